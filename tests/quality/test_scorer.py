"""Scores are those of lm-eval's `hf` model, whatever the family, the packing, the memory and the pathway."""

from __future__ import annotations

import logging
import random
from itertools import pairwise
from pathlib import Path

import lm_eval
import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from spath_eval import SpathLM, plugins
from spath_eval.masks import Mask
from spath_eval.pathways import Exercise, StaticPathway
from spath_eval.plugins.architectures.gemma import GEMMA
from spath_eval.plugins.architectures.moe import MOE
from spath_eval.quality import scorer
from spath_eval.tasks import FOLDER

ZOO = Path(plugins.__file__).parent / "zoo"
ROOM = 64
"""Longest input of the tiny models."""
WINDOW = {"sliding_window": 8}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
KINDS = {
    "gemma": {},
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "gemma3n_text": WINDOW,
    "gemma4_text": WINDOW,
    "gemma4_text+experts": WINDOW,
    "phi": {},
    "phi3": WINDOW,
    "qwen2": QWEN_WINDOW,
    "qwen3": QWEN_WINDOW,
    "llama": {},
    "llama+mlp_bias": {},
    "mistral": WINDOW,
    "mixtral": WINDOW,
    "qwen2_moe": QWEN_WINDOW,
    "qwen3_moe": QWEN_WINDOW,
    "olmoe": {},
    "phimoe": WINDOW,
    "deepseek_v3": {},
    "gpt_oss": WINDOW,
    "kimi_k25": {},
}
"""Every model type with a tiny model, with a window that is shorter than the texts where the type has windows."""


def words(generator, count):
    """Text of that many tokens of the tiny tokenizer."""
    return " ".join(f"w{generator.randrange(4, 100)}" for _ in range(count))


def choices():
    """Pairs of context and continuation: questions behind a header, contexts that are the beginning of others, long
    and empty ones, and one that is asked for twice."""
    generator = random.Random(0)
    header = words(generator, 14)
    questions = [f"{header} {words(generator, count)}" for count in (3, 6, 9)]
    pairs = [(question, f" {words(generator, count)}") for question in questions for count in (1, 1, 2, 4)]
    pairs += [(header, f" {words(generator, 3)}"), ("", words(generator, 4)), (words(generator, 40), " w5 w6")]
    return [*pairs, pairs[2]]


def texts():
    generator = random.Random(1)
    header = words(generator, 14)
    return [f"{header} w7 w8", words(generator, 150), f"{header} w9", "w4"]


def stock(model, tokenizer, max_length=ROOM, **settings):
    """The reference."""
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=4,
        max_length=max_length,
        softmax_dtype=torch.float32,
        **settings,
    )


def packed(model, tokenizer, max_length=ROOM, budget=None, **settings):
    lm = SpathLM(model, tokenizer=tokenizer, batch_size=4, max_length=max_length, **settings)
    lm.token_budget = budget or lm.token_budget
    return lm


def likelihoods(lm, pairs):
    """`loglikelihood` of (context, continuation) pairs, or `loglikelihood_rolling` of texts."""
    if isinstance(pairs[0], str):
        requests = [Instance("loglikelihood_rolling", {}, (text,), at) for at, text in enumerate(pairs)]
        return lm.loglikelihood_rolling(requests, disable_tqdm=True)
    return lm.loglikelihood([Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(pairs)])


def difference(found, expected):
    """The largest difference of scores, all else being equal. Greediness must be the same."""
    assert len(found) == len(expected)
    if isinstance(found[0], tuple):
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        found, expected = [[score for score, _ in scores] for scores in (found, expected)]
    return max(abs(one - other) for one, other in zip(found, expected, strict=True))


def assert_same(found, expected):
    """Equal within 1e-4, or what float32 resolves in the sum over a long text."""
    sizes = [abs(score[0] if isinstance(score, tuple) else score) for score in expected]
    assert difference(found, expected) <= max(1e-4, 5e-7 * max(sizes))


# Every family


