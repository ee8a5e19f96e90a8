"""What was timed, in the form of the record's `speed`: figures with their raw values, ceilings and flagged faults."""

from __future__ import annotations

from typing import Any

from spath_eval.speed.ceilings import Bound
from spath_eval.speed.timing import PairedTimes, PhaseTimes, Workload


def speed_entry(
    subject: str,
    times: PairedTimes,
    bounds: tuple[Bound, Bound],
    workload: Workload,
    *,
    exceeds_cache: bool,
    precision: float | None = None,
) -> dict[str, Any]:
    """The entry of a model in prefill and decode; `subject` says what was timed, e.g. `model`.

    `exceeds_cache` says whether the weights of both arms are larger than the last-level cache, and `precision` how
    narrow intervals were to become, relative to their ratios.
    """
    shared: dict[str, Any] = {"exceeds_cache": exceeds_cache, "precision": precision, "batch": workload.batch}
    prefill, decode = bounds
    return {
        "subject": subject,
        "prefill": timing_entry(times.prefill, prefill, tokens=workload.tokens, **shared),
        "decode": timing_entry(times.decode, decode, tokens=workload.tokens, **shared)
        | {"new_tokens": workload.new_tokens},
    }


def timing_entry(
    times: PhaseTimes, bound: Bound, *, batch: int, tokens: int, exceeds_cache: bool, precision: float | None = None
) -> dict[str, Any]:
    """One phase: seconds, ratio and ceiling, and `fault` where the ratio is more than what was removed can give.

    A ratio is a fault where its interval lies above what removing work gives whatever limits the device, and no cache
    explains that: with weights smaller than it, the sparse arm may run from a cache that the dense one overflows. What
    remains is a dense arm that was disturbed, or whose products have a width that is slow on the device.
    """
    low, high = times.ci95
    entry: dict[str, Any] = {
        "ratio": times.ratio,
        "ci95": [low, high],
        "ceiling": bound.ceiling,
        "limit": bound.limit,
        "ffn_share": bound.ffn_share,
        "dense_seconds": list(times.dense_seconds),
        "sparse_seconds": list(times.sparse_seconds),
        "rounds": times.rounds,
        "batch": batch,
        "tokens": tokens,
    }
    if bound.least_seconds is not None:
        dense, sparse = bound.least_seconds
        entry["least_seconds"] = {"dense": dense, "sparse": sparse}
    if precision is not None:
        entry["precision"] = {"requested": precision, "reached": times.precision <= precision}
    if times.others:
        entry["dense_execution"] = times.dense_arm
        entry["other_dense_seconds"] = {name: list(seconds) for name, seconds in times.others.items()}
    if low > bound.limit and exceeds_cache:
        entry["fault"] = (
            f"the ratio is above {low:.3f}, where counting allows {bound.limit:.3f} and no cache explains more: "
            "the dense arm took longer for each operation or byte than the sparse one"
        )
    return entry
