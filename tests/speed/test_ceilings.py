"""Ceilings equal counts made by hand."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GemmaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from spath_eval.contracts import FFN
from spath_eval.masks import Mask, drop_all, keep_all
from spath_eval.sites import Site, find_sites
from spath_eval.speed.ceilings import Bound, Count, Work, site_work, work
from spath_eval.speed.conditions import Rates
from spath_eval.speed.timing import Workload

WORKLOAD = Workload(batch=3, tokens=5, new_tokens=2)
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
# Weights of one layer: query and output 16 x 16, key and value 16 x 8; gate, up and down 16 x 32; the head 16 x 64.
ATTENTION = 2 * 16 * 16 + 2 * 16 * 8
NEURON = 3 * 16
FFNS = 2 * 32 * NEURON
HEAD = 16 * 64
# Two operations per weight and token, the head once; scores and values over the 15 causal pairs of 5 tokens.
PREFILL_REST = 2 * (5 * 2 * ATTENTION + HEAD) + 2 * (2 * 2 * 2 * 8 * 15)
# Keys and values of one 8-wide head; the two steps attend to 6 and 7 positions.
CACHED = 2 * 8 * (6 + 7) / 2
DECODE_REST = 2 * ATTENTION + HEAD + 3 * 2 * CACHED


@dataclass(frozen=True)
class Ceiling:
    prefill: float
    decode: float


def ceiling(model: PreTrainedModel, sites: Any, mask: Any, workload: Workload) -> Ceiling:
    """By operations in prefill, by bytes in decode."""
    dense, sparse = (work(model, sites, one, workload) for one in (None, mask))
    return Ceiling(
        Bound.of(dense.prefill, sparse.prefill, "flops").ceiling, Bound.of(dense.decode, sparse.decode, "bytes").ceiling
    )


def gemma(dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(GemmaConfig(**SIZES | changes), dtype=dtype)


def sites_of(model: PreTrainedModel) -> list[Site]:
    return find_sites(model, (FFN("model.layers.*.mlp"),))


def keep_first(sites: list[Site], kept: int) -> Mask:
    return Mask({site.path: torch.arange(site.width) < kept for site in sites})


def test_removing_nothing_gives_exactly_one() -> None:
    model = gemma()
    limit = ceiling(model, sites_of(model), keep_all(sites_of(model)), WORKLOAD)
    assert (limit.prefill, limit.decode) == (1.0, 1.0)


def test_removing_all_leaves_the_rest() -> None:
    model = gemma()
    limit = ceiling(model, sites_of(model), drop_all(sites_of(model)), WORKLOAD)
    assert limit.prefill == pytest.approx((PREFILL_REST + 10 * FFNS) / PREFILL_REST, rel=1e-12)
    assert limit.decode == pytest.approx((DECODE_REST + FFNS) / DECODE_REST, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_part_removed_counts_by_hand_whatever_the_dtype_and_the_embedding(dtype: torch.dtype, tied: bool) -> None:
    model = gemma(dtype, tie_word_embeddings=tied)
    assert model.dtype == dtype
    limit = ceiling(model, sites_of(model), keep_first(sites_of(model), 8), WORKLOAD)
    kept = 2 * 8 * NEURON
    assert limit.prefill == pytest.approx((PREFILL_REST + 10 * FFNS) / (PREFILL_REST + 10 * kept), rel=1e-12)
    assert limit.decode == pytest.approx((DECODE_REST + FFNS) / (DECODE_REST + kept), rel=1e-12)


def test_a_longer_context_lowers_the_ceiling() -> None:
    model = gemma()
    sites = sites_of(model)
    short, long = (ceiling(model, sites, keep_first(sites, 8), Workload(tokens=tokens)) for tokens in (64, 512))
    assert long.prefill < short.prefill
    assert long.decode < short.decode


def test_sliding_windows_bound_what_is_attended_to() -> None:
    config = Gemma3TextConfig(**SIZES, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
    model = Gemma3ForCausalLM(config)
    limit = ceiling(model, sites_of(model), drop_all(sites_of(model)), WORKLOAD)
    # In the sliding layer the five queries attend to 1, 2, 3, 4 and 4 positions, and each step to 4.
    prefill = 2 * (5 * 2 * ATTENTION + HEAD) + 2 * 2 * 2 * 8 * (14 + 15)
    decode = 2 * ATTENTION + HEAD + 3 * (2 * 8 * 4 + CACHED)
    assert limit.prefill == pytest.approx((prefill + 10 * FFNS) / prefill, rel=1e-12)
    assert limit.decode == pytest.approx((decode + FFNS) / decode, rel=1e-12)


def test_look_up_tables_cost_nothing() -> None:
    layers: dict[str, Any] = {
        "num_kv_shared_layers": 0,
        "layer_types": ["full_attention"] * 2,
        "activation_sparsity_pattern": [0.0, 0.0],
    }
    extras: dict[str, Any] = {"hidden_size_per_layer_input": 4, "laurel_rank": 2, "altup_num_inputs": 2, **layers}
    small, large = (
        Gemma3nForCausalLM(Gemma3nTextConfig(**SIZES, **extras, vocab_size_per_layer_input=size)) for size in (64, 4096)
    )
    limits = [ceiling(model, sites_of(model), drop_all(sites_of(model)), WORKLOAD) for model in (small, large)]
    assert limits[0] == limits[1]
    assert 1 < limits[0].decode < 3


@dataclass
class Experts:
    """Stands for a site of routed experts with 32 neurons each, of which the mask keeps the given number."""

    path: str
    experts: int = 8

    def weight_bytes(self, kept: int | None) -> int:
        return 4 * self.experts * NEURON * (32 if kept is None else kept)

    def kept_experts(self, kept: int | None) -> int:
        return self.experts


def test_of_routed_experts_only_those_used_count() -> None:
    config = MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2, sliding_window=None)
    model = MixtralForCausalLM(config)
    sites = [Experts(f"model.layers.{layer}.mlp.experts") for layer in range(2)]
    for batch, experts_read in ((1, 2), (3, 6), (5, 8)):
        limit = ceiling(model, sites, 0, Workload(batch=batch, tokens=5, new_tokens=2))
        # One token computes two experts of each layer; a step reads as many as its batch can reach.
        assert limit.prefill == pytest.approx((PREFILL_REST + 10 * 2 * FFNS) / PREFILL_REST, rel=1e-12)
        decode = 2 * ATTENTION + HEAD + batch * 2 * CACHED
        assert limit.decode == pytest.approx((decode + experts_read * FFNS) / decode, rel=1e-12)


def test_whole_experts_that_go_lower_what_a_large_batch_reads_but_not_what_a_token_computes() -> None:
    config = MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2, sliding_window=None)
    model = MixtralForCausalLM(config)
    experts = FFN("model.layers.*.mlp.experts", "experts", up="gate_up_proj", model_types=("mixtral",))
    sites = find_sites(model, (experts,))
    chosen = torch.arange(8) < 6
    mask = Mask(keep_all(sites).keep, {}, {site.path: chosen for site in sites})
    for batch, dense, kept in ((1, 2, 2), (3, 6, 6), (5, 8, 6)):
        limit = ceiling(model, sites, mask, Workload(batch=batch, tokens=5, new_tokens=2))
        assert limit.prefill == pytest.approx(1, rel=1e-12)
        rest = 2 * ATTENTION + HEAD + batch * 2 * CACHED
        assert limit.decode == pytest.approx((rest + dense * FFNS) / (rest + kept * FFNS), rel=1e-12)


def test_work_is_counted_by_hand_in_operations_and_bytes() -> None:
    model = gemma(torch.bfloat16)
    sites = sites_of(model)
    for mask, neurons in ((None, 32), (keep_first(sites, 8), 8)):
        found = work(model, sites, mask, WORKLOAD)
        ffns = 2 * neurons * NEURON
        assert found.prefill.flops == Count(3 * 10 * ffns, 3 * (PREFILL_REST + 10 * ffns))
        assert found.decode.bytes == Count(2 * ffns, 2 * (DECODE_REST + ffns))
        # a prompt reads every weight once; a step attends to 6 and 7 positions with two heads
        assert found.prefill.bytes == Count(2 * ffns, 2 * (2 * ATTENTION + HEAD + ffns))
        pairs = 2 * 2 * 2 * 8 * 2 * (6 + 7) / 2
        assert found.decode.flops == Count(3 * 2 * ffns, 3 * (2 * (2 * ATTENTION + HEAD) + pairs + 2 * ffns))


def test_sites_alone_have_no_rest() -> None:
    model = gemma()
    sites = sites_of(model)
    assert site_work(model, sites, None, 7) == Work(Count(14 * FFNS, 14 * FFNS), Count(4 * FFNS, 4 * FFNS))
    bound = Bound.of(site_work(model, sites, None, 7), site_work(model, sites, keep_first(sites, 8), 7), "flops")
    assert (bound.ceiling, bound.limit, bound.ffn_share) == (4, 4, 1)


def test_works_add_up() -> None:
    one, other = Work(Count(1, 2), Count(3, 4)), Work(Count(10, 20), Count(30, 40))
    assert one + other == Work(Count(11, 22), Count(33, 44))


def test_a_bound_counts_one_thing_and_knows_the_limit_by_either() -> None:
    dense, sparse = Work(Count(6, 8), Count(90, 100)), Work(Count(2, 4), Count(30, 40))
    by_flops, by_bytes = Bound.of(dense, sparse, "flops"), Bound.of(dense, sparse, "bytes")
    assert (by_flops.ceiling, by_flops.limit, by_flops.ffn_share, by_flops.least_seconds) == (2, 2.5, 0.75, None)
    assert (by_bytes.ceiling, by_bytes.limit, by_bytes.ffn_share) == (2.5, 2.5, 0.9)


def test_measured_rates_turn_counts_into_the_least_seconds() -> None:
    dense, sparse = Work(Count(6, 8), Count(90, 100)), Work(Count(2, 4), Count(30, 40))
    assert Bound.of(dense, sparse, "flops", Rates(100, 1)).least_seconds == (8, 4)
    assert Bound.of(dense, sparse, "flops", Rates(20, 1)).least_seconds == (8, 4)
    assert Bound.of(dense, sparse, "bytes", Rates(10, 1)).least_seconds == (10, 4)
