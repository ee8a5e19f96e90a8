"""Models that accelerate spreads over devices give what they give in one place, or are refused with the reason.

There is one device here, so that a spread model has all that accelerate adds to it but the distance: hooks in the
place of each module's `forward`, weights that are on the meta device between calls, and weights that lie on disk. What
is true of sites and pathways is tested on every model type.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import attach_align_device_hook_on_blocks, remove_hook_from_submodules
from accelerate.utils import OffloadedWeightsLoader, extract_submodules_state_dict

from spath_eval import LoadRequest, UsageError, sites
from spath_eval.masks import drop_all, keep_all, remove_experts, remove_lowest
from spath_eval.models import (
    DEVICE_MAPS,
    check_device_map,
    fingerprint,
    load,
    output_head,
    parameter_count,
    weight_bytes,
)
from spath_eval.pathways import Exercise, GateError, StaticPathway, check_neutrality, check_parity
from spath_eval.plugins.architectures.gemma import GEMMA
from spath_eval.plugins.architectures.llama import LLAMA
from spath_eval.plugins.architectures.moe import MOE
from spath_eval.plugins.architectures.phi import PHI
from spath_eval.plugins.architectures.qwen import QWEN
from spath_eval.profiling import ROUTING, STATISTICS, forward_backbone, profile_domain
from spath_eval.texts import Corpus, batches

FAMILIES = [GEMMA, PHI, QWEN, LLAMA, MOE]
KINDS = [*(model_type for family in FAMILIES for model_type in family.model_types), "gemma4_text+experts"]
PLACES = ["device", "memory", "disk"]
"""Where the layers after the first one lie: on another device, or offloaded, to be loaded for each forward."""
EXECUTIONS = ["masked", "compact"]
PHASES = ["scoring", "prefill", "decode"]


def sites_of(model):
    return next(family for family in FAMILIES if family.matches(model.config)).sites(model)


def neuron_mask(sites):
    """Half of the neurons go."""
    generator = torch.Generator().manual_seed(0)
    return remove_lowest({site.path: torch.rand(site.shape, generator=generator) for site in sites}, 0.5)


def random_mask(sites):
    """Half of the neurons go, and of routed experts a quarter."""
    generator = torch.Generator().manual_seed(1)
    mixtures = {site.path: torch.rand(site.experts, generator=generator) for site in sites if site.experts}
    return remove_experts(neuron_mask(sites), mixtures, 0.25) if mixtures else neuron_mask(sites)


def spread(model, place, folder):
    """Put the layers after the first one to `place`, as transformers does when it loads a model with a device map."""
    decoder = model.get_decoder()
    path = next(path for path, module in model.named_modules() if module is decoder)
    device_map = dict.fromkeys(parts(model, f"{path}.layers"), "cpu")
    far = [part for part in device_map if part.startswith(f"{path}.layers.") and not part.endswith("layers.0")]
    skipped = {"skip_keys": model._skip_keys_device_placement}
    if place == "device":
        return dispatch_model(model, device_map, force_hooks=True, **skipped)
    if place == "disk":
        return dispatch_model(model, device_map | dict.fromkeys(far, "disk"), offload_dir=folder, **skipped)
    # What `dispatch_model` does where layers on a CPU wait for a GPU, which is a CPU here.
    attach_align_device_hook_on_blocks(
        model,
        execution_device={**device_map, "": "cpu"},
        offload={part: part in far for part in device_map},
        weights_map=OffloadedWeightsLoader(state_dict=extract_submodules_state_dict(model.state_dict(), far)),
        tied_params_map={},
        **skipped,
    )
    return model


def parts(module, layers, path="") -> Iterator[str]:
    """The largest parts that hold not only some of the layers, and these one by one."""
    own = [name for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]]
    for name, child in [*dict.fromkeys(own).items(), *module.named_children()]:
        part = f"{path}.{name}" if path else name
        if child is not None and (layers == part or layers.startswith(f"{part}.")):
            yield from parts(child, layers, part)
        else:
            yield part


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(params=PLACES)
def place(request):
    return request.param


@pytest.fixture
def plain(kind, tiny_model):
    """The model in one place."""
    return tiny_model(kind)


@pytest.fixture
def model(kind, place, tiny_model, tmp_path):
    """The same one, spread."""
    return spread(tiny_model(kind), place, tmp_path)


@pytest.fixture
def tokens():
    return torch.randint(3, 100, (2, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def probe(tiny_tokenizer):
    return next(batches(tiny_tokenizer, ["w7 w9 w11 w13 w50 w4", "w8 w21 w17"], tokens=100, batch_size=2))


def logits(model, tokens, pathway=None):
    with torch.inference_mode(), pathway.applied() if pathway else ExitStack():
        return model(tokens).logits


def pathway_or_refusal(model, mask, execution, place):
    """The pathway; none where it is refused, as it must be for weights on disk."""
    if (execution, place) != ("compact", "disk"):
        return StaticPathway(sites_of(model), mask, execution)
    with pytest.raises(
        UsageError, match=r"layers\.1\.[a-z._12]*: its weights are offloaded to disk.*masked works$"
    ) as caught:
        StaticPathway(sites_of(model), mask, execution)
    assert "\n" not in str(caught.value)
    return None


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_a_spread_model_gives_to_the_last_bit_what_it_gives_in_one_place(plain, model, tokens, execution, place):
    mask, dense = random_mask(sites_of(plain)), logits(plain, tokens)
    expected = logits(plain, tokens, StaticPathway(sites_of(plain), mask, execution))
    assert (expected - dense).abs().max() > 1e-2
    if pathway := pathway_or_refusal(model, mask, execution, place):
        assert torch.equal(logits(model, tokens, pathway), expected)
    assert torch.equal(logits(model, tokens), dense)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_the_gates_hold(model, probe, execution, place):
    mask = random_mask(sites_of(model))
    pathway = pathway_or_refusal(model, mask, execution, place)
    if pathway is None:
        return
    found = check_neutrality(model, pathway.sites, probe, execution)
    assert found.keep_all_difference == 0
    assert found.drop_all_difference > 1e-2
    if execution == "compact":
        assert check_parity(model, pathway, probe)["max_relative_difference"] < 1e-5
    exercise = watched(model, pathway, probe)
    assert exercise.check(PHASES)["sites"] == len(pathway.sites)


def watched(model, pathway, probe):
    exercise = Exercise(model, pathway)
    with pathway.applied(), exercise.watching():
        exercise.scoring = True
        logits(model, probe.input_ids)
        exercise.scoring = False
        row = probe.input_ids[1:]
        model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return exercise


@pytest.mark.parametrize("place", ["device", "memory"])
def test_a_copy_that_takes_over_the_hook_runs_dense_which_the_gates_find(model, probe, monkeypatch, place):
    """accelerate's hook holds on to the module that it was put on, so that a copy of it with other weights is idle."""

    def clone(module):
        copied = module.__class__.__new__(module.__class__)
        copied.__dict__ = {name: copy.copy(v) if isinstance(v, dict) else v for name, v in module.__dict__.items()}
        return copied

    monkeypatch.setattr(sites, "_clone", clone)
    monkeypatch.setattr(sites, "_hooked_as", lambda module, clone: clone)
    pathway = StaticPathway(sites_of(model), neuron_mask(sites_of(model)), "compact")
    with pytest.raises(GateError, match="compact differs from masked at"):
        check_parity(model, pathway, probe)
    if not all(site.experts for site in pathway.sites):  # inside of the experts' own function nobody sees the width
        with pytest.raises(GateError, match="neurons entered down, not the compact width"):
            watched(model, pathway, probe).check(PHASES)


