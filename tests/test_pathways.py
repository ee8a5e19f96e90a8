"""Pathways and their gates. Each gate is made to fail by a fault that would make the results worthless."""

from __future__ import annotations

import re
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from spath_eval import Budget, Context, Strategy, UsageError
from spath_eval.masks import Mask, drop_all, keep_all
from spath_eval.pathways import (
    PARITY_TOLERANCE,
    Exercise,
    GateError,
    PromptPathway,
    StaticPathway,
    TokenPathway,
    check_neutrality,
    check_parity,
)
from spath_eval.plugins.architectures.gemma import GEMMA
from spath_eval.texts import batches

EXECUTIONS = ["masked", "compact"]
PHASES = ["scoring", "prefill", "decode"]
FAULTY = "model.layers.1.mlp"


@pytest.fixture(params=["gemma", "gemma3n_text"])
def model(request, tiny_model):
    return tiny_model(request.param)


@pytest.fixture
def sites(model):
    return GEMMA.sites(model)


@pytest.fixture
def mask(sites):
    generator = torch.Generator().manual_seed(0)
    return Mask({site.path: torch.rand(site.width, generator=generator) > 0.3 for site in sites})


@pytest.fixture(scope="module")
def probe(tiny_tokenizer):
    documents = ["w7 w9 w11 w13 w50 w4", "w8 w21 w17"]
    return next(batches(tiny_tokenizer, documents, tokens=100, batch_size=2))


def logits(model, tokens, **inputs):
    with torch.inference_mode():
        return model(tokens, **inputs).logits


@dataclass
class Run:
    """A model run through all phases; `is_in` tells an injected fault which one it is in."""

    model: object
    phase: str = ""
    forward_tokens: int = 0

    def __call__(self, exercise, probe, *, phases=PHASES):
        handle = self.model.get_decoder().register_forward_pre_hook(self.remember, with_kwargs=True)
        try:
            if "scoring" in phases:
                exercise.scoring, self.phase = True, "scoring"
                logits(self.model, probe.input_ids, attention_mask=probe.attention_mask)
                logits(self.model, probe.input_ids[:1, :1])  # one token alone is no decoding
                exercise.scoring = False
            if "prefill" in phases:
                self.phase = "generation"
                row = probe.input_ids[1:]
                new = 4 if "decode" in phases else 1
                self.model.generate(
                    row, attention_mask=torch.ones_like(row), max_new_tokens=new, min_new_tokens=new, do_sample=False
                )
        finally:
            handle.remove()

    def is_in(self, phase):
        if self.phase == "scoring":
            return phase == "scoring"
        return phase == ("decode" if self.forward_tokens == 1 else "prefill")

    def remember(self, module, args, kwargs):
        self.forward_tokens = kwargs["input_ids"].shape[1]


@pytest.fixture
def run(model):
    return Run(model)


def watched(pathway, run, probe, *, phases=PHASES):
    exercise = Exercise(run.model, pathway)
    with pathway.applied(), exercise.watching():
        run(exercise, probe, phases=phases)
    return exercise


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_static_pathway_computes_what_zeroed_down_columns_compute(model, sites, mask, probe, execution):
    """The reference zeroes columns of the down projections in the weights, and uses nothing of the program."""
    pathway = StaticPathway(sites, mask, execution)
    with pathway.applied():
        sparse = logits(model, probe.input_ids)
    dense = logits(model, probe.input_ids)
    for layer in range(3):
        path = f"model.layers.{layer}.mlp"
        model.get_submodule(path).down_proj.weight[:, ~mask[path]] = 0
    expected = logits(model, probe.input_ids)
    assert (sparse - expected).abs().max() < 2e-5 * expected.abs().max()
    assert (sparse - dense).abs().max() > 1e-2


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_mask_of_another_model_is_refused(sites, tiny_model, execution):
    other = keep_all(GEMMA.sites(tiny_model("gemma", num_hidden_layers=2)))
    with pytest.raises(UsageError, match="lacks 1 of the model's sites"):
        StaticPathway(sites, other, execution)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_exercise_passes_where_the_mask_is_applied(sites, mask, run, probe, execution):
    exercise = watched(StaticPathway(sites, mask, execution), run, probe)
    assert exercise.check(PHASES) == {"ok": True, "phases": {"scoring": 2, "prefill": 1, "decode": 3}, "sites": 3}


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("select", [keep_all, drop_all])
def test_exercise_passes_where_all_or_nothing_is_kept(sites, run, probe, execution, select):
    assert watched(StaticPathway(sites, select(sites), execution), run, probe).check(PHASES)["ok"]


