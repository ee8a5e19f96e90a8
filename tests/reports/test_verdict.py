"""The verdict: one sentence for each model, which says no more than intervals bear out."""

import copy
from pathlib import Path

import pytest

from spath_eval import records
from spath_eval.reports.tables import ABOVE_CEILING
from spath_eval.reports.verdict import gain, judged, verdicts


@pytest.fixture
def example():
    return records.read(Path(__file__).parents[1] / "data" / "record.json")


def timing(low, ratio, high, ceiling=1.2):
    return {"ratio": ratio, "ci95": [low, high], "ceiling": ceiling}


def test_a_single_case_is_told_whole(example):
    example["cases"] = example["cases"][:1]
    assert verdicts(example) == {
        "gemma": "gemma, without 14.9% of its FFN neurons (math/negative@0.15), keeps 0.99 [0.97, 1.01] of what it "
        "scored above chance (mean of 2 tasks, 600 documents, 12 of them changed); its perplexity on held-out text is "
        "1.031 [1.024, 1.039] times the dense one; decode runs 1.02 [1.02, 1.04] times as fast, of at most 1.06 "
        "(faster, 32% of the possible gain), prefill runs 1.05 [1.04, 1.06] times as fast, of at most 1.08 (faster, "
        "65% of the possible gain)."
    }


def test_several_cases_are_told_by_their_extremes(example):
    assert verdicts(example) == {
        "gemma": "gemma, over 3 cases without controls: mean retention 0.63 [0.57, 0.68] (math/random@0.15) to 0.99 "
        "[0.95, 1.03] (language/negative@0.15), the interval reaching 1 in 2 of 3 (at least 300 documents each); "
        "perplexity ratio 1.031 [1.024, 1.039] (math/negative@0.15) to 1.813 [1.751, 1.881] (math/random@0.15); "
        "decode faster in 2 of 2 timed, at best 1.03 [1.02, 1.04] times as fast, of at most 1.06 "
        "(language/negative@0.15: faster, 43% of the possible gain); 1 of 4 cases did not pass."
    }


def test_the_fastest_is_one_that_is_faster_where_there_is_any(example):
    example["cases"][2]["speed"][0]["decode"].update(ratio=1.5, ci95=[0.9, 2.0])
    (sentence,) = verdicts(example).values()
    assert "decode faster in 1 of 2 timed, at best 1.02 [1.02, 1.04] times as fast" in sentence
    example["cases"][0]["speed"][0]["decode"].update(ci95=[0.9, 1.04])
    (sentence,) = verdicts(example).values()
    assert "decode faster in 0 of 2 timed, at best 1.50 [0.90, 2.00] times as fast" in sentence


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (timing(1.01, 1.1, 1.15), "faster, 50% of the possible gain"),
        (timing(1.0, 1.1, 1.15), "no difference shown"),
        (timing(0.9, 1.1, 1.3), "no difference shown"),
        (timing(0.8, 0.9, 0.99), "slower"),
        (timing(1.1, 1.3, 1.5), "faster, by an estimate above its ceiling"),
        (timing(1.21, 1.3, 1.5), ABOVE_CEILING),
        (timing(1.01, 1.1, 1.15, ceiling=None), "faster"),
        ({"ratio": 1.1, "ci95": None, "ceiling": 1.2}, "no interval"),
        (timing(1.01, 1.1, 1.15) | {"fault": "a clock ran backwards"}, "measurement fault: a clock ran backwards"),
    ],
)
def test_a_speed_is_called_faster_only_where_its_interval_lies_above_1(measured, expected):
    assert judged(measured) == expected


def test_the_share_of_the_gain_is_undefined_where_nothing_can_be_gained():
    assert gain(timing(1.0, 1.05, 1.1, ceiling=1.0)) is None
    assert gain(timing(1.0, 1.05, 1.1, ceiling=1.2)) == pytest.approx(0.25)
    assert gain(timing(0.8, 0.9, 1.0, ceiling=1.2)) == pytest.approx(-0.5)


def test_controls_and_masks_of_others_are_no_part_of_it(example):
    first, other, *_ = example["cases"]
    other["strategy"]["control"] = True
    crossed = copy.deepcopy(first) | {"id": "gemma/math>language/negative@0.15", "evaluated_on": "language"}
    example["cases"] = [first, other, crossed]
    assert verdicts(example)["gemma"].startswith("gemma, without 14.9% of its FFN neurons (math/negative@0.15), keeps")
    example["cases"] = [other]
    assert verdicts(example)["gemma"] == "gemma: nothing can be said, for no case passed that is not a control."


def test_nothing_is_said_of_cases_that_did_not_pass(example):
    example["cases"] = example["cases"][3:]
    assert verdicts(example)["gemma"] == (
        "gemma: nothing can be said, for no case passed that is not a control; 1 of 1 cases did not pass."
    )


def test_documents_of_which_none_changed_are_counted(example):
    for case in example["cases"][:3:2]:
        for entry in case["quality"]:
            entry["difference"].update(lost=0, gained=0)
    assert "(at least 300 documents each; in 2 of the cases none changed)" in verdicts(example)["gemma"]
    example["cases"] = example["cases"][:1]
    assert "600 documents, 0 of them changed" in verdicts(example)["gemma"]


def test_a_document_that_several_metrics_score_counts_once(example):
    example["cases"] = example["cases"][:1]
    entries = example["cases"][0]["quality"]
    entries.append(copy.deepcopy(entries[0]) | {"metric": "acc_norm"})
    assert "600 documents, 12 of them changed" in verdicts(example)["gemma"]


def test_what_was_not_measured_comes_with_its_reason(example):
    case = example["cases"][0]
    example["cases"] = [case]
    case.update(quality=[], quality_reason="not asked for", preservation=None, preservation_reason="no held-out text")
    case.update(speed=[], speed_reason="masking is not skipping")
    assert verdicts(example)["gemma"] == (
        "gemma, without 14.9% of its FFN neurons (math/negative@0.15), has no retention (not asked for); perplexity "
        "was not compared (no held-out text); its speed was not measured (masking is not skipping)."
    )
    example["cases"] = [case, copy.deepcopy(case) | {"id": "gemma/math/negative@0.5"}]
    assert verdicts(example)["gemma"] == (
        "gemma, over 2 cases without controls: retention not measured; perplexity ratio undefined; the model's speed "
        "not measured."
    )


def test_every_model_has_a_sentence(example):
    example["cases"].append(copy.deepcopy(example["cases"][0]) | {"id": "phi/math/negative@0.15", "model": "phi"})
    found = verdicts(example)
    assert list(found) == ["gemma", "phi"]
    assert found["phi"].startswith("phi, without 14.9%")
    assert verdicts({}) == {}
