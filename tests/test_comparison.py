"""Two records compared: what changed is found, where nothing did nothing is, and what cannot be compared says why."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, t

from spath_eval import UsageError, records
from spath_eval.comparison import (
    Evidence,
    Gain,
    Margin,
    NotComparable,
    compare,
    corpus_change,
    judge,
    perplexity_change,
    speed_change,
)

CASES = ("toy/math/negative@0.15", "toy/code/negative@0.15", "toy/math/wanda@0.15")
MARGINS = [Margin.parse("retention:2%"), Margin.parse("perplexity:1%"), Margin.parse("speed.decode:10%")]


@dataclass
class Made:
    """A run on a made-up model: each document has a latent chance to be answered and a latent length in nats, and two
    runs draw from these anew, which is as much as two runs of the same can differ."""

    seed: int = 0
    documents: int = 150
    heldout: int = 60
    rounds: int = 12
    noise: float = 0.05
    """Of the logarithm of a round's speedup, and of a document's nats relative to its own."""
    worse: dict[str, dict[str, float]] = field(default_factory=dict)
    """By case: `score` is the share of right answers lost, `perplexity` and `speed` are factors."""

    def __post_init__(self):
        self.random = np.random.default_rng(1000 + self.seed)
        self.rows = []
        tasks = [self.task(domain) for domain in ("math", "code")]
        dense = [self.dense(domain) for domain in ("math", "code")]
        cases = [self.case(id) for id in CASES]
        self.record = {
            "version": 1,
            "status": "complete",
            "created": "2026-03-01T12:00:00+00:00",
            "command": {"given": [], "resolved": {"apply_chat_template": False, "seed": self.seed}},
            "seed": self.seed,
            "plugins": [],
            "environment": {
                "packages": {"torch": "2.13.0"},
                "python": "3.11.7",
                "machine": {"architecture": "x86_64", "cores": 2},
                "device": "cpu",
                "dtype": "float32",
                "threads": 2,
                "revision": {"commit": "a" * 40, "dirty": False},
            },
            "models": [
                {
                    "name": "toy",
                    "arch": "gemma",
                    "reference": "toy",
                    "fingerprint": "f" * 64,
                    "parameters": 1000,
                    "layers": 1,
                    "sites": [{"path": "mlp", "width": 8}],
                    "ffn_share": 0.5,
                }
            ],
            "profiles": [],
            "tasks": tasks,
            "dense": dense,
            "cases": cases,
        }

    def task(self, domain):
        about = {"task": f"{domain}_choice", "version": "1", "digest": "d", "metric": "acc", "filter": "none"}
        about |= {"higher_is_better": True, "chance": 0.25, "documents": self.documents, "num_fewshot": 0}
        return about

    def answers(self, case, domain, lost=0.0):
        """Answers to the domain's task, with their mean and its standard error."""
        latent = np.random.default_rng(len(domain)).beta(8, 2, size=1000)[: self.documents]
        right = (self.random.random(self.documents) < latent) & (self.random.random(self.documents) >= lost)
        for number, score in enumerate(right.astype(float)):
            likelihoods = [[-1.0, False], [-2.0, False]] if score else [[-2.0, False], [-1.0, False]]
            text = f"{domain} {number}"
            self.rows.append(
                {
                    "case": case,
                    "task": f"{domain}_choice",
                    "filter": "none",
                    "doc_id": number,
                    "doc": {"passage": f"{domain} {number // 6}"},
                    "arguments": [[f"{text}?", " yes"], [f"{text}?", " no"]],
                    "filtered_resps": likelihoods,
                    "metrics": ["acc"],
                    "acc": score,
                    "doc_hash": text,
                    "prompt_hash": f"{text}?",
                    "target_hash": "yes",
                }
            )
        error = right.std(ddof=1) / len(right) ** 0.5
        return {"value": float(right.mean()), "stderr": float(error)}

    def texts(self, case, domain, factor=1.0):
        """Nats of held-out documents, and their perplexity."""
        lengths = np.random.default_rng(100 + len(domain)).integers(20, 80, size=1000)[: self.heldout]
        nats = lengths * (1.2 + math.log(factor)) * np.exp(self.noise * self.random.normal(size=self.heldout))
        for number, (length, total) in enumerate(zip(lengths.tolist(), nats.tolist(), strict=True)):
            self.rows.append({"case": case, "heldout": f"{domain} {number}", "nats": total, "tokens": length})
        return math.exp(nats.sum() / lengths.sum())

    def timing(self, factor=1.0):
        disturbed = np.where(self.random.random(self.rounds) < 0.1, 0.4, self.noise)
        speedups = 1.1 / factor * np.exp(disturbed * self.random.normal(size=self.rounds))
        found = {"ratio": float(np.median(speedups)), "ci95": [0.9, 1.3], "ceiling": 1.2, "rounds": self.rounds}
        seconds = {"dense_seconds": [0.011] * self.rounds, "sparse_seconds": (0.011 / speedups).tolist()}
        return found | seconds | {"batch": 1, "tokens": 128}

    def dense(self, domain):
        scores = self.answers(f"toy/{domain}/dense", domain)
        perplexity = self.texts(f"toy/{domain}/dense", domain)
        quality = [{"task": f"{domain}_choice", "metric": "acc", "filter": "none", **scores}]
        return {"model": "toy", "domain": domain, "quality": quality, "perplexity": perplexity}

    def case(self, id):
        _, domain, strategy = id.split("/")
        worse = self.worse.get(id, {})
        scores = self.answers(id, domain, worse.get("score", 0.0))
        sparse = self.texts(id, domain, worse.get("perplexity", 1.0))
        difference = {"value": 0.0, "ci95": [0.0, 0.0], "p_value": 1.0, "lost": 0, "gained": 0}
        quality = {"task": f"{domain}_choice", "metric": "acc", "filter": "none", "higher_is_better": True}
        quality |= {"documents": self.documents, "chance": 0.25, "dense": scores, "sparse": scores}
        quality |= {"difference": difference, "retention": {"value": 1.0, "ci95": [1.0, 1.0]}}
        perplexity = {"dense": sparse, "sparse": sparse, "ratio": 1.0, "ci95": [1.0, 1.0]}
        parity = {"ok": True, "max_relative_difference": 0.0, "max_logit_difference": 0.0, "tolerance": 1e-5}
        exercised = {"ok": True, "phases": {}, "sites": 1, "keep_all_difference": 0, "drop_all_difference": 1.0}
        speed = {"subject": "model"}
        speed |= {phase: self.timing(worse.get("speed", 1.0)) for phase in ("prefill", "decode")}
        return {
            "id": id,
            "model": "toy",
            "arch": "gemma",
            "domain": domain,
            "evaluated_on": domain,
            "strategy": {"name": strategy.partition("@")[0], "options": {}, "kind": "static", "control": False},
            "execution": "compact",
            "outcome": "passed",
            "seconds": 1.0,
            "mask": {"digest": f"mask of {id}"},
            "profile": "p",
            "sparsity": {
                "requested": 0.15,
                "achieved": 0.15,
                "per_site": {},
                "ffn_weights_removed": 0.15,
                "model_weights_removed": 0.1,
            },
            "gates": {
                "exercised": exercised,
                "parity": parity,
                "disjoint": {"ok": True, "overlap": {}, "allowed": False},
            },
            "preservation": {"tokens": 1000, "cosine": 1.0, "kl": 0.0, "top1_agreement": 1.0, "perplexity": perplexity},
            "quality": [quality],
            "speed": [speed],
        }

    def written(self, path):
        """The path of the record, written with its samples beside it."""
        samples = records.write_samples(self.rows, path.with_suffix(".samples.jsonl"))
        for entry in [*self.record["tasks"], *self.record["cases"]]:
            entry["samples"] = samples
        records.write(self.record, path)
        return path

    def read(self, folder, name="candidate"):
        return Evidence.read(self.written(folder / f"{name}.json"))


