"""lm-eval's tasks by their names: found quickly, fed from a folder of rows, checked before any model is loaded.

lm-eval parses its 14,000 YAML files to find one task. Here their bytes are searched for the name, and only the folders
that define it are parsed. What is loaded is lm-eval's own task object: merely `download`, the method that lm-eval means
to be overridden for data from elsewhere, reads JSON lines, so prompt, metrics, filters and examples are the stock ones.
Every row that a run will use is rendered once, so that a bad one is reported by its file, line and field.
"""

from __future__ import annotations

import ast
import difflib
import gzip
import json
import math
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import evaluate
import jinja2
import jinja2.meta
import lm_eval.tasks
import lm_eval.utils
from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from spath_eval.collection import Limits
from spath_eval.contracts import UsageError
from spath_eval.quality import sandbox

STOCK = Path(lm_eval.tasks.__file__).parent
"""The folder of lm-eval's own tasks."""

SAME_ROWS: Mapping[tuple[str, str | None], str] = {
    ("openai/gsm8k", "main"): "gsm8k",
    ("openai/openai_humaneval", None): "humaneval",
    ("google-research-datasets/mbpp", "full"): "mbpp",
    ("allenai/ai2_arc", "ARC-Easy"): "arc_easy",
    ("allenai/ai2_arc", "ARC-Challenge"): "arc_challenge",
    ("tau/commonsense_qa", None): "commonsense_qa",
    ("baber/piqa", None): "piqa",
    ("EleutherAI/lambada_openai", "default"): "lambada_openai",
    ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1"): "wikitext",
}
"""The task whose folder has the rows of a data set of the hub: gsm8k_cot, say, asks for those of gsm8k."""

SAME_ROWS_BY_SUBJECT: Mapping[str, str] = {"cais/mmlu": "mmlu", "hails/mmlu_no_train": "mmlu"}
"""The same for data sets whose configurations are the values of the rows' `subject`."""


def load_tasks(
    names: Sequence[str],
    folders: Iterable[Path] = (),
    *,
    data_dir: Path | None = None,
    num_fewshot: int | None = None,
    limits: Limits | None = None,
    allow_code_execution: bool = False,
) -> dict[str, ConfigurableTask]:
    """The tasks called `names`, groups and tags as the tasks they consist of, by name and in a fixed order.

    A name is looked up in `folders`, then among lm-eval's own. With `data_dir`, rows come from
    `data_dir/TASK/SPLIT.jsonl` or `.jsonl.gz`, from the folder of a task with the same rows, or from that of a group,
    whose rows have a `subject`; a task of `folders` without such rows, or with a `custom_dataset`, gets its own.
    `num_fewshot` replaces the stock number of examples, and `limits` says how many documents will be evaluated. Tasks
    that execute what the model writes do so in a sandbox, and only with `allow_code_execution`; otherwise they only
    generate it.

    Raises `UsageError` for an unknown name, for rows that are missing or not as the task needs them, for examples that
    a task cannot have, for a task that cannot be loaded, and where code is to be executed and cannot be contained.
    """
    names = list(dict.fromkeys(names))
    if data_dir is not None and not data_dir.is_dir():
        raise UsageError(f"the data directory {data_dir} is no folder")
    manager = task_manager(names, sorted({str(folder) for folder in folders}))
    feed = _Feed(data_dir, num_fewshot, limits or Limits(), _parents(manager))
    tasks: dict[str, ConfigurableTask] = {}
    sandboxed = _SandboxedCodeEval()
    for name in names:
        try:
            with feed.in_place(), _code_evaluated_by(sandboxed):
                found = manager.load([name])["tasks"]
        except UsageError:
            raise
        except Exception as error:
            advice = "; --data-dir takes its rows from a folder" if not data_dir and isinstance(error, OSError) else ""
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(f"cannot load the task {name}: {reason}{advice}") from error
        if twice := sorted(tasks.keys() & found.keys()):
            raise UsageError(f"the task {twice[0]} is asked for twice: by its name and by a group")
        tasks.update(found)
    for task in tasks.values():
        _check_number_of_examples(task)
        if getattr(task, "UNSAFE_CODE", False):
            if not allow_code_execution:
                task.config.process_results = _no_metrics
            elif (refusal := sandbox.unavailable()) is not None:
                raise UsageError(f"{task.task_name} executes code, which cannot be contained here: {refusal}")
    return tasks


