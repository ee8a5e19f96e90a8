"""The console report: a record as tables of plain text.

Per model: quality (cases x tasks) and its noise floor, output preservation (cases), masks, speed (what was timed x
cases), and what cases say side by side. What is undefined or suspicious is marked `(1)`, `(2)`, ... and explained once,
below the tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spath_eval.contracts import Register
from spath_eval.hookspecs import hookimpl
from spath_eval.reports.matrices import (
    Case,
    Pairs,
    arm,
    cross_domain,
    evaluated_on,
    is_own,
    label,
    league,
    mean_retention,
)
from spath_eval.reports.tables import (
    ABOVE_CEILING,
    Group,
    Note,
    Row,
    Table,
    coloured,
    decimals,
    estimate,
    number,
    p_value,
    ratio,
    wrapped,
)

INTERVALS_LEGEND = "sparsity: share of FFN neurons removed. [95%]: interval over documents, for speed over rounds."
QUALITY_LEGEND = (
    "retention: (sparse - chance) / (dense - chance), so 1 keeps all that dense knows and 0 is chance.",
    "lost/gained: documents that got worse/better than in the dense model. p: not adjusted.",
    INTERVALS_LEGEND,
)
NOISE_LEGEND = (
    "noise floor: the dense model again, in other batches: how many documents differ, the largest change of one, the "
    "mean change. A pathway that changes no more than that has shown nothing.",
)
PRESERVATION_LEGEND = (
    INTERVALS_LEGEND,
    "cosine of final hidden states, KL in nats, top-1: same next token; on held-out text of the domain.",
)
MASKS_LEGEND = ("halves: of the neurons removed by the masks of two halves of the profile text, the share in both.",)
SPEED_LEGEND = (
    INTERVALS_LEGEND,
    "speed: dense time / sparse time, beside its ceiling: what removing those weights could give at most.",
)
UNCONVERGED = "two halves of the profile text agree on less than {:.0%} of the removed neurons: profile more text"


class Notes:
    """Explanations in the order in which they are first needed, each of them once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, text: str) -> str:
        """The mark of an explanation."""
        text = " ".join(text.split())
        if text not in self.texts:
            self.texts.append(text)
        return f"({self.texts.index(text) + 1})"


@dataclass(frozen=True)
class Content:
    """What the report says, before it takes a form."""

    lead: Sequence[str]
    """Lines that come first."""
    tables: Mapping[str, Mapping[str, Sequence[Table]]]
    """Model to subject (quality, noise floor, preservation, masks, speed, across domains, league) to its tables."""
    notes: Sequence[str]
    """What the marks (1), (2), ... in the tables stand for."""
    remarks: Sequence[str]
    """Lines on the whole run."""

    def all_tables(self) -> list[Table]:
        """The tables of all models and subjects."""
        return [table for subjects in self.tables.values() for tables in subjects.values() for table in tables]

    def legend(self) -> list[str]:
        """What the tables' columns mean, each line once."""
        return list(dict.fromkeys(line for table in self.all_tables() for line in table.legend))


def content(record: Mapping[str, Any]) -> Content:
    """The tables of `record`, empty ones left out, and what is said around them."""
    note = Notes()
    cases = record.get("cases", [])
    pairs = Pairs.read(record.get("comparisons", []))
    tables: dict[str, dict[str, list[Table]]] = {}
    for model in dict.fromkeys(case["model"] for case in cases):
        own = [case for case in cases if case["model"] == model]
        dense = [entry for entry in record.get("dense", []) if entry["model"] == model]
        subjects = {
            "quality": [_quality(model, own, note)],
            "noise floor": [_noise_floor(model, dense)],
            "preservation": [_preservation(model, own, note)],
            "masks": [_masks(model, own, note)],
            "speed": [_speed(model, own, note)],
            "across domains": cross_domain(model, own, pairs, note),
            "league": league(model, own, pairs, note),
        }
        tables[model] = {name: [table for table in found if table.groups] for name, found in subjects.items()}
    lead = [] if record.get("status") == "complete" else [f"This run is {record.get('status', 'incomplete')}."]
    reasons = dict.fromkeys(case["quality_reason"] for case in cases if "quality_reason" in case)
    lead += [f"Quality was not measured: {reason}." for reason in reasons]
    lead += [] if cases else ["No cases."]
    return Content(lead, tables, note.texts, _shared_words(cases))


