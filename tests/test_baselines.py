"""The committed baselines of the small models, and that what they are kept for, each kind of regression, fails.

Runs are those of `make compare`, cut to one domain and some documents.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from spath_eval import records
from spath_eval.plugins.strategies.negative import Negative
from spath_eval.plugins.strategies.reverse import Reverse
from spath_eval.quality.adapter import PathwayLM
from spath_eval.sites import GatedSite

BASELINES = Path(__file__).parents[1] / "results" / "baselines"
FAMILIES = ("gemma", "phi", "qwen", "llama", "moe")


@pytest.fixture
def compared(spath_eval_command, work_folder):
    """The outcome of a run of the small gemma beside its baseline."""
    options = ("--domain", "math", "--limit", 80, "--no-speed", "--baseline", BASELINES / "gemma-negative.json")
    return lambda: spath_eval_command("run", "--arch", "gemma", *options)


def failing(outcome):
    """The lines that say what failed."""
    assert outcome.status == 1, outcome.out + outcome.err
    return outcome.out


@pytest.mark.parametrize("family", FAMILIES)
def test_a_baseline_is_a_complete_run_of_committed_code(family):
    record = records.read(BASELINES / f"{family}-negative.json")
    records.validate(record)
    assert record["status"] == "complete"
    assert record["environment"]["revision"]["dirty"] is False
    assert {case["outcome"] for case in record["cases"]} == {"passed"}
    assert [model["arch"] for model in record["models"]] == [family]


def test_what_has_not_changed_passes(compared):
    outcome = compared()
    assert outcome.status == 0, outcome.out + outcome.err


def test_a_wrong_mask_is_found(compared, monkeypatch):
    monkeypatch.setattr(Negative, "select", Reverse.select)
    assert "gemma/math/negative@0.15 perplexity: worse" in failing(compared())


def test_a_wrong_scorer_is_found_though_hardly_an_answer_changes(compared, monkeypatch):
    scored = PathwayLM.loglikelihood

    def by_length(self, requests, disable_tqdm=True):
        answers = scored(self, requests)
        return [
            (score / len(request.args[1]), greedy) for request, (score, greedy) in zip(requests, answers, strict=True)
        ]

    monkeypatch.setattr(PathwayLM, "loglikelihood", by_length)
    assert "gemma/math/dense likelihood spath_math_choice: worse" in failing(compared())


def test_a_mask_that_is_not_applied_everywhere_is_found(compared, monkeypatch):
    from contextlib import nullcontext

    installed = GatedSite.installed

    def faulty(self, module):
        return nullcontext() if self.path.endswith(".1.mlp") else installed(self, module)

    monkeypatch.setattr(GatedSite, "installed", faulty)
    assert "gemma/math/negative@0.15 outcome: newly failing" in failing(compared())


def test_a_slower_path_is_found(spath_eval_command, work_folder, monkeypatch):
    """A baseline of this machine: on another, speeds are not comparable."""
    options = "--arch gemma --domain math --no-quality --no-controls --preservation-tokens 300 --profile-tokens 2000"
    run = ("run", *options.split())
    assert spath_eval_command(*run, "-o", "before.json").status == 0
    compact = GatedSite.compact

    def slower(self, mask):
        module = compact(self, mask)
        if module is not self.module:
            module.register_forward_pre_hook(lambda *arguments: time.sleep(0.01))
        return module

    monkeypatch.setattr(GatedSite, "compact", slower)
    assert "gemma/math/negative@0.15 speed.decode: worse" in failing(
        spath_eval_command(*run, "--baseline", "before.json")
    )
