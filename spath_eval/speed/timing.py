"""Times ways to run a model, dense and sparse, which take turns in one process, in prefill and in decode.

What disturbs a machine (other load, clocks, heat) drifts slowly, so each round runs all arms back to back on the same
tokens, in an order that is reversed from round to round, and only ratios within a round are interpreted. Lengths are
fixed, decoding is greedy and never stops early: all arms do the same number of steps of the same shape. A sparse arm is
compared with the fastest dense one.
"""

from __future__ import annotations

import gc
import inspect
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import torch
from scipy.stats import quantile_test
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import StaticCache

from spath_eval.pathways import GateError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Context = Callable[[], AbstractContextManager[Any]]
EAGER, COMPILED = "eager", "compiled"


@dataclass(frozen=True)
class Workload:
    """What is timed: a prompt of fixed length, then a fixed number of single-token steps. Each is at least 1."""

    batch: int = 1
    """Sequences at a time."""
    tokens: int = 128
    """Tokens of the prompt."""
    new_tokens: int = 16
    """Decode steps after it."""

    def __post_init__(self) -> None:
        if min(self.batch, self.tokens, self.new_tokens) < 1:
            raise ValueError(f"batch, tokens and new_tokens must be at least 1: {self}")


@dataclass(frozen=True)
class Stop:
    """When rounds end: at the first of these."""

    seconds: float = 2.0
    """Since the first round."""
    precision: float | None = None
    """Where given: no 95% interval is wider, relative to its ratio."""
    min_rounds: int = 6
    """Rounds that there are in any case."""
    max_rounds: int = 50

    def __post_init__(self) -> None:
        if not 1 <= self.min_rounds <= self.max_rounds:
            raise ValueError(f"rounds must satisfy 1 <= min_rounds <= max_rounds: {self}")


