"""CATS: each token skips the neurons whose activated gate is small.

Lee et al., "CATS: Contextually-Aware Thresholding for Sparsity in Large Language Models" (2024): the activated gate is
set to zero where its size is below a threshold,

    keep[j] = |activation(gate(x))[j]| > t,    t = min {t' : F(t') >= sparsity}

with F the empirical distribution function of the sizes over calibration text, at each site. The gate is computed whole;
what can be saved of a skipped neuron is its row of up and its column of down. (The paper keeps what equals t as well.)
FFNs without a gate are refused, and so are routed experts, whose gates are not shown by token.
"""

from dataclasses import dataclass
from typing import ClassVar

from spath_eval import Strategy, UsageError, hookimpl


@dataclass(frozen=True)
class Cats(Strategy):
    """Each token keeps the neurons whose activated gate exceeds its site's threshold, taken from the domain's text."""

    name: ClassVar[str] = "cats"
    kind: ClassVar[str] = "token"
    needs_batches: ClassVar[bool] = True
    reads_product: ClassVar[bool] = False

    def prepare(self, context):
        import torch

        from spath_eval.plugins.strategies._thresholds import thresholds

        def watch(site, receive):
            def look(gate, product):
                if gate is None:
                    raise UsageError(f"cats needs an activated gate for each token, and {site.path} shows none")
                receive(gate, torch.arange(len(gate), device=gate.device))

            return site.filtered(look)

        return thresholds(context, watch)

    def keep(self, context, site, gate, product):
        return gate.float().abs() > context.prepared[site.path]


@hookimpl
def spath_register_strategies(register):
    register(Cats)
