"""Profiles: equal to a plain float64 loop, in memory that does not grow, from a cache that is never wrong."""

from __future__ import annotations

import gc
import logging
import random

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from spath_eval import UsageError
from spath_eval.models import fingerprint
from spath_eval.plugins.architectures.gemma import GEMMA
from spath_eval.plugins.architectures.moe import MOE
from spath_eval.profiling import (
    ROUTING,
    STATISTICS,
    DomainProfile,
    Profile,
    cache_folder,
    cached_profile,
    forward_backbone,
    pooled,
    profile_domain,
    specialisation,
)
from spath_eval.texts import Corpus, batches

NAMES = tuple(STATISTICS)


@pytest.fixture(scope="module", params=["gemma", "gemma3n_text"])
def model(request, tiny_model):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def corpus():
    generator = random.Random(0)
    documents = [
        " ".join(f"w{generator.randrange(4, 100)}" for _ in range(generator.randrange(1, 25))) for _ in range(20)
    ]
    return Corpus(tuple(documents), (), "twenty documents")


def profile_of(model, tokenizer, corpus, *, names=NAMES, tokens=200, batch_size=4, **others):
    sites = (GEMMA if model.config.model_type.startswith("gemma") else MOE).sites(model)
    return profile_domain(
        model, tokenizer, sites, "math", corpus, names, tokens=tokens, batch_size=batch_size, **others
    )


def entering_down(model, receive):
    """Hooks of the test's own, without the program's sites."""
    return [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, inputs, path=path: receive(path, inputs[0]))
        for path, layer in ((f"model.layers.{n}.mlp", layer) for n, layer in enumerate(model.model.layers))
    ]


def plain_loop(model, corpus, *, tokens):
    """One document at a time, without padding, one float64 sum per neuron."""
    sums, seen = {name: {} for name in NAMES}, 0

    def receive(path, entered):
        values = entered[0, 1:].double().numpy()
        for name, function in (("mean_abs", np.abs), ("mean_square", np.square)):
            sums[name][path] = sums[name].get(path, 0) + function(values).sum(0)

    handles = entering_down(model, receive)
    for document in corpus.profile:
        ids = [int(word[1:]) for word in document.split()][: tokens - seen]
        if ids:
            seen += len(ids)
            with torch.inference_mode():
                model(torch.tensor([[2, *ids]]))
    for handle in handles:
        handle.remove()
    return {name: {path: total / seen for path, total in sites.items()} for name, sites in sums.items()}, seen


