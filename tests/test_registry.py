"""The registry: whatever is wrong with a plugin is one line that names it, and never stops another plugin."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from spath_eval import CONTRACT_VERSION, Architecture, Domain, UsageError, hookspecs
from spath_eval.registry import HOOKS, PluginProblem, Registry

DOCS = Path(__file__).parents[1] / "docs" / "plugins.md"

STRATEGY = """
from dataclasses import dataclass
from typing import ClassVar, Literal
from spath_eval import Strategy, hookimpl

@dataclass(frozen=True)
class Toy(Strategy):
    name: ClassVar[str] = "{name}"
    kind: ClassVar[str] = "{kind}"
    pool: Literal["layer", "model"] = "layer"
    power: float = 1.0
    rounds: int = 3
    absolute: bool = True
    label: str = ""

    def __post_init__(self):
        if self.rounds < 0:
            raise ValueError("rounds is negative")

    def {method}(self, *arguments):
        return self.name, *arguments

@hookimpl
def spath_register_strategies(register):
    register(Toy)
"""


def toy(name: str = "toy", kind: str = "static", method: str = "select") -> str:
    return STRATEGY.format(name=name, kind=kind, method=method)


def only_problem(registry: Registry, distribution: str) -> PluginProblem:
    (problem,) = [problem for problem in registry.problems if problem.distribution == distribution]
    return problem


BROKEN = {
    "import error": (
        "import there_is_no_such_module",
        "ModuleNotFoundError: No module named 'there_is_no_such_module'",
    ),
    "syntax error": ("def broken(:", "SyntaxError: invalid syntax (broken_module.py, line 1)"),
    "exit at import": ("raise SystemExit(3)", "SystemExit: 3"),
    "several lines": ("raise RuntimeError('one\\n two')", "RuntimeError: one two"),
    "misspelt hook": (
        "from spath_eval import hookimpl\n@hookimpl\ndef spath_run_cas(case): ...",
        "Did you mean spath_run_case?",
    ),
    "unknown argument": (
        "from spath_eval import hookimpl\n@hookimpl\ndef spath_run_case(case, sesion): ...",
        "spath_run_case has no argument 'sesion': there are case, session. Did you mean session?",
    ),
    "no hook": ("def spath_run_case(case): ...", "it implements no hook; mark the functions that do with"),
    "contract version": (
        "SPATH_CONTRACT_VERSION = 99" + toy(),
        "it is for version 99 of the plugin contract, and this is version 1",
    ),
    "hook raises": (
        "from spath_eval import hookimpl\n@hookimpl\ndef spath_register_domains(register): 1 / 0",
        "spath_register_domains raised ZeroDivisionError: division by zero",
    ),
    "hook exits": (
        "from spath_eval import hookimpl\n@hookimpl\ndef spath_register_domains(register): raise SystemExit",
        "SystemExit",
    ),
    "architecture of another type": (
        "from spath_eval import hookimpl\n@hookimpl\ndef spath_register_architectures(register): register('gpt')",
        "'gpt' is not a spath_eval.Architecture",
    ),
    "domain of another type": (
        "from spath_eval import hookimpl\n@hookimpl\ndef spath_register_domains(register): register(4)",
        "4 is not a spath_eval.Domain",
    ),
    "report without render": (
        "from spath_eval import hookimpl\n@hookimpl\ndef spath_register_reports(register): register(4)",
        "4 is not a report: it has no method render",
    ),
    "strategy of another type": (
        "from spath_eval import hookimpl\n@hookimpl\ndef spath_register_strategies(register): register(int)",
        "<class 'int'> is not a class derived from spath_eval.Strategy",
    ),
    "strategy instance": (toy().replace("register(Toy)", "register(Toy())"), "is not a class derived from"),
    "strategy that is no dataclass": (
        toy().replace("@dataclass(frozen=True)", ""),
        "strategy class Toy is not marked with @dataclass(frozen=True)",
    ),
    "mutable strategy": (toy().replace("frozen=True", ""), "cannot inherit non-frozen dataclass from a frozen one"),
    "unknown kind": (toy(kind="tokens"), "unknown kind 'tokens': there are prompt, static, token. Did you mean token?"),
    "method of another kind": (toy(kind="token"), "strategy class Toy is of kind token and does not define keep()"),
    "unnamed strategy": (toy(name="a b"), "'a b' cannot name the strategy"),
    "option without default": (
        toy().replace("pool:", "size: int\n    pool:"),
        "option size of strategy class Toy has no",
    ),
    "option of another type": (
        toy().replace("int = 3", "list = 3"),
        "option rounds of strategy class Toy is not an int",
    ),
    "registered twice": (
        toy().replace("register(Toy)", "register(Toy); register(Toy)"),
        "registers strategy 'toy' twice",
    ),
}


@pytest.mark.parametrize(("source", "cause"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_is_one_line_and_does_not_stop_the_others(distribute, source, cause):
    distribute("broken-dist", {"broken": "broken_module"}, {"broken_module": source}, version="2.1")
    distribute("whole-dist", {"whole": "whole_module"}, {"whole_module": toy("whole")})
    registry = Registry.load()
    problem = only_problem(registry, "broken-dist")
    assert (problem.entry_point, problem.version) == ("broken", "2.1")
    assert cause in problem.cause
    assert str(problem) == f"plugin 'broken' (broken-dist 2.1): {problem.cause}"
    assert "\n" not in str(problem)
    assert registry.strategy("whole").name == "whole"
    (info,) = [plugin for plugin in registry.plugins if plugin.name == "broken"]
    assert (info.status, info.hooks, dict(info.provides)) == ("broken", (), {})


def test_nothing_of_a_broken_plugin_is_used(distribute):
    source = toy() + "\n@hookimpl\ndef spath_update_record(record): ...\n"
    source += "\n@hookimpl\ndef spath_register_reports(register): register(None)\n"
    distribute("broken-dist", {"broken": "broken_module"}, {"broken_module": source})
    registry = Registry.load()
    assert "toy" not in registry.strategies
    assert "broken" not in [call.plugin_name for call in registry.hook.spath_update_record.get_hookimpls()]


def test_an_interrupt_while_a_plugin_is_imported_is_not_a_problem_but_an_interrupt(distribute):
    distribute("slow-dist", {"slow": "slow_module"}, {"slow_module": "raise KeyboardInterrupt"})
    with pytest.raises(KeyboardInterrupt):
        Registry.load()


def test_a_taken_name_names_who_holds_it(distribute):
    distribute("a-dist", {"first": "first_module"}, {"first_module": toy()}, version="1.1")
    distribute("b-dist", {"second": "second_module"}, {"second_module": toy()})
    registry = Registry.load()
    assert only_problem(registry, "b-dist").cause == "strategy 'toy' is taken by plugin 'first' (a-dist 1.1)"
    assert registry.owner("strategy", "toy").distribution == "a-dist"


def test_a_taken_plugin_name_and_a_module_given_twice_are_problems(distribute):
    distribute("a-dist", {"same": "first_module"}, {"first_module": toy()})
    distribute("b-dist", {"same": "second_module"}, {"second_module": toy("other")})
    distribute("c-dist", {"again": "first_module"}, {})
    registry = Registry.load()
    assert only_problem(registry, "b-dist").cause == "the plugin name is taken by module first_module of a-dist 1.0"
    assert only_problem(registry, "c-dist").cause == "the module is loaded already, as plugin 'same' of a-dist 1.0"


def test_nobody_takes_the_name_of_a_built_in(distribute):
    distribute("aaa-dist", {"gemma": "aaa_module"}, {"aaa_module": toy()})
    assert "the plugin name is taken by module" in only_problem(Registry.load(), "aaa-dist").cause


def test_an_unreadable_entry_point_file_is_a_problem_of_its_distribution(distribute):
    folder = distribute("torn-dist", {}, {})
    (folder / "entry_points.txt").write_text("[spath_eval]\nno equals sign\n", encoding="utf-8")
    problem = only_problem(Registry.load(), "torn-dist")
    assert problem.entry_point == "*"
    assert "its entry points cannot be read" in problem.cause


def test_an_optional_hook_of_another_version_is_no_problem(distribute):
    source = toy() + "\n@hookimpl(optionalhook=True)\ndef spath_of_the_future(case): ...\n"
    distribute("new-dist", {"new": "new_module"}, {"new_module": source})
    assert "toy" in Registry.load().strategies


def test_plugins_load_in_a_stable_order_with_the_built_ins_first(distribute):
    distribute("b-dist", {"two": "two_module", "one": "one_module"}, {"two_module": toy("x"), "one_module": toy("y")})
    distribute("a-dist", {"zero": "zero_module"}, {"zero_module": toy("z")})
    plugins = Registry.load().plugins
    origins = [plugin.distribution for plugin in plugins]
    assert origins == ["spath-eval"] * (len(plugins) - 3) + ["a-dist", "b-dist", "b-dist"]
    assert [plugin.name for plugin in plugins[-3:]] == ["zero", "one", "two"]


@pytest.mark.parametrize("name", ["toys", "toy_module"])
def test_a_blocked_plugin_is_not_even_imported(distribute, name):
    distribute("toy-dist", {"toys": "toy_module"}, {"toy_module": "raise KeyboardInterrupt"})
    registry = Registry.load(blocked=[name])
    assert [plugin.name for plugin in registry.plugins if plugin.status == "blocked"] == ["toys"]
    assert all(problem.distribution != "toy-dist" for problem in registry.problems)


def test_a_built_in_can_be_blocked_and_replaced(distribute):
    distribute("toy-dist", {"toys": "toy_module"}, {"toy_module": toy("keep-all")})
    registry = Registry.load(blocked=["keep-all"])
    assert registry.owner("strategy", "keep-all").distribution == "toy-dist"


def test_blocking_what_is_not_installed_is_an_error_with_a_suggestion():
    with pytest.raises(UsageError, match=r"no plugin 'gema' to block: .*Did you mean gemma\?"):
        Registry.load(blocked=["gema"])


def test_a_wanted_plugin_has_to_work(distribute):
    distribute("broken-dist", {"broken": "broken_module"}, {"broken_module": "import no_such_thing"})
    Registry.load(wanted=["gemma"])
    for name in ("broken", "broken_module"):
        with pytest.raises(UsageError, match=r"^plugin 'broken' \(broken-dist 1.0\): ModuleNotFoundError"):
            Registry.load(wanted=[name])
    with pytest.raises(UsageError, match=r"^plugin 'no_such_plugin' \(no distribution\): ModuleNotFoundError"):
        Registry.load(wanted=["no_such_plugin"])
    with pytest.raises(UsageError, match="both asked for and blocked"):
        Registry.load(wanted=["gemma"], blocked=["gemma"])


def test_a_wanted_module_is_loaded_without_an_entry_point(tmp_path, distribute):
    (tmp_path / "loose_module.py").write_text(toy(), encoding="utf-8")
    registry = Registry.load(wanted=["loose_module", "loose_module"])
    assert registry.owner("strategy", "toy").module == "loose_module"
    assert registry.owner("strategy", "toy").origin == "no distribution"


def test_strict_lists_every_problem(distribute):
    distribute("a-dist", {"a": "a_module"}, {"a_module": "import no_such_a"})
    distribute("b-dist", {"b": "b_module"}, {"b_module": "import no_such_b"})
    with pytest.raises(UsageError, match=r"plugin 'a' \(a-dist 1.0\).*; plugin 'b' \(b-dist 1.0\)"):
        Registry.load(strict=True)


def test_the_sample_plugin_offers_one_object_of_each_kind(sample_plugin):
    registry = Registry.load(wanted=["sample"])
    assert registry.plugins[-1].provides == {
        "architecture": ("olmo",),
        "domain": ("calendar",),
        "strategy": ("weakest",),
        "report": ("lines",),
    }
    assert isinstance(registry.architecture("olmo"), Architecture)
    domain = registry.domain("calendar")
    assert isinstance(domain, Domain)
    assert not set(domain.texts("profile")) & set(domain.texts("heldout"))
    assert registry.parse_strategy("weakest:pool=model").pool == "model"
    record = {"cases": [{"id": "gemma/math/negative@0.15", "outcome": "passed"}]}
    assert registry.report("lines").render(record, width=20, colour=False) == "passed gemma/math/ne\n"


@pytest.mark.parametrize("kind", ["architecture", "domain", "strategy", "report"])
def test_an_unknown_name_says_what_there_is_and_what_is_close(sample_plugin, kind):
    registry = Registry.load()
    name = {"architecture": "olmo", "domain": "calendar", "strategy": "weakest", "report": "lines"}[kind]
    with pytest.raises(UsageError) as error:
        getattr(registry, kind)(name[:-1])
    assert str(error.value).startswith(f"unknown {kind} {name[:-1]!r}: there ")
    assert f"Did you mean {name}?" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["better", "hidden"])
def test_an_unknown_name_names_the_broken_plugin_that_would_have_offered_it(distribute, name):
    distribute("good-ideas", {"better": "better_module"}, {"better_module": "import absent" + toy("hidden")})
    with pytest.raises(UsageError) as error:
        Registry.load().parse_strategy(name)
    cause = "plugin 'better' (good-ideas 1.0) would have offered it but failed: ModuleNotFoundError: No module named"
    assert cause in str(error.value)


def test_an_unknown_name_names_the_blocked_plugin_that_would_have_offered_it(distribute):
    distribute("good-ideas", {"better": "better_module"}, {"better_module": toy("hidden")})
    with pytest.raises(UsageError, match=r"plugin 'better' \(good-ideas 1.0\) would have offered it but is blocked"):
        Registry.load(blocked=["better"]).strategy("hidden")


@pytest.mark.parametrize(("kind", "method"), [("static", "select"), ("prompt", "select_prompt"), ("token", "keep")])
def test_strategies_of_each_kind_are_made_from_text(distribute, kind, method):
    distribute("toy-dist", {"toys": "toy_module"}, {"toy_module": toy("toy", kind, method)})
    registry = Registry.load()
    strategy = registry.parse_strategy("toy:pool=model,power=-2.5e0:rounds=7,absolute=false:label=a=b")
    assert vars(strategy) == {"pool": "model", "power": -2.5, "rounds": 7, "absolute": False, "label": "a=b"}
    assert strategy.kind == kind
    assert getattr(strategy, method)(1) == ("toy", 1)
    assert registry.parse_strategy("toy") == registry.strategy("toy")()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "toy:pol=model",
            "strategy 'toy' has no option 'pol': there are absolute, label, pool, power, rounds. Did you ",
        ),
        ("toy:", "strategy 'toy' has no option '': there are absolute, label, pool, power, rounds"),
        ("toy:pool", "option pool of strategy 'toy' lacks its value: write pool=VALUE"),
        ("toy:pool=modle", "option pool of strategy 'toy' must be layer or model, not 'modle'"),
        ("toy:pool=", "option pool of strategy 'toy' must be layer or model, not ''"),
        ("toy:rounds=1.5", "option rounds of strategy 'toy' must be an integer, not '1.5'"),
        ("toy:power=nan", "option power of strategy 'toy' must be a finite number, not 'nan'"),
        ("toy:power=-inf", "option power of strategy 'toy' must be a finite number, not '-inf'"),
        ("toy:power=much", "option power of strategy 'toy' must be a finite number, not 'much'"),
        ("toy:absolute=1", "option absolute of strategy 'toy' must be true or false, not '1'"),
        ("toy:rounds=1,rounds=2", "option rounds of strategy 'toy' is given twice"),
        ("toy:rounds=-1", "strategy 'toy:rounds=-1': ValueError: rounds is negative"),
        ("toi:rounds=1", "unknown strategy 'toi': "),
        ("", "unknown strategy '': "),
    ],
)
def test_wrong_options_are_refused_with_the_right_ones(distribute, text, message):
    distribute("toy-dist", {"toys": "toy_module"}, {"toy_module": toy()})
    with pytest.raises(UsageError) as error:
        Registry.load().parse_strategy(text)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_strategy_without_options_says_so(distribute):
    source = "\n".join(line for line in toy().splitlines() if " = " not in line or "ClassVar" in line)
    source = source.replace("if self.rounds < 0:", "if False:")
    distribute("toy-dist", {"toys": "toy_module"}, {"toy_module": source})
    with pytest.raises(UsageError, match="strategy 'toy' has no option 'pool': there are none"):
        Registry.load().parse_strategy("toy:pool=model")


def test_no_plugin_imports_anything_heavy():
    program = "\n".join(
        [
            "import sys",
            "from spath_eval.registry import Registry",
            "Registry.load()",
            "print(*{'torch', 'transformers', 'lm_eval', 'numpy', 'pandas', 'datasets'} & set(sys.modules))",
        ]
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.split() == []


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_and_annotated(hook):
    function = getattr(hookspecs, hook)
    first = (function.__doc__ or "").strip().split("\n")[0]
    assert first[:1].isupper()
    assert "." in first
    signature = inspect.signature(function)
    assert all(parameter.annotation is not parameter.empty for parameter in signature.parameters.values())
    assert signature.return_annotation is not signature.empty


def written(hook: str) -> str:
    """The hook's signature, as the docs have to give it."""
    signature = inspect.signature(getattr(hookspecs, hook))
    arguments = ", ".join(f"{name}: {parameter.annotation}" for name, parameter in signature.parameters.items())
    return f"{hook}({arguments}) -> {signature.return_annotation}"


