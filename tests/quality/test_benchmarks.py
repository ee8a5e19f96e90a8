"""Stock tasks by their names: lm-eval's own prompts from a folder of rows, and every mistake named before a model."""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from pathlib import Path

import datasets
import evaluate
import lm_eval
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.dummy import DummyLM
from lm_eval.tasks import TaskManager

from spath_eval import UsageError
from spath_eval.collection import Limits
from spath_eval.quality import benchmarks
from spath_eval.quality.benchmarks import STOCK, load_tasks, unscored
from spath_eval.quality.sandbox import unavailable
from spath_eval.registry import Registry
from spath_eval.tasks import FOLDER


def science(number):
    options = {"text": [f"answer {letter} of {number}" for letter in "abcd"], "label": ["A", "B", "C", "D"]}
    return {"id": f"q{number}", "question": f"Which is {number}?", "choices": options, "answerKey": "ABCD"[number % 4]}


def common(number):
    options = {"label": ["A", "B", "C", "D", "E"], "text": [f"thing {number}{letter}" for letter in "vwxyz"]}
    return {"id": str(number), "question": f"Where is {number}? ", "choices": options, "answerKey": "ABCDE"[number % 5]}


def subject(name, number):
    choices = [f"{name} {number}{letter}" for letter in "wxyz"]
    return {"question": f"In {name}, what is {number}?", "subject": name, "choices": choices, "answer": number % 4}


def program(number):
    prompt = f'def f{number}(x):\n    """Add {number}."""\n'
    test = f"def check(candidate):\n    assert candidate(0) == {number}\n"
    solution = f"    return x + {number}\n"
    return {
        "task_id": f"H/{number}",
        "prompt": prompt,
        "canonical_solution": solution,
        "test": test,
        "entry_point": f"f{number}",
    }


def snippet(number):
    tests = [f"assert g({number}) == {value}" for value in range(3)]
    return {
        "task_id": number,
        "text": f"Write g{number}.",
        "code": "def g(x):\r\n  return x",
        "test_list": tests,
        "test_setup_code": "",
        "challenge_test_list": [],
    }


def grade_school(number):
    return {"question": f"Tom has {number} nuts and gets 1. How many?", "answer": f"{number}+1\n#### {number + 1}"}


def physical(number):
    return {"goal": f"open {number}", "sol1": "push it", "sol2": f"pull it {number}", "label": number % 2}


ROWS = {
    "gsm8k": {"test": [grade_school(n) for n in range(4)], "train": [grade_school(n) for n in range(20, 32)]},
    "arc_easy": {"test": [science(n) for n in range(5)], "train": [science(n) for n in range(20, 29)]},
    "arc_challenge": {"test": [science(n) for n in range(50, 53)]},
    "mmlu": {
        "test": [subject(name, n) for n in range(3) for name in ("anatomy", "virology")],
        "dev": [subject(name, n) for name in ("virology", "anatomy") for n in range(10, 15)],
    },
    "piqa": {"validation": [physical(n) for n in range(4)]},
    "commonsense_qa": {"validation": [common(n) for n in range(4)]},
    "humaneval": {"test": [program(n) for n in range(3)]},
    "mbpp": {"test": [snippet(n) for n in range(11, 14)]},
    "wikitext": {"test": [{"page": f" = Title {n} = \n It is 1 @,@ 00{n} m . \n"} for n in range(3)]},
    "lambada_openai": {"test": [{"text": f"She took the {n} and went back to the {n}th house"} for n in range(3)]},
}


def write(folder, rows):
    for split, documents in rows.items():
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(document) + "\n" for document in documents)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, rows in ROWS.items():
        write(folder / name, rows)
    return folder


@pytest.fixture
def one(tmp_path):
    """Writes the rows of one task, some of them changed, to a data directory of its own."""

    def make(task, split="test", **changes):
        rows = json.loads(json.dumps(ROWS[task]))
        for position, change in changes.items():
            row = rows[split][int(position.removeprefix("row")) - 1]
            row.update(change)
            for name in [name for name, value in row.items() if value is ...]:
                del row[name]
        write(tmp_path / "data" / task, rows)
        return tmp_path / "data"

    return make


class NoMetric:
    def compute(self, **_):
        return [None]