def interrupt(*call):
    raise KeyboardInterrupt


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("place", ["device", "memory"])
def test_a_spread_model_is_afterwards_as_it_was(model, tokens, execution, place):
    def state():
        return [(name, id(module), id(vars(module).get("_hf_hook"))) for name, module in model.named_modules()]

    before, dense = state(), logits(model, tokens)
    pathway = StaticPathway(sites_of(model), random_mask(sites_of(model)), execution)
    handle = model.get_output_embeddings().register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model, tokens, pathway)
    handle.remove()
    assert state() == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(logits(model, tokens), dense)


@pytest.mark.parametrize("place", ["memory"])
def test_slices_of_offloaded_weights_are_offloaded_as_well(plain, model, tokens, place):
    mask = random_mask(sites_of(plain))
    pathway = StaticPathway(sites_of(model), mask, "compact")
    for _ in range(2):
        for site, reference in zip(pathway.sites, sites_of(plain), strict=True):
            compact = pathway.compact_module(site)
            offloaded = ".layers.0." not in site.path
            assert all(parameter.is_meta == offloaded for parameter in compact.parameters())
            assert site.weight_bytes(mask) == reference.weight_bytes(mask)
            if not site.experts or site.path not in mask.experts:
                assert sum(parameter.nbytes for parameter in compact.parameters()) == site.weight_bytes(mask)
        logits(model, tokens, pathway)


