"""Negative selection and its controls, against percentiles computed by numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spath_eval import Budget, Context, UsageError
from spath_eval.plugins.architectures.gemma import GEMMA
from spath_eval.plugins.architectures.moe import MOE
from spath_eval.plugins.strategies.keep_all import KeepAll
from spath_eval.plugins.strategies.negative import Negative
from spath_eval.plugins.strategies.random import Random
from spath_eval.plugins.strategies.reverse import Reverse
from spath_eval.profiling import DomainProfile, Profile

SPARSITY = 0.25


@pytest.fixture(scope="module")
def sites(tiny_model):
    return GEMMA.sites(tiny_model("gemma3n_text"))


@pytest.fixture(scope="module")
def activity(sites):
    """Mean absolute activations that grow with depth, as they do in real models."""
    generator = torch.Generator().manual_seed(0)
    return {
        site.path: (depth + 1) * torch.rand(site.width, generator=generator, dtype=torch.float64)
        for depth, site in enumerate(sites)
    }


def context(sites, activity=None, *, routing=None, budget=None, sparsity=SPARSITY, seed=0):
    profile = None
    if activity:
        own = {"mean_abs": activity, "routing_share": routing or {}}
        other = {name: {path: values.flip(0) for path, values in part.items()} for name, part in own.items()}
        domains = {"math": own, "code": other}
        profile = Profile({name: DomainProfile(name, 9, "", "", values) for name, values in domains.items()})
    generator = torch.Generator().manual_seed(seed)
    return Context("math", budget or Budget(sparsity), {site.path: site for site in sites}, profile, generator)


def test_negative_skips_what_lies_below_the_percentile_of_its_layer(sites, activity):
    mask = Negative().select(context(sites, activity))
    assert Negative().pool == "layer"
    for path, values in activity.items():
        percentile = np.percentile(values.numpy(), 100 * SPARSITY, method="higher")
        assert np.array_equal(mask[path].numpy(), values.numpy() >= percentile)
    assert mask.achieved == SPARSITY


def test_negative_skips_what_lies_below_the_percentile_of_the_model(sites, activity):
    mask = Negative(pool="model").select(context(sites, activity))
    percentile = np.percentile(torch.cat(list(activity.values())).numpy(), 100 * SPARSITY, method="higher")
    for path, values in activity.items():
        assert np.array_equal(mask[path].numpy(), values.numpy() >= percentile)
    assert mask.achieved == SPARSITY
    first, *_, last = mask.per_site.values()
    assert first > SPARSITY > last, "pooling over the model empties early layers first"


def test_reverse_removes_the_most_active(sites, activity):
    mask = Reverse().select(context(sites, activity))
    pooled = Reverse(pool="model").select(context(sites, activity))
    everything = np.percentile(torch.cat(list(activity.values())).numpy(), 100 * (1 - SPARSITY), method="lower")
    for path, values in activity.items():
        percentile = np.percentile(values.numpy(), 100 * (1 - SPARSITY), method="lower")
        assert np.array_equal(mask[path].numpy(), values.numpy() <= percentile)
        assert np.array_equal(pooled[path].numpy(), values.numpy() <= everything)
    assert mask.achieved == pooled.achieved == SPARSITY


def test_negative_and_reverse_read_statistics_of_their_own_domain():
    assert (Negative.requires, Reverse.requires) == (("mean_abs", "routing_share"), ("mean_abs",))
    for strategy in (Negative, Reverse):
        assert (strategy.all_domains, strategy.needs_batches) == (False, False)


def test_negative_removes_the_experts_that_the_domain_is_routed_to_least(tiny_model):
    sites = MOE.sites(tiny_model("qwen3_moe"))
    generator = torch.Generator().manual_seed(0)
    activity = {
        site.path: torch.rand((site.experts, site.width) if site.experts else (site.width,), generator=generator)
        for site in sites
    }
    routing = {site.path: torch.rand(8, generator=generator) for site in sites if site.experts}
    for sparsity in (0.0, SPARSITY):
        budget = Budget(sparsity, expert_sparsity=0.4)
        mask = Negative().select(context(sites, activity, routing=routing, budget=budget))
        mask.check(sites)
        assert mask.experts.keys() == routing.keys()
        for path, shares in routing.items():
            percentile = np.percentile(shares.numpy(), 40, method="higher")
            assert np.array_equal(mask.experts[path].numpy(), shares.numpy() >= percentile)
            kept = mask[path][mask.experts[path]]
            assert (kept.sum(1) == 24 - round(24 * sparsity)).all()
            assert not mask[path][~mask.experts[path]].any()
        assert mask[sites[0].path].sum() == 64 - round(64 * sparsity), "the dense FFN loses its own share alone"


def test_negative_removes_no_expert_where_none_is_asked_for(sites, activity):
    assert Negative().select(context(sites, activity)).experts == {}


def test_negative_says_that_a_dense_model_has_no_experts_to_remove(sites, activity):
    with pytest.raises(UsageError, match="no routed experts"):
        Negative().select(context(sites, activity, budget=Budget(0.1, expert_sparsity=0.25)))


def test_random_removes_the_same_share_of_every_layer(sites):
    mask = Random().select(context(sites, sparsity=0.15))
    assert {path: int((~keep).sum()) for path, keep in mask.keep.items()} == {
        site.path: round(0.15 * site.width) for site in sites
    }


def test_random_depends_on_the_seed_alone(sites, activity):
    mask = Random().select(context(sites))
    torch.manual_seed(99)  # the global generator is none of its business
    assert Random.requires == ()
    assert Random().select(context(sites)).digest == mask.digest
    assert Random().select(context(sites, activity)).digest == mask.digest
    assert Random().select(context(sites, seed=1)).digest != mask.digest


def test_random_spares_no_neuron_for_good(sites):
    kept = sum(Random().select(context(sites, seed=seed))[sites[0].path].int() for seed in range(60))
    assert kept.min() > 0
    assert kept.max() < 60
    assert kept.double().mean() == pytest.approx(60 * (1 - SPARSITY))


def test_keep_all_removes_nothing_whatever_the_budget(sites):
    mask = KeepAll().select(context(sites, sparsity=0.9))
    mask.check(sites)
    assert mask.achieved == 0
    assert KeepAll.requires == ()
