"""lm-eval tasks on a loaded model: the same requests for every arm.

`SpathLM` answers the requests and lm-eval's `evaluate` applies filters and metrics. What is added is the phase for the
exercise gate, what prompt strategies need (the context runs dense, what follows it sparse), and a cache of the dense
model's answers by its fingerprint. lm-eval's own request cache is never used, because it does not know which model
answered.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from statistics import stdev
from typing import Any

import lm_eval
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spath_eval import records
from spath_eval.collection import Limits
from spath_eval.contracts import UsageError
from spath_eval.models import tokenizer_digest
from spath_eval.pathways import Exercise, PromptPathway
from spath_eval.profiling import cache_folder
from spath_eval.quality.benchmarks import unscored
from spath_eval.quality.scorer import SpathLM
from spath_eval.quality.statistics import CORPUS_METRICS, corpus_value
from spath_eval.texts import digest

logging.getLogger("lm_eval").setLevel(logging.ERROR)
log = logging.getLogger(__name__)

GROUPING = ("passage", "article", "context", "paragraph", "story")
"""Fields of a document that others may share: several questions on one passage are not independent."""
ACCURACIES = {"acc", "acc_norm", "exact_match", "pass@1", "pass_at_1"}
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
    likelihoods: Mapping[str, Any] = field(default_factory=dict)
    """The same with what lm-eval logs, where the metric is one of `statistics.CORPUS_METRICS`."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """The same with what they share with other documents, a passage say; empty where each stands for itself."""
    grouped_by: str | None = None
    """The field of a document that is shared."""

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.task, self.metric, self.filter)


@dataclass(frozen=True)
class Evaluation:
    """All tasks of a domain, on one arm."""

    scores: Mapping[tuple[str, str, str], Scores]
    samples: Sequence[Mapping[str, Any]]
    """A row per document and filter: prompt, answers, metrics."""
    unscored: Mapping[str, str] = field(default_factory=dict)
    """Tasks whose texts have no score, and why."""
    token_budget: int = 0
    """Tokens of a forward, by which the requests were packed."""


class PathwayLM(SpathLM):
    """The scorer around a loaded model, whichever pathway is applied to it."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> None:
        super().__init__(model, tokenizer=tokenizer, batch_size=batch_size)
        self._batch_size = batch_size
        self.exercise: Exercise | None = None
        """Told whether a forward scores or generates, while an arm is watched."""
        self.prompt_pathway: PromptPathway | None = None
        """Set while the pathway of a prompt strategy is applied."""
        self._fingerprint: str | None = None
        """Set while answers come from the cache, or go there."""
        _ = self.plain  # found out now, while the model is dense and nobody watches

    @property
    def batch_size(self) -> int:
        return 1 if self.prompt_pathway else self._batch_size

    @contextmanager
    def repacked(self) -> Iterator[None]:
        """Within the context, forwards are of half the size, so that sums are rounded in another order."""
        budget, batch_size = self.token_budget, self._batch_size
        self.token_budget, self._batch_size = max(budget // 2, 1), max(batch_size // 2, 1)
        try:
            yield
        finally:
            self.token_budget, self._batch_size = budget, batch_size

    @contextmanager
    def remembering(self, fingerprint: str) -> Iterator[None]:
        """Within the context, answers are taken from the cache where the model of that fingerprint has given them."""
        self._fingerprint = fingerprint
        try:
            yield
        finally:
            self._fingerprint = None

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        answers = self._remembered("loglikelihood", requests, super().loglikelihood)
        return [(score, greedy) for score, greedy in answers]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        return self._remembered("loglikelihood_rolling", requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        if self.prompt_pathway:
            return HFLM.generate_until(self, requests, disable_tqdm=True)
        return self._remembered("generate_until", requests, super().generate_until)

    def _remembered(self, kind: str, requests: list[Any], answer: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """What the cache holds for `requests`, else what `answer` gives, which is then cached."""
        if self._fingerprint is None:
            return answer(requests)
        key = {
            "model": self._fingerprint,
            "tokenizer": self._tokenizer_digest,
            "device": self.device.type,
            "dtype": str(self.model.dtype),
            "tokens": [self.token_budget, self._batch_size, self.max_length],
            "requests": [kind, [request.args for request in requests]],
            "code": _code_digest(),
        }
        name = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        path = cache_folder() / "answers" / f"{name}.json"
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            answers = kept["answers"]
            self.truncated += kept["truncated"]
            if len(answers) == len(requests):
                return list(answers)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError) as error:
            log.warning("answers in the cache are made again, because they cannot be read: %s", error)
        before, budget = self.truncated, self.token_budget
        answers = answer(requests)
        if self.token_budget == budget:
            try:
                records.write({"truncated": self.truncated - before, "answers": answers}, path)
            except (UsageError, ValueError) as error:
                log.warning("the dense model's answers are not cached: %s", error)
        return answers

    @cached_property
    def _tokenizer_digest(self) -> str:
        return tokenizer_digest(self.tokenizer)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **settings: Any) -> list[tuple[float, bool]]:
        if self.exercise:
            self.exercise.scoring = True
        try:
            if self.prompt_pathway:
                return [self._after_prompt(context, continuation) for _, context, continuation in requests]
            return super()._loglikelihood_tokens(requests, **settings)
        finally:
            if self.exercise:
                self.exercise.scoring = False

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


def evaluate(
    lm: PathwayLM, tasks: Mapping[str, ConfigurableTask], limits: Limits, seed: int, chat_template: bool = False
) -> Evaluation:
    """Score `lm` as it now is on the first documents of each task, as many as `limits` says.

    The few-shot examples depend on `seed` alone, and the requests are built once, so that every arm meets the same.
    """
    scores: dict[tuple[str, str, str], Scores] = {}
    samples: list[Mapping[str, Any]] = []
    by_limit: dict[int | None, dict[str, ConfigurableTask]] = {}
    for name, task in tasks.items():
        by_limit.setdefault(limits.of(name), {})[name] = task
    random.seed(seed)
    for limit, group in by_limit.items():
        for task in group.values():
            if task.config.num_fewshot is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed)
            built = vars(task).setdefault("_built", {})
            task.build_all_requests = partial(_build_or_reuse, task, seed, built)
        with torch.inference_mode():  # bootstrapping would fork, and print to stdout
            results = lm_eval.evaluate(
                lm,
                {"tasks": dict(group)},
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,
                confirm_run_unsafe_code=True,  # `load_tasks` puts it in a sandbox, or takes it out
            )
        assert results is not None
        for name in group:
            samples += [{"task": name, **row} for row in results["samples"][name]]
            for one in _scores(name, results):
                scores[one.key] = one
    reasons = {name: reason for name, task in tasks.items() if (reason := unscored(task))}
    return Evaluation(scores, samples, reasons, lm.token_budget)


