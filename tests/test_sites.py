"""Sites: what is observed is what the model computes, and masks change that and nothing else."""

from __future__ import annotations

import math
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import nn

from spath_eval import FFN, UsageError
from spath_eval.masks import Mask, drop_all, keep_all
from spath_eval.pathways import PARITY_TOLERANCE
from spath_eval.plugins.architectures.gemma import GEMMA
from spath_eval.sites import find_sites

PATHS = [f"model.layers.{layer}.mlp" for layer in range(3)]
EXECUTIONS = ["masked", "compact"]


@pytest.fixture(params=GEMMA.model_types)
def model(request, tiny_model):
    return tiny_model(request.param)


@pytest.fixture
def sites(model):
    return GEMMA.sites(model)


@pytest.fixture
def tokens():
    return torch.randint(3, 100, (2, 10), generator=torch.Generator().manual_seed(1))


def random_mask(sites, *, seed=0, share=0.5):
    generator = torch.Generator().manual_seed(seed)
    return Mask({site.path: torch.rand(site.width, generator=generator) >= share for site in sites})


def applied(sites, mask, execution):
    stack = ExitStack()
    for site in sites:
        stack.enter_context(site.masked(mask) if execution == "masked" else site.installed(site.compact(mask)))
    return stack


def logits(model, tokens, **inputs):
    with torch.inference_mode():
        return model(tokens, **inputs).logits


def reference_activations(module, inputs):
    """act(gate(x)) * up(x) in float64, from the weights alone."""
    x = inputs.double().numpy().reshape(-1, inputs.shape[-1])
    gate = x @ module.gate_proj.weight.double().numpy().T
    if share := getattr(module, "activation_sparsity", 0.0):
        cutoff = gate.mean(-1, keepdims=True) + gate.std(-1, keepdims=True) * norm.ppf(share)
        gate = np.maximum(gate - cutoff, 0)
    gelu = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    return gelu * (x @ module.up_proj.weight.double().numpy().T)


def relative_difference(values, reference):
    return np.abs(np.asarray(values, dtype=np.float64) - reference).max() / np.abs(reference).max()


def hooks(model):
    return [
        (name, attribute, len(found))
        for name, module in model.named_modules()
        for attribute, found in vars(module).items()
        if attribute.endswith("_hooks") and found
    ]


def test_sites_are_found_at_the_declared_paths_with_their_widths(model, sites):
    widths = [64, 48, 80] if model.config.model_type == "gemma3n_text" else [64, 64, 64]
    assert [site.path for site in sites] == PATHS
    assert [site.width for site in sites] == widths
    assert [site.experts for site in sites] == [None] * 3
    for site, width in zip(sites, widths, strict=True):
        assert site.module is model.get_submodule(site.path) is site.installed_module
        assert (site.gate.shape, site.up.shape, site.down.shape) == ((width, 32), (width, 32), (32, width))


def test_observed_activations_equal_a_float64_computation(model, sites, tokens):
    observed, entered = {}, {}
    with ExitStack() as stack:
        for site in sites:
            handle = site.module.register_forward_pre_hook(
                lambda _, inputs, p=site.path: entered.update({p: inputs[0]})
            )
            stack.callback(handle.remove)
            stack.enter_context(site.observe(lambda seen, path=site.path: observed.update({path: seen})))
        logits(model, tokens)
    for site in sites:
        seen = observed[site.path]
        assert seen.tokens.tolist() == list(range(20))
        assert relative_difference(seen.values, reference_activations(site.module, entered[site.path])) < 2e-6
    assert not hooks(model)


