"""The protocol of a run: what it computes once, what it leaves as it was, and the faults that it must not survive."""

from __future__ import annotations

import gc
import math
import weakref
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch

import spath_eval
from spath_eval import UsageError, records, session
from spath_eval.sites import GatedSite, Site
from spath_eval.speed import measurement
from spath_eval.speed.timing import Stop, Workload

FAULTY = "model.layers.1.mlp"


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of a function of the session module: `calls("evaluate")` is the list of their arguments."""

    def count(name, module=session):
        made = []
        original = getattr(module, name)

        def spy(*args, **kwargs):
            made.append(args)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, spy)
        return made

    return count


@pytest.fixture
def models(monkeypatch):
    """The models that are loaded, with clones of their parameters from then."""
    import spath_eval.models

    loaded = []
    load = spath_eval.models.load

    def spy(request):
        model, tokenizer = load(request)
        before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
        loaded.append((model, before))
        return model, tokenizer

    monkeypatch.setattr(spath_eval.models, "load", spy)
    return loaded


def quality(case):
    return {(entry["task"], entry["metric"]): (entry["dense"], entry["sparse"]) for entry in case["quality"]}


def by_id(record):
    return {case["id"]: case for case in record["cases"]}


def test_weights_are_loaded_and_the_dense_model_is_scored_once(run, calls, models):
    evaluations, profiles = calls("evaluate"), calls("profile_domain")
    record = run("--domain", "math,code", "--sparsity", "0.1,0.3", "--execution", "masked").record
    assert [case["outcome"] for case in record["cases"]] == ["passed"] * 8
    assert len(models) == 1
    assert len(evaluations) == 2 + 8
    assert [args[3] for args in profiles] == ["math", "code"]


@pytest.mark.parametrize("execution", ["compact", "masked"])
def test_masks_are_swapped_in_place(run, models, execution):
    assert run("--execution", execution).status == 0
    ((model, before),) = models
    assert dict(model.named_parameters()).keys() == before.keys()
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])
    hooks = [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]
    assert hooks == []


def test_two_models_are_never_in_memory_together(run, tiny_checkpoint, tmp_path, monkeypatch):
    import shutil

    import spath_eval.models

    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    load = spath_eval.models.load
    alive = []

    def spy(request):
        gc.collect()
        assert [reference() for reference in alive] == [None] * len(alive)
        model, tokenizer = load(request)
        alive.append(weakref.ref(model))
        return model, tokenizer

    monkeypatch.setattr(spath_eval.models, "load", spy)
    record = run("--model", other).record
    assert len(alive) == 2
    assert [model["name"] for model in record["models"]] == ["tiny", "other"]
    assert [case["id"] for case in record["cases"]] == [
        f"{model}/math/{strategy}@0.15" for model in ("tiny", "other") for strategy in ("negative", "random")
    ]
    assert len(record["dense"]) == len(record["profiles"]) == 2
    assert len({model["fingerprint"] for model in record["models"]}) == 1


def test_no_profile_is_made_for_strategies_that_need_none(run, calls):
    profiles = calls("profile_domain")
    record = run("--strategy", "random,keep-all").record
    assert profiles == []
    assert record["profiles"] == []
    assert [case["id"] for case in record["cases"]] == ["tiny/math/random@0.15", "tiny/math/keep-all@0.15"]


def test_a_case_names_a_profile_of_the_record(run, short_text):
    record = run("--domain", "math,code", "--profile-text", f"code={short_text}").record
    known = {profile["fingerprint"] for profile in record["profiles"]}
    assert {case["profile"] for case in record["cases"] if case["strategy"]["name"] == "negative"} <= known


def test_a_profile_is_made_once_and_then_cached(run, calls):
    profiles = calls("profile_domain")
    first, second = run("-o", "1.json").record, run("-o", "2.json").record
    assert len(profiles) == 1
    assert first["profiles"] == second["profiles"]
    assert first["profiles"][0]["tokens"] == {"math": 600}


def without_what_time_changes(record):
    cases = [
        {key: value for key, value in case.items() if key not in ("seconds", "samples")} for case in record["cases"]
    ]
    return record["models"], record["profiles"], record["dense"], cases


def test_equal_seeds_give_equal_figures_and_another_seed_another_random_mask(run):
    first, again = run("-o", "1.json").record, run("-o", "2.json").record
    assert without_what_time_changes(first) == without_what_time_changes(again)
    other = run("-o", "3.json", "--seed", "1").record
    masks = [[case["mask"]["digest"] for case in record["cases"]] for record in (first, other)]
    assert masks[0][0] == masks[1][0]
    assert masks[0][1] != masks[1][1]
    assert first["cases"][0]["preservation"]["kl"] == other["cases"][0]["preservation"]["kl"]
    assert first["cases"][1]["preservation"]["kl"] != other["cases"][1]["preservation"]["kl"]


def test_a_control_is_the_same_whatever_runs_beside_it(run):
    pair = by_id(run("-o", "1.json").record)
    alone = by_id(run("-o", "2.json", "--strategy", "random", "--sparsity", "0.3,0.15").record)
    name = "tiny/math/random@0.15"
    assert alone[name]["mask"] == pair[name]["mask"]


def test_keep_all_changes_nothing_at_all(run):
    record = run("--strategy", "keep-all", "--limit", 10).record
    (case,) = record["cases"]
    assert case["sparsity"]["achieved"] == case["sparsity"]["model_weights_removed"] == 0
    for entry in case["quality"]:
        assert entry["dense"] == entry["sparse"]
        assert entry["difference"]["value"] == entry["difference"]["lost"] == entry["difference"]["gained"] == 0
        assert entry["retention"]["value"] in (None, 1)
        assert entry["retention"]["value"] == 1 or entry["retention"]["reason"]
    assert case["preservation"]["kl"] == 0
    assert case["preservation"]["top1_agreement"] == case["preservation"]["perplexity"]["ratio"] == 1
    assert case["preservation"]["cosine"] == pytest.approx(1, abs=1e-12)
    assert case["gates"]["exercised"]["keep_all_difference"] == case["gates"]["parity"]["max_logit_difference"] == 0


def test_masked_and_compact_execution_score_alike(run):
    compact = run("-o", "1.json", "--sparsity", "0.4", "--limit", 10).record
    masked = run("-o", "2.json", "--sparsity", "0.4", "--limit", 10, "--execution", "masked").record
    for one, other in zip(compact["cases"], masked["cases"], strict=True):
        assert other["id"] == f"{one['id']}[masked]"
        assert other["mask"]["digest"] == one["mask"]["digest"]
        assert quality(other) == quality(one)
        assert other["preservation"]["kl"] == pytest.approx(one["preservation"]["kl"], rel=1e-3)
        assert one["gates"]["parity"]["ok"]
        assert one["gates"]["parity"]["max_relative_difference"] <= one["gates"]["parity"]["tolerance"]
        assert other["gates"]["parity"] is None
        assert other["gates"]["parity_reason"]


def test_masked_execution_has_no_speed(spath_eval_command, work_folder, tiny_checkpoint, brief):
    options = [option for option in brief if option != "--no-speed"]
    outcome = spath_eval_command("run", "--model", tiny_checkpoint, *options, "--execution", "masked", "--no-controls")
    (case,) = outcome.record["cases"]
    assert case["speed"] == []
    assert "not measured: masking is not skipping" in case["speed_reason"]
    assert "not measured: masking is not skipping" in outcome.out


def test_a_token_strategys_speed_needs_the_kernels(spath_eval_command, work_folder, tiny_checkpoint, brief):
    options = [option for option in brief if option != "--no-speed"]
    arguments = ("--strategy", "oracle", "--no-controls", "--no-quality", "--device", "cpu")
    outcome = spath_eval_command("run", "--model", tiny_checkpoint, *options, *arguments)
    (case,) = outcome.record["cases"]
    assert case["speed"] == []
    assert "the kernels that skip token by token need [kernels], a CUDA device" in case["speed_reason"]


def test_both_arms_meet_the_same_requests(run):
    samples = [row for row in run("--limit", 6).samples if "task" in row]
    requests = {}
    for row in samples:
        requests.setdefault(row["case"], []).append(
            (row["task"], row["doc_id"], row["doc_hash"], row["prompt_hash"], row["target_hash"])
        )
    dense = requests.pop("tiny/math/dense")
    assert len(dense) == 12
    assert requests == {"tiny/math/negative@0.15": dense, "tiny/math/random@0.15": dense}


def test_the_samples_hold_the_scores_of_the_record(run):
    outcome = run("--limit", 8)
    for case in outcome.record["cases"]:
        for entry in case["quality"]:
            for arm, name in (("dense", "tiny/math/dense"), ("sparse", case["id"])):
                scores = [
                    row[entry["metric"]]
                    for row in outcome.samples
                    if row["case"] == name and row.get("task") == entry["task"] and row["filter"] == entry["filter"]
                ]
                assert len(scores) == entry["documents"] == 8
                assert entry[arm]["value"] == pytest.approx(sum(scores) / len(scores))


def test_sparsity_is_what_was_removed(run):
    record = run("--sparsity", "0.3", "--no-controls").record
    (case,) = record["cases"]
    removed = round(0.3 * 64)
    model = 2 * 3 * 32 * removed / record["models"][0]["parameters"]
    assert case["sparsity"] == {
        "requested": 0.3,
        "achieved": pytest.approx(removed / 64),
        "per_site": {f"model.layers.{layer}.mlp": pytest.approx(removed / 64) for layer in (0, 1)},
        "ffn_weights_removed": pytest.approx(removed / 64),
        "model_weights_removed": pytest.approx(model),
    }


# What ends a run early


INTERRUPTING = """
from spath_eval import hookimpl

