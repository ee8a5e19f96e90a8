"""The checks for plugin authors: they accept what is sound, and say of what is not what to mend."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch

from spath_eval import (
    FFN,
    Architecture,
    Domain,
    Mask,
    ReferenceShape,
    Strategy,
    UsageError,
    records,
    remove_lowest,
    sites,
    testing,
)
from spath_eval.plugins.architectures.llama import LLAMA
from spath_eval.profiling import ROUTING, STATISTICS
from spath_eval.registry import STRATEGY_METHODS, Registry
from spath_eval.testing import (
    SIZES,
    check_architecture,
    check_domain,
    check_report,
    check_strategy,
    example_context,
    example_record,
    tiny_model,
)

BUILT_IN = Registry.load()
FILE_FORMATS = ("csv", "html", "json", "junit", "latex", "md")


# What is sound is accepted


@pytest.mark.parametrize("name", BUILT_IN.strategies)
def test_built_in_strategies_are_accepted(name):
    check_strategy(BUILT_IN.strategy(name))


@pytest.mark.parametrize("name", BUILT_IN.architectures)
def test_built_in_architectures_are_accepted(tiny_model, name):
    architecture = BUILT_IN.architecture(name)
    check_architecture(architecture, {kind: tiny_model.configuration(kind) for kind in architecture.model_types})


@pytest.mark.parametrize("name", BUILT_IN.domains)
def test_built_in_domains_are_accepted(name):
    check_domain(BUILT_IN.domain(name))


@pytest.mark.parametrize("name", BUILT_IN.reports)
def test_built_in_reports_are_accepted(name):
    check_report(BUILT_IN.report(name), for_terminal=name not in FILE_FORMATS)


def test_the_objects_of_the_sample_plugin_are_accepted(sample_plugin):
    registry = Registry.load(wanted=["sample"])
    check_strategy(registry.strategy("weakest"))
    check_architecture(registry.architecture("olmo"))
    check_domain(registry.domain("calendar"))
    check_report(registry.report("lines"))


def test_the_example_record_is_one_and_each_call_gives_its_own():
    record = example_record()
    records.validate(record)
    assert {case["outcome"] for case in record["cases"]} == {"passed", "failed", "error"}
    assert any(entry["retention"]["value"] is None for case in record["cases"] for entry in case.get("quality", ()))
    record["cases"].clear()
    assert example_record()["cases"]


def test_an_example_context_is_what_a_run_hands_over():
    strategy = BUILT_IN.parse_strategy("specialisation")
    context = example_context(strategy, sparsity=0.25, shape="mixtral")
    assert context.budget.sparsity == 0.25
    assert context.domain in context.profile.domains
    assert len(context.profile.domains) > 1
    assert {site.experts for site in context.sites.values()} == {8}
    assert context.batches == ()
    assert example_context(BUILT_IN.parse_strategy("random")).profile is None
    assert len(example_context(BUILT_IN.parse_strategy("teal")).batches) > 0


def test_a_tiny_model_is_the_same_each_time_and_leaves_randomness_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = (tiny_model("phi").state_dict() for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["model.layers.0.mlp.fc1.bias"].abs().max() > 0


def test_the_docs_name_what_can_be_chosen_and_what_the_kit_offers():
    text = (Path(__file__).parents[1] / "docs" / "plugins.md").read_text(encoding="utf-8")
    for name in (*sites.SHAPES, *STATISTICS, ROUTING, *STRATEGY_METHODS):
        assert f"`{name}`" in text
    for name, function in inspect.getmembers(testing, inspect.isfunction):
        if function.__module__ == testing.__name__ and not name.startswith("_"):
            assert f"`{name}(" in text


def test_nothing_heavy_is_imported_before_a_check():
    program = "import sys, spath_eval.testing; print(*{'torch', 'transformers', 'lm_eval', 'numpy'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.split() == []


# Strategies that are not


@dataclass(frozen=True)
class Sound(Strategy):
    """What the broken ones differ from in one point."""

    name: ClassVar[str] = "sound"
    pool: Literal["layer", "model"] = "layer"

    def scores(self, context):
        return {path: site.up.norm(dim=-1) for path, site in context.sites.items()}

    def select(self, context):
        return remove_lowest(self.scores(context), context.budget.sparsity, self.pool)


@dataclass(frozen=True)
class Unseeded(Sound):
    def scores(self, context):
        return {path: torch.rand(site.shape) for path, site in context.sites.items()}


@dataclass(frozen=True)
class Greedy(Sound):
    def select(self, context):
        return remove_lowest(self.scores(context), context.budget.sparsity + 0.1)


@dataclass(frozen=True)
class Timid(Sound):
    def select(self, context):
        return remove_lowest(self.scores(context), context.budget.sparsity / 2)


@dataclass(frozen=True)
class Partial(Sound):
    def select(self, context):
        return Mask(dict(list(super().select(context).keep.items())[:-1]))


@dataclass(frozen=True)
class Dictionary(Sound):
    def select(self, context):
        return dict(super().select(context).keep)


@dataclass(frozen=True)
class Rescaling(Sound):
    def scores(self, context):
        return {path: site.up.mul_(2).norm(dim=-1) for path, site in context.sites.items()}


@dataclass(frozen=True)
class Hooking(Sound):
    def scores(self, context):
        context.model.register_forward_hook(lambda *_: None)
        return super().scores(context)


@dataclass(frozen=True)
class Learning(Sound):
    def scores(self, context):
        context.model.requires_grad_(True)
        return super().scores(context)


@dataclass(frozen=True)
class Normalising(Sound):
    requires: ClassVar[tuple[str, ...]] = ("mean_abs",)

    def scores(self, context):
        statistic = context.profile.statistic("mean_abs", context.domain)
        return {path: values.div_(values.sum()) for path, values in statistic.items()}


@dataclass(frozen=True)
class Unprofiled(Sound):
    def scores(self, context):
        return context.profile.statistic("mean_abs", context.domain)


@dataclass(frozen=True)
class Undeclared(Normalising):
    def scores(self, context):
        return context.profile.statistic("mean_square", context.domain)


@dataclass(frozen=True)
class Misspelling(Sound):
    requires: ClassVar[tuple[str, ...]] = ("mean_absolute",)


@dataclass(frozen=True)
class Text(Sound):
    requires: ClassVar[str] = "mean_abs"


@dataclass(frozen=True)
class Fastidious(Sound):
    def select(self, context):
        raise UsageError("only on Sundays")


@dataclass(frozen=True)
class OneSided(Sound):
    def select(self, context):
        if self.pool == "model":
            raise KeyError("model")
        return super().select(context)


@dataclass(frozen=True)
class Demanding(Sound):
    power: float = 0.0

    def __post_init__(self):
        if not self.power:
            raise ValueError("a power is needed")


@dataclass(frozen=True)
class Listing(Sound):
    layers: str = "1,2"


@dataclass(frozen=True)
class HeadHunting(Sound):
    def select(self, context):
        experts = {path: torch.arange(site.experts) > 0 for path, site in context.sites.items() if site.experts}
        return Mask(super().select(context).keep, experts=experts)


@dataclass(frozen=True)
class ByToken(Strategy):
    name: ClassVar[str] = "by-token"
    kind: ClassVar[str] = "token"

    def keep(self, context, site, gate, product):
        kept = product.abs().topk(site.width - round(context.budget.sparsity * site.width)).indices
        return torch.zeros_like(product, dtype=torch.bool).scatter_(1, kept, True)


@dataclass(frozen=True)
class Short(ByToken):
    def keep(self, context, site, gate, product):
        return super().keep(context, site, gate, product)[:, :-1]


@dataclass(frozen=True)
class Soft(ByToken):
    def keep(self, context, site, gate, product):
        return super().keep(context, site, gate, product).float()


@dataclass(frozen=True)
class Overwriting(ByToken):
    def keep(self, context, site, gate, product):
        return super().keep(context, site, gate, product.abs_())


@dataclass(frozen=True)
class Peeking(ByToken):
    reads_product: ClassVar[bool] = False


@dataclass(frozen=True)
class Sparing(ByToken):
    def keep(self, context, site, gate, product):
        return torch.ones_like(product, dtype=torch.bool)


@dataclass(frozen=True)
class Rolling(ByToken):
    def keep(self, context, site, gate, product):
        return super().keep(context, site, gate, torch.rand_like(product))


@dataclass(frozen=True)
class ByPrompt(Strategy):
    name: ClassVar[str] = "by-prompt"
    kind: ClassVar[str] = "prompt"

    def select_prompt(self, context, activations):
        scores = {path: values.abs().mean(0) for path, values in activations.items()}
        return remove_lowest(scores, context.budget.sparsity)


@dataclass(frozen=True)
class ByWholePrompt(ByPrompt):
    def select_prompt(self, context, activations):
        return remove_lowest({path: values.abs() for path, values in activations.items()}, context.budget.sparsity)


@dataclass(frozen=True)
class TimidCheck(Timid):
    control: ClassVar[bool] = True


@pytest.mark.parametrize("strategy", [Sound, ByToken, ByPrompt, TimidCheck])
def test_a_sound_strategy_of_each_kind_is_accepted(strategy):
    check_strategy(strategy)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (Sound(), r"is not a class derived from spath_eval\.Strategy"),
        (Unseeded, r"'sound': select for 0\.25 of the neurons of a tiny llama gives two masks .*generator=context"),
        (Greedy, r"removes 0\.34\d of the neurons, more than context\.budget\.sparsity allows"),
        (Timid, r"removes 0\.12\d of the neurons, less than context\.budget\.sparsity asks for"),
        (Partial, r"the mask lacks 1 of the model's sites, model\.layers\.2\.mlp among them"),
        (Dictionary, r"returns a dict, not a spath_eval\.Mask: remove_lowest"),
        (Rescaling, r"changes the model's weights: work on copies"),
        (Hooking, r"changes the model's hooks"),
        (Learning, r"changes which weights have gradients"),
        (Normalising, r"changes the profile"),
        (Unprofiled, r"raises AttributeError: .*\(`requires` names no statistic, so that there is no context\.profile"),
        (
            Undeclared,
            r"refuses every kind of FFN.* llama: the profile has no statistic 'mean_square'.*Strategy\.requires",
        ),
        (Misspelling, r"`requires` is \('mean_absolute',\); .*mean_abs, mean_square, routing_share"),
        (Text, r"`requires` is 'mean_abs'; it must be a tuple"),
        (Fastidious, r"'sound' refuses every kind of FFN, and must accept one: llama: only on Sundays; phi: "),
        (OneSided, r"'sound:pool=model': select .* raises KeyError: 'model'"),
        (Demanding, r"'sound' cannot be made without options: ValueError: a power is needed"),
        (Listing, r"'sound': strategy 'sound' has no option '2'"),
        (HeadHunting, r"removes 1 of 8 experts at model\.layers\.0\.mlp\.experts: .*expert_sparsity"),
        (Short, r"must return a boolean tensor of the shape \[\d+, 64\] .* returns torch\.bool \[\d+, 63\]"),
        (Soft, r"returns torch\.float32"),
        (Overwriting, r"changes the activations it is handed"),
        (Peeking, r"reads `product`, although `reads_product` is false"),
        (Sparing, r"removes 0\.000 of the neurons, less than"),
        (Rolling, r"decides otherwise for equal contexts"),
        (ByWholePrompt, r"the mask of model\.layers\.0\.mlp has shape \[\d+, 64\]"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_broken_strategy_is_told_what_to_mend(strategy, message):
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        check_strategy(strategy)


# Architectures that are not


GATED = FFN("model.layers.*.mlp")


class Elsewhere(Architecture):
    def matches(self, config):
        return False


class Sliceless(Architecture):
    """Its compact execution is the dense one."""

    def sites(self, model):
        sites = super().sites(model)
        for site in sites:
            site.compact = lambda mask, site=site: site.module
        return sites


class Maskless(Architecture):
    """Its masked execution is the dense one."""

    def sites(self, model):
        sites = super().sites(model)
        for site in sites:
            site.filtered = lambda keep, site=site: site.observe(lambda seen: None)
        return sites


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (LLAMA.name, "'llama' is not a spath_eval.Architecture"),
        (Architecture("x", (), (GATED,)), r"`model_types` is \(\); it must be a tuple of what `model_type` is"),
        (Architecture("x", "llama", (GATED,)), "`model_types` is 'llama'; it must be a tuple"),
        (Architecture("x", ("lama",), (GATED,)), r"model type 'lama': transformers \S+ knows no such type"),
        (Architecture("x", ("llama",), (FFN("model.layers.*.ffn"),)), "model type 'llama': .*model.layers"),
        (Architecture("x", ("llama",), (FFN("model.layers.*.mlp", gate="w1"),)), "has no module 'w1', as an FFN of"),
        (Architecture("x", ("llama",), (FFN("model.layers.1.mlp"),)), "no FFN site lies in model.layers.0, so that"),
        (Elsewhere("x", ("llama",), (GATED,)), r"matches\(\) is false"),
        (Maskless("x", ("llama",), (GATED,)), "'llama', masked: .*does not change the logits"),
        (Sliceless("x", ("llama",), (GATED,)), "'llama', compact: .*does not change the logits"),
        (
            replace(LLAMA, reference_shapes=(ReferenceShape("Other", {"model_type": "gemma"}),)),
            "reference shape 'Other' is of model type 'gemma', which it does not claim",
        ),
        (replace(LLAMA, checkpoint=Path(__file__).parent), "its checkpoint: .*no config.json"),
    ],
)
def test_a_broken_architecture_is_told_what_to_mend(architecture, message):
    with pytest.raises(AssertionError, match=f"(?s){message}"):
        check_architecture(architecture)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"gemma": SIZES}, "sizes are given for gemma, which it does not claim"),
        ({"llama": {**SIZES, "vocab_size": 1_000_000}}, r"no tiny model .*`sizes` for it\): .* has [\d,]+ weights"),
        ({"llama": {**SIZES, "hidden_act": "no"}}, r"no tiny model can be made \(give check_architecture `sizes`"),
    ],
)
def test_sizes_that_make_no_tiny_model_are_told(sizes, message):
    with pytest.raises(AssertionError, match=message):
        check_architecture(Architecture("x", ("llama",), (GATED,)), sizes)


# Domains that are not


PROFILE, HELDOUT = [f"Loaf {n} is baked." for n in range(9)], [f"Cake {n} is cold." for n in range(9)]


def domain(profile=PROFILE, heldout=HELDOUT, *, texts=None, tasks=("arc_easy",), provenance="made up", licence="CC0"):
    split = {"profile": profile, "heldout": heldout}
    return Domain("toy", texts or split.__getitem__, tasks, provenance=provenance, licence=licence)


CALLS = iter(range(100))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("math", "'math' is not a spath_eval.Domain"),
        (domain(profile=[]), r"texts\('profile'\) has no document"),
        (domain(heldout=()), r"texts\('heldout'\) has no document"),
        (domain(profile="Bread."), r"texts\('profile'\) must return a list of documents, and returns a str"),
        (domain(texts=lambda split: iter(PROFILE)), "must return a list of documents, and returns a list_iterator"),
        (domain(profile=["Bread.", " \n"]), r"document 1 of texts\('profile'\) is ' \\n'"),
        (domain(profile=["Bread.", ""]), r"document 1 of texts\('profile'\) is empty"),
        (domain(texts=lambda split: [f"{split} {next(CALLS)}"]), "differs from one call to the next: seed what is"),
        (domain(texts=lambda split: 1 / 0), r"texts\('profile'\): ZeroDivisionError"),
        (
            domain(heldout=[*HELDOUT, "Loaf 3  is\nbaked."]),
            r"1 documents are in profile and in heldout, such as 'Loaf 3",
        ),
        (domain(provenance=""), "say its provenance"),
        (domain(licence=" "), "say its licence"),
        (domain(tasks=()), "has no tasks"),
        (domain(tasks=("arc_eazy",)), "unknown task 'arc_eazy'; the nearest are .*arc_easy"),
        (replace(domain(), benchmarks=("gsm9k",)), "unknown task 'gsm9k'"),
        (replace(domain(), task_paths=(Path("no-such-folder"),)), "the task folder no-such-folder is no folder"),
    ],
)
def test_a_broken_domain_is_told_what_to_mend(broken, message):
    with pytest.raises(AssertionError, match=message):
        check_domain(broken)


def test_a_sound_domain_is_accepted():
    check_domain(domain())


TASK = """
task: toy_choice
custom_dataset: !function toy_items.items
output_type: multiple_choice
test_split: test
num_fewshot: 0
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: label
"""


def test_items_of_a_domains_own_tasks_must_not_stand_in_its_texts(tmp_path):
    (tmp_path / "toy.yaml").write_text(TASK, encoding="utf-8")
    (tmp_path / "toy_items.py").write_text(
        "import datasets\n\ndef items(**_):\n"
        "    rows = [{'prompt': f'Loaf {n} is', 'choices': ['raw.', 'baked.'], 'label': 1} for n in range(20)]\n"
        "    return {'test': datasets.Dataset.from_list(rows)}\n",
        encoding="utf-8",
    )
    own = {"tasks": ("toy_choice",), "task_paths": (tmp_path,)}
    check_domain(replace(domain(profile=["Rolls are baked."]), **own))
    check_domain(replace(domain(profile=["Loaf 1 is baked."]), **own))
    with pytest.raises(AssertionError, match=r"9 of 20 items of toy_choice .* such as 'Loaf 0 is"):
        check_domain(replace(domain(), **own))


# Reports that are not


class Lines:
    name = "lines"

    def line(self, case, width):
        return f"{case['outcome']} {case['id']} {case.get('message', '')}"[:width]

    def render(self, record, *, width, colour):
        return "".join(f"{self.line(case, width)}\n" for case in record["cases"])


class Wide(Lines):
    def line(self, case, width):
        return super().line(case, 1000)


class Gaudy(Lines):
    def line(self, case, width):
        return f"\x1b[31m{super().line(case, width)}\x1b[0m"


class Sorting(Lines):
    def render(self, record, *, width, colour):
        record["cases"].sort(key=lambda case: case["seconds"])
        return super().render(record, width=width, colour=colour)


class Counting(Lines):
    name = "counting"
    calls = 0

    def render(self, record, *, width, colour):
        self.calls += 1
        return f"{self.calls}\n"


class Trusting(Lines):
    def line(self, case, width):
        return f"{case['quality'][0]['metric']}"


class First(Lines):
    def render(self, record, *, width, colour):
        return self.line(record["cases"][0], width) + "\n"


class Unended(Lines):
    def render(self, record, *, width, colour):
        return super().render(record, width=width, colour=colour).rstrip()


class Binary(Lines):
    def render(self, record, *, width, colour):
        return super().render(record, width=width, colour=colour).encode()


@pytest.mark.parametrize(
    ("report", "message"),
    [
        ("lines", "'lines' is not a report: it has no method render"),
        (Wide(), r"render of the example record with width=60 and colour=False has a line of \d+ columns: 'failed "),
        (Gaudy(), "colour=False has escape codes"),
        (Sorting(), "changes the record: work on a copy"),
        (Counting(), "differs from one call to the next"),
        (Trusting(), "the example record .*: KeyError: 'quality'"),
        (First(), "a record without cases .*: IndexError"),
        (Unended(), "does not end with a line end"),
        (Binary(), "must return a string, and returns a bytes"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_broken_report_is_told_what_to_mend(report, message):
    with pytest.raises(AssertionError, match=message):
        check_report(report)


def test_a_format_of_files_may_be_wider():
    check_report(Wide(), for_terminal=False)
    check_report(Lines())
