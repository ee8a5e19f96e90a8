"""TEAL, CATS and the oracle, against plain loops over what the stock model computes for each text alone."""

from __future__ import annotations

import math
import random
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from spath_eval import Budget, Context, UsageError
from spath_eval.pathways import TokenPathway
from spath_eval.plugins.architectures.gemma import GEMMA
from spath_eval.plugins.architectures.llama import LLAMA
from spath_eval.plugins.architectures.moe import MOE
from spath_eval.plugins.architectures.phi import PHI
from spath_eval.plugins.strategies._thresholds import Sizes
from spath_eval.plugins.strategies.cats import Cats
from spath_eval.plugins.strategies.oracle import Oracle
from spath_eval.plugins.strategies.teal import Teal
from spath_eval.texts import batches

FAMILIES = {"gemma": GEMMA, "gemma3n_text": GEMMA, "llama+mlp_bias": LLAMA, "phi3": PHI, "phi": PHI, "qwen3_moe": MOE}
GATED = ("gemma", "gemma3n_text", "llama+mlp_bias", "phi3")
STRATEGIES = {"teal": Teal(), "cats": Cats(), "oracle": Oracle()}
WITH_THRESHOLDS = [(kind, name) for kind in FAMILIES for name in ("teal", "cats") if name == "teal" or kind in GATED]
EXACTLY = [(kind, name) for kind, name in WITH_THRESHOLDS if kind != "qwen3_moe"] + [
    (kind, "oracle") for kind in FAMILIES if kind != "qwen3_moe"
]
"""Not the experts, whose rows are not in the order of tokens."""
SHARES = (0.1, 0.5, 0.9)


@pytest.fixture(scope="module", params=FAMILIES)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind, tiny_model):
    return tiny_model(kind)


@pytest.fixture(scope="module")
def sites(kind, model):
    return FAMILIES[kind].sites(model)


@pytest.fixture(scope="module")
def documents():
    generator = random.Random(0)
    return [" ".join(f"w{generator.randrange(4, 100)}" for _ in range(generator.randrange(2, 30))) for _ in range(12)]


@pytest.fixture(scope="module")
def calibration(documents, tiny_tokenizer):
    found = list(batches(tiny_tokenizer, documents, tokens=10_000, batch_size=4))
    assert not all(batch.attention_mask.all() for batch in found), "some rows are padded"
    return found


@pytest.fixture(scope="module")
def context(model, sites, calibration):
    def make(sparsity):
        return Context(
            "math",
            Budget(sparsity),
            {site.path: site for site in sites},
            None,
            torch.Generator(),
            model,
            tuple(batch.inputs(model.device) for batch in calibration),
            tuple(batch.counted for batch in calibration),
        )

    return make


@pytest.fixture(scope="module")
def seen(model, sites, documents, reference_activations):
    """What the strategies decide by, of every token but BOS: strategy to site path to rows of sizes.

    Dense FFNs are watched by hooks of the test's own; experts are computed from their weights.
    """
    found = {name: {site.path: [] for site in sites} for name in ("teal", "cats")}

    def watch(name, path):
        def hook(module, inputs, output=None):
            values = inputs[0] if output is None else output
            found[name][path] += values[0, 1:].abs().tolist()

        return hook

    def experts(path):
        def hook(module, inputs):
            hidden, chosen = inputs[0][1:], inputs[1][1:]
            for place in range(chosen.shape[1]):
                found["teal"][path] += abs(reference_activations(module, hidden, chosen[:, place])).tolist()

        return hook

    with ExitStack() as stack:
        for site in sites:
            module = model.get_submodule(site.path)
            if site.path.endswith("experts"):
                handles = [module.register_forward_pre_hook(experts(site.path))]
            else:
                down = module.fc2 if hasattr(module, "fc2") else module.down_proj
                activation = module.act_fn if hasattr(module, "act_fn") else module.activation_fn
                handles = [
                    down.register_forward_pre_hook(watch("teal", site.path)),
                    activation.register_forward_hook(watch("cats", site.path)),
                ]
            for handle in handles:
                stack.callback(handle.remove)
        with torch.inference_mode():
            for document in documents:
                model(torch.tensor([[2, *(int(word[1:]) for word in document.split())]]))
    return found


