"""Sites of routed experts: each neuron and each routing decision against loops in float64 over the raw weights."""

from __future__ import annotations

import itertools
import random
import re
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from spath_eval import FFN, UsageError
from spath_eval.masks import Mask, drop_all, keep_all, remove_experts, remove_lowest
from spath_eval.pathways import (
    PARITY_TOLERANCE,
    Exercise,
    GateError,
    StaticPathway,
    check_neutrality,
    check_parity,
)
from spath_eval.plugins.architectures.gemma import GEMMA
from spath_eval.plugins.architectures.moe import MOE
from spath_eval.profiling import ROUTING, STATISTICS, profile_domain
from spath_eval.sites import find_sites
from spath_eval.texts import Corpus, batches

KINDS = [*MOE.model_types, "gemma4_text+experts"]
EXECUTIONS = ["masked", "compact"]
IMPLEMENTATIONS = ["eager", "batched_mm", "grouped_mm"]
"""The experts functions of transformers."""
PHASES = ["scoring", "prefill", "decode"]
ROUTED, DENSE = ("experts", 24, 8), ("gated", 64, None)
LAYERS = {
    "mixtral": {"mlp.experts": ROUTED},
    "qwen2_moe": {"mlp.experts": ROUTED, "mlp.shared_expert": ("gated", 40, None)},
    "qwen3_moe": {"mlp.experts": ROUTED},
    "olmoe": {"mlp.experts": ROUTED},
    "phimoe": {"mlp.experts": ROUTED},
    "deepseek_v3": {"mlp.experts": ROUTED, "mlp.shared_experts": ("gated", 48, None)},
    "gpt_oss": {"mlp.experts": ROUTED},
    "kimi_k25": {"mlp.experts": ROUTED, "mlp.shared_experts": ("gated", 48, None)},
    "gemma4_text+experts": {"mlp": DENSE, "experts": ROUTED},
}
"""What the layers of each model hold: the path within the layer to shape, width and number of experts."""


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind, tiny_model):
    return tiny_model(kind)


@pytest.fixture
def sites(model):
    return sites_of(model)


