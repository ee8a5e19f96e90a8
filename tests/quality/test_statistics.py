"""Statistics against independent references: plain loops, full enumeration, and scipy's own."""

import itertools
import math
import runpy
import statistics as reference
from fractions import Fraction
from pathlib import Path

import lm_eval.api.metrics
import numpy as np
import pytest
import scipy.stats

from spath_eval.quality.statistics import (
    NoiseFloor,
    Retention,
    corpus_difference,
    corpus_value,
    mcnemar,
    noise_floor,
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


def scipy_interval(samples, statistic, *, resamples, method="BCa", **settings):
    """scipy's own bootstrap, asked for the level that 95% is stretched to for so many documents."""
    documents = len(samples[0])
    reach = math.sqrt(documents / (documents - 1)) * scipy.stats.t.ppf(0.025, documents - 1)
    found = scipy.stats.bootstrap(
        samples,
        statistic,
        confidence_level=1 - 2 * scipy.stats.norm.cdf(reach),
        n_resamples=resamples,
        method=method,
        random_state=0,
        **settings,
    )
    return tuple(found.confidence_interval)


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
    expected = scipy_interval((sparse - dense,), np.mean, resamples=20_000)
    assert found.ci95 == pytest.approx(expected, abs=0.011)


def test_interval_of_skewed_differences_is_that_of_scipys_bca_and_not_of_percentiles():
    change = np.random.default_rng(2).lognormal(sigma=1.3, size=30)
    found = paired_difference(np.zeros(30), change, resamples=100_000)
    bca, percentile = (
        scipy_interval((change,), np.mean, resamples=100_000, method=method) for method in ("BCa", "percentile")
    )
    assert found.ci95 == pytest.approx(bca, rel=0.02)
    assert found.ci95 != pytest.approx(percentile, rel=0.05)


def test_interval_of_a_ratio_is_that_of_scipys_bca_with_its_generic_jackknife():
    generator = np.random.default_rng(12)
    tokens = np.ceil(generator.lognormal(5, 1, size=25))
    excess = tokens * generator.gamma(0.5, 0.1, size=25)
    expected = scipy_interval(
        (excess, tokens),
        lambda nats, counts, axis: nats.sum(axis=axis) / counts.sum(axis=axis),
        resamples=50_000,
        paired=True,
        vectorized=True,
    )
    found = perplexity_ratio(np.ones(25), 1 + excess, tokens, resamples=50_000)
    assert np.log(found.ci95) == pytest.approx(expected, rel=0.02)


def test_resamples_on_one_side_of_the_value_leave_their_percentiles():
    """One resample is always on one side, where the correction for bias would be infinite."""
    change = np.array([0.1, 0.7, 0.2, 0.9, 0.4])
    found = paired_difference(np.zeros(5), change, resamples=1)
    drawn = change[np.random.default_rng(0).integers(5, size=5)].mean()
    assert drawn != pytest.approx(found.value)
    assert found.ci95 == pytest.approx((drawn, drawn))


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


def test_documents_that_all_change_by_the_same_leave_no_doubt():
    for dense, change in (([0.25, 0.5, 1.0], 0.5), (np.linspace(0.1, 0.9, 50), -0.1), ([0, 0, 0], 1)):
        found = paired_difference(dense, np.add(dense, change))
        assert found.ci95 == (found.value, found.value)
        assert found.value == pytest.approx(change)


def test_where_lower_is_better_a_rise_is_a_loss():
    found = paired_difference([2.0, 3.0, 4.0], [2.5, 3.5, 3.0], higher_is_better=False)
    assert (found.lost, found.gained, found.value) == (2, 1, 0.0)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """A small version of the benchmark: shares of 200 runs are known to within 3 standard errors of a binomial."""
    benchmark = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "paired_statistics.py"))
    runs = 200
    for truth in (0.0, -0.06):
        setting = benchmark["Setting"]("", truth, benchmark["binary"](300, 0.2, truth))
        found = benchmark["simulate"](setting, runs=runs, seed=1)
        assert found.covered == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / runs))
        if truth:
            assert found.significant > found.unpaired + 0.1
        else:
            assert found.significant < 0.05 + 3 * math.sqrt(0.95 * 0.05 / runs)


