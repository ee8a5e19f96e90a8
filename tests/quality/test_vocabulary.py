"""Likelihoods, divergences and likeliest tokens beside torch's, in one slice and in several."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from spath_eval.quality import vocabulary

ROWS, VOCABULARY = 7, 50


@pytest.fixture(params=[3 * VOCABULARY, 2**19], autouse=True)
def size(request, monkeypatch):
    monkeypatch.setitem(vocabulary.SLICE, "cpu", request.param)


@pytest.fixture
def logits():
    return 5 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0))


def test_log_probabilities_overwrite_logits(logits):
    expected = logits.double().log_softmax(-1)
    largest = vocabulary.normalise(logits)
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=0)
    assert torch.equal(largest, logits.amax(-1))


def test_targets_have_their_likelihood_and_whether_they_are_likeliest(logits):
    row = torch.tensor([0, 0, 3, 6, 6])
    target = torch.tensor([4, int(logits[0].argmax()), 49, int(logits[6].argmax()), 0])
    likelihood, likeliest = vocabulary.likelihoods(logits, row, target)
    torch.testing.assert_close(likelihood.double(), logits.double().log_softmax(-1)[row, target], atol=1e-5, rtol=0)
    assert torch.equal(likeliest.bool(), logits.argmax(-1)[row] == target)


def test_of_equally_likely_tokens_the_first_is_the_likeliest(logits):
    logits[2, [5, 9, 30]] = 40.0
    row, target = torch.full((3,), 2), torch.tensor([5, 9, 30])
    assert vocabulary.likelihoods(logits, row, target)[1].tolist() == [1, 0, 0]
    assert vocabulary.is_likeliest(logits, logits.amax(-1), row, target).tolist() == [True, False, False]


def test_the_divergence_is_summed_over_rows(logits):
    other = logits.flip(0).contiguous()
    for arm in (logits, other):
        vocabulary.normalise(arm)
    expected = F.kl_div(other.double(), logits.double(), reduction="sum", log_target=True)
    assert vocabulary.divergence(logits, other) == pytest.approx(float(expected), rel=1e-5)
    assert vocabulary.divergence(logits, logits) == 0
