"""Gemma, Gemma 2, Gemma 3, Gemma 3n and Gemma 4 (text), the last with or without a mixture beside its FFNs."""

from pathlib import Path

from spath_eval import FFN, Architecture, ReferenceShape, hookimpl

GEMMA = Architecture(
    name="gemma",
    model_types=("gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text"),
    ffns=(
        FFN("model.layers.*.mlp", couples_neurons="activation_sparsity"),
        FFN("model.layers.*.experts", "experts", up="gate_up_proj", router="router"),
    ),
    checkpoint=Path(__file__).parents[1] / "zoo" / "gemma",
    reference_shapes=(
        ReferenceShape(
            "gemma-2b",
            {
                "model_type": "gemma",
                "hidden_size": 2048,
                "intermediate_size": 16384,
                "num_hidden_layers": 18,
                "num_attention_heads": 8,
                "num_key_value_heads": 1,
                "head_dim": 256,
                "hidden_activation": "gelu_pytorch_tanh",
                "vocab_size": 256000,
                "max_position_embeddings": 8192,
            },
        ),
    ),
)


@hookimpl
def spath_register_architectures(register):
    register(GEMMA)