@pytest.mark.parametrize("batch_size", [1, 7])
@pytest.mark.parametrize("tokens", [150, 10_000])
def test_profile_equals_a_plain_float64_loop(model, tiny_tokenizer, corpus, batch_size, tokens):
    expected, seen = plain_loop(model, corpus, tokens=tokens)
    part = profile_of(model, tiny_tokenizer, corpus, tokens=tokens, batch_size=batch_size)
    assert part.tokens == seen == min(tokens, sum(len(text.split()) for text in corpus.profile))
    assert (part.domain, part.source) == ("math", "twenty documents")
    for name in NAMES:
        assert part.statistics[name].keys() == expected[name].keys()
        for path, values in part.statistics[name].items():
            assert values.dtype == torch.float64
            np.testing.assert_allclose(values.numpy(), expected[name][path], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activations_are_added_in_float64_whatever_the_models_dtype(tiny_model, tiny_tokenizer, corpus, dtype):
    """Half-precision activations are squared in a wider type too, in which nothing overflows."""
    model = tiny_model("gemma").to(dtype)
    model.model.layers[1].mlp.up_proj.weight.mul_(500)
    entered = {}
    handles = entering_down(model, lambda path, values: entered.setdefault(path, []).append(values))
    part = profile_of(model, tiny_tokenizer, corpus, tokens=10_000, batch_size=1)
    for handle in handles:
        handle.remove()
    largest = max(float(values.abs().max()) for values in entered["model.layers.1.mlp"])
    assert 256 < largest < 65_504, "squares overflow in float16, the values themselves do not"
    for path, batch in entered.items():
        values = torch.cat([one[0, 1:] for one in batch]).double()
        np.testing.assert_allclose(part.statistics["mean_abs"][path], values.abs().mean(0), rtol=1e-12, atol=0)
        np.testing.assert_allclose(part.statistics["mean_square"][path], values.square().mean(0), rtol=1e-6, atol=0)


def test_what_does_not_count_may_be_infinite(tiny_model, tiny_tokenizer, corpus):
    """As activations of BOS and of padding are in float16."""
    model = tiny_model("gemma")
    expected = profile_of(model, tiny_tokenizer, corpus).statistics
    lengths = []

    def spoil(module, inputs):
        spoilt = inputs[0].clone()
        spoilt[:, 0] = torch.inf
        for row, length in enumerate(lengths.pop()):
            spoilt[row, length:] = torch.nan
        return (spoilt,)

    model.model.layers[-1].mlp.down_proj.register_forward_pre_hook(spoil)
    made = list(batches(tiny_tokenizer, corpus.profile, tokens=200, batch_size=4))
    lengths += [batch.attention_mask.sum(-1).tolist() for batch in reversed(made)]
    found = profile_of(model, tiny_tokenizer, corpus).statistics
    for name in NAMES:
        for path, values in found[name].items():
            assert torch.equal(values, expected[name][path])


@pytest.fixture(params=["gemma", "gemma3n_text", "mixtral"])
def any_model(request, tiny_model):
    """Routed experts too, of which a mean is over the tokens that each is chosen for."""
    return tiny_model(request.param)


def assert_close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, sites in expected.items():
        assert found[name].keys() == sites.keys()
        for path, values in sites.items():
            np.testing.assert_allclose(found[name][path], values, **tolerance)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_a_half_is_the_profile_of_every_second_document(any_model, tiny_tokenizer, corpus, batch_size):
    whole = profile_of(any_model, tiny_tokenizer, corpus, tokens=10_000, batch_size=batch_size)
    for index, half in enumerate(whole.halves):
        documents = corpus.profile[index::2]
        alone = profile_of(any_model, tiny_tokenizer, Corpus(documents, (), corpus.source), tokens=10_000, batch_size=1)
        assert (half.tokens, half.text_digest) == (alone.tokens, alone.text_digest)
        assert (half.domain, half.source, half.halves) == ("math", corpus.source, None)
        assert half.tokens == sum(len(text.split()) for text in documents)
        assert_close(half.statistics, alone.statistics, rtol=1e-4, atol=1e-6)


def test_the_whole_is_both_halves_together(any_model, tiny_tokenizer, corpus):
    whole = profile_of(any_model, tiny_tokenizer, corpus, tokens=150)
    assert whole.tokens == sum(half.tokens for half in whole.halves) == 150
    for name, sites in whole.statistics.items():
        for path, values in sites.items():
            weights = [torch.tensor(half.tokens) for half in whole.halves]
            if values.dim() == 2:
                weights = [half.tokens * half.statistics[ROUTING][path].unsqueeze(-1) for half in whole.halves]
            sums = sum(weight * half.statistics[name][path] for weight, half in zip(weights, whole.halves, strict=True))
            np.testing.assert_allclose(values, sums / sum(weights).clamp(min=1), rtol=1e-12, atol=0)


def test_rows_of_a_long_document_are_in_one_half(tiny_model, tiny_tokenizer):
    corpus = Corpus((" ".join(["w7"] * 1200), "w8 w9", "w10"), (), "")
    part = profile_of(tiny_model("gemma"), tiny_tokenizer, corpus, tokens=10_000, batch_size=2)
    assert [half.tokens for half in part.halves] == [1201, 2]


@pytest.mark.parametrize("documents", [("w7 w8",), ("", "w7 w8")])
def test_a_single_document_has_no_halves(tiny_model, tiny_tokenizer, documents, tmp_path):
    model = tiny_model("gemma")
    part = profile_of(model, tiny_tokenizer, Corpus(documents, (), ""))
    assert part.halves is None
    assert_close(part.statistics, profile_of(model, tiny_tokenizer, Corpus(("w7 w8",), (), "")).statistics, rtol=1e-12)
    Profile({"math": part}).save(tmp_path / "file")
    for profile in (Profile({"math": part}), Profile.load(tmp_path / "file")):
        with pytest.raises(UsageError, match="profile of 'math' has no halves"):
            profile.half(0)


def test_bos_and_padding_do_not_count(model, tiny_tokenizer):
    """A token's activations in the one-token documents do not depend on what stands in the batch beside them."""
    alone = profile_of(model, tiny_tokenizer, Corpus(("w7",), (), ""), batch_size=1)
    beside = profile_of(model, tiny_tokenizer, Corpus(("w7", "w7"), (), ""), batch_size=2)
    text = "w7 " + " ".join(f"w{n}" for n in range(4, 24))
    padded = profile_of(model, tiny_tokenizer, Corpus(("w7", text), (), ""), batch_size=2)
    longer = profile_of(model, tiny_tokenizer, Corpus((text,), (), ""), batch_size=1)
    assert (alone.tokens, beside.tokens, padded.tokens, longer.tokens) == (1, 2, 22, 21)
    for path, values in padded.statistics["mean_abs"].items():
        one, rest = (part.statistics["mean_abs"][path] for part in (alone, longer))
        np.testing.assert_allclose(beside.statistics["mean_abs"][path], one, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(values, (one + 21 * rest) / 22, rtol=1e-4, atol=1e-6)


def test_memory_does_not_grow_with_the_number_of_tokens(tiny_model, tiny_tokenizer):
    model = tiny_model("gemma")
    documents = tuple(" ".join(f"w{4 + (first + n) % 96}" for n in range(40)) for first in range(40))
    held, rows = [], []

    def live_bytes(count):
        rows.append(count)
        if len(rows) in (3, 20):
            storages = {
                one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
                for one in gc.get_objects()
                if type(one) in (torch.Tensor, torch.nn.Parameter) and one.device.type == "cpu"
            }
            held.append(sum(storages.values()))

    profile_of(model, tiny_tokenizer, Corpus(documents, (), ""), tokens=10_000, batch_size=2, progress=live_bytes)
    assert rows == [80] * 20
    early, late = held
    activations_of_one_batch = 82 * 64 * 4
    assert abs(late - early) < activations_of_one_batch


def test_progress_is_told_of_every_counted_token(tiny_model, tiny_tokenizer, corpus):
    told = []
    part = profile_of(tiny_model("gemma"), tiny_tokenizer, corpus, progress=told.append)
    assert sum(told) == part.tokens == 200
    assert len(told) > 1


def test_only_what_was_asked_for_is_collected(tiny_model, tiny_tokenizer, corpus):
    part = profile_of(tiny_model("gemma"), tiny_tokenizer, corpus, names=["mean_square"])
    assert list(part.statistics) == ["mean_square"]


def test_of_experts_it_is_known_how_often_each_is_chosen(tiny_model, tiny_tokenizer, corpus):
    part = profile_of(tiny_model("mixtral"), tiny_tokenizer, corpus, names=["mean_abs"])
    assert list(part.statistics) == ["mean_abs", ROUTING]


def test_profiling_leaves_no_hook_behind(tiny_model, tiny_tokenizer, corpus):
    model = tiny_model("gemma")

    def interrupt(count):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile_of(model, tiny_tokenizer, corpus, progress=interrupt)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("documents", [(), ("", "  \n ")])
def test_text_without_a_token_is_a_usage_error(tiny_model, tiny_tokenizer, documents):
    with pytest.raises(UsageError, match=r"profile text of math \(nowhere\): it holds no token"):
        profile_of(tiny_model("gemma"), tiny_tokenizer, Corpus(documents, (), "nowhere"))


def test_backbone_gives_what_the_output_head_is_applied_to(model, tiny_tokenizer, corpus):
    (batch, *_) = batches(tiny_tokenizer, corpus.profile, tokens=100, batch_size=3)
    heads = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0]))
    with torch.inference_mode():
        model(**batch.inputs(model.device))
        handle.remove()
        assert torch.equal(forward_backbone(model, batch), heads[0])


