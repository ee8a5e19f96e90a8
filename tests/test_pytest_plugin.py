"""The pytest plugin as a team meets it: tests of theirs, run by a pytest of their own."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from xml.etree import ElementTree

import pytest

from spath_eval import records

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "lm_eval", "numpy", "pandas", "scipy", "datasets", "click")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache that the tests share. Beforehand all is imported that a run needs: `pytester` takes out of `sys.modules`
    what is imported after it was set up, and pyarrow cannot be imported twice."""
    importlib.import_module("spath_eval.session")
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def team(cache, tiny_checkpoint, pytester, short_text, monkeypatch):
    """Makes a test file of a source, whose tests run on the tiny checkpoint, and runs it in this process."""
    monkeypatch.setenv("SPATH_CACHE_DIR", str(cache))
    head = f"""
        import pytest
        from pathlib import Path
        from spath_eval import UsageError
        import spath_eval.models

        pytestmark = pytest.mark.spath(
            model=Path({str(tiny_checkpoint)!r}), domain="math", limit=4, profile_tokens=600, preservation_tokens=300,
            batch_size=8, no_speed=True, profile_text={{"math": Path({str(short_text)!r})}}, no_controls=True,
        )
        load, loads = spath_eval.models.load, []
    """

    def run(source, *arguments):
        pytester.makepyfile(_dedented(head) + _dedented(source))
        return pytester.runpytest_inprocess("-p", "no:cacheprovider", *arguments)

    return run


def _dedented(source):
    return textwrap.dedent(source) + "\n"