@pytest.fixture
def tokens():
    return torch.randint(3, 100, (2, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def probe(tiny_tokenizer):
    documents = ["w7 w9 w11 w13 w50 w4", "w8 w21 w17"]
    return next(batches(tiny_tokenizer, documents, tokens=100, batch_size=2))


def sites_of(model):
    return next(family for family in (GEMMA, MOE) if family.matches(model.config)).sites(model)


def mixtures(sites):
    return [site for site in sites if site.experts]


def logits(model, tokens):
    with torch.inference_mode():
        return model(tokens).logits


def random_scores(sites, shape, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {site.path: torch.rand(shape(site), generator=generator) for site in sites}


def neuron_mask(sites, share=0.5, pool="layer"):
    """With `pool="model"` the experts lose unequal numbers of neurons."""
    shape = lambda site: (site.width,) if site.experts is None else (site.experts, site.width)  # noqa: E731
    scores = random_scores(sites, shape)
    if pool == "model":
        scores |= {site.path: scores[site.path] * torch.linspace(0.8, 1.2, 8)[:, None] for site in mixtures(sites)}
    return remove_lowest(scores, share, pool)


def expert_mask(sites, share=0.25, neurons=0.0):
    """Removes another choice of experts at each site."""
    base = neuron_mask(sites, neurons) if neurons else keep_all(sites)
    return remove_experts(base, random_scores(mixtures(sites), lambda site: (site.experts,)), share)


MASKS = {
    "neurons": neuron_mask,
    "unequal neurons": lambda sites: neuron_mask(sites, 0.6, "model"),
    "experts": expert_mask,
    "both": lambda sites: expert_mask(sites, 0.25, 0.5),
}


@pytest.fixture(params=MASKS)
def mask(request, sites):
    return MASKS[request.param](sites)


@dataclass
class Call:
    """What a site's module is called with: `hidden` `[tokens, hidden]`, of routed experts also the router's choice."""

    hidden: torch.Tensor
    experts: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    router_input: torch.Tensor | None = None

    def __call__(self, module):
        with torch.inference_mode():
            return module(self.hidden, self.experts, self.weights)


def calls_of(model, sites, tokens):
    """Every site's call in one forward, seen by hooks of the test's own."""
    calls, routed = {}, {}

    def remember(path, inputs):
        calls[path] = Call(*inputs, router_input=routed.get(path))

    with ExitStack() as stack:
        for site in sites:
            hook = lambda _, inputs, path=site.path: remember(path, inputs)  # noqa: E731
            stack.callback(site.installed_module.register_forward_pre_hook(hook).remove)
            if site.experts:
                hook = lambda _, inputs, path=site.path: routed.update({path: inputs[0]})  # noqa: E731
                stack.callback(site.router.register_forward_pre_hook(hook).remove)
        logits(model, tokens)
    return calls


def raw(parameter):
    return parameter.detach().double().numpy()


def down_of(module, expert):
    """Down weights `[hidden, width]` and bias of an expert."""
    if hasattr(module, "down_proj_bias"):
        return raw(module.down_proj[expert]).T, raw(module.down_proj_bias[expert])
    return raw(module.down_proj[expert]), 0


def float64_output(site, call, keep, reference_activations):
    """The routed experts' output `[tokens, hidden]` with the neurons `keep` `[experts, width]`."""
    result = np.zeros(call.hidden.shape)
    for token, expert, weight in choices(call):
        active = reference_activations(site.module, call.hidden[token : token + 1], torch.tensor([expert]))[0]
        down, bias = down_of(site.module, expert)
        result[token] += weight * (down @ (active * keep[expert].numpy()) + bias)
    return result


def choices(call):
    """Token, expert and weight of every choice that the router made."""
    for token, (experts, weights) in enumerate(zip(call.experts.tolist(), call.weights.tolist(), strict=True)):
        for expert, weight in zip(experts, weights, strict=True):
            yield token, expert, weight


def relative_difference(values, reference):
    return np.abs(np.asarray(values, dtype=np.float64) - reference).max() / np.abs(reference).max()


def test_routed_shared_and_dense_sites_are_found_in_one_model(kind, model, sites):
    layers = "model.language_model.layers" if kind == "kimi_k25" else "model.layers"
    expected = {f"{layers}.{n}.{path}": what for n in range(3) for path, what in LAYERS[kind].items()}
    if kind in ("qwen3_moe", "deepseek_v3", "kimi_k25"):  # its first layer is dense
        expected = {path: what for path, what in expected.items() if not path.startswith(f"{layers}.0.")}
        expected = {f"{layers}.0.mlp": DENSE} | expected
    if kind == "gemma4_text+experts":  # its last layer shares keys and values, and is twice as wide
        expected["model.layers.2.mlp"] = ("gated", 128, None)
    assert {site.path: (site.ffn.shape, site.width, site.experts) for site in sites} == expected
    assert [site.path for site in sites] == [path for path, _ in model.named_modules() if path in expected]
    assert all(site.module is model.get_submodule(site.path) is site.installed_module for site in sites)


def test_gate_up_and_down_are_the_weights_of_each_expert(kind, sites):
    for site in mixtures(sites):
        assert site.gate.shape == site.up.shape == (8, 24, 32)
        for expert in range(8):
            fused = site.module.gate_up_proj[expert]
            gate, up = (fused.T[::2], fused.T[1::2]) if kind == "gpt_oss" else fused.split(24)
            assert torch.equal(site.gate[expert], gate)
            assert torch.equal(site.up[expert], up)
            np.testing.assert_array_equal(raw(site.down[expert]), down_of(site.module, expert)[0])


def test_observed_activations_equal_a_float64_loop(kind, model, sites, tokens, reference_activations):
    calls, observed = calls_of(model, sites, tokens), {}
    with ExitStack() as stack:
        for site in mixtures(sites):
            stack.enter_context(site.observe(lambda seen, path=site.path: observed.update({path: seen})))
        logits(model, tokens)
    for site in mixtures(sites):
        call, seen = calls[site.path], observed[site.path]
        rows = {
            (token, expert): (weight, values)
            for token, expert, weight, values in zip(
                seen.tokens.tolist(), seen.experts.tolist(), seen.weights.tolist(), seen.values, strict=True
            )
        }
        assert len(rows) == len(seen.values) == 20 * 2
        for token, expert, weight in choices(call):
            found, values = rows.pop((token, expert))
            assert found == pytest.approx(weight, rel=1e-5)
            expected = reference_activations(site.module, call.hidden[token : token + 1], torch.tensor([expert]))
            assert relative_difference(values, expected[0]) < 5e-6
        assert not rows


def test_the_clamps_of_gpt_oss_matter(tiny_model, tokens):
    """Else the test above would not see them."""
    model = tiny_model("gpt_oss")
    sites = sites_of(model)
    for site in sites:
        call = calls_of(model, sites, tokens)[site.path]
        both = raw(call.hidden) @ raw(site.module.gate_up_proj[0]) + raw(site.module.gate_up_proj_bias[0])
        assert (both[:, ::2] > 1.5).any()
        assert (both[:, 1::2] > 1.5).any()
        assert (both[:, 1::2] < -1.5).any()


@pytest.mark.parametrize("batch_size", [1, 5])
def test_profile_of_each_expert_equals_a_float64_loop(model, sites, tiny_tokenizer, batch_size, reference_activations):
    """One document at a time, without padding; of each expert the mean over the tokens that were routed to it."""
    generator = random.Random(0)
    documents = [[generator.randrange(4, 100) for _ in range(generator.randrange(1, 16))] for _ in range(10)]
    count = sum(map(len, documents))
    sums = {site.path: np.zeros((2, site.experts or 1, site.width)) for site in sites}
    routed = {site.path: np.zeros(site.experts or 1) for site in sites}
    for document in documents:
        calls = calls_of(model, sites, torch.tensor([[2, *document]]))
        for site in sites:
            call = calls[site.path]
            if not site.experts:
                active = reference_activations(site.module, call.hidden)[1:]
                sums[site.path][:, 0] += np.stack([np.abs(active).sum(0), np.square(active).sum(0)])
                routed[site.path] += len(active)
                continue
            for token, expert, _ in choices(call):
                if token == 0:  # BOS
                    continue
                hidden = call.hidden[token : token + 1]
                active = reference_activations(site.module, hidden, torch.tensor([expert]))[0]
                sums[site.path][:, expert] += np.stack([np.abs(active), np.square(active)])
                routed[site.path][expert] += 1

    texts = tuple(" ".join(f"w{token}" for token in document) for document in documents)
    names = [*STATISTICS, ROUTING]
    part = profile_domain(
        model, tiny_tokenizer, sites, "math", Corpus(texts, (), ""), names, tokens=1000, batch_size=batch_size
    )
    assert part.tokens == count
    assert part.statistics[ROUTING].keys() == {site.path for site in mixtures(sites)}
    for site in sites:
        means = sums[site.path] / np.maximum(routed[site.path], 1)[:, None]
        means = means if site.experts else means[:, 0]
        for name, expected in zip(STATISTICS, means, strict=True):
            found = part.statistics[name][site.path]
            assert found.dtype == torch.float64
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        if site.experts:
            shares = part.statistics[ROUTING][site.path]
            np.testing.assert_allclose(shares, routed[site.path] / count, rtol=1e-12)
            assert float(shares.sum()) == pytest.approx(2)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keep_all_runs_the_models_own_experts_function_and_changes_exactly_nothing(
    model, sites, tokens, probe, execution, implementation
):
    model.get_decoder().set_experts_implementation(implementation)
    dense = logits(model, tokens)
    with StaticPathway(sites, keep_all(sites), execution).applied():
        assert not any("forward" in site.installed_module.__dict__ for site in mixtures(sites))
        assert torch.equal(logits(model, tokens), dense)
    found = check_neutrality(model, sites, probe, execution)
    assert found.keep_all_difference == 0
    assert found.drop_all_difference > 1e-2


def test_masked_and_compact_equal_a_float64_loop(model, sites, tokens, mask, reference_activations):
    with StaticPathway(sites, mask, "masked").applied():
        calls = calls_of(model, sites, tokens)
    for site in mixtures(sites):
        call = calls[site.path]
        expected = float64_output(site, call, mask[site.path], reference_activations)
        with site.masked(mask):
            masked = call(site.module)
        assert relative_difference(masked, expected) < 1e-5
        for implementation in IMPLEMENTATIONS:
            model.get_decoder().set_experts_implementation(implementation)
            compact = call(site.compact(mask))
            assert relative_difference(compact, expected) < 1e-5
            assert relative_difference(compact, raw(masked)) < 1e-5


def test_whole_models_agree_masked_and_compact_and_differ_from_dense(model, sites, tokens, mask, probe):
    assert check_parity(model, StaticPathway(sites, mask, "compact"), probe)["max_relative_difference"] < 1e-5
    found = {}
    for execution in EXECUTIONS:
        with StaticPathway(sites, mask, execution).applied():
            found[execution] = logits(model, tokens)
    assert relative_difference(found["compact"], raw(found["masked"])) < 1e-4
    assert (found["masked"] - logits(model, tokens)).abs().max() > 1e-2


@pytest.mark.parametrize("mask", ["unequal neurons", "both"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masked_and_compact_agree_in_half_precision(model, sites, tokens, mask, dtype):
    with StaticPathway(sites, mask, "masked").applied():
        calls = calls_of(model, sites, tokens)
    model.to(dtype)
    for site in mixtures(sites):
        call = calls[site.path]
        call = Call(call.hidden.to(dtype), call.experts, call.weights.to(dtype))
        with site.masked(mask):
            masked = call(site.module)
        compact = call(site.compact(mask))
        assert compact.dtype == dtype
        assert relative_difference(compact.float(), raw(masked)) < PARITY_TOLERANCE[dtype]


def test_compact_has_fewer_parameters_and_weight_bytes_are_its_own(kind, sites, mask):
    for site in sites:
        compact = site.compact(mask)
        real = sum(parameter.nbytes for parameter in compact.parameters())
        dense = sum(parameter.nbytes for parameter in site.module.parameters())
        assert (site.weight_bytes(mask), site.weight_bytes(None)) == (real, dense)
        if not site.experts:
            continue
        assert real < dense
        width = compact.down_proj.shape[1 if kind == "gpt_oss" else 2]
        most = int(mask[site.path].sum(1).max())
        assert site.kept_width(mask) == width
        assert (width % 8, most <= width < most + 8) == (0, True)
        kept = int(mask.experts[site.path].sum()) if mask.experts else 8
        assert site.kept_experts(mask) == len(compact.down_proj) == len(compact.gate_up_proj) == kept
        assert site.kept_experts(None) == 8


def test_a_width_that_is_no_multiple_of_eight_is_never_exceeded(tiny_model, tokens, reference_activations):
    model = tiny_model("mixtral", intermediate_size=20)
    sites = sites_of(model)
    keep = {site.path: torch.ones(8, 20, dtype=torch.bool) for site in sites}
    keep["model.layers.0.mlp.experts"][:, 0] = False  # 19 stay, which are not filled up to 24
    mask = Mask(keep)
    assert [site.kept_width(mask) for site in sites] == [20, 20, 20]
    for path, call in calls_of(model, sites, tokens).items():
        site = next(site for site in sites if site.path == path)
        expected = float64_output(site, call, mask[path], reference_activations)
        assert relative_difference(call(site.compact(mask)), expected) < 1e-5


def test_experts_that_keep_fewer_neurons_are_filled_up_with_zeros(tiny_model):
    """Under a mask whose counts differ by expert, what is added to a smaller expert can change nothing."""
    (site, *_) = sites_of(tiny_model("mixtral"))
    keep = torch.zeros(8, 24, dtype=torch.bool)
    for expert in range(8):
        keep[expert, expert : 2 * expert + 1] = True
    compact = site.compact(Mask({site.path: keep}))
    assert compact.down_proj.shape == (8, 32, 8)
    assert compact.gate_up_proj.shape == (8, 16, 32)
    for expert in range(8):
        kept = expert + 1
        assert torch.equal(compact.down_proj[expert, :, :kept], site.down[expert][:, keep[expert]])
        assert torch.equal(compact.gate_up_proj[expert, :kept], site.gate[expert][keep[expert]])
        assert torch.equal(compact.gate_up_proj[expert, 8 : 8 + kept], site.up[expert][keep[expert]])
        rest = (compact.down_proj[expert, :, kept:], compact.gate_up_proj[expert, kept:8])
        assert not any(part.any() for part in (*rest, compact.gate_up_proj[expert, 8 + kept :]))


def test_where_all_neurons_of_an_expert_go_its_output_is_its_bias(kind, model, sites, tokens, reference_activations):
    for site in mixtures(sites):
        mask = drop_all([site])
        call = calls_of(model, sites, tokens)[site.path]
        expected = float64_output(site, call, mask[site.path], reference_activations)
        assert expected.any() == (kind == "gpt_oss")
        for module, context in ((site.module, site.masked(mask)), (site.compact(mask), nullcontext())):
            with context:
                np.testing.assert_allclose(call(module), expected, atol=1e-6)


def test_repaired_down_weights_take_the_place_of_the_models_own(kind, model, sites, tokens, reference_activations):
    mask, calls, dense = neuron_mask(sites), calls_of(model, sites, tokens), logits(model, tokens)
    for site, compact in itertools.product(mixtures(sites), [False, True]):
        weight = torch.randn(site.down.shape, generator=torch.Generator().manual_seed(3))
        bias = torch.arange(8 * 32).view(8, 32).float() if kind == "gpt_oss" else None
        call, expected = calls[site.path], np.zeros((20, 32))
        for token, expert, share in choices(call):
            active = reference_activations(site.module, call.hidden[token : token + 1], torch.tensor([expert]))[0]
            output = raw(weight[expert]) @ (active * mask[site.path][expert].numpy())
            expected[token] += share * (output + (0 if bias is None else raw(bias[expert])))
        with site.with_down(mask, weight, bias, compact=compact):
            assert relative_difference(call(site.installed_module), expected) < 1e-5
    assert torch.equal(logits(model, tokens), dense)


def test_filtered_keeps_by_token(model, sites, tokens, reference_activations):
    calls = calls_of(model, sites, tokens)
    for site in mixtures(sites):
        call, gates = calls[site.path], []
        keep = lambda gate, product: (gates.append(gate), product > 0)[1]  # noqa: E731, B023
        with site.filtered(keep):
            output = call(site.module)
        expected = np.zeros(call.hidden.shape)
        for token, expert, weight in choices(call):
            active = reference_activations(site.module, call.hidden[token : token + 1], torch.tensor([expert]))[0]
            down, bias = down_of(site.module, expert)
            expected[token] += weight * (down @ np.maximum(active, 0) + bias)
        assert relative_difference(output, expected) < 1e-5
        assert gates == [None]


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("mask", ["both"], indirect=True)
def test_the_model_is_bit_identical_after_the_context(model, sites, tokens, mask, execution, failing):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, dense = dict(model.named_modules()), logits(model, tokens)
    attributes = {name: set(vars(module)) for name, module in modules.items()}
    pathway = StaticPathway(sites, mask, execution)
    try:
        with pathway.applied(), Exercise(model, pathway).watching():
            logits(model, tokens)
            if failing:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert failing
    assert dict(model.named_modules()) == modules
    assert {name: set(vars(module)) for name, module in modules.items()} == attributes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules.values())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, tokens), dense)


def test_a_forward_that_was_there_before_comes_back(model, sites, tokens):
    """Others replace the forward of modules too, accelerate among them."""
    site = mixtures(sites)[0]
    for module in (site.module, site.router):
        module.forward = module.forward
    before = [site.module.__dict__["forward"], site.router.__dict__["forward"]]
    with StaticPathway(sites, expert_mask(sites), "masked").applied():
        logits(model, tokens)
    assert [site.module.__dict__["forward"], site.router.__dict__["forward"]] == before


class Run:
    """A model run through all phases; `is_in` tells an injected fault which one it is in."""

    def __init__(self, model):
        self.model, self.phase = model, ""

    def __call__(self, pathway, tokens):
        exercise = Exercise(self.model, pathway)
        handle = self.model.get_decoder().register_forward_pre_hook(self.remember, with_kwargs=True)
        self.exercise = exercise
        with pathway.applied(), exercise.watching():
            exercise.scoring = True
            logits(self.model, tokens)
            exercise.scoring = False
            self.model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=6, min_new_tokens=6, do_sample=False
            )
        handle.remove()
        return exercise

    def remember(self, module, args, kwargs):
        inputs = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
        generating = "decode" if inputs.shape[1] == 1 else "prefill"
        self.phase = "scoring" if self.exercise.scoring else generating


@pytest.fixture
def run(model):
    return Run(model)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_exercise_passes_where_the_mask_is_applied(sites, mask, run, tokens, execution):
    found = run(StaticPathway(sites, mask, execution), tokens).check(PHASES)
    assert found == {"ok": True, "phases": {"scoring": 1, "prefill": 1, "decode": 5}, "sites": len(sites)}


def not_applied(site, run, phases):
    """Make the mask have no effect at `site` in `phases`, in either execution."""
    masked_as_it_should, install = site.masked, site.installed

    @contextmanager
    def masked(mask):
        with masked_as_it_should(mask):
            zeroing, own = site.module.forward, type(site.module).forward
            site.module.forward = lambda *call: own(site.module, *call) if run.phase in phases else zeroing(*call)
            yield

    @contextmanager
    def installed(compact):
        def swap(*call):
            run.remember(*call)
            setattr(site._parent, site._name, site.module if run.phase in phases else compact)

        handle = run.model.get_decoder().register_forward_pre_hook(swap, with_kwargs=True)
        with install(compact):
            yield
        handle.remove()

    site.masked, site.installed = masked, installed


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("phases", [PHASES, ["decode"]], ids="-".join)
def test_a_mask_that_is_not_applied_at_one_site_fails(sites, run, tokens, execution, phases):
    site = mixtures(sites)[1]
    not_applied(site, run, phases)
    exercise = run(StaticPathway(sites, neuron_mask(sites), execution), tokens)
    with pytest.raises(GateError, match=rf"mask not applied at {re.escape(site.path)} in {phases[0]}:"):
        exercise.check(PHASES)


def test_a_site_that_does_not_mask_at_all_fails(sites, run, tokens):
    site = mixtures(sites)[1]
    site.masked = lambda mask: nullcontext()
    exercise = run(StaticPathway(sites, neuron_mask(sites), "masked"), tokens)
    with pytest.raises(GateError, match=rf"mask not applied at {re.escape(site.path)} in scoring: removed neurons"):
        exercise.check(PHASES)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("neurons", [0.0, 0.5])
def test_tokens_that_are_routed_to_removed_experts_in_one_phase_fail(sites, run, tokens, execution, neurons):
    """Compact execution would run another expert in the removed one's place, and nobody would see it."""
    site, mask = mixtures(sites)[1], expert_mask(sites, 0.25, neurons)
    # the first expert stays, so that renumbering gives each removed one the number of one that is there
    chosen = dict(mask.experts) | {site.path: torch.tensor([1, 1, 0, 1, 1, 0, 1, 1]).bool()}
    keep = {path: torch.ones_like(part) for path, part in mask.keep.items()} if not neurons else neuron_mask(sites).keep
    routed = site.routed

    @contextmanager
    def faulty(mask):
        with routed(mask):
            excluding, own = site.router.forward, type(site.router).forward
            site.router.forward = lambda *call: own(site.router, *call) if run.phase == "decode" else excluding(*call)
            yield

    site.routed = faulty
    exercise = run(StaticPathway(sites, Mask(keep, {}, chosen), execution), tokens)
    with pytest.raises(GateError, match=rf"at {re.escape(site.path)} in decode: tokens were routed to removed"):
        exercise.check(PHASES)


def test_a_router_left_as_it_was_fails(sites, run, tokens):
    site = mixtures(sites)[1]
    site.routed = lambda mask: nullcontext()
    exercise = run(StaticPathway(sites, expert_mask(sites), "masked"), tokens)
    with pytest.raises(GateError, match=rf"mask not applied at {re.escape(site.path)} in scoring: tokens were routed"):
        exercise.check(PHASES)


def softmax(scores):
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def best(scores, allowed, count):
    return sorted(np.flatnonzero(allowed), key=lambda number: -scores[number])[:count]


# Each rule takes what the router computes for one token, `[experts]`, and which experts it may choose. They differ in
# when the weights are normalised, and over which experts.


def by_softmax(router, scores, allowed, *, normalised):
    """A softmax over all experts, the removed ones included, then the two best of those that stay."""
    probabilities = softmax(scores)
    chosen = best(probabilities, allowed, 2)
    total = sum(probabilities[chosen]) if normalised else 1
    return {number: probabilities[number] / total for number in chosen}


def by_softmax_of_the_chosen(router, scores, allowed, *, normalised):
    chosen = best(scores, allowed, 2)
    return dict(zip(chosen, softmax(scores[chosen]), strict=True))


def by_groups(router, scores, allowed, *, normalised):
    """DeepSeek-V3: of the groups, those whose two best are the highest; of their experts, the best."""
    sigmoid = 1 / (1 + np.exp(-scores))
    ranked = np.where(allowed, sigmoid + raw(router.e_score_correction_bias), -np.inf)
    groups = ranked.reshape(router.num_group, -1)
    group_scores = np.sort(groups, axis=1)[:, -2:].sum(1)
    open_groups = np.isin(np.arange(len(groups)), np.argsort(-group_scores)[: router.topk_group])
    chosen = best(ranked, allowed & np.repeat(open_groups, groups.shape[1]), router.top_k)
    total = sum(sigmoid[chosen]) if normalised else 1
    return {number: 2.5 * sigmoid[number] / total for number in chosen}


def by_sparse_mixer(router, scores, allowed, *, normalised):
    """Phi-3.5-MoE: twice the highest, each weighed by a softmax over those whose score is near to its own."""
    result = {}
    for _ in range(2):
        left = [number for number in np.flatnonzero(allowed) if number not in result]
        highest = max(left, key=lambda number: scores[number])
        top = scores[highest]
        near = [number for number in left if (top - scores[number]) / max(abs(scores[number]), top) <= 2 * 0.1]
        result[highest] = 1 / sum(np.exp(scores[number] - top) for number in near)
    return result


def float64_routing(kind, router, inputs, allowed, *, normalised):
    """For each token the chosen experts and their weights, where only the `allowed` ones may be chosen."""
    x = raw(inputs).reshape(-1, 32)
    scale = np.ones(8)
    if kind == "gemma4_text+experts":
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + router.eps) * raw(router.scale) / np.sqrt(32)
        weight, scale = raw(router.proj.weight), raw(router.per_expert_scale)
    else:
        weight = raw(router.weight)
    scores = x @ weight.T + (raw(router.bias) if kind == "gpt_oss" else 0)
    rule = {
        "gpt_oss": by_softmax_of_the_chosen,
        "phimoe": by_sparse_mixer,
        "deepseek_v3": by_groups,
        "kimi_k25": by_groups,
    }.get(kind, by_softmax)
    rows = [rule(router, row, allowed.numpy(), normalised=normalised) for row in scores]
    return [{number: weight * scale[number] for number, weight in row.items()} for row in rows]


