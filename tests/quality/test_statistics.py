"""Statistics against independent references: plain loops, full enumeration, and scipy's own."""

import itertools
import math
import statistics as reference
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats

from spath_eval.quality.statistics import (
    Retention,
    mcnemar,
    paired_difference,
    perplexity_ratio,
    retention,
    standard_error,
)


def arms(seed, documents=200, dense=0.8, sparse=0.7):
    generator = np.random.default_rng(seed)
    draws = generator.random(documents)
    changed = generator.random(documents) < 0.3
    return (draws < dense) * 1.0, (np.where(changed, generator.random(documents), draws) < sparse) * 1.0


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 4), (12, 3), (0, 9), (40, 61)])
def test_mcnemar_is_the_exact_binomial_tail_on_both_sides(lost, gained):
    pairs = lost + gained
    tail = sum(Fraction(math.comb(pairs, k), 2**pairs) for k in range(min(lost, gained) + 1))
    assert mcnemar(lost, gained) == pytest.approx(float(min(1, 2 * tail)), rel=1e-12)


def test_standard_error_is_that_of_the_mean():
    values = [0.2, 0.9, 0.4, 1.0, 0.0]
    assert standard_error(values) == pytest.approx(reference.stdev(values) / math.sqrt(5))
    assert standard_error([0.7]) == 0.0


def test_binary_difference_counts_the_discordant_documents():
    found = paired_difference([1, 1, 1, 0, 0, 1], [1, 0, 0, 0, 1, 1])
    assert (found.lost, found.gained) == (2, 1)
    assert found.value == pytest.approx(-1 / 6)
    assert found.p_value == mcnemar(2, 1)


def test_difference_interval_agrees_with_scipy_bootstrap():
    dense, sparse = arms(1)
    found = paired_difference(dense, sparse)
    expected = scipy.stats.bootstrap(
        (sparse - dense,), np.mean, method="percentile", n_resamples=20_000, random_state=0
    )
    assert found.ci95 == pytest.approx(tuple(expected.confidence_interval), abs=0.011)


def test_graded_difference_has_the_p_value_of_all_sign_flips():
    generator = np.random.default_rng(3)
    dense = generator.normal(size=10)
    sparse = dense + generator.normal(-0.4, 0.6, size=10)
    change = sparse - dense
    flips = [
        abs(sum(s * c for s, c in zip(signs, change, strict=True))) for signs in itertools.product((-1, 1), repeat=10)
    ]
    exact = sum(flip >= abs(change.sum()) - 1e-12 for flip in flips) / len(flips)
    found = paired_difference(dense, sparse, resamples=20_000)
    assert found.p_value == pytest.approx(exact, abs=0.01)
    assert (found.lost, found.gained) == ((change < 0).sum(), (change > 0).sum())


def test_sign_flips_of_binary_scores_agree_with_mcnemar():
    dense, sparse = arms(4, documents=80)
    binary = paired_difference(dense, sparse, resamples=20_000)
    graded = paired_difference(dense / 2, sparse / 2, resamples=20_000)
    assert graded.p_value == pytest.approx(binary.p_value, abs=0.015)


def test_identical_arms_differ_by_nothing_for_sure():
    for scores in ([1, 0, 1, 1], [0.3, 0.1, 0.7, 0.2]):
        found = paired_difference(scores, scores)
        assert (found.value, found.ci95, found.p_value, found.lost, found.gained) == (0.0, (0.0, 0.0), 1.0, 0, 0)


def test_where_lower_is_better_a_rise_is_a_loss():
    found = paired_difference([2.0, 3.0, 4.0], [2.5, 3.5, 3.0], higher_is_better=False)
    assert (found.lost, found.gained, found.value) == (2, 1, 0.0)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    covered = 0
    for seed in range(200):
        dense, sparse = arms(seed, documents=100)
        low, high = paired_difference(dense, sparse, seed=seed, resamples=400).ci95
        covered += low <= -0.1 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_retention_and_its_interval_agree_with_a_plain_loop():
    dense, sparse = arms(5)
    found = retention(dense, sparse, 0.25)
    assert found.reason is None
    assert found.value == pytest.approx((reference.mean(sparse) - 0.25) / (reference.mean(dense) - 0.25))
    generator = np.random.default_rng(99)
    ratios = []
    for _ in range(4000):
        drawn = generator.integers(len(dense), size=len(dense))
        ratios.append((sparse[drawn].mean() - 0.25) / (dense[drawn].mean() - 0.25))
    assert found.ci95 == pytest.approx(tuple(np.quantile(ratios, (0.025, 0.975))), abs=0.015)


