"""A reference layer has the published dimensions, and nothing else that takes time."""

import pytest
import torch

from spath_eval.contracts import FFN, Architecture, ReferenceShape, UsageError
from spath_eval.speed import shapes
from spath_eval.speed.shapes import Cut, build, check_fits, find_shape, subject
from spath_eval.speed.timing import Workload

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
    model = build(GEMMA_2B, Cut(1), device="cpu", dtype=torch.bfloat16)
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
    assert subject(GEMMA_2B, Cut(1)) == "one layer of gemma-2b, random weights"


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
    first, second, third = (build(shape, Cut(1), device="cpu", dtype=torch.float32, seed=seed) for seed in (1, 1, 2))
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
    weight = build(shape, Cut(1), device="cpu", dtype=torch.float32).model.layers[0].self_attn.q_proj.weight
    assert weight.std().item() == pytest.approx(0.05, rel=0.02)
    assert weight.mean().item() == pytest.approx(0, abs=0.002)


FAMILY = Architecture(
    "family",
    ("llama", "mixtral"),
    (
        FFN("model.layers.*.mlp.experts", "experts", up="gate_up_proj", model_types=("mixtral",)),
        FFN("model.layers.*.mlp"),
    ),
    reference_shapes=(ReferenceShape("Nano-1B", {"model_type": "llama", **SMALL, "head_dim": 8}),),
)
MIXTURE = ReferenceShape(
    "mixture", {"model_type": "mixtral", **SMALL, "head_dim": 8, "num_local_experts": 6, "num_experts_per_tok": 2}
)
NANO = FAMILY.reference_shapes[0]


def test_shapes_are_found_by_name_whatever_the_case() -> None:
    assert find_shape([FAMILY], "nano-1b") == (FAMILY, NANO)
    with pytest.raises(UsageError, match="unknown shape 'nano': there are Nano-1B"):
        find_shape([FAMILY], "nano")


def test_subjects_say_how_much_of_the_model_it_is() -> None:
    assert subject(NANO, Cut()) == "Nano-1B, random weights"
    assert subject(NANO, Cut(3)) == "3 layers of Nano-1B, random weights"
    assert subject(MIXTURE, Cut(1, 2)) == "one layer of mixture with 2 of 6 experts, random weights"
    assert subject(MIXTURE, Cut(1, 6)) == "one layer of mixture, random weights"


def test_the_whole_model_has_all_layers_and_the_whole_vocabulary() -> None:
    model = build(NANO, Cut(), device="cpu", dtype=torch.float32)
    assert len(model.model.layers) == 12
    assert model.lm_head.weight.shape == (1000, 32)
    some = build(NANO, Cut(3), device="cpu", dtype=torch.float32)
    assert len(some.model.layers) == 3
    assert some.lm_head.weight.shape == (256, 32)


def test_fewer_experts_are_chosen_where_fewer_are_built() -> None:
    for experts, chosen in ((6, 2), (3, 2), (1, 1)):
        model = build(MIXTURE, Cut(1, experts), device="cpu", dtype=torch.float32)
        (site,) = FAMILY.sites(model)
        assert site.experts == experts
        assert model.config.num_experts_per_tok == chosen
        with torch.inference_mode():
            assert torch.isfinite(model(input_ids=torch.arange(9)[None]).logits).all()


def test_a_few_layers_of_a_mixture_that_begins_dense_are_mixtures() -> None:
    sizes = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "n_shared_experts": 1}
    own = {"num_key_value_heads": 4, "first_k_dense_replace": 1, "moe_intermediate_size": 16}
    shape = ReferenceShape("deep", {"model_type": "deepseek_v3", **SMALL, **sizes, **experts, **own})
    for cut, mixtures in ((Cut(1, 3), [True]), (Cut(), [False] + [True] * 11)):
        model = build(shape, cut, device="cpu", dtype=torch.float32)
        assert [hasattr(layer.mlp, "experts") for layer in model.model.layers] == mixtures
        with torch.inference_mode():
            assert torch.isfinite(model(input_ids=torch.arange(9)[None]).logits).all()


@pytest.mark.parametrize(
    ("shape", "cut", "message"),
    [
        (NANO, Cut(13), "Nano-1B has 12 layers: --layers 13"),
        (NANO, Cut(1, 2), "Nano-1B has no routed experts: --experts 2"),
        (MIXTURE, Cut(1, 7), "mixture has 6 experts in a layer: --experts 7"),
    ],
)
def test_what_a_shape_does_not_have_is_refused(shape: ReferenceShape, cut: Cut, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(shape, cut, device="cpu", dtype=torch.float32)


WORKLOAD = Workload(batch=2, tokens=10, new_tokens=6)
# Of a layer: attention 2 x 32 x 32 and 2 x 32 x 16, two norms, gate, up and down; embedding and head of 256; a norm.
LAYER = 2 * 32 * 32 + 2 * 32 * 16 + 2 * 32
NEURONS = 3 * 64 * 32
CACHED = 2 * 16 * 2 * 2 * 8
ACTIVE = 2 * (10 * (4 * 32 + 3 * 64) + 256)


def needed(layers: int, experts: int = 1, kept: float = 0.5) -> int:
    return round(4 * (2 * 256 * 32 + 32 + layers * (LAYER + (1 + kept) * experts * NEURONS + CACHED) + ACTIVE))


def fits(monkeypatch: pytest.MonkeyPatch, available: int, shape: ReferenceShape, cut: Cut, kept: float = 0.5) -> None:
    monkeypatch.setattr(shapes, "available_memory", lambda device: available)
    where: dict = {"device": torch.device("cpu"), "dtype": torch.float32}
    check_fits(FAMILY, shape, cut, WORKLOAD, kept=kept, **where)


def test_what_does_not_fit_is_refused_with_the_most_layers_that_would(monkeypatch: pytest.MonkeyPatch) -> None:
    fits(monkeypatch, needed(4), NANO, Cut(4))
    with pytest.raises(UsageError, match=r"4 layers of Nano-1B.*--layers 3 would fit"):
        fits(monkeypatch, needed(4) - 1, NANO, Cut(4))
    with pytest.raises(UsageError, match=r"--layers 1 would fit"):
        fits(monkeypatch, needed(2) - 1, NANO, Cut())
    with pytest.raises(UsageError, match=r"not even one layer would fit"):
        fits(monkeypatch, needed(1) - 1, NANO, Cut())
    with pytest.raises(UsageError, match=r"--layers 3 would fit"):
        fits(monkeypatch, needed(4), NANO, Cut(4), kept=0.6)


def test_of_a_mixture_the_most_experts_that_would_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    three_experts = needed(1, 3) + 4 * (6 * 32 + 2 * 10 * 3 * 64)  # a larger router than 3 rows, and two chosen experts
    with pytest.raises(UsageError, match=r"--layers 1 --experts 3 would fit"):
        fits(monkeypatch, three_experts, MIXTURE, Cut())


def test_refusing_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    huge = ReferenceShape("huge", {**NANO.config, "hidden_size": 2**18, "intermediate_size": 2**20})
    with pytest.raises(UsageError, match=r"huge, random weights: it needs [\d,.]+ GB in float32, and .* on cpu"):
        fits(monkeypatch, 10**9, huge, Cut())
