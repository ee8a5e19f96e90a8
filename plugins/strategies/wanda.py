"""Wanda, structured: skip the neurons whose activations and outgoing weights are small together.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models" (2023), score a single weight by its
size times the norm of what enters it over the calibration tokens: |W[i, j]| * ||X[:, j]||. A neuron is removed whole,
so its score is the norm of the scores in its column of down

    ||X[:, j]|| * ||down[:, j]||,    ||X[:, j]|| = sqrt(sum over the domain's tokens of (activation of j)^2)

over the tokens routed to its expert, where it has one. Of whole experts it is the norm of their neurons' scores.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from spath_eval import Strategy, hookimpl


@dataclass(frozen=True)
class Wanda(Strategy):
    """Removes the neurons of the smallest activation norm times weight norm, of each layer or of the whole model."""

    name: ClassVar[str] = "wanda"
    requires: ClassVar[tuple[str, ...]] = ("mean_square", "routing_share")

    pool: Literal["layer", "model"] = "layer"

    def select(self, context):
        from spath_eval import remove_experts, remove_lowest

        scores = {path: _scores(context, site) for path, site in context.sites.items()}
        mask = remove_lowest(scores, context.budget.sparsity, self.pool)
        if not context.budget.expert_sparsity:
            return mask
        experts = {path: scores[path].norm(dim=-1) for path, site in context.sites.items() if site.experts}
        return remove_experts(mask, experts, context.budget.expert_sparsity)


def _scores(context, site):
    import torch

    profile, domain = context.profile, context.domain
    squares = profile.statistic("mean_square", domain)[site.path] * profile.domains[domain].tokens
    if site.experts:  # their means are over the tokens routed to each
        squares = squares * profile.statistic("routing_share", domain)[site.path].unsqueeze(-1)
    return squares.sqrt() * torch.linalg.vector_norm(site.down, dim=-2, dtype=torch.float64).cpu()


@hookimpl
def spath_register_strategies(register):
    register(Wanda)
