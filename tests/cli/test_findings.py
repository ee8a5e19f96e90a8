"""`spath-eval findings`: what is printed, what is written, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import weakref
from contextlib import nullcontext

import pytest

from spath_eval.pathways import StaticPathway
from spath_eval.profiling import Profile
from spath_eval.session import Session

DOMAINS = ("code", "factual", "language", "math")


@pytest.fixture
def find(spath_eval_command, work_folder, tiny_checkpoint, short_text):
    """Calls `spath-eval findings` on the tiny checkpoint with little text, and with the options given."""

    def call(*arguments, models=(tiny_checkpoint,)):
        texts = [f"--profile-text={domain}={short_text}" for domain in DOMAINS]
        brief = "--profile-tokens 300 --preservation-tokens 100 --batch-size 8 --sparsity 0.15 --ablation-sparsity 0.9"
        return spath_eval_command("findings", *models, *texts, *brief.split(), *arguments)

    return call


def refused(outcome, *words):
    """Assert that the command refused in one clear line that holds these words."""
    assert (outcome.status, outcome.out) == (4, "")
    assert outcome.err.startswith("error: ")
    assert len(outcome.err.splitlines()) == 1, outcome.err
    for word in words:
        assert word in outcome.err


def test_tables_go_to_stdout_talk_to_stderr_and_figures_to_files(find, work_folder):
    outcome = find("-o", "new/found.json", "--ablation-depths", "0")
    assert outcome.status == 0, outcome.err
    for title in ("1. Scale", "2. Depth", "2b. ", "3. Archi", "4. Skippable", "5. Mixtures", "6. Output", "6b. "):
        assert f"\n{title}" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 100
    assert outcome.err.splitlines()[0] == "tiny: profiling 4 domains"
    assert outcome.err.splitlines()[-2:] == [
        "profile: new/found.tiny.profile.safetensors",
        "findings: new/found.json",
    ]
    assert sorted(file.name for file in (work_folder / "new").iterdir()) == [
        "found.json",
        "found.tiny.profile.safetensors",
    ]
    result = json.loads((work_folder / "new/found.json").read_text())
    (part,) = result["models"]
    assert result["kind"] == "findings"
    assert result["definitions"] == {
        "ratio": 2.0,
        "percentile": 50.0,
        "pool": "layer",
        "sparsities": [0.15],
        "ablation_depths": [0.0],
        "ablation_sparsities": [0.9],
    }
    profile = Profile.load(work_folder / "new" / part["profile"]["path"])
    assert profile.fingerprint == part["profile"]["fingerprint"]
    assert part["profile"]["tokens"] == dict.fromkeys(DOMAINS, 300)
    assert [(cell["domain"], cell["sparsity"]) for cell in part["preservation"]] == [(name, 0.15) for name in DOMAINS]
    assert [cell["layer"] for cell in part["ablations"]] == [0] * 4
    assert part["model"]["gates"]["keep_all_difference"] == 0


def test_a_single_document_gives_no_interval(find, short_text, work_folder):
    outcome = find("--preservation-tokens", "5", "--no-ablation", "-o", "found.json")
    assert outcome.status == 0, outcome.err
    (part,) = json.loads((work_folder / "found.json").read_text())["models"]
    for cell in part["preservation"]:
        assert (cell["documents"], cell["perplexity"]["ci95"]) == (1, None)
        assert "one document" in cell["perplexity"]["ci95_reason"]
    assert f"{part['preservation'][0]['perplexity']['ratio']:.3f} [-]" in outcome.out


def test_json_is_what_the_file_holds(find, work_folder):
    outcome = find("--format", "json", "-o", "found.json", "--no-ablation")
    assert outcome.out == (work_folder / "found.json").read_text()
    assert json.loads(outcome.out)["models"][0]["ablations"] == []


def test_show_prints_the_tables_again_and_compare_says_what_the_file_is(find, spath_eval_command, work_folder):
    measured = find("-o", "found.json", "--no-ablation")
    assert spath_eval_command("show", "found.json").out == measured.out
    refused = spath_eval_command("compare", "found.json", "found.json")
    assert refused.status == 4
    assert refused.err == "error: found.json is not a record of a run: `spath-eval findings` wrote it\n"


def test_markdown(find, work_folder):
    outcome = find("--format", "markdown", "-o", "found.json", "--no-ablation")
    assert outcome.status == 0, outcome.err
    assert outcome.out.count("\n## ") == 7
    assert "not tested" in outcome.out
    assert "| phi-2" in outcome.out


def test_a_family_stands_for_its_small_checkpoint_and_a_folder_for_itself(find, tiny_checkpoint):
    brief = ["--no-ablation", "--profile-tokens", "100", "--preservation-tokens", "60"]
    outcome = find(*brief, "--format", "json", "-o", "found.json", models=("llama", tiny_checkpoint, "llama"))
    assert [part["model"]["name"] for part in json.loads(outcome.out)["models"]] == ["llama", "tiny"]


def test_one_model_is_in_memory_at_a_time(find, tiny_checkpoint, monkeypatch):
    load, models = Session.load, []

    def watched(session, target):
        assert [model() for model in models] == [None] * len(models)
        loaded = load(session, target)
        models.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(Session, "load", watched)
    brief = ["--ablation-depths", "0", "--profile-tokens", "100", "--preservation-tokens", "60"]
    assert find(*brief, "-o", "found.json", models=("moe", "llama", tiny_checkpoint)).status == 0
    assert len(models) == 3


def test_definitions_are_options(find):
    options = ["--ratio", "1.2", "--percentile", "75", "--pool", "model", "--domain", "code,math", "--no-ablation"]
    result = json.loads(find(*options, "--format", "json", "-o", "found.json").out)
    assert [result["definitions"][name] for name in ("ratio", "percentile", "pool")] == [1.2, 75.0, "model"]
    (part,) = result["models"]
    assert list(part["profile"]["tokens"]) == ["code", "math"]
    shares = [row["all_layers"]["share"] for row in part["skippable"]["pools"]["model"].values()]
    assert sum(shares) / 2 == pytest.approx(0.75, abs=0.01)


def test_a_mask_that_is_not_applied_fails(find, monkeypatch, work_folder):
    monkeypatch.setattr(StaticPathway, "applied", lambda self: nullcontext())
    outcome = find("-o", "found.json")
    assert (outcome.status, outcome.out) == (1, "")
    assert "FAILED tiny: removing every neuron does not change the logits" in outcome.err
    assert list(work_folder.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--ratio", "4"], ["--ratio 4", "number of domains, 4"]),
        (["--domain", "math"], ["--ratio 2", "number of domains, 1"]),
        (["--domain", "maths"], ["unknown domain 'maths'"]),
        (["--ablation-depths", "0,2"], ["--ablation-depths", "between 0 and 1"]),
        (["--ablation-depths", ""], ["--ablation-depths"]),
        (["--sparsity", "1.5"], ["sparsity"]),
        (["--percentile", "101"], ["--percentile"]),
        (["--format", "pdf"], ["--format"]),
        (["--arch", "gemma"], ["--arch"]),
        (["-o", "."], ["cannot write"]),
    ],
)
def test_what_cannot_be_measured_is_refused(find, work_folder, options, words):
    refused(find(*options), *words)
    assert list(work_folder.iterdir()) == []


def test_models_that_cannot_be_told_apart_or_found_are_refused(find, tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "other" / "tiny")
    refused(find(models=(tiny_checkpoint, tmp_path / "other" / "tiny")), "same name")
    refused(find(models=()), "MODEL")
    refused(find(models=("./missing",)), "./missing")


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from spath_eval.cli import main; main(['findings', '--help']); "
        "sys.exit(sum(name in sys.modules for name in ('torch', 'transformers', 'lm_eval', 'scipy', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "--ablation-depths" in done.stdout
