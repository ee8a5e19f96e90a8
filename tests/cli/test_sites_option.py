"""`--sites PATTERN`: models of no known family, whose FFNs are guessed from the paths of their down projections."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from spath_eval import plugins
from spath_eval.masks import Mask

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
GATED = "model.layers.*.mlp.down_proj"
UNCLAIMED = {
    "stablelm": (GATED, "gated"),
    "starcoder2": ("model.layers.*.mlp.c_proj", "plain"),
    "gpt_neox": ("gpt_neox.layers.*.mlp.dense_4h_to_h", "plain"),
    "codegen": ("transformer.h.*.mlp.fc_out", "plain"),
    "glm": (GATED, "fused"),
}
"""Model type, to where its down projections stand and the shape of its FFNs."""
PARTICULARS = {
    "codegen": {"n_inner": 64, "rotary_dim": 16},
    "glm": {"head_dim": 16, "partial_rotary_factor": 0.5},
    "gpt2": {"n_inner": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
}
"""What the configurations of some types have beside or instead of the sizes."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Saves a tiny random model with the tokenizer of the project's own models: `checkpoint(model_type)`."""
    tokenizer = AutoTokenizer.from_pretrained(Path(plugins.__file__).parent / "zoo" / "tokenizer")
    folders: dict[str, Path] = {}

    def save(model_type: str) -> Path:
        if model_type not in folders:
            folders[model_type] = tmp_path_factory.mktemp("unclaimed") / model_type
            torch.manual_seed(0)
            config = AutoConfig.for_model(model_type, **SIZES, **PARTICULARS.get(model_type, {}))
            AutoModelForCausalLM.from_config(config).save_pretrained(folders[model_type])
            tokenizer.save_pretrained(folders[model_type])
        return folders[model_type]

    return save


@pytest.fixture
def run_with(spath_eval_command, work_folder, checkpoint, brief):
    """Calls `spath-eval run --sites`: `run_with(model_type, pattern, ...)`."""
    return lambda model_type, pattern, *arguments: spath_eval_command(
        "run", "--model", checkpoint(model_type), "--sites", pattern, *brief, *arguments
    )


def refused(outcome, *words):
    """Assert that the command refused in one clear line that holds these words."""
    assert (outcome.status, outcome.out) == (4, "")
    assert outcome.err.startswith("error: ")
    assert len(outcome.err.splitlines()) == 1, outcome.err
    for word in words:
        assert word in outcome.err


@pytest.mark.parametrize("model_type", UNCLAIMED)
def test_a_model_of_no_known_family_passes_every_gate(run_with, model_type):
    pattern, shape = UNCLAIMED[model_type]
    outcome = run_with(model_type, pattern)
    assert outcome.status == 0, outcome.err
    warnings = [line for line in outcome.err.splitlines() if line.startswith("warning: ")]
    (warning,) = (line for line in warnings if "two halves of the profile text" not in line)
    assert f"the FFNs (2 {shape}) are guessed from '{pattern}' and unverified" in warning
    (model,) = outcome.record["models"]
    assert (model["arch"], model["sites_pattern"]) == ("unverified", pattern)
    block = pattern.rpartition(".")[0]
    assert model["sites"] == [{"path": block.replace("*", str(layer)), "width": 64} for layer in range(2)]
    for case in outcome.record["cases"]:
        assert case["outcome"] == "passed"
        assert case["arch"] == "unverified"
        assert case["gates"]["parity"]["ok"]


def test_such_a_model_is_refused_without_the_option_and_told_of_it(spath_eval_command, work_folder, checkpoint, brief):
    outcome = spath_eval_command("run", "--model", checkpoint("stablelm"), *brief)
    refused(outcome, "no architecture claims model type 'stablelm'", "--sites")