class ConsoleReport:
    """The report `console`."""

    name = "console"

    def render(self, record: Mapping[str, Any], *, width: int = 100, colour: bool = False) -> str:
        """The tables of `record`, at most `width` columns wide, with ANSI colours where `colour`."""
        found = content(record)
        parts = [wrapped(line, width, "  ") for line in found.lead]
        parts += [table.text(width, colour) for table in found.all_tables()]
        explained = [wrapped(f"({number}) {text}", width, "    ") for number, text in enumerate(found.notes, 1)]
        explained += [wrapped(line, width, "  ") for line in found.remarks]
        legend = dict.fromkeys(wrapped(line, width, "  ") for line in found.legend())
        return "\n\n".join([*parts, *("\n".join(lines) for lines in (explained, legend) if lines)]) + "\n"


@hookimpl
def spath_register_reports(register: Register) -> None:
    register(ConsoleReport())


def case_line(case: Case, *, colour: bool = False, width: int = 100) -> str:
    """The line printed as a case ends: outcome, id, and its main figures, or the message where it did not pass.

    Retention is the mean over the tasks that have one. Where the line would exceed `width` its interval is left out,
    and a message is cut.
    """
    outcome = case["outcome"]
    start = f"{coloured(outcome.upper(), outcome, colour)} {case['id']}"
    if not _passed(case):
        message = " ".join(str(case.get("message", "")).split())
        room = max(20, width - len(f"{outcome} {case['id']}: "))
        return f"{start}: {message if len(message) <= room else message[: room - 3].rstrip() + '...'}"
    figures = []
    kept = mean_retention(case)
    if kept["value"] is not None:
        figures.append(f"retention {estimate(kept, str, '{:.2f}'.format)}")
    if (change := _get(case, "preservation", "perplexity", "ratio")) is not None:
        figures.append(f"ppl x{number(change)}")
    timing = next((entry.get("decode") for entry in case.get("speed", []) if entry["subject"] == "model"), None)
    if timing:
        ceiling = timing.get("ceiling")
        figures.append(f"decode x{timing['ratio']:.2f}" + (f" of {ceiling:.2f}" if ceiling is not None else ""))
    if "seconds" in case:
        figures.append(f"{case['seconds']:.1f} s")
    if figures and len("  ".join([f"{outcome} {case['id']}", *figures])) > width:
        figures[0] = figures[0].partition(" [")[0]
    return "  ".join([start, *figures])


def _quality(model: str, cases: Sequence[Case], note: Note) -> Table:
    """Cases as headings, their tasks as rows; of masks on domains that are not theirs only those that did not pass."""
    shown = [case for case in cases if not _passed(case) or (is_own(case) and "quality_reason" not in case)]
    groups = []
    for case in shown:
        labels = _task_labels(case.get("quality", []))
        rows = []
        for entry in case.get("quality", []):
            difference = entry.get("difference", {})
            rows.append(
                (
                    labels[_key(entry)],
                    str(entry.get("documents", "-")),
                    decimals(_get(entry, "dense", "value")),
                    decimals(_get(entry, "sparse", "value")),
                    _change(difference, note),
                    p_value(difference.get("p_value")),
                    estimate(entry.get("retention", {}), note, "{:.2f}".format),
                    "-" if difference.get("lost") is None else f"{difference['lost']}/{difference['gained']}",
                )
            )
        groups.append(Group(_heading(case), rows, "" if _passed(case) else case["outcome"]))
    title = f"Quality of {model}" if any(map(_passed, shown)) else f"Cases of {model} that did not pass"
    header = ("task", "n", "dense", "sparse", "difference [95%]", "p", "retention [95%]", "lost/gained")
    below = []
    if any(case.get("quality") and _passed(case) and not is_own(case) for case in cases):
        below = ["Masks on domains that are not theirs: in the matrices below; task by task in the record."]
    legend = QUALITY_LEGEND if any(group.rows for group in groups) else ()
    return Table(title, header, groups, below, legend)


