"""Negative selection: skip the neurons that a domain surely does not need.

Those whose mean absolute activation on the domain's text lies below a percentile go ("Sparse Pathways: Domain-Aware
Neuron Routing", A. Young). The axis over which the percentile is pooled changes the answer, so it is an option.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from spath_eval import Strategy, hookimpl


@dataclass(frozen=True)
class Negative(Strategy):
    """Removes the least active neurons, of each layer or of the whole model."""

    name: ClassVar[str] = "negative"
    requires: ClassVar[tuple[str, ...]] = ("mean_abs",)

    pool: Literal["layer", "model"] = "layer"

    def select(self, context):
        from spath_eval import remove_lowest

        return remove_lowest(context.profile.statistic("mean_abs", context.domain), context.budget.sparsity, self.pool)


@hookimpl
def spath_register_strategies(register):
    register(Negative)
