"""Evaluates public benchmarks by plain lm-eval and by `SpathLM`, on the same rows, and says whether the scores agree.

    python tests/benchmarks/stock.py --model FOLDER --data-dir DIR [--limit 50] [--pages 5] [--code 4] [--tasks gsm8k]

The plain side is lm-eval and nothing else: its `hf` model in batches of 8 (pages one by one), `simple_evaluate`, and
its own YAML with its own way of reading local rows (`dataset_path: json`). The other side loads tasks by `load_tasks`
and scores them with `SpathLM`, so prompts, few-shot examples and rows are compared as well. Everything is in float32.
Of humaneval and mbpp the generated texts are compared, which are not executed. Exit status 1 where an accuracy, a
prompt or a text differs, or a perplexity by more than 1e-3 of it. DIR has the rows, as for `spath-eval run --data-dir`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from common import environment, quiet, say

BATCH_SIZE = 8
PERPLEXITY_TOLERANCE = 1e-3
FEWSHOT_SEED = 1234
"""The one that lm-eval sets by default."""


@dataclass(frozen=True)
class Stock:
    """A task of lm-eval's."""

    yaml: str
    """Its file among lm-eval's."""
    splits: tuple[str, ...] = ("test",)
    """Those that it needs of the ones it names; without examples it asks for the others all the same."""
    subject: str | None = None
    """The value of its rows' `subject` where they share a file."""
    kind: str = "documents"
    """`pages`: few and long; `code`: generated texts without a score."""


TASKS = {
    "gsm8k": Stock("gsm8k/gsm8k.yaml", ("train", "test")),
    "arc_easy": Stock("arc/arc_easy.yaml", ("train", "validation", "test")),
    "arc_challenge": Stock("arc/arc_challenge.yaml", ("train", "validation", "test")),
    "piqa": Stock("piqa/piqa.yaml", ("validation",)),
    "commonsense_qa": Stock("commonsense_qa/default.yaml", ("validation",)),
    "lambada_openai": Stock("lambada/lambada_openai.yaml"),
    "wikitext": Stock("wikitext/wikitext.yaml", kind="pages"),
    "mmlu_anatomy": Stock("mmlu/default/mmlu_anatomy.yaml", ("dev", "test"), subject="anatomy"),
    "humaneval": Stock("humaneval/humaneval.yaml", kind="code"),
    "mbpp": Stock("mbpp/mbpp.yaml", kind="code"),
}


@dataclass(frozen=True)
class Row:
    """One value in both arms."""

    task: str
    metric: str
    filter: str
    plain: str
    spath: str
    equal: bool


