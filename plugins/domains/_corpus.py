"""How the built-in domains make texts and evaluation items out of exercises.

A domain is a list of kinds of exercise, each a function of a random generator. An exercise is reserved for evaluation
or free for texts, and it says so itself: by the hash of what was sampled, or by its wording. Texts are built of free
ones only, items of reserved ones only, so the two cannot overlap. A document belongs to the split that its own hash
names, so no document is in two splits, whatever the sizes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random

SPLITS = {"train": (0, 1, 2, 3), "profile": (4, 5), "heldout": (6, 7)}
"""Which eighths of all documents a split consists of."""
DOCUMENTS = {"train": 30_000, "profile": 1_600, "heldout": 400}
"""How many documents `texts` returns."""
RESERVED_SHARE = 8
"""One in so many sampled instances is reserved for evaluation."""
CHOICES = 4
START, END = "\x02", "\x03"
"""What encloses answers in `Corpus.marked`; no text has these characters."""
LINES = 10
"""A document has at most so many lines."""


@dataclass(frozen=True)
class Exercise:
    """A prompt with its one right answer; `prompt + " " + answer + tail` reads as a line of text (or a few)."""

    prompt: str
    answer: str
    wrong: tuple[str, ...]
    """At least three other answers, all of them wrong; may be empty where only a text is meant."""
    reserved: bool
    """Whether it is for evaluation only."""
    tail: str = ""

    @property
    def marked(self) -> str:
        """The line of text, with marks around all that follows the prompt."""
        return f"{self.prompt}{START} {self.answer}{self.tail}{END}"


@dataclass(frozen=True)
class Item:
    """An evaluation item: multiple choice, or, without choices, generation up to the end of the line."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()


Kind = Callable[[Random], Exercise]


def plain(document: str) -> str:
    """A marked document without its marks."""
    return document.replace(START, "").replace(END, "")


def bucket(text: str, buckets: int) -> int:
    """The number below `buckets` that the SHA-256 of `text` names, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % buckets


def reserve(*instance: object) -> bool:
    """Whether a sampled instance is reserved for evaluation, decided by its hash."""
    return bucket(repr(instance), RESERVED_SHARE) == 0


def other(rng: Random, options: Sequence[str], answer: str) -> tuple[str, ...]:
    """Three wrong answers drawn from `options`."""
    return tuple(rng.sample(sorted(set(options) - {answer}), CHOICES - 1))


@dataclass(frozen=True)
class Corpus:
    """Texts and items of a domain."""

    name: str
    choice: tuple[Kind, ...]
    """Kinds of which multiple-choice items are made (and texts)."""
    generate: tuple[Kind, ...]
    """Kinds of which generation items are made (and texts)."""
    prose: tuple[Callable[[Random], Exercise | str], ...] = ()
    """Further passages that only texts contain."""
    exercises: tuple[int, int] = (2, 6)
    """The least and the most exercises in a document."""
    choice_items: int = 200
    generation_items: int = 120

    @cached_property
    def _kinds(self) -> tuple[Kind, ...]:
        return tuple(dict.fromkeys(self.choice + self.generate))

    def texts(self, split: str) -> list[str]:
        """The documents of `train`, `profile` or `heldout`, always the same ones.

        Raises `ValueError` for another split.
        """
        return [plain(document) for document in self.marked(split)]

    def marked(self, split: str) -> list[str]:
        """The same documents with marks around the answers in them, for training that weighs answers more."""
        if split not in SPLITS:
            raise ValueError(f"domain {self.name} has no split {split!r}; there are {', '.join(SPLITS)}")
        rng = Random(f"{self.name} {split}")
        documents: dict[str, None] = {}
        while len(documents) < DOCUMENTS[split]:
            document = self._document(rng)
            if bucket(plain(document).casefold(), 8) in SPLITS[split]:
                documents[document] = None
        return list(documents)

    def _document(self, rng: Random) -> str:
        lines: list[str] = []
        for _ in range(rng.randint(*self.exercises)):
            passage = self._passage(rng).split("\n")
            if len(lines) + len(passage) <= LINES:
                lines += passage
        return "\n".join(lines)

    def _passage(self, rng: Random) -> str:
        position = rng.randrange(len(self._kinds) + len(self.prose))
        if position < len(self._kinds):
            return _draw(rng, self._kinds[position], reserved=False).marked
        passage = self.prose[position - len(self._kinds)](rng)
        return passage if isinstance(passage, str) else passage.marked

    def items(self, form: str) -> list[Item]:
        """The evaluation items of the form `choice` or `generate`, always the same ones; no two share a prompt."""
        choice = self._items(self.choice, self.choice_items, set())
        if form == "choice":
            return [_with_choices(exercise) for exercise in choice]
        prompts = {exercise.prompt for exercise in choice}
        generation = self._items(self.generate, self.generation_items, prompts)
        return [Item(exercise.prompt, exercise.answer) for exercise in generation]

    def _items(self, kinds: tuple[Kind, ...], count: int, taken: set[str]) -> list[Exercise]:
        rng = Random(f"{self.name} items")
        prompts = set(taken)
        found: list[Exercise] = []
        kind = 0
        while len(found) < count:
            exercise = _draw(rng, kinds[kind % len(kinds)], reserved=True)
            kind += 1
            if exercise.prompt not in prompts:
                prompts.add(exercise.prompt)
                found.append(exercise)
        return found


def _draw(rng: Random, kind: Kind, *, reserved: bool) -> Exercise:
    while True:
        exercise = kind(rng)
        if exercise.reserved == reserved:
            return exercise


def _with_choices(exercise: Exercise) -> Item:
    rng = Random(exercise.prompt)
    choices = [exercise.answer, *rng.sample(sorted(set(exercise.wrong)), CHOICES - 1)]
    rng.shuffle(choices)
    return Item(exercise.prompt, exercise.answer, tuple(choices))
