"""Every command of the README runs, and what it shows is what the program prints."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from spath_eval import records
from spath_eval.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (.+)$", README, flags=re.MULTILINE)
MAIN_JOB = "spath-eval run --arch gemma --strategy negative"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory as the README has it: a clone's folders, and its plugin saved as it says."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("plugins", "tests"):
        (folder / name).symlink_to(ROOT / name)
    plugin = re.search(r"Save this as `quietest.py`:\n+```python\n(.+?)```", README, flags=re.DOTALL)[1]
    (folder / "quietest.py").write_text(plugin)
    before = Path.cwd()
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def main_job(folder):
    """The main job's record and what it printed."""
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([*shlex.split(MAIN_JOB)[1:], "-o", str(folder / "main.json")]) == 0
    return json.loads((folder / "main.json").read_text()), printed.getvalue()


def test_the_main_job_measures_four_domains_and_the_control(main_job):
    record, printed = main_job
    records.validate(record)
    assert record["status"] == "complete"
    domains = ("code", "factual", "language", "math")
    ids = [f"gemma/{domain}/{strategy}@0.15" for domain in domains for strategy in ("negative", "random")]
    assert sorted(case["id"] for case in record["cases"]) == ids
    assert {entry["subject"] for case in record["cases"] for entry in case["speed"]} == {
        "model",
        "one layer of gemma-2b, random weights",
    }
    assert all(id.partition("/")[2] in printed for id in ids)


def test_the_readme_shows_the_main_jobs_output(main_job):
    """Figures vary with the machine, and so do footnotes about them: every word shown must be among those printed."""
    shown = re.search(r"main job: begin -->\n+```text\n(.+?)```", README, flags=re.DOTALL)[1]
    assert set(re.findall(r"[a-z/]{4,}", shown)) <= set(re.findall(r"[a-z/]{4,}", main_job[1]))


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != MAIN_JOB])
def test_the_readmes_commands_run(command, folder, capsys):
    program, *arguments = shlex.split(command)
    assert program == "spath-eval"
    assert main(arguments) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize(("target", "recipe"), [("run", MAIN_JOB), ("test", "pytest")])
def test_the_two_commands_are_make_targets(target, recipe):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    shown = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True)
    assert recipe in shown.stdout
    assert f"make {target}" in README


def test_the_readmes_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_readme_names_every_exit_status_and_built_in_strategy():
    for strategy in ("negative", "specialisation", "wanda", "magnitude", "random", "reverse", "keep-all"):
        assert f"`{strategy}`" in README
    assert re.findall(r"^\| (\d) \|", README, flags=re.MULTILINE) == [str(status) for status in range(6)]


def test_the_scorer_is_constructed_as_the_readme_says():
    """Its example needs the hub for weights and rows; the names and keywords it uses are those that exist."""
    import lm_eval

    from spath_eval import SpathLM

    example = re.search(r"```python\n(import lm_eval.+?)```", README, flags=re.DOTALL)[1]
    made = []

    class Constructed(SpathLM):
        def __init__(self, pretrained, **settings):
            super().__init__(str(ROOT / "plugins/zoo/gemma"), **settings)

    class Called:
        @staticmethod
        def simple_evaluate(model, *, tasks):
            assert callable(lm_eval.simple_evaluate)
            made.append((model, tasks))

    exec("\n".join(example.splitlines()[3:]), {"lm_eval": Called, "SpathLM": Constructed})
    ((model, tasks),) = made
    assert model.max_length > 0
    assert tasks == ["arc_easy"]
