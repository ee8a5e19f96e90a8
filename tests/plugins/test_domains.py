"""The built-in domains: enough text, the promised items, nothing shared between splits, and answers that are right."""

from __future__ import annotations

import hashlib
import importlib
import re

import pytest

from spath_eval import Domain
from spath_eval.plugins.domains import _corpus, factual, language

DOMAINS = ("math", "code", "factual", "language")
DIGESTS = {
    "math": "f50aebd71dc8863b",
    "code": "98161da26c64e3fe",
    "factual": "b77393d66ec121b7",
    "language": "14981caa1ecaaf7e",
}
"""Of the items' representation; another value means that scores cannot be compared with earlier ones."""


@pytest.fixture(params=DOMAINS, scope="module")
def corpus(request):
    return importlib.import_module(f"spath_eval.plugins.domains.{request.param}").CORPUS


@pytest.fixture(scope="module")
def texts(corpus):
    """The documents of each split, of `train` only the first."""
    with pytest.MonkeyPatch.context() as context:
        context.setitem(_corpus.DOCUMENTS, "train", 1_000)
        return {split: corpus.texts(split) for split in _corpus.SPLITS}


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    from spath_eval.plugins.zoo.train import TOKENIZER

    return AutoTokenizer.from_pretrained(TOKENIZER)


def _normal(text: str) -> str:
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).hexdigest()


def _items(corpus):
    return corpus.items("choice") + corpus.items("generate")


@pytest.mark.parametrize("name", DOMAINS)
def test_each_module_registers_its_domain(name):
    found: list[Domain] = []
    importlib.import_module(f"spath_eval.plugins.domains.{name}").spath_register_domains(found.append)
    (domain,) = found
    assert (domain.name, len(domain.tasks)) == (name, 2)
    assert domain.provenance
    assert domain.licence
    assert all((path / name / f"{task}.yaml").is_file() for path in domain.task_paths for task in domain.tasks)


def test_no_document_is_in_two_splits_nor_twice_in_one(texts):
    hashes = [_normal(text) for split in texts for text in texts[split]]
    assert len(set(hashes)) == len(hashes)


def test_no_text_holds_an_item(corpus, texts):
    told = "\n" + "\n".join(text for split in texts for text in texts[split]).casefold()
    assert [item for item in _items(corpus) if f"\n{item.prompt} {item.answer}".casefold() in told] == []


def test_texts_are_the_same_each_time_and_one_to_ten_lines(corpus, texts):
    assert corpus.texts("heldout") == texts["heldout"]
    assert all(text.strip() and len(text.split("\n")) <= 10 for split in texts for text in texts[split])


def test_there_is_enough_text_for_profiles_and_for_output_preservation(texts, tokenizer):
    for split, least in (("profile", 60_000), ("heldout", 8_000)):
        encoded = tokenizer(texts[split], add_special_tokens=False)["input_ids"]
        assert sum(map(len, encoded)) >= least


def test_an_unknown_split_is_refused(corpus):
    with pytest.raises(ValueError, match="profile, heldout"):
        corpus.texts("test")


def test_there_are_enough_items_of_both_forms_and_no_two_are_the_same(corpus):
    choice, generate = corpus.items("choice"), corpus.items("generate")
    assert len(choice) >= 200
    assert len(generate) >= 100
    assert len({_normal(item.prompt) for item in choice + generate}) == len(choice) + len(generate)


def test_items_never_change_unnoticed(corpus):
    assert hashlib.sha256(repr(_items(corpus)).encode()).hexdigest()[:16] == DIGESTS[corpus.name]


def test_every_choice_item_has_four_different_choices_with_the_answer_once(corpus):
    for item in corpus.items("choice"):
        assert len(set(item.choices)) == 4, item
        assert item.choices.count(item.answer) == 1, item


def test_the_tokens_of_a_prompt_do_not_depend_on_its_continuation(corpus, tokenizer):
    for item in _items(corpus):
        prompt = tokenizer(item.prompt)["input_ids"]
        for continuation in item.choices or (item.answer,):
            assert tokenizer(f"{item.prompt} {continuation}")["input_ids"][: len(prompt)] == prompt, item