@pytest.fixture
def baseline(tmp_path):
    return Made().read(tmp_path, "baseline")


@pytest.fixture
def same():
    """The baseline's run again, to be changed."""
    return Made()


def by_label(found):
    return {(row.case, row.label): row for row in found.rows}


def marks(found, case=None):
    return "".join(row.mark for row in found.rows if case in (None, row.case))


def reasons(found):
    """Of the rows that are not comparable, by what they are about."""
    return {(row.case, row.quantity): row.reason for row in found.rows if row.mark == "x"}


def test_the_made_records_are_records(same):
    for entry in [*same.record["tasks"], *same.record["cases"]]:
        entry["samples"] = {"path": "samples.jsonl", "sha256": "0" * 64}
    records.validate(json.loads(json.dumps(same.record)))


def test_a_record_compared_with_itself_has_changed_in_nothing(baseline):
    found = compare(baseline, baseline, MARGINS[:2])
    assert found.exit_status == 0
    assert marks(found) == "~" * (3 * 4 + 2 * 3)
    for row in found.rows:
        if not row.quantity.startswith("speed"):
            assert row.change.ci95 == ((1, 1) if row.quantity == "perplexity" else (0, 0))
            assert row.p_adjusted == 1
            assert row.quantity == "likelihood" or row.judgement.verdict == "held"
    assert found.differing == ()
    assert found.unjudged == ()


def test_runs_of_the_same_pass_whatever_their_seed_and_subset(tmp_path):
    """The error rate is held over all rows of a comparison: 5% at most are to fail, by chance."""
    baseline = Made(seed=1).read(tmp_path, "baseline")
    outcomes = [
        compare(baseline, Made(seed=seed, documents=60 + 4 * seed).read(tmp_path)).exit_status for seed in range(2, 22)
    ]
    assert sum(outcomes) <= 1


@pytest.mark.parametrize(
    ("quantity", "amount", "label"),
    [("score", 0.3, "math_choice acc"), ("perplexity", 1.05, "perplexity"), ("speed", 1.25, "speed.decode")],
)
def test_a_regression_is_found_where_it_is(tmp_path, baseline, quantity, amount, label):
    worse = {CASES[0]: {quantity: amount}}
    for seed in range(1, 4):
        found = compare(baseline, Made(seed=seed, worse=worse).read(tmp_path))
        assert found.exit_status == 1
        assert by_label(found)[CASES[0], label].mark == "-"
    alone = Made(seed=0, worse=worse).read(tmp_path)  # all else is drawn as for the baseline
    assert {row.case for row in compare(baseline, alone).failures} == {CASES[0]}
    improved = compare(alone, baseline)
    assert by_label(improved)[CASES[0], label].mark == "+"
    assert improved.exit_status == 0


