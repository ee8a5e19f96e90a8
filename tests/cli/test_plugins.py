"""`spath-eval plugins`, and what all commands share: exit codes, `-p`, `--strict-plugins` and `-v`."""

from __future__ import annotations

import json
import subprocess
import sys

import click
import pytest

import spath_eval
from spath_eval import UsageError
from spath_eval.cli import COMMANDS, group, load_registry, main, plugin_options
from spath_eval.cli import plugins as plugins_command


@pytest.fixture
def broken(distribute) -> str:
    distribute("broken-dist", {"broken": "broken_module"}, {"broken_module": "import no_such_thing"}, version="0.3")
    return "plugin 'broken' (broken-dist 0.3): ModuleNotFoundError: No module named 'no_such_thing'"


@pytest.fixture
def raising(monkeypatch):
    """Make `spath-eval plugins` raise what the test calls it with."""

    def raise_from_command(error: BaseException) -> None:
        @click.command("plugins")
        @plugin_options
        def command(**options: object) -> None:
            raise error

        monkeypatch.setattr(plugins_command, "command", command)

    return raise_from_command


def test_the_table_lists_plugins_then_problems(capsys, sample_plugin, broken):
    assert main(["plugins"]) == 0
    output, errors = capsys.readouterr()
    table, problems = output.split("\nproblems:\n")
    lines = table.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("sample "))
    assert lines[start].split()[1:3] == ["spath-eval-sample", "1.0"]
    provided = " ".join([*lines[start].split()[3:], *" ".join(lines[start + 1 :]).split()])
    objects = "architecture olmo; domain calendar; strategy weakest; report lines"
    assert provided == f"{objects}; hooks addoption, collection_modifyitems"
    assert max(map(len, lines)) <= 100
    assert f"  {broken}" in problems.splitlines()
    assert errors == ""


def test_json_holds_the_same(capsys, sample_plugin, broken):
    assert main(["plugins", "--json", "-p", "no:gemma"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["contract_version"] == spath_eval.CONTRACT_VERSION
    plugins = {plugin["name"]: plugin for plugin in content["plugins"]}
    assert plugins["gemma"]["status"] == "blocked"
    assert plugins["broken"]["status"] == "broken"
    assert plugins["sample"] == {
        "name": "sample",
        "module": "spath_eval_sample",
        "distribution": "spath-eval-sample",
        "version": "1.0",
        "hooks": [
            f"spath_{hook}"
            for hook in (
                "addoption",
                "collection_modifyitems",
                "register_architectures",
                "register_domains",
                "register_reports",
                "register_strategies",
            )
        ],
        "provides": {
            "architecture": ["olmo"],
            "domain": ["calendar"],
            "strategy": ["weakest"],
            "report": ["lines"],
        },
        "status": "active",
    }
    assert {
        "entry_point": "broken",
        "distribution": "broken-dist",
        "version": "0.3",
        "cause": "ModuleNotFoundError: No module named 'no_such_thing'",
    } in content["problems"]


@pytest.mark.parametrize("hook", ["spath_update_record", "update_record"])
def test_hook_lists_only_plugins_that_implement_it(capsys, distribute, sample_plugin, hook):
    source = "from spath_eval import hookimpl\n@hookimpl\ndef spath_update_record(record): ..."
    distribute("stamp-dist", {"stamp": "stamp_module"}, {"stamp_module": source})
    assert main(["plugins", "--json", "--hook", hook]) == 0
    names = [plugin["name"] for plugin in json.loads(capsys.readouterr().out)["plugins"]]
    assert "stamp" in names
    assert not {"sample", "gemma"} & set(names)


def test_an_unknown_hook_is_a_usage_error_with_a_suggestion(capsys):
    assert main(["plugins", "--hook", "run_cas"]) == 4
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: there is no hook 'run_cas': there are spath_addoption, ")
    assert errors.endswith("Did you mean spath_run_case?\n")


@pytest.mark.parametrize("arguments", [["--strict-plugins"], ["-p", "broken"]])
def test_a_problem_is_fatal_where_strict_or_asked_for(capsys, broken, arguments):
    assert main(["plugins", *arguments]) == 4
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: ")
    assert broken in errors
    assert errors.count("\n") == 1


def test_other_commands_warn_of_each_problem_once(capsys, broken):
    load_registry((), False)
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.splitlines().count(f"warning: {broken}") == 1


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("no such model"), 4, "error: no such model"),
        (click.UsageError("bad\noption"), 4, "error: bad option"),
        (click.FileError("mask.bin", "unreadable"), 4, "error: Could not open file 'mask.bin': unreadable"),
        (KeyboardInterrupt(), 2, "interrupted"),
        (click.Abort(), 2, "interrupted"),
        (ValueError("a\nb"), 3, "internal error: ValueError: a b (run with -v for the traceback)"),
        (SystemExit(1), 3, "internal error: SystemExit: 1 (run with -v for the traceback)"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_outcome_is_an_exit_code_and_one_line(capsys, raising, error, status, line):
    raising(error)
    assert main(["plugins"]) == status
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors == f"{line}\n"


@pytest.mark.parametrize("arguments", [["-v", "plugins"], ["plugins", "--verbose"]])
def test_verbose_shows_the_traceback_before_the_line(capsys, raising, arguments):
    raising(ValueError("odd"))
    assert main(arguments) == 3
    errors = capsys.readouterr().err
    assert errors.startswith("Traceback (most recent call last):")
    assert errors.splitlines()[-1] == "internal error: ValueError: odd"


def test_a_command_returns_its_exit_code(monkeypatch):
    for status, expected in ((None, 0), (1, 1), (5, 5)):
        monkeypatch.setattr(plugins_command, "command", click.Command("plugins", callback=lambda status=status: status))
        assert main(["plugins"]) == expected


@pytest.mark.parametrize("arguments", [["plugin"], ["plugins", "--jsn"], ["--nothing"], ["plugins", "extra"]])
def test_mistakes_on_the_command_line_exit_with_4_and_one_line(capsys, arguments):
    assert main(arguments) == 4
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1


def test_help_lists_every_command_and_every_exit_code(capsys):
    assert main([]) == main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, summary in COMMANDS.items():
        assert f"{name} " in text
        assert summary in " ".join(text.split())
    for status in range(6):
        assert f"\n    {status}  " in text


def test_the_short_help_is_the_first_line_of_the_command_s_own():
    for name, summary in COMMANDS.items():
        command = group.get_command(click.Context(group), name)
        assert command is not None
        assert (command.help or "").split("\n")[0] == summary


def test_version(capsys):
    assert main(["--version"]) == 0
    assert spath_eval.__version__ in capsys.readouterr().out


def test_a_reader_that_goes_away_is_no_error_message():
    command = [sys.executable, "-m", "spath_eval", "plugins"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 2
