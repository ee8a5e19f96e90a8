"""`spath-eval run` as its user meets it: what is printed where, exit codes, and one clear line for bad input."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spath_eval.reports.console import ConsoleReport
from spath_eval.texts import HELD_OUT, digest


@pytest.fixture
def loads(monkeypatch):
    """Every request to load a model."""
    import spath_eval.models

    requests = []
    load = spath_eval.models.load
    monkeypatch.setattr(spath_eval.models, "load", lambda request: requests.append(request) or load(request))
    return requests


def ids(outcome):
    return [case["id"] for case in outcome.record["cases"]]


def test_defaults_are_one_strategy_beside_its_control_on_all_domains(
    spath_eval_command, work_folder, tiny_checkpoint, short_text
):
    domains = ("code", "factual", "language", "math")
    texts = [f"--profile-text={domain}={short_text}" for domain in domains]
    outcome = spath_eval_command(
        "run", "--model", tiny_checkpoint, "--limit", 4, "--profile-tokens", 600, "--no-speed", *texts
    )
    assert outcome.status == 0
    record = outcome.record
    assert record["status"] == "complete"
    assert [case["id"] for case in record["cases"]] == [
        f"tiny/{domain}/{strategy}@0.15" for domain in domains for strategy in ("negative", "random")
    ]
    assert {case["outcome"] for case in record["cases"]} == {"passed"}
    assert {case["execution"] for case in record["cases"]} == {"compact"}
    assert {entry["task"] for entry in record["tasks"]} == {
        f"spath_{domain}_{form}" for domain in domains for form in ("choice", "generate")
    }
    assert record["seed"] == 0
    assert record["environment"]["dtype"] == "float32"
    assert record["command"]["resolved"]["sparsities"] == [0.15]
    assert record["command"]["given"][:2] == ["--model", str(tiny_checkpoint)]


def test_the_record_lands_below_results_with_its_samples_beside_it(run, work_folder):
    outcome = run()
    (path,) = Path("results/runs").glob("*.json")
    assert outcome.record_path == path
    assert re.fullmatch(r"\d{8}T\d{6}-tiny-negative\.json", path.name)
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.stem}.samples.jsonl"]
    for entry in [*outcome.record["cases"], *outcome.record["tasks"]]:
        samples = path.parent / entry["samples"]["path"]
        assert samples == path.with_suffix(".samples.jsonl")
        assert hashlib.sha256(samples.read_bytes()).hexdigest() == entry["samples"]["sha256"]
    assert sorted(file.name for file in work_folder.iterdir()) == ["results"]


def test_output_names_the_record(run, work_folder):
    outcome = run("-o", "new/folder/record.json")
    assert outcome.record_path == Path("new/folder/record.json")
    files = sorted(file.name for file in (work_folder / "new/folder").iterdir())
    assert files == ["record.json", "record.samples.jsonl"]
    assert not (work_folder / "results").exists()


SHORT = re.compile(r"warning: tiny/math/negative@\S+: two halves of the profile text agree on \d+%")
"""What is said of a text as short as the tests'."""


def test_stdout_is_the_report_of_the_record_and_stderr_the_talk(run):
    outcome = run("--sparsity", "0.15,0.3")
    assert outcome.out.rstrip("\n") == ConsoleReport().render(outcome.record).rstrip("\n")
    assert "\x1b" not in outcome.out + outcome.err
    lines = [line for line in outcome.err.splitlines() if not SHORT.match(line)]
    assert len(outcome.err.splitlines()) == len(lines) + 2
    assert re.fullmatch(r"spath-eval \S+, torch \S+, transformers \S+, lm-eval \S+", lines[0])
    assert lines[1:3] == ["device: cpu, float32", "plugins: built-in only"]
    assert [line.split()[:2] for line in lines[3:7]] == [["PASSED", case["id"]] for case in outcome.record["cases"]]
    assert lines[7:] == [f"record: {outcome.record_path}", "4 passed"]


def test_a_pipe_gets_nothing_but_those_lines(work_folder, tiny_checkpoint, brief):
    command = [sys.executable, "-m", "spath_eval", "run", "--model", str(tiny_checkpoint), *brief]
    done = subprocess.run([*command, "-o", "record.json"], capture_output=True, text=True, check=True)
    record = json.loads((work_folder / "record.json").read_text(encoding="utf-8"))
    assert done.stdout.rstrip("\n") == ConsoleReport().render(record).rstrip("\n")
    assert sum(bool(SHORT.match(line)) for line in done.stderr.splitlines()) == 1
    assert len(done.stderr.splitlines()) == 3 + 1 + 2 + 2, done.stderr