def test_weights_are_those_of_the_model_in_one_place(plain, model):
    for site, reference in zip(sites_of(model), sites_of(plain), strict=True):
        assert (site.shape, site.device) == (reference.shape, torch.device("cpu"))
        assert site.weight_bytes(None) == reference.weight_bytes(None)
        for name in ("gate", "up", "down"):
            weight, expected = getattr(site, name), getattr(reference, name)
            assert weight is expected is None or torch.equal(weight, expected)
    assert fingerprint(model) == fingerprint(plain)


def test_weights_are_counted_as_in_one_place_also_once_accelerate_has_parted_tied_ones(plain, model, tokens):
    logits(model, tokens)
    assert parameter_count(model) == parameter_count(plain) == sum(p.numel() for p in plain.parameters())
    assert weight_bytes(model) == weight_bytes(plain)


def test_profiles_are_those_of_the_model_in_one_place(plain, model, tiny_tokenizer):
    corpus = Corpus(("w7 w9 w11 w13 w50 w4", "w8 w21 w17", "w30"), (), "")
    expected, found = (
        profile_domain(
            one, tiny_tokenizer, sites_of(one), "math", corpus, [*STATISTICS, ROUTING], tokens=100, batch_size=2
        ).statistics
        for one in (plain, model)
    )
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert all(torch.equal(found[name][path], value) for path, value in values.items())


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_repaired_down_weights_take_the_place_of_offloaded_ones(plain, model, tokens, execution, place):
    if (execution, place) == ("compact", "disk"):
        pytest.skip("weights on disk are not sliced")
    found = []
    for one in (plain, model):
        mask = neuron_mask(sites_of(one))
        with ExitStack() as stack:
            for site in sites_of(one):
                weight = torch.randn(site.down.shape, generator=torch.Generator().manual_seed(3))
                stack.enter_context(site.with_down(mask, weight, None, compact=execution == "compact"))
            found.append(logits(one, tokens))
        assert not torch.equal(logits(one, tokens), found[-1])
    assert torch.equal(*found)
    assert torch.equal(logits(plain, tokens), logits(model, tokens))


@pytest.mark.parametrize("kind", ["gemma", "mixtral"])
def test_a_hook_that_slices_cannot_have_is_a_reason(plain):
    from accelerate.hooks import ModelHook, add_hook_to_module

    site = sites_of(plain)[1]
    add_hook_to_module(site.module if site.experts else site.module.up_proj, ModelHook())
    with pytest.raises(UsageError, match=r"accelerate's ModelHook cannot be had on sliced weights: .*masked works"):
        site.compact(drop_all([site]))
    assert site.compact(keep_all([site])) is site.module
    remove_hook_from_submodules(plain)
    assert site.unsliceable is None


