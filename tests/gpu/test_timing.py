"""The stopwatch of the device: events and memory, on a reference layer."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from spath_eval.contracts import FFN, ReferenceShape
from spath_eval.masks import Mask
from spath_eval.sites import find_sites
from spath_eval.speed.ceilings import ceiling
from spath_eval.speed.shapes import one_layer
from spath_eval.speed.timing import Workload, measure, record_entry

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_device_times_and_memory_are_measured_in_both_arms() -> None:
    shape = ReferenceShape(
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
    model = one_layer(shape, device="cuda", dtype=torch.bfloat16)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    (site,) = sites = find_sites(model, (FFN("model.layers.*.mlp"),))
    mask = Mask({site.path: torch.arange(site.width) < site.width // 2})
    module: nn.Module = site.compact(mask)

    @contextmanager
    def sparse() -> Iterator[None]:
        with site.installed(module):
            yield

    workload = Workload(batch=2, tokens=64, new_tokens=4)
    times = measure(model, sparse, workload, seconds=0, min_rounds=6)
    for phase in (times.prefill, times.decode):
        assert len(phase.dense_seconds) == len(phase.sparse_seconds) == 6
        both = phase.dense_seconds + phase.sparse_seconds
        assert 0 < min(both) <= max(both) < 10
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert times.peak_memory is not None
    assert min(times.peak_memory.dense, times.peak_memory.sparse) > weights
    entry = record_entry("layer", times, ceiling(model, sites, mask, workload), workload)
    assert entry["peak_memory"] == {"dense": times.peak_memory.dense, "sparse": times.peak_memory.sparse}
    assert "peak_memory_reason" not in entry
