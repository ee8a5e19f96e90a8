"""Pathways: a model with a mask applied, and the gates that prove it was.

*Masked* execution zeroes the removed neurons' activations and is the reference; *compact* execution has their weights
sliced out. The gates exist because published results of this field came from masks that were never applied: a run fails
unless, in every phase and at every site, what entered the down projection was seen to be zero where it had to be, or of
the compact width; and a speed is measured only where compact was proved equal to masked, site by site on identical
inputs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spath_eval.contracts import Context, Strategy
from spath_eval.masks import Mask, drop_all, keep_all
from spath_eval.models import output_head
from spath_eval.profiling import forward_backbone
from spath_eval.sites import Observation, Site
from spath_eval.texts import Batch

Execution = Literal["compact", "masked"]

PARITY_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest difference of a site's compact output from its masked one, relative to the largest output."""


class GateError(Exception):
    """A gate found that the run does not measure what it claims to: the case fails."""


class Pathway:
    """A model whose FFNs run sparse within `applied()`, and dense outside."""

    execution: Execution = "masked"
    sparse_phases: tuple[str, ...] = ("scoring", "prefill", "decode")
    """The phases in which it removes neurons."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.sites = sites

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context, the model runs sparse."""
        raise NotImplementedError
        yield

    def removed_experts(self, site: Site) -> Tensor | None:
        """The experts of `site` to which no token may be routed, boolean `[experts]`; none where there are none."""
        return None

    def expected(self, site: Site, seen: Observation) -> Tensor | int | None:
        """What must be true of what was `seen` to enter down at `site`: the neurons that may be non-zero (boolean,
        broadcast over rows), or its width; none where nothing is removed."""
        raise NotImplementedError


class StaticPathway(Pathway):
    """One mask for all tokens."""

    def __init__(self, sites: Sequence[Site], mask: Mask, execution: Execution) -> None:
        super().__init__(sites)
        mask.check(sites)
        self.mask = mask
        self.execution = execution
        self._keep = {site.path: mask[site.path].to(site.device) for site in sites}
        self._modules = {site.path: site.compact(mask) for site in sites} if execution == "compact" else {}

    def compact_module(self, site: Site) -> nn.Module:
        """What stands in for the dense FFN in compact execution."""
        return self._modules[site.path]

    @contextmanager
    def applied(self) -> Iterator[None]:
        with ExitStack() as stack:
            for site in self.sites:
                stack.enter_context(site.routed(self.mask))
                compact = self._modules.get(site.path)
                stack.enter_context(site.masked(self.mask) if compact is None else site.installed(compact))
            yield

    def removed_experts(self, site: Site) -> Tensor | None:
        chosen = self.mask.experts.get(site.path)
        return None if chosen is None else ~chosen.to(site.device)

    def expected(self, site: Site, seen: Observation) -> Tensor | int | None:
        if self.execution == "compact":
            return site.kept_width(self.mask)
        keep = self._keep[site.path]
        return keep if seen.experts is None else keep[seen.experts]


class TokenPathway(Pathway):
    """A mask for each token, by a strategy of kind `token`."""

    def __init__(self, sites: Sequence[Site], strategy: Strategy, context: Context) -> None:
        super().__init__(sites)
        self.strategy = strategy
        self.context = replace(context, prepared=strategy.prepare(context))
        self._decided: dict[str, Tensor] = {}
        self.kept, self.total = 0, 0

    @contextmanager
    def applied(self) -> Iterator[None]:
        with ExitStack() as stack:
            for site in self.sites:
                stack.enter_context(site.filtered(self._keep_at(site)))
            yield

    def expected(self, site: Site, seen: Observation) -> Tensor | int | None:
        unasked = torch.zeros(site.width, dtype=torch.bool, device=site.device)
        return self._decided.pop(site.path, unasked)

    @property
    def achieved(self) -> float:
        """Share of activations that were removed so far."""
        return 1 - self.kept / self.total if self.total else 0.0

    def _keep_at(self, site: Site) -> Callable[[Tensor | None, Tensor], Tensor]:
        def keep(gate: Tensor | None, product: Tensor) -> Tensor:
            kept = self.strategy.keep(self.context, site, gate, product)
            self._decided[site.path] = kept
            self.kept += int(kept.expand(product.shape).sum())
            self.total += product.numel()
            return kept

        return keep