def unscored(task: ConfigurableTask) -> str | None:
    """Why a task generates texts but has no score, or none where it has."""
    return "code is executed only with --allow-code-execution" if task.config.process_results is _no_metrics else None


def _no_metrics(document: Mapping[str, Any], results: Sequence[Any]) -> dict[str, Any]:
    return {}


# Finding what defines a name


class _Headers(NamedTuple):
    """What a folder's YAML files say of names, as far as it can be read off their lines."""

    definitions: Mapping[str, Path]
    """Task or group to the file that defines it."""
    tags: Mapping[str, Sequence[Path]]
    """Tag to the files that have it in their own text."""
    includes: Mapping[str, Sequence[Path]]
    """File to those that include it, and so may have its tags."""


_HEADER = re.compile(
    rb"""^(["']?)(task|group|tag|include)\1[ \t]*:[ \t]*(.*(?:\r?\n[ \t]*-[ \t].*)*)""", flags=re.MULTILINE
)


@cache
def _headers(top: str) -> _Headers:
    """Of one of the folders in `STOCK`, with all below it."""
    definitions: dict[str, Path] = {}
    tags: dict[str, list[Path]] = {}
    includes: dict[str, list[Path]] = {}
    for folder, _, files in os.walk(STOCK / top):
        for file in files:
            if not file.endswith("yaml") and "." in file:  # what is only included may be called `_template`
                continue
            path = Path(folder, file)
            for _, key, value in _HEADER.findall(path.read_bytes()):
                values = [item.partition(" #")[0].strip(" \t\r-[]\"'") for item in re.split("[\n,]", value.decode())]
                values = [item for item in values if item]
                if key == b"tag":
                    for tag in values:
                        tags.setdefault(tag, []).append(path)
                elif key == b"include":
                    for target in values:
                        includes.setdefault(os.path.normpath(os.path.join(folder, target)), []).append(path)
                elif not value.startswith((b"\n", b"\r")) and values:  # a list under `task:` has a group's members
                    definitions.setdefault(values[0], path)
    return _Headers(definitions, tags, includes)


@cache
def _tops() -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(STOCK) if entry.is_dir() and entry.name != "__pycache__"))


def _folders_defining(name: str) -> set[str]:
    """The folders of lm-eval with the files that define a task, a group, or the tasks of a tag."""
    parts = name.split("_")
    likely = {"_".join(parts[:length]) for length in range(1, len(parts) + 1)}.intersection(_tops())
    for top in [*sorted(likely, key=len, reverse=True), *_tops()]:
        if path := _headers(top).definitions.get(name):
            return {str(path.parent)}
    files = [path for top in _tops() for path in _headers(top).tags.get(name, ())]
    for path in files:  # grows as it goes
        including = (other for top in _tops() for other in _headers(top).includes.get(str(path), ()))
        files += [other for other in including if other not in files]
    return {str(path.parent) for path in files}


def task_manager(names: Sequence[str], folders: Sequence[str]) -> TaskManager:
    """lm-eval's task manager for `folders` and for those of its own folders that `names` need.

    Raises `UsageError` where a name is in neither.
    """
    if missing := [folder for folder in folders if not Path(folder).is_dir()]:
        raise UsageError(f"the task folder {missing[0]} is no folder")
    manager = own = TaskManager(include_path=list(folders), include_defaults=False)
    stock: set[str] = set()
    searched: set[str] = set()
    while wanted := [
        name for name in _reached(manager, names) if name not in searched and _in_stock(name, manager, own)
    ]:
        searched.update(wanted)
        stock.update(*map(_folders_defining, wanted))
        outermost = sorted(folder for folder in stock if not any(str(up) in stock for up in Path(folder).parents))
        manager = TaskManager(include_path=[*outermost, *folders], include_defaults=False)
    if unknown := [name for name in names if name not in manager.task_index]:
        raise UsageError(_unknown(unknown[0], own, folders))
    return manager


def _in_stock(name: str, manager: TaskManager, own: TaskManager) -> bool:
    """Whether lm-eval's folders must be searched for a name: it is in no folder so far, or a tag, which many have."""
    entry = manager.task_index.get(name)
    return name not in own.task_index and (entry is None or entry.kind.name == "TAG")