def test_the_docs_give_every_hook_with_its_exact_signature_and_no_other():
    signatures = re.findall(r"^spath_\w+\(.+$", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(signatures) == sorted(map(written, HOOKS))


def test_the_docs_name_the_hooks_of_which_the_first_result_counts():
    first = {hook for hook in HOOKS if getattr(hookspecs, hook).spath_eval_spec["firstresult"]}
    (sentence,) = re.findall(
        r"Of ([^.]+) the first\s+result that is not `None` counts", DOCS.read_text(encoding="utf-8")
    )
    assert set(re.findall(r"`(spath_\w+)`", sentence)) == first


def test_the_docs_state_the_version_of_the_contract():
    text = DOCS.read_text(encoding="utf-8")
    assert f"`spath_eval.CONTRACT_VERSION`, now {CONTRACT_VERSION}." in text
    assert f"\nSPATH_CONTRACT_VERSION = {CONTRACT_VERSION}\n" in text


EXAMPLES = re.findall(r"^```python\n(.+?)^```", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("source", [source for source in EXAMPLES if "hookimpl" in source])
def test_the_examples_in_the_docs_load(distribute, source):
    distribute("docs-dist", {"docs": "docs_module"}, {"docs_module": source})
    assert Registry.load(wanted=["docs"]).plugins[-1].hooks


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_built_in_that_implements_it(hook):
    built_ins = [plugin for plugin in Registry.load().plugins if plugin.distribution == "spath-eval"]
    assert any(hook in plugin.hooks for plugin in built_ins)


def test_every_built_in_plugin_loads():
    assert [str(problem) for problem in Registry.load().problems if problem.distribution == "spath-eval"] == []
