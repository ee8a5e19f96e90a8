"""Two records compared: what changed, and whether the candidate is not worse than a margin.

Cases are matched by id, metrics by (task, metric, filter), documents by their hash: what both records hold is compared
in pairs. The two questions are kept apart. *Changed* means significant (p < 0.05 after Holm's adjustment over all that
is compared) and beyond a factor: 1.1 for speed, 1.01 for the rest. *Not worse than a margin* is non-inferiority: the
lower end of the 95% interval lies above the margin. A large p value answers neither question. Everything is computed
from the records and their samples files alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING, Any, TypeVar

from spath_eval import records
from spath_eval.contracts import UsageError
from spath_eval.quality import statistics
from spath_eval.reports.matrices import SIGNIFICANT, holm

if TYPE_CHECKING:
    import pandas as pd

BETTER, WORSE, FAILING, FIXED, INCOMPARABLE, NOISE = MARKS = "+-!*x~"
MEANINGS = dict(zip(MARKS, "better,worse,newly failing,fixed,not comparable,within noise".split(","), strict=True))
"""What the marks of rows say."""
FACTOR, SPEED_FACTOR = 1.01, 1.1
"""How far apart two figures are at least, as a ratio, to count as changed."""
PHASES = ("prefill", "decode", "ffn")
QUANTITIES = ("retention", "perplexity", "speed", *(f"speed.{phase}" for phase in PHASES))
"""What a margin can be about; `speed` is every phase that has no margin of its own."""
HELD, BROKEN, UNRESOLVED = "held", "broken", "unresolved"
TRIMMED = 0.2
"""Share of the rounds, at either end, that is left out of a mean: a disturbed round says nothing about the arms."""
RESAMPLES = 100
"""For each comparison, so that a p value can be small enough to survive Holm's adjustment over all of them."""

Record = Mapping[str, Any]
K = TypeVar("K")
V = TypeVar("V")
Key = tuple[str, str, str]
"""Task, metric and filter."""
Document = tuple[str, int]
"""A document's hash, and how many like it came before."""


@dataclass(frozen=True)
class Margin:
    """By how much a quantity may be worse."""

    quantity: str
    """One of `QUANTITIES`."""
    share: float
    """Of the baseline's perplexity or speedup; of retention, a share of what its dense model scores above chance."""

    @classmethod
    def parse(cls, text: str) -> Margin:
        """`retention:2%`. Raises `UsageError` for an unknown quantity, and for what is not above 0% and below 100%."""
        found = re.fullmatch(r"\s*([\w.]+)\s*:\s*(\d+(?:\.\d*)?|\.\d+)\s*%\s*", text)
        if not found or found[1] not in QUANTITIES:
            raise UsageError(f"--fail-on {text!r}: expected QUANTITY:N%, with {', '.join(QUANTITIES)}")
        if not 0 < float(found[2]) < 100:
            raise UsageError(f"--fail-on {text!r}: a margin lies above 0% and below 100%")
        return cls(found[1], float(found[2]) / 100)

    @property
    def lowest(self) -> float:
        """The least `Gain.value` that is allowed."""
        if self.quantity == "retention":
            return -self.share
        return -math.log1p(self.share) if self.quantity == "perplexity" else math.log1p(-self.share)

    def __str__(self) -> str:
        return f"{self.quantity}:{100 * self.share:g}%"


@dataclass(frozen=True)
class Gain:
    """How much better the candidate is, in the unit of the margins on a quantity: points of retention, or the logarithm
    of a ratio of perplexities or speedups."""

    quantity: str
    value: float | None
    ci95: tuple[float, float] | None
    reason: str | None = None
    """Why there is none, or no interval."""


@dataclass(frozen=True)
class Judgement:
    """What becomes of a margin in one row."""

    margin: Margin
    verdict: str
    """`held`: the lower end of the interval lies above it. `broken`: the estimate lies beyond it. Else `unresolved`."""
    needed: int | None = None
    """Documents, or rounds of each record, by which it would be held if the estimate stayed; where unresolved."""


@dataclass(frozen=True)
class Flip:
    """A document that only one record's model gets right."""

    document: str
    """Its hash."""
    lost: bool
    prompt: str | None
    """None where neither samples file has kept it."""
    baseline: str | None
    """The answer in the baseline, if its samples file has kept it."""
    candidate: str | None


@dataclass(frozen=True)
class Change:
    """What became of one figure."""

    baseline: float
    candidate: float
    value: float
    """candidate - baseline, or where `is_ratio` candidate / baseline."""
    ci95: tuple[float, float]
    p_value: float
    """Two-sided, of no change; not adjusted."""
    units: int
    """Documents compared; of speeds the rounds, of the record with fewer."""
    is_ratio: bool
    higher_is_better: bool
    paired: bool = True
    """Whether the same documents were compared one by one; of speeds it says nothing."""
    note: str | None = None
    """Why they could not be paired, or what else differs in them."""
    lost: int | None = None
    gained: int | None = None
    gain: Gain | None = None
    """None where no margin can be about it."""
    flips: tuple[Flip, ...] = ()
    p_by: Callable[[int], float] | None = field(default=None, repr=False, compare=False)
    """The p value by so many resamples, where it depends on them."""


