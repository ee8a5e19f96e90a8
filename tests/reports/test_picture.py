"""The picture of speeds: what it draws, what it says, and that the same entries give the same file."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from spath_eval import UsageError
from spath_eval.reports.picture import check_picture, picture_files, speed_picture

matplotlib = pytest.importorskip("matplotlib", reason="pictures are drawn with matplotlib")

LAYER = "one layer of nano, random weights"


def timing(ratio: float, batch: int = 1, tokens: int = 64, **changes: Any) -> dict[str, Any]:
    shared = {"batch": batch, "tokens": tokens, "ceiling": ratio + 0.2}
    return {"ratio": ratio, "ci95": [ratio - 0.1, ratio + 0.05], **shared, **changes}


def entry(sparsity: float, subject: str = LAYER, **timings: Any) -> dict[str, Any]:
    about = {"subject": subject, "execution": "eager", "device": "cpu", "dtype": "float32"}
    return {**about, "sparsity": sparsity, "conditions": {"threads": 2}, **timings}


ENTRIES = [
    entry(sparsity, prefill=timing(1 + sparsity, batch), decode=timing(1 + 2 * sparsity, batch))
    for batch in (1, 8)
    for sparsity in (0.5, 0.3)
]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws entries, and returns the figure that was saved."""
    from matplotlib.figure import Figure

    saved: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *arguments, **options: saved.append(figure))

    def draw(entries):
        speed_picture(entries, tmp_path / "speed.png")
        return saved.pop()

    return draw


def panels(figure):
    """Axes by subject and phase."""
    return {(row.get_suptitle(), axes.get_title()): axes for row in figure.subfigs for axes in row.axes}


def lines(axes):
    """By colour and style, the points of each line of a panel that has a marker."""
    return {
        (line.get_color(), line.get_linestyle()): [tuple(map(float, point)) for point in line.get_xydata()]
        for line in axes.lines
        if line.get_marker() not in ("None", None, "|") and line.get_linestyle() != "None"
    }


def labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_ratios_and_ceilings_are_drawn_over_sparsity_for_each_phase_and_batch(drawn):
    found = panels(drawn(ENTRIES))
    assert list(found) == [("one layer of nano, random weights", phase) for phase in ("prefill", "decode")]
    decode = list(lines(found["one layer of nano, random weights", "decode"]).values())
    assert decode[1] == [(30, 1.6), (50, 2.0)]
    assert decode[0] == [(30, pytest.approx(1.8)), (50, pytest.approx(2.2))]
    assert len(decode) == 4


def test_all_ratios_and_ceilings_lie_within_the_axes(drawn):
    for axes in panels(drawn([*ENTRIES, entry(0.9, decode=timing(7.0))])).values():
        low, high = axes.get_ylim()
        assert low < 1 < 7.2 < high < 9
        assert axes.get_xlim()[1] > 90


def test_intervals_are_drawn(drawn):
    axes = panels(drawn([entry(0.5, decode=timing(1.5))]))["one layer of nano, random weights", "decode"]
    (bars,) = [one for one in axes.collections if one.get_segments()]
    assert bars.get_segments()[0].tolist() == [[50, pytest.approx(1.4)], [50, pytest.approx(1.55)]]


def test_axes_have_names_and_units_and_batches_a_legend(drawn):
    figure = drawn(ENTRIES)
    for axes in panels(figure).values():
        assert axes.get_xlabel() == "FFN neurons removed, %"
        assert axes.get_ylabel() == "dense time / sparse time"
        assert axes.get_xlim()[0] <= 0
    assert labels(figure) == ["batch 1, context 64", "batch 8, context 64", "ceiling"]
    assert figure.get_supxlabel().startswith("cpu, float32, threads: 2. ")