def plain(name, rows, monkeypatch, **overrides):
    """The task as lm-eval itself makes it, with the rows given through the key `custom_dataset` of its YAML."""
    splits = {split: datasets.Dataset.from_list(documents) for split, documents in rows.items()}
    overrides["custom_dataset"] = lambda **_: splits
    folder = "mmlu/continuation" if "continuation" in name else "mmlu/default" if "mmlu" in name else name.split("_")[0]
    folder = {"commonsense": "commonsense_qa"}.get(folder, folder)
    manager = TaskManager(include_path=str(STOCK / folder), include_defaults=False)
    monkeypatch.setattr(evaluate, "load", lambda *_: NoMetric())
    task = manager.load([{"group": "all", "task": [{"task": name, **overrides}]}])["tasks"][name]
    for module in ("lm_eval.tasks.humaneval.utils", "lm_eval.tasks.mbpp.utils"):
        sys.modules.pop(module, None)
    return task


def settings(task):
    """All of its configuration but where its rows come from, functions by their names."""

    def comparable(value):
        if isinstance(value, dict):
            return {key: comparable(item) for key, item in value.items() if key not in ("custom_dataset", "metadata")}
        if isinstance(value, list):
            return [comparable(item) for item in value]
        return (value.__module__, value.__qualname__) if callable(value) else value

    return comparable(task.config.to_dict(keep_callable=True))


def requests(task):
    task.set_fewshot_seed(7)
    task.build_all_requests()
    return [(instance.request_type, instance.args, instance.doc, instance.doc_id) for instance in task.instances]


def of_subject(name):
    return {split: [row for row in rows if row["subject"] == name] for split, rows in ROWS["mmlu"].items()}


NOTHING_TO_LEARN_FROM = {"train": [ROWS["piqa"]["validation"][0]]}


@pytest.mark.parametrize(
    ("name", "rows", "shots"),
    [
        ("gsm8k", ROWS["gsm8k"], None),
        ("gsm8k", ROWS["gsm8k"], 2),
        ("gsm8k", ROWS["gsm8k"], 0),
        ("gsm8k_cot", ROWS["gsm8k"], None),
        ("gsm8k_cot", ROWS["gsm8k"], 3),
        ("gsm8k_cot_llama", ROWS["gsm8k"], None),
        ("gsm8k_cot_zeroshot", ROWS["gsm8k"], None),
        ("arc_easy", ROWS["arc_easy"], None),
        ("arc_easy", ROWS["arc_easy"], 4),
        ("arc_challenge", ROWS["arc_challenge"] | {"train": [science(0)]}, None),
        ("arc_challenge_chat", ROWS["arc_challenge"] | {"train": [science(0)]}, None),
        ("mmlu_anatomy", of_subject("anatomy"), None),
        ("mmlu_anatomy", of_subject("anatomy"), 5),
        ("mmlu_virology_continuation", of_subject("virology"), 2),
        ("piqa", ROWS["piqa"] | NOTHING_TO_LEARN_FROM, None),
        ("commonsense_qa", ROWS["commonsense_qa"] | {"train": [common(0)]}, None),
        ("humaneval", ROWS["humaneval"], None),
        ("humaneval_instruct", ROWS["humaneval"], None),
        ("mbpp", ROWS["mbpp"], None),
        ("mbpp", ROWS["mbpp"], 1),
        ("mbpp_instruct", ROWS["mbpp"], None),
        ("wikitext", ROWS["wikitext"] | {"train": [{"page": "x"}]}, None),
        ("lambada_openai", ROWS["lambada_openai"], None),
    ],
)
def test_requests_and_settings_are_those_of_the_stock_task(name, rows, shots, data, monkeypatch):
    (task,) = load_tasks([name], data_dir=data, num_fewshot=shots).values()
    reference = plain(name, rows, monkeypatch, **({} if shots is None else {"num_fewshot": shots}))
    assert requests(task) == requests(reference)
    assert [task.doc_to_target(doc) for doc in task.eval_docs] == [reference.doc_to_target(d) for d in task.eval_docs]
    ours = settings(task)
    if unscored(task):
        assert ours.pop("process_results")
    assert ours == settings(reference)
    assert task.VERSION == reference.VERSION
    assert [f.name for f in task._filters] == [f.name for f in reference._filters]


