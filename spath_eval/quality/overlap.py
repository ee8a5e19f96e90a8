"""Overlap: which evaluated items stand in the calibration text.

The test is the one by which GPT-3's benchmarks were cleaned (Brown et al., "Language Models are Few-Shot Learners",
2020, section 4 and appendix C): an item overlaps where it shares a sequence of 13 words with the text, and where it
stands in it whole if it is shorter than that. Words are compared in lower case and without punctuation, so that other
quotation marks, hyphens or line breaks hide nothing. A shared sequence need not be a copied item: two programs that
count from 1 to 13 share one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

WORD = re.compile(r"[^\W_]+|[+=]")
"""A run of letters and digits, or a sign without which a sum would be any list of its numbers. The rest is punctuation,
the underscores of emphasis among it."""


def overlaps(calibration: Iterable[str], items: Sequence[Collection[str]], n: int = 13) -> list[bool]:
    """For each item, whether `calibration`, the documents, holds a sequence of `n` words of one of the item's texts.

    An item without a text of `n` words overlaps where a document holds one of its texts whole, those apart that are
    part of another one: of a prompt, and the prompt with its answer, the latter must stand there. No sequence crosses
    from one document to the next, for the model reads them apart.

    A text must be the item's own: a prompt's examples are other items, often of a split that is calibrated on, and
    cannot be told from the item here. The caller leaves them out, as by the prompt without examples and the document's
    fields. Sequences are compared by 64-bit hashes. Raises `ValueError` where `n` is not positive.
    """
    if n < 1:
        raise ValueError(f"a sequence has at least one word, not {n}")
    lengths: set[int] = set()
    sequences: list[set[int]] = []
    for texts in items:
        own = {_words(text) for text in texts} - {()}
        if any(len(words) >= n for words in own):
            lengths.add(n)
            sequences.append({key for words in own for key in _keys(words, n)})
        else:
            own = _not_part_of_another(own)
            lengths.update(map(len, own))
            sequences.append({hash(words) for words in own})
    wanted = set().union(*sequences)
    found: set[int] = set()
    for document in calibration:
        words = _words(document)
        for length in lengths:
            found.update(wanted.intersection(_keys(words, length)))
    return [not found.isdisjoint(keys) for keys in sequences]


def _words(text: str) -> tuple[str, ...]:
    return tuple(WORD.findall(text.lower()))


def _keys(words: tuple[str, ...], n: int) -> Iterator[int]:
    """The hashes of all sequences of `n` words."""
    return (hash(words[start : start + n]) for start in range(len(words) - n + 1))


def _not_part_of_another(texts: set[tuple[str, ...]]) -> set[tuple[str, ...]]:
    spaced = {words: f" {' '.join(words)} " for words in texts}
    return {
        words
        for words, text in spaced.items()
        if not any(text in other for longer, other in spaced.items() if longer != words)
    }
