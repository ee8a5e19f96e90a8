"""Models at published dimensions, or some of their layers, with random weights: real speed without a download.

Matrix products take as long on random weights as on trained ones; the class is the family's own in transformers. Where
only some layers are built, the vocabulary is cut to 256, so that embeddings and output head do not count. What would
not fit into memory is refused before anything is allocated.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from spath_eval.contracts import Architecture, ReferenceShape, UsageError
from spath_eval.models import weight_bytes
from spath_eval.speed.conditions import available_memory

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from spath_eval.speed.timing import Workload

VOCABULARY = 256
"""Tokens that a model of some layers knows."""
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""What configurations call the number of routed experts."""
CHOSEN = ("num_experts_per_tok", "top_k_experts")
"""What they call the number that a token uses."""


@dataclass(frozen=True)
class Cut:
    """How much of a shape is built."""

    layers: int | None = None
    """Its first layers; none for all of them, with embeddings and output head."""
    experts: int | None = None
    """Routed experts of each layer; none for all."""


def find_shape(architectures: Iterable[Architecture], name: str) -> tuple[Architecture, ReferenceShape]:
    """The reference shape of that name, upper and lower case alike, and its family. Raises `UsageError` for another."""
    shapes = {shape.name: (family, shape) for family in architectures for shape in family.reference_shapes}
    for known, found in shapes.items():
        if known.lower() == name.lower():
            return found
    raise UsageError(f"unknown shape {name!r}: there are {', '.join(sorted(shapes, key=str.lower))}")


def routed_experts(shape: ReferenceShape) -> int | None:
    """Number of routed experts of a layer; none where there are none."""
    return _experts(AutoConfig.for_model(**shape.config))


def subject(shape: ReferenceShape, cut: Cut) -> str:
    """What a record calls that measurement."""
    layers = {None: "", 1: "one layer of "}.get(cut.layers, f"{cut.layers} layers of ")
    whole = routed_experts(shape)
    experts = "" if cut.experts in (None, whole) else f" with {cut.experts} of {whole} experts"
    return f"{layers}{shape.name}{experts}, random weights"


def build(
    shape: ReferenceShape, cut: Cut, *, device: str | torch.device, dtype: torch.dtype, seed: int = 0
) -> PreTrainedModel:
    """A causal language model of `shape`, as much of it as `cut` says, in evaluation mode.

    Weights are uniform with the standard deviation the family starts training with; norm weights are 1. Raises
    `UsageError` where the shape has no such layers or experts.
    """
    model = _without_values(shape, cut, device, dtype)
    generator = torch.Generator(device=device).manual_seed(seed)
    bound = 3**0.5 * getattr(model.config, "initializer_range", 0.02)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith(".weight"):
                parameter.fill_(1.0)
            else:
                parameter.uniform_(-bound, bound, generator=generator)
    return model.eval().requires_grad_(False)


