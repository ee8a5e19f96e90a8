"""Profiles: how strongly each neuron is activated by the text of a domain.

One streaming pass of the dense model over the text; sums are kept in float64 and only the text's own tokens count,
neither padding nor BOS. Statistics are taken of what enters the down projection, the neuron's activation. The mean
absolute activation is the one of "Sparse Pathways: Domain-Aware Neuron Routing" (A. Young).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spath_eval import __version__
from spath_eval.contracts import UsageError
from spath_eval.masks import read_safetensors, write_safetensors
from spath_eval.sites import Observation, Site
from spath_eval.texts import Batch, Corpus, batches, digest_all

log = logging.getLogger(__name__)

STATISTICS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean_abs": torch.abs,
    "mean_square": torch.square,
}
"""What a strategy's `requires` can name, to the function whose mean over tokens is taken (over those routed to it, for
a routed expert)."""

ROUTING = "routing_share"
"""The statistic of routed experts: which share of the tokens each is chosen for, `[experts]`."""


@dataclass(frozen=True)
class DomainProfile:
    """Statistics of one domain."""

    domain: str
    tokens: int
    """Number of tokens that were counted."""
    source: str
    """Where the text comes from."""
    text_digest: str
    statistics: Mapping[str, Mapping[str, torch.Tensor]]
    """Name of the statistic to site path to float64 `[width]` (`[experts, width]` where the site has experts)."""


@dataclass(frozen=True)
class Profile:
    """Statistics of every FFN neuron, per domain."""

    domains: Mapping[str, DomainProfile]
    model: str = ""
    """Fingerprint of the model."""
    provenance: Mapping[str, str] = field(default_factory=dict)

    def statistic(self, name: str, domain: str) -> Mapping[str, torch.Tensor]:
        """Site path to values `[width]`. Raises `UsageError` for what was not collected."""
        if domain not in self.domains:
            raise UsageError(f"the profile has no domain {domain!r}: it has {', '.join(self.domains)}")
        statistics = self.domains[domain].statistics
        if name not in statistics:
            raise UsageError(
                f"the profile has no statistic {name!r}: it has {', '.join(statistics)}; see Strategy.requires"
            )
        return statistics[name]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the model, the domains and every value."""
        result = hashlib.sha256(self.model.encode())
        for domain, part in sorted(self.domains.items()):
            result.update(f"{domain}{part.tokens}{part.text_digest}".encode())
            for name, sites in sorted(part.statistics.items()):
                for path, values in sorted(sites.items()):
                    result.update(f"{name}{path}".encode() + values.numpy().tobytes())
        return result.hexdigest()

    def save(self, path: Path) -> None:
        """Write all domains into one safetensors file, provenance in the header."""
        tensors: dict[str, torch.Tensor] = {}
        about: dict[str, Any] = {}
        for domain, part in self.domains.items():
            about[domain] = {"tokens": part.tokens, "source": part.source, "text_digest": part.text_digest}
            for name, sites in part.statistics.items():
                tensors |= {f"{domain}/{name}/{site}": values for site, values in sites.items()}
        header = {**self.provenance, "spath_eval": "profile", "model": self.model, "domains": about}
        write_safetensors(tensors, header, path)

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile. Raises `UsageError` for what is none."""
        tensors, header = read_safetensors(path, "profile")
        try:
            model, about = header.pop("model"), json.loads(header.pop("domains"))
            domains: dict[str, dict[str, dict[str, torch.Tensor]]] = {domain: {} for domain in about}
            for key, values in tensors.items():
                domain, name, site = key.split("/", 2)
                domains[domain].setdefault(name, {})[site] = values
            parts = {domain: DomainProfile(domain, statistics=domains[domain], **about[domain]) for domain in about}
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"profile {path} is damaged: {error!r}") from error
        return cls(parts, model, {key: value for key, value in header.items() if key != "spath_eval"})


class _Sums:
    """Running float64 sums of one site's statistics over counted tokens."""

    def __init__(self, site: Site, names: Iterable[str]) -> None:
        device = site.down.device
        shape = site.shape
        means = [name for name in names if name != ROUTING]
        self.sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name in means}
        self.rows = torch.zeros(shape[:-1], dtype=torch.float64, device=device)
        self.counted: torch.Tensor | None = None
        """Which tokens of the batch now in the model count, `[batch * tokens]`."""

    def add(self, observation: Observation) -> None:
        assert self.counted is not None
        counted = self.counted[observation.tokens]
        values = observation.values[counted].float()  # in half precision squares are coarse, and overflow
        if observation.experts is None:
            self.rows += len(values)
            for name, total in self.sums.items():
                total += STATISTICS[name](values).sum(0, dtype=torch.float64)
            return
        experts = observation.experts[counted]
        self.rows.index_add_(0, experts, torch.ones_like(experts, dtype=torch.float64))
        for name, total in self.sums.items():
            total.index_add_(0, experts, STATISTICS[name](values).double())

    def statistics(self, tokens: int) -> dict[str, torch.Tensor]:
        """Each statistic after `tokens` counted tokens."""
        rows = self.rows.clamp(min=1).unsqueeze(-1)
        routing = {ROUTING: (self.rows / tokens).cpu()} if self.rows.dim() else {}
        return {name: (total / rows).cpu() for name, total in self.sums.items()} | routing


