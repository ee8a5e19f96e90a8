"""Suite files: every natural form of an option, and one clear line for what is wrong in one."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

from spath_eval.cli.run import command
from spath_eval.contracts import UsageError
from spath_eval.suite import NO_KEYS, Suite, key_of

ROOT = Path(__file__).resolve().parents[1]


def suite(text, folder="ci"):
    return Suite(tomllib.loads(text), "suite.toml", Path(folder))


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ('model = "org/name"', "models", ("org/name",)),
        ('model = ["org/one", "org/two"]', "models", ("org/one", "org/two")),
        ('domain = "math"', "domain", "math"),
        ('domain = ["math", "code"]', "domain", "math,code"),
        ('strategy = ["negative", "negative:pool=model"]', "strategy", "negative,negative:pool=model"),
        ("sparsity = 0.3", "sparsity", "0.3"),
        ("sparsity = [0.05, 0.15]", "sparsity", "0.05,0.15"),
        ('sparsity = "0.05,0.15"', "sparsity", "0.05,0.15"),
        ("expert-sparsity = 0.25", "expert_sparsity", "0.25"),
        ("limit = 5", "limit", "5"),
        ('limit = [50, "gsm8k=5"]', "limit", "50,gsm8k=5"),
        ("[limit]\ngsm8k = 5\nmmlu = 2", "limit", "gsm8k=5,mmlu=2"),
        ('tasks = ["gsm8k", "arc_easy"]', "tasks", "gsm8k,arc_easy"),
        ('[tasks]\nmath = ["gsm8k", "arc_easy"]\ncode = "mbpp"', "tasks", "math=gsm8k+arc_easy,code=mbpp"),
        ('fail-on = ["retention:2%"]', "fail_on", ("retention:2%",)),
        ('[fail_on]\nretention = "2%"\nspeed.decode = "10%"', "fail_on", ("retention:2%", "speed.decode:10%")),
        ("batch-size = 4", "batch_size", 4),
        ("batch_size = 4", "batch_size", 4),
        ('execution = "masked"', "execution", "masked"),
        ('keyword = "math and negative"', "keyword", "math and negative"),
        ("no-speed = true", "no_speed", True),
        ("no-speed = false", "no_speed", False),
        ("no-controls = true", "no_controls", True),
        ('plugins = "no:wanda"', "plugin_names", ("no:wanda",)),
        ('mask = "a/mask.safetensors"', "mask", Path("ci/a/mask.safetensors")),
        ('mask = "/a/mask.safetensors"', "mask", Path("/a/mask.safetensors")),
        ('include-path = ["a", "../b"]', "include_path", (Path("ci/a"), Path("ci/../b"))),
        ('[profile-text]\nmath = "texts"', "profile_text", ("math=ci/texts",)),
        (
            'profile-text = ["math=/texts", "code=hub:a:train:text"]',
            "profile_text",
            ("math=/texts", "code=hub:a:train:text"),
        ),
    ],
)
def test_an_option_is_what_the_command_line_would_make_of_it(text, name, value):
    context = command.with_suites([suite(text)])
    assert context.params[name] == value


def test_what_a_suite_leaves_open_is_as_without_one():
    assert command.with_suites([suite("")]).params == command.with_suites([]).params


def test_every_option_of_run_has_a_key_or_is_for_one_call():
    context = command.with_suites([])
    options = [one for one in context.command.params if isinstance(one, click.Option)]
    keys = [key_of(one) for one in options if one.name not in NO_KEYS and one.expose_value]
    assert len(set(keys)) == len(keys)
    assert {"model", "domain", "strategy", "sparsity", "tasks", "baseline", "fail_on", "plugins", "keyword"} <= set(
        keys
    )
    assert {one.name for one in options} >= NO_KEYS


def test_a_model_is_a_path_where_there_is_one_beside_the_suite(tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    models = 'model = ["org/name", "org/other", "./missing", "missing.gguf"]'
    found = command.with_suites([suite(models, tmp_path)]).params["models"]
    assert found == (f"{tmp_path}/org/name", "org/other", f"{tmp_path}/missing", f"{tmp_path}/missing.gguf")


def test_a_later_suite_overrides_an_earlier_one_key_by_key():
    first, second = suite('domain = "math"\nsparsity = [0.1, 0.2]'), suite("sparsity = 0.3")
    params = command.with_suites([first, second]).params
    assert (params["domain"], params["sparsity"]) == ("math", "0.3")
    assert command.with_suites([first, second], ["--sparsity", "0.4"]).params["sparsity"] == "0.4"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparcity = 0.1", "suite.toml: unknown key 'sparcity': did you mean sparsity?"),
        ("Domain-s = 1", "suite.toml: unknown key 'Domain-s': did you mean domain?"),
        ("no-control = true", "suite.toml: unknown key 'no-control': did you mean no_controls?"),
        ("collect-only = true", "suite.toml: unknown key 'collect-only': "),
        ("config = 'other.toml'", "suite.toml: unknown key 'config': "),
        ("zzz = 1", "suite.toml: unknown key 'zzz': there are allow_code_execution, "),
        ("[tool.spath-eval]\nseed = 1", "suite.toml: unknown key 'tool': "),
        ("no-speed = true\nno_speed = true", "suite.toml: no_speed comes twice, with a dash and with an underscore"),
        ("domain = 3", "suite.toml: domain is 3: expected text or a list"),
        ("domain = ['math', 3]", "suite.toml: domain is ['math', 3]: expected text or a list"),
        ("seed = '1'", "suite.toml: seed is '1': expected an integer"),
        ("seed = 1.5", "suite.toml: seed is 1.5: expected an integer"),
        ("seed = true", "suite.toml: seed is True: expected an integer"),
        ("seed = [1]", "suite.toml: seed is [1]: expected an integer"),
        ("no-speed = 1", "suite.toml: no_speed is 1: expected true or false"),
        ("no-controls = 'yes'", "suite.toml: no_controls is 'yes': expected true or false"),
        ("sparsity = true", "suite.toml: sparsity is True: expected a number or text or a list"),
        ("execution = ['compact']", "suite.toml: execution is ['compact']: expected text"),
        ("output = 2024-01-01", "suite.toml: output is datetime.date(2024, 1, 1): expected text"),
        ("tasks = {math = 3.5}", "suite.toml: tasks is {'math': 3.5}: expected text or a list or a table"),
        ("plugins = [1]", "suite.toml: plugins is [1]: expected text or a list"),
        ("batch-size = 0", "suite.toml: Invalid value for '--batch-size': 0 is not in the range x>=1."),
        ("execution = 'compct'", "suite.toml: Invalid value for '--execution': 'compct' is not one of "),
    ],
)
def test_what_is_wrong_is_said_with_the_file_and_the_key(text, message):
    with pytest.raises(UsageError) as error:
        command.with_suites([suite(text)])
    assert str(error.value).startswith(message)


def test_a_choice_that_there_is_not_gets_the_nearest():
    with pytest.raises(UsageError, match=r"Did you mean compact\?$"):
        command.with_suites([suite("execution = 'compct'")])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.toml", None, "cannot read missing.toml: No such file or directory"),
        ("suite.toml", b"domain = ", "suite.toml is not TOML: "),
        ("suite.toml", b"\xff", "suite.toml is not TOML: "),
        ("pyproject.toml", b"[tool.ruff]", "pyproject.toml has no table [tool.spath-eval]"),
        ("pyproject.toml", b"[tool]\nspath-eval = 3", "pyproject.toml: tool.spath-eval is 3: expected a table"),
    ],
)
def test_a_file_that_is_no_suite_is_refused(work_folder, name, content, message):
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(UsageError) as error:
        Suite.read(Path(name))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("content", "settings"),
    [
        (None, None),
        ("[tool.ruff]\nline-length = 100", None),
        ('[project]\ndependencies = ["spath-eval"]', None),
        ("this is no TOML", None),
        ("[tool.spath-eval]\nsparsity = 0.3", {"sparsity": 0.3}),
        ("[tool.spath-eval]", {}),
    ],
)
def test_the_table_of_a_project_is_found_where_there_is_one(work_folder, content, settings):
    if content is not None:
        Path("pyproject.toml").write_text(content, encoding="utf-8")
    found = Suite.find()
    assert (found and found.settings) == settings


def test_the_suites_of_the_docs_are_right():
    page = (ROOT / "docs" / "teams.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```toml\n(.+?)```", page, flags=re.DOTALL)
    assert len(blocks) == 2
    params = command.with_suites([suite("\n".join([blocks[1].partition("\n")[0], blocks[0]])), suite(blocks[1])]).params
    assert params["limit"] == "spath_math_choice=40,spath_math_generate=20"
    assert params["fail_on"] == ("retention:5%", "perplexity:1%")


def test_the_commands_of_the_docs_run(spath_eval_command, work_folder):
    page = (ROOT / "docs" / "teams.md").read_text(encoding="utf-8")
    (work_folder / "suite.toml").write_text(re.search(r"```toml\n(.+?)```", page, flags=re.DOTALL)[1], encoding="utf-8")
    listed, measured = (
        spath_eval_command(*shlex.split(line)[1:]) for line in re.findall(r"^\$ (.+)$", page, flags=re.MULTILINE)
    )
    assert (listed.status, measured.status) == (0, 0), listed.err + measured.err
    assert len(listed.out.splitlines()) == 2 * 2 * (2 + 1)
    assert {entry["documents"] for entry in measured.record["tasks"]} == {40, 20}
