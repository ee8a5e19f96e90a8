"""Suite files: the options of `spath-eval run` that a team keeps, in TOML.

Keys are the long names of options, with dashes or underscores: at the top level of a file of its own, or in the table
`[tool.spath-eval]` of a pyproject.toml. Lists stand for commas and for options that are repeated, tables for
`DOMAIN=...`. All of it is handed to click as defaults, so that whatever checks the command line checks it too, and the
command line overrides it key by key. Relative paths are relative to the file.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from spath_eval.contracts import UsageError

PROJECT = "pyproject.toml"
TABLE = "spath-eval"
"""Name of the table below `tool` in such a file."""
KEYS = {"plugin_names": "plugins"}
"""Keys of options that have no long name, where they differ from the parameter's."""
NO_KEYS = {"as_json", "collect_only", "config", "exitfirst", "strict_plugins"}
"""Parameters that say how one call goes, and not what is evaluated."""
COMMAS = {"domain", "limit", "sparsity", "strategy", "tasks"}
"""Options that take several values by commas."""
TABLES = {"fail_on": ":", "limit": "=", "profile_text": "=", "tasks": "="}
"""Options that take pairs, and what stands between the two."""
NUMBERS = {"expert_sparsity", "limit", "sparsity"}
"""Options that hold numbers, and text for the command line's sake."""


@dataclass(frozen=True)
class Suite:
    """Options by key, not checked yet."""

    settings: Mapping[str, Any]
    source: str
    """What messages call it."""
    folder: Path
    """What relative paths are relative to."""
    path: Path | None = None
    """The file it was read from."""

    @classmethod
    def read(cls, path: Path) -> Suite:
        """The suite in a TOML file. Raises `UsageError` where there is none."""
        content = _load(path)
        if path.name == PROJECT:
            if TABLE not in content.get("tool", {}):
                raise UsageError(f"{path} has no table [tool.{TABLE}]")
            content = content["tool"][TABLE]
            if not isinstance(content, dict):
                raise UsageError(f"{path}: tool.{TABLE} is {content!r}: expected a table")
        return cls(content, str(path), path.parent, path)

    @classmethod
    def find(cls) -> Suite | None:
        """The suite in the working directory's pyproject.toml, if it has one. Raises `UsageError` as `read` does."""
        path = Path(PROJECT)
        # a file that does not mention us may have any fault
        mentioned = path.is_file() and TABLE.encode() in path.read_bytes()
        return cls.read(path) if mentioned and TABLE in _load(path).get("tool", {}) else None

    @property
    def plugins(self) -> list[str]:
        """The plugins that it names. Raises `UsageError` where that is no list of names."""
        names = self.settings.get("plugins", [])
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UsageError(f"{self.source}: plugins is {names!r}: expected text or a list")
        return names

    def defaults(self, parameters: Iterable[click.Parameter]) -> dict[str, Any]:
        """The settings as click's `default_map`: parameter name to value.

        Raises `UsageError` for a key that is no option's and for a value of the wrong type.
        """
        options = {key_of(one): one for one in parameters if isinstance(one, click.Option) and one.name not in NO_KEYS}
        found: dict[str, Any] = {}
        for given, value in self.settings.items():
            key = given.replace("-", "_")
            if key not in options:
                raise UsageError(f"{self.source}: unknown key {given!r}: {_nearest(key, options)}")
            option = options[key]
            assert option.name is not None
            if option.name in found:
                raise UsageError(f"{self.source}: {key} comes twice, with a dash and with an underscore")
            found[option.name] = self._value(key, option, value)
        return found

    def _value(self, key: str, option: click.Option, value: Any) -> Any:
        """A value in the form in which click takes it."""
        types, expected = _form(key, option)
        several = option.multiple or option.nargs != 1
        if several or key in COMMAS:
            expected += " or a list"
        if key in TABLES:
            expected += " or a table"
        items = [value]
        if isinstance(value, dict) and key in TABLES:
            items = list(_pairs(value, TABLES[key]))
            types = (str,)
        elif isinstance(value, list) and (several or key in COMMAS):
            items = value
        for item in items:
            if not isinstance(item, types) or (isinstance(item, bool) and bool not in types):
                raise UsageError(f"{self.source}: {key} is {value!r}: expected {expected}")
        items = [self._located(key, option, item) for item in items]
        if several:
            return items
        return ",".join(map(str, items)) if key in COMMAS else items[0]

    def _located(self, key: str, option: click.Option, item: Any) -> Any:
        """A path beside the suite, where `item` is a relative path; else `item`."""
        if key == "model":
            path = self.folder / item
            return str(path) if path.exists() or item.startswith(".") or item.endswith(".gguf") else item
        if key == "profile_text":
            domain, equals, text = item.partition("=")
            return item if not text or text.startswith("hub:") else f"{domain}{equals}{self.folder / text}"
        return str(self.folder / item) if isinstance(option.type, click.Path) else item


def _load(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not TOML: {error}") from error


def key_of(option: click.Option) -> str:
    """What a suite calls an option: its first long name, with underscores."""
    assert option.name is not None
    long = [name for name in option.opts if name.startswith("--")]
    return long[0].lstrip("-").replace("-", "_") if long else KEYS.get(option.name, option.name)


def _form(key: str, option: click.Option) -> tuple[tuple[type, ...], str]:
    """The types that a value may have, and what to call them."""
    if option.is_flag and option.is_bool_flag:
        return (bool,), "true or false"
    if isinstance(option.type, click.types.IntParamType):
        return (int,), "an integer"
    if isinstance(option.type, click.types.FloatParamType):
        return (int, float), "a number"
    return ((int, float, str), "a number or text") if key in NUMBERS else ((str,), "text")


def _pairs(table: Mapping[str, Any], between: str, start: str = "") -> Iterator[Any]:
    """The pairs of a table as on the command line; a value that has no form there comes as it is, to be refused."""
    for name, value in table.items():
        if isinstance(value, dict):  # `speed.decode` without quotes
            yield from _pairs(value, between, f"{start}{name}.")
        elif isinstance(value, list) and all(isinstance(part, str) for part in value):
            yield f"{start}{name}{between}{'+'.join(value)}"
        elif isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
            yield f"{start}{name}{between}{value}"
        else:
            yield value


def _nearest(key: str, keys: Iterable[str]) -> str:
    """Which key may have been meant, or all that there are."""
    keys = sorted(keys)
    close = difflib.get_close_matches(key, keys, n=1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(keys)}"