def test_no_controls_leaves_the_control_out(run):
    assert ids(run("--no-controls")) == ["tiny/math/negative@0.15"]


def test_a_control_that_is_asked_for_comes_once(run):
    assert ids(run("--strategy", "random,negative,negative:pool=layer")) == [
        "tiny/math/random@0.15",
        "tiny/math/negative@0.15",
    ]


def test_collect_only_lists_ids_and_loads_no_model(run, loads, work_folder):
    outcome = run("--collect-only", "--sparsity", "0.1,0.2", "--domain", "code,math", "-k", "not (code and random)")
    assert outcome.status == 0
    assert outcome.out.splitlines() == [
        "tiny/code/negative@0.1",
        "tiny/code/negative@0.2",
        "tiny/math/negative@0.1",
        "tiny/math/random@0.1",
        "tiny/math/negative@0.2",
        "tiny/math/random@0.2",
    ]
    assert outcome.err == ""
    assert loads == []
    assert list(work_folder.iterdir()) == []


def test_the_list_of_cases_is_json_where_that_is_asked_for(run, loads):
    outcome = run("--collect-only", "--json", "--no-controls")
    assert json.loads(outcome.out) == {"cases": ["tiny/math/negative@0.15"]}
    outcome = run("--json")
    assert (outcome.status, outcome.out) == (4, "")
    assert outcome.err == ("error: --json is for the list of --collect-only: the record of a run is JSON in any case\n")
    assert loads == []


def test_keywords_select_the_cases_that_run(run):
    outcome = run("--sparsity", "0.1,0.2", "-k", "RANDOM and @0.2 or negative and @0.1")
    assert ids(outcome) == ["tiny/math/negative@0.1", "tiny/math/random@0.2"]


@pytest.mark.parametrize("more", [[], ["--collect-only"]])
def test_no_cases_selected_is_status_5_without_a_record(run, loads, work_folder, more):
    outcome = run("-k", "nothing", *more)
    assert (outcome.status, outcome.out, outcome.err) == (5, "", "no cases selected\n")
    assert loads == []
    assert list(work_folder.iterdir()) == []


def test_small_token_budgets_are_enough(run):
    outcome = run("--profile-tokens", 1, "--preservation-tokens", 2, "--limit", 1)
    assert outcome.status == 0
    assert outcome.record["profiles"][0]["tokens"] == {"math": 1}
    assert {case["preservation"]["tokens"] for case in outcome.record["cases"]} == {2}


@pytest.mark.parametrize("sparsity", [0.001, 0.999])
def test_extreme_sparsities_are_measured_too(run, sparsity):
    outcome = run("--sparsity", sparsity, "--strategy", "negative:pool=model,reverse")
    assert outcome.status == 0
    assert {case["sparsity"]["achieved"] for case in outcome.record["cases"]} == {round(sparsity)}


@pytest.mark.parametrize("seed", [2**32 - 1, 2**31])
def test_large_seeds_work(run, seed):
    outcome = run("--seed", seed)
    assert outcome.status == 0
    assert outcome.record["seed"] == seed


# Bad input


def without_config(folder):
    (folder / "config.json").unlink()


def pickled(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": 1}))


def truncated(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


def without_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def of_another_family(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}), encoding="utf-8")


def of_no_known_family(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "perceptron"}), encoding="utf-8")


def empty(folder):
    for file in folder.iterdir():
        file.unlink()


def refused(outcome, *words):
    """Assert that the command refused in one clear line that holds these words."""
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert len(outcome.err.splitlines()) == 1, outcome.err
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err
    assert outcome.status == 4


@pytest.fixture
def out(work_folder):
    """A folder for output, in which nothing may be left."""
    folder = work_folder / "out"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []
    assert list(work_folder.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without_config, "no config.json"),
        (pickled, "pytorch_model.bin is a pickle"),
        (truncated, "its weights cannot be loaded"),
        (without_tokenizer, "tokenizer"),
        (of_another_family, "no architecture claims model type 'gpt2'. Supported: "),
        (of_no_known_family, "perceptron"),
        (empty, "no config.json"),
    ],
)
def test_a_bad_checkpoint_is_refused(spath_eval_command, out, tiny_checkpoint, brief, tmp_path, damage, words):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "damaged")
    damage(folder)
    refused(spath_eval_command("run", "--model", folder, *brief, "-o", out / "record.json"), words)


