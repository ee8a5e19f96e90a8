"""The CSV report: a row for each case, task, metric and filter, one for its output preservation, and one for each
timing. What a row has no value for is empty; a case of which nothing was measured has one row, of kind `case`.
"""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from spath_eval.contracts import Register
from spath_eval.hookspecs import hookimpl
from spath_eval.reports.matrices import Case, evaluated_on

COLUMNS = (
    "kind model arch case domain evaluated_on strategy options control outcome message sparsity_requested "
    "sparsity_achieved ffn_weights_removed model_weights_removed task metric filter higher_is_better n chance dense "
    "dense_stderr sparse sparse_stderr difference difference_low difference_high p_value lost gained retention "
    "retention_low retention_high ratio ratio_low ratio_high ceiling cosine kl top1_agreement batch tokens reason"
).split()
"""`kind` is quality, preservation, speed or case. `n` counts documents, tokens of preservation, and rounds of speed.
`dense` and `sparse` are scores, perplexities, or median seconds; `ratio` is sparse / dense of perplexities, dense /
sparse of seconds. Of speed, `task` is what was timed and `metric` the phase."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""How a text begins that a spreadsheet would compute."""


class CsvReport:
    """The report `csv`."""

    name = "csv"

    def render(self, record: Mapping[str, Any], *, width: int = 100, colour: bool = False) -> str:
        """The rows of `record` below a header, figures in full precision; neither `width` nor `colour` matters."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for case in record.get("cases", []):
            for row in list(_rows(case)) or [{"kind": "case"}]:
                writer.writerow({name: _cell(value) for name, value in (_about(case) | row).items()})
        return text.getvalue()


@hookimpl
def spath_register_reports(register: Register) -> None:
    register(CsvReport())


def _rows(case: Case) -> Iterator[dict[str, Any]]:
    for entry in case.get("quality", []):
        dense, sparse, difference, retention = (entry[key] for key in ("dense", "sparse", "difference", "retention"))
        yield {
            "kind": "quality",
            **{key: entry[key] for key in ("task", "metric", "filter", "higher_is_better", "chance")},
            "n": entry["documents"],
            "dense": dense["value"],
            "dense_stderr": dense.get("stderr"),
            "sparse": sparse["value"],
            "sparse_stderr": sparse.get("stderr"),
            **_estimate("difference", difference),
            **{key: difference[key] for key in ("p_value", "lost", "gained")},
            **_estimate("retention", retention),
            "reason": retention.get("reason") or difference.get("reason"),
        }
    if preserved := case.get("preservation"):
        perplexity = preserved["perplexity"] or {}
        yield {
            "kind": "preservation",
            "metric": "perplexity",
            "n": preserved["tokens"],
            "dense": perplexity.get("dense"),
            "sparse": perplexity.get("sparse"),
            **_estimate("ratio", {**perplexity, "value": perplexity.get("ratio")}),
            **{key: preserved[key] for key in ("cosine", "kl", "top1_agreement")},
            "reason": preserved.get("perplexity_reason"),
        }
    for entry in case.get("speed", []):
        for phase in ("prefill", "decode", "ffn"):
            if timing := entry.get(phase):
                yield {
                    "kind": "speed",
                    "task": entry["subject"],
                    "metric": phase,
                    "n": timing["rounds"],
                    "dense": statistics.median(timing["dense_seconds"]),
                    "sparse": statistics.median(timing["sparse_seconds"]),
                    **_estimate("ratio", {**timing, "value": timing["ratio"]}),
                    **{key: timing[key] for key in ("ceiling", "batch", "tokens")},
                    "reason": timing.get("fault"),
                }


def _about(case: Case) -> dict[str, Any]:
    """What every row of a case has."""
    strategy, sparsity = case["strategy"], case.get("sparsity", {})
    return {
        "model": case["model"],
        "arch": case.get("arch"),
        "case": case["id"],
        "domain": case["domain"],
        "evaluated_on": evaluated_on(case),
        "strategy": strategy["name"],
        "options": json.dumps(strategy["options"], sort_keys=True) if strategy["options"] else None,
        "control": strategy.get("control"),
        "outcome": case["outcome"],
        "message": " ".join(case.get("message", "").split()),
        "sparsity_requested": sparsity.get("requested"),
        "sparsity_achieved": sparsity.get("achieved"),
        "ffn_weights_removed": sparsity.get("ffn_weights_removed"),
        "model_weights_removed": sparsity.get("model_weights_removed"),
    }


def _estimate(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    low, high = found.get("ci95") or (None, None)
    return {name: found["value"], f"{name}_low": low, f"{name}_high": high}


def _cell(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula is quoted for it."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
