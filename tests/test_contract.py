"""The strategy contract: one toy of each kind, from a plugin, through the whole command line."""

from __future__ import annotations

import dataclasses
import math
import sys

import pytest
import torch

TOYS = """
from dataclasses import dataclass
from typing import ClassVar

from spath_eval import Strategy, hookimpl

SEEN = []


def lowest(context, scores):
    from spath_eval import remove_lowest

    SEEN.append(context)
    return remove_lowest(scores, context.budget.sparsity)


@dataclass(frozen=True)
class Quiet(Strategy):
    name: ClassVar[str] = "quiet"
    requires: ClassVar[tuple[str, ...]] = ("mean_square",)

    def select(self, context):
        return lowest(context, context.profile.statistic("mean_square", context.domain))


@dataclass(frozen=True)
class Special(Strategy):
    name: ClassVar[str] = "special"
    requires: ClassVar[tuple[str, ...]] = ("mean_abs", "mean_square")
    all_domains: ClassVar[bool] = True
    needs_batches: ClassVar[bool] = True

    def select(self, context):
        import torch

        parts = [context.profile.statistic("mean_abs", domain) for domain in context.profile.domains]
        own = context.profile.statistic("mean_abs", context.domain)
        return lowest(context, {path: own[path] / torch.stack([part[path] for part in parts]).mean(0) for path in own})


@dataclass(frozen=True)
class Blind(Strategy):
    name: ClassVar[str] = "blind"

    def select(self, context):
        return lowest(context, {path: site.up.norm(dim=1) for path, site in context.sites.items()})


@dataclass(frozen=True)
class ByPrompt(Strategy):
    name: ClassVar[str] = "by-prompt"
    kind: ClassVar[str] = "prompt"

    def select_prompt(self, context, activations):
        return lowest(context, {path: values.abs().mean(0) for path, values in activations.items()})


@dataclass(frozen=True)
class ByToken(Strategy):
    name: ClassVar[str] = "by-token"
    kind: ClassVar[str] = "token"
    by: str = "product"

    def keep(self, context, site, gate, product):
        import torch

        SEEN.append((context, site.path, gate.shape, product.shape))
        values = (product if self.by == "product" else gate).abs()
        kept = values.topk(round((1 - context.budget.sparsity) * site.width)).indices
        return torch.zeros_like(values, dtype=torch.bool).scatter_(1, kept, True)


@dataclass(frozen=True)
class Careless(ByToken):
    name: ClassVar[str] = "careless"

    def keep(self, context, site, gate, product):
        return super().keep(context, site, gate, product)[:, :-1]


@hookimpl
def spath_register_strategies(register):
    for strategy in (Quiet, Special, Blind, ByPrompt, ByToken, Careless):
        register(strategy)
"""

DOMAINS = ["code", "factual", "language", "math"]
SITES = ["model.layers.0.mlp", "model.layers.1.mlp"]


@pytest.fixture
def seen(distribute):
    """What the toy strategies were handed."""
    distribute("toys", {"toys": "toys"}, {"toys": TOYS})

    class Lazily:
        def __iter__(self):
            return iter(sys.modules["toys"].SEEN)

    return Lazily()


def only_case(outcome):
    assert outcome.status == 0, outcome.err
    (case,) = outcome.record["cases"]
    assert case["outcome"] == "passed"
    assert case["strategy"]["plugin"] == "toys"
    assert {"name": "toys", "distribution": "toys", "version": "1.0"} in outcome.record["plugins"]
    exercised = case["gates"]["exercised"]
    assert exercised["ok"]
    assert exercised["keep_all_difference"] == 0 < exercised["drop_all_difference"]
    assert set(exercised["phases"]) == {"scoring", "prefill", "decode"}
    assert exercised["sites"] == 2
    return case


def test_a_static_strategy_gets_the_statistic_it_requires(run, seen):
    outcome = run("--strategy", "quiet", "--sparsity", "0.25", "--no-controls")
    case = only_case(outcome)
    assert case["id"] == "tiny/math/quiet@0.25"
    assert case["execution"] == "compact"
    assert case["sparsity"]["achieved"] == 0.25
    context, *halves = seen
    assert [half.profile.domains["math"].tokens < 600 for half in halves] == [True, True]
    assert list(context.profile.domains) == ["math"]
    assert list(context.profile.domains["math"].statistics) == ["mean_square"]
    assert list(context.sites) == SITES
    assert context.batches == ()
    assert case["profile"] == context.profile.fingerprint == outcome.record["profiles"][0]["fingerprint"]


