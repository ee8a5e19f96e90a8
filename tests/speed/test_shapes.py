"""A reference layer has the published dimensions, and nothing else that takes time."""

import pytest
import torch

from spath_eval.contracts import ReferenceShape
from spath_eval.speed.shapes import one_layer, subject

# Source: the published config.json of google/gemma-2b.
GEMMA_2B = ReferenceShape(
    "gemma-2b",
    {
        "model_type": "gemma",
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "num_hidden_layers": 18,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
    },
)
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 12,
    "vocab_size": 1000,
}


def test_gemma_2b_layer_has_the_published_dimensions() -> None:
    model = one_layer(GEMMA_2B, device="cpu", dtype=torch.bfloat16)
    layer = "model.layers.0"
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == {
        "model.embed_tokens.weight": (256, 2048),
        f"{layer}.self_attn.q_proj.weight": (8 * 256, 2048),
        f"{layer}.self_attn.k_proj.weight": (256, 2048),
        f"{layer}.self_attn.v_proj.weight": (256, 2048),
        f"{layer}.self_attn.o_proj.weight": (2048, 8 * 256),
        f"{layer}.mlp.gate_proj.weight": (16384, 2048),
        f"{layer}.mlp.up_proj.weight": (16384, 2048),
        f"{layer}.mlp.down_proj.weight": (2048, 16384),
        f"{layer}.input_layernorm.weight": (2048,),
        f"{layer}.post_attention_layernorm.weight": (2048,),
        "model.norm.weight": (2048,),
    }
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert model.config.num_hidden_layers == 1
    assert subject(GEMMA_2B) == "one layer of gemma-2b, random weights"


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("gemma", {"pad_token_id": 0, "eos_token_id": 999}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        (
            "gemma3n_text",
            {"num_kv_shared_layers": 5, "intermediate_size": [64] * 12, "vocab_size_per_layer_input": 900},
        ),
        ("llama", {}),
        ("qwen2", {"pad_token_id": 999, "tie_word_embeddings": False}),
        ("phi", {}),
        ("mixtral", {}),
    ],
)
def test_one_layer_of_any_family_runs_with_finite_seeded_weights(model_type: str, changes: dict) -> None:
    shape = ReferenceShape(model_type, {"model_type": model_type, **SMALL, **changes})
    first, second, third = (one_layer(shape, device="cpu", dtype=torch.float32, seed=seed) for seed in (1, 1, 2))
    assert len(first.model.layers) == 1
    assert first.config.num_hidden_layers == 1
    prompt = torch.arange(256)[None, ::7]
    with torch.inference_mode():
        logits = [model(input_ids=prompt).logits for model in (first, second, third)]
    assert logits[0].shape[-1] == 256
    assert torch.isfinite(logits[0]).all()
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])


def test_weights_have_the_spread_the_family_starts_training_with() -> None:
    shape = ReferenceShape("wide", {"model_type": "llama", **SMALL, "hidden_size": 256, "initializer_range": 0.05})
    weight = one_layer(shape, device="cpu", dtype=torch.float32).model.layers[0].self_attn.q_proj.weight
    assert weight.std().item() == pytest.approx(0.05, rel=0.02)
    assert weight.mean().item() == pytest.approx(0, abs=0.002)
