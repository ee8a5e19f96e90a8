"""Cases: what a run will measure, each with a stable id.

The id is `model/domain/strategy@sparsity`; it is the key for `-k`, for reports and for comparisons between records.
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spath_eval.contracts import Domain, Strategy, UsageError

if TYPE_CHECKING:
    from spath_eval.pathways import Execution


@dataclass(frozen=True)
class Case:
    """One pathway of one model on one domain."""

    model: str
    """Name of the model: the family for a zoo model, else the last part of its reference."""
    domain: Domain
    """The domain whose mask it is, and on which it is evaluated."""
    strategy: Strategy
    sparsity: float
    """Requested share of FFN neurons to remove."""
    execution: Execution
    expert_sparsity: float = 0.0
    """Requested share of each layer's routed experts to remove whole."""

    @property
    def id(self) -> str:
        """`model/domain/strategy@sparsity`, with the options and the execution that are not the default."""
        experts = f"+experts@{self.expert_sparsity:g}" if self.expert_sparsity else ""
        suffix = "" if self.execution == "compact" else f"[{self.execution}]"
        return f"{self.model}/{self.domain.name}/{spell(self.strategy)}@{self.sparsity:g}{experts}{suffix}"


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