@hookimpl(tryfirst=True)
def spath_run_case(case, session):
    if case.strategy.name == "random":
        raise KeyboardInterrupt
"""

CRASHING = """
from spath_eval import UsageError, hookimpl

@hookimpl(tryfirst=True)
def spath_run_case(case, session):
    if case.strategy.name == "negative" and case.sparsity == 0.1:
        raise RuntimeError("the roof\\nis on fire")
    if case.strategy.name == "negative":
        raise UsageError("not like this")
"""


def test_an_interrupted_run_keeps_the_finished_cases(run, distribute):
    distribute("interrupting", {"interrupting": "interrupting"}, {"interrupting": INTERRUPTING})
    outcome = run("--sparsity", "0.1,0.2")
    assert outcome.status == 2
    assert outcome.record["status"] == "interrupted"
    assert [case["id"] for case in outcome.record["cases"]] == ["tiny/math/negative@0.1"]
    assert outcome.record["cases"][0]["outcome"] == "passed"
    assert outcome.err.splitlines()[-1] == "1 passed, 3 not run"
    assert outcome.out.startswith("This run is interrupted.")
    assert "interrupting (interrupting 1.0)" in outcome.err


@pytest.mark.parametrize("function", ["evaluate", "profile_domain", "check_neutrality"])
def test_a_run_interrupted_before_its_first_case_leaves_a_record(run, monkeypatch, function):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(session, function, interrupt)
    outcome = run()
    assert outcome.status == 2
    assert outcome.record["status"] == "interrupted"
    assert outcome.record["cases"] == []


def test_a_case_that_raises_is_an_error_and_the_others_go_on(run, distribute):
    distribute("crashing", {"crashing": "crashing"}, {"crashing": CRASHING})
    outcome = run("--sparsity", "0.1,0.2")
    assert outcome.status == 1
    assert outcome.record["status"] == "failed"
    cases = outcome.record["cases"]
    assert [case["outcome"] for case in cases] == ["error", "passed", "error", "passed"]
    assert cases[0]["message"] == "RuntimeError: the roof\nis on fire"
    assert cases[2]["message"] == "not like this"
    assert outcome.err.splitlines()[-1] == "2 passed, 2 error"
    assert "ERROR tiny/math/negative@0.2: not like this" in outcome.err.splitlines()
    assert "Traceback" not in outcome.err


def test_exitfirst_stops_at_the_first_case_that_fails(run, distribute):
    distribute("crashing", {"crashing": "crashing"}, {"crashing": CRASHING})
    outcome = run("--sparsity", "0.3,0.2", "-x")
    assert outcome.status == 1
    assert outcome.record["status"] == "failed"
    assert [case["outcome"] for case in outcome.record["cases"]] == ["error"]
    assert outcome.err.splitlines()[-1] == "0 passed, 1 error, 3 not run"


def test_no_hook_sees_the_pathway_of_another_case(run, monkeypatch):
    seen = []
    describe = session.make_pathway

    def spy(loaded, case, context):
        seen.append(loaded.session.pathway)
        return describe(loaded, case, context)

    monkeypatch.setattr(session, "make_pathway", spy)
    run()
    assert seen == [None, None]


# Faults that the gates must find


def failures(outcome):
    """Messages of the failed cases, after the marks of a failed run were seen."""
    assert outcome.status == 1
    assert outcome.record["status"] == "failed"
    cases = [case for case in outcome.record["cases"] if case["outcome"] == "failed"]
    assert all("quality" not in case and "speed" not in case for case in cases)
    for case in cases:
        assert f"FAILED {case['id']}: {case['message']}" in outcome.err.splitlines()
    return [case["message"] for case in cases]


@pytest.mark.parametrize(("execution", "method"), [("masked", "masked"), ("compact", "installed")])
def test_a_mask_that_is_not_applied_at_one_site_fails_the_run(run, monkeypatch, execution, method):
    original = getattr(Site, method)

    def faulty(self, argument):
        return nullcontext() if self.path == FAULTY else original(self, argument)

    monkeypatch.setattr(Site, method, faulty)
    messages = failures(run("--execution", execution))
    assert len(messages) == 2
    assert all(message.startswith(f"mask not applied at {FAULTY} in scoring: ") for message in messages)


@pytest.fixture
def decoding(monkeypatch):
    """A function that says whether the model is now decoding, and a list of contexts to enter around such forwards."""
    from transformers import GemmaModel

    around = []
    state = {"decoding": False}
    forward = GemmaModel.forward

    def watched(self, *args, **kwargs):
        cache = kwargs.get("cache")
        state["decoding"] = cache is not None and cache.get_seq_length() > 0
        if not state["decoding"] or not around:
            return forward(self, *args, **kwargs)
        with around[-1]():
            return forward(self, *args, **kwargs)

    monkeypatch.setattr(GemmaModel, "forward", watched)
    return lambda: state["decoding"], around


def test_a_mask_that_is_not_applied_in_decode_only_fails_masked_execution(run, monkeypatch, decoding):
    is_decoding, _ = decoding

    def faulty(self, mask):
        keep = mask[self.path]
        return self.filtered(lambda gate, product: None if self.path == FAULTY and is_decoding() else keep)

    monkeypatch.setattr(Site, "masked", faulty)
    assert (
        failures(run("--execution", "masked"))
        == [f"mask not applied at {FAULTY} in decode: removed neurons were not zero"] * 2
    )


def test_a_mask_that_is_not_applied_in_decode_only_fails_compact_execution(run, monkeypatch, decoding):
    _, around = decoding
    installed = Site.installed

    @contextmanager
    def faulty(self, module):
        if self.path != FAULTY or module is self.module:
            with installed(self, module):
                yield
            return

        @contextmanager
        def dense_again():
            setattr(self._parent, self._name, self.module)
            yield
            setattr(self._parent, self._name, module)

        with installed(self, module):
            around.append(dense_again)
            yield
            around.pop()

    monkeypatch.setattr(Site, "installed", faulty)
    assert failures(run("--no-controls")) == [
        f"mask not applied at {FAULTY} in decode: 64 neurons entered down, not the compact width"
    ]


def scaled(module, down):
    """A copy of a compact FFN whose down projection is a thousandth too large."""
    import copy

    module = copy.deepcopy(module)
    getattr(module, down).weight.mul_(1.001)
    return module


def test_a_compact_module_that_computes_something_else_fails_the_run(run, monkeypatch):
    compact = GatedSite.compact

    def faulty(self, mask):
        module = compact(self, mask)
        return scaled(module, self.ffn.down) if self.path == FAULTY and module is not self.module else module

    monkeypatch.setattr(GatedSite, "compact", faulty)
    messages = failures(run())
    assert len(messages) == 2
    assert all(message.startswith(f"compact differs from masked at {FAULTY} by 0.001") for message in messages)


def test_keeping_all_that_is_not_neutral_fails_the_run(run, monkeypatch):
    compact = GatedSite.compact

    def faulty(self, mask):
        module = compact(self, mask)
        return scaled(module, self.ffn.down) if module is self.module else module

    monkeypatch.setattr(GatedSite, "compact", faulty)
    messages = failures(run())
    assert len(messages) == 2
    assert all(message.startswith("keeping every neuron changes the logits by ") for message in messages)


@pytest.mark.parametrize("execution", ["masked", "compact"])
def test_masks_that_never_reach_the_model_fail_the_run(run, monkeypatch, execution):
    method = {"masked": "masked", "compact": "installed"}[execution]
    monkeypatch.setattr(Site, method, lambda self, argument: nullcontext())
    messages = failures(run("--execution", execution))
    assert messages == ["removing every neuron does not change the logits: the mask does not reach the model"] * 2


@pytest.fixture
def contaminated(tmp_path, short_text):
    """A profile text that holds two of the first four questions of `spath_math_choice`."""
    from spath_eval.plugins.domains.math import CORPUS

    items = CORPUS.items("choice")[1:3]
    # each in many documents, so that whichever are held out, some of them are profiled on
    documents = [f"Number {n}.\n{item.prompt}  {item.answer}" for item in items for n in range(20)]
    path = tmp_path / "contaminated.txt"
    path.write_text("\n\n".join([short_text.read_text(encoding="utf-8"), *documents]), encoding="utf-8")
    return path


def test_profile_text_that_overlaps_the_evaluation_fails_the_run(run, contaminated):
    outcome = run("--profile-text", f"math={contaminated}")
    (message,) = failures(outcome)
    assert message == (
        "the profile text holds 50.0% of spath_math_choice: calibration and evaluation overlap "
        "(--allow-overlap accepts it)"
    )
    assert by_id(outcome.record)["tiny/math/random@0.15"]["outcome"] == "passed"  # it never saw that text


def test_overlap_can_be_allowed_and_the_record_keeps_it(run, contaminated):
    outcome = run("--profile-text", f"math={contaminated}", "--allow-overlap")
    assert outcome.status == 0
    case = by_id(outcome.record)["tiny/math/negative@0.15"]
    expected = {"spath_math_choice": 0.5, "spath_math_generate": 0.0}
    assert case["gates"]["disjoint"] == {"ok": False, "overlap": expected, "ngrams": expected, "allowed": True}


def test_items_that_share_words_with_the_profile_text_fail_the_run(run, short_text, tmp_path):
    from spath_eval.plugins.domains.math import CORPUS

    items = CORPUS.items("choice")[1:3]
    quotes = [f"Note {n}: I read that {item.prompt} {item.answer} today." for item in items for n in range(20)]
    path = tmp_path / "quotes.txt"
    path.write_text("\n\n".join([short_text.read_text(encoding="utf-8"), *quotes]), encoding="utf-8")
    (message,) = failures(run("--profile-text", f"math={path}"))
    assert message.startswith("the profile text shares 13 words in a row with 50.0% of spath_math_choice: ")


def test_the_built_in_domains_pass_the_overlap_gate(run):
    record = run("-p", "no:code").record
    assert by_id(record)["tiny/math/negative@0.15"]["gates"]["disjoint"] == {
        "ok": True,
        "overlap": {"spath_math_choice": 0.0, "spath_math_generate": 0.0},
        "ngrams": {"spath_math_choice": 0.0, "spath_math_generate": 0.0},
        "allowed": False,
    }


# From Python


def test_a_run_can_be_started_from_python(work_folder, tiny_checkpoint, short_text):
    record = spath_eval.run(
        models=(str(tiny_checkpoint),),
        domains=("math",),
        strategies=("negative:pool=model",),
        profile_text={"math": short_text},
        limit=4,
        profile_tokens=600,
        preservation_tokens=300,
        speed=False,
        output=work_folder / "record.json",
    )
    assert records.read(work_folder / "record.json")["cases"][0]["id"] == "tiny/math/negative:pool=model@0.15"
    assert record["status"] == "complete"
    with pytest.raises(UsageError, match="unknown strategy 'negativ'"):
        spath_eval.run(models=(str(tiny_checkpoint),), strategies=("negativ",))


# lm-eval's own benchmarks


ROWS = Path(__file__).parent / "data" / "rows"
"""Rows written for these tests, in the form of those of gsm8k, arc_easy, lambada_openai and wikitext."""


def test_benchmarks_are_evaluated_on_rows_from_a_folder(run):
    record = run("--data-dir", ROWS, "--tasks", "gsm8k,arc_easy", "--limit", "3,gsm8k=2", "--no-controls").record
    records.validate(record)
    assert {(entry["task"], entry["documents"], entry["limit"], entry["num_fewshot"]) for entry in record["tasks"]} == {
        ("gsm8k", 2, 2, 5),
        ("arc_easy", 3, 3, 0),
    }
    (case,) = record["cases"]
    assert [(entry["task"], entry["metric"], entry["filter"]) for entry in case["quality"]] == [
        ("gsm8k", "exact_match", "strict-match"),
        ("gsm8k", "exact_match", "flexible-extract"),
        ("arc_easy", "acc", "none"),
        ("arc_easy", "acc_norm", "none"),
    ]


def test_with_rows_at_hand_a_domain_is_evaluated_on_its_public_benchmarks(run, monkeypatch):
    record = run("--data-dir", ROWS).record
    assert {entry["task"] for entry in record["tasks"]} == {"gsm8k"}
    monkeypatch.setenv("SPATH_DATA_DIR", str(ROWS))
    assert {entry["task"] for entry in run("-o", "again.json").record["tasks"]} == {"gsm8k"}
    own = run("--tasks", "math=spath_math_choice", "-o", "own.json").record
    assert {entry["task"] for entry in own["tasks"]} == {"spath_math_choice"}


def test_perplexities_are_compared_by_their_logarithms_document_by_document(run):
    outcome = run("--data-dir", ROWS, "--domain", "language", "--sparsity", "0.5", "--no-controls")
    assert outcome.status == 0
    records.validate(outcome.record)
    (case,) = outcome.record["cases"]
    entries = {(entry["task"], entry["metric"]): entry for entry in case["quality"]}
    assert sorted(entries) == [
        ("lambada_openai", "acc"),
        ("lambada_openai", "perplexity"),
        ("wikitext", "bits_per_byte"),
        ("wikitext", "byte_perplexity"),
        ("wikitext", "word_perplexity"),
    ]
    for (_, metric), entry in entries.items():
        dense, sparse = entry["dense"]["value"], entry["sparse"]["value"]
        change = math.log(sparse / dense) if "perplexity" in metric else sparse - dense
        assert entry["difference"]["value"] == pytest.approx(change)
        low, high = entry["difference"]["ci95"]
        assert low <= change <= high
    assert "x1." in outcome.out or "x0." in outcome.out


def test_the_number_of_examples_can_be_chosen(run):
    record = run("--data-dir", ROWS, "--num-fewshot", 2).record
    assert {entry["num_fewshot"] for entry in record["tasks"]} == {2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tasks", "gsm8q"), "nearest are gsm8k"),
        (("--tasks", "piqa"), "piqa"),
        (("--tasks", "physics=gsm8k"), "unknown domain 'physics'"),
        (("--tasks", "gsm8k", "--num-fewshot", 30), "cannot have 30 examples"),
        (("--tasks", "gsm8k", "--limit", "none"), "--limit 'none'"),
        (("--tasks", "gsm8k", "--include-path", "nowhere"), "nowhere"),
    ],
)
def test_what_is_wrong_with_benchmarks_is_said_before_a_model_is_loaded(run, models, options, message):
    outcome = run("--data-dir", ROWS, *options)
    assert outcome.status == 4
    assert message in outcome.err
    assert models == []


def test_a_chat_template_is_refused_where_there_is_none(run):
    outcome = run("--apply-chat-template")
    assert outcome.status == 4
    assert "no template" in outcome.err


def test_a_smaller_token_budget_of_a_sparse_arm_holds_for_the_dense_one_too(run, monkeypatch):
    """Whatever a forward holds must be the same in both arms."""
    from spath_eval.quality.adapter import PathwayLM

    budgets = []
    forward = PathwayLM._forward

    def short_of_memory(self, step, before):
        if self.exercise and self.token_budget > 200:
            raise torch.OutOfMemoryError("made up")
        budgets.append((self.exercise is not None, self.token_budget))
        return forward(self, step, before)

    monkeypatch.setattr(PathwayLM, "_forward", short_of_memory)
    outcome = run("--no-controls")
    assert outcome.status == 0
    assert "out of memory: going on with 128 tokens" in outcome.err
    assert budgets[-1] == (False, 128)


# Domains beside each other, and strategies


@pytest.fixture
def both(short_text):
    """Options for two domains."""
    return "--domain", "math,code", "--profile-text", f"code={short_text}"


def test_masks_are_evaluated_on_every_domain_and_pooled(run, both):
    outcome = run(*both, "--cross")
    assert outcome.status == 0
    cases = by_id(outcome.record)
    assert set(cases) == {
        "tiny/math/negative@0.15",
        "tiny/math>code/negative@0.15",
        "tiny/math/random@0.15",
        "tiny/code/negative@0.15",
        "tiny/code>math/negative@0.15",
        "tiny/code/random@0.15",
        "tiny/pooled>math/negative@0.15",
        "tiny/pooled>code/negative@0.15",
    }
    crossed = cases["tiny/math>code/negative@0.15"]
    assert (crossed["domain"], crossed["evaluated_on"]) == ("math", "code")
    assert crossed["mask"] == cases["tiny/math/negative@0.15"]["mask"]
    assert {entry["task"] for entry in crossed["quality"]} == {"spath_code_choice", "spath_code_generate"}
    assert cases["tiny/pooled>math/negative@0.15"]["mask"] == cases["tiny/pooled>code/negative@0.15"]["mask"]
    (shares,) = (entry["specialisation"] for entry in outcome.record["profiles"] if "specialisation" in entry)
    assert list(shares["model.layers.0.mlp"]) == ["math", "code"]
    pairs = {(entry["case"], entry["other"]) for entry in outcome.record["comparisons"]}
    assert ("tiny/code/negative@0.15", "tiny/math>code/negative@0.15") in pairs
    assert ("tiny/math/negative@0.15", "tiny/math/random@0.15") in pairs


def test_a_pathway_is_timed_once(spath_eval_command, work_folder, tiny_checkpoint, brief, both, monkeypatch):
    monkeypatch.setattr(measurement, "Stop", lambda: Stop(seconds=0))
    monkeypatch.setattr(measurement, "WORKLOAD", Workload(batch=1, tokens=4, new_tokens=1))
    options = [option for option in brief if option != "--no-speed"]
    outcome = spath_eval_command(
        "run", "--model", tiny_checkpoint, *options, *both, "--cross", "--no-controls", "-k", ">"
    )
    timed = {case["id"]: case["speed_reason"] for case in outcome.record["cases"] if not case["speed"]}
    assert timed == {"tiny/pooled>code/negative@0.15": "the same pathway as in tiny/pooled>math/negative@0.15"}


def test_a_given_mask_cannot_be_crossed(run, both):
    outcome = run(*both, "--cross", "--mask", "some.safetensors")
    assert outcome.status == 4


def test_all_static_strategies_run_side_by_side(run, both):
    record = run(*both, "--strategy", "all", "--no-quality").record
    names = {case["strategy"]["name"]: case["strategy"]["control"] for case in record["cases"]}
    controls = {"keep-all": True, "random": True, "reverse": True}
    assert names == {"magnitude": False, "negative": False, "specialisation": False, "wanda": False} | controls
    assert {case["outcome"] for case in record["cases"]} == {"passed"}
    best = [entry for entry in record["comparisons"] if entry["case"] == "tiny/math/magnitude@0.15"]
    assert {entry["quantity"] for entry in best} == {"perplexity"}


def test_without_quality_no_task_is_evaluated(run, calls):
    record = run("--no-quality").record
    assert record["tasks"] == []
    for case in record["cases"]:
        assert (case["quality"], case["quality_reason"]) == ([], "not asked for")
        assert case["preservation"]["tokens"] > 0
        assert set(case["gates"]["exercised"]["phases"]) == {"prefill", "decode"}


def test_samples_hold_what_every_held_out_document_costs(run):
    outcome = run("--no-quality")
    for case in outcome.record["cases"]:
        rows = {
            arm: {row["heldout"]: row for row in outcome.samples if row["case"] == arm}
            for arm in (case["id"], "tiny/math/dense")
        }
        sparse, dense = rows.values()
        assert sparse.keys() == dense.keys()
        excess = sum(sparse[key]["nats"] - dense[key]["nats"] for key in dense)
        tokens = sum(row["tokens"] for row in dense.values())
        assert math.exp(excess / tokens) == pytest.approx(case["preservation"]["perplexity"]["ratio"])


def test_the_noise_floor_is_the_dense_model_in_other_batches(run):
    record = run("--noise-floor").record
    (dense,) = record["dense"]
    floors = {(entry["task"], entry["metric"]): entry for entry in dense["noise_floor"]}
    assert floors.keys() == {(entry["task"], entry["metric"]) for entry in dense["quality"]}
    assert all(entry["documents"] == 4 for entry in floors.values())


def test_two_halves_of_the_text_are_asked_for_the_mask(run, tmp_path):
    record = run().record
    cases = by_id(record)
    assert 0 < cases["tiny/math/negative@0.15"]["convergence"]["jaccard"] <= 1
    assert cases["tiny/math/random@0.15"]["convergence"] is None
    assert cases["tiny/math/random@0.15"]["convergence_reason"] == "the strategy reads no profile"


def test_a_text_too_short_to_choose_by_is_warned_of(run, tmp_path):
    text = tmp_path / "two.txt"
    text.write_text("\n\n".join(["one and one", "zebra queue", "17 * 23", "def f(): pass", "a b c"]), encoding="utf-8")
    outcome = run("--profile-text", f"math={text}", "--sparsity", "0.3")
    (case,) = (case for case in outcome.record["cases"] if case["strategy"]["name"] == "negative")
    agreement = case["convergence"]["jaccard"]
    assert agreement < 0.7
    assert f"two halves of the profile text agree on {100 * agreement:.0f}% of the neurons" in outcome.err
