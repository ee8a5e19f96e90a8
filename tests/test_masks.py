"""Masks: exact counts, a deterministic choice, files that say what they are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from spath_eval import UsageError
from spath_eval.masks import Mask, drop_all, jaccard, keep_all, remove_experts, remove_lowest
from spath_eval.plugins.architectures.gemma import GEMMA
from spath_eval.plugins.architectures.moe import MOE

WIDTHS = {"a": 64, "b": 48, "c": 81}


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    return {path: torch.rand(width, generator=generator) for path, width in WIDTHS.items()}


def lowest(values, sparsity):
    """Plain reference: the places of the lowest share, the first of equals first."""
    return sorted(range(len(values)), key=lambda place: (values[place], place))[: round(sparsity * len(values))]


@pytest.mark.parametrize("sparsity", [0.001, 0.05, 0.15, 0.3, 0.5, 0.999])
def test_the_lowest_share_of_every_layer_goes(scores, sparsity):
    mask = remove_lowest(scores, sparsity)
    for path, values in scores.items():
        assert (~mask[path]).nonzero().flatten().tolist() == sorted(lowest(values.tolist(), sparsity))
    removed = sum(round(sparsity * width) for width in WIDTHS.values())
    assert mask.achieved == pytest.approx(removed / sum(WIDTHS.values()), abs=1e-12)
    assert mask.per_site == pytest.approx({path: round(sparsity * width) / width for path, width in WIDTHS.items()})


@pytest.mark.parametrize("sparsity", [0.001, 0.05, 0.15, 0.3, 0.5, 0.999])
def test_the_lowest_share_of_the_whole_model_goes(scores, sparsity):
    scores["a"] /= 3  # so that layers lose different shares
    mask = remove_lowest(scores, sparsity, "model")
    together = np.concatenate([values.numpy() for values in scores.values()])
    expected = np.ones(len(together), dtype=bool)
    expected[lowest(together.tolist(), sparsity)] = False
    assert np.array_equal(np.concatenate([mask[path].numpy() for path in scores]), expected)
    assert mask.achieved == pytest.approx(round(sparsity * len(together)) / len(together), abs=1e-12)


@pytest.mark.parametrize("pool", ["layer", "model"])
def test_of_equal_scores_the_first_go(pool):
    mask = remove_lowest({"a": torch.zeros(10), "b": torch.zeros(10)}, 0.25, pool)
    assert (~mask["a"]).nonzero().flatten().tolist() == ([0, 1] if pool == "layer" else [0, 1, 2, 3, 4])
    assert mask["b"].sum() == (8 if pool == "layer" else 10)


def test_experts_lose_the_same_share_each():
    scores = torch.rand(4, 20, generator=torch.Generator().manual_seed(0))
    mask = remove_lowest({"a": scores}, 0.3)
    for expert in range(4):
        expected = sorted(lowest(scores[expert].tolist(), 0.3))
        assert (~mask["a"][expert]).nonzero().flatten().tolist() == expected
    assert mask.achieved == pytest.approx(0.3)


def test_experts_are_pooled_over_the_model_too():
    scores = {"a": torch.rand(4, 20, generator=torch.Generator().manual_seed(0)), "b": torch.ones(20) + 1}
    mask = remove_lowest(scores, 0.4, "model")
    expected = lowest(scores["a"].flatten().tolist() + [2.0] * 20, 0.4)
    assert mask["a"].shape == (4, 20)
    assert (~mask["a"]).flatten().nonzero().flatten().tolist() == sorted(expected)
    assert mask["b"].all()


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.3, 0.875])
def test_the_experts_that_are_routed_to_least_go_at_every_site(sparsity):
    scores = {"a": torch.tensor([0.3, 0.0, 0.2, 0.9, 0.0, 0.5, 0.1, 0.4]), "b": torch.rand(8)}
    keep = {path: torch.rand(8, 20) > 0.5 for path in "ab"} | {"c": torch.rand(30) > 0.5}
    mask = remove_experts(Mask(keep, {"domain": "math"}), scores, sparsity)
    assert mask.provenance == {"domain": "math"}
    for path, values in scores.items():
        removed = sorted(lowest(values.tolist(), sparsity))
        assert (~mask.experts[path]).nonzero().flatten().tolist() == removed
        for expert in range(8):
            expected = torch.zeros(20, dtype=torch.bool) if expert in removed else keep[path][expert]
            assert torch.equal(mask[path][expert], expected)
    assert torch.equal(mask["c"], keep["c"])
    kept = sum(int(part.sum()) for part in mask.keep.values())
    assert mask.achieved == pytest.approx(1 - kept / (2 * 8 * 20 + 30))


def test_where_there_are_no_experts_none_can_be_removed():
    with pytest.raises(UsageError, match="no routed experts"):
        remove_experts(Mask({"a": torch.ones(8, dtype=torch.bool)}), {}, 0.25)


def removed_neurons(mask):
    return {(path, *place) for path, keep in mask.keep.items() for place in (~keep).nonzero().tolist()}


def test_jaccard_counts_the_neurons_that_both_masks_remove_among_those_that_either_does():
    generator = torch.Generator().manual_seed(0)
    first, second = (
        Mask({"a": torch.rand(64, generator=generator) > 0.3, "b": torch.rand(4, 20, generator=generator) > share})
        for share in (0.5, 0.1)
    )
    one, other = removed_neurons(first), removed_neurons(second)
    assert 0 < len(one & other) < min(len(one), len(other))
    assert jaccard(first, second) == jaccard(second, first) == len(one & other) / len(one | other)
    assert jaccard(first, first) == 1


def test_jaccard_of_unrelated_masks_is_what_chance_gives():
    generator = torch.Generator().manual_seed(0)
    masks = [remove_lowest({"a": torch.rand(100_000, generator=generator)}, 0.15) for _ in range(2)]
    assert jaccard(*masks) == pytest.approx(0.15 / (2 - 0.15), abs=0.005)


def test_jaccard_at_its_ends():
    nothing = Mask({"a": torch.ones(8, dtype=torch.bool)})
    half = Mask({"a": torch.arange(8) < 4})
    rest = Mask({"a": torch.arange(8) >= 4})
    assert jaccard(nothing, nothing) == 1
    assert jaccard(nothing, half) == jaccard(half, rest) == 0


@pytest.mark.parametrize("other", [{"b": [8]}, {"a": [8], "b": [8]}, {"a": [4]}, {"a": [2, 8]}, {"a": [1]}])
def test_jaccard_is_of_masks_of_the_same_sites(other):
    masks = [
        Mask({path: torch.ones(shape, dtype=torch.bool) for path, shape in part.items()})
        for part in ({"a": [8]}, other)
    ]
    for pair in (masks, masks[::-1]):
        with pytest.raises(ValueError, match="not of the same sites"):
            jaccard(*pair)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pool", ["layer", "model"])
def test_scores_that_are_not_finite_are_refused(scores, value, pool):
    scores["b"][7] = value
    with pytest.raises(ValueError, match="scores of b are not finite"):
        remove_lowest(scores, 0.15, pool)


def test_a_mask_does_not_follow_the_tensor_it_was_made_of():
    keep = torch.ones(8, dtype=torch.bool)
    parts = {"a": keep}
    mask = Mask(parts)
    digest = mask.digest
    keep[:4] = False
    parts["b"] = keep
    assert list(mask.keep) == ["a"]
    assert mask["a"].all()
    assert mask.achieved == 0
    assert Mask(mask.keep).digest == digest


@pytest.mark.parametrize("keep", [torch.ones(4), torch.ones(4, dtype=torch.uint8), torch.ones(2, 2, 2).bool()])
def test_a_mask_is_boolean_over_neurons(keep):
    with pytest.raises(UsageError, match="mask of a: expected boolean"):
        Mask({"a": keep})


EXPERTS = torch.tensor([True, False, True])


@pytest.mark.parametrize(
    ("keep", "experts"),
    [
        (torch.ones(3, 4), {"b": EXPERTS}),
        (torch.ones(3, 4), {"a": EXPERTS.int()}),
        (torch.ones(3, 4), {"a": EXPERTS[:2]}),
        (torch.ones(3, 4), {"a": EXPERTS.expand(4, 3).T}),
        (torch.ones(3), {"a": EXPERTS}),
    ],
    ids=["of no site", "no booleans", "too few", "of neurons", "of a dense FFN"],
)
def test_experts_of_a_mask_are_boolean_and_those_of_a_site_that_has_some(keep, experts):
    with pytest.raises(UsageError, match=r"mask of [ab]: expected boolean \[experts\] for its experts"):
        Mask({"a": keep.bool()}, {}, experts)


def test_of_experts_that_go_no_neuron_stays_and_nothing_of_what_was_handed_in_changes():
    keep, chosen = torch.ones(3, 4, dtype=torch.bool), EXPERTS.clone()
    mask = Mask({"a": keep}, {}, {"a": chosen})
    assert mask["a"].sum(1).tolist() == [4, 0, 4]
    assert keep.all()
    chosen[0] = False
    assert mask.experts["a"].tolist() == [True, False, True]


def test_digest_depends_on_which_experts_the_router_may_choose():
    """An expert that has no neuron left is still chosen, and takes another's place."""
    keep = torch.ones(3, 4, dtype=torch.bool)
    keep[1] = False
    masks = [Mask({"a": keep}, {}, experts) for experts in ({}, {"a": EXPERTS}, {"a": torch.ones(3).bool()})]
    assert all(torch.equal(mask["a"], keep) for mask in masks)
    assert len({mask.digest for mask in masks}) == 3