def profile_domain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sites: Sequence[Site],
    domain: str,
    corpus: Corpus,
    names: Iterable[str],
    *,
    tokens: int,
    batch_size: int,
    progress: Callable[[int], None] = lambda count: None,
) -> DomainProfile:
    """Stream the first `tokens` tokens of the corpus through the dense model and average.

    `progress` is told how many tokens each batch counted. Raises `UsageError` where the text holds no token.
    """
    sums = {site.path: _Sums(site, names) for site in sites}
    device = model.device
    seen = 0
    with torch.inference_mode(), ExitStack() as stack:
        for site in sites:
            stack.enter_context(site.observe(sums[site.path].add))
        for batch in batches(tokenizer, corpus.profile, tokens=tokens, batch_size=batch_size):
            counted = batch.counted.flatten().to(device)
            for one in sums.values():
                one.counted = counted
            forward_backbone(model, batch)
            count = int(batch.counted.sum())
            seen += count
            progress(count)
    if not seen:
        raise UsageError(f"profile text of {domain} ({corpus.source}): it holds no token")
    found = {path: one.statistics(seen) for path, one in sums.items()}
    statistics = {name: {path: values[name] for path, values in found.items() if name in values} for name in names}
    return DomainProfile(domain, seen, corpus.source, digest_all(corpus.profile), statistics)


def forward_backbone(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Final hidden states `[rows, tokens, hidden]`, without the output head."""
    backbone = model.get_decoder()
    return backbone(**batch.inputs(model.device), use_cache=False).last_hidden_state


def cache_folder() -> Path:
    """`$SPATH_CACHE_DIR`, else `spath-eval` in the user's cache folder."""
    if folder := os.environ.get("SPATH_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spath-eval"


def cached_profile(
    fingerprint: str,
    model: PreTrainedModel,
    domain: str,
    corpus: Corpus,
    settings: Mapping[str, Any],
    make: Callable[[], DomainProfile],
) -> DomainProfile:
    """The domain's profile from the cache if it was made from exactly these inputs, else from `make`, and then cached.

    `settings` holds what else decides the values: statistics, tokens, batch size.
    """
    key = {
        "model": fingerprint,
        "device": model.device.type,
        "domain": domain,
        "text": digest_all(corpus.profile),
        "source": corpus.source,
        **settings,
        "versions": [__version__, torch.__version__, transformers.__version__],
    }
    path = (
        cache_folder()
        / "profiles"
        / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.safetensors"
    )
    if os.path.exists(path):  # unlike Path.exists it is false where the folder cannot be looked into
        try:
            return Profile.load(path).domains[domain]
        except (UsageError, KeyError) as error:
            log.warning("a damaged profile in the cache is made again: %s", error)
    part = make()
    try:
        Profile({domain: part}, fingerprint).save(path)
    except UsageError as error:
        log.warning("the profile is not cached: %s", error)
    return part