@dataclass(frozen=True)
class Row:
    """One comparison."""

    case: str
    """The id of the case, or of the dense model on a domain: `model/domain/dense`."""
    quantity: str
    """`outcome`, `score`, `likelihood` (of the dense model's choices), `perplexity` or `speed.` and a phase."""
    name: str = ""
    """The task, metric and filter, or what was timed, where the quantity does not say it all."""
    key: Key | None = None
    mark: str = NOISE
    reason: str | None = None
    """Why it is not comparable, or how the case failed."""
    change: Change | None = None
    p_adjusted: float | None = None
    judgement: Judgement | None = None

    @property
    def label(self) -> str:
        """Quantity and name, as far as both are needed."""
        return self.name if self.quantity == "score" else f"{self.quantity} {self.name}".strip()


@dataclass(frozen=True)
class Evidence:
    """A record, and what its samples files hold."""

    record: Record
    path: str
    documents: Mapping[tuple[str, str, str], Mapping[Document, Record]] = field(default_factory=dict)
    """Rows by case (`model/domain/dense` for the dense model), task and filter, then by document."""
    heldout: Mapping[str, Mapping[str, tuple[float, int]]] = field(default_factory=dict)
    """By case, then by the digest of a held-out document: its nats, and of how many tokens."""
    missing: str | None = None
    """Why there are no samples, where there are none."""

    @classmethod
    def read(cls, path: str | Path) -> Evidence:
        """The record in the file `path`, with the samples files that it names, if they are what it says they are.

        Raises `UsageError` where `path` is not the record of a run.
        """
        record = records.read(path)
        if absent := [name for name in ("cases", "models", "tasks", "dense", "environment") if name not in record]:
            raise UsageError(f"{path} is not the record of a run: it has no {absent[0]}")
        named = [entry.get("samples") for entry in [*record["tasks"], *record["cases"]]]
        files = dict.fromkeys((samples["path"], samples["sha256"]) for samples in named if samples)
        if not files:
            return cls(record, str(path), missing=f"{Path(path).name} names no samples")
        rows: list[Record] = []
        for name, sha256 in files:
            try:
                content = (Path(path).parent / name).read_bytes()
            except OSError as error:
                return cls(record, str(path), missing=f"cannot read {name}: {error.strerror or error}")
            if hashlib.sha256(content).hexdigest() != sha256:
                return cls(record, str(path), missing=f"{name} is not the file that {Path(path).name} was written with")
            rows += map(json.loads, content.splitlines())
        return cls(record, str(path), *_indexed(rows))

    @cached_property
    def cases(self) -> dict[str, Record]:
        """The cases by id."""
        return {case["id"]: case for case in self.record["cases"]}

    @cached_property
    def dense(self) -> dict[str, Record]:
        """The dense arms by `model/domain/dense`."""
        return {f"{entry['model']}/{entry['domain']}/dense": entry for entry in self.record["dense"]}

    @cached_property
    def tasks(self) -> dict[Key, Record]:
        """The tasks by task, metric and filter."""
        return {_key(entry): entry for entry in self.record["tasks"]}

    def fingerprint(self, model: str) -> str | None:
        """The fingerprint of the model's weights."""
        return next((entry["fingerprint"] for entry in self.record["models"] if entry["name"] == model), None)


@dataclass(frozen=True)
class Comparison:
    """All rows, and what follows from them."""

    baseline: Evidence
    candidate: Evidence
    rows: tuple[Row, ...]
    margins: tuple[Margin, ...]
    differing: tuple[str, ...]
    """What else differs between the two runs: options, versions, machine."""
    other_masks: frozenset[str]
    """Ids of the cases whose masks are not the same."""

    @property
    def counts(self) -> dict[str, int]:
        """Rows by mark, all marks."""
        found = Counter(row.mark for row in self.rows)
        return {mark: found[mark] for mark in MARKS}

    @property
    def unjudged(self) -> tuple[Margin, ...]:
        """Margins that no row could be judged by."""
        judged = {row.judgement.margin for row in self.rows if row.judgement}
        return tuple(margin for margin in self.margins if margin not in judged)

    @property
    def failures(self) -> tuple[Row, ...]:
        """Rows that fail the comparison."""
        return tuple(row for row in self.rows if self.fails(row))

    @property
    def exit_status(self) -> int:
        """1 where a row fails, a margin could not be judged, or nothing was comparable; else 0."""
        incomparable = all(row.mark == INCOMPARABLE for row in self.rows)
        return int(incomparable or bool(self.failures or self.unjudged))

    def frame(self) -> pd.DataFrame:
        """A row for each comparison; what is undefined is missing. Intervals are 95%."""
        import pandas as pd

        frame = pd.DataFrame([table_row(row) for row in self.rows], columns=list(table_row(Row("", ""))))
        return frame.astype(dict.fromkeys(("units", "lost", "gained", "needed"), "Int64"))

    def fails(self, row: Row) -> bool:
        """Whether the row fails the comparison: it is newly failing, or the dense model answers otherwise, or a margin
        is not held in it, or without margins it is worse."""
        if row.mark == FAILING or (row.quantity, row.mark) == ("likelihood", WORSE):
            return True
        if self.margins:
            return row.judgement is not None and row.judgement.verdict != HELD
        return row.mark == WORSE


