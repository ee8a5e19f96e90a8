"""A whole plugin: a strategy, a domain, an architecture, a report and an option, each as small as it can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import click

import spath_eval
from spath_eval import FFN, Architecture, Context, Domain, Strategy, hookimpl


@dataclass(frozen=True)
class Weakest(Strategy):
    """Skips the neurons whose row of the up projection is shortest: it needs no profile."""

    name: ClassVar[str] = "weakest"
    pool: Literal["layer", "model"] = "layer"

    def select(self, context: Context) -> spath_eval.Mask:
        scores = {path: site.up.float().norm(dim=-1) for path, site in context.sites.items()}
        return spath_eval.remove_lowest(scores, context.budget.sparsity, pool=self.pool)


def months(split: str) -> Sequence[str]:
    names = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October")
    before, after = {"profile": ("comes before", "is followed by"), "heldout": ("precedes", "goes ahead of")}[split]
    return [f"{first} {before} {then}. {first} {after} {then}." for first, then in pairwise(names)]


class Lines:
    """A report with one line for each case."""

    name = "lines"

    def render(self, record: Mapping[str, Any], *, width: int, colour: bool) -> str:
        return "".join(f"{case['outcome']} {case['id']}"[:width] + "\n" for case in record["cases"])


@hookimpl
def spath_register_strategies(register):
    register(Weakest)


@hookimpl
def spath_register_domains(register):
    register(Domain("calendar", months, tasks=("arc_easy",), provenance="written for this example", licence="CC0-1.0"))


@hookimpl
def spath_register_architectures(register):
    register(Architecture("olmo", model_types=("olmo2", "olmo3"), ffns=(FFN("model.layers.*.mlp"),)))


@hookimpl
def spath_register_reports(register):
    register(Lines())


@hookimpl
def spath_addoption(group):
    group.params.append(click.Option(["--first"], type=click.IntRange(min=1), help="Run only the first N cases."))


@hookimpl(trylast=True)
def spath_collection_modifyitems(cases, session):
    if first := session.options.plugin.get("first"):
        del cases[first:]
