"""The console report: a record as tables of plain text.

Per model: quality (cases x tasks), output preservation (cases) and speed (what was timed x cases). Tables keep to the
width asked for: one that is too wide is split by columns, its first column repeated. What is undefined or suspicious
is marked `(1)`, `(2)`, ... and explained once, below the tables.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spath_eval.contracts import Register
from spath_eval.hookspecs import hookimpl

LEGEND = (
    "retention: (sparse - chance) / (dense - chance), so 1 keeps all that dense knows and 0 is chance.",
    "lost/gained: documents that got worse/better than in the dense model. p: not adjusted.",
    "sparsity: share of FFN neurons removed. [95%]: interval over documents, for speed over rounds.",
    "cosine of final hidden states, KL in nats, top-1: same next token; on held-out text of the domain.",
    "speed: dense time / sparse time, beside its ceiling: what removing those weights could give at most.",
)
ABOVE_CEILING = "above ceiling: timing noise or a measurement fault"
COLOURS = {"failed": "31", "error": "31", "skipped": "33", "passed": "32"}
"""Outcome to ANSI colour."""

Row = tuple[str, ...]
Note = Callable[[str], str]
"""Turns an explanation into the mark that stands for it."""


class ConsoleReport:
    """The report `console`."""

    name = "console"

    def render(self, record: Mapping[str, Any], *, width: int = 100, colour: bool = False) -> str:
        """The tables of `record`, at most `width` columns wide, with ANSI colours where `colour`."""
        notes: list[str] = []

        def note(text: str) -> str:
            text = " ".join(text.split())
            if text not in notes:
                notes.append(text)
            return f"({notes.index(text) + 1})"

        cases = record.get("cases", [])
        parts = [] if record.get("status") == "complete" else [f"This run is {record.get('status', 'incomplete')}."]
        for model in dict.fromkeys(case["model"] for case in cases):
            own = [case for case in cases if case["model"] == model]
            parts.append(_titled(f"Quality of {model}", _quality(own, note), width, colour))
            parts.append(_titled(f"Output preservation of {model}", _preservation(own, note), width, colour))
            parts.append(_titled(f"Speed of {model}", _speed(own, note), width, colour))
        if not cases:
            parts.append("No cases.")
        explained = [_wrapped(f"({number}) {text}", width, "    ") for number, text in enumerate(notes, 1)]
        legend = [_wrapped(line, width, "  ") for line in LEGEND] if cases else []
        parts += ["\n".join(lines) for lines in (explained, legend) if lines]
        return "\n\n".join(part for part in parts if part) + "\n"


@hookimpl
def spath_register_reports(register: Register) -> None:
    register(ConsoleReport())


def case_line(case: Mapping[str, Any], *, colour: bool = False, width: int = 100) -> str:
    """The line printed as a case ends: outcome, id, and its main figures, or the message where it did not pass.

    Retention is the mean over the tasks that have one. Tasks have documents of their own, so the errors are taken as
    independent and the mean's interval is built from the tasks' (MOVER: Zou & Donner 2008). Where the line
    would exceed `width` the interval is left out, and a message is cut.
    """
    outcome = case["outcome"]
    start = f"{_coloured(outcome.upper(), outcome, colour)} {case['id']}"
    if outcome != "passed":
        message = " ".join(str(case.get("message", "")).split())
        room = max(20, width - len(f"{outcome} {case['id']}: "))
        return f"{start}: {message if len(message) <= room else message[: room - 3].rstrip() + '...'}"
    figures = []
    if kept := [
        entry["retention"] for entry in case.get("quality", []) if _get(entry, "retention", "value") is not None
    ]:
        mean, interval = _mean(kept)
        figures.append(f"retention {mean:.2f}")
        if interval:
            figures[-1] += f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    if (ratio := _get(case, "preservation", "perplexity", "ratio")) is not None:
        figures.append(f"ppl x{_number(ratio)}")
    timing = next((entry.get("decode") for entry in case.get("speed", []) if entry["subject"] == "model"), None)
    if timing:
        ceiling = timing.get("ceiling")
        figures.append(f"decode x{timing['ratio']:.2f}" + (f" of {ceiling:.2f}" if ceiling is not None else ""))
    if "seconds" in case:
        figures.append(f"{case['seconds']:.1f} s")
    if kept and len("  ".join([f"{outcome} {case['id']}", *figures])) > width:
        figures[0] = figures[0].partition(" [")[0]
    return "  ".join([start, *figures])


@dataclass(frozen=True)
class _Group:
    """Rows of a table under one line that says what they belong to."""

    heading: str
    rows: Sequence[Row]
    outcome: str = ""
    """Where given, the heading is coloured as this outcome."""


@dataclass(frozen=True)
class _Table:
    header: Row
    groups: Sequence[_Group]

    def lines(self, width: int, colour: bool) -> Iterator[str]:
        """The table, or the tables it is split into, with its groups' headings; without rows, the headings alone."""
        rows = [row for group in self.groups for row in group.rows]
        indent = "  " if any(group.heading for group in self.groups) else ""
        for number, columns in enumerate(_split(self.header, rows, width - len(indent)) if rows else [[]]):
            body = iter(_aligned(self.header, rows, columns, width - len(indent)) if rows else ())
            if rows:
                yield from ([""] if number else [])
                yield from (indent + next(body) for _ in ("header", "rule"))
            for group in self.groups:
                if group.heading and (group.rows or not number):
                    yield _coloured(_wrapped(group.heading, width, "    "), group.outcome, colour)
                yield from (indent + next(body) for _ in group.rows)


