"""Oracle: each token keeps its most active neurons, as if they were known beforehand.

Of every token the share `1 - sparsity` of neurons with the largest |activation| stays: of all choices of that many, the
one after which what enters down is nearest to what entered it before. Gate and up are computed whole to find them, so
that it is no way to be fast, but the bound for those who predict a token's active neurons (Liu et al., "Deja Vu:
Contextual Sparsity for Efficient LLMs at Inference Time", 2023). It is a bound at an equal number for each token:
a threshold, as of `teal`, keeps more of some and fewer of others, and can do better.
"""

from dataclasses import dataclass
from typing import ClassVar

from spath_eval import Strategy, hookimpl


@dataclass(frozen=True)
class Oracle(Strategy):
    """Each token keeps its most active neurons, the same number at each site: an upper bound, without any speed."""

    name: ClassVar[str] = "oracle"
    kind: ClassVar[str] = "token"

    def keep(self, context, site, gate, product):
        import torch

        kept = product.abs().topk(site.width - round(context.budget.sparsity * site.width)).indices
        return torch.zeros_like(product, dtype=torch.bool).scatter_(1, kept, True)


@hookimpl
def spath_register_strategies(register):
    register(Oracle)
