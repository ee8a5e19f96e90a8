"""Checks by simulation what the intervals and p values of `spath_eval.quality.statistics` promise.

    python tests/benchmarks/paired_statistics.py [--runs 2000] [--documents 300] [--discordance 0.2] [--effect 0.06]

Every run draws two arms whose true difference is known. Where it is 0 (A/A), 95% of the intervals should cover it and
at most 5% of the p values should be below 0.05; where it is not, the share of p values below 0.05 is the power, beside
that of the unpaired z-test that ignores that both arms saw the same documents. The first rows are 0/1 scores with the
given documents and share of discordant documents, the next ones those of a small benchmark where hardly anything
changes. Then follow questions in groups of six whose scores change in the same direction, compared with and without
naming the groups, and pages of unequal length compared by perplexity. The table goes to stdout, progress to stderr.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from tabulate import tabulate

from spath_eval.quality.statistics import Difference, corpus_difference, paired_difference, standard_error

Scores = NDArray[np.float64]
Draw = Callable[[np.random.Generator], tuple[Difference, bool]]
"""One run: what was found between two arms, and whether the unpaired z-test finds them different at 5%."""

ACCURACY = 0.7
"""Of the dense arm; only the unpaired z-test depends on it."""
GROUP = 6
"""Questions of a group."""
PAGES = (5, 20, 60)
SPREAD = 0.05
"""Standard deviation over pages of the excess nats per token."""


@dataclass(frozen=True)
class Setting:
    """What is drawn again and again."""

    name: str
    truth: float
    """The difference that an endless number of documents would show."""
    draw: Draw


@dataclass(frozen=True)
class Outcome:
    """Shares of the runs of a setting."""

    covered: float
    """With the truth in the interval."""
    significant: float
    """With p < 0.05."""
    unpaired: float
    """With p < 0.05 in the unpaired z-test."""
    certain: float
    """With an interval that is a point."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000, metavar="N", help="of each row (default: 2000)")
    parser.add_argument("--documents", type=int, default=300, metavar="N", help="default: 300")
    parser.add_argument("--discordance", type=float, default=0.2, metavar="X", help="default: 0.2")
    parser.add_argument("--effect", type=float, default=0.06, metavar="X", help="what is truly lost (default: 0.06)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = []
    for setting in settings(options.documents, options.discordance, options.effect):
        print(setting.name, file=sys.stderr, flush=True)
        found = simulate(setting, runs=options.runs, seed=options.seed)
        shares = (found.covered, found.significant, found.unpaired, found.certain)
        rows.append([setting.name, f"{setting.truth:g}", *(f"{share:.1%}" for share in shares)])
    headers = ["drawn", "truth", "95% interval covers it", "p < 0.05", "unpaired z-test", "interval is a point"]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


def settings(documents: int, discordance: float, effect: float) -> Iterator[Setting]:
    """The rows of the table."""
    for size, changing, lost in ((documents, discordance, effect), (50, 0.02, 0.02)):
        for truth in (0.0, -lost):
            name = f"{size} documents, {changing:.0%} discordant"
            yield Setting(name, truth, binary(size, changing, truth))
    for named in (False, True):
        how = "given" if named else "not given"
        name = f"{documents} documents in groups of {GROUP}, {discordance:.0%} discordant, groups {how}"
        yield Setting(name, 0.0, binary(documents, discordance, 0.0, group=GROUP, named=named))
    for count in PAGES:
        yield Setting(f"perplexity of {count} pages", 0.0, pages(count))


def simulate(setting: Setting, *, runs: int, seed: int) -> Outcome:
    """Draw `setting` so many times."""
    generator = np.random.default_rng(seed)
    found = [setting.draw(generator) for _ in range(runs)]
    # An end of the interval may differ from the truth by a rounding error.
    covered = [d.ci95[0] - 1e-12 <= setting.truth <= d.ci95[1] + 1e-12 for d, _ in found]
    return Outcome(
        covered=float(np.mean(covered)),
        significant=float(np.mean([d.p_value < 0.05 for d, _ in found])),
        unpaired=float(np.mean([unpaired for _, unpaired in found])),
        certain=float(np.mean([d.ci95[0] == d.ci95[1] for d, _ in found])),
    )


def binary(documents: int, discordance: float, truth: float, *, group: int = 1, named: bool = False) -> Draw:
    """0/1 scores of two arms, of which a share `discordance` differs, on average by `truth` over all documents.

    Those of a `group` that differ do so in the same direction; `named` says whether the groups are made known.
    """
    losing = (1 - truth / discordance) / 2
    agreeing = (ACCURACY - losing * discordance) / (1 - discordance)
    labels = np.arange(documents) // group

    def draw(generator: np.random.Generator) -> tuple[Difference, bool]:
        differs = generator.random(documents) < discordance
        lost = (generator.random(labels[-1] + 1) < losing)[labels]
        agreed = generator.random(documents) < agreeing
        dense = np.where(differs, lost, agreed).astype(np.float64)
        sparse = np.where(differs, ~lost, agreed).astype(np.float64)
        seed = int(generator.integers(2**32))
        found = paired_difference(dense, sparse, groups=labels if named else None, seed=seed)
        return found, is_different(dense, sparse)

    return draw


def pages(count: int) -> Draw:
    """Log-likelihoods of pages whose lengths are log-normal and whose excess nats per token are normal around 0."""

    def draw(generator: np.random.Generator) -> tuple[Difference, bool]:
        words = np.ceil(generator.lognormal(math.log(1500), 0.7, count))
        dense = generator.normal(3.0, 0.3, count)
        sparse = dense + generator.normal(0.0, SPREAD, count)
        arms = (np.column_stack([-nats * words, words]) for nats in (dense, sparse))
        found = corpus_difference("word_perplexity", *arms, seed=int(generator.integers(2**32)))
        return found, is_different(dense, sparse)

    return draw


def is_different(dense: Scores, sparse: Scores) -> bool:
    """Whether an unpaired, two-sided z-test of the means finds p < 0.05."""
    error = math.hypot(standard_error(dense), standard_error(sparse))
    return bool(error and 2 * ndtr(-abs(sparse.mean() - dense.mean()) / error) < 0.05)


if __name__ == "__main__":
    main()
