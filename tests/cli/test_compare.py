"""`spath-eval compare` and `run --baseline`: exit codes, every form of the output, and one clear line for bad input."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

CASE = "tiny/math/negative@0.15"
TASK = "spath_math_generate"


@pytest.fixture(scope="module")
def recorded(spath_eval_command, tiny_checkpoint, brief, tmp_path_factory):
    """The record of a real run of two cases."""
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPATH_CACHE_DIR", str(folder / "cache"))
        outcome = spath_eval_command(
            "run", "--model", tiny_checkpoint, *brief, "--limit", 20, "-o", folder / "run.json"
        )
    assert outcome.status == 0, outcome.err
    return folder / "run.json"


@pytest.fixture
def baseline(recorded, tmp_path):
    """The run, in which a case has answered everything right."""
    return altered(recorded, tmp_path / "baseline.json", lambda row: 1.0)


@pytest.fixture
def regressed(recorded, tmp_path):
    """The same, but for the first half of its answers."""
    return altered(recorded, tmp_path / "candidate.json", lambda row: float(row["doc_id"] >= 10))


@pytest.fixture
def compare(spath_eval_command, monkeypatch):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    return lambda *arguments: spath_eval_command("compare", *arguments)


def altered(source, path, score):
    """A copy of a record and its samples, in which the case's answers score otherwise."""
    record = json.loads(source.read_text(encoding="utf-8"))
    lines = source.with_suffix(".samples.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    own = [row for row in rows if row["case"] == CASE and row.get("task") == TASK]
    for row in own:
        row["exact_match"] = score(row)
        row["filtered_resps"] = ["right" if row["exact_match"] else "wr\x1bong\ntwice"]
    entry = next(entry for entry in record["cases"][0]["quality"] if entry["task"] == TASK)
    entry["sparse"]["value"] = sum(row["exact_match"] for row in own) / len(own)
    content = "".join(f"{json.dumps(row)}\n" for row in rows)
    path.with_suffix(".samples.jsonl").write_text(content, encoding="utf-8")
    samples = {
        "path": path.with_suffix(".samples.jsonl").name,
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
    }
    for entry in [*record["tasks"], *record["cases"]]:
        entry["samples"] = samples
    path.write_text(json.dumps(record), encoding="utf-8")
    return path


def changed(path, change):
    """The record with `change` applied to it."""
    record = json.loads(path.read_text(encoding="utf-8"))
    change(record)
    path.write_text(json.dumps(record), encoding="utf-8")
    return path


def test_a_run_compared_with_itself_passes(compare, recorded):
    outcome = compare(recorded, recorded)
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.splitlines()[-1] == "10 rows: 10 within noise (~): passed"


def test_a_regression_is_printed_and_fails(compare, baseline, regressed):
    outcome = compare(baseline, regressed)
    assert outcome.status == 1
    row = next(line for line in outcome.out.splitlines() if line.startswith(f"  - {TASK}"))
    assert re.split(r"\s{2,}", row.strip())[:4] == [f"- {TASK}", "20", "1.000", "0.500"]
    assert row.endswith("10/0")
    *_, reason, end = outcome.out.rstrip("\n").split("\n")
    assert "10 rows: 1 worse (-), 9 within noise (~): failed" in f"{reason} {end}"
    assert f"{CASE} {TASK} exact_match answer: worse: 1.000 -> 0.500, -0.500" in outcome.out
    assert all(len(line) <= 100 for line in outcome.out.splitlines())
    assert "\x1b" not in outcome.out


def test_a_gain_passes(compare, baseline, regressed):
    outcome = compare(regressed, baseline)
    assert outcome.status == 0
    assert f"  + {TASK}" in outcome.out


def test_margins_have_a_table_and_decide(compare, baseline, regressed):
    same = compare(baseline, baseline, "--fail-on", "perplexity:1%")
    assert same.status == 0
    assert "perplexity, perplexity:1%" in same.out
    broken = compare(baseline, regressed, "--fail-on", "perplexity:1%", "--fail-on", "perplexity:2%")
    assert (broken.status, broken.err) == (4, "error: --fail-on: a quantity has one margin\n")
    unheld = compare(baseline, regressed, "--fail-on", "speed:10%")
    assert unheld.status == 1
    assert "speed:10%: no row to judge it by" in unheld.out


@pytest.mark.parametrize("margin", ["retention", "accuracy:2%", "speed.decode:200%"])
def test_a_margin_that_is_none_is_refused(compare, recorded, margin):
    outcome = compare(recorded, recorded, "--fail-on", margin)
    assert (outcome.status, outcome.out) == (4, "")
    assert f"--fail-on '{margin}'" in outcome.err


def test_flips_are_shown_with_prompt_and_both_answers(compare, baseline, regressed):
    shown = compare(baseline, regressed, "--show-flips", "2").out
    assert f"{CASE} {TASK} exact_match answer: 10 lost, 0 gained" in shown
    assert re.search(r"    prompt:    \S.+\n    baseline:  right\n    candidate: wr\ufffdong\n {15}twice\n", shown)
    assert shown.count("lost, document ") == 2
    assert "  and 8 more" in shown
    assert "lost, document" not in compare(baseline, regressed).out


def test_json_holds_every_row(compare, baseline, regressed):
    outcome = compare(baseline, regressed, "--format", "json", "--show-flips", "1")
    content = json.loads(outcome.out)
    assert content["exit_status"] == outcome.status == 1
    assert content["counts"] == {"+": 0, "-": 1, "!": 0, "*": 0, "x": 0, "~": 9}
    (worse,) = [row for row in content["rows"] if row["mark"] == "-"]
    assert (worse["case"], worse["task"], worse["change"], worse["lost"]) == (CASE, TASK, -0.5, 10)
    assert [flip["candidate"] for flip in worse["flips"]] == ["wr\x1bong\ntwice"]
    assert len(content["failures"]) == 1


def test_csv_is_a_table(compare, baseline, regressed):
    rows = list(csv.DictReader(compare(baseline, regressed, "--format", "csv").out.splitlines()))
    assert [row["mark"] for row in rows].count("-") == 1
    assert {row["case"] for row in rows} == {CASE, "tiny/math/random@0.15", "tiny/math/dense"}
    assert rows[0]["units"] == "20"


def test_junit_has_a_test_for_each_row(compare, baseline, regressed):
    changed(regressed, lambda record: record["cases"][1].update(outcome="skipped", message="a\x00message <&>"))
    outcome = compare(baseline, regressed, "--format", "junit")
    suite = ElementTree.fromstring(outcome.out).find("testsuite")
    tests = {(test.get("classname"), test.get("name")): test for test in suite}
    assert len(tests) == int(suite.get("tests")) == 8
    assert (suite.get("failures"), suite.get("skipped")) == ("1", "1")
    failure = tests[CASE, f"{TASK} exact_match answer"].find("failure")
    assert failure.get("message").startswith("worse: 1.000 -> 0.500")
    skipped = tests["tiny/math/random@0.15", "outcome"].find("skipped")
    assert skipped.get("message").endswith("skipped in the candidate: a\ufffdmessage <&>")


def test_junit_fails_where_the_comparison_does(compare, recorded, tmp_path):
    other = altered(recorded, tmp_path / "other.json", lambda row: 1.0)
    changed(other, lambda record: record["models"][0].update(fingerprint="another"))
    for arguments in ([recorded, other], [recorded, recorded, "--fail-on", "speed:1%"]):
        outcome = compare(*arguments, "--format", "junit")
        assert outcome.status == 1
        assert int(ElementTree.fromstring(outcome.out).get("failures")) == 1


def test_markdown_names_what_failed_and_folds_the_rest(compare, baseline, regressed):
    shown = compare(baseline, regressed, "--format", "markdown").out
    assert shown.startswith("### spath-eval compare: failed\n")
    assert f"- {CASE} {TASK} exact_match answer: worse: 1.000 -> 0.500" in shown
    assert len(re.findall(r"^\| `-` +\|", shown, flags=re.MULTILINE)) == 2
    assert shown.index("<details><summary>All 10 rows</summary>") > shown.index("| `-`")


def test_the_step_summary_is_appended_to(compare, baseline, regressed, tmp_path, monkeypatch):
    summary = tmp_path / "summary.md"
    summary.write_text("before\n", encoding="utf-8")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    compare(baseline, regressed)
    text = summary.read_text(encoding="utf-8")
    assert text.startswith("before\n### spath-eval compare: failed\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path))
    outcome = compare(baseline, baseline)
    assert outcome.status == 0
    assert "warning: cannot write the step summary" in outcome.err


def test_output_takes_the_form_and_stdout_the_text(compare, baseline, regressed, tmp_path):
    path = tmp_path / "new" / "results.xml"
    outcome = compare(baseline, regressed, "--format", "junit", "-o", path)
    assert outcome.status == 1
    assert ElementTree.fromstring(path.read_text(encoding="utf-8")).get("failures") == "1"
    assert outcome.out.startswith("Baseline baseline.json")
    refused = compare(baseline, regressed, "-o", tmp_path)
    assert (refused.status, refused.out) == (4, "")
    assert refused.err.startswith(f"error: cannot write {tmp_path}")


def test_another_machine_or_missing_samples_are_noted(compare, recorded, tmp_path):
    other = altered(recorded, tmp_path / "other.json", lambda row: 1.0)
    changed(other, lambda record: record.update(seed=3) or record["command"]["resolved"].update(seed=3))
    other.with_suffix(".samples.jsonl").unlink()
    shown = compare(recorded, other).out
    assert shown.startswith("The runs differ in: seed 0 -> 3.\n")
    assert "not paired: cannot read other.samples.jsonl: No such file or directory" in " ".join(shown.split())


def test_a_record_that_is_none_is_refused(compare, recorded, tmp_path):
    (tmp_path / "text.json").write_text("text", encoding="utf-8")
    for path in (tmp_path / "text.json", tmp_path / "nothing.json"):
        for arguments in ([path, recorded], [recorded, path]):
            outcome = compare(*arguments)
            assert (outcome.status, outcome.out) == (4, "")
            assert str(path) in outcome.err
            assert len(outcome.err.splitlines()) == 1


def test_a_run_compares_itself_with_a_baseline(run, work_folder, monkeypatch):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    assert run("-o", "baseline.json").status == 0
    same = run("--baseline", "baseline.json", "--seed", "1", "-o", "same.json")
    assert same.status == 0, same.out
    assert "Baseline baseline.json" in same.out
    assert "which this control draws by the seed: 0 and 1" in " ".join(same.out.split())
    assert same.out.splitlines()[-1].endswith("passed")
    rows = [json.loads(line) for line in Path("baseline.samples.jsonl").read_text().splitlines()]
    for row in rows:
        if row["case"] == CASE and "heldout" in row:
            row["nats"] *= 0.9
    content = "".join(f"{json.dumps(row)}\n" for row in rows)
    Path("baseline.samples.jsonl").write_text(content)
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    changed(
        Path("baseline.json"),
        lambda record: [entry["samples"].update(sha256=sha256) for entry in [*record["tasks"], *record["cases"]]],
    )
    worse = run("--baseline", "baseline.json", "-o", "baseline.json")  # read before it is written to
    assert worse.status == 1
    assert f"{CASE} perplexity: worse" in worse.out


def test_a_baseline_that_is_none_is_refused_before_a_model_is_loaded(run, work_folder, monkeypatch):
    import spath_eval.models

    monkeypatch.setattr(spath_eval.models, "load", lambda request: pytest.fail("a model was loaded"))
    outcome = run("--baseline", "nothing.json")
    assert outcome.status == 4
    assert "cannot read nothing.json" in outcome.err
    assert list(work_folder.iterdir()) == []


def test_comparing_imports_no_torch(recorded):
    program = (
        "import sys; from spath_eval.cli import main; "
        f"status = main(['compare', {str(recorded)!r}, {str(recorded)!r}]); "
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False"
