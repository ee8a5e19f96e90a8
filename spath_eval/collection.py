"""Cases: what a run will measure, each with a stable id.

The id is `model/domain/strategy@sparsity`; it is the key for `-k`, for reports and for comparisons between records.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from spath_eval.contracts import Domain, Strategy, UsageError

if TYPE_CHECKING:
    from spath_eval.pathways import Execution

POOLED = "pooled"
"""Name of all of a run's domains together."""


@dataclass(frozen=True)
class Case:
    """One pathway of one model on one domain."""

    model: str
    """Name of the model: the family for a zoo model, else the last part of its reference."""
    domain: Domain
    """The domain whose mask it is."""
    strategy: Strategy
    sparsity: float
    """Requested share of FFN neurons to remove."""
    execution: Execution
    expert_sparsity: float = 0.0
    """Requested share of each layer's routed experts to remove whole."""
    other: Domain | None = None
    """The domain on which it is evaluated, where that is not the mask's."""

    @property
    def evaluated_on(self) -> Domain:
        """The domain on which it is evaluated."""
        return self.other or self.domain

    @property
    def is_own(self) -> bool:
        """Whether it is evaluated on the domain whose mask it is."""
        return self.other is None

    @property
    def mask_id(self) -> str:
        """The id, but for what does not change the mask: where it is evaluated and how it is executed."""
        return dataclasses.replace(self, other=None, execution="compact").id

    @property
    def id(self) -> str:
        """`model/domain/strategy@sparsity`, with `>` and the domain it is evaluated on where that is another one, and
        the options and the execution that are not the default."""
        domain = self.domain.name if self.other is None else f"{self.domain.name}>{self.other.name}"
        experts = f"+experts@{self.expert_sparsity:g}" if self.expert_sparsity else ""
        suffix = "" if self.execution == "compact" else f"[{self.execution}]"
        return f"{self.model}/{domain}/{spell(self.strategy)}@{self.sparsity:g}{experts}{suffix}"


def spell(strategy: Strategy) -> str:
    """The strategy as on the command line: its name and those options that are not the default."""
    changed = []
    for option in dataclasses.fields(strategy):
        value = getattr(strategy, option.name)
        if value != option.default:  # a file's folder would make the id differ between machines
            changed.append(f"{option.name}={value.name if isinstance(value, Path) else value}")
    return ":".join([strategy.name, *changed])


def collect(
    models: Sequence[str],
    domains: Sequence[Domain],
    strategies: Sequence[Strategy],
    sparsities: Sequence[float],
    execution: Execution,
    expert_sparsity: float = 0.0,
) -> list[Case]:
    """All combinations, by model, domain, sparsity and strategy, each once; token and prompt strategies run masked."""
    cases = [
        Case(model, domain, strategy, sparsity, execution if strategy.kind == "static" else "masked", expert_sparsity)
        for model in models
        for domain in domains
        for sparsity in sparsities
        for strategy in strategies
    ]
    return list({case.id: case for case in cases}.values())


def cross(cases: Sequence[Case], domains: Sequence[Domain]) -> list[Case]:
    """`cases`, and behind each what its mask does in the other `domains`; at the end the masks of all domains pooled.

    A strategy that reads no text of its domain chooses for no domain, and stays alone. One that compares domains has no
    pooled mask. Raises `UsageError` for fewer than two domains.
    """
    if len(domains) < 2:
        raise UsageError("--cross evaluates the masks of domains on each other: name two domains or more")
    crossed: list[Case] = []
    together: dict[str, Case] = {}
    everything = pooled(domains)
    for case in cases:
        crossed.append(case)
        if not (case.strategy.requires or case.strategy.needs_batches):
            continue
        crossed += [dataclasses.replace(case, other=domain) for domain in domains if domain != case.domain]
        if not case.strategy.all_domains:
            for domain in domains:
                pool = dataclasses.replace(case, domain=everything, other=domain)
                together[pool.id] = pool
    return crossed + list(together.values())


def pooled(domains: Sequence[Domain]) -> Domain:
    """Stands for `domains` together: the text of all of them, and no task."""

    def texts(split: str) -> list[str]:
        return [text for domain in domains for text in domain.texts(split)]

    return Domain(POOLED, texts, tasks=(), provenance=f"pooled: {', '.join(domain.name for domain in domains)}")


