"""Discovery of plugins, and look-up of what they registered.

Every entry point of the group `spath_eval` is loaded by a loop of our own rather than pluggy's, so that whatever goes
wrong with one of them (it does not import, misspells a hook, registers a name that is taken) becomes a `PluginProblem`
that says whose fault it is. A plugin is accepted whole or not at all, and a broken one never stops the others.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import importlib.util
import inspect
import math
import re
import sys
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

import pluggy

from spath_eval import hookspecs
from spath_eval.contracts import CONTRACT_VERSION, Architecture, Domain, Report, Strategy, UsageError

GROUP = "spath_eval"
"""Entry-point group, and pluggy's project name."""

OWN_DISTRIBUTION = "spath-eval"

REGISTERING = {
    "spath_register_architectures": "architecture",
    "spath_register_domains": "domain",
    "spath_register_strategies": "strategy",
    "spath_register_reports": "report",
}
"""The hooks through which objects are registered, and the kind of object each takes."""

STRATEGY_METHODS = {"static": "select", "prompt": "select_prompt", "token": "keep"}
"""Kinds of strategy, and the method that each has to provide."""

HOOKS: Mapping[str, frozenset[str]] = {
    name: frozenset(inspect.signature(function).parameters)
    for name, function in vars(hookspecs).items()
    if pluggy.PluginManager(GROUP).parse_hookspec_opts(hookspecs, name)
}
"""Every hook with the names of its arguments."""


