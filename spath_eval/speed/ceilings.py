"""The speedup that removing FFN weights could give at most, from counting alone.

Prefill is counted as limited by arithmetic (floating-point operations of the matrix products), decode as limited by
memory (bytes of weights and KV cache read per step): roofline reasoning, Williams et al. 2009. The ceiling is
(rest + dense FFN) / (rest + sparse FFN), which grows as the rest shrinks. To stay an upper bound, the rest is
therefore the least work that computes the same thing: causal half of the attention square, windows honoured, the
output head for one position per sequence, and nothing for norms, biases, activations, routers and embedding look-ups.

A large batch's decode may be limited by arithmetic, and a short prompt's prefill by memory. Whatever limits the FFN, no
ratio is above the larger of the two: the rest takes at least as long as either count of it says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spath_eval.masks import Mask
    from spath_eval.sites import Site
    from spath_eval.speed.conditions import Rates
    from spath_eval.speed.timing import Workload


@dataclass(frozen=True)
class Count:
    """Floating-point operations, or bytes read."""

    ffn: float
    """In the sites."""
    whole: float

    def __add__(self, other: Count) -> Count:
        return Count(self.ffn + other.ffn, self.whole + other.whole)


@dataclass(frozen=True)
class Work:
    """The least work of a phase."""

    flops: Count
    """Floating-point operations."""
    bytes: Count
    """Of weights and KV cache that are read."""

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Phases:
    """The least work of a workload: its prefill, and the mean of its decode steps."""

    prefill: Work
    decode: Work

    def __add__(self, other: Phases) -> Phases:
        return Phases(self.prefill + other.prefill, self.decode + other.decode)


@dataclass(frozen=True)
class Bound:
    """What counting says of one phase of a dense and a sparse arm."""

    ceiling: float
    """The largest possible ratio of dense to sparse time, if what is counted limits both."""
    limit: float
    """The largest possible ratio, whatever limits them."""
    ffn_share: float
    """Share of the dense arm's work that lies in the sites."""
    least_seconds: tuple[float, float] | None
    """What dense and sparse take at least, at the rates measured on this machine; none where they were not."""

    @classmethod
    def of(cls, dense: Work, sparse: Work, counted: Literal["flops", "bytes"], rates: Rates | None = None) -> Bound:
        """The bound of two arms, of whose work either the one or the other is counted."""
        ceilings = {
            "flops": dense.flops.whole / sparse.flops.whole,
            "bytes": dense.bytes.whole / sparse.bytes.whole,
        }
        least = None if rates is None else (_least_seconds(dense, rates), _least_seconds(sparse, rates))
        count = dense.flops if counted == "flops" else dense.bytes
        return cls(ceilings[counted], max(ceilings.values()), count.ffn / count.whole, least)


def work(model: PreTrainedModel, sites: Iterable[Site], mask: Mask | None, workload: Workload) -> Phases:
    """What `workload` takes on the dense `model`, or without what `mask` removes at `sites`.

    Routed experts are taken as equally used; as many of them as the tokens of a forward can reach are read.
    """
    sites = list(sites)
    config = model.config.get_text_config()
    itemsize = model.dtype.itemsize
    projections = _projection_weights(model, sites)
    head = _head_weights(model)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads

    def phase(tokens: int, pairs: float, cached: float) -> Work:
        """Per sequence: tokens of a forward, pairs of positions attended to, cached positions read."""
        # Two operations per weight, and two products (scores, values) per attended pair.
        flops = workload.batch * (2 * (tokens * projections + head) + 4 * heads * head_dim * pairs)
        # A tied embedding is read whole once, as the head; of any embedding the look-up reads single rows.
        read = itemsize * (projections + head + workload.batch * 2 * kv_heads * head_dim * cached)
        own = site_work(model, sites, mask, workload.batch * tokens)
        return Work(Count(own.flops.ffn, flops + own.flops.ffn), Count(own.bytes.ffn, read + own.bytes.ffn))

    attended = _attended(config, workload.tokens + 1, workload.tokens + workload.new_tokens) / workload.new_tokens
    prefill = phase(workload.tokens, _attended(config, 1, workload.tokens), 0)
    return Phases(prefill, phase(1, attended, attended))


def site_work(model: PreTrainedModel, sites: Iterable[Site], mask: Mask | None, tokens: int) -> Work:
    """What the sites alone take for `tokens` tokens at once."""
    sites = list(sites)
    config = model.config.get_text_config()
    used = sum(site.weight_bytes(mask) * _experts_used(site, mask, config, 1) for site in sites)
    read = sum(site.weight_bytes(mask) * _experts_used(site, mask, config, tokens) for site in sites)
    flops = 2 * tokens * used / model.dtype.itemsize
    return Work(Count(flops, flops), Count(read, read))


def _least_seconds(work: Work, rates: Rates) -> float:
    return max(work.flops.whole / rates.flops_per_second, work.bytes.whole / rates.bytes_per_second)


def _projection_weights(model: PreTrainedModel, sites: Sequence[Site]) -> int:
    """Number of weights that multiply every token outside the sites: the decoder's linear layers."""
    decoder = set(model.get_decoder().modules())
    inside = tuple(f"{site.path}." for site in sites)
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module in decoder and not name.startswith(inside)
    )


def _head_weights(model: PreTrainedModel) -> int:
    head: Any = model.get_output_embeddings()
    return 0 if head is None else head.weight.numel()


def _attended(config: Any, first: int, last: int) -> int:
    """Positions attended to, summed over layers and over the queries at positions `first` to `last`, counted from 1."""
    return sum(int(min(position, window)) for window in _windows(config) for position in range(first, last + 1))


def _windows(config: Any) -> list[float]:
    """How far back each layer looks, in tokens; 0 for kinds of attention that keep no such cache, or unknown ones."""
    sliding = getattr(config, "sliding_window", None) or math.inf
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [sliding] * config.num_hidden_layers
    return [{"full_attention": math.inf, "sliding_attention": sliding}.get(kind, 0) for kind in kinds]


def _experts_used(site: Site, mask: Mask | None, config: Any, tokens: int) -> float:
    """Share of a site's (kept) experts that `tokens` tokens use at most; 1 where there is no routing."""
    experts = site.kept_experts(mask)
    if experts is None:
        return 1.0
    chosen = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k_experts", None) or experts
    return min(1.0, tokens * chosen / experts)
