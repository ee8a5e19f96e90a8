"""What cases say side by side: the masks of domains on one another, and strategies against each other.

Figures are the cases' own; whether two differ is read off the record's `comparisons`, which pair the documents of two
cases. Their p values are adjusted by Holm's method within what is looked at together: a matrix's comparisons of each
domain's own mask with the others, or all pairs of strategies in one domain at one sparsity.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from spath_eval.reports.tables import Group, Note, Row, Table, estimate, short

CROSS_LEGEND = (
    "mask of pooled: one mask, made from all domains together.",
    "significantly: by the paired difference on the same documents, p < 0.05 after Holm's adjustment over the "
    "comparisons of own masks with others in one matrix.",
)
LEAGUE_LEGEND = (
    "*: the best of its domain and sparsity, better than every other by the paired difference on the same documents, "
    "p < 0.05 after Holm's adjustment over all pairs there; (controls) do not compete.",
)
SIGNIFICANT = 0.05
POOLED = "pooled"
"""Whose mask it is, where it was made from all domains together."""

Case = Mapping[str, Any]


@dataclass(frozen=True)
class Pairs:
    """The paired comparisons of a record."""

    found: Mapping[tuple[str, str, str], tuple[float, float]]
    """Quantity and the ids of two cases to what the first is better by, and the raw p value."""

    @classmethod
    def read(cls, comparisons: Iterable[Mapping[str, Any]]) -> Pairs:
        """Those with a value and a p value, either way round."""
        found = {}
        for entry in comparisons:
            if entry["value"] is None or entry["p_value"] is None:
                continue
            better = -math.log(entry["value"]) if entry["quantity"] == "perplexity" else entry["value"]
            found[entry["quantity"], entry["case"], entry["other"]] = better, entry["p_value"]
            found[entry["quantity"], entry["other"], entry["case"]] = -better, entry["p_value"]
        return cls(found)

    def judge(self, quantity: str, pairs: Iterable[tuple[Case, Case]]) -> dict[tuple[str, str], int]:
        """By ids, whether the first of each pair is significantly better (1), worse (-1) or neither (0), among `pairs`;
        those that the record does not compare are left out."""
        ids = [(first["id"], second["id"]) for first, second in pairs]
        compared = {pair: self.found[quantity, *pair] for pair in ids if (quantity, *pair) in self.found}
        adjusted = holm([p_value for _, p_value in compared.values()])
        return {
            pair: 0 if p_value >= SIGNIFICANT else (better > 0) - (better < 0)
            for (pair, (better, _)), p_value in zip(compared.items(), adjusted, strict=True)
        }


@dataclass(frozen=True)
class Quantity:
    """What cases are compared by."""

    name: str
    """In the record's comparisons."""
    title: str
    of: Callable[[Case], Mapping[str, Any]]
    """A case's value and interval, or the reason why it has none."""
    better: str
    """Where a better case lies: above or below."""
    form: Callable[[float], str]
    """How it is written where cells are many."""

    def value(self, case: Case) -> float | None:
        return self.of(case).get("value")

    def is_better(self, first: Case, second: Case) -> bool:
        """Whether the value of `first` is the better one; both have one."""
        one, other = self.of(first)["value"], self.of(second)["value"]
        return one < other if self.better == "below" else one > other


def label(case: Case) -> str:
    """The id without the model."""
    return case["id"].removeprefix(case["model"] + "/")


def arm(case: Case) -> str:
    """Strategy and sparsity, as the id has them: `negative@0.15`."""
    return label(case).partition("/")[2]


def evaluated_on(case: Case) -> str:
    """The domain on which the case is evaluated."""
    return case.get("evaluated_on", case["domain"])


def is_own(case: Case) -> bool:
    """Whether the case is evaluated on the domain whose mask it is."""
    return evaluated_on(case) == case["domain"]


def perplexity_ratio(case: Case) -> Mapping[str, Any]:
    """The case's ratio of perplexities with its interval, or the reason why there is none."""
    preservation = case.get("preservation")
    if not preservation:
        return {"value": None, "reason": case.get("preservation_reason")}
    found = preservation["perplexity"]
    return {**found, "value": found["ratio"]} if found else {"reason": preservation.get("perplexity_reason")}


def mean_retention(case: Case) -> Mapping[str, Any]:
    """The mean over the tasks that have a retention, or no value.

    Tasks have documents of their own, so the errors are taken as independent and the mean's interval is built from the
    tasks' (MOVER: Zou & Donner 2008); there is none where a task has none.
    """
    found = [entry["retention"] for entry in case.get("quality", []) if "retention" in entry]
    found = [retention for retention in found if retention["value"] is not None]
    if not found:
        return {"value": None}
    values = [retention["value"] for retention in found]
    mean = sum(values) / len(values)
    intervals = [retention["ci95"] for retention in found if retention.get("ci95")]
    if len(intervals) < len(values):
        return {"value": mean}
    below = math.hypot(*(value - low for value, (low, _) in zip(values, intervals, strict=True))) / len(values)
    above = math.hypot(*(high - value for value, (_, high) in zip(values, intervals, strict=True))) / len(values)
    return {"value": mean, "ci95": (mean - below, mean + above)}


PERPLEXITY = Quantity("perplexity", "perplexity ratio [95%]", perplexity_ratio, "below", short)
RETENTION = Quantity("retention", "mean retention [95%]", mean_retention, "above", "{:.2f}".format)


