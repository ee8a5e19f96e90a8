"""The plugin contract: every hook there is. Group and project name of pluggy: `spath_eval`."""

from __future__ import annotations

from collections.abc import MutableSequence
from typing import TYPE_CHECKING, Any

import pluggy

from spath_eval.contracts import LoadRequest, Register, Write

if TYPE_CHECKING:
    import click
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spath_eval.collection import Case
    from spath_eval.session import Session

hookspec = pluggy.HookspecMarker("spath_eval")
hookimpl = pluggy.HookimplMarker("spath_eval")


@hookspec
def spath_register_architectures(register: Register) -> None:
    """Register model families: call `register(Architecture(...))` for each."""


@hookspec
def spath_register_domains(register: Register) -> None:
    """Register domains: call `register(Domain(...))` for each."""


@hookspec
def spath_register_strategies(register: Register) -> None:
    """Register sparsity strategies: call `register(StrategySubclass)` for each."""


@hookspec
def spath_register_reports(register: Register) -> None:
    """Register reports: call `register(report)` for each."""


@hookspec
def spath_addoption(group: click.Command) -> None:
    """Add options to `spath-eval run`: append `click.Option`s to `group.params`.

    Their values are in `session.options.plugin` by parameter name.
    """


@hookspec(firstresult=True)
def spath_load_model(request: LoadRequest) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
    """Load the model and tokenizer of `request`. Stops at first non-None result. Raise `UsageError` for a bad model."""


@hookspec
def spath_collection_modifyitems(cases: MutableSequence[Case], session: Session) -> None:
    """Add, remove or reorder the collected cases, in place, before `-k` selects among them."""


@hookspec(firstresult=True)
def spath_run_case(case: Case, session: Session) -> dict[str, Any] | None:
    """Run one case and return its part of the record. Stops at first non-None result. A raise makes it an error."""


@hookspec(firstresult=True)
def spath_measure_speed(case: Case, session: Session) -> list[dict[str, Any]] | None:
    """Measure the speed of `session.pathway`, entries as in the record. Stops at first non-None result.

    An empty list says that there is nothing to measure.
    """


@hookspec
def spath_update_record(record: dict[str, Any]) -> None:
    """Add to the record, in place, before it is written."""


@hookspec
def spath_report_header(session: Session) -> str | list[str] | None:
    """Lines to print before the first case."""


@hookspec
def spath_terminal_summary(session: Session, write: Write) -> None:
    """Print to the end of the run with `write(line)`."""
