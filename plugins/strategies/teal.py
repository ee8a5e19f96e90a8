"""TEAL: each token skips the neurons whose activation is small.

Liu et al., "Training-Free Activation Sparsity in Large Language Models" (2024): what enters a matrix is set to zero
where its size does not exceed a threshold,

    keep[j] = |x[j]| > t,    t = min {t' : F(t') >= sparsity}

with F the empirical distribution function of the sizes over calibration text. There it is done before every matrix of
the model, and a search shares the sparsity out among them. Here it is done before the down projections alone, with the
same sparsity at each: the uniform form. All of gate and up is computed before a neuron is known to be skipped, so that
what can be saved is down's column. A site of routed experts has one threshold for all of them.
"""

from dataclasses import dataclass
from typing import ClassVar

from spath_eval import Strategy, hookimpl


@dataclass(frozen=True)
class Teal(Strategy):
    """Each token keeps the neurons whose activation exceeds its site's threshold, taken from the domain's text."""

    name: ClassVar[str] = "teal"
    kind: ClassVar[str] = "token"
    needs_batches: ClassVar[bool] = True

    def prepare(self, context):
        from spath_eval.plugins.strategies._thresholds import thresholds

        def watch(site, receive):
            return site.observe(lambda seen: receive(seen.values, seen.tokens))

        return thresholds(context, watch)

    def keep(self, context, site, gate, product):
        return product.float().abs() > context.prepared[site.path]


@hookimpl
def spath_register_strategies(register):
    register(Teal)
