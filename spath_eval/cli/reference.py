"""The reference of the command line, made from the commands: `python -m spath_eval.cli.reference > docs/cli.md`.

It holds each command's `--help` as it is printed at 100 columns, without what plugins add. A test compares the file
with what is made.
"""

from __future__ import annotations

from collections.abc import Iterator

import click

from spath_eval.cli import group

WIDTH = 100
HEAD = """# The command line

Made by `python -m spath_eval.cli.reference > docs/cli.md`: change the commands, not this file.

stdout is the result, stderr the talk. Colour is for terminals only. Tables are as wide as the terminal, up to 100
columns (`speed`: 140), and wider ones are split. An error is one line; `-v` shows the traceback. Options that plugins
add to `run` are in `spath-eval run --help`."""
VARIABLES = {
    "SPATH_CACHE_DIR": "Where profiles and the dense model's answers are cached, instead of `~/.cache/spath-eval`.",
    "XDG_CACHE_HOME": "Takes the place of `~/.cache` where `SPATH_CACHE_DIR` is not set.",
    "SPATH_DATA_DIR": "Where `run` finds the rows of tasks: see its `--data-dir`.",
    "NO_COLOR": "Where it is set and not empty, nothing is coloured.",
    "GITHUB_STEP_SUMMARY": "`compare` appends its Markdown to this file.",
}
"""Environment variables that are read, besides those of the libraries."""


def reference() -> str:
    """The whole page, as Markdown."""
    variables = [f"| `{name}` | {meaning} |" for name, meaning in VARIABLES.items()]
    table = "\n".join(["## Environment", "", "| variable | meaning |", "|---|---|", *variables])
    return "\n\n".join([HEAD, *_sections(group, click.Context(group, info_name="spath-eval")), table]) + "\n"


def _sections(command: click.Command, context: click.Context) -> Iterator[str]:
    """The help of a command, and of each below it."""
    formatter = click.HelpFormatter(width=WIDTH)
    command.format_help(context, formatter)
    yield f"## {context.command_path}\n\n```text\n{formatter.getvalue().rstrip()}\n```"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner
            yield from _sections(inner, click.Context(inner, info_name=name, parent=context))


if __name__ == "__main__":
    click.echo(reference(), nl=False)