ALWAYS = ("mixtral", "gemma4_text+experts", "gpt_oss", "phimoe")
"""Models whose routers have no choice of whether they normalise."""
NORMALISING = ["deepseek_v3", "kimi_k25"]
"""Models whose routers do so unless they are told otherwise."""
RULES = [(kind, None) for kind in ALWAYS] + [
    (kind, normalised) for kind in KINDS if kind not in ALWAYS for normalised in (False, True)
]


@pytest.mark.parametrize(("kind", "normalised"), RULES)
@pytest.mark.parametrize("removed", [[], [0], [1, 6], [2, 3, 4]], ids=str)
def test_removed_experts_are_never_chosen_and_the_router_is_else_unchanged(
    kind, tiny_model, tokens, removed, normalised
):
    changes = {} if normalised is None else {"norm_topk_prob": normalised}
    model = tiny_model(kind, **changes)
    sites = sites_of(model)
    if removed == [2, 3, 4] and kind in ("deepseek_v3", "kimi_k25"):
        removed = [2, 3, 4, 5]  # which leaves two in either group
    allowed = torch.ones(8, dtype=torch.bool)
    allowed[removed] = False
    mask = Mask(keep_all(sites).keep, {}, {site.path: allowed for site in mixtures(sites)} if removed else {})
    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(site.routed(mask))
        calls = calls_of(model, sites, tokens)
    for site in mixtures(sites):
        call = calls[site.path]
        assert not set(removed) & set(call.experts.flatten().tolist())
        rows = float64_routing(kind, site.router, call.router_input, allowed, normalised=normalised is not False)
        for token, expected in enumerate(rows):
            found = dict(zip(call.experts[token].tolist(), call.weights[token].tolist(), strict=True))
            assert found == pytest.approx(expected, rel=1e-4)