def lowest_exceeded_by_no_more(sizes, share):
    """The lowest size that at least `share` of all do not exceed."""
    return sorted(sizes)[math.ceil(share * len(sizes)) - 1]


def flat(rows):
    return [value for row in rows for value in row]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("kind", "name"), WITH_THRESHOLDS, indirect=["kind"])
def test_thresholds_are_quantiles_of_the_text_without_padding_and_bos(name, share, context, seen):
    thresholds = STRATEGIES[name].prepare(context(share))
    assert thresholds.keys() == seen[name].keys()
    for path, rows in seen[name].items():
        expected = lowest_exceeded_by_no_more(flat(rows), share)
        assert expected * (1 - 1e-5) <= thresholds[path], path
        assert thresholds[path] <= max(expected * (1 + 2**-10) * (1 + 1e-5), torch.finfo(torch.float32).tiny), path


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(("kind", "name"), WITH_THRESHOLDS, indirect=["kind"])
def test_the_share_that_goes_on_the_calibration_text_is_the_one_asked_for(name, share, context, seen):
    asked = context(share)
    asked = replace(asked, prepared=STRATEGIES[name].prepare(asked))
    for path, rows in seen[name].items():
        values = torch.tensor(rows)
        kept = STRATEGIES[name].keep(asked, asked.sites[path], values, values)
        zeros = float((values == 0).double().mean())  # which go together
        assert float((~kept).double().mean()) == pytest.approx(max(share, zeros), abs=0.002), path


@pytest.mark.parametrize("kind", ["gemma"], indirect=True)
def test_thresholds_with_padding_and_bos_are_others(kind, context):
    """Far enough from the right ones to be told from them above."""
    asked = context(0.5)
    everything = replace(asked, counted=tuple(torch.ones_like(counted) for counted in asked.counted))
    for strategy in (Teal(), Cats()):
        right, wrong = strategy.prepare(asked), strategy.prepare(everything)
        assert max(abs(wrong[path] / right[path] - 1) for path in right) > 2**-9


