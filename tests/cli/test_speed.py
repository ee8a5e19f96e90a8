"""`spath-eval speed`, on shapes and models so small that their times mean nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import sys

import pytest

from spath_eval import ReferenceShape

NANO = ReferenceShape(
    "Nano-1B",
    {
        "model_type": "gemma",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": 500,
    },
)


@pytest.fixture
def speed(spath_eval_command, work_folder, monkeypatch):
    """Calls `spath-eval speed` with as little work as there can be; the family gemma has a shape Nano-1B."""
    from spath_eval.plugins.architectures import gemma
    from spath_eval.speed import benchmark
    from spath_eval.speed.conditions import Rates

    monkeypatch.setattr(gemma, "GEMMA", dataclasses.replace(gemma.GEMMA, reference_shapes=(NANO,)))
    monkeypatch.setattr(benchmark, "measure_rates", lambda device, dtype: Rates(1e10, 1e11))
    brief = ["--context", "6", "--new-tokens", "2", "--seconds", "0"]
    return lambda *arguments: spath_eval_command("speed", *brief, *arguments)


@pytest.fixture
def on_tiny(speed, tiny_checkpoint, short_text):
    """The same on the tiny checkpoint, profiled on a short text of mathematics."""
    model = ["--model", tiny_checkpoint, "--profile-text", f"math={short_text}", "--profile-tokens", "400"]
    return lambda *arguments: speed(*model, *arguments)


def subjects(outcome):
    assert outcome.status == 0, outcome.err
    return list(dict.fromkeys(entry["subject"] for entry in json.loads(outcome.out)))


def written(outcome):
    """The file that stderr names."""
    from pathlib import Path

    return json.loads(Path(re.findall(r"^speed: (.+)$", outcome.err, flags=re.MULTILINE)[-1]).read_text())


def test_a_shape_is_measured_as_ffns_one_layer_and_whole(speed):
    outcome = speed("--shape", "nano-1b", "--json")
    assert subjects(outcome) == [
        "one layer of Nano-1B, random weights",
        "FFNs of Nano-1B, random weights",
        "Nano-1B, random weights",
    ]
    assert {entry["sparsity"] for entry in json.loads(outcome.out)} == {0.5}


def test_some_layers_of_a_shape_are_said_to_be_that(speed):
    names = ["FFNs of 2 layers of Nano-1B, random weights", "2 layers of Nano-1B, random weights"]
    assert subjects(speed("--shape", "Nano-1B", "--layers", "2", "--subject", "ffn,model", "--json")) == names
    one = ["FFN of one layer of Nano-1B, random weights", "one layer of Nano-1B, random weights"]
    assert subjects(speed("--shape", "Nano-1B", "--layers", "1", "--json")) == one
    assert subjects(speed("--shape", "Nano-1B", "--subject", "layer", "--json")) == one[1:]


def test_all_workloads_and_sparsities_are_measured(speed):
    sizes = ["--batch", "1,2", "--context", "5,7", "--sparsity", "0.25,0.5"]
    entries = json.loads(speed("--shape", "Nano-1B", "--layers", "1", *sizes, "--json").out)
    whole = [entry for entry in entries if "decode" in entry]
    assert [(e["sparsity"], e["decode"]["batch"], e["decode"]["tokens"]) for e in whole] == [
        (sparsity, batch, tokens) for sparsity in (0.25, 0.5) for batch in (1, 2) for tokens in (5, 7)
    ]
    assert not any("new_tokens" in entry["prefill"] for entry in whole)
    assert {entry["decode"]["new_tokens"] for entry in whole} == {2}
    alone = [entry["ffn"] for entry in entries if "ffn" in entry and entry["sparsity"] == 0.5]
    assert [(timing["batch"], timing["tokens"]) for timing in alone] == [(1, 1), (1, 5), (1, 7), (2, 1), (2, 5), (2, 7)]


def test_the_table_is_the_result_and_the_file_holds_the_raw_values(speed, tmp_path):
    path = tmp_path / "speed.json"
    outcome = speed("--shape", "Nano-1B", "--layers", "1", "-o", path)
    assert outcome.status == 0
    assert "one layer of Nano-1B, random weights" in outcome.out
    assert "reached" in outcome.out
    assert outcome.err.splitlines()[-1] == f"speed: {path}"
    content = json.loads(path.read_text())
    assert (content["kind"], content["status"]) == ("speed", "complete")
    assert content["options"]["shape"] == "Nano-1B"
    assert content["environment"]["packages"]["torch"]
    timing = content["speed"][-1]["decode"]
    assert len(timing["dense_seconds"]) == len(timing["sparse_seconds"]) == timing["rounds"] == 6


def test_show_prints_the_table_again(speed, spath_eval_command, tmp_path):
    measured = speed("--shape", "Nano-1B", "--layers", "1", "-o", tmp_path / "speed.json")
    assert spath_eval_command("show", tmp_path / "speed.json").out == measured.out


def test_a_picture_is_drawn_of_what_was_measured(speed, work_folder):
    pytest.importorskip("matplotlib", reason="pictures are drawn with matplotlib")
    outcome = speed("--shape", "Nano-1B", "--layers", "1", "--sparsity", "0.25,0.5", "--picture", "new/nano")
    assert outcome.status == 0
    assert outcome.err.splitlines()[-2:] == ["picture: new/nano.png", "picture: new/nano.svg"]
    text = (work_folder / "new" / "nano.svg").read_text(encoding="utf-8")
    for label in ("FFN of one layer of Nano-1B, random weights", "prefill", "decode", "batch 1, context 6"):
        assert f"<!-- {label} -->" in text


def test_without_matplotlib_nothing_is_measured(speed, work_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = speed("--shape", "Nano-1B", "--picture", "nano")
    assert (outcome.status, outcome.out) == (4, "")
    assert outcome.err == "error: a picture is drawn with matplotlib: pip install 'spath-eval[report]'\n"
    assert list(work_folder.iterdir()) == []


def test_a_self_test_times_dense_against_dense(speed):
    outcome = speed("--shape", "Nano-1B", "--layers", "1", "--self-test")
    assert outcome.status == 0
    for entry in written(outcome)["speed"]:
        assert (entry["self_test"], entry["sparsity"]) == (True, 0)
        for phase in {"ffn", "prefill", "decode"} & set(entry):
            assert entry[phase]["ceiling"] == 1
    assert re.search(r"Self-test, dense against dense: \d of 4 intervals contain 1\.", outcome.out)


def test_domains_of_a_shape_are_switched_between_and_mixed(speed):
    options = ["--layers", "1", "--subject", "model", "--domain", "math,code", "--batch", "2"]
    assert subjects(speed("--shape", "Nano-1B", *options, "--json")) == [
        "one layer of Nano-1B, random weights",
        "one layer of Nano-1B, random weights: switching among 2 pathways",
        "one layer of Nano-1B, random weights: 2 domains in a batch, by sub-batches",
        "one layer of Nano-1B, random weights: 2 domains in a batch, by the union",
    ]


def test_a_model_is_measured_with_a_freshly_selected_mask(on_tiny):
    outcome = on_tiny("--sparsity", "0.25", "--json", "--domain", "math")
    assert subjects(outcome) == ["one layer of tiny, random weights", "FFNs of the model", "model"]
    assert {entry["sparsity"] for entry in json.loads(outcome.out)} == {0.25}


def test_a_model_is_measured_with_a_mask_from_a_file(
    on_tiny, spath_eval_command, tiny_checkpoint, short_text, tmp_path
):
    path = tmp_path / "mask.safetensors"
    made = ["--model", tiny_checkpoint, "--profile-text", f"math={short_text}", "--profile-tokens", "400"]
    outcome = spath_eval_command("mask", *made, "--domain", "math", "--sparsity", "0.375", "-o", path)
    assert outcome.status == 0
    entries = json.loads(on_tiny("--mask", path, "--subject", "model", "--json").out)
    assert [entry["sparsity"] for entry in entries] == [0.375]


def test_a_model_is_measured_with_the_mask_of_a_record(run, speed, tmp_path):
    recorded = run("--sparsity", "0.25,0.5", "--no-controls", "--dtype", "bfloat16")
    assert recorded.status == 0
    case = recorded.record["cases"][1]
    options = ["--record", recorded.record_path, "--subject", "model", "--json"]
    (entry,) = json.loads(speed(*options, "--case", case["id"]).out)
    assert entry["sparsity"] == case["sparsity"]["achieved"]
    assert entry["dtype"] == "bfloat16"

    record = json.loads(recorded.record_path.read_text())
    record["cases"][1]["mask"]["digest"] = "0" * 64
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(record))
    outcome = speed("--record", changed, "--case", case["id"])
    assert outcome.status == 4
    assert "another mask was selected than the record's" in outcome.err
    outcome = speed("--record", changed, "--case", "tiny/math/other@0.5")
    assert outcome.status == 4
    assert "the record has no case 'tiny/math/other@0.5': there are tiny/math/negative@0.25" in outcome.err


def test_a_fault_is_flagged_in_the_table_and_on_stderr(speed, monkeypatch):
    from spath_eval.speed import benchmark, entries

    monkeypatch.setattr(benchmark, "exceeds_cache", lambda count, device: True)
    timing_entry = entries.timing_entry

    def faster(times, *rest, **named):
        dense = tuple(9 * seconds for seconds in times.dense_seconds)
        sparse = tuple(seconds / 9 for seconds in times.dense_seconds)
        return timing_entry(dataclasses.replace(times, dense_seconds=dense, sparse_seconds=sparse), *rest, **named)

    monkeypatch.setattr(entries, "timing_entry", faster)
    outcome = speed("--shape", "Nano-1B", "--layers", "1", "--subject", "model")
    assert outcome.status == 0
    warnings = re.findall(r"^warning: measurement fault: one layer of Nano-1B", outcome.err, flags=re.MULTILINE)
    assert len(warnings) == 2
    assert "measurement fault" in outcome.out
    (entry,) = written(outcome)["speed"]
    assert "fault" in entry["prefill"]


def test_a_pathway_that_is_not_applied_fails_before_anything_is_timed(speed, monkeypatch):
    from contextlib import nullcontext

    from spath_eval.sites import Site

    monkeypatch.setattr(Site, "installed", lambda self, module: nullcontext())
    outcome = speed("--shape", "Nano-1B", "--json")
    assert outcome.status == 1
    assert "FAILED mask not applied at" in outcome.err
    assert json.loads(outcome.out) == []
    assert written(outcome)["status"] == "failed"


def test_an_interrupted_run_keeps_what_it_has_measured(speed, monkeypatch):
    from spath_eval.speed.benchmark import Benchmark

    def interrupt(self, pathway):
        raise KeyboardInterrupt

    monkeypatch.setattr(Benchmark, "whole", interrupt)
    outcome = speed("--shape", "Nano-1B", "--layers", "1")
    assert outcome.status == 2
    content = written(outcome)
    assert content["status"] == "interrupted"
    assert len(content["speed"]) == 2


def test_a_shape_that_exceeds_memory_is_refused(speed, monkeypatch):
    from spath_eval.speed import shapes

    monkeypatch.setattr(shapes, "available_memory", lambda device: 200_000)
    outcome = speed("--shape", "Nano-1B")
    assert outcome.status == 4
    assert re.search(r"error: Nano-1B, random weights: it needs 0.0 GB .* --layers \d would fit", outcome.err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a shape with --shape"),
        (["--shape", "nano-2b"], "unknown shape 'nano-2b': there are"),
        (["--shape", "Nano-1B", "--model", "x"], "--shape says which model and mask, and so does --model"),
        (["--shape", "Nano-1B", "--record", "x"], "--shape says which model and mask, and so does --record"),
        (["--record", "x"], "--record names a record and --case one of its cases"),
        (["--record", "x", "--case", "y", "--sparsity", "0.5"], "--record says which model and mask, and so does"),
        (["--arch", "gemma", "--layers", "1"], "--layers says how much of a shape is built"),
        (["--arch", "gemma", "--mask", "x", "--sparsity", "0.5"], "--mask takes the place of --sparsity"),
        (["--shape", "Nano-1B", "--self-test", "--sparsity", "0.5"], "--self-test removes nothing"),
        (["--shape", "Nano-1B", "--layers", "4"], "Nano-1B has 3 layers: --layers 4"),
        (["--shape", "Nano-1B", "--experts", "4"], "Nano-1B has no routed experts: --experts 4"),
        (["--shape", "Nano-1B", "--batch", "0"], "--batch '0': expected numbers from 1 on"),
        (["--shape", "Nano-1B", "--context", "1,x"], "--context '1,x': expected numbers from 1 on"),
        (["--shape", "Nano-1B", "--subject", "head"], "--subject 'head': there are ffn, layer, model"),
        (["--shape", "Nano-1B", "--sparsity", "2"], "sparsity 2 is not between 0 and 1"),
        (["--arch", "gemma", "--strategy", "negative,random"], "one --model with one --strategy"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(speed, arguments, message):
    outcome = speed(*arguments)
    assert outcome.status == 4
    assert message in outcome.err.splitlines()[-1]


def test_a_strategy_without_a_fixed_mask_has_no_speed(on_tiny):
    outcome = on_tiny("--strategy", "oracle")
    assert outcome.status == 4
    assert "strategy 'oracle' is of kind token: it has no compact execution" in outcome.err