def test_watching_changes_nothing_and_leaves_nothing_behind(model, sites, mask, run, probe):
    dense = logits(model, probe.input_ids)
    pathway = StaticPathway(sites, mask, "compact")
    with pathway.applied():
        sparse = logits(model, probe.input_ids)
        with Exercise(model, pathway).watching():
            assert torch.equal(logits(model, probe.input_ids), sparse)
    assert torch.equal(logits(model, probe.input_ids), dense)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def not_applied(site, run, phases):
    """Make the mask have no effect at `site` in `phases`, in either execution."""
    install = site.installed

    def masked(mask):
        keep = mask[site.path]
        return site.filtered(lambda gate, product: None if any(map(run.is_in, phases)) else keep)

    @contextmanager
    def installed(compact):
        def swap(*call):
            run.remember(*call)
            setattr(site._parent, site._name, site.module if any(map(run.is_in, phases)) else compact)

        run_hook = run.model.get_decoder().register_forward_pre_hook(swap, with_kwargs=True)
        with install(compact):
            yield
        run_hook.remove()

    site.masked, site.installed = masked, installed


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("faulty_phases", [PHASES, ["decode"], ["prefill"], ["scoring"]], ids="-".join)
@pytest.mark.parametrize("layer", [0, 2])
def test_a_mask_that_is_not_applied_at_one_site_fails(sites, mask, run, probe, execution, faulty_phases, layer):
    site = sites[layer]
    not_applied(site, run, faulty_phases)
    exercise = watched(StaticPathway(sites, mask, execution), run, probe)
    with pytest.raises(GateError, match=rf"mask not applied at {re.escape(site.path)} in {faulty_phases[0]}:"):
        exercise.check(PHASES)


def test_one_faulty_forward_fails_though_those_after_it_are_right(sites, mask, run, probe):
    site = sites[1]
    site.masked = lambda mask: site.filtered(
        lambda gate, product: None if run.is_in("scoring") and len(product) > 1 else mask[site.path]
    )
    exercise = watched(StaticPathway(sites, mask, "masked"), run, probe)
    assert exercise.forwards["scoring"] == 2
    with pytest.raises(GateError, match=rf"mask not applied at {re.escape(site.path)} in scoring"):
        exercise.check(PHASES)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_mask_that_is_applied_nowhere_fails(model, sites, mask, run, probe, execution):
    pathway = StaticPathway(sites, mask, execution)
    exercise = Exercise(model, pathway)
    with exercise.watching():
        run(exercise, probe)
    with pytest.raises(GateError, match=r"mask not applied at model\.layers\.0\.mlp in scoring"):
        exercise.check(PHASES)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_one_neuron_that_is_not_removed_fails(sites, mask, run, probe, execution):
    site = sites[1]
    leaky = mask[site.path].clone()
    leaky[int((~leaky).nonzero()[0])] = True
    applied = StaticPathway(sites, Mask({**mask.keep, site.path: leaky}), execution)
    exercise = Exercise(run.model, StaticPathway(sites, mask, execution))
    with applied.applied(), exercise.watching():
        run(exercise, probe)
    with pytest.raises(GateError, match=rf"mask not applied at {re.escape(site.path)} in scoring"):
        exercise.check(PHASES)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("faulty_phase", PHASES)
def test_a_site_that_is_bypassed_fails(sites, mask, run, probe, execution, faulty_phase):
    pathway = StaticPathway(sites, mask, execution)
    site = sites[1]
    module = site.module if execution == "masked" else pathway.compact_module(site)
    forward = module.forward
    module.forward = lambda x: torch.zeros_like(x) if run.is_in(faulty_phase) else forward(x)
    exercise = watched(pathway, run, probe)
    with pytest.raises(GateError, match=rf"mask not applied at {re.escape(site.path)} in {faulty_phase}: seen in 0 of"):
        exercise.check(PHASES)