def _members(entry: Any) -> list[str]:
    """The names that a group or tag refers to."""
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    names = []
    pending = [(entry.cfg or {}).get("task")] if entry.kind.name == "GROUP" else []
    while pending:
        for item in listed if isinstance(listed := pending.pop(), list) else []:
            if isinstance(item, dict):
                pending.append(item.get("task"))
                item = item.get("group") or item.get("task")
            if isinstance(item, str):
                names.append(item)
    return names


def _reached(manager: TaskManager, names: Sequence[str]) -> list[str]:
    """`names` and what they consist of."""
    reached = dict.fromkeys(names)
    pending = list(names)
    while pending:
        entry = manager.task_index.get(pending.pop())
        new = [name for name in _members(entry) if name not in reached] if entry else []
        reached.update(dict.fromkeys(new))
        pending += new
    return list(reached)


def _parents(manager: TaskManager) -> dict[str, list[str]]:
    """Name to the groups and tags that it is a member of."""
    parents: dict[str, list[str]] = {}
    for name, entry in manager.task_index.items():
        for member in _members(entry):
            parents.setdefault(member, []).append(name)
    return parents


def _unknown(name: str, own: TaskManager, folders: Sequence[str]) -> str:
    """What to say of a name that is nowhere."""
    for path in sorted(path for folder in folders for path in Path(folder).rglob("*.yaml")):
        if re.search(rf"^(task|group):\s*[\"']?{re.escape(name)}[\"']?\s*$", path.read_text("utf-8", "replace"), re.M):
            return f"unknown task {name!r}: {path}, which defines it, is no readable YAML"
    stock = [known for top in _tops() for kind in _headers(top)[:2] for known in kind]
    near = difflib.get_close_matches(name, dict.fromkeys([*own.task_index, *stock]), n=3)
    where = " or ".join([*folders, "lm-eval"])
    return f"unknown task {name!r}" + (f"; the nearest are {', '.join(near)}" if near else f": it is not in {where}")


# Rows in the place of the hub's


@dataclass(frozen=True)
class _Rows:
    """Rows of a file of JSON lines."""

    file: Path
    lines: Sequence[int]
    rows: Sequence[dict[str, Any]]

    def only(self, positions: Sequence[int]) -> _Rows:
        return _Rows(self.file, [self.lines[p] for p in positions], [self.rows[p] for p in positions])

    def bad(self, position: int, what: str) -> UsageError:
        return UsageError(f"{self.file}:{self.lines[position]}: {what}")


@dataclass(frozen=True)
class _Feed:
    """Where the tasks that are being loaded get rows and examples from."""

    data_dir: Path | None
    num_fewshot: int | None
    limits: Limits
    parents: Mapping[str, Sequence[str]]
    files: dict[Path, _Rows] = field(default_factory=dict)
    """What was read so far: many tasks share a file."""
    subjects: dict[Path, dict[str, _Rows]] = field(default_factory=dict)
    """The same by the rows' subject."""

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While it lasts, tasks are constructed with these rows and examples."""
        download = ConfigurableTask.download

        def instead(task: ConfigurableTask, *arguments: Any, **settings: Any) -> None:
            self._set_examples(task)
            if place := self._place(task):
                task.dataset = _Splits(self, task, *place)
            else:
                download(task, *arguments, **settings)

        ConfigurableTask.download = instead
        try:
            yield
        finally:
            ConfigurableTask.download = download

    def read(self, file: Path) -> _Rows:
        if file not in self.files:
            self.files[file] = _read_rows(file)
        return self.files[file]

    def read_subject(self, file: Path, subject: str) -> _Rows:
        """The rows of a subject, which may be none."""
        if file not in self.subjects:
            rows = self.read(file)
            positions: dict[str, list[int]] = {}
            for position, row in enumerate(rows.rows):
                if not isinstance(row.get("subject"), str):
                    raise rows.bad(position, "expected a field 'subject' with a string, which says whose row it is")
                positions.setdefault(row["subject"], []).append(position)
            self.subjects[file] = {name: rows.only(chosen) for name, chosen in positions.items()}
        return self.subjects[file].get(subject, _Rows(file, (), ()))

    def _set_examples(self, task: ConfigurableTask) -> None:
        if self.num_fewshot is None:
            return
        if self.num_fewshot > 0 and (reason := _no_examples(task)):
            raise UsageError(f"{task.task_name} cannot have {self.num_fewshot} examples: {reason}")
        task.config.num_fewshot = self.num_fewshot

    def _place(self, task: ConfigurableTask) -> tuple[Path, str | None] | None:
        """The folder with a task's rows, and the subject that they are of where it has others as well."""
        config = task.config
        if self.data_dir is None or callable(config.custom_dataset):
            return None
        groups = list(self.parents.get(task.task_name, ()))
        for group in groups:  # grows as it goes
            groups += [outer for outer in self.parents.get(group, ()) if outer not in groups]
        path, name = str(config.dataset_path), config.dataset_name
        places = [(task.task_name, None), (SAME_ROWS.get((path, name)), None), (SAME_ROWS_BY_SUBJECT.get(path), name)]
        for folder, subject in [*places, *((group, name) for group in groups if name)]:
            if folder and (self.data_dir / folder).is_dir():
                return self.data_dir / folder, subject
        source = (config.metadata or {}).get("config_source", "")
        if STOCK in Path(source).parents:
            looked = " or ".join(dict.fromkeys(str(self.data_dir / folder) for folder, _ in places if folder))
            raise UsageError(f"there are no rows for the task {task.task_name}: expected the folder {looked}")
        return None