def test_scores_are_paired_by_document(baseline, same, tmp_path):
    rows = [row for row in same.rows if row["case"] == CASES[0] and "task" in row]
    right = [row for row in rows if row["acc"] == 1]
    wrong = [row for row in rows if row["acc"] == 0]
    for row in right[:14]:
        row["acc"] = 0.0
    wrong[0]["acc"] = 1.0
    rows.reverse()
    score = same.record["cases"][0]["quality"][0]["sparse"]
    score["value"] = sum(row["acc"] for row in rows) / len(rows)
    found = by_label(compare(baseline, same.read(tmp_path)))[CASES[0], "math_choice acc"]
    assert found.mark == "-"
    assert found.change.value == pytest.approx(-13 / 150)
    assert (found.change.lost, found.change.gained) == (14, 1)
    assert found.change.p_value == pytest.approx(binomtest(1, 15).pvalue)
    assert found.p_adjusted == pytest.approx(18 * binomtest(1, 15).pvalue)
    dense = np.mean([row["acc"] for row in same.rows if row["case"] == "toy/math/dense" and "task" in row])
    assert found.change.gain.value == pytest.approx(-13 / 150 / (dense - 0.25))


def test_documents_are_those_that_both_hold(baseline, tmp_path):
    candidate = Made(documents=40, heldout=30)
    candidate.rows = [row for row in candidate.rows if row.get("heldout") != "math 3"]
    found = by_label(compare(baseline, candidate.read(tmp_path)))
    assert found[CASES[0], "math_choice acc"].change.units == 40
    assert found[CASES[0], "perplexity"].change.units == 29
    assert found[CASES[1], "perplexity"].change.units == 30


def test_a_document_that_comes_twice_is_paired_with_its_like(baseline, same, tmp_path):
    for row in same.rows:
        if row.get("doc_hash") == "math 1":
            row["doc_hash"], row["prompt_hash"] = "math 0", "math 0?"
    first, second = same.read(tmp_path, "first"), copy.deepcopy(same).read(tmp_path, "second")
    assert by_label(compare(first, second))[CASES[0], "math_choice acc"].change.units == 150
    assert by_label(compare(baseline, second))[CASES[0], "math_choice acc"].change.units == 149


def test_a_held_out_document_of_another_length_is_another(baseline, same, tmp_path):
    for row in same.rows:
        if row.get("heldout") == "math 5":
            row["tokens"] -= 1
    assert by_label(compare(baseline, same.read(tmp_path)))[CASES[0], "perplexity"].change.units == 59


def test_perplexities_are_compared_by_their_ratio():
    before, tokens = np.array([30.0, 50.0, 20.0, 44.0]), [20, 30, 15, 25]
    after = before + np.array([1.0, 2.0, 0.5, 1.5])
    change = perplexity_change(before.tolist(), after.tolist(), tokens)
    assert change.baseline == pytest.approx(math.exp(144 / 90))
    assert change.value == pytest.approx(math.exp(5 / 90))
    assert change.gain.value == pytest.approx(-5 / 90)
    low, high = change.gain.ci95
    assert (math.exp(-high), math.exp(-low)) == pytest.approx(change.ci95)
    assert (change.lost, change.gained) == (4, 0)
    assert change.p_value == pytest.approx(2 / 2**4)


def test_perplexities_of_tasks_are_compared_by_their_ratio_and_bits_by_their_difference():
    before, after = [[-30.0, 10], [-44.0, 12]], [[-32.0, 10], [-45.0, 12]]
    words = corpus_change("word_perplexity", before, after)
    assert words.baseline == pytest.approx(math.exp(74 / 22))
    assert words.value == pytest.approx(math.exp(3 / 22))
    assert (words.gain.quantity, words.gain.value) == ("perplexity", pytest.approx(-3 / 22))
    bits = corpus_change("bits_per_byte", before, after)
    assert bits.value == pytest.approx(3 / 22 / math.log(2))
    assert not bits.is_ratio
    assert bits.gain is None
    with pytest.raises(NotComparable, match="do not count the same words"):
        corpus_change("word_perplexity", before, [[-32.0, 10], [-45.0, 13]])


def test_a_corpus_metric_is_recognised_by_its_value(same, tmp_path):
    about = same.record["tasks"][0]
    about |= {"metric": "word_perplexity", "higher_is_better": False, "chance": None, "chance_reason": "none"}
    entries = [same.record["dense"][0]["quality"][0], *(same.record["cases"][n]["quality"][0] for n in (0, 2))]
    for arm, entry in zip(("toy/math/dense", CASES[0], CASES[2]), entries, strict=True):
        entry["metric"] = "word_perplexity"
        rows = [row for row in same.rows if row["case"] == arm and row.get("task") == "math_choice"]
        for row in rows:
            row["word_perplexity"] = [-10.0 - row["acc"], 5]
        value = math.exp(sum(-row["word_perplexity"][0] for row in rows) / 5 / len(rows))
        entry.get("sparse", entry)["value"] = value
    evidence = same.read(tmp_path)
    row = by_label(compare(evidence, evidence, MARGINS))[CASES[0], "math_choice word_perplexity"]
    assert row.change.is_ratio
    assert row.change.baseline == pytest.approx(entries[1]["sparse"]["value"])
    assert row.judgement.margin.quantity == "perplexity"


