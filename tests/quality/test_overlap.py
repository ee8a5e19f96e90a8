"""Overlap: against a plain search for the item's words in the text."""

from __future__ import annotations

import random
import time

import pytest

from spath_eval.quality.overlap import overlaps

DOCUMENT = (
    "It was a bright cold day in April, and the clocks were striking thirteen times; she counted _each_ of them -- "
    "twice! -- and wrote the number down in a book that had been her grandfather's."
)
WORDS = DOCUMENT.split()


def plainly(calibration, items, n):
    """The definition, word by word, for texts that are words between spaces."""

    def stands(words):
        texts = [document.split() for document in calibration]
        return any(words == text[k : k + len(words)] for text in texts for k in range(len(text) - len(words) + 1))

    result = []
    for (text,) in items:
        words = text.split()
        parts = [words[k : k + n] for k in range(len(words) - n + 1)] or [words]
        result.append(any(map(stands, parts)))
    return result


@pytest.mark.parametrize(("n", "words"), [(2, 12), (3, 6), (5, 3)])
def test_overlaps_equal_a_plain_search(n, words):
    generator = random.Random(n)

    def text(longest):
        return " ".join(chr(ord("a") + generator.randrange(words)) for _ in range(generator.randint(1, longest)))

    calibration = [text(30) for _ in range(5)]
    items = [{text(8)} for _ in range(300)]
    expected = plainly(calibration, items, n)
    assert overlaps(iter(calibration), items, n) == expected
    assert 20 < sum(expected) < 280


@pytest.mark.parametrize(("words", "shared"), [(12, False), (13, True), (20, True)])
def test_an_item_overlaps_from_thirteen_shared_words_on(words, shared):
    item = " ".join(["Something", "else", *WORDS[4 : 4 + words], "and", "so", "on"])
    assert overlaps([DOCUMENT], [{item}]) == [shared]


@pytest.mark.parametrize(
    "item",
    [
        DOCUMENT.upper(),
        DOCUMENT.replace(" ", "\n\n"),
        DOCUMENT.replace("'", "’").replace(" -- ", "—").replace("_each_", "“each”"),
        DOCUMENT.replace(",", "").replace(";", " ."),
    ],
    ids=["case", "white space", "typography", "punctuation"],
)
def test_neither_case_nor_white_space_nor_punctuation_hides_a_copy(item):
    assert overlaps([DOCUMENT], [{item}]) == overlaps([item], [{DOCUMENT}]) == [True]


@pytest.mark.parametrize(
    ("item", "shared"), [("Clocks were striking", True), ("clocks are striking", False), ("were striking thirt", False)]
)
def test_a_short_item_overlaps_where_it_stands_whole(item, shared):
    assert overlaps([DOCUMENT], [{item}]) == [shared]


def test_of_a_short_item_the_prompt_with_an_answer_must_stand_there():
    item = {"The capital of France is", "The capital of France is Paris", "The capital of France is Kuala Lumpur"}
    texts = ["The capital of France is not on the sea.", "The capital of France is Paris.", "Paris is the capital."]
    assert [overlaps([text], [item]) for text in texts] == [[False], [True], [False]]


def test_one_long_text_makes_an_item_long():
    long = " ".join(f"number {n}" for n in range(9))
    assert overlaps([DOCUMENT], [{"the clocks were striking", long}, {"the clocks were striking"}]) == [False, True]
    assert overlaps([long], [{"the clocks were striking", long}]) == [True]


def test_a_sum_is_no_sequence_of_numbers():
    assert overlaps(["Go on: 0, 2, 4, 6, 8"], [{"2 + 4 = 6"}]) == [False]
    assert overlaps(["We know that 2 + 4 = 6."], [{"2+4=6"}]) == [True]


def test_no_sequence_crosses_from_one_document_to_the_next():
    halves = [" ".join(WORDS[:10]), " ".join(WORDS[10:20])]
    item = {" ".join(WORDS[4:17])}
    assert overlaps(halves, [item]) == [False]
    assert overlaps([" ".join(halves)], [item]) == [True]


def test_what_has_no_words_overlaps_with_nothing():
    assert overlaps([DOCUMENT, "", "..."], [set(), {""}, {"--", "?!"}]) == [False, False, False]
    assert overlaps([], [{DOCUMENT}, {"clocks"}]) == [False, False]
    assert overlaps([DOCUMENT], []) == []


def test_a_sequence_has_at_least_one_word():
    with pytest.raises(ValueError, match="at least one word, not 0"):
        overlaps([DOCUMENT], [{DOCUMENT}], 0)


def test_a_megabyte_and_thousands_of_items_take_seconds():
    generator = random.Random(0)
    words = [f"word{n}" for n in range(5000)]
    documents = [" ".join(generator.choices(words, k=200)) for _ in range(600)]
    items = [{" ".join(generator.choices(words, k=60))} for _ in range(2000)]
    items[7] = {documents[300][100:500]}
    items[8] = {" ".join(documents[400].split()[50:55])}
    start = time.process_time()
    assert [number for number, found in enumerate(overlaps(documents, items)) if found] == [7, 8]
    assert time.process_time() - start < 10
