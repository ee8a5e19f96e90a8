"""`spath-eval profile` and `spath-eval mask`: files that others can read, and that `run --mask` evaluates."""

from __future__ import annotations

import shutil

import pytest
import torch

from spath_eval.masks import Mask
from spath_eval.profiling import Profile

SITES = ["model.layers.0.mlp", "model.layers.1.mlp"]


@pytest.fixture
def make(spath_eval_command, work_folder, tiny_checkpoint, short_text):
    """Calls `spath-eval profile` or `mask` on the tiny checkpoint."""

    def call(command, *arguments):
        options = ["--profile-tokens", 600, "--profile-text", f"math={short_text}", "--batch-size", 8]
        return spath_eval_command(command, "--model", tiny_checkpoint, *options, *arguments)

    return call


@pytest.fixture
def mask(make, work_folder):
    """A mask of the tiny checkpoint."""
    assert make("mask", "--domain", "math", "--sparsity", "0.25", "-o", "negative.safetensors").status == 0
    return work_folder / "negative.safetensors"


def refused(outcome, *words):
    """Assert that the command refused in one clear line that holds these words."""
    assert (outcome.status, outcome.out) == (4, "")
    assert outcome.err.startswith("error: ")
    assert len(outcome.err.splitlines()) == 1, outcome.err
    for word in words:
        assert word in outcome.err


def test_a_profile_holds_what_was_asked_for(make, work_folder, short_text):
    outcome = make("profile", "--domain", "math", "-o", "new/math.safetensors", "--statistics", "mean_square,mean_abs")
    assert outcome.status == 0
    assert outcome.out == f"math: 600 tokens of {short_text}\n"
    assert outcome.err == "profile: new/math.safetensors\n"
    profile = Profile.load(work_folder / "new/math.safetensors")
    assert profile.domains["math"].tokens == 600
    for name in ("mean_square", "mean_abs"):
        values = profile.statistic(name, "math")
        assert list(values) == SITES
        assert {value.shape for value in values.values()} == {(64,)}
        assert {value.dtype for value in values.values()} == {torch.float64}
        assert all((value > 0).all() for value in values.values())
    assert [file.name for file in (work_folder / "new").iterdir()] == ["math.safetensors"]


def test_a_profile_holds_every_domain_by_default(make, work_folder, short_text):
    texts = [f"--profile-text={domain}={short_text}" for domain in ("code", "factual", "language")]
    assert make("profile", "-o", "all.safetensors", *texts).status == 0
    profile = Profile.load(work_folder / "all.safetensors")
    assert sorted(profile.domains) == ["code", "factual", "language", "math"]


def test_a_mask_is_the_one_that_a_run_uses(make, mask, run, work_folder):
    loaded = Mask.load(mask)
    assert list(loaded.keep) == SITES
    assert loaded.achieved == 0.25
    (case,) = run("--sparsity", "0.25", "--no-controls").record["cases"]
    assert case["mask"]["digest"] == loaded.digest
    assert loaded.provenance["case"] == "tiny/math/negative@0.25"
    assert loaded.provenance["profile"] == case["profile"]


def test_a_mask_is_evaluated_as_its_strategy_would_be(mask, run):
    given = run("--mask", mask, "-o", "1.json").record
    (asked,) = run("--sparsity", "0.25", "--no-controls", "-o", "2.json").record["cases"]
    assert [case["id"] for case in given["cases"]] == [
        "tiny/math/mask:file=negative.safetensors@0.25",
        "tiny/math/random@0.25",
    ]
    case = given["cases"][0]
    assert case["mask"]["digest"] == asked["mask"]["digest"]
    assert case["mask"]["path"] == str(mask)
    assert case["quality"] == asked["quality"]
    assert case["preservation"] == asked["preservation"]
    assert case["sparsity"] == asked["sparsity"]


def test_the_id_of_a_mask_does_not_depend_on_its_folder(mask, run, work_folder, tmp_path):
    moved = tmp_path / "elsewhere" / mask.name
    moved.parent.mkdir()
    shutil.copy(mask, moved)
    outcomes = [run("--mask", path, "--collect-only") for path in (mask, mask.name, moved)]
    assert {outcome.out for outcome in outcomes} == {
        "tiny/math/mask:file=negative.safetensors@0.25\ntiny/math/random@0.25\n"
    }


