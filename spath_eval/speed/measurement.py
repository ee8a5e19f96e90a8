"""The speed of a case: its model dense against compact, and one layer of the family's reference shape beside it.

The model says what its user gets; the layer, with random weights at the achieved sparsity, what a model of a published
size would get. Masking does not skip: what is timed is compact execution, and of a strategy that chooses token by token
the kernels that skip, where these run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from spath_eval.contracts import UsageError
from spath_eval.masks import remove_lowest
from spath_eval.models import weight_bytes
from spath_eval.pathways import StaticPathway, TokenPathway
from spath_eval.speed.ceilings import Bound, Count, Work, work
from spath_eval.speed.conditions import last_level_cache
from spath_eval.speed.entries import speed_entry
from spath_eval.speed.shapes import Cut, build, routed_experts, subject
from spath_eval.speed.timing import EAGER, Part, Pass, Stop, Workload, measure, peak_memory, random_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from spath_eval.contracts import ReferenceShape
    from spath_eval.masks import Mask
    from spath_eval.session import LoadedModel, Session
    from spath_eval.sites import Site

WORKLOAD = Workload(batch=1, tokens=128, new_tokens=16)


def measure_case(session: Session) -> list[dict[str, Any]]:
    """The record's `speed` entries of the case that is running; none where nothing skips what its pathway removes."""
    loaded, pathway = session.loaded, session.pathway
    assert loaded is not None
    seed = session.options.seed
    if isinstance(pathway, TokenPathway):
        return _by_kernels(loaded.model, pathway, seed)
    if not isinstance(pathway, StaticPathway) or pathway.execution != "compact":
        return []
    entries = [_timed("model", loaded.model, pathway, seed)]
    for shape in loaded.target.architecture.reference_shapes[:1]:
        entries.append(_layer(loaded, shape, pathway.mask.achieved, seed))
    return entries


def arm_bytes(model: PreTrainedModel, sites: Sequence[Site], mask: Mask) -> dict[str, int]:
    """Bytes of all weights of the dense and of the sparse arm, were each alone in memory."""
    dense = weight_bytes(model)
    return {"dense": dense, "sparse": dense - sum(site.weight_bytes(None) - site.weight_bytes(mask) for site in sites)}


def exceeds_cache(count: int, device: torch.device) -> bool:
    """Whether `count` bytes are more than the last-level cache holds; false where that is unknown."""
    cache = last_level_cache(device)
    return cache is not None and count > cache


def random_mask(sites: Sequence[Site], sparsity: float, seed: int) -> Mask:
    """A mask that removes the `sparsity` share of each site's neurons, whichever these are."""
    generator = torch.Generator().manual_seed(seed)
    return remove_lowest({site.path: torch.rand(site.shape, generator=generator) for site in sites}, sparsity)


def _timed(name: str, model: PreTrainedModel, pathway: StaticPathway, seed: int) -> dict[str, Any]:
    times = measure(model, pathway.applied, WORKLOAD, Stop(), seed=seed)[EAGER]
    weights = arm_bytes(model, pathway.sites, pathway.mask)
    dense, sparse = (work(model, pathway.sites, mask, WORKLOAD) for mask in (None, pathway.mask))
    bounds = Bound.of(dense.prefill, sparse.prefill, "flops"), Bound.of(dense.decode, sparse.decode, "bytes")
    too_large = exceeds_cache(weights["sparse"], model.device)
    entry = speed_entry(name, times, bounds, WORKLOAD, exceeds_cache=too_large) | {"weight_bytes": weights}
    if model.device.type == "cuda":
        peaks = peak_memory(model, pathway.applied, WORKLOAD, weights)
        return entry | {"peak_memory": {"dense": peaks.dense, "sparse": peaks.sparse}}
    return entry | {"peak_memory": None, "peak_memory_reason": "on a CPU, only spath-eval speed counts it"}


def _by_kernels(model: PreTrainedModel, pathway: TokenPathway, seed: int) -> list[dict[str, Any]]:
    """The model with the kernels that skip token by token; nothing where there are none for it.

    The ceiling of decoding counts the weights that are skipped on average in the tokens that are timed. A prompt is of
    more tokens than the kernels are for: it is computed whole, and has nothing to gain.
    """
    try:
        from spath_eval.speed.kernels import KernelPathway

        skipping = KernelPathway(pathway)
    except (ImportError, UsageError):
        return []
    kept, total = pathway.kept, pathway.total
    with pathway.applied():
        Pass(model, [Part(random_tokens(model, WORKLOAD.batch, WORKLOAD.tokens, seed))], WORKLOAD.new_tokens)()
    skipped = skipping.skippable_bytes * (1 - (pathway.kept - kept) / (pathway.total - total))
    dense = work(model, pathway.sites, None, WORKLOAD)
    decode = _without(dense.decode, skipped, model)
    bounds = Bound.of(dense.prefill, dense.prefill, "flops"), Bound.of(dense.decode, decode, "bytes")
    times = measure(model, skipping.applied, WORKLOAD, Stop(), seed=seed)[EAGER]
    weights = weight_bytes(model)
    too_large = exceeds_cache(weights, model.device)
    entry = speed_entry("model", times, bounds, WORKLOAD, exceeds_cache=too_large)
    return [entry | {"weight_bytes": {"dense": weights, "sparse": weights}}]


def _without(dense: Work, skipped: float, model: PreTrainedModel) -> Work:
    """The work of a token that reads and multiplies by `skipped` bytes of weights less."""
    flops = 2 * skipped / model.dtype.itemsize
    return Work(
        Count(dense.flops.ffn - flops, dense.flops.whole - flops),
        Count(dense.bytes.ffn - skipped, dense.bytes.whole - skipped),
    )


def _layer(loaded: LoadedModel, shape: ReferenceShape, sparsity: float, seed: int) -> dict[str, Any]:
    """Timed once per shape and sparsity, since it depends on nothing else. Of a mixture's experts there is one."""
    key = (shape.name, round(sparsity, 3))
    if key not in loaded.layer_speed:
        cut = Cut(layers=1, experts=routed_experts(shape) and 1)
        model = build(shape, cut, device=loaded.model.device, dtype=loaded.model.dtype, seed=seed)
        sites = loaded.target.architecture.sites(model)
        pathway = StaticPathway(sites, random_mask(sites, sparsity, seed), "compact")
        loaded.layer_speed[key] = _timed(subject(shape, cut), model, pathway, seed)
    return loaded.layer_speed[key]