@dataclass(frozen=True)
class PluginInfo:
    """One plugin, whatever became of it."""

    name: str
    """Name of its entry point."""
    module: str
    distribution: str | None
    """The installed package it came with; none for a module named by `-p`."""
    version: str | None
    hooks: tuple[str, ...] = ()
    """The hooks it implements, where it is active."""
    provides: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Kind of object to the names it registered, where it is active."""
    status: Literal["active", "blocked", "broken"] = "active"

    @property
    def origin(self) -> str:
        """Distribution and version, for messages."""
        return _origin(self.distribution, self.version)


@dataclass(frozen=True)
class PluginProblem:
    """Why a plugin is not in use."""

    entry_point: str
    distribution: str | None
    version: str | None
    cause: str
    """One line."""

    def __str__(self) -> str:
        return f"plugin {self.entry_point!r} ({_origin(self.distribution, self.version)}): {self.cause}"


class Registry:
    """What the plugins offer. Made by `Registry.load`."""

    def __init__(self) -> None:
        self.architectures: dict[str, Architecture] = {}
        self.domains: dict[str, Domain] = {}
        self.strategies: dict[str, type[Strategy]] = {}
        self.reports: dict[str, Report] = {}
        self.plugins: list[PluginInfo] = []
        self.problems: list[PluginProblem] = []
        self._objects: dict[str, dict[str, Any]] = {
            "architecture": self.architectures,
            "domain": self.domains,
            "strategy": self.strategies,
            "report": self.reports,
        }
        self._owners: dict[tuple[str, str], PluginInfo] = {}
        self._manager = pluggy.PluginManager(GROUP)
        self._manager.add_hookspecs(hookspecs)

    @classmethod
    def load(cls, *, wanted: Sequence[str] = (), blocked: Sequence[str] = (), strict: bool = False) -> Registry:
        """Load every installed plugin.

        `wanted` names entry points, or modules to load as plugins, whose problems are fatal; `blocked` names those to
        leave out, by either name; `strict` makes every problem fatal. Raises `UsageError` for a fatal problem and for
        a name in `blocked` that no plugin has.
        """
        registry = cls()
        entry_points = list(_entry_points(registry.problems))
        names = {name for entry_point in entry_points for name in _names(entry_point)}
        for name in blocked:
            if name not in names:
                there_are = choices(name, {point.name for point in entry_points})
                raise UsageError(f"there is no plugin {name!r} to block: {there_are}")
        for name in wanted:
            if name in blocked:
                raise UsageError(f"plugin {name!r} is both asked for and blocked")
            if name not in names:
                entry_points.append(importlib.metadata.EntryPoint(name=name, value=name, group=GROUP))
                names.add(name)

        fatal = []
        for entry_point in entry_points:
            if _names(entry_point) & set(blocked):
                registry.plugins.append(_info(entry_point, status="blocked"))
                continue
            problem = registry._load(entry_point)
            if problem and _names(entry_point) & set(wanted):
                fatal.append(problem)
        if strict:
            fatal = registry.problems
        if fatal:
            raise UsageError("; ".join(map(str, fatal)))
        return registry

    @property
    def hook(self) -> Any:
        """Pluggy's relay: `registry.hook.spath_run_case(case=case, session=session)`."""
        return self._manager.hook

    def owner(self, kind: str, name: str) -> PluginInfo:
        """The plugin that registered an object of `kind` (`architecture`, `domain`, `strategy`, `report`)."""
        return self._owners[kind, name]

    def architecture(self, name: str) -> Architecture:
        """The architecture of that name. Raises `UsageError` where there is none."""
        return cast(Architecture, self._look_up("architecture", name))

    def domain(self, name: str) -> Domain:
        """The domain of that name. Raises `UsageError` where there is none."""
        return cast(Domain, self._look_up("domain", name))

    def strategy(self, name: str) -> type[Strategy]:
        """The strategy class of that name. Raises `UsageError` where there is none."""
        return cast(type[Strategy], self._look_up("strategy", name))

    def report(self, name: str) -> Report:
        """The report of that name. Raises `UsageError` where there is none."""
        return cast(Report, self._look_up("report", name))

    def parse_strategy(self, text: str) -> Strategy:
        """The strategy that `NAME[:KEY=VALUE[,KEY=VALUE...]]` describes; `:` may stand for the commas too.

        Raises `UsageError` for an unknown name or key, a value that does not fit its field, or values that the
        strategy itself refuses.
        """
        name, colon, options = text.partition(":")
        strategy = self.strategy(name)
        pairs = re.split("[:,]", options) if colon else []
        try:
            return strategy(**_parse_options(strategy, pairs))
        except (TypeError, ValueError) as error:
            raise UsageError(f"strategy {text!r}: {_one_line(error)}") from error

    def _look_up(self, kind: str, name: str) -> object:
        objects = self._objects[kind]
        if name in objects:
            return objects[name]
        message = f"unknown {kind} {name!r}: {choices(name, objects)}"
        causes = {(problem.entry_point, problem.distribution): problem.cause for problem in self.problems}
        for plugin in self.plugins:
            if plugin.status != "active" and _seems_to_offer(plugin, name):
                cause = "is blocked"
                if plugin.status == "broken":
                    cause = f"failed: {causes[plugin.name, plugin.distribution]}"
                message += f"; plugin {plugin.name!r} ({plugin.origin}) would have offered it but {cause}"
        raise UsageError(message)

    def _load(self, entry_point: importlib.metadata.EntryPoint) -> PluginProblem | None:
        """Load one plugin whole, or leave nothing of it but a problem, which is returned."""
        plugin = None
        try:
            self._refuse_duplicate(entry_point)
            plugin = entry_point.load()
            hooks = self._check_plugin(entry_point, plugin)
            self._manager.register(plugin, entry_point.name)
            offers = self._collect(plugin, hooks)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: importing a script by mistake must not end the program
            if plugin is not None and self._manager.get_name(plugin) == entry_point.name:
                self._manager.unregister(name=entry_point.name)
            cause = str(error) if isinstance(error, Refused) else _one_line(error)
            broken = _info(entry_point, status="broken")
            problem = PluginProblem(broken.name, broken.distribution, broken.version, cause)
            self.plugins.append(broken)
            self.problems.append(problem)
            return problem

        provides = {kind: tuple(names) for kind, names in offers.items() if names}
        info = _info(entry_point, hooks=hooks, provides=provides)
        self.plugins.append(info)
        for kind, objects in offers.items():
            self._objects[kind].update(objects)
            self._owners.update({(kind, name): info for name in objects})
        return None

    def _refuse_duplicate(self, entry_point: importlib.metadata.EntryPoint) -> None:
        for other in self.plugins:
            if other.status == "active" and entry_point.name == other.name:
                raise Refused(f"the plugin name is taken by module {other.module} of {other.origin}")
            if other.status == "active" and entry_point.value == other.module:
                raise Refused(f"the module is loaded already, as plugin {other.name!r} of {other.origin}")

    def _check_plugin(self, entry_point: importlib.metadata.EntryPoint, plugin: object) -> tuple[str, ...]:
        """The hooks that a plugin implements. Raises `Refused` where it does not keep to the contract."""
        module = plugin if isinstance(plugin, types.ModuleType) else sys.modules.get(entry_point.module)
        version = getattr(module, "SPATH_CONTRACT_VERSION", CONTRACT_VERSION)
        if version != CONTRACT_VERSION:
            raise Refused(
                f"it is for version {version!r} of the plugin contract, and this is version {CONTRACT_VERSION}"
            )

        hooks = []
        for attribute in dir(plugin):
            options = self._manager.parse_hookimpl_opts(plugin, attribute)
            if options is None:
                continue
            hook = options.get("specname") or attribute
            if hook in HOOKS:
                hooks.append(hook)
                _check_arguments(hook, getattr(plugin, attribute))
            elif not options.get("optionalhook"):
                raise Refused(f"there is no hook {hook}: {choices(hook, HOOKS)}")
        if not hooks:
            raise Refused("it implements no hook; mark the functions that do with @spath_eval.hookimpl")
        return tuple(hooks)

    def _collect(self, plugin: object, hooks: Collection[str]) -> dict[str, dict[str, object]]:
        """Call the registering hooks of one plugin; kind to name to object."""
        offers: dict[str, dict[str, object]] = {kind: {} for kind in REGISTERING.values()}
        others = self._manager.get_plugins() - {plugin}
        for hook in sorted(set(hooks) & set(REGISTERING)):
            kind = REGISTERING[hook]
            try:
                self._manager.subset_hook_caller(hook, others)(register=partial(self._offer, kind, offers[kind]))
            except Refused:
                raise
            except Exception as error:
                raise Refused(f"{hook} raised {_one_line(error)}") from error
        return offers

    def _offer(self, kind: str, offers: dict[str, object], offered: object) -> None:
        name = check_object(kind, offered)
        if name in offers:
            raise Refused(f"it registers {kind} {name!r} twice")
        if (kind, name) in self._owners:
            holder = self.owner(kind, name)
            raise Refused(f"{kind} {name!r} is taken by plugin {holder.name!r} ({holder.origin})")
        offers[name] = offered


