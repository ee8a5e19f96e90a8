"""Both arms are timed on the same work, in turn, and summed up without assumptions about the distribution."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from scipy.stats import binom
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GemmaConfig, GemmaForCausalLM, PreTrainedModel

from spath_eval.pathways import GateError
from spath_eval.speed.timing import (
    COMPILED,
    EAGER,
    Arm,
    PairedTimes,
    Part,
    Pass,
    PhaseTimes,
    Stop,
    Workload,
    peak_memory,
    take_turns,
)
from spath_eval.speed.timing import measure as measure_all


def measure(model: PreTrainedModel, sparse: Any, workload: Workload, *, seed: int = 0, **stop: Any) -> PairedTimes:
    """Of eager execution."""
    return measure_all(model, sparse, workload, Stop(**stop), seed=seed)[EAGER]


WORKLOAD = Workload(batch=2, tokens=6, new_tokens=3)
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    """Threads of a busy machine wait for each other far longer than these models take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return GemmaForCausalLM(GemmaConfig(**SIZES)).eval()


class Spy:
    """Notes in which arm, with which tokens and with how long a cache each forward ran."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.arm = "dense"
        self.calls: list[tuple[str, torch.Tensor, int, int]] = []
        self.collecting: set[bool] = set()
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        cached = kwargs["cache"].get_seq_length() if "cache" in kwargs else 0
        self.calls.append((self.arm, kwargs["input_ids"], cached, kwargs["attention_mask"].shape[1]))
        self.collecting.add(gc.isenabled())

    @contextmanager
    def sparse(self) -> Iterator[None]:
        assert not torch.is_inference_mode_enabled(), "weights sliced here would be unusable outside inference mode"
        self.arm = "sparse"
        try:
            yield
        finally:
            self.arm = "dense"

    def passes(self) -> list[str]:
        """The arm of each prefill."""
        return [arm for arm, ids, _, _ in self.calls if ids.shape[1] > 1]


def test_arms_alternate_their_order_from_round_to_round(model: PreTrainedModel) -> None:
    spy = Spy(model)
    measure(model, spy.sparse, WORKLOAD, seconds=0, min_rounds=4)
    warm_up, rounds = spy.passes()[:2], spy.passes()[2:]
    assert sorted(warm_up) == ["dense", "sparse"]
    assert rounds == ["dense", "sparse", "sparse", "dense"] * 2
    assert spy.arm == "dense"


def test_every_pass_is_one_prefill_and_a_fixed_number_of_cached_steps_on_the_same_prompt(
    model: PreTrainedModel,
) -> None:
    spy = Spy(model)
    measure(model, spy.sparse, WORKLOAD, seconds=0, min_rounds=2, seed=3)
    prompt = spy.calls[0][1]
    assert prompt.shape == (2, 6)
    assert int(prompt.max()) < 64
    for start in range(0, len(spy.calls), 4):
        prefill, *steps = spy.calls[start : start + 4]
        assert torch.equal(prefill[1], prompt)
        assert prefill[2:] == (0, 6)
        assert [(tuple(ids.shape), cached, seen) for _, ids, cached, seen in steps] == [
            ((2, 1), 6, 7),
            ((2, 1), 7, 8),
            ((2, 1), 8, 9),
        ]
    assert len(spy.calls) == 4 * 2 * (1 + 2)


def test_decoding_is_greedy_and_equals_uncached_forwards(model: PreTrainedModel) -> None:
    spy = Spy(model)
    measure(model, spy.sparse, WORKLOAD, seconds=0, min_rounds=1)
    tokens = torch.cat([ids for _, ids, _, _ in spy.calls[:4]], dim=1)
    with torch.inference_mode():
        uncached = torch.stack([model.model(tokens[:, :length]).last_hidden_state[:, -1] for length in (6, 7, 8)], 1)
        assert torch.equal(tokens[:, 6:], model.lm_head(uncached).argmax(-1))


def test_prompt_depends_on_the_seed_only(model: PreTrainedModel) -> None:
    spy = Spy(model)
    for seed in (0, 0, 1):
        torch.manual_seed(torch.seed())
        measure(model, spy.sparse, Workload(tokens=50, new_tokens=1), seconds=0, min_rounds=1, seed=seed)
    first, second, third = (ids for _, ids, _, _ in spy.calls[::8])
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_rounds_keep_within_bounds(model: PreTrainedModel) -> None:
    spy = Spy(model)
    assert measure(model, spy.sparse, WORKLOAD, seconds=0, min_rounds=3).prefill.rounds == 3
    assert measure(model, spy.sparse, WORKLOAD, seconds=60, min_rounds=1, max_rounds=4).decode.rounds == 4
    for bounds in ((0, 5), (6, 5)):
        with pytest.raises(ValueError, match="min_rounds"):
            Stop(min_rounds=bounds[0], max_rounds=bounds[1])


def test_times_are_positive_and_paired(model: PreTrainedModel) -> None:
    times = measure(model, Spy(model).sparse, WORKLOAD, seconds=0, min_rounds=3)
    for phase in (times.prefill, times.decode):
        assert len(phase.dense_seconds) == len(phase.sparse_seconds) == phase.rounds == 3
        assert min(phase.dense_seconds + phase.sparse_seconds) > 0
        assert min(phase.ratios) <= phase.ratio <= max(phase.ratios)


def test_garbage_collection_is_off_while_timing_and_as_before_afterwards(model: PreTrainedModel) -> None:
    spy = Spy(model)
    measure(model, spy.sparse, WORKLOAD, seconds=0, min_rounds=1)
    assert spy.collecting == {False}
    assert gc.isenabled()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        measure(model, spy.sparse, WORKLOAD)
    assert gc.isenabled()
    assert spy.arm == "dense"


def test_a_prompt_longer_than_the_sliding_window_is_timed() -> None:
    config = Gemma3TextConfig(**SIZES, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    model = Gemma3ForCausalLM(config).eval()
    assert measure(model, Spy(model).sparse, WORKLOAD, seconds=0, min_rounds=1).decode.rounds == 1


def test_workload_must_be_positive() -> None:
    for field in ("batch", "tokens", "new_tokens"):
        with pytest.raises(ValueError, match=field):
            Workload(**{field: 0})


@pytest.mark.parametrize("rounds", [6, 9, 10, 25, 50])
def test_interval_of_the_median_is_the_narrowest_pair_of_order_statistics_that_covers_it(rounds: int) -> None:
    sparse = [1 + (7 * index % rounds) / rounds for index in range(rounds)]
    phase = PhaseTimes((3.0,) * rounds, tuple(sparse))
    # The k-th and the (n + 1 - k)-th smallest miss the median with probability 2 P(Binomial(n, 1/2) < k).
    k = max(k for k in range(1, rounds) if 2 * binom.cdf(k - 1, rounds, 0.5) <= 0.05)
    ordered = sorted(3.0 / value for value in sparse)
    assert phase.ci95 == pytest.approx((ordered[k - 1], ordered[rounds - k]))
    assert phase.ratio == pytest.approx((ordered[(rounds - 1) // 2] + ordered[rounds // 2]) / 2)


def test_interval_of_few_rounds_is_their_range() -> None:
    assert PhaseTimes((2.0,), (1.0,)).ci95 == (2.0, 2.0)
    assert PhaseTimes((2.0, 1.0, 3.0, 1.0, 1.0), (1.0,) * 5).ci95 == (1.0, 3.0)


def counting(values: list[float]) -> Arm:
    """An arm of one phase that takes as long as it is told, the last value again and again."""
    return Arm(lambda: [values.pop(0) if len(values) > 1 else values[0]])


def test_rounds_end_when_every_interval_is_narrow_enough() -> None:
    noisy = [0.0, *(1.0 + number % 2 for number in range(12)), 1.0]
    stop = Stop(seconds=60, precision=0.02, max_rounds=500)
    rounds = take_turns({EAGER: counting([2.0])}, {EAGER: counting(noisy), "other": counting([1.0])}, stop)
    assert rounds.precision <= 0.02
    assert 12 < rounds.compared(EAGER, 0).rounds < 100
    assert take_turns({EAGER: counting([2.0])}, {EAGER: counting([1.0])}, stop).compared(EAGER, 0).rounds == 6


def test_rounds_end_with_the_time_budget_however_wide_the_interval_is() -> None:
    stop = Stop(seconds=0, precision=0.02, max_rounds=500)
    wide = take_turns({EAGER: counting([1.0])}, {EAGER: counting([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])}, stop)
    assert wide.compared(EAGER, 0).rounds == 6
    assert wide.precision > 0.02


def test_intervals_are_looked_at_ever_more_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    from spath_eval.speed import timing

    looks: list[int] = []

    def precision(self: timing.Rounds) -> float:
        looks.append(len(self.dense[EAGER]))
        return 1.0

    monkeypatch.setattr(timing.Rounds, "precision", property(precision))
    take_turns({EAGER: counting([1.0])}, {EAGER: counting([1.0])}, Stop(seconds=60, precision=0.1, max_rounds=60))
    assert looks == [6, 8, 10, 12, 15, 18, 22, 27, 33, 40, 48, 58]


def test_a_sparse_arm_is_compared_with_the_fastest_dense_one_phase_by_phase() -> None:
    dense = {EAGER: Arm(lambda: [2.0, 5.0]), COMPILED: Arm(lambda: [3.0, 4.0])}
    rounds = take_turns(dense, {EAGER: Arm(lambda: [1.0, 2.0])}, Stop(seconds=0, min_rounds=2))
    prefill, decode = (rounds.compared(EAGER, phase) for phase in (0, 1))
    assert (prefill.ratio, prefill.dense_arm, prefill.others) == (2.0, EAGER, {COMPILED: (3.0, 3.0)})
    assert (decode.ratio, decode.dense_arm, decode.others) == (2.0, COMPILED, {EAGER: (5.0, 5.0)})


def test_precision_is_the_width_of_the_interval_relative_to_the_ratio() -> None:
    phase = PhaseTimes((2.0, 1.0, 3.0), (1.0,) * 3)
    assert phase.precision == (3.0 - 1.0) / 2.0


def test_parts_of_a_batch_take_turns_step_by_step_in_contexts_of_their_own(model: PreTrainedModel) -> None:
    spy = Spy(model)
    first, second = torch.arange(6)[None], torch.arange(12).reshape(2, 6)

    @contextmanager
    def other() -> Iterator[None]:
        spy.arm = "sparse"
        yield
        spy.arm = "dense"

    Pass(model, [Part(first), Part(second, other)], 2)()
    assert [arm for arm, *_ in spy.calls] == ["dense", "sparse"] * 3
    assert [tuple(ids.shape) for _, ids, _, _ in spy.calls] == [(1, 6), (2, 6), *[(1, 1), (2, 1)] * 2]
    assert [cached for _, _, cached, _ in spy.calls] == [0, 0, 6, 6, 7, 7]
    assert [seen for *_, seen in spy.calls] == [6, 6, 7, 7, 8, 8]


class HalfFFNs:
    """The model with the second half of each FFN's neurons sliced out."""

    def __init__(self, model: PreTrainedModel) -> None:
        from spath_eval.contracts import FFN
        from spath_eval.masks import Mask
        from spath_eval.pathways import StaticPathway
        from spath_eval.sites import find_sites

        sites = find_sites(model, (FFN("model.layers.*.mlp"),))
        mask = Mask({site.path: torch.arange(site.width) < site.width // 2 for site in sites})
        self.applied = StaticPathway(sites, mask, "compact").applied


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are captured, but not turned into machine code, which takes long."""
    from spath_eval.speed import timing

    monkeypatch.setattr(
        timing, "compiled", lambda function, device: torch.compile(function, backend="eager", dynamic=False)
    )


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("windows", [False, True])
def test_compiled_arms_compute_what_eager_ones_do(model: PreTrainedModel, windows: bool) -> None:
    if windows:
        config = Gemma3TextConfig(**SIZES, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
        model = Gemma3ForCausalLM(config).eval()
    from spath_eval.speed.timing import CompiledPass

    prompt = torch.arange(12).reshape(2, 6)
    seen: list[list[torch.Tensor]] = []
    for one in (Pass(model, [Part(prompt)], 3), CompiledPass(model, prompt, 3)):
        logits: list[torch.Tensor] = []
        forward = one._forward
        one._forward = lambda *inputs, f=forward, into=logits: (r := f(*inputs), into.append(r[0]))[0]  # type: ignore
        for _ in range(2):  # the second time on the same cache
            one()
        seen.append(logits)
    for eager, compiled in zip(*seen, strict=True):
        assert torch.allclose(eager, compiled, atol=1e-5)


@pytest.mark.usefixtures("without_inductor")
def test_both_executions_are_timed_and_compared_with_both_dense_ones(model: PreTrainedModel) -> None:
    times = measure_all(model, HalfFFNs(model).applied, WORKLOAD, Stop(seconds=0, min_rounds=2), compiled=True)
    assert list(times) == [EAGER, COMPILED]
    for paired in times.values():
        for phase in (paired.prefill, paired.decode):
            assert {phase.dense_arm, *phase.others} == {EAGER, COMPILED}
            assert len(phase.sparse_seconds) == phase.rounds == 2


def test_compiled_code_that_runs_dense_is_found_out(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from copy import deepcopy

    from spath_eval.speed import timing

    dense = deepcopy(model)
    monkeypatch.setattr(timing, "compiled", lambda function, device: dense)
    half = HalfFFNs(model)
    with pytest.raises(GateError, match="compiled, the sparse arm does not compute"):
        measure_all(model, half.applied, WORKLOAD, Stop(seconds=0, min_rounds=1), compiled=True)


def test_peak_memory_is_that_of_an_arm_alone(model: PreTrainedModel) -> None:
    weights = {"dense": 1000, "sparse": 600}
    small, large = (peak_memory(model, HalfFFNs(model).applied, Workload(batch, 32, 2), weights) for batch in (1, 8))
    assert small.dense > 1000
    # the largest of what a forward allocates at once grows with the batch, and is smaller where FFNs are narrower
    assert 5 < (large.dense - 1000) / (small.dense - 1000) < 9
    assert large.dense - large.sparse > 400
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        pass  # a profiler can still be used