@pytest.fixture
def saved(tiny_model, tiny_tokenizer, corpus):
    """Two domains of which one has halves, the other none, as in a file of before there were some."""
    math = profile_of(tiny_model("gemma"), tiny_tokenizer, corpus)
    other = profile_of(tiny_model("gemma", seed=1), tiny_tokenizer, corpus)
    code = DomainProfile("code", other.tokens, other.source, other.text_digest, other.statistics)
    return Profile({"math": math, "code": code}, "0123", {"made by": "a test"})


def assert_same(one, other):
    """Two profiles of a domain, to the last bit."""
    assert (one.tokens, one.source, one.text_digest) == (other.tokens, other.source, other.text_digest)
    assert_close(one.statistics, other.statistics, rtol=0, atol=0)
    assert (one.halves is None) == (other.halves is None)
    for half, of_other in zip(one.halves or (), other.halves or (), strict=True):
        assert_same(half, of_other)


def test_a_saved_profile_comes_back_with_its_provenance(saved, tmp_path):
    path = tmp_path / "profile.safetensors"
    saved.save(path)
    loaded = Profile.load(path)
    assert (loaded.model, loaded.provenance) == ("0123", {"made by": "a test"})
    assert loaded.fingerprint == saved.fingerprint
    assert loaded.domains.keys() == saved.domains.keys()
    for domain, part in saved.domains.items():
        assert_same(loaded.domains[domain], part)
    with pytest.raises(UsageError, match="profile of 'code' has no halves"):
        loaded.half(1)