def check_fits(
    family: Architecture,
    shape: ReferenceShape,
    cut: Cut,
    workload: Workload,
    *,
    kept: float,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Raise `UsageError` where the shape does not fit into the memory of `device`; nothing is allocated for that.

    Held are the dense weights and, at once, compact pathways that keep the `kept` share of all FFN weights together (1
    is another copy of them), the KV cache of `workload`, and activations, of which there are no more at a time than
    four of the hidden and three of the FFNs' width. The message names the most layers, or else experts, that fit.
    """
    available = available_memory(device)

    def needed(one: Cut) -> int:
        return _bytes_needed(family, _without_values(shape, one, "meta", dtype), workload, kept)

    wanted = needed(cut)
    if wanted <= available:
        return
    config = AutoConfig.for_model(**shape.config)
    layers, experts = cut.layers or config.num_hidden_layers, cut.experts or _experts(config)
    most = _most(layers, lambda count: needed(Cut(count, cut.experts)), available)
    if most:
        hint = f"--layers {most} would fit"
    elif experts and (most := _most(experts, lambda count: needed(Cut(1, count)), available)):
        hint = f"--layers 1 --experts {most} would fit"
    else:
        hint = "not even one layer would fit"
    raise UsageError(
        f"{subject(shape, cut)}: it needs {_gigabytes(wanted)} in {str(dtype).removeprefix('torch.')}, and "
        f"{_gigabytes(available)} are available on {device}: {hint}"
    )


def _most(limit: int, needed: Callable[[int], int], available: int) -> int:
    """The largest number from 1 to `limit` that needs no more than is available; 0 where 1 does."""
    return bisect.bisect_right(range(1, limit + 1), available, key=needed)


def _bytes_needed(family: Architecture, model: PreTrainedModel, workload: Workload, kept: float) -> int:
    config = model.config.get_text_config()
    sites = family.sites(model)
    ffn = sum(site.weight_bytes(None) for site in sites)
    heads = config.num_attention_heads
    if hasattr(config, "qk_head_dim"):  # latent attention, whose keys and values transformers caches in full
        position = heads * (config.qk_head_dim + config.v_head_dim)
    else:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        position = 2 * head_dim * (getattr(config, "num_key_value_heads", None) or heads)
    cached = workload.batch * (workload.tokens + workload.new_tokens) * config.num_hidden_layers * position
    chosen = next((getattr(config, name) for name in CHOSEN if getattr(config, name, None)), 1)
    widest = max(site.width * (chosen if site.experts else 1) for site in sites)
    active = workload.batch * (workload.tokens * (4 * config.hidden_size + 3 * widest) + config.vocab_size)
    return round(weight_bytes(model) + kept * ffn + model.dtype.itemsize * (cached + active))


def _without_values(shape: ReferenceShape, cut: Cut, device: str | torch.device, dtype: torch.dtype) -> PreTrainedModel:
    config = AutoConfig.for_model(**_configuration(shape, cut))
    # The library's own initialisation takes seconds for a hundred million weights.
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


def _configuration(shape: ReferenceShape, cut: Cut) -> dict[str, Any]:
    """The shape's configuration, cut down: of every list that has one entry per layer the first are left."""
    config = AutoConfig.for_model(**shape.config)
    # Ids beyond a cut vocabulary are refused by the embedding.
    whole = config.to_dict() | {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    if cut.experts is not None:
        whole |= _fewer_experts(shape, config, cut.experts)
    layers = whole["num_hidden_layers"]
    if cut.layers is None:
        return whole
    if not 1 <= cut.layers <= layers:
        raise UsageError(f"{shape.name} has {layers} layers: --layers {cut.layers} cannot be built")
    some = {
        key: value[: cut.layers] if isinstance(value, list) and len(value) == layers else value
        for key, value in whole.items()
    }
    some |= {"num_hidden_layers": cut.layers, "vocab_size": VOCABULARY}
    if "vocab_size_per_layer_input" in some:
        some["vocab_size_per_layer_input"] = VOCABULARY
    if "num_kv_shared_layers" in some:
        some["num_kv_shared_layers"] = 0
    if dense := some.get("first_k_dense_replace"):  # a few layers stand for the many, which are mixtures
        some["first_k_dense_replace"] = round(dense * cut.layers / layers)
    return some


def _experts(config: PreTrainedConfig) -> int | None:
    return next((found for name in EXPERTS if (found := getattr(config, name, None))), None)


def _fewer_experts(shape: ReferenceShape, config: PreTrainedConfig, experts: int) -> dict[str, Any]:
    whole = _experts(config)
    if whole is None:
        raise UsageError(f"{shape.name} has no routed experts: --experts {experts} cannot be built")
    if not 1 <= experts <= whole:
        raise UsageError(f"{shape.name} has {whole} experts in a layer: --experts {experts} cannot be built")
    own = config.to_dict()
    fewer = {name: experts for name in EXPERTS if name in own}
    fewer |= {name: min(experts, own[name]) for name in CHOSEN if own.get(name)}
    return fewer | {name: 1 for name in ("n_group", "topk_group") if own.get(name)}


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB"
