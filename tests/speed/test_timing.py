"""Both arms are timed on the same work, in turn, and summed up without assumptions about the distribution."""

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from scipy.stats import binom
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GemmaConfig, GemmaForCausalLM, PreTrainedModel

from spath_eval.speed.ceilings import Ceiling
from spath_eval.speed.timing import PairedTimes, PeakMemory, PhaseTimes, Workload, measure, record_entry

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
            measure(model, spy.sparse, WORKLOAD, min_rounds=bounds[0], max_rounds=bounds[1])


def test_times_are_positive_and_paired(model: PreTrainedModel) -> None:
    times = measure(model, Spy(model).sparse, WORKLOAD, seconds=0, min_rounds=3)
    for phase in (times.prefill, times.decode):
        assert len(phase.dense_seconds) == len(phase.sparse_seconds) == phase.rounds == 3
        assert min(phase.dense_seconds + phase.sparse_seconds) > 0
        assert min(phase.ratios) <= phase.ratio <= max(phase.ratios)
    assert times.peak_memory is None


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


def test_record_entry_has_the_records_fields() -> None:
    times = PairedTimes(PhaseTimes((2.0, 3.0), (1.0, 1.0)), PhaseTimes((1.5, 1.0), (1.0, 1.0)), None)
    entry = record_entry("model", times, Ceiling(prefill=3.0, decode=1.4), WORKLOAD)
    shared = {"sparse_seconds": [1.0, 1.0], "rounds": 2, "batch": 2, "tokens": 6}
    assert entry == {
        "subject": "model",
        "prefill": {"ratio": 2.5, "ci95": [2.0, 3.0], "ceiling": 3.0, "dense_seconds": [2.0, 3.0], **shared},
        "decode": {
            "ratio": 1.25,
            "ci95": [1.0, 1.5],
            "ceiling": 1.4,
            "dense_seconds": [1.5, 1.0],
            "new_tokens": 3,
            **shared,
        },
        "peak_memory": None,
        "peak_memory_reason": "not counted on a CPU",
    }
    assert not any(math.isnan(value) for value in entry["decode"]["ci95"])
    on_gpu = PairedTimes(times.prefill, times.decode, PeakMemory(dense=10, sparse=12))
    entry = record_entry("model", on_gpu, Ceiling(1.0, 1.0), WORKLOAD)
    assert entry["peak_memory"] == {"dense": 10, "sparse": 12}
    assert "peak_memory_reason" not in entry