def test_rows_are_told_apart_where_a_batch_is_padded(model, sites, tokens):
    """The activations at the attention mask's tokens are those of the short row alone."""
    attention = torch.ones_like(tokens)
    attention[0, 6:] = 0
    alone, padded = [], []
    with sites[1].observe(alone.append):
        logits(model, tokens[:1, :6])
    with sites[1].observe(padded.append):
        logits(model, tokens, attention_mask=attention)
    counted = attention.bool().flatten()[padded[0].tokens]
    assert counted.sum() == 16
    assert relative_difference(padded[0].values[counted][:6], alone[0].values.double().numpy()) < 1e-5


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_keep_all_changes_the_logits_by_exactly_nothing(model, sites, tokens, execution):
    dense = logits(model, tokens)
    with applied(sites, keep_all(sites), execution):
        assert torch.equal(logits(model, tokens), dense)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("select", [random_mask, drop_all])
def test_other_masks_change_the_logits(model, sites, tokens, execution, select):
    dense = logits(model, tokens)
    with applied(sites, select(sites), execution):
        assert (logits(model, tokens) - dense).abs().max() > 1e-2


def test_masked_and_compact_equal_the_float64_computation_at_every_site(model, sites, tokens):
    mask = random_mask(sites)
    inputs = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    for site in sites:
        activations = reference_activations(site.module, inputs) * mask[site.path].numpy()
        expected = (activations @ site.down.double().numpy().T).reshape(inputs.shape)
        with site.masked(mask):
            masked = site.module(inputs)
        compact = site.compact(mask)(inputs)
        assert relative_difference(masked, expected) < 1e-5
        assert relative_difference(compact, expected) < 1e-5
        assert relative_difference(compact, masked.double().numpy()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masked_and_compact_agree_in_half_precision(model, dtype):
    model.to(dtype)
    sites = GEMMA.sites(model)
    mask = random_mask(sites)
    inputs = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    for site in sites:
        with site.masked(mask):
            masked = site.module(inputs).double().numpy()
        compact = site.compact(mask)(inputs)
        assert compact.dtype == dtype
        assert relative_difference(compact.double(), masked) < PARITY_TOLERANCE[dtype]


def test_masked_and_compact_models_have_the_same_logits(model, sites, tokens):
    mask = random_mask(sites, share=0.3)
    with applied(sites, mask, "masked"):
        masked = logits(model, tokens)
    with applied(sites, mask, "compact"):
        compact = logits(model, tokens)
    assert relative_difference(compact, masked.double().numpy()) < 1e-4


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_bit_identical_after_the_context(model, sites, tokens, execution, failing):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules, dense = dict(model.named_modules()), logits(model, tokens)
    try:
        with applied(sites, random_mask(sites), execution):
            logits(model, tokens)
            if failing:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert failing
    assert list(modules) == [name for name, _ in model.named_modules()]
    assert all(module is modules[name] for name, module in model.named_modules())
    assert not hooks(model)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, tokens), dense)


def test_compact_where_nothing_is_removed_is_the_dense_ffn_itself(sites):
    assert all(site.compact(keep_all(sites)) is site.module for site in sites)


def test_weight_bytes_are_those_of_the_modules(model, sites):
    mask = random_mask(sites)
    for site in sites:
        compact = site.compact(mask)
        assert site.weight_bytes(None) == sum(parameter.nbytes for parameter in site.module.parameters())
        assert site.weight_bytes(mask) == sum(parameter.nbytes for parameter in compact.parameters())
        assert site.kept_width(mask) == mask[site.path].sum() == compact.down_proj.in_features
        # gemma3n's own sparsity takes mean and deviation over all gate outputs
        whole_gate = bool(getattr(site.module, "activation_sparsity", 0.0))
        assert compact.gate_proj.out_features == (site.width if whole_gate else site.kept_width(mask))
        assert compact.up_proj.out_features == site.kept_width(mask)


def test_compact_weights_are_copies_that_leave_the_dense_ones_alone(sites):
    site = sites[2]
    before = {name: tensor.clone() for name, tensor in site.module.state_dict().items()}
    compact = site.compact(random_mask(sites))
    for name in ("gate_proj", "up_proj", "down_proj"):
        compact.get_submodule(name).weight.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in site.module.state_dict().items())


