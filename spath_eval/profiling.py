"""Profiles: how strongly each neuron is activated by the text of a domain.

One streaming pass of the dense model over the text; sums are kept in float64 and only the text's own tokens count,
neither padding nor BOS. Statistics are taken of what enters the down projection, the neuron's activation. The mean
absolute activation is the one of "Sparse Pathways: Domain-Aware Neuron Routing" (A. Young).

The same pass gives the statistics of two halves of the text, whose documents take turns, so that one can ask how far
the halves agree on a mask.
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

Statistics = Mapping[str, Mapping[str, torch.Tensor]]
"""Name of the statistic to site path to float64 `[width]` (`[experts, width]` where the site has experts)."""

log = logging.getLogger(__name__)

STATISTICS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean_abs": torch.abs,
    "mean_square": torch.square,
}
"""What a strategy's `requires` can name, to the function whose mean over tokens is taken (over those routed to it, for
a routed expert)."""

ROUTING = "routing_share"
"""The statistic of routed experts: which share of the tokens each is chosen for, `[experts]`. It is always collected,
for without it nobody could average the means of two texts."""

FORMAT = 2
"""Version of what a file holds of a profile: 2 brought the halves."""

CPU_CHUNK, GPU_CHUNK = 2**15, 2**24
"""Activations that are added up at a time, for each thread: in float64 a core's cache holds them, and torch gives each
thread as many; or a GPU is kept busy by them."""


@dataclass(frozen=True)
class DomainProfile:
    """Statistics of one domain."""

    domain: str
    tokens: int
    """Number of tokens that were counted."""
    source: str
    """Where the text comes from."""
    text_digest: str
    statistics: Statistics
    halves: tuple[DomainProfile, DomainProfile] | None = None
    """Those of either half of the text, whose documents take turns; none where a half holds no token, as of a single
    document, and in files of before there were halves."""


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

    def half(self, index: int) -> Profile:
        """The profile that half 0 or half 1 of each domain's text gives. Raises `UsageError` where there are none."""
        halves = {}
        for domain, part in self.domains.items():
            if part.halves is None:
                raise UsageError(f"the profile of {domain!r} has no halves: one document gives none, nor an old file")
            halves[domain] = part.halves[index]
        return Profile(halves, self.model, self.provenance)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the model, the domains and every value."""
        result = hashlib.sha256(self.model.encode())
        for domain, whole in sorted(self.domains.items()):
            for part in (whole, *(whole.halves or ())):
                result.update(f"{domain}{part.tokens}{part.text_digest}".encode())
                for name, sites in sorted(part.statistics.items()):
                    for path, values in sorted(sites.items()):
                        result.update(f"{name}{path}".encode() + values.numpy().tobytes())
        return result.hexdigest()

    def save(self, path: Path) -> None:
        """Write all domains into one safetensors file, provenance in the header.

        A tensor is called `DOMAIN/STATISTIC/SITE`. Of a text with halves the file holds these, as `DOMAIN/0/...` and
        `DOMAIN/1/...`, and the number of tokens of each, which give the whole.
        """
        tensors: dict[str, torch.Tensor] = {}
        for domain, whole in self.domains.items():
            stored = {f"{domain}/{n}": half for n, half in enumerate(whole.halves)} if whole.halves else {domain: whole}
            for prefix, part in stored.items():
                for name, sites in part.statistics.items():
                    tensors |= {f"{prefix}/{name}/{site}": values for site, values in sites.items()}
        about = {domain: _about(part) for domain, part in self.domains.items()}
        header = {**self.provenance, "spath_eval": "profile", "model": self.model, "domains": about}
        write_safetensors(tensors, header, path)

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a profile. Raises `UsageError` for what is none."""
        tensors, header = read_safetensors(path, "profile")
        try:
            model, about = header.pop("model"), json.loads(header.pop("domains"))
            parts = {domain: _read(domain, domain, entry, tensors) for domain, entry in about.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"profile {path} is damaged: {error!r}") from error
        return cls(parts, model, {key: value for key, value in header.items() if key != "spath_eval"})


SPECIALISED = 2.0
"""A neuron is specialised where its largest mean activation exceeds so many times its mean over domains."""


