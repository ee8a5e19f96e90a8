"""The built-in lm-eval tasks: found, loaded and run by plain lm-eval, wherever one stands and without a network."""

from __future__ import annotations

from collections import defaultdict
from typing import ClassVar

import pytest

from spath_eval.tasks import FOLDER

TASKS = [f"spath_{name}_{form}" for name in ("math", "code", "factual", "language") for form in ("choice", "generate")]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return TaskManager(include_path=str(FOLDER), include_defaults=False).load(TASKS)["tasks"]


def test_all_tasks_load_from_another_working_directory(tasks):
    assert sorted(tasks) == sorted(TASKS)
    for name, task in tasks.items():
        assert len(list(task.eval_docs)) == (200 if name.endswith("choice") else 120)
        assert (task.VERSION, task.config.num_fewshot) == (2 if "factual" in name else 1, 0)


def test_requests_are_the_prompt_and_a_continuation_that_starts_with_a_space(tasks):
    from spath_eval.plugins.domains.code import CORPUS

    task = tasks["spath_code_choice"]
    item = CORPUS.items("choice")[0]
    document = next(iter(task.eval_docs))
    assert task.doc_to_text(document) == item.prompt
    requests = task.construct_requests(document, item.prompt, metadata=("spath_code_choice", 0, 1))
    assert [request.args for request in requests] == [(item.prompt, f" {choice}") for choice in item.choices]


def test_a_right_answer_scores_one_and_a_wrong_one_zero(tasks):
    import lm_eval
    from lm_eval.api.model import LM

    class Oracle(LM):
        """Answers every second document rightly, and in some tasks goes on as the texts do."""

        tails: ClassVar[dict[str, str]] = defaultdict(
            str, spath_math_generate=" apples.", spath_language_generate=" all day"
        )

        def __init__(self):
            super().__init__()
            self.answers = {}
            for task in tasks.values():
                for place, document in enumerate(task.eval_docs):
                    self.answers[document["prompt"]] = document["answer"] if place % 2 else "nothing"

        def loglikelihood(self, requests):
            return [(float(r.args[1] == f" {self.answers[r.args[0]]}"), False) for r in requests]

        def generate_until(self, requests):
            assert all("\n" in r.args[1]["until"] and r.args[1]["max_gen_toks"] == 16 for r in requests)
            return [f" {self.answers[r.args[0]]}{self.tails[r.task_name]}" for r in requests]

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError

    results = lm_eval.evaluate(Oracle(), tasks, bootstrap_iters=0)["results"]
    for name in TASKS:
        if name.endswith("generate"):
            assert results[name]["exact_match,answer"] == 0.5
        else:
            first = [document["label"] == 0 for document in tasks[name].eval_docs][::2]
            assert results[name]["acc,none"] == pytest.approx(0.5 + sum(first) / 200)
