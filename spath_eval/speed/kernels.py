"""Triton kernels with which a GPU skips neurons token by token, for few tokens at a time, as in decoding.

Weights are read row by row, and a row is a neuron: of gate and up as they are, of down after it was transposed. Rows
that no token keeps are masked out of the loads, so that their bytes are never asked of memory; which rows those are
stays on the device, and nothing waits for it. Sums are in float32. Down is summed in pieces of its rows, which are
added up in a fixed order, so that results do not depend on the order in which programs ran.

In Triton's interpreter (`TRITON_INTERPRET=1`) the kernels run on a CPU, to be tested. It multiplies the bit patterns of
bfloat16 in `tl.dot`, so that there operands are cast to float32 before. Needs the extra `[kernels]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn.functional import linear

from spath_eval.contracts import UsageError
from spath_eval.pathways import TokenPathway
from spath_eval.sites import DenseSite, GatedSite, Site

MAX_TOKENS = 16
"""Tokens up to which rows are skipped: the fewest that a matrix instruction takes. Of more than that hardly a row is
skipped by all, and the product is dense."""

ROWS_BLOCKS = {
    1: {"BLOCK_WIDTH": 8, "BLOCK_HIDDEN": 512},
    MAX_TOKENS: {"BLOCK_WIDTH": 16, "BLOCK_HIDDEN": 128},
}
COLUMNS_BLOCKS = {
    1: {"BLOCK_WIDTH": 32, "BLOCK_HIDDEN": 128, "PIECE": 256},
    MAX_TOKENS: {"BLOCK_WIDTH": 32, "BLOCK_HIDDEN": 128, "PIECE": 512},
}
"""By the tokens that a program takes, how many weights it loads at a time, and how many rows of down it sums up in a
`PIECE`. Of one token the weights on their way are 8 kB a program, and two loads ahead of the sums, as loading a row
waits for whether it is kept: by Little's law an H100 keeps its memory busy with some 15 kB on the way to a
multiprocessor, and six programs fit on one. Counted, not measured."""
STAGES = tl.constexpr(3)
"""Steps of a loop that are under way at a time: the loads of two, and the sums of one."""


@triton.jit
def _multiply(left, right, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """`left [M, K] @ right [K, N]` in float32."""
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _rows_kernel(  # type: ignore[no-untyped-def]
    inputs,
    weight,
    keep,
    outputs,
    tokens,
    width,
    hidden: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    token = tl.arange(0, BLOCK_TOKENS)
    neuron = tl.program_id(0) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    places = token[:, None] * width + neuron[None, :]
    inside = (token < tokens)[:, None] & (neuron < width)[None, :]
    kept = tl.load(keep + places, mask=inside, other=0) != 0
    needed = tl.max(kept.to(tl.int32), axis=0) != 0
    if BLOCK_TOKENS == 1:
        products = tl.zeros((BLOCK_WIDTH, BLOCK_HIDDEN), dtype=tl.float32)
        for start in tl.range(0, hidden, BLOCK_HIDDEN, num_stages=STAGES):
            feature = start + tl.arange(0, BLOCK_HIDDEN)
            rows = weight + neuron[:, None].to(tl.int64) * hidden + feature[None, :]
            row = tl.load(rows, mask=needed[:, None] & (feature < hidden)[None, :], other=0.0)
            values = tl.load(inputs + feature, mask=feature < hidden, other=0.0)
            products += values.to(tl.float32)[None, :] * row.to(tl.float32)
        sums = tl.sum(products, axis=1)[None, :]
    else:
        sums = tl.zeros((BLOCK_TOKENS, BLOCK_WIDTH), dtype=tl.float32)
        for start in range(0, hidden, BLOCK_HIDDEN):
            feature = start + tl.arange(0, BLOCK_HIDDEN)
            rows = weight + neuron[None, :].to(tl.int64) * hidden + feature[:, None]
            row = tl.load(rows, mask=needed[None, :] & (feature < hidden)[:, None], other=0.0)
            present = (token < tokens)[:, None] & (feature < hidden)[None, :]
            values = tl.load(inputs + token[:, None] * hidden + feature[None, :], mask=present, other=0.0)
            sums += _multiply(values, row, UPCAST)
    tl.store(outputs + places, tl.where(kept, sums, 0.0).to(outputs.dtype.element_ty), mask=inside)


@triton.jit
def _columns_kernel(  # type: ignore[no-untyped-def]
    inputs,
    weight,
    keep,
    outputs,
    tokens,
    width,
    hidden: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    UPCAST: tl.constexpr,
):
    token = tl.arange(0, BLOCK_TOKENS)
    feature = tl.program_id(0) * BLOCK_HIDDEN + tl.arange(0, BLOCK_HIDDEN)
    piece = tl.program_id(1)
    if BLOCK_TOKENS == 1:
        products = tl.zeros((BLOCK_WIDTH, BLOCK_HIDDEN), dtype=tl.float32)
        for start in tl.range(0, PIECE, BLOCK_WIDTH, num_stages=STAGES):
            neuron = piece * PIECE + start + tl.arange(0, BLOCK_WIDTH)
            kept = tl.load(keep + neuron, mask=neuron < width, other=0) != 0
            values = tl.load(inputs + neuron, mask=kept, other=0.0)
            rows = weight + neuron[:, None].to(tl.int64) * hidden + feature[None, :]
            row = tl.load(rows, mask=kept[:, None] & (feature < hidden)[None, :], other=0.0)
            products += values.to(tl.float32)[:, None] * row.to(tl.float32)
        sums = tl.sum(products, axis=0)[None, :]
    else:
        sums = tl.zeros((BLOCK_TOKENS, BLOCK_HIDDEN), dtype=tl.float32)
        for start in range(0, PIECE, BLOCK_WIDTH):
            neuron = piece * PIECE + start + tl.arange(0, BLOCK_WIDTH)
            places = token[:, None] * width + neuron[None, :]
            inside = (token < tokens)[:, None] & (neuron < width)[None, :]
            kept = tl.load(keep + places, mask=inside, other=0) != 0
            needed = tl.max(kept.to(tl.int32), axis=0) != 0
            values = tl.load(inputs + places, mask=kept, other=0.0)
            rows = weight + neuron[:, None].to(tl.int64) * hidden + feature[None, :]
            row = tl.load(rows, mask=needed[:, None] & (feature < hidden)[None, :], other=0.0)
            sums += _multiply(values, row, UPCAST)
    places = (piece * tokens + token)[:, None] * hidden + feature[None, :]
    tl.store(outputs + places, sums, mask=(token < tokens)[:, None] & (feature < hidden)[None, :])


INTERPRETED = not isinstance(_rows_kernel, triton.JITFunction)


def kept_rows(inputs: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """Of `inputs [tokens, hidden] @ weight.T`, with `weight [width, hidden]`, what `keep [tokens, width]` keeps.

    The rest is 0, `[tokens, width]`. Raises `ValueError` where shapes or types do not fit.
    """
    tokens, (width, hidden) = len(inputs), weight.shape
    _check(inputs, weight, keep, (tokens, hidden))
    if tokens > MAX_TOKENS:
        return linear(inputs, weight).masked_fill(~keep, 0)
    outputs = inputs.new_empty(tokens, width)
    block = ROWS_BLOCKS[_block(tokens)]
    grid = (triton.cdiv(width, block["BLOCK_WIDTH"]),)
    arguments = (inputs.contiguous(), weight, _bytes(keep), outputs, tokens, width, hidden)
    with _on(inputs.device):
        _rows_kernel[grid](*arguments, BLOCK_TOKENS=_block(tokens), UPCAST=INTERPRETED, **block)
    return outputs


def kept_columns(inputs: Tensor, weight: Tensor, keep: Tensor) -> Tensor:
    """`inputs [tokens, width] @ weight`, with `weight [width, hidden]`, over what `keep [tokens, width]` keeps.

    `weight` is a down projection transposed, and the result is `[tokens, hidden]`. Raises `ValueError` where shapes or
    types do not fit.
    """
    tokens, (width, hidden) = len(inputs), weight.shape
    _check(inputs, weight, keep, (tokens, width))
    if tokens > MAX_TOKENS:
        return inputs.masked_fill(~keep, 0) @ weight
    block = COLUMNS_BLOCKS[_block(tokens)]
    pieces = triton.cdiv(width, block["PIECE"])
    outputs = torch.empty(pieces, tokens, hidden, dtype=torch.float32, device=inputs.device)
    grid = (triton.cdiv(hidden, block["BLOCK_HIDDEN"]), pieces)
    arguments = (inputs.contiguous(), weight, _bytes(keep), outputs, tokens, width, hidden)
    with _on(inputs.device):
        _columns_kernel[grid](*arguments, BLOCK_TOKENS=_block(tokens), UPCAST=INTERPRETED, **block)
    return outputs.sum(0).to(inputs.dtype)


class KernelPathway:
    """A token pathway whose skipped neurons are not computed, as far as the strategy decides before they are.

    By the activated gate alone: rows of up, where it is a matrix of its own, and columns of down are skipped; by what
    enters down: columns of down. Each site holds a transposed copy of its down weights. Raises `UsageError` for a site
    that has no such form.
    """

    def __init__(self, pathway: TokenPathway) -> None:
        self.pathway = pathway
        self._sites = [_KernelSite(site, pathway) for site in pathway.sites]

    @property
    def skippable_bytes(self) -> int:
        """Bytes of the weights that are read by the kernels: what a token that keeps nothing skips."""
        kernels = [kernel for site in self._sites for kernel in site.replaced.values()]
        return sum(kernel.weight.nbytes for kernel in kernels)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context, the model computes what the pathway does, by kernels."""
        with ExitStack() as stack:
            for site in self._sites:
                stack.enter_context(site.applied())
            yield


