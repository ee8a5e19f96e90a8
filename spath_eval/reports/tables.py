"""Tables of plain text that keep to a width, and how figures are written in them.

A table that is too wide is split by columns into tables of about the same width, its first column repeated.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

COLOURS = {"failed": "31", "error": "31", "skipped": "33", "passed": "32"}
"""Outcome to ANSI colour."""

ABOVE_CEILING = (
    "above its ceiling: by noise, by a cache that holds the sparse weights, or by a width that suits the device better"
)
"""What there is to say of a ratio whose interval begins there."""

Row = tuple[str, ...]
Note = Callable[[str], str]
"""Turns an explanation into the mark that stands for it."""


@dataclass(frozen=True)
class Group:
    """Rows of a table under one line that says what they belong to."""

    heading: str
    rows: Sequence[Row]
    outcome: str = ""
    """Where given, the heading is coloured as this outcome."""


@dataclass(frozen=True)
class Table:
    """Groups of rows under a title and a header; without rows, the groups' headings alone."""

    title: str
    header: Row
    groups: Sequence[Group]
    below: Sequence[str] = ()
    """Lines that sum the table up."""
    legend: Sequence[str] = ()
    """What its columns mean: said once, below all tables."""

    def text(self, width: int, colour: bool) -> str:
        """The table, or the tables it is split into, at most `width` columns wide."""
        lines = [wrapped(self.title, width, "  "), "", *self._body(width, colour)]
        if self.below:
            lines += ["", *(wrapped(line, width, "  ") for line in self.below)]
        return "\n".join(lines)

    def _body(self, width: int, colour: bool) -> Iterator[str]:
        rows = [row for group in self.groups for row in group.rows]
        indent = "  " if any(group.heading for group in self.groups) else ""
        for number, columns in enumerate(_split(self.header, rows, width - len(indent)) if rows else [[]]):
            body = iter(_aligned(self.header, rows, columns, width - len(indent)) if rows else ())
            if rows:
                yield from ([""] if number else [])
                yield from (indent + next(body) for _ in ("header", "rule"))
            for group in self.groups:
                if group.heading and (group.rows or not number):
                    yield coloured(wrapped(group.heading, width, "    "), group.outcome, colour)
                yield from (indent + next(body) for _ in group.rows)


def estimate(found: Mapping[str, Any], note: Note, form: Callable[[float], str]) -> str:
    """`value [low, high]`, with a mark where either is undefined for a reason."""
    value, interval = found.get("value"), found.get("ci95")
    if value is None or interval is None:
        reason = found.get("reason") or found.get("value_reason") or found.get("ci95_reason")
        shown = "-" if value is None else form(value)
        return f"{shown} {note(reason)}" if reason else shown
    low, high = map(form, interval)
    return f"{form(value)} [{low}, {high}]"


def decimals(value: float | None) -> str:
    """Three decimals."""
    return "-" if value is None else f"{value:.3f}"


def number(value: float | None) -> str:
    """Two decimals, or from 1,000 on three digits."""
    return "-" if value is None else f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def ratio(value: float) -> str:
    """Three decimals, or from 100 on as `number`."""
    return decimals(value) if value < 100 else number(value)


def short(value: float) -> str:
    """Four digits, or three and k for thousands, M for millions, G for billions."""
    if value < 999.95:
        return f"{value:.{1 + (value < 9.9995) + (value < 99.995)}f}"
    for unit in "kM":
        value /= 1000
        if value < 999.5:
            return f"{value:.{(value < 9.995) + (value < 99.95)}f}{unit}"
    return f"{value / 1000:.3g}G"


def p_value(value: float | None) -> str:
    """Three decimals, and no zero."""
    return "-" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def wrapped(text: str, width: int, indent: str) -> str:
    """`text` in lines of at most `width` columns, those after the first indented."""
    return textwrap.fill(text, width, subsequent_indent=indent, break_on_hyphens=False)


def coloured(text: str, outcome: str, colour: bool) -> str:
    """`text` in the colour of an outcome, where it has one and `colour` is asked for."""
    return f"\x1b[{COLOURS[outcome]}m{text}\x1b[0m" if colour and outcome in COLOURS else text


def _split(header: Row, rows: Sequence[Row], width: int) -> list[list[int]]:
    """Columns of each table: as few tables as fit in `width`, and those as narrow as they can be."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    fewest = len(_filled(widths, width))
    return next(tables for room in range(1, width + 1) if len(tables := _filled(widths, room)) == fewest)


def _filled(widths: Sequence[int], width: int) -> list[list[int]]:
    """Columns of each table that fits in `width`; the first column stands in all of them."""
    tables = [[0]]
    for column in range(1, len(widths)):
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
