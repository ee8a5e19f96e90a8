"""Mixtures of experts: Mixtral, Qwen, OLMoE, Phi-3.5-MoE, DeepSeek-V3, gpt-oss, Kimi K2.5.

A layer has routed experts and perhaps a shared expert that every token passes, or else an ordinary FFN.
"""

from pathlib import Path

from spath_eval import FFN, Architecture, ReferenceShape, hookimpl


def _layers(layers: str) -> tuple[FFN, ...]:
    """The FFNs of mixtures whose layers stand at that path."""
    experts = f"{layers}.mlp.experts"
    by_gate = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "kimi_k25")
    return (
        FFN(experts, "experts", up="gate_up_proj", model_types=by_gate),
        FFN(experts, "experts", up="gate_up_proj", router="router", model_types=("gpt_oss",)),
        FFN(experts, "experts", up="gate_up_proj", router="router", routes_by_logits=True, model_types=("phimoe",)),
        FFN(f"{layers}.mlp.shared_expert"),
        FFN(f"{layers}.mlp.shared_experts"),
        FFN(f"{layers}.mlp"),
    )


MOE = Architecture(
    name="moe",
    model_types=("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "deepseek_v3", "gpt_oss", "kimi_k25"),
    ffns=(*_layers("model.layers.*"), *_layers("model.language_model.layers.*")),
    auto_classes={"kimi_k25": "AutoModelForImageTextToText"},
    checkpoint=Path(__file__).parents[1] / "zoo" / "moe",
    reference_shapes=(
        ReferenceShape(
            "Mixtral-8x7B",
            {
                "model_type": "mixtral",
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
                "vocab_size": 32000,
                "max_position_embeddings": 32768,
            },
        ),
        ReferenceShape(
            "Qwen3-30B-A3B",
            {
                "model_type": "qwen3_moe",
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "moe_intermediate_size": 768,
                "num_hidden_layers": 48,
                "num_attention_heads": 32,
                "num_key_value_heads": 4,
                "head_dim": 128,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "norm_topk_prob": True,
                "vocab_size": 151936,
                "max_position_embeddings": 40960,
            },
        ),
        ReferenceShape(
            "Kimi-K2.5",  # its language model, a DeepSeek-V3
            {
                "model_type": "deepseek_v3",
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
            },
        ),
    ),
)


@hookimpl
def spath_register_architectures(register):
    register(MOE)
