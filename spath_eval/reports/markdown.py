"""The Markdown report: verdict, tables and provenance as GitHub renders them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from spath_eval.contracts import Register
from spath_eval.hookspecs import hookimpl
from spath_eval.reports.console import content
from spath_eval.reports.provenance import provenance
from spath_eval.reports.tables import Table
from spath_eval.reports.verdict import verdicts

SPECIAL = re.compile(r"[\\`*<>|~&$#]|(?<!\w)_|_(?!\w)|^\[|(?<=\])(?=[(\[])")
"""What would be markup: underscores only at the edge of a word, brackets only where they would make a link."""


class MarkdownReport:
    """The report `md`."""

    name = "md"

    def render(self, record: Mapping[str, Any], *, width: int = 100, colour: bool = False) -> str:
        """The report on `record`; neither `width` nor `colour` matters."""
        found = content(record)
        sentences = verdicts(record)
        parts = [f"# spath-eval: {escaped(', '.join(sentences) or 'no cases')}"]
        parts += [escaped(line) for line in found.lead]
        parts += [f"> {escaped(sentence)}" for sentence in sentences.values()]
        parts += [part for table in found.all_tables() for part in _table(table)]
        parts += [f"({number}) {escaped(text)}" for number, text in enumerate(found.notes, 1)]
        parts += [escaped(line) for line in found.remarks]
        if legend := found.legend():
            parts.append("\n".join(f"- {escaped(line)}" for line in legend))
        parts += ["<details>\n<summary>Provenance</summary>"]
        parts += [part for table in provenance(record) for part in _table(table)]
        return "\n\n".join([*parts, "</details>"]) + "\n"


@hookimpl
def spath_register_reports(register: Register) -> None:
    register(MarkdownReport())


def escaped(text: str) -> str:
    """`text` on one line, with nothing in it that Markdown or HTML would take for markup."""
    return SPECIAL.sub(lambda found: f"\\{found[0]}", " ".join(text.split()))


def _table(table: Table) -> Iterator[str]:
    """Title, rows, and lines below; what rows belong to is a row of its own, in bold."""
    yield f"## {escaped(table.title)}"
    if not any(group.rows for group in table.groups):
        yield "\n".join(f"- {escaped(group.heading)}" for group in table.groups)
    else:
        rows: list[list[str]] = []
        for group in table.groups:
            if group.heading:
                rows.append([f"**{escaped(group.heading)}**", *("" for _ in table.header[1:])])
            rows += [[escaped(cell) for cell in row] for row in group.rows]
        alignment = [":--", *("--:" for _ in table.header[1:])]
        lines = [[escaped(name) for name in table.header], alignment, *rows]
        yield "\n".join(f"| {' | '.join(line)} |" for line in lines)
    yield from (escaped(line) for line in table.below)
