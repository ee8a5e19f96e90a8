"""Arms in pairs: what a pathway changed in the dense model's scores, and how two pathways compare.

Every arm of a model has answered the same requests, so documents are matched by id and hashes, and everything is
computed from pairs: the record's `quality` of a case, its `comparisons` of cases, and the noise floor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from spath_eval.collection import Case
from spath_eval.pathways import GateError
from spath_eval.quality import statistics
from spath_eval.quality.adapter import Evaluation, Scores
from spath_eval.quality.preservation import Nats

Chance = Callable[[Scores], tuple[float | None, str | None]]
"""The level of guessing in a metric of a task, or none and the reason."""


@dataclass(frozen=True)
class Arm:
    """What a case has scored, kept to be compared with others."""

    case: Case
    scores: Mapping[tuple[str, str, str], Scores]
    """By task, metric and filter."""
    quality: Sequence[Mapping[str, Any]]
    """The record's."""
    heldout: Mapping[str, Nats]
    """By the digest of a held-out document."""


def compare_quality(dense: Evaluation, sparse: Evaluation, chance: Chance, seed: int) -> list[dict[str, Any]]:
    """The record's `quality`: per task, metric and filter, both arms and their paired difference.

    Raises `GateError` where the arms were not scored on the same documents.
    """
    entries = []
    for key, before in dense.scores.items():
        after = sparse.scores[key]
        level, level_reason = chance(before)
        entry: dict[str, Any] = {
            "task": before.task,
            "metric": before.metric,
            "filter": before.filter,
            "higher_is_better": before.higher_is_better,
            "documents": _documents(dense, before.task),
            "chance": level,
            "dense": score_record(before),
            "sparse": score_record(after),
        }
        if level_reason:
            entry["chance_reason"] = level_reason
        entries.append(entry | _paired(before, after, level, level_reason, seed))
    return entries + [_unmeasured(task, reason, dense) for task, reason in dense.unscored.items()]


def noise_floor(dense: Evaluation, repeat: Evaluation) -> list[dict[str, Any]]:
    """The record's `noise_floor`: what another batch size changes in the dense model's own scores."""
    entries = []
    for key, scores in dense.scores.items():
        first, second = _per_document(scores), _per_document(repeat.scores[key])
        if not first:
            continue
        floor = statistics.noise_floor(list(first.values()), [second[document] for document in first])
        identity = {"task": scores.task, "metric": scores.metric, "filter": scores.filter}
        entries.append(identity | {"documents": len(first)} | dataclasses.asdict(floor))
    return entries


def compare_arms(arms: Sequence[Arm], seed: int) -> list[dict[str, Any]]:
    """The record's `comparisons` of one model's cases: those of different strategies with each other, and each domain's
    own mask with the others that its strategy selects, where they are evaluated on the same at one sparsity."""
    entries = []
    for first, second in combinations(arms, 2):
        if not _comparable(first.case, second.case):
            continue
        if second.case.is_own and not first.case.is_own:
            first, second = second, first
        about = {
            "model": first.case.model,
            "evaluated_on": first.case.evaluated_on.name,
            "sparsity": first.case.sparsity,
            "case": first.case.id,
            "other": second.case.id,
        }
        entries += [about | found for found in _compared(first, second, seed)]
    return entries


def score_record(scores: Scores) -> dict[str, Any]:
    """An arm's value and standard error, as the record has them."""
    return {"value": scores.value} | ({} if scores.stderr is None else {"stderr": scores.stderr})


def _comparable(first: Case, second: Case) -> bool:
    if any(getattr(first, name) != getattr(second, name) for name in ("evaluated_on", "sparsity", "expert_sparsity")):
        return False
    return first.strategy == second.strategy if first.is_own != second.is_own else first.is_own


def _compared(first: Arm, second: Arm, seed: int) -> Iterator[dict[str, Any]]:
    if first.heldout and first.heldout.keys() == second.heldout.keys():
        pairs = [(first.heldout[document], second.heldout[document]) for document in first.heldout]
        found = statistics.perplexity_ratio(
            [nats for _, (nats, _) in pairs],
            [nats for (nats, _), _ in pairs],
            [tokens for (_, tokens), _ in pairs],
            seed=seed,
        )
        yield {"quantity": "perplexity", "value": found.ratio, "ci95": list(found.ci95), "p_value": found.p_value}
    if retained := _retained(first, second):
        difference = statistics.paired_difference(retained[1], retained[0], groups=retained[2], seed=seed)
        shown = dataclasses.asdict(difference)
        yield {"quantity": "retention", **{name: shown[name] for name in ("value", "ci95", "p_value")}}