def _noise_floor(model: str, dense: Sequence[Mapping[str, Any]]) -> Table:
    """Domains as headings, their tasks as rows."""
    groups = []
    for entry in dense:
        found = entry.get("noise_floor") or []
        labels = _task_labels(found)
        rows = [
            (
                labels[_key(task)],
                str(task["documents"]),
                str(task["differing"]),
                f"{task['largest']:.3g}",
                f"{task['mean']:+.3g}",
            )
            for task in found
        ]
        groups += [Group(entry["domain"], rows)] if rows else []
    return Table(f"Noise floor of {model}", ("task", "n", "differing", "largest", "mean"), groups, (), NOISE_LEGEND)


def _preservation(model: str, cases: Sequence[Case], note: Note) -> Table:
    """Cases as rows; where masks are evaluated on several domains, masks as headings and the domains as rows."""
    crossed = not all(map(is_own, cases))
    rows: dict[str, list[Row]] = {}
    for case in cases:
        if "preservation" not in case:
            continue
        found = case["preservation"] or {}
        perplexity = found.get("perplexity") or {}
        mark = "" if found else " " + note(case.get("preservation_reason", "not measured"))
        change = {"value": perplexity.get("ratio"), **perplexity}
        rows.setdefault(_mask(case) if crossed else "", []).append(
            (
                (f"on {evaluated_on(case)}" if crossed else label(case)) + mark,
                str(found.get("tokens", "-")),
                number(perplexity.get("dense")),
                number(perplexity.get("sparse")),
                estimate(change, note, ratio) if perplexity else "-",
                decimals(found.get("cosine")),
                decimals(found.get("kl")),
                decimals(found.get("top1_agreement")),
            )
        )
    header = ("case", "tokens", "dense ppl", "sparse ppl", "ratio [95%]", "cosine", "KL", "top-1")
    groups = [Group(heading, found) for heading, found in rows.items()]
    return Table(f"Output preservation of {model}", header, groups, (), PRESERVATION_LEGEND)


def _masks(model: str, cases: Sequence[Case], note: Note) -> Table:
    """Masks as rows: what they remove, and whether the profile text was enough to choose by."""
    rows: dict[str, Row] = {}
    for case in cases:
        if "convergence" not in case or _mask(case) in rows:
            continue
        sparsity = case.get("sparsity", {})
        requested = sparsity.get("requested")
        if case["convergence"] is None:
            halves = f"- {note(case.get('convergence_reason', 'not measured'))}"
        else:
            agreement, enough = case["convergence"]["jaccard"], case["convergence"]["threshold"]
            halves = decimals(agreement) + (f" {note(UNCONVERGED.format(enough))}" if agreement < enough else "")
        rows[_mask(case)] = (
            _mask(case),
            decimals(sparsity.get("achieved")) + (f" of {requested:g}" if requested is not None else ""),
            decimals(sparsity.get("ffn_weights_removed")),
            decimals(sparsity.get("model_weights_removed")),
            halves,
        )
    header = ("mask", "neurons removed", "FFN weights", "all weights", "halves")
    return Table(f"Masks of {model}", header, [Group("", list(rows.values()))] if rows else [], (), MASKS_LEGEND)


def _speed(model: str, cases: Sequence[Case], note: Note) -> Table:
    """What was timed as headings, cases as rows; a mask that is timed in one case is left out in the others."""
    measured = [(case, entry) for case in cases for entry in case.get("speed", [])]
    phases = [phase for phase in ("prefill", "decode", "ffn") if any(entry.get(phase) for _, entry in measured)]
    groups = []
    for subject in dict.fromkeys(entry["subject"] for _, entry in measured):
        rows = [
            (label(case), *(_timing(entry, phase, note) for phase in phases))
            for case, entry in measured
            if entry["subject"] == subject
        ]
        groups.append(Group("the model" if subject == "model" else subject, rows))
    timed = {_mask(case) for case, _ in measured}
    without: dict[str, Case] = {}
    for case in cases:
        if not case.get("speed") and "speed_reason" in case and _mask(case) not in timed:
            without.setdefault(_mask(case), case)
    if groups:
        rows = [(f"{label(case)} {note(case['speed_reason'])}", *("-" for _ in phases)) for case in without.values()]
        groups += [Group("not measured", rows)] if rows else []
    elif len(reasons := {case["speed_reason"] for case in without.values()}) == 1:
        groups = [Group(f"not measured: {reasons.pop().removeprefix('not measured: ')}", ())]
    else:
        groups = [Group(f"{label(case)}: {case['speed_reason']}", ()) for case in without.values()]
    header = ("case", *(f"{phase} [95%] / ceiling" for phase in phases))
    return Table(f"Speed of {model}", header, groups, (), SPEED_LEGEND if measured else ())


