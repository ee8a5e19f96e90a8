"""Markdown, LaTeX, CSV, JSON and JUnit: the same record, whole and escaped for whoever reads it."""

import csv
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from spath_eval import records
from spath_eval.reports import latex, markdown
from spath_eval.reports.console import ConsoleReport
from spath_eval.reports.csv import COLUMNS, CsvReport
from spath_eval.reports.json import JsonReport
from spath_eval.reports.junit import JunitReport
from spath_eval.reports.latex import LatexReport
from spath_eval.reports.markdown import MarkdownReport

HOSTILE = "a|b [x](javascript:alert(1)) <b>*c*_d_`e` $f$ &amp; #1 \\g {h} % ~ ^ \x1b[31m\n# i"


@pytest.fixture
def example():
    return records.read(Path(__file__).parents[1] / "data" / "record.json")


@pytest.mark.parametrize("report", [MarkdownReport(), LatexReport()])
def test_no_figure_of_the_console_report_is_dropped(example, report):
    text = report.render(example).replace("$-$", "-")
    figures = re.findall(r"[<+-]?\d+\.\d+", ConsoleReport().render(example, width=1000))
    assert len(figures) > 100
    for figure in figures:
        escaped = {"md": figure.replace("<", r"\<"), "latex": figure.replace("<", r"\textless{}")}[report.name]
        assert escaped in text


def test_markdown_reads_as_agreed(example):
    lines = MarkdownReport().render(example).splitlines()
    assert lines[0] == "# spath-eval: gemma"
    assert lines[2].startswith("> gemma, over 3 cases without controls: mean retention 0.63")
    start = lines.index("## Quality of gemma")
    assert lines[start + 2 : start + 6] == [
        "| task | n | dense | sparse | difference [95%] | p | retention [95%] | lost/gained |",
        "| :-- | --: | --: | --: | --: | --: | --: | --: |",
        "| **math/negative@0.15 sparsity 0.149 of 0.15 requested** |  |  |  |  |  |  |  |",
        "| choice | 300 | 0.853 | 0.843 | -0.010 [-0.023, +0.000] | 0.250 | 0.98 [0.96, 1.00] | 3/0 |",
    ]
    assert "(1) dense 0.010 is not above chance 0.000 by two standard errors (0.012)" in lines
    assert "| command | spath-eval run --arch gemma --strategy negative --domain math,language |" in lines
    assert lines[-1] == "</details>"


def test_every_row_of_a_markdown_table_has_as_many_cells_as_its_header(example):
    example["cases"][3]["message"] = HOSTILE
    text = MarkdownReport().render(example)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 3 + 8
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_markdown_takes_nothing_of_a_record_for_markup():
    parser = pytest.importorskip("markdown_it", reason="needs markdown-it-py").MarkdownIt("commonmark").enable("table")
    (inline,) = [token for token in parser.parse(markdown.escaped(HOSTILE)) if token.type == "inline"]
    assert {token.type for token in inline.children} <= {"text", "text_special"}
    assert "".join(token.content for token in inline.children) == " ".join(HOSTILE.split())
    plain = "spath_math_choice 0.98 [0.96, 1.00] (1) gemma/math>code/negative:pool=model@0.15[masked]"
    assert markdown.escaped(plain) == plain.replace(">", r"\>")


def test_latex_reads_as_agreed(example):
    lines = LatexReport().render(example).splitlines()
    start = lines.index(r"\caption{Quality of gemma}")
    assert lines[start - 2 : start + 7] == [
        r"\begin{table}[htbp]",
        r"\centering\footnotesize",
        r"\caption{Quality of gemma}",
        r"\begin{tabular}{@{}lrrrrrrr@{}}",
        r"\toprule",
        r"task & n & dense & sparse & difference [95\%] & p & retention [95\%] & lost/gained \\",
        r"\midrule",
        r"\multicolumn{8}{@{}l@{}}{\textit{math/negative@0.15 sparsity 0.149 of 0.15 requested}} \\",
        r"choice & 300 & 0.853 & 0.843 & $-$0.010 [$-$0.023, +0.000] & 0.250 & 0.98 [0.96, 1.00] & 3/0 \\",
    ]
    for kind in ("table", "tabular"):
        assert lines.count(rf"\end{{{kind}}}") == sum(line.startswith(rf"\begin{{{kind}}}") for line in lines) == 3
    for line in lines:
        if line.endswith(r"\\") and "multicolumn" not in line:
            assert line.count("&") in (7, 2)


def test_latex_takes_nothing_of_a_record_for_a_command(example):
    assert latex.escaped(r"50% of a_b & #1 {x} \y ~ ^ <z> $|") == (
        r"50\% of a\_b \& \#1 \{x\} \textbackslash{}y \textasciitilde{} \textasciicircum{} "
        r"\textless{}z\textgreater{} \$\textbar{}"
    )
    assert latex.escaped("-0.5 [-1, 2] top-1 a-2") == "$-$0.5 [$-$1, 2] top-1 a-2"
    assert latex.escaped("a\x1b\x00b\n\nc") == "ab c"
    for case in example["cases"]:
        case["strategy"]["control"] = False
    rows = [line for line in LatexReport().render(example).splitlines() if line.endswith(r"\\")]
    assert not any(line.startswith(("[", "*")) for line in rows)


