"""Cases: their ids are the names that everything else goes by."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import pytest

from spath_eval import Domain, UsageError
from spath_eval.collection import (
    Case,
    Limits,
    collect,
    cross,
    keyword_filter,
    parse_limits,
    parse_sparsities,
    parse_tasks,
)
from spath_eval.plugins.strategies.negative import Negative
from spath_eval.plugins.strategies.random import Random
from spath_eval.plugins.strategies.specialisation import Specialisation
from spath_eval.plugins.strategies.teal import Teal
from spath_eval.session import GivenMask

MATH = Domain("math", lambda split: [], ())
CODE = Domain("code", lambda split: [], ())


@pytest.mark.parametrize(
    ("strategy", "sparsity", "execution", "expected"),
    [
        (Negative(), 0.15, "compact", "gemma/math/negative@0.15"),
        (Negative(pool="layer"), 0.15, "compact", "gemma/math/negative@0.15"),
        (Negative(pool="model"), 0.3, "compact", "gemma/math/negative:pool=model@0.3"),
        (Random(), 0.05, "masked", "gemma/math/random@0.05[masked]"),
        (Random(), 0.5, "compact", "gemma/math/random@0.5"),
        (GivenMask(Path("here/it/is.safetensors")), 0.25, "compact", "gemma/math/mask:file=is.safetensors@0.25"),
        (GivenMask(Path("/there/is.safetensors")), 0.25, "compact", "gemma/math/mask:file=is.safetensors@0.25"),
    ],
)
def test_an_id_says_what_is_not_the_default(strategy, sparsity, execution, expected):
    assert Case("gemma", MATH, strategy, sparsity, execution).id == expected


def test_cases_go_by_model_domain_sparsity_and_strategy():
    cases = collect(["a", "b"], [MATH, CODE], [Negative(), Random()], [0.3, 0.1], "compact")
    assert len(cases) == 16
    assert [case.id for case in cases[:5]] == [
        "a/math/negative@0.3",
        "a/math/random@0.3",
        "a/math/negative@0.1",
        "a/math/random@0.1",
        "a/code/negative@0.3",
    ]
    assert cases[8].id == "b/math/negative@0.3"


def test_crossed_masks_are_evaluated_on_every_domain():
    crossed = cross(collect(["a"], [MATH, CODE], [Negative(), Random()], [0.1], "compact"), [MATH, CODE])
    assert [case.id for case in crossed] == [
        "a/math/negative@0.1",
        "a/math>code/negative@0.1",
        "a/math/random@0.1",
        "a/code/negative@0.1",
        "a/code>math/negative@0.1",
        "a/code/random@0.1",
        "a/pooled>math/negative@0.1",
        "a/pooled>code/negative@0.1",
    ]
    assert {case.mask_id for case in crossed if case.domain.name == "pooled"} == {"a/pooled/negative@0.1"}
    assert [case.is_own for case in crossed] == [True, False, True, True, False, True, False, False]


def test_thresholds_of_a_domain_are_crossed_as_masks_are():
    crossed = cross(collect(["a"], [MATH, CODE], [Teal()], [0.1], "compact"), [MATH, CODE])
    assert [case.id for case in crossed] == [
        "a/math/teal@0.1[masked]",
        "a/math>code/teal@0.1[masked]",
        "a/code/teal@0.1[masked]",
        "a/code>math/teal@0.1[masked]",
        "a/pooled>math/teal@0.1[masked]",
        "a/pooled>code/teal@0.1[masked]",
    ]


def test_a_strategy_that_compares_domains_has_no_pooled_mask():
    crossed = cross(collect(["a"], [MATH, CODE], [Specialisation()], [0.1], "compact"), [MATH, CODE])
    assert {case.domain.name for case in crossed} == {"math", "code"}


def test_a_single_domain_cannot_be_crossed():
    with pytest.raises(UsageError, match="two domains or more"):
        cross(collect(["a"], [MATH], [Negative()], [0.1], "compact"), [MATH])


def test_what_is_asked_for_twice_is_one_case():
    cases = collect(["a"], [MATH, MATH], [Negative(), Negative(pool="layer"), Random()], [0.1, 0.1], "compact")
    assert [case.id for case in cases] == ["a/math/negative@0.1", "a/math/random@0.1"]


@pytest.mark.parametrize("kind", ["token", "prompt"])
def test_strategies_without_a_fixed_mask_run_masked(kind):
    strategy = type("Toy", (Random,), {"kind": kind, "name": "toy"})()
    cases = collect(["a"], [MATH], [Random(), strategy], [0.1], "compact")
    assert [case.execution for case in cases] == ["compact", "masked"]


IDS = [
    f"gemma/{domain}/{strategy}@{sparsity}"
    for domain in ("math", "code")
    for strategy in ("negative:pool=model", "random")
    for sparsity in ("0.15", "0.3")
]


@pytest.mark.parametrize(
    ("expression", "chosen"),
    [
        ("math", lambda id: "math" in id),
        ("MATH", lambda id: "math" in id),
        ("@0.3", lambda id: "@0.3" in id),
        ("pool=model", lambda id: "pool=model" in id),
        ("gemma/math/random@0.15", lambda id: id == "gemma/math/random@0.15"),
        ("math and random", lambda id: "math" in id and "random" in id),
        ("math or random", lambda id: "math" in id or "random" in id),
        ("not math", lambda id: "math" not in id),
        ("not not math", lambda id: "math" in id),
        ("math or code and random", lambda id: "math" in id or ("code" in id and "random" in id)),
        ("(math or code) and random", lambda id: ("math" in id or "code" in id) and "random" in id),
        ("(math or code)and not(random)", lambda id: "random" not in id),
        ("not math and random", lambda id: "math" not in id and "random" in id),
        ("not (math and random)", lambda id: not ("math" in id and "random" in id)),
        ("  ( (math) )\n", lambda id: "math" in id),
        ("nothing", lambda id: False),
        ("True", lambda id: False),
        ("lambda", lambda id: False),
        ("math'", lambda id: False),
        ('"math"', lambda id: False),
        ("and_ or math", lambda id: "math" in id),
    ],
)
def test_keywords_choose_as_in_pytest(expression, chosen):
    keyword = keyword_filter(expression)
    assert [id for id in IDS if keyword(id)] == [id for id in IDS if chosen(id)]


@pytest.mark.parametrize(
    "expression",
    [
        " ",
        "and",
        "not",
        "math and",
        "or math",
        "math random",
        "math not random",
        "math (random)",
        "(math)(random)",
        "()",
        "math()",
        "not ()",
        "(math",
        "math)",
        "math and or random",
        "(" * 500 + "math" + ")" * 500,
    ],
)
def test_what_is_no_expression_is_refused(expression):
    with pytest.raises(UsageError, match="expected words joined by and, or, not and parentheses"):
        keyword_filter(expression)


@pytest.mark.parametrize(
    "expression",
    ["__import__('os').mkdir('made')", "[__import__('os').mkdir('made')]", "x' or __import__('os').mkdir('made') or '"],
)
def test_a_keyword_is_never_executed(expression, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with suppress(UsageError):
        keyword_filter(expression)("gemma/math/negative@0.15")
    assert list(tmp_path.iterdir()) == []


def test_sparsities_keep_their_order_and_come_once():
    assert parse_sparsities("0.3") == (0.3,)
    assert parse_sparsities("0.3, 0.05,0.150,.15,0.3,1e-1") == (0.3, 0.05, 0.15, 0.1)


@pytest.mark.parametrize("text", ["0", "1", "-0.1", "1.5", "nan", "inf", "abc", "", ",", "0.1,", "0.1,abc", "15%"])
def test_what_is_no_share_of_neurons_is_refused(text):
    with pytest.raises(UsageError, match="the share of neurons to remove"):
        parse_sparsities(text)


DOMAINS = ("math", "code", "factual")


@pytest.mark.parametrize(
    ("text", "tasks"),
    [
        ("gsm8k", dict.fromkeys(DOMAINS, ("gsm8k",))),
        ("gsm8k, arc_easy,gsm8k", dict.fromkeys(DOMAINS, ("gsm8k", "arc_easy"))),
        ("math=gsm8k", {"math": ("gsm8k",)}),
        ("code=humaneval+mbpp, math = gsm8k", {"code": ("humaneval", "mbpp"), "math": ("gsm8k",)}),
        ("math=a + b+a", {"math": ("a", "b")}),
    ],
)
def test_tasks_are_for_every_domain_or_for_those_named(text, tasks):
    assert parse_tasks(text, DOMAINS) == tasks


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a name is empty"),
        ("gsm8k,", "a name is empty"),
        ("math=gsm8k,,code=mbpp", "a name is empty"),
        ("math=gsm8k,mbpp", "mbpp has no domain while others have"),
        ("arc_easy,math=gsm8k", "arc_easy has no domain while others have"),
        ("maths=gsm8k", "unknown domain 'maths'; chosen are math, code, factual"),
        ("=gsm8k", "unknown domain ''"),
        ("math=", "a task of domain math is empty"),
        ("math=a++b", "a task of domain math is empty"),
        ("math=a,math=b", "domain math comes twice"),
    ],
)
def test_tasks_that_are_not_clear_are_refused(text, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        parse_tasks(text, DOMAINS)


def test_a_limit_is_for_all_tasks_or_for_a_task_or_group():
    assert parse_limits("50") == Limits(50, {})
    assert parse_limits("50, mmlu=5") == Limits(50, {"mmlu": 5})
    limits = parse_limits("mmlu=5,mmlu_high_school=3,mmlu_virology=7,arc_easy=1")
    assert [limits.of(name) for name in ("mmlu_virology", "mmlu_anatomy", "mmlu_high_school_physics")] == [7, 5, 3]
    assert [limits.of(name) for name in ("arc_easy", "arc_challenge", "mmlux", "mm", "mmlu")] == [
        1,
        None,
        None,
        None,
        5,
    ]
    assert parse_limits("2,mmlu=5").of("gsm8k") == 2


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "abc", "mmlu", "mmlu=", "=5", "mmlu=0", "5,", "50,mmlu=x", "²"])
def test_what_is_no_number_of_documents_is_refused(text):
    with pytest.raises(UsageError, match="expected a number of documents of at least 1, or TASK=N"):
        parse_limits(text)


@pytest.mark.parametrize(("text", "which"), [("5,6", "of all"), ("mmlu=5,3,mmlu=5", "of mmlu")])
def test_a_limit_that_comes_twice_is_refused(text, which):
    with pytest.raises(UsageError, match=f"the limit {which} comes twice"):
        parse_limits(text)
