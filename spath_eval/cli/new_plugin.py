"""`spath-eval new-plugin`: a package to start a plugin from, whole and tested."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import click

import spath_eval
from spath_eval.cli import load_registry, plugin_options
from spath_eval.contracts import CONTRACT_VERSION, UsageError
from spath_eval.registry import REGISTERING, Registry

TEMPLATES = Path(spath_eval.__file__).parent / "templates"
SHARED = {
    "README.md": "README.md",
    "setup.cfg": "setup.cfg",
    "pyproject.toml": "pyproject.toml",
    ".github/workflows/test.yml": "test.yml",
}
"""What every package has: file to template, without the suffix `.jinja`."""
MODULE = {"{module}.py": "plugin.py", "tests/test_{module}.py": "test.py"}
PACKAGE = {
    "{module}/__init__.py": "plugin.py",
    "{module}/texts/profile.txt": "profile.txt",
    "{module}/texts/heldout.txt": "heldout.txt",
    "{module}/tasks/{task}.yaml": "choice.yaml",
    "{module}/tasks/items.jsonl": "items.jsonl",
    "tests/test_{module}.py": "test.py",
}
FILES = {"strategy": MODULE, "architecture": MODULE, "domain": PACKAGE, "report": MODULE}
"""What the package of each kind has besides: file to template in the folder of the kind."""


@click.command()
@click.argument("name")
@click.option("--kind", required=True, type=click.Choice(list(FILES)), help="What the plugin registers as NAME.")
@plugin_options
def command(name: str, kind: str, plugin_names: tuple[str, ...], strict_plugins: bool) -> None:
    """Write the package of a new plugin to ./NAME: module, tests, README and CI file.

    It can be installed and passes its tests as it is: an example to replace, step by step, by what is meant.

    \b
    Example:
      spath-eval new-plugin quietest --kind strategy
    """
    _check_name(name, kind, load_registry(plugin_names, strict_plugins))
    if os.path.lexists(name):
        raise UsageError(f"{name} exists already in this folder: choose another name, or remove it")
    try:
        for path, text in sorted(_package(name, kind).items()):
            file = Path(name, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            click.echo(file.as_posix())
    except OSError as error:
        raise UsageError(f"cannot write {name}: {error.strerror or error}") from error
    click.echo(f"next: cd {name} && python -m pip install --editable '.[test]' && python -m pytest", err=True)


def _check_name(name: str, kind: str, registry: Registry) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*", name):
        raise UsageError(f"{name!r} cannot name a package: write small letters and digits, joined by - or _")
    taken = {plugin.name: plugin for plugin in registry.plugins}
    for plugin in registry.plugins:
        taken |= dict.fromkeys(plugin.provides.get(kind, ()), plugin)
    if holder := taken.get(name):
        raise UsageError(f"the name {name!r} is taken by plugin {holder.name!r} ({holder.origin}): choose another one")


def _package(name: str, kind: str) -> dict[str, str]:
    """The files of the package: path to text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    snake = name.replace("-", "_")
    names: dict[str, Any] = {
        "name": name,
        "kind": kind,
        "module": f"spath_eval_{snake}",
        "task": f"{snake}_choice",
        "class_name": "".join(map(str.capitalize, snake.split("_"))) + kind.capitalize(),
        "distribution": f"spath-eval-{name.replace('_', '-')}",
        "hook": next(hook for hook, registered in REGISTERING.items() if registered == kind),
        "contract": CONTRACT_VERSION,
        "version": spath_eval.__version__,
    }
    sources = SHARED | {path: f"{kind}/{template}" for path, template in FILES[kind].items()}
    return {
        path.format(**names): environment.get_template(f"{template}.jinja").render(names)
        for path, template in sources.items()
    }
