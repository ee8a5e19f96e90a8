"""Output preservation: exact where nothing was removed, and equal to a plain float64 loop where something was."""

from __future__ import annotations

import copy
import math
import random

import numpy as np
import pytest
import torch

from spath_eval.masks import Mask, keep_all
from spath_eval.pathways import StaticPathway
from spath_eval.plugins.architectures.gemma import GEMMA
from spath_eval.quality import preservation as module
from spath_eval.quality.preservation import Preservation


@pytest.fixture(scope="module", params=["gemma", "gemma2", "gemma3n_text"])
def model(request, tiny_model):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def sites(model):
    return GEMMA.sites(model)


@pytest.fixture(scope="module")
def documents():
    generator = random.Random(0)
    lengths = [1, 2, 7, 12, 30, 25, 3, 18]
    return [" ".join(f"w{generator.randrange(4, 100)}" for _ in range(length)) for length in lengths]


def random_mask(sites):
    generator = torch.Generator().manual_seed(0)
    return Mask({site.path: torch.rand(site.width, generator=generator) > 0.3 for site in sites})


def outputs(model, ids):
    """Final hidden states and logits of one row, in float64."""
    entered = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0].double().numpy()
    handle.remove()
    return entered[0][0].double().numpy(), logits


def softmax(logits):
    return np.exp(logits - np.logaddexp.reduce(logits))


def plain_loop(model, mask, documents):
    """Every figure from its definition, a document at a time; neurons are removed from the weights themselves."""
    dense = copy.deepcopy(model).double()
    sparse = copy.deepcopy(dense)
    for path, keep in mask.keep.items():
        sparse.get_submodule(path).down_proj.weight[:, ~keep] = 0
    cosines, divergences, agreed, losses = [], [], [], {"dense": 0.0, "sparse": 0.0}
    for document in documents:
        ids = [2, *(int(word[1:]) for word in document.split())]
        (hidden_dense, dense_logits), (hidden_sparse, sparse_logits) = outputs(dense, ids), outputs(sparse, ids)
        for position in range(1, len(ids)):
            a, b = hidden_dense[position], hidden_sparse[position]
            cosines.append(a @ b / math.sqrt((a @ a) * (b @ b)))
            p, q = (softmax(logits[position - 1]) for logits in (dense_logits, sparse_logits))
            divergences.append(float((p * np.log(p / q)).sum()))
            agreed.append(p.argmax() == q.argmax())
            losses["dense"] -= math.log(p[ids[position]])
            losses["sparse"] -= math.log(q[ids[position]])
    perplexities = {arm: math.exp(loss / len(agreed)) for arm, loss in losses.items()}
    return {
        "tokens": len(cosines),
        "cosine": np.mean(cosines),
        "kl": np.mean(divergences),
        "top1_agreement": np.mean(agreed),
        **perplexities,
        "ratio": perplexities["sparse"] / perplexities["dense"],
    }


@pytest.mark.parametrize("batch_size", [1, 3])
def test_figures_equal_a_plain_float64_loop(model, sites, tiny_tokenizer, documents, batch_size, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 16)  # several chunks to a batch
    mask = random_mask(sites)
    preservation = Preservation(model, tiny_tokenizer, documents, tokens=1000, batch_size=batch_size)
    found = preservation.compare(StaticPathway(sites, mask, "compact"), seed=0)
    expected = plain_loop(model, mask, documents)
    perplexity = found["perplexity"]
    assert found["tokens"] == expected["tokens"] == sum(len(text.split()) for text in documents)
    assert found["cosine"] == pytest.approx(expected["cosine"], rel=1e-5)
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-5)
    assert found["kl"] > 1e-3
    assert found["top1_agreement"] == pytest.approx(expected["top1_agreement"], rel=1e-5)
    assert perplexity["dense"] == pytest.approx(expected["dense"], rel=1e-5)
    assert perplexity["sparse"] == pytest.approx(expected["sparse"], rel=1e-5)
    assert perplexity["ratio"] == pytest.approx(expected["ratio"], rel=1e-5)
    low, high = perplexity["ci95"]
    assert low < perplexity["ratio"] < high


@pytest.mark.parametrize("execution", ["masked", "compact"])
def test_an_identical_pathway_preserves_everything_exactly(model, sites, tiny_tokenizer, documents, execution):
    preservation = Preservation(model, tiny_tokenizer, documents, tokens=1000, batch_size=3)
    found = preservation.compare(StaticPathway(sites, keep_all(sites), execution), seed=0)
    assert found["cosine"] == pytest.approx(1, abs=1e-12)
    assert found["kl"] == 0
    assert found["top1_agreement"] == 1
    assert found["perplexity"]["ratio"] == 1
    assert found["perplexity"]["ci95"] == [1, 1]
    assert found["perplexity"]["dense"] == found["perplexity"]["sparse"] > 1


def test_masked_and_compact_tell_the_same(model, sites, tiny_tokenizer, documents):
    preservation = Preservation(model, tiny_tokenizer, documents, tokens=1000, batch_size=3)
    masked, compact = (
        preservation.compare(StaticPathway(sites, random_mask(sites), execution), seed=0)
        for execution in ("masked", "compact")
    )
    assert masked["perplexity"]["ratio"] == pytest.approx(compact["perplexity"]["ratio"], rel=1e-5)
    assert masked["kl"] == pytest.approx(compact["kl"], rel=1e-4)


def test_short_memory_changes_no_figure(model, sites, tiny_tokenizer, documents, monkeypatch):
    def twice():
        preservation = Preservation(model, tiny_tokenizer, documents, tokens=1000, batch_size=3)
        return [preservation.compare(StaticPathway(sites, random_mask(sites), "masked"), seed=0) for _ in range(2)]

    kept = twice()
    monkeypatch.setattr(module, "_available_bytes", lambda device: 0)
    assert twice() == kept == [kept[0], kept[0]]


def test_documents_sum_up_to_the_ratio(model, sites, tiny_tokenizer, documents):
    preservation = Preservation(model, tiny_tokenizer, documents, tokens=1000, batch_size=3)
    found, sparse = preservation.measure(StaticPathway(sites, random_mask(sites), "masked"), seed=0)
    dense = preservation.dense_nats
    assert dense.keys() == sparse.keys()
    assert len(dense) == len(documents)
    excess = sum(sparse[key][0] - dense[key][0] for key in dense) / sum(tokens for _, tokens in dense.values())
    assert math.exp(excess) == pytest.approx(found["perplexity"]["ratio"])


def test_the_token_budget_holds(model, sites, tiny_tokenizer, documents):
    preservation = Preservation(model, tiny_tokenizer, documents, tokens=25, batch_size=2)
    assert preservation.compare(StaticPathway(sites, random_mask(sites), "masked"), seed=0)["tokens"] == 25


def test_a_comparison_leaves_the_model_dense(model, sites, tiny_tokenizer, documents):
    preservation = Preservation(model, tiny_tokenizer, documents, tokens=100, batch_size=2)
    pathway = StaticPathway(sites, random_mask(sites), "compact")
    first = preservation.compare(pathway, seed=0)
    assert preservation.compare(StaticPathway(sites, keep_all(sites), "masked"), seed=0)["kl"] == 0
    assert preservation.compare(pathway, seed=0) == first