def test_few_pages_have_an_interval_that_is_wide_enough_to_mean_something():
    """Percentiles or plain BCa cover 0 in 8 of 10 runs with five pages; a share of 200 runs is known to within 0.06."""
    benchmark = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "paired_statistics.py"))
    found = benchmark["simulate"](benchmark["Setting"]("", 0.0, benchmark["pages"](5)), runs=200, seed=2)
    assert found.covered > 0.92 - 0.06


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
        ([1, 0, 0, 1, 0, 0, 1, 0], 0.25, "dense at chance: 0.375 is not above 0.250 by two standard errors (0.366)"),
        ([0, 0, 0, 0], 0.0, "dense at chance: 0.000 is not above 0.000"),
        ([0, 0, 0, 1], 0.9, "dense at chance: 0.250 is not above 0.900"),
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


def test_grouped_documents_are_resampled_as_one():
    """Whole groups drawn in a plain loop; the groups come in no order and are of unequal size."""
    generator = np.random.default_rng(11)
    labels = np.array([f"page {number}" for number in generator.integers(40, size=300)])
    shift = dict(zip(np.unique(labels), generator.normal(-0.1, 0.3, size=40), strict=True))
    dense = generator.random(300)
    sparse = dense + np.array([shift[label] for label in labels]) + generator.normal(0, 0.05, size=300)
    found = paired_difference(dense, sparse, groups=labels, resamples=10_000)
    members = [np.flatnonzero(labels == name) for name in np.unique(labels)]
    means = []
    for _ in range(10_000):
        drawn = np.concatenate([members[number] for number in generator.integers(len(members), size=len(members))])
        means.append((sparse - dense)[drawn].mean())
    assert found.value == pytest.approx((sparse - dense).mean())
    assert found.ci95 == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), abs=0.02)
    low, high = paired_difference(dense, sparse).ci95
    assert found.ci95[1] - found.ci95[0] > 2 * (high - low)


def test_groups_of_one_document_each_change_nothing():
    dense, sparse = arms(13)
    alone = np.arange(len(dense))
    assert paired_difference(dense, sparse, groups=alone) == paired_difference(dense, sparse)
    assert retention(dense, sparse, 0.25, groups=alone) == retention(dense, sparse, 0.25)
    assert standard_error(dense, alone) == standard_error(dense)


def test_binary_scores_in_groups_are_tested_by_flipping_groups():
    dense, sparse = np.ones(12), np.array([0.0] * 6 + [0, 1, 1, 0, 1, 1])
    labels = np.repeat(["a", "b", "c", "d"], 3)
    found = paired_difference(dense, sparse, groups=labels)
    sums = [-3, -3, -1, -1]
    flips = [
        abs(sum(s * c for s, c in zip(signs, sums, strict=True))) for signs in itertools.product((-1, 1), repeat=4)
    ]
    assert found.p_value == sum(flip >= 8 for flip in flips) / 16 == 2 / 16
    assert paired_difference(dense, sparse).p_value == mcnemar(8, 0)
    assert (found.lost, found.gained) == (8, 0)


def test_standard_error_of_grouped_documents_is_that_of_their_sums():
    values, labels = [0.2, 0.4, 0.9, 0.7, 0.0, 0.1], [1, 1, 2, 2, 3, 3]
    assert standard_error(values, labels) == pytest.approx(reference.stdev([0.3, 0.8, 0.05]) / math.sqrt(3))
    assert standard_error(values, [1] * 6) == 0.0


def test_retention_of_grouped_documents_needs_dense_above_chance_by_group():
    dense = np.repeat([1.0, 0.0], [60, 40])
    pages = np.repeat(np.arange(5), 20)
    assert retention(dense, dense, 0.4).value == 1.0
    assert "dense at chance" in (retention(dense, dense, 0.4, groups=pages).reason or "")
    assert retention(dense, dense, 0.4, groups=[1] * 100).reason == "fewer than two groups of documents"


