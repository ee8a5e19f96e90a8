"""Sites of dense FFNs: what is observed is what the model computes, and masks change that and nothing else.

Every test runs on every model type whose FFNs are dense; those of mixtures are in `test_experts.py`.
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from torch import nn

from spath_eval import FFN, UsageError
from spath_eval.masks import Mask, drop_all, keep_all
from spath_eval.pathways import PARITY_TOLERANCE
from spath_eval.plugins.architectures.gemma import GEMMA
from spath_eval.plugins.architectures.llama import LLAMA
from spath_eval.plugins.architectures.moe import MOE
from spath_eval.plugins.architectures.phi import PHI
from spath_eval.plugins.architectures.qwen import QWEN
from spath_eval.sites import find_sites

FAMILIES = [GEMMA, PHI, QWEN, LLAMA]
KINDS = [*(model_type for family in FAMILIES for model_type in family.model_types), "llama+mlp_bias"]
PATHS = [f"model.layers.{layer}.mlp" for layer in range(3)]
WIDTHS = {"gemma3n_text": [64, 48, 80], "gemma4_text": [64, 64, 128]}
EXECUTIONS = ["masked", "compact"]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind, tiny_model):
    return tiny_model(kind)


@pytest.fixture
def sites(model):
    return sites_of(model)


def sites_of(model):
    return next(family for family in FAMILIES if family.matches(model.config)).sites(model)


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


def reference_output(site, activations):
    """What down makes of `activations` `[rows, width]`, in float64."""
    down = site.module.get_submodule(site.ffn.down)
    bias = 0 if down.bias is None else down.bias.double().numpy()
    return activations @ down.weight.double().numpy().T + bias


def relative_difference(values, reference):
    return np.abs(np.asarray(values, dtype=np.float64) - reference).max() / np.abs(reference).max()


def hooks(model):
    return [
        (name, attribute, len(found))
        for name, module in model.named_modules()
        for attribute, found in vars(module).items()
        if attribute.endswith("_hooks") and found
    ]


def test_sites_are_found_at_the_declared_paths_with_their_widths(kind, model, sites):
    widths = WIDTHS.get(kind, [64, 64, 64])
    assert [site.path for site in sites] == PATHS
    assert [site.width for site in sites] == widths
    assert [site.experts for site in sites] == [site.kept_experts(None) for site in sites] == [None] * 3
    for site in sites:
        assert site.module is model.get_submodule(site.path) is site.installed_module


def test_gate_up_and_down_are_the_weights_that_stand_in_the_model(kind, model, sites):
    for site in sites:
        weights = dict(site.module.named_parameters())
        if kind == "phi":
            assert site.gate is None
            assert (site.up.data_ptr(), site.up.shape) == (weights["fc1.weight"].data_ptr(), (64, 32))
            assert torch.equal(site.down, weights["fc2.weight"])
        elif kind == "phi3":
            assert torch.equal(torch.cat([site.gate, site.up]), weights["gate_up_proj.weight"])
            assert site.gate.shape == site.up.shape == (64, 32)
            assert torch.equal(site.down, weights["down_proj.weight"])
        else:
            for name in ("gate", "up", "down"):
                assert getattr(site, name) is weights[f"{name}_proj.weight"]
        assert site.down.shape == (32, site.width)


def test_observed_activations_equal_a_float64_computation(model, sites, tokens, reference_activations):
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


def test_masked_and_compact_equal_the_float64_computation_at_every_site(sites, reference_activations):
    mask = random_mask(sites)
    inputs = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    for site in sites:
        activations = reference_activations(site.module, inputs) * mask[site.path].numpy()
        expected = reference_output(site, activations).reshape(inputs.shape)
        with site.masked(mask):
            masked = site.module(inputs)
        compact = site.compact(mask)(inputs)
        assert relative_difference(masked, expected) < 1e-5
        assert relative_difference(compact, expected) < 1e-5
        assert relative_difference(compact, masked.double().numpy()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masked_and_compact_agree_in_half_precision(model, dtype):
    sites = sites_of(model.to(dtype))
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
        assert site.kept_width(mask) == mask[site.path].sum() == compact.get_submodule(site.ffn.down).in_features
        up = compact.get_submodule(site.ffn.up)
        assert up.out_features == site.kept_width(mask) * (2 if site.ffn.shape == "fused" else 1)
        if site.ffn.shape == "gated":
            # gemma3n's own sparsity takes mean and deviation over all gate outputs
            whole_gate = bool(getattr(site.module, "activation_sparsity", 0.0))
            assert compact.gate_proj.out_features == (site.width if whole_gate else site.kept_width(mask))


def test_biases_are_there_where_the_model_has_them(kind, sites):
    mask = random_mask(sites)
    for site in sites:
        biases = {name for name, _ in site.compact(mask).named_parameters() if name.endswith("bias")}
        assert biases == {
            "phi": {"fc1.bias", "fc2.bias"},
            "llama+mlp_bias": {"gate_proj.bias", "up_proj.bias", "down_proj.bias"},
        }.get(kind, set())
        assert all(site.module.get_parameter(name).any() for name in biases)


def test_compact_weights_are_copies_that_leave_the_dense_ones_alone(sites):
    site = sites[2]
    before = {name: tensor.clone() for name, tensor in site.module.state_dict().items()}
    compact = site.compact(random_mask(sites))
    for name in site.modules[:-1]:  # the last is the activation function
        compact.get_submodule(getattr(site.ffn, name)).weight.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in site.module.state_dict().items())


@pytest.mark.parametrize("compact", [False, True])
def test_repaired_down_weights_take_the_place_of_the_models_own(model, sites, compact, tokens, reference_activations):
    mask, dense = random_mask(sites), logits(model, tokens)
    inputs = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
    for site in sites:
        weight = torch.randn(site.down.shape, generator=torch.Generator().manual_seed(3))
        bias = None if site.module.get_submodule(site.ffn.down).bias is None else torch.arange(32.0)
        activations = reference_activations(site.module, inputs) * mask[site.path].numpy()
        expected = activations @ weight.double().numpy().T + (0 if bias is None else bias.double().numpy())
        with site.with_down(mask, weight, bias, compact=compact):
            output = site.installed_module(inputs)
        assert relative_difference(output, expected.reshape(inputs.shape)) < 1e-5
    assert torch.equal(logits(model, tokens), dense)


def test_filtered_is_handed_the_activated_gate_and_keeps_by_token(sites, reference_activations):
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
        assert relative_difference(product, activations) < 2e-6
        if site.gate is None:
            assert gate is None
        else:
            up = inputs.double().numpy().reshape(10, 32) @ site.up.double().numpy().T
            if (projection := site.module.get_submodule(site.ffn.up)).bias is not None:
                up += projection.bias.double().numpy()
            assert relative_difference(gate.double().numpy() * up, activations) < 2e-6
        kept = (product > product.median(-1, keepdim=True).values).numpy()
        assert len({tuple(row) for row in kept.tolist()}) == 10, "each token keeps other neurons"
        expected = reference_output(site, activations * kept).reshape(inputs.shape)
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


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("gemma", "gate_proj"),
        ("gemma", "up_proj"),
        ("gemma", "down_proj"),
        ("phi", "fc1"),
        ("phi", "fc2"),
        ("phi3", "gate_up_proj"),
        ("phi3", "down_proj"),
    ],
)
def test_compact_refuses_weights_that_it_cannot_slice(model, sites, name):
    class Quantised(nn.Linear):
        pass

    site = sites[1]
    dense = site.module.get_submodule(name)
    setattr(site.module, name, Quantised(dense.in_features, dense.out_features, bias=False))
    with pytest.raises(UsageError, match=rf"model\.layers\.1\.mlp\.{name} is a Quantised.*--execution masked"):
        site.compact(random_mask([site]))
    bias = site.module.get_submodule(site.ffn.down).bias
    nothing = torch.zeros(1, 3, 32) if bias is None else bias.expand(1, 3, 32)
    with site.masked(drop_all([site])), torch.no_grad():
        assert torch.equal(site.module(torch.randn(1, 3, 32)), nothing), "masked execution does not mind"


class Linear4bit(nn.Linear):
    """Holds two numbers of 4 bits in a byte, in one column, as bitsandbytes does, and a scale."""

    def __init__(self, dense):
        super().__init__(dense.in_features, dense.out_features, bias=False, device="meta")
        self.bias = dense.bias
        self.scale = dense.weight.abs().max() / 7
        numbers = (dense.weight / self.scale).round().to(torch.uint8).flatten().bitwise_and(15)
        self.weight = nn.Parameter((numbers[::2] * 16 + numbers[1::2]).unsqueeze(1), requires_grad=False)

    def dequantised(self):
        numbers = torch.cat([self.weight // 16, self.weight % 16], 1).flatten().float()
        return (numbers - 16 * (numbers > 7)).view(self.out_features, self.in_features) * self.scale

    def forward(self, inputs):
        return nn.functional.linear(inputs, self.dequantised(), self.bias)


class Linear8bit(nn.Linear):
    """Holds numbers of 8 bits in the shape of the weights, and a scale."""

    def __init__(self, dense):
        super().__init__(dense.in_features, dense.out_features, bias=False, device="meta")
        self.bias = dense.bias
        self.scale = dense.weight.abs().max() / 127
        self.weight = nn.Parameter((dense.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def dequantised(self):
        return self.weight.float() * self.scale

    def forward(self, inputs):
        return nn.functional.linear(inputs, self.dequantised(), self.bias)


class QuantLinear(nn.Module):
    """Holds no parameter and nothing that is called weight, as those of GPTQ and AWQ do."""

    def __init__(self, dense):
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.bias = dense.bias
        self.scale = dense.weight.abs().max() / 127
        self.register_buffer("qweight", (dense.weight / self.scale).round().to(torch.int8).T.contiguous())

    def dequantised(self):
        return self.qweight.T.float() * self.scale

    def forward(self, inputs):
        return nn.functional.linear(inputs, self.dequantised(), self.bias)


METHODS = {
    "bitsandbytes, 4 bits": (Linear4bit, {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}),
    "bitsandbytes, 8 bits": (Linear8bit, {"load_in_8bit": True}),
    "gptq, 4 bits": (QuantLinear, {"quant_method": "gptq", "bits": 4}),
    "fp8": (Linear8bit, {"quant_method": "fp8"}),
}


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@pytest.fixture
def quantised(model, method):
    """The model with every linear layer quantised but its head."""
    linear, model.config.quantization_config = METHODS[method]
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path != "lm_head":
            model.set_submodule(path, linear(module))
    return model


@pytest.mark.parametrize("kind", ["gemma", "gemma3n_text", "phi", "phi3", "llama+mlp_bias"])
def test_quantised_weights_are_masked_as_their_numbers_would_be(quantised, tokens):
    """The reference has a dense layer with those numbers in the place of each quantised one."""
    sites = sites_of(quantised)
    assert [site.path for site in sites] == PATHS
    mask = random_mask(sites)
    dense = logits(quantised, tokens)
    with applied(sites, keep_all(sites), "masked"):
        assert torch.equal(logits(quantised, tokens), dense)
    with applied(sites, mask, "masked"):
        sparse = logits(quantised, tokens)
    for site in sites:
        weight = site.module.get_submodule(site.ffn.down).dequantised()
        assert weight.shape == (32, site.width)
        reference = nn.Linear(site.width, 32, bias=False)
        reference.weight.data = weight * mask[site.path]
        reference.bias = site.module.get_submodule(site.ffn.down).bias
        setattr(site.module, site.ffn.down, reference)
    expected = logits(quantised, tokens)
    assert (sparse - expected).abs().max() < 2e-5 * expected.abs().max()
    assert (sparse - dense).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["gemma", "phi", "phi3"])
def test_quantised_weights_are_neither_sliced_nor_read_and_the_method_is_said(quantised, method):
    sites = sites_of(quantised)
    kind = METHODS[method][0].__name__
    said = rf"model\.layers\.0\.mlp\.\w+ is a {kind} \(quantised by {method}\), whose weights cannot be "
    with pytest.raises(UsageError, match=f"{said}sliced: --execution masked works$"):
        sites[0].compact(random_mask(sites))
    assert sites[0].unsliceable
    assert sites[0].compact(keep_all(sites)) is sites[0].module
    for name in ("up", "down", *(["gate"] if sites[0].ffn.shape != "plain" else [])):
        with pytest.raises(UsageError, match=f"{said}read: take a strategy that does not$"):
            getattr(sites[0], name)


@pytest.mark.parametrize("kind", ["gemma", "phi", "phi3", "llama+mlp_bias"])
def test_bytes_of_quantised_weights_are_those_that_they_take(quantised, kind):
    for site in sites_of(quantised):
        held = [*site.module.parameters(), *site.module.buffers()]
        assert site.weight_bytes(None) == sum(tensor.nbytes for tensor in held)
        biases = {"phi": 32 * 4, "llama+mlp_bias": 32 * 4}.get(kind, 0)
        half = Mask({site.path: torch.arange(site.width) % 2 == 0})
        assert site.weight_bytes(half) - biases == (site.weight_bytes(None) - biases) / 2


def test_one_quantised_projection_is_enough(tiny_model):
    model = tiny_model("gemma")
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    site = sites_of(model)[1]
    assert site.unsliceable is None, "it is the weights that count: others than these may be quantised"
    site.module.up_proj = Linear8bit(site.module.up_proj)
    assert "mlp.up_proj is a Linear8bit (quantised by bitsandbytes, 8 bits)" in site.unsliceable


def test_quantised_routed_experts_are_refused(tiny_model):
    model = tiny_model("gpt_oss")
    model.config.quantization_config = {"quant_method": "mxfp4"}
    experts = model.model.layers[1].mlp.experts
    assert find_sites(model, MOE.ffns)[1].unsliceable is None, "transformers may have dequantised them"
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.to(torch.uint8), requires_grad=False)
    said = r"layers\.1\.mlp\.experts\.gate_up_proj: routed experts quantised by mxfp4 run neither masked nor compact"
    with pytest.raises(UsageError, match=said):
        find_sites(model, MOE.ffns)
    del experts.gate_up_proj  # packed ones have other names
    with pytest.raises(UsageError, match=said):
        find_sites(model, MOE.ffns)


def test_a_projection_that_does_not_say_its_sizes_is_an_error(tiny_model):
    from transformers.pytorch_utils import Conv1D

    model = tiny_model("phi")
    model.model.layers[1].mlp.fc1 = Conv1D(64, 32)
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.fc1 is a Conv1D, which does not say how many values enter"):
        sites_of(model)


def test_a_pattern_that_matches_nothing_is_an_error(tiny_model):
    with pytest.raises(UsageError, match=r"no FFN site found in GemmaForCausalLM.*transformer\.h\.\*\.mlp"):
        find_sites(tiny_model("gemma"), [FFN("transformer.h.*.mlp")])


def test_a_star_stands_for_exactly_one_component(tiny_model):
    with pytest.raises(UsageError, match="no FFN site"):
        find_sites(tiny_model("gemma"), [FFN("model.*.mlp")])


def test_an_ffn_without_the_declared_projections_is_an_error(tiny_model):
    with pytest.raises(UsageError, match=r"model\.layers\.0\.mlp \(GemmaMLP\) has no module 'w1'"):
        find_sites(tiny_model("gemma"), [FFN("model.layers.*.mlp", gate="w1")])


def test_the_declaration_of_another_type_of_the_family_does_not_count(tiny_model):
    """Both types of the family have their FFNs at the same path, and each declaration is for one of them."""
    plain, fused = PHI.ffns
    with pytest.raises(UsageError, match="no FFN site found in PhiForCausalLM"):
        find_sites(tiny_model("phi"), [fused])
    assert [site.ffn for site in find_sites(tiny_model("phi3"), [plain, fused])] == [fused] * 3