def _quality(cases: Sequence[Mapping[str, Any]], note: Note) -> _Table:
    """Cases as headings, their tasks as rows."""
    groups = []
    for case in cases:
        labels = _task_labels(case.get("quality", []))
        rows = []
        for entry in case.get("quality", []):
            difference = entry.get("difference", {})
            rows.append(
                (
                    labels[_key(entry)],
                    str(entry.get("documents", "-")),
                    _decimals(_get(entry, "dense", "value")),
                    _decimals(_get(entry, "sparse", "value")),
                    _change(difference, note),
                    _p_value(difference.get("p_value")),
                    _estimate(entry.get("retention", {}), note, ".2f"),
                    "-" if difference.get("lost") is None else f"{difference['lost']}/{difference['gained']}",
                )
            )
        groups.append(_Group(_heading(case), rows, "" if case["outcome"] == "passed" else case["outcome"]))
    header = ("task", "n", "dense", "sparse", "difference [95%]", "p", "retention [95%]", "lost/gained")
    return _Table(header, groups)


def _preservation(cases: Sequence[Mapping[str, Any]], note: Note) -> _Table:
    rows = []
    for case in cases:
        if "preservation" not in case:
            continue
        found = case["preservation"] or {}
        perplexity = found.get("perplexity") or {}
        mark = "" if found else " " + note(case.get("preservation_reason", "not measured"))
        rows.append(
            (
                _label(case) + mark,
                str(found.get("tokens", "-")),
                _number(perplexity.get("dense")),
                _number(perplexity.get("sparse")),
                _estimate({"value": perplexity.get("ratio"), **perplexity}, note, ".3f") if perplexity else "-",
                _decimals(found.get("cosine")),
                _decimals(found.get("kl")),
                _decimals(found.get("top1_agreement")),
            )
        )
    header = ("case", "tokens", "dense ppl", "sparse ppl", "ratio [95%]", "cosine", "KL", "top-1")
    return _Table(header, [_Group("", rows)] if rows else [])


def _speed(cases: Sequence[Mapping[str, Any]], note: Note) -> _Table:
    """What was timed as headings, cases as rows."""
    measured = [(case, entry) for case in cases for entry in case.get("speed", [])]
    phases = [phase for phase in ("prefill", "decode", "ffn") if any(entry.get(phase) for _, entry in measured)]
    groups = []
    for subject in dict.fromkeys(entry["subject"] for _, entry in measured):
        rows = [
            (_label(case), *(_timing(entry, phase, note) for phase in phases))
            for case, entry in measured
            if entry["subject"] == subject
        ]
        groups.append(_Group("the model" if subject == "model" else subject, rows))
    without = [case for case in cases if not case.get("speed") and "speed_reason" in case]
    if groups:
        rows = [(f"{_label(case)} {note(case['speed_reason'])}", *("-" for _ in phases)) for case in without]
        groups += [_Group("not measured", rows)] if rows else []
    else:
        groups = [_Group(f"{_label(case)}: {case['speed_reason']}", ()) for case in without]
    return _Table(("case", *(f"{phase} [95%] / ceiling" for phase in phases)), groups)


def _titled(title: str, table: _Table, width: int, colour: bool) -> str:
    lines = list(table.lines(width, colour))
    return "\n".join([title, "", *lines]) if lines else ""


def _label(case: Mapping[str, Any]) -> str:
    return case["id"].removeprefix(case["model"] + "/")


