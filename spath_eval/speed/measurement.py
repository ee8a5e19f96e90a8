"""The speed of a case: its model dense against compact, and one layer of the family's reference shape beside it.

The model says what its user gets; the layer, with random weights at the achieved sparsity, what a model of a published
size would get. Only compact execution is timed: masking does not skip.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from spath_eval.masks import remove_lowest
from spath_eval.pathways import StaticPathway
from spath_eval.speed.ceilings import ceiling
from spath_eval.speed.shapes import one_layer, subject
from spath_eval.speed.timing import Workload, measure, record_entry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spath_eval.contracts import ReferenceShape
    from spath_eval.session import LoadedModel, Session

WORKLOAD = Workload(batch=1, tokens=128, new_tokens=16)


def measure_case(session: Session) -> list[dict[str, Any]]:
    """The record's `speed` entries of the case that is running; none where its pathway is not compact."""
    loaded, pathway = session.loaded, session.pathway
    assert loaded is not None
    if not isinstance(pathway, StaticPathway) or pathway.execution != "compact":
        return []
    seed = session.options.seed
    entries = [_timed("model", loaded.model, pathway, seed)]
    for shape in loaded.target.architecture.reference_shapes[:1]:
        entries.append(_layer(loaded, shape, pathway.mask.achieved, seed))
    return entries


def _timed(name: str, model: PreTrainedModel, pathway: StaticPathway, seed: int) -> dict[str, Any]:
    times = measure(model, pathway.applied, WORKLOAD, seed=seed)
    return record_entry(name, times, ceiling(model, pathway.sites, pathway.mask, WORKLOAD), WORKLOAD)


def _layer(loaded: LoadedModel, shape: ReferenceShape, sparsity: float, seed: int) -> dict[str, Any]:
    """Timed once per shape and sparsity, since it depends on nothing else."""
    key = (shape.name, round(sparsity, 3))
    if key not in loaded.layer_speed:
        model = one_layer(shape, device=loaded.model.device, dtype=loaded.model.dtype, seed=seed)
        sites = loaded.target.architecture.sites(model)
        generator = torch.Generator().manual_seed(seed)
        scores = {site.path: torch.rand(site.shape, generator=generator) for site in sites}
        pathway = StaticPathway(sites, remove_lowest(scores, sparsity), "compact")
        loaded.layer_speed[key] = _timed(subject(shape), model, pathway, seed)
    return loaded.layer_speed[key]
