"""Specialisation: skip the neurons that are less active in a domain than they are elsewhere.

"Sparse Pathways: Domain-Aware Neuron Routing" (A. Young) measures how specialised a neuron is by ratios of its mean
absolute activations. The score of neuron j in domain d, among the reference domains D, is

    a[d, j] / mean over D of a[., j],    a[d, j] = mean over the tokens of d of |activation of j|

between 0 and the number of domains, whatever the scale of the neuron's activations; of a neuron that is never active
it is 0. Of whole experts, the share of tokens that is routed to them takes the place of a.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from spath_eval import Strategy, UsageError, hookimpl


@dataclass(frozen=True)
class Specialisation(Strategy):
    """Removes the neurons least active for the domain beside their mean over domains, of each layer or the model."""

    name: ClassVar[str] = "specialisation"
    requires: ClassVar[tuple[str, ...]] = ("mean_abs", "routing_share")
    all_domains: ClassVar[bool] = True

    pool: Literal["layer", "model"] = "layer"

    def select(self, context):
        from spath_eval import remove_experts, remove_lowest

        if len(context.profile.domains) < 2:
            raise UsageError(f"specialisation compares domains, and the profile has but one: {context.domain}")
        mask = remove_lowest(_ratios(context, "mean_abs"), context.budget.sparsity, self.pool)
        share = context.budget.expert_sparsity
        return remove_experts(mask, _ratios(context, "routing_share"), share) if share else mask


def _ratios(context, statistic):
    import torch

    profile = context.profile
    parts = [profile.statistic(statistic, domain) for domain in profile.domains]
    ratios = {}
    for path, own in profile.statistic(statistic, context.domain).items():
        mean = torch.stack([part[path] for part in parts]).mean(0)
        ratios[path] = own / mean.clamp(min=torch.finfo(mean.dtype).tiny)
    return ratios


@hookimpl
def spath_register_strategies(register):
    register(Specialisation)
