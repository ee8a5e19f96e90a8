"""`spath-eval compare`: two records compared, and the forms a comparison is printed in."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import click

from spath_eval.cli.terminal import columns, has_colour
from spath_eval.contracts import UsageError

if TYPE_CHECKING:
    from spath_eval.comparison import Change, Comparison, Evidence, Flip, Row
    from spath_eval.reports.tables import Note

FORMATS = ("text", "markdown", "json", "junit", "csv")
LEGEND = (
    "marks: + better, - worse, ! newly failing, * fixed, x not comparable, ~ within noise. Changed is what is "
    "significant (p < 0.05, adjusted by Holm's method over all rows) and differs by a factor of 1.01, for speed 1.1.",
    "within noise: no change was found. That there is none is what a margin can show (--fail-on).",
    "n: documents that both records hold; of speed, rounds. speed: dense time / sparse time.",
)
MARGINS_LEGEND = (
    "held: the lower end of the interval lies above the margin. broken: the estimate lies beyond it. unresolved: "
    "neither. needed: documents, or rounds of each record, by which it would be held if the estimate stayed.",
    "retention: the change of the score beside what the baseline's dense model scores above chance.",
)
UNPRINTABLE = re.compile(r"[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What would move a terminal's cursor, or may not stand in XML."""


@click.command()
@click.argument("baseline", type=click.Path(path_type=Path))
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option(
    "--fail-on",
    "margins",
    multiple=True,
    metavar="QUANTITY:N%",
    help="Fail unless the candidate is shown to be not worse than this: retention:2%, perplexity:1%, speed:10%, or "
    "speed.decode:10%. Repeatable.  [default: fail on what is worse or newly failing]",
)
@click.option(
    "--format", "form", default="text", show_default=True, type=click.Choice(FORMATS), help="What is printed."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write that to a file, and print the text.")
@click.option(
    "--show-flips",
    "flips",
    default=0,
    metavar="N",
    type=click.IntRange(min=0),
    help="Show up to N documents of each score that only one record's model gets right: prompt and both answers.",
)
def command(
    baseline: Path, candidate: Path, margins: tuple[str, ...], form: str, output: Path | None, flips: int
) -> int:
    """Compare the records BASELINE and CANDIDATE: what changed, and what became worse.

    Exit status 1 where anything is worse, newly failing or beyond a margin, and where nothing is comparable. Markdown
    is also appended to the file that GITHUB_STEP_SUMMARY names.
    """
    from spath_eval import comparison

    asked = comparison.parse_margins(margins)
    found = comparison.compare(comparison.Evidence.read(baseline), comparison.Evidence.read(candidate), asked)
    return report(found, form=form, output=output, flips=flips)


def report(found: Comparison, *, form: str = "text", output: Path | None = None, flips: int = 0) -> int:
    """Print a comparison, append it to the step summary where there is one, and return its exit status.

    Raises `UsageError` where `output` cannot be written.
    """
    if output is not None:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(render(found, form, flips=flips), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write {output}: {error.strerror or error}") from error
        form = "text"
    shown = render(found, form, width=columns(), colour=has_colour(sys.stdout), flips=flips)
    click.echo(shown.rstrip("\n"))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(render(found, "markdown", flips=flips))
        except OSError as error:
            click.echo(f"warning: cannot write the step summary {summary}: {error.strerror or error}", err=True)
    return found.exit_status


def render(found: Comparison, form: str, *, width: int = 100, colour: bool = False, flips: int = 0) -> str:
    """A comparison in one of `FORMATS`; `width` and `colour` are for text, `flips` is how many are shown of a row."""
    if form == "text":
        return _text(found, width, colour, flips)
    if form == "markdown":
        return _markdown(found, flips)
    if form == "json":
        return _json(found, flips)
    return _junit(found) if form == "junit" else found.frame().to_csv(index=False)


def _text(found: Comparison, width: int, colour: bool, flips: int) -> str:
    from spath_eval.reports.tables import Group, Table, wrapped

    notes: list[str] = []

    def note(text: str) -> str:
        if text not in notes:
            notes.append(text)
        return f"({notes.index(text) + 1})"

    groups, judged = [], []
    for case in dict.fromkeys(row.case for row in found.rows):
        own = [row for row in found.rows if row.case == case]
        heading = f"{case}  (another mask)" if case in found.other_masks else case
        outcome = "failed" if any(found.fails(row) for row in own) else ""
        labels = _labels(own, note)
        rows = [
            (f"{row.mark} {label}" + (f" {note(why)}" if (why := _why(row)) else ""), *_cells(row))
            for row, label in zip(own, labels, strict=True)
        ]
        groups.append(Group(heading, rows, outcome))
        verdicts = [
            (f"{label}, {row.judgement.margin}", *_verdict(row))
            for row, label in zip(own, labels, strict=True)
            if row.judgement
        ]
        judged += [Group(case, verdicts, outcome)] if verdicts else []
    header = ("row", "n", "baseline", "candidate", "change [95%]", "p", "lost/gained")
    tables = [
        Table(f"Baseline {_about(found.baseline)}, candidate {_about(found.candidate)}", header, groups, (), LEGEND)
    ]
    if judged:
        columns = ("row, margin", "n", "change [95%]", "allowed", "verdict", "needed")
        tables.append(Table("Margins", columns, judged, (), MARGINS_LEGEND))
    parts = [table.text(width, colour) for table in tables]
    if found.differing:
        parts.insert(0, wrapped(f"The runs differ in: {'; '.join(found.differing)}.", width, "  "))
    parts += [_flip_text(row, flips) for row in found.rows if flips and row.change and row.change.flips]
    parts += ["\n".join(wrapped(f"({n}) {text}", width, "    ") for n, text in enumerate(notes, 1))] if notes else []
    parts.append("\n".join(wrapped(line, width, "  ") for table in tables for line in table.legend))
    parts.append("\n".join(wrapped(line, width, "  ") for line in [*_failures(found), _conclusion(found)]))
    return "\n\n".join(parts) + "\n"


def _markdown(found: Comparison, flips: int) -> str:
    from tabulate import tabulate

    def table(rows: Sequence[Row]) -> str:
        cells = [(f"`{row.mark}`", row.case, row.label, *_cells(row), _why(row) or "") for row in rows]
        header = ("", "case", "row", "n", "baseline", "candidate", "change [95%]", "p", "lost/gained", "note")
        escaped = [[cell.replace("|", "\\|") for cell in line] for line in cells]
        return tabulate(escaped, header, tablefmt="github", disable_numparse=True)

    notable = [row for row in found.rows if row.mark not in "~x" or found.fails(row)]
    parts = [
        f"### spath-eval compare: {'failed' if found.exit_status else 'passed'}",
        f"Baseline {_about(found.baseline)}, candidate {_about(found.candidate)}. {_conclusion(found)}",
    ]
    parts += ["\n".join(f"- {line}" for line in _failures(found))] if found.exit_status else []
    parts += [table(notable)] if notable else []
    judged = [(row.case, row.label, str(row.judgement.margin), *_verdict(row)) for row in found.rows if row.judgement]
    if judged:
        header = ("case", "row", "margin", "n", "change [95%]", "allowed", "verdict", "needed")
        parts.append(tabulate(judged, header, tablefmt="github", disable_numparse=True))
    parts.append(f"<details><summary>All {len(found.rows)} rows</summary>\n\n{table(found.rows)}\n\n</details>")
    if found.differing:
        parts.append(f"The runs differ in: {'; '.join(found.differing)}.")
    for row in found.rows if flips else ():
        if row.change and row.change.flips:
            parts.append("\n".join(["```text", _flip_text(row, flips).replace("```", "` ` `"), "```"]))
    return "\n\n".join([*parts, *LEGEND[:2]]) + "\n"


def _json(found: Comparison, flips: int) -> str:
    import dataclasses

    from spath_eval.comparison import table_row

    rows = []
    for row in found.rows:
        shown = row.change.flips[:flips] if row.change else ()
        rows.append(table_row(row) | ({"flips": [dataclasses.asdict(flip) for flip in shown]} if flips else {}))
    content = {
        "exit_status": found.exit_status,
        "baseline": {"path": found.baseline.path, "created": found.baseline.record["created"]},
        "candidate": {"path": found.candidate.path, "created": found.candidate.record["created"]},
        "counts": found.counts,
        "failures": _failures(found),
        "differing": list(found.differing),
        "other_masks": sorted(found.other_masks),
        "rows": rows,
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _junit(found: Comparison) -> str:
    """A test case for each row; those of the whole comparison are there only where they fail."""
    rows: list[tuple[str, str, str, str | None]] = []
    for row in found.rows:
        if found.fails(row):
            rows.append((row.case, row.label, "failure", _failure(row)))
        elif row.mark == "x":
            rows.append((row.case, row.label, "skipped", _why(row)))
        else:
            rows.append((row.case, row.label, "", None))
    rows += [("comparison", "as a whole", "failure", line) for line in _general_failures(found)]
    counts = {kind: str(sum(row[2] == kind for row in rows)) for kind in ("failure", "skipped")}
    totals = {"tests": str(len(rows)), "failures": counts["failure"], "errors": "0", "skipped": counts["skipped"]}
    root = ElementTree.Element("testsuites", totals)
    suite = ElementTree.SubElement(root, "testsuite", {"name": "spath-eval compare", **totals})
    for case, label, kind, message in rows:
        test = ElementTree.SubElement(suite, "testcase", classname=_printable(case), name=_printable(label))
        if kind:
            ElementTree.SubElement(test, kind, message=_printable(message or ""))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _about(side: Evidence) -> str:
    return f"{Path(side.path).name} ({side.record['created'][:16].replace('T', ' ')})"


def _conclusion(found: Comparison) -> str:
    from spath_eval.comparison import MEANINGS

    counts = [f"{count} {MEANINGS[mark]} ({mark})" for mark, count in found.counts.items() if count]
    return f"{len(found.rows)} rows: {', '.join(counts)}: {'failed' if found.exit_status else 'passed'}"


def _failures(found: Comparison) -> list[str]:
    """A line for each reason to fail."""
    return [f"{row.case} {row.label}: {_failure(row)}" for row in found.failures] + _general_failures(found)


def _general_failures(found: Comparison) -> list[str]:
    lines = [f"{margin}: no row to judge it by" for margin in found.unjudged]
    return lines + ["no row is comparable"] * all(row.mark == "x" for row in found.rows)


def _failure(row: Row) -> str:
    if row.change is None:
        return f"newly failing: {_why(row)}"
    if row.judgement and row.judgement.verdict != "held":
        needed = row.judgement.needed
        more = f", about {needed} {_unit(row)} would do" if needed else ""
        return f"{row.judgement.margin} {row.judgement.verdict}: {_verdict(row)[1]}{more}"
    baseline, candidate = _cells(row)[1:3]
    return f"worse: {baseline} -> {candidate}, {_change(row.change)}, p {_cells(row)[4]}"


def _labels(rows: Sequence[Row], note: Note) -> list[str]:
    """Short labels of one case's rows: of tasks the metric and filter only where there are several, and what was timed,
    if not the model, in a note."""
    metrics = Counter(row.key and row.key[0] for row in rows)
    labels = []
    for row in rows:
        if row.key:
            labels.append(row.name if metrics[row.key[0]] > 1 else row.key[0])
        else:
            labels.append(row.quantity + (f" {note(row.name)}" if row.name else ""))
    return labels


def _unit(row: Row) -> str:
    return "rounds" if row.quantity.startswith("speed") else "documents"


def _why(row: Row) -> str | None:
    """What there is to explain about a row, on one line."""
    why = row.reason or (row.change and row.change.note)
    return " ".join(_printable(why).split()) if why else None


def _cells(row: Row) -> tuple[str, ...]:
    """n, both figures, change, adjusted p value, lost and gained."""
    from spath_eval.reports.tables import decimals, number, p_value

    change = row.change
    if change is None:
        return ("-",) * 6
    form = number if change.is_ratio and not row.quantity.startswith("speed") else decimals
    flipped = "-" if change.lost is None else f"{change.lost}/{change.gained}"
    figures = form(change.baseline), form(change.candidate), _change(change), p_value(row.p_adjusted)
    return (str(change.units), *figures, flipped)


def _change(change: Change) -> str:
    return _estimate(change.value, change.ci95, change.is_ratio)


def _verdict(row: Row) -> tuple[str, ...]:
    """n, change in the margin's unit, what it allows, verdict, documents or rounds needed."""
    assert row.change
    assert row.judgement
    change, gain, judgement = row.change, row.change.gain, row.judgement
    assert gain
    assert gain.value is not None
    assert gain.ci95
    share = judgement.margin.share
    if gain.quantity == "retention":
        shown, allowed = _estimate(gain.value, gain.ci95, False), f"{-share:+.3f}"
    else:
        shown = _change(change)
        allowed = f"x{1 + share if gain.quantity == 'perplexity' else 1 - share:.3f}"
    needed = "-" if judgement.needed is None else str(judgement.needed)
    return str(change.units), shown, allowed, judgement.verdict, needed


def _estimate(value: float, interval: tuple[float, float], is_ratio: bool) -> str:
    from spath_eval.reports.tables import ratio

    form = (lambda figure: f"x{ratio(figure)}") if is_ratio else "{:+.3f}".format
    low, high = map(form, interval)
    return f"{form(value)} [{low}, {high}]"


def _flip_text(row: Row, count: int) -> str:
    assert row.change
    flips = row.change.flips
    lost = sum(flip.lost for flip in flips)
    lines = [f"{row.case} {row.label}: {lost} lost, {len(flips) - lost} gained"]
    lines += [line for flip in flips[:count] for line in _flip_lines(flip)]
    if len(flips) > count:
        lines.append(f"  and {len(flips) - count} more")
    return "\n".join(lines)


def _flip_lines(flip: Flip) -> Iterator[str]:
    yield f"  {'lost' if flip.lost else 'gained'}, document {flip.document[:12]}"
    parts: dict[str, Any] = {"prompt": flip.prompt, "baseline": flip.baseline, "candidate": flip.candidate}
    for name, text in parts.items():
        shown = "(not kept)" if text is None else _printable(text)
        yield textwrap.indent(shown, " " * 15, lambda line: True).replace(" " * 15, f"    {name + ':':11}", 1)


def _printable(text: str) -> str:
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)
