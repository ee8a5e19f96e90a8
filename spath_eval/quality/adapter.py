"""lm-eval tasks on a loaded model: the same requests for every arm.

Scores are lm-eval's own: its `HFLM` answers the requests and its `evaluate` applies filters and metrics. What is added
is the phase for the exercise gate, and what prompt strategies need: the context runs dense, what follows it sparse.
lm-eval's request cache is never used, because it does not know which model answered.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any

import lm_eval
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spath_eval.contracts import UsageError
from spath_eval.pathways import Exercise, PromptPathway

logging.getLogger("lm_eval").setLevel(logging.ERROR)

ACCURACIES = {"acc", "acc_norm", "exact_match"}
"""Metrics that have a chance level."""


@dataclass(frozen=True)
class Scores:
    """One metric of one task."""

    task: str
    metric: str
    filter: str
    higher_is_better: bool
    value: float
    stderr: float | None
    per_document: Mapping[str, float]
    """Document id and hash to its score; empty where the metric is no mean over documents."""

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.task, self.metric, self.filter)


@dataclass(frozen=True)
class Evaluation:
    """All tasks of a domain, on one arm."""

    scores: Mapping[tuple[str, str, str], Scores]
    samples: Sequence[Mapping[str, Any]]
    """A row per document and filter: prompt, answers, metrics."""


class PathwayLM(HFLM):
    """lm-eval's Hugging Face model around a loaded model, whichever pathway is applied to it."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            softmax_dtype=torch.float32,
        )
        self._batch_size = batch_size
        self.exercise: Exercise | None = None
        """Told whether a forward scores or generates, while an arm is watched."""
        self.prompt_pathway: PromptPathway | None = None
        """Set while the pathway of a prompt strategy is applied."""
        self.truncated = 0
        """Requests so far that were longer than the model's input and lost tokens on their left."""

    @property
    def batch_size(self) -> int:
        return 1 if self.prompt_pathway else self._batch_size

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[Any], **settings: Any) -> list[tuple[float, bool]]:
        self.truncated += sum(len(context) + len(answer) > self.max_length + 1 for _, context, answer in requests)
        if self.exercise:
            self.exercise.scoring = True
        try:
            if self.prompt_pathway:
                return [self._after_prompt(context, continuation) for _, context, continuation in requests]
            return super()._loglikelihood_tokens(requests, **settings)
        finally:
            if self.exercise:
                self.exercise.scoring = False

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **settings: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if left_truncate_len is not None:
            self.truncated += sum(len(self.tok_encode(string)) > left_truncate_len for string in strings)
        return super().tok_batch_encode(strings, padding_side, left_truncate_len, **settings)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        if self.prompt_pathway:
            self.prompt_pathway.begin(skip=self._leading_bos(context))
        return super()._model_generate(context, max_length, stop, **settings)

    def _leading_bos(self, ids: torch.Tensor) -> int:
        return int(ids[0, 0] == self.tokenizer.bos_token_id) if self.tokenizer.bos_token_id is not None else 0

    def _after_prompt(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Log-likelihood of a continuation whose context is the prompt, and whether greedy decoding gives it."""
        assert self.prompt_pathway
        ids = torch.tensor([(context + continuation)[-(self.max_length + 1) :]], device=self.device)
        split = ids.shape[1] - len(continuation)
        self.prompt_pathway.begin(skip=self._leading_bos(ids))
        with torch.inference_mode():
            prompt = self.model(ids[:, :split], use_cache=True)
            logits = prompt.logits[:, -1:]
            if len(continuation) > 1:
                rest = self.model(ids[:, split:-1], cache=prompt.cache, use_cache=True)
                logits = torch.cat([logits, rest.logits], dim=1)
        logprobs = logits.float().log_softmax(-1)
        targets = ids[:, split:]
        total = logprobs.gather(2, targets.unsqueeze(-1)).sum()
        return float(total), bool((logprobs.argmax(-1) == targets).all())


def load_tasks(names: Sequence[str], folders: Iterable[Path]) -> dict[str, ConfigurableTask]:
    """The tasks called `names`, from `folders` or lm-eval's own. Raises `UsageError` for one that is in neither, or
    cannot be loaded."""
    paths = sorted({str(folder) for folder in folders})
    manager = TaskManager(include_path=paths, include_defaults=False)
    own = ", ".join(manager.all_subtasks) or "none"
    if any(name not in manager.all_tasks for name in names):  # lm-eval's own are thousands of files
        manager = TaskManager(include_path=paths)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise UsageError(f"unknown task {unknown[0]!r}: there are {own}, and those of lm-eval")
    try:
        return dict(manager.load(list(names))["tasks"])
    except Exception as error:
        raise UsageError(f"cannot load the tasks {', '.join(names)}: {error}") from error


def evaluate(lm: PathwayLM, tasks: Mapping[str, ConfigurableTask], limit: int | None, seed: int) -> Evaluation:
    """Score `lm` as it now is on the first `limit` documents of each task.

    The few-shot examples depend on `seed` alone, so that every arm meets the same requests.
    """
    random.seed(seed)
    for task in tasks.values():
        if task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed)
    with torch.inference_mode():  # bootstrapping would fork, and print to stdout
        results = lm_eval.evaluate(lm, {"tasks": dict(tasks)}, limit=limit, bootstrap_iters=0, log_samples=True)
    assert results is not None
    scores = {}
    samples: list[Mapping[str, Any]] = []
    for name in tasks:
        rows = results["samples"][name]
        samples += [{"task": name, **row} for row in rows]
        for key, value in results["results"][name].items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr"):
                continue
            per_document = {
                f"{row['doc_id']}:{row['doc_hash']}:{row['prompt_hash']}": row[metric]
                for row in rows
                if row["filter"] == filter_name and metric in row
            }
            if not _is_mean(value, per_document.values()):
                per_document = {}
            better = bool(results["higher_is_better"][name].get(metric, True))
            one = Scores(
                name,
                metric,
                filter_name,
                better,
                float(value),
                stdev(per_document.values()) / len(per_document) ** 0.5 if len(per_document) > 1 else None,
                {key: float(score) for key, score in per_document.items()},
            )
            scores[one.key] = one
    return Evaluation(scores, samples)


def _is_mean(value: float, scores: Collection[Any]) -> bool:
    """Whether a metric's value is the mean of what its documents score; that of a perplexity, say, is not."""
    if not scores or not all(isinstance(score, int | float) for score in scores):
        return False
    return math.isclose(value, sum(scores) / len(scores), rel_tol=1e-9, abs_tol=1e-12)


def chance(task: ConfigurableTask, metric: str, limit: int | None) -> tuple[float | None, str | None]:
    """The score of guessing, or none and the reason why there is none.

    The mean over documents of 1 / choices for multiple choice, 0 for generation.
    """
    if metric not in ACCURACIES:
        return None, f"{metric} has no chance level"
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0.0, None
    documents = list(task.eval_docs)[:limit]
    return sum(1 / len(task.doc_to_choice(document)) for document in documents) / len(documents), None


def task_record(
    task: ConfigurableTask, evaluation: Evaluation, limit: int | None, batch_size: int
) -> list[dict[str, Any]]:
    """The task's entries in the record, one per metric and filter."""
    rows = [row for row in evaluation.samples if row["task"] == task.task_name]
    identity = [(row["doc_hash"], row["prompt_hash"], row["target_hash"]) for row in rows]
    entries = []
    for score in evaluation.scores.values():
        if score.task != task.task_name:
            continue
        level, reason = chance(task, score.metric, limit)
        version = (task.config.metadata or {}).get("version", task.VERSION)
        entry = {
            "task": score.task,
            "version": str(version),
            "digest": hashlib.sha256(json.dumps([score.task, str(version), identity]).encode()).hexdigest(),
            "metric": score.metric,
            "filter": score.filter,
            "higher_is_better": score.higher_is_better,
            "chance": level,
            "documents": len({row["doc_id"] for row in rows}),
            "num_fewshot": task.config.num_fewshot,
            "batch": batch_size,
        }
        if limit is not None:
            entry["limit"] = limit
        if reason is not None:
            entry["chance_reason"] = reason
        entries.append(entry)
    return entries


def item_texts(evaluation: Evaluation) -> dict[str, list[set[str]]]:
    """Per task, for each document the texts by which it would be recognised in a corpus: its prompt, its prompt with
    each answer and with the right one, and its fields of at least 32 characters."""
    texts: dict[str, dict[int, set[str]]] = {}
    for row in evaluation.samples:
        own = texts.setdefault(row["task"], {}).setdefault(row["doc_id"], set())
        for arguments in row["arguments"]:
            prompt = str(arguments[0])
            own.add(prompt)
            if len(arguments) > 1 and isinstance(arguments[1], str):
                own.add(prompt + arguments[1])
            own.add(f"{prompt} {row['target']}")
        own.update(value for value in row["doc"].values() if isinstance(value, str) and len(value) >= 32)
    return {task: list(documents.values()) for task, documents in texts.items()}
