"""Mixtures of experts: Mixtral, Qwen, OLMoE, Phi-3.5-MoE, DeepSeek-V3, gpt-oss.

A layer has routed experts, perhaps a shared expert that every token passes, or an ordinary FFN where it is not a mixture.
"""

from pathlib import Path

from spath_eval import FFN, Architecture, hookimpl

MOE = Architecture(
    name="moe",
    model_types=("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "deepseek_v3", "gpt_oss"),
    ffns=(
        FFN("model.layers.*.mlp.experts", "experts", up="gate_up_proj"),
        FFN("model.layers.*.mlp.shared_expert"),
        FFN("model.layers.*.mlp.shared_experts"),
        FFN("model.layers.*.mlp"),
    ),
    checkpoint=Path(__file__).parents[1] / "zoo" / "moe",
)


@hookimpl
def spath_register_architectures(register):
    register(MOE)
