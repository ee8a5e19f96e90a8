"""Scores are lm-eval's own, the requests are the same for every arm, and guessing is known for what it is."""

from __future__ import annotations

import math

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from spath_eval import UsageError
from spath_eval.collection import Limits
from spath_eval.quality.adapter import PathwayLM, chance, evaluate, item_texts, task_record
from spath_eval.quality.benchmarks import load_tasks
from spath_eval.tasks import FOLDER

TASKS = ("spath_math_choice", "spath_math_generate")


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval(), AutoTokenizer.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def evaluation(loaded):
    return evaluate(PathwayLM(*loaded, batch_size=4), load_tasks(TASKS, [FOLDER]), Limits(6), seed=0)


@pytest.fixture(scope="module")
def plain(loaded):
    """What stock lm-eval finds."""
    model, tokenizer = loaded
    return lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(FOLDER), include_defaults=False),
        limit=6,
        log_samples=True,
    )


def test_scores_are_those_of_plain_lm_eval(evaluation, plain):
    assert [score.key for score in evaluation.scores.values()] == [
        ("spath_math_choice", "acc", "none"),
        ("spath_math_generate", "exact_match", "answer"),
    ]
    for (task, metric, chosen), score in evaluation.scores.items():
        assert score.value == plain["results"][task][f"{metric},{chosen}"]
        assert score.stderr == pytest.approx(plain["results"][task][f"{metric}_stderr,{chosen}"])
        assert score.higher_is_better
        assert list(score.per_document.values()) == [row[metric] for row in plain["samples"][task]]


def test_answers_are_those_of_plain_lm_eval(evaluation, plain):
    for task in TASKS:
        rows = [row for row in evaluation.samples if row["task"] == task]
        assert len(rows) == 6
        for row, stock in zip(rows, plain["samples"][task], strict=True):
            for key in ("doc_id", "doc_hash", "prompt_hash", "target_hash"):
                assert row[key] == stock[key]
            for answer, expected in zip(row["filtered_resps"], stock["filtered_resps"], strict=True):
                assert answer == (pytest.approx(expected, abs=1e-4) if isinstance(expected, tuple) else expected)


def test_accuracy_does_not_depend_on_the_batch(loaded, evaluation):
    for batch_size in (1, 5):
        again = evaluate(PathwayLM(*loaded, batch_size=batch_size), load_tasks(TASKS, [FOLDER]), Limits(6), seed=0)
        assert {key: score.per_document for key, score in again.scores.items()} == {
            key: score.per_document for key, score in evaluation.scores.items()
        }


def test_evaluating_twice_gives_the_same_requests_and_scores(loaded, evaluation):
    lm, tasks = PathwayLM(*loaded, batch_size=4), load_tasks(TASKS, [FOLDER])
    for _ in range(2):
        again = evaluate(lm, tasks, Limits(6), seed=0)
        assert again.scores == evaluation.scores


# A task of its own: other numbers of choices, a perplexity, few-shot examples


CHOICE = """
task: toy_choice
custom_dataset: !function toy.rows
output_type: multiple_choice
test_split: test
fewshot_split: test
num_fewshot: {fewshot}
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
  - metric: acc_norm
metadata:
  version: 3
"""