def test_speeds_are_compared_by_yuens_test_of_the_rounds():
    """Against its formulas: trimmed means of the logarithms, winsorised variances, and Welch's degrees of freedom."""
    random = np.random.default_rng(0)
    seconds = [(random.uniform(1.0, 1.3, rounds), random.uniform(0.8, 1.2, rounds)) for rounds in (7, 11)]
    timings = [{"dense_seconds": dense.tolist(), "sparse_seconds": sparse.tolist()} for dense, sparse in seconds]
    means, spreads, freedoms = [], [], []
    for dense, sparse in seconds:
        logs = np.sort(np.log(dense / sparse))
        rounds, cut = len(logs), int(0.2 * len(logs))
        inner = logs[cut : rounds - cut]
        winsorised = np.clip(logs, inner[0], inner[-1])
        means.append(inner.mean())
        spreads.append(((winsorised - winsorised.mean()) ** 2).sum() / (len(inner) * (len(inner) - 1)))
        freedoms.append(len(inner) - 1)
    change, error = means[1] - means[0], math.sqrt(sum(spreads))
    freedom = sum(spreads) ** 2 / sum(spread**2 / one for spread, one in zip(spreads, freedoms, strict=True))
    found = speed_change(*timings)
    assert found.baseline == pytest.approx(math.exp(means[0]))
    assert found.value == pytest.approx(math.exp(change))
    assert found.p_value == pytest.approx(2 * t.sf(abs(change) / error, freedom))
    reach = t.ppf(0.975, freedom) * error
    assert found.ci95 == pytest.approx((math.exp(change - reach), math.exp(change + reach)))
    assert found.units == 7


def test_rounds_that_are_all_alike_are_compared_exactly():
    timing = {"dense_seconds": [2.0] * 6, "sparse_seconds": [1.0] * 6}
    same = speed_change(timing, timing)
    assert (same.value, same.ci95, same.p_value) == (1, (1, 1), 1)
    slower = speed_change(timing, timing | {"sparse_seconds": [2.0] * 6})
    assert (slower.value, slower.ci95, slower.p_value) == (0.5, (0.5, 0.5), 0)


def test_one_round_is_not_compared():
    timing = {"dense_seconds": [2.0], "sparse_seconds": [1.0]}
    with pytest.raises(NotComparable, match="fewer than two rounds"):
        speed_change(timing, timing)


def test_a_significant_change_within_the_factor_is_noise(tmp_path, baseline, same):
    for row in same.rows:
        if row["case"] == CASES[0] and "heldout" in row:
            row["nats"] *= 1.005
    found = by_label(compare(baseline, same.read(tmp_path)))[CASES[0], "perplexity"]
    assert found.p_adjusted < 0.05
    assert 1 < found.change.value < 1.01
    assert found.mark == "~"


def test_a_change_beyond_the_factor_that_is_not_significant_is_noise(baseline, same, tmp_path):
    for row in [row for row in same.rows if row["case"] == CASES[0] and row.get("acc") == 1][:3]:
        row["acc"] = 0.0
        same.record["cases"][0]["quality"][0]["sparse"]["value"] -= 1 / 150
    found = by_label(compare(baseline, same.read(tmp_path)))[CASES[0], "math_choice acc"]
    assert found.change.candidate / found.change.baseline < 1 / 1.01
    assert found.mark == "~"


def test_resampled_p_values_can_survive_adjustment_over_many_rows(tmp_path):
    """2,000 resamples bear no p value below 1/2001, which Holm's method turns into 1 where there are 200 rows."""

    def made(factor):
        run = Made(documents=2, heldout=30)
        run.record["cases"] = [run.case(f"toy/math/s{number}@0.1") | {"speed": []} for number in range(120)]
        for row in run.rows:
            if "heldout" in row and "/s" in row["case"]:
                row["nats"] *= factor
        return run.read(tmp_path, f"made{factor}")

    before, after = made(1.0), made(1.05)
    found = compare(before, after)
    assert len(found.rows) > 200
    assert sum(row.mark == "-" for row in found.rows) == 120


def test_groups_of_documents_count_as_one(tmp_path):
    """Six questions on a passage that all flip are one flip, not six."""

    def made(grouped):
        before, after = Made(), Made()
        for run in (before, after):
            if grouped:
                run.record["tasks"][0]["grouped_by"] = "passage"
        for row in after.rows:
            if row["case"] == CASES[0] and row.get("doc", {}).get("passage") in ("math 0", "math 1", "math 2"):
                row["acc"] = 0.0
        rows = [row["acc"] for row in after.rows if row["case"] == CASES[0] and "acc" in row]
        after.record["cases"][0]["quality"][0]["sparse"]["value"] = sum(rows) / len(rows)
        found = compare(before.read(tmp_path, "before"), after.read(tmp_path, "after"))
        return by_label(found)[CASES[0], "math_choice acc"].change

    alone, together = made(False), made(True)
    assert alone.lost == together.lost > 10
    assert alone.p_value < 0.001
    assert together.p_value == pytest.approx(2 / 2**3)