@pytest.mark.parametrize("strategy", ["random", "keep-all", "reverse:pool=model", "negative:pool=layer"])
def test_every_static_strategy_has_a_mask_to_write(make, work_folder, strategy):
    outcome = make("mask", "--domain", "math", "--strategy", strategy, "--sparsity", "0.5", "-o", "mask.safetensors")
    assert outcome.status == 0
    expected = 0.0 if strategy == "keep-all" else 0.5
    assert Mask.load(work_folder / "mask.safetensors").achieved == expected
    assert f"{expected:.4f} of the neurons removed" in outcome.out
    assert outcome.err == "mask: mask.safetensors\n"


def test_a_mask_of_another_model_is_refused(run, work_folder):
    Mask({"model.layers.0.mlp": torch.ones(64, dtype=torch.bool)}).save(work_folder / "short.safetensors")
    refused(run("--mask", "short.safetensors"), "lacks 1 of the model's sites, model.layers.1.mlp")
    narrow = {path: torch.ones(32, dtype=torch.bool) for path in SITES}
    Mask(narrow).save(work_folder / "narrow.safetensors")
    refused(run("--mask", "narrow.safetensors"), "shape [32], the model's site [64]")
    assert sorted(file.name for file in work_folder.iterdir()) == ["narrow.safetensors", "short.safetensors"]


def test_what_is_no_mask_is_refused(run, make, mask, tiny_checkpoint, work_folder, tmp_path):
    (tmp_path / "text").write_text("not a mask", encoding="utf-8")
    refused(run("--mask", tmp_path / "text"), "cannot read mask")
    (tmp_path / "half").write_bytes(mask.read_bytes()[:-10])
    refused(run("--mask", tmp_path / "half"), "cannot read mask")
    refused(run("--mask", tmp_path), "cannot read mask")
    refused(run("--mask", tiny_checkpoint / "model.safetensors"), "is not a mask")
    make("profile", "--domain", "math", "-o", tmp_path / "profile")
    refused(run("--mask", tmp_path / "profile"), "is not a mask")
    Mask({}).save(tmp_path / "empty")
    refused(run("--mask", tmp_path / "empty"), "empty")
    assert [file.name for file in work_folder.iterdir()] == [mask.name]


@pytest.mark.parametrize("command", ["profile", "mask"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--domain", "maths"], ["unknown domain 'maths'"]),
        (["--domain", "math,"], ["--domain"]),
        (["--model", "./missing"], ["name one model", "./missing"]),
        (["--profile-text", "math"], ["--profile-text"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--seed", "-1"], ["--seed"]),
        (["--nonsense"], ["--nonsense"]),
    ],
)
def test_bad_options_are_refused(make, work_folder, command, options, words):
    outcome = make(command, "--domain", "math", "-o", "file", *options)
    assert outcome.status == 4
    assert len(outcome.err.splitlines()) == 1
    assert any(word in outcome.err for word in words)
    assert list(work_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "name one of each"),
        (["--domain", "math,code"], "name one of each"),
        (["--domain", "math", "--sparsity", "0.1,0.2"], "name one of each"),
        (["--domain", "math", "--strategy", "negative,random"], "name one of each"),
        (["--domain", "math", "--sparsity", "1"], "sparsity"),
        (["--domain", "math", "--sparsity", ""], "sparsity"),
        (["--domain", "math", "--strategy", ""], "--strategy"),
        (["--domain", "math", "--strategy", "negative:pool=head"], "layer or model"),
    ],
)
def test_a_mask_of_several_things_is_refused(make, work_folder, options, words):
    refused(make("mask", "-o", "file", *options), words)
    assert list(work_folder.iterdir()) == []


@pytest.mark.parametrize("statistics", ["median", "", "mean_abs,", "mean_abs,median"])
def test_unknown_statistics_are_refused(make, work_folder, statistics):
    refused(make("profile", "--domain", "math", "-o", "file", "--statistics", statistics))
    assert list(work_folder.iterdir()) == []


@pytest.mark.parametrize("command", ["profile", "mask"])
def test_unwritable_output_is_refused(make, work_folder, command):
    (work_folder / "taken").write_text("mine", encoding="utf-8")
    for output in ("taken/file", "."):
        refused(make(command, "--domain", "math", "-o", output), "cannot write")
    refused(make(command, "--domain", "math"), "-o")
    assert [file.name for file in work_folder.iterdir()] == ["taken"]


def test_a_profile_needs_no_strategy(make, work_folder):
    outcome = make("profile", "--domain", "math", "-o", "file", "-p", "no:negative")
    assert outcome.status == 0, outcome.err
