"""What `spath-eval speed` measures of a model, on models so small that their times mean nothing."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from spath_eval import records
from spath_eval.contracts import FFN
from spath_eval.masks import Mask, keep_all
from spath_eval.pathways import GateError
from spath_eval.sites import Site, find_sites
from spath_eval.speed import benchmark as module
from spath_eval.speed.benchmark import Benchmark, Plan, run, time_switches, union_of
from spath_eval.speed.ceilings import work
from spath_eval.speed.conditions import Rates
from spath_eval.speed.measurement import random_mask
from spath_eval.speed.sources import Subject
from spath_eval.speed.timing import COMPILED, EAGER, Stop, Workload

RATES = Rates(1e9, 1e10)
STOP = Stop(seconds=0, precision=0.02, min_rounds=2)
GATED = (FFN("model.layers.*.mlp"),)
MIXTURE = (FFN("model.layers.*.mlp.experts", "experts", up="gate_up_proj"),)


@pytest.fixture
def bench(tiny_model):
    """A benchmark of a tiny model: `bench(kind="gemma", batches=(2,), **plan)`; `bench.said` is what it announced."""

    def make(kind: str = "gemma", batches: tuple[int, ...] = (2,), ffns: Any = GATED, **plan: Any) -> Benchmark:
        model = tiny_model(kind)
        workloads = tuple(Workload(batch, 6, 3) for batch in batches)
        make.said = []
        return Benchmark(
            "model", model, find_sites(model, ffns), Plan(workloads, STOP, **plan), RATES, make.said.append
        )

    return make


def validated(entries: Any) -> list[dict[str, Any]]:
    """The entries, as JSON has them, checked against the schema in a record that is otherwise complete."""
    entries = json.loads(json.dumps(list(entries), allow_nan=False))
    record = json.loads((Path(__file__).parents[1] / "data" / "record.json").read_text(encoding="utf-8"))
    record["cases"][0]["speed"] = entries
    records.validate(record)
    return entries


def test_prefill_and_decode_of_each_workload_are_measured_with_their_conditions(bench):
    one = bench(batches=(1, 2))
    pathway = one.pathway(random_mask(one.sites, 0.5, 0))
    entries = validated(one.whole(pathway))
    assert [entry["decode"]["batch"] for entry in entries] == [1, 2]
    for entry in entries:
        assert (entry["subject"], entry["execution"], entry["sparsity"]) == ("model", EAGER, 0.5)
        assert (entry["device"], entry["dtype"]) == ("cpu", "float32")
        assert entry["parity"]["ok"]
        ffn = sum(site.weight_bytes(None) for site in one.sites)
        assert entry["weight_bytes"]["dense"] - entry["weight_bytes"]["sparse"] == ffn / 2
        assert entry["peak_memory"]["dense"] - entry["peak_memory"]["sparse"] >= ffn / 2
        assert entry["conditions"]["bytes_per_second"] == 1e9
        assert entry["conditions"]["threads"] == torch.get_num_threads()
        workload = Workload(entry["decode"]["batch"], 6, 3)
        dense = work(one.model, one.sites, None, workload)
        assert entry["decode"]["least_seconds"]["dense"] == pytest.approx(dense.decode.bytes.whole / 1e9)
        assert entry["prefill"]["precision"]["requested"] == 0.02
    assert bench.said == [f"model: sparsity 0.500, {batch} x 6 tokens" for batch in (1, 2)]


@pytest.mark.parametrize(("kind", "ffns", "width"), [("gemma", GATED, 64), ("mixtral", MIXTURE, 24)])
def test_ffns_alone_are_called_with_what_they_meet_in_the_model(bench, monkeypatch, kind, ffns, width):
    one = bench(kind, (1, 2), ffns)
    pathway = one.pathway(random_mask(one.sites, 0.5, 0))
    calls: list[tuple[int, tuple[int, ...]]] = []
    original = type(one.sites[0].module).forward

    def forward(self: Any, hidden: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        down = self.down_proj if kind == "mixtral" else self.down_proj.weight
        calls.append((down.shape[-1], tuple(hidden.shape)))
        return original(self, hidden, *rest)

    monkeypatch.setattr(type(one.sites[0].module), "forward", forward)
    kept = one.sites[0].kept_width(pathway.mask)
    entries = validated(one.ffns(pathway))
    assert [(entry["ffn"]["batch"], entry["ffn"]["tokens"]) for entry in entries] == [(1, 1), (1, 6), (2, 1), (2, 6)]
    for entry in entries:
        assert entry["subject"] == "FFNs of the model"
        assert entry["ffn"]["ceiling"] == entry["ffn"]["limit"] == pytest.approx(width / kept)
        assert entry["ffn"]["ffn_share"] == 1
    # per size: the inputs are recorded, both arms warm up, and there are two rounds
    for size in range(4):
        own = calls[size * 7 * 3 : (size + 1) * 7 * 3]
        assert [found for found, _ in own[::3]] == [kept, width, kept, width, kept, kept, width]
        assert len({shape for _, shape in own}) == 1


def test_experts_that_are_removed_are_not_called(bench):
    one = bench("mixtral", (4,), MIXTURE)
    chosen = torch.arange(8) < 3
    mask = Mask(keep_all(one.sites).keep, {}, {site.path: chosen for site in one.sites})
    pathway = one.pathway(mask)
    inputs = one._inputs(pathway, 4, 6)
    assert all(int(experts.max()) < 3 for _, experts, _ in inputs.values())
    assert len(list(one.ffns(pathway))) == 2


def test_hidden_states_of_the_first_site_stand_for_all(bench):
    one = bench()
    inputs = one._inputs(one.pathway(random_mask(one.sites, 0.5, 0)), 2, 6)
    assert len(inputs) == 3
    assert len({value.data_ptr() for (value,) in inputs.values()}) == 1


def test_ffns_of_which_nothing_is_left_are_not_timed(bench):
    one = bench()
    assert list(one.ffns(one.pathway(random_mask(one.sites, 1.0, 0)))) == []


def test_a_pathway_that_is_not_applied_is_never_timed(bench, monkeypatch):
    one = bench()
    monkeypatch.setattr(Site, "installed", lambda self, module: nullcontext())
    with pytest.raises(GateError, match="not the compact width"):
        one.pathway(random_mask(one.sites, 0.5, 0))


def test_a_compact_pathway_that_differs_from_the_masked_one_is_never_timed(bench, monkeypatch):
    one = bench()
    whole = one.sites[0].compact

    def wrong(mask: Mask) -> Any:
        compact = whole(mask)
        compact.down_proj.weight.mul_(1.01)
        return compact

    monkeypatch.setattr(one.sites[0], "compact", wrong)
    with pytest.raises(GateError, match="compact differs from masked"):
        one.pathway(random_mask(one.sites, 0.5, 0))


def test_keeping_all_runs_the_dense_ffns_in_both_arms(bench):
    one = bench()
    pathway = one.pathway(random_mask(one.sites, 0.0, 0))
    assert all(pathway.compact_module(site) is site.module for site in one.sites)
    (entry,) = one.whole(pathway)
    assert (entry["prefill"]["ceiling"], entry["decode"]["ceiling"]) == (1, 1)
    assert entry["parity"]["max_logit_difference"] == 0


def test_both_executions_are_measured_where_asked_for(bench, monkeypatch):
    from spath_eval.speed import timing

    for place in (timing, module):
        monkeypatch.setattr(
            place, "compiled", lambda function, device: torch.compile(function, backend="eager", dynamic=False)
        )
    one = bench(compiled=True)
    pathway = one.pathway(random_mask(one.sites, 0.5, 0))
    for entries, count in ((validated(one.whole(pathway)), 1), (validated(one.ffns(pathway)), 2)):
        assert [entry["execution"] for entry in entries] == [EAGER, COMPILED] * count
        for eager, compiled in zip(entries[::2], entries[1::2], strict=True):
            assert "compiler" not in eager
            assert compiled["compiler"] == {"graph_breaks": 0, "skipped_cuda_graphs": 0}
            for phase in {"prefill", "decode", "ffn"} & set(eager):
                assert eager[phase]["dense_seconds"] == compiled[phase]["dense_seconds"]
                assert eager[phase]["sparse_seconds"] != compiled[phase]["sparse_seconds"]
                assert len(eager[phase]["other_dense_seconds"]) == 1


def test_switching_replaces_references_and_leaves_the_model_dense(bench):
    one = bench()
    pathways = {name: one.pathway(random_mask(one.sites, 0.5, seed)) for seed, name in enumerate("abc")}
    weights = {name: parameter.data_ptr() for name, parameter in one.model.named_parameters()}
    installed: list[Any] = []
    site = one.sites[0]
    for name, pathway in pathways.items():
        applied = pathway.applied

        def spy(applied: Any = applied, name: str = name) -> Any:
            installed.append(name)
            return applied()

        pathway.applied = spy  # type: ignore[method-assign]
    assert all(seconds > 0 for seconds in time_switches(list(pathways.values()), 5))
    assert "".join(installed) == "cabcab"
    assert site.installed_module is site.module
    assert weights == {name: parameter.data_ptr() for name, parameter in one.model.named_parameters()}
    (entry,) = validated([one.switching(pathways)])
    ffn = sum(site.weight_bytes(None) for site in one.sites)
    memory = entry["switch"]["memory"]
    assert memory["dense_ffn"] == ffn
    assert memory["pathways"] == dict.fromkeys("abc", ffn / 2)
    assert memory["shared"] + ffn == sum(parameter.nbytes for parameter in one.model.parameters())
    assert entry["switch"]["domains"] == ["a", "b", "c"]
    assert len(entry["switch"]["seconds"]) == module.SWITCHES


def test_mixed_batches_run_in_parts_and_by_the_union(bench, monkeypatch):
    one = bench(batches=(5,))
    masks = {name: random_mask(one.sites, 0.5, seed) for seed, name in enumerate(("math", "code"))}
    pathways = {name: one.pathway(mask) for name, mask in masks.items()}
    rows: list[tuple[int, int]] = []
    original = type(one.sites[0].module).forward

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        rows.append((self.down_proj.in_features, hidden.shape[0]))
        return original(self, hidden)

    union = union_of(list(masks.values()))
    one.pathway(union)
    monkeypatch.setattr(type(one.sites[0].module), "forward", forward)
    parts, united = validated(one.mixed(pathways))
    assert set(rows) == {(64, 5), (32, 3), (32, 2), *((site.kept_width(union), 5) for site in one.sites)}
    assert parts["subject"] == "model: 2 domains in a batch, by sub-batches"
    assert united["subject"] == "model: 2 domains in a batch, by the union"
    assert parts["domains"] == united["domains"] == ["math", "code"]
    assert (parts["sparsity"], united["sparsity"]) == (0.5, pytest.approx(union.achieved))
    dense = work(one.model, one.sites, None, Workload(5, 6, 3))
    by_parts = [
        work(one.model, one.sites, mask, Workload(count, 6, 3))
        for mask, count in zip(masks.values(), (3, 2), strict=True)
    ]
    read = sum(part.decode.bytes.whole for part in by_parts)
    assert parts["decode"]["ceiling"] == pytest.approx(dense.decode.bytes.whole / read)
    assert parts["decode"]["ceiling"] < 1  # all other weights are read twice
    operations = sum(part.prefill.flops.whole for part in by_parts)
    assert parts["prefill"]["ceiling"] == pytest.approx(dense.prefill.flops.whole / operations)
    limit = dense.decode.bytes.whole / work(one.model, one.sites, union, Workload(5, 6, 3)).decode.bytes.whole
    assert united["decode"]["ceiling"] == pytest.approx(limit)
    ffn = sum(site.weight_bytes(None) for site in one.sites)
    assert parts["weight_bytes"]["sparse"] == parts["weight_bytes"]["dense"]  # two halves
    assert united["weight_bytes"]["dense"] - united["weight_bytes"]["sparse"] == pytest.approx(ffn * union.achieved)


def test_a_batch_holds_no_more_domains_than_sequences(bench):
    one = bench(batches=(1, 2))
    pathways = {str(seed): one.pathway(random_mask(one.sites, 0.5, seed)) for seed in range(3)}
    assert [entry["domains"] for entry in one.mixed(pathways)] == [["0", "1"]] * 2
    assert bench.said[0] == "model: a batch of 1 is of one domain, so that none of mixed domains is measured"


def test_the_union_keeps_what_any_mask_keeps(bench):
    one = bench("mixtral", ffns=MIXTURE)
    first, second = (random_mask(one.sites, 0.5, seed) for seed in (0, 1))
    for site in one.sites:
        assert torch.equal(union_of([first, second])[site.path], first[site.path] | second[site.path])
    path = one.sites[0].path
    some = Mask(first.keep, {}, {path: torch.arange(8) < 3})
    more = Mask(second.keep, {}, {path: torch.arange(8) > 5})
    assert union_of([some, more]).experts[path].tolist() == [True] * 3 + [False] * 3 + [True] * 2
    assert union_of([some, second]).experts == {}


def test_a_run_measures_what_each_subject_asks_for(tiny_model, monkeypatch):
    asked: list[torch.dtype] = []
    monkeypatch.setattr(module, "measure_rates", lambda device, dtype: asked.append(dtype) or RATES)
    model = tiny_model()
    sites = find_sites(model, GATED)
    masks = [{"math": random_mask(sites, sparsity, 0)} for sparsity in (0.25, 0.5)]
    two = [{"math": random_mask(sites, 0.5, 0), "code": random_mask(sites, 0.5, 1)}]
    subjects = [
        Subject("layer", model, sites, masks, ffns=False, whole=True),
        Subject("model", model, sites, two, ffns=True, whole=True),
    ]
    plan = Plan((Workload(2, 4, 2),), STOP)
    entries = validated(run(subjects, plan, torch.device("cpu"), torch.float32, lambda line: None))
    assert [(entry["subject"], entry["sparsity"]) for entry in entries[:5]] == [
        ("layer", 0.25),
        ("layer", 0.5),
        ("FFNs of the model", 0.5),
        ("FFNs of the model", 0.5),
        ("model", 0.5),
    ]
    assert [entry["subject"].partition(": ")[2] for entry in entries[5:]] == [
        "switching among 2 pathways",
        "2 domains in a batch, by sub-batches",
        "2 domains in a batch, by the union",
    ]
    assert asked == [torch.float32]