def test_a_guess_selects_the_neurons_that_the_declaration_selects(run, work_folder):
    declared = run("--no-controls", "-o", "declared.json").record
    guessed = run("--no-controls", "-o", "guessed.json", "--sites", GATED).record
    assert (declared["models"][0]["arch"], guessed["models"][0]["arch"]) == ("gemma", "unverified")
    assert "sites_pattern" not in declared["models"][0]
    assert declared["cases"][0]["mask"]["digest"] == guessed["cases"][0]["mask"]["digest"]


def test_profiles_and_masks_can_be_made_by_it(spath_eval_command, work_folder, checkpoint, brief):
    options = ["--model", checkpoint("glm"), "--sites", GATED, *brief[: brief.index("--preservation-tokens")]]
    options = [option for option in options if option not in ("--limit", "4")]
    for command in ("profile", "mask"):
        outcome = spath_eval_command(command, *options, "-o", command)
        assert outcome.status == 0, outcome.err
        assert outcome.err.count("unverified") == 1
    assert list(Mask.load(work_folder / "mask").keep) == ["model.layers.0.mlp", "model.layers.1.mlp"]


def test_a_narrower_pattern_profiles_anew(run_with):
    """Profiles are cached; what another pattern found must not be taken for this one's."""
    for pattern, layers in ((GATED, 2), ("model.layers.1.mlp.down_proj", 1), (GATED, 2)):
        outcome = run_with("stablelm", pattern, "--no-controls")
        assert outcome.status == 0, outcome.err
        assert len(outcome.record["models"][0]["sites"]) == layers


@pytest.mark.parametrize("pattern", ["model.*.down_proj", "down_proj", "layers.*.mlp.down_proj", ""])
def test_a_pattern_that_finds_nothing_is_one_line_that_says_what_there_is(run_with, pattern):
    refused(run_with("stablelm", pattern), f"matches '{pattern}'", "model.layers.*.self_attn.o_proj", GATED)


@pytest.mark.parametrize(
    ("model_type", "pattern", "words"),
    [
        ("stablelm", "model.layers.*.mlp.gate_proj", ["it gives 64 values, and 32 are hidden"]),
        ("starcoder2", "model.layers.*.mlp.c_fc", ["it gives 64 values, and 32 are hidden"]),
        ("stablelm", "model.layers.*.mlp", ["is a StableLmMLP", "Linear"]),
        ("stablelm", "lm_head", ["it gives 2048 values"]),
        (
            "stablelm",
            "model.layers.*.self_attn.o_proj",
            ["q_proj (Linear of 32 rows), k_proj", "gate_proj and up_proj"],
        ),
        ("gpt_neox", "gpt_neox.layers.*.attention.dense", ["query_key_value (Linear of 96 rows)"]),
        ("opt", "model.decoder.layers.*.fc2", ["self_attn (OPTAttention)", "fc1 (Linear of 64 rows)"]),
        ("gpt2", "transformer.h.*.mlp.c_proj", ["is a Conv1D", "Linear"]),
    ],
)
def test_what_is_no_down_projection_is_refused(run_with, model_type, pattern, words):
    refused(run_with(model_type, pattern), pattern.replace("*", "0"), *words)


def test_a_routed_expert_is_refused(tiny_model):
    """Its rows are not those of the input, and padding could not be told from text."""
    from spath_eval import UsageError
    from spath_eval.sites import guess_sites

    model = tiny_model("llama")
    model.model.layers[0].experts = torch.nn.ModuleList([copy.deepcopy(model.model.layers[0].mlp)])
    with pytest.raises(UsageError, match="belongs to a routed expert"):
        guess_sites(model, "model.layers.*.experts.*.down_proj")


def test_the_option_and_a_family_exclude_each_other(run_with):
    refused(run_with("stablelm", GATED, "--arch", "gemma"), "--sites", "--arch")


def test_without_a_model_there_is_nothing_to_guess(spath_eval_command, work_folder):
    refused(spath_eval_command("run", "--sites", GATED), "name a model with --model")
