"""Start-up is cheap: asking for help imports nothing heavy."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "lm_eval", "pandas", "numpy", "scipy", "datasets", "tabulate")


@pytest.mark.parametrize(
    "command", [[sys.executable, "-m", "spath_eval"], [Path(sys.executable).with_name("spath-eval")]]
)
def test_help_takes_half_a_second_of_the_processor(command):
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*command, "--help"], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(5)) <= 0.5


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plugins", "--json"], ["plugins", "--help"]])
def test_nothing_heavy_is_imported(arguments):
    program = "\n".join(
        [
            "import sys",
            "from spath_eval.cli import main",
            f"status = main({arguments!r})",
            f"print(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)",
            "sys.exit(status)",
        ]
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stderr.split() == []


def test_help_imports_no_command():
    program = "\n".join(
        [
            "import sys",
            "from spath_eval.cli import COMMANDS, main",
            "main(['--help'])",
            "modules = [f'spath_eval.cli.{name}'.replace('-', '_') for name in COMMANDS]",
            "print(*[name for name in modules if name in sys.modules], file=sys.stderr)",
        ]
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stderr.split() == []