class PromptPathway(Pathway):
    """A mask for each prompt, by a strategy of kind `prompt`: the prompt runs dense, what follows it with the mask.

    `begin()` starts a prompt; the forward after it is the prompt, all later ones what follows it. One row at a time.
    """

    sparse_phases = ("scoring", "decode")

    def __init__(self, sites: Sequence[Site], strategy: Strategy, context: Context) -> None:
        super().__init__(sites)
        self.strategy, self.context = strategy, context
        self._prompt: dict[str, Tensor] = {}
        self._skip = 0
        self.mask: Mask | None = None
        self.removed: list[float] = []

    def begin(self, skip: int = 0) -> None:
        """The next forward is a prompt, whose first `skip` tokens (BOS) the strategy is not shown."""
        self._prompt, self.mask, self._skip = {}, None, skip

    @contextmanager
    def applied(self) -> Iterator[None]:
        with ExitStack() as stack:
            for site in self.sites:
                stack.enter_context(site.filtered(self._keep_at(site)))
            yield

    def expected(self, site: Site, seen: Observation) -> Tensor | int | None:
        return None if self.mask is None else self.mask[site.path].to(site.device)

    @property
    def achieved(self) -> float:
        """Mean over prompts of the share of neurons removed after them."""
        return sum(self.removed) / len(self.removed) if self.removed else 0.0

    def _keep_at(self, site: Site) -> Callable[[Tensor | None, Tensor], Tensor | None]:
        def keep(gate: Tensor | None, product: Tensor) -> Tensor | None:
            if site.path not in self._prompt:
                self._prompt[site.path] = product[self._skip :]
                return None
            if self.mask is None:
                self.mask = self.strategy.select_prompt(self.context, self._prompt)
                self.mask.check(self.sites)
                self.removed.append(self.mask.achieved)
            return self.mask[site.path].to(product.device)

        return keep


