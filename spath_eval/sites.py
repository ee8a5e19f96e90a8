"""FFN sites: the feed-forward blocks of a model, seen through one interface.

A neuron is one hidden unit of an FFN; its activation is what enters the down projection. A site can be observed, can
be masked (the activations of removed neurons are set to zero: the reference) and can be compacted (their weights are
sliced out: the same function, less work). The rest of the program knows FFNs only through `Site`. What differs between
architectures are the shapes, of which this module has one class each.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spath_eval.contracts import FFN, UsageError
from spath_eval.masks import Mask


@dataclass(frozen=True)
class Observation:
    """Activations of a site in one forward pass."""

    values: Tensor
    """What enters the down projection, `[rows, width]`."""
    tokens: Tensor
    """For each row, the index of its token in the flattened `[batch * tokens]` input."""
    experts: Tensor | None = None
    """For each row, the expert it belongs to, where the site has experts."""
    weights: Tensor | None = None
    """For each row, the routing weight, where the site has experts."""


Keep = Callable[[Tensor | None, Tensor], Tensor | None]
"""From the activated gate and the product that would enter down, both `[rows, width]`, to the neurons that each row
keeps (boolean, broadcast over rows); none keeps all."""


class Site(ABC):
    """One FFN of a model."""

    def __init__(self, model: PreTrainedModel, path: str, ffn: FFN) -> None:
        self.path = path
        """Module path of the FFN."""
        self.ffn = ffn
        self.module = model.get_submodule(path)
        """The dense FFN."""
        parent, _, self._name = path.rpartition(".")
        self._parent = model.get_submodule(parent)

    @property
    @abstractmethod
    def width(self) -> int:
        """Number of neurons (per expert, where there are experts)."""

    @property
    def experts(self) -> int | None:
        """Number of routed experts; none for a dense FFN."""
        return None

    @property
    @abstractmethod
    def gate(self) -> Tensor | None:
        """Gate weights `[width, hidden]`, where the shape has them."""

    @property
    @abstractmethod
    def up(self) -> Tensor:
        """Up weights `[width, hidden]`."""

    @property
    @abstractmethod
    def down(self) -> Tensor:
        """Down weights `[hidden, width]`."""

    @abstractmethod
    def observe(self, receive: Callable[[Observation], None]) -> AbstractContextManager[None]:
        """Within the context, hand every forward's activations to `receive`."""

    @abstractmethod
    def filtered(self, keep: Keep) -> AbstractContextManager[None]:
        """Within the context, set to zero what `keep` does not keep before it enters the down projection."""

    @abstractmethod
    def compact(self, mask: Mask) -> nn.Module:
        """A module that computes what the masked FFN computes, without the removed neurons' weights.

        Where the mask removes nothing it is the dense FFN itself. Raises `UsageError` where weights cannot be sliced.
        """

    @abstractmethod
    def entering_down(self, receive: Callable[[Tensor], None]) -> AbstractContextManager[None]:
        """Within the context, hand to `receive` what enters the down projection of the FFN now in the model, whichever
        that is, and of the dense FFN, should it be called in its stead."""

    @abstractmethod
    def kept_width(self, mask: Mask) -> int:
        """Width of what enters the down projection in compact execution."""

    @abstractmethod
    def weight_bytes(self, mask: Mask | None) -> int:
        """Bytes of the FFN's weights and biases in compact execution; of the dense FFN without a mask."""

    def masked(self, mask: Mask) -> AbstractContextManager[None]:
        """Within the context, removed neurons' activations are zero."""
        keep = mask[self.path].to(self.down.device)
        return self.filtered(lambda gate, product: keep)

    @contextmanager
    def installed(self, module: nn.Module) -> Iterator[None]:
        """Within the context, `module` stands in the model in place of the dense FFN."""
        setattr(self._parent, self._name, module)
        try:
            yield
        finally:
            setattr(self._parent, self._name, self.module)

    @property
    def installed_module(self) -> nn.Module:
        """The module that now stands at the site's path."""
        return cast(nn.Module, getattr(self._parent, self._name))