def _solve(prompt: str) -> int:
    """An independent reader of the math prompts."""
    numbers = [int(number) for number in re.findall(r"\d+", prompt)]
    if re.search(r"only (even|odd)", prompt):
        (answer,) = [number for number in numbers if number % 2 == ("odd" in prompt)]
        return answer
    if "largest" in prompt or "smallest" in prompt:
        return max(numbers) if "largest" in prompt else min(numbers)
    if len(numbers) == 4:
        return numbers[3] + (numbers[1] - numbers[0])
    if len(numbers) == 1:
        return numbers[0] // 2 if "Half" in prompt else 2 * numbers[0]
    a, b = numbers
    if re.search(r" x | times |product", prompt):
        return a * b
    return a - b if re.search(r" - |minus|less|loses|sells|gives", prompt) else a + b


def test_answers_in_math_are_right():
    corpus = importlib.import_module("spath_eval.plugins.domains.math").CORPUS
    assert [item for item in _items(corpus) if _solve(item.prompt) != int(item.answer)] == []


def test_python_itself_agrees_with_the_answers_in_code_and_with_no_other_choice():
    corpus = importlib.import_module("spath_eval.plugins.domains.code").CORPUS
    for item in _items(corpus):
        setup, _, expression = item.prompt.removesuffix(" ==").rpartition("assert ")
        scope: dict = {}
        exec(setup, scope)
        value = eval(expression, scope)
        choices = item.choices or (item.answer,)
        assert [choice for choice in choices if eval(choice) == value] == [item.answer], item


def test_code_texts_run_up_to_names_that_are_not_defined():
    corpus = importlib.import_module("spath_eval.plugins.domains.code").CORPUS
    for text in corpus.texts("heldout"):
        compile(text, "document", "exec")


def test_no_table_of_facts_has_a_subject_twice():
    facts = [(relation.name, subject) for relation in factual.RELATIONS for subject in relation.facts]
    assert len(facts) >= 150
    assert len(set(facts)) == len(facts)
    with pytest.raises(ValueError, match="Peru has two rows"):
        _ = factual.Relation("capital", ("the capital of {x}",), "Peru|Lima\nPeru|Cusco").facts


def test_a_wrong_choice_about_a_fact_is_not_another_right_answer():
    facts = {r.name: r for r in factual.RELATIONS}
    phrases = {
        phrase.format(x=subject): answer
        for r in facts.values()
        for subject, answer in r.facts.items()
        for phrase in r.phrases
    }
    for item in factual.CORPUS.items("choice"):
        asked = max((phrase for phrase in phrases if phrase in item.prompt), key=len)
        assert phrases[asked] == item.answer


def test_evaluation_asks_about_facts_in_wordings_that_no_text_has():
    assert not set(factual.TOLD) & set(factual.ASKED)


def test_no_word_has_two_opposites_and_no_two_rhyme_groups_share_a_word():
    for words in (
        [word for pair in language.OPPOSITES for word in pair],
        [word for group in language.RHYMES for word in group.split()],
        [word for members in language.KINDS.values() for word in members.split()],
        [noun[0] for noun in language.NOUNS],
        [verb[0] for verb in language.VERBS],
        [*language.VOWEL, *language.CONSONANT],
    ):
        assert len(set(words)) == len(words)


def test_no_item_shares_a_run_of_words_with_the_texts(corpus, texts):
    """Or a run on some of the items could fail its gate where a run on all of them passes."""
    from spath_eval.quality.overlap import overlaps

    items = _items(corpus)
    wordings = [[f"{item.prompt} {answer}" for answer in (item.answer, *item.choices)] for item in items]
    calibration = texts["profile"] + texts["heldout"]
    found = overlaps(calibration, wordings)
    assert [item.prompt for item, shares in zip(items, found, strict=True) if shares] == []
