"""Arithmetic as a domain: sums, differences, products, sequences, comparisons and word problems with small numbers.

An instance is an operation with its operands. One in eight is reserved for evaluation, in whatever words it is put, so
a right answer there is computed and not remembered.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import spath_eval.tasks
from spath_eval import Domain, hookimpl
from spath_eval.plugins.domains._corpus import Corpus, Exercise, reserve

NAMES = ("Tom", "Ann", "Ben", "Eva", "Max", "Lucy", "Paul", "Nora", "Sam", "Ida")
THINGS = ("apples", "marbles", "coins", "cards", "stamps", "pencils", "shells", "nuts", "buttons", "books")


def _near(rng: Random, answer: int) -> tuple[str, ...]:
    """Three numbers that a slip or a bad guess would give."""
    slips = [answer + slip for slip in (-20, -11, -10, -5, -2, -1, 1, 2, 5, 10, 11, 20) if answer + slip >= 0]
    return tuple(str(slip) for slip in rng.sample(slips, 3))


def _operand(rng: Random, limit: int) -> int:
    """A number below `limit`, half of the time one with a single digit."""
    return rng.randrange(10) if rng.random() < 0.5 else rng.randrange(limit)


def add(rng: Random) -> Exercise:
    a, b = _operand(rng, 30), _operand(rng, 30)
    prompt = rng.choice(("{a} + {b} =", "{a} plus {b} is", "The sum of {a} and {b} is")).format(a=a, b=b)
    return Exercise(prompt, str(a + b), _near(rng, a + b), reserve("+", a, b))


def subtract(rng: Random) -> Exercise:
    a, b = sorted((_operand(rng, 40), _operand(rng, 40)), reverse=True)
    prompt = rng.choice(("{a} - {b} =", "{a} minus {b} is", "{a} less {b} leaves")).format(a=a, b=b)
    return Exercise(prompt, str(a - b), _near(rng, a - b), reserve("-", a, b))


def multiply(rng: Random) -> Exercise:
    a, b = rng.randrange(1, 11), rng.randrange(1, 11)
    prompt = rng.choice(("{a} x {b} =", "{a} times {b} is", "The product of {a} and {b} is")).format(a=a, b=b)
    return Exercise(prompt, str(a * b), _near(rng, a * b), reserve("x", a, b))


def double(rng: Random) -> Exercise:
    a = rng.randrange(1, 50)
    if rng.random() < 0.5:
        return Exercise(f"Twice {a} is", str(2 * a), _near(rng, 2 * a), reserve("twice", a))
    return Exercise(f"Half of {2 * a} is", str(a), _near(rng, a), reserve("half", a))


def go_on(rng: Random) -> Exercise:
    start, step = rng.randrange(20), rng.randrange(1, 8)
    terms = [start + step * position for position in range(5)]
    if rng.random() < 0.3:
        terms.reverse()
    shown = ", ".join(map(str, terms[:4]))
    prompt = rng.choice(("Count on: {s},", "The sequence {s} goes on with", "After {s} comes")).format(s=shown)
    return Exercise(prompt, str(terms[4]), _near(rng, terms[4]), reserve("sequence", start, step))


def compare(rng: Random) -> Exercise:
    numbers = rng.sample(range(50), 4)
    word, answer = rng.choice((("largest", max(numbers)), ("smallest", min(numbers))))
    a, b, c, d = numbers
    prompt = rng.choice((f"The {word} of {a}, {b}, {c} and {d} is", f"Among {a}, {b}, {c}, {d} the {word} is"))
    wrong = tuple(str(number) for number in numbers if number != answer)
    return Exercise(prompt, str(answer), wrong, reserve("compare", *sorted(numbers)))


def parity(rng: Random) -> Exercise:
    word, remainder = rng.choice((("even", 0), ("odd", 1)))
    numbers = [2 * half + 1 - remainder for half in rng.sample(range(25), 3)] + [2 * rng.randrange(25) + remainder]
    answer = numbers[3]
    rng.shuffle(numbers)
    a, b, c, d = numbers
    wrong = tuple(str(number) for number in numbers if number != answer)
    prompt = f"The only {word} number among {a}, {b}, {c} and {d} is"
    return Exercise(prompt, str(answer), wrong, reserve("parity", *sorted(numbers)))


def gain(rng: Random) -> Exercise:
    a, b = _operand(rng, 30), _operand(rng, 30)
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    verb = rng.choice(("buys", "finds", "wins"))
    prompt = f"{name} has {a} {things} and {verb} {b} more. Now {name} has"
    return Exercise(prompt, str(a + b), _near(rng, a + b), reserve("+", a, b), f" {things}.")


def lose(rng: Random) -> Exercise:
    a, b = sorted((_operand(rng, 40), _operand(rng, 40)), reverse=True)
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    verb = rng.choice(("loses", "sells", "gives away"))
    prompt = f"{name} has {a} {things} and {verb} {b}. Now {name} has"
    return Exercise(prompt, str(a - b), _near(rng, a - b), reserve("-", a, b), f" {things}.")


def copy(rng: Random) -> Exercise:
    numbers = ", ".join(str(number) for number in rng.sample(range(50), rng.randint(2, 6)))
    return Exercise(rng.choice((f"Write down {numbers}:", f"Again {numbers},")), numbers, (), False)


CORPUS = Corpus(
    name="math",
    choice=(add, subtract, multiply, double, go_on, compare, parity, gain, lose),
    generate=(add, subtract, go_on, compare, gain, lose),
    prose=(copy,),
)


@hookimpl
def spath_register_domains(register: Callable[[Domain], None]) -> None:
    register(
        Domain(
            name=CORPUS.name,
            texts=CORPUS.texts,
            tasks=("spath_math_choice", "spath_math_generate"),
            task_paths=(spath_eval.tasks.FOLDER,),
            provenance="generated by spath_eval.plugins.domains.math",
            licence="Apache-2.0",
            benchmarks=("gsm8k",),
        )
    )
