"""Times a model dense and sparse, interleaved in one process, in prefill and in decode.

What disturbs a machine (other load, clocks, heat) drifts slowly, so each round runs both arms back to back on the same
tokens, in an order that alternates from round to round, and only the ratio within a round is interpreted. Lengths are
fixed, decoding is greedy and never stops early: both arms do the same number of steps of the same shape.
"""

from __future__ import annotations

import gc
import inspect
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from scipy.stats import quantile_test

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spath_eval.speed.ceilings import Ceiling


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
class PhaseTimes:
    """One phase in both arms, one value per round: seconds per prefill, or seconds per decode step."""

    dense_seconds: tuple[float, ...]
    sparse_seconds: tuple[float, ...]

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


@dataclass(frozen=True)
class PeakMemory:
    """Most bytes allocated on the device at once during prefill and decode, all that lies there included.

    Dense weights that the sparse arm keeps to swap back are in both figures.
    """

    dense: int
    sparse: int


@dataclass(frozen=True)
class PairedTimes:
    """Both phases of a workload, dense and sparse."""

    prefill: PhaseTimes
    """Time to the first new token: one forward over the prompt."""
    decode: PhaseTimes
    """Mean time per further token over `Workload.new_tokens` steps."""
    peak_memory: PeakMemory | None
    """None on a CPU, where it is not counted."""


def measure(
    model: PreTrainedModel,
    sparse: Callable[[], AbstractContextManager[Any]],
    workload: Workload,
    *,
    seconds: float = 2.0,
    min_rounds: int = 6,
    max_rounds: int = 50,
    seed: int = 0,
) -> PairedTimes:
    """Time the causal language model `model` as it is, and within `sparse()`, on the same random tokens.

    Each arm is warmed up once; then rounds follow until `seconds` are used, at least `min_rounds` and at most
    `max_rounds`. Entering and leaving `sparse()` is never timed. Raises `ValueError` where `min_rounds` is below 1 or
    above `max_rounds`, or where the model is neither on a CPU nor on a CUDA device.
    """
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(f"rounds must satisfy 1 <= min_rounds <= max_rounds, not {min_rounds} and {max_rounds}")
    if model.device.type not in ("cpu", "cuda"):
        raise ValueError(f"timing needs a model on a CPU or a CUDA device, not on {model.device}")
    prompt = _random_tokens(model, workload, seed)
    arms: dict[str, Callable[[], AbstractContextManager[Any]]] = {"dense": nullcontext, "sparse": sparse}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}

    for context in arms.values():
        with context():
            _time_once(model, prompt, workload)
    started = time.perf_counter()
    for round_ in range(max_rounds):
        if round_ >= min_rounds and time.perf_counter() - started >= seconds:
            break
        for name in arms if round_ % 2 == 0 else reversed(arms):
            with arms[name]():
                times[name].append(_time_once(model, prompt, workload))

    prefill, decode = (
        PhaseTimes(tuple(arm[phase] for arm in times["dense"]), tuple(arm[phase] for arm in times["sparse"]))
        for phase in (0, 1)
    )
    return PairedTimes(prefill, decode, _peak_memory(model, arms, prompt, workload))


def record_entry(subject: str, times: PairedTimes, ceiling: Ceiling, workload: Workload) -> dict[str, Any]:
    """One entry of a case's `speed` in the record; `subject` says what was timed, e.g. `model`."""

    def phase(phase_times: PhaseTimes, limit: float) -> dict[str, Any]:
        return {
            "ratio": phase_times.ratio,
            "ci95": list(phase_times.ci95),
            "ceiling": limit,
            "dense_seconds": list(phase_times.dense_seconds),
            "sparse_seconds": list(phase_times.sparse_seconds),
            "rounds": phase_times.rounds,
            "batch": workload.batch,
            "tokens": workload.tokens,
        }

    entry: dict[str, Any] = {
        "subject": subject,
        "prefill": phase(times.prefill, ceiling.prefill),
        "decode": phase(times.decode, ceiling.decode) | {"new_tokens": workload.new_tokens},
        "peak_memory": None,
    }
    if times.peak_memory is None:
        entry["peak_memory_reason"] = "not counted on a CPU"
    else:
        entry["peak_memory"] = {"dense": times.peak_memory.dense, "sparse": times.peak_memory.sparse}
    return entry


def _random_tokens(model: PreTrainedModel, workload: Workload, seed: int) -> torch.Tensor:
    """Token ids `[batch, tokens]` on the model's device, equal for equal seeds whatever the device."""
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (workload.batch, workload.tokens), generator=generator).to(model.device)


def _time_once(model: PreTrainedModel, prompt: torch.Tensor, workload: Workload) -> tuple[float, float]:
    """Seconds of the prefill of `prompt`, and seconds per decode step after it."""
    attention_mask = prompt.new_ones(workload.batch, workload.tokens + workload.new_tokens)
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    stopwatch = _CudaStopwatch(model.device) if model.device.type == "cuda" else _WallStopwatch()

    with torch.inference_mode(), _garbage_collection_off():
        stopwatch.mark()
        output = model(input_ids=prompt, attention_mask=attention_mask[:, : workload.tokens], **options)
        token = output.logits[:, -1:].argmax(-1)
        stopwatch.mark()
        for length in range(workload.tokens + 1, workload.tokens + workload.new_tokens + 1):
            output = model(
                input_ids=token,
                attention_mask=attention_mask[:, :length],
                cache=output.cache,
                **options,
            )
            token = output.logits[:, -1:].argmax(-1)
        stopwatch.mark()
        prefill, decode = stopwatch.laps()
    return prefill, decode / workload.new_tokens


class _WallStopwatch:
    """Marks by the processor's clock."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Seconds between successive marks."""
        return [after - before for before, after in zip(self._marks, self._marks[1:], strict=False)]


class _CudaStopwatch:
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
def _garbage_collection_off() -> Iterator[None]:
    """A collection in one arm and not in the other would be read as a difference."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _peak_memory(
    model: PreTrainedModel,
    arms: dict[str, Callable[[], AbstractContextManager[Any]]],
    prompt: torch.Tensor,
    workload: Workload,
) -> PeakMemory | None:
    """Peak bytes of one more pass of each arm."""
    if model.device.type != "cuda":
        return None
    peaks: dict[str, int] = {}
    for name, context in arms.items():
        with context():
            torch.cuda.reset_peak_memory_stats(model.device)
            _time_once(model, prompt, workload)
            peaks[name] = torch.cuda.max_memory_allocated(model.device)
    return PeakMemory(**peaks)