def test_every_model_type_is_compared(tiny_model):
    assert set(KINDS) == set(tiny_model.kinds)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_a_model_type_are_those_of_lm_eval(kind, tiny_model, tiny_tokenizer):
    """With all in one forward, and with prefixes kept and chunked."""
    model = tiny_model(kind, **KINDS[kind])
    reference = stock(model, tiny_tokenizer)
    for asked in (choices(), texts()):
        expected = likelihoods(reference, asked)
        for budget in (None, 24):
            lm = packed(model, tiny_tokenizer, budget=budget)
            assert_same(likelihoods(lm, asked), expected)
            assert not lm.plain


@pytest.mark.parametrize("kind", [kind for kind, changes in KINDS.items() if changes])
def test_windows_are_shorter_than_the_texts(kind, tiny_model, tiny_tokenizer):
    """Else the comparison above would say nothing about them."""
    narrow, wide = (
        likelihoods(stock(tiny_model(kind, **changes), tiny_tokenizer), choices())
        for changes in (KINDS[kind], KINDS[kind] | {"sliding_window": 1000})
    )
    assert max(abs(one - other) for (one, _), (other, _) in zip(narrow, wide, strict=True)) > 0.1


@pytest.mark.parametrize("family", ["gemma", "phi", "qwen", "llama", "moe"])
def test_scores_of_the_trained_models_are_those_of_lm_eval(family):
    folder = str(ZOO / family)
    settings = {"device": "cpu", "dtype": "float32", "batch_size": 4, "max_length": 64}
    reference, lm = HFLM(folder, **settings), SpathLM(folder, **settings)
    header = "Question: What is 3 plus 4? Answer: 7\n\n"
    pairs = [
        (f"{header}Question: What is {number} plus 2? Answer:", f" {answer}")
        for number in (1, 5)
        for answer in ("three", "seven", 3, 7)
    ]
    assert_same(likelihoods(lm, pairs), likelihoods(reference, pairs))
    passages = [f"{header}The river is long. " * 8, header]
    assert_same(likelihoods(lm, passages), likelihoods(reference, passages))
    assert not lm.plain


@pytest.mark.parametrize("kind", ["gemma3_text", "llama", "mixtral"])
def test_eager_attention_is_scored_packed_as_well(kind, tiny_model, tiny_tokenizer):
    model = tiny_model(kind, **KINDS[kind])
    expected = likelihoods(stock(model, tiny_tokenizer), choices())
    model.set_attn_implementation("eager")
    lm = packed(model, tiny_tokenizer)
    assert_same(likelihoods(lm, choices()), expected)
    assert not lm.plain


def test_soft_capped_logits_are_scored_as_such(tiny_model, tiny_tokenizer):
    scores = []
    for cap in (2.0, None):
        model = tiny_model("gemma2", final_logit_softcapping=cap)
        scores.append(likelihoods(packed(model, tiny_tokenizer), choices()))
        assert_same(scores[-1], likelihoods(stock(model, tiny_tokenizer), choices()))
    assert max(abs(one - other) for (one, _), (other, _) in zip(*scores, strict=True)) > 0.1


def test_half_precision_is_scored_packed(tiny_model, tiny_tokenizer):
    model = tiny_model("llama").to(torch.bfloat16)
    lm = packed(model, tiny_tokenizer)
    found, expected = likelihoods(lm, choices()), likelihoods(stock(model, tiny_tokenizer), choices())
    assert not lm.plain
    assert max(abs(one - other) for (one, _), (other, _) in zip(found, expected, strict=True)) < 0.2


# What cannot be scored packed


def build(model_type, **configuration):
    """A tiny random model of a type that no family claims."""
    torch.manual_seed(0)
    special = {"vocab_size": 100, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "initializer_range": 0.2}
    config = transformers.AutoConfig.for_model(model_type, **special, **configuration)
    return transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = SMALL | {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 64}
PLAIN = {
    "positions by distance in the row": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 2}),
    "a cache of its own": (
        "recurrent_gemma",
        LLAMA | {"num_hidden_layers": 3, "attention_window_size": 8, "lru_width": 32},
    ),
    "a scale at the output": ("granite", LLAMA | {"logits_scaling": 3.0}),
    "a window by distance in the row": (
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 32,
            "max_position_embeddings": 512,
        },
    ),
}


