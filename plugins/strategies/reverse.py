"""Control: remove the most active neurons, which must hurt more than removing the least active ones."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from spath_eval import Strategy, hookimpl


@dataclass(frozen=True)
class Reverse(Strategy):
    """Removes the most active neurons, of each layer or of the whole model."""

    name: ClassVar[str] = "reverse"
    control: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("mean_abs",)

    pool: Literal["layer", "model"] = "layer"

    def select(self, context):
        from spath_eval import remove_lowest

        activity = context.profile.statistic("mean_abs", context.domain)
        return remove_lowest({path: -values for path, values in activity.items()}, context.budget.sparsity, self.pool)


@hookimpl
def spath_register_strategies(register):
    register(Reverse)