@dataclass(frozen=True)
class PhaseTimes:
    """One phase in both arms, one value per round: seconds per prefill, or seconds per decode step."""

    dense_seconds: tuple[float, ...]
    sparse_seconds: tuple[float, ...]
    others: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """What slower dense arms took, by their names."""
    dense_arm: str = EAGER
    """The dense arm, where there were several the one whose median was least."""

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return len(self.dense_seconds)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Dense over sparse per round; above 1 the sparse arm is faster."""
        return tuple(dense / sparse for dense, sparse in zip(self.dense_seconds, self.sparse_seconds, strict=True))

    @property
    def ratio(self) -> float:
        """The median of `ratios`."""
        return statistics.median(self.ratios)

    @property
    def ci95(self) -> tuple[float, float]:
        """Distribution-free 95% interval of the median ratio, from its order statistics (the inverted sign test).

        With fewer than 6 rounds no order statistics reach 95%: the interval is then the smallest and largest ratio,
        which cover the median with probability 1 - 2**(1 - rounds) only. Source: Conover, Practical Nonparametric
        Statistics, 3rd edition, section 3.2.
        """
        if self.rounds < 6:
            return min(self.ratios), max(self.ratios)
        interval: Any = quantile_test(self.ratios, p=0.5).confidence_interval(0.95)
        return float(interval.low), float(interval.high)

    @property
    def precision(self) -> float:
        """The width of the interval, relative to the ratio."""
        low, high = self.ci95
        return (high - low) / self.ratio


@dataclass(frozen=True)
class PeakMemory:
    """Most bytes at once during prefill and decode, of an arm that would be alone in memory: its weights, and what was
    allocated on top of what lay there before."""

    dense: int
    sparse: int


@dataclass(frozen=True)
class PairedTimes:
    """Both phases of a workload, dense and sparse."""

    prefill: PhaseTimes
    """Time to the first new token: one forward over the prompt."""
    decode: PhaseTimes
    """Mean time per further token over `Workload.new_tokens` steps."""


@dataclass(frozen=True)
class Arm:
    """One way to do the work."""

    run: Callable[[], Sequence[float]]
    """Does it once and returns the seconds of each phase."""
    within: Context = nullcontext
    """Entered before and left after each run, untimed."""
    warm_ups: int = 1
    """Runs before the first round."""


@dataclass(frozen=True)
class Rounds:
    """What arms took, by their names: seconds by round and phase."""

    dense: Mapping[str, Sequence[Sequence[float]]]
    sparse: Mapping[str, Sequence[Sequence[float]]]

    @property
    def phases(self) -> int:
        """Number of phases."""
        return len(next(iter(self.sparse.values()))[0])

    def compared(self, arm: str, phase: int) -> PhaseTimes:
        """A sparse arm in one phase, beside the fastest dense one."""
        dense = {name: tuple(run[phase] for run in runs) for name, runs in self.dense.items()}
        fastest = min(dense, key=lambda name: statistics.median(dense[name]))
        chosen = dense.pop(fastest)
        return PhaseTimes(chosen, tuple(run[phase] for run in self.sparse[arm]), dense, fastest)

    @property
    def precision(self) -> float:
        """The widest interval of all ratios, relative to its ratio."""
        return max(self.compared(arm, phase).precision for arm in self.sparse for phase in range(self.phases))


def take_turns(dense: Mapping[str, Arm], sparse: Mapping[str, Arm], stop: Stop) -> Rounds:
    """Warm every arm up, then run all of them in rounds until `stop`.

    Whoever stops at the first narrow interval of many looks finds one by chance: after the first look, at 6 rounds,
    each is about a fifth later.
    """
    arms = [*dense.values(), *sparse.values()]
    taken: list[list[Sequence[float]]] = [[] for _ in arms]
    rounds = Rounds(dict(zip(dense, taken, strict=False)), dict(zip(sparse, taken[len(dense) :], strict=True)))
    for arm in arms:
        with arm.within():
            for _ in range(arm.warm_ups):
                arm.run()
    started = time.perf_counter()
    next_look = max(stop.min_rounds, 6)
    for number in range(stop.max_rounds):
        if number >= stop.min_rounds and time.perf_counter() - started >= stop.seconds:
            break
        order = list(range(len(arms)) if number % 2 == 0 else reversed(range(len(arms))))
        if stop.precision is not None and number == next_look:
            if rounds.precision <= stop.precision:
                break
            next_look = math.ceil(1.2 * next_look)
            with arms[order[0]].within():
                arms[order[0]].run()  # the look left caches cold, which only the first arm would feel
        for index in order:
            with arms[index].within():
                taken[index].append(arms[index].run())
    return rounds


@dataclass(frozen=True)
class Part:
    """Sequences of a batch that run together."""

    prompt: Tensor
    """Token ids `[sequences, tokens]`."""
    within: Context = nullcontext
    """Entered before and left after each of its forwards, in inference mode, and timed with it."""


def measure(
    model: PreTrainedModel, sparse: Context, workload: Workload, stop: Stop, *, compiled: bool = False, seed: int = 0
) -> dict[str, PairedTimes]:
    """Time the causal language model `model` as it is, and within `sparse()`, on the same random tokens.

    The result has an entry for each sparse arm: `eager`, and where asked for `compiled`. Entering and leaving
    `sparse()` is never timed. Raises `ValueError` where the model is neither on a CPU nor on a CUDA device, and
    `GateError` where compiled code does not compute what the model does.
    """
    if model.device.type not in ("cpu", "cuda"):
        raise ValueError(f"timing needs a model on a CPU or a CUDA device, not on {model.device}")
    prompt = random_tokens(model, workload.batch, workload.tokens, seed)
    if compiled:
        torch.compiler.reset()  # or what earlier workloads compiled would count towards the limit of recompilations

    def passes() -> dict[str, Pass]:
        eager = {EAGER: Pass(model, [Part(prompt)], workload.new_tokens)}
        return eager | ({COMPILED: CompiledPass(model, prompt, workload.new_tokens)} if compiled else {})

    dense, pruned = passes(), passes()
    rounds = take_turns(
        {name: Arm(one, warm_ups=one.warm_ups) for name, one in dense.items()},
        {name: Arm(one, sparse, one.warm_ups) for name, one in pruned.items()},
        stop,
    )
    if compiled:
        _check_compiled(dense, pruned)
    return {name: PairedTimes(rounds.compared(name, 0), rounds.compared(name, 1)) for name in rounds.sparse}


def peak_memory(model: PreTrainedModel, sparse: Context, workload: Workload, weights: Mapping[str, int]) -> PeakMemory:
    """The peaks of one eager pass of each arm, whose weights take `weights["dense"]` and `weights["sparse"]` bytes.

    On a CPU they are those of torch's allocator, which torch's profiler watches.
    """
    one = Pass(model, [Part(random_tokens(model, workload.batch, workload.tokens, 0))], workload.new_tokens)
    peaks = {}
    for side, context in {"dense": nullcontext, "sparse": sparse}.items():
        with context():
            peaks[side] = weights[side] + _most_allocated(model, one)
    return PeakMemory(**peaks)


def random_tokens(model: PreTrainedModel, sequences: int, tokens: int, seed: int) -> Tensor:
    """Token ids `[sequences, tokens]` on the model's device, equal for equal seeds whatever the device."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (sequences, tokens), generator=generator).to(model.device)