@pytest.mark.parametrize("kind", ["gemma", "phi", "phi3"])
def test_an_ffn_that_is_itself_spread_is_refused(model):
    projection = model.model.layers[1].mlp.get_submodule(sites_of(model)[1].ffn.down)
    projection._hf_hook.execution_device = "meta"
    with pytest.raises(UsageError, match=r"layers\.1\.mlp: its projections lie on several devices \(cpu, meta\)"):
        sites_of(model)


@pytest.fixture(scope="module")
def saved(tiny_model, tiny_tokenizer, tmp_path_factory):
    """The folder of a model with tied embeddings: a function of its type."""

    def save(kind):
        folder = tmp_path_factory.mktemp("checkpoint")
        tiny_model(kind, tie_word_embeddings=True).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return save


def request(reference, **others):
    settings = {"revision": None, "architecture": None, "device": "cpu", "dtype": "float32"} | others
    return LoadRequest(str(reference), **settings)


@pytest.fixture
def memory(monkeypatch):
    """Says how many bytes of main memory there are to accelerate, and that there is no other device."""

    def limit(count):
        monkeypatch.setattr("transformers.integrations.accelerate.get_max_memory", lambda given=None: {"cpu": count})

    return limit


def enough_for(model, layers):
    """Bytes that hold the embeddings and some layers of a model, and the layer that accelerate keeps free beside."""
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    return model.get_input_embeddings().weight.nbytes + int((layers + 1.5) * layer)


@pytest.mark.parametrize("how", DEVICE_MAPS)
def test_a_device_map_changes_nothing_where_the_model_fits(saved, tokens, how):
    folder = saved("gemma3_text")
    plain, _ = load(request(folder))
    model, _ = load(request(folder, device_map=how))
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert torch.equal(logits(model, tokens), logits(plain, tokens))
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("how", DEVICE_MAPS)
def test_a_model_that_does_not_fit_is_offloaded_which_is_said(saved, memory, tokens, how, caplog):
    folder = saved("gemma3_text")
    plain, _ = load(request(folder))
    memory(enough_for(plain, 1))
    with caplog.at_level(logging.WARNING, "spath_eval"):
        model, _ = load(request(folder, device_map=how))
    said = [record.getMessage() for record in caplog.records if record.name == "spath_eval.models"]
    offloaded = sum(parameter.nbytes for parameter in model.parameters() if parameter.is_meta)
    share = f"{100 * offloaded / weight_bytes(plain):.0f}%"
    assert said == [
        f"{folder}: {share} of its weights are offloaded to main memory or disk, and loaded anew for every forward"
    ]
    assert [site.unsliceable is None for site in sites_of(model)] == [True, False, False]
    assert torch.equal(logits(model, tokens), logits(plain, tokens))
    assert fingerprint(model) == fingerprint(plain)
    mask = random_mask(sites_of(plain))
    masked = [logits(one, tokens, StaticPathway(sites_of(one), mask, "masked")) for one in (plain, model)]
    assert torch.equal(*masked)


def test_hidden_states_come_back_to_where_the_inputs_came_from(saved, memory, probe):
    """Else they would stay on the last layer's device, and logits on the head's."""
    folder = saved("gemma2")
    plain, _ = load(request(folder))
    memory(enough_for(plain, 1))
    model, _ = load(request(folder, device_map="auto"))
    moved = model.get_decoder()._hf_hook
    assert moved.io_same_device
    with torch.inference_mode():
        hidden = forward_backbone(model, probe)
        assert moved.input_device == model.device == hidden.device
        assert torch.equal(output_head(model, hidden), output_head(plain, forward_backbone(plain, probe)))


def test_embeddings_without_a_place_are_a_usage_error(saved, memory):
    folder = saved("gemma3_text")
    memory(100)
    with pytest.raises(UsageError, match="no device has room for its input embeddings"):
        load(request(folder, device_map="auto"))