def test_a_margin_is_read():
    assert Margin.parse("retention:2%") == Margin("retention", 0.02)
    assert Margin.parse(" speed.decode : 10% ") == Margin("speed.decode", 0.1)
    assert str(Margin.parse("perplexity:.5%")) == "perplexity:0.5%"
    for text in ("retention", "retention:2", "speed.nothing:2%", "acc:1%", "retention:0%", "speed:100%", "speed:-1%"):
        with pytest.raises(UsageError, match="--fail-on"):
            Margin.parse(text)


def test_a_quantity_has_one_margin(baseline):
    with pytest.raises(UsageError, match="one margin"):
        compare(baseline, baseline, [Margin("speed", 0.1), Margin("speed", 0.2)])


@pytest.mark.parametrize(
    ("interval", "verdict", "needed"),
    [
        ((-0.01, (-0.019, 0.0)), "held", None),
        ((-0.03, (-0.05, -0.01)), "broken", None),
        ((-0.03, (-0.05, 0.01)), "broken", None),
        ((-0.01, (-0.0301, 0.01)), "unresolved", 405),
        ((0.01, (-0.02, 0.04)), "unresolved", 101),
        ((-0.02, (-0.04, 0.0)), "unresolved", None),
        ((0.0, (0.0, 0.0)), "held", None),
    ],
)
def test_a_margin_is_held_broken_or_unresolved(interval, verdict, needed):
    found = judge(Gain("retention", *interval), 100, Margin("retention", 0.02))
    assert (found.verdict, found.needed) == (verdict, needed)


def test_what_is_needed_is_the_fewest_documents_that_hold():
    random = np.random.default_rng(3)
    for _ in range(100):
        estimate, width = random.uniform(-0.02, 0.02), random.uniform(0.001, 0.1)
        units = int(random.integers(10, 1000))
        found = judge(
            Gain("retention", estimate, (estimate - width, estimate + width)), units, Margin("retention", 0.02)
        )
        if found.verdict == "unresolved":
            held = [estimate - width * math.sqrt(units / n) > -0.02 for n in (found.needed, found.needed - 1)]
            assert held == [True, False]


def test_margins_of_ratios_are_shares_of_the_baseline():
    slower = Gain("speed.decode", math.log(0.92), (math.log(0.905), math.log(0.94)))
    assert judge(slower, 20, Margin("speed", 0.10)).verdict == "held"
    assert judge(slower, 20, Margin("speed", 0.07)).verdict == "broken"
    larger = Gain("perplexity", -math.log(1.02), (-math.log(1.0301), -math.log(1.01)))
    assert judge(larger, 20, Margin("perplexity", 0.03)).verdict == "unresolved"
    assert judge(larger, 20, Margin("perplexity", 0.031)).verdict == "held"


def test_margins_decide_in_the_place_of_marks(tmp_path, baseline):
    candidate = Made(worse={CASES[0]: {"score": 0.3}}).read(tmp_path)
    assert compare(baseline, candidate).exit_status == 1
    assert compare(baseline, candidate, [Margin("retention", 0.99)]).exit_status == 0
    found = compare(baseline, candidate, [Margin("retention", 0.02)])
    assert found.exit_status == 1
    assert [row.case for row in found.failures if row.judgement.verdict == "broken"] == [CASES[0]]


def test_few_documents_do_not_hold_a_margin(tmp_path, baseline):
    found = compare(baseline, Made(seed=5).read(tmp_path), [Margin("retention", 0.02)])
    unresolved = [row.judgement for row in found.rows if row.judgement and row.judgement.verdict == "unresolved"]
    assert found.exit_status == 1
    assert all(judgement.needed > 150 for judgement in unresolved)


def test_the_nearer_of_two_margins_counts(baseline):
    found = compare(baseline, baseline, [Margin("speed", 0.5), Margin("speed.decode", 0.9)])
    judged = {row.quantity: row.judgement.margin.share for row in found.rows if row.judgement}
    assert judged == {"speed.prefill": 0.5, "speed.decode": 0.9}


def test_a_margin_that_nothing_can_be_judged_by_fails(baseline):
    found = compare(baseline, baseline, [Margin("speed.ffn", 0.1)])
    assert found.unjudged == (Margin("speed.ffn", 0.1),)
    assert found.exit_status == 1


def test_dense_drift_has_rows_of_its_own_and_fails(baseline, same, tmp_path):
    for row in same.rows:
        if row["case"] == "toy/math/dense" and "acc" in row:
            row["acc"] *= row["doc_id"] % 3 > 0
    rows = [row["acc"] for row in same.rows if row["case"] == "toy/math/dense" and "acc" in row]
    same.record["dense"][0]["quality"][0]["value"] = sum(rows) / len(rows)
    candidate = same.read(tmp_path)
    found = compare(baseline, candidate)
    assert [(row.case, row.label) for row in found.failures] == [("toy/math/dense", "math_choice acc")]
    judged = compare(baseline, candidate, [Margin("retention", 0.05)])
    assert [(row.case, row.judgement.verdict) for row in judged.failures] == [("toy/math/dense", "broken")]


