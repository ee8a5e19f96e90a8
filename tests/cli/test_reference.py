"""The reference of the command line is that of the commands, and the examples in their help run."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import click
import pytest

from spath_eval.cli import COMMANDS, group
from spath_eval.cli.reference import VARIABLES, reference

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = re.compile(r"^\s*(spath-eval .+)$", re.MULTILINE)


def commands(command: click.Command, context: click.Context):
    yield command
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            yield from commands(command.get_command(context, name), context)


def examples() -> list[str]:
    found = commands(group, click.Context(group))
    return [line for command in found for line in EXAMPLE.findall(command.help or "")]


def test_the_page_is_what_the_commands_say():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == reference(), "make it again: python -m spath_eval.cli.reference > docs/cli.md"


def test_neither_the_terminal_nor_a_plugin_changes_it(monkeypatch, distribute):
    before = reference()
    monkeypatch.setenv("COLUMNS", "40")
    source = (
        "import click\nfrom spath_eval import hookimpl\n@hookimpl\ndef spath_addoption(group):\n"
        "    group.params.append(click.Option(['--of-a-plugin']))"
    )
    distribute("adding-dist", {"adding": "adding_module"}, {"adding_module": source})
    assert reference() == before
    blocks = re.findall(r"```text\n(.*?)```", before, re.DOTALL)
    assert max(len(line) for block in blocks for line in block.splitlines()) <= 100


def test_every_command_and_option_is_there():
    page = reference()
    for name in COMMANDS:
        assert f"\n## spath-eval {name}\n" in page
    for command in commands(group, click.Context(group)):
        for parameter in command.params:
            assert all(option in page for option in parameter.opts if option.startswith("-"))


def test_every_variable_that_is_read_is_there():
    patterns = (r"environ\.get\(\s*\"([A-Z_]+)\"", r"environ\[\"([A-Z_]+)\"\]", r"envvar=\"([A-Z_]+)\"")
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "spath_eval").rglob("*.py")]
    sources += [path.read_text(encoding="utf-8") for path in (ROOT / "plugins").rglob("*.py")]
    found = {name for source in sources for pattern in patterns for name in re.findall(pattern, source)}
    ours = {name for name in found if name.startswith(("SPATH_", "XDG_", "GITHUB_")) or name == "NO_COLOR"}
    assert ours <= set(VARIABLES)
    assert {name for name in VARIABLES if name.startswith("SPATH_")} <= ours


@pytest.mark.parametrize("line", examples())
def test_the_examples_in_the_help_run(line, spath_eval_command, work_folder):
    """In a folder with the record that some of them name."""
    shutil.copy(ROOT / "tests" / "data" / "record.json", work_folder)
    program, *arguments = shlex.split(line)
    outcome = spath_eval_command(*arguments)
    assert (program, outcome.status) == ("spath-eval", 0), outcome.err
