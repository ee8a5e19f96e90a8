"""Compact weights lie as fast products want them: contiguous, and in two-byte types in rows of whole 16 bytes."""

import pytest
import torch

from spath_eval.contracts import FFN
from spath_eval.masks import Mask
from spath_eval.pathways import PARITY_TOLERANCE, StaticPathway, check_parity
from spath_eval.sites import find_sites
from spath_eval.texts import Batch

FFNS = {
    "gemma": FFN("model.layers.*.mlp"),
    "llama+mlp_bias": FFN("model.layers.*.mlp"),
    "gemma3n_text": FFN("model.layers.*.mlp", couples_neurons="activation_sparsity"),
    "phi": FFN("model.layers.*.mlp", "plain", up="fc1", down="fc2", activation="activation_fn"),
    "phi3": FFN("model.layers.*.mlp", "fused", up="gate_up_proj", activation="activation_fn"),
}


def sites_and_mask(model, ffn, kept):
    """The sites of `model`, and a mask that keeps the first and the last neuron and so many others between them."""
    sites = find_sites(model, (ffn,))
    generator = torch.Generator().manual_seed(0)
    keep = {}
    for site in sites:
        between = 1 + torch.randperm(site.width - 2, generator=generator)[: kept - 2]
        keep[site.path] = torch.zeros(site.width, dtype=torch.bool)
        keep[site.path][torch.cat([between, torch.tensor([0, site.width - 1])])] = True
    return sites, Mask(keep)


@pytest.mark.parametrize("kind", FFNS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", [2, 17, 33, 40])
def test_rows_of_two_byte_types_are_filled_up_with_zeros(tiny_model, kind, dtype, kept):
    model = tiny_model(kind).to(dtype)
    sites, mask = sites_and_mask(model, FFNS[kind], kept)
    for site in sites:
        module, width = site.compact(mask), -(-kept // 8) * 8
        down = module.get_submodule(site.ffn.down)
        assert site.kept_width(mask) == down.in_features == width
        assert site.weight_bytes(mask) == sum(parameter.nbytes for parameter in module.parameters())
        assert all(parameter.is_contiguous() for parameter in module.parameters())
        assert down.weight.stride(0) * down.weight.itemsize % 16 == 0
        assert int((down.weight != 0).any(0).sum()) == kept
        up = module.get_submodule(site.ffn.up)
        rows = kept * (2 if site.ffn.shape == "fused" else 1)
        assert int((up.weight != 0).any(1).sum()) == rows
        if up.bias is not None:
            assert int((up.bias != 0).sum()) <= rows
    tokens = torch.arange(4, 36).reshape(2, 16)
    probe = Batch(tokens, torch.ones_like(tokens), torch.ones_like(tokens).bool(), (0, 1))
    parity = check_parity(model, StaticPathway(sites, mask, "compact"), probe)
    assert parity["max_relative_difference"] <= PARITY_TOLERANCE[dtype]


@pytest.mark.parametrize("kind", FFNS)
def test_nothing_is_filled_up_in_float32_nor_to_the_whole_width(tiny_model, kind):
    model = tiny_model(kind)
    sites, mask = sites_and_mask(model, FFNS[kind], 17)
    assert [site.kept_width(mask) for site in sites] == [17] * len(sites)
    half = find_sites(model.to(torch.bfloat16), (FFNS[kind],))
    for site in half:
        almost, none = (torch.arange(site.width) < kept for kept in (site.width - 1, 0))
        assert site.kept_width(Mask({site.path: almost})) == site.width - 1
        assert site.kept_width(Mask({site.path: none})) == 0
