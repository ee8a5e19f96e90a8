"""The findings, against plain loops over what enters down, and against what the published rows give by hand."""

from __future__ import annotations

import dataclasses
import math
from contextlib import contextmanager, nullcontext
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spath_eval import findings
from spath_eval.findings import PUBLISHED, Activity, Definitions
from spath_eval.pathways import GateError, StaticPathway
from spath_eval.profiling import DomainProfile, Profile
from spath_eval.registry import Registry
from spath_eval.session import Options, Session

DEFINITIONS = Definitions(
    ratio=1.5, percentile=60, sparsities=(0.15, 0.5), ablation_depths=(0.0, 0.9), ablation_sparsities=(0.7,)
)
DOCUMENTS = 16
"""Of each domain's text, few enough for loops."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Files with a little of each domain's own text."""
    folder = tmp_path_factory.mktemp("texts")
    for name, domain in Registry.load().domains.items():
        (folder / f"{name}.txt").write_text("\n\n".join(domain.texts("profile")[:DOCUMENTS]), encoding="utf-8")
    return {path.stem: path for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module", params=["phi", "moe"])
def loaded(request, texts):
    """A small trained model, with all of the little text for its profile."""
    options = Options(
        arch=request.param, strategies=(), profile_text=texts, preservation_tokens=100_000, batch_size=4, device="cpu"
    )
    session = Session(options, Registry.load())
    return session.load(session.targets[0])


@pytest.fixture(scope="module")
def measured(loaded, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPATH_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return findings.measure(loaded, DEFINITIONS)


@pytest.fixture
def part(measured):
    return measured[0]


@pytest.fixture(scope="module")
def entered(loaded, reference_activations):
    """Domain to layer to neuron, or to expert and neuron, to its activations over the tokens of the profile text."""
    return {
        domain.name: activations(loaded, loaded.corpus(domain).profile, reference_activations)
        for domain in loaded.session.domains
    }


def activations(loaded, documents, reference_activations):
    """`[layer][expert]`, of a dense layer of one expert, to rows `[width]` of the tokens that it sees."""
    found = [[[] for _ in range(site.experts or 1)] for site in loaded.sites]

    def dense(layer):
        return lambda module, inputs: found[layer][0].extend(inputs[0][0, 1:].double().tolist())  # without BOS

    def routed(layer):
        def hook(module, inputs):
            for token in range(1, len(inputs[0])):
                for expert in inputs[1][token].tolist():
                    row = reference_activations(module, inputs[0][token : token + 1], torch.tensor([expert]))
                    found[layer][expert].append(row[0].tolist())

        return hook

    handles = [
        site.module.register_forward_pre_hook(routed(layer))
        if site.experts
        else site.module.fc2.register_forward_pre_hook(dense(layer))
        for layer, site in enumerate(loaded.sites)
    ]
    with torch.inference_mode():
        for document in documents:
            loaded.model(torch.tensor([loaded.tokenizer(document).input_ids]))
    for handle in handles:
        handle.remove()
    return found


@pytest.fixture(scope="module")
def means(entered):
    """Domain to `[layer][neuron]`: mean |activation|, experts one after another; 0 where no token was seen."""
    found = {}
    for domain, layers in entered.items():
        found[domain] = []
        for experts in layers:
            width = max(len(rows[0]) for rows in experts if rows)
            found[domain].append(
                [
                    sum(abs(row[n]) for row in rows) / len(rows) if rows else 0.0
                    for rows in experts
                    for n in range(width)
                ]
            )
    return found


def known(entered, layer):
    """The neurons that have a mean in every domain: not those of experts that one of them does not use."""
    experts = list(zip(*(layers[layer] for layers in entered.values()), strict=True))
    width = max(len(rows[0]) for expert in experts for rows in expert if rows)
    return [n for n in range(width * len(experts)) if all(rows for rows in experts[n // width])]


def percentile(values, rank):
    """By linear interpolation between order statistics."""
    ordered = sorted(values)
    place = rank / 100 * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def test_specialised_shares_equal_a_plain_loop(part, entered, means):
    found, strongest = [], dict.fromkeys(means, 0)
    for layer in range(len(part["specialised"]["layers"])):
        special = []
        for neuron in known(entered, layer):
            values = {domain: layers[layer][neuron] for domain, layers in means.items()}
            mean = sum(values.values()) / len(values)
            special.append(max(values.values()) > DEFINITIONS.ratio * mean)
            if special[-1]:
                strongest[max(values, key=values.get)] += 1
        assert part["specialised"]["layers"][layer]["share"] == pytest.approx(sum(special) / len(special))
        found += special
    share = sum(found) / len(found)
    assert 0.01 < share < 0.9
    assert part["specialised"]["share"] == pytest.approx(share)
    assert part["specialised"]["speedup"] == pytest.approx(1 / (1 - share))
    assert part["specialised"]["compared"] == len(found)
    assert part["specialised"]["neurons"] == sum(len(layer) for layer in means["math"])
    assert part["specialised"]["by_domain"] == pytest.approx(
        {domain: count / len(found) for domain, count in strongest.items()}
    )


def test_skippable_shares_equal_a_plain_loop(part, means):
    layers = range(len(means["math"]))
    everything = [value for values in means.values() for layer in values for value in layer]
    limits = {
        "model": [percentile(everything, DEFINITIONS.percentile)] * len(layers),
        "layer": [
            percentile([value for values in means.values() for value in values[layer]], DEFINITIONS.percentile)
            for layer in layers
        ],
    }
    for pool, thresholds in limits.items():
        for domain, values in means.items():
            below = [[value < thresholds[layer] for value in values[layer]] for layer in layers]
            scopes = {"first_layer": below[0], "all_layers": [one for layer in below for one in layer]}
            for scope, found in scopes.items():
                share = sum(found) / len(found)
                given = part["skippable"]["pools"][pool][domain][scope]
                assert given["share"] == pytest.approx(share)
                assert given["speedup"] == pytest.approx(1 / (1 - share))
    medians = part["skippable"]["median_activation"]
    assert medians["all_layers"] == pytest.approx(percentile(everything, 50), rel=1e-5)
    first = [value for values in means.values() for value in values[0]]
    assert medians["first_layer"] == pytest.approx(percentile(first, 50), rel=1e-5)


def test_mixtures_equal_a_plain_loop(loaded, part, entered):
    if loaded.sites[0].experts is None:
        assert part["mixture"] is None
        return
    tokens = {
        domain: sum(len(rows) for rows in layers[0]) / part["mixture"]["used_per_token"]
        for domain, layers in entered.items()
    }
    assert part["mixture"]["used_per_token"] == loaded.model.config.num_experts_per_tok
    assert tokens == part["profile"]["tokens"]
    for domain, layers in entered.items():
        used = [bool(rows) for layer in layers for rows in layer]
        assert part["mixture"]["domains"][domain] == {
            "used": sum(used),
            "never_used": pytest.approx(1 - sum(used) / len(used)),
        }
    special = 0
    for layer in range(len(entered["math"])):
        for expert in range(len(entered["math"][layer])):
            shares = [len(layers[layer][expert]) / tokens[domain] for domain, layers in entered.items()]
            special += max(shares) > DEFINITIONS.ratio * sum(shares) / len(shares)
    assert part["mixture"]["experts"] == sum(len(layer) for layer in entered["math"])
    assert part["mixture"]["specialised_experts"] == pytest.approx(special / part["mixture"]["experts"])
    assert part["mixture"]["inside"]["share"] == part["specialised"]["share"]  # it has no other FFNs


@contextmanager
def without(loaded, removed):
    """Within the context, the down weights of the `[layer][expert]` neurons are zero."""
    downs = [site.module.down_proj if site.experts else site.module.fc2.weight[None] for site in loaded.sites]
    before = [down.clone() for down in downs]
    for down, experts in zip(downs, removed, strict=True):
        for expert, neurons in enumerate(experts):
            down[expert][:, neurons] = 0
    yield
    for down, values in zip(downs, before, strict=True):
        down.copy_(values)


def outputs(loaded, document):
    """Final hidden states and log-probabilities of a document, `[tokens, ...]`."""
    ids = torch.tensor([loaded.tokenizer(document).input_ids])
    with torch.inference_mode():
        output = loaded.model(ids, output_hidden_states=True)
    return ids[0], output.hidden_states[-1][0].double(), output.logits[0].double().log_softmax(-1)


def preserved(loaded, domain, removed):
    """Cosine, KL, agreement and perplexity ratio on the held-out text, document by document."""
    cosines, divergences, agreed, nats = [], [], [], [0.0, 0.0]
    for document in loaded.corpus(domain).heldout:
        ids, hidden, before = outputs(loaded, document)
        with without(loaded, removed):
            _, other, after = outputs(loaded, document)
        for position in range(len(ids)):
            if position:  # BOS does not count
                x, y = hidden[position], other[position]
                cosines.append(float(x @ y / (x.norm() * y.norm())))
            if position + 1 < len(ids):
                p, q, target = before[position], after[position], int(ids[position + 1])
                divergences.append(float((p.exp() * (p - q)).sum()))
                agreed.append(int(p.argmax()) == int(q.argmax()))
                nats[0] -= float(p[target])
                nats[1] -= float(q[target])
    return {
        "documents": len(loaded.corpus(domain).heldout),
        "cosine": np.mean(cosines),
        "kl": np.mean(divergences),
        "top1_agreement": np.mean(agreed),
        "ratio": math.exp((nats[1] - nats[0]) / len(agreed)),
    }


def lowest(site, values, share):
    """Of each expert of a layer, the share of neurons whose value is lowest."""
    experts = site.experts or 1
    width = len(values) // experts
    return [
        sorted(range(width), key=lambda neuron: values[expert * width + neuron])[: round(share * width)]
        for expert in range(experts)
    ]


def check_preserved(found, expected):
    assert found["documents"] == expected["documents"] > 1
    assert found["cosine"] == pytest.approx(expected["cosine"], abs=1e-5)
    assert found["kl"] == pytest.approx(expected["kl"], rel=1e-3)
    assert found["top1_agreement"] == pytest.approx(expected["top1_agreement"], abs=2e-3)
    assert found["perplexity"]["ratio"] == pytest.approx(expected["ratio"], rel=1e-4)


def test_output_preservation_equals_a_plain_loop(loaded, part, means):
    domain = loaded.session.registry.domain("math")
    (found,) = (cell for cell in part["preservation"] if (cell["domain"], cell["sparsity"]) == ("math", 0.5))
    removed = [lowest(site, values, 0.5) for site, values in zip(loaded.sites, means["math"], strict=True)]
    check_preserved(found, preserved(loaded, domain, removed))


def test_an_ablation_makes_one_layer_sparse(loaded, part, means):
    layers = len(loaded.sites)
    assert {cell["layer"] for cell in part["ablations"]} == {0, layers - 1}
    for cell in part["ablations"]:
        assert cell["achieved"] == pytest.approx(0.7 / layers, abs=5e-3)
    domain = loaded.session.registry.domain("code")
    (found,) = (cell for cell in part["ablations"] if (cell["layer"], cell["domain"]) == (0, "code"))
    removed = [lowest(loaded.sites[0], means["code"][0], 0.7), *([] for _ in range(layers - 1))]
    check_preserved(found, preserved(loaded, domain, removed))


def test_the_profile_gives_the_figures(loaded, measured, tmp_path):
    part, profile = measured
    profile.save(tmp_path / "profile.safetensors")
    again = Profile.load(tmp_path / "profile.safetensors")
    assert again.fingerprint == part["profile"]["fingerprint"]
    activity = Activity.of(again, loaded.sites)
    assert findings.specialisation(activity, DEFINITIONS.ratio) == part["specialised"]
    assert findings.skippable(activity, DEFINITIONS.percentile) == part["skippable"]
    assert findings.agreement(again, loaded.sites, DEFINITIONS.ratio) == part["halves"]
    assert 0 < part["halves"]["jaccard"] < 1


def test_a_mask_that_is_not_applied_is_found_out(loaded, monkeypatch, tmp_path):
    monkeypatch.setenv("SPATH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(StaticPathway, "applied", lambda self: nullcontext())
    monkeypatch.setattr(loaded, "neutrality", lambda *arguments: dataclasses.make_dataclass("Passed", [])())
    with pytest.raises(GateError, match="removed neurons were not zero"):
        findings.measure(loaded, DEFINITIONS)


def profile_of(**domains):
    """A profile of made-up values: domain to site path to (means, routing shares or none)."""
    parts = {}
    for domain, sites in domains.items():
        statistics = {
            "mean_abs": {path: torch.tensor(means, dtype=torch.float64) for path, (means, _) in sites.items()},
            "routing_share": {path: torch.tensor(shares) for path, (_, shares) in sites.items() if shares},
        }
        parts[domain] = DomainProfile(domain, 10, "", "", statistics)
    return Profile(parts)


def test_experts_that_a_domain_never_uses_are_not_compared():
    sites = [
        SimpleNamespace(path="layers.0.mlp", experts=None),
        SimpleNamespace(path="layers.1.experts", experts=2),
        SimpleNamespace(path="layers.1.shared", experts=None),
    ]
    profile = profile_of(
        math={
            "layers.0.mlp": ([0.0, 1.0, 3.0], None),
            "layers.1.experts": ([[9.0, 1.0], [5.0, 5.0]], [1.0, 1.0]),
            "layers.1.shared": ([1.0], None),
        },
        code={
            "layers.0.mlp": ([0.0, 1.0, 1.0], None),
            "layers.1.experts": ([[1.0, 1.0], [0.0, 0.0]], [2.0, 0.0]),
            "layers.1.shared": ([1.0], None),
        },
    )
    found = findings.specialisation(Activity.of(profile, sites), 1.4)
    assert (found["neurons"], found["compared"]) == (8, 6)
    assert [layer["share"] for layer in found["layers"]] == pytest.approx([1 / 3, 1 / 3])
    assert found["by_domain"] == pytest.approx({"math": 2 / 6, "code": 0.0})
    mixture = findings.mixture(profile, sites, 1.4)
    assert mixture["domains"] == {"math": {"used": 2, "never_used": 0.0}, "code": {"used": 1, "never_used": 0.5}}
    assert mixture["used_per_token"] == 2
    assert mixture["specialised_experts"] == 0.5
    assert mixture["inside"] == {"compared": 2, "share": 0.5, "speedup": 2.0}


def test_a_neuron_that_is_never_active_is_not_specialised():
    values = np.array([[0.0, 4.0, 1.0], [0.0, 0.0, 1.0]])
    assert findings.ratios(values).tolist() == [0.0, 2.0, 1.0]


def test_pooled_over_the_model_a_quiet_layer_is_skippable_in_every_domain():
    sites = [SimpleNamespace(path=f"layers.{number}.mlp", experts=None) for number in range(3)]
    profile = profile_of(
        math={"layers.0.mlp": ([0.1, 0.4], None), **{f"layers.{n}.mlp": ([5.0, 7.0], None) for n in (1, 2)}},
        code={"layers.0.mlp": ([0.2, 0.3], None), **{f"layers.{n}.mlp": ([6.0, 8.0], None) for n in (1, 2)}},
    )
    found = findings.skippable(Activity.of(profile, sites), 50)
    assert {row["first_layer"]["share"] for row in found["pools"]["model"].values()} == {1.0}
    assert {row["first_layer"]["speedup"] for row in found["pools"]["model"].values()} == {None}
    assert {row["first_layer"]["share"] for row in found["pools"]["layer"].values()} == {0.5}
    assert found["median_activation"] == {"first_layer": 0.25, "all_layers": 5.5}


@pytest.mark.parametrize(
    ("layers", "expected"), [(64, [2, 18, 34, 56, 62]), (30, [1, 8, 16, 26, 29]), (6, [0, 2, 3, 5, 5])]
)
def test_published_depths_find_their_layers(layers, expected):
    assert findings.nearest_layers([row["depth"] for row in PUBLISHED["depth"]], layers) == expected


def ranks(values):
    return [sorted(values).index(value) + 1 for value in values]


def pearson(x, y):
    x, y = ([value - sum(values) / len(values) for value in values] for values in (x, y))
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    return dot / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))


def permutation_p(x, y):
    """Twice the smaller tail over all pairings."""
    observed = pearson(x, y)
    every = [pearson(x, other) for other in permutations(y)]
    tails = (sum(sign * value >= sign * observed - 1e-12 for value in every) for sign in (1, -1))
    return min(1.0, 2 * min(tails) / len(every))


@pytest.mark.parametrize(
    ("rows", "spearman", "pearson_value"),
    [(PUBLISHED["scale"], 0.5, 0.999), ([*PUBLISHED["scale"], *PUBLISHED["architectures"]], 0.49, 0.68)],
)
def test_what_the_published_rows_give(rows, spearman, pearson_value):
    sizes, shares = [row["billions"] for row in rows], [row["share"] for row in rows]
    found = findings.correlation(sizes, shares)
    assert round(found["spearman"]["value"], 2) == spearman
    assert round(found["pearson"]["value"], 2 if len(rows) > 3 else 3) == pearson_value
    for name, x, y in (("spearman", ranks(sizes), ranks(shares)), ("pearson", sizes, shares)):
        assert found[name]["value"] == pytest.approx(pearson(x, y))
        assert found[name]["p_value"] == pytest.approx(permutation_p(x, y))
        assert found[name]["exact"]
        if len(rows) == 3:
            assert found[name]["ci95"] is None
            assert "3 points" in found[name]["ci95_reason"]
            continue
        error = math.sqrt((1 + pearson(x, y) ** 2 / 2 if name == "spearman" else 1) / 3)
        ends = [math.tanh(math.atanh(pearson(x, y)) + sign * 1.959964 * error) for sign in (-1, 1)]
        assert found[name]["ci95"] == pytest.approx(ends, rel=1e-5)


def test_the_published_slope_is_that_of_the_published_rows():
    slope = findings.correlation(*zip(*((row["billions"], row["share"]) for row in PUBLISHED["scale"]), strict=True))[
        "slope"
    ]
    assert round(slope["value"], 2) == PUBLISHED["claims"]["slope"]
    assert slope["ci95"][0] < slope["value"] < slope["ci95"][1]


def test_spearman_of_three_points_has_four_values():
    assert findings.possible_spearmans(3) == [-1.0, -0.5, 0.5, 1.0]


def test_what_has_no_correlation_says_why():
    assert findings.correlation([1, 2], [0.1, 0.2])["reason"] == "fewer than 3 points"
    assert "the same" in findings.correlation([1, 2, 3], [0.2, 0.2, 0.2])["reason"]
    ordered = findings.correlation([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.5])["spearman"]
    assert (ordered["value"], ordered["ci95"]) == (1.0, None)
    assert "infinite" in ordered["ci95_reason"]
    assert ordered["p_value"] == pytest.approx(2 / 24)


def test_beyond_eight_points_pairings_are_drawn_by_the_seed():
    x = list(range(10))
    y = [0.1, 0.3, 0.2, 0.5, 0.4, 0.3, 0.6, 0.2, 0.8, 0.5]
    first, second = (findings.correlation(x, y, seed=1) for _ in range(2))
    assert first == second
    assert not first["pearson"]["exact"]


def test_the_result_says_what_follows(measured):
    part, _ = measured
    part["profile"]["path"] = "profile.safetensors"
    result = findings.findings([part], DEFINITIONS)
    text = findings.render(result, "text")
    assert max(map(len, text.splitlines())) <= 100
    words = " ".join(text.split())
    for phrase in (
        "3 published rows give Spearman 0.500 (exact p 1.000) and Pearson 0.999",
        "can only be -1, -0.5, 0.5, 1",
        "Spearman 0.486",
        "Pearson 0.684",
        "Measured: no correlation, for there are fewer than 3 points",
        "48.3% is 1.93x, not 1.88x",
        "is what the router chooses for each token by design",
        f"{part['profile']['fingerprint'][:12]} in profile.safetensors",
    ):
        assert phrase in words
    for number in "123456":
        assert f"\n{number}. " in text


def test_markdown_has_the_same_figures(measured):
    part, _ = measured
    part["profile"]["path"] = "profile.safetensors"
    result = findings.findings([part], DEFINITIONS)
    markdown = findings.render(result, "markdown")
    assert markdown.startswith("# Findings")
    assert markdown.count("\n## ") == 8
    assert "| K2-Think" in markdown
    assert f"{part['specialised']['share']:.1%}" in markdown
    for statements in result["statements"].values():
        assert all(f"- {statement}" in markdown for statement in statements)