def test_weights_that_cannot_stay_on_disk_are_a_usage_error_of_one_line(saved, memory):
    """transformers fuses the weights of experts as it loads them."""
    folder = saved("mixtral")
    memory(enough_for(load(request(folder))[0], 1))
    with pytest.raises(UsageError, match=r"do not fit into memory, and .* cannot stay on disk$") as caught:
        load(request(folder, device_map="auto"))
    assert "\n" not in str(caught.value)


def test_a_device_beside_a_device_map_and_an_unknown_one_are_usage_errors():
    for device_map in DEVICE_MAPS:
        check_device_map(device_map, "auto")
        for device in ("cpu", "cuda", "cuda:0"):
            with pytest.raises(UsageError, match="--device names one: give one of the two"):
                check_device_map(device_map, device)
    check_device_map(None, "cpu")
    for unknown in ("cpu", "balanced_low_0", "", "{}"):
        with pytest.raises(UsageError, match=r"unknown device map .*: use auto, balanced, sequential"):
            check_device_map(unknown, "auto")


def test_the_program_runs_an_offloaded_model_masked(run, memory, tiny_checkpoint):
    plain, _ = load(request(tiny_checkpoint))
    memory(enough_for(plain, 0))
    whole = run("--execution", "masked").record
    outcome = run("--execution", "masked", "--device-map", "auto")
    assert outcome.status == 0
    assert "are offloaded to main memory or disk" in outcome.err
    record = outcome.record
    assert record["command"]["resolved"]["device_map"] == "auto"
    device_map = record["models"][0].pop("device_map")
    assert set(device_map.values()) == {"cpu", "disk"}
    assert record["models"] == whole["models"]
    for case, expected in zip(record["cases"], whole["cases"], strict=True):
        assert case["outcome"] == "passed"
        for key in ("mask", "sparsity", "quality", "preservation", "gates"):
            assert case[key] == expected[key], key


def test_the_program_refuses_compact_for_weights_on_disk_before_it_begins(run, memory, tiny_checkpoint):
    memory(enough_for(load(request(tiny_checkpoint))[0], 0))
    outcome = run("--device-map", "auto")
    assert outcome.status == 4
    assert "offloaded to disk, and slices of them would have to stay in memory: --execution masked works" in outcome.err
    assert "record:" not in outcome.err


def test_the_program_takes_one_of_device_and_device_map(run):
    outcome = run("--device-map", "auto", "--device", "cpu")
    assert outcome.status == 4
    assert "give one of the two" in outcome.err
    assert run("--device-map", "cpu").status == 4


@pytest.mark.gpu
@pytest.mark.parametrize("execution", EXECUTIONS)
def test_layers_that_wait_in_main_memory_for_a_gpu(saved, monkeypatch, tokens, probe, execution):
    folder = saved("gemma3_text")
    plain, _ = load(request(folder, device="cuda"))
    room = {0: enough_for(plain, 1), "cpu": 2**30}
    monkeypatch.setattr("transformers.integrations.accelerate.get_max_memory", lambda given=None: dict(room))
    model, _ = load(request(folder, device="cuda", device_map="sequential"))
    assert [site.down.device.type for site in sites_of(model)] == ["cuda", "cpu", "cpu"]
    assert {str(site.device) for site in sites_of(model)} == {"cuda:0"}
    assert fingerprint(model) == fingerprint(plain)
    mask = random_mask(sites_of(plain))
    expected, found = (
        logits(one, tokens.to("cuda"), StaticPathway(sites_of(one), mask, execution)) for one in (plain, model)
    )
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    pathway = StaticPathway(sites_of(model), mask, execution)
    assert check_neutrality(model, pathway.sites, probe, execution).keep_all_difference == 0
    if execution == "compact":
        assert check_parity(model, pathway, probe)["ok"]