def test_the_published_defaults_normalise_as_each_model_does(tiny_model):
    """What the rules above are asked for explicitly."""
    defaults = {kind: sites_of(tiny_model(kind)) for kind in KINDS if kind not in ALWAYS}
    assert {kind: mixtures(sites)[0].router.norm_topk_prob for kind, sites in defaults.items()} == {
        "qwen2_moe": False,
        "qwen3_moe": False,
        "olmoe": False,
        "deepseek_v3": True,
        "kimi_k25": True,
    }


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_the_experts_that_run_are_those_the_mask_keeps(sites, model, tokens, execution):
    mask = expert_mask(sites)
    with StaticPathway(sites, mask, execution).applied():
        calls = calls_of(model, sites, tokens)
    assert len({tuple(part.tolist()) for part in mask.experts.values()}) > 1, "each site loses other experts"
    for site in mixtures(sites):
        kept = set(mask.experts[site.path].nonzero().flatten().tolist())
        assert len(kept) == 6
        assert set(calls[site.path].experts.flatten().tolist()) <= kept


def test_compact_holds_the_kept_experts_in_their_order_and_renumbers(kind, model, sites, tokens):
    mask = expert_mask(sites)
    with StaticPathway(sites, mask, "compact").applied():
        calls = calls_of(model, sites, tokens)
    for site in mixtures(sites):
        kept = mask.experts[site.path].nonzero().flatten()
        compact = site.compact(mask)
        for name, parameter in compact.named_parameters():
            assert torch.equal(parameter, site.module.get_parameter(name)[kept])
        call = calls[site.path]
        numbers = {old: new for new, old in enumerate(kept.tolist())}
        renumbered = call.experts.clone().apply_(lambda old: numbers[old])  # noqa: B023
        with torch.inference_mode():
            expected = type(compact).forward(compact, call.hidden, renumbered, call.weights)
        assert torch.equal(call(compact), expected)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_fewer_experts_than_the_router_must_choose_are_refused_with_the_reason(model, sites, tokens, execution):
    dense, mask = logits(model, tokens), expert_mask(sites, 0.9)
    assert {int(part.sum()) for part in mask.experts.values()} == {1}
    first = mixtures(sites)[0].path
    with (
        pytest.raises(UsageError, match=rf"{re.escape(first)}: its router must choose 2 experts.* leave it [01]$"),
        StaticPathway(sites, mask, execution).applied(),
    ):
        pass
    assert torch.equal(logits(model, tokens), dense)


