"""The scorer against lm-eval's `hf` on a CUDA device, in bfloat16: what they answer, and in how much time."""

import time

import pytest
import torch

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
SHAPES = {
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "Llama-3.2-1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
"""Published shapes, for random weights."""


@pytest.fixture(scope="module", params=["the small llama", *SHAPES])
def named_model(request):
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from spath_eval.registry import Registry

    folder = Registry.load().architecture("llama").checkpoint
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if request.param in SHAPES:
        torch.manual_seed(0)
        config = LlamaConfig(**SHAPES[request.param], tie_word_embeddings=True, max_position_embeddings=2048)
        model = LlamaForCausalLM(config).to(DEVICE, torch.bfloat16)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE)
    return request.param, model.eval(), tokenizer


@pytest.fixture(scope="module")
def requests():
    """By benchmark: questions with their choices, the same behind five examples, and questions to be continued."""
    from types import SimpleNamespace

    from spath_eval.plugins.domains.factual import CORPUS

    def asked(*arguments):
        return SimpleNamespace(args=arguments, task_name="own")

    items = CORPUS.items("choice")
    examples = "".join(f"{item.prompt} {item.answer}\n" for item in items[:5])
    choices = {
        name: [asked(prefix + item.prompt, f" {choice}") for item in items[5:] for choice in item.choices]
        for name, prefix in (("choice", ""), ("choice, 5 examples", examples))
    }
    settings = {"until": ["\n"], "do_sample": False, "max_gen_toks": 32}
    return choices | {"generate": [asked(item.prompt, settings) for item in CORPUS.items("generate")]}


@pytest.mark.parametrize("benchmark", ["choice", "choice, 5 examples", "generate"])
def test_answers_are_those_of_lm_eval(named_model, requests, benchmark, capsys):
    from lm_eval.models.huggingface import HFLM

    from spath_eval import SpathLM

    name, model, tokenizer = named_model
    method = "generate_until" if benchmark == "generate" else "loglikelihood"
    answers, seconds = {}, {}
    for arm in (HFLM, SpathLM) * 2:  # the first round warms up
        lm = arm(model, tokenizer=tokenizer, batch_size=64, softmax_dtype=torch.float32)
        torch.cuda.synchronize()
        started = time.perf_counter()
        answers[arm] = getattr(lm, method)(requests[benchmark], disable_tqdm=True)
        seconds[arm] = time.perf_counter() - started
    pairs = list(zip(answers[HFLM], answers[SpathLM], strict=True))
    if benchmark == "generate":
        difference = f"{sum(one != other for one, other in pairs)} of {len(pairs)} texts differ"
    else:
        largest = max(abs(one[0] - other[0]) for one, other in pairs)
        difference = f"largest difference {largest:.2g}"
        # bfloat16 has 8 bits: sums of a few log-likelihoods near the vocabulary's logarithm
        assert all(abs(one[0] - other[0]) <= 0.05 * (1 + abs(one[0])) for one, other in pairs)
    with capsys.disabled():
        ratio = seconds[HFLM] / seconds[SpathLM]
        print(
            f"\n{torch.cuda.get_device_name()}, bfloat16, {name}, {benchmark}: hf {seconds[HFLM]:.2f} s, "
            f"spath {seconds[SpathLM]:.2f} s, ratio {ratio:.1f}, {difference}"
        )
