"""Paired statistics: the same documents scored by the dense model and by a pathway, compared document by document.

Both arms see the same documents, so everything is computed from pairs: an unpaired test would count the difficulty of
the documents as noise twice. Every quantity is a ratio of two sums over documents (a difference of means, a retention,
nats per token), which makes one interval serve all: the bias-corrected and accelerated bootstrap (BCa; Efron &
Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 14) with its jackknife in closed form, stretched for few
documents. p values come from sign-flip tests, whose exact form for 0/1 scores is McNemar's test. Documents that share
an origin (a page, a passage) are not independent: given as `groups`, they are resampled, and have their signs flipped,
as one. Every function draws the same documents for the same seed, and none returns NaN: what is undefined is `None`
with a reason, and non-finite input is refused. `docs/statistics.md` has a simulation of what to expect.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri, stdtrit
from scipy.stats import binomtest

_BLOCK = 1_000_000
"""Entries drawn at a time, so that memory does not grow with documents x resamples."""
_TAIL = 0.025
"""Share of resamples beyond each end of a 95% interval."""

CORPUS_METRICS: Mapping[str, float] = {
    "perplexity": 1.0,
    "word_perplexity": 1.0,
    "byte_perplexity": 1.0,
    "bits_per_byte": 1 / math.log(2),
}
"""lm-eval's metrics of a whole corpus, and the unit they are compared in: 1 nat for the logarithm of a perplexity, or
the bits of a nat."""


@dataclass(frozen=True)
class Difference:
    """What the pathway changed in a metric."""

    value: float
    """Of means over documents, sparse - dense; of perplexities, the logarithm of sparse / dense."""
    ci95: tuple[float, float]
    """Bootstrap interval of `value`; a point where all documents differ by the same, or there is only one."""
    p_value: float
    """Two-sided, of no difference; raw, not adjusted for other comparisons."""
    lost: int
    """Documents that got worse."""
    gained: int
    """Documents that got better."""


@dataclass(frozen=True)
class Retention:
    """How much of what the dense model scores above chance the pathway keeps: 1 is all, 0 is chance."""

    value: float | None
    ci95: tuple[float, float] | None
    reason: str | None
    """Why `value` or `ci95` is undefined; none where both are defined."""


@dataclass(frozen=True)
class PerplexityRatio:
    """Corpus perplexities of both arms on the same text."""

    dense: float
    sparse: float
    ratio: float
    """sparse / dense: 1 is no change, more is worse."""
    ci95: tuple[float, float]
    """Bootstrap interval of `ratio`."""
    p_value: float
    """Two-sided, of no difference."""


@dataclass(frozen=True)
class NoiseFloor:
    """What changed between two runs of the dense model that differ in nothing but the shape of their batches."""

    differing: int
    """Documents whose score is not exactly the same."""
    largest: float
    """Largest absolute difference of a document's score."""
    mean: float
    """Mean over documents of repeat - dense: a smaller difference of arms says nothing about the pathway."""


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p value of McNemar's test for `lost` against `gained` discordant pairs; 1 where there is none."""
    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def standard_error(values: ArrayLike, groups: ArrayLike | None = None) -> float:
    """Standard error of the mean of `values` (`[documents]`, sample deviation), of grouped documents by group.

    It is 0 below two documents or groups. Groups (`[documents]`) enter by the residuals of their sums (Cochran,
    "Sampling Techniques", 1977, chapter 6), which is the usual formula where each has one document.
    """
    values = _documents(values)
    sums, counts = _by_group(groups, values, np.ones_like(values))
    units = len(sums)
    if units < 2:
        return 0.0
    residuals = sums - values.mean() * counts
    return float(math.sqrt((residuals**2).sum() * units / (units - 1)) / len(values))