def test_a_file_holds_two_values_of_a_neuron_whose_text_has_halves(any_model, tiny_tokenizer, corpus, tmp_path):
    part = profile_of(any_model, tiny_tokenizer, corpus, names=["mean_abs", ROUTING])
    Profile({"math": part}).save(tmp_path / "file")
    with safe_open(tmp_path / "file", "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert stored == 2 * sum(values.numel() for sites in part.statistics.values() for values in sites.values())
    loaded = Profile.load(tmp_path / "file")
    assert_same(loaded.domains["math"], part)
    assert loaded.statistic(ROUTING, "math").keys() == part.statistics[ROUTING].keys(), "also where there is none"


def test_a_file_of_before_there_were_halves_is_read(tmp_path):
    about = '{"law": {"tokens": 7, "source": "a book", "text_digest": "89ab"}}'
    header = {"spath_eval": "profile", "model": "0123", "domains": about}
    values = torch.arange(4, dtype=torch.float64)
    save_file({"law/mean_abs/model.layers.0.mlp": values}, tmp_path / "file", header)
    part = Profile.load(tmp_path / "file").domains["law"]
    assert_same(part, DomainProfile("law", 7, "a book", "89ab", {"mean_abs": {"model.layers.0.mlp": values}}))


def test_fingerprint_changes_with_every_value(saved):
    before = saved.fingerprint
    assert Profile(saved.domains, "4567").fingerprint != before
    assert Profile({"math": saved.domains["math"]}, "0123").fingerprint != before
    saved.statistic("mean_square", "code")["model.layers.2.mlp"][5] *= 1 + 1e-12
    assert saved.fingerprint != before
    before = saved.fingerprint
    saved.domains["math"].halves[1].statistics["mean_abs"]["model.layers.0.mlp"][3] *= 1 + 1e-12
    assert saved.fingerprint != before


def test_the_profile_of_a_half_is_a_profile(saved):
    math = Profile({"math": saved.domains["math"]}, saved.model, saved.provenance)
    for index in (0, 1):
        half = math.half(index)
        assert (half.model, half.provenance) == (math.model, math.provenance)
        assert half.domains["math"] is math.domains["math"].halves[index]
    assert len({profile.fingerprint for profile in (math, math.half(0), math.half(1))}) == 3


@pytest.fixture
def by_domain(any_model, tiny_tokenizer, corpus):
    """A long domain and a short one."""
    texts = {"math": corpus.profile[:14], "code": corpus.profile[14:]}
    names = [*NAMES, ROUTING]
    parts = {
        domain: profile_of(any_model, tiny_tokenizer, Corpus(text, (), f"text of {domain}"), names=names, tokens=10_000)
        for domain, text in texts.items()
    }
    return Profile(parts, "0123", {"made by": "a test"})


def test_pooled_is_the_profile_of_all_domains_texts(any_model, tiny_tokenizer, corpus, by_domain, tmp_path):
    everything = pooled(by_domain)
    assert (everything.model, everything.provenance) == (by_domain.model, by_domain.provenance)
    assert list(everything.domains) == ["pooled"]
    found = everything.domains["pooled"]
    assert (found.domain, found.source) == ("pooled", "text of math; text of code")
    expected = profile_of(any_model, tiny_tokenizer, corpus, names=[*NAMES, ROUTING], tokens=10_000)
    for part, by_itself in zip((found, *found.halves), (expected, *expected.halves), strict=True):
        assert part.tokens == by_itself.tokens
        assert_close(part.statistics, by_itself.statistics, rtol=1e-4, atol=1e-6)
    everything.save(tmp_path / "file")
    assert Profile.load(tmp_path / "file").fingerprint == everything.fingerprint
    assert list(pooled(by_domain, "all").domains) == ["all"]


def test_pooled_has_halves_only_where_all_domains_have_some(by_domain):
    math, code = by_domain.domains.values()
    whole = DomainProfile("code", code.tokens, code.source, code.text_digest, code.statistics)
    part = pooled(Profile({"math": math, "code": whole})).domains["pooled"]
    assert part.halves is None
    assert_close(part.statistics, pooled(by_domain).domains["pooled"].statistics, rtol=1e-12)


def test_experts_are_not_pooled_without_their_shares_of_the_tokens(by_domain):
    parts = {
        domain: DomainProfile(domain, part.tokens, "", "", {name: part.statistics[name] for name in NAMES})
        for domain, part in by_domain.domains.items()
    }
    if not by_domain.domains["math"].statistics[ROUTING]:
        assert pooled(Profile(parts)).domains["pooled"].tokens == sum(part.tokens for part in parts.values())
        return
    with pytest.raises(UsageError, match="no statistic 'routing_share', by which the means of experts are weighted"):
        pooled(Profile(parts))


def test_domains_of_different_statistics_are_not_pooled(by_domain):
    math, code = by_domain.domains.values()
    less = DomainProfile("code", code.tokens, "", "", {"mean_abs": code.statistics["mean_abs"]})
    with pytest.raises(UsageError, match="different statistics"):
        pooled(Profile({"math": math, "code": less}))


def test_what_was_not_collected_is_a_usage_error_that_says_what_was(saved):
    with pytest.raises(UsageError, match="no domain 'law': it has math, code"):
        saved.statistic("mean_abs", "law")
    with pytest.raises(UsageError, match="no statistic 'mean_cube': it has mean_abs, mean_square"):
        saved.statistic("mean_cube", "math")


def damaged_words(path):
    path.write_text("these are words")


def damaged_end(path):
    path.write_bytes(path.read_bytes()[:-100])


def damaged_header(path):
    save_file({"math/mean_abs/a": torch.ones(4)}, path, {"spath_eval": "profile"})


def damaged_domains(path):
    about = '{"law": {"tokens": 1, "source": "", "text_digest": ""}}'
    save_file({"law/mean_abs/a": torch.ones(4)}, path, {"spath_eval": "profile", "model": "", "domains": about})


def damaged_half(path):
    """One half without what the other one has."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = file.metadata()
    first = min(name for name in tensors if name.startswith("math/0/"))
    save_file({name: values for name, values in tensors.items() if name != first}, path, header)


@pytest.mark.parametrize("damage", [damaged_words, damaged_end, damaged_header, damaged_half])
def test_what_is_no_profile_file_is_a_usage_error_of_one_line(saved, tmp_path, damage):
    path = tmp_path / "profile.safetensors"
    saved.save(path)
    damage(path)
    with pytest.raises(UsageError) as caught:
        Profile.load(path)
    assert "\n" not in str(caught.value)
    assert "profile.safetensors" in str(caught.value)


class Cached:
    """A profile asked for through the cache, and how often it was made."""

    def __init__(self, model, tokenizer, corpus):
        self.model, self.tokenizer, self.corpus, self.made = model, tokenizer, corpus, 0

    def __call__(self, **changes):
        inputs = {"fingerprint": fingerprint(self.model), "corpus": self.corpus, "tokens": 100, "names": ["mean_abs"]}
        inputs |= changes
        settings = {"tokens": inputs["tokens"], "batch_size": 4}

        def make():
            self.made += 1
            return profile_of(self.model, self.tokenizer, inputs["corpus"], names=inputs["names"], **settings)

        settings_and_names = settings | {"statistics": inputs["names"]}
        return cached_profile(inputs["fingerprint"], self.model, "math", inputs["corpus"], settings_and_names, make)


@pytest.fixture
def cached(tiny_model, tiny_tokenizer, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("SPATH_CACHE_DIR", str(tmp_path / "cache"))
    return Cached(tiny_model("gemma"), tiny_tokenizer, corpus)


def same(one, other):
    return Profile({"math": one}).fingerprint == Profile({"math": other}).fingerprint


def test_same_inputs_are_profiled_once(cached):
    first = cached()
    assert same(cached(), first)
    assert cached.made == 1
    assert len(list(cache_folder().rglob("*.safetensors"))) == 1


def test_other_inputs_are_profiled_again(cached, corpus):
    cached()
    others = [
        {"fingerprint": "of another model"},
        {"corpus": Corpus(corpus.profile[1:], (), corpus.source)},
        {"names": ["mean_square"]},
        {"tokens": 50},
    ]
    for number, other in enumerate(others):
        cached(**other)
        assert cached.made == number + 2
    assert list(cached(names=["mean_square"]).statistics) == ["mean_square"]
    assert cached(tokens=50).tokens == 50
    assert cached.made == 5


def test_a_cached_profile_of_another_format_is_not_read(cached, monkeypatch):
    cached()
    monkeypatch.setattr("spath_eval.profiling.FORMAT", 1)
    cached()
    assert cached.made == 2


@pytest.mark.parametrize("damage", [damaged_words, damaged_end, damaged_header, damaged_domains, damaged_half])
def test_a_damaged_profile_in_the_cache_is_made_again_and_said(cached, caplog, damage):
    first = cached()
    (path,) = cache_folder().rglob("*.safetensors")
    damage(path)
    with caplog.at_level(logging.WARNING):
        assert same(cached(), first)
    assert cached.made == 2
    assert "damaged" in caplog.text
    assert same(cached(), first)
    assert cached.made == 2, "the cache was mended"


@pytest.mark.parametrize("unusable", ["file", "x" * 300])
def test_a_cache_that_cannot_be_written_costs_a_warning(cached, caplog, tmp_path, monkeypatch, unusable):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SPATH_CACHE_DIR", str(tmp_path / unusable))
    with caplog.at_level(logging.WARNING):
        assert cached().tokens == 100
    assert "not cached" in caplog.text
    assert cached.made == 1


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("SPATH_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "spath-eval"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "spath-eval"
    monkeypatch.setenv("SPATH_CACHE_DIR", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_specialised_neurons_are_counted_where_they_are_most_active():
    activations = {"math": [9.0, 1.0, 1.0, 0.0], "code": [1.0, 1.0, 1.0, 0.0], "law": [1.0, 1.0, 8.0, 0.0]}
    profile = Profile(
        {
            name: DomainProfile(name, 7, "", "", {"mean_abs": {"a": torch.tensor(values, dtype=torch.float64)}})
            for name, values in activations.items()
        }
    )
    assert specialisation(profile) == {"a": {"math": 0.25, "code": 0.0, "law": 0.25}}
