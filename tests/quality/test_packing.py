"""A plan computes each target after exactly its context, once, within the budget, and no token oftener than need be."""

from __future__ import annotations

import random

import numpy as np
import pytest

from spath_eval.quality.packing import KEPT, LONE, Costs, Plan, Request

CPU = Costs(budget=1024, row=128, overhead=32.0, pairs=1000.0)
CUDA = Costs(budget=16384, row=512, overhead=4096.0, pairs=3000.0)
COSTS = {
    "cpu": CPU,
    "cuda": CUDA,
    "attention is dear": Costs(budget=64, row=16, overhead=1.0, pairs=4.0),
    "forwards are free": Costs(budget=16, row=16, overhead=0.0, pairs=1e9),
    "forwards are dear": Costs(budget=32, row=8, overhead=1e6, pairs=100.0),
    "chunks": Costs(budget=5, row=3, overhead=0.0, pairs=10.0),
    "one by one": Costs(budget=1, row=1, overhead=0.0, pairs=10.0),
}


def answer(text, count):
    """The request for the last `count` tokens of a text."""
    return Request(tuple(text[:-1]), tuple(text[-count:]))


def run(plan, count):
    """What a model that remembers its whole context is asked for, slot by slot: `(context, target)`.

    The promises that each step makes are checked on the way.
    """
    found = [None] * count
    kept = [()]
    for step in plan.steps:
        assert 0 <= step.level < len(kept)
        del kept[step.level + 1 :]
        before = kept[-1]
        for tree in step.rows:
            contexts = []
            for node, attends in enumerate(tree.ancestors()):
                ancestors = np.flatnonzero(attends)
                assert ancestors[-1] == node
                assert tree.positions[ancestors].tolist() == list(range(len(before), len(before) + len(ancestors)))
                contexts.append(before + tuple(tree.tokens[ancestors].tolist()))
            for node, target, slot in zip(tree.nodes, tree.targets, tree.slots, strict=True):
                assert found[slot] is None, "a slot is written twice"
                found[slot] = (contexts[node], int(target))
        check_size(step, len(before), plan.costs)
        if step.keep:
            (prefix,) = step.rows
            assert contexts[-1] == before + tuple(prefix.tokens.tolist()), "a prefix is a single line"
            kept.append(contexts[-1])
    return found


def check_size(step, before, costs):
    assert all(len(tree) for tree in step.rows)
    if step.plain and len(step.rows) == 1 and step.width > costs.budget:
        assert step.width <= LONE * costs.budget
        return
    assert max(len(tree) for tree in step.rows) <= costs.budget
    assert len(step.rows) * step.width <= max(costs.budget, costs.row)
    assert len(step.rows) == 1 or len(step.rows) * (before + step.width) <= KEPT * costs.budget


def expected(requests):
    """What each slot asks for, from the requests alone."""
    slots = []
    for request in requests:
        start = len(request.tokens) - len(request.targets) + 1
        slots += [(request.tokens[: start + at], target) for at, target in enumerate(request.targets)]
    return slots


def distinct(requests):
    """How many tokens there are to compute, if none is computed twice: the beginnings that differ."""
    return len({request.tokens[:end] for request in requests for end in range(1, len(request.tokens) + 1)})


def random_requests(generator, alphabet, count=25, longest=24):
    """Texts of few tokens, so that beginnings are shared at every depth, some of them texts of their own, or twice."""
    draw = lambda: [generator.randrange(alphabet) for _ in range(generator.randint(2, longest))]  # noqa: E731
    texts = [draw() for _ in range(count)]
    for _ in range(count):
        text = generator.choice(texts)
        end = generator.randint(2, len(text))
        texts.append(text[:end] + (draw() if generator.random() < 0.7 else []))
    texts += [draw() * 5 for _ in range(2)]
    counts = (lambda text: 1, lambda text: len(text) - 1, lambda text: generator.randint(1, len(text) - 1))
    requests = [answer(text, generator.choice(counts)(text)) for text in texts]
    requests += generator.choices(requests, k=5)
    generator.shuffle(requests)
    return requests


@pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS)
@pytest.mark.parametrize("alphabet", [1, 2, 3, 50])
def test_every_target_is_computed_once_after_its_context(costs, alphabet):
    for seed in range(4):
        requests = random_requests(random.Random(seed), alphabet)
        plan = Plan(requests, costs)
        slots = expected(requests)
        assert plan.offsets.tolist() == np.cumsum([0, *(len(request.targets) for request in requests)]).tolist()
        assert run(plan, len(slots)) == slots
        assert plan.computed >= distinct(requests)


@pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS)
def test_a_plan_does_not_depend_on_the_order_of_the_requests(costs):
    requests = random_requests(random.Random(7), alphabet=2)
    shuffled = random.Random(8).sample(requests, len(requests))

    def shape(plan):
        return [
            (step.level, step.keep, [(tree.tokens.tolist(), tree.branches) for tree in step.rows])
            for step in plan.steps
        ]

    assert shape(Plan(shuffled, costs)) == shape(Plan(requests, costs))


@pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS)
def test_what_is_asked_twice_is_computed_once(costs):
    requests = random_requests(random.Random(3), alphabet=3)
    twice = Plan(requests + requests, costs)
    assert twice.computed == Plan(requests, costs).computed
    assert run(twice, twice.offsets[-1]) == expected(requests + requests)


def multiple_choice(questions, header=100, question=60, choices=((1,), (2,), (3,), (4,))):
    """Questions behind one header, of `question` tokens each, with the same choices."""
    generator = random.Random(0)
    begin = [generator.randrange(10, 10_000) for _ in range(header)]
    texts = [begin + [generator.randrange(10, 10_000) for _ in range(question)] for _ in range(questions)]
    return [answer(text + list(choice), len(choice)) for text in texts for choice in choices]


@pytest.mark.parametrize("questions", [1, 5, 12, 40])
@pytest.mark.parametrize("costs", [CPU, CUDA], ids=["cpu", "cuda"])
def test_a_subject_with_one_token_choices_is_computed_as_if_it_were_one_text(costs, questions):
    requests = multiple_choice(questions)
    assert Plan(requests, costs).computed == distinct(requests) == 100 + 60 * questions


@pytest.mark.parametrize("questions", [5, 40])
def test_long_choices_share_their_question_and_the_header(questions):
    choices = tuple(tuple(range(start, start + 9)) for start in (20, 40, 60))
    requests = multiple_choice(questions, choices=choices)
    assert Plan(requests, CPU).computed == distinct(requests) == 100 + questions * (60 + 3 * 8)


def test_a_long_prefix_is_kept_where_its_texts_do_not_fit_in_one_forward():
    requests = multiple_choice(40, header=900)
    steps = Plan(requests, CPU).steps
    assert [(step.keep, step.level, step.width) for step in steps if step.keep] == [(True, 0, 900)]
    assert all(step.level == 1 for step in steps if not step.keep)


def test_prefixes_are_kept_within_prefixes():
    """Subjects behind common instructions: both are computed once, though each subject exceeds the budget."""
    costs = Costs(budget=64, row=8, overhead=2.0, pairs=64.0)
    instructions = tuple(range(1000, 1056))
    requests = []
    for subject in range(3):
        header = instructions + tuple(range(2000 + 100 * subject, 2050 + 100 * subject))
        requests += [Request((*header, *range(10 * question, 10 * question + 5)), (1,)) for question in range(25)]
    plan = Plan(requests, costs)
    assert run(plan, len(requests)) == expected(requests)
    assert [step.level for step in plan.steps if step.keep] == [0, 1, 1, 1]
    assert plan.computed == distinct(requests) == 56 + 3 * (50 + 25 * 5)


def test_texts_that_share_next_to_nothing_stand_side_by_side():
    """A shared BOS token is not worth a forward, and short texts fill the rows."""
    generator = random.Random(0)
    texts = [(2, *(generator.randrange(10, 10_000) for _ in range(generator.randint(15, 40)))) for _ in range(25)]
    requests = [Request(text, (5,)) for text in texts]
    plan = Plan(requests, CPU)
    assert not any(step.keep for step in plan.steps)
    assert plan.computed <= distinct(requests) + len(texts)
    room = sum(len(step.rows) * step.width for step in plan.steps)
    assert room <= 1.1 * plan.computed, "rows are filled up"
    assert len(plan.steps) <= 1 + room // CPU.budget


@pytest.mark.parametrize("length", [16, 17, 16 * LONE])
def test_a_lone_text_is_computed_in_one_forward_even_beyond_the_budget(length):
    (step,) = Plan([answer(range(length + 1), length)], COSTS["forwards are free"]).steps
    assert step.plain


@pytest.mark.parametrize("length", [16 * LONE + 1, 300])
def test_a_text_far_beyond_the_budget_is_computed_piece_by_piece(length):
    request = answer(range(length + 1), length)
    plan = Plan([request], COSTS["forwards are free"])
    assert plan.computed == length
    assert len(plan.steps) == -(-length // 16)
    assert [step.level for step in plan.steps] == list(range(len(plan.steps)))
    assert run(plan, length) == expected([request])


def test_a_kept_prefix_bounds_the_rows_that_go_on_from_it():
    """The keys and values of a row are its prefix's as well."""
    costs = Costs(budget=64, row=1, overhead=0.0, pairs=1e9)
    requests = [Request((*range(60), 100 + end), (1,)) for end in range(64)]
    plan = Plan(requests, costs)
    assert run(plan, len(requests)) == expected(requests)
    assert max(len(step.rows) for step in plan.steps) == KEPT * costs.budget // 61


def test_nothing_is_planned_for_nothing():
    plan = Plan([], CPU)
    assert plan.steps == []
    assert plan.computed == 0
    assert plan.offsets.tolist() == [0]
