"""`spath-eval speed`: how much faster a model really runs without the FFN neurons that a mask removes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spath_eval.cli import FAILED, INTERRUPTED, load_registry, plugin_options
from spath_eval.cli.run import MODEL_OPTIONS, profile_texts, quiet_libraries, split_list
from spath_eval.cli.terminal import columns
from spath_eval.contracts import UsageError

if TYPE_CHECKING:
    import torch

    from spath_eval.registry import Registry
    from spath_eval.speed.sources import Subject
    from spath_eval.speed.timing import Workload

LEFT_OUT = {"device_map", "batch_size"}
"""Options of a model that the timing has no use for."""
OF_A_MODEL = ("models", "arch", "sites", "revision", "strategy", "mask", "profile_text", "profile_tokens")
MOST_ROUNDS = 2_000


def model_options(command: Any) -> Any:
    """The options that say which model is profiled on what, as other commands have them."""
    for option in reversed(MODEL_OPTIONS):
        command = option(command)
    command.__click_params__ = [one for one in command.__click_params__ if one.name not in LEFT_OUT]
    return command


def parse_counts(option: str, text: str) -> tuple[int, ...]:
    """`1,8` as numbers. Raises `UsageError` for what is no number from 1 on."""
    parts = split_list(option, text)
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"{option} {text!r}: expected numbers from 1 on, by commas")
    return tuple(dict.fromkeys(map(int, parts)))


@click.command()
@model_options
@click.option("--shape", metavar="NAME", help="A published model's dimensions with random weights, e.g. gemma-2b.")
@click.option("--layers", type=click.IntRange(min=1), help="Measure so many layers of the shape, without its head.")
@click.option("--experts", type=click.IntRange(min=1), help="Build so many of the shape's routed experts per layer.")
@click.option("--strategy", default="negative", show_default=True, help="What selects the model's mask.")
@click.option("--mask", type=click.Path(path_type=Path), help="Take the model's mask from this file.")
@click.option("--record", type=click.Path(path_type=Path), help="Take model and mask from this record of a run.")
@click.option("--case", "case_id", metavar="ID", help="Which of the record's cases.")
@click.option("--sparsity", default="0.5", show_default=True, help="Shares of FFN neurons to remove, by commas.")
@click.option("--subject", default="ffn,layer,model", show_default=True, help="What to measure, by commas.")
@click.option("--batch", "batches", default="1", show_default=True, help="Sequences at a time, by commas.")
@click.option("--context", "contexts", default="128", show_default=True, help="Tokens of the prompt, by commas.")
@click.option(
    "--new-tokens", default=16, show_default=True, type=click.IntRange(min=1), help="Decode steps after the prompt."
)
@click.option("--compile", "compiled", is_flag=True, help="Time both arms compiled, too; on CUDA as CUDA graphs.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the CPU.  [default: torch's]")
@click.option(
    "--precision",
    default=0.02,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Stop a measurement when no 95% interval is wider, relative to its ratio.",
)
@click.option(
    "--seconds",
    default=60.0,
    show_default=True,
    type=click.FloatRange(0),
    help="Stop it after that time in any case, but not before 6 rounds.",
)
@click.option("--self-test", is_flag=True, help="Time dense against dense: the ratio should be 1.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: a list shaped as the record's `speed`.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Where the raw values go.  [default: results/runs/...]"
)
@click.option(
    "--picture",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Draw ratios and ceilings over sparsity: FILE.png or FILE.svg by its ending, without either both.",
)
@plugin_options
@click.pass_context
def command(context: click.Context, plugin_names: tuple[str, ...], strict_plugins: bool, **given: Any) -> int:
    """Measure how much faster a model or a published model's shape runs without a share of its FFN neurons.

    Both arms take turns in one process. Several domains' pathways are switched between, and mixed in a batch. The table
    goes to stdout, all talk to stderr, the raw values to a JSON file.

    \b
    spath-eval speed --arch gemma --domain math --subject model --seconds 1 --picture gemma
    """
    import json

    registry = load_registry(plugin_names, strict_plugins)
    _check(context, given)
    quiet_libraries()
    from spath_eval import records
    from spath_eval.pathways import GateError
    from spath_eval.reports.picture import check_picture, speed_picture
    from spath_eval.speed.table import WIDEST, faults, render, timings

    created = datetime.now(UTC)
    name = given["shape"] or given["case_id"] or "+".join(map(_last_part, given["models"])) or given["arch"]
    output = given["output"] or Path("results/runs") / f"{created:%Y%m%dT%H%M%S}-{name.replace('/', '-')}-speed.json"
    records.check_writable(output)
    if given["picture"]:
        check_picture(given["picture"])
    if given["record"] and given["dtype"] == "auto":
        given["dtype"] = records.read(given["record"]).get("environment", {}).get("dtype", "auto")
    entries: list[dict[str, Any]] = []
    device, dtype = _device(given)
    status, code = "complete", 0
    try:
        for entry in _measure(registry, given, device, dtype):
            entries.append(entry | ({"self_test": True} if given["self_test"] else {}))
    except GateError as error:
        status, code = "failed", FAILED
        click.echo(f"FAILED {error}", err=True)
    except KeyboardInterrupt:
        status, code = "interrupted", INTERRUPTED
    about = {
        "kind": "speed",
        "status": status,
        "created": created.isoformat(timespec="seconds"),
        "options": {key: given[key] for key in sorted(given) if key not in ("as_json", "output", "picture")},
        "environment": records.environment(str(device), str(dtype).removeprefix("torch.")),
        "speed": entries,
    }
    records.write(about, output)
    plain = json.loads(output.read_text(encoding="utf-8"))["speed"]
    click.echo(json.dumps(plain, indent=1) if given["as_json"] else render(plain, columns(WIDEST)).rstrip("\n"))
    for fault in faults(plain):
        click.echo(f"warning: measurement fault: {fault}", err=True)
    click.echo(f"speed: {output}", err=True)
    if given["picture"] and any(timings(plain)):
        for file in speed_picture(plain, given["picture"]):
            click.echo(f"picture: {file}", err=True)
    return code


def _check(context: click.Context, given: dict[str, Any]) -> None:
    """Raise `UsageError` for options that contradict each other, or that cannot be read."""

    def chosen(*names: str) -> list[str]:
        by_default = click.core.ParameterSource.DEFAULT
        options = {option.name: option.opts[-1] for option in context.command.params}
        return [options[name] for name in names if context.get_parameter_source(name) is not by_default]

    kinds = [name for name, found in (("--shape", given["shape"]), ("--record", given["record"])) if found]
    if kinds and (others := [*kinds[1:], *chosen(*OF_A_MODEL)]):
        raise UsageError(f"{kinds[0]} says which model and mask, and so does {others[0]}: give one of them")
    if given["record"] and (others := chosen("sparsity", "domain", "layers", "experts", "seed")):
        raise UsageError(f"--record says which model and mask, and so does {others[0]}: give one of them")
    if bool(given["record"]) != bool(given["case_id"]):
        raise UsageError("--record names a record and --case one of its cases: give both")
    if not given["shape"] and (others := chosen("layers", "experts")):
        raise UsageError(f"{others[0]} says how much of a shape is built: give --shape")
    if given["mask"] and (others := chosen("sparsity", "strategy", "domain")):
        raise UsageError(f"--mask takes the place of {others[0]}: give one of them")
    if given["self_test"] and (others := chosen("sparsity", "strategy", "mask", "record", "domain")):
        raise UsageError(f"--self-test removes nothing, and {others[0]} says what to remove: give one of them")
    if not kinds and not given["models"] and given["arch"] == "auto":
        raise UsageError("name a shape with --shape, a model with --model, a family with --arch, or a record")


def _device(given: Mapping[str, Any]) -> tuple[torch.device, torch.dtype]:
    import torch

    from spath_eval.models import DTYPES, resolve_device, resolve_dtype

    if given["threads"]:
        torch.set_num_threads(given["threads"])
    device = resolve_device(given["device"])
    return torch.device(device), DTYPES[resolve_dtype(given["dtype"], device)]


def _measure(
    registry: Registry, given: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> Iterator[dict[str, Any]]:
    """The entries, one after the other."""
    from spath_eval.speed.benchmark import Plan, run
    from spath_eval.speed.timing import Stop, Workload

    batches, contexts = parse_counts("--batch", given["batches"]), parse_counts("--context", given["contexts"])
    workloads = tuple(Workload(batch, tokens, given["new_tokens"]) for batch in batches for tokens in contexts)
    stop = Stop(given["seconds"], given["precision"], max_rounds=MOST_ROUNDS)
    largest = max(workloads, key=lambda one: one.batch * one.tokens)
    subjects = _subjects(registry, given, largest, device, dtype)
    return run(subjects, Plan(workloads, stop, given["compiled"], given["seed"]), device, dtype, _say)


def _subjects(
    registry: Registry, given: Mapping[str, Any], largest: Workload, device: torch.device, dtype: torch.dtype
) -> Iterator[Subject]:
    """What is measured, built or loaded one after the other."""
    from spath_eval import records
    from spath_eval.collection import parse_sparsities
    from spath_eval.session import Options, Session
    from spath_eval.speed.shapes import Cut, find_shape
    from spath_eval.speed.sources import SUBJECTS, of_model, of_shape, recorded, select

    wanted = split_list("--subject", given["subject"])
    if unknown := [name for name in wanted if name not in SUBJECTS]:
        raise UsageError(f"--subject {unknown[0]!r}: there are {', '.join(SUBJECTS)}")
    sparsities = (0.0,) if given["self_test"] else parse_sparsities(given["sparsity"])
    domains = split_list("--domain", given["domain"])
    shared: dict[str, Any] = {"seed": given["seed"], "largest": largest}
    if given["shape"]:
        family, shape = find_shape(registry.architectures.values(), given["shape"])
        cut = Cut(given["layers"], given["experts"])
        names = domains or ("random",)
        return of_shape(family, shape, cut, wanted, sparsities, names, device=device, dtype=dtype, **shared)
    if given["record"]:
        record = records.read(given["record"])
        loaded, masks = recorded(registry, record, given["case_id"], device=given["device"], dtype=given["dtype"])
        return of_model(loaded, masks, wanted, **shared)
    options = Options(
        domains=domains,
        strategies=split_list("--strategy", given["strategy"]),
        sparsities=parse_sparsities(given["sparsity"]),
        profile_text=profile_texts(given["profile_text"]),
        **{
            name: given[name]
            for name in ("models", "arch", "sites", "revision", "mask", "device", "dtype", "profile_tokens", "seed")
        },
    )
    loaded, masks = select(Session(options, registry), self_test=given["self_test"])
    return of_model(loaded, masks, wanted, **shared)


def _say(line: str) -> None:
    click.echo(line, err=True)


def _last_part(reference: str) -> str:
    return Path(reference).stem if reference.endswith(".gguf") else Path(reference).name