@pytest.mark.parametrize("phases", [["prefill", "decode"], ["scoring", "prefill"], ["scoring"], []], ids="-".join)
def test_a_phase_that_was_never_seen_fails(sites, mask, run, probe, phases):
    exercise = watched(StaticPathway(sites, mask, "masked"), run, probe, phases=phases)
    unseen = next(phase for phase in PHASES if phase not in phases)
    with pytest.raises(GateError, match=f"never run with the mask in {unseen}"):
        exercise.check(PHASES)
    exercise.check(phases)


def test_an_infinite_activation_that_is_kept_is_no_fault(sites, mask, run, probe):
    """Half precision overflows in some models: the gate is about what had to be zero."""
    kept = int(mask[FAULTY].nonzero()[0])
    sites[1].module.up_proj.weight[kept] = torch.inf
    assert watched(StaticPathway(sites, mask, "masked"), run, probe, phases=["scoring"]).check(["scoring"])["ok"]


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_neutrality_is_exact_and_drop_all_shows(model, sites, probe, execution):
    found = check_neutrality(model, sites, probe, execution)
    assert found.keep_all_difference == 0
    dense = logits(model, probe.input_ids, attention_mask=probe.attention_mask)
    for site in sites:
        site.module.down_proj.weight.zero_()
    difference = (logits(model, probe.input_ids, attention_mask=probe.attention_mask) - dense).abs().max()
    assert found.drop_all_difference == pytest.approx(float(difference), rel=1e-4)


def test_keep_all_that_perturbs_fails_masked(model, sites, probe):
    site, masked = sites[1], sites[1].masked

    @contextmanager
    def perturbed(mask):
        handle = site.module.register_forward_hook(lambda module, inputs, output: output * (1 + 1e-5))
        with masked(mask):
            yield
        handle.remove()

    site.masked = perturbed
    with pytest.raises(GateError, match=r"keeping every neuron changes the logits by .*e-.*, not by exactly 0"):
        check_neutrality(model, sites, probe, "masked")


def test_keep_all_that_perturbs_fails_compact(model, sites, probe):
    site, compact = sites[1], sites[1].compact
    almost = keep_all(sites).keep[site.path].clone()
    almost[0] = False
    site.compact = lambda mask: compact(Mask({site.path: almost}) if mask[site.path].all() else mask)
    with pytest.raises(GateError, match="keeping every neuron changes the logits"):
        check_neutrality(model, sites, probe, "compact")


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_drop_all_without_effect_fails(model, sites, probe, execution):
    for site in sites:
        site.masked = site.installed = lambda what: nullcontext()
    with pytest.raises(GateError, match="removing every neuron does not change the logits"):
        check_neutrality(model, sites, probe, execution)


def test_parity_of_compact_and_masked(model, sites, mask, probe):
    found = check_parity(model, StaticPathway(sites, mask, "compact"), probe)
    assert found["ok"]
    assert 0 <= found["max_relative_difference"] < found["tolerance"] == 1e-5
    with StaticPathway(sites, mask, "masked").applied():
        masked = logits(model, probe.input_ids, attention_mask=probe.attention_mask)
    with StaticPathway(sites, mask, "compact").applied():
        compact = logits(model, probe.input_ids, attention_mask=probe.attention_mask)
    assert found["max_logit_difference"] == pytest.approx(float((compact - masked).abs().max()), rel=1e-3, abs=1e-9)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parity_in_half_precision(model, mask, probe, dtype):
    model.to(dtype)
    found = check_parity(model, StaticPathway(GEMMA.sites(model), mask, "compact"), probe)
    assert found["max_relative_difference"] <= found["tolerance"] == PARITY_TOLERANCE[dtype]


