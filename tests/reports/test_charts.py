"""Charts: axes that hold what matters, ticks that are round, and colours that can be told apart."""

import re
from pathlib import Path

import pytest

from spath_eval.reports import charts
from spath_eval.reports.charts import Axis, Panel, Point, Series, panel, shade, tick_text, track

TEMPLATE = Path(charts.__file__).with_name("report.html.jinja").read_text(encoding="utf-8")


def luminance(colour):
    """Relative luminance, from the text of WCAG 2."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (one / 255 for one in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("logarithmic", [False, True])
def test_an_axis_holds_all_points_and_ordinary_intervals(logarithmic):
    axis = Axis.around([1.0, 1.2, 0.9], [(0.8, 1.0), (1.1, 1.3)], logarithmic=logarithmic)
    assert 0 < axis.place(0.8) < axis.place(0.9) < axis.place(1.0) < axis.place(1.3) < 1
    assert axis.low == pytest.approx(0.8, rel=0.06)


def test_one_wide_interval_does_not_squeeze_the_others():
    narrow = [(0.99, 1.01)] * 5
    axis = Axis.around([1.0, 1.1], [*narrow, (0.001, 40.0)])
    assert axis.low == pytest.approx(0.9, abs=0.03)
    assert axis.high == pytest.approx(1.2, abs=0.03)


def test_an_axis_is_linear_where_a_logarithm_is_undefined():
    assert not Axis.around([1.0, 2.0], [(-0.5, 2.0)], logarithmic=True).logarithmic
    assert Axis.around([1.0, 2.0], [(0.5, 2.0)], logarithmic=True).logarithmic


@pytest.mark.parametrize("high", [1.0, 1.001, 1.04, 1.7, 20.0, 58.0, 1e4, 1e8, 1e15])
@pytest.mark.parametrize("logarithmic", [False, True])
def test_ticks_are_few_and_lie_on_the_axis(high, logarithmic):
    axis = Axis.around([1.0, high], [], logarithmic=logarithmic)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 8
    assert all(-1e-8 < axis.place(tick) < 1 + 1e-8 for tick in ticks)
    assert ticks == sorted(ticks)
    assert len(set(map(tick_text, ticks))) == len(ticks)


def test_ticks_are_written_with_few_digits():
    assert [tick_text(value) for value in (0.1 + 0.2, 1.0, 0.995, 20.0, 1200.0, 1e4, 1e8)] == [
        "0.3",
        "1",
        "0.995",
        "20",
        "1.2e3",
        "1e4",
        "1e8",
    ]


def test_a_track_places_what_it_shows_and_cuts_an_interval_at_the_edge():
    axis = Axis(0.0, 2.0)
    drawn = str(track(axis, 0.5, (0.25, 9.0), 1.5))
    assert 'class="interval" d="M12.50 10H100.00"' in drawn
    assert 'class="dot" d="M25.00 10h.01"' in drawn
    assert 'class="ceiling" d="M75.00 3V17"' in drawn
    assert 'class="reference" d="M50.00 0V20"' in drawn


def test_a_panel_names_its_axes_and_escapes_what_it_names():
    point = Point(0.15, 0.9, "<b>&", (0.8, 1.0), 1.1)
    chart = Panel(
        "a<script>", "mean retention", Axis(0, 0.2), Axis(0.5, 1.2), [Series(0, [point]), Series(9, [point], True)]
    )
    drawn = str(panel(chart))
    assert "neurons removed, %" in drawn
    assert drawn.count("mean retention") == 2
    assert "a&lt;script&gt;" in drawn
    assert "&lt;b&gt;&amp;" in drawn
    assert "<b>" not in drawn
    assert '<g class="s1 control">' in drawn
    ticks = re.findall(r'class="tick"[^>]*>([^<]+)<', drawn)
    assert ticks == ["0.5", "0.6", "0.7", "0.8", "0.9", "1", "1.1", "1.2", "0", "5", "10", "15", "20"]


def test_text_on_a_heat_map_can_be_read():
    for step in range(101):
        background, text = re.fullmatch(r"background:rgb\((.+)\);color:#(\w+)", shade(step / 100)).groups()
        assert contrast(list(map(int, background.split())), [0] * 3 if text == "000" else [255] * 3) >= 4.5
    assert shade(0.0).startswith("background:rgb(68 1 84)")
    assert shade(1.0) == shade(7.0) == "background:rgb(253 231 37);color:#000"


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_stand_out_from_the_page(scheme):
    block = re.findall(r":root \{(.*?)\}", TEMPLATE, re.DOTALL)[scheme]
    colours = {
        name: [int(value[start : start + 2], 16) for start in (0, 2, 4)]
        for name, value in re.findall(r"--(\w+): #(\w{6})", block)
    }
    page = colours.pop("page")
    for name in ("text", "quiet", "better", "worse"):
        assert contrast(colours[name], page) >= 4.5, name
        assert contrast(colours[name], colours["raised"]) >= 4.5, name
    for number in range(charts.SHAPES):
        assert contrast(colours[f"s{number}"], page) >= 3, number