class Exercise:
    """Sees whether a pathway is applied: every forward of the model, at every site, in every phase.

    It looks at what enters the down projections by hooks of its own and trusts nothing that the pathway says of itself.
    """

    def __init__(self, model: PreTrainedModel, pathway: Pathway) -> None:
        self.model, self.pathway = model, pathway
        self.scoring = False
        """Set by whoever scores, to tell scoring from generation."""
        self.forwards: Counter[str] = Counter()
        self.seen: Counter[tuple[str, str]] = Counter()
        self._nonzero: dict[tuple[str, str], Tensor] = {}
        self._wrong_width: dict[tuple[str, str], int] = {}
        self._misrouted: dict[tuple[str, str], Tensor] = {}
        self._phase = "scoring"
        self._sparse: set[str] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within the context (entered after the pathway's), watch."""
        with ExitStack() as stack:
            handle = self.model.get_decoder().register_forward_pre_hook(self._on_forward, with_kwargs=True)
            stack.callback(handle.remove)
            for site in self.pathway.sites:
                stack.enter_context(site.entering_down(partial(self._on_down, site)))
            yield

    def check(self, phases: Iterable[str]) -> dict[str, Any]:
        """The gate's part of the record. Raises `GateError` where the pathway was not applied in one of `phases`."""
        for (path, phase), width in self._wrong_width.items():
            raise GateError(
                f"mask not applied at {path} in {phase}: {width} neurons entered down, not the compact width"
            )
        for (path, phase), nonzero in self._nonzero.items():
            if nonzero.item():
                raise GateError(f"mask not applied at {path} in {phase}: removed neurons were not zero")
        for (path, phase), misrouted in self._misrouted.items():
            if misrouted.item():
                raise GateError(f"mask not applied at {path} in {phase}: tokens were routed to removed experts")
        for phase, forwards in self.forwards.items():
            for site in self.pathway.sites:
                if (seen := self.seen[site.path, phase]) < forwards:
                    raise GateError(
                        f"mask not applied at {site.path} in {phase}: seen in {seen} of {forwards} forwards"
                    )
        for phase in phases:
            if phase in self.pathway.sparse_phases and phase not in self._sparse:
                raise GateError(f"the model was never run with the mask in {phase}")
        return {"ok": True, "phases": dict(self.forwards), "sites": len(self.pathway.sites)}

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("cache")
        prefilled = cache is not None and cache.get_seq_length() > 0
        self._phase = "scoring" if self.scoring else "decode" if prefilled else "prefill"
        self.forwards[self._phase] += 1

    def _on_down(self, site: Site, seen: Observation) -> None:
        values = seen.values
        key = (site.path, self._phase)
        self.seen[key] += 1
        expected = self.pathway.expected(site, seen)
        if expected is not None:
            self._sparse.add(self._phase)
        removed = self.pathway.removed_experts(site)
        if removed is not None and seen.experts is not None:
            misrouted = removed[seen.experts].any()
            self._misrouted[key] = self._misrouted[key] | misrouted if key in self._misrouted else misrouted
        if isinstance(expected, int):
            if values.shape[-1] != expected:
                self._wrong_width[key] = values.shape[-1]
        elif expected is not None:
            nonzero = values.masked_fill(expected, 0).any()
            self._nonzero[key] = self._nonzero[key] | nonzero if key in self._nonzero else nonzero


@dataclass(frozen=True)
class Neutrality:
    """What keeping everything and removing everything does to the logits."""

    keep_all_difference: float
    drop_all_difference: float


def check_neutrality(model: PreTrainedModel, sites: Sequence[Site], probe: Batch, execution: Execution) -> Neutrality:
    """Keep-all must change the logits by exactly 0 and drop-all must change them. Raises `GateError` otherwise."""
    dense = _logits(model, probe)
    differences = []
    for mask in (keep_all(sites), drop_all(sites)):
        with StaticPathway(sites, mask, execution).applied():
            differences.append(float((_logits(model, probe) - dense).abs().max()))
    result = Neutrality(*differences)
    if result.keep_all_difference != 0:
        raise GateError(
            f"keeping every neuron changes the logits by {result.keep_all_difference:.3g}, not by exactly 0"
        )
    if not result.drop_all_difference > 0:
        raise GateError("removing every neuron does not change the logits: the mask does not reach the model")
    return result


def check_parity(model: PreTrainedModel, pathway: StaticPathway, probe: Batch) -> dict[str, Any]:
    """Compact must equal masked at every site on identical inputs. Raises `GateError` otherwise.

    The inputs are those that each site meets while the model runs masked. Compact modules meet them when nothing is
    masked any more, so that one which runs the dense FFN is found out.
    """
    calls: dict[str, tuple[list[Tensor], Tensor]] = {}
    differences: dict[str, float] = {}
    masked = StaticPathway(pathway.sites, pathway.mask, "masked")

    def remember(path: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls[path] = [value.clone() for value in inputs], output.clone()

    with ExitStack() as stack:
        stack.enter_context(masked.applied())
        for site in pathway.sites:
            handle = site.module.register_forward_hook(partial(remember, site.path))
            stack.callback(handle.remove)
        reference = _logits(model, probe)
    for site in pathway.sites:
        if site.path in calls:
            inputs, output = calls.pop(site.path)
            with torch.inference_mode():
                difference = float((pathway.compact_module(site)(*inputs) - output).abs().max())
            scale = float(output.abs().max())
            differences[site.path] = difference / scale if scale else difference
    with pathway.applied():
        logits = _logits(model, probe)
    tolerance = PARITY_TOLERANCE[model.dtype]
    for site in pathway.sites:
        difference = differences.get(site.path, math.nan)
        if not difference <= tolerance:  # so that NaN fails
            raise GateError(
                f"compact differs from masked at {site.path} by {difference:.2g} of the largest output "
                f"(tolerance {tolerance:.0e})"
            )
    return {
        "max_relative_difference": max(differences.values()),
        "max_logit_difference": float((logits - reference).abs().max()),
        "tolerance": tolerance,
        "ok": True,
    }


def _logits(model: PreTrainedModel, probe: Batch) -> Tensor:
    with torch.inference_mode():
        return output_head(model, forward_backbone(model, probe))