def test_a_pytest_without_our_fixture_imports_nothing_heavy(tmp_path):
    (tmp_path / "test_empty.py").write_text("def test_nothing():\n    pass\n", encoding="utf-8")
    program = "\n".join(
        [
            "import sys, pytest",
            f"status = pytest.main(['--collect-only', '-q', {str(tmp_path)!r}])",
            "assert 'spath_eval.pytest_plugin' in sys.modules",
            f"print(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)",
            "sys.exit(status)",
        ]
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stderr.split() == []


def test_the_marker_and_the_option_are_documented_by_pytest_itself(pytester):
    assert "@pytest.mark.spath(**options): options of `spath.run`" in pytester.runpytest("--markers").stdout.str()
    assert "--spath-output=DIR" in pytester.runpytest("--help").stdout.str()


def test_figures_come_from_the_record_and_a_model_is_loaded_once(team):
    result = team(
        """
        @pytest.fixture(autouse=True)
        def counted(monkeypatch):
            monkeypatch.setattr(spath_eval.models, "load", lambda request: loads.append(request) or load(request))

        def test_figures(spath):
            run = spath.run(strategy="negative", sparsity=0.15)
            case, (entry,) = run["math"], run.record["cases"]
            assert list(run) == ["math"] and len(run) == 1 and "code" not in run
            assert case is run["tiny/math/negative@0.15"] is run["negative", 0.15, "math"]
            assert (case.id, case.outcome, case.message) == ("tiny/math/negative@0.15", "passed", "")
            assert case.record == entry
            ratio, found = case.perplexity_ratio, entry["preservation"]["perplexity"]
            assert [ratio.value, ratio.lower, ratio.upper] == [found["ratio"], *found["ci95"]]
            assert run.path.is_file() and run.path.with_suffix(".samples.jsonl").is_file()

        def test_equal_calls_are_one_run(spath):
            run = spath.run(strategy="negative")
            assert run is spath.run(**{"strategy": ["negative"], "sparsity": "0.15"}) is spath.run(limit="4")
            assert run is not spath.run(limit=3)
            assert len(loads) == 1

        @pytest.mark.spath(sparsity=0.3)
        def test_the_closest_marker_counts(spath):
            assert list(spath.run().cases) == ["tiny/math/negative@0.3"]
            assert list(spath.run(sparsity=0.2).cases) == ["tiny/math/negative@0.2"]

        def test_models_are_let_go_of(spath):
            spath.forget()
            spath.run(seed=1)
            assert len(loads) == 2
        """
    )
    result.assert_outcomes(passed=4)


def test_a_kept_model_gives_what_a_fresh_one_gives(team):
    result = team(
        """
        def scores(run):
            return [(case["quality"], case["preservation"], case["mask"]) for case in run.record["cases"]]

        def test_again(spath):
            strategies = ["negative", "random", "teal"]
            first = spath.run(strategy=strategies, sparsity=0.3, preservation_tokens=301)
            spath.run(strategy=strategies, sparsity=0.5, execution="masked")
            other = first.path.with_name("other.json")
            again = spath.run(strategy=strategies, sparsity=0.3, preservation_tokens=301, output=other)
            assert again is not first and again.path == other
            assert scores(again) == scores(first)
            assert again.record["models"] == first.record["models"]
        """
    )
    result.assert_outcomes(passed=1)


def test_a_failure_shows_the_table_and_the_flips(team, pytester):
    result = team(
        """
        def test_it_keeps_everything(spath):
            assert spath.run(strategy="reverse", sparsity=0.9, limit=30)["math"].perplexity_ratio.upper < 0.5

        def test_another(spath):
            pass
        """,
        "--junit-xml=out.xml",
    )
    result.assert_outcomes(passed=1, failed=1)
    text = result.stdout.str()
    assert re.search(
        r"^E +\+  where [\d.]+ = <perplexity ratio of tiny/math/reverse@0.9: [\d.]+ \[.*\]>.upper", text, re.M
    )
    assert re.search(r"^-+ spath-eval: /\S+\.json -+$", text, re.MULTILINE)
    assert "Quality of tiny" in text
    assert re.search(r"^tiny/math/reverse@0.9 spath_math_choice acc\w*: \d+ lost, \d+ gained$", text, re.MULTILINE)
    assert re.search(
        r"^    prompt: .+\n(.+\n)*?    target: .+\n(.+\n)*?    dense: .+\n(.+\n)*?    sparse: ", text, re.M
    )
    failed, passed = ElementTree.parse(pytester.path / "out.xml").getroot().iter("testcase")
    assert "Quality of tiny" in (failed.find("failure").text or "")
    properties = {one.get("name"): one.get("value") for one in failed.iter("property")}
    assert re.fullmatch(r"[\d.]+ \[[\d.]+, [\d.]+\]", properties["tiny/math/reverse@0.9 perplexity ratio"])
    assert Path(properties["spath record"]).is_file()
    assert list(passed.iter("property")) == []


def test_no_figure_comes_from_a_case_that_failed_a_gate(team, monkeypatch):
    from spath_eval import session
    from spath_eval.pathways import GateError

    def fail(*arguments):
        raise GateError("compact is not masked")

    monkeypatch.setattr(session, "check_parity", fail)
    result = team(
        """
        @pytest.mark.parametrize("figure", ["retention", "perplexity_ratio", "speed"])
        def test_figures(spath, figure):
            case = spath.run(seed=2)["math"]
            assert (case.outcome, case.message) == ("failed", "compact is not masked")
            getattr(case, figure)
        """
    )
    result.assert_outcomes(failed=3)
    assert result.stdout.str().count("Failed: tiny/math/negative@0.15 failed: compact is not masked") >= 3


def test_what_is_not_defined_fails_with_the_reason(team):
    result = team(
        """
        def test_speed(spath):
            spath.run()["math"].speed["decode"]

        def test_retention(spath):
            spath.run(no_quality=True)["math"].retention.lower
        """
    )
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        [
            "E * Failed: there is no speed of decode: not asked for",
            "E * Failed: retention of tiny/math/negative@0.15 is not defined: not asked for",
        ]
    )


def test_what_names_no_case_or_several_says_which_there_are(team):
    result = team(
        """
        def test_keys(spath):
            run = spath.run(strategy=["negative", "negative:pool=model"], sparsity=[0.1, 0.2], no_controls=False)
            assert len(run.cases) == 6 and list(run) == ["math"]
            with pytest.raises(KeyError, match=r"'math' names several cases: .*'tiny/math/negative:pool=model@0.2'"):
                run["math"]
            with pytest.raises(KeyError, match="names several cases"):
                run["negative", 0.1, "math"]
            with pytest.raises(KeyError, match="'maths' names no case: there are 'tiny/math/negative@0.1', "):
                run["maths"]
            assert run["negative:pool=model", 0.1, "math"].id == "tiny/math/negative:pool=model@0.1"
            assert run["tiny/math/random@0.2"].outcome == "passed"

        def test_a_control_does_not_count_unless_it_was_asked_for(spath):
            assert spath.run(no_controls=False)["math"].id == "tiny/math/negative@0.15"
            assert spath.run(strategy="random")["math"].id == "tiny/math/random@0.15"

        @pytest.mark.parametrize(
            ("option", "value", "message"),
            [
                ("sparcity", 0.1, "spath.run: unknown key 'sparcity': did you mean sparsity?"),
                ("limit", True, "spath.run: limit is True: expected a number or text"),
                ("seed", -1, "spath.run: Invalid value for '--seed': -1"),
                ("strategy", "negativ", "Did you mean negative?"),
                ("keyword", "x", "no cases selected"),
            ],
        )
        def test_mistakes(spath, option, value, message):
            with pytest.raises(UsageError) as error:
                spath.run(**{option: value})
            assert message in str(error.value)
        """
    )
    result.assert_outcomes(passed=7)


