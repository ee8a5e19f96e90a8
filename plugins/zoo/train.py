"""Trains the checkpoints that `--arch NAME` uses without `--model`: `python -m spath_eval.plugins.zoo.train NAME`.

One tokenizer is shared by all families. A model learns from the split `train` of the four built-in domains: rows of
packed documents, in each batch a fixed number of every domain, answers weighing more than the rest; AdamW, a cosine
schedule, float32. It is saved in bfloat16, with a model card that says how it was made and how it scores.
"""

from __future__ import annotations

import argparse
import importlib
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from spath_eval.plugins.domains._corpus import Corpus

ZOO = Path(__file__).resolve().parent
TOKENIZER = ZOO / "tokenizer"
VOCABULARY = 2048
DOMAINS = {"math": 3, "code": 3, "factual": 1, "language": 1}
"""Rows of each domain in a batch: more of what takes longer to learn."""
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
"""What the families have in common."""
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma": {
        "model_type": "gemma3_text",
        **SHAPE,
        "initializer_range": 0.08,
        "query_pre_attn_scalar": 32,
        "sliding_window": 64,
        "sliding_window_pattern": 3,
    },
    "phi": {
        "model_type": "phi",
        **SHAPE,
        "intermediate_size": 768,
        "num_key_value_heads": 4,
        "initializer_range": 0.08,
        "partial_rotary_factor": 0.5,
        "resid_pdrop": 0.0,
    },
    "qwen": {"model_type": "qwen3", **SHAPE, "initializer_range": 0.08},
    "llama": {"model_type": "llama", **SHAPE, "initializer_range": 0.08},
    "moe": {
        "model_type": "mixtral",
        **SHAPE,
        "num_hidden_layers": 5,
        "intermediate_size": 96,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "initializer_range": 0.08,
    },
}
"""Keyword arguments of `transformers.AutoConfig.for_model`."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    steps: int = 5000
    row: int = 128
    """Tokens in a row."""
    learning_rate: float = 3e-3
    warmup: int = 200
    """Steps in which the learning rate rises to its highest; it then falls to a tenth along a cosine."""
    weight_decay: float = 0.1
    other_weight: float = 0.2
    """Weight in the loss of tokens outside answers, many of which are drawn at random and cannot be learned."""
    seed: int = 0
    save_every: int = 500

    def rate(self, step: int) -> float:
        """The learning rate at a step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def corpora() -> dict[str, Corpus]:
    """The texts and items of the four built-in domains."""
    return {name: importlib.import_module(f"spath_eval.plugins.domains.{name}").CORPUS for name in DOMAINS}