class Pass:
    """Prefill and decode of a batch, step by step through all of its parts.

    A call returns the seconds of the prefill and, on average, of a decode step.
    """

    warm_ups = 1

    def __init__(self, model: PreTrainedModel, parts: Sequence[Part], new_tokens: int) -> None:
        self.model, self.parts, self.new_tokens = model, parts, new_tokens
        self._seen = [part.prompt.new_ones(len(part.prompt), part.prompt.shape[1] + new_tokens) for part in parts]
        self.first_logits: Tensor | None = None
        """Those of the first forward of all, `[sequences, 1, vocabulary]`."""
        self._options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            self._options["logits_to_keep"] = 1

    def __call__(self) -> tuple[float, float]:
        with torch.inference_mode(), garbage_collection_off():
            return self._timed()

    def _timed(self) -> tuple[float, float]:
        stopwatch = start_stopwatch(self.model.device)
        tokens = [part.prompt for part in self.parts]
        caches: list[Any] = [None] * len(self.parts)
        length = tokens[0].shape[1]
        for step in range(self.new_tokens + 1):
            for index, part in enumerate(self.parts):
                with part.within():
                    seen = self._seen[index][:, : length + step]
                    logits, caches[index] = self._forward(tokens[index], seen, caches[index])
                    tokens[index] = logits.argmax(-1)
            if step == 0:
                stopwatch.mark()
        stopwatch.mark()
        prefill, decode = stopwatch.laps()
        return prefill, decode / self.new_tokens

    def _forward(self, tokens: Tensor, seen: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """The logits of the last position `[sequences, 1, vocabulary]`, and the cache with `tokens` in it."""
        own = {} if cache is None else {"cache": cache}
        output = self.model(input_ids=tokens, attention_mask=seen, **own, **self._options)
        return self._kept(output.logits[:, -1:]), output.cache

    def _kept(self, logits: Tensor) -> Tensor:
        if self.first_logits is None:
            self.first_logits = logits.float().clone()
        return logits


class CompiledPass(Pass):
    """The same, compiled; on a CUDA device as CUDA graphs. The KV cache has a fixed size, without which there are none,
    and the attention mask follows from it."""

    warm_ups = 3
    """CUDA graphs are compiled in the first, recorded in the second and replayed from the third on."""

    def __init__(self, model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> None:
        super().__init__(model, [Part(prompt)], new_tokens)
        self._graphs = model.device.type == "cuda"
        self._compiled = compiled(model.__call__, model.device)
        self._cache = StaticCache(config=model.config, max_cache_len=prompt.shape[1] + new_tokens)

    def __call__(self) -> tuple[float, float]:
        with torch.no_grad(), garbage_collection_off():
            if not self._cache.is_initialized:  # compiled code could not mark its addresses as fixed
                self.model(input_ids=self.parts[0].prompt[:, :1], cache=self._cache, use_cache=True)
            self._cache.reset()
            return self._timed()

    def _forward(self, tokens: Tensor, seen: Tensor, cache: Any) -> tuple[Tensor, Any]:
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        output = self._compiled(input_ids=tokens, cache=self._cache, **self._options)
        return self._kept(output.logits[:, -1:]), self._cache


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`function`, compiled for fixed shapes; on a CUDA device as CUDA graphs."""
    mode = "reduce-overhead" if device.type == "cuda" else None
    return torch.compile(function, mode=mode, dynamic=False)


def start_stopwatch(device: torch.device) -> WallStopwatch | CudaStopwatch:
    """A stopwatch with its first mark."""
    stopwatch = CudaStopwatch(device) if device.type == "cuda" else WallStopwatch()
    stopwatch.mark()
    return stopwatch


class WallStopwatch:
    """Marks by the processor's clock."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Seconds between successive marks."""
        return [after - before for before, after in zip(self._marks, self._marks[1:], strict=False)]


class CudaStopwatch:
    """Marks by events in the device's stream, read after one synchronisation.

    An arm starts on an idle device, because the arm before it has been read: were both read together, the second
    one's launches would hide behind the work that the first one left queued.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[torch.cuda.Event] = []
        torch.cuda.synchronize(device)

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def laps(self) -> list[float]:
        """Seconds between successive marks."""
        torch.cuda.synchronize(self._device)
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


@contextmanager
def garbage_collection_off() -> Iterator[None]:
    """A collection in one arm and not in the other would be read as a difference."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check_compiled(dense: Mapping[str, Pass], sparse: Mapping[str, Pass]) -> None:
    """Raise `GateError` unless each compiled arm is nearer to its own eager arm than to the other one."""
    eager = [cast(Tensor, arms[EAGER].first_logits) for arms in (dense, sparse)]
    if torch.equal(*eager):
        return
    for own, name in enumerate(("dense", "sparse")):
        logits = cast(Tensor, (dense, sparse)[own][COMPILED].first_logits)
        away = [float((logits - other).norm()) for other in eager]
        if not away[own] < away[1 - own]:  # so that NaN fails
            raise GateError(f"compiled, the {name} arm does not compute what it computes eagerly")


def _most_allocated(model: PreTrainedModel, run: Callable[[], object]) -> int:
    """The most bytes that `run` has allocated at once, over all devices that the model is on."""
    if model.device.type == "cuda":
        devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
        before = sum(map(torch.cuda.memory_allocated, devices))
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        run()
        return sum(map(torch.cuda.max_memory_allocated, devices)) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler says on stderr that it starts and stops
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        run()
    events: Any = watched.profiler.kineto_results.events() if watched.profiler else []
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate((change for _, change in changes), initial=0))
