"""Phi (phi-1, phi-1.5, phi-2: plain FFNs with biases) and Phi-3 (gate and up in one projection)."""

from pathlib import Path

from spath_eval import FFN, Architecture, ReferenceShape, hookimpl

PHI = Architecture(
    name="phi",
    model_types=("phi", "phi3"),
    ffns=(
        FFN("model.layers.*.mlp", "plain", up="fc1", down="fc2", activation="activation_fn", model_types=("phi",)),
        FFN("model.layers.*.mlp", "fused", up="gate_up_proj", activation="activation_fn", model_types=("phi3",)),
    ),
    checkpoint=Path(__file__).parents[1] / "zoo" / "phi",
    reference_shapes=(
        ReferenceShape(
            "phi-2",
            {
                "model_type": "phi",
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "partial_rotary_factor": 0.4,
                "hidden_act": "gelu_new",
                "vocab_size": 51200,
                "max_position_embeddings": 2048,
            },
        ),
        ReferenceShape(
            "Phi-3.5-mini",
            {
                "model_type": "phi3",
                "hidden_size": 3072,
                "intermediate_size": 8192,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 32,
                "vocab_size": 32064,
                "max_position_embeddings": 131072,
            },
        ),
    ),
)


@hookimpl
def spath_register_architectures(register):
    register(PHI)