class _Splits(dict[str, datasets.Dataset]):
    """A task's data set, whose splits are read and checked when they are asked for.

    lm-eval asks for the split of the examples even where there are to be none: then it gets one without rows.
    """

    def __init__(self, feed: _Feed, task: ConfigurableTask, folder: Path, subject: str | None) -> None:
        super().__init__()
        self.feed = feed
        self.config = task.config
        self.folder = folder
        self.subject = subject
        self.evaluated = task.config.test_split or task.config.validation_split

    def __missing__(self, split: str) -> datasets.Dataset:
        examples = self.config.num_fewshot or 0
        if not examples and self.evaluated not in (None, split):
            self[split] = self[str(self.evaluated)].select(())
            return self[split]
        rows = self._rows(split)
        limit = self.feed.limits.of(str(self.config.task))
        prompts = [(_Prompt.of_documents(self.config), limit)] if split == self.evaluated else []
        if examples and (split != self.evaluated or split == self.config.fewshot_config.split):
            prompts.append((_Prompt.of_examples(self.config), None))
        self[split] = _checked(rows, prompts)
        return self[split]

    def _rows(self, split: str) -> _Rows:
        """Raises `UsageError` where the split has no file, or its file no rows for the task."""
        plain, packed = self.folder / f"{split}.jsonl", self.folder / f"{split}.jsonl.gz"
        if not plain.exists() and not packed.exists():
            shots = self.config.num_fewshot
            what = f"the {shots} examples of " if shots and split != self.evaluated else ""
            advice = " (with 0 examples it needs none)" if what else ""
            raise UsageError(f"{plain} (or .gz) is missing, from which {what}{self.config.task} would come{advice}")
        file = plain if plain.exists() else packed
        found = self.feed.read(file) if self.subject is None else self.feed.read_subject(file, self.subject)
        if not found.rows:
            raise UsageError(f"{file}: no rows" + (f" with the subject {self.subject!r}" if self.subject else ""))
        return found


def _read_rows(file: Path) -> _Rows:
    """Raises `UsageError` for what cannot be read, and for a line that is no JSON object."""
    lines, rows = [], []
    number = 0
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as opened:
            for number, line in enumerate(opened, start=1):
                if line.isspace():
                    continue
                row = json.loads(line.rstrip())
                if not isinstance(row, dict):
                    raise UsageError(f"{file}:{number}: expected a JSON object, found {_kind(row)}")
                lines.append(number)
                rows.append(row)
    except json.JSONDecodeError as error:
        raise UsageError(f"{file}:{number}: expected a JSON object: {error.msg} at column {error.colno}") from error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UsageError(f"{file}:{number + 1}: cannot be read: {error}") from error
    return _Rows(file, lines, rows)