def compare(baseline: Evidence, candidate: Evidence, margins: Sequence[Margin] = (), *, seed: int = 0) -> Comparison:
    """Compare two records. Equal seeds draw equal resamples. Raises `UsageError` for two margins on one quantity."""
    _check_margins(margins)
    pair = _Pair(baseline, candidate, seed)
    return Comparison(
        baseline=baseline,
        candidate=candidate,
        rows=tuple(_judged(row, margins) for row in _marked(list(pair.rows()))),
        margins=tuple(margins),
        differing=tuple(_differing(baseline.record, candidate.record)),
        other_masks=frozenset(pair.other_masks()),
    )


def parse_margins(texts: Iterable[str]) -> tuple[Margin, ...]:
    """The margins of a comparison. Raises `UsageError` as `Margin.parse` and `compare` do."""
    margins = tuple(map(Margin.parse, texts))
    _check_margins(margins)
    return margins


def _check_margins(margins: Sequence[Margin]) -> None:
    if len({margin.quantity for margin in margins}) < len(margins):
        raise UsageError("--fail-on: a quantity has one margin")


def table_row(row: Row) -> dict[str, Any]:
    """The row as a flat mapping."""
    change, judgement = row.change, row.judgement
    task, metric, chosen = row.key or (None, None, None)
    low, high = change.ci95 if change else (None, None)
    gain = change.gain if change and change.gain else None
    gain_low, gain_high = gain.ci95 if gain and gain.ci95 else (None, None)
    return {
        "mark": row.mark,
        "case": row.case,
        "quantity": row.quantity,
        "task": task,
        "metric": metric,
        "filter": chosen,
        "timed": row.name if row.quantity.startswith("speed") else None,
        "units": change and change.units,
        "baseline": change and change.baseline,
        "candidate": change and change.candidate,
        "scale": None if change is None else "ratio" if change.is_ratio else "difference",
        "change": change and change.value,
        "change_low": low,
        "change_high": high,
        "p_value": change and change.p_value,
        "p_adjusted": row.p_adjusted,
        "lost": change and change.lost,
        "gained": change and change.gained,
        "paired": None if change is None or row.quantity.startswith("speed") else change.paired,
        "gain_quantity": gain and gain.quantity,
        "gain": gain and gain.value,
        "gain_low": gain_low,
        "gain_high": gain_high,
        "margin": str(judgement.margin) if judgement else None,
        "verdict": judgement and judgement.verdict,
        "needed": judgement and judgement.needed,
        "reason": row.reason or (change and change.note) or (gain and gain.reason),
    }


class NotComparable(Exception):
    """Why two figures are not comparable."""


