"""Magnitude: skip the neurons whose weights are smallest, without a look at any text.

Pruning by magnitude (Han et al., "Learning both Weights and Connections for Efficient Neural Networks", 2015) of all
weights that go together, as a group (Fang et al., "DepGraph: Towards Any Structural Pruning", 2023). The group of
neuron j is its row of gate, where there is one, and of up, and its column of down. Its score is the group's norm

    sqrt(sum over i of gate[j, i]^2 + up[j, i]^2 + down[i, j]^2)

without biases. Of whole experts it is the norm of all their weights.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from spath_eval import Strategy, hookimpl


@dataclass(frozen=True)
class Magnitude(Strategy):
    """Removes the neurons with the smallest weights, of each layer or of the whole model; the same in every domain."""

    name: ClassVar[str] = "magnitude"

    pool: Literal["layer", "model"] = "layer"

    def select(self, context):
        from spath_eval import remove_experts, remove_lowest

        norms = {path: _norms(site) for path, site in context.sites.items()}
        mask = remove_lowest(norms, context.budget.sparsity, self.pool)
        if not context.budget.expert_sparsity:
            return mask
        experts = {path: norms[path].norm(dim=-1) for path, site in context.sites.items() if site.experts}
        return remove_experts(mask, experts, context.budget.expert_sparsity)


def _norms(site):
    import torch

    rows = [site.up] if site.gate is None else [site.gate, site.up]
    parts = [(weight, -1) for weight in rows] + [(site.down, -2)]
    norms = [torch.linalg.vector_norm(weight, dim=dim, dtype=torch.float64).cpu() for weight, dim in parts]
    return torch.stack(norms).norm(dim=0)


@hookimpl
def spath_register_strategies(register):
    register(Magnitude)
