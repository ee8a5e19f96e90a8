"""Arms in pairs: what is compared with what, and that it is the documents' differences that count."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spath_eval import Domain
from spath_eval.collection import Case, cross
from spath_eval.plugins.strategies.magnitude import Magnitude
from spath_eval.plugins.strategies.negative import Negative
from spath_eval.quality.adapter import Evaluation, Scores
from spath_eval.quality.paired import Arm, compare_arms, compare_quality, noise_floor

MATH, CODE = (Domain(name, lambda split: [], ()) for name in ("math", "code"))
GENERATOR = np.random.default_rng(0)
KEY = ("choice", "acc", "none")


def scores(values, groups=()):
    per_document = {f"{number}:h:p": float(value) for number, value in enumerate(values)}
    return Scores(*KEY, True, float(np.mean(values)), None, per_document, groups=dict(groups))


def evaluation(found):
    return Evaluation({found.key: found}, [{"task": "choice", "doc_id": n} for n in range(len(found.per_document))])


def quality(dense, sparse, chance=0.25):
    return compare_quality(evaluation(dense), evaluation(sparse), lambda _: (chance, None), seed=0)


def arm(case, dense, sparse, nats=()):
    heldout = {f"document {number}": (value, 10) for number, value in enumerate(nats)}
    return Arm(case, {KEY: sparse}, quality(dense, sparse), heldout)


def own(strategy=None, sparsity=0.15, domain=MATH):
    return Case("tiny", domain, strategy or Negative(), sparsity, "compact")


@pytest.fixture(scope="module")
def answers():
    """0/1 scores of a dense model and two pathways on 200 documents."""
    dense = (GENERATOR.random(200) < 0.8).astype(float)
    return [dense, *(np.where(GENERATOR.random(200) < share, 1 - dense, dense) for share in (0.1, 0.6))]


def test_a_difference_of_retentions_is_that_of_the_means(answers):
    dense, good, bad = map(scores, answers)
    first, second = arm(own(), dense, good), arm(own(Magnitude()), dense, bad)
    (found,) = compare_arms([first, second], seed=0)
    kept = [entry.quality[0]["retention"]["value"] for entry in (first, second)]
    assert found["quantity"] == "retention"
    assert (found["case"], found["other"]) == ("tiny/math/negative@0.15", "tiny/math/magnitude@0.15")
    assert found["value"] == pytest.approx(kept[0] - kept[1])
    assert found["ci95"][0] < found["value"] < found["ci95"][1]
    assert found["p_value"] < 0.05


def test_a_ratio_of_perplexities_is_of_the_same_documents(answers):
    dense, good, _ = map(scores, answers)
    first, second = (arm(own(one), dense, good, nats) for one, nats in ((None, [20, 31]), (Magnitude(), [22, 35])))
    found = next(found for found in compare_arms([first, second], seed=0) if found["quantity"] == "perplexity")
    assert found["value"] == pytest.approx(math.exp((20 + 31 - 22 - 35) / 20))
    other = arm(own(Magnitude()), dense, good, [22, 35, 4])  # not the same documents
    assert [found["quantity"] for found in compare_arms([first, other], seed=0)] == ["retention"]


def test_strategies_are_compared_in_their_own_domain_and_masks_within_their_strategy(answers):
    dense, good, _ = map(scores, answers)
    cases = cross([own(), own(domain=CODE), own(Magnitude())], [MATH, CODE])
    found = compare_arms([arm(case, dense, good) for case in cases], seed=0)
    assert {(entry["evaluated_on"], entry["case"], entry["other"]) for entry in found} == {
        ("math", "tiny/math/negative@0.15", "tiny/code>math/negative@0.15"),
        ("math", "tiny/math/negative@0.15", "tiny/pooled>math/negative@0.15"),
        ("math", "tiny/math/negative@0.15", "tiny/math/magnitude@0.15"),
        ("code", "tiny/code/negative@0.15", "tiny/math>code/negative@0.15"),
        ("code", "tiny/code/negative@0.15", "tiny/pooled>code/negative@0.15"),
    }
    assert {(entry["value"], tuple(entry["ci95"]), entry["p_value"]) for entry in found} == {(0.0, (0.0, 0.0), 1.0)}


def test_cases_of_different_sparsity_are_not_compared(answers):
    dense, good, _ = map(scores, answers)
    assert not compare_arms([arm(own(sparsity=sparsity), dense, good) for sparsity in (0.1, 0.2)], seed=0)


def test_documents_that_share_a_passage_count_once(answers):
    dense, good, _ = answers
    repeated = [np.repeat(values, 4) for values in (dense, good)]
    groups = {f"{number}:h:p": str(number // 4) for number in range(len(repeated[0]))}
    (alone,) = quality(scores(dense), scores(good))
    (together,) = quality(scores(repeated[0], groups), scores(repeated[1], groups))
    (naive,) = quality(*map(scores, repeated))
    assert together["difference"]["value"] == pytest.approx(alone["difference"]["value"])
    assert together["difference"]["ci95"] == pytest.approx(alone["difference"]["ci95"], abs=0.01)
    assert np.ptp(naive["difference"]["ci95"]) < 0.6 * np.ptp(together["difference"]["ci95"])


def test_the_noise_floor_counts_documents_that_change(answers):
    dense, good, _ = map(scores, answers)
    (floor,) = noise_floor(evaluation(dense), evaluation(good))
    changed = sum(one != other for one, other in zip(answers[0], answers[1], strict=True))
    assert floor == {
        "task": "choice",
        "metric": "acc",
        "filter": "none",
        "documents": 200,
        "differing": changed,
        "largest": 1.0,
        "mean": pytest.approx(good.value - dense.value),
    }
