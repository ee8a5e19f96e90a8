"""What a benchmark of speed is given: models of published shapes, or a loaded one, with the masks to measure."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spath_eval.collection import Case
from spath_eval.contracts import Architecture, ReferenceShape, UsageError
from spath_eval.masks import Mask, keep_all
from spath_eval.session import Options, Session
from spath_eval.speed.measurement import random_mask
from spath_eval.speed.shapes import Cut, build, check_fits, subject

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from spath_eval.registry import Registry
    from spath_eval.session import LoadedModel
    from spath_eval.sites import Site
    from spath_eval.speed.timing import Workload

Masks = Sequence[Mapping[str, Mask]]
"""For each sparsity, the mask of each domain."""
SUBJECTS = ("ffn", "layer", "model")
"""What can be measured: the FFNs alone, one decoder layer, and all of what was named."""


@dataclass(frozen=True)
class Subject:
    """A model in memory, and what of it is measured."""

    name: str
    model: PreTrainedModel
    sites: Sequence[Site]
    masks: Masks
    ffns: bool
    """Whether its FFNs are measured alone."""
    whole: bool
    """Whether its prefill and decode are measured."""


def of_shape(
    family: Architecture,
    shape: ReferenceShape,
    cut: Cut,
    wanted: Sequence[str],
    sparsities: Sequence[float],
    domains: Sequence[str],
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    largest: Workload,
) -> Iterator[Subject]:
    """The subjects of a shape, built one after the other; masks are random, those of several domains independent.

    Raises `UsageError`, before anything is built, where one does not fit into memory with its pathways and `largest`.
    """
    one_layer = Cut(1, cut.experts)
    builds = []
    if "layer" in wanted and not (cut.layers == 1 and "model" in wanted):
        builds.append((one_layer, False, True, domains[:1]))
    if "ffn" in wanted or "model" in wanted:
        builds.append((cut, "ffn" in wanted, "model" in wanted, domains))
    for one, _, _, names in reversed(builds):  # what was asked for before what is measured beside it
        held = max(_kept(sparsity, len(names)) for sparsity in sparsities)
        check_fits(family, shape, one, largest, kept=held, device=device, dtype=dtype)
    for one, ffns, whole, names in builds:
        model = build(shape, one, device=device, dtype=dtype, seed=seed)
        sites = family.sites(model)
        masks = [
            {name: random_mask(sites, sparsity, seed + number) for number, name in enumerate(names)}
            for sparsity in sparsities
        ]
        yield Subject(subject(shape, one), model, sites, masks, ffns, whole)
        del model, sites, masks


def _kept(sparsity: float, domains: int) -> float:
    """Share of all FFN weights that compact pathways hold at once: the domains', and of several ones their union."""
    if sparsity == 0:  # the dense FFNs themselves
        return 0.0
    return domains * (1 - sparsity) + (1 - sparsity**domains if domains > 1 else 0.0)


def of_model(
    loaded: LoadedModel, masks: Masks, wanted: Sequence[str], *, seed: int, largest: Workload
) -> Iterator[Subject]:
    """The subjects of a loaded model. Its layer has random weights and random masks of the same sparsity.

    Raises `UsageError` where a layer is asked for and cannot be built.
    """
    model, family = loaded.model, loaded.target.architecture
    if "layer" in wanted:
        if model.config.get_text_config() is not model.config:
            raise UsageError(
                f"{loaded.target.name}: its layers are parts of a part, of which none can be built alone: "
                "use --subject ffn,model"
            )
        shape = ReferenceShape(loaded.target.name, model.config.to_dict())
        sparsities = [next(iter(by_domain.values())).achieved for by_domain in masks]
        where: dict[str, Any] = {"device": model.device, "dtype": model.dtype}
        yield from of_shape(
            family, shape, Cut(1), ("layer",), sparsities, ("random",), seed=seed, largest=largest, **where
        )
    if "ffn" in wanted or "model" in wanted:
        yield Subject("model", model, loaded.sites, masks, ffns="ffn" in wanted, whole="model" in wanted)


def select(session: Session, *, self_test: bool) -> tuple[LoadedModel, Masks]:
    """The session's model, loaded, and its masks: freshly selected, read from a file, or for a self-test whole.

    Without domains in the options, it is the mask of the first one. Raises `UsageError` where there is more than one
    model or strategy, and where the strategy has no mask that weights could be sliced by.
    """
    options = session.options
    if len(session.targets) != 1 or len(options.strategies) != 1:
        raise UsageError("speed is measured of one --model with one --strategy")
    strategy = session.registry.parse_strategy(options.strategies[0])
    if strategy.kind != "static" and not (self_test or options.mask):
        raise UsageError(
            f"strategy {strategy.name!r} is of kind {strategy.kind}: it has no compact execution, so that its speed "
            "is not measured"
        )
    loaded = session.load(session.targets[0])
    if self_test:
        return loaded, [{"all": keep_all(loaded.sites)}]
    if options.mask:
        mask = Mask.load(options.mask)
        mask.check(loaded.sites)
        return loaded, [{"mask": mask}]
    domains = session.domains if options.domains else session.domains[:1]
    name = loaded.target.name
    cases = [
        [Case(name, domain, strategy, sparsity, "compact") for domain in domains] for sparsity in options.sparsities
    ]
    return loaded, [{case.domain.name: loaded.select(case, loaded.context(case)) for case in some} for some in cases]


def recorded(
    registry: Registry, record: Mapping[str, Any], case_id: str, *, device: str, dtype: str
) -> tuple[LoadedModel, Masks]:
    """The model and the mask of a record's case, selected anew.

    Raises `UsageError` where the record has no such case, and where another mask is selected than the record's.
    """
    cases = {case["id"]: case for case in record.get("cases", [])}
    if case_id not in cases:
        raise UsageError(f"the record has no case {case_id!r}: there are {', '.join(cases) or 'none'}")
    digest = (cases[case_id].get("mask") or {}).get("digest")
    if digest is None:
        raise UsageError(f"{case_id} has no mask: {cases[case_id].get('mask_reason', 'it did not get so far')}")
    resolved = record["command"]["resolved"]
    session = Session(_options(resolved, device, dtype), registry)
    case = next((case for case in session.cases if case.id == case_id), None)
    if case is None:
        raise UsageError(f"{case_id} cannot be made again from the record's options")
    loaded = session.load(next(target for target in session.targets if target.name == case.model))
    mask = loaded.select(case, loaded.context(case))
    if mask.digest != digest:
        raise UsageError(
            f"{case_id}: another mask was selected than the record's, as model, text, dtype or device are others now"
        )
    return loaded, [{case.domain.name: mask}]


RECORDED = (
    "arch sites revision strategies sparsities expert_sparsity mask execution cross seed batch_size profile_text "
    "profile_tokens models domains plugin"
).split()
"""The options that decide which mask is selected."""


def _options(resolved: Mapping[str, Any], device: str, dtype: str) -> Options:
    """Of a record's options those that decide on masks, in the types that they had."""
    known = {field.name for field in dataclasses.fields(Options)}
    values = {name: resolved[name] for name in RECORDED if name in resolved and name in known}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if values.get("mask"):
        values["mask"] = Path(values["mask"])
    texts = values.get("profile_text") or {}
    values["profile_text"] = {name: text if text.startswith("hub:") else Path(text) for name, text in texts.items()}
    return Options(**values, device=device, dtype=dtype)