@pytest.mark.parametrize("factor", [0.5, 1.02])
def test_a_scorer_that_is_wrong_fails_where_no_answer_changes(baseline, same, tmp_path, factor):
    for row in same.rows:
        if "filtered_resps" in row:
            row["filtered_resps"] = [[factor * score, greedy] for score, greedy in row["filtered_resps"]]
    candidate = same.read(tmp_path)
    for margins in ((), [Margin("retention", 0.05)]):
        found = compare(baseline, candidate, margins)
        assert {(row.case, row.label) for row in found.failures} == {
            (f"toy/{domain}/dense", f"likelihood {domain}_choice") for domain in ("math", "code")
        }


def test_likelihoods_are_those_of_the_same_prompts(baseline, same, tmp_path):
    for row in same.rows:
        if "filtered_resps" in row and row["doc_id"]:
            row |= {"prompt_hash": "other", "filtered_resps": [[-9.0, False], [-9.0, False]]}
    assert not [row for row in compare(baseline, same.read(tmp_path)).rows if row.quantity == "likelihood"]


def fingerprint(run):
    run.record["models"][0]["fingerprint"] = "e" * 64


def options(run):
    run.record["cases"][0]["strategy"]["options"] = {"pool": "model"}


def plugin(run):
    run.record["cases"][0]["strategy"]["plugin"] = "other"


def version(run):
    run.record["tasks"][0]["version"] = "2"


def examples(run):
    run.record["tasks"][0]["num_fewshot"] = 5


def template(run):
    run.record["command"]["resolved"]["apply_chat_template"] = True


def prompts(run):
    for row in run.rows:
        if row.get("task") == "math_choice":
            row["prompt_hash"] += "!"


def targets(run):
    for row in run.rows:
        if row.get("doc_hash") == "math 7":
            row["target_hash"] = "no"


def machine(run):
    run.record["environment"]["machine"]["cores"] = 8


def threads(run):
    run.record["environment"]["threads"] = 1


def dtype(run):
    run.record["environment"]["dtype"] = "bfloat16"


def workload(run):
    for case in run.record["cases"]:
        case["speed"][0]["decode"]["batch"] = 8


def fault(run):
    run.record["cases"][0]["speed"][0]["decode"]["fault"] = "more than there is to gain"


def no_speed(run):
    run.record["cases"][0] |= {"speed": [], "speed_reason": "not asked for"}


def no_quality(run):
    run.record["cases"][0] |= {"quality": [], "quality_reason": "not asked for"}


def no_heldout(run):
    run.rows = [row for row in run.rows if row.get("case") != CASES[0] or "heldout" not in row]


def no_preservation(run):
    run.record["cases"][0] |= {"preservation": None, "preservation_reason": "no held-out text"}


SCORES, MATH = {"score"}, {CASES[0], CASES[2], "toy/math/dense"}
SPEEDS = {"speed.prefill", "speed.decode"}
DENSE = {"likelihood"}
EVERYTHING = {*CASES, "toy/math/dense", "toy/code/dense"}


@pytest.mark.parametrize(
    ("change", "cases", "quantities", "reason"),
    [
        (
            fingerprint,
            EVERYTHING,
            SCORES | DENSE | {"perplexity"} | SPEEDS,
            "another model (weights): ffffffffffff and eeeeee",
        ),
        (options, {CASES[0]}, SCORES | {"perplexity"} | SPEEDS, "another strategy (options): {} and {'pool': 'model'}"),
        (plugin, {CASES[0]}, SCORES | {"perplexity"} | SPEEDS, "another strategy (plugin): None and other"),
        (version, MATH, SCORES, "another version of the task: 1 and 2"),
        (examples, MATH, SCORES, "another prompt (examples): 0 and 5"),
        (template, EVERYTHING, SCORES, "another prompt (chat template): False and True"),
        (machine, set(CASES), SPEEDS, "another machine (cores): 2 and 8"),
        (threads, set(CASES), SPEEDS, "another number of threads: 2 and 1"),
        (dtype, set(CASES), SPEEDS, "another dtype: float32 and bfloat16"),
        (workload, set(CASES), {"speed.decode"}, "another workload (batch): 1 and 8"),
        (fault, {CASES[0]}, {"speed.decode"}, "measurement fault: more than there is to gain"),
        (no_speed, {CASES[0]}, SPEEDS, "not in the candidate: not asked for"),
        (no_quality, {CASES[0]}, SCORES, "not in the candidate: not asked for"),
        (no_heldout, {CASES[0]}, {"perplexity"}, "fewer than two held-out documents in common"),
        (no_preservation, {CASES[0]}, {"perplexity"}, "not in the candidate: no held-out text"),
    ],
)
def test_what_makes_rows_not_comparable_is_said_and_touches_no_others(
    baseline, same, tmp_path, change, cases, quantities, reason
):
    change(same)
    found = compare(baseline, same.read(tmp_path))
    rows = {(row.case, row.quantity) for row in found.rows}
    assert reasons(found).keys() == {(case, name) for case, name in rows if case in cases and name in quantities}
    assert all(why.startswith(reason) for why in reasons(found).values())


