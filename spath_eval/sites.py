"""FFN sites: the feed-forward blocks of a model, seen through one interface.

A neuron is one hidden unit of an FFN; its activation is what enters the down projection. A site can be observed, can
be masked (the activations of removed neurons are set to zero: the reference) and can be compacted (their weights are
sliced out: the same function, less work). The rest of the program knows FFNs only through `Site`. What differs between
architectures are the shapes, of which this module has one class each.

A model may be spread over devices by accelerate, whose hooks stand in for the `forward` of modules: they bring inputs
to a module's device and, where its weights are offloaded to main memory or disk, the weights for the length of a call;
between calls these are on the meta device. Weights may also be quantised: then activations can be masked, but there is
nothing that could be sliced.
"""

from __future__ import annotations

import copy
import re
from abc import ABC, abstractmethod
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, cast

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel

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
        self._quantisation = quantisation(model.config)

    @property
    def device(self) -> torch.device:
        """Where it computes; its weights may lie elsewhere."""
        return _device(self.module)

    @property
    @abstractmethod
    def unsliceable(self) -> str | None:
        """Why its weights cannot be sliced, so that it has no compact execution; none where they can."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Number of neurons (per expert, where there are experts)."""

    @property
    def experts(self) -> int | None:
        """Number of routed experts; none for a dense FFN."""
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of what has a value per neuron: `[width]`, or `[experts, width]`."""
        return (self.width,) if self.experts is None else (self.experts, self.width)

    @property
    @abstractmethod
    def gate(self) -> Tensor | None:
        """Gate weights `[width, hidden]`, where the shape has them. Raises `UsageError` where they are quantised."""

    @property
    @abstractmethod
    def up(self) -> Tensor:
        """Up weights `[width, hidden]`. Raises `UsageError` where they are quantised."""

    @property
    @abstractmethod
    def down(self) -> Tensor:
        """Down weights `[hidden, width]`. Raises `UsageError` where they are quantised."""

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
    def entering_down(self, receive: Callable[[Observation], None]) -> AbstractContextManager[None]:
        """Within the context, hand to `receive` what enters the down projection of the FFN now in the model, whichever
        that is, and of the dense FFN, should it be called in its stead."""

    @abstractmethod
    def kept_width(self, mask: Mask) -> int:
        """Width of what enters the down projection in compact execution."""

    def kept_experts(self, mask: Mask | None) -> int | None:
        """Number of experts in compact execution; none for a dense FFN."""
        return None

    @contextmanager
    def routed(self, mask: Mask) -> Iterator[None]:
        """Within the context, no token is routed to an expert that the mask removes."""
        yield

    @abstractmethod
    def weight_bytes(self, mask: Mask | None) -> int:
        """Bytes of the FFN's weights and biases in compact execution; of the dense FFN without a mask."""

    def masked(self, mask: Mask) -> AbstractContextManager[None]:
        """Within the context, removed neurons' activations are zero."""
        keep = mask[self.path].to(self.device)
        return self.filtered(lambda gate, product: keep)

    @abstractmethod
    def down_replaced(self, weight: Tensor, bias: Tensor | None) -> AbstractContextManager[None]:
        """Within the context, the dense FFN has other down weights, shaped as `down`, and another bias if given."""

    @contextmanager
    def with_down(self, mask: Mask, weight: Tensor, bias: Tensor | None, *, compact: bool) -> Iterator[None]:
        """Within the context, the site runs `mask`, masked or compact, with repaired down weights.

        `weight` is shaped as `down`, whose columns of removed neurons do not matter; `bias` as the projection's.
        """
        with self.down_replaced(weight, bias), self.installed(self.compact(mask)) if compact else self.masked(mask):
            yield

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