def _no_examples(task: ConfigurableTask) -> str | None:
    """Why a task can have no examples but those of its configuration, or none where it can."""
    config = task.config
    if config.output_type == "loglikelihood_rolling":
        return "a rolling log-likelihood has no prompt in which they could stand"
    if config.num_fewshot == 0:
        return "its configuration sets 0, which lm-eval lets nobody override"
    if config.fewshot_config.split or config.fewshot_config.samples or task.has_training_docs():
        return None
    if task.has_test_docs() and task.has_validation_docs():
        return None
    return "its only split is the one that is evaluated"


def _check_number_of_examples(task: ConfigurableTask) -> None:
    """Raises `UsageError` where there are fewer examples than the task is to have."""
    config = task.config
    sampler = getattr(task, "sampler", None)
    if not config.num_fewshot or sampler is None or config.output_type == "loglikelihood_rolling":
        return
    split = config.fewshot_config.split
    fixed = split is None and config.fewshot_config.samples is not None
    # one is the evaluated document itself, and lm-eval takes two missing names for the same split, too
    itself = split == config.test_split and (split is not None or not isinstance(sampler, FirstNSampler))
    there = len(sampler.df) - itself
    if there < config.num_fewshot:
        why = f"its configuration has {there} fixed ones" if fixed else f"lm-eval can draw {there} from their split"
        raise UsageError(f"{task.task_name} cannot have {config.num_fewshot} examples: {why}")


# Checking rows


def _kind(value: Any) -> str:
    """What a JSON value is, in words; a list with what it consists of, as far as it has any."""
    if isinstance(value, list):
        kinds = sorted({_kind(item) for item in value if item is not None})
        return f"a list of {' and '.join(kinds)}" if kinds else "a list"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", dict: "an object"}
    return names.get(type(value), "null")