def test_digest_tells_masks_apart():
    base = {"a": torch.tensor([True, False, True, False]), "b": torch.tensor([True, True])}
    different = [
        base | {"a": torch.tensor([True, False, True, True])},
        base | {"a": torch.tensor([[True, False], [True, False]])},
        {"a": base["a"], "c": base["b"]},
    ]
    digests = {Mask(parts).digest for parts in [base, *different]}
    assert len(digests) == 4
    assert Mask(dict(reversed(base.items())), {"note": "of another order and origin"}).digest == Mask(base).digest


def test_check_accepts_the_model_it_was_made_for_and_names_what_differs(tiny_model):
    sites = GEMMA.sites(tiny_model("gemma"))
    for mask in (keep_all(sites), drop_all(sites)):
        mask.check(sites)
    keep = dict(keep_all(sites).keep)
    first = keep.pop("model.layers.0.mlp")
    with pytest.raises(UsageError, match=r"lacks 1 of the model's sites, model\.layers\.0\.mlp among them"):
        Mask(keep).check(sites)
    with pytest.raises(UsageError, match=r"sites that the model lacks: model\.layers\.9\.mlp"):
        Mask(keep_all(sites).keep | {"model.layers.9.mlp": first}).check(sites)
    for shape in ([63], [1, 64]):
        with pytest.raises(UsageError, match=rf"model\.layers\.0\.mlp has shape \[{shape[0]}.*the model's site \[64\]"):
            Mask(keep | {"model.layers.0.mlp": torch.ones(shape, dtype=torch.bool)}).check(sites)


