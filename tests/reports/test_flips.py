"""Flips: which documents changed, and what both arms answered, from the samples that the record was written with."""

import json

from spath_eval import records
from spath_eval.reports.flips import LONGEST, with_flips


def row(case, number, task="sums", filtered=None, said=None, target="4", **metrics):
    """A document of which text was generated."""
    said = filtered if said is None else said
    return {
        "case": case,
        "task": task,
        "doc_id": number,
        "doc_hash": f"hash {number}",
        "target": target,
        "arguments": [[f"{number} + {number} =", {"until": ["\n"]}]],
        "resps": [[said]],
        "filtered_resps": [filtered],
        "filter": "none",
        "metrics": list(metrics),
        **metrics,
    }


def choice(case, number, likelihoods, choices=(" cat", " caterpillar"), contexts=None, target=0, **metrics):
    """A document of which choices were scored."""
    contexts = contexts or ["Which one?"] * len(choices)
    arguments = [[context, text] for context, text in zip(contexts, choices, strict=True)]
    made = row(case, number, "choices", target=target, **metrics)
    responses = [[likelihood, False] for likelihood in likelihoods]
    return made | {"arguments": arguments, "filtered_resps": responses, "resps": [[one] for one in responses]}


def entry(task="sums", metric="exact_match", **more):
    return {"task": task, "metric": metric, "filter": "none", "higher_is_better": True, **more}


def make(folder, rows, quality):
    """A record with one case in `folder`."""
    samples = records.write_samples(rows, folder / "x.samples.jsonl")
    case = {"id": "m/math/negative@0.5", "model": "m", "domain": "math", "quality": quality, "samples": samples}
    return {"cases": [case]}


def flips(folder, rows, quality, most=10):
    found = with_flips(make(folder, rows, quality), folder, most)
    return found["flips"].get("m/math/negative@0.5", [])


DENSE, SPARSE = "m/math/dense", "m/math/negative@0.5"


def test_documents_that_changed_are_found_with_both_answers(tmp_path):
    rows = [
        row(SPARSE, 0, filtered="4", exact_match=1.0),
        row(SPARSE, 1, filtered="5", said=" 5 apples", exact_match=0.0),
        row(SPARSE, 2, filtered="4", exact_match=1.0),
        {"case": SPARSE, "heldout": "digest", "nats": 3.5, "tokens": 2},
        row(DENSE, 0, filtered="4", exact_match=1.0),
        row(DENSE, 1, filtered="4", exact_match=1.0),
        row(DENSE, 2, filtered="3", exact_match=0.0),
    ]
    (found,) = flips(tmp_path, rows, [entry()])
    assert (found["task"], found["metric"], found["filter"]) == ("sums", "exact_match", "none")
    assert (found["lost"], found["gained"]) == (1, 1)
    assert found["documents"] == [
        {
            "doc_id": 1,
            "prompt": "1 + 1 =",
            "target": "4",
            "change": "lost",
            "dense": {"answer": "4", "score": 1.0},
            "sparse": {"answer": " 5 apples", "read_as": "5", "score": 0.0},
        },
        {
            "doc_id": 2,
            "prompt": "2 + 2 =",
            "target": "4",
            "change": "gained",
            "dense": {"answer": "3", "score": 0.0},
            "sparse": {"answer": "4", "score": 1.0},
        },
    ]


def test_documents_are_the_first_ones_and_all_are_counted(tmp_path):
    rows = [
        row(arm, number, filtered=arm, f1=score) for arm, score in ((SPARSE, 0.2), (DENSE, 0.5)) for number in range(9)
    ]
    (found,) = flips(tmp_path, rows, [entry(metric="f1")], most=2)
    assert found["lost"] == 9
    assert [document["doc_id"] for document in found["documents"]] == [0, 1]
    (found,) = flips(tmp_path, rows, [entry(metric="f1", higher_is_better=False)], most=0)
    assert (found["lost"], found["gained"], found["documents"]) == (0, 9, [])