def test_a_group_is_the_tasks_it_consists_of_in_lm_evals_order(tmp_path, monkeypatch):
    names = sorted(
        path.stem.removeprefix("mmlu_")
        for path in (STOCK / "mmlu" / "default").glob("mmlu_*.yaml")
        if path.stem[0] != "_"
    )
    write(tmp_path / "mmlu", {"test": [subject(name, n) for name in names for n in range(2)]})
    tasks = load_tasks(["mmlu"], data_dir=tmp_path)
    assert len(tasks) == len(names) == 57
    assert {row["subject"] for row in tasks["mmlu_us_foreign_policy"].eval_docs} == {"us_foreign_policy"}
    monkeypatch.setattr(ConfigurableTask, "__init__", lambda self, config: setattr(self, "_config", config))
    monkeypatch.setattr(ConfigurableTask, "task_name", property(lambda self: self._config["task"]))
    manager = TaskManager(include_path=str(STOCK / "mmlu" / "default"), include_defaults=False)
    assert list(tasks) == list(manager.load(["mmlu"])["tasks"])


def test_a_tag_is_all_tasks_that_have_or_inherit_it(data):
    assert list(load_tasks(["ai2_arc"], data_dir=data)) == ["arc_challenge", "arc_easy"]


def test_every_benchmark_of_the_domains_exists():
    domains = [domain for domain in Registry.load().domains.values() if domain.name in DOMAINS]
    assert {domain.name: domain.benchmarks for domain in domains} == DOMAINS
    for names in DOMAINS.values():
        for name in names:
            assert benchmarks._folders_defining(name)


DOMAINS = {
    "math": ("gsm8k",),
    "code": ("humaneval", "mbpp"),
    "factual": ("arc_easy", "arc_challenge", "mmlu", "commonsense_qa", "piqa"),
    "language": ("lambada_openai", "wikitext"),
}


def test_a_stock_task_is_found_in_less_than_two_seconds(data):
    benchmarks._headers.cache_clear()
    benchmarks._tops.cache_clear()
    started = time.process_time()
    load_tasks(["arc_easy"], data_dir=data)
    assert time.process_time() - started < 2


OWN = """
task: {name}
{source}
output_type: multiple_choice
test_split: test
training_split: train
doc_to_text: "Q: {{{{question}}}}"
doc_to_choice: "{{{{choices.text}}}}"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
"""


@pytest.fixture
def own(tmp_path):
    """A folder of tasks of one's own: another arc_easy, and a group of it and a stock task."""
    folder = tmp_path / "own"
    folder.mkdir()
    file = tmp_path / "elsewhere.jsonl"
    file.write_text("".join(json.dumps(science(n)) + "\n" for n in (8, 9)), encoding="utf-8")
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}, train: {file}}}}}"
    (folder / "arc.yaml").write_text(OWN.format(name="arc_easy", source=source), encoding="utf-8")
    (folder / "group.yaml").write_text("group: ours\ntask:\n  - piqa\n  - arc_easy\n", encoding="utf-8")
    return folder


def test_a_task_of_ones_own_comes_before_a_stock_one_and_has_its_own_rows(own, tmp_path, data):
    (tmp_path / "data").mkdir()
    for data_dir in (None, tmp_path / "data"):
        task = load_tasks(["arc_easy"], [own], data_dir=data_dir)["arc_easy"]
        assert [document["id"] for document in task.eval_docs] == ["q8", "q9"]
    in_data_dir = load_tasks(["arc_easy"], [own], data_dir=data)["arc_easy"]
    assert in_data_dir.doc_to_text(in_data_dir.eval_docs[0]) == "Q: Which is 0?"


def test_a_group_of_ones_own_can_have_stock_tasks(own, data):
    assert list(load_tasks(["ours", "gsm8k"], [own], data_dir=data)) == ["piqa", "arc_easy", "gsm8k"]


def test_the_projects_own_tasks_need_no_data_directory(data):
    for data_dir in (None, data):
        tasks = load_tasks(["spath_math_choice", "spath_math_generate"], [FOLDER], data_dir=data_dir)
        assert [len(task.eval_docs) for task in tasks.values()] == [200, 120]


def test_a_group_may_have_its_rows_in_one_folder(tmp_path):
    write(tmp_path / "mmlu_stem", {"test": [subject("anatomy", 0), subject("virology", 1), subject("anatomy", 2)]})
    task = load_tasks(["mmlu_anatomy"], data_dir=tmp_path)["mmlu_anatomy"]
    assert [row["question"] for row in task.eval_docs] == [subject("anatomy", n)["question"] for n in (0, 2)]


