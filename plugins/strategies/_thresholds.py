"""Thresholds of size, one for each site, below which a given share of the calibration text's activations lies.

The papers whose strategies are built on this read the threshold off the empirical distribution function of the sizes
at each site: the lowest one with F(threshold) >= sparsity, over the text's own tokens. All sizes are more than a memory
holds, so they are counted in buckets: float32 numbers that agree in sign, exponent and the first 10 bits of their
fraction. A threshold is the largest number of its bucket, at most 0.1% too high; of float16 and bfloat16 activations a
bucket holds one value alone, and the threshold is exact.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import TYPE_CHECKING

from spath_eval import Context

if TYPE_CHECKING:
    import torch

    from spath_eval import Site

IGNORED_BITS = 13
"""Of a float32's 23 bits of fraction, those in which the numbers of a bucket differ."""
BUCKETS = 2 ** (31 - IGNORED_BITS)
CHUNK = 2**22
"""Activations that are counted at a time."""

Receive = Callable[["torch.Tensor", "torch.Tensor"], None]
"""Takes activations `[rows, width]` and the token of each row, as its index in the flattened batch."""
Watch = Callable[["Site", Receive], AbstractContextManager[None]]
"""Within the context, hands over every forward's activations at a site."""


class Sizes:
    """How often each size occurred at a site."""

    def __init__(self, device: "torch.device") -> None:
        import torch

        self.counts = torch.zeros(BUCKETS, dtype=torch.int64, device=device)

    def add(self, values: "torch.Tensor") -> None:
        """Count the sizes of `values`, of any shape."""
        import torch

        for chunk in values.flatten().split(CHUNK):
            buckets = chunk.float().abs().view(torch.int32) >> IGNORED_BITS
            self.counts += torch.bincount(buckets, minlength=BUCKETS)

    def threshold(self, share: float) -> float:
        """The lowest one that at least `share` of all sizes do not exceed; -1, below all of them, for a share of 0."""
        import torch

        if share == 0:
            return -1.0
        below = self.counts.cumsum(0).double()
        bucket = int(torch.searchsorted(below, share * below[-1]))
        largest = torch.tensor(((bucket + 1) << IGNORED_BITS) - 1, dtype=torch.int32)
        return float(largest.view(torch.float32))


def thresholds(context: Context, watch: Watch) -> dict[str, float]:
    """Site path to the threshold that the budget's sparsity needs, by one pass of the dense model over the batches."""
    import torch

    assert context.model is not None
    sizes = {path: Sizes(site.device) for path, site in context.sites.items()}
    counted = torch.empty(0)

    def receive(path: str, values: torch.Tensor, tokens: torch.Tensor) -> None:
        sizes[path].add(values[counted.to(values.device)[tokens]])

    with torch.inference_mode(), ExitStack() as stack:
        for path, site in context.sites.items():
            stack.enter_context(watch(site, partial(receive, path)))
        for batch, mask in zip(context.batches, context.counted, strict=True):
            counted = mask.flatten()
            context.model.get_decoder()(**batch, use_cache=False)
    return {path: one.threshold(context.budget.sparsity) for path, one in sizes.items()}