def test_groups_that_do_not_name_every_document_are_refused():
    with pytest.raises(ValueError, match="one group per document"):
        paired_difference([1, 0, 1], [1, 1, 1], groups=["a", "b"])


def pages(seed, count=40):
    """Log-likelihoods and words of pages under two arms."""
    generator = np.random.default_rng(seed)
    words = generator.integers(50, 900, size=count)
    dense = -words * generator.normal(3.0, 0.4, size=count)
    return np.column_stack([dense, words]), np.column_stack([dense - words * generator.normal(0.05, 0.1, count), words])


@pytest.mark.parametrize(
    ("metric", "aggregation"),
    [
        ("word_perplexity", lm_eval.api.metrics.weighted_perplexity),
        ("byte_perplexity", lm_eval.api.metrics.weighted_perplexity),
        ("bits_per_byte", lm_eval.api.metrics.bits_per_byte),
    ],
)
def test_corpus_metrics_are_lm_evals(metric, aggregation):
    dense, sparse = pages(14)
    before, after = aggregation(dense.tolist()), aggregation(sparse.tolist())
    assert corpus_value(metric, dense) == pytest.approx(before, rel=1e-12)
    expected = after - before if metric == "bits_per_byte" else math.log(after / before)
    found = corpus_difference(metric, dense, sparse)
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert found.ci95[0] < expected < found.ci95[1]
    assert (found.lost, found.gained) == ((dense > sparse)[:, 0].sum(), (dense < sparse)[:, 0].sum())


def test_perplexity_of_single_continuations_is_lm_evals():
    dense, sparse = (arm[:, 0] / 100 for arm in pages(15))
    before, after = map(lm_eval.api.metrics.perplexity, (dense, sparse))
    assert corpus_value("perplexity", dense) == pytest.approx(before, rel=1e-12)
    assert corpus_difference("perplexity", dense, sparse).value == pytest.approx(math.log(after / before), rel=1e-9)


def test_a_perplexity_is_compared_as_its_ratio_is_and_bits_are_its_logarithm():
    dense, sparse = pages(16)
    ratio = perplexity_ratio(-dense[:, 0], -sparse[:, 0], dense[:, 1], seed=5)
    by_words = corpus_difference("word_perplexity", dense, sparse, seed=5)
    bits = corpus_difference("bits_per_byte", dense, sparse, seed=5)
    assert math.exp(by_words.value) == pytest.approx(ratio.ratio)
    assert np.exp(by_words.ci95) == pytest.approx(ratio.ci95)
    assert np.multiply(bits.ci95, math.log(2)) == pytest.approx(by_words.ci95)
    assert by_words.p_value == bits.p_value == ratio.p_value


def test_five_pages_have_the_p_value_of_all_their_sign_flips():
    dense = np.column_stack([[-90.0, -80, -70, -60, -50], [30, 30, 30, 30, 30]])
    worse = dense - [[1, 0], [2, 0], [3, 0], [4, 0], [5, 0]]
    assert corpus_difference("word_perplexity", dense, worse).p_value == 2 / 2**5


def test_arms_that_count_different_words_are_refused():
    with pytest.raises(ValueError, match="do not count the same words"):
        corpus_difference("word_perplexity", [[-3.0, 2]], [[-3.0, 1]])


def test_noise_floor_says_how_many_scores_a_repeat_changes_and_by_how_much():
    assert noise_floor([0.5, 0.25, 1.0, 0.0], [0.5, 0.5, 0.25, 0.0]) == NoiseFloor(2, 0.75, -0.125)
    assert noise_floor([1, 0, 1], [1, 0, 1]) == NoiseFloor(0, 0.0, 0.0)
    with pytest.raises(ValueError, match="found 2 and 1 documents"):
        noise_floor([1, 0], [1])


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