def specialisation(profile: Profile) -> dict[str, dict[str, float]]:
    """Site path to domain to the share of the site's neurons that are specialised and most active in that domain.

    Needs `mean_abs`. The ratio cannot exceed the number of domains.
    """
    shares = {}
    for path in profile.statistic("mean_abs", next(iter(profile.domains))):
        values = torch.stack([profile.statistic("mean_abs", domain)[path].flatten() for domain in profile.domains])
        special = values.amax(0) > SPECIALISED * values.mean(0)
        counts = torch.bincount(values.argmax(0)[special], minlength=len(values))
        shares[path] = dict(zip(profile.domains, (counts / values.shape[1]).tolist(), strict=True))
    return shares


def pooled(profile: Profile, name: str = "pooled") -> Profile:
    """A profile of one domain, whose text is that of all domains of `profile` together, token by token.

    It has halves where all domains have some. Raises `UsageError` where the domains do not have the same statistics, or
    experts no `routing_share`, by which their means are weighted.
    """
    parts = list(profile.domains.values())
    if not _alike(parts):
        raise UsageError("the domains of the profile have different statistics, so that they cannot be pooled")
    return Profile({name: _pool(name, parts)}, profile.model, profile.provenance)


def _pool(domain: str, parts: Sequence[DomainProfile]) -> DomainProfile:
    halves = None
    pairs = [part.halves for part in parts if part.halves]
    if len(pairs) == len(parts):
        first, second = (_pool(domain, half) for half in zip(*pairs, strict=True))
        halves = (first, second)
    return DomainProfile(
        domain,
        sum(part.tokens for part in parts),
        "; ".join(dict.fromkeys(part.source for part in parts)),
        hashlib.sha256("".join(part.text_digest for part in parts).encode()).hexdigest(),
        _combined(halves or parts),
        halves,
    )


def _alike(parts: Sequence[DomainProfile]) -> bool:
    """Whether all have the same statistics of the same sites."""
    first, *others = [{name: sites.keys() for name, sites in part.statistics.items()} for part in parts]
    return all(other == first for other in others)


def _combined(parts: Sequence[DomainProfile]) -> Statistics:
    """The statistics of the texts of all parts together."""
    tokens = torch.tensor([part.tokens for part in parts], dtype=torch.float64)

    def mean(name: str, path: str) -> torch.Tensor:
        values = torch.stack([part.statistics[name][path] for part in parts])
        weights = tokens.view(-1, *[1] * (values.dim() - 1))
        if values.dim() == 3:
            if not all(path in part.statistics.get(ROUTING, {}) for part in parts):
                raise UsageError(
                    f"the profile has no statistic {ROUTING!r}, by which the means of experts are weighted"
                )
            shares = torch.stack([part.statistics[ROUTING][path] for part in parts])
            weights = (weights * shares.unsqueeze(-1)).round()
        return (weights * values).sum(0) / weights.sum(0).clamp(min=1)

    return {name: {path: mean(name, path) for path in sites} for name, sites in parts[0].statistics.items()}


def _about(part: DomainProfile) -> dict[str, Any]:
    """What a profile file says of a domain, or of half of one, beside the values."""
    about = {"tokens": part.tokens, "source": part.source, "text_digest": part.text_digest}
    halves = {"halves": [_about(half) for half in part.halves]} if part.halves else {}
    return {**about, "statistics": list(part.statistics), **halves}


