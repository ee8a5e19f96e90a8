"""Whole experts are removed from the command line, in a model that loads through another auto class."""

from __future__ import annotations

import dataclasses

import pytest

from spath_eval import ReferenceShape
from spath_eval.speed import measurement
from spath_eval.speed.timing import Workload

TEXT = {
    "model_type": "deepseek_v3",
    "hidden_size": 32,
    "intermediate_size": 64,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
LAYER = ReferenceShape(
    "nano",
    {
        "model_type": "mixtral",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 1,
        "num_experts_per_tok": 1,
    },
)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, tiny_checkpoint):
    """The folder of a randomly initialised Kimi K2.5 of two layers."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "mixture"
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = TEXT | tokens | {"vocab_size": len(tokenizer)}
    config = AutoConfig.for_model("kimi_k25", text_config=text, vision_config=vision)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(spath_eval_command, work_folder, mixture, brief):
    return lambda *arguments: spath_eval_command("run", "--model", mixture, *brief, *arguments)


def test_experts_alone_or_with_neurons(run):
    alone, _ = run("--expert-sparsity", "0.25").record["cases"]
    assert alone["id"] == "mixture/math/negative@0+experts@0.25"
    # a quarter of the experts of the one mixture, and nothing of the dense and the shared FFN
    assert alone["sparsity"]["per_site"] == {
        "model.language_model.layers.0.mlp": 0.0,
        "model.language_model.layers.1.mlp.experts": 0.25,
        "model.language_model.layers.1.mlp.shared_experts": 0.0,
    }
    both, random = run("--expert-sparsity", "0.25", "--sparsity", "0.5").record["cases"]
    assert both["id"] == "mixture/math/negative@0.5+experts@0.25"
    for case in (both, random):
        assert case["outcome"] == "passed"
        assert case["sparsity"]["per_site"]["model.language_model.layers.1.mlp.experts"] == 1 - 0.75 * 0.5
        assert case["gates"]["parity"]["ok"]


def test_the_reference_layer_of_a_mixture_is_timed(spath_eval_command, work_folder, mixture, brief, monkeypatch):
    from spath_eval.plugins.architectures import moe

    monkeypatch.setattr(moe, "MOE", dataclasses.replace(moe.MOE, reference_shapes=(LAYER,)))
    monkeypatch.setattr(measurement, "WORKLOAD", Workload(batch=1, tokens=8, new_tokens=2))
    options = [option for option in brief if option != "--no-speed"]
    outcome = spath_eval_command("run", "--model", mixture, *options, "--sparsity", "0.5", "--no-controls")
    assert outcome.status == 0
    subjects = [entry["subject"] for entry in outcome.record["cases"][0]["speed"]]
    assert subjects == ["model", "one layer of nano, random weights"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--expert-sparsity", "0.9"], "its router must choose 2 experts"),
        (["--expert-sparsity", "0.1,0.2"], "--expert-sparsity takes one value"),
        (["--expert-sparsity", "1"], "is not between 0 and 1"),
    ],
)
def test_what_cannot_be_removed_is_refused(run, arguments, message):
    outcome = run(*arguments)
    assert outcome.status in (1, 4)
    assert message in outcome.err


def test_a_model_without_routed_experts_is_refused(spath_eval_command, work_folder, tiny_checkpoint, brief):
    outcome = spath_eval_command("run", "--model", tiny_checkpoint, *brief, "--expert-sparsity", "0.25")
    assert outcome.status == 4
    assert outcome.err.splitlines()[-1] == "error: --expert-sparsity: tiny has no routed experts"


def test_a_mask_with_experts_comes_back_from_its_file(spath_eval_command, run, work_folder, mixture, brief):
    record = run("--expert-sparsity", "0.25", "--no-controls").record
    from spath_eval.masks import Mask, remove_experts

    keep = {path: 1 - share for path, share in record["cases"][0]["sparsity"]["per_site"].items()}
    assert keep["model.language_model.layers.1.mlp.experts"] == 0.75
    import torch

    widths = {site["path"]: site for site in record["models"][0]["sites"]}
    whole = {
        path: torch.ones((site["experts"], site["width"]) if "experts" in site else (site["width"],), dtype=torch.bool)
        for path, site in widths.items()
    }
    scores = {path: torch.arange(8.0) for path, site in widths.items() if "experts" in site}
    remove_experts(Mask(whole), scores, 0.25).save(work_folder / "mask.safetensors")
    outcome = run("--mask", "mask.safetensors", "--no-controls")
    assert outcome.status == 0
    assert outcome.record["cases"][0]["sparsity"]["achieved"] == pytest.approx(0.25 * 8 * 24 / (64 + 8 * 24 + 24))