def test_a_strategy_that_compares_domains_gets_all_of_them_and_batches(run, seen, short_text):
    texts = [f"--profile-text={domain}={short_text}" for domain in DOMAINS]
    outcome = run("--strategy", "special", "--no-controls", *texts)
    only_case(outcome)
    (context,) = seen
    assert sorted(context.profile.domains) == DOMAINS
    assert context.domain == "math"
    for part in context.profile.domains.values():
        assert part.tokens == 600
        assert sorted(part.statistics) == ["mean_abs", "mean_square"]
    assert sorted(outcome.record["profiles"][0]["domains"]) == DOMAINS
    tokens = 0
    for batch in context.batches:
        assert sorted(batch) == ["attention_mask", "input_ids"]
        assert batch["input_ids"].shape == batch["attention_mask"].shape
        assert len(batch["input_ids"]) <= 8
        tokens += int(batch["attention_mask"].sum()) - len(batch["input_ids"])  # less the BOS of each row
        assert torch.isfinite(context.model(**batch).logits).all()
    assert tokens == 600


def test_text_of_every_domain_that_is_profiled_is_kept_from_the_evaluation(run, seen, short_text, tmp_path):
    from spath_eval.plugins.domains.math import CORPUS

    item = CORPUS.items("choice")[0]
    leaky = tmp_path / "leaky.txt"
    leaky.write_text("\n\n".join(f"Number {n}.\n{item.prompt} {item.answer}" for n in range(20)), encoding="utf-8")
    texts = [f"--profile-text={domain}={short_text}" for domain in DOMAINS]
    outcome = run("--strategy", "special,quiet", "--no-controls", *texts, "--profile-text", f"code={leaky}")
    assert outcome.status == 1
    assert [case["outcome"] for case in outcome.record["cases"]] == ["failed", "passed"]
    assert "25.0% of spath_math_choice" in outcome.record["cases"][0]["message"]


def test_a_strategy_that_requires_nothing_gets_no_profile(run, seen):
    outcome = run("--strategy", "blind", "--no-controls")
    case = only_case(outcome)
    (context,) = seen
    assert context.profile is None
    assert outcome.record["profiles"] == []
    assert "profile" not in case