@pytest.mark.parametrize(
    ("change", "note"),
    [(prompts, "another prompt in 150 of 150 documents"), (targets, "another right answer in 1 of 150 documents")],
)
def test_prompts_that_changed_without_a_setting_are_noted_and_compared(baseline, same, tmp_path, change, note):
    change(same)
    found = compare(baseline, same.read(tmp_path))
    assert reasons(found) == {}
    assert {row.case for row in found.rows if row.change.note == note} == MATH
    assert {row.change.note for row in found.rows} == {note, None}


def test_a_record_without_a_comparable_row_fails(baseline, same, tmp_path):
    fingerprint(same)
    found = compare(baseline, same.read(tmp_path))
    assert set(marks(found)) == {"x"}
    assert found.exit_status == 1


def test_another_seed_limit_or_batch_size_makes_nothing_incomparable(baseline, tmp_path):
    other = Made(seed=9, documents=50)
    for task in other.record["tasks"]:
        task |= {"batch": 8, "limit": 50}
    found = compare(baseline, other.read(tmp_path))
    assert reasons(found) == {}
    assert found.differing == ("seed 0 -> 9",)


def test_examples_drawn_by_another_seed_may_change_prompts(tmp_path):
    runs = [Made(seed=0), Made(seed=1)]
    for run in runs:
        run.record["tasks"][0]["num_fewshot"] = 2
        for row in run.rows:
            if row.get("task") == "math_choice":
                row["prompt_hash"] += str(run.seed)
    found = compare(runs[0].read(tmp_path, "first"), runs[1].read(tmp_path))
    assert {row.change.note for row in found.rows} == {None}


def test_a_control_that_draws_its_mask_is_comparable_for_one_seed_only(tmp_path):
    def made(seed, profile, digest):
        run = Made(seed=seed)
        run.record["cases"][0]["strategy"]["control"] = True
        run.record["cases"][0]["mask"]["digest"] = digest
        run.record["cases"][0].pop("profile" if not profile else "message", None)
        return run.read(tmp_path, f"{seed}{profile}{digest}")

    before = made(0, False, "one")
    found = compare(before, made(1, False, "other"))
    assert reasons(found).keys() == {(CASES[0], "score"), (CASES[0], "perplexity")}
    assert "which this control draws by the seed: 0 and 1" in reasons(found)[CASES[0], "score"]
    assert reasons(compare(before, made(0, False, "other"))) == {}
    assert reasons(compare(made(0, True, "one"), made(1, True, "other"))) == {}


def test_other_masks_are_named(baseline, same, tmp_path):
    same.record["cases"][1]["mask"]["digest"] = "another"
    assert compare(baseline, same.read(tmp_path)).other_masks == {CASES[1]}


def test_given_masks_are_matched_by_content_whatever_their_folder(same, tmp_path):
    def made(folder, digest):
        run = copy.deepcopy(same)
        run.record["cases"][0]["strategy"] |= {"name": "mask", "options": {"file": f"{folder}/mask.safetensors"}}
        run.record["cases"][0]["mask"]["digest"] = digest
        return run.read(tmp_path, folder)

    assert reasons(compare(made("here", "a"), made("there", "a"))) == {}
    assert set(reasons(compare(made("here", "a"), made("there", "b"))).values()) == {"another mask: a and b"}


def test_cases_that_fail_are_fixed_or_are_alone_are_marked(same, tmp_path):
    before, after = copy.deepcopy(same), copy.deepcopy(same)
    after.record["cases"][0] |= {"outcome": "failed", "message": "the mask was not applied"}
    before.record["cases"][1] |= {"outcome": "error", "message": "out of memory"}
    before.record["cases"][2]["id"] += "0"
    found = compare(before.read(tmp_path, "before"), after.read(tmp_path, "after"))
    outcomes = [(row.mark, row.reason) for row in found.rows if row.quantity == "outcome"]
    assert outcomes == [
        ("!", "failed: the mask was not applied"),
        ("*", "was error: out of memory"),
        ("x", "only in the baseline"),
        ("x", "only in the candidate"),
    ]
    assert found.exit_status == 1
    assert compare(found.baseline, found.candidate, [Margin("retention", 0.5)]).exit_status == 1
    assert compare(found.candidate, found.baseline).counts == found.counts | {"+": 0, "-": 0}


def test_cases_that_fail_in_both_are_not_comparable(same, tmp_path):
    same.record["cases"][0] |= {"outcome": "failed", "message": "no"}
    evidence = same.read(tmp_path)
    reason = "failed in the baseline: no; failed in the candidate: no"
    assert reasons(compare(evidence, evidence))[CASES[0], "outcome"] == reason


def absent(path):
    path.with_suffix(".samples.jsonl").unlink()