def train_tokenizer(folder: Path = TOKENIZER) -> PreTrainedTokenizerBase:
    """Train the shared tokenizer, byte-level BPE with single digits, and save it.

    It puts `<bos>` in front of what it encodes, as Gemma's does.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(" ?[0-9]"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for corpus in corpora().values() for text in corpus.texts("train")[:10_000]]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=SHAPE["max_position_embeddings"],
    )
    fast.save_pretrained(folder)
    return fast


@dataclass(frozen=True)
class Rows:
    """Documents one after another, each from `<bos>` to `<eos>`, cut into rows."""

    tokens: torch.Tensor
    """`[rows, tokens]`."""
    answers: torch.Tensor
    """1 where a token is part of an answer, else 0; `[rows, tokens]`."""

    def __getitem__(self, places: Any) -> Rows:
        return Rows(self.tokens[places], self.answers[places])


def packed(documents: list[str], tokenizer: PreTrainedTokenizerBase, row: int) -> Rows:
    """Rows of `row` tokens from marked documents (`Corpus.marked`)."""
    import torch

    from spath_eval.plugins.domains._corpus import END, START, plain

    encoded = tokenizer([plain(document) for document in documents], return_offsets_mapping=True)
    tokens: list[int] = []
    answers: list[int] = []
    for document, ids, offsets in zip(documents, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        inside: list[int] = []
        for stretch in document.split(START):
            answer, _, other = stretch.rpartition(END)
            inside += [1] * len(answer) + [0] * len(other)
        tokens += (*ids, tokenizer.eos_token_id)
        answers += (*(inside[start] for start, _ in offsets), 0)
    whole = len(tokens) // row * row
    return Rows(torch.tensor(tokens[:whole]).view(-1, row), torch.tensor(answers[:whole]).view(-1, row))


def batches(rows: Mapping[str, Rows], recipe: Recipe, start: int) -> Iterator[Rows]:
    """Batches from step `start` to the last; each pass over a domain's rows has an order of its own."""
    import torch

    orders: dict[tuple[str, int], torch.Tensor] = {}
    for step in range(start, recipe.steps):
        picked = []
        for name, table in rows.items():
            rows_per_step = DOMAINS[name]
            epoch, position = divmod(step, len(table.tokens) // rows_per_step)
            if (name, epoch) not in orders:
                generator = torch.Generator().manual_seed(recipe.seed + epoch)
                orders[name, epoch] = torch.randperm(len(table.tokens), generator=generator)
            picked.append(table[orders[name, epoch][position * rows_per_step : (position + 1) * rows_per_step]])
        yield Rows(torch.cat([part.tokens for part in picked]), torch.cat([part.answers for part in picked]))


def loss_of(model: PreTrainedModel, batch: Rows, other_weight: float) -> torch.Tensor:
    """Weighted mean next-token cross entropy in nats: tokens of answers weigh 1, the others `other_weight`."""
    import torch

    logits = model(input_ids=batch.tokens[:, :-1], use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
    weights = (batch.answers + (1 - batch.answers) * other_weight)[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def heldout_losses(model: PreTrainedModel, rows: Mapping[str, Rows]) -> dict[str, float]:
    """The loss on the answers in each domain's held-out texts."""
    import torch

    model.eval()
    with torch.inference_mode():
        losses = {name: round(float(loss_of(model, table[:64], 0.0)), 4) for name, table in rows.items()}
    model.train()
    return losses


@dataclass(frozen=True)
class Trained:
    """What a model card says about the data."""

    tokens: Mapping[str, int]
    """Tokens there are to learn from, per domain."""
    losses: Mapping[str, float]
    """Loss on the answers in held-out texts, per domain."""


def initial(family: str) -> PreTrainedModel:
    """A family's model before training, in float32.

    The outputs that blocks add to the residual stream are made small, so that all together start about as large as the
    embeddings: at their usual size they drown out the tokens, and learning starts late. Gemma normalises each output,
    and there the norm's weight decides; elsewhere the last projection's weights do.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**FAMILIES[family])).float().train()
    gemma = model.config.model_type.startswith("gemma")
    size = (2 * model.config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if gemma and name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
                weight.fill_(size - 1)
            elif not gemma and name.endswith(
                ("o_proj.weight", "dense.weight", "down_proj.weight", "fc2.weight", "down_proj")
            ):
                weight.mul_(size)
    return model


def train(family: str, recipe: Recipe, out: Path, work: Path, *, resume: bool) -> Trained:
    """Train a family's model and save it to `out`; its state is kept in `work`, and `resume` goes on from there."""
    import torch
    from tqdm import tqdm
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER) if TOKENIZER.exists() else train_tokenizer()
    texts = corpora()
    rows = {name: packed(corpus.marked("train"), tokenizer, recipe.row) for name, corpus in texts.items()}
    heldout = {name: packed(corpus.marked("heldout"), tokenizer, recipe.row) for name, corpus in texts.items()}

    torch.manual_seed(recipe.seed)
    model = initial(family)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=recipe.weight_decay)
    state = work / "state.pt"
    start = 0
    if resume and state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]

    progress = tqdm(batches(rows, recipe, start), initial=start, total=recipe.steps, unit="step", desc=family)
    for step, batch in enumerate(progress, start):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        loss = loss_of(model, batch, recipe.other_weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            progress.write(f"step {step + 1}: held-out loss {heldout_losses(model, heldout)}", file=sys.stderr)
            _save_state(state, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
            export(model, tokenizer, out)
    return Trained({name: table.tokens.numel() for name, table in rows.items()}, heldout_losses(model, heldout))


def _save_state(path: Path, state: dict[str, Any]) -> None:
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write a checkpoint in bfloat16 to `out`, each file replaced in one move."""
    import copy

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        copy.deepcopy(model).bfloat16().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for file in Path(folder).iterdir():
            file.chmod(0o644)
            os.replace(file, out / file.name)


def scores(folder: Path) -> dict[str, tuple[str, int, float]]:
    """The checkpoint's score in each task of the built-in domains, by plain lm-eval: metric, documents, value."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from spath_eval.tasks import FOLDER

    model = HFLM(pretrained=str(folder), tokenizer=str(folder), device="cpu", dtype="float32", batch_size=64)
    tasks = [f"spath_{name}_{form}" for name in DOMAINS for form in ("choice", "generate")]
    manager = TaskManager(include_path=str(FOLDER), include_defaults=False)
    found = lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    table = {}
    for task in tasks:
        metric = "acc,none" if task.endswith("choice") else "exact_match,answer"
        table[task] = (metric.split(",")[0], found["n-samples"][task]["effective"], found["results"][task][metric])
    return table


CARD = """---
license: apache-2.0
language: en
tags: [spath-eval]
---

# A small {family} for trying out sparse pathways

`{model_type}` with {parameters:,} parameters, {ffn_share:.0%} of them in FFNs: {layers} layers, hidden size {hidden},
{width} neurons per FFN. It knows four small domains and nothing else; it is made to be measured, not to be used.

- Made by `python -m spath_eval.plugins.zoo.train {family} --steps {steps}`, seed {seed}.
- Data: split `train` of spath-eval's domains, made by generators and from hand-written tables.
  Tokens: {tokens}.
  Their splits `profile` and `heldout` and their evaluation items were not seen.
- Training: {steps} steps of {batch:,} tokens, {seen:,} in all ({rows}).
  AdamW, learning rate {rate} at its highest, cosine schedule, float32; tokens outside answers weigh {other_weight}.
  Saved in bfloat16.
- Loss on the answers in held-out texts, in nats per token: {losses}.

| task | metric | items | chance | score |
|---|---|---|---|---|
{table}

Scores are of the saved weights, loaded in float32, by lm-eval's `hf` model without few-shot examples.
"""


def write_card(family: str, recipe: Recipe, out: Path, trained: Trained) -> None:
    """Score the checkpoint in `out` and write its model card."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out)
    parameters = sum(p.numel() for p in model.parameters())
    ffn = sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name)
    lines = []
    for task, (metric, items, value) in scores(out).items():
        chance = "0.250" if task.endswith("choice") else "0"
        lines.append(f"| {task} | {metric} | {items} | {chance} | {value:.3f} |")
    batch = recipe.row * sum(DOMAINS.values())
    card = CARD.format(
        family=family,
        model_type=model.config.model_type,
        parameters=parameters,
        ffn_share=ffn / parameters,
        layers=model.config.num_hidden_layers,
        hidden=model.config.hidden_size,
        width=model.config.intermediate_size,
        steps=recipe.steps,
        seed=recipe.seed,
        batch=batch,
        rows=", ".join(f"{name} {share / sum(DOMAINS.values()):.0%}" for name, share in DOMAINS.items()),
        other_weight=recipe.other_weight,
        seen=batch * recipe.steps,
        rate=recipe.learning_rate,
        tokens=", ".join(f"{name} {count:,}" for name, count in trained.tokens.items()),
        losses=", ".join(f"{name} {loss:.3f}" for name, loss in trained.losses.items()),
        table="\n".join(lines),
    )
    (out / "README.md").write_text(card)
    print(card)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train one of the zoo's checkpoints.")
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--resume", action="store_true", help="go on from the last saved step")
    parser.add_argument("--out", type=Path, help="folder of the checkpoint; default: the family's in the package")
    parser.add_argument("--work", type=Path, help="folder of the training state; default: results/runs/zoo/FAMILY")
    options = parser.parse_args()
    recipe = Recipe(steps=options.steps, seed=options.seed)
    out = options.out or ZOO / options.family
    work = options.work or Path("results/runs/zoo") / options.family
    write_card(options.family, recipe, out, train(options.family, recipe, out, work, resume=options.resume))


if __name__ == "__main__":
    main()
