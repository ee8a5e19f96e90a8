"""What is asked of logits over a large vocabulary, in float32 and in few passes over memory.

A row of 262,144 logits is a megabyte. A pass over many rows waits for memory, and so does a new tensor of them.
Rows are therefore taken a few at a time, as many as a core's cache holds, and results overwrite them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SLICE = {"cpu": 2**19}
"""Logits that are taken at a time; elsewhere all are."""


def slices(logits: Tensor) -> Iterator[slice]:
    """The rows of `logits` `[rows, vocabulary]` that are taken together, in turn."""
    size = max(1, SLICE.get(logits.device.type, logits.numel()) // logits.shape[1])
    return (slice(start, start + size) for start in range(0, len(logits), size))


def normalise(logits: Tensor) -> Tensor:
    """Turn `logits` `[rows, vocabulary]` into log-probabilities, in place; the largest of each row, `[rows]`."""
    largest = []
    for part in map(logits.__getitem__, slices(logits)):
        total, top = _normaliser(part)
        part.sub_(total)
        largest.append((top - total)[:, 0])
    return torch.cat(largest)


def likelihoods(logits: Tensor, row: Tensor, target: Tensor) -> Tensor:
    """Of each target its log-likelihood, and whether it is the token that `argmax` gives: `[2, targets]`.

    `logits` are `[rows, vocabulary]`, `row` and `target` `[targets]`.
    """
    picked = logits[row, target]
    normalisers, tops = [], []
    for part in map(logits.__getitem__, slices(logits)):
        total, top = _normaliser(part)
        normalisers.append(total[:, 0])
        tops.append(top[:, 0])
    likeliest = is_likeliest(logits, torch.cat(tops), row, target)
    return torch.stack([picked - torch.cat(normalisers)[row], likeliest.to(picked.dtype)])


def is_likeliest(logits: Tensor, largest: Tensor, row: Tensor, target: Tensor) -> Tensor:
    """Whether each target is the token that `argmax` gives, of equally likely ones the first; boolean, `[targets]`.

    `largest` `[rows]` are the largest of `logits` `[rows, vocabulary]`. On a CPU `argmax` itself is slow.
    """
    if logits.device.type != "cpu":
        return logits.argmax(-1)[row] == target
    likeliest = logits[row, target] == largest[row]
    for number in likeliest.nonzero()[:, 0].tolist():
        place = row[number]
        likeliest[number] = not (logits[place, : target[number]] == largest[place]).any()
    return likeliest


def divergence(before: Tensor, after: Tensor) -> float:
    """The sum over rows of KL(before || after) of log-probabilities `[rows, vocabulary]`, in nats."""
    sums = [float((before[at].exp().mul_(before[at] - after[at])).sum()) for at in slices(before)]
    return sum(sums)


def _normaliser(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of the sum of exponentials of each row, and the largest of the row, `[rows, 1]` each."""
    top = logits.amax(-1, keepdim=True)
    return (logits - top).exp_().sum(-1, keepdim=True).log_().add_(top), top