def _read(domain: str, prefix: str, about: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> DomainProfile:
    """The inverse of `_about`, with the tensors whose names begin with `prefix`."""
    found: dict[str, dict[str, torch.Tensor]] = {name: {} for name in about.pop("statistics", ())}
    if "halves" in about:
        first, second = (_read(domain, f"{prefix}/{n}", half, tensors) for n, half in enumerate(about.pop("halves")))
        if not _alike([first, second]):
            raise ValueError(f"the halves of {domain} have different statistics")
        return DomainProfile(domain, statistics=_combined([first, second]), halves=(first, second), **about)
    for key in tensors:
        if key.startswith(f"{prefix}/"):
            name, site = key.removeprefix(f"{prefix}/").split("/", 1)
            found.setdefault(name, {})[site] = tensors[key]
    return DomainProfile(domain, statistics=found, **about)


class _Counted:
    """The tokens of a batch that count, by the half of the text that they are of."""

    def __init__(self, batch: Batch, device: torch.device) -> None:
        halves = torch.tensor(batch.documents).remainder(2).unsqueeze(-1)
        self.half = torch.where(batch.counted, halves, -1).flatten().to(device)
        """0 or 1, and -1 of what does not count, `[batch * tokens]`."""
        self.tokens = _indices_by_half(self.half)

    def rows(self, observation: Observation) -> list[torch.Tensor]:
        """The rows of either half."""
        device = observation.values.device
        if observation.experts is None:  # one row for each token, in their order
            return [tokens.to(device) for tokens in self.tokens]
        return _indices_by_half(self.half.to(device)[observation.tokens])


def _indices_by_half(half: torch.Tensor) -> list[torch.Tensor]:
    return [(half == number).nonzero().squeeze(-1) for number in (0, 1)]


class _Sums:
    """Running float64 sums of one site's statistics over the counted tokens, of each half of the text."""

    def __init__(self, site: Site, names: Iterable[str]) -> None:
        device = site.device
        shape = (2, *site.shape)
        means = [name for name in names if name != ROUTING]
        self.sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name in means}
        self.rows = torch.zeros(shape[:-1], dtype=torch.float64, device=device)
        size = CPU_CHUNK * torch.get_num_threads() if device.type == "cpu" else GPU_CHUNK
        self.chunk = max(1, size // site.width)
        self.counted: _Counted | None = None
        """Those of the batch now in the model."""

    def add(self, observation: Observation) -> None:
        assert self.counted is not None
        experts = observation.experts
        for half, rows in enumerate(self.counted.rows(observation)):
            self.rows[half] += len(rows) if experts is None else experts[rows].bincount(minlength=self.rows.shape[-1])
            for chunk in rows.split(self.chunk):
                # In half precision squares would be coarse, and overflow.
                activations = observation.values.index_select(0, chunk).float()
                for name, sums in self.sums.items():
                    values = STATISTICS[name](activations)
                    if experts is None:
                        sums[half].add_(values.sum(0, dtype=torch.float64))
                    else:
                        sums[half].index_add_(0, experts[chunk], values.double())

    def statistics(self, half: int, tokens: int) -> dict[str, torch.Tensor]:
        """Each statistic of a half, after `tokens` counted tokens of it."""
        rows = self.rows[half].clamp(min=1).unsqueeze(-1)
        routing = {ROUTING: (self.rows[half] / tokens).cpu()} if self.rows.dim() > 1 else {}
        return {name: (total[half] / rows).cpu() for name, total in self.sums.items()} | routing


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
    """Stream the first `tokens` tokens of the corpus through the dense model and average, also over either half.

    `progress` is told how many tokens each batch counted. Raises `UsageError` where the text holds no token.
    """
    sums = {site.path: _Sums(site, names) for site in sites}
    seen = [0, 0]
    with torch.inference_mode(), ExitStack() as stack:
        for site in sites:
            stack.enter_context(site.observe(sums[site.path].add))
        for batch in batches(tokenizer, corpus.profile, tokens=tokens, batch_size=batch_size):
            counted = _Counted(batch, model.device)
            for one in sums.values():
                one.counted = counted
            forward_backbone(model, batch)
            seen = [before + len(rows) for before, rows in zip(seen, counted.tokens, strict=True)]
            progress(sum(map(len, counted.tokens)))
    if not any(seen):
        raise UsageError(f"profile text of {domain} ({corpus.source}): it holds no token")
    collected = dict.fromkeys([*names, *[ROUTING for site in sites if site.experts]])

    def part(half: int) -> DomainProfile:
        found = {path: one.statistics(half, seen[half]) for path, one in sums.items()}
        statistics = {name: {path: has[name] for path, has in found.items() if name in has} for name in collected}
        return DomainProfile(domain, seen[half], corpus.source, digest_all(corpus.profile[half::2]), statistics)

    parts = [part(half) for half in (0, 1) if seen[half]]
    halves = (parts[0], parts[1]) if len(parts) == 2 else None
    return DomainProfile(domain, sum(seen), corpus.source, digest_all(corpus.profile), _combined(parts), halves)


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
        "format": FORMAT,
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