def test_ffns_alone_stand_beside_the_phase_that_their_tokens_are_of(drawn):
    alone = [entry(0.5, "FFN of one layer", ffn=timing(ratio, 8, tokens)) for ratio, tokens in ((1.9, 1), (1.5, 64))]
    figure = drawn([*alone, entry(0.5, "model", prefill=timing(1.2, 8), decode=timing(1.3, 8))])
    found = panels(figure)
    assert [name for name, _ in found] == ["FFN of one layer"] * 2 + ["the whole model"] * 2
    ratios = {place: [y for points in lines(axes).values() for _, y in points] for place, axes in found.items()}
    assert 1.9 in ratios["FFN of one layer", "decode, whatever the context"]
    assert 1.5 in ratios["FFN of one layer", "prefill"]
    assert labels(figure) == ["batch 8, context 64", "ceiling"]


def test_a_context_of_one_token_is_a_line_of_its_own(drawn):
    figure = drawn([entry(0.5, "model", decode=timing(1.3, tokens=tokens)) for tokens in (1, 64)])
    assert labels(figure) == ["batch 1, context 1", "batch 1, context 64", "ceiling"]
    figure = drawn([entry(0.5, "FFNs of the model", ffn=timing(1.3, tokens=1))])
    assert labels(figure) == ["batch 1, context 1", "ceiling"]
    assert [title for _, title in panels(figure)] == ["prefill", "decode"]


def test_lines_differ_in_colour_and_in_marker(drawn):
    entries = [entry(0.5, decode=timing(1.5, batch, tokens)) for batch in (1, 2, 4) for tokens in (64, 256)]
    figure = drawn(entries)
    handles = figure.legends[0].legend_handles[:-1]
    assert len({handle.get_color() for handle in handles}) == len({handle.get_marker() for handle in handles}) == 6


def test_a_phase_that_was_not_measured_says_so(drawn):
    axes = panels(drawn([entry(0.5, decode=timing(1.5))]))["one layer of nano, random weights", "prefill"]
    assert [text.get_text() for text in axes.texts] == ["not measured"]


def test_a_measurement_fault_is_crossed_out(drawn):
    figure = drawn([*ENTRIES, entry(0.7, decode=timing(9.0, fault="the ratio is above 8.9"))])
    axes = panels(figure)["one layer of nano, random weights", "decode"]
    crosses = [line.get_xydata().tolist() for line in axes.lines if line.get_marker() == "x"]
    assert crosses == [[[70, 9]]]
    assert labels(figure)[-1] == "measurement fault"


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("speed.png", ["speed.png"]),
        ("speed.SVG", ["speed.SVG"]),
        ("qwen1.5-1.8b", ["qwen1.5-1.8b.png", "qwen1.5-1.8b.svg"]),
    ],
)
def test_the_ending_says_which_files_are_written(tmp_path, name, files):
    path = tmp_path / "new" / name
    expected = [path.with_name(file) for file in files]
    assert picture_files(path) == expected
    assert speed_picture(ENTRIES[:1], path) == expected
    for file in expected:
        kind = file.suffix.lower()
        assert file.read_bytes().startswith(b"\x89PNG" if kind == ".png" else b"<?xml")


def test_the_same_entries_give_the_same_svg_whatever_the_user_has_set(tmp_path):
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    speed_picture(ENTRIES, first)
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30, "svg.fonttype": "none"}):
        before = dict(matplotlib.rcParams)
        speed_picture(ENTRIES, second)
        assert dict(matplotlib.rcParams) == before
    assert first.read_bytes() == second.read_bytes()
    text = first.read_text(encoding="utf-8")
    assert not re.search(r"<dc:date>|https?://(?!www\.w3\.org|purl\.org|creativecommons\.org|matplotlib\.org)", text)


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for call in (lambda path: speed_picture(ENTRIES, path), check_picture):
        with pytest.raises(UsageError, match=r"pip install 'spath-eval\[report\]'"):
            call(tmp_path / "speed.png")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write"):
        check_picture(Path(tmp_path / "file" / "speed.png"))
