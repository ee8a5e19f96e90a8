"""`spath-eval findings`: the "Sparse pathways" paper's tables, measured, beside the published values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spath_eval.cli import FAILED, load_registry, plugin_options
from spath_eval.cli.run import model_options, profile_texts, quiet_libraries, split_list
from spath_eval.cli.terminal import columns
from spath_eval.contracts import UsageError

if TYPE_CHECKING:
    from spath_eval.findings import Definitions
    from spath_eval.registry import Registry
    from spath_eval.session import Session

ONE_MODEL = {"models", "arch", "sites", "revision"}
"""Shared options that say which model: here arguments do, of which there may be several."""


def parse_depths(text: str) -> tuple[float, ...]:
    """`0,0.28` as numbers. Raises `UsageError` for what lies outside 0 <= depth <= 1."""
    try:
        depths = tuple(dict.fromkeys(map(float, text.split(","))))
    except ValueError:
        depths = ()
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise UsageError(f"--ablation-depths {text!r}: expected numbers between 0 and 1, by commas, e.g. 0,0.5")
    return depths


def domain_options(command: Any) -> Any:
    """The options that all commands with a model share, but for those that say which."""
    command = model_options(command)
    command.__click_params__ = [option for option in command.__click_params__ if option.name not in ONE_MODEL]
    return command


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@domain_options
@click.option(
    "--ratio",
    default=2.0,
    show_default=True,
    type=click.FloatRange(min=1),
    help="A neuron is specialised where its largest mean activation exceeds so many times the mean over domains.",
)
@click.option(
    "--percentile",
    default=50.0,
    show_default=True,
    type=click.FloatRange(0, 100),
    help="A neuron is skippable where its mean activation in the domain is below this percentile of all domains.",
)
@click.option(
    "--pool",
    default="layer",
    show_default=True,
    type=click.Choice(["layer", "model"]),
    help="Over what negative selection ranks neurons for output preservation.",
)
@click.option(
    "--sparsity", default="0.05,0.15,0.3,0.5", show_default=True, help="Shares to remove for output preservation."
)
@click.option(
    "--preservation-tokens",
    default=1_000,
    show_default=True,
    type=click.IntRange(min=2),
    help="Held-out tokens to compare outputs on, per domain.",
)
@click.option(
    "--ablation-depths",
    default="0,0.28,0.53,0.88",
    show_default=True,
    help="Depths, layer / layers, of the layers to make sparse one at a time.",
)
@click.option("--ablation-sparsity", default="0.5,0.7,0.9", show_default=True, help="Shares to remove of that layer.")
@click.option("--no-ablation", is_flag=True, help="Make no layer sparse alone.")
@click.option(
    "--format",
    "form",
    default="text",
    show_default=True,
    type=click.Choice(["text", "markdown", "json"]),
    help="What is printed.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Where the JSON goes, profiles beside it.  [default: results/runs/...]",
)
@plugin_options
def command(plugin_names: tuple[str, ...], strict_plugins: bool, **given: Any) -> int:
    """Measure the tables of the "Sparse pathways" paper, and print them beside the published values.

    MODEL is a family, whose small checkpoint is taken, a folder, a GGUF file or a hub id. The tables go to stdout, all
    talk to stderr.
    """
    registry = load_registry(plugin_names, strict_plugins)
    definitions, sessions = _prepare(registry, given)
    from spath_eval import findings, records
    from spath_eval.pathways import GateError

    created = datetime.now(UTC)
    names = "+".join(session.targets[0].name for session in sessions)
    output = given["output"] or Path("results/runs") / f"{created:%Y%m%dT%H%M%S}-{names}-findings.json"
    records.check_writable(output)
    parts = []
    for session in sessions:
        try:
            parts.append(_measure(session, definitions, output))
        except GateError as error:
            click.echo(f"FAILED {session.targets[0].name}: {error}", err=True)
            return FAILED
    first = sessions[0]
    about = {
        "kind": "findings",
        "created": created.isoformat(timespec="seconds"),
        "options": {key: given[key] for key in sorted(given) if key not in ("form", "output")},
        "environment": records.environment(first.device, first.dtype),
    }
    result = about | findings.findings(parts, definitions, seed=given["seed"])
    records.write(result, output)
    text = (
        output.read_text(encoding="utf-8")
        if given["form"] == "json"
        else findings.render(result, given["form"], columns())
    )
    click.echo(text.rstrip("\n"))
    click.echo(f"findings: {output}", err=True)
    return 0


def _prepare(registry: Registry, given: Mapping[str, Any]) -> tuple[Definitions, list[Session]]:
    """What is measured, and a session for each model, none of which is loaded yet."""
    from spath_eval.collection import parse_sparsities

    texts, domains = profile_texts(given["profile_text"]), split_list("--domain", given["domain"])
    depths = () if given["no_ablation"] else parse_depths(given["ablation_depths"])
    sparsities = [parse_sparsities(given[name]) for name in ("sparsity", "ablation_sparsity")]
    quiet_libraries()
    from spath_eval.findings import Definitions
    from spath_eval.session import Options, Session

    definitions = Definitions(given["ratio"], given["percentile"], given["pool"], sparsities[0], depths, sparsities[1])
    shared = {field.name: given[field.name] for field in dataclasses.fields(Options) if field.name in given}
    shared |= {"models": (), "domains": domains, "profile_text": texts, "strategies": ()}
    sessions = []
    for model in dict.fromkeys(given["models"]):
        which = {"arch": model} if model in registry.architectures else {"models": (model,)}
        sessions.append(Session(Options(**shared | which), registry))
    names = [session.targets[0].name for session in sessions]
    if len(set(names)) < len(names):
        raise UsageError("two models have the same name, so that their rows could not be told apart")
    if given["ratio"] >= (count := len(sessions[0].domains)):
        raise UsageError(f"--ratio {given['ratio']:g} is out of reach: no ratio exceeds the number of domains, {count}")
    return definitions, sessions


def _measure(session: Session, definitions: Definitions, output: Path) -> dict[str, Any]:
    """One model's part of the result, its profile saved beside `output`."""
    from spath_eval.findings import measure

    loaded = session.load(session.targets[0])
    part, profile = measure(loaded, definitions, lambda line: click.echo(line, err=True))
    path = output.with_name(f"{output.name.removesuffix('.json')}.{loaded.target.name}.profile.safetensors")
    profile.save(path)
    part["profile"]["path"] = path.name
    click.echo(f"profile: {path}", err=True)
    return part
