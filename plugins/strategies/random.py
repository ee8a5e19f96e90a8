"""Control: remove neurons at random, the same number in every layer, which must hurt more than any good choice.

It joins every run of another strategy at the same sparsities, unless `--no-controls` is given.
"""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import click

from spath_eval import Strategy, hookimpl


@dataclass(frozen=True)
class Random(Strategy):
    """Removes neurons at random, the same share of each layer."""

    name: ClassVar[str] = "random"
    control: ClassVar[bool] = True

    def select(self, context):
        import torch

        from spath_eval import remove_experts, remove_lowest

        neurons, experts = {}, {}
        for path, site in context.sites.items():
            neurons[path] = torch.rand(site.shape, generator=context.generator)
            if site.experts is not None:
                experts[path] = torch.rand(site.experts, generator=context.generator)
        mask = remove_lowest(neurons, context.budget.sparsity)
        share = context.budget.expert_sparsity
        return remove_experts(mask, experts, share) if share else mask


@hookimpl
def spath_register_strategies(register):
    register(Random)


@hookimpl
def spath_addoption(group):
    help = "Leave out the random control that runs beside the asked strategy."
    group.params.append(click.Option(["--no-controls/--controls"], is_flag=True, help=help))


@hookimpl
def spath_collection_modifyitems(cases, session):
    if session.options.plugin.get("no_controls"):
        return
    for case in list(cases):
        if not case.is_own:
            continue
        control = dataclasses.replace(case, strategy=Random(), execution=session.options.execution)
        if case.strategy.name not in ("random", "keep-all") and control not in cases:
            cases.insert(cases.index(case) + 1, control)
