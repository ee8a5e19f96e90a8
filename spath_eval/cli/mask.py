"""`spath-eval mask`: select the mask of one domain and save it, to be evaluated with `spath-eval run --mask`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from spath_eval.cli import load_registry, plugin_options
from spath_eval.cli.run import model_options, prepare
from spath_eval.contracts import UsageError


@click.command()
@model_options
@click.option("--strategy", "strategy", default="negative", show_default=True, help="NAME[:OPTION=VALUE].")
@click.option("--sparsity", default="0.15", show_default=True, help="Share of FFN neurons to remove.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The safetensors file to write.")
@plugin_options
def command(plugin_names: tuple[str, ...], strict_plugins: bool, **given: Any) -> None:
    """Write the mask that a strategy selects.

    It holds a boolean per neuron of each FFN, true where it is kept.
    """
    session, loaded = prepare(load_registry(plugin_names, strict_plugins), given)
    from spath_eval.collection import Case

    one_each = (session.domains, session.options.strategies, session.options.sparsities)
    if any(len(values) != 1 for values in one_each):
        raise UsageError("a mask is of one --domain, --strategy and --sparsity: name one of each")
    strategy = session.registry.parse_strategy(session.options.strategies[0])
    if strategy.kind != "static":
        raise UsageError(f"strategy {strategy.name!r} is of kind {strategy.kind}: it has no fixed mask to write")
    case = Case(loaded.target.name, session.domains[0], strategy, session.options.sparsities[0], "compact")
    mask = loaded.select(case, loaded.context(case))
    mask.save(given["output"])
    click.echo(f"{case.id}: {mask.achieved:.4f} of the neurons removed")
    click.echo(f"mask: {given['output']}", err=True)