class Refused(Exception):
    """The cause of a plugin problem, said already as it is to be shown."""


def _entry_points(problems: list[PluginProblem]) -> Iterator[importlib.metadata.EntryPoint]:
    """The entry points of the group, our own distribution's first, the others by distribution and name.

    `importlib.metadata.entry_points` would raise for all of them where one distribution's file cannot be parsed.
    """
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for distribution in importlib.metadata.distributions():
        name = version = None
        try:
            # most distributions are passed over unparsed, which keeps start-up short
            if GROUP not in (distribution.read_text("entry_points.txt") or ""):
                continue
            name, version = distribution.metadata["Name"], distribution.version
            if _normal(name) not in found:  # else shadowed by one earlier on the path, as in an import
                points = distribution.entry_points.select(group=GROUP)
                found[_normal(name)] = sorted(points, key=lambda point: point.name)
        except Exception as error:
            problems.append(PluginProblem("*", name, version, f"its entry points cannot be read: {_one_line(error)}"))
    for name in sorted(found, key=lambda name: (name != OWN_DISTRIBUTION, name)):
        yield from found[name]


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _origin(distribution: str | None, version: str | None) -> str:
    return f"{distribution} {version}" if distribution else "no distribution"


def _names(entry_point: importlib.metadata.EntryPoint) -> set[str]:
    """The names by which a user may call a plugin: entry point and module."""
    return {entry_point.name, entry_point.value}


def _info(
    entry_point: importlib.metadata.EntryPoint,
    *,
    hooks: tuple[str, ...] = (),
    provides: Mapping[str, tuple[str, ...]] | None = None,
    status: Literal["active", "blocked", "broken"] = "active",
) -> PluginInfo:
    distribution = entry_point.dist
    name, version = (distribution.metadata["Name"], distribution.version) if distribution else (None, None)
    return PluginInfo(entry_point.name, entry_point.value, name, version, hooks, provides or {}, status)


def _check_arguments(hook: str, function: Any) -> None:
    for name, parameter in inspect.signature(function).parameters.items():
        passed = parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is parameter.empty
        if passed and name not in HOOKS[hook]:
            raise Refused(f"{hook} has no argument {name!r}: {choices(name, HOOKS[hook])}")