def least_left(chosen, groups, limit):
    """The fewest experts that any set of groups keeps which DeepSeek-V3's router can choose, by trying all sets.

    A group's score is the sum of its two best experts', so that it is minus infinity where fewer than two stay.
    """
    left = chosen.view(groups, -1).sum(1).tolist()
    finite = [group for group in range(groups) if left[group] >= 2]
    sets = [
        set(one)
        for one in itertools.combinations(range(groups), limit)
        if set(one) <= set(finite) or set(finite) <= set(one)
    ]
    return min(sum(left[group] for group in one) for one in sets)


def grouped_choice(seed):
    """Some of 16 experts, more of them or less."""
    return torch.rand(16, generator=torch.Generator().manual_seed(seed)) < (0.55, 0.7, 0.85, 0.95)[seed % 4]


@pytest.mark.parametrize("seed", range(40))
def test_of_grouped_experts_every_set_of_groups_must_keep_enough(tiny_model, seed):
    """Accepted or refused as trying all sets says; and where accepted, a router driven to each set proves it."""
    groups, limit, needed = 4, 2, 5
    model = tiny_model(
        "deepseek_v3", num_hidden_layers=2, n_routed_experts=16, num_experts_per_tok=needed, n_group=4, topk_group=2
    )
    (site,) = mixtures(sites_of(model))
    chosen = grouped_choice(seed)
    mask = Mask({site.path: torch.ones(16, 24, dtype=torch.bool)}, {}, {site.path: chosen})
    worst = least_left(chosen, groups, limit)
    if worst < needed:
        with (
            pytest.raises(UsageError, match=rf"choose 5 experts in its 2 groups.*, and the mask may leave it {worst}$"),
            site.routed(mask),
        ):
            pass
        return
    site.router.weight.copy_(torch.eye(16, 32))  # its logits are then the first 16 values of the input
    site.router.e_score_correction_bias.zero_()
    generator = torch.Generator().manual_seed(seed)
    for wanted in itertools.combinations(range(groups), limit):
        scores = torch.randn(50, groups, 4, generator=generator)
        scores[:, list(wanted)] += 4
        with site.routed(mask):
            _, _, experts = site.router(torch.cat([scores.view(50, 16), torch.zeros(50, 16)], 1))
        assert chosen[experts].all()
        assert all(len(set(row)) == needed for row in experts.tolist())


def test_both_outcomes_occur_among_the_masks_above():
    worst = [least_left(grouped_choice(seed), 4, 2) for seed in range(40)]
    assert 5 <= sum(count >= 5 for count in worst) <= 35


def test_experts_that_are_not_fused_are_refused(tiny_model):
    ffn = FFN("model.layers.*.mlp.experts", "experts", up="up_proj")
    with pytest.raises(UsageError, match=r"model\.layers\.0\.mlp\.experts \(MixtralExperts\) has no fused experts"):
        find_sites(tiny_model("mixtral"), [ffn])


def test_experts_without_a_gate_are_refused(tiny_model):
    model = tiny_model("mixtral")
    model.model.layers[0].mlp.experts.has_gate = False
    with pytest.raises(UsageError, match="experts without a gate"):
        sites_of(model)