def _scores(name: str, results: Any) -> Iterator[Scores]:
    """What lm-eval found for the task `name`, metric by metric."""
    for key, value in results["results"][name].items():
        metric, _, filter_name = key.partition(",")
        if not filter_name or metric.endswith("_stderr"):
            continue
        per_document = {
            _key(row): row[metric] for row in results["samples"][name] if row["filter"] == filter_name and metric in row
        }
        likelihoods = {}
        if not _is_mean(value, per_document.values()):
            if _is_of_corpus(metric, value, list(per_document.values())):
                likelihoods = per_document
            per_document = {}
        grouped_by, groups = _groups(results["samples"][name])
        yield Scores(
            name,
            metric,
            filter_name,
            bool(results["higher_is_better"][name].get(metric, True)),
            float(value),
            stdev(per_document.values()) / len(per_document) ** 0.5 if len(per_document) > 1 else None,
            {key: float(score) for key, score in per_document.items()},
            likelihoods,
            groups,
            grouped_by,
        )


def _key(row: Mapping[str, Any]) -> str:
    return f"{row['doc_id']}:{row['doc_hash']}:{row['prompt_hash']}"


def _groups(rows: Sequence[Mapping[str, Any]]) -> tuple[str | None, dict[str, str]]:
    """The field that several documents share, and each document's value of it; none where they share none."""
    documents = {_key(row): row["doc"] for row in rows}
    for name in GROUPING:
        values = {key: document.get(name) for key, document in documents.items()}
        texts = {key: digest(value) for key, value in values.items() if isinstance(value, str) and value}
        if len(set(texts.values())) < len(texts) == len(documents):
            return name, texts
    return None, {}


def _build_or_reuse(task: Any, seed: int, built: dict[tuple[Any, ...], list[Instance]], **settings: Any) -> None:
    """lm-eval's `build_all_requests`, but for what was built before: that is used again, without its answers."""
    key = (seed, settings["limit"], settings["tokenizer_name"])
    if key not in built:
        type(task).build_all_requests(task, **settings)
        built[key] = task._instances
    for instance in built[key]:
        instance.resps, instance.filtered_resps = [], {}
    task._instances = built[key]


def _code_digest() -> str:
    """What else decides answers: the versions of the libraries, and this package's scoring code."""
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "lm-eval")]
    code = [
        Path(__file__).with_name(f"{name}.py").read_bytes()
        for name in ("scorer", "packing", "vocabulary", "generation")
    ]
    return hashlib.sha256(b"".join([json.dumps(versions).encode(), *code])).hexdigest()


def _is_mean(value: float, scores: Collection[Any]) -> bool:
    """Whether a metric's value is the mean of what its documents score; that of a perplexity, say, is not."""
    if not scores or not all(isinstance(score, int | float) for score in scores):
        return False
    return math.isclose(value, sum(scores) / len(scores), rel_tol=1e-9, abs_tol=1e-12)


def _is_of_corpus(metric: str, value: float, likelihoods: Sequence[Any]) -> bool:
    """Whether a metric's value is a perplexity, or bits per byte, of what was logged per document."""
    return metric in CORPUS_METRICS and math.isclose(value, corpus_value(metric, likelihoods), rel_tol=1e-6)


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
    """The task's entries in the record, one per metric and filter; none where nothing was measured."""
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
            "token_budget": evaluation.token_budget,
        }
        if limit is not None:
            entry["limit"] = limit
        if score.grouped_by:
            entry["grouped_by"] = score.grouped_by
        if reason is not None:
            entry["chance_reason"] = reason
        entries.append(entry)
    return entries


def item_texts(evaluation: Evaluation, tasks: Mapping[str, ConfigurableTask]) -> dict[str, list[set[str]]]:
    """Per task, for each document the texts by which it would be recognised in a corpus: its prompt without examples,
    that with each answer and with the right one, and its fields of at least 32 characters."""
    texts: dict[str, dict[int, set[str]]] = {}
    for row in evaluation.samples:
        own = texts.setdefault(row["task"], {}).setdefault(row["doc_id"], set())
        asked = tasks[row["task"]].doc_to_text(row["doc"])
        for arguments in row["arguments"]:
            prompt = asked if isinstance(asked, str) else str(arguments[0])
            own.add(prompt)
            if len(arguments) > 1 and isinstance(arguments[1], str):
                own.add(prompt + arguments[1])
            own.add(f"{prompt} {row['target']}")
        own.update(value for value in row["doc"].values() if isinstance(value, str) and len(value) >= 32)
    return {task: list(documents.values()) for task, documents in texts.items()}
