"""The families: which configurations they claim, and the published models they time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

from spath_eval import UsageError
from spath_eval.models import find_architecture
from spath_eval.registry import Registry


@pytest.fixture(scope="module")
def registry():
    return Registry.load()


MODEL_TYPES = {
    "gemma": ["gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text"],
    "phi": ["phi", "phi3"],
    "qwen": ["qwen2", "qwen3"],
    "llama": ["llama", "mistral"],
    "moe": ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "deepseek_v3", "gpt_oss", "kimi_k25"],
}
CLAIMS = [(family, model_type) for family, model_types in MODEL_TYPES.items() for model_type in model_types]


@dataclass(frozen=True)
class Published:
    """A published model, rebuilt from its facts alone."""

    family: str
    parameters: int | None
    """As its weight files count them, the output head once where it is the embedding."""
    sites: int
    widths: set[int]
    config: dict[str, Any]


def kimi_k25():
    """Its language model calls itself kimi_k2 and is a DeepSeek-V3 (technical report of Kimi K2, table 2)."""
    text = {
        "model_type": "kimi_k2",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 1,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "n_routed_experts": 384,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "vocab_size": 163840,
        "max_position_embeddings": 262144,
    }
    return {"model_type": "kimi_k25", "text_config": text, "tie_word_embeddings": False}


def dense(model_type, hidden, width, layers, heads, kv_heads, vocabulary, **others):
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        **others,
    }


PUBLISHED = {
    "phi-2": Published(
        "phi", 2_779_683_840, 32, {10240}, dense("phi", 2560, 10240, 32, 32, 32, 51200, partial_rotary_factor=0.4)
    ),
    "Phi-3.5-mini": Published("phi", 3_821_079_552, 32, {8192}, dense("phi3", 3072, 8192, 32, 32, 32, 32064)),
    "K2-Think": Published("qwen", 32_763_876_352, 64, {27648}, dense("qwen2", 5120, 27648, 64, 40, 8, 152064)),
    "gemma-2b": Published(
        "gemma", 2_506_172_416, 18, {16384}, dense("gemma", 2048, 16384, 18, 8, 1, 256000, head_dim=256)
    ),
    "Qwen1.5-1.8B": Published("qwen", 1_836_828_672, 24, {5504}, dense("qwen2", 2048, 5504, 24, 16, 16, 151936)),
    "TinyLlama-1.1B": Published("llama", 1_100_048_384, 22, {5632}, dense("llama", 2048, 5632, 22, 32, 4, 32000)),
    "Kimi K2.5": Published("moe", None, 121, {2048, 18432}, kimi_k25()),
}
"""The models of "Sparse Pathways: Domain-Aware Neuron Routing" (A. Young)."""


def without_weights(config, auto_class="AutoModelForCausalLM"):
    with torch.device("meta"):
        return getattr(transformers, auto_class).from_config(AutoConfig.for_model(**config))


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("family", "model_type"), CLAIMS)
@pytest.mark.parametrize("by_name", [False, True])
def test_families_claim_their_model_types(registry, family, model_type, by_name):
    name = family if by_name else "auto"
    assert find_architecture(registry, AutoConfig.for_model(model_type), name).name == family


def test_no_family_claims_more_than_is_tested_here(registry):
    assert {name: list(family.model_types) for name, family in registry.architectures.items()} == MODEL_TYPES


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_resolve_to_their_family_and_have_their_sites(registry, name):
    published = PUBLISHED[name]
    family = find_architecture(registry, AutoConfig.for_model(**published.config), "auto")
    assert family.name == published.family
    auto_class = family.auto_classes.get(published.config["model_type"], "AutoModelForCausalLM")
    model = without_weights(published.config, auto_class)
    sites = family.sites(model)
    assert len(sites) == published.sites
    assert {site.width for site in sites} == published.widths
    assert published.parameters in (None, count(model))


def test_kimi_k25_has_384_routed_experts_in_all_layers_but_the_first(registry):
    family = registry.architecture("moe")
    assert family.auto_classes == {"kimi_k25": "AutoModelForImageTextToText"}
    model = without_weights(kimi_k25(), family.auto_classes["kimi_k25"])
    sites = family.sites(model)
    layers = "model.language_model.layers"
    assert sites[0].path == f"{layers}.0.mlp"
    routed = [site.path for site in sites if site.experts == 384]
    shared = [site.path for site in sites[1:] if site.experts is None]
    assert routed == [f"{layers}.{layer}.mlp.experts" for layer in range(1, 61)]
    assert shared == [f"{layers}.{layer}.mlp.shared_experts" for layer in range(1, 61)]
    # a trillion, of which 32 billion work on a token (technical report of Kimi K2)
    assert count(model.model.language_model) + 7168 * 163840 == pytest.approx(1.03e12, rel=0.01)


def test_a_model_type_that_nobody_claims_lists_what_is_supported_and_how_to_register_one(registry):
    with pytest.raises(UsageError) as caught:
        find_architecture(registry, AutoConfig.for_model("bert"), "auto")
    message = str(caught.value)
    assert "no architecture claims model type 'bert'" in message
    assert "gemma: gemma, gemma2, gemma3_text, gemma3n_text" in message
    assert "spath_register_architectures" in message
    assert "\n" not in message


def test_a_family_asked_for_by_name_must_claim_the_model(registry):
    with pytest.raises(UsageError, match=r"'gemma' does not claim model type 'bert' \(it claims gemma, .*--arch auto"):
        find_architecture(registry, AutoConfig.for_model("bert"), "gemma")


def test_an_unknown_family_lists_those_there_are(registry):
    with pytest.raises(UsageError, match=r"unknown architecture 'gema'.*gemma.*Did you mean gemma\?"):
        find_architecture(registry, AutoConfig.for_model("gemma"), "gema")


SHAPES = {
    "phi": ["phi-2", "Phi-3.5-mini"],
    "gemma": ["gemma-2b"],
    "qwen": ["Qwen1.5-1.8B", "Qwen3-8B", "K2-Think-32B"],
    "llama": ["TinyLlama-1.1B", "Llama-3.1-8B"],
    "moe": ["Mixtral-8x7B", "Qwen3-30B-A3B", "Kimi-K2.5"],
}
PARAMETERS = {
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen3-8B": 8_190_735_360,
    "Mixtral-8x7B": 46_702_792_704,
    "Qwen3-30B-A3B": 30_532_122_624,
}
"""As their weight files count them, of models that are not among `PUBLISHED`."""


@pytest.mark.parametrize(("family", "name"), [(family, name) for family in SHAPES for name in SHAPES[family]])
def test_reference_shapes_are_the_published_models(registry, family, name):
    architecture = registry.architecture(family)
    assert [shape.name for shape in architecture.reference_shapes] == SHAPES[family]
    shape = next(shape for shape in architecture.reference_shapes if shape.name == name)
    published = PUBLISHED.get(name.removesuffix("-32B"))
    if published is not None:
        assert shape.config.items() >= published.config.items()
    if name != "Kimi-K2.5":
        parameters = published.parameters if published else PARAMETERS[name]
        assert count(without_weights(shape.config)) == parameters


def test_the_reference_shape_of_kimi_k25_is_its_language_model(registry):
    shape = registry.architecture("moe").reference_shapes[-1]
    assert shape.config.items() >= (kimi_k25()["text_config"] | {"model_type": "deepseek_v3"}).items()
    whole = without_weights(kimi_k25(), "AutoModelForImageTextToText")
    assert count(without_weights(shape.config)) == count(whole.model.language_model) + count(whole.lm_head)