class DenseSite(Site):
    """An FFN that every token passes: some projections whose rows are neurons, an activation function, and down."""

    modules: tuple[str, ...] = ()
    """The fields of `FFN` that name submodules of this shape."""
    gated = True
    """Whether a gate is activated."""

    def __init__(self, model: PreTrainedModel, path: str, ffn: FFN) -> None:
        super().__init__(model, path, ffn)
        for name in (getattr(ffn, field) for field in self.modules):
            if not isinstance(getattr(self.module, name, None), nn.Module):
                kind = f"{path} ({type(self.module).__name__})"
                raise UsageError(f"{kind} has no module {name!r}, as an FFN of shape {ffn.shape!r} has")
        for name in self._projections:
            sizes = [getattr(self._projection(name), size, None) for size in ("in_features", "out_features")]
            if not all(isinstance(size, int) for size in sizes):
                raise UsageError(f"{self._described(name)}, which does not say how many values enter and leave it")
        if len(devices := {str(_device(self._projection(name))) for name in self._projections}) > 1:
            raise UsageError(f"{path}: its projections lie on several devices ({', '.join(sorted(devices))})")

    @abstractmethod
    def rows(self, kept: Tensor) -> dict[str, Tensor]:
        """For each projection before down, the rows that compact execution keeps of it, where `kept` neurons stay."""

    @property
    def width(self) -> int:
        return self._projection(self.ffn.down).in_features

    @property
    def down(self) -> Tensor:
        return self._weight(self.ffn.down)

    @property
    def unsliceable(self) -> str | None:
        for name in self._projections:
            projection = self._projection(name)
            if type(projection) is not nn.Linear or is_packed(projection):
                return f"{self._described(name)}, whose weights cannot be sliced: --execution masked works"
            if reason := _unsliceable_where_it_lies(projection, "weight"):
                return f"{self.path}.{name}: {reason}: --execution masked works"
        return None

    @property
    def couples_neurons(self) -> bool:
        """Whether the activation function needs every gate output to compute any of them."""
        return self.ffn.couples_neurons is not None and bool(getattr(self.module, self.ffn.couples_neurons, False))

    @contextmanager
    def observe(self, receive: Callable[[Observation], None]) -> Iterator[None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            receive(_all_tokens(inputs[0]))

        with _removing(self._projection(self.ffn.down).register_forward_pre_hook(hook)):
            yield

    @contextmanager
    def filtered(self, keep: Keep) -> Iterator[None]:
        gates: list[Tensor] = []

        def remember_gate(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            gates[:] = [output.flatten(0, -2)]  # a compact FFN whose width is 0 shares the activation function

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            product = inputs[0]
            kept = keep(gates.pop() if gates else None, product.reshape(-1, product.shape[-1]))
            if kept is None:
                return None
            kept = kept if kept.dim() == 1 else kept.reshape(product.shape)
            return (product.masked_fill(~kept, 0), *inputs[1:])

        handles = [self._projection(self.ffn.down).register_forward_pre_hook(hook)]
        if self.gated:
            handles.append(getattr(self.module, self.ffn.activation).register_forward_hook(remember_gate))
        with _removing(*handles):
            yield

    @contextmanager
    def entering_down(self, receive: Callable[[Observation], None]) -> Iterator[None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            receive(_all_tokens(inputs[0]))

        downs = {id(module): getattr(module, self.ffn.down) for module in (self.installed_module, self.module)}
        handles = [down.register_forward_pre_hook(hook) for down in downs.values()]
        with _removing(*handles):
            yield

    def compact(self, mask: Mask) -> nn.Module:
        """In two-byte types a multiple of 8 neurons is kept: some of the removed ones, whose weights are zero then."""
        keep = mask[self.path]
        if keep.all():
            return self.module
        if reason := self.unsliceable:
            raise UsageError(reason)
        kept = self._kept(mask)
        real = keep[kept]
        module = _clone(self.module)
        if self.couples_neurons:
            pick = _Pick(kept.to(self.device))
            setattr(module, self.ffn.activation, nn.Sequential(getattr(module, self.ffn.activation), pick))
        for name, rows in self.rows(kept).items():
            if len(rows) < self._projection(name).out_features:
                setattr(module, name, self._sliced(name, rows, 0, real.repeat(len(rows) // max(1, len(kept)))))
        setattr(module, self.ffn.down, self._sliced(self.ffn.down, kept, 1, real))
        return _hooked_as(self.module, module)

    def kept_width(self, mask: Mask) -> int:
        kept = int(mask[self.path].sum())
        filled = -(-kept // ALIGNMENT) * ALIGNMENT
        weight = getattr(self._projection(self.ffn.down), "weight", None)
        return filled if getattr(weight, "itemsize", None) == 2 and filled < self.width else kept

    def weight_bytes(self, mask: Mask | None) -> int:
        kept = torch.arange(self.width) if mask is None else self._kept(mask)
        down = self._projection(self.ffn.down)
        bias = 0 if down.bias is None else down.bias.nbytes  # which stays whole
        total = bias + (_bytes(down) - bias) / self.width * len(kept)
        for name, rows in self.rows(kept).items():
            projection = self._projection(name)
            total += _bytes(projection) / projection.out_features * len(rows)
        return round(total)

    @contextmanager
    def down_replaced(self, weight: Tensor, bias: Tensor | None) -> Iterator[None]:
        down = self._projection(self.ffn.down)
        with _replaced(down, "weight", weight), _replaced(down, "bias", bias):
            yield

    def _projection(self, name: str) -> nn.Linear:
        return cast(nn.Linear, getattr(self.module, name))

    @property
    def _projections(self) -> list[str]:
        """The names of all projections."""
        return [getattr(self.ffn, field) for field in self.modules if field != "activation"]

    def _described(self, name: str) -> str:
        method = f" (quantised by {self._quantisation})" if self._quantisation else ""
        return f"{self.path}.{name} is a {type(self._projection(name)).__name__}{method}"

    def _weight(self, name: str) -> Tensor:
        projection = self._projection(name)
        if is_packed(projection):
            raise UsageError(f"{self._described(name)}, whose weights cannot be read: take a strategy that does not")
        return stored(projection, "weight")

    def _kept(self, mask: Mask) -> Tensor:
        """The neurons in compact execution, in their order: those that the mask keeps, and what fills them up."""
        keep = mask[self.path]
        missing = self.kept_width(mask) - int(keep.sum())
        return (keep | ((~keep).cumsum(0) <= missing)).nonzero().squeeze(-1) if missing else keep.nonzero().squeeze(-1)

    def _sliced(self, name: str, kept: Tensor, dim: int, real: Tensor) -> nn.Linear:
        """A projection with the `kept` rows or columns, zero where not `real`."""
        projection = self._projection(name)
        weight = stored(projection, "weight").detach()
        kept, filled = kept.to(weight.device), (~real).nonzero().squeeze(-1).to(weight.device)
        sliced = cast(nn.Linear, _clone(projection))
        picked = weight.index_select(dim, kept).index_fill_(dim, filled, 0).contiguous()
        sliced.weight = nn.Parameter(picked, requires_grad=False)
        sliced.out_features, sliced.in_features = sliced.weight.shape
        if projection.bias is not None:
            bias = stored(projection, "bias").detach()
            bias = bias.index_select(0, kept).index_fill_(0, filled, 0) if dim == 0 else bias
            sliced.bias = nn.Parameter(bias, requires_grad=False)
        return cast(nn.Linear, _hooked_as(projection, sliced))


class PlainSite(DenseSite):
    """`down(activation(up(x)))`, often with biases: Phi, GPT-2 and the first transformers (Vaswani et al., 2017)."""

    modules = ("up", "down", "activation")
    gated = False

    @property
    def gate(self) -> None:
        return None

    @property
    def up(self) -> Tensor:
        return self._weight(self.ffn.up)

    def rows(self, kept: Tensor) -> dict[str, Tensor]:
        return {self.ffn.up: kept}


class GatedSite(DenseSite):
    """`down(activation(gate(x)) * up(x))`: Llama, Gemma, Qwen and most others (Shazeer, "GLU Variants Improve
    Transformer", 2020)."""

    modules = ("gate", "up", "down", "activation")

    @property
    def gate(self) -> Tensor:
        return self._weight(self.ffn.gate)

    @property
    def up(self) -> Tensor:
        return self._weight(self.ffn.up)

    def rows(self, kept: Tensor) -> dict[str, Tensor]:
        whole = torch.arange(self.width, device=kept.device)
        return {self.ffn.gate: whole if self.couples_neurons else kept, self.ffn.up: kept}


class FusedGatedSite(DenseSite):
    """The gated shape with gate and up in one projection, gate first: Phi-3. `FFN.up` names it."""

    modules = ("up", "down", "activation")

    @property
    def gate(self) -> Tensor:
        return self._weight(self.ffn.up)[: self.width]

    @property
    def up(self) -> Tensor:
        return self._weight(self.ffn.up)[self.width :]

    def rows(self, kept: Tensor) -> dict[str, Tensor]:
        return {self.ffn.up: torch.cat([kept, kept + self.width])}


ALIGNMENT = 8
"""Neurons: rows of 16 bytes in two-byte types, without which `torch.nn.functional.grouped_mm` refuses weights, and
tensor cores are used poorly (NVIDIA, Matrix Multiplication Background User's Guide, "Tensor Core Requirements")."""


class ExpertsSite(Site):
    """The routed experts of a layer, whose weights are fused into three-dimensional parameters, as in transformers.

    Every expert is a gated FFN with `width` neurons of its own. What is observed or masked runs through a loop over
    the experts that were chosen; where nothing is removed the model's own experts function runs, bit for bit, and so it
    does in compact execution, on smaller parameters.
    """

    def __init__(self, model: PreTrainedModel, path: str, ffn: FFN) -> None:
        super().__init__(model, path, ffn)
        for name in (ffn.up, ffn.down):
            weight = getattr(self.module, name, None)
            if self._quantisation and not _is_plain(weight):
                raise UsageError(
                    f"{path}.{name}: routed experts quantised by {self._quantisation} run neither masked nor compact"
                )
            if getattr(weight, "ndim", 0) != 3:
                raise UsageError(f"{path} ({type(self.module).__name__}) has no fused experts {name!r}")
        if not getattr(self.module, "has_gate", True) or getattr(self.module, "has_post_expert_norm", False):
            kind = f"{path} ({type(self.module).__name__})"
            raise UsageError(f"{kind} has experts without a gate, or with a norm of their own: not supported")
        self._watchers: list[Callable[[Observation], None]] = []
        self.router = self._parent.get_submodule(ffn.router)

    @property
    def width(self) -> int:
        return self._down_shape(self.module)[2]

    @property
    def experts(self) -> int:
        return self._down_shape(self.module)[0]

    @property
    def unsliceable(self) -> str | None:
        for name in (self.ffn.up, self.ffn.down):
            if reason := _unsliceable_where_it_lies(self.module, name):
                return f"{self.path}.{name}: {reason}: --execution masked works"
        return None

    @property
    def gate(self) -> Tensor:
        """`[experts, width, hidden]`."""
        return self._weight(self.ffn.up)[:, self._rows[0]]

    @property
    def up(self) -> Tensor:
        """`[experts, width, hidden]`."""
        return self._weight(self.ffn.up)[:, self._rows[1]]

    @property
    def down(self) -> Tensor:
        """`[experts, hidden, width]`."""
        return self._weight(self.ffn.down)

    @contextmanager
    def observe(self, receive: Callable[[Observation], None]) -> Iterator[None]:
        def edit(observation: Observation) -> Tensor:
            receive(observation)
            return observation.values

        with self._forward_by(edit):
            yield

    @contextmanager
    def filtered(self, keep: Keep) -> Iterator[None]:
        def edit(observation: Observation) -> Tensor:
            kept = keep(None, observation.values)
            return observation.values if kept is None else observation.values.masked_fill(~kept, 0)

        with self._forward_by(edit):
            yield

    @contextmanager
    def masked(self, mask: Mask) -> Iterator[None]:
        keep = mask[self.path].to(self.device)
        if keep.all():
            yield
            return
        with self._forward_by(lambda seen: seen.values.masked_fill(~keep[seen.experts], 0)):
            yield

    @contextmanager
    def entering_down(self, receive: Callable[[Observation], None]) -> Iterator[None]:
        """Where the loop does not run, the experts function does as it likes with all neurons that its weights have:
        `receive` is then handed ones of their width."""
        told: list[bool] = []

        def tell(observation: Observation) -> None:
            told.append(True)
            receive(observation)

        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            told.clear()

        def after(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if not told:
                chosen = inputs[1].flatten()
                tokens = torch.arange(len(chosen), device=chosen.device) // inputs[1].shape[1]
                values = torch.ones(len(chosen), self._down_shape(module)[2], device=chosen.device)
                receive(Observation(values, tokens, chosen))

        self._watchers.append(tell)
        modules = {id(module): module for module in (self.installed_module, self.module)}.values()
        handles = [module.register_forward_pre_hook(before) for module in modules]
        handles += [module.register_forward_hook(after) for module in modules]
        try:
            with _removing(*handles):
                yield
        finally:
            self._watchers.remove(tell)

    def compact(self, mask: Mask) -> nn.Module:
        """Experts keep an equal number of neurons, as the fused parameters demand, a multiple of 8, as grouped matrix
        products do: what is missing is filled up with neurons whose weights are zero."""
        keep = mask[self.path]
        if keep.all():
            return self.module
        if reason := self.unsliceable:
            raise UsageError(reason)
        module = _clone(self.module)
        names = [self.ffn.up, self.ffn.down]
        for name in names + [f"{name}_bias" for name in names if self._has_bias]:
            setattr(module, name, nn.Parameter(stored(self.module, name).detach(), requires_grad=False))
        keep = keep.to(getattr(module, self.ffn.down).device)
        if self.path in mask.experts:
            chosen = mask.experts[self.path].to(keep.device)
            self._pick_experts(module, chosen)
            keep = keep[chosen]
        # A stable sort puts each expert's kept neurons first, in their order.
        kept = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, : self.kept_width(mask)]
        self._slice(module, kept, keep.gather(1, kept))
        return _hooked_as(self.module, module)

    @contextmanager
    def routed(self, mask: Mask) -> Iterator[None]:
        """The selection score of removed experts is minus infinity; the router is else unchanged, and normalises the
        weights of the chosen ones as it always does."""
        if self.path not in mask.experts:
            yield
            return
        removed = ~mask.experts[self.path].to(_device(self.router))
        if reason := self._unroutable(mask.experts[self.path]):
            raise UsageError(f"{self.path}: {reason}")
        original = getattr(self.router, OWN_FORWARD, self.router.forward)

        def forward(*inputs: Any, **options: Any) -> Any:
            with _Excluding(removed, logits=self.ffn.routes_by_logits):
                return original(*inputs, **options)

        with _forwarding(self.router, forward):
            yield

    def kept_width(self, mask: Mask) -> int:
        most = max(1, int(mask[self.path].sum(1).max()))
        return min(self.width, -(-most // ALIGNMENT) * ALIGNMENT)

    def kept_experts(self, mask: Mask | None) -> int:
        return self.experts if mask is None or self.path not in mask.experts else int(mask.experts[self.path].sum())

    def weight_bytes(self, mask: Mask | None) -> int:
        share = 1.0 if mask is None or mask[self.path].all() else self.kept_width(mask) / self.width
        total = (getattr(self.module, self.ffn.up).nbytes + getattr(self.module, self.ffn.down).nbytes) * share
        if self._has_bias:
            total += getattr(self.module, f"{self.ffn.up}_bias").nbytes * share
            total += getattr(self.module, f"{self.ffn.down}_bias").nbytes
        return round(total * self.kept_experts(mask) / self.experts)

    @contextmanager
    def down_replaced(self, weight: Tensor, bias: Tensor | None) -> Iterator[None]:
        weight = weight.transpose(1, 2) if self._transposed else weight
        name = self.ffn.down
        with _replaced(self.module, name, weight), _replaced(self.module, f"{name}_bias", bias):
            yield

    @property
    def _has_bias(self) -> bool:
        return bool(getattr(self.module, "has_bias", False))

    @property
    def _transposed(self) -> bool:
        return bool(getattr(self.module, "is_transposed", False))

    @property
    def _rows(self) -> tuple[slice, slice]:
        """Where gate and up stand among the rows of the fused projection: one after the other, or in turn."""
        if getattr(self.module, "is_concatenated", True):
            return slice(None, self.width), slice(self.width, None)
        return slice(0, None, 2), slice(1, None, 2)

    def _weight(self, name: str) -> Tensor:
        weight = stored(self.module, name)
        return weight.transpose(1, 2) if self._transposed else weight

    def _down_shape(self, module: nn.Module) -> tuple[int, int, int]:
        """Experts, hidden size and width."""
        experts, *sizes = cast(Tensor, getattr(module, self.ffn.down)).shape
        hidden, width = reversed(sizes) if self._transposed else sizes
        return experts, hidden, width

    def _slice(self, module: nn.Module, kept: Tensor, real: Tensor) -> None:
        """Replace the parameters of `module` by those of `kept` neurons `[experts, kept]`, zero where not `real`."""
        concatenated = getattr(self.module, "is_concatenated", True)
        rows = torch.cat([kept, kept + self.width], 1) if concatenated else torch.stack([2 * kept, 2 * kept + 1], 2)
        rows = rows.flatten(1)
        filled = real.repeat(1, 2) if concatenated else real.repeat_interleave(2, 1)

        def sliced(weight: Tensor, index: Tensor, keep: Tensor, dim: int) -> nn.Parameter:
            shape = [1] * weight.dim()
            shape[0], shape[dim] = index.shape
            whole = list(weight.shape)
            whole[dim] = index.shape[1]
            picked = weight.detach().gather(dim, index.view(shape).expand(whole))
            return nn.Parameter(picked.masked_fill_(~keep.view(shape), 0), requires_grad=False)

        up, down = self.ffn.up, self.ffn.down
        setattr(module, up, sliced(getattr(module, up), rows, filled, 2 if self._transposed else 1))
        setattr(module, down, sliced(getattr(module, down), kept, real, 1 if self._transposed else 2))
        if self._has_bias:
            setattr(module, f"{up}_bias", sliced(getattr(module, f"{up}_bias"), rows, filled, 1))

    def _pick_experts(self, module: nn.Module, chosen: Tensor) -> None:
        """Leave to `module` the parameters of the `chosen` experts, and renumber those that it is called with."""
        names = [self.ffn.up, self.ffn.down]
        for name in names + [f"{name}_bias" for name in names if self._has_bias]:
            picked = cast(Tensor, getattr(module, name)).detach()[chosen]
            setattr(module, name, nn.Parameter(picked, requires_grad=False))
        module.__dict__["num_experts"] = int(chosen.sum())
        number = (chosen.cumsum(0) - 1).to(self.device)
        original = type(module).forward

        def forward(hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
            return original(module, hidden, number[experts], weights)

        module.__dict__["forward"] = forward

    def _unroutable(self, chosen: Tensor) -> str | None:
        """Why the router cannot do with the `chosen` experts; none where it can."""
        router = cast(Any, self.router)
        needed = int(getattr(router, "top_k", 0) or router.config.top_k_experts)
        groups, limit = getattr(router, "num_group", None) or 1, getattr(router, "topk_group", None) or 1
        left = chosen.view(groups, -1).sum(1)
        # A group's score is the sum of its two best experts', minus infinity where it has fewer: such a group is chosen
        # only where there are not enough others.
        admissible, other = left[left >= 2].sort().values, left[left < 2].sort().values
        worst = int(torch.cat([admissible[:limit], other[: max(0, limit - len(admissible))]]).sum())
        if worst >= needed:
            return None
        where = f" in its {limit} groups of experts" if groups > 1 else ""
        return f"its router must choose {needed} experts{where}, and the mask may leave it {worst}"

    @contextmanager
    def _forward_by(self, edit: Callable[[Observation], Tensor]) -> Iterator[None]:
        """Within the context, the experts run through our loop, with what enters down as `edit` returns it."""

        def forward(hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
            order = experts.flatten().argsort(stable=True)
            chosen, routing = experts.flatten()[order], weights.flatten()[order]
            tokens = order // experts.shape[1]
            sizes = torch.bincount(chosen, minlength=self.experts).tolist()
            inputs = hidden[tokens].split(sizes)
            products = [self._product(number, rows) for number, rows in enumerate(inputs) if len(rows)]
            values = edit(Observation(torch.cat(products), tokens, chosen, routing))
            for watcher in self._watchers:
                watcher(Observation(values, tokens, chosen, routing))
            outputs = [self._output(number, rows) for number, rows in enumerate(values.split(sizes)) if len(rows)]
            result = torch.zeros_like(hidden)
            return result.index_add_(0, tokens, (torch.cat(outputs) * routing.unsqueeze(-1)).to(hidden.dtype))

        with _forwarding(self.module, forward):
            yield

    def _product(self, expert: int, rows: Tensor) -> Tensor:
        bias = getattr(self.module, f"{self.ffn.up}_bias")[expert] if self._has_bias else None
        gate_up = nn.functional.linear(rows, self._weight(self.ffn.up)[expert], bias)
        return cast(Any, self.module)._apply_gate(gate_up)

    def _output(self, expert: int, rows: Tensor) -> Tensor:
        bias = getattr(self.module, f"{self.ffn.down}_bias")[expert] if self._has_bias else None
        return nn.functional.linear(rows, self.down[expert], bias)


class _Pick(nn.Module):
    """Picks kept columns."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept, persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        return values.index_select(-1, cast(Tensor, self.kept))


class _Excluding(TorchFunctionMode):
    """Within it, the selection among all experts, `topk` or `max`, sees minus infinity for the `removed` ones.

    Routers that select by `topk` weigh the chosen experts by what they computed before, which stays as it is. Sparse
    mixers (Phi-3.5-MoE) select by `max` and weigh by a softmax over what they selected from: the logits themselves are
    then minus infinity.
    """

    def __init__(self, removed: Tensor, *, logits: bool = False) -> None:
        super().__init__()
        self.removed, self.logits = removed, logits

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.logits and func in (torch.topk, Tensor.topk):
            scores, *rest = args
            grouped = scores.dim() == 3 and scores.shape[1] * scores.shape[2] == len(self.removed)
            if grouped or scores.shape[-1] == len(self.removed):
                removed = self.removed.view(scores.shape[1:]) if grouped else self.removed
                return func(scores.masked_fill(removed, -torch.inf), *rest, **kwargs)
        result = func(*args, **kwargs)
        if self.logits and func is nn.functional.linear:
            return result.masked_fill(self.removed, -torch.inf)
        return result


SHAPES: dict[str, type[Site]] = {
    "plain": PlainSite,
    "gated": GatedSite,
    "fused": FusedGatedSite,
    "experts": ExpertsSite,
}
"""Name in `FFN.shape` to the class that knows it."""


def find_sites(model: PreTrainedModel, ffns: Sequence[FFN]) -> list[Site]:
    """The sites that `ffns` declare, in module order. Raises `UsageError` where there is none.

    A block that holds other sites (a mixture, its experts) is none itself.
    """
    types = {model.config.model_type, model.config.get_text_config().model_type}
    ffns = [ffn for ffn in ffns if not ffn.model_types or types & set(ffn.model_types)]
    found = [(path, ffn) for path, _ in model.named_modules() for ffn in ffns if _matches(path, ffn.pattern)]
    containers = {path for path, _ in found if any(other.startswith(f"{path}.") for other, _ in found)}
    sites = [SHAPES[ffn.shape](model, path, ffn) for path, ffn in found if path not in containers]
    if not sites:
        patterns = ", ".join(ffn.pattern for ffn in ffns)
        raise UsageError(f"no FFN site found in {type(model).__name__}: no module matches {patterns}")
    return sites


def guess_sites(model: PreTrainedModel, pattern: str) -> list[Site]:
    """The sites whose down projections stand at `pattern`, in module order, each shape guessed from what stands beside.

    Raises `UsageError` where nothing stands there, and where it is not the down projection of a shape known here.
    """
    modules = dict(model.named_modules())
    paths = [path for path in modules if path and _matches(path, pattern)]
    if not paths:
        hidden = model.config.get_text_config().hidden_size
        linears = [path for path, module in modules.items() if getattr(module, "out_features", None) == hidden]
        places = dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", path) for path in linears)
        raise UsageError(
            f"no module of {type(model).__name__} matches {pattern!r}; linear modules that give its hidden size stand "
            f"at {', '.join(places) or 'no place'}"
        )
    return [_guess_site(model, path) for path in paths]


def _guess_site(model: PreTrainedModel, path: str) -> Site:
    block, _, name = path.rpartition(".")
    down, hidden = model.get_submodule(path), model.config.get_text_config().hidden_size
    if not isinstance(down, nn.Linear):
        raise UsageError(f"{path} is a {type(down).__name__}; a down projection whose FFN can be guessed is a Linear")
    if down.out_features != hidden:
        raise UsageError(f"{path} is no down projection: it gives {down.out_features} values, and {hidden} are hidden")
    if re.search(r"expert[^.]*\.\d+\.", path):
        raise UsageError(f"{path} belongs to a routed expert, which sees some tokens only: that cannot be guessed")
    beside = {
        other: module
        for other, module in model.get_submodule(block).named_children()
        if other != name and not isinstance(module, nn.Dropout)
    }
    rows = {other: module.out_features for other, module in beside.items() if isinstance(module, nn.Linear)}
    activations = [other for other, module in beside.items() if not list(module.parameters())]
    width = down.in_features
    by_rows: dict[tuple[int, ...], str] = {(width,): "plain", (2 * width,): "fused"}
    shape = "gated" if rows == {"gate_proj": width, "up_proj": width} else by_rows.get(tuple(rows.values()))
    if shape is None or len(activations) != 1 or len(beside) != len(rows) + 1:
        found = ", ".join(f"{other} ({_describe(module)})" for other, module in beside.items())
        raise UsageError(
            f"{path} is no down projection of an FFN whose shape is known: beside it stand {found or 'no modules'}; "
            f"expected are an activation function and gate_proj and up_proj, or one Linear, of {width} rows each, "
            f"or one Linear of {2 * width} rows"
        )
    up = "up_proj" if shape == "gated" else next(iter(rows))
    return SHAPES[shape](model, block, FFN(block, shape, up=up, down=name, activation=activations[0]))


def _describe(module: nn.Module) -> str:
    kind = type(module).__name__
    return f"{kind} of {module.out_features} rows" if isinstance(module, nn.Linear) else kind


def _matches(path: str, pattern: str) -> bool:
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _all_tokens(values: Tensor) -> Observation:
    rows = values.flatten(0, -2)
    return Observation(rows, torch.arange(len(rows), device=rows.device))


def quantisation(config: PreTrainedConfig) -> str | None:
    """The method by which a model's weights are quantised, with its bits where it says so; none where they are not."""
    found = getattr(config, "quantization_config", None)
    found = found or getattr(config.get_text_config(), "quantization_config", None)
    if found is None:
        return None
    about = found if isinstance(found, dict) else found.to_dict()
    bits = about.get("bits") or (8 if about.get("load_in_8bit") else 4 if about.get("load_in_4bit") else None)
    method = about.get("quant_method") or "bitsandbytes"  # whose oldest configurations do not name it
    return f"{getattr(method, 'value', method)}{f', {bits} bits' if bits else ''}"


def stored(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer of `module`, from where it is offloaded to if it is."""
    tensor = cast(Tensor, getattr(module, name))
    hook = _hook(module)
    return hook.weights_map[name] if tensor.is_meta and hook is not None and hook.offload else tensor


def is_packed(module: Any) -> bool:
    """Whether `module` is a linear layer whose weight is not a plain matrix of numbers."""
    sizes: list[Any] = [getattr(module, name, None) for name in ("out_features", "in_features")]
    return all(isinstance(size, int) for size in sizes) and not _is_plain(getattr(module, "weight", None), sizes)


OWN_FORWARD = "_old_forward"
"""What accelerate's hook calls, in a module that has one."""


def _hook(module: nn.Module) -> AlignDevicesHook | None:
    hook = getattr(module, "_hf_hook", None)
    return hook if isinstance(hook, AlignDevicesHook) else None


def _device(module: nn.Module) -> torch.device:
    """Where `module` computes."""
    for part in module.modules():
        hook = _hook(part)
        if hook is not None and hook.execution_device is not None:
            return torch.device(hook.execution_device)
        for tensor in chain(part.parameters(recurse=False), part.buffers(recurse=False)):
            return tensor.device
    raise ValueError(f"a {type(module).__name__} has no weights, and so no device")


def _is_plain(weight: Any, shape: Sequence[int] | None = None) -> bool:
    """Whether `weight` holds numbers, neither packed nor in need of scales, and has that shape."""
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.itemsize < 2:
        return False
    return shape is None or list(weight.shape) == list(shape)


def _bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in chain(module.parameters(), module.buffers()))


def _unsliceable_where_it_lies(module: nn.Module, name: str) -> str | None:
    """Why a weight of numbers cannot be sliced all the same; none where it can."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None and _hook(module) is None:
        return f"accelerate's {type(hook).__name__} cannot be had on sliced weights"
    weights: Any = getattr(hook, "weights_map", None)
    loader = weights.dataset if isinstance(weights, PrefixedDataset) else None
    if isinstance(loader, OffloadedWeightsLoader) and f"{weights.prefix}{name}" not in loader.state_dict:
        return "its weights are offloaded to disk, and slices of them would have to stay in memory"
    return None


def _clone(module: nn.Module) -> nn.Module:
    """A module of the same class that shares parameters and submodules, but whose submodules can be replaced.

    accelerate's hook is left behind: it would run the module that was cloned.
    """
    clone = module.__class__.__new__(module.__class__)
    hooking = {"_hf_hook", OWN_FORWARD, "forward"} if hasattr(module, "_hf_hook") else set()
    clone.__dict__ = {
        name: copy.copy(value) if isinstance(value, dict) else value
        for name, value in module.__dict__.items()
        if name not in hooking
    }
    return clone


def _hooked_as(module: nn.Module, clone: nn.Module) -> nn.Module:
    """The clone of a `module` with a hook of its own, where that has one: it computes and is offloaded as that is."""
    if (hook := _hook(module)) is None:
        return clone
    hook = copy.copy(hook)
    hook.weights_map = hook.tied_params_map = None
    hook.tied_params_names = set()
    return add_hook_to_module(clone, hook)


@contextmanager
def _forwarding(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context, calls of `module` run `forward`, inside of accelerate's hook where there is one."""
    name = OWN_FORWARD if hasattr(module, OWN_FORWARD) else "forward"
    before = module.__dict__.get(name)
    module.__dict__[name] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


@contextmanager
def _removing(*handles: torch.utils.hooks.RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _replaced(module: nn.Module, name: str, values: Tensor | None) -> Iterator[None]:
    """Within the context, a parameter of `module` has other values, where some are given."""
    if values is None:
        yield
        return
    before, hook = getattr(module, name), _hook(module)
    weights: Any = None if hook is None else hook.weights_map
    setattr(module, name, nn.Parameter(values, requires_grad=False))
    if hook is not None and hook.offload:
        hook.weights_map = ChainMap({name: values}, weights)
    try:
        yield
    finally:
        setattr(module, name, before)
        if hook is not None:
            hook.weights_map = weights
