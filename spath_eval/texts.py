"""Text for profiling and for output preservation: documents, their split, and batches of their tokens.

A document is a block between blank lines, of a file or of a dataset's row. Documents are put in the order of their
hashes, so that a token budget draws from all of a corpus and the choice does not depend on file names. Padding and the
BOS token are marked, since statistics that count them are wrong: in many models BOS activations are hundreds of times
larger than others.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from spath_eval.contracts import UsageError
from spath_eval.models import bos_token_id

SUFFIXES = {".txt", ".md", ".tex", ".py"}
MAX_DOCUMENT = 4000
"""Characters beyond which a document is cut at the next line end."""
WINDOW = 512
"""Tokens beyond which a document continues in a new row."""
HELD_OUT = 5
"""One document in so many is held out from the profile, for output preservation."""
HUB = "hub:"
"""Begins a text that is read from the hub."""
HUB_DOCUMENTS = 20_000
"""Documents that are read from the hub at most: the first ones."""


@dataclass(frozen=True)
class Corpus:
    """A domain's text, split."""

    profile: tuple[str, ...]
    heldout: tuple[str, ...]
    source: str
    """Where it comes from, for the record."""


@dataclass(frozen=True)
class Batch:
    """Right-padded rows of tokens."""

    input_ids: torch.Tensor
    """`[rows, tokens]`."""
    attention_mask: torch.Tensor
    """1 where there is a token, 0 where there is padding; `[rows, tokens]`."""
    counted: torch.Tensor
    """True for the text's own tokens: neither padding nor BOS; `[rows, tokens]`."""
    documents: tuple[int, ...]
    """For each row, the number of its document."""

    def inputs(self, device: torch.device) -> dict[str, torch.Tensor]:
        """What the model's forward takes."""
        return {"input_ids": self.input_ids.to(device), "attention_mask": self.attention_mask.to(device)}


