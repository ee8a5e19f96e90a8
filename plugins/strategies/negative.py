"""Negative selection: skip the neurons that a domain surely does not need.

Those whose mean absolute activation on the domain's text lies below a percentile go ("Sparse Pathways: Domain-Aware
Neuron Routing", A. Young). The axis over which the percentile is pooled changes the answer, so it is an option. Of
whole experts, those go to which the domain's tokens are routed least.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from spath_eval import Strategy, hookimpl


@dataclass(frozen=True)
class Negative(Strategy):
    """Removes the least active neurons, of each layer or of the whole model."""

    name: ClassVar[str] = "negative"
    requires: ClassVar[tuple[str, ...]] = ("mean_abs", "routing_share")

    pool: Literal["layer", "model"] = "layer"

    def select(self, context):
        from spath_eval import remove_experts, remove_lowest

        budget, profile = context.budget, context.profile
        mask = remove_lowest(profile.statistic("mean_abs", context.domain), budget.sparsity, self.pool)
        if not budget.expert_sparsity:
            return mask
        return remove_experts(mask, profile.statistic("routing_share", context.domain), budget.expert_sparsity)


@hookimpl
def spath_register_strategies(register):
    register(Negative)
