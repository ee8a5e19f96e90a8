"""Colour is for terminals, and for nobody who sets NO_COLOR."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spath_eval import records
from spath_eval.cli import main
from spath_eval.cli.terminal import columns, has_colour

EXAMPLE = Path(__file__).parents[1] / "data" / "record.json"


class Stream:
    def __init__(self, terminal: bool) -> None:
        self.isatty = lambda: terminal


@pytest.mark.parametrize(
    ("terminal", "variable", "coloured"),
    [(True, None, True), (True, "", True), (True, "0", False), (True, "1", False), (False, None, False)],
)
def test_colour_is_for_a_terminal_without_no_color(monkeypatch, terminal, variable, coloured):
    monkeypatch.delenv("NO_COLOR", raising=False)
    if variable is not None:
        monkeypatch.setenv("NO_COLOR", variable)
    assert has_colour(Stream(terminal)) is coloured


@pytest.fixture
def failing(tmp_path):
    """A record in which another case fails than in the example."""
    record = records.read(EXAMPLE)
    record["cases"][0].update(outcome="failed", message="mask not applied")
    path = tmp_path / "failing.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    return path


@pytest.mark.parametrize("command", ["show", "compare"])
def test_what_failed_is_coloured_on_a_terminal_only(command, failing, capsys, monkeypatch):
    arguments = [command, *([str(EXAMPLE)] if command == "compare" else []), str(failing)]
    monkeypatch.delenv("NO_COLOR", raising=False)
    main(arguments)
    assert "\x1b[" not in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    main(arguments)
    assert "\x1b[31m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    main(arguments)
    assert "\x1b[" not in capsys.readouterr().out


def test_width_is_the_terminals_within_bounds(monkeypatch):
    assert columns() == columns(140) == 100
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    found = []
    for width in ("20", "80", "200"):
        monkeypatch.setenv("COLUMNS", width)
        found.append((columns(), columns(140)))
    assert found == [(60, 60), (80, 80), (100, 140)]