def tampered(path):
    with path.with_suffix(".samples.jsonl").open("a") as file:
        file.write("{}\n")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (absent, "cannot read candidate.samples.jsonl: No such file or directory"),
        (tampered, "candidate.samples.jsonl is not the file that candidate.json was written with"),
    ],
)
def test_without_samples_scores_are_compared_unpaired_and_perplexities_not(baseline, same, tmp_path, damage, reason):
    path = same.written(tmp_path / "candidate.json")
    damage(path)
    found = compare(baseline, Evidence.read(path), MARGINS[:1])
    row = by_label(found)[CASES[0], "math_choice acc"]
    score = same.record["cases"][0]["quality"][0]["sparse"]
    reach = 1.959964 * math.sqrt(2) * score["stderr"]
    assert (row.change.paired, row.change.note) == (False, f"not paired: {reason}")
    assert row.change.ci95 == pytest.approx((-reach, reach))
    dense = same.record["dense"][0]["quality"][0]["value"]
    assert row.change.gain.ci95 == pytest.approx((-reach / (dense - 0.25), reach / (dense - 0.25)))
    assert row.judgement.verdict == "unresolved"
    assert set(reasons(found).values()) == {f"perplexities are compared document by document, and {reason}"}


def test_an_unpaired_loss_is_found_where_it_is_large(baseline, tmp_path):
    path = Made(worse={CASES[0]: {"score": 0.4}}).written(tmp_path / "candidate.json")
    absent(path)
    found = compare(baseline, Evidence.read(path))
    assert [(row.case, row.quantity) for row in found.failures] == [(CASES[0], "score")]


def test_a_score_without_samples_or_error_is_not_comparable(baseline, same, tmp_path):
    del same.record["cases"][0]["quality"][0]["sparse"]["stderr"]
    path = same.written(tmp_path / "candidate.json")
    absent(path)
    assert "there is no standard error" in reasons(compare(baseline, Evidence.read(path)))[CASES[0], "score"]


def test_retention_is_not_judged_where_dense_is_at_chance(tmp_path):
    run = Made()
    for row in run.rows:
        if row["case"] == "toy/math/dense" and "acc" in row:
            row["acc"] = float(row["doc_id"] % 4 == 0)
    evidence = run.read(tmp_path)
    row = by_label(compare(evidence, evidence, MARGINS))[CASES[0], "math_choice acc"]
    assert row.judgement is None
    assert "dense at chance" in row.change.gain.reason


def test_what_several_cases_share_is_compared_once(tmp_path):
    def made(seed):
        run = Made(seed=seed)
        layer = {"subject": "one layer", "decode": run.timing()}
        for case in run.record["cases"]:
            case["speed"].append(layer)
        return run.read(tmp_path, f"run{seed}")

    found = compare(made(0), made(1))
    assert [row.case for row in found.rows if row.label == "speed.decode one layer"] == [CASES[0]]


def test_flips_hold_prompt_and_both_answers_lost_ones_first(baseline, same, tmp_path):
    rows = [row for row in same.rows if row["case"] == CASES[0] and "task" in row]
    flipped = [next(row for row in rows if row["acc"] == score) for score in (0, 1)]
    for row in flipped:
        row["acc"] = 1 - row["acc"]
        row["filtered_resps"].reverse()
    found = by_label(compare(baseline, same.read(tmp_path)))[CASES[0], "math_choice acc"].change.flips
    assert [(flip.lost, flip.baseline, flip.candidate) for flip in found] == [(True, "yes", "no"), (False, "no", "yes")]
    assert found[0].prompt == f"{flipped[1]['doc_hash']}?"


def test_a_frame_has_a_row_for_each_comparison(baseline, same, tmp_path):
    no_speed(same)
    found = compare(baseline, same.read(tmp_path), MARGINS)
    frame = found.frame()
    assert len(frame) == len(found.rows)
    assert frame["mark"].tolist() == [row.mark for row in found.rows]
    assert frame.loc[frame["mark"] == "x", "reason"].tolist() == ["not in the candidate: not asked for"] * 2
    scores = frame[frame["quantity"] == "score"]
    assert scores["lost"].tolist() == [0] * 5
    assert scores["metric"].tolist() == ["acc"] * 5
    assert set(frame["verdict"].dropna()) <= {"held", "broken", "unresolved"}


def test_what_is_no_record_of_a_run_is_refused(tmp_path):
    records.write({"version": 1, "cases": []}, tmp_path / "other.json")
    with pytest.raises(UsageError, match="is not the record of a run: it has no models"):
        Evidence.read(tmp_path / "other.json")
    with pytest.raises(UsageError, match="cannot read"):
        Evidence.read(tmp_path / "nothing.json")


def test_samples_are_verified_by_their_digest(baseline):
    content = Path(baseline.path).with_suffix(".samples.jsonl").read_bytes()
    assert hashlib.sha256(content).hexdigest() == baseline.record["cases"][0]["samples"]["sha256"]
    assert baseline.missing is None


def test_samples_may_lie_in_a_folder_below(same, tmp_path):
    path = same.written(tmp_path / "run.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    for entry in [*record["tasks"], *record["cases"]]:
        entry["samples"]["path"] = "below/samples.jsonl"
    (tmp_path / "below").mkdir()
    path.with_suffix(".samples.jsonl").rename(tmp_path / "below/samples.jsonl")
    path.write_text(json.dumps(record), encoding="utf-8")
    assert Evidence.read(path).missing is None


def test_torch_is_not_imported():
    program = "import sys, spath_eval.comparison; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