def cross_domain(model: str, cases: Sequence[Case], pairs: Pairs, note: Note) -> list[Table]:
    """A matrix for each quantity, strategy and sparsity of which masks were evaluated on other domains than their own:
    masks as rows, the pooled one last, and what they were evaluated on as columns."""
    tables = []
    for crossed in dict.fromkeys(arm(case) for case in cases if not is_own(case)):
        placed = {(case["domain"], evaluated_on(case)): case for case in cases if arm(case) == crossed}
        masks = sorted(dict.fromkeys(mask for mask, _ in placed), key=lambda mask: mask == POOLED)
        domains = list(dict.fromkeys(domain for _, domain in placed))
        for quantity in (PERPLEXITY, RETENTION):
            if all(quantity.value(case) is None for case in placed.values()):
                continue
            cells = {place: _cell(case, quantity, note) for place, case in placed.items()}
            rows: list[Row] = [(mask, *(cells.get((mask, domain), "-") for domain in domains)) for mask in masks]
            title = f"Across domains, {model}, {crossed}: {quantity.title}"
            header = ("mask of", *(f"on {domain}" for domain in domains))
            tables.append(Table(title, header, [Group("", rows)], _own_masks(placed, quantity, pairs), CROSS_LEGEND))
    return tables


def league(model: str, cases: Sequence[Case], pairs: Pairs, note: Note) -> list[Table]:
    """A table for each quantity, where at least two static strategies compete: strategies by sparsity as rows, controls
    in parentheses and last, and domains as columns."""
    placed = [case for case in cases if is_own(case) and case["strategy"]["kind"] == "static"]
    if len({_strategy(case)[0] for case in placed if _competes(case)}) < 2:
        return []
    domains = list(dict.fromkeys(case["domain"] for case in placed))
    tables = []
    for quantity in (PERPLEXITY, RETENTION):
        if all(quantity.value(case) is None for case in placed):
            continue
        groups = []
        for sparsity in dict.fromkeys(_strategy(case)[1] for case in placed):
            entrants = [case for case in placed if _strategy(case)[1] == sparsity]
            groups.append(Group(f"sparsity {sparsity}", _league_rows(entrants, domains, quantity, pairs, note)))
        tables.append(Table(f"League of {model}: {quantity.title}", ("strategy", *domains), groups, (), LEAGUE_LEGEND))
    return tables


def holm(p_values: Sequence[float]) -> list[float]:
    """p values adjusted for being looked at together (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _own_masks(placed: Mapping[tuple[str, str], Case], quantity: Quantity, pairs: Pairs) -> list[str]:
    """How often a domain's own mask is better on it than those of others, and than the pooled one."""
    measured = {place: case for place, case in placed.items() if quantity.value(case) is not None}
    rivals = [
        (measured[domain, domain], case)
        for (mask, domain), case in measured.items()
        if mask != domain and (domain, domain) in measured
    ]
    verdicts = pairs.judge(quantity.name, rivals)
    lines = []
    for name, is_pooled in (("the others", False), ("the pooled one", True)):
        found = [(own, other) for own, other in rivals if (other["domain"] == POOLED) == is_pooled]
        if not found:
            continue
        better = [(own["id"], other["id"]) for own, other in found if quantity.is_better(own, other)]
        judged = [verdicts[pair] for own, other in found if (pair := (own["id"], other["id"])) in verdicts]
        significant = sum(verdicts.get(pair) == 1 for pair in better)
        line = f"own mask {quantity.better} {name}: {len(better)} of {len(found)} cells, "
        line += f"{significant} of them significantly" if judged else "not compared in pairs"
        line += f" ({len(judged)} cells compared in pairs)" if 0 < len(judged) < len(found) else ""
        line += f"; significantly worse in {judged.count(-1)}" if -1 in judged else ""
        lines.append(line)
    return lines


def _best(column: Sequence[Case], quantity: Quantity, pairs: Pairs) -> str | None:
    """The id of the strategy that is significantly better than every other one, controls apart, if there is one."""
    competing = [case for case in column if _competes(case)]
    beaten: defaultdict[str, set[str]] = defaultdict(set)
    for (first, second), verdict in pairs.judge(quantity.name, combinations(competing, 2)).items():
        if verdict:
            winner, loser = (first, second) if verdict > 0 else (second, first)
            beaten[winner].add(loser)
    return next((winner for winner, losers in beaten.items() if len(losers) == len(competing) - 1), None)


def _competes(case: Case) -> bool:
    """Whether the strategy is known to be no control."""
    return case["strategy"].get("control") is False


def _strategy(case: Case) -> tuple[str, str]:
    """The strategy with its options, and the sparsity, as the id has them."""
    strategy, _, sparsity = arm(case).partition("@")
    return strategy, sparsity


def _league_rows(
    entrants: Sequence[Case], domains: Sequence[str], quantity: Quantity, pairs: Pairs, note: Note
) -> list[Row]:
    """The rows of one sparsity."""
    best = {_best([case for case in entrants if case["domain"] == domain], quantity, pairs) for domain in domains}
    cells: dict[str, dict[str, str]] = {}
    for case in sorted(entrants, key=lambda case: not _competes(case)):
        strategy = _strategy(case)[0]
        star = "*" if case["id"] in best else ""
        row = cells.setdefault(strategy if _competes(case) else f"({strategy})", {})
        row[case["domain"]] = star + _cell(case, quantity, note)
    return [(name, *(row.get(domain, "-") for domain in domains)) for name, row in cells.items()]


def _cell(case: Case, quantity: Quantity, note: Note) -> str:
    """A case's estimate, or how it ended where it has none for that reason."""
    found = quantity.of(case)
    if found.get("value") is None and case["outcome"] != "passed":
        return case["outcome"]
    return estimate(found, note, quantity.form)
