"""`spath-eval models`: families, checkpoints and scores, read without loading anything."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spath_eval.plugins.architectures.gemma import GEMMA
from spath_eval.plugins.zoo.train import CARD

SCORES = [
    ("spath_math_choice", "acc", 200, "0.250", 0.875),
    ("spath_math_generate", "exact_match", 60, "0", 0.9),
]
FAMILY = """
from pathlib import Path
from spath_eval import FFN, Architecture, ReferenceShape, hookimpl

@hookimpl
def spath_register_architectures(register):
    register(Architecture(
        name="{name}",
        model_types=("{name}_text", "{name}_moe"),
        ffns=(FFN("model.layers.*.mlp.experts", "experts"), FFN("model.layers.*.mlp"), FFN("model.layers.*.mlp.one")),
        checkpoint={checkpoint!r} and Path({checkpoint!r}),
        reference_shapes=(ReferenceShape("{name}-7B", {{}}), ReferenceShape("{name}-1B", {{}})),
    ))
"""


def card() -> str:
    """A model card as the training script writes it."""
    rows = [
        f"| {task} | {metric} | {items} | {chance} | {value:.3f} |" for task, metric, items, chance, value in SCORES
    ]
    numbers = ("parameters", "ffn_share", "layers", "hidden", "width", "steps", "seed", "batch", "seen", "rate")
    words = ("family", "model_type", "tokens", "rows", "losses", "other_weight")
    return CARD.format(table="\n".join(rows), **dict.fromkeys(numbers, 1), **dict.fromkeys(words, "x"))


@pytest.fixture
def add_family(distribute):
    """Installs a plugin that registers a family: `add_family(name, checkpoint=None)`."""

    def add(name: str, checkpoint: Path | None = None) -> None:
        source = FAMILY.format(name=name, checkpoint=checkpoint and str(checkpoint))
        distribute(f"{name}-dist", {f"{name}-plugin": f"{name}_module"}, {f"{name}_module": source})

    return add


@pytest.fixture
def described(tiny_checkpoint, tmp_path):
    """The tiny checkpoint, with a model card."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "described")
    (folder / "README.md").write_text(card(), encoding="utf-8")
    return folder


@pytest.fixture
def listed(spath_eval_command):
    """The families by name, as JSON has them."""

    def call(*arguments: str) -> dict:
        outcome = spath_eval_command("models", "--json", *arguments)
        assert (outcome.status, outcome.err) == (0, "")
        return {family["name"]: family for family in json.loads(outcome.out)["architectures"]}

    return call


def test_a_family_is_what_its_plugin_declares(listed, add_family):
    add_family("nova")
    assert listed()["nova"] == {
        "name": "nova",
        "model_types": ["nova_text", "nova_moe"],
        "shapes": ["experts", "gated"],
        "reference_shapes": ["nova-7B", "nova-1B"],
        "checkpoint": None,
    }


def test_every_registered_family_is_listed(listed):
    from spath_eval.registry import Registry

    families = listed()
    assert list(families) == list(Registry.load().architectures)
    assert families["gemma"]["model_types"] == list(GEMMA.model_types)
    assert "gemma" not in listed("-p", "no:gemma")


def test_a_checkpoint_has_the_size_and_the_parameters_of_its_weights(listed, add_family, tiny_checkpoint):
    from transformers import AutoModelForCausalLM

    add_family("nova", tiny_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    assert listed()["nova"]["checkpoint"] == {
        "folder": str(tiny_checkpoint),
        "file_bytes": (tiny_checkpoint / "model.safetensors").stat().st_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "scores": [],
    }


def test_weights_in_several_files_count_together(listed, add_family, described):
    whole = sum(tensor.numel() for tensor in load_file(described / "model.safetensors").values())
    save_file({"more": torch.zeros(3, 5), "one": torch.zeros(())}, described / "more.safetensors", {"format": "pt"})
    add_family("nova", described)
    listed_parameters = listed()["nova"]["checkpoint"]["parameters"]
    assert listed_parameters == whole + 15 + 1


def test_scores_are_those_of_the_card_that_training_writes(listed, add_family, described):
    add_family("nova", described)
    assert listed()["nova"]["checkpoint"]["scores"] == [
        {"task": task, "metric": metric, "items": items, "chance": float(chance), "score": value}
        for task, metric, items, chance, value in SCORES
    ]


def test_the_checkpoints_of_the_project_score_as_their_cards_say(listed):
    for family in listed().values():
        checkpoint = family["checkpoint"]
        if checkpoint and (Path(checkpoint["folder"]) / "README.md").is_file():
            tasks = {
                f"spath_{name}_{form}"
                for name in ("math", "code", "factual", "language")
                for form in ("choice", "generate")
            }
            assert {row["task"] for row in checkpoint["scores"]} == tasks
            assert all(row["chance"] < row["score"] <= 1 for row in checkpoint["scores"])


def test_the_table_holds_the_same(spath_eval_command, add_family, described, tmp_path):
    add_family("nova", described)
    add_family("vega", tmp_path / "not-there")
    add_family("lyra")
    outcome = spath_eval_command("models")
    assert (outcome.status, outcome.err) == (0, "")
    families, title, *scores = outcome.out.split("\n\n")
    assert title == "Dense scores of the checkpoints"
    rows = {line.split()[0]: line.split() for line in families.splitlines() if not line.startswith(" ")}
    size, parameters = rows["nova"][-3:-1], rows["nova"][-1]
    assert size == [f"{(described / 'model.safetensors').stat().st_size / 1e6:.1f}", "MB"]
    assert int(parameters.replace(",", "")) > 10_000
    assert rows["vega"][-2:] == rows["lyra"][-2:] == ["-", "-"]
    assert max(map(len, outcome.out.splitlines())) <= 100

    assert not any("vega" in part for part in scores)
    assert "spath_math_choice acc 200 0.25 " in " ".join(scores[0].split())
    (part,) = [part for part in scores if "nova" in part]
    header, _, *lines = part.splitlines()
    column = header.split().index("nova") - len(header.split())
    table = {line.split()[0]: line.split() for line in lines}
    assert (table["spath_math_choice"][column], table["spath_math_generate"][column]) == ("0.875", "0.900")


@pytest.mark.parametrize("content", [b"", b"\x08", b"\xff" * 40, (4).to_bytes(8, "little") + b"[1]]"])
def test_weights_that_cannot_be_read_are_one_line(spath_eval_command, add_family, tmp_path, content):
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(content)
    add_family("nova", folder)
    outcome = spath_eval_command("models")
    assert (outcome.status, outcome.out) == (4, "")
    assert outcome.err.startswith(f"error: {folder / 'model.safetensors'}: not a readable safetensors file")
    assert len(outcome.err.splitlines()) == 1


def test_nothing_heavy_is_imported():
    program = "\n".join(
        [
            "import sys",
            "from spath_eval.cli import main",
            "assert main(['models']) == 0",
            "heavy = {'torch', 'transformers', 'lm_eval', 'pandas', 'safetensors', 'datasets'}",
            "print(*heavy & set(sys.modules), file=sys.stderr)",
        ]
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stderr.split() == []
