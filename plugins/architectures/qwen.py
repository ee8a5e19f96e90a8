"""Qwen 1.5, Qwen 2, Qwen 2.5 (all of type qwen2) and Qwen 3."""

from pathlib import Path

from spath_eval import FFN, Architecture, ReferenceShape, hookimpl

QWEN = Architecture(
    name="qwen",
    model_types=("qwen2", "qwen3"),
    ffns=(FFN("model.layers.*.mlp"),),
    checkpoint=Path(__file__).parents[1] / "zoo" / "qwen",
    reference_shapes=(
        ReferenceShape(
            "Qwen1.5-1.8B",
            {
                "model_type": "qwen2",
                "hidden_size": 2048,
                "intermediate_size": 5504,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "num_key_value_heads": 16,
                "vocab_size": 151936,
                "max_position_embeddings": 32768,
            },
        ),
        ReferenceShape(
            "Qwen3-8B",
            {
                "model_type": "qwen3",
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "head_dim": 128,
                "vocab_size": 151936,
                "tie_word_embeddings": False,
                "max_position_embeddings": 40960,
            },
        ),
        ReferenceShape(
            "K2-Think-32B",
            {
                "model_type": "qwen2",
                "hidden_size": 5120,
                "intermediate_size": 27648,
                "num_hidden_layers": 64,
                "num_attention_heads": 40,
                "num_key_value_heads": 8,
                "vocab_size": 152064,
                "tie_word_embeddings": False,
                "max_position_embeddings": 131072,
            },
        ),
    ),
)


@hookimpl
def spath_register_architectures(register):
    register(QWEN)
