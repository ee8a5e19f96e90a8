"""Entries have the record's fields, and a fault is flagged where nothing explains a ratio."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from spath_eval import records
from spath_eval.speed.ceilings import Bound
from spath_eval.speed.entries import speed_entry, timing_entry
from spath_eval.speed.timing import PairedTimes, PhaseTimes, Workload

WORKLOAD = Workload(batch=2, tokens=6, new_tokens=3)
BOUND = Bound(ceiling=3.0, limit=3.5, ffn_share=0.75, least_seconds=None)


def in_record(entry: dict[str, Any]) -> dict[str, Any]:
    """`entry`, checked against the schema in a record that is otherwise complete."""
    from pathlib import Path

    record = json.loads((Path(__file__).parents[1] / "data" / "record.json").read_text(encoding="utf-8"))
    record["cases"][0]["speed"] = [entry]
    records.validate(record)
    return entry


def test_an_entry_has_the_records_fields() -> None:
    times = PairedTimes(PhaseTimes((2.0, 3.0), (1.0, 1.0)), PhaseTimes((1.5, 1.0), (1.0, 1.0)))
    bounds = BOUND, Bound(1.4, 1.4, 0.5, (0.5, 0.25))
    entry = in_record(speed_entry("model", times, bounds, WORKLOAD, exceeds_cache=False))
    shared = {"sparse_seconds": [1.0, 1.0], "rounds": 2, "batch": 2, "tokens": 6}
    prefill = {"ratio": 2.5, "ci95": [2.0, 3.0], "ceiling": 3.0, "limit": 3.5, "ffn_share": 0.75}
    decode = {"ratio": 1.25, "ci95": [1.0, 1.5], "ceiling": 1.4, "limit": 1.4, "ffn_share": 0.5}
    assert entry == {
        "subject": "model",
        "prefill": {**prefill, "dense_seconds": [2.0, 3.0], **shared},
        "decode": {
            **decode,
            "dense_seconds": [1.5, 1.0],
            "new_tokens": 3,
            "least_seconds": {"dense": 0.5, "sparse": 0.25},
            **shared,
        },
    }
    assert not any(math.isnan(value) for value in entry["decode"]["ci95"])


def test_whether_the_interval_became_as_narrow_as_asked_for_is_kept() -> None:
    narrow, wide = PhaseTimes((2.0,) * 6, (1.0,) * 6), PhaseTimes((2.0,) * 6, (1.0, 1.0, 1.0, 1.0, 1.0, 2.0))
    for times, reached in ((narrow, True), (wide, False)):
        entry = timing_entry(times, BOUND, batch=1, tokens=1, exceeds_cache=False, precision=0.02)
        assert entry["precision"] == {"requested": 0.02, "reached": reached}


def test_slower_dense_arms_keep_their_values() -> None:
    times = PhaseTimes((2.0,) * 6, (1.0,) * 6, {"eager": (3.0,) * 6}, "compiled")
    entry = timing_entry(times, BOUND, batch=1, tokens=1, exceeds_cache=False)
    assert (entry["dense_execution"], entry["other_dense_seconds"]) == ("compiled", {"eager": [3.0] * 6})
    in_record({"subject": "model", "ffn": entry})


@pytest.mark.parametrize(
    ("low", "exceeds_cache", "fault"), [(3.6, True, True), (3.6, False, False), (3.4, True, False), (2.0, True, False)]
)
def test_a_fault_is_an_interval_above_what_any_limit_allows_that_no_cache_explains(
    low: float, exceeds_cache: bool, fault: bool
) -> None:
    times = PhaseTimes((low, *[low + 0.1] * 5), (1.0,) * 6)
    entry = timing_entry(times, BOUND, batch=1, tokens=1, exceeds_cache=exceeds_cache)
    assert ("fault" in entry) == fault
    in_record({"subject": "model", "ffn": entry})


def test_a_ratio_above_the_ceiling_is_no_fault_where_another_limit_holds() -> None:
    times = PhaseTimes((3.2,) * 6, (1.0,) * 6)
    assert "fault" not in timing_entry(times, BOUND, batch=1, tokens=1, exceeds_cache=True)
    assert "fault" in timing_entry(times, replace(BOUND, limit=3.0), batch=1, tokens=1, exceeds_cache=True)
