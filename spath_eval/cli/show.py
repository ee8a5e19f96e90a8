"""`spath-eval show`: the tables as the command printed them that wrote the file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spath_eval.cli import load_registry, plugin_options
from spath_eval.cli.terminal import columns, has_colour

if TYPE_CHECKING:
    from spath_eval.contracts import Report


@click.command()
@click.argument("record", type=click.Path(path_type=Path))
@plugin_options
def command(record: Path, plugin_names: tuple[str, ...], strict_plugins: bool) -> None:
    """Print the tables of a run again, from its record.

    What `spath-eval speed` and `spath-eval findings` wrote is printed as well.
    """
    from spath_eval import records

    found = records.read(record, *records.OTHER_KINDS)
    match found.get("kind"):
        case "speed":
            from spath_eval.speed import table

            text = table.render(found["speed"], columns(table.WIDEST)).rstrip("\n")
        case "findings":
            from spath_eval import findings

            text = findings.render(found, "text", columns())
        case _:
            text = rendered(load_registry(plugin_names, strict_plugins).report("console"), found)
    click.echo(text)


def rendered(report: Report, record: Mapping[str, Any]) -> str:
    """`report` for stdout: as wide as the terminal, between 60 and 100 columns, and coloured unless `NO_COLOR` is set.

    What is no valid Unicode in a model's answer is written with backslashes.
    """
    text = report.render(record, width=columns(), colour=has_colour(sys.stdout))
    return text.encode("utf-8", "backslashreplace").decode()