def test_keep_all_and_drop_all_are_what_they_say(tiny_model):
    sites = GEMMA.sites(tiny_model("gemma3n_text"))
    assert keep_all(sites).achieved == 0
    assert drop_all(sites).achieved == 1
    assert {path: len(keep) for path, keep in drop_all(sites).keep.items()} == {site.path: site.width for site in sites}


def test_masks_of_mixtures_are_shaped_as_their_sites(tiny_model):
    sites = MOE.sites(tiny_model("qwen3_moe"))
    for mask in (keep_all(sites), drop_all(sites)):
        assert [list(keep.shape) for keep in mask.keep.values()] == [[64], [8, 24], [8, 24]]
        mask.check(sites)
    routed = sites[1].path
    for shape in ((24,), (8, 25), (7, 24)):
        keep = keep_all(sites).keep | {routed: torch.ones(shape, dtype=torch.bool)}
        with pytest.raises(UsageError, match=rf"{routed} has shape .*the model's site \[8, 24\]"):
            Mask(keep).check(sites)


def test_a_saved_mask_keeps_its_experts(tmp_path):
    keep = {"a": torch.rand(3, 4) > 0.3, "b": torch.rand(8) > 0.3, "c": torch.rand(3, 4) > 0.3}
    mask = Mask(keep, {"domain": "math"}, {"c": EXPERTS})
    mask.save(tmp_path / "mask.safetensors")
    loaded = Mask.load(tmp_path / "mask.safetensors")
    assert (loaded.digest, loaded.provenance) == (mask.digest, mask.provenance)
    assert loaded.keep.keys() == keep.keys()
    assert {path: part.tolist() for path, part in loaded.experts.items()} == {"c": EXPERTS.tolist()}
    assert torch.equal(loaded["c"], mask["c"])