@pytest.mark.parametrize(("kind", "name"), EXACTLY, indirect=["kind"])
def test_the_model_computes_what_it_does_without_what_goes(name, model, sites, context, calibration):
    """The reference changes what enters down by hooks of its own, and decides in plain comparisons."""
    pathway = TokenPathway(sites, STRATEGIES[name], context(0.5))
    inputs = calibration[0].input_ids
    gates = {}

    def remember(path):
        return lambda module, inputs, output: gates.update({path: output})

    def change(path):
        def hook(module, inputs):
            (product,) = inputs
            if name == "oracle":
                order = product.abs().argsort(-1, descending=True)
                keep = torch.zeros_like(product, dtype=torch.bool)
                keep.scatter_(-1, order[..., : product.shape[-1] // 2], True)
            else:
                keep = (gates[path] if name == "cats" else product).abs() > pathway.context.prepared[path]
            return product * keep

        return hook

    with torch.inference_mode(), ExitStack() as stack:
        for site in sites:
            module = model.get_submodule(site.path)
            down = module.fc2 if hasattr(module, "fc2") else module.down_proj
            activation = module.act_fn if hasattr(module, "act_fn") else module.activation_fn
            stack.callback(activation.register_forward_hook(remember(site.path)).remove)
            stack.callback(down.register_forward_pre_hook(change(site.path)).remove)
        expected = model(inputs).logits
    with torch.inference_mode():
        dense = model(inputs).logits
        with pathway.applied():
            sparse = model(inputs).logits
    assert torch.equal(sparse, expected)
    assert not torch.equal(sparse, dense)


@pytest.mark.parametrize("share", SHARES)
def test_the_oracle_keeps_the_largest_of_each_token(share, kind, context, seen):
    asked = context(share)
    for path, rows in seen["teal"].items():
        values = torch.tensor(rows)
        signs = torch.where(torch.arange(values.numel()).reshape(values.shape) % 2 == 0, 1, -1)
        kept = Oracle().keep(asked, asked.sites[path], None, values * signs)
        for row, keep in zip(values.tolist(), kept.tolist(), strict=True):
            largest = sorted(row)[round(share * len(row)) :]
            assert sorted(value for value, is_kept in zip(row, keep, strict=True) if is_kept) == largest


@pytest.mark.parametrize("kind", ["phi", "qwen3_moe"], indirect=True)
def test_cats_refuses_a_site_that_shows_no_gate(kind, context, sites):
    with pytest.raises(UsageError) as refusal:
        TokenPathway(sites, Cats(), context(0.5))
    path = next(site.path for site in sites if kind == "phi" or site.experts)
    assert str(refusal.value) == f"cats needs an activated gate for each token, and {path} shows none"


@pytest.mark.parametrize("kind", ["gemma"], indirect=True)
def test_a_budget_of_nothing_changes_nothing(kind, model, sites, context, calibration):
    inputs = calibration[0].input_ids
    with torch.inference_mode():
        dense = model(inputs).logits
        for strategy in STRATEGIES.values():
            pathway = TokenPathway(sites, strategy, context(0.0))
            with pathway.applied():
                assert torch.equal(model(inputs).logits, dense)
            assert pathway.achieved == 0


@pytest.mark.parametrize("kind", ["gemma"], indirect=True)
def test_the_text_is_read_once_by_the_dense_model(kind, model, sites, context, calibration):
    forwards = []
    handle = model.get_decoder().register_forward_hook(lambda *call: forwards.append(call[2][0]))
    pathway = TokenPathway(sites, Teal(), context(0.5))
    with pathway.applied(), torch.inference_mode():
        assert len(forwards) == len(calibration)
        model(calibration[0].input_ids)
        assert len(forwards) == len(calibration) + 1
    with torch.inference_mode():
        model(**calibration[0].inputs(model.device))
    handle.remove()
    assert torch.equal(forwards[0], forwards[-1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("share", SHARES)
def test_thresholds_of_two_byte_activations_are_exact(dtype, share):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 1001, generator=generator).to(dtype)
    sizes = Sizes(values.device)
    for part in values:
        sizes.add(part)
    threshold = lowest_exceeded_by_no_more(values.abs().flatten().tolist(), share)
    removed = values.float().abs() <= sizes.threshold(share)
    assert removed.tolist() == [[abs(value) <= threshold for value in row] for row in values.tolist()]


def test_zeros_go_together():
    values = torch.tensor([0.0] * 6 + [-0.0] * 2 + [3.0, -5.0])
    sizes = Sizes(values.device)
    sizes.add(values)
    removed = [int((values.abs() <= sizes.threshold(share)).sum()) for share in (0, 0.5, 0.8, 0.85, 0.95, 1)]
    assert removed == [0, 8, 8, 9, 10, 10]


def test_what_each_of_them_reads():
    assert {name: one.needs_batches for name, one in STRATEGIES.items()} == {
        "teal": True,
        "cats": True,
        "oracle": False,
    }
    assert [name for name, one in STRATEGIES.items() if not one.reads_product] == ["cats"]
    for strategy in STRATEGIES.values():
        assert (strategy.kind, strategy.requires, strategy.control) == ("token", (), False)


def test_a_run_takes_all_three(run):
    outcome = run("--strategy", "teal,cats,oracle", "--sparsity", "0.5", "--no-controls")
    assert outcome.status == 0, outcome.err
    for case in outcome.record["cases"]:
        assert case["outcome"] == "passed"
        assert case["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.05)
        assert case["sparsity"]["ffn_weights_removed"] == 0, "a mask for each token removes no weights"
        assert case["preservation"]["perplexity"]["ratio"] > 0


def test_a_run_says_in_one_line_that_cats_needs_a_gate(spath_eval_command, work_folder, brief):
    outcome = spath_eval_command("run", "--arch", "phi", *brief, "--strategy", "cats", "--no-controls")
    assert outcome.status == 1
    (case,) = outcome.record["cases"]
    assert case["outcome"] == "error"
    assert case["message"] == "cats needs an activated gate for each token, and model.layers.0.mlp shows none"
