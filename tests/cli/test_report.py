"""`spath-eval show` and `spath-eval report`: a record told again, on stdout or in a file."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import pytest

from spath_eval import records
from spath_eval.cli import main
from spath_eval.reports.console import ConsoleReport
from spath_eval.reports.html import HtmlReport

EXAMPLE = Path(__file__).parents[1] / "data" / "record.json"


@pytest.fixture
def record(tmp_path):
    """The example record, where nothing else is."""
    return Path(shutil.copy(EXAMPLE, tmp_path / "record.json"))


def answered(case, number, said, right):
    return {
        "case": case,
        "task": "spath_math_generate",
        "doc_id": number,
        "doc_hash": str(number),
        "target": "4",
        "arguments": [["2 + 2 =", {"until": ["\n"]}]],
        "resps": [[said]],
        "filtered_resps": [said],
        "filter": "first-line",
        "exact_match": float(right),
    }


@pytest.fixture
def with_samples(record):
    """The same, with the samples of its first case beside it: one document was lost, with an answer that is no text."""
    content = records.read(record)
    case = content["cases"][0]
    rows = [answered("gemma/math/dense", 0, "4", True), answered(case["id"], 0, "<i>5\ud800", False)]
    content["cases"] = [case | {"samples": records.write_samples(rows, record.parent / "samples.jsonl")}]
    records.write(content, record)
    return record


def test_show_prints_what_the_run_printed(record, capsys):
    assert main(["show", str(record)]) == 0
    out, err = capsys.readouterr()
    assert out == ConsoleReport().render(records.read(record)) + "\n"
    assert err == ""


def test_show_is_as_wide_as_the_terminal_and_coloured_unless_told_not_to(record, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda fallback: os.terminal_size((72, 24)))
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(["show", str(record)])
    assert capsys.readouterr().out == ConsoleReport().render(records.read(record), width=72, colour=True) + "\n"
    monkeypatch.setenv("NO_COLOR", "1")
    main(["show", str(record)])
    assert capsys.readouterr().out == ConsoleReport().render(records.read(record), width=72) + "\n"


@pytest.mark.parametrize("name", ["html", "md", "csv", "latex", "json", "junit", "console"])
def test_a_report_is_the_same_on_stdout_and_in_a_file(record, capsys, name):
    assert main(["report", str(record), "--format", name]) == 0
    printed = capsys.readouterr().out
    output = record.with_name(f"report.{name}")
    assert main(["report", str(record), "--format", name, "-o", str(output)]) == 0
    out, err = capsys.readouterr()
    assert output.read_bytes().decode() == printed
    assert (out, err) == ("", f"report: {output}\n")
    assert sorted(file.name for file in record.parent.iterdir()) == sorted([record.name, output.name])


def test_documents_that_changed_come_from_the_samples_beside_the_record(with_samples, capsys):
    assert main(["report", str(with_samples), "--format", "json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["derived"]["flips"]["gemma/math/negative@0.15"]
    assert (found["lost"], found["gained"], len(found["documents"])) == (1, 0, 1)
    assert main(["report", str(with_samples), "--format", "html"]) == 0
    assert "&lt;i&gt;5\\ud800" in capsys.readouterr().out
    output = with_samples.with_name("report.html")
    assert main(["report", str(with_samples), "--format", "html", "--show-flips", "0", "-o", str(output)]) == 0
    page = output.read_text(encoding="utf-8")
    assert "The first 0 in document order." in page
    assert "&lt;i&gt;5" not in page


def test_a_record_without_its_samples_says_so(record, capsys):
    assert main(["report", str(record), "--format", "html"]) == 0
    assert "Not shown: there is no samples file math-negative.jsonl beside the record." in capsys.readouterr().out


def test_rows_can_be_read_by_a_program(record, capsys):
    assert main(["report", str(record), "--format", "csv"]) == 0
    assert len(list(csv.DictReader(capsys.readouterr().out.splitlines()))) == 6 + 3 + 8 + 1


def test_a_report_of_a_plugin_can_be_asked_for(record, capsys, sample_plugin):
    assert main(["report", str(record), "--format", "lines"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "passed gemma/math/negative@0.15"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "none.json"], "error: cannot read none.json: No such file or directory"),
        (["report", "none.json", "--format", "html"], "error: cannot read none.json: No such file or directory"),
        (["report", "RECORD", "--format", "htm"], "error: unknown report 'htm': there are console, csv, html, json, "),
        (["report", "RECORD"], "error: Missing option '--format'."),
        (["report", "RECORD", "--format", "md", "-o", "RECORD"], "RECORD is the record itself: name another file"),
        (["report", "RECORD", "--format", "md", "-o", "none/x.md"], "error: Could not open file 'none/x.md': No such"),
        (["report", "RECORD", "--format", "md", "--show-flips", "-1"], "error: Invalid value for '--show-flips'"),
    ],
)
def test_what_cannot_be_done_is_one_line(record, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(record.parent)
    before = record.read_bytes()
    assert main([argument.replace("RECORD", str(record)) for argument in arguments]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert message.replace("RECORD", str(record)) in err
    assert record.read_bytes() == before
    assert [file.name for file in record.parent.iterdir()] == [record.name]


def test_a_report_that_fails_leaves_the_file_as_it_was(record, monkeypatch):
    output = record.with_name("report.html")
    output.write_text("before", encoding="utf-8")

    def fail(*arguments, **options):
        raise RuntimeError("no page")

    monkeypatch.setattr(HtmlReport, "render", fail)
    assert main(["report", str(record), "--format", "html", "-o", str(output)]) == 3
    assert output.read_text(encoding="utf-8") == "before"