def test_rows_may_be_compressed(tmp_path):
    (tmp_path / "piqa").mkdir()
    with gzip.open(tmp_path / "piqa" / "validation.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS["piqa"]["validation"])
    assert list(load_tasks(["piqa"], data_dir=tmp_path)["piqa"].eval_docs) == ROWS["piqa"]["validation"]


def test_only_the_splits_that_are_used_are_read(one):
    data_dir = one("gsm8k")
    (data_dir / "gsm8k" / "train.jsonl").write_text("no JSON\n")
    (data_dir / "gsm8k" / "validation.jsonl").write_text("no JSON\n")
    assert len(load_tasks(["gsm8k"], data_dir=data_dir, num_fewshot=0)["gsm8k"].eval_docs) == 4
    with pytest.raises(UsageError, match=r"train\.jsonl:1: expected a JSON object: Expecting value at column 1"):
        load_tasks(["gsm8k"], data_dir=data_dir)


# What is executed


@pytest.mark.parametrize("name", ["humaneval", "mbpp", "mbpp_instruct"])
def test_tasks_that_execute_code_generate_and_log_but_have_no_metric(name, data):
    tasks = load_tasks([name, "gsm8k"], data_dir=data, num_fewshot=0)
    assert unscored(tasks[name]) == "code is executed only with --allow-code-execution"
    assert unscored(tasks["gsm8k"]) is None
    found = lm_eval.evaluate(
        DummyLM(), {"tasks": tasks}, log_samples=True, confirm_run_unsafe_code=True, bootstrap_iters=0
    )
    assert [key for key in found["results"][name] if "," in key] == []
    assert "exact_match,strict-match" in found["results"]["gsm8k"]
    assert len(found["samples"][name]) == 3
    for row in found["samples"][name]:
        assert row["metrics"] == []
        assert row["resps"] == [["lol"]]
        assert row["filtered_resps"]


def _solved(data, answers):
    """The scores of humaneval and mbpp where the model writes `answers`."""
    tasks = load_tasks(["humaneval", "mbpp"], data_dir=data, num_fewshot=0, allow_code_execution=True)

    class Writer(DummyLM):
        def generate_until(self, requests, disable_tqdm=True):
            return [answers[request.task_name][request.doc_id] for request in requests]

    settings = {"log_samples": True, "confirm_run_unsafe_code": True, "bootstrap_iters": 0}
    return tasks, lm_eval.evaluate(Writer(), {"tasks": tasks}, **settings)["results"]


@pytest.mark.skipif(unavailable() is not None, reason=f"no sandbox: {unavailable()}")
def test_with_permission_code_is_executed_in_the_sandbox(data):
    answers = {
        "humaneval": [row["canonical_solution"] for row in ROWS["humaneval"]["test"]],
        "mbpp": ["calls = iter(range(3))\ndef g(x):\n    return next(calls)"] * 3,  # what its rows' tests expect
    }
    tasks, right = _solved(data, answers)
    assert [unscored(task) for task in tasks.values()] == [None, None]
    assert (right["humaneval"]["pass@1,create_test"], right["mbpp"]["pass_at_1,none"]) == (1, 1)
    wrong = {name: ["    raise SystemExit(0)", *texts[1:]] for name, texts in answers.items()}
    _, found = _solved(data, wrong)
    assert found["humaneval"]["pass@1,create_test"] == pytest.approx(2 / 3)
    assert found["mbpp"]["pass_at_1,none"] == pytest.approx(2 / 3)


def test_where_code_cannot_be_contained_its_task_is_refused(data, monkeypatch):
    monkeypatch.setattr("spath_eval.quality.sandbox.unavailable", lambda: "the kernel refuses it")
    with pytest.raises(
        UsageError, match="humaneval executes code, which cannot be contained here: the kernel refuses it"
    ):
        load_tasks(["humaneval"], data_dir=data, allow_code_execution=True)
    assert load_tasks(["humaneval"], data_dir=data)


def test_nothing_stays_patched(data):
    before = evaluate.load, ConfigurableTask.download
    load_tasks(["humaneval", "mbpp"], data_dir=data)
    with pytest.raises(UsageError):
        load_tasks(["gsm8k"], data_dir=data, num_fewshot=20)
    assert (evaluate.load, ConfigurableTask.download) == before
    assert "lm_eval.tasks.humaneval.utils" not in sys.modules
    assert "lm_eval.tasks.mbpp.utils" not in sys.modules


# Examples


@pytest.mark.parametrize(
    ("name", "shots", "reason"),
    [
        ("wikitext", 1, "wikitext cannot have 1 examples: a rolling log-likelihood has no prompt"),
        ("humaneval", 2, "humaneval cannot have 2 examples: its configuration sets 0"),
        ("lambada_openai", 2, "lambada_openai cannot have 2 examples: its only split is the one that is evaluated"),
        ("mbpp", 4, "mbpp cannot have 4 examples: its configuration has 3 fixed ones"),
        ("gsm8k_cot", 9, "gsm8k_cot cannot have 9 examples: its configuration has 8 fixed ones"),
        ("gsm8k", 13, "gsm8k cannot have 13 examples: lm-eval can draw 12 from their split"),
        ("mmlu_anatomy", 6, "mmlu_anatomy cannot have 6 examples: lm-eval can draw 5 from their split"),
        ("commonsense_qa", 2, r"commonsense_qa/train\.jsonl \(or \.gz\) is missing, from which the 2 examples"),
    ],
)
def test_examples_that_a_task_cannot_have_are_refused_with_the_reason(name, shots, reason, data):
    with pytest.raises(UsageError, match=reason):
        load_tasks([name], data_dir=data, num_fewshot=shots)
    assert load_tasks([name], data_dir=data, num_fewshot=0)[name].config.num_fewshot == 0


def test_examples_are_counted_as_lm_eval_draws_them(one):
    """Where a task has no test split, lm-eval keeps one row back for the document itself."""
    data_dir = one("piqa")
    write(data_dir / "piqa", {"train": [physical(n) for n in range(20, 23)]})
    assert len(requests(load_tasks(["piqa"], data_dir=data_dir, num_fewshot=2)["piqa"])) == 8
    with pytest.raises(UsageError, match="piqa cannot have 3 examples: lm-eval can draw 2 from their split"):
        load_tasks(["piqa"], data_dir=data_dir, num_fewshot=3)


def test_nothing_asked_leaves_the_stock_number_of_examples(data):
    tasks = load_tasks(["gsm8k", "mbpp", "gsm8k_cot", "arc_easy"], data_dir=data)
    assert [task.config.num_fewshot for task in tasks.values()] == [5, 3, 8, None]


# Mistakes


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["arc_esay"], "unknown task 'arc_esay'; the nearest are arc_easy"),
        (["gsm8k", "spath_math_choise"], "unknown task 'spath_math_choise'; the nearest are spath_math_choice"),
        (["qqqqqqqqqq"], "unknown task 'qqqqqqqqqq': it is not in .*tasks or lm-eval"),
        (["piqa", "mmlu_anatomy", "mmlu_stem_tasks"], "no rows with the subject|asked for twice"),
        (["hellaswag"], "no rows for the task hellaswag: expected the folder .*data.*/hellaswag"),
        (["mmlu_astronomy"], r"mmlu/test\.jsonl: no rows with the subject 'astronomy'"),
    ],
)
def test_names_without_a_task_or_rows_are_refused(names, said, data):
    with pytest.raises(UsageError, match=said) as raised:
        load_tasks(names, [FOLDER], data_dir=data)
    assert "\n" not in str(raised.value)