def paired_difference(
    dense: ArrayLike,
    sparse: ArrayLike,
    *,
    higher_is_better: bool = True,
    groups: ArrayLike | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> Difference:
    """Mean difference of two arms (`[documents]` each, same order), its interval, p value, and who changed.

    0/1 scores of ungrouped documents are tested by exact McNemar. Others are tested by flipping the signs of the
    differences, or of their sums by group, with the mean as the statistic: it tests the very quantity reported, which
    Wilcoxon's ranks do not, and it is the same test as McNemar's where scores are 0/1. Where `resamples` suffice for
    all flips the test is exact; else flips are drawn, and its smallest p value is 1 / (resamples + 1) (Phipson & Smyth
    2010). `groups` (`[documents]`, labels of any kind) says which documents belong together.

    Raises `ValueError` for arms of different length, no documents or non-finite scores.
    """
    dense, sparse = _arms(dense, sparse)
    return _difference(
        sparse - dense,
        np.ones_like(dense),
        higher_is_better=higher_is_better,
        binary=bool(np.isin([dense, sparse], (0, 1)).all()),
        groups=groups,
        seed=seed,
        resamples=resamples,
    )


def retention(
    dense: ArrayLike,
    sparse: ArrayLike,
    chance: float | None,
    *,
    groups: ArrayLike | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> Retention:
    """(mean sparse - chance) / (mean dense - chance) of two arms (`[documents]` each), documents resampled in pairs.

    Undefined where there is no chance level, and where dense is not above chance by more than two standard errors:
    there is then nothing to retain, and the ratio is noise over noise. Resamples in which dense falls to chance or
    below have no ratio. They are left out of the interval where they are rare; where they outnumber one tail of the
    interval (2.5%) its end would be arbitrary, and the interval is undefined. `groups` as in `paired_difference`.

    Raises `ValueError` as `paired_difference` does.
    """
    dense, sparse = _arms(dense, sparse)
    if chance is None:
        return Retention(None, None, "no chance level: a perplexity is compared by its log ratio")
    kept, above = _by_group(groups, sparse - chance, dense - chance)
    if len(above) < 2:
        return Retention(None, None, f"fewer than two {'documents' if groups is None else 'groups of documents'}")
    margin = 2 * standard_error(dense, groups)
    if dense.mean() - chance <= margin:
        by = f"by two standard errors ({margin:.3f})"
        return Retention(None, None, f"dense at chance: {dense.mean():.3f} is not above {chance:.3f} {by}")
    value = float(kept.sum() / above.sum())
    kept_sums, above_sums = _resampled_sums(kept, above, seed=seed, resamples=resamples)
    defined = above_sums > 0
    if (undefined := 1 - defined.mean()) > _TAIL:
        return Retention(value, None, f"dense is at or below chance in {undefined:.1%} of the resamples: no interval")
    return Retention(value, _bca(kept, above, kept_sums[defined] / above_sums[defined]), None)


def perplexity_ratio(
    dense_nll_sums: ArrayLike,
    sparse_nll_sums: ArrayLike,
    counts: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> PerplexityRatio:
    """Corpus perplexities exp(sum of nll / sum of counts) of both arms, and their ratio with its interval.

    All three are `[documents]`: each document's summed negative log-likelihood in nats under either arm, and what it
    is shared among: the number of tokens scored, or of words or bytes. Documents with a count of 0 are left out.
    `groups` as in `paired_difference`; the p value is that of flipping the signs of the documents' excess.

    Raises `ValueError` as `paired_difference` does, and where a perplexity is too large for a float.
    """
    dense, sparse = _arms(dense_nll_sums, sparse_nll_sums)
    dense, counts = _arms(dense, counts)
    found = _excess(dense, sparse, counts, unit=1.0, groups=groups, seed=seed, resamples=resamples)
    logs = [dense[counts > 0].sum() / counts.sum(), sparse[counts > 0].sum() / counts.sum(), found.value, *found.ci95]
    dense_perplexity, sparse_perplexity, ratio, low, high = map(_exp, logs)
    return PerplexityRatio(dense_perplexity, sparse_perplexity, ratio, ci95=(low, high), p_value=found.p_value)


def corpus_value(metric: str, likelihoods: ArrayLike) -> float:
    """One of `CORPUS_METRICS` from what lm-eval logs per document: a perplexity, or bits per byte.

    `likelihoods` is `[documents, 2]`, each document's log-likelihood in nats and its words or bytes, or `[documents]`
    where each counts once, as for the `perplexity` of tasks that ask for one continuation (lambada). Perplexities are
    exp(-sum of log-likelihoods / sum of counts), bits per byte are -sum of log-likelihoods / (sum of bytes ln 2).

    Raises `ValueError` for no documents, no words or bytes, non-finite values, or a perplexity too large for a float.
    """
    likelihood, counts = _likelihoods(likelihoods)
    nats = -likelihood.sum() / _positive(counts.sum())
    return float(nats * CORPUS_METRICS[metric]) if metric == "bits_per_byte" else _exp(nats)


def corpus_difference(
    metric: str,
    dense: ArrayLike,
    sparse: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    seed: int = 0,
    resamples: int = 2000,
) -> Difference:
    """Two arms compared in one of `CORPUS_METRICS`, from what lm-eval logs per document (as for `corpus_value`).

    Perplexities by the logarithm of sparse / dense, bits per byte by sparse - dense: both are the sum of the documents'
    excess nats over the sum of their counts. More is worse. `groups` as in `paired_difference`; the p value is that of
    flipping the signs of the documents' excess.

    Raises `ValueError` as `paired_difference` does, and where the arms do not count the same words or bytes.
    """
    (before, counts), (after, other) = _likelihoods(dense), _likelihoods(sparse)
    _arms(before, after)
    if not np.array_equal(counts, other):
        raise ValueError(f"{metric}: the two arms do not count the same words or bytes")
    unit = CORPUS_METRICS[metric]
    return _excess(-before, -after, counts, unit=unit, groups=groups, seed=seed, resamples=resamples)


def noise_floor(dense: ArrayLike, repeat: ArrayLike) -> NoiseFloor:
    """How much the scores (`[documents]`) of the dense model change when it is run again with other batches.

    In exact arithmetic nothing would: sums are rounded in another order, and near ties fall the other way.

    Raises `ValueError` as `paired_difference` does.
    """
    dense, repeat = _arms(dense, repeat)
    change = repeat - dense
    return NoiseFloor(int(np.count_nonzero(change)), float(np.abs(change).max()), float(change.mean()))


def _documents(values: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"one score per document is needed, found shape {list(values.shape)}")
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {len(values)} scores are not finite")
    return values


def _arms(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = _documents(first), _documents(second)
    if len(first) != len(second):
        raise ValueError(f"arms are paired document by document, found {len(first)} and {len(second)} documents")
    return first, second


def _likelihoods(items: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log-likelihoods and counts, `[documents]` each."""
    items = np.asarray(items, dtype=np.float64)
    if items.ndim == 2 and items.shape[1] == 2:
        return _arms(items[:, 0], items[:, 1])
    likelihood = _documents(items)
    return likelihood, np.ones_like(likelihood)


def _positive(count: float) -> float:
    if not count > 0:
        raise ValueError("no token was scored")
    return count


def _exp(nats: float) -> float:
    if nats > math.log(np.finfo(np.float64).max):
        raise ValueError("a perplexity is too large to be represented")
    return math.exp(nats)


def _by_group(groups: ArrayLike | None, *columns: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """The columns (`[documents]`) summed by group, which are the units that are resampled."""
    if groups is None:
        return columns
    labels = np.asarray(groups)
    if labels.shape != columns[0].shape:
        raise ValueError(
            f"one group per document is needed, found {list(labels.shape)} for {len(columns[0])} documents"
        )
    names, index = np.unique(labels, return_inverse=True)
    sums = (np.bincount(index, weights=column, minlength=len(names)) for column in columns)
    return tuple(np.asarray(total, dtype=np.float64) for total in sums)


def _excess(
    dense: NDArray[np.float64],
    sparse: NDArray[np.float64],
    counts: NDArray[np.float64],
    *,
    unit: float,
    groups: ArrayLike | None,
    seed: int,
    resamples: int,
) -> Difference:
    """What `sparse` adds to the summed nats of `dense` (`[documents]`) per count, in `unit`s of a nat."""
    _positive(counts.sum())
    scored = counts > 0
    return _difference(
        (sparse - dense)[scored] * unit,
        counts[scored],
        higher_is_better=False,
        binary=False,
        groups=None if groups is None else np.asarray(groups)[scored],
        seed=seed,
        resamples=resamples,
    )


def _difference(
    change: NDArray[np.float64],
    counts: NDArray[np.float64],
    *,
    higher_is_better: bool,
    binary: bool,
    groups: ArrayLike | None,
    seed: int,
    resamples: int,
) -> Difference:
    worse, better = int((change < 0).sum()), int((change > 0).sum())
    lost, gained = (worse, better) if higher_is_better else (better, worse)
    changes, sizes = _by_group(groups, change, counts)
    alone = len(changes) == len(change)
    numerators, denominators = _resampled_sums(changes, sizes, seed=seed, resamples=resamples)
    return Difference(
        value=float(changes.sum() / sizes.sum()),
        ci95=_bca(changes, sizes, numerators / denominators),
        p_value=mcnemar(lost, gained) if binary and alone else _sign_flip(changes, seed=seed, resamples=resamples),
        lost=lost,
        gained=gained,
    )


def _blocks(resamples: int, units: int) -> Iterator[slice]:
    step = max(1, _BLOCK // units)
    for start in range(0, resamples, step):
        yield slice(start, min(start + step, resamples))


def _resampled_sums(*columns: NDArray[np.float64], seed: int, resamples: int) -> NDArray[np.float64]:
    """Sums of each column over the same units drawn with replacement, `[columns, resamples]`."""
    generator = np.random.default_rng(seed)
    units = len(columns[0])
    sums = np.empty((len(columns), resamples))
    for block in _blocks(resamples, units):
        drawn = generator.integers(units, size=(block.stop - block.start, units))
        for row, column in zip(sums, columns, strict=True):
            row[block] = column[drawn].sum(axis=1)
    return sums


def _bca(
    numerators: NDArray[np.float64], denominators: NDArray[np.float64], resampled: NDArray[np.float64]
) -> tuple[float, float]:
    """95% interval of sum of numerators / sum of denominators (`[units]` each), `resampled` as often as it could be.

    Leaving a unit out changes the two sums by its own terms: that is the jackknife behind the acceleration. The levels
    are those of Student's t, stretched by the root of units / (units - 1), as resamples vary less than the truth where
    units are few (Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69, 2015: the
    expanded percentile interval). BCa is undefined where all resamples lie on one side of the value; the interval is
    then that of the percentiles. Where all units have the same ratio it is a point.
    """
    total, share = numerators.sum(), denominators.sum()
    value = float(total / share)
    if np.abs(numerators - value * denominators).max() <= 1e-12 * np.abs(numerators).max():
        return value, value
    # Sums of the same terms in another order still count as ties.
    tolerance = 1e-9 * np.ptp(resampled)
    below = (np.mean(resampled < value - tolerance) + np.mean(resampled <= value + tolerance)) / 2
    units = len(numerators)
    reach = math.sqrt(units / (units - 1)) * stdtrit(units - 1, _TAIL)
    normal = np.array([reach, -reach])
    levels = ndtr(normal)
    if 0 < below < 1:
        jackknife = (total - numerators) / (share - denominators)
        influence = jackknife.mean() - jackknife
        acceleration = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
        bias = ndtri(below)
        levels = ndtr(bias + (bias + normal) / (1 - acceleration * (bias + normal)))
    low, high = np.quantile(resampled, levels)
    return float(low), float(high)


def _sign_flip(change: NDArray[np.float64], *, seed: int, resamples: int) -> float:
    """Two-sided p value of a sum of 0, the signs of `change` (`[units]`) being arbitrary under the hypothesis."""
    change = change[change != 0]
    units = len(change)
    total = change.sum()
    # The same sum added up in another order must still count as equal to the observed one.
    threshold = abs(total) - 1e-12 * np.abs(change).sum()
    if 2**units <= resamples:
        kept = (np.arange(2**units)[:, None] >> np.arange(units)) & 1
        return float(np.mean(np.abs(2 * (kept @ change) - total) >= threshold))
    generator = np.random.default_rng(seed)
    extreme = 0
    for block in _blocks(resamples, units):
        flips = generator.integers(2, size=(block.stop - block.start, units), dtype=np.int8).astype(np.float64)
        extreme += int((np.abs(2 * (flips @ change) - total) >= threshold).sum())
    return (1 + extreme) / (1 + resamples)
