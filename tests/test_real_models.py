"""The main job on a real pretrained model, from its folder and from its GGUF file.

The models come from `$SPATH_REAL_MODELS` (a folder with `gemma3/` and `gemma3.gguf`), or are laid out by the script
`tools/real_models.py` of a folder `shared` beside the checkout, where there is one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spath_eval.cli import main

pytestmark = pytest.mark.real_model

SHARED = Path(__file__).resolve().parents[2] / "shared"
MATHEMATICS = SHARED / "data" / "corpora" / "math"


@pytest.fixture(autouse=True)
def all_cores():
    """Unlike the tiny models, these gain from more than one thread."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def real_models(tmp_path_factory):
    if folder := os.environ.get("SPATH_REAL_MODELS"):
        return Path(folder)
    script = SHARED / "tools" / "real_models.py"
    if not script.exists():
        pytest.skip("no real models here: set SPATH_REAL_MODELS to a folder with gemma3/ and gemma3.gguf")
    folder = tmp_path_factory.mktemp("real_models")
    subprocess.run([sys.executable, str(script), str(folder), "gemma3"], check=True)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    if not MATHEMATICS.exists():
        pytest.skip(f"no mathematics text at {MATHEMATICS}")
    return MATHEMATICS


def run(model, text, output, *more):
    arguments = ["--domain", "math", "--profile-text", f"math={text}", "--limit", "4", "--batch-size", "8"]
    small = ["--profile-tokens", "1000", "--preservation-tokens", "400", "--no-speed", "-o", str(output)]
    assert main(["run", "--model", str(model), "--strategy", "negative", *arguments, *small, *more]) == 0
    return json.loads(output.read_text())


def test_gemma_3_is_recognised_and_negative_selection_beats_random(real_models, text, tmp_path):
    record = run(real_models / "gemma3", text, tmp_path / "folder.json")
    assert record["models"][0]["arch"] == "gemma"
    assert record["models"][0]["name"] == "gemma3"
    negative, random = (case["preservation"]["perplexity"] for case in record["cases"])
    assert 1.0 < negative["ratio"] < 1.4
    assert random["ratio"] > 2 * negative["ratio"]

    from_gguf = run(real_models / "gemma3.gguf", text, tmp_path / "gguf.json", "--no-controls")
    assert from_gguf["models"][0]["arch"] == "gemma"
    again = from_gguf["cases"][0]["preservation"]["perplexity"]
    assert again["dense"] == pytest.approx(negative["dense"], rel=1e-3)
    assert again["ratio"] == pytest.approx(negative["ratio"], rel=1e-3)