@dataclass(frozen=True)
class _Pair:
    """Two records side by side."""

    before: Evidence
    after: Evidence
    seed: int

    @property
    def sides(self) -> tuple[Evidence, Evidence]:
        return self.before, self.after

    def rows(self) -> Iterator[Row]:
        timed: set[str] = set()
        for id, one, other in _side_by_side(self.before.cases, self.after.cases):
            if one is None or other is None:
                yield _alone(id, one)
            elif one["outcome"] != "passed" or other["outcome"] != "passed":
                yield _outcome(id, one, other)
            else:
                obstacle = self._other_model(one["model"]) or _other_strategy(one, other)
                about_answers = obstacle or self._drawn(one, other)
                dense = f"{one['model']}/{one['evaluated_on']}/dense"
                yield from self._scores(id, dense, about_answers, one, other)
                preserved = [case.get("preservation") for case in (one, other)]
                if any(preserved):
                    absent = _absent(preserved, [case.get("preservation_reason") for case in (one, other)])
                    yield _row(Row(id, "perplexity"), about_answers or absent, partial(self._perplexity, id))
                yield from self._speeds(id, obstacle, one, other, timed)
        for id, one, other in _side_by_side(self.before.dense, self.after.dense):
            if one is None or other is None:
                yield _alone(id, one)
                continue
            obstacle = self._other_model(one["model"])
            yield from self._scores(id, id, obstacle, one, other)
            yield from self._likelihoods(id, obstacle)
            if self._missing or any(id in side.heldout for side in self.sides):
                yield _row(Row(id, "perplexity"), obstacle, partial(self._perplexity, id))

    def other_masks(self) -> Iterator[str]:
        """Ids of the cases whose masks are not the same."""
        return (id for id in self.before.cases if id in self.after.cases and self._other_mask(id))

    @property
    def _missing(self) -> str | None:
        """Why one of the two has no samples."""
        return self.before.missing or self.after.missing

    def _other_mask(self, id: str) -> bool:
        one, other = (side.cases[id].get("mask") or {} for side in self.sides)
        return bool(one and other and one["digest"] != other["digest"])

    def _other_model(self, model: str) -> str | None:
        return _differ("model (weights)", *(_short(side.fingerprint(model)) for side in self.sides))

    def _drawn(self, one: Record, other: Record) -> str | None:
        """A control that looks at no text draws its mask by the seed, and two draws are not one pathway."""
        if not one["strategy"].get("control") or one.get("profile") or not self._other_mask(other["id"]):
            return None
        return _differ("mask, which this control draws by the seed", *(side.record["seed"] for side in self.sides))

    def _scores(self, id: str, dense: str, obstacle: str | None, one: Record, other: Record) -> Iterator[Row]:
        """Rows of the scores of two cases, or of the dense model's."""
        for key, first, second in _side_by_side(_values(one), _values(other)):
            row = Row(id, "score", " ".join(part for part in key if part != "none"), key)
            absent = _absent((first, second), (one.get("quality_reason"), other.get("quality_reason")))
            reason = obstacle or absent or self._other_task(key)
            yield _row(row, reason, partial(self._score, id, dense, key))

    def _likelihoods(self, id: str, obstacle: str | None) -> Iterator[Row]:
        """Rows of the mean log-likelihood of all choices of a task's document, where documents have the same prompt.

        The same weights give the same, in either direction: what an accuracy hides, because no answer changes.
        """
        seen = set()
        for case, task, chosen in self.before.documents:
            if case != id or task in seen:
                continue
            seen.add(task)
            before, after = (side.documents.get((id, task, chosen), {}) for side in self.sides)
            alike = [name for name in before if _prompt(before[name]) == _prompt(after.get(name, {})) is not None]
            sums = [(_likelihood(before[name]), _likelihood(after[name])) for name in alike]
            pairs = [pair for pair in sums if None not in pair]
            if len(pairs) > 1:
                arms = zip(*pairs, strict=True)
                yield _row(Row(id, "likelihood", task), obstacle, partial(score_change, *arms, higher_is_better=True))

    def _other_task(self, key: Key) -> str | None:
        first, second = (side.tasks[key] for side in self.sides)
        chat = [side.record["command"]["resolved"].get("apply_chat_template", False) for side in self.sides]
        return (
            _differ("version of the task", first.get("version"), second.get("version"))
            or _differ("prompt (examples)", first["num_fewshot"], second["num_fewshot"])
            or _differ("prompt (chat template)", *chat)
        )

    def _score(self, id: str, dense: str, key: Key) -> Change:
        """The change of a score: in pairs where there are samples and the score comes from single documents."""
        task, metric, chosen = key
        before, after = (side.documents.get((id, task, chosen), {}) for side in self.sides)
        values = [_values(side.dense.get(id) or side.cases[id])[key]["value"] for side in self.sides]
        kinds = {_kind(metric, value, rows.values()) for value, rows in zip(values, (before, after), strict=True)}
        if self._missing or kinds not in ({"mean"}, {"corpus"}):
            return self._unpaired(id, dense, key, self._missing or "the metric is no mean over documents")
        shared = [name for name in before if metric in before[name] and metric in after.get(name, ())]
        if len(shared) < 2:
            raise NotComparable("fewer than two documents in common")
        note = self._other_prompts(key, [(before[document], after[document]) for document in shared])
        arms = tuple([rows[document][metric] for document in shared] for rows in (before, after))
        field_name = self.after.tasks[key].get("grouped_by")
        groups = [str(after[document]["doc"][field_name]) for document in shared] if field_name else None
        if kinds == {"corpus"}:
            return dataclasses.replace(corpus_change(metric, *arms, groups=groups, seed=self.seed), note=note)
        higher = self.after.tasks[key]["higher_is_better"]
        change = score_change(*arms, higher_is_better=higher, groups=groups, seed=self.seed)
        return dataclasses.replace(
            change,
            note=note,
            gain=self._retained(dense, key, shared, arms, groups),
            flips=tuple(_flips(metric, shared, before, after, higher)),
        )

    def _other_prompts(self, key: Key, rows: Sequence[tuple[Record, Record]]) -> str | None:
        """In how many documents the right answer or the prompt differs, where no seed has drawn other examples: if the
        task and its settings are the same, that may be the very fault that is looked for."""
        seeds = {side.record["seed"] for side in self.sides}
        redrawn = len(seeds) == 2 and self.after.tasks[key]["num_fewshot"]
        hashes = {"target_hash": "right answer"} | ({} if redrawn else {"prompt_hash": "prompt"})
        for name, meaning in hashes.items():
            if changed := sum(one.get(name) != other.get(name) for one, other in rows):
                return f"another {meaning} in {changed} of {len(rows)} documents"
        return None

    def _unpaired(self, id: str, dense: str, key: Key, why: str) -> Change:
        one, other = (_values(side.dense.get(id) or side.cases[id])[key] for side in self.sides)
        if one.get("stderr") is None or other.get("stderr") is None:
            raise NotComparable(f"{why}, and there is no standard error")
        tasks = [side.tasks[key] for side in self.sides]
        units = min(task["documents"] for task in tasks)
        change = unpaired_change(one, other, units, tasks[1]["higher_is_better"], why)
        chance = tasks[0]["chance"]
        level = _values(self.before.dense.get(dense, {})).get(key)
        if chance is None or level is None:
            return change
        above = level["value"] - chance
        if above <= 2 * (level.get("stderr") or 0.0):
            return dataclasses.replace(change, gain=Gain("retention", None, None, "dense at chance"))
        low, high = change.ci95
        return dataclasses.replace(change, gain=Gain("retention", change.value / above, (low / above, high / above)))

    def _retained(
        self,
        dense: str,
        key: Key,
        shared: Sequence[Document],
        arms: Sequence[Sequence[float]],
        groups: Sequence[str] | None,
    ) -> Gain | None:
        """The change of a score, beside what the baseline's dense model scores above chance: where the dense model is
        the same in both records, the difference of their retentions."""
        task, metric, chosen = key
        chance = self.before.tasks[key]["chance"]
        if chance is None:
            return None
        full = self.before.documents.get((dense, task, chosen), {})
        if any(document not in full for document in shared):
            return Gain("retention", None, None, "the dense model's answers are not in the baseline")
        scored = [full[document][metric] for document in shared]
        kept = [chance + after - before for before, after in zip(*arms, strict=True)]
        found = statistics.retention(scored, kept, chance, groups=groups, seed=self.seed)
        return Gain("retention", found.value, found.ci95, found.reason)

    def _perplexity(self, id: str) -> Change:
        if self._missing:
            raise NotComparable(f"perplexities are compared document by document, and {self._missing}")
        before, after = (side.heldout.get(id, {}) for side in self.sides)
        # A document that is cut to the token budget has another length, and is another text.
        shared = [name for name in before if name in after and before[name][1] == after[name][1]]
        if len(shared) < 2:
            raise NotComparable("fewer than two held-out documents in common")
        nats = [[rows[name][0] for name in shared] for rows in (before, after)]
        return perplexity_change(nats[0], nats[1], [before[name][1] for name in shared], seed=self.seed)

    def _speeds(self, id: str, obstacle: str | None, one: Record, other: Record, timed: set[str]) -> Iterator[Row]:
        """Rows of what was timed in either case. What several cases share, a reference layer, has one in the first."""
        for subject, first, second in _side_by_side(_by_subject(one), _by_subject(other)):
            for phase in PHASES:
                times: list[Any] = [(entry or {}).get(phase) for entry in (first, second)]
                raw = json.dumps([phase, *(time and time["sparse_seconds"] for time in times)])
                if not any(times) or raw in timed:
                    continue
                timed.add(raw)
                absent = _absent(times, (one.get("speed_reason"), other.get("speed_reason")))
                row = Row(id, f"speed.{phase}", "" if subject == "model" else subject)
                reason = obstacle or absent or self._other_conditions(*times)
                yield _row(row, reason, partial(speed_change, *times, quantity=row.quantity))

    def _other_conditions(self, first: Record, second: Record) -> str | None:
        """Why two timings are not of the same work on the same machine."""
        one, other = (side.record["environment"] for side in self.sides)
        reasons = [
            *(
                _differ(f"machine ({name})", one["machine"].get(name), other["machine"].get(name))
                for name in sorted({*one["machine"], *other["machine"]})
            ),
            _differ("device", one["device"], other["device"]),
            _differ("number of threads", one["threads"], other["threads"]),
            _differ("dtype", one["dtype"], other["dtype"]),
            *(
                _differ(f"workload ({name})", first.get(name), second.get(name))
                for name in ("batch", "tokens", "new_tokens")
            ),
            *(f"measurement fault: {time['fault']}" for time in (first, second) if "fault" in time),
        ]
        return next(filter(None, reasons), None)