@pytest.mark.parametrize("whole", [[FAULTY], [f"model.layers.{layer}.mlp" for layer in range(3)]])
def test_parity_where_sites_are_kept_whole(model, sites, mask, probe, whole):
    """Pooling over the model may spare a layer, and keep-all spares every one."""
    kept = keep_all(sites)
    mixed = Mask({site.path: (kept if site.path in whole else mask)[site.path] for site in sites})
    found = check_parity(model, StaticPathway(sites, mixed, "compact"), probe)
    assert found["ok"]
    if len(whole) == 3:
        assert found["max_relative_difference"] == found["max_logit_difference"] == 0


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", ["up_proj", "down_proj"])
def test_a_wrong_row_in_a_compact_module_fails(model, sites, mask, probe, layer, name):
    pathway = StaticPathway(sites, mask, "compact")
    pathway.compact_module(sites[layer]).get_submodule(name).weight[3] *= 1.01
    with pytest.raises(GateError, match=rf"compact differs from masked at {re.escape(sites[layer].path)} by"):
        check_parity(model, pathway, probe)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_compact_module_that_runs_the_dense_ffn_fails(model, sites, mask, probe, layer):
    """Its neurons are masked while the reference runs, and must not be when the compact module does."""
    pathway = StaticPathway(sites, mask, "compact")
    pathway.compact_module(sites[layer]).forward = sites[layer].module.forward
    with pytest.raises(GateError, match=rf"compact differs from masked at {re.escape(sites[layer].path)} by"):
        check_parity(model, pathway, probe)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_compact_module_that_gives_nan_fails(model, sites, mask, probe, layer):
    pathway = StaticPathway(sites, mask, "compact")
    pathway.compact_module(sites[layer]).up_proj.weight[3] = torch.nan
    with pytest.raises(GateError, match=rf"compact differs from masked at {re.escape(sites[layer].path)} by nan"):
        check_parity(model, pathway, probe)


def test_a_site_that_is_never_compared_fails(model, sites, mask, probe):
    layer = model.model.layers[1]
    layer.mlp.__class__ = type("Unhooked", (type(layer.mlp),), {"__call__": lambda self, x: self.forward(x)})
    with pytest.raises(GateError, match=re.escape(FAULTY)):
        check_parity(model, StaticPathway(sites, mask, "compact"), probe)


@dataclass(frozen=True)
class TopHalf(Strategy):
    """Each token keeps the half of the neurons with the largest products."""

    name: ClassVar[str] = "top-half"
    kind: ClassVar[str] = "token"

    def keep(self, context, site, gate, product):
        assert gate.shape == product.shape
        assert site is context.sites[site.path]
        return top_half(product)


