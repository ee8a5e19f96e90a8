"""The JSON report: the record itself, with what reports derive from it under `derived`.

`derived` holds `verdicts` (model to sentence), `mean_retention` (case to estimate; left out where undefined), `speed`
(case to phase to what its interval says, and the share of the possible gain) and `flips`. It stays a record, which
every command can read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from spath_eval.contracts import Register
from spath_eval.hookspecs import hookimpl
from spath_eval.reports.matrices import Case, mean_retention
from spath_eval.reports.verdict import gain, of_model, pace, verdicts


class JsonReport:
    """The report `json`."""

    name = "json"

    def render(self, record: Mapping[str, Any], *, width: int = 100, colour: bool = False) -> str:
        """`record` and what is derived from it; neither `width` nor `colour` matters."""
        cases = record.get("cases", [])
        retentions = {case["id"]: mean_retention(case) for case in cases}
        derived = {
            "verdicts": verdicts(record),
            "mean_retention": {name: found for name, found in retentions.items() if found["value"] is not None},
            "speed": {case["id"]: _speed(case) for case in cases if of_model(case)},
            **{key: record[key] for key in ("flips", "flips_reason") if key in record},
        }
        own = {key: value for key, value in record.items() if key not in ("flips", "flips_reason")}
        return json.dumps({**own, "derived": derived}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


@hookimpl
def spath_register_reports(register: Register) -> None:
    register(JsonReport())


def _speed(case: Case) -> dict[str, Any]:
    timings = {phase: of_model(case).get(phase) for phase in ("prefill", "decode", "ffn")}
    shares = {phase: {"says": pace(one), "share_of_gain": gain(one)} for phase, one in timings.items() if one}
    return {phase: {key: value for key, value in one.items() if value is not None} for phase, one in shares.items()}