@pytest.mark.parametrize(("model_type", "configuration"), PLAIN.values(), ids=PLAIN)
def test_what_cannot_be_scored_packed_is_scored_plainly_and_said_once(
    model_type, configuration, tiny_tokenizer, caplog
):
    model = build(model_type, **configuration)
    lm = packed(model, tiny_tokenizer)
    with caplog.at_level(logging.WARNING):
        for asked in (choices(), texts(), choices()):
            assert_same(likelihoods(lm, asked), likelihoods(stock(model, tiny_tokenizer), asked))
    assert lm.plain
    said = [record.getMessage() for record in caplog.records if record.name == scorer.__name__]
    assert len(said) == 1
    assert said[0].startswith(f"{type(model).__name__}: scored in plain batches, because ")


def test_an_attention_without_masks_is_scored_plainly(tiny_model, tiny_tokenizer, caplog, monkeypatch):
    model = tiny_model("llama")
    lm = packed(model, tiny_tokenizer)
    monkeypatch.setattr(model.config, "_attn_implementation", "flash_attention_2")
    with caplog.at_level(logging.WARNING):
        assert lm.plain
    assert "'flash_attention_2' takes no mask" in caplog.text


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "opt"])
def test_models_of_no_family_are_scored_packed_where_they_can_be(model_type, tiny_tokenizer):
    sizes = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}}
    others = SMALL | {"max_position_embeddings": 64, "ffn_dim": 64, "word_embed_proj_dim": 32}
    model = build(model_type, **sizes.get(model_type, others))
    lm = packed(model, tiny_tokenizer)
    assert_same(likelihoods(lm, choices()), likelihoods(stock(model, tiny_tokenizer), choices()))
    assert not lm.plain


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_positions_that_depend_on_the_length_are_those_of_lm_eval(rope, tiny_tokenizer):
    """An input that is long as a whole is short in pieces."""
    parameters = {"rope_theta": 10_000.0, "original_max_position_embeddings": 20, **rope}
    model = build("llama", **LLAMA | {"max_position_embeddings": 20, "rope_parameters": parameters})
    reference = stock(model, tiny_tokenizer)
    for pairs in (choices(), [(context, answer) for context, answer in choices() if len(context.split()) < 15]):
        assert_same(likelihoods(packed(model, tiny_tokenizer, budget=24), pairs), likelihoods(reference, pairs))


# Packing


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen2_moe"])
def test_scores_do_not_depend_on_what_is_computed_together(kind, tiny_model, tiny_tokenizer, monkeypatch):
    model, asked = tiny_model(kind, **KINDS[kind]), choices()
    together = likelihoods(packed(model, tiny_tokenizer), asked)
    order = random.Random(0).sample(range(len(asked)), len(asked))
    shuffled = likelihoods(packed(model, tiny_tokenizer), [asked[at] for at in order])
    assert difference(shuffled, [together[at] for at in order]) <= 1e-4
    one_by_one = packed(model, tiny_tokenizer)
    assert difference([likelihoods(one_by_one, [pair])[0] for pair in asked], together) <= 1e-4
    for row in (1, 16, 128, 1024):
        monkeypatch.setitem(scorer.ROW, "cpu", row)
        for budget in (7, 33, 150):
            assert difference(likelihoods(packed(model, tiny_tokenizer, budget=budget), asked), together) <= 1e-4


def test_texts_do_not_depend_on_what_is_computed_together(tiny_model, tiny_tokenizer):
    model = tiny_model("gemma3_text", **WINDOW)
    lm = packed(model, tiny_tokenizer)
    together = likelihoods(lm, texts())
    assert_same([likelihoods(lm, [text])[0] for text in texts()], together)
    assert_same(likelihoods(lm, texts()[::-1]), together[::-1])