def keyword_filter(expression: str) -> Callable[[str], bool]:
    """pytest's `-k`: words that must be part of the id, ignoring case, joined by `and`, `or`, `not` and parentheses.

    Raises `UsageError` for what is no such expression.
    """
    tokens = re.findall(r"[()]|[^\s()]+", expression)
    code = [token if token in {"and", "or", "not", "(", ")"} else f"({token.lower()!r} in id)" for token in tokens]
    try:
        tree = ast.parse(" ".join(code), "-k", "eval")
        # to Python, two words in parentheses beside each other are a call, and empty parentheses a tuple
        if any(isinstance(node, ast.Call | ast.Tuple) for node in ast.walk(tree)):
            raise SyntaxError
    except (SyntaxError, MemoryError):
        raise UsageError(f"-k {expression!r}: expected words joined by and, or, not and parentheses") from None
    compiled = compile(tree, "-k", "eval")
    return lambda id: bool(eval(compiled, {"__builtins__": {}}, {"id": id.lower()}))


def parse_sparsities(text: str) -> tuple[float, ...]:
    """`0.05,0.15` as numbers. Raises `UsageError` for what lies outside 0 < sparsity < 1."""
    values = []
    for part in text.split(","):
        try:
            value = float(part)
        except ValueError:
            raise UsageError(
                f"sparsity {part!r} is not a number; it is the share of neurons to remove, e.g. 0.15"
            ) from None
        if not 0 < value < 1:
            raise UsageError(
                f"sparsity {part.strip()} is not between 0 and 1; it is the share of neurons to remove, e.g. 0.15"
            )
        values.append(value)
    return tuple(dict.fromkeys(values))


def parse_tasks(text: str, domains: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The tasks of each domain: `gsm8k,arc_easy` names those of all `domains`, `math=gsm8k,code=humaneval+mbpp` those
    of each domain, and a domain that is not named there has no entry.

    Raises `UsageError` for a mixture of the two, an unknown domain and an empty name.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UsageError(f"--tasks {text!r}: a name is empty; expected e.g. gsm8k,arc_easy or math=gsm8k")
    by_domain = ["=" in part for part in parts]
    if not any(by_domain):
        return {domain: tuple(dict.fromkeys(parts)) for domain in domains}
    if not all(by_domain):
        plain = parts[by_domain.index(False)]
        raise UsageError(f"--tasks {text!r}: {plain} has no domain while others have; several of one are math=a+b")
    tasks: dict[str, tuple[str, ...]] = {}
    for part in parts:
        domain, _, joined = part.partition("=")
        names = [name.strip() for name in joined.split("+")]
        domain = domain.strip()
        if domain not in domains:
            raise UsageError(f"--tasks {text!r}: unknown domain {domain!r}; chosen are {', '.join(domains)}")
        if domain in tasks:
            raise UsageError(f"--tasks {text!r}: domain {domain} comes twice; several tasks of one are {domain}=a+b")
        if not all(names):
            raise UsageError(f"--tasks {text!r}: a task of domain {domain} is empty; expected e.g. {domain}=a+b")
        tasks[domain] = tuple(dict.fromkeys(names))
    return tasks


@dataclass(frozen=True)
class Limits:
    """How many documents are evaluated."""

    default: int | None = None
    """Of a task without a limit of its own; none stands for all of them."""
    tasks: Mapping[str, int] = field(default_factory=dict)
    """By the name of a task, or of a group: `mmlu` is for `mmlu_anatomy` too."""

    def of(self, task: str) -> int | None:
        """The limit of a task: its own, else that of the longest name that it continues with `_`, else the default."""
        names = [name for name in self.tasks if task == name or task.startswith(f"{name}_")]
        return self.tasks[max(names, key=len)] if names else self.default


def parse_limits(text: str) -> Limits:
    """`50`, `50,mmlu=5` or `mmlu=5`. Raises `UsageError` for what is no number of at least 1, or comes twice."""
    limits: dict[str, int] = {}
    for part in text.split(","):
        name, equals, number = (piece.strip() for piece in part.rpartition("="))
        if not (number.isascii() and number.isdecimal() and int(number) >= 1) or bool(name) != bool(equals):
            raise UsageError(f"--limit {part.strip()!r}: expected a number of documents of at least 1, or TASK=N")
        if name in limits:
            raise UsageError(f"--limit {text!r}: {f'the limit of {name}' if name else 'the limit of all'} comes twice")
        limits[name] = int(number)
    return Limits(limits.pop("", None), limits)
