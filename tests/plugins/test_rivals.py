"""The rivals of negative selection, against plain float64 loops over raw weights and over what enters down."""

from __future__ import annotations

import math
import random

import pytest
import torch

from spath_eval import Budget, Context, UsageError
from spath_eval.masks import Mask
from spath_eval.plugins.architectures.gemma import GEMMA
from spath_eval.plugins.architectures.moe import MOE
from spath_eval.plugins.architectures.phi import PHI
from spath_eval.plugins.strategies.magnitude import Magnitude
from spath_eval.plugins.strategies.specialisation import Specialisation
from spath_eval.plugins.strategies.wanda import Wanda
from spath_eval.profiling import DomainProfile, Profile, profile_domain
from spath_eval.texts import Corpus

FAMILIES = {"phi": PHI, "gemma": GEMMA, "phi3": PHI, "qwen3_moe": MOE, "gpt_oss": MOE}
RIVALS = {"specialisation": Specialisation, "magnitude": Magnitude, "wanda": Wanda}
DOMAINS = {"code": (4, 50), "math": (30, 80), "language": (60, 100)}
"""Of which words, by their numbers, the text of a domain is made."""


@pytest.fixture(scope="module")
def texts():
    generator = random.Random(0)
    return {
        domain: tuple(
            " ".join(f"w{generator.randrange(*words)}" for _ in range(generator.randrange(2, 20))) for _ in range(12)
        )
        for domain, words in DOMAINS.items()
    }


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
def profile(model, sites, texts, tiny_tokenizer):
    names = ("mean_abs", "mean_square", "routing_share")
    parts = {
        domain: profile_domain(
            model, tiny_tokenizer, sites, domain, Corpus(documents, (), ""), names, tokens=10_000, batch_size=4
        )
        for domain, documents in texts.items()
    }
    return Profile(parts)


@pytest.fixture(scope="module")
def entered(model, sites, texts, reference_activations):
    """Domain to site path to the activations of every neuron, `[width][tokens]`, by expert where there are some."""
    return {domain: activations(model, sites, documents, reference_activations) for domain, documents in texts.items()}


def activations(model, sites, documents, reference_activations):
    found = {site.path: [[] for _ in range(site.experts or 1)] for site in sites}

    def hook(path):
        def dense(module, inputs):
            found[path][0].extend(inputs[0][0, 1:].double().tolist())  # without BOS

        def routed(module, inputs):
            hidden, chosen = inputs[0][1:], inputs[1][1:]
            for place in range(chosen.shape[1]):
                rows = reference_activations(module, hidden, chosen[:, place])
                for expert, row in zip(chosen[:, place].tolist(), rows.tolist(), strict=True):
                    found[path][expert].append(row)

        module = model.get_submodule(path)
        if not path.endswith("experts"):
            down = module.fc2 if hasattr(module, "fc2") else module.down_proj
            return down.register_forward_pre_hook(dense)
        return module.register_forward_pre_hook(routed)

    handles = [hook(site.path) for site in sites]
    with torch.inference_mode():
        for document in documents:
            model(torch.tensor([[2, *(int(word[1:]) for word in document.split())]]))
    for handle in handles:
        handle.remove()
    return found