def test_logits_are_computed_a_part_at_a_time_and_only_where_they_are_scored(tiny_model, tiny_tokenizer, monkeypatch):
    model = tiny_model("llama")
    lm = packed(model, tiny_tokenizer)
    assert not lm.plain
    rows = []
    handle = model.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[:-1].numel()))
    try:
        whole = likelihoods(lm, choices())
        targets = {
            (tuple(context), tuple(answer[: at + 1]))
            for _, context, answer in next(iter(lm._encoded.values()))
            for at in range(len(answer))
        }
        assert sum(rows) == len({(*context, *answer[:-1]) for context, answer in targets})
        rows.clear()
        monkeypatch.setattr(scorer, "LOGITS", 3 * 100)
        parts = likelihoods(packed(model, tiny_tokenizer), choices())
        assert set(rows[-3:]) <= {1, 2, 3}
    finally:
        handle.remove()
    assert difference(parts, whole) <= 1e-4


def test_what_greedy_decoding_gives_is_found_greedy(tiny_model, tiny_tokenizer):
    model = tiny_model("gemma3_text", **WINDOW)
    pairs = []
    for context, _ in choices()[:12:4]:
        tokens = tiny_tokenizer(context).input_ids
        for _ in range(4):
            with torch.inference_mode():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        answer = " ".join(tiny_tokenizer.convert_ids_to_tokens(tokens[-4:]))
        pairs += [(context, f" {answer}"), (context, f" {answer} w4"), (context, f" {answer.split()[0]}")]
    found = likelihoods(packed(model, tiny_tokenizer), pairs)
    assert [greedy for _, greedy in found] == [True, False, True] * 3
    assert_same(found, likelihoods(stock(model, tiny_tokenizer), pairs))


def test_requests_are_tokenised_and_planned_once(tiny_model, tiny_tokenizer, monkeypatch):
    calls = []
    at_once, encode, plan = SpathLM._encode_at_once, HFLM.tok_encode, scorer.Plan
    monkeypatch.setattr(SpathLM, "_encode_at_once", lambda *args: calls.append("tokens") or at_once(*args))
    monkeypatch.setattr(HFLM, "tok_encode", lambda *args, **kwargs: calls.append("tokens") or encode(*args, **kwargs))
    monkeypatch.setattr(scorer, "Plan", lambda *args: calls.append("plan") or plan(*args))
    lm = packed(tiny_model("llama"), tiny_tokenizer)
    for asked in (choices(), texts()):
        first = likelihoods(lm, asked)
        assert {"tokens", "plan"} <= set(calls)
        calls.clear()
        assert likelihoods(lm, asked) == first
        assert calls == []