def _shared_words(cases: Sequence[Case]) -> list[str]:
    """A line that names the tasks of which documents share words with the profile text, where there are any."""
    shares: dict[str, float] = {}
    for case in cases:
        for task, share in (_get(case, "gates", "disjoint", "ngrams") or {}).items():
            shares[task] = max(share, shares.get(task, 0.0))
    found = [f"{task} {100 * share:.2g}%" for task, share in shares.items() if share]
    return [f"Documents that share 13 words in a row with a case's profile text: {', '.join(found)}."] if found else []


def _passed(case: Case) -> bool:
    return case["outcome"] == "passed"


def _mask(case: Case) -> str:
    """Whose mask it is, strategy and sparsity: the id of the case in which the mask is evaluated on its own domain."""
    return f"{case['domain']}/{arm(case)}"


def _heading(case: Case) -> str:
    heading = label(case)
    achieved, requested = _get(case, "sparsity", "achieved"), _get(case, "sparsity", "requested")
    if achieved is not None:
        heading += f"  sparsity {achieved:.3f}" + (f" of {requested:g} requested" if requested is not None else "")
    if not _passed(case):
        heading += f"  {case['outcome'].upper()}: {' '.join(str(case.get('message', '')).split())}"
    return heading


def _key(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    return entry["task"], entry["metric"], entry["filter"]


def _task_labels(entries: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], str]:
    """A short name for each (task, metric, filter): without the words that all of them begin with; metric and
    filter only where a task has several."""
    keys = list(dict.fromkeys(_key(entry) for entry in entries))
    words = [task.split("_") for task, _, _ in keys]
    shared = 0
    while len(words) > 1 and all(len(task) > shared + 1 and task[shared] == words[0][shared] for task in words):
        shared += 1
    labels = {}
    for (task, metric, chosen), parts in zip(keys, words, strict=True):
        short = "_".join(parts[shared:])
        siblings = [key for key in keys if key[0] == task]
        if len({key[1] for key in siblings}) > 1:
            short += f":{metric}"
        if len({key[2] for key in siblings}) > 1:
            short += f":{chosen}"
        labels[task, metric, chosen] = short
    return labels


def _timing(entry: Mapping[str, Any], phase: str, note: Note) -> str:
    timing = entry.get(phase)
    if not timing:
        reason = entry.get(f"{phase}_reason")
        return f"- {note(reason)}" if reason else "-"
    ceiling, interval = timing.get("ceiling"), timing.get("ci95")
    text = estimate({**timing, "value": timing["ratio"]}, note, "{:.2f}".format)
    text += f" / {ceiling:.2f}" if ceiling is not None else " / -"
    return f"{text} {note(ABOVE_CEILING)}" if ceiling is not None and interval and interval[0] > ceiling else text


def _change(difference: Mapping[str, Any], note: Note) -> str:
    """A difference; of perplexities, which are compared by logarithms, the ratio."""
    if "scale" not in difference:
        return estimate(difference, note, "{:+.3f}".format)
    low, high = difference["ci95"]
    return f"x{math.exp(difference['value']):.3f} [x{math.exp(low):.3f}, x{math.exp(high):.3f}]"


def _get(found: Mapping[str, Any], *keys: str) -> Any:
    """What stands under `keys`, or none where any of them is absent or null."""
    value: Any = found
    for key in keys:
        value = value.get(key) if value else None
    return value
