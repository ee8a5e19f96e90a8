"""Output preservation: how far a pathway's outputs on held-out text of the domain are from the dense model's.

Cosine similarity of final hidden states, Kullback-Leibler divergence KL(dense || sparse) of next-token distributions in
nats, agreement of the most likely token, and the ratio of perplexities with an interval over documents.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from spath_eval.contracts import UsageError
from spath_eval.models import logits_buffer, output_head
from spath_eval.pathways import Pathway
from spath_eval.profiling import forward_backbone
from spath_eval.quality.statistics import perplexity_ratio
from spath_eval.quality.vocabulary import divergence, is_likeliest, normalise
from spath_eval.texts import Batch, batches, digest

CHUNK = 128
"""Positions whose logits are held at a time: a vocabulary of 262,144 makes 1 MiB of each."""
KEPT = 32
"""What is kept of the dense model's distributions leaves this many times as much memory as its next piece."""

Nats = tuple[float, int]
"""A document's summed negative log-likelihood in nats, and how many tokens that is of."""


class Preservation:
    """The dense model's outputs on held-out text, computed once, against which pathways are compared.

    Raises `UsageError` where the text holds nothing to predict.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        documents: Sequence[str],
        *,
        tokens: int,
        batch_size: int,
    ) -> None:
        self.model = model
        self.documents = documents
        self._dense_logprobs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.dense_nats: dict[str, Nats] = {}
        """What each document costs the dense model, by digest, once a pathway was compared."""
        self.batches = list(batches(tokenizer, documents, tokens=tokens, batch_size=batch_size))
        if not any(batch.counted[:, 1:].any() for batch in self.batches):
            raise UsageError("the domain's text holds no held-out token to predict")
        with torch.inference_mode():
            self.dense = [forward_backbone(model, batch) for batch in self.batches]

    def compare(self, pathway: Pathway, *, seed: int) -> dict[str, Any]:
        """The record's `preservation` of a pathway, which must not be applied yet."""
        return self.measure(pathway, seed=seed)[0]

    def measure(self, pathway: Pathway, *, seed: int) -> tuple[dict[str, Any], dict[str, Nats]]:
        """`compare`, and what each document costs the pathway, by digest."""
        sums: defaultdict[str, float] = defaultdict(float)
        documents: defaultdict[int, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        with torch.inference_mode():
            for number, (batch, dense) in enumerate(zip(self.batches, self.dense, strict=True)):
                with pathway.applied():
                    sparse = forward_backbone(self.model, batch)
                counted = batch.counted.to(dense.device)
                cosine = F.cosine_similarity(dense[counted].double(), sparse[counted].double(), dim=-1)
                sums["cosine"] += float(cosine.sum())
                sums["tokens"] += len(cosine)
                self._add_distributions(number, batch, dense, sparse, sums, documents)
        digests = {number: digest(self.documents[number]) for number in sorted(documents)}
        self.dense_nats = {key: (documents[number][0], int(documents[number][2])) for number, key in digests.items()}
        sparse_nats = {key: (documents[number][1], int(documents[number][2])) for number, key in digests.items()}
        perplexity = perplexity_ratio(*zip(*documents.values(), strict=True), seed=seed)
        record = {
            "tokens": int(sums["tokens"]),
            "cosine": sums["cosine"] / sums["tokens"],
            "kl": sums["kl"] / sums["predicted"],
            "top1_agreement": sums["agreed"] / sums["predicted"],
            "perplexity": {
                "dense": perplexity.dense,
                "sparse": perplexity.sparse,
                "ratio": perplexity.ratio,
                "ci95": list(perplexity.ci95),
            },
        }
        return record, sparse_nats

    def forget(self) -> None:
        """Give back the memory of the dense model's distributions, which are computed again when they are needed."""
        self._dense_logprobs.clear()

    def _dense(self, number: int, chunk: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The dense model's log-probabilities, which are half of the work of a comparison and kept where they fit, and
        its likeliest tokens."""
        known = self._dense_logprobs.get((number, chunk))
        if known is None:
            logprobs = output_head(self.model, hidden)
            normalise(logprobs)
            known = logprobs, logprobs.argmax(-1)
            if logprobs.nbytes * KEPT < _available_bytes(logprobs.device):
                self._dense_logprobs[number, chunk] = known
        return known

    def _add_distributions(
        self,
        number: int,
        batch: Batch,
        dense: Tensor,
        sparse: Tensor,
        sums: defaultdict[str, float],
        documents: defaultdict[int, list[float]],
    ) -> None:
        buffer = logits_buffer(self.model, CHUNK)
        for chunk, (rows, positions) in enumerate(_predicting(batch)):
            targets = batch.input_ids[rows, positions + 1].to(dense.device)
            before, likeliest = self._dense(number, chunk, dense[rows, positions])
            after = output_head(self.model, sparse[rows, positions], buffer)
            largest = normalise(after)
            sums["kl"] += max(divergence(before, after), 0.0)
            row = torch.arange(len(after), device=after.device)
            sums["agreed"] += int(is_likeliest(after, largest, row, likeliest).sum())
            sums["predicted"] += len(rows)
            losses = torch.stack([F.nll_loss(arm, targets, reduction="none") for arm in (before, after)]).double().cpu()
            for row, (dense_loss, sparse_loss) in zip(rows.tolist(), losses.T.tolist(), strict=True):
                total = documents[batch.documents[row]]
                total[0] += dense_loss
                total[1] += sparse_loss
                total[2] += 1


def _available_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def _predicting(batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Row and position of everything that predicts a counted token, a chunk at a time."""
    rows, positions = batch.counted[:, 1:].nonzero(as_tuple=True)
    yield from zip(rows.split(CHUNK), positions.split(CHUNK), strict=True)