def _kinds(row: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The kind of each field, and as `choices.text` of those within."""
    kinds: dict[str, str] = {}
    for name, value in row.items():
        kinds[prefix + name] = _kind(value)
        if isinstance(value, dict):
            kinds |= _kinds(value, f"{prefix}{name}.")
    return kinds


def _checked(rows: _Rows, prompts: Sequence[tuple[_Prompt, int | None]]) -> datasets.Dataset:
    """The rows as a data set. Raises `UsageError` for the first one that differs from the others in the fields that a
    prompt needs or in the type of any field, or of which, up to its limit, a prompt cannot be made."""
    columns = list(dict.fromkeys(name for row in rows.rows for name in row))
    used = (
        len(rows.rows) if any(limit is None for _, limit in prompts) else max((n or 0 for _, n in prompts), default=0)
    )
    _check_kinds(rows, {name for prompt, _ in prompts for name in prompt.fields(columns)}, used)
    complete = rows.rows
    if any(len(row) < len(columns) for row in rows.rows):  # the first row alone would decide which columns there are
        complete = [{name: row.get(name) for name in columns} for row in rows.rows]
    try:
        dataset = datasets.Dataset.from_list(list(complete))
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise UsageError(f"{rows.file}: cannot be a table: {error}") from error
    for prompt, limit in prompts:
        prompt.check(rows, dataset, limit)
    return dataset


def _check_kinds(rows: _Rows, needed: Collection[str], used: int) -> None:
    """Raises `UsageError` for a field of another type than in most rows, and, in the first `used` rows, for one that is
    needed and missing although others have it."""
    kinds = [_kinds(row) for row in rows.rows]
    counts: dict[str, Counter[str]] = {}
    for of_row in kinds:
        for name, kind in of_row.items():
            if kind not in ("null", "a list"):
                counts.setdefault(name, Counter())[kind] += 1
    usual = {name: of_field.most_common(1)[0][0] for name, of_field in counts.items()}
    for position, of_row in enumerate(kinds):
        for name, kind in usual.items():
            found = of_row.get(name)
            if found is None and name in needed and position < used:
                raise rows.bad(position, f"expected a field {name!r} with {kind}, which is missing")
            if found not in (None, "null", kind) and not (found == "a list" and kind.startswith("a list")):
                raise rows.bad(position, f"expected {kind} in the field {name!r}, as in other rows, found {found}")


def _printable(value: Any) -> Any:
    """Refuses null in what a template prints, where Jinja would write `None`."""
    if value is None:
        raise ValueError("null stands where text was expected")
    return value


_JINJA = lm_eval.utils.env.overlay(finalize=_printable, undefined=jinja2.StrictUndefined)


@cache
def _template(source: str) -> jinja2.Template:
    return _JINJA.from_string(source)


@dataclass(frozen=True)
class _Prompt:
    """What a task makes of a row: lm-eval's `doc_to_text`, `doc_to_choice` and `doc_to_target`."""

    parts: Mapping[str, Any]
    """Each one's template, name of a field, function or constant, choices before the target that is one of them."""
    process_docs: Callable[..., Any] | None
    scored_by_task: bool
    """Whether the task has a function of its own that scores answers, to which targets may mean anything."""

    @classmethod
    def of_documents(cls, config: Any) -> _Prompt:
        return cls(_parts(config, "description", "gen_prefix"), config.process_docs, callable(config.process_results))

    @classmethod
    def of_examples(cls, config: Any) -> _Prompt:
        own = config.fewshot_config
        return cls(_parts(own, "gen_prefix"), own.process_docs, callable(config.process_results))

    def fields(self, columns: Sequence[str]) -> set[str]:
        """Which of the columns it reads, as far as that can be known: otherwise all of them."""
        if self.process_docs is not None:
            return set(columns)
        return {name for part in self.parts for name in self._read_by(part, columns)}

    def check(self, rows: _Rows, dataset: datasets.Dataset, limit: int | None) -> None:
        """Raises `UsageError` for the first of the `limit` rows of which it cannot be made."""
        documents: Sequence[dict[str, Any]] = rows.rows
        columns: Sequence[str] = dataset.column_names
        if self.process_docs is not None:
            try:
                documents = list(self.process_docs(dataset))
            except Exception as error:
                raise UsageError(f"{rows.file}: process_docs of the task fails: {_said(error)}") from error
            columns = list(documents[0]) if documents else []
        one_by_one = len(documents) == len(rows.rows)
        for position, document in enumerate(documents[:limit]):
            if fault := self._fault(document, columns):
                what = self._described(fault, document, documents, columns)
                if one_by_one:
                    raise rows.bad(position, what)
                raise UsageError(f"{rows.file}: document {position + 1} that process_docs makes of it: {what}")

    def _fault(self, row: Mapping[str, Any], columns: Sequence[str]) -> tuple[str, Exception] | None:
        """The first part that cannot be made of a row, and why."""
        made: dict[str, Any] = {}
        for part in self.parts:
            try:
                made[part] = self._made(part, row, columns)
                self._expect(part, made)
            except Exception as error:  # the functions of a task may raise anything
                return part, error
        return None

    def _is_field(self, part: str, columns: Sequence[str]) -> bool:
        """Whether a part names a field. To lm-eval, the name of one that no row has is the text itself: here it is
        that only where it can be meant, as a target such as `yes`."""
        source, choices = self.parts[part], self.parts.get("doc_to_choice")
        if source in columns:
            return True
        if part == "doc_to_target" and (self.scored_by_task or (isinstance(choices, list) and source in choices)):
            return False
        return part.startswith("doc_to_") and source.isidentifier()

    def _read_by(self, part: str, columns: Sequence[str]) -> set[str]:
        """The fields that a part reads; of a function nothing is known, so it may be all of them."""
        source = self.parts[part]
        if callable(source):
            return set(columns)
        if not isinstance(source, str):
            return set()
        return {source} if self._is_field(part, columns) else set(_names(source))

    def _made(self, part: str, row: Mapping[str, Any], columns: Sequence[str]) -> Any:
        """What lm-eval makes of a row, but that a template is compiled once and a field that is missing is an error."""
        source = self.parts[part]
        if callable(source):
            return source(deepcopy(row))
        if isinstance(source, dict):
            return list(source.values())
        if not isinstance(source, str):
            return source
        if self._is_field(part, columns):
            return row[source]
        text = _template(source).render(**row)
        if part == "doc_to_choice":
            return ast.literal_eval(text)
        if text.isdigit() and part.startswith("doc_to_") and "doc_to_choice" in self.parts:
            return int(text)
        if part == "doc_to_target" and text.startswith("[") and text.endswith("]"):
            with suppress(SyntaxError, ValueError):
                return ast.literal_eval(text)
        return text

    def _expect(self, part: str, made: Mapping[str, Any]) -> None:
        """Raises `ValueError` where a part is nothing that lm-eval can use."""
        value, choices, text = made[part], made.get("doc_to_choice"), made.get("doc_to_text")
        if part == "doc_to_choice":
            if not isinstance(value, list) or not value or not all(isinstance(choice, str) for choice in value):
                raise ValueError(f"expected a list of strings, found {_kind(value)}")
        elif part != "doc_to_target":
            of_contexts = part == "doc_to_text" and choices is not None and type(value) is int
            if not isinstance(value, str) and not of_contexts:  # then it is a position: the choices are contexts
                raise ValueError(f"expected a string, found {_kind(value)}")
        elif value is None:
            raise ValueError("expected a value, found null")
        elif choices is not None and not self.scored_by_task:
            gold = text if type(text) is int else value
            for one in gold if isinstance(gold, list) else [gold]:
                if not (one in choices if isinstance(one, str) else type(one) is int and 0 <= one < len(choices)):
                    raise ValueError(f"expected one of {len(choices)} choices, or its position from 0, found {one!r}")

    def _described(
        self,
        fault: tuple[str, Exception],
        row: dict[str, Any],
        others: Sequence[dict[str, Any]],
        columns: Sequence[str],
    ) -> str:
        """What is wrong, with the field: the missing one, or the one that another row's value would mend."""
        part, error = fault
        source = f"{part}: {self.parts[part]!r}" if isinstance(self.parts[part], str) else part
        undefined = re.match(r"'(\w+)' is undefined", str(error))
        missing = undefined[1] if undefined else error.args[0] if isinstance(error, KeyError) and error.args else None
        if missing is not None and missing not in row:
            return f"expected a field {missing!r}, which is missing ({source})"
        names = sorted(self._read_by(part, columns))
        for other in others[:100]:
            if not self._fault(other, columns):
                mended = [name for name in names if not self._fault({**row, name: other.get(name)}, columns)]
                names = mended[:1] or names
                break
        return f"field {' or '.join(map(repr, names))}: {_said(error)} ({source})"


def _parts(config: Any, *others: str) -> dict[str, Any]:
    parts = {name: getattr(config, name) for name in ("doc_to_choice", "doc_to_text", "doc_to_target")}
    parts = {name: source for name, source in parts.items() if source is not None}
    return parts | {name: source for name in others if (source := getattr(config, name))}


@cache
def _names(template: str) -> frozenset[str]:
    return frozenset(jinja2.meta.find_undeclared_variables(_JINJA.parse(template)))


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


# Tasks whose metric executes code


class _SandboxedCodeEval:
    """In the place of the metric `code_eval`, which modules of tasks load, and try out, when they are imported."""

    def __init__(self) -> None:
        self.active = False
        """Whether programs are executed; while tasks are loaded, none is."""

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int], **_: Any
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """pass@k of the programs that consist of a prediction and the tests that are its reference."""
        if not self.active:
            return {}, {}
        shares = dict.fromkeys(k, 0.0)
        for reference, candidates in zip(references, predictions, strict=True):
            passed = sum(one.passed for one in sandbox.run_all(f"{code}\n{reference}" for code in candidates))
            failed = len(candidates) - passed
            for size in k:  # Chen et al. 2021, equation 1
                shares[size] += 1 - math.comb(failed, size) / math.comb(len(candidates), size)
        return {f"pass@{size}": share / len(references) for size, share in shares.items()}, {}


@contextmanager
def _code_evaluated_by(metric: _SandboxedCodeEval) -> Iterator[None]:
    """While it lasts, `evaluate.load` gives tasks `metric`; modules that took it are forgotten, so that lm-eval itself
    imports them anew."""
    load = evaluate.load
    known = set(sys.modules)

    def instead(path: str, *arguments: Any, **settings: Any) -> Any:
        return metric if path == "code_eval" else load(path, *arguments, **settings)

    evaluate.load = instead
    metric.active = False
    try:
        yield
    finally:
        evaluate.load = load
        metric.active = True
        for name in set(sys.modules) - known:
            if any(value is metric for value in list(vars(sys.modules[name]).values())):
                del sys.modules[name]
