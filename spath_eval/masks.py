"""Masks: which FFN neurons a pathway keeps.

A score per neuron becomes a mask by removing the lowest share of it, ranked within each layer or over the whole model.
The two differ: activations of early layers are often smaller, so that pooling over the model empties those first.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from spath_eval.contracts import UsageError

if TYPE_CHECKING:
    from spath_eval.sites import Site

Pool = Literal["layer", "model"]

EXPERTS = "experts:"
"""What a mask file puts before a site's path for the experts that the router may choose."""


@dataclass(frozen=True)
class Mask:
    """The neurons that are kept, per site. Immutable."""

    keep: Mapping[str, torch.Tensor]
    """A site's path to boolean `[width]`, or `[experts, width]` where the site has experts."""
    provenance: Mapping[str, str] = field(default_factory=dict)
    """Where it comes from: model fingerprint, profile, domain, strategy."""
    experts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Of sites from which whole experts are removed: the path to boolean `[experts]`, true for those that the router
    may choose. Of the others no neuron is kept."""

    def __post_init__(self) -> None:
        for name in ("keep", "experts"):
            copies = {path: keep.detach().cpu().clone() for path, keep in getattr(self, name).items()}
            object.__setattr__(self, name, copies)
        for path, keep in self.keep.items():
            if keep.dtype != torch.bool or keep.dim() not in (1, 2):
                raise UsageError(
                    f"mask of {path}: expected boolean [width] or [experts, width], not {keep.dtype} {list(keep.shape)}"
                )
        for path, experts in self.experts.items():
            keep = self.keep.get(path, torch.empty(0))
            if keep.dim() != 2 or experts.dtype != torch.bool or experts.shape != keep.shape[:1]:
                raise UsageError(f"mask of {path}: expected boolean [experts] for its experts")
            keep[~experts] = False

    def __getitem__(self, path: str) -> torch.Tensor:
        return self.keep[path]

    @cached_property
    def achieved(self) -> float:
        """Share of all neurons that is removed."""
        total = sum(keep.numel() for keep in self.keep.values())
        return 1 - sum(int(keep.sum()) for keep in self.keep.values()) / total

    @property
    def per_site(self) -> dict[str, float]:
        """Share of each site's neurons that is removed."""
        return {path: 1 - int(keep.sum()) / keep.numel() for path, keep in self.keep.items()}

    @cached_property
    def digest(self) -> str:
        """SHA-256 over paths, shapes and values."""
        digest = hashlib.sha256()
        for part in (self.keep, self.experts):
            for path, keep in sorted(part.items()):
                digest.update(f"{path}{list(keep.shape)}".encode())
                digest.update(keep.numpy().tobytes())
        return digest.hexdigest()

    def check(self, sites: Sequence[Site]) -> None:
        """Raise `UsageError` unless the mask fits `sites` exactly."""
        expected = {site.path: list(site.shape) for site in sites}
        if missing := [path for path in expected if path not in self.keep]:
            raise UsageError(f"the mask lacks {len(missing)} of the model's sites, {missing[0]} among them")
        if unknown := [path for path in self.keep if path not in expected]:
            raise UsageError(f"the mask has sites that the model lacks: {', '.join(unknown[:3])}")
        for path, shape in expected.items():
            if list(self.keep[path].shape) != shape:
                raise UsageError(
                    f"the mask of {path} has shape {list(self.keep[path].shape)}, the model's site {shape}"
                )

    def save(self, path: Path) -> None:
        """Write the mask as safetensors with its provenance in the header, atomically."""
        header = {**self.provenance, "spath_eval": "mask", "digest": self.digest}
        experts = {f"{EXPERTS}{site}": chosen for site, chosen in self.experts.items()}
        write_safetensors(dict(self.keep) | experts, header, path)

    @classmethod
    def load(cls, path: Path) -> Mask:
        """Read a mask. Raises `UsageError` for what is none, or does not hold the values it was written with."""
        tensors, header = read_safetensors(path, "mask")
        if not tensors:
            raise UsageError(f"mask {path} is empty: it has no site")
        experts = {name[len(EXPERTS) :]: tensors.pop(name) for name in list(tensors) if name.startswith(EXPERTS)}
        provenance = {key: value for key, value in header.items() if key not in ("spath_eval", "digest")}
        mask = cls(tensors, provenance, experts)
        if header.get("digest", mask.digest) != mask.digest:
            raise UsageError(f"mask {path} is damaged: its values do not have the digest that its header gives")
        return mask


