"""The shell's completion of a line, and the nearest name where one is wrong."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from spath_eval.cli import COMMANDS, main


@pytest.fixture
def completions(capfd, monkeypatch):
    """What bash is told of the last word of a line."""

    def complete(line):
        words = line.split(" ")
        monkeypatch.setenv("_SPATH_EVAL_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        assert main() == 0
        out, err = capfd.readouterr()
        assert err == ""
        return [one.partition(",")[2] for one in out.split()]

    return complete


def test_commands_are_completed(completions):
    assert completions("spath-eval ") == list(COMMANDS)
    assert "profile" in completions("spath-eval pro")


def test_options_are_completed_and_those_of_plugins_too(completions, work_folder):
    assert completions("spath-eval run --no-contr") == ["--no-controls"]
    assert completions("spath-eval run -p no:random --no-contr") == []
    assert "--sparsity" in completions("spath-eval run --model x --s")
    assert completions("spath-eval profile --no-contr") == []


def test_choices_are_completed(completions, work_folder):
    assert completions("spath-eval run --execution m") == ["masked"]
    assert "float32" in completions("spath-eval run --dtype ")


def test_a_broken_suite_or_plugin_is_no_hindrance(completions, work_folder):
    (work_folder / "pyproject.toml").write_text("[tool.spath-eval]\nsparcity = 1", encoding="utf-8")
    assert "--sparsity" in completions("spath-eval run --spars")
    assert "--sparsity" in completions("spath-eval run -p a_module_that_is_missing --spars")


def test_the_script_for_the_shell_names_the_program():
    variables = {**os.environ, "_SPATH_EVAL_COMPLETE": "zsh_source"}
    command = [sys.executable, "-m", "spath_eval"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert "#compdef spath-eval" in done.stdout
    assert "_SPATH_EVAL_COMPLETE=zsh_complete spath-eval" in done.stdout


def test_completion_imports_nothing_heavy():
    program = "\n".join(
        [
            "import sys",
            "from spath_eval.cli import main",
            "status = main()",
            "print(*[name for name in ('torch', 'transformers', 'lm_eval') if name in sys.modules], file=sys.stderr)",
            "sys.exit(status)",
        ]
    )
    line = {"COMP_WORDS": "spath-eval run --no-contr", "COMP_CWORD": "2", "_SPATH_EVAL_COMPLETE": "bash_complete"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=os.environ | line, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr.split()) == ("plain,--no-controls\n", [])


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["rum"], "Did you mean run?"),
        (["comparee", "a", "b"], "Did you mean compare?"),
        (["run", "--spasity", "0.1"], "--sparsity"),
        (["run", "--no-control"], "--no-controls"),
        (["run", "--dtype", "float23"], "Did you mean float32?"),
        (["compare", "a", "b", "--format", "markdwon"], "Did you mean markdown?"),
        (["baseline", "updat"], "update"),
    ],
)
def test_the_nearest_name_is_suggested(capsys, arguments, nearest):
    assert main(arguments) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert nearest in err
    assert len(err.splitlines()) == 1
