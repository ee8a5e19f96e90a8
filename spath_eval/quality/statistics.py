"""Paired statistics: the same documents scored by the dense model and by a pathway, compared document by document.

Both arms see the same documents, so everything is computed from pairs: an unpaired test would count the difficulty of
the documents as noise twice. Intervals are percentile bootstraps over documents (Efron & Tibshirani, "An Introduction
to the Bootstrap", 1993, chapter 13), p values come from sign-flip tests, whose exact form for 0/1 scores is McNemar's
test. Every function draws the same documents for the same seed, and none returns NaN: what is undefined is `None`
with a reason, and non-finite input is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest

_BLOCK = 1_000_000
"""Entries drawn at a time, so that memory does not grow with documents x resamples."""
_TAIL = 0.025
"""Share of resamples beyond each end of a 95% interval."""


@dataclass(frozen=True)
class Difference:
    """What the pathway changed in a metric."""

    value: float
    """Mean over documents of sparse - dense."""
    ci95: tuple[float, float]
    """Bootstrap interval of `value`."""
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


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided p value of McNemar's test for `lost` against `gained` discordant pairs; 1 where there is none."""
    return float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0


def standard_error(values: ArrayLike) -> float:
    """Standard error of the mean of `values` (`[documents]`, sample deviation); 0 below two documents."""
    values = _documents(values)
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def paired_difference(
    dense: ArrayLike,
    sparse: ArrayLike,
    *,
    higher_is_better: bool = True,
    seed: int = 0,
    resamples: int = 2000,
) -> Difference:
    """Mean difference of two arms (`[documents]` each, same order), its interval, p value, and who changed.

    0/1 scores are tested by exact McNemar. Others are tested by flipping the signs of the differences at random, with
    the mean as the statistic: it tests the very quantity reported, which Wilcoxon's ranks do not, and it is the same
    test as McNemar's where scores are 0/1. Its smallest p value is 1 / (resamples + 1) (Phipson & Smyth 2010).

    Raises `ValueError` for arms of different length, no documents or non-finite scores.
    """
    dense, sparse = _arms(dense, sparse)
    change = sparse - dense
    worse, better = int((change < 0).sum()), int((change > 0).sum())
    lost, gained = (worse, better) if higher_is_better else (better, worse)
    binary = bool(np.isin([dense, sparse], (0, 1)).all())
    return Difference(
        value=float(change.mean()),
        ci95=_interval(_resampled_means(change, seed=seed, resamples=resamples)[0]),
        p_value=mcnemar(lost, gained) if binary else _sign_flip(change, seed=seed, resamples=resamples),
        lost=lost,
        gained=gained,
    )


def retention(
    dense: ArrayLike,
    sparse: ArrayLike,
    chance: float | None,
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> Retention:
    """(mean sparse - chance) / (mean dense - chance) of two arms (`[documents]` each), documents resampled in pairs.

    Undefined where there is no chance level, and where dense is not above chance by more than two standard errors:
    there is then nothing to retain, and the ratio is noise over noise. Resamples in which dense falls to chance or
    below have no ratio. They are left out of the interval where they are rare; where they outnumber one tail of the
    interval (2.5%) its end would be arbitrary, and the interval is undefined.

    Raises `ValueError` as `paired_difference` does.
    """
    dense, sparse = _arms(dense, sparse)
    if chance is None:
        return Retention(None, None, "no chance level: a perplexity is compared by its log ratio")
    if len(dense) < 2:
        return Retention(None, None, "fewer than two documents")
    margin = 2 * standard_error(dense)
    if dense.mean() - chance <= margin:
        reason = f"dense {dense.mean():.3f} is not above chance {chance:.3f} by two standard errors ({margin:.3f})"
        return Retention(None, None, reason)
    value = float((sparse.mean() - chance) / (dense.mean() - chance))
    dense_means, sparse_means = _resampled_means(dense, sparse, seed=seed, resamples=resamples)
    defined = dense_means > chance
    if (undefined := 1 - defined.mean()) > _TAIL:
        return Retention(value, None, f"dense is at or below chance in {undefined:.1%} of the resamples: no interval")
    return Retention(value, _interval((sparse_means[defined] - chance) / (dense_means[defined] - chance)), None)


def perplexity_ratio(
    dense_nll_sums: ArrayLike,
    sparse_nll_sums: ArrayLike,
    token_counts: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> PerplexityRatio:
    """Corpus perplexities exp(sum of nll / sum of tokens) of both arms, and their ratio with its interval.

    All three are `[documents]`: each document's summed negative log-likelihood in nats under either arm, and the
    number of tokens scored. Documents without a scored token are left out.

    Raises `ValueError` as `paired_difference` does, and where a perplexity is too large for a float.
    """
    dense, sparse = _arms(dense_nll_sums, sparse_nll_sums)
    dense, tokens = _arms(dense, token_counts)
    scored = tokens > 0
    if not scored.any():
        raise ValueError("no token was scored")
    dense, sparse, tokens = dense[scored], sparse[scored], tokens[scored]
    excess, count = _resampled_means(sparse - dense, tokens, seed=seed, resamples=resamples)
    logs = [dense.sum() / tokens.sum(), sparse.sum() / tokens.sum(), (sparse - dense).sum() / tokens.sum()]
    low, high = _interval(excess / count)
    if max(*logs, high) > math.log(np.finfo(np.float64).max):
        raise ValueError("a perplexity is too large to be represented")
    dense_perplexity, sparse_perplexity, ratio = map(math.exp, logs)
    return PerplexityRatio(dense_perplexity, sparse_perplexity, ratio, ci95=(math.exp(low), math.exp(high)))


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


def _blocks(resamples: int, documents: int) -> Iterator[slice]:
    step = max(1, _BLOCK // documents)
    for start in range(0, resamples, step):
        yield slice(start, min(start + step, resamples))


def _resampled_means(*columns: NDArray[np.float64], seed: int, resamples: int) -> NDArray[np.float64]:
    """Means of each column over the same documents drawn with replacement, `[columns, resamples]`."""
    generator = np.random.default_rng(seed)
    documents = len(columns[0])
    means = np.empty((len(columns), resamples))
    for block in _blocks(resamples, documents):
        drawn = generator.integers(documents, size=(block.stop - block.start, documents))
        for row, column in zip(means, columns, strict=True):
            row[block] = column[drawn].mean(axis=1)
    return means


def _interval(resampled: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(resampled, (_TAIL, 1 - _TAIL))
    return float(low), float(high)


def _sign_flip(change: NDArray[np.float64], *, seed: int, resamples: int) -> float:
    """Two-sided p value of a mean of 0, the signs of `change` (`[documents]`) being arbitrary under the hypothesis."""
    generator = np.random.default_rng(seed)
    total = change.sum()
    # The same sum added up in another order must still count as equal to the observed one.
    threshold = abs(total) - 1e-12 * np.abs(change).sum()
    extreme = 0
    for block in _blocks(resamples, len(change)):
        kept = generator.integers(2, size=(block.stop - block.start, len(change)), dtype=np.int8).astype(np.float64)
        extreme += int((np.abs(2 * (kept @ change) - total) >= threshold).sum())
    return (1 + extreme) / (1 + resamples)
