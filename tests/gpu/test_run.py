"""The main job on a CUDA device, in bfloat16, with nothing else changed."""

import json

import pytest

from spath_eval.cli import main

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "record.json"
    arguments = "run --arch gemma --strategy negative --device cuda --dtype bfloat16 --limit 40 -o".split()
    assert main([*arguments, str(path)]) == 0
    return json.loads(path.read_text())


def test_the_main_job_passes_in_bfloat16(record):
    assert record["environment"]["device"] == "cuda"
    assert record["environment"]["dtype"] == "bfloat16"
    assert {case["outcome"] for case in record["cases"]} == {"passed"}
    assert len(record["cases"]) == 8


def test_compact_equals_masked_in_bfloat16(record):
    for case in record["cases"]:
        parity = case["gates"]["parity"]
        assert parity["max_relative_difference"] <= parity["tolerance"]


def test_peak_memory_is_measured(record):
    for case in record["cases"]:
        for entry in case["speed"]:
            assert entry["peak_memory"]["dense"] > 0
            assert entry["peak_memory"]["sparse"] > 0