def test_a_suite_file_a_baseline_and_a_changed_file(team, pytester, short_text):
    (pytester.path / "suite.toml").write_text('sparsity = 0.3\nseed = 3\nplugins = ["no:cats"]', encoding="utf-8")
    (pytester.path / "text.txt").write_text(short_text.read_text(encoding="utf-8"), encoding="utf-8")
    result = team(
        """
        def test_suite(spath):
            record = spath.run(config="suite.toml", seed=4).record
            assert record["command"]["resolved"]["sparsities"] == [0.3] and record["seed"] == 4
            assert "cats" not in [plugin["name"] for plugin in record["plugins"]]
            paths = [entry.get("path") for entry in record["command"]["suites"]]
            assert paths == [str(Path("suite.toml").resolve()), None]

        def test_baseline_held(spath):
            before = spath.run().path
            assert spath.run(baseline=before, fail_on={"perplexity": "1%"})["math"].outcome == "passed"

        def test_baseline_broken(spath):
            before = spath.run(strategy="keep-all").path
            text = before.read_text()
            Path("before.json").write_text(text.replace("keep-all", "reverse"))
            before.with_suffix(".samples.jsonl").rename("before.samples.jsonl")
            spath.run(strategy="reverse", sparsity=0.9, baseline="before.json", fail_on=["speed:5%"])

        def test_another_text_is_another_run(spath):
            first = spath.run(profile_text={"math": "text.txt"})
            assert spath.run(profile_text={"math": "text.txt"}) is first
            Path("text.txt").write_text(Path("text.txt").read_text() + "\\n\\nAnother line of it.")
            assert spath.run(profile_text={"math": "text.txt"}) is not first
        """,
        "--spath-output=kept",
    )
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(["E * Failed: worse than the baseline", "*speed:5%: no row to judge it by*"])
    for path in (pytester.path / "kept").glob("*negative*.json"):
        records.validate(json.loads(path.read_text(encoding="utf-8")))


def test_a_run_leaves_the_tests_as_they_were(team):
    result = team(
        """
        import logging, os, random

        def test_undisturbed(spath):
            random.seed(1)
            before = random.getstate(), dict(os.environ), os.getcwd(), logging.getLogger("transformers").level
            spath.run(seed=7)
            assert before == (
                random.getstate(), dict(os.environ), os.getcwd(), logging.getLogger("transformers").level
            )
        """,
        "-W",
        "error",
    )
    result.assert_outcomes(passed=1)


def test_workers_of_xdist_have_sessions_of_their_own(team, pytester, monkeypatch):
    pytest.importorskip("xdist")
    source = """
        @pytest.mark.parametrize("seed", [5, 6])
        def test_it(spath, seed):
            assert spath.run(seed=seed)["math"].perplexity_ratio.upper < 0.1
    """
    monkeypatch.setattr(pytester, "runpytest_inprocess", pytester.runpytest_subprocess)
    result = team(source, "-n", "1", "--spath-output=kept", "--junit-xml=out.xml")
    result.assert_outcomes(failed=2)
    assert result.stdout.str().count("Output preservation of tiny") == 2
    names = sorted(path.name for path in (pytester.path / "kept").glob("*.json"))
    assert [re.sub(r"^\d{8}T\d{6}-", "", name) for name in names] == [
        "tiny-negative-gw0-1.json",
        "tiny-negative-gw0-2.json",
    ]
    cases = list(ElementTree.parse(pytester.path / "out.xml").getroot().iter("testcase"))
    assert all(case.find("properties") is not None for case in cases)


def test_the_example_of_the_docs_passes(cache, pytester, monkeypatch):
    monkeypatch.setenv("SPATH_CACHE_DIR", str(cache))
    page = (ROOT / "docs" / "teams.md").read_text(encoding="utf-8")
    pytester.makepyfile(re.search(r"```python\n(.+?)```", page, flags=re.DOTALL)[1])
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=1)
