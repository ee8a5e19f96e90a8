"""`spath-eval baseline update`: what is written, what is refused, and that what changes is shown."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from spath_eval import records

DESTINATION = Path("results/baselines/tiny-negative.json")


@pytest.fixture(scope="module")
def recorded(spath_eval_command, tiny_checkpoint, brief, tmp_path_factory):
    """The record of a real run, as of a package that is installed from no checkout."""
    folder = tmp_path_factory.mktemp("recorded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPATH_CACHE_DIR", str(folder / "cache"))
        outcome = spath_eval_command("run", "--model", tiny_checkpoint, *brief, "-o", folder / "run.json")
    assert outcome.status == 0, outcome.err
    edit(folder / "run.json", lambda record: record["environment"].update(revision=None, revision_reason="installed"))
    return folder / "run.json"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """The working directory: a checkout with one commit."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path / "checkout"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    (folder / "code.py").write_text("one\n", encoding="utf-8")
    git("init", "--quiet")
    commit()
    return folder


@pytest.fixture
def update(spath_eval_command):
    return lambda *arguments: spath_eval_command("baseline", "update", *arguments)


def git(*arguments):
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True, capture_output=True)


def commit():
    git("add", "--all")
    git("commit", "--quiet", "--message", "a commit")


def edit(path, change):
    record = records.read(path)
    change(record)
    records.write(record, path)


def copied(recorded, folder, change=lambda record: None):
    for path in (recorded, recorded.with_suffix(".samples.jsonl")):
        shutil.copy(path, folder)
    edit(folder / recorded.name, change)
    return folder / recorded.name


def test_a_baseline_is_written_that_later_runs_compare_with(update, spath_eval_command, checkout, recorded):
    outcome = update(recorded)
    assert outcome.status == 0, outcome.err
    assert outcome.out == "new baseline: 2 cases\n"
    assert outcome.err == f"baseline: {DESTINATION}\n"
    written = records.read(DESTINATION)
    records.validate(written)
    assert {case["samples"]["path"] for case in written["cases"]} == {"tiny-negative.samples.jsonl"}
    compared = spath_eval_command("compare", DESTINATION, recorded, "--fail-on", "perplexity:0.1%")
    assert compared.status == 0, compared.out
    assert "not comparable" not in compared.out.splitlines()[-1]


def test_a_baseline_has_the_answers_and_not_the_texts_of_a_benchmark(update, checkout, recorded):
    update(recorded)
    rows = [json.loads(line) for line in DESTINATION.with_suffix(".samples.jsonl").read_text().splitlines()]
    original = [json.loads(line) for line in recorded.with_suffix(".samples.jsonl").read_text().splitlines()]
    assert len(rows) == len(original)
    assert not any({"doc", "arguments", "target", "resps"} & row.keys() for row in rows)
    kept = {(row["case"], row["doc_hash"]): row["filtered_resps"] for row in rows if "task" in row}
    assert kept == {(row["case"], row["doc_hash"]): row["filtered_resps"] for row in original if "task" in row}


def test_programs_are_not_kept_and_a_baseline_can_be_updated_with_itself(update, checkout, recorded, tmp_path):
    record = copied(recorded, tmp_path)
    samples = record.with_suffix(".samples.jsonl")
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if row.get("task") == "spath_math_generate":
            row["filtered_resps"] = [["def the_benchmarks_own(): pass"]]
    new = records.write_samples(rows, samples)
    edit(record, lambda content: [entry.update(samples=new) for entry in [*content["tasks"], *content["cases"]]])
    for source in (record, DESTINATION):
        assert update(source).status == 0
        assert "the_benchmarks_own" not in DESTINATION.with_suffix(".samples.jsonl").read_text(encoding="utf-8")


def test_documents_stay_grouped_in_a_baseline(update, spath_eval_command, checkout, recorded, tmp_path):
    def group(record):
        for task in record["tasks"]:
            task["grouped_by"] = "prompt"

    record = copied(recorded, tmp_path, group)
    update(record)
    rows = [json.loads(line) for line in DESTINATION.with_suffix(".samples.jsonl").read_text().splitlines()]
    assert all(len(row["doc"]["prompt"]) == 64 for row in rows if "task" in row)
    assert spath_eval_command("compare", record, DESTINATION).status == 0


def test_an_update_shows_what_it_changes_and_passes(update, checkout, recorded, tmp_path):
    update(recorded)
    commit()
    worse = copied(
        recorded,
        tmp_path,
        lambda record: record["cases"][0].update(outcome="failed", message="parity"),
    )
    outcome = update(worse)
    assert outcome.status == 0
    assert "newly failing: failed: parity" in outcome.out
    assert records.read(DESTINATION)["cases"][0]["outcome"] == "failed"


def test_output_names_the_baseline(update, checkout, recorded):
    assert update(recorded, "-o", "other/name.json").status == 0
    assert sorted(path.name for path in Path("other").iterdir()) == ["name.json", "name.samples.jsonl"]
    assert not DESTINATION.exists()


def test_a_dirty_tree_is_refused(update, checkout, recorded, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(checkout / "nowhere"))  # as a hook of another repository would
    (checkout / "code.py").write_text("two\n", encoding="utf-8")
    outcome = update(recorded)
    assert (outcome.status, outcome.out) == (4, "")
    assert outcome.err == "error: a baseline belongs to a commit, and this is not committed: code.py\n"
    (checkout / "new.py").write_text("new\n", encoding="utf-8")
    assert "code.py and 1 more" in update(recorded).err
    assert not DESTINATION.exists()


def test_records_and_baselines_do_not_make_a_tree_dirty(update, checkout, recorded):
    (checkout / "results/runs").mkdir(parents=True)
    (checkout / "results/runs/earlier.json").write_text("{}", encoding="utf-8")
    record = copied(recorded, checkout)
    assert update(record).status == 0
    assert update(record).status == 0
    (checkout / "deeper").mkdir()
    assert update("run.json", "-o", "deeper/baseline.json").status == 0
    outcome = update("run.json")
    assert outcome.status == 4
    assert "deeper/" in outcome.err


def test_without_a_checkout_it_is_said(update, tmp_path, monkeypatch, recorded):
    monkeypatch.chdir(tmp_path)
    outcome = update(recorded)
    assert outcome.status == 0
    assert "warning: this is no git checkout" in outcome.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record: record.update(status="interrupted"), "this one is interrupted"),
        (
            lambda record: record["environment"].update(revision={"commit": "a" * 40, "dirty": True}),
            "was made by a checkout of spath-eval with changes that are not committed",
        ),
        (
            lambda record: record["cases"][0]["samples"].update(sha256="0" * 64),
            "a baseline needs the answers of its run",
        ),
    ],
)
def test_a_record_that_is_no_baseline_is_refused(update, checkout, recorded, tmp_path, change, words):
    outcome = update(copied(recorded, tmp_path, change))
    assert (outcome.status, outcome.out) == (4, "")
    assert words in outcome.err
    assert not DESTINATION.exists()


def test_a_file_that_is_in_the_way_is_refused(update, checkout, recorded):
    outcome = update(recorded, "-o", "code.py/baseline.json")
    assert (outcome.status, outcome.out) == (4, "")
    assert "cannot write" in outcome.err