class GatedSite(Site):
    """`down(activation(gate(x)) * up(x))`: Llama, Gemma, Qwen and most others (Shazeer, "GLU Variants Improve
    Transformer", 2020)."""

    def __init__(self, model: PreTrainedModel, path: str, ffn: FFN) -> None:
        super().__init__(model, path, ffn)
        for name in (ffn.gate, ffn.up, ffn.down, ffn.activation):
            if not isinstance(getattr(self.module, name, None), nn.Module):
                raise UsageError(f"{path} ({type(self.module).__name__}) has no module {name!r}, as a gated FFN has")

    @property
    def width(self) -> int:
        return self.down.shape[1]

    @property
    def gate(self) -> Tensor:
        return self._projection(self.ffn.gate).weight

    @property
    def up(self) -> Tensor:
        return self._projection(self.ffn.up).weight

    @property
    def down(self) -> Tensor:
        return self._projection(self.ffn.down).weight

    @property
    def couples_neurons(self) -> bool:
        """Whether the activation function needs every gate output to compute any of them."""
        return self.ffn.couples_neurons is not None and bool(getattr(self.module, self.ffn.couples_neurons, False))

    @contextmanager
    def observe(self, receive: Callable[[Observation], None]) -> Iterator[None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0].reshape(-1, inputs[0].shape[-1])
            receive(Observation(values, torch.arange(len(values), device=values.device)))

        with _removing(self._projection(self.ffn.down).register_forward_pre_hook(hook)):
            yield

    @contextmanager
    def filtered(self, keep: Keep) -> Iterator[None]:
        gates: list[Tensor] = []

        def remember_gate(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            gates[:] = [output.reshape(-1, output.shape[-1])]

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            product = inputs[0]
            kept = keep(gates.pop() if gates else None, product.reshape(-1, product.shape[-1]))
            if kept is None:
                return None
            kept = kept if kept.dim() == 1 else kept.reshape(product.shape)
            return (product.masked_fill(~kept, 0), *inputs[1:])

        activation = getattr(self.module, self.ffn.activation)
        with (
            _removing(activation.register_forward_hook(remember_gate)),
            _removing(self._projection(self.ffn.down).register_forward_pre_hook(hook)),
        ):
            yield

    @contextmanager
    def entering_down(self, receive: Callable[[Tensor], None]) -> Iterator[None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            receive(inputs[0])

        downs = {id(module): getattr(module, self.ffn.down) for module in (self.installed_module, self.module)}
        handles = [down.register_forward_pre_hook(hook) for down in downs.values()]
        with _removing(*handles):
            yield

    def compact(self, mask: Mask) -> nn.Module:
        keep = mask[self.path]
        if keep.all():
            return self.module
        kept = keep.nonzero().squeeze(-1).to(self.down.device)
        module = _clone(self.module)
        if self.couples_neurons:
            setattr(module, self.ffn.activation, nn.Sequential(getattr(module, self.ffn.activation), _Pick(kept)))
        else:
            setattr(module, self.ffn.gate, self._sliced(self.ffn.gate, kept, 0))
        setattr(module, self.ffn.up, self._sliced(self.ffn.up, kept, 0))
        setattr(module, self.ffn.down, self._sliced(self.ffn.down, kept, 1))
        return module

    def kept_width(self, mask: Mask) -> int:
        return int(mask[self.path].sum())

    def weight_bytes(self, mask: Mask | None) -> int:
        share = 1.0 if mask is None else self.kept_width(mask) / self.width
        names = {self.ffn.gate: 1.0 if self.couples_neurons else share, self.ffn.up: share, self.ffn.down: share}
        total = 0
        for name, kept in names.items():
            projection = self._projection(name)
            total += round(projection.weight.nbytes * kept)
            if projection.bias is not None:
                total += round(projection.bias.nbytes * (1.0 if name == self.ffn.down else kept))
        return total

    def _projection(self, name: str) -> nn.Linear:
        return cast(nn.Linear, getattr(self.module, name))

    def _sliced(self, name: str, kept: Tensor, dim: int) -> nn.Linear:
        projection = self._projection(name)
        if type(projection) is not nn.Linear:
            raise UsageError(
                f"{self.path}.{name} is a {type(projection).__name__}, whose weights cannot be sliced: "
                "use --execution masked --no-speed"
            )
        weight = projection.weight.detach().index_select(dim, kept).contiguous()
        bias = projection.bias
        if bias is not None and dim == 0:
            bias = nn.Parameter(bias.detach().index_select(0, kept), requires_grad=False)
        sliced = cast(nn.Linear, _clone(projection))
        sliced.out_features, sliced.in_features = weight.shape
        sliced.weight = nn.Parameter(weight, requires_grad=False)
        sliced.bias = bias
        return sliced


class _Pick(nn.Module):
    """Picks kept columns."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        return values.index_select(-1, cast(Tensor, self.kept))


SHAPES: dict[str, type[Site]] = {"gated": GatedSite}
"""Name in `FFN.shape` to the class that knows it."""


def find_sites(model: PreTrainedModel, ffns: Sequence[FFN]) -> list[Site]:
    """The sites that `ffns` declare, in module order. Raises `UsageError` where there is none."""
    sites = []
    for path, _ in model.named_modules():
        for ffn in ffns:
            if _matches(path, ffn.pattern):
                sites.append(SHAPES[ffn.shape](model, path, ffn))
    if not sites:
        patterns = ", ".join(ffn.pattern for ffn in ffns)
        raise UsageError(f"no FFN site found in {type(model).__name__}: no module matches {patterns}")
    return sites


def _matches(path: str, pattern: str) -> bool:
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _clone(module: nn.Module) -> nn.Module:
    """A module of the same class that shares parameters and submodules, but whose submodules can be replaced."""
    clone = module.__class__.__new__(module.__class__)
    clone.__dict__ = {
        name: copy.copy(value) if isinstance(value, dict) else value for name, value in module.__dict__.items()
    }
    return clone


@contextmanager
def _removing(*handles: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