def test_a_saved_mask_comes_back_with_its_provenance(scores, tmp_path):
    mask = Mask(remove_lowest(scores, 0.15).keep, {"model": "ab12", "domain": "math"})
    path = tmp_path / "new folder" / "mask.safetensors"
    mask.save(path)
    loaded = Mask.load(path)
    assert loaded.provenance == {"model": "ab12", "domain": "math"}
    assert loaded.digest == mask.digest
    assert loaded.keep.keys() == mask.keep.keys()
    assert all(torch.equal(loaded[path], mask[path]) for path in mask.keep)
    assert [file.name for file in path.parent.iterdir()] == ["mask.safetensors"]


def test_saving_replaces_an_older_file_whole(scores, tmp_path):
    path = tmp_path / "mask.safetensors"
    remove_lowest(scores, 0.5).save(path)
    mask = remove_lowest({"a": scores["a"]}, 0.15)
    mask.save(path)
    assert Mask.load(path).digest == mask.digest


def no_mask(path):
    path.write_text("these are words")


def truncated(path):
    Mask({"a": torch.ones(64, dtype=torch.bool)}).save(path)
    path.write_bytes(path.read_bytes()[:-10])


def of_another_program(path):
    save_file({"a": torch.ones(4, dtype=torch.bool)}, path)


def of_another_kind(path):
    save_file({"a": torch.ones(4, dtype=torch.bool)}, path, {"spath_eval": "profile"})


def of_numbers(path):
    save_file({"a": torch.ones(4)}, path, {"spath_eval": "mask"})


def a_folder(path):
    path.mkdir()


def nothing(path):
    pass


@pytest.mark.parametrize(
    "write", [no_mask, truncated, of_another_program, of_another_kind, of_numbers, a_folder, nothing]
)
def test_what_is_no_mask_file_is_a_usage_error_of_one_line(write, tmp_path):
    path = tmp_path / "mask.safetensors"
    write(path)
    with pytest.raises(UsageError) as caught:
        Mask.load(path)
    assert "\n" not in str(caught.value)
    assert "mask" in str(caught.value)


def test_a_file_whose_values_were_changed_after_it_was_written_is_refused(tmp_path):
    path = tmp_path / "mask.safetensors"
    Mask({"a": torch.ones(64, dtype=torch.bool)}).save(path)
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(UsageError, match="digest"):
        Mask.load(path)


def test_where_the_file_system_refuses_no_partial_file_is_left(scores, tmp_path):
    mask = remove_lowest(scores, 0.15)
    file = tmp_path / "file"
    file.write_text("in the way")
    folder = tmp_path / "folder"
    folder.mkdir()
    for path in (file / "mask.safetensors", folder):
        with pytest.raises(UsageError, match="cannot write"):
            mask.save(path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]
    assert file.read_text() == "in the way"
