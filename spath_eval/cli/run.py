"""`spath-eval run`: evaluate strategies on models and print what they keep and what they gain."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from spath_eval.cli import NO_CASES, explained, load_registry, plugin_options
from spath_eval.cli.show import rendered
from spath_eval.cli.terminal import has_colour
from spath_eval.contracts import UsageError
from spath_eval.suite import Suite

if TYPE_CHECKING:
    from spath_eval.comparison import Comparison
    from spath_eval.registry import Registry
    from spath_eval.session import Load, LoadedModel, Session


MASK_REPLACES = ("strategy", "sparsity", "expert_sparsity")
"""Options that have no meaning beside `--mask`."""


class RunCommand(click.Command):
    """Options that plugins add are known only once plugins are loaded, and suites are read before that."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        try:
            path = self._first_look(args).params["config"]
            suite = Suite.read(path) if path else Suite.find()
            return self.with_suites([suite] if suite else [], args, info_name, parent, **extra)
        except UsageError:
            if not extra.get("resilient_parsing"):
                raise
            return super().make_context(info_name, args, parent, **extra)  # while the shell completes a line

    def with_suites(
        self,
        suites: Sequence[Suite],
        args: Sequence[str] = (),
        info_name: str | None = "run",
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        """The context of `args`, with what they leave open from the last of `suites` that has it.

        Raises `UsageError` for a suite that is not right.
        """
        first = self._first_look(args).params
        names = first["plugin_names"] or next((suite.plugins for suite in reversed(suites) if suite.plugins), ())
        registry = load_registry(names, first["strict_plugins"], warn=not extra.get("resilient_parsing"))
        whole = click.Command(self.name, callback=self.callback, params=list(self.params), help=self.help)
        own = {parameter.name for parameter in whole.params}
        registry.hook.spath_addoption(group=whole)
        defaults: dict[str, Any] = {}
        sources: dict[str, str] = {}
        for suite in suites:
            found = suite.defaults(whole.params)
            defaults = _without_replaced(defaults, found) | found
            sources |= dict.fromkeys(found, suite.source)
        defaults = _without_replaced(defaults, first)
        try:
            context = whole.make_context(info_name, list(args), parent, default_map=defaults, **extra)
        except click.BadParameter as error:
            name = error.param.name if error.param else None
            given = error.ctx and name and error.ctx.get_parameter_source(name)
            if name is None or given is not ParameterSource.DEFAULT_MAP:
                raise
            raise UsageError(f"{sources[name]}: {explained(error)}") from error
        context.meta["registry"] = registry
        context.meta["given"] = tuple(args)
        context.meta["suites"] = tuple(suites)
        context.meta["plugin"] = [p.name for p in whole.params if p.name not in own]
        return context

    def _first_look(self, args: Sequence[str]) -> click.Context:
        """What can be told of `args` before the options of plugins are known."""
        settings = {"ignore_unknown_options": True, "allow_extra_args": True}
        known = click.Command(self.name, params=list(self.params), add_help_option=False, context_settings=settings)
        return known.make_context(self.name, list(args), resilient_parsing=True)


def _without_replaced(settings: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` without what a mask in `over`, which overrides them, takes the place of."""
    return {name: value for name, value in settings.items() if not (over.get("mask") and name in MASK_REPLACES)}


LIBRARIES = ("transformers", "datasets", "lm_eval", "accelerate", "torch", "httpx", "huggingface_hub")
"""Loggers of libraries, of which only errors are told."""


def quiet_libraries() -> None:
    """Say nothing but what this program says: before torch, transformers and lm-eval are imported."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING, stream=sys.stderr)
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)


def profile_texts(values: tuple[str, ...]) -> dict[str, Path | str]:
    """`DOMAIN=PATH` and `DOMAIN=hub:...` options as a mapping. A domain's last one counts. Raises `UsageError` where
    there is no `=`."""
    texts: dict[str, Path | str] = {}
    for value in values:
        domain, equals, text = value.partition("=")
        if not equals or not text:
            expected = "DOMAIN=FILE, DOMAIN=FOLDER or DOMAIN=hub:DATASET:SPLIT:FIELD"
            raise UsageError(f"--profile-text {value!r}: expected {expected}")
        texts[domain] = text if text.startswith("hub:") else Path(text)
    return texts


def split_list(option: str, text: str | None) -> tuple[str, ...]:
    """A comma-separated option as its parts, none where it is not given. Raises `UsageError` for an empty part."""
    if text is None:
        return ()
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not all(parts):
        raise UsageError(f"{option} {text!r}: expected names, by commas")
    return parts


MODEL_OPTIONS = [
    click.option("--model", "models", multiple=True, metavar="FOLDER|HUB_ID|FILE.gguf", help="A model. Repeatable."),
    click.option(
        "--arch", default="auto", show_default=True, help="Its family; without --model, the family's small checkpoint."
    ),
    click.option(
        "--sites",
        metavar="PATTERN",
        help="For a model of no known family: module paths of its down projections, * for one component, from which "
        "its FFNs are guessed.  [e.g. model.layers.*.mlp.down_proj]",
    ),
    click.option("--revision", help="Revision of a hub model."),
    click.option(
        "--device", default="auto", show_default=True, help="cpu, cuda or cuda:N; auto takes CUDA where there is one."
    ),
    click.option(
        "--device-map",
        type=click.Choice(["auto", "balanced", "sequential"]),
        help="Spread a large model over all devices, and main memory and disk where they do not suffice.",
    ),
    click.option(
        "--dtype",
        default="auto",
        show_default=True,
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        help="auto is float32 on the CPU and bfloat16 on CUDA.",
    ),
    click.option("--batch-size", default=32, show_default=True, type=click.IntRange(min=1), help="Rows per forward."),
    click.option("--domain", "domain", help="Domains, by commas; all by default."),
    click.option(
        "--profile-text",
        multiple=True,
        metavar="DOMAIN=FILE|FOLDER|hub:DATASET[,CONFIG]:SPLIT:FIELD",
        help="Text to profile a domain on (80%) and to compare outputs on (20%), instead of its own: files, or a field "
        "of a dataset of the hub, up to 20,000 documents. Repeatable.",
    ),
    click.option(
        "--profile-tokens",
        default=20_000,
        show_default=True,
        type=click.IntRange(min=1),
        help="Tokens to profile, per domain.",
    ),
    click.option(
        "--seed",
        default=0,
        show_default=True,
        type=click.IntRange(0, 2**32 - 1),
        help="Seed of random masks and of resampling.",
    ),
]


def model_options(command: Any) -> Any:
    """The options that say which model is profiled on what."""
    for option in reversed(MODEL_OPTIONS):
        command = option(command)
    return command


@click.command(cls=RunCommand)
@model_options
@click.option(
    "--strategy",
    "strategy",
    default="negative",
    show_default=True,
    help="Strategies, by commas: NAME[:OPTION=VALUE]; all takes the static ones.",
)
@click.option("--sparsity", default="0.15", show_default=True, help="Shares of FFN neurons to remove, by commas.")
@click.option("--expert-sparsity", help="Share of each layer's routed experts to remove; alone, no other neurons go.")
@click.option("--mask", type=click.Path(path_type=Path), help="Evaluate the mask in this file instead of a strategy.")
@click.option(
    "--execution",
    default="compact",
    show_default=True,
    type=click.Choice(["compact", "masked"]),
    help="compact slices the weights out; masked zeroes activations, and has no speed.",
)
@click.option(
    "--cross/--no-cross", is_flag=True, help="Evaluate each domain's mask, and one of all together, on every domain."
)
@click.option("--no-speed/--speed", is_flag=True, help="Do not measure speed.")
@click.option("--no-quality/--quality", is_flag=True, help="Evaluate no task: compare outputs on held-out text only.")
@click.option(
    "--noise-floor/--no-noise-floor", is_flag=True, help="Evaluate the dense model twice, with two batch sizes."
)
@click.option(
    "--tasks",
    metavar="TASK,...|DOMAIN=TASK+TASK,...",
    help="lm-eval tasks to evaluate on instead of the domains' own: for every domain, or domain by domain.",
)
@click.option(
    "--data-dir",
    envvar="SPATH_DATA_DIR",
    type=click.Path(path_type=Path),
    help="Folder with the rows of lm-eval's tasks, TASK/SPLIT.jsonl: without --tasks, the domains' public benchmarks "
    "are evaluated.  [env: SPATH_DATA_DIR]",
)
@click.option("--hub/--no-hub", is_flag=True, help="Evaluate the domains' public benchmarks with rows from the hub.")
@click.option(
    "--include-path",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A folder with task files of your own. Repeatable.",
)
@click.option("--limit", metavar="N,TASK=N,...", help="Evaluate only the first N documents of each task, or of one.")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples in the prompt, instead of the tasks' own.")
@click.option(
    "--allow-code-execution/--no-allow-code-execution",
    is_flag=True,
    help="Score humaneval, mbpp and the like by executing, in a sandbox, the code that the model writes.",
)
@click.option(
    "--apply-chat-template/--no-apply-chat-template", is_flag=True, help="Put prompts in the tokenizer's chat template."
)
@click.option(
    "--preservation-tokens",
    default=5_000,
    show_default=True,
    type=click.IntRange(min=2),
    help="Held-out tokens to compare outputs on, per domain.",
)
@click.option(
    "--allow-overlap/--no-allow-overlap", is_flag=True, help="Go on where profile text and evaluation overlap."
)
@click.option("-k", "keyword", help="Run only cases whose id matches: words joined by and, or, not.")
@click.option("--collect-only", is_flag=True, help="List the cases and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the list of --collect-only as JSON.")
@click.option("-x", "exitfirst", is_flag=True, help="Stop at the first case that fails.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Where the record goes.  [default: results/runs/...]"
)
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    help="Compare with this record, and fail on what is worse: see spath-eval compare.",
)
@click.option(
    "--fail-on",
    multiple=True,
    metavar="QUANTITY:N%",
    help="With --baseline: fail unless shown to be not worse than this: retention:2%, perplexity:1%, speed:10%, or "
    "speed.decode:10%. Repeatable.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="A suite file (TOML) with these options, which the command line overrides.  [default: the table "
    "tool.spath-eval of ./pyproject.toml, if there is one]",
)
@plugin_options
@click.pass_context
def command(context: click.Context, **given: Any) -> int:
    """Evaluate strategies on a model: what they keep of its quality, and how much faster it really runs.

    The table goes to stdout, all talk to stderr, the record to a JSON file.
    """
    if given["as_json"] and not given["collect_only"]:
        raise UsageError("--json is for the list of --collect-only: the record of a run is JSON in any case")
    for suite in context.meta["suites"]:
        click.echo(f"suite: {suite.source}", err=True)
    quiet_libraries()
    if context.obj.verbose:
        logging.getLogger("spath_eval").setLevel(logging.DEBUG)
    session = make_session(context)
    if not session.cases:
        click.echo("no cases selected", err=True)
        return NO_CASES
    if given["collect_only"]:
        ids = [case.id for case in session.cases]
        click.echo(json.dumps({"cases": ids}, indent=2) if given["as_json"] else "\n".join(ids))
        return 0
    return _run(session, comparison_with(given["baseline"], given["fail_on"]))


def make_session(context: click.Context, load: Load | None = None) -> Session:
    """The session that a context of `RunCommand` asks for; `load` loads its models instead of the plugins."""
    from spath_eval.collection import parse_limits, parse_sparsities, parse_tasks
    from spath_eval.session import Options, Session

    given = context.params
    by_default = ParameterSource.DEFAULT
    for name in MASK_REPLACES:
        if given["mask"] and context.get_parameter_source(name) is not by_default:
            raise UsageError(f"--mask takes the place of --{name.replace('_', '-')}: give one of them")
    sparsities = parse_sparsities(given["sparsity"])
    expert_sparsity = 0.0
    if given["expert_sparsity"] is not None:
        expert_sparsity, *more = parse_sparsities(given["expert_sparsity"])
        if more:
            raise UsageError("--expert-sparsity takes one value")
        if context.get_parameter_source("sparsity") is by_default:
            sparsities = (0.0,)
    texts = profile_texts(given["profile_text"])
    domains = split_list("--domain", given["domain"])
    everything = tuple(context.meta["registry"].domains)
    chosen = domains or everything
    tasks = {}
    if given["tasks"]:  # of which a suite may name more than are evaluated now
        by_suite = context.get_parameter_source("tasks") is ParameterSource.DEFAULT_MAP
        named = parse_tasks(given["tasks"], everything if by_suite else chosen)
        tasks = {domain: names for domain, names in named.items() if domain in chosen}
    options = Options(
        models=given["models"],
        domains=domains,
        strategies=split_list("--strategy", given["strategy"]),
        sparsities=sparsities,
        tasks=tasks,
        limit=parse_limits(given["limit"]) if given["limit"] else None,
        expert_sparsity=expert_sparsity,
        speed=not given["no_speed"],
        quality=not given["no_quality"],
        profile_text=texts,
        plugin={name: given[name] for name in context.meta["plugin"]},
        **{
            name: given[name]
            for name in (
                "arch",
                "sites",
                "revision",
                "mask",
                "execution",
                "cross",
                "noise_floor",
                "data_dir",
                "hub",
                "include_path",
                "num_fewshot",
                "apply_chat_template",
                "allow_code_execution",
                "seed",
                "keyword",
                "exitfirst",
                "device",
                "device_map",
                "dtype",
                "batch_size",
                "profile_tokens",
                "preservation_tokens",
                "allow_overlap",
                "output",
            )
        },
    )
    asked: dict[str, Any] = {"given": list(context.meta["given"])}
    if given["baseline"]:
        asked |= {"baseline": str(given["baseline"]), "fail_on": list(given["fail_on"])}
    if suites := context.meta["suites"]:
        paths = [{"path": str(suite.path)} if suite.path else {} for suite in suites]
        asked["suites"] = [path | {"settings": suite.settings} for path, suite in zip(paths, suites, strict=True)]
    return Session(options, context.meta["registry"], asked, load)


def prepare(registry: Registry, given: dict[str, Any]) -> tuple[Session, LoadedModel]:
    """For the commands that make one file of one model: a session, of which no case is run, and its model, loaded."""
    from spath_eval.collection import parse_sparsities

    sparsities = parse_sparsities(given.get("sparsity", "0.15"))
    texts = profile_texts(given["profile_text"])
    quiet_libraries()
    from spath_eval.records import check_writable
    from spath_eval.session import Options, Session

    options = Options(
        models=given["models"],
        domains=split_list("--domain", given["domain"]),
        strategies=split_list("--strategy", given.get("strategy")),
        sparsities=sparsities,
        profile_text=texts,
        **{
            name: given[name]
            for name in (
                "arch",
                "sites",
                "revision",
                "device",
                "device_map",
                "dtype",
                "batch_size",
                "profile_tokens",
                "seed",
            )
        },
    )
    session = Session(options, registry)
    if len(session.targets) != 1:
        raise UsageError("name one model")
    check_writable(given["output"])
    session.loaded = session.load(session.targets[0])
    return session, session.loaded


def _run(session: Session, conclude: Callable[[Path], Comparison] | None) -> int:
    from tqdm import tqdm

    from spath_eval.cli.compare import report
    from spath_eval.reports.console import case_line

    def on_start() -> None:
        for lines in session.registry.hook.spath_report_header(session=session):
            for line in [lines] if isinstance(lines, str) else lines:
                click.echo(line, err=True)

    colour = has_colour(sys.stderr)
    with tqdm(
        total=len(session.cases), unit="case", file=sys.stderr, disable=not sys.stderr.isatty(), leave=False
    ) as bar:

        def on_case(case: dict[str, Any]) -> None:
            bar.write(case_line(case, colour=colour), file=sys.stderr)
            bar.update()

        record = session.run(on_start, on_case)
    click.echo(rendered(session.registry.report("console"), record))
    click.echo(f"record: {session.output}", err=True)
    session.registry.hook.spath_terminal_summary(session=session, write=lambda line: click.echo(line, err=True))
    return max(session.exit_status, report(conclude(session.output)) if conclude else 0)


def comparison_with(baseline: Path | None, fail_on: Sequence[str]) -> Callable[[Path], Comparison] | None:
    """Compares a run's record with the baseline, which is read now: the run may write to its file.

    Raises `UsageError` for a margin that is none, and for margins without a baseline.
    """
    if baseline is None:
        if fail_on:
            raise UsageError("--fail-on judges by a record to compare with: give --baseline")
        return None
    from spath_eval.comparison import Evidence, compare, parse_margins

    margins, before = parse_margins(fail_on), Evidence.read(baseline)
    return lambda output: compare(before, Evidence.read(output), margins)