def weights(model, path, expert):
    """Of each neuron, what it reads with and what it writes with, from the raw parameters."""
    module = model.get_submodule(path)
    if path.endswith("experts"):
        gate_up, down = module.gate_up_proj[expert].double(), module.down_proj[expert].double()
        if type(module).__name__ == "GptOssExperts":  # transposed, gate and up in turn
            reads = [torch.cat([gate_up[:, 2 * j], gate_up[:, 2 * j + 1]]) for j in range(gate_up.shape[1] // 2)]
            return [read.tolist() for read in reads], down.tolist()
    else:
        names = ("fc1", "fc2") if hasattr(module, "fc1") else ("gate_up_proj", "down_proj")
        if hasattr(module, "gate_proj"):
            reads = torch.cat([module.gate_proj.weight, module.up_proj.weight], 1).double()
            return reads.tolist(), module.down_proj.weight.T.double().tolist()
        gate_up, down = (getattr(module, name).weight.double() for name in names)
        if names[0] == "fc1":
            return gate_up.tolist(), down.T.tolist()
    gate, up = gate_up.chunk(2)
    return torch.cat([gate, up], 1).tolist(), down.T.tolist()


def norm(values):
    return math.sqrt(math.fsum(value * value for value in values))


def mean_abs(rows, neuron):
    return math.fsum(abs(row[neuron]) for row in rows) / len(rows) if rows else 0.0


def reference(name, model, entered, path, expert, neuron, reads, writes):
    """The score of one neuron by the formula of the strategy, in the domain `math`."""
    if name == "magnitude":
        return norm(reads[neuron] + writes[neuron])
    rows = {domain: parts[path][expert] for domain, parts in entered.items()}
    if name == "wanda":
        return norm(row[neuron] for row in rows["math"]) * norm(writes[neuron])
    mean = sum(mean_abs(part, neuron) for part in rows.values()) / len(rows)
    return mean_abs(rows["math"], neuron) / mean


@pytest.fixture(scope="module", params=RIVALS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def scores(name, model, sites, entered):
    """Site path to `[experts][width]`."""
    result = {}
    for site in sites:
        result[site.path] = []
        for expert in range(site.experts or 1):
            reads, writes = weights(model, site.path, expert)
            row = [
                reference(name, model, entered, site.path, expert, neuron, reads, writes)
                for neuron in range(site.width)
            ]
            result[site.path].append(row)
    return result


@pytest.fixture
def context(sites, profile):
    def make(*, profile=profile, **budget):
        paths = {site.path: site for site in sites}
        return Context("math", Budget(**budget), paths, profile, torch.Generator())

    return make


def lowest(scored, sparsity):
    """The places of the lowest share of (place, score)s."""
    ranked = sorted(scored, key=lambda one: one[1])
    return {place for place, _ in ranked[: round(sparsity * len(ranked))]}


def removed(mask: Mask):
    result = set()
    for path, keep in mask.keep.items():
        places = (~keep).nonzero().tolist()
        result |= {(path, *(place if len(place) == 2 else [0, *place])) for place in places}
    return result


@pytest.mark.parametrize("sparsity", [0.05, 0.15, 0.5, 0.9])
@pytest.mark.parametrize("pool", ["layer", "model"])
def test_the_neurons_that_go_are_those_of_the_lowest_scores_of_a_plain_loop(name, scores, context, pool, sparsity):
    mask = RIVALS[name](pool=pool).select(context(sparsity=sparsity))
    parts = [
        [((path, expert, neuron), score) for neuron, score in enumerate(row)]
        for path, rows in scores.items()
        for expert, row in enumerate(rows)
    ]
    if pool == "model":
        parts = [[one for part in parts for one in part]]
    assert removed(mask) == set().union(*(lowest(part, sparsity) for part in parts))
    mask.check(list(context(sparsity=sparsity).sites.values()))


def test_the_experts_that_go_are_those_of_the_lowest_scores(name, scores, context, sites, entered):
    if not any(site.experts for site in sites):
        with pytest.raises(UsageError, match="no routed experts"):
            RIVALS[name]().select(context(sparsity=0.1, expert_sparsity=0.25))
        return
    mask = RIVALS[name]().select(context(sparsity=0.1, expert_sparsity=0.25))
    assert mask.experts.keys() == {site.path for site in sites if site.experts}
    for path, chosen in mask.experts.items():
        ranks = [norm(row) for row in scores[path]]
        if name == "specialisation":
            rows = {domain: [len(part) for part in parts[path]] for domain, parts in entered.items()}
            shares = {domain: [count / sum(counts) for count in counts] for domain, counts in rows.items()}
            ranks = [own / sum(part[e] for part in shares.values()) for e, own in enumerate(shares["math"])]
        assert set((~chosen).nonzero().flatten().tolist()) == lowest(enumerate(ranks), 0.25)
    assert not RIVALS[name]().select(context(sparsity=0.1)).experts


def test_what_each_of_them_reads():
    assert Specialisation.requires == ("mean_abs", "routing_share")
    assert Wanda.requires == ("mean_square", "routing_share")
    assert Magnitude.requires == ()
    assert {name: rival.all_domains for name, rival in RIVALS.items()} == {
        "specialisation": True,
        "magnitude": False,
        "wanda": False,
    }
    for rival in RIVALS.values():
        assert (rival.kind, rival.needs_batches, rival().pool) == ("static", False, "layer")


@pytest.mark.parametrize("kind", ["gemma"], indirect=True)
def test_magnitude_needs_no_profile(context, kind):
    mask = Magnitude().select(context(profile=None, sparsity=0.25))
    assert mask.digest == Magnitude().select(context(sparsity=0.25)).digest


def of_values(**domains):
    return Profile(
        {
            domain: DomainProfile(domain, 9, "", "", {"mean_abs": {"a": torch.tensor(values, dtype=torch.float64)}})
            for domain, values in domains.items()
        }
    )


def special(profile, sparsity):
    return Specialisation().select(Context("math", Budget(sparsity), {}, profile, torch.Generator()))


def test_a_neuron_that_is_never_active_goes_before_all_others():
    profile = of_values(math=[9.0, 0.0, 0.001, 4.0], code=[1.0, 0.0, 0.1, 4.0])
    assert [special(profile, share)["a"].tolist() for share in (0.25, 0.5)] == [
        [True, False, True, True],
        [True, False, False, True],
    ]


def test_activations_that_are_not_finite_are_refused_and_not_taken_for_idle_ones():
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="scores of a are not finite"):
            special(of_values(math=[1.0, value], code=[1.0, 1.0]), 0.5)


def test_one_domain_cannot_be_compared_with_others():
    with pytest.raises(UsageError, match="compares domains, and the profile has but one: math"):
        special(of_values(math=[1.0, 2.0]), 0.5)


def test_a_run_takes_all_three(run):
    outcome = run("--strategy", "specialisation:pool=model,magnitude,wanda", "--no-controls")
    assert outcome.status == 0, outcome.err
    record = outcome.record
    cases = {case["strategy"]["name"]: case for case in record["cases"]}
    assert {name: case["outcome"] for name, case in cases.items()} == dict.fromkeys(RIVALS, "passed")
    assert all(case["sparsity"]["achieved"] == pytest.approx(0.15, abs=0.01) for case in cases.values())
    domains = {profile["fingerprint"]: profile["domains"] for profile in record["profiles"]}
    assert sorted(domains[cases["specialisation"]["profile"]]) == ["code", "factual", "language", "math"]
    assert domains[cases["wanda"]["profile"]] == ["math"]
