"""The speedup that removing FFN weights could give at most, from counting alone.

Prefill is counted as limited by arithmetic (floating-point operations of the matrix products), decode as limited by
memory (bytes of weights and KV cache read per step): roofline reasoning, Williams et al. 2009. The ceiling is
(rest + dense FFN) / (rest + sparse FFN), which grows as the rest shrinks. To stay an upper bound, the rest is
therefore the least work that computes the same thing: causal half of the attention square, windows honoured, the
output head for one position per sequence, and nothing for norms, biases, activations, routers and embedding look-ups.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from spath_eval.masks import Mask
    from spath_eval.sites import Site
    from spath_eval.speed.timing import Workload


@dataclass(frozen=True)
class Ceiling:
    """The largest possible ratio of dense to sparse time, per phase; 1 where nothing is removed."""

    prefill: float
    decode: float


def ceiling(model: PreTrainedModel, sites: Iterable[Site], mask: Mask, workload: Workload) -> Ceiling:
    """The speedup that removing from the dense `model` what `mask` removes at `sites` could give at most.

    Routed experts are taken as equally used; in decode as many of them as the batch can reach are read.
    """
    sites = list(sites)
    config = model.config.get_text_config()
    itemsize = model.dtype.itemsize
    projections = _projection_weights(model, sites)
    head = _head_weights(model)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads

    # Per sequence: the batch cancels. Two operations per weight, and two products (scores, values) per attended pair.
    pairs = _attended(config, 1, workload.tokens)
    flops_rest = 2 * (workload.tokens * projections + head) + 4 * heads * head_dim * pairs
    # A tied embedding is read whole once, as the head; of any embedding the look-up reads single rows.
    cached = _attended(config, workload.tokens + 1, workload.tokens + workload.new_tokens) / workload.new_tokens
    bytes_rest = itemsize * (projections + head + workload.batch * 2 * kv_heads * head_dim * cached)

    def flops(kept: Mask | None) -> float:
        used = sum(site.weight_bytes(kept) / itemsize * _experts_used(site, kept, config, 1) for site in sites)
        return flops_rest + 2 * workload.tokens * used

    def bytes_read(kept: Mask | None) -> float:
        return bytes_rest + sum(
            site.weight_bytes(kept) * _experts_used(site, kept, config, workload.batch) for site in sites
        )

    return Ceiling(prefill=flops(None) / flops(mask), decode=bytes_read(None) / bytes_read(mask))


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