def rows(record):
    return list(csv.DictReader(io.StringIO(CsvReport().render(record))))


def test_csv_has_a_row_for_each_score_preservation_and_timing(example):
    found = rows(example)
    cases = example["cases"]
    assert list(found[0]) == COLUMNS
    assert [row["kind"] for row in found].count("quality") == sum(len(case.get("quality", [])) for case in cases) == 6
    assert [row["kind"] for row in found].count("preservation") == 3
    assert [row["kind"] for row in found].count("speed") == 8
    last = found[-1]
    assert (last["kind"], last["case"], last["outcome"]) == ("case", "gemma/language/random@0.15", "failed")
    assert last["message"].startswith("mask not applied")


def test_csv_figures_are_those_of_the_record_in_full(example):
    case = example["cases"][0]
    quality = next(row for row in rows(example) if row["task"] == "spath_math_generate")
    entry = case["quality"][1]
    assert float(quality["dense"]) == entry["dense"]["value"]
    assert float(quality["sparse_stderr"]) == entry["sparse"]["stderr"]
    assert [float(quality[f"difference_{end}"]) for end in ("low", "high")] == entry["difference"]["ci95"]
    assert float(quality["retention"]) == entry["retention"]["value"]
    assert (quality["n"], quality["lost"], quality["gained"]) == ("300", "5", "4")
    assert json.loads(quality["options"]) == {"pool": "layer"}
    kept = next(row for row in rows(example) if row["kind"] == "preservation")
    assert [float(kept[name]) for name in ("ratio", "ratio_low", "cosine")] == [1.0313, 1.0242, 0.9931]
    timing = next(row for row in rows(example) if row["kind"] == "speed" and row["metric"] == "decode")
    measured = case["speed"][0]["decode"]
    assert (timing["task"], timing["n"], timing["batch"]) == ("model", "7", "1")
    assert float(timing["dense"]) == sorted(measured["dense_seconds"])[3]
    assert [float(timing[name]) for name in ("ratio", "ceiling")] == [measured["ratio"], measured["ceiling"]]


def test_csv_says_why_a_figure_is_missing_and_holds_no_formula(example):
    undefined = [row for row in rows(example) if row["kind"] == "quality" and not row["retention"]]
    assert [row["reason"] for row in undefined] == [
        "dense 0.010 is not above chance 0.000 by two standard errors (0.012)"
    ]
    example["cases"][3]["message"] = '=HYPERLINK("x")\nnext'
    assert rows(example)[-1]["message"] == '\'=HYPERLINK("x") next'


def test_json_is_the_record_with_what_is_derived_from_it(example):
    flips = {"flips": None, "flips_reason": "there is no samples file"}
    found = json.loads(JsonReport().render(example | flips))
    records.validate(found)
    derived = found.pop("derived")
    assert found == example
    assert list(derived["verdicts"]) == ["gemma"]
    # the mean of both tasks, and an interval of which the halves are the roots of the tasks' summed squares
    estimate = derived["mean_retention"]["gemma/math/negative@0.15"]
    assert estimate["value"] == pytest.approx((0.983425 + 0.994737) / 2)
    below = ((0.983425 - 0.962162) ** 2 + (0.994737 - 0.963629) ** 2) ** 0.5 / 2
    assert estimate["ci95"][0] == pytest.approx(estimate["value"] - below)
    assert derived["speed"]["gemma/math/negative@0.15"]["decode"] == {
        "says": "faster",
        "share_of_gain": pytest.approx(0.02061 / 0.064),
    }
    assert {key: derived[key] for key in flips} == flips


def test_the_report_of_a_json_report_is_the_same(example):
    text = JsonReport().render(example)
    assert JsonReport().render(json.loads(text)) == text
    assert ConsoleReport().render(json.loads(text)) == ConsoleReport().render(example)


def test_junit_has_a_test_for_each_case(example):
    example["cases"][1].update(outcome="error", message="crashed:\n\x00 why")
    example["cases"][2].update(outcome="skipped", message="no such domain")
    root = ElementTree.fromstring(JunitReport().render(example).partition("?>")[2])
    (suite,) = root
    for counted in (root, suite):
        assert [counted.get(name) for name in ("tests", "failures", "errors", "skipped")] == ["4", "1", "1", "1"]
    assert [(test.get("classname"), test.get("name")) for test in suite] == [
        ("gemma", "math/negative@0.15"),
        ("gemma", "math/random@0.15"),
        ("gemma", "language/negative@0.15"),
        ("gemma", "language/random@0.15"),
    ]
    assert [test[0].tag for test in suite] == ["system-out", "error", "skipped", "failure"]
    assert "retention 0.99 [0.97, 1.01]" in suite[0][0].text
    assert suite[1][0].get("message") == "crashed: \N{REPLACEMENT CHARACTER} why"
    assert suite[3][0].get("message").startswith("mask not applied")
    assert suite[0].get("time") == "3.200"


@pytest.mark.parametrize("report", [MarkdownReport(), LatexReport(), CsvReport(), JsonReport(), JunitReport()])
def test_a_record_with_nothing_in_it_makes_a_report(report):
    assert report.render({"version": 1, "status": "interrupted"}).endswith("\n")