@pytest.mark.parametrize("add_bos_token", [None, False, True])
def test_tokens_are_those_of_lm_eval_though_encoded_at_once(add_bos_token, tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(GEMMA.checkpoint)
    contexts = ["One and one is", "One and one is ", "  ", "", f"{tokenizer.bos_token}One", "Two  \n"]
    pairs = [(context, answer) for context in contexts for answer in ("two", " two", "\ntwo", tokenizer.bos_token)]
    arms = [of(tiny_model("llama"), tokenizer, add_bos_token=add_bos_token) for of in (packed, stock)]
    found = arms[0]._encode([Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(pairs)])
    assert [(pair, tokens) for pair, *tokens in found if pair[0]] == [
        (pair, [*map(list, arms[1]._encode_pair(*pair))]) for pair in pairs if pair[0]
    ]


# The edges of an input


@pytest.mark.parametrize("max_length", [6, 24])
def test_long_inputs_lose_their_left_as_in_lm_eval_and_are_counted(max_length, tiny_model, tiny_tokenizer):
    model = tiny_model("gemma3_text", **WINDOW)
    lm, reference = packed(model, tiny_tokenizer, max_length), stock(model, tiny_tokenizer, max_length)
    assert_same(likelihoods(lm, choices()), likelihoods(reference, choices()))
    lengths = [1 + len(f"{context}{answer}".split()) for context, answer in choices()]
    assert lm.truncated == sum(length > max_length + 1 for length in lengths) > 0
    before = lm.truncated
    assert_same(likelihoods(lm, texts()), likelihoods(reference, texts()))
    assert lm.truncated == before, "windows of a text lose nothing"


def test_an_answer_as_long_as_the_input_is_scored(tiny_model, tiny_tokenizer):
    model, pair = tiny_model("llama"), ("w9", f" {words(random.Random(0), 12)}")
    found = likelihoods(packed(model, tiny_tokenizer, 12), [pair])
    assert_same(found, likelihoods(stock(model, tiny_tokenizer, 12), [pair]))


@pytest.mark.parametrize(
    "pair", [("w9", f" {words(random.Random(0), 13)}"), (" ", "w5 w6"), ("w5", "")], ids=["long", "blank", "nothing"]
)
def test_what_lm_eval_refuses_is_refused(pair, tiny_model, tiny_tokenizer):
    """An answer longer than the input, a context without a token, an answer without one: they have no score."""
    model = tiny_model("llama")
    with pytest.raises(AssertionError):
        likelihoods(stock(model, tiny_tokenizer, 12, add_bos_token=False), [pair])
    with pytest.raises((AssertionError, ValueError)):
        likelihoods(packed(model, tiny_tokenizer, 12, add_bos_token=False), [pair])


def test_no_requests_have_no_scores(tiny_model, tiny_tokenizer):
    lm = packed(tiny_model("llama"), tiny_tokenizer)
    assert lm.loglikelihood([]) == []
    assert lm.loglikelihood_rolling([]) == []


# Memory


def out_of_memory():
    raise torch.OutOfMemoryError("out of memory")


def out_of_address_space():
    torch.empty(2**56)


@pytest.mark.parametrize("run_out", [out_of_memory, out_of_address_space])
def test_running_out_of_memory_halves_the_budget_for_good(run_out, tiny_model, tiny_tokenizer, caplog):
    model = tiny_model("gemma3_text", **WINDOW)
    expected = likelihoods(stock(model, tiny_tokenizer), choices())
    lm = packed(model, tiny_tokenizer)
    sizes = []

    def hook(_module, _args, kwargs):
        sizes.append(kwargs["input_ids"].numel())
        if sizes[-1] > 80:
            run_out()

    handle = model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with caplog.at_level(logging.WARNING):
            assert_same(likelihoods(lm, choices()), expected)
        assert lm.token_budget in (64, 128)
        said = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
        assert said == [
            f"out of memory: going on with {budget} tokens in a forward"
            for budget in (512, 256, 128, 64)
            if budget >= lm.token_budget
        ]
        sizes.clear()
        assert_same(likelihoods(lm, choices()[::-1]), expected[::-1])
        assert max(sizes) <= lm.token_budget, "later requests start with the smaller budget"
    finally:
        handle.remove()


def test_below_the_smallest_budget_running_out_of_memory_is_an_error(tiny_model, tiny_tokenizer):
    model = tiny_model("llama")
    lm = packed(model, tiny_tokenizer)
    assert not lm.plain
    handle = model.get_decoder().register_forward_pre_hook(lambda *_: out_of_memory())
    try:
        with pytest.raises(torch.OutOfMemoryError):
            likelihoods(lm, choices())
    finally:
        handle.remove()
    assert lm.token_budget == scorer.SMALLEST


def test_another_error_is_not_taken_for_a_lack_of_memory(tiny_model, tiny_tokenizer):
    model = tiny_model("llama")
    lm = packed(model, tiny_tokenizer)
    assert not lm.plain
    budget = lm.token_budget
    handle = model.get_decoder().register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            likelihoods(lm, choices())
    finally:
        handle.remove()
    assert lm.token_budget == budget


# The model that is scored


def masks_of_transformers():
    return {name: ALL_MASK_ATTENTION_FUNCTIONS[name] for name in ALL_MASK_ATTENTION_FUNCTIONS}


def test_the_model_is_left_as_it_was(tiny_model, tiny_tokenizer):
    model, before = tiny_model("gemma3_text", **WINDOW), masks_of_transformers()
    tokens = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = model(tokens).logits
        lm = packed(model, tiny_tokenizer)
        likelihoods(lm, choices())
        assert masks_of_transformers() == before
        assert torch.equal(model(tokens).logits, logits)
        handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            likelihoods(lm, choices())
        handle.remove()
        assert masks_of_transformers() == before
        assert torch.equal(model(tokens).logits, logits)


@pytest.mark.parametrize("execution", ["masked", "compact"])
@pytest.mark.parametrize(("kind", "family"), [("gemma3_text", GEMMA), ("qwen2_moe", MOE)])
def test_a_pathway_is_scored_as_lm_eval_scores_it(kind, family, execution, tiny_model, tiny_tokenizer):
    model = tiny_model(kind, **KINDS[kind])
    sites = family.sites(model)
    generator = torch.Generator().manual_seed(0)
    keep = {}
    for site in sites:
        kept = torch.randperm(site.width, generator=generator) < site.width // 2
        keep[site.path] = kept if site.experts is None else kept.expand(site.experts, -1).clone()
    pathway = StaticPathway(sites, Mask(keep), execution)
    lm, reference = packed(model, tiny_tokenizer), stock(model, tiny_tokenizer)
    dense = likelihoods(lm, choices())
    with pathway.applied():
        expected = likelihoods(reference, choices())
        exercise = Exercise(model, pathway)
        exercise.scoring = True
        with exercise.watching():
            found = likelihoods(lm, choices())
    assert exercise.check(["scoring"])["sites"] == len(sites)
    assert_same(found, expected)
    assert max(abs(one - other) for (one, _), (other, _) in zip(found, dense, strict=True)) > 0.1
    assert likelihoods(lm, choices()) == dense


# Alone, in lm-eval


def test_it_stands_in_for_lm_evals_model():
    settings = {"device": "cpu", "dtype": "float32", "batch_size": 4, "max_length": 256}
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    tasks = ["spath_math_choice", "spath_language_choice"]
    results = [
        lm_eval.simple_evaluate(lm(str(ZOO / "llama"), **settings), tasks=tasks, task_manager=manager, limit=5)
        for lm in (HFLM, SpathLM)
    ]
    expected, found = results
    assert found["results"] == expected["results"]
    for task in tasks:
        for one, other in zip(found["samples"][task], expected["samples"][task], strict=True):
            assert one["prompt_hash"] == other["prompt_hash"]
            for (score, greedy), (wanted, wanted_greedy) in zip(
                one["filtered_resps"], other["filtered_resps"], strict=True
            ):
                assert score == pytest.approx(wanted, abs=1e-4)
                assert greedy == wanted_greedy


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """A llama of one layer with random weights."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(ROOM)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(100)
    generator = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (100, 32), "output": (100, 32), "output_norm": (32,)}
    block = {f"attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    block |= {"ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48), "attn_norm": (32,), "ffn_norm": (32,)}
    for name, shape in {**shapes, **{f"blk.0.{name}": shape for name, shape in block.items()}}.items():
        weight = torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) / 4
        writer.add_tensor(f"{name}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_scored(gguf_file, tiny_tokenizer):
    settings = {"gguf_file": gguf_file.name, "tokenizer": tiny_tokenizer, "device": "cpu", "dtype": "float32"}
    reference, lm = (kind(str(gguf_file.parent), batch_size=4, **settings) for kind in (HFLM, SpathLM))
    assert_same(likelihoods(lm, choices()), likelihoods(reference, choices()))
    assert_same(likelihoods(lm, texts()), likelihoods(reference, texts()))


def test_it_takes_a_folder_and_a_tokenizer_by_name(tiny_checkpoint):
    lm = SpathLM(str(tiny_checkpoint), tokenizer=str(ZOO / "tokenizer"), device="cpu", dtype="float32", max_length=32)
    assert lm.max_length == 32
    assert lm.model.dtype == torch.float32
    assert lm.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(ZOO / "tokenizer").get_vocab()
    (score, greedy), *_ = likelihoods(lm, [("What is 1 plus 1?", " 2")])
    assert score < 0
    assert greedy in (True, False)


def test_a_longer_continuation_is_less_likely(tiny_model, tiny_tokenizer):
    """The chain rule: what HFLM is not needed for."""
    lm = packed(tiny_model("mixtral", **WINDOW), tiny_tokenizer)
    answer = words(random.Random(5), 6).split()
    scores = likelihoods(lm, [("w4 w5 w6", f" {' '.join(answer[:end])}") for end in range(1, 7)])
    assert all(longer < shorter for (shorter, _), (longer, _) in pairwise(scores))
