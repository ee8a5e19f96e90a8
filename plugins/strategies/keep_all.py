"""Control: remove nothing, which must change nothing at all."""

from dataclasses import dataclass
from typing import ClassVar

from spath_eval import Strategy, hookimpl


@dataclass(frozen=True)
class KeepAll(Strategy):
    """Removes nothing, whatever the budget."""

    name: ClassVar[str] = "keep-all"
    control: ClassVar[bool] = True

    def select(self, context):
        from spath_eval.masks import keep_all

        return keep_all(list(context.sites.values()))


@hookimpl
def spath_register_strategies(register):
    register(KeepAll)