def score_change(
    before: Sequence[float],
    after: Sequence[float],
    *,
    higher_is_better: bool,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Change:
    """Two arms' scores `[documents]`, same documents in the same order, compared by the difference of their means; see
    `statistics.paired_difference`."""

    def difference(resamples: int) -> statistics.Difference:
        return statistics.paired_difference(
            before, after, higher_is_better=higher_is_better, groups=groups, seed=seed, resamples=resamples
        )

    found = difference(2000)
    exact = groups is None and {*before, *after} <= {0, 1}
    return Change(
        baseline=fmean(before),
        candidate=fmean(after),
        value=found.value,
        ci95=found.ci95,
        p_value=found.p_value,
        units=len(before),
        is_ratio=False,
        higher_is_better=higher_is_better,
        lost=found.lost,
        gained=found.gained,
        p_by=None if exact else lambda resamples: difference(resamples).p_value,
    )


def corpus_change(
    metric: str, before: Sequence[Any], after: Sequence[Any], *, groups: Sequence[str] | None = None, seed: int = 0
) -> Change:
    """Two arms compared in one of `statistics.CORPUS_METRICS`, from what lm-eval logs of each of the same documents.

    Raises `NotComparable` where they do not count the same words or bytes.
    """

    def difference(resamples: int) -> statistics.Difference:
        return statistics.corpus_difference(metric, before, after, groups=groups, seed=seed, resamples=resamples)

    try:
        found = difference(2000)
    except ValueError as error:
        raise NotComparable(str(error)) from error
    is_ratio = metric != "bits_per_byte"
    low, high = found.ci95
    return Change(
        baseline=statistics.corpus_value(metric, before),
        candidate=statistics.corpus_value(metric, after),
        value=math.exp(found.value) if is_ratio else found.value,
        ci95=(math.exp(low), math.exp(high)) if is_ratio else found.ci95,
        p_value=found.p_value,
        units=len(before),
        is_ratio=is_ratio,
        higher_is_better=False,
        lost=found.lost,
        gained=found.gained,
        gain=Gain("perplexity", 0.0 - found.value, (0.0 - high, 0.0 - low)) if is_ratio else None,
        p_by=lambda resamples: difference(resamples).p_value,
    )


def perplexity_change(
    before: Sequence[float], after: Sequence[float], tokens: Sequence[int], *, seed: int = 0
) -> Change:
    """Two arms' nats `[documents]` on the same documents of `tokens` `[documents]`, compared by the ratio of corpus
    perplexities; see `statistics.perplexity_ratio`."""

    def ratio(resamples: int) -> statistics.PerplexityRatio:
        return statistics.perplexity_ratio(before, after, tokens, seed=seed, resamples=resamples)

    found = ratio(2000)
    low, high = map(math.log, found.ci95)
    return Change(
        baseline=found.dense,
        candidate=found.sparse,
        value=found.ratio,
        ci95=found.ci95,
        p_value=found.p_value,
        units=len(tokens),
        is_ratio=True,
        higher_is_better=False,
        lost=sum(second > first for first, second in zip(before, after, strict=True)),
        gained=sum(second < first for first, second in zip(before, after, strict=True)),
        gain=Gain("perplexity", 0.0 - math.log(found.ratio), (0.0 - high, 0.0 - low)),
        p_by=lambda resamples: ratio(resamples).p_value,
    )


def unpaired_change(before: Record, after: Record, units: int, higher_is_better: bool, why: str) -> Change:
    """Two scores compared by their standard errors (`value` and `stderr`) alone, as if of different documents: an
    interval far wider than that of pairs."""
    change = after["value"] - before["value"]
    error = math.hypot(before["stderr"], after["stderr"])
    reach = NormalDist().inv_cdf(0.975) * error
    return Change(
        baseline=before["value"],
        candidate=after["value"],
        value=change,
        ci95=(change - reach, change + reach),
        p_value=2 * NormalDist().cdf(-abs(change) / error) if error else float(change == 0),
        units=units,
        is_ratio=False,
        higher_is_better=higher_is_better,
        paired=False,
        note=f"not paired: {why}",
    )


def speed_change(before: Record, after: Record, *, quantity: str = "speed") -> Change:
    """Two timings of records (`dense_seconds` and `sparse_seconds`, a value per round) compared by their speedups.

    A round's speedup is dense / sparse, of which the logarithm is taken. The two records' means of these, trimmed by a
    fifth at either end, are compared by Yuen's test (Biometrika 61, 1974), which allows for unequal spread; the
    interval is that of the test. Rounds count as independent: what differs from one run to the next is not in it.

    Raises `NotComparable` for fewer than two rounds.
    """
    import numpy as np
    from scipy.stats import trim_mean, ttest_ind

    logs = [np.log(np.divide(times["dense_seconds"], times["sparse_seconds"])) for times in (before, after)]
    rounds = min(map(len, logs))
    if rounds < 2:
        raise NotComparable("fewer than two rounds")
    levels = [float(trim_mean(log, TRIMMED)) for log in logs]
    change = levels[1] - levels[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of rounds that are all alike, which are dealt with below
        found = ttest_ind(logs[1], logs[0], equal_var=False, trim=TRIMMED)
        low, high = map(float, found.confidence_interval(0.95))
    p_value = float(found.pvalue)
    if not all(map(math.isfinite, (low, high, p_value))):
        low, high, p_value = change, change, float(change == 0)
    return Change(
        baseline=math.exp(levels[0]),
        candidate=math.exp(levels[1]),
        value=math.exp(change),
        ci95=(math.exp(low), math.exp(high)),
        p_value=p_value,
        units=rounds,
        is_ratio=True,
        higher_is_better=True,
        gain=Gain(quantity, change, (low, high)),
    )


def judge(gain: Gain, units: int, margin: Margin) -> Judgement | None:
    """Whether a gain from so many documents or rounds holds a margin; none where it has no interval.

    An interval is taken to narrow with the root of the number of documents.
    """
    if gain.value is None or gain.ci95 is None:
        return None
    low, room = gain.ci95[0], gain.value - margin.lowest
    if low > margin.lowest:
        return Judgement(margin, HELD)
    if room < 0:
        return Judgement(margin, BROKEN)
    needed = math.floor(units * ((gain.value - low) / room) ** 2) + 1 if room else None
    return Judgement(margin, UNRESOLVED, needed)


def _marked(rows: Sequence[Row]) -> list[Row]:
    """The rows with their p values adjusted together, and what follows from those."""
    compared = [row for row in rows if row.change]
    resamples = RESAMPLES * len(compared)
    adjusted = iter(holm([_sharpened(row.change, resamples) for row in compared if row.change]))
    marked = []
    for row in rows:
        if change := row.change:
            p_value = next(adjusted)
            factor = SPEED_FACTOR if row.quantity.startswith("speed") else FACTOR
            changed = p_value < SIGNIFICANT and _beyond(change.baseline, change.candidate, factor)
            better = (change.candidate > change.baseline) == change.higher_is_better and row.quantity != "likelihood"
            row = dataclasses.replace(row, p_adjusted=p_value, mark=(BETTER if better else WORSE) if changed else NOISE)
        marked.append(row)
    return marked


def _sharpened(change: Change, resamples: int) -> float:
    """The p value, by more resamples where 2,000 could not make it small enough."""
    if change.p_by is None or change.p_value >= SIGNIFICANT or resamples <= 2000:
        return change.p_value
    return change.p_by(resamples)


def _beyond(one: float, other: float, factor: float) -> bool:
    """Whether two figures differ by more than a factor; those of different sign do."""
    smaller, larger = sorted((abs(one), abs(other)))
    return larger > factor * smaller or one * other < 0


def _judged(row: Row, margins: Sequence[Margin]) -> Row:
    if row.change is None or row.change.gain is None:
        return row
    quantity = row.change.gain.quantity
    own = [margin for name in (quantity, quantity.partition(".")[0]) for margin in margins if margin.quantity == name]
    return dataclasses.replace(row, judgement=judge(row.change.gain, row.change.units, own[0])) if own else row


def _row(row: Row, obstacle: str | None, measure: Callable[[], Change]) -> Row:
    """The row with what `measure` finds, or with the reason why nothing is comparable."""
    try:
        if obstacle:
            raise NotComparable(obstacle)
        return dataclasses.replace(row, change=measure())
    except NotComparable as reason:
        return dataclasses.replace(row, mark=INCOMPARABLE, reason=str(reason))


def _absent(found: Sequence[Record | None], reasons: Sequence[str | None]) -> str | None:
    """Why one of two things is not there, if so: its own reason where it has no value, else the given one."""
    for side, thing, given in zip(("baseline", "candidate"), found, reasons, strict=True):
        if thing is None or thing.get("value", 0) is None:
            reason = (thing or {}).get("reason") or given
            return f"not in the {side}" + (f": {reason}" if reason else "")
    return None


def _alone(id: str, in_baseline: Record | None) -> Row:
    return Row(
        id, "outcome", mark=INCOMPARABLE, reason=f"only in the {'candidate' if in_baseline is None else 'baseline'}"
    )


def _outcome(id: str, one: Record, other: Record) -> Row:
    """The row of a case that did not pass in both records."""
    if one["outcome"] == "passed" and other["outcome"] != "skipped":
        return Row(id, "outcome", mark=FAILING, reason=f"{other['outcome']}: {other.get('message')}")
    if other["outcome"] == "passed" and one["outcome"] != "skipped":
        return Row(id, "outcome", mark=FIXED, reason=f"was {one['outcome']}: {one.get('message')}")
    sides = zip(("baseline", "candidate"), (one, other), strict=True)
    reasons = [f"{case['outcome']} in the {side}: {case.get('message')}" for side, case in sides]
    return Row(id, "outcome", mark=INCOMPARABLE, reason="; ".join(reasons))


def _other_strategy(one: Record, other: Record) -> str | None:
    first, second = one["strategy"], other["strategy"]
    for name in ("name", "kind", "plugin"):
        if reason := _differ(f"strategy ({name})", first.get(name), second.get(name)):
            return reason
    if first["name"] == "mask":  # its one option is a file, whose folder says nothing
        return _differ("mask", *(_short((case.get("mask") or {}).get("digest")) for case in (one, other)))
    return _differ("strategy (options)", first["options"], second["options"]) or _differ(
        "strategy (repair)", one.get("repair"), other.get("repair")
    )


def _differ(what: str, one: Any, other: Any) -> str | None:
    return None if one == other else f"another {what}: {one} and {other}"


def _short(digest: str | None) -> str | None:
    return digest and digest[:12]


def _differing(one: Record, other: Record) -> Iterator[str]:
    """Options, versions and circumstances of two runs that are not the same."""
    for name, first, second in _side_by_side(_circumstances(one), _circumstances(other)):
        if first != second:
            shown = ("none" if value is None else str(value) for value in (first, second))
            yield f"{name} " + " -> ".join(text if len(text) <= 40 else f"{text[:37]}..." for text in shown)


def _circumstances(record: Record) -> dict[str, Any]:
    environment = record["environment"]
    revision = environment.get("revision") or {}
    options = {key: value for key, value in record["command"]["resolved"].items() if key != "output"}
    return {
        "status": record["status"],
        "revision": revision and revision["commit"][:10] + (" (dirty)" if revision["dirty"] else ""),
        **options,
        **{name: environment.get(name) for name in ("device", "dtype", "threads", "python")},
        **environment["packages"],
        **environment["machine"],
    }


def _side_by_side(before: Mapping[K, V], after: Mapping[K, V]) -> Iterator[tuple[K, V | None, V | None]]:
    """Each key of either with its values, none where it has none: first the keys of `before`."""
    return ((key, before.get(key), after.get(key)) for key in dict.fromkeys([*before, *after]))


def _indexed(
    rows: Iterable[Record],
) -> tuple[dict[tuple[str, str, str], dict[Document, Record]], dict[str, dict[str, tuple[float, int]]]]:
    """`Evidence.documents` and `Evidence.heldout`."""
    documents: dict[tuple[str, str, str], dict[Document, Record]] = {}
    heldout: dict[str, dict[str, tuple[float, int]]] = {}
    seen: Counter[tuple[Any, ...]] = Counter()
    for row in rows:
        if "heldout" in row:
            heldout.setdefault(row["case"], {})[row["heldout"]] = row["nats"], row["tokens"]
            continue
        place = row["case"], row["task"], row["filter"]
        documents.setdefault(place, {})[row["doc_hash"], seen[*place, row["doc_hash"]]] = row
        seen[*place, row["doc_hash"]] += 1
    return documents, heldout


def _values(arm: Record) -> dict[Key, Record]:
    """What a case scores, or the dense model does: `value` and `stderr` by task, metric and filter."""
    return {_key(entry): entry.get("sparse", entry) for entry in arm.get("quality", [])}


def _by_subject(case: Record) -> dict[str, Record]:
    return {entry["subject"]: entry for entry in case["speed"]}


def _key(entry: Record) -> Key:
    return entry["task"], entry["metric"], entry["filter"]


def _prompt(row: Record) -> tuple[str, str | None] | None:
    """What a row's prompt and right answer are known by."""
    return (row["prompt_hash"], row.get("target_hash")) if "prompt_hash" in row else None


def _likelihood(row: Record) -> float | None:
    """The sum of the log-likelihoods of a row's choices; none of a text that was generated."""
    choices = row.get("filtered_resps") or [None]
    scored = all(isinstance(choice, list) and choice and isinstance(choice[0], float) for choice in choices)
    return math.fsum(choice[0] for choice in choices) if scored else None


def _kind(metric: str, value: float, rows: Iterable[Record]) -> str | None:
    """How a metric's value comes from what documents score: their `mean`, or of the `corpus`; none where neither."""
    scores: list[Any] = [row[metric] for row in rows if metric in row]
    if not scores:
        return None
    if all(isinstance(score, int | float) for score in scores) and math.isclose(
        value, fmean(scores), rel_tol=1e-9, abs_tol=1e-12
    ):
        return "mean"
    known = metric in statistics.CORPUS_METRICS
    return "corpus" if known and math.isclose(value, statistics.corpus_value(metric, scores), rel_tol=1e-6) else None


def _flips(
    metric: str,
    shared: Sequence[Document],
    before: Mapping[Document, Record],
    after: Mapping[Document, Record],
    higher_is_better: bool,
) -> list[Flip]:
    """The documents that only one side gets right, those lost first."""
    flips = []
    for document in shared:
        one, other = before[document], after[document]
        if {one[metric], other[metric]} != {0, 1}:
            continue
        arguments = other.get("arguments") or one.get("arguments")
        flips.append(
            Flip(
                document=document[0],
                lost=(other[metric] < one[metric]) == higher_is_better,
                prompt=str(arguments[0][0]) if arguments else None,
                baseline=_answer(one, arguments, metric),
                candidate=_answer(other, arguments, metric),
            )
        )
    return sorted(flips, key=lambda flip: not flip.lost)


def _answer(row: Record, arguments: Sequence[Sequence[Any]] | None, metric: str) -> str | None:
    """The text a row's answer is, of choices the likeliest; else what the row holds."""
    found = row.get("filtered_resps")
    if found is None:
        return None
    if len(found) == 1 and isinstance(found[0], str):
        return found[0]
    if len(found) < 2 or not arguments or len(arguments) != len(found):
        return json.dumps(found, ensure_ascii=False)
    choices = [str(argument[1]).removeprefix(" ") for argument in arguments]
    lengths = [len(choice) or 1 if metric == "acc_norm" else 1 for choice in choices]
    likelihoods = [likelihood / length for (likelihood, _), length in zip(found, lengths, strict=True)]
    return choices[likelihoods.index(max(likelihoods))]