def test_keeping_every_document_retains_exactly_all():
    dense, _ = arms(6)
    assert retention(dense, dense, 0.25) == Retention(1.0, (1.0, 1.0), None)


@pytest.mark.parametrize(
    ("dense", "chance", "reason"),
    [
        ([1, 0, 1, 0], None, "perplexity is compared by its log ratio"),
        ([1, 0, 0, 1, 0, 0, 1, 0], 0.25, "not above chance 0.250 by two standard errors"),
        ([0, 0, 0, 0], 0.0, "dense 0.000 is not above chance"),
        ([0, 0, 0, 1], 0.9, "dense 0.250 is not above chance 0.900"),
        ([1], 0.25, "fewer than two documents"),
    ],
)
def test_retention_is_undefined_with_a_reason_where_dense_knows_nothing(dense, chance, reason):
    found = retention(dense, dense, chance)
    assert found.value is None
    assert found.ci95 is None
    assert reason in (found.reason or "")


def test_retention_has_no_interval_where_dense_often_resamples_to_chance():
    dense = np.array([1.0] * 18 + [-3.2] * 2)
    found = retention(dense, dense / 2, 0.0)
    assert found.value == pytest.approx(0.5)
    assert found.ci95 is None
    assert "at or below chance in" in (found.reason or "")


def test_perplexities_are_of_the_corpus_and_the_interval_of_resampled_documents():
    generator = np.random.default_rng(7)
    tokens = generator.integers(20, 200, size=60)
    dense = tokens * generator.normal(2.0, 0.3, size=60)
    sparse = dense + tokens * generator.normal(0.1, 0.05, size=60)
    found = perplexity_ratio(dense, sparse, tokens)
    assert found.dense == pytest.approx(math.exp(dense.sum() / tokens.sum()))
    assert found.sparse == pytest.approx(math.exp(sparse.sum() / tokens.sum()))
    assert found.ratio == pytest.approx(found.sparse / found.dense)
    ratios = []
    for _ in range(4000):
        drawn = generator.integers(60, size=60)
        ratios.append(math.exp((sparse[drawn].sum() - dense[drawn].sum()) / tokens[drawn].sum()))
    assert found.ci95 == pytest.approx(tuple(np.quantile(ratios, (0.025, 0.975))), abs=0.002)


def test_documents_without_a_scored_token_do_not_count():
    with_empty = perplexity_ratio([8.0, 0.0, 6.0], [9.0, 0.0, 6.0], [4, 0, 3])
    assert with_empty == perplexity_ratio([8.0, 6.0], [9.0, 6.0], [4, 3])


def test_same_seed_same_interval():
    dense, sparse = arms(8)
    assert paired_difference(dense, sparse, seed=3) == paired_difference(dense, sparse, seed=3)
    assert retention(dense, sparse, 0.2, seed=3).ci95 != retention(dense, sparse, 0.2, seed=4).ci95


def test_many_documents_are_resampled_in_blocks_without_changing_the_answer(monkeypatch):
    dense, sparse = arms(9)
    whole = paired_difference(dense / 3, sparse / 3, resamples=1000)
    monkeypatch.setattr("spath_eval.quality.statistics._BLOCK", 1000)
    blocks = paired_difference(dense / 3, sparse / 3, resamples=1000)
    assert blocks.ci95 == pytest.approx(whole.ci95)
    assert blocks.p_value == pytest.approx(whole.p_value, abs=0.02)


@pytest.mark.parametrize(
    ("dense", "sparse", "message"),
    [
        ([], [], "one score per document"),
        ([1, 0], [1], "found 2 and 1 documents"),
        ([1, math.nan], [1, 0], "1 of 2 scores are not finite"),
        ([1, 0], [1, math.inf], "1 of 2 scores are not finite"),
    ],
)
def test_scores_that_are_no_pairs_of_numbers_are_refused(dense, sparse, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(dense, sparse)
    with pytest.raises(ValueError, match=message):
        retention(dense, sparse, 0.25)


def test_perplexities_without_tokens_or_beyond_a_float_are_refused():
    with pytest.raises(ValueError, match="no token was scored"):
        perplexity_ratio([0.0], [0.0], [0])
    with pytest.raises(ValueError, match="too large"):
        perplexity_ratio([1.0, 1.0], [1e4, 1e4], [1, 1])
