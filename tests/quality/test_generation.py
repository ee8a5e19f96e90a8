"""Greedy generation gives the tokens of `model.generate` one prompt at a time, however rows and columns are shared."""

import logging
import random
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

from spath_eval import plugins
from spath_eval.masks import remove_lowest
from spath_eval.pathways import Exercise, StaticPathway
from spath_eval.quality import generation
from spath_eval.quality.generation import generate, why_not
from spath_eval.registry import Registry

ZOO = Path(plugins.__file__).parent / "zoo"
FAMILIES = ["gemma", "phi", "qwen", "llama", "moe"]
NEW = 10
WINDOWED = {
    "gemma2": {},
    "gemma3_text": {},
    "gemma3n_text": {},
    "gemma4_text": {},
    "phi3": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1},
    "mixtral": {},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 1},
    "gpt_oss": {},
}
"""Model types with sliding-window layers, and what else switches these on."""


@pytest.fixture(scope="module")
def zoo():
    """A family's trained checkpoint and its tokenizer."""

    def load(name):
        model = AutoModelForCausalLM.from_pretrained(ZOO / name, dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(ZOO / name)

    return load


@pytest.fixture
def llama(tiny_model):
    return tiny_model("llama", max_position_embeddings=256)


def random_prompts(count, *, shared=0, seed=0):
    """Prompts of 2 to 34 words after BOS and what they share."""
    source = random.Random(seed)
    words = lambda number: [source.randrange(4, 100) for _ in range(number)]  # noqa: E731
    prefix = [2, *words(shared)]
    return [prefix + words(source.choice([1, 2, 5, 12, 20, 33])) for _ in range(count)]


def reference(model, prompts, new=NEW):
    """What transformers generates for each prompt alone."""
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
        )
        outputs.append(output[0, len(prompt) :].tolist())
    return outputs


def generated(model, tokenizer, prompts, *, until=(), new=NEW, rows=4, budget=128):
    answers = dict(
        generate(model, tokenizer, prompts, until=until, max_new_tokens=new, max_rows=rows, token_budget=budget)
    )
    return [answers[index] for index in range(len(prompts))]


def texts(lm, prompts, until, new, *, rows=4, budget=512):
    """The texts that lm-eval makes of our tokens."""
    stops = handle_stop_sequences(list(until), eos=lm.tok_decode(lm.eot_token_id, skip_special_tokens=False))
    ids = [lm.tok_encode(prompt) for prompt in prompts]
    tokens = generated(lm.model, lm.tokenizer, ids, until=stops, new=new, rows=rows, budget=budget)
    return [postprocess_generated_text(lm.tok_decode(one), stops, None) for one in tokens]


def texts_of_lm_eval(lm, prompts, until, new):
    settings = {"until": list(until), "max_gen_toks": new, "do_sample": False}
    requests = [Instance("generate_until", {}, (prompt, settings), number) for number, prompt in enumerate(prompts)]
    return lm.generate_until(requests, disable_tqdm=True)


@pytest.mark.parametrize("kind", WINDOWED)
def test_rows_with_a_sliding_window_give_the_tokens_of_each_prompt_alone(tiny_model, tiny_tokenizer, kind):
    build = lambda window: tiny_model(  # noqa: E731
        kind, max_position_embeddings=256, sliding_window=window, **WINDOWED[kind]
    )
    model = build(8)
    prompts = random_prompts(6)
    expected = reference(model, prompts)
    assert expected != reference(build(200), prompts)  # so that a lost window would be noticed
    assert generated(model, tiny_tokenizer, prompts) == expected


@pytest.mark.parametrize("kind", ["gemma", "phi", "llama", "qwen3_moe", "olmoe", "phimoe", "deepseek_v3", "kimi_k25"])
def test_rows_without_a_window_give_the_tokens_of_each_prompt_alone(tiny_model, tiny_tokenizer, kind):
    model = tiny_model(kind, max_position_embeddings=256)
    prompts = random_prompts(5)
    assert generated(model, tiny_tokenizer, prompts) == reference(model, prompts)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("shared", [0, 40])
def test_neither_rows_nor_budget_change_the_tokens(tiny_model, tiny_tokenizer, monkeypatch, kind, shared):
    window = {"sliding_window": 8, **WINDOWED[kind]} if kind in WINDOWED else {}
    model = tiny_model(kind, max_position_embeddings=256, **window)
    monkeypatch.setattr(generation, "SPARE_COLUMNS", 3)  # so that the block is moved again and again
    prompts = random_prompts(9, shared=shared)
    expected = reference(model, prompts)
    for rows, budget in [(1, 1), (4, 100), (64, 4000)]:
        assert generated(model, tiny_tokenizer, prompts, rows=rows, budget=budget) == expected