def digest(text: str) -> str:
    """SHA-256 of a text without regard to white space."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def digest_all(documents: Iterable[str]) -> str:
    """SHA-256 of a sequence of documents."""
    return hashlib.sha256("".join(digest(document) for document in documents).encode()).hexdigest()


def read_corpus(source: Path | str) -> Corpus:
    """The documents of a file, a folder or a dataset of the hub, split 80/20 by their hashes.

    A dataset is written `hub:DATASET:SPLIT:FIELD`, or `hub:DATASET,CONFIG:SPLIT:FIELD`. Of the split's rows the field
    is read, each row as a file, up to 20,000 documents. Raises `UsageError` where there are none.
    """
    if isinstance(source, str) and source.startswith(HUB):
        return _split(*_read_hub(source))
    return _split(_read_files(Path(source)), str(source))


def _read_files(path: Path) -> list[str]:
    if path.is_dir():
        files = sorted(
            file
            for file in path.rglob("*")
            if file.suffix in SUFFIXES and file.is_file() and "LICENSE" not in file.name
        )
    elif path.is_file():
        files = [path]
    else:
        raise UsageError(f"profile text {path}: no such file or folder")
    documents: list[str] = []
    for file in files:
        try:
            documents += blocks(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"profile text {file}: {error}") from error
    if not documents:
        raise UsageError(f"profile text {path}: it holds no text (read: {', '.join(sorted(SUFFIXES))})")
    return documents


def _read_hub(spec: str) -> tuple[list[str], str]:
    """The documents, and where they come from, with the revision where the hub tells one."""
    try:
        name, split, text = spec.removeprefix(HUB).split(":")
    except ValueError:
        name = split = text = ""
    if not (name and split and text):
        raise UsageError(f"profile text {spec!r}: expected {HUB}DATASET:SPLIT:FIELD or {HUB}DATASET,CONFIG:SPLIT:FIELD")
    dataset, _, config = name.partition(",")
    import datasets

    try:
        builder = datasets.load_dataset_builder(dataset, config or None)
        rows = builder.as_streaming_dataset(split=split)
        columns = rows.column_names or list(next(iter(rows), {text: None}))
        if text not in columns:
            raise UsageError(f"its rows have no field {text!r}: they have {', '.join(columns)}")
        texts = (_text_of(row[text], text) for row in rows.select_columns(text))
        found = itertools.chain.from_iterable(map(blocks, texts))
        documents = list(itertools.islice(found, HUB_DOCUMENTS))
    except Exception as error:  # the library lets through what its many readers and clients raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"profile text {spec}: {reason}") from error
    if not documents:
        raise UsageError(f"profile text {spec}: it holds no text")
    source = spec
    if revision := re.search(r"@([0-9a-f]{40})", builder.base_path or ""):
        source += f" at revision {revision[1]}"
    if len(documents) == HUB_DOCUMENTS:
        source += f", the first {HUB_DOCUMENTS} documents"
    return documents, source


def _text_of(value: object, field: str) -> str:
    if value is not None and not isinstance(value, str):
        raise UsageError(f"its field {field!r} holds no text but {type(value).__name__}")
    return value or ""


def _split(documents: Iterable[str], source: str) -> Corpus:
    ordered = in_hash_order(documents)
    heldout = tuple(document for document in ordered if int(digest(document), 16) % HELD_OUT == 0)
    profile = tuple(document for document in ordered if int(digest(document), 16) % HELD_OUT)
    if not profile:
        raise UsageError(
            f"profile text {source}: its {len(ordered)} documents leave none to profile; blank lines part documents"
        )
    return Corpus(profile, heldout, source)


def blocks(text: str) -> list[str]:
    """The documents of a text: blocks between blank lines, cut at the line end beyond 4,000 characters."""
    documents: list[str] = []
    current: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            current.append(line)
        if current and (not line.strip() or sum(map(len, current)) > MAX_DOCUMENT):
            documents.append("\n".join(current))
            current = []
    return documents


def in_hash_order(documents: Iterable[str]) -> list[str]:
    """Each distinct, non-empty document once, in the order of the hashes."""
    return [text for _, text in sorted({digest(text): text for text in documents if text.strip()}.items())]


def batches(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], *, tokens: int, batch_size: int, window: int = WINDOW
) -> Iterator[Batch]:
    """Batches that hold the first `tokens` counted tokens of `documents`, rows of at most `window` tokens.

    Only a few batches' rows are held at a time; within them rows are sorted by length, so that little is padded.
    """
    bos = bos_token_id(tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    rows: list[tuple[int, list[int]]] = []
    for row in _rows(tokenizer, documents, tokens, window, bos):
        rows.append(row)
        if len(rows) == 16 * batch_size:
            yield from _padded(rows, batch_size, bos, pad)
            rows = []
    yield from _padded(rows, batch_size, bos, pad)


def _rows(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], tokens: int, window: int, bos: int | None
) -> Iterator[tuple[int, list[int]]]:
    prefix = [] if bos is None else [bos]
    body = window - len(prefix)
    for number, document in enumerate(documents):
        encoded = tokenizer(document, add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids = encoded.input_ids[:tokens]
        tokens -= len(ids)
        for start in range(0, len(ids), body):
            yield number, prefix + ids[start : start + body]
        if tokens <= 0:
            return


def _padded(rows: list[tuple[int, list[int]]], batch_size: int, bos: int | None, pad: int) -> Iterator[Batch]:
    rows = sorted(rows, key=lambda row: len(row[1]))
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        longest = max(len(ids) for _, ids in chunk)
        input_ids = torch.tensor([ids + [pad] * (longest - len(ids)) for _, ids in chunk])
        attention_mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for _, ids in chunk])
        counted = attention_mask.bool()
        if bos is not None:
            counted[:, 0] = False
        yield Batch(input_ids, attention_mask, counted, tuple(number for number, _ in chunk))