PERPLEXITY = """
task: toy_perplexity
custom_dataset: !function toy.rows
output_type: loglikelihood
test_split: test
num_fewshot: 0
doc_to_text: prompt
doc_to_target: answer
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""

ROWS = [
    {"prompt": f"Case {number}:", "choices": [f"answer {n}" for n in range(size)], "label": 0, "answer": " yes"}
    for number, size in enumerate((2, 4, 5, 5, 3, 2))
]


@pytest.fixture
def folder(tmp_path):
    """A folder with these tasks."""
    (tmp_path / "toy.py").write_text(
        f"import datasets\n\ndef rows(**_):\n    return {{'test': datasets.Dataset.from_list({ROWS!r})}}\n",
        encoding="utf-8",
    )
    (tmp_path / "choice.yaml").write_text(CHOICE.format(fewshot=0), encoding="utf-8")
    (tmp_path / "perplexity.yaml").write_text(PERPLEXITY, encoding="utf-8")
    return tmp_path


def test_chance_is_the_mean_of_one_over_the_number_of_choices(folder):
    task = load_tasks(["toy_choice"], [folder])["toy_choice"]
    assert chance(task, "acc", None) == (pytest.approx((1 / 2 + 1 / 4 + 1 / 5 + 1 / 5 + 1 / 3 + 1 / 2) / 6), None)
    assert chance(task, "acc_norm", 3) == (pytest.approx((1 / 2 + 1 / 4 + 1 / 5) / 3), None)
    tasks = load_tasks(TASKS, [FOLDER])
    assert chance(tasks["spath_math_choice"], "acc", 10) == (0.25, None)
    assert chance(tasks["spath_math_generate"], "exact_match", 10) == (0, None)


def test_a_perplexity_has_no_chance_level_but_a_value(loaded, folder):
    tasks = load_tasks(["toy_perplexity"], [folder])
    assert chance(tasks["toy_perplexity"], "perplexity", None) == (None, "perplexity has no chance level")
    found = evaluate(PathwayLM(*loaded, batch_size=4), tasks, Limits(), seed=0)
    score = found.scores["toy_perplexity", "perplexity", "none"]
    assert score.value > 1
    assert not score.higher_is_better
    assert score.per_document == {}  # those are log-likelihoods, whose mean is no perplexity
    assert score.stderr is None
    assert len(score.likelihoods) == 6
    assert score.value == pytest.approx(math.exp(-sum(score.likelihoods.values()) / 6))
    assert len(found.scores["toy_perplexity", "acc", "none"].per_document) == 6


@pytest.mark.parametrize("seed", [0, 1])
def test_few_shot_examples_depend_on_the_seed_alone(loaded, folder, seed):
    (folder / "choice.yaml").write_text(CHOICE.format(fewshot=2), encoding="utf-8")
    lm = PathwayLM(*loaded, batch_size=4)
    prompts = []
    for given in (seed, seed, seed + 1):
        found = evaluate(lm, load_tasks(["toy_choice"], [folder]), Limits(4), seed=given)
        prompts.append([row["prompt_hash"] for row in found.samples])
    assert prompts[0] == prompts[1]
    assert prompts[0] != prompts[2]


def test_a_task_that_cannot_be_loaded_says_why(tmp_path):
    (tmp_path / "broken.yaml").write_text("task: broken\ncustom_dataset: !function nowhere.rows\n", encoding="utf-8")
    with pytest.raises(UsageError, match="broken"):
        load_tasks(["broken"], [tmp_path])


def test_the_record_of_a_task_names_what_was_asked(evaluation):
    tasks = load_tasks(TASKS, [FOLDER])
    for task in tasks.values():
        task.set_config(key="num_fewshot", value=0)
    (entry,) = task_record(tasks["spath_math_choice"], evaluation, 6, 4)
    digest = entry.pop("digest")
    assert entry == {
        "task": "spath_math_choice",
        "version": "1",
        "metric": "acc",
        "filter": "none",
        "higher_is_better": True,
        "chance": 0.25,
        "documents": 6,
        "num_fewshot": 0,
        "batch": 4,
        "token_budget": 1024,
        "limit": 6,
    }
    assert len(digest) == 64


def test_documents_are_recognised_by_prompt_and_answer(evaluation):
    from spath_eval.plugins.domains.math import CORPUS

    documents = item_texts(evaluation, load_tasks(TASKS, [FOLDER]))["spath_math_choice"]
    for own, item in zip(documents, CORPUS.items("choice")[:6], strict=True):
        assert item.prompt in own
        assert f"{item.prompt} {item.answer}" in own


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPATH_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "answers"


def _never(*args, **settings):
    raise AssertionError("the model was asked again")


def test_remembered_answers_are_not_asked_for_again(loaded, evaluation, cache, monkeypatch):
    tasks = load_tasks(TASKS, [FOLDER])
    with (lm := PathwayLM(*loaded, batch_size=4)).remembering("a fingerprint"):
        assert evaluate(lm, tasks, Limits(6), seed=0).scores == evaluation.scores
    assert len(list(cache.iterdir())) == 2
    lm = PathwayLM(*loaded, batch_size=4)
    monkeypatch.setattr(lm.model, "forward", _never)
    with lm.remembering("a fingerprint"):
        again = evaluate(lm, load_tasks(TASKS, [FOLDER]), Limits(6), seed=0)
    assert again.scores == evaluation.scores
    with lm.remembering("another one"), pytest.raises(AssertionError, match="asked again"):
        evaluate(lm, tasks, Limits(6), seed=0)


def test_answers_in_the_cache_that_cannot_be_read_are_made_again(loaded, evaluation, cache, caplog):
    tasks = load_tasks(TASKS, [FOLDER])
    for damage in ("", "{", '{"answers": [1], "truncated": 0}'):
        lm = PathwayLM(*loaded, batch_size=4)
        with lm.remembering("a fingerprint"):
            assert evaluate(lm, tasks, Limits(6), seed=0).scores == evaluation.scores
        for file in cache.iterdir():
            file.write_text(damage, encoding="utf-8")
    assert "made again" in caplog.text


def test_without_a_fingerprint_nothing_is_remembered(loaded, cache):
    evaluate(PathwayLM(*loaded, batch_size=4), load_tasks(TASKS, [FOLDER]), Limits(2), seed=0)
    assert not cache.exists()


def test_requests_are_built_once_for_all_arms(loaded, monkeypatch):
    tasks, lm = load_tasks(TASKS, [FOLDER]), PathwayLM(*loaded, batch_size=4)
    first = evaluate(lm, tasks, Limits(3), seed=0)
    for task in tasks.values():
        monkeypatch.setattr(type(task), "build_all_requests", _never)
    monkeypatch.setattr(lm, "tok_encode", _never)
    again = evaluate(lm, tasks, Limits(3), seed=0)
    assert again.scores == first.scores
    assert [row["resps"] for row in again.samples] == [row["resps"] for row in first.samples]
