"""`spath-eval show`: a record's report as the run printed it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spath_eval.cli import load_registry, plugin_options

if TYPE_CHECKING:
    from spath_eval.contracts import Report


@click.command()
@click.argument("record", type=click.Path(path_type=Path))
@plugin_options
def command(record: Path, plugin_names: tuple[str, ...], strict_plugins: bool) -> None:
    """Print the tables of a run again, from its record."""
    from spath_eval import records

    report = load_registry(plugin_names, strict_plugins).report("console")
    click.echo(rendered(report, records.read(record)))


def rendered(report: Report, record: Mapping[str, Any]) -> str:
    """`report` for stdout: as wide as the terminal, between 60 and 100 columns, and coloured unless `NO_COLOR` is set.

    What is no valid Unicode in a model's answer is written with backslashes.
    """
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size((100, 24)).columns if terminal else 100
    text = report.render(record, width=min(max(width, 60), 100), colour=terminal and "NO_COLOR" not in os.environ)
    return text.encode("utf-8", "backslashreplace").decode()