def test_a_shared_prefix_changes_no_token_and_is_computed_once(llama, tiny_tokenizer, monkeypatch):
    prompts = [*random_prompts(10, shared=40), random_prompts(1, shared=40)[0][:41]]  # the last is hardly more
    computed = []
    llama.register_forward_pre_hook(
        lambda _, __, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    together = generated(llama, tiny_tokenizer, prompts, new=5, rows=1, budget=1)
    with_prefix = sum(computed)
    computed.clear()
    monkeypatch.setattr(generation, "SHORTEST_PREFIX", 10_000)
    assert generated(llama, tiny_tokenizer, prompts, new=5, rows=1, budget=1) == together
    assert sum(computed) - with_prefix == 40 * (len(prompts) - 1)


def test_identical_prompts_get_identical_tokens(llama, tiny_tokenizer):
    prompts = [random_prompts(1, shared=40)[0]] * 5
    assert generated(llama, tiny_tokenizer, prompts) == reference(llama, prompts)


def test_a_row_ends_with_any_eos_token_and_leaves(llama, tiny_tokenizer):
    prompts = random_prompts(8)
    free = reference(llama, prompts)
    llama.generation_config.eos_token_id = [free[0][3], free[1][0]]
    expected = reference(llama, prompts)
    assert len(expected[0]) <= 4
    assert len(expected[1]) == 1
    rows = []
    llama.register_forward_pre_hook(lambda _, __, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    assert generated(llama, tiny_tokenizer, prompts, rows=8) == expected
    assert sum(rows) == sum(map(len, expected))


def test_one_new_token(llama, tiny_tokenizer):
    prompts = random_prompts(6)
    assert generated(llama, tiny_tokenizer, prompts, new=1) == reference(llama, prompts, new=1)


def test_no_prompts_give_nothing(llama, tiny_tokenizer):
    assert generated(llama, tiny_tokenizer, []) == []


def test_a_stop_string_of_several_tokens_ends_the_row_at_its_last(llama, tiny_tokenizer):
    prompts = random_prompts(8)
    free = reference(llama, prompts)
    until = [tiny_tokenizer.decode(free[0][4:7]), tiny_tokenizer.decode(free[3][1:3])]
    answers = generated(llama, tiny_tokenizer, prompts, until=until)
    for answer, whole in zip(answers, free, strict=True):
        ends = [end for end in range(1, NEW + 1) if any(stop in tiny_tokenizer.decode(whole[:end]) for stop in until)]
        assert answer == whole[: min(ends, default=NEW)]
    assert len(answers[0]) <= 7
    assert len(answers[3]) <= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_are_those_of_lm_eval(zoo, family):
    model, tokenizer = zoo(family)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    prompts = ["Q: 3 + 4 =", "The capital of France is", "def add(a, b):\n", "Once", "Question: what is water? " * 4]
    for until in ([], ["\n"], ["the", ".\n", "return a"]):
        assert texts(lm, prompts, until, 16) == texts_of_lm_eval(lm, prompts, until, 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_models_give_the_tokens_of_each_prompt_alone(zoo, family):
    model, tokenizer = zoo(family)
    words = "Question: a train has 4 cars of 20 seats. How many seats are there? Answer: 80. ".split(" ")
    prompts = [tokenizer(" ".join((words * 6)[: 5 + 9 * number])).input_ids for number in range(5)]
    assert generated(model, tokenizer, prompts) == reference(model, prompts)


def test_a_state_of_another_kind_falls_back_to_padded_batches_and_says_so_once(tiny_tokenizer, caplog):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 100, "state_size": 8, "initializer_range": 0.2}
    model = MambaForCausalLM(MambaConfig(**sizes, pad_token_id=0, bos_token_id=2, eos_token_id=1)).eval()
    prompts = random_prompts(5)
    free = reference(model, prompts)
    until = [tiny_tokenizer.decode(free[0][2:4])]
    generation._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        answers = generated(model, tiny_tokenizer, prompts, rows=1, until=until)
        generated(model, tiny_tokenizer, prompts, rows=1, new=2)
    assert answers[0] == free[0][: len(answers[0])]
    assert until[0] in tiny_tokenizer.decode(answers[0])
    ours = [record.message for record in caplog.records if record.name == generation.__name__]
    assert ours == ["MambaForCausalLM generates in padded batches, which is slower: its forward takes no position_ids"]


def test_padded_batches_give_the_same_tokens(llama, tiny_tokenizer, monkeypatch):
    prompts = random_prompts(7)
    free = reference(llama, prompts)
    llama.generation_config.eos_token_id = free[1][5]
    until = [tiny_tokenizer.decode(free[0][4:6])]
    expected = generated(llama, tiny_tokenizer, prompts, until=until)
    monkeypatch.setattr(generation, "_needs_own_cache", lambda model, longest: "of a test")
    assert generated(llama, tiny_tokenizer, prompts, until=until, rows=3) == expected


def test_a_position_encoding_that_depends_on_the_longest_row_falls_back(tiny_model):
    model = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    assert generation._needs_own_cache(model, 64) is None
    assert "beyond 64 tokens" in generation._needs_own_cache(model, 65)


def test_the_exercise_gate_sees_a_pathway_in_prefill_and_in_decode(llama, tiny_tokenizer):
    sites = Registry.load().architectures["llama"].sites(llama)
    mask = remove_lowest({site.path: torch.arange(site.width).float() for site in sites}, 0.5)
    pathway = StaticPathway(sites, mask, "compact")
    exercise = Exercise(llama, pathway)
    prompts = random_prompts(5)
    with pathway.applied(), exercise.watching():
        answers = generated(llama, tiny_tokenizer, prompts, rows=8, budget=4000)
        assert answers == reference(llama, prompts)
    assert answers != reference(llama, prompts)
    gate = exercise.check(["prefill", "decode"])
    assert gate["phases"]["prefill"] == 1 + len(prompts)
    assert gate["phases"]["decode"] == (NEW - 1) * (1 + len(prompts))


def test_memory_that_runs_out_is_reported_and_what_has_ended_is_kept(llama, tiny_tokenizer):
    def run_out(_, __, kwargs):
        if len(answers) == 2:
            raise torch.OutOfMemoryError("no memory left")

    answers = {}
    handle = llama.register_forward_pre_hook(run_out, with_kwargs=True)
    prompts = random_prompts(6)
    settings = {"until": [], "max_new_tokens": 4, "token_budget": 100}
    with pytest.raises(torch.OutOfMemoryError):
        answers.update(generate(llama, tiny_tokenizer, prompts, max_rows=2, **settings))
    handle.remove()
    left = [index for index in range(6) if index not in answers]
    assert len(left) == 4
    rest = generate(llama, tiny_tokenizer, [prompts[index] for index in left], max_rows=1, **settings)
    answers |= {left[index]: tokens for index, tokens in rest}
    assert [answers[index] for index in range(6)] == reference(llama, prompts, new=4)


def test_inference_mode_does_not_leak_between_answers(llama, tiny_tokenizer):
    for _ in generate(
        llama, tiny_tokenizer, random_prompts(3), until=[], max_new_tokens=2, max_rows=1, token_budget=64
    ):
        assert not torch.is_inference_mode_enabled()


def test_greedy_settings_are_taken_and_others_named(llama):
    assert why_not(llama, {"do_sample": False, "temperature": 0.0}) is None
    assert why_not(llama, {"do_sample": False, "top_p": 0.9, "num_beams": 1, "repetition_penalty": 1.0}) is None
    assert why_not(llama, {"do_sample": True, "temperature": 0.7}) == "the task samples"
    assert why_not(llama, {"num_beams": 4}) == "the task sets num_beams=4"
    assert why_not(llama, {"max_length": 99}) == "the task sets max_length=99"
    assert why_not(llama, {"eos_token_id": 7}) == "the task sets eos_token_id=7"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 1.1),
        ("suppress_tokens", [5]),
        ("begin_suppress_tokens", [5]),
        ("forced_eos_token_id", 1),
        ("min_length", 3),
        ("min_new_tokens", 3),
        ("bad_words_ids", [[5]]),
        ("no_repeat_ngram_size", 2),
        ("max_new_tokens", 7),
        ("stop_strings", ["w5"]),
        ("prompt_lookup_num_tokens", 3),
    ],
)
def test_a_generation_configuration_that_changes_greedy_decoding_is_named(llama, name, value):
    setattr(llama.generation_config, name, value)
    assert why_not(llama, {}) == f"the model's generation configuration sets {name}={value!r}"


def test_a_generation_configuration_that_only_samples_is_taken(llama):
    llama.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[1, 5])
    assert why_not(llama, {"do_sample": False}) is None


def test_every_setting_of_transformers_is_known_or_refused():
    """A setting that transformers has removed from its own code would make the lists above lie."""
    from transformers import GenerationConfig

    known = set(GenerationConfig().to_dict()) | {"_from_model_config"}
    assert set(generation.NEUTRAL) | generation.IRRELEVANT | generation.SAMPLING <= known
