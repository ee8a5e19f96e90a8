"""Small Python programs as a domain: what an expression evaluates to, after the lines that it depends on.

Every statement in it is true Python; a test executes the items. One in eight sampled instances is reserved for
evaluation. Generated rather than taken from installed source files, so that profiles do not depend on the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from random import Random

import spath_eval.tasks
from spath_eval import Domain, hookimpl
from spath_eval.plugins.domains._corpus import Corpus, Exercise, reserve

LISTS = ("items", "values", "numbers", "data", "row", "scores", "queue", "stack")
VARIABLES = ("x", "y", "n", "m", "i", "k", "total", "count", "size", "width", "height", "index")
KEYS = ("red", "blue", "left", "right", "top", "end", "name", "size", "key", "id", "low", "high", "min", "max")
WORDS = tuple(
    "cat dog sun map box key tree node file path line word user list test code table index queue value input print "
    "string number".split()
)
FUNCTIONS: dict[str, tuple[str, str, Callable[[int, int], int]]] = {
    "add": ("a, b", "a + b", lambda a, b: a + b),
    "subtract": ("a, b", "a - b", lambda a, b: a - b),
    "first": ("a, b", "a", lambda a, b: a),
    "second": ("a, b", "b", lambda a, b: b),
    "larger": ("a, b", "max(a, b)", max),
    "smaller": ("a, b", "min(a, b)", min),
    "equal": ("a, b", "a == b", lambda a, b: a == b),
    "less": ("a, b", "a < b", lambda a, b: a < b),
}


def _literal(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _numbers(rng: Random, least: int = 2, most: int = 6) -> list[int]:
    return rng.sample(range(10), rng.randint(least, most))


def _about_list(rng: Random, values: list[int], call: str, answer: object, wrong: tuple[object, ...]) -> Exercise:
    """An assertion on a list, which `call` names as `{}`: written in place, or bound to a name first."""
    reserved = reserve("list", *values)
    literals = tuple(_literal(value) for value in wrong)
    if rng.random() < 0.4:
        return Exercise(f"assert {call.format(values)} ==", _literal(answer), literals, reserved)
    name = rng.choice(LISTS)
    return Exercise(f"{name} = {values}\nassert {call.format(name)} ==", _literal(answer), literals, reserved)


def _other_numbers(rng: Random, values: list[int], answer: int) -> tuple[int, ...]:
    """Three wrong numbers, from the list as far as it goes."""
    wrong = [value for value in values if value != answer]
    rng.shuffle(wrong)
    spare = [value for value in range(10) if value not in values]
    return tuple(wrong[:3] + rng.sample(spare, max(0, 3 - len(wrong))))


def length(rng: Random) -> Exercise:
    values = _numbers(rng, 1, 7)
    wrong = rng.sample([size for size in range(9) if size != len(values)], 3)
    return _about_list(rng, values, "len({})", len(values), tuple(wrong))


def element(rng: Random) -> Exercise:
    values = _numbers(rng, 3)
    index = rng.choice((0, 1, 2, -1))
    return _about_list(rng, values, f"{{}}[{index}]", values[index], _other_numbers(rng, values, values[index]))


def extreme(rng: Random) -> Exercise:
    values = _numbers(rng)
    name, answer = rng.choice((("max", max(values)), ("min", min(values))))
    return _about_list(rng, values, f"{name}({{}})", answer, _other_numbers(rng, values, answer))


def order(rng: Random) -> Exercise:
    values = _numbers(rng, 3, 3)
    orders = [list(places) for places in permutations(values)]
    call, answer = rng.choice(
        (("sorted({})", sorted(values)), ("{}[::-1]", values[::-1]), ("list({})", values), ("{}[:2]", values[:2]))
    )
    others = [tried for tried in (*orders, values[1:], values[:1]) if tried != answer]
    return _about_list(rng, values, call, answer, tuple(rng.sample(others, 3)))


def append(rng: Random) -> Exercise:
    *values, extra = _numbers(rng, 2, 4)
    name = rng.choice(LISTS)
    wrong = ([extra, *values], values, [*values[1:], extra, extra], [*values, extra, extra])
    prompt = f"{name} = {values}\n{name}.append({extra})\nassert {name} =="
    return Exercise(prompt, str([*values, extra]), tuple(map(str, wrong)), reserve("append", *values, extra))


def membership(rng: Random) -> Exercise:
    values = _numbers(rng, 2, 5)
    member = rng.choice(values) if rng.random() < 0.5 else rng.randrange(10)
    answer = member in values
    return _about_list(rng, values, f"({member} in {{}})", answer, (not answer, None, []))


def lookup(rng: Random) -> Exercise:
    keys, values = rng.sample(KEYS, 4), rng.sample(range(10), 4)
    name = rng.choice(("table", "ages", "config", "prices"))
    place = rng.randrange(4)
    body = ", ".join(f'"{key}": {value}' for key, value in zip(keys, values, strict=True))
    wrong = tuple(str(value) for value in values if value != values[place])
    prompt = f'{name} = {{{body}}}\nassert {name}["{keys[place]}"] =='
    return Exercise(prompt, str(values[place]), wrong, reserve("lookup", *keys, *values))


def variable(rng: Random) -> Exercise:
    names, values = rng.sample(VARIABLES, 4), rng.sample(range(10), 4)
    place = rng.randrange(4)
    lines = "\n".join(f"{name} = {value}" for name, value in zip(names, values, strict=True))
    wrong = tuple(str(value) for value in values if value != values[place])
    prompt = f"{lines}\nassert {names[place]} =="
    return Exercise(prompt, str(values[place]), wrong, reserve("variable", *names, *values))


def call(rng: Random) -> Exercise:
    name = rng.choice(tuple(FUNCTIONS))
    parameters, body, function = FUNCTIONS[name]
    a, b = rng.randrange(10), rng.randrange(10)
    if rng.random() < 0.2:
        b = a
    answer = function(a, b)
    if isinstance(answer, bool):
        wrong = ["None", "[]", str(not answer)]
    else:
        near = {a, b, a + b, a - b, answer + 1, answer - 1, answer + 10}
        wrong = [str(number) for number in rng.sample(sorted(near - {answer}), 3)]
    prompt = f"def {name}({parameters}):\n    return {body}\n\nassert {name}({a}, {b}) =="
    return Exercise(prompt, str(answer), tuple(wrong), reserve("call", name, a, b))


def join(rng: Random) -> Exercise:
    a, b = rng.sample(WORDS, 2)
    c = rng.choice([word for word in WORDS if word not in (a, b)])
    if rng.random() < 0.5:
        wrong = (f'"{b}{a}"', f'"{a}{a}"', f'"{a}{c}"')
        return Exercise(f'assert "{a}" + "{b}" ==', f'"{a}{b}"', wrong, reserve("join", a, b))
    wrong = (f'"{b} {a}"', f'"{a} {a}"', f'"{a} {c}"')
    return Exercise(f'assert " ".join(["{a}", "{b}"]) ==', f'"{a} {b}"', wrong, reserve("join", a, b))


def spell(rng: Random) -> Exercise:
    word = rng.choice(WORDS)
    answers: dict[str, int | str] = {
        "{}[0]": word[0],
        "{}[-1]": word[-1],
        "len({})": len(word),
        "{}.upper()": word.upper(),
    }
    operation, answer = rng.choice(tuple(answers.items()))
    if isinstance(answer, int):
        wrong = tuple(str(size) for size in range(2, 8) if size != answer)
    else:
        others = {answer} | {word[0], word[-1]} if len(answer) == 1 else {answer}
        pool = "abcdeiklnoprstuv" if len(answer) == 1 else [other.upper() for other in WORDS]
        wrong = tuple(_literal(letter) for letter in rng.sample(sorted(set(pool) - others), 3))
    name = rng.choice(("s", "text", "word", "label"))
    prompt = f"assert {operation.format(_literal(word))} =="
    if rng.random() < 0.6:
        prompt = f'{name} = "{word}"\nassert {operation.format(name)} =='
    return Exercise(prompt, _literal(answer), wrong, reserve("spell", prompt))


def copy(rng: Random) -> Exercise:
    a, b = rng.sample(LISTS, 2)
    values = str(_numbers(rng)) if rng.random() < 0.7 else _literal(" ".join(rng.sample(WORDS, 3)))
    return Exercise(f"{a} = {values}\n{b} =", values, (), False)


def define(rng: Random) -> str:
    name = rng.choice(tuple(FUNCTIONS))
    parameters, body, _ = FUNCTIONS[name]
    return f"def {name}({parameters}):\n    return {body}\n"


def loop(rng: Random) -> str:
    name, variable, limit = rng.choice(LISTS), rng.choice(VARIABLES[:6]), rng.randrange(2, 30)
    return rng.choice(
        (
            f"for {variable} in range({limit}):\n    print({variable})",
            f"for {variable} in {name}:\n    if {variable} > {limit}:\n        break",
            f"while {variable} < {limit}:\n    {variable} += 1",
            f"total = 0\nfor {variable} in {name}:\n    total += {variable}\nprint(total)",
            f"{name} = [{variable} for {variable} in range({limit})]\nassert len({name}) == {limit}",
            f'if not {name}:\n    raise ValueError("{name} is empty")',
            f"with open(path) as file:\n    {name} = file.read().split()",
            f"class {name.title()}:\n    def __init__(self, {variable}):\n        self.{variable} = {variable}",
        )
    )


CORPUS = Corpus(
    name="code",
    choice=(length, element, extreme, order, append, membership, lookup, variable, call, join, spell),
    generate=(length, element, extreme, append, lookup, variable, call, join),
    prose=(copy, define, loop),
    exercises=(1, 4),
)


@hookimpl
def spath_register_domains(register: Callable[[Domain], None]) -> None:
    register(
        Domain(
            name=CORPUS.name,
            texts=CORPUS.texts,
            tasks=("spath_code_choice", "spath_code_generate"),
            task_paths=(spath_eval.tasks.FOLDER,),
            provenance="generated by spath_eval.plugins.domains.code",
            licence="Apache-2.0",
            benchmarks=("humaneval", "mbpp"),
        )
    )
