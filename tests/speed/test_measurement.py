"""The speed of a case: what its user gets, and beside it a layer of a published size, labelled as such."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest

from spath_eval import ReferenceShape
from spath_eval.speed import measurement
from spath_eval.speed.timing import Stop, Workload

SHAPE = ReferenceShape(
    "gemma-nano",
    {
        "model_type": "gemma",
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "vocab_size": 1000,
        "max_position_embeddings": 512,
    },
)


@pytest.fixture
def run(spath_eval_command, work_folder, tiny_checkpoint, brief, monkeypatch):
    """Calls `spath-eval run` with speed, of as little work as there can be, on a family with a tiny reference shape."""
    from spath_eval.plugins.architectures import gemma

    monkeypatch.setattr(gemma, "GEMMA", dataclasses.replace(gemma.GEMMA, reference_shapes=(SHAPE,)))
    monkeypatch.setattr(measurement, "WORKLOAD", Workload(batch=1, tokens=8, new_tokens=2))
    monkeypatch.setattr(measurement, "Stop", partial(Stop, seconds=0.0))
    options = [option for option in brief if option != "--no-speed"]
    return lambda *arguments: spath_eval_command("run", "--model", tiny_checkpoint, *options, *arguments)


@pytest.fixture
def layers(monkeypatch):
    """The names of the reference layers that are built."""
    names = []
    build = measurement.build
    monkeypatch.setattr(
        measurement, "build", lambda shape, cut, **rest: names.append(shape.name) or build(shape, cut, **rest)
    )
    return names


def test_a_case_has_the_model_and_the_labelled_layer(run):
    outcome = run("--sparsity", "0.5", "--no-controls")
    assert outcome.status == 0
    (case,) = outcome.record["cases"]
    model, layer = case["speed"]
    assert model["subject"] == "model"
    assert layer["subject"] == "one layer of gemma-nano, random weights"
    for entry in (model, layer):
        for phase in ("prefill", "decode"):
            timing = entry[phase]
            assert timing["rounds"] == len(timing["dense_seconds"]) == len(timing["sparse_seconds"]) >= 6
            assert timing["ci95"][0] <= timing["ratio"] <= timing["ci95"][1]
            assert timing["ceiling"] > 1
            assert (timing["batch"], timing["tokens"]) == (1, 8)
        assert entry["peak_memory"] is None
        assert entry["peak_memory_reason"]
    assert "one layer of gemma-nano, random weights" in outcome.out
    assert "speed_reason" not in case


def test_the_ceilings_are_of_the_model_and_the_layer_at_the_achieved_sparsity(run):
    from spath_eval.masks import remove_lowest
    from spath_eval.plugins.architectures.gemma import GEMMA
    from spath_eval.speed.ceilings import work
    from spath_eval.speed.shapes import Cut, build

    (case,) = run("--sparsity", "0.3", "--no-controls").record["cases"]
    import torch

    model = build(SHAPE, Cut(1), device="cpu", dtype=torch.float32)
    sites = GEMMA.sites(model)
    scores = {site.path: torch.arange(site.width).float() for site in sites}
    mask = remove_lowest(scores, case["sparsity"]["achieved"])
    dense, sparse = (work(model, sites, one, measurement.WORKLOAD) for one in (None, mask))
    of_model, of_layer = case["speed"]
    prefill, decode = dense.prefill.flops, dense.decode.bytes
    assert of_layer["prefill"]["ceiling"] == pytest.approx(prefill.whole / sparse.prefill.flops.whole)
    assert of_layer["decode"]["ceiling"] == pytest.approx(decode.whole / sparse.decode.bytes.whole)
    assert of_layer["prefill"]["ffn_share"] == pytest.approx(prefill.ffn / prefill.whole)
    assert of_model["decode"]["ceiling"] != pytest.approx(of_layer["decode"]["ceiling"])
    removed = of_layer["weight_bytes"]["dense"] - of_layer["weight_bytes"]["sparse"]
    assert removed == 4 * 3 * SHAPE.config["hidden_size"] * int((~mask[sites[0].path]).sum())


def test_a_layer_is_timed_once_for_each_sparsity(run, layers, short_text):
    outcome = run("--domain", "math,code", "--profile-text", f"code={short_text}", "--sparsity", "0.25,0.5")
    assert outcome.status == 0
    assert layers == ["gemma-nano"] * 2
    timings = {}
    for case in outcome.record["cases"]:
        timings.setdefault(case["sparsity"]["achieved"], []).append(case["speed"][1])
    assert {sparsity: len(entries) for sparsity, entries in timings.items()} == {0.25: 4, 0.5: 4}
    for entries in timings.values():
        assert all(entry == entries[0] for entry in entries)


def test_keeping_all_has_a_ceiling_of_one(run):
    (case,) = run("--strategy", "keep-all").record["cases"]
    for entry in case["speed"]:
        assert entry["prefill"]["ceiling"] == entry["decode"]["ceiling"] == 1


def test_a_family_without_a_reference_shape_times_the_model_alone(run, monkeypatch):
    from spath_eval.plugins.architectures import gemma

    monkeypatch.setattr(gemma, "GEMMA", dataclasses.replace(gemma.GEMMA, reference_shapes=()))
    (case,) = run("--no-controls").record["cases"]
    assert [entry["subject"] for entry in case["speed"]] == ["model"]


def test_nothing_is_measured_where_it_is_not_asked_for(run, layers):
    outcome = run("--no-speed", "--no-controls")
    (case,) = outcome.record["cases"]
    assert (case["speed"], case["speed_reason"]) == ([], "not asked for")
    assert layers == []


def test_a_failed_gate_leaves_no_speed(run, layers, monkeypatch):
    from contextlib import nullcontext

    from spath_eval.sites import Site

    monkeypatch.setattr(Site, "installed", lambda self, module: nullcontext())
    outcome = run()
    assert outcome.status == 1
    assert all("speed" not in case for case in outcome.record["cases"])
    assert layers == []
