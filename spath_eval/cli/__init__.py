"""The command line: one module of this package for each command, imported only when that command is called.

`main` is what the console script runs. It turns every outcome into one of the exit codes below, and every error into
one line on stderr.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click

import spath_eval
from spath_eval.contracts import UsageError
from spath_eval.registry import Registry, choices

OK, FAILED, INTERRUPTED, INTERNAL_ERROR, USAGE_ERROR, NO_CASES = range(6)
COMPLETE = "_SPATH_EVAL_COMPLETE"
"""The variable through which a shell asks how a line can go on: click's own protocol."""

COMMANDS = {
    "run": "Evaluate strategies on a model: what they keep of its quality, and how much faster it really runs.",
    "compare": "Compare the records BASELINE and CANDIDATE: what changed, and what became worse.",
    "baseline": "Keep a record as the one that later runs are compared with.",
    "profile": "Measure how strongly each neuron responds to a domain.",
    "mask": "Write the mask that a strategy selects.",
    "speed": "Measure how much faster a model or a published model's shape runs without a share of its FFN neurons.",
    "findings": 'Measure the tables of the "Sparse pathways" paper, and print them beside the published values.',
    "show": "Print the tables of a run again, from its record.",
    "report": "Turn a record into a report: a page, tables, rows or test results.",
    "models": "List the model families: types, FFN shapes, reference shapes, and small checkpoints with their scores.",
    "plugins": "List the installed plugins, what each provides, and what is wrong with any.",
    "new-plugin": "Write the package of a new plugin to ./NAME: module, tests, README and CI file.",
}
"""Commands and the first lines of their help, which stand here so that listing them imports none."""

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass
class _Settings:
    """What `main` has to know of the arguments, even after a command has raised."""

    verbose: bool = False


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"{__name__}.{cmd_name.replace('-', '_')}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            raise UsageError(f"unknown command {name!r}: {choices(name, COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _set_verbose(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.ensure_object(_Settings).verbose = True


_verbose_option = click.option(
    "-v", "--verbose", is_flag=True, expose_value=False, callback=_set_verbose, help="Show tracebacks of errors."
)


@click.group(cls=_LazyGroup, invoke_without_command=True)
@click.version_option(spath_eval.__version__, prog_name="spath-eval")
@_verbose_option
@click.pass_context
def group(ctx: click.Context) -> None:
    """What happens to a language model when it skips the FFN neurons that a domain does not need.

    \b
    Exit status:
      0  fine
      1  a case failed or errored
      2  interrupted
      3  internal error
      4  usage or plugin error
      5  no cases selected
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def plugin_options(command: Command) -> Command:
    """Give a command the options of all that load plugins: `-p` and `--strict-plugins`, and `-v`.

    They arrive as `plugin_names: tuple[str, ...]` and `strict_plugins: bool`, to be handed to `load_registry`.
    """
    command = _verbose_option(command)
    command = click.option("--strict-plugins", is_flag=True, help="Make every plugin problem an error.")(command)
    return click.option(
        "-p",
        "plugin_names",
        metavar="NAME",
        multiple=True,
        help="Insist on the plugin NAME, or load the module NAME as one; no:NAME leaves a plugin out. Repeatable.",
    )(command)


def load_registry(plugin_names: Sequence[str], strict_plugins: bool, *, warn: bool = True) -> Registry:
    """The registry that the options of `plugin_options` ask for; each problem is a warning on stderr.

    Raises `UsageError` for a problem with a plugin asked for by name, and for any where `strict_plugins`.
    """
    blocked = [name.removeprefix("no:") for name in plugin_names if name.startswith("no:")]
    wanted = [name for name in plugin_names if not name.startswith("no:")]
    if wanted and os.getcwd() not in sys.path:  # last, so that nothing there can stand in for an installed module
        sys.path.append(os.getcwd())
    registry = Registry.load(wanted=wanted, blocked=blocked, strict=strict_plugins)
    if warn:
        for problem in registry.problems:
            click.echo(f"warning: {problem}", err=True)
    return registry


def main(argv: Sequence[str] | None = None) -> int:
    """Run `spath-eval` with `argv` (by default the process's arguments) and return its exit status."""
    settings = _Settings()
    if instruction := os.environ.get(COMPLETE):
        from click.shell_completion import shell_complete

        return shell_complete(group, {"obj": settings}, "spath-eval", COMPLETE, instruction)
    try:
        # click's own main would print and exit for some errors with codes that are not ours
        with group.make_context("spath-eval", list(sys.argv[1:] if argv is None else argv), obj=settings) as ctx:
            status = group.invoke(ctx)
        sys.stdout.flush()
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        _discard_stdout()
        return INTERRUPTED
    except click.ClickException as error:
        return _fail(f"error: {explained(error)}", USAGE_ERROR, settings)
    except UsageError as error:
        return _fail(f"error: {error}", USAGE_ERROR, settings)
    except (Exception, SystemExit) as error:
        hint = "" if settings.verbose else " (run with -v for the traceback)"
        return _fail(f"internal error: {type(error).__name__}: {error}{hint}", INTERNAL_ERROR, settings)
    return status or OK


def explained(error: click.ClickException) -> str:
    """What click says is wrong; of a choice that there is not, with the nearest one that there is."""
    message = error.format_message()
    parameter = error.param if isinstance(error, click.BadParameter) else None
    if parameter is not None and isinstance(parameter.type, click.Choice):
        value = re.match("'(.*)' is not", error.message)
        close = difflib.get_close_matches(value[1], map(str, parameter.type.choices), n=1) if value else []
        message += f" Did you mean {close[0]}?" if close else ""
    return message


def _fail(message: str, status: int, settings: _Settings | None = None) -> int:
    """Say why on one line of stderr, below the traceback where that is wanted."""
    if settings and settings.verbose:
        traceback.print_exc()
    click.echo(" ".join(message.split()), err=True)
    return status


def _discard_stdout() -> None:
    """The reader of our output has gone: let the interpreter's last flush go nowhere rather than complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
