"""`spath-eval profile`: profile a model on domains and save the statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from spath_eval.cli import load_registry, plugin_options
from spath_eval.cli.run import model_options, prepare


@click.command()
@model_options
@click.option("--statistics", default="mean_abs", show_default=True, help="What to collect, by commas.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The safetensors file to write.")
@plugin_options
def command(plugin_names: tuple[str, ...], strict_plugins: bool, **given: Any) -> None:
    """Measure how strongly each neuron responds to a domain.

    The file holds, per domain, statistic and FFN, a float64 value for each neuron.
    """
    session, loaded = prepare(load_registry(plugin_names, strict_plugins), given)
    from spath_eval.cli.run import split_list

    profile = loaded.make_profile(session.domains, split_list("--statistics", given["statistics"]))
    profile.save(given["output"])
    for domain, part in profile.domains.items():
        click.echo(f"{domain}: {part.tokens} tokens of {part.source}")
    click.echo(f"profile: {given['output']}", err=True)