def test_a_truncated_checkpoint_is_one_line_in_a_process_of_its_own(out, tiny_checkpoint, brief, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "damaged")
    truncated(folder)
    command = [sys.executable, "-m", "spath_eval", "run", "--model", str(folder), *brief, "-o", str(out / "it.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith(f"error: {folder}: its weights cannot be loaded")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "missing.gguf", "a/b/c"])
def test_a_missing_model_is_refused(spath_eval_command, out, name):
    refused(spath_eval_command("run", "--model", name, "-o", out / "record.json"), name, "no such file or folder")


def test_a_truncated_gguf_file_is_refused(spath_eval_command, out, tmp_path):
    import gguf
    import numpy as np

    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_tensor("token_embd.weight", np.ones((64, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = path.read_bytes()
    for size in (len(whole) - 100, 200, 3, 0):
        path.write_bytes(whole[:size])
        refused(spath_eval_command("run", "--model", path, "-o", out / "record.json"), "model.gguf", "GGUF")


@pytest.mark.parametrize("sparsity", ["0", "1", "-0.1", "1.5", "nan", "abc", "", "0.15,abc", "0.15,"])
def test_a_bad_sparsity_is_refused(run, out, sparsity):
    refused(run("-o", out / "record.json", "--sparsity", sparsity), "sparsity", "the share of neurons to remove")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--domain", "maths"], ["unknown domain 'maths'", "Did you mean math?"]),
        (["--domain", "math,"], ["--domain 'math,'"]),
        (["--domain", ","], ["--domain"]),
        (["--domain", ""], ["--domain"]),
        (["--strategy", "negativ"], ["unknown strategy 'negativ'", "Did you mean negative?"]),
        (["--strategy", ""], ["--strategy"]),
        (["--strategy", "negative,,random"], ["--strategy"]),
        (["--strategy", "negative:axis=layer"], ["no option 'axis'", "pool"]),
        (["--strategy", "negative:pool=head"], ["option pool", "layer or model", "'head'"]),
        (["--strategy", "negative:pool"], ["pool=VALUE"]),
        (["--arch", "gema"], ["unknown architecture 'gema'", "Did you mean gemma?"]),
        (["-k", "negative random"], ["-k 'negative random'"]),
        (["-k", "negative (random)"], ["-k"]),
        (["-k", "(("], ["-k"]),
        (["--profile-text", "math"], ["--profile-text 'math'", "DOMAIN=FILE"]),
        (["--profile-text", "math="], ["--profile-text 'math='"]),
        (["--profile-text", "=file"], ["unknown domain ''"]),
        (["--profile-text", "maths=text.txt"], ["unknown domain 'maths'", "Did you mean math?"]),
        (["--profile-text", "math=missing.txt"], ["missing.txt", "no such file or folder"]),
        (["--mask", "missing.safetensors"], ["missing.safetensors"]),
        (["--batch-size", "0"], ["--batch-size"]),
        (["--limit", "0"], ["--limit"]),
        (["--limit", "some"], ["--limit"]),
        (["--seed", "-1"], ["--seed"]),
        (["--seed", "1.5"], ["--seed"]),
        (["--profile-tokens", "0"], ["--profile-tokens"]),
        (["--preservation-tokens", "1"], ["--preservation-tokens"]),
        (["--device", "tpu"], ["unknown device 'tpu'"]),
        (["--dtype", "int8"], ["--dtype", "bfloat16"]),
        (["--execution", "sparse"], ["--execution", "compact", "masked"]),
        (["--executon", "masked"], ["--executon", "--execution"]),
        (["surplus"], ["surplus"]),
        (["-p", "no:nothing"], ["no plugin 'nothing' to block"]),
        (["-p", "a_module_that_is_missing"], ["a_module_that_is_missing"]),
        (["-p", "no:negative"], ["unknown strategy 'negative'", "is blocked"]),
    ],
)
def test_a_bad_option_is_refused(run, out, options, words):
    refused(run("-o", out / "record.json", *options), *words)


def test_cuda_that_is_not_there_is_refused(run, out):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    for device in ("cuda", "cuda:1"):
        refused(run("-o", out / "record.json", "--device", device), "no CUDA device")


@pytest.mark.parametrize("content", [b"", b" \n\n\t\n", b"\xff\xfe\x00"])
def test_a_file_without_text_is_refused(run, out, tmp_path, content):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    refused(run("-o", out / "record.json", "--profile-text", f"math={path}"), str(path))


def test_text_that_is_all_held_out_is_refused(run, out, tmp_path):
    documents = [f"document {number}" for number in range(100)]
    path = tmp_path / "text.txt"
    path.write_text(next(text for text in documents if int(digest(text), 16) % HELD_OUT == 0), encoding="utf-8")
    refused(run("-o", out / "record.json", "--profile-text", f"math={path}"), str(path), "none to profile")


def test_a_folder_without_text_is_refused(run, out, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "LICENSE.txt").write_text("A licence is no text.", encoding="utf-8")
    (folder / "image.png").write_bytes(b"\x89PNG")
    refused(run("-o", out / "record.json", "--profile-text", f"math={folder}"), str(folder), "holds no text")


def test_unwritable_output_is_refused_before_anything_is_loaded(run, loads, work_folder):
    (work_folder / "file").write_text("mine", encoding="utf-8")
    (work_folder / "folder").mkdir()
    for output in ("file/record.json", "folder", ".", ""):
        refused(run("-o", output), "cannot write")
    assert loads == []
    assert (work_folder / "file").read_text(encoding="utf-8") == "mine"
    assert sorted(file.name for file in work_folder.rglob("*")) == ["file", "folder"]


SITELESS = """
from spath_eval import FFN, Architecture, hookimpl

@hookimpl
def spath_register_architectures(register):
    register(Architecture("siteless", ("gemma",), (FFN("nowhere.*.mlp"),)))
"""


def test_a_model_without_sites_is_refused(run, out, distribute):
    distribute("siteless", {"siteless": "siteless"}, {"siteless": SITELESS})
    outcome = run("-o", out / "record.json", "-p", "no:gemma")
    refused(outcome, "no FFN site found in GemmaForCausalLM", "nowhere.*.mlp")


def test_no_model_and_no_family_is_refused(spath_eval_command, out):
    refused(spath_eval_command("run", "-o", out / "record.json"), "--model", "--arch: gemma")


def test_two_models_of_one_name_are_refused(run, out, tiny_checkpoint, tmp_path):
    other = shutil.copytree(tiny_checkpoint, tmp_path / "elsewhere" / "tiny")
    refused(run("-o", out / "record.json", "--model", other), "same name")


def test_verbose_shows_the_traceback_of_a_refusal(run, out):
    outcome = run("-o", out / "record.json", "--strategy", "negativ", "-v")
    assert outcome.status == 4
    assert outcome.err.startswith("Traceback")
    assert outcome.err.splitlines()[-1].startswith("error: unknown strategy 'negativ'")


# Suite files


@pytest.fixture
def suite(spath_eval_command, work_folder, tiny_checkpoint, short_text):
    """Calls `spath-eval run` with a suite file that holds the tiny checkpoint, brief options and what is given."""

    def call(text, *arguments, name="ci/suite.toml", head=""):
        path = work_folder / name
        path.parent.mkdir(exist_ok=True)
        brief = f"""
            model = "{tiny_checkpoint}"
            profile-tokens = 600
            preservation-tokens = 300
            batch-size = 8
            no-speed = true
            profile-text = ["math={short_text}", "code={short_text}"]
        """
        path.write_text(head + brief + text, encoding="utf-8")
        config = () if name == "pyproject.toml" else ("--config", name)
        return spath_eval_command("run", *config, *arguments)

    return call


def test_a_suite_file_says_what_is_run_and_the_record_says_so(suite, tiny_checkpoint):
    settings = 'domain = ["math"]\nsparsity = [0.1, 0.2]\nno-controls = true\nlimit = 4\noutput = "out.json"'
    outcome = suite(settings, "--sparsity", "0.3")
    assert outcome.status == 0
    assert ids(outcome) == ["tiny/math/negative@0.3"]
    assert outcome.err.startswith("suite: ci/suite.toml\n")
    assert outcome.record_path == Path("ci/out.json")
    command = outcome.record["command"]
    assert command["given"] == ["--config", "ci/suite.toml", "--sparsity", "0.3"]
    ((path, kept),) = [tuple(entry.values()) for entry in command["suites"]]
    assert (path, kept["sparsity"], kept["limit"]) == ("ci/suite.toml", [0.1, 0.2], 4)
    assert command["resolved"]["sparsities"] == [0.3]
    assert command["resolved"]["models"] == [str(tiny_checkpoint)]
    assert command["resolved"]["plugin"] == {"no_controls": True}


def test_a_projects_table_is_used_and_each_key_overridden(suite):
    head = "[tool.spath-eval]\n"
    settings = 'strategy = ["negative", "wanda"]\ndomain = "math,code"\nno-controls = true\ncross = true'
    whole = suite(settings, "--collect-only", head=head, name="pyproject.toml")
    assert whole.err == "suite: pyproject.toml\n"
    assert len(whole.out.splitlines()) == 2 * 2 * 2 + 2 * 2
    less = suite(settings, "--collect-only", "--no-cross", "--domain", "math", head=head, name="pyproject.toml")
    assert less.out.splitlines() == ["tiny/math/negative@0.15", "tiny/math/wanda@0.15"]
    more = suite(
        "no-controls = true", "--collect-only", "--controls", "--domain", "math", head=head, name="pyproject.toml"
    )
    assert more.out.splitlines() == ["tiny/math/negative@0.15", "tiny/math/random@0.15"]


def test_a_suite_may_name_tasks_of_domains_that_are_left_out(suite):
    settings = '[tasks]\nmath = ["spath_math_choice"]\ncode = ["spath_code_choice"]\n[limit]\nspath_math = 2'
    outcome = suite(settings, "--domain", "math")
    assert outcome.status == 0
    assert outcome.record["command"]["resolved"]["tasks"] == {"math": ["spath_math_choice"]}
    assert {entry["documents"] for entry in outcome.record["tasks"]} == {2}
    asked = suite(settings, "--domain", "math", "--tasks", "code=spath_code_choice")
    assert asked.status == 4
    assert "unknown domain 'code'" in asked.err


def test_a_mask_takes_the_place_of_what_a_suite_says_of_strategies(suite, spath_eval_command, tiny_checkpoint, brief):
    options = ["--model", tiny_checkpoint, *brief[:2], *brief[4:6], *brief[-2:]]
    assert spath_eval_command("mask", *options, "-o", "mask.safetensors").status == 0
    settings = 'strategy = ["negative", "wanda"]\nsparsity = [0.1, 0.2]\nexpert-sparsity = 0.5\ndomain = "math"'
    outcome = suite(settings, "--mask", "mask.safetensors", "--collect-only", "--no-controls")
    assert re.fullmatch(r"tiny/math/mask:file=mask.safetensors@0\.1\d+\n", outcome.out)
    both = suite('mask = "../mask.safetensors"\nsparsity = 0.1')
    assert (both.status, both.out) == (4, "")
    assert both.err.splitlines()[-1] == "error: --mask takes the place of --sparsity: give one of them"


def test_what_is_wrong_in_a_suite_is_refused(suite, loads):
    refused(suite("sparcity = 0.1"), "ci/suite.toml: unknown key 'sparcity': did you mean sparsity?")
    refused(suite('seed = "one"'), "ci/suite.toml: seed is 'one': expected an integer")
    refused(suite("num-fewshot = -1"), "ci/suite.toml: ", "--num-fewshot")
    assert loads == []


def test_margins_decide_wherever_they_are_given(suite):
    settings = 'domain = "math"\nlimit = 4\nno-controls = true\n'
    assert suite(settings, "-o", "before.json").status == 0
    margins = 'baseline = "../before.json"\n[fail-on]\nperplexity = "1%"'
    held = suite(settings + margins)
    assert held.status == 0
    assert "held" in held.out
    assert held.record["command"]["baseline"] == "ci/../before.json"
    assert held.record["command"]["fail_on"] == ["perplexity:1%"]
    other = suite(settings + margins, "--fail-on", "speed:10%", "-o", "other.json")
    assert other.status == 1
    assert "speed:10%: no row to judge it by" in other.out


def test_margins_that_cannot_be_judged_are_refused_before_the_run(run, loads):
    refused(run("--fail-on", "retention:2%"), "--fail-on", "--baseline")
    for margins in (["retention:two"], ["speed:5%", "speed:6%"]):
        options = [part for margin in margins for part in ("--fail-on", margin)]
        refused(run("--baseline", "missing.json", *options), "--fail-on")
    assert loads == []