def _retained(first: Arm, second: Arm) -> tuple[list[float], list[float], list[str]] | None:
    """What each document adds to the mean retention of either arm, in units that make their mean that retention (but
    for a constant), and which documents belong together; none where no task has a retention.

    The dense scores, by which retentions are scaled, are taken as they are.
    """
    entries = [entry for entry in first.quality if entry["retention"]["value"] is not None]
    terms: list[tuple[float, float, str]] = []
    for entry in entries:
        key = entry["task"], entry["metric"], entry["filter"]
        one, other = first.scores[key], second.scores[key]
        scale = len(entries) * len(one.per_document) * (entry["dense"]["value"] - entry["chance"])
        for document, score in one.per_document.items():
            group = one.groups.get(document, document)  # a document that several metrics score is one
            terms.append((score / scale, other.per_document[document] / scale, f"{entry['task']}/{group}"))
    if not terms:
        return None
    ours, theirs, groups = zip(*terms, strict=True)
    return [len(terms) * term for term in ours], [len(terms) * term for term in theirs], list(groups)


def _paired(before: Scores, after: Scores, level: float | None, level_reason: str | None, seed: int) -> dict[str, Any]:
    if (before.per_document.keys(), before.likelihoods.keys()) != (after.per_document.keys(), after.likelihoods.keys()):
        raise GateError(f"{before.task}: the two arms were not scored on the same documents and prompts")
    if before.likelihoods:
        arms = [list(before.likelihoods.values()), [after.likelihoods[key] for key in before.likelihoods]]
        change = dataclasses.asdict(statistics.corpus_difference(before.metric, *arms, seed=seed))
        scale = {} if before.metric == "bits_per_byte" else {"scale": "logarithm of sparse / dense"}
        return {"difference": change | scale, "retention": {"value": None, "ci95": None, "reason": level_reason}}
    if not before.per_document:
        reason = "the metric is no mean over documents"
        unpaired = {"value": after.value - before.value, "ci95": None, "p_value": None, "lost": 0, "gained": 0}
        return {
            "difference": unpaired | {"reason": reason},
            "retention": {"value": None, "ci95": None, "reason": level_reason or reason},
        }
    dense = list(before.per_document.values())
    sparse = [after.per_document[key] for key in before.per_document]
    groups = [before.groups.get(key, key) for key in before.per_document] if before.groups else None
    difference = statistics.paired_difference(
        dense, sparse, higher_is_better=before.higher_is_better, groups=groups, seed=seed
    )
    kept = dataclasses.asdict(statistics.retention(dense, sparse, level, groups=groups, seed=seed))
    if kept["reason"] is None:
        del kept["reason"]
    return {"difference": dataclasses.asdict(difference), "retention": kept}


def _unmeasured(task: str, reason: str, dense: Evaluation) -> dict[str, Any]:
    """The record's `quality` of a task whose texts were generated and not scored."""
    nothing = {"value": None, "reason": f"not measured: {reason}"}
    return {
        "task": task,
        "metric": "pass@1",
        "filter": "none",
        "higher_is_better": True,
        "documents": _documents(dense, task),
        "chance": 0.0,
        "dense": nothing,
        "sparse": nothing,
        "difference": nothing | {"ci95": None, "p_value": None, "lost": None, "gained": None},
        "retention": nothing | {"ci95": None},
    }


def _documents(evaluation: Evaluation, task: str) -> int:
    return len({row["doc_id"] for row in evaluation.samples if row["task"] == task})


def _per_document(scores: Scores) -> dict[str, float]:
    """A number for each document: its score, or its log-likelihood where the metric is one of a corpus."""
    logged = {key: value[0] if isinstance(value, tuple | list) else value for key, value in scores.likelihoods.items()}
    return {key: float(value) for key, value in (scores.per_document or logged).items()}
