"""Llama and what shares its layout: SmolLM, TinyLlama (type llama) and Mistral."""

from pathlib import Path

from spath_eval import FFN, Architecture, ReferenceShape, hookimpl

LLAMA = Architecture(
    name="llama",
    model_types=("llama", "mistral"),
    ffns=(FFN("model.layers.*.mlp"),),
    checkpoint=Path(__file__).parents[1] / "zoo" / "llama",
    reference_shapes=(
        ReferenceShape(
            "TinyLlama-1.1B",
            {
                "model_type": "llama",
                "hidden_size": 2048,
                "intermediate_size": 5632,
                "num_hidden_layers": 22,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "vocab_size": 32000,
                "max_position_embeddings": 2048,
            },
        ),
        ReferenceShape(
            "Llama-3.1-8B",
            {
                "model_type": "llama",
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "vocab_size": 128256,
                "max_position_embeddings": 131072,
            },
        ),
    ),
)


@hookimpl
def spath_register_architectures(register):
    register(LLAMA)
