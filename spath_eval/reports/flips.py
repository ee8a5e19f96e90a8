"""Flips: documents whose score a pathway changed, with what both arms answered, read from the samples beside a record.

A metric of a whole corpus (a perplexity) has none: there every document differs a little.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spath_eval.reports.matrices import Case, evaluated_on

LONGEST = 1_500
"""Characters of a text that are shown; of a longer one the middle is left out."""
CORPUS_METRICS = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
Sample = Mapping[str, Any]
Key = tuple[str, str, str, str, str]
"""Case, task, filter, and number and hash of the document."""


class _Unreadable(Exception):
    """Why the samples say nothing."""


def with_flips(record: Mapping[str, Any], folder: Path, most: int) -> dict[str, Any]:
    """`record`, of a file in `folder`, with `flips` beside its own fields.

    They map the id of a case to entries `{task, metric, filter, lost, gained, documents}`, one for each of the case's
    metrics in which a document got worse or better. Of these `documents` the first `most` are there, in document order:
    `{doc_id, prompt, target, change: lost|gained, dense{answer, score}, sparse{answer, score}}`; `read_as` beside an
    answer is what the task took from it, where that is not all of it. Null with `flips_reason` where the samples are
    absent, or are not those that the record was written with.
    """
    try:
        return {**record, "flips": _flips(record.get("cases", []), folder, most)}
    except _Unreadable as error:
        reason = str(error)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        reason = f"a row of the samples is not as expected: {type(error).__name__}: {error}"
    return {**record, "flips": None, "flips_reason": reason}


def _flips(cases: Sequence[Case], folder: Path, most: int) -> dict[str, list[dict[str, Any]]]:
    scored = [case for case in cases if case.get("quality")]
    files = {case["samples"]["path"]: case["samples"]["sha256"] for case in scored if case.get("samples")}
    if not files:
        raise _Unreadable("no case has a samples file" if scored else "no task was scored")
    names = {f"{case['model']}/{evaluated_on(case)}/dense" for case in scored}
    dense = {_key(row): row for path, digest in files.items() for row in _rows(folder / path, names, digest)}
    by_id = {case["id"]: case for case in scored}
    found: dict[str, list[dict[str, Any]]] = {
        case["id"]: [
            {name: entry[name] for name in ("task", "metric", "filter")} | {"lost": 0, "gained": 0, "documents": []}
            for entry in case["quality"]
        ]
        for case in scored
    }
    for path in files:
        for row in _rows(folder / path, by_id.keys()):
            case = by_id[row["case"]]
            before = dense.get((f"{case['model']}/{evaluated_on(case)}/dense", *_key(row)[1:]))
            for quality, entry in zip(case["quality"], found[case["id"]], strict=True):
                if before and (entry["task"], entry["filter"]) == (row["task"], row["filter"]):
                    _add(entry, before, row, quality["higher_is_better"], most)
    kept = {name: [entry for entry in entries if entry["lost"] + entry["gained"]] for name, entries in found.items()}
    return {name: entries for name, entries in kept.items() if entries}


def _rows(path: Path, cases: Container[str], digest: str | None = None) -> Iterator[Sample]:
    """The documents of `cases` in a samples file, which must have `digest` where that is given."""
    if not path.is_file():
        raise _Unreadable(f"there is no samples file {path.name} beside the record")
    content = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for line in file:
                content.update(line)
                row = json.loads(line)
                if "task" in row and row["case"] in cases:
                    yield row
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _Unreadable(f"the samples file {path.name} cannot be read: {error}") from error
    if digest is not None and content.hexdigest() != digest:
        raise _Unreadable(f"the samples file {path.name} is not the one that the record was written with")


def _key(row: Sample) -> Key:
    return row["case"], row["task"], row["filter"], str(row["doc_id"]), row["doc_hash"]


def _add(entry: dict[str, Any], before: Sample, after: Sample, higher_is_better: bool, most: int) -> None:
    """Count the document in `entry` where its score changed, and describe it where there is room."""
    metric = entry["metric"]
    first, second = before.get(metric), after.get(metric)
    if metric in CORPUS_METRICS or not isinstance(first, int | float) or not isinstance(second, int | float):
        return
    if first == second:
        return
    change = "gained" if (second > first) == higher_is_better else "lost"
    entry[change] += 1
    if len(entry["documents"]) < most:
        prompt, target = _asked(before)
        entry["documents"].append(
            {
                "doc_id": before["doc_id"],
                "prompt": prompt,
                "target": target,
                "change": change,
                "dense": _answer(before, metric) | {"score": first},
                "sparse": _answer(after, metric) | {"score": second},
            }
        )


def _asked(row: Sample) -> tuple[str, str]:
    """The prompt, and the right answer."""
    contexts = [str(arguments[0]) for arguments in row["arguments"]]
    choices, target = _choices(row), row["target"]
    targets = target if isinstance(target, list) else [target]
    if choices:
        targets = [choices[one] if isinstance(one, int) and 0 <= one < len(choices) else one for one in targets]
    return _shortened(contexts[0][: _shared(contexts)]), _shortened(" | ".join(map(str, targets)))


def _choices(row: Sample) -> list[str]:
    """What could be chosen: what follows that which all prompts begin with; nothing where text was generated."""
    arguments = row["arguments"]
    if not all(isinstance(one, list) and len(one) > 1 and isinstance(one[1], str) for one in arguments):
        return []
    shared = _shared([one[0] for one in arguments])
    return [one[0][shared:] + one[1] for one in arguments]


def _shared(texts: Sequence[str]) -> int:
    """How many characters all of them begin with."""
    first, last = min(texts), max(texts)
    pairs = zip(first, last, strict=False)
    return next((index for index, (one, other) in enumerate(pairs) if one != other), min(len(first), len(last)))


def _answer(row: Sample, metric: str) -> dict[str, Any]:
    """The likeliest choice (by character, where the metric says so), or the text that was generated."""
    responses, choices = row["filtered_resps"], _choices(row)
    if not choices:
        said, read_as = str(row["resps"][0][0]), str(responses[0])
        same = said.strip() == read_as.strip()
        return {"answer": _shortened(said)} | ({} if same else {"read_as": _shortened(read_as)})
    likelihoods = [response[0] for response in responses]
    if metric == "acc_norm":
        lengths = [len(one[1].lstrip()) for one in row["arguments"]]
        likelihoods = [likelihood / max(1, length) for likelihood, length in zip(likelihoods, lengths, strict=True)]
    return {"answer": _shortened(choices[max(range(len(likelihoods)), key=likelihoods.__getitem__)])}


def _shortened(text: str) -> str:
    """`text` with its middle left out where it is too long; of a prompt the end says what is asked."""
    if len(text) <= LONGEST:
        return text
    head, tail = text[: LONGEST // 3], text[LONGEST // 3 - LONGEST :]
    return f"{head}\n[... {len(text) - LONGEST:,} characters left out ...]\n{tail}"
