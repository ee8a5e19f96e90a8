"""The stopwatch of the device: events, CUDA graphs and memory, on layers of published families."""

import pytest
import torch

from spath_eval.contracts import FFN, ReferenceShape
from spath_eval.pathways import StaticPathway
from spath_eval.sites import find_sites
from spath_eval.speed.benchmark import Benchmark, Plan
from spath_eval.speed.conditions import available_memory, last_level_cache, load, measure_rates
from spath_eval.speed.measurement import arm_bytes, random_mask
from spath_eval.speed.shapes import Cut, build
from spath_eval.speed.timing import COMPILED, EAGER, CompiledPass, Part, Pass, Stop, Workload, measure, peak_memory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPE = ReferenceShape(
    "small",
    {
        "model_type": "gemma",
        "hidden_size": 512,
        "intermediate_size": 4096,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "num_hidden_layers": 2,
    },
)
WORKLOAD = Workload(batch=2, tokens=64, new_tokens=4)
CUDA = torch.device("cuda")


@pytest.fixture
def model():
    return build(SHAPE, Cut(1), device="cuda", dtype=torch.bfloat16)


@pytest.fixture
def pathway(model):
    sites = find_sites(model, (FFN("model.layers.*.mlp"),))
    return StaticPathway(sites, random_mask(sites, 0.5, 0), "compact")


def test_device_times_and_memory_are_measured_in_both_arms(model, pathway) -> None:
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    times = measure(model, pathway.applied, WORKLOAD, Stop(seconds=0))[EAGER]
    for phase in (times.prefill, times.decode):
        assert len(phase.dense_seconds) == len(phase.sparse_seconds) == 6
        both = phase.dense_seconds + phase.sparse_seconds
        assert 0 < min(both) <= max(both) < 10
    weights = arm_bytes(model, pathway.sites, pathway.mask)
    peaks = peak_memory(model, pathway.applied, WORKLOAD, weights)
    assert weights["dense"] < peaks.dense < 2 * weights["dense"]
    assert weights["sparse"] < peaks.sparse < peaks.dense


def test_cuda_graphs_compute_what_eager_arms_do(model, pathway) -> None:
    torch.compiler.reset()
    prompt = torch.arange(2 * 64, device="cuda").reshape(2, 64) % 256
    for context in (torch.no_grad, pathway.applied):
        eager, graphs = Pass(model, [Part(prompt)], 4), CompiledPass(model, prompt, 4)
        with context():
            eager()
            for _ in range(graphs.warm_ups + 2):  # from the third pass on, graphs are replayed
                graphs.first_logits = None
                graphs()
        assert eager.first_logits is not None
        assert graphs.first_logits is not None
        scale = eager.first_logits.abs().max()
        assert (eager.first_logits - graphs.first_logits).abs().max() < 4e-2 * scale


def test_cuda_graphs_are_timed_in_both_arms_and_none_is_skipped(model, pathway) -> None:
    said: list[str] = []
    plan = Plan((WORKLOAD,), Stop(seconds=0), compiled=True)
    benchmark = Benchmark("small", model, pathway.sites, plan, measure_rates(CUDA, torch.bfloat16, 0.1), said.append)
    proved = benchmark.pathway(pathway.mask)
    for entries in (list(benchmark.whole(proved)), list(benchmark.ffns(proved))):
        assert {entry["execution"] for entry in entries} == {EAGER, COMPILED}
        for entry in entries:
            if entry["execution"] == COMPILED:
                assert entry["compiler"] == {"graph_breaks": 0, "skipped_cuda_graphs": 0}


def test_what_the_device_can_do_is_measured_and_its_state_is_noted() -> None:
    rates = measure_rates(CUDA, torch.bfloat16, 0.1)
    assert rates.bytes_per_second > 1e10
    assert rates.flops_per_second > 1e12
    assert 0 < available_memory(CUDA) <= torch.cuda.get_device_properties(CUDA).total_memory
    assert (last_level_cache(CUDA) or 0) > 0
    assert "load_average" in load(CUDA)