def _heading(case: Mapping[str, Any]) -> str:
    heading = _label(case)
    achieved, requested = _get(case, "sparsity", "achieved"), _get(case, "sparsity", "requested")
    if achieved is not None:
        heading += f"  sparsity {achieved:.3f}" + (f" of {requested:g} requested" if requested is not None else "")
    if case["outcome"] != "passed":
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
        label = "_".join(parts[shared:])
        siblings = [key for key in keys if key[0] == task]
        if len({key[1] for key in siblings}) > 1:
            label += f":{metric}"
        if len({key[2] for key in siblings}) > 1:
            label += f":{chosen}"
        labels[task, metric, chosen] = label
    return labels


def _timing(entry: Mapping[str, Any], phase: str, note: Note) -> str:
    timing = entry.get(phase)
    if not timing:
        reason = entry.get(f"{phase}_reason")
        return f"- {note(reason)}" if reason else "-"
    ceiling, interval = timing.get("ceiling"), timing.get("ci95")
    text = _estimate({**timing, "value": timing["ratio"]}, note, ".2f")
    text += f" / {ceiling:.2f}" if ceiling is not None else " / -"
    return f"{text} {note(ABOVE_CEILING)}" if ceiling is not None and interval and interval[0] > ceiling else text


def _change(difference: Mapping[str, Any], note: Note) -> str:
    """A difference; of perplexities, which are compared by logarithms, the ratio."""
    if "scale" not in difference:
        return _estimate(difference, note, "+.3f")
    low, high = difference["ci95"]
    return f"x{math.exp(difference['value']):.3f} [x{math.exp(low):.3f}, x{math.exp(high):.3f}]"


def _estimate(found: Mapping[str, Any], note: Note, form: str) -> str:
    """`value [low, high]`, with a mark where either is undefined for a reason."""
    value, interval = found.get("value"), found.get("ci95")
    if value is None or interval is None:
        reason = found.get("reason") or found.get("value_reason") or found.get("ci95_reason")
        shown = "-" if value is None else format(value, form)
        return f"{shown} {note(reason)}" if reason else shown
    low, high = (format(end, form) for end in interval)
    return f"{value:{form}} [{low}, {high}]"


def _mean(retentions: Sequence[Mapping[str, Any]]) -> tuple[float, tuple[float, float] | None]:
    values = [found["value"] for found in retentions]
    mean = sum(values) / len(values)
    intervals = [found["ci95"] for found in retentions if found.get("ci95")]
    if len(intervals) < len(values):
        return mean, None
    below = math.hypot(*(value - low for value, (low, _) in zip(values, intervals, strict=True))) / len(values)
    above = math.hypot(*(high - value for value, (_, high) in zip(values, intervals, strict=True))) / len(values)
    return mean, (mean - below, mean + above)


def _get(found: Mapping[str, Any], *keys: str) -> Any:
    """What stands under `keys`, or none where any of them is absent or null."""
    value: Any = found
    for key in keys:
        value = value.get(key) if value else None
    return value


def _decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def _p_value(value: float | None) -> str:
    return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def _split(header: Row, rows: Sequence[Row], width: int) -> list[list[int]]:
    """Columns of each table that fits in `width`; the first column stands in all of them."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    tables = [[0]]
    for column in range(1, len(header)):
        if sum(widths[taken] + 2 for taken in tables[-1]) + widths[column] > width and len(tables[-1]) > 1:
            tables.append([0])
        tables[-1].append(column)
    return tables


def _aligned(header: Row, rows: Sequence[Row], columns: Sequence[int], width: int) -> list[str]:
    """Header, rule and rows of one table; its first column is shortened where the table would exceed `width`."""
    from tabulate import tabulate

    cells = [[row[column] for column in columns] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    widths[0] = min(widths[0], max(8, width - sum(2 + taken for taken in widths[1:])))
    lines = [["-" * taken for taken in widths], *([_shortened(row[0], widths[0]), *row[1:]] for row in cells)]
    lines[:2] = lines[1::-1]
    # As its header, tabulate would make every column two wider than the title.
    alignment = ["left"] + ["right"] * (len(columns) - 1)
    return tabulate(lines, tablefmt="plain", disable_numparse=True, colalign=alignment).splitlines()


def _shortened(text: str, room: int) -> str:
    """`text` with its middle left out where it is longer than `room`."""
    if len(text) <= room:
        return text
    tail = (room - 2) // 2
    return f"{text[: room - 2 - tail]}..{text[len(text) - tail :]}"


def _wrapped(text: str, width: int, indent: str) -> str:
    return textwrap.fill(text, width, subsequent_indent=indent, break_on_hyphens=False)


def _coloured(text: str, outcome: str, colour: bool) -> str:
    return f"\x1b[{COLOURS[outcome]}m{text}\x1b[0m" if colour and outcome in COLOURS else text