def check_object(kind: str, offered: Any) -> str:
    """The name of an object of that kind. Raises `Refused` where it is not what the contract describes."""
    if kind == "strategy":
        _check_strategy(offered)
    elif kind == "report":
        if not callable(getattr(offered, "render", None)):
            raise Refused(f"{offered!r} is not a report: it has no method render")
    else:
        expected = {"architecture": Architecture, "domain": Domain}[kind]
        if not isinstance(offered, expected):
            raise Refused(f"{offered!r} is not a spath_eval.{expected.__name__}")
    name = getattr(offered, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+-]*", name):
        raise Refused(f"{name!r} cannot name the {kind} {offered!r}: letters, digits and . + - _ make a name")
    return name


def _check_strategy(offered: Any) -> None:
    if not (inspect.isclass(offered) and issubclass(offered, Strategy)):
        raise Refused(f"{offered!r} is not a class derived from spath_eval.Strategy")
    label = f"strategy class {offered.__name__}"
    if "__dataclass_fields__" not in vars(offered):
        raise Refused(f"{label} is not marked with @dataclass(frozen=True)")
    if offered.kind not in STRATEGY_METHODS:
        raise Refused(f"{label} is of unknown kind {offered.kind!r}: {choices(offered.kind, STRATEGY_METHODS)}")
    method = STRATEGY_METHODS[offered.kind]
    if getattr(offered, method) is getattr(Strategy, method):
        raise Refused(f"{label} is of kind {offered.kind} and does not define {method}()")
    for field, annotation in _options(offered).items():
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise Refused(f"option {field.name} of {label} has no default")
        texts = get_origin(annotation) is Literal and all(isinstance(value, str) for value in get_args(annotation))
        if annotation not in (int, float, bool, str) and not texts:
            raise Refused(f"option {field.name} of {label} is not an int, float, bool, str or Literal of strings")


def _options(strategy: type[Strategy]) -> dict[dataclasses.Field[Any], Any]:
    """The fields of a strategy with their annotations resolved."""
    annotations = get_type_hints(strategy)
    return {field: annotations[field.name] for field in dataclasses.fields(strategy)}


def _parse_options(strategy: type[Strategy], pairs: Sequence[str]) -> dict[str, object]:
    annotations = {field.name: annotation for field, annotation in _options(strategy).items()}
    values: dict[str, object] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if key not in annotations:
            raise UsageError(f"strategy {strategy.name!r} has no option {key!r}: {choices(key, annotations)}")
        if not equals:
            raise UsageError(f"option {key} of strategy {strategy.name!r} lacks its value: write {key}=VALUE")
        if key in values:
            raise UsageError(f"option {key} of strategy {strategy.name!r} is given twice")
        try:
            values[key] = _parse_value(value, annotations[key])
        except ValueError as error:
            raise UsageError(f"option {key} of strategy {strategy.name!r} must be {error}, not {value!r}") from None
    return values


def _parse_value(text: str, annotation: Any) -> object:
    """Convert to an option's type. Raises `ValueError` saying what the text should have been."""
    if annotation is str:
        return text
    if annotation is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("true or false")
        return text.lower() == "true"
    if annotation in (int, float):
        expected = "an integer" if annotation is int else "a finite number"
        try:
            number = annotation(text)
        except ValueError:
            raise ValueError(expected) from None
        if not math.isfinite(number):
            raise ValueError(expected)
        return number
    if text not in get_args(annotation):
        raise ValueError(" or ".join(get_args(annotation)))
    return text


def choices(name: str, names: Collection[str]) -> str:
    """What there is, and which of it may have been meant."""
    if not names:
        return "there are none"
    text = f"there {'is' if len(names) == 1 else 'are'} {', '.join(sorted(names))}"
    close = difflib.get_close_matches(name, sorted(names), n=1)
    return f"{text}. Did you mean {close[0]}?" if close else text


def _seems_to_offer(plugin: PluginInfo, name: str) -> bool:
    """Whether a plugin that was not loaded would have registered `name`, as far as its name and its source tell."""
    if name == plugin.name or name in re.split(r"[-_.]", plugin.name):
        return True
    try:
        spec = importlib.util.find_spec(plugin.module.partition(":")[0])
        source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
    except (Exception, SystemExit):  # a parent package may fail in any way, and did once already
        return False
    return bool(name) and (f'"{name}"' in source or f"'{name}'" in source)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
