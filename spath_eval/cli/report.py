"""`spath-eval report`: a record as a page, tables or rows."""

from __future__ import annotations

from pathlib import Path

import click

from spath_eval.cli import load_registry, plugin_options
from spath_eval.cli.show import rendered
from spath_eval.contracts import UsageError


@click.command()
@click.argument("record", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "name",
    required=True,
    metavar="NAME",
    help="html, md, csv, latex, json, junit, console, or a report that a plugin offers.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file to write.  [default: stdout]")
@click.option(
    "--show-flips",
    default=10,
    show_default=True,
    type=click.IntRange(min=0),
    help="Per case and metric, show so many of the documents whose score changed (html, json).",
)
@plugin_options
def command(
    record: Path,
    name: str,
    output: Path | None,
    show_flips: int,
    plugin_names: tuple[str, ...],
    strict_plugins: bool,
) -> None:
    """Turn a record into a report: a page, tables, rows or test results.

    All of it comes from the file RECORD, but for the documents that changed: those stand in the samples file beside it.

    \b
    spath-eval report record.json --format html -o report.html
    spath-eval report record.json --format csv
    """
    from spath_eval import records
    from spath_eval.reports.flips import with_flips

    if output is not None and output.resolve() == record.resolve():
        raise UsageError(f"{output} is the record itself: name another file")
    report = load_registry(plugin_names, strict_plugins).report(name)
    found = with_flips(records.read(record), record.parent, show_flips)
    if output is None:
        click.echo(rendered(report, found), nl=False)
        return
    text = report.render(found, width=100, colour=False)
    with click.open_file(str(output), "w", encoding="utf-8", errors="backslashreplace", lazy=True, atomic=True) as file:
        file.write(text)
    click.echo(f"report: {output}", err=True)
