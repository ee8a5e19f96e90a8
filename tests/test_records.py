"""The record file: what goes in comes out, nothing half-written stays, and the schema means what it says."""

import copy
import hashlib
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from spath_eval import UsageError, records
from spath_eval.quality.statistics import Retention

EXAMPLE = Path(__file__).parent / "data" / "record.json"


@pytest.fixture
def example():
    return records.read(EXAMPLE)


def test_a_written_record_reads_back_the_same(example, tmp_path):
    path = tmp_path / "new" / "folder" / "record.json"
    records.write(example, path)
    assert records.read(path) == example
    assert [entry.name for entry in path.parent.iterdir()] == ["record.json"]


def test_values_of_numpy_torch_and_python_become_json(tmp_path):
    values = {
        "numpy": [np.float32(0.5), np.int64(3), np.bool_(True), np.array([1, 2])],
        "torch": [torch.tensor(0.25, dtype=torch.bfloat16), torch.tensor([1, 2])],
        "tuple": (0.1, 0.9),
        "path": Path("folder/file"),
        "retention": Retention(None, None, "no chance level"),
        "text": "Größe \udce9 √2",
    }
    records.write({"version": 1, **values}, tmp_path / "record.json")
    assert records.read(tmp_path / "record.json") == {
        "version": 1,
        "numpy": [0.5, 3, True, [1, 2]],
        "torch": [0.25, [1, 2]],
        "tuple": [0.1, 0.9],
        "path": "folder/file",
        "retention": {"value": None, "ci95": None, "reason": "no chance level"},
        "text": "Größe \udce9 √2",
    }
    assert "Größe" in (tmp_path / "record.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        ({"cases": [{"speed": {"ratio": float("nan")}}]}, ValueError, r"cases\[0\]\.speed\.ratio is nan"),
        ({"cases": [{"kl": np.float32("inf")}]}, ValueError, r"cases\[0\]\.kl is inf"),
        ({"scores": torch.tensor([1.0, float("nan")])}, ValueError, r"scores\[1\] is nan"),
        ({"site": {3: 0.1}}, TypeError, "site has the key 3"),
        ({"names": {"a"}}, TypeError, "names is a set"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_its_key_path_and_the_old_file_stays(record, error, message, tmp_path):
    path = tmp_path / "record.json"
    path.write_text("old")
    with pytest.raises(error, match=message):
        records.write(record, path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["record.json"]


def unwritable(folder):
    """Paths no record can be written to, and a word of the reason."""
    (folder / "file").write_text("")
    os.mkfifo(folder / "pipe")
    return [
        (folder, "it is a folder"),
        (folder / "file" / "record.json", "Not a directory"),
        (folder / "file" / "deeper" / "record.json", "Not a directory"),
        (folder / "pipe", "not a regular file"),
        (folder / ("x" * 300), "too long"),
    ]


def test_an_unwritable_path_is_told_before_and_at_writing_and_leaves_nothing(tmp_path):
    paths = unwritable(tmp_path)
    before = sorted(os.listdir(tmp_path))
    for path, reason in paths:
        for attempt in (records.check_writable, lambda path: records.write({"version": 1}, path)):
            with pytest.raises(UsageError, match=f"cannot write .*{reason}"):
                attempt(path)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_folder_is_told_before_a_run(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot write"):
        records.check_writable(tmp_path / "new" / "record.json")


def test_checking_a_writable_path_leaves_nothing(tmp_path):
    records.check_writable(tmp_path / "new" / "folder" / "record.json")
    assert os.listdir(tmp_path) == []


def test_a_record_has_the_permissions_of_any_new_file_and_follows_links(tmp_path):
    (tmp_path / "plain").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    records.write({"version": 1}, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read .*No such file"),
        ("{", "is not a record: Expecting"),
        ("[1]", "has no version"),
        ('{"cases": []}', "has no version"),
        ('{"version": 1, "seed": NaN}', "it contains NaN"),
        ('{"version": 2}', "newer version 2: upgrade spath-eval"),
        (b"\xff\xfe", "is not a record"),
    ],
)
def test_a_file_that_is_no_record_of_this_version_is_told_by_name(text, message, tmp_path):
    path = tmp_path / "some.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=message) as raised:
        records.read(path)
    assert "some.json" in str(raised.value)


def test_samples_are_one_json_line_each_with_their_digest(tmp_path):
    rows = [{"doc": index, "scores": (np.float32(index), 0.5), "text": "a\nb"} for index in range(3)]
    found = records.write_samples(iter(rows), tmp_path / "run" / "math.jsonl", folder=tmp_path)
    content = (tmp_path / found["path"]).read_bytes()
    assert found == {"path": "run/math.jsonl", "sha256": hashlib.sha256(content).hexdigest()}
    assert [json.loads(line)["scores"] for line in content.splitlines()] == [[0.0, 0.5], [1.0, 0.5], [2.0, 0.5]]
    assert records.write_samples(rows, tmp_path / "run" / "math.jsonl")["path"] == "math.jsonl"


def test_samples_that_fail_on_the_way_leave_the_old_file(tmp_path):
    path = tmp_path / "math.jsonl"
    path.write_text("old")
    with pytest.raises(ValueError, match=r"row 1\.score is nan"):
        records.write_samples([{"score": 1.0}, {"score": float("nan")}], path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["math.jsonl"]


def test_the_environment_fits_the_schema_and_names_what_matters(example):
    example["environment"] = found = records.environment("cpu", "float32")
    records.validate(example)
    assert found["packages"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert ("commit" in found["revision"]) if found["revision"] else found["revision_reason"]


def test_the_revision_is_that_of_a_checkout_which_tracks_the_package(tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert records._revision(package)["revision"] is None

    def git(*arguments):
        identity = ("-c", "user.name=test", "-c", "user.email=test@localhost")
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    git("init")
    found = records._revision(package)
    assert found == {"revision": None, "revision_reason": "no git checkout that tracks the package could be read"}
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    commit = (tmp_path / ".git" / git_head(tmp_path)).read_text().strip()
    assert records._revision(package)["revision"] == {"commit": commit, "dirty": False}
    (package / "__init__.py").write_text("changed")
    assert records._revision(package)["revision"] == {"commit": commit, "dirty": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert records._revision(package)["revision_reason"] == "git is not installed"


def git_head(folder):
    return (folder / ".git" / "HEAD").read_text().removeprefix("ref: ").strip()


def changed(record, path, value):
    """A copy of `record` with `value` at `path`, or without what stands there where `value` is `...`."""
    record = copy.deepcopy(record)
    target = record
    for key in path[:-1]:
        target = target[key]
    if value is ...:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    return record


CASE = ("cases", 0)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 2),
        (("status",), "done"),
        (("created",), "yesterday"),
        (("seed",), None),
        (("environment", "revision_reason"), ...),
        (("models", 0, "parameters"), ...),
        (("models", 0, "sites"), []),
        (("tasks", 0, "chance"), None),
        ((*CASE, "id"), ...),
        ((*CASE, "outcome"), "ok"),
        ((*CASE, "sparsity", "achieved"), 1.2),
        ((*CASE, "preservation"), None),
        ((*CASE, "preservation", "kl"), None),
        ((*CASE, "preservation", "perplexity", "ci95"), [1.0]),
        ((*CASE, "quality", 0, "difference", "p_value"), 1.5),
        ((*CASE, "quality", 0, "retention"), {"value": None, "ci95": None, "reason": None}),
        ((*CASE, "quality", 0, "retention"), {"value": 1.0, "ci95": None}),
        ((*CASE, "speed"), []),
        ((*CASE, "speed", 0, "decode"), None),
        ((*CASE, "speed", 0, "decode", "ceiling"), None),
        ((*CASE, "gates", "parity"), None),
        ((*CASE, "gates", "parity", "ok"), False),
        ((*CASE, "gates", "exercised", "ok"), False),
        ((*CASE, "gates", "exercised", "keep_all_difference"), 1e-9),
        ((*CASE, "gates", "exercised", "drop_all_difference"), 0.0),
        ((*CASE, "gates", "exercised", "phases"), {"training": 3}),
        ((*CASE, "gates", "disjoint"), {"ok": False, "overlap": {"math": 0.1}, "allowed": False}),
        (("cases", 3, "message"), ""),
    ],
)
def test_the_schema_refuses_departures(example, path, value):
    with pytest.raises(ValueError, match="not a version 1 record"):
        records.validate(changed(example, path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("added_later",), {"anything": 1}),
        (("status",), "interrupted"),
        (("cases",), []),
        (("tasks", 0, "limit"), 50),
        (("environment", "revision"), {"commit": "0" * 40, "dirty": True}),
        ((*CASE, "evaluated_on_texts"), "added later"),
        ((*CASE, "gates", "disjoint"), {"ok": False, "overlap": {"math": 0.1}, "allowed": True}),
        ((*CASE, "gates"), {"exercised": None, "parity": None, "disjoint": None, "reason": "made by a plugin"}),
        ((*CASE, "quality", 0, "retention"), {"value": 1.0, "ci95": None, "ci95_reason": "one document"}),
        (("cases", 3), {"id": "a/b/c@0.1", "model": "a", "domain": "b", "outcome": "error", "message": "crashed",
                        "strategy": {"name": "c", "options": {}, "kind": "token"}}),
    ],
)  # fmt: skip
def test_the_schema_admits_what_may_vary(example, path, value):
    records.validate(changed(example, path, value))


def test_the_example_fits_the_schema_and_departures_are_named_by_place(example):
    records.validate(example)
    with pytest.raises(ValueError, match=r"\$\.cases\[0\]\.seconds: 'long' is not of type 'number'"):
        records.validate(changed(example, (*CASE, "seconds"), "long"))
