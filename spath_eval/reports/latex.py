"""The LaTeX report: the tables of a record for a paper, with `booktabs` rules. It needs no other package."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from spath_eval.contracts import Register
from spath_eval.hookspecs import hookimpl
from spath_eval.reports.console import content
from spath_eval.reports.tables import Table
from spath_eval.reports.verdict import verdicts

SPECIAL = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}
LONG = 90
"""Characters of a heading from which it is broken into lines."""


class LatexReport:
    """The report `latex`."""

    name = "latex"

    def render(self, record: Mapping[str, Any], *, width: int = 100, colour: bool = False) -> str:
        """The tables of `record`, to be read in with `\\input`; neither `width` nor `colour` matters."""
        found = content(record)
        parts = ["% needs \\usepackage{booktabs}"]
        parts += [escaped(line) for line in [*found.lead, *verdicts(record).values()]]
        parts += ["\n".join(_table(table)) for table in found.all_tables()]
        parts += [f"({number}) {escaped(text)}" for number, text in enumerate(found.notes, 1)]
        parts += [escaped(line) for line in [*found.remarks, *found.legend()]]
        return "\n\n".join(parts) + "\n"


@hookimpl
def spath_register_reports(register: Register) -> None:
    register(LatexReport())


def escaped(text: str) -> str:
    """`text` on one line, as LaTeX prints it, with minus signs for numbers; control characters are left out."""
    text = re.sub(r"[\x00-\x1f\x7f]+", "", " ".join(text.split()))
    text = "".join(SPECIAL.get(character, character) for character in text)
    return re.sub(r"(?<![^\s{[])-(?=\d)", "$-$", text)


def _table(table: Table) -> Iterator[str]:
    columns = len(table.header)
    yield r"\begin{table}[htbp]"
    yield r"\centering\footnotesize"
    yield rf"\caption{{{escaped(table.title)}}}"
    yield rf"\begin{{tabular}}{{@{{}}l{'r' * (columns - 1)}@{{}}}}"
    yield r"\toprule"
    if any(group.rows for group in table.groups):
        yield _row(table.header)
        yield r"\midrule"
    for group in table.groups:
        if group.heading:
            width = r"p{\linewidth}" if len(group.heading) > LONG else "l"
            yield rf"\multicolumn{{{columns}}}{{@{{}}{width}@{{}}}}{{\textit{{{escaped(group.heading)}}}}} \\"
        yield from map(_row, group.rows)
    yield r"\bottomrule"
    yield r"\end{tabular}"
    yield from (rf"\par {escaped(line)}" for line in table.below)
    yield r"\end{table}"


def _row(cells: tuple[str, ...]) -> str:
    row = " & ".join(map(escaped, cells)) + r" \\"
    return "{}" + row if row.startswith(("[", "*")) else row  # else they belong to the end of the row above