def test_biases_are_sliced_and_counted(tiny_model):
    site = GEMMA.sites(tiny_model("gemma"))[0]
    for name in ("gate_proj", "up_proj", "down_proj"):
        projection = site.module.get_submodule(name)
        projection.bias = nn.Parameter(torch.randn(projection.out_features), requires_grad=False)
    mask = random_mask([site])
    inputs = torch.randn(4, 32)
    with site.masked(mask):
        masked = site.module(inputs)
    compact = site.compact(mask)
    assert relative_difference(compact(inputs), masked.double().numpy()) < 1e-5
    assert site.weight_bytes(mask) == sum(parameter.nbytes for parameter in compact.parameters())


def test_filtered_is_handed_the_activated_gate_and_keeps_by_token(model, sites):
    inputs = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    handed = []

    def keep(gate, product):
        handed.append((gate, product))
        return product > product.median(-1, keepdim=True).values

    for site in sites:
        with site.filtered(keep):
            output = site.module(inputs)
        gate, product = handed.pop()
        activations = reference_activations(site.module, inputs)
        up = inputs.double().numpy().reshape(10, 32) @ site.up.double().numpy().T
        assert relative_difference(product, activations) < 2e-6
        assert relative_difference(gate.double().numpy() * up, activations) < 2e-6
        kept = (product > product.median(-1, keepdim=True).values).numpy()
        assert len({tuple(row) for row in kept.tolist()}) == 10, "each token keeps other neurons"
        expected = ((activations * kept) @ site.down.double().numpy().T).reshape(inputs.shape)
        assert relative_difference(output, expected) < 1e-5


def test_filtered_that_answers_none_keeps_all(model, sites, tokens):
    dense = logits(model, tokens)
    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(site.filtered(lambda gate, product: None))
        assert torch.equal(logits(model, tokens), dense)


def test_entering_down_sees_the_ffn_in_the_model_and_the_dense_one(sites):
    site, mask, inputs = sites[0], random_mask(sites), torch.randn(1, 3, 32)
    seen = []
    with site.masked(mask), site.entering_down(seen.append):
        site.installed_module(inputs)
    assert (seen.pop().values[..., ~mask[site.path]] == 0).all()
    with site.installed(site.compact(mask)), site.entering_down(seen.append):
        site.installed_module(inputs)
        site.module(inputs)
    assert [observation.values.shape[-1] for observation in seen] == [site.kept_width(mask), site.width]


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_compact_refuses_weights_that_it_cannot_slice(tiny_model, name):
    class Quantised(nn.Linear):
        pass

    model = tiny_model("gemma")
    site = GEMMA.sites(model)[1]
    dense = site.module.get_submodule(name)
    setattr(site.module, name, Quantised(dense.in_features, dense.out_features, bias=False))
    with pytest.raises(UsageError, match=rf"model\.layers\.1\.mlp\.{name} is a Quantised.*--execution masked"):
        site.compact(random_mask([site]))
    with site.masked(drop_all([site])):
        assert not site.module(torch.randn(1, 3, 32)).any(), "masked execution does not mind"


def test_a_pattern_that_matches_nothing_is_an_error(tiny_model):
    with pytest.raises(UsageError, match=r"no FFN site found in GemmaForCausalLM.*transformer\.h\.\*\.mlp"):
        find_sites(tiny_model("gemma"), [FFN("transformer.h.*.mlp")])


def test_a_star_stands_for_exactly_one_component(tiny_model):
    with pytest.raises(UsageError, match="no FFN site"):
        find_sites(tiny_model("gemma"), [FFN("model.*.mlp")])


def test_an_ffn_without_the_declared_projections_is_an_error(tiny_model):
    with pytest.raises(UsageError, match=r"model\.layers\.0\.mlp \(GemmaMLP\) has no module 'w1'"):
        find_sites(tiny_model("gemma"), [FFN("model.layers.*.mlp", gate="w1")])