def keep_all(sites: Sequence[Site]) -> Mask:
    """The mask that removes nothing."""
    return Mask({site.path: torch.ones(site.shape, dtype=torch.bool) for site in sites})


def drop_all(sites: Sequence[Site]) -> Mask:
    """The mask that removes everything."""
    return Mask({site.path: torch.zeros(site.shape, dtype=torch.bool) for site in sites})


def remove_lowest(scores: Mapping[str, torch.Tensor], sparsity: float, pool: Pool = "layer") -> Mask:
    """The mask that removes the `sparsity` share of neurons whose scores are lowest.

    `scores` maps a site's path to `[width]` or `[experts, width]`. With `pool="layer"` the share is taken of every site
    (of every expert within it), with `pool="model"` of all neurons together. The number removed is the share rounded
    to a whole neuron; among equal scores the first go, so that the result is deterministic. Raises `ValueError` for a
    score that is not finite.
    """
    for path, score in scores.items():
        if not torch.isfinite(score).all():
            raise ValueError(f"scores of {path} are not finite")
    if pool == "layer":
        return Mask({path: _above_lowest(score, sparsity) for path, score in scores.items()})
    everything = torch.cat([score.flatten() for score in scores.values()])
    parts = _above_lowest(everything, sparsity).split([score.numel() for score in scores.values()])
    return Mask({path: part.view(scores[path].shape) for path, part in zip(scores, parts, strict=True)})


def remove_experts(mask: Mask, scores: Mapping[str, torch.Tensor], sparsity: float) -> Mask:
    """The mask that removes of each site's experts the `sparsity` share whose scores `[experts]` are lowest, too."""
    if not scores:
        raise UsageError("the model has no routed experts to remove")
    experts = {path: _above_lowest(score, sparsity) for path, score in scores.items()}
    return Mask(mask.keep, mask.provenance, experts)


def jaccard(first: Mask, second: Mask) -> float:
    """Of the neurons that either mask removes, the share that both remove; 1 where neither removes any.

    Of the masks that two halves of a text give, it says how little the choice depends on the text. Of two unrelated
    choices of the share s of all neurons it is about s / (2 - s). Raises `ValueError` for masks of different sites.
    """
    shapes, others = ({path: keep.shape for path, keep in mask.keep.items()} for mask in (first, second))
    if shapes != others:
        raise ValueError("the masks are not of the same sites")
    both = sum(int((~keep & ~second[path]).sum()) for path, keep in first.keep.items())
    either = sum(int((~keep | ~second[path]).sum()) for path, keep in first.keep.items())
    return both / either if either else 1.0


def _above_lowest(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    count = round(sparsity * scores.shape[-1])
    order = scores.argsort(dim=-1, stable=True)
    keep = torch.ones(scores.shape, dtype=torch.bool)
    return keep.scatter_(-1, order[..., :count].cpu(), value=False)


def write_safetensors(tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any], path: Path) -> None:
    """Write `tensors` with `header` atomically. Raises `UsageError` where the file system refuses."""
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in header.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
            Path(temporary).chmod(0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink()
            raise
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot write {path}: {error}") from error


def read_safetensors(path: Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and header of a file that this project wrote as `kind`. Raises `UsageError` for any other file."""
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("spath_eval") != kind:
                raise UsageError(f"{path} is not a {kind} of this program")
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UsageError(f"cannot read {kind} {path}: {error}") from error