def main() -> int:
    options = parse_options()
    quiet()

    import tabulate

    print(environment("lm-eval", dtype="float32"), flush=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        manager = plain_tasks(options.tasks, options.data_dir, Path(folder))
        plain, spath = load_arms(options.model, options.max_length)
        limits = {"documents": options.limit, "pages": options.pages, "code": options.code}
        for name in options.tasks:
            kind = TASKS[name].kind
            plain.batch_size_per_gpu = 1 if kind == "pages" else BATCH_SIZE
            compare = texts if kind == "code" else scores
            found = list(compare(name, manager, plain, spath, options.data_dir, limits[kind]))
            say(f"{name}: {'equal' if all(row.equal for row in found) else 'DIFFERENT'}")
            rows += found
    table = [list((vars(row) | {"equal": "yes" if row.equal else "NO"}).values()) for row in rows]
    headers = ["task", "metric", "filter", "plain lm-eval", "spath", "equal"]
    print(tabulate.tabulate(table, headers=headers, disable_numparse=True))
    return int(not all(row.equal for row in rows))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    data_dir = os.environ.get("SPATH_DATA_DIR")
    parser.add_argument("--model", required=True, metavar="FOLDER")
    parser.add_argument("--data-dir", type=Path, default=data_dir, required=not data_dir, metavar="DIR")
    parser.add_argument("--tasks", type=names, default=list(TASKS), metavar="A,B", help=f"some of {','.join(TASKS)}")
    parser.add_argument("--limit", type=int, default=50, metavar="N", help="documents of a task (default: 50)")
    parser.add_argument("--pages", type=int, default=5, metavar="N", help="of wikitext (default: 5)")
    parser.add_argument("--code", type=int, default=4, metavar="N", help="of humaneval and of mbpp (default: 4)")
    parser.add_argument("--max-length", type=int, metavar="N", help="longest input in tokens (default: the model's)")
    return parser.parse_args()


def names(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in TASKS]:
        raise argparse.ArgumentTypeError(f"unknown task {unknown[0]!r}: there are {', '.join(TASKS)}")
    return chosen


def load_arms(folder: str, max_length: int | None) -> tuple[Any, Any]:
    import torch
    from lm_eval.models.huggingface import HFLM

    from spath_eval.quality.scorer import SpathLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = {"device": device, "dtype": "float32", "batch_size": BATCH_SIZE, "max_length": max_length}
    return HFLM(folder, **settings), SpathLM(folder, **settings)


def plain_tasks(names: Sequence[str], data_dir: Path, folder: Path) -> Any:
    """lm-eval's task manager for its own tasks, each included by a file in `folder` that says where its rows are."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    stock = Path(lm_eval.tasks.__file__).parent
    for name in names:
        task = TASKS[name]
        files = {split: str(rows_of(task, name, split, data_dir, folder)) for split in task.splits}
        own: dict[str, Any] = {
            "include": str(stock / task.yaml),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        }
        for key, split in (("training_split", "train"), ("validation_split", "validation")):
            if split not in task.splits:
                own[key] = None
        (folder / f"{name}.yaml").write_text(json.dumps(own), encoding="utf-8")  # JSON is YAML
    return TaskManager(include_defaults=False, include_path=str(folder))


def rows_of(task: Stock, name: str, split: str, data_dir: Path, folder: Path) -> Path:
    """The file with a split's rows, made in `folder` where the task has only some of them."""
    group = name if task.subject is None else name.removesuffix(f"_{task.subject}")
    whole = (data_dir / group / f"{split}.jsonl").resolve()
    if task.subject is None:
        return whole
    with whole.open(encoding="utf-8") as lines:
        chosen = [line for line in lines if json.loads(line)["subject"] == task.subject]
    part = folder / f"{name}-{split}.jsonl"
    part.write_text("".join(chosen), encoding="utf-8")
    return part


def spath_task(name: str, data_dir: Path) -> Any:
    from spath_eval.quality.benchmarks import load_tasks

    return load_tasks([name], data_dir=data_dir)[name]


def scores(name: str, manager: Any, plain: Any, spath: Any, data_dir: Path, limit: int) -> Iterator[Row]:
    """Every metric of a task by both, the number of equal prompts, and of equal texts where there are some."""
    import lm_eval

    settings = {"task_manager": manager, "limit": limit, "bootstrap_iters": 0}
    one = lm_eval.simple_evaluate(model=plain, tasks=[name], **settings)
    two = lm_eval.simple_evaluate(model=spath, tasks=[spath_task(name, data_dir)], **settings)
    left, right = one["results"][name], two["results"][name]
    for key in sorted(left.keys() | right.keys()):
        metric, comma, filter_ = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            pair = left.get(key, math.nan), right.get(key, math.nan)
            yield Row(name, metric, filter_, *(f"{value:.8g}" for value in pair), agree(metric, *pair))
    samples = [{row["doc_id"]: row for row in result["samples"][name]} for result in (one, two)]
    yield identical(name, "prompts", *([row["arguments"] for row in rows.values()] for rows in samples))
    if generates(samples[0]):
        yield identical(name, "texts", *([row["resps"] for row in rows.values()] for rows in samples))


def generates(rows: dict[int, Any]) -> bool:
    """Whether answers are texts: an answer is the first of a request's repeats, of a document's first request."""
    return isinstance(next(iter(rows.values()))["resps"][0][0], str)


def texts(name: str, manager: Any, plain: Any, spath: Any, data_dir: Path, limit: int) -> Iterator[Row]:
    """The numbers of equal prompts and of equal generated texts."""
    import evaluate

    load, evaluate.load = evaluate.load, lambda *_, **__: SimpleNamespace(compute=lambda **_: ({}, {}))
    try:  # the modules of these tasks load a metric from the hub, and try it out, when they are imported
        stock = manager.load([name])["tasks"][name]
    finally:
        evaluate.load = load
    requests = []
    for task in (stock, spath_task(name, data_dir)):
        task.set_fewshot_seed(FEWSHOT_SEED)
        task.build_all_requests(limit=limit)
        requests.append(task.instances)
    yield identical(name, "prompts", *([request.args for request in of_arm] for of_arm in requests))
    yield identical(name, "texts", plain.generate_until(requests[0]), spath.generate_until(requests[1]))


def agree(metric: str, plain: float, spath: float) -> bool:
    """Whether two values of a metric are the same; of what is no count, up to rounding."""
    if "perplexity" in metric or metric == "bits_per_byte":
        return math.isclose(plain, spath, rel_tol=PERPLEXITY_TOLERANCE)
    return plain == spath


def identical(task: str, what: str, plain: Sequence[Any], spath: Sequence[Any]) -> Row:
    """How many there are, and how many of them are the same."""
    same = sum(a == b for a, b in zip(plain, spath, strict=False))
    return Row(task, what, "", str(len(plain)), f"{same} the same", list(plain) == list(spath))


if __name__ == "__main__":
    sys.exit(main())
