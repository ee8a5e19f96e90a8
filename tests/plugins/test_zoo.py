"""The zoo: checkpoints that are small, load like any other, know their domains, and can be trained again."""

from __future__ import annotations

import pytest
import torch

from spath_eval.plugins.domains import _corpus
from spath_eval.plugins.zoo import train as zoo

LIMIT = 5 * 1024**2
ITEMS = 80


@pytest.fixture(params=sorted(zoo.FAMILIES), scope="module")
def folder(request):
    return zoo.ZOO / request.param


def test_checkpoint_is_at_most_five_megabytes_and_has_a_card(folder):
    assert sum(file.stat().st_size for file in folder.iterdir()) <= LIMIT
    assert f"spath_eval.plugins.zoo.train {folder.name}" in (folder / "README.md").read_text()


def test_checkpoint_loads_with_the_auto_classes(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == zoo.FAMILIES[folder.name]["model_type"]
    assert model.dtype == torch.bfloat16
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer("The capital of France")["input_ids"][0] == model.config.bos_token_id
    text = "def f(x):\n    return x  # 10, don't"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_all_checkpoints_share_one_tokenizer(folder):
    assert (folder / "tokenizer.json").read_bytes() == (zoo.TOKENIZER / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", zoo.DOMAINS)
def test_checkpoint_is_well_above_chance_in_every_domain(folder, name):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from spath_eval.tasks import FOLDER

    model = HFLM(pretrained=str(folder), tokenizer=str(folder), device="cpu", dtype="float32", batch_size=64)
    task = f"spath_{name}_choice"
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    found = lm_eval.simple_evaluate(model=model, tasks=[task], task_manager=manager, limit=ITEMS, bootstrap_iters=0)
    assert found["results"][task]["acc,none"] >= 0.5


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(_corpus, "DOCUMENTS", dict.fromkeys(_corpus.SPLITS, 100))
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 4}
    monkeypatch.setitem(zoo.FAMILIES, "gemma", zoo.FAMILIES["gemma"] | shape)
    return zoo.Recipe(steps=4, row=32, warmup=2, save_every=2)


def test_training_again_or_in_two_halves_gives_the_same_weights(small, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    for name in ("once", "again"):
        zoo.train("gemma", small, tmp_path / name, tmp_path / f"{name} work", resume=False)

    save = zoo._save_state

    def interrupt(path, state):
        save(path, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(zoo, "_save_state", interrupt)
        with pytest.raises(KeyboardInterrupt):
            zoo.train("gemma", small, tmp_path / "halves", tmp_path / "halves work", resume=False)
    zoo.train("gemma", small, tmp_path / "halves", tmp_path / "halves work", resume=True)

    once = load_file(tmp_path / "once" / "model.safetensors")
    for name in ("again", "halves"):
        other = load_file(tmp_path / name / "model.safetensors")
        assert once.keys() == other.keys()
        assert all(torch.equal(once[key], other[key]) for key in once)


def _rows(tokens):
    return zoo.Rows(tokens, torch.zeros_like(tokens))


def test_every_batch_has_its_share_of_each_domain_and_a_pass_uses_each_row_once(small):
    math, language = zoo.DOMAINS["math"], zoo.DOMAINS["language"]
    rows = {
        "math": _rows(torch.arange(4 * math).view(-1, 1)),
        "language": _rows(100 + torch.arange(4 * language).view(-1, 1)),
    }
    seen = [batch.tokens.flatten() for batch in zoo.batches(rows, small, 0)]
    assert [(batch >= 100).tolist() for batch in seen] == [[False] * math + [True] * language] * 4
    assert sorted(torch.cat(seen).tolist()) == [*range(4 * math), *range(100, 100 + 4 * language)]
    again = [batch.tokens.flatten() for batch in zoo.batches(rows, small, 2)]
    assert all(torch.equal(one, other) for one, other in zip(again, seen[2:], strict=True))


def test_answers_are_marked_token_by_token():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(zoo.TOKENIZER)
    start, end = _corpus.START, _corpus.END
    rows = zoo.packed([f"2 + 11 ={start} 13 coins.{end}\nHalf of 8 is{start} 4{end}", "No answer"], tokenizer, 4)
    tokens, answers = rows.tokens.flatten(), rows.answers.flatten().bool()
    assert tokenizer.decode(tokens[answers]) == " 13 coins. 4"
    assert tokenizer.decode(tokens[~answers]).startswith("<bos>2 + 11 =\nHalf of 8 is<eos><bos>No")


def test_loss_is_the_mean_over_answers_where_nothing_else_weighs(small):
    model = zoo.initial("gemma")
    tokens = torch.randint(3, zoo.VOCABULARY, (2, 9))
    answers = torch.randint(0, 2, (2, 9))
    logits = model(input_ids=tokens).logits.double().log_softmax(-1)
    losses = {
        place: -logits[row, column - 1, tokens[row, column]].item()
        for row in range(2)
        for column in range(1, 9)
        for place in [(row, column)]
    }
    picked = [loss for place, loss in losses.items() if answers[place]]
    batch = zoo.Rows(tokens, answers)
    assert zoo.loss_of(model, batch, 0.0).item() == pytest.approx(sum(picked) / len(picked), rel=1e-5)
    assert zoo.loss_of(model, batch, 1.0).item() == pytest.approx(sum(losses.values()) / len(losses), rel=1e-5)


def test_learning_rate_rises_then_falls_to_a_tenth():
    recipe = zoo.Recipe(steps=1000, warmup=100, learning_rate=1e-2)
    rates = [recipe.rate(step) for step in range(1001)]
    assert (rates[0], max(rates), rates[-1]) == pytest.approx((1e-4, 1e-2, 1e-3))
    assert rates[100:] == sorted(rates[100:], reverse=True)