def top_half(product):
    kept = torch.zeros(product.shape, dtype=torch.bool)
    return kept.scatter(-1, product.abs().topk(product.shape[-1] // 2).indices, True)


@dataclass(frozen=True)
class AboveMedian(Strategy):
    """What follows a prompt keeps the neurons that were more active over it than the median."""

    name: ClassVar[str] = "above-median"
    kind: ClassVar[str] = "prompt"

    def select_prompt(self, context, activations):
        assert list(activations) == list(context.sites)
        return Mask({path: above_median(values) for path, values in activations.items()})


def above_median(values):
    activity = values.abs().mean(0)
    return activity > activity.median()


@pytest.fixture
def context(sites):
    return Context("math", Budget(0.5), {site.path: site for site in sites}, None, torch.Generator())


@contextmanager
def changing_down_inputs(model, change):
    """The test's own way to change what enters the down projections: `change(path, values [tokens, width])`."""
    with ExitStack() as stack:
        for number, layer in enumerate(model.model.layers):

            def hook(module, inputs, path=f"model.layers.{number}.mlp"):
                values = inputs[0].flatten(0, -2)
                return change(path, values).reshape(inputs[0].shape)

            handle = layer.mlp.down_proj.register_forward_pre_hook(hook)
            stack.callback(handle.remove)
        yield


def test_token_pathway_keeps_by_token(model, sites, context, probe):
    pathway = TokenPathway(sites, TopHalf(), context)
    with pathway.applied():
        sparse = logits(model, probe.input_ids)
    with changing_down_inputs(model, lambda path, values: values * top_half(values)):
        expected = logits(model, probe.input_ids)
    assert torch.equal(sparse, expected)
    assert not torch.equal(sparse, logits(model, probe.input_ids))
    assert pathway.achieved == pytest.approx(0.5)
    assert pathway.total == probe.input_ids.numel() * sum(site.width for site in sites)


def test_exercise_passes_for_a_token_strategy(sites, context, run, probe):
    exercise = watched(TokenPathway(sites, TopHalf(), context), run, probe)
    assert exercise.check(PHASES)["phases"] == {"scoring": 2, "prefill": 1, "decode": 3}


@pytest.mark.parametrize("faulty_phase", PHASES)
def test_a_token_strategy_that_is_not_applied_at_one_site_fails(sites, context, run, probe, faulty_phase):
    site, filtered = sites[1], sites[1].filtered

    def faulty(keep):
        def ignoring(gate, product):
            kept = keep(gate, product)
            return None if run.is_in(faulty_phase) else kept

        return filtered(ignoring)

    site.filtered = faulty
    exercise = watched(TokenPathway(sites, TopHalf(), context), run, probe)
    with pytest.raises(GateError, match=rf"mask not applied at {re.escape(site.path)} in {faulty_phase}"):
        exercise.check(PHASES)


@pytest.mark.parametrize("faulty_phase", PHASES)
def test_a_token_strategy_that_is_not_asked_at_one_site_fails(sites, context, run, probe, faulty_phase):
    site, filtered = sites[1], sites[1].filtered
    site.filtered = lambda keep: filtered(lambda *seen: None if run.is_in(faulty_phase) else keep(*seen))
    with pytest.raises(GateError, match=rf"mask not applied at {re.escape(site.path)} in {faulty_phase}"):
        watched(TokenPathway(sites, TopHalf(), context), run, probe).check(PHASES)


def test_prompt_pathway_leaves_the_prompt_dense_and_masks_what_follows(model, sites, context, probe):
    prompt, rest = probe.input_ids[1:, :4], probe.input_ids[1:, 4:]
    pathway = PromptPathway(sites, AboveMedian(), context)
    with pathway.applied(), torch.inference_mode():
        pathway.begin()
        first = model(prompt, use_cache=True)
        then = model(rest, cache=first.cache, use_cache=True)

    activations = {}
    with torch.inference_mode():
        with changing_down_inputs(model, lambda path, values: activations.setdefault(path, values)):
            dense = model(prompt, use_cache=True)
        keep = {path: above_median(values) for path, values in activations.items()}
        with changing_down_inputs(model, lambda path, values: values * keep[path]):
            expected = model(rest, cache=dense.cache, use_cache=True)
    assert torch.equal(first.logits, dense.logits)
    assert torch.equal(then.logits, expected.logits)
    assert not torch.equal(then.logits, logits(model, probe.input_ids[1:])[:, 4:])
    removed = sum(int((~kept).sum()) for kept in keep.values()) / sum(site.width for site in sites)
    assert pathway.achieved == pytest.approx(removed)
    assert 0.4 < removed < 0.6


def test_each_prompt_has_its_own_mask(model, sites, context):
    pathway, masks = PromptPathway(sites, AboveMedian(), context), []
    with pathway.applied(), torch.inference_mode():
        for prompt in ([[2, 5, 6]], [[2, 90, 80, 70]]):
            pathway.begin()
            cache = model(torch.tensor(prompt), use_cache=True).cache
            assert pathway.mask is None
            model(torch.tensor([[7]]), cache=cache, use_cache=True)
            masks.append(pathway.mask.digest)
            model(torch.tensor([[8]]), cache=cache, use_cache=True)
            assert pathway.mask.digest == masks[-1], "selected once per prompt"
    assert masks[0] != masks[1]
    assert len(pathway.removed) == 2


def test_a_prompt_mask_that_does_not_fit_is_refused(model, sites, context):
    @dataclass(frozen=True)
    class Forgetful(AboveMedian):
        def select_prompt(self, context, activations):
            return Mask({path: above_median(values) for path, values in list(activations.items())[1:]})

    pathway = PromptPathway(sites, Forgetful(), context)
    with pathway.applied(), pytest.raises(UsageError, match="lacks 1 of the model's sites"):
        model.generate(torch.tensor([[2, 5, 6]]), max_new_tokens=2, do_sample=False)


def test_exercise_passes_for_a_prompt_strategy(sites, context, run, probe):
    pathway = PromptPathway(sites, AboveMedian(), context)
    exercise = watched(pathway, run, probe, phases=["prefill", "decode"])
    assert exercise.check(["prefill", "decode"])["phases"] == {"prefill": 1, "decode": 3}
    assert len(pathway.removed) == 1


def test_a_prompt_strategy_that_is_not_applied_in_decode_fails(sites, context, run, probe):
    site, filtered = sites[1], sites[1].filtered
    site.filtered = lambda keep: filtered(lambda *seen: None if run.is_in("decode") else keep(*seen))
    exercise = watched(PromptPathway(sites, AboveMedian(), context), run, probe, phases=["prefill", "decode"])
    with pytest.raises(GateError, match=rf"mask not applied at {re.escape(site.path)} in decode"):
        exercise.check(["prefill", "decode"])