def test_the_likeliest_choice_is_the_answer_by_character_where_the_metric_is(tmp_path):
    # by the whole -3 beats -6, by character -6 / 11 beats -3 / 3
    rows = [
        choice(SPARSE, 0, [-3.0, -6.0], acc=1.0, acc_norm=0.0),
        choice(DENSE, 0, [-7.0, -6.0], acc=0.0, acc_norm=1.0),
    ]
    plain, by_character = flips(tmp_path, rows, [entry("choices", "acc"), entry("choices", "acc_norm")])
    (document,) = plain["documents"]
    assert (document["prompt"], document["target"]) == ("Which one?", " cat")
    assert (document["dense"]["answer"], document["sparse"]["answer"]) == (" caterpillar", " cat")
    (document,) = by_character["documents"]
    assert (document["dense"]["answer"], document["sparse"]["answer"]) == (" caterpillar", " caterpillar")


def test_choices_that_differ_in_their_context_are_shown_from_where_they_differ(tmp_path):
    contexts, choices = ["Ann saw Bob, as Ann", "Ann saw Bob, as Bob"], [" looked.", " looked."]
    rows = [
        choice(SPARSE, 0, [-1.0, -2.0], choices, contexts, target=1, acc=0.0),
        choice(DENSE, 0, [-2.0, -1.0], choices, contexts, target=1, acc=1.0),
    ]
    (found,) = flips(tmp_path, rows, [entry("choices", "acc")])
    (document,) = found["documents"]
    assert document["prompt"] == "Ann saw Bob, as "
    assert document["target"] == document["dense"]["answer"] == "Bob looked."
    assert document["sparse"]["answer"] == "Ann looked."


def test_perplexities_have_no_flips(tmp_path):
    rows = [row(arm, 0, filtered="", word_perplexity=score) for arm, score in ((SPARSE, [-9.0, 4]), (DENSE, [-8.0, 4]))]
    rows += [row(arm, 0, "bits", filtered="", bits_per_byte=score) for arm, score in ((SPARSE, -9.0), (DENSE, -8.0))]
    assert flips(tmp_path, rows, [entry(metric="word_perplexity"), entry("bits", "bits_per_byte")]) == []


def test_of_a_long_text_the_middle_is_left_out(tmp_path):
    long = "a" * LONGEST + "b" * 1000
    rows = [row(SPARSE, 0, filtered=long, f1=0.0), row(DENSE, 0, filtered="4", f1=1.0)]
    (found,) = flips(tmp_path, rows, [entry(metric="f1")])
    answer = found["documents"][0]["sparse"]["answer"]
    assert answer == f"{'a' * 500}\n[... 1,000 characters left out ...]\n{'b' * 1000}"


def test_the_record_is_left_as_it_was(tmp_path):
    record = make(tmp_path, [row(DENSE, 0, filtered="4", f1=1.0)], [entry()])
    before = json.dumps(record)
    assert with_flips(record, tmp_path, 3) == {**record, "flips": {}}
    assert json.dumps(record) == before


def test_samples_that_are_absent_or_others_are_refused(tmp_path):
    record = make(tmp_path, [row(DENSE, 0, filtered="4", f1=1.0)], [entry()])
    path = tmp_path / "x.samples.jsonl"
    path.write_bytes(path.read_bytes() + b"{}\n")
    found = with_flips(record, tmp_path, 3)
    assert found["flips"] is None
    assert found["flips_reason"] == "the samples file x.samples.jsonl is not the one that the record was written with"
    path.write_text("no JSON\n")
    assert "cannot be read" in with_flips(record, tmp_path, 3)["flips_reason"]
    path.unlink()
    assert (
        with_flips(record, tmp_path, 3)["flips_reason"] == "there is no samples file x.samples.jsonl beside the record"
    )
    del record["cases"][0]["samples"]
    assert with_flips(record, tmp_path, 3)["flips_reason"] == "no case has a samples file"
    assert with_flips({}, tmp_path, 3) == {"flips": None, "flips_reason": "no task was scored"}


def test_a_row_of_another_shape_is_told_not_raised(tmp_path):
    rows = [row(SPARSE, 0, filtered="5", f1=0.0) | {"filtered_resps": []}, row(DENSE, 0, filtered="4", f1=1.0)]
    found = with_flips(make(tmp_path, rows, [entry(metric="f1")]), tmp_path, 3)
    assert found["flips"] is None
    assert found["flips_reason"].startswith("a row of the samples is not as expected: IndexError: ")