class _KernelSite:
    """One site, and what is known of the forward it is in."""

    def __init__(self, site: Site, pathway: TokenPathway) -> None:
        if not isinstance(site, DenseSite):
            raise UsageError(f"{site.path}: the kernels do not know routed experts")
        if reason := site.unsliceable:
            raise UsageError(reason)
        if site.device.type != "cuda" and not INTERPRETED:
            raise UsageError(f"{site.path} lies on {site.device}: the kernels need a CUDA device")
        self.site, self.pathway = site, pathway
        self.gate: Tensor | None = None
        self.keep: Tensor | None = None
        ffn = site.ffn
        self.replaced: dict[str, _KeptRows | _KeptColumns] = {
            ffn.down: _KeptColumns(self, getattr(site.module, ffn.down))
        }
        if isinstance(site, GatedSite) and not pathway.strategy.reads_product:
            self.replaced[ffn.up] = _KeptRows(self, getattr(site.module, ffn.up))

    @contextmanager
    def applied(self) -> Iterator[None]:
        module = self.site.module
        before = {name: getattr(module, name) for name in self.replaced}
        activation = getattr(module, self.site.ffn.activation)
        handle = activation.register_forward_hook(self._on_activation) if self.site.gated else None
        try:
            for name, kernel in self.replaced.items():
                setattr(module, name, kernel)
            yield
        finally:
            for name, projection in before.items():
                setattr(module, name, projection)
            if handle is not None:
                handle.remove()

    def decide(self, product: Tensor) -> Tensor:
        """What the strategy keeps, `[tokens, width]`."""
        pathway = self.pathway
        return pathway.strategy.keep(pathway.context, self.site, self.gate, product)

    def _on_activation(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        self.gate = output.flatten(0, -2)
        if not self.pathway.strategy.reads_product:
            self.keep = self.decide(torch.empty_like(self.gate, device="meta"))


class _KeptRows(nn.Module):
    """In place of up: the rows that the gate kept."""

    def __init__(self, site: _KernelSite, projection: nn.Linear) -> None:
        super().__init__()
        self.site = site
        self.weight = nn.Parameter(site.site.up.detach(), requires_grad=False)
        self.bias = projection.bias

    def forward(self, inputs: Tensor) -> Tensor:
        assert self.site.keep is not None, "the gate comes first"
        outputs = kept_rows(inputs.flatten(0, -2), self.weight, self.site.keep)
        outputs = outputs if self.bias is None else outputs + self.bias
        return outputs.view(*inputs.shape[:-1], -1)


class _KeptColumns(nn.Module):
    """In place of down: the columns that are kept."""

    def __init__(self, site: _KernelSite, projection: nn.Linear) -> None:
        super().__init__()
        self.site = site
        self.in_features, self.out_features = projection.in_features, projection.out_features
        self.weight = nn.Parameter(site.site.down.detach().t().contiguous(), requires_grad=False)
        self.bias = projection.bias

    def forward(self, inputs: Tensor) -> Tensor:
        product = inputs.flatten(0, -2)
        keep = self.site.decide(product) if self.site.keep is None else self.site.keep
        self.site.gate = self.site.keep = None
        outputs = kept_columns(product, self.weight, keep)
        outputs = outputs if self.bias is None else outputs + self.bias
        return outputs.view(*inputs.shape[:-1], -1)


def _check(inputs: Tensor, weight: Tensor, keep: Tensor, expected: tuple[int, int]) -> None:
    if tuple(inputs.shape) != expected or tuple(keep.shape) != (len(inputs), len(weight)) or keep.dtype != torch.bool:
        shapes = f"inputs {list(inputs.shape)}, weight {list(weight.shape)} and keep {list(keep.shape)} ({keep.dtype})"
        raise ValueError(f"{shapes} do not fit together")
    if inputs.dtype != weight.dtype or inputs.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"inputs are of {inputs.dtype}, and weights of {weight.dtype}")
    if not weight.is_contiguous():
        raise ValueError("the rows of the weights do not lie one after the other")


def _bytes(keep: Tensor) -> Tensor:
    return keep.contiguous().view(torch.uint8)


def _block(tokens: int) -> int:
    return 1 if tokens == 1 else MAX_TOKENS


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Within the context, Triton launches on `device`: it does not look where arguments are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
