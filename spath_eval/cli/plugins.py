"""`spath-eval plugins`: what is installed, what it provides, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Sequence

import click

from spath_eval.cli import load_registry, plugin_options
from spath_eval.cli.terminal import columns
from spath_eval.contracts import CONTRACT_VERSION, UsageError
from spath_eval.registry import HOOKS, REGISTERING, PluginInfo, PluginProblem, choices


@click.command("plugins")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--hook", metavar="HOOK", help="Only plugins that implement HOOK, with or without its prefix spath_.")
@plugin_options
def command(as_json: bool, hook: str | None, plugin_names: tuple[str, ...], strict_plugins: bool) -> None:
    """List the installed plugins, what each provides, and what is wrong with any."""
    name = hook and _hook_name(hook)
    registry = load_registry(plugin_names, strict_plugins, warn=False)
    plugins = [plugin for plugin in registry.plugins if name is None or name in plugin.hooks]
    click.echo(_as_json(plugins, registry.problems) if as_json else _as_text(plugins, registry.problems))


def _hook_name(hook: str) -> str:
    for name in (hook, f"spath_{hook}"):
        if name in HOOKS:
            return name
    prefixed = hook if hook.startswith("spath_") else f"spath_{hook}"
    raise UsageError(f"there is no hook {hook!r}: {choices(prefixed, HOOKS)}")


def _as_json(plugins: Sequence[PluginInfo], problems: Sequence[PluginProblem]) -> str:
    content = {
        "contract_version": CONTRACT_VERSION,
        "plugins": [vars(plugin) for plugin in plugins],
        "problems": [vars(problem) for problem in problems],
    }
    return json.dumps(content, indent=2)


def _as_text(plugins: Sequence[PluginInfo], problems: Sequence[PluginProblem]) -> str:
    from tabulate import tabulate

    header = ("plugin", "distribution", "version")
    about = [(plugin.name, plugin.distribution or "-", plugin.version or "-") for plugin in plugins]
    # tabulate makes a column at least two wider than its header
    taken = sum(max([len(title) + 2, *map(len, column)]) + 2 for title, *column in zip(header, *about, strict=True))
    text = tabulate(
        [(*row, _summary(plugin)) for row, plugin in zip(about, plugins, strict=True)],
        headers=(*header, "provides"),
        disable_numparse=True,
        maxcolwidths=[None, None, None, max(20, columns() - taken)],
    )
    if problems:
        text += "\n\nproblems:\n" + "\n".join(f"  {problem}" for problem in problems)
    return text


def _summary(plugin: PluginInfo) -> str:
    """What the plugin provides: objects by kind, and the hooks it implements beside those that register objects."""
    if plugin.status != "active":
        return f"({plugin.status})"
    parts = [f"{kind} {', '.join(names)}" for kind, names in plugin.provides.items()]
    hooks = [hook.removeprefix("spath_") for hook in plugin.hooks if hook not in REGISTERING]
    if hooks:
        parts.append(f"hooks {', '.join(hooks)}")
    return "; ".join(parts) or "-"