def test_a_context_and_a_strategy_are_frozen(run, seen):
    run("--strategy", "blind", "--no-controls")
    (context,) = seen
    for frozen, name in ((context, "domain"), (context, "profile"), (context.budget, "sparsity")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(frozen, name, None)
    strategy = sys.modules["toys"].ByToken()
    with pytest.raises(dataclasses.FrozenInstanceError):
        strategy.by = "gate"


def test_a_prompt_strategy_has_a_mask_for_each_prompt(run, seen):
    outcome = run("--strategy", "by-prompt", "--sparsity", "0.5", "--no-controls")
    case = only_case(outcome)
    assert case["id"] == "tiny/math/by-prompt@0.5[masked]"
    assert case["sparsity"]["achieved"] == 0.5
    assert case["sparsity"]["ffn_weights_removed"] == case["sparsity"]["model_weights_removed"] == 0
    assert case["mask"] is None
    assert case["mask_reason"]
    assert case["preservation"] is None
    assert case["preservation_reason"]
    # 4 documents of 4 choices whose answers have more than one token, and 4 that are generated
    assert len(list(seen)) > 4
    assert {context.profile for context in seen} == {None}


def test_a_prompt_itself_runs_dense(run, seen, monkeypatch):
    """With a continuation of one token, all that is scored is the prompt's own last logits."""
    from spath_eval.quality.adapter import PathwayLM

    after = PathwayLM._after_prompt
    scores = []

    def spy(self, context, continuation):
        masked = after(self, context, continuation[:1])
        pathway = self.prompt_pathway
        pathway.begin()
        with torch.inference_mode():
            logits = self.model(torch.tensor([context])).logits[0, -1].log_softmax(-1)
        scores.append((masked[0], float(logits[continuation[0]])))
        return after(self, context, continuation)

    monkeypatch.setattr(PathwayLM, "_after_prompt", spy)
    run("--strategy", "by-prompt", "--sparsity", "0.5", "--no-controls")
    assert len(scores) == 16
    for masked, dense in scores:
        assert masked == pytest.approx(dense, abs=1e-5)


@pytest.mark.parametrize("option", ["", ":by=gate"])
def test_a_token_strategy_has_a_mask_for_each_token(run, seen, option):
    outcome = run("--strategy", f"by-token{option}", "--sparsity", "0.75", "--no-controls")
    case = only_case(outcome)
    assert case["id"] == f"tiny/math/by-token{option}@0.75[masked]"
    assert case["sparsity"]["achieved"] == 0.75
    assert case["preservation"]["kl"] > 0
    assert {path for _, path, _, _ in seen} == set(SITES)
    for _, _, gate, product in seen:
        assert gate == product
        assert product[1] == 64


def test_neither_prompt_nor_token_strategies_have_a_speed(
    spath_eval_command, work_folder, tiny_checkpoint, brief, seen
):
    options = [option for option in brief if option != "--no-speed"]
    outcome = spath_eval_command(
        "run", "--model", tiny_checkpoint, *options, "--strategy", "by-prompt,by-token", "--no-controls"
    )
    assert outcome.status == 0
    for case in outcome.record["cases"]:
        assert case["speed"] == []
        assert case["speed_reason"].startswith("not measured")


def test_the_control_beside_a_token_strategy_is_compact(run, seen):
    record = run("--strategy", "by-token").record
    assert [case["id"] for case in record["cases"]] == [
        "tiny/math/by-token@0.15[masked]",
        "tiny/math/random@0.15",
    ]


def test_a_strategy_that_breaks_the_contract_is_an_error_of_its_case(run, seen):
    outcome = run("--strategy", "careless")
    assert outcome.status == 1
    assert [case["outcome"] for case in outcome.record["cases"]] == ["error", "passed"]


# Domains of others


PERPLEXITY = """
task: toy_perplexity
custom_dataset: !function toy_rows.rows
output_type: loglikelihood
test_split: test
num_fewshot: 0
doc_to_text: prompt
doc_to_target: answer
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
"""

DOMAIN = """
from pathlib import Path

from spath_eval import Domain, hookimpl


def texts(split):
    return [f"the {split} text number {n}" for n in range(40 if split == "profile" else 0)]


@hookimpl
def spath_register_domains(register):
    register(Domain("toy", texts, ("toy_perplexity",), (Path(__file__).parent / "toy_tasks",), "made up", "CC0-1.0"))
"""


def test_a_domain_without_held_out_text_whose_metric_is_no_mean_is_evaluated(run, distribute, tmp_path):
    folder = tmp_path / "toy_tasks"
    folder.mkdir()
    (folder / "perplexity.yaml").write_text(PERPLEXITY, encoding="utf-8")
    rows = [{"prompt": f"Case {n}:", "answer": " yes"} for n in range(5)]
    (folder / "toy_rows.py").write_text(
        f"import datasets\n\ndef rows(**_):\n    return {{'test': datasets.Dataset.from_list({rows!r})}}\n",
        encoding="utf-8",
    )
    distribute("toy", {"toy": "toy_domain"}, {"toy_domain": DOMAIN})
    outcome = run("--domain", "toy", "--sparsity", "0.5")
    assert outcome.status == 0, outcome.err
    for case in outcome.record["cases"]:
        (entry,) = case["quality"]
        assert (entry["metric"], entry["higher_is_better"], entry["chance"]) == ("perplexity", False, None)
        change = math.log(entry["sparse"]["value"] / entry["dense"]["value"])
        assert entry["difference"]["value"] == pytest.approx(change)
        low, high = entry["difference"]["ci95"]
        assert low <= change <= high
        assert entry["retention"]["value"] is None
        assert entry["retention"]["reason"] == "perplexity has no chance level"
        assert case["preservation"] is None
        assert "held" in case["preservation_reason"]
    assert outcome.record["profiles"][0]["texts"] == {"toy": "made up"}


# Options of others


def test_an_option_of_a_plugin_is_one_of_run_and_reaches_its_hooks(run, sample_plugin):
    whole = run("--sparsity", "0.1,0.3", "--collect-only").out.splitlines()
    assert len(whole) == 4
    assert run("--sparsity", "0.1,0.3", "--collect-only", "--first", "3").out.splitlines() == whole[:3]
    record = run("--no-quality", "--first", "1").record
    assert [case["id"] for case in record["cases"]] == ["tiny/math/negative@0.15"]
    assert record["command"]["resolved"]["plugin"]["first"] == 1


def test_an_option_of_a_plugin_is_checked_and_in_the_help(run, spath_eval_command, sample_plugin):
    refused = run("--first", "0")
    assert refused.status == 4
    assert "'--first'" in refused.err
    assert "--first" in spath_eval_command("run", "--help").out
    assert "--first" not in spath_eval_command("run", "-p", "no:sample", "--help").out