def test_folders_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"data directory .*nowhere is no folder"):
        load_tasks(["gsm8k"], data_dir=tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"task folder .*nowhere is no folder"):
        load_tasks(["gsm8k"], [tmp_path / "nowhere"])


def test_a_missing_split_is_named(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    with pytest.raises(UsageError, match=r"gsm8k/test\.jsonl \(or \.gz\) is missing, from which gsm8k would come"):
        load_tasks(["gsm8k"], data_dir=tmp_path, num_fewshot=0)


def test_without_hub_and_data_directory_one_line_says_so():
    with pytest.raises(UsageError, match=r"cannot load the task gsm8k: .*openai/gsm8k.*--data-dir") as raised:
        load_tasks(["gsm8k"])
    assert "\n" not in str(raised.value)


def test_a_broken_yaml_of_ones_own_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: mine\n  doc_to_text: [\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"unknown task 'mine': .*mine\.yaml, which defines it, is no readable YAML"):
        load_tasks(["mine"], [tmp_path])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"question": "a", "answer": ', "expected a JSON object: Expecting value at column 28"),
        ("[1, 2]", "expected a JSON object, found a list of a number"),
        ('"text"', "expected a JSON object, found a string"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(line, said, one):
    file = one("gsm8k") / "gsm8k" / "test.jsonl"
    file.write_text(file.read_text() + "\n" + line + "\n", encoding="utf-8")  # line 5 is empty
    with pytest.raises(UsageError) as raised:
        load_tasks(["gsm8k"], data_dir=file.parents[1])
    assert str(raised.value) == f"{file}:6: {said}"


def test_a_compressed_file_that_is_cut_off_is_named(one):
    data_dir = one("gsm8k")
    file = data_dir / "gsm8k" / "test.jsonl"
    packed = gzip.compress(file.read_bytes())
    file.unlink()
    file.with_suffix(".jsonl.gz").write_bytes(packed[:-12])
    with pytest.raises(UsageError, match=r"test\.jsonl\.gz:\d+: cannot be read: "):
        load_tasks(["gsm8k"], data_dir=data_dir)


@pytest.mark.parametrize(
    ("task", "split", "changes", "line", "said"),
    [
        (
            "gsm8k",
            "test",
            {"row3": {"question": ...}},
            3,
            "expected a field 'question' with a string, which is missing",
        ),
        ("gsm8k", "test", {"row1": {"answer": ...}}, 1, "expected a field 'answer' with a string, which is missing"),
        ("gsm8k", "test", {"row2": {"question": 5}}, 2, "expected a string in the field 'question', as in other rows,"),
        ("gsm8k", "test", {"row2": {"answer": None}}, 2, "field 'answer': null stands where text was expected"),
        ("gsm8k", "train", {"row9": {"answer": ...}}, 9, "expected a field 'answer' with a string, which is missing"),
        ("arc_easy", "test", {"row4": {"answerKey": "Z"}}, 4, "field 'answerKey': 'Z' is not in list (doc_to_target"),
        ("arc_easy", "test", {"row1": {"answerKey": "E"}}, 1, "field 'answerKey': 'E' is not in list (doc_to_target"),
        ("arc_easy", "test", {"row2": {"choices": ["a", "b"]}}, 2, "expected an object in the field 'choices', as in"),
        ("arc_easy", "test", {"row2": {"choices": {"label": ["A"]}}}, 2, "field 'choices': "),
        ("piqa", "validation", {"row2": {"label": 2}}, 2, "field 'label': expected one of 2 choices, or its position"),
        ("piqa", "validation", {"row2": {"label": True}}, 2, "expected a number in the field 'label', as in other"),
        ("piqa", "validation", {"row2": {"sol2": None}}, 2, "field 'sol2': expected a list of strings, found a list"),
        (
            "commonsense_qa",
            "validation",
            {"row3": {"answerKey": "F"}},
            3,
            "field 'answerKey': expected one of 5 choices",
        ),
        ("humaneval", "test", {"row2": {"entry_point": ...}}, 2, "expected a field 'entry_point' with a string, which"),
        ("mbpp", "test", {"row2": {"test_list": ["assert 1"]}}, 2, "field 'test_list': "),
        ("wikitext", "test", {"row2": {"page": ...}}, 2, "expected a field 'page' with a string, which is missing"),
        ("wikitext", "test", {"row2": {"page": None}}, 2, "field 'page': "),
        ("lambada_openai", "test", {"row1": {"text": ["a"]}}, 1, "expected a string in the field 'text', as in other"),
    ],
)
def test_a_bad_field_is_named_by_file_line_and_name(task, split, changes, line, said, one):
    data_dir = one(task, split, **changes)
    with pytest.raises(UsageError) as raised:
        load_tasks([task], data_dir=data_dir)
    assert str(raised.value).startswith(f"{data_dir / task / split}.jsonl:{line}: {said}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("task", "name"),
    [("gsm8k", "question"), ("piqa", "label"), ("commonsense_qa", "answerKey"), ("wikitext", "page")],
)
def test_a_field_that_no_row_has_is_missing_and_no_text(task, name, one):
    split = "test" if "test" in ROWS[task] else "validation"
    rows = {f"row{n}": {name: ...} for n in range(1, len(ROWS[task][split]) + 1)}
    with pytest.raises(UsageError, match=rf":1: expected a field '{name}', which is missing"):
        load_tasks([task], data_dir=one(task, split, **rows))


def test_a_row_of_a_subject_has_its_own_line(one):
    data_dir = one("mmlu", row4={"answer": 4})
    with pytest.raises(UsageError, match=r"test\.jsonl:4: field 'answer': expected one of 4 choices"):
        load_tasks(["mmlu_virology"], data_dir=data_dir)
    assert load_tasks(["mmlu_anatomy"], data_dir=data_dir)
    data_dir = one("mmlu", row5={"subject": ...})
    with pytest.raises(UsageError, match=r"test\.jsonl:5: expected a field 'subject' with a string"):
        load_tasks(["mmlu_anatomy"], data_dir=data_dir)


def test_a_field_that_no_prompt_needs_may_be_missing(one):
    data_dir = one("arc_easy", row1={"id": ...}, row3={"id": None})
    documents = load_tasks(["arc_easy"], data_dir=data_dir)["arc_easy"].eval_docs
    assert [document["id"] for document in documents] == [None, "q1", None, "q3", "q4"]


def test_rows_beyond_the_limit_may_be_bad(one):
    data_dir = one("arc_easy", row4={"answerKey": "Z"}, row5={"question": ...})
    for limits in (Limits(3), Limits(None, {"arc": 2}), Limits(9, {"arc_easy": 3})):
        assert len(load_tasks(["arc_easy"], data_dir=data_dir, limits=limits)["arc_easy"].eval_docs) == 5
    for limits in (None, Limits(4), Limits(1, {"arc_easy": 4})):
        with pytest.raises(UsageError, match=r"test\.jsonl:[45]: "):
            load_tasks(["arc_easy"], data_dir=data_dir, limits=limits)


PROCESSED = """
task: processed
dataset_path: nowhere
output_type: generate_until
test_split: test
process_docs: !function own.docs
doc_to_text: "{{said}}"
doc_to_target: answer
"""


def test_documents_that_a_task_makes_of_rows_are_checked_too(tmp_path):
    (tmp_path / "own.py").write_text(
        "def docs(rows):\n"
        "    return rows.filter(lambda row: row['keep']).map(lambda row: {'said': row['question'] or None})\n"
    )
    (tmp_path / "processed.yaml").write_text(PROCESSED, encoding="utf-8")
    rows = [{"question": text, "answer": "b", "keep": keep} for text, keep in [("x", True), ("y", True), ("", True)]]
    write(tmp_path / "processed", {"test": rows})
    with pytest.raises(UsageError, match=r"test\.jsonl:3: field 'said': null"):
        load_tasks(["processed"], [tmp_path], data_dir=tmp_path)
    write(tmp_path / "processed", {"test": [rows[0] | {"keep": False}, *rows]})
    with pytest.raises(UsageError, match=r"test\.jsonl: document 3 that process_docs makes of it: field 'said': null"):
        load_tasks(["processed"], [tmp_path], data_dir=tmp_path)
    write(tmp_path / "processed", {"test": rows[:2]})
    assert len(load_tasks(["processed"], [tmp_path], data_dir=tmp_path)["processed"].eval_docs) == 2


@pytest.mark.real_model
def test_all_default_benchmarks_load_from_real_rows():
    folder = os.environ.get("SPATH_DATA_DIR") or Path(__file__).resolve().parents[3] / "shared" / "data" / "benchmarks"
    if not Path(folder).is_dir():
        pytest.skip("no benchmark rows here: set SPATH_DATA_DIR to a folder of TASK/SPLIT.jsonl")
    names = [name for benchmark in DOMAINS.values() for name in benchmark]
    tasks = load_tasks(names, data_dir=Path(folder), limits=Limits(50))
    assert len(tasks) == len(names) - 1 + 57
    sizes = {name: len(task.eval_docs) for name, task in tasks.items() if not name.startswith("mmlu_")}
    assert sizes["gsm8k"] == 1319
    assert sizes["arc_easy"] == 2376
    assert sum(len(task.eval_docs) for name, task in tasks.items() if name.startswith("mmlu_")) == 14042
