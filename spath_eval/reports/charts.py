"""Charts of the HTML report, as inline SVG: intervals on a track, and quality and speed over sparsity.

Colours are classes `s0` to `s7`, which the page's style sheet defines for light and dark; every series has a shape of
its own too. What stands in a chart stands in a table or a tooltip as well.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from markupsafe import Markup

Interval = Sequence[float]
WIDTH, HEIGHT = 290, 195
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 24, 36
"""Margins of a panel, in its units, which are pixels where it has room."""
SHAPES = 8
NUDGE = 3.0
"""Units between series that stand at the same sparsity."""
VIRIDIS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Of matplotlib's colour map (van der Walt & Smith 2015), red, green and blue at equal steps."""


@dataclass(frozen=True)
class Axis:
    """A range of values, linear or logarithmic."""

    low: float
    high: float
    logarithmic: bool = False

    @classmethod
    def around(cls, points: Sequence[float], intervals: Sequence[Interval], *, logarithmic: bool = False) -> Axis:
        """One that holds all of `points`, and of `intervals` what a few wide ones do not squeeze together.

        It extends to their ends, but no farther from the points than these are from each other, or twice the median
        width of an interval. It is linear where something is not positive.
        """
        logarithmic = logarithmic and min([*points, *(low for low, _ in intervals)]) > 0
        scaled: Callable[[float], float] = math.log if logarithmic else float
        low, high = scaled(min(points)), scaled(max(points))
        ends = [(scaled(one), scaled(other)) for one, other in intervals] or [(low, high)]
        room = max(high - low, 2 * statistics.median(other - one for one, other in ends))
        low, high = (
            min(low, max(low - room, min(one for one, _ in ends))),
            max(high, min(high + room, max(other for _, other in ends))),
        )
        edge = max(0.06 * (high - low), 0.005)
        low, high = low - edge, high + edge
        return cls(math.exp(low), math.exp(high), True) if logarithmic else cls(low, high)

    def place(self, value: float) -> float:
        """Where `value` lies: 0 at the low end, 1 at the high end."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Up to eight round values; on a long logarithmic axis 1, 2 and 5 times powers of ten, or those alone."""
        if self.logarithmic and self.high / self.low > 5:
            powers = range(math.floor(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
            found = [tick for tick in found if self.low <= tick <= self.high]
            tens = [10.0**power for power in powers if 10.0**power >= self.low]
            return found if len(found) <= 8 else tens[:: 1 + (len(tens) - 1) // 8]
        rough = (self.high - self.low) / 7
        unit = 10 ** math.floor(math.log10(rough))
        step = next(step * unit for step in (1, 2, 5, 10) if step * unit >= rough)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [step * index for index in range(first, last + 1)]


@dataclass(frozen=True)
class Point:
    """A case in a panel."""

    x: float
    y: float
    title: str
    """Its tooltip."""
    interval: Interval | None = None
    ceiling: float | None = None


@dataclass(frozen=True)
class Series:
    """Points of one strategy, and the number of its colour and shape."""

    number: int
    points: Sequence[Point]
    control: bool = False


@dataclass(frozen=True)
class Panel:
    """A chart of y over sparsity."""

    title: str
    y_label: str
    x_axis: Axis
    y_axis: Axis
    series: Sequence[Series] = field(default=())


def tick_text(value: float) -> str:
    """As few digits as it takes."""
    return f"{value:.3g}".replace("e+0", "e") if abs(value) >= 1_000 else f"{value:.10g}"


def track(axis: Axis, value: float | None, interval: Interval | None, ceiling: float | None) -> Markup:
    """One line of a chart of intervals: where the estimate, its interval, its ceiling and 1 lie.

    It is stretched to whatever width there is, so that it can hold no text. An interval is cut where the axis ends.
    """
    marks = [_line("reference", axis, 1, 0, 20)]
    if interval:
        low, high = (100 * min(max(axis.place(end), 0.0), 1.0) for end in interval)
        marks.append(_markup('<path class="interval" d="M{:.2f} 10H{:.2f}"/>', low, high))
    if ceiling is not None:
        marks.append(_line("ceiling", axis, ceiling, 3, 17))
    if value is not None:
        marks.append(_markup('<path class="dot" d="M{:.2f} 10h.01"/>', 100 * axis.place(value)))
    return _svg('class="track" viewBox="0 0 100 20" preserveAspectRatio="none" aria-hidden="true"', marks)


def panel(chart: Panel) -> Markup:
    """A chart with axes, one line and one shape for each series, and a dashed line at 1."""
    y_axis = chart.y_axis
    marks = [
        _markup("<title>{}</title>", f"{chart.title}: {chart.y_label} by share of FFN neurons removed"),
        _markup('<text class="title" x="{}" y="14">{}</text>', LEFT, chart.title),
        _markup(
            '<text class="axis-label" x="{}" y="{}" text-anchor="middle">FFN neurons removed, %</text>',
            (LEFT + WIDTH - RIGHT) / 2,
            HEIGHT - 4,
        ),
        _markup(
            '<text class="axis-label" transform="translate(10 {}) rotate(-90)" text-anchor="middle">{}</text>',
            (TOP + HEIGHT - BOTTOM) / 2,
            chart.y_label,
        ),
    ]
    for tick in y_axis.ticks():
        height = _y(y_axis, tick)
        marks.append(_markup('<path class="grid" d="M{} {:.1f}H{}"/>', LEFT, height, WIDTH - RIGHT))
        text = '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
        marks.append(_markup(text, LEFT - 5, height + 3.5, tick_text(tick)))
    for tick in chart.x_axis.ticks():
        text = '<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>'
        marks.append(_markup(text, _x(chart.x_axis, tick), HEIGHT - BOTTOM + 15, tick_text(100 * tick)))
    marks.append(_markup('<path class="frame" d="M{} {}V{}H{}"/>', LEFT, TOP, HEIGHT - BOTTOM, WIDTH - RIGHT))
    if y_axis.low < 1 < y_axis.high:
        marks.append(_markup('<path class="reference" d="M{} {:.1f}H{}"/>', LEFT, _y(y_axis, 1), WIDTH - RIGHT))
    drawn = [
        mark
        for index, series in enumerate(chart.series)
        for mark in _series(chart, series, NUDGE * (index - (len(chart.series) - 1) / 2))
    ]
    # an svg within an svg hides what lies beyond it: points that are off the scale
    window = f"{LEFT} {TOP} {WIDTH - LEFT - RIGHT} {HEIGHT - TOP - BOTTOM}"
    place = f'x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}"'
    marks.append(_svg(f'{place} viewBox="{window}" overflow="hidden"', drawn))
    return _svg(f'class="panel" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"', marks)


def key(number: int, control: bool) -> Markup:
    """The mark of a series, for the legend."""
    return _svg(f'class="key{_control(control)}" viewBox="-8 -8 16 16" aria-hidden="true"', [_shape(number, 0, 0)])


def shade(share: float) -> str:
    """The style of a heat map's cell: viridis at `share` (0 to 1), and text that can be read on it."""
    place = min(max(share, 0.0), 1.0) * (len(VIRIDIS) - 1)
    below = min(int(place), len(VIRIDIS) - 2)
    pairs = zip(VIRIDIS[below], VIRIDIS[below + 1], strict=True)
    red, green, blue = (round(one + (other - one) * (place - below)) for one, other in pairs)
    text = "#000" if _luminance(red, green, blue) > 0.179 else "#fff"
    return f"background:rgb({red} {green} {blue});color:{text}"


def _luminance(*channels: int) -> float:
    """Relative luminance of an sRGB colour (WCAG 2); black and white text contrast equally at 0.179."""
    shares = [channel / 255 for channel in channels]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _series(chart: Panel, series: Series, nudge: float) -> list[Markup]:
    points = sorted(series.points, key=lambda point: point.x)
    placed = [(_x(chart.x_axis, point.x) + nudge, _y(chart.y_axis, point.y)) for point in points]
    marks = []
    if len(placed) > 1:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        marks.append(_markup('<path class="line" d="M{}"/>', path))
    for point, (x, y) in zip(points, placed, strict=True):
        inner = [_markup("<title>{}</title>", point.title)]
        if point.interval:
            low, high = (_y(chart.y_axis, end) for end in point.interval)
            inner.append(_markup('<path class="whisker" d="M{:.1f} {:.1f}V{:.1f}"/>', x, low, high))
        if point.ceiling is not None:
            height = _y(chart.y_axis, point.ceiling)
            inner.append(_markup('<path class="ceiling" d="M{:.1f} {:.1f}h14"/>', x - 7, height))
        marks.append(_markup("<g>{}</g>", _joined([*inner, _shape(series.number, x, y)])))
    return [_markup('<g class="s{}{}">{}</g>', series.number % SHAPES, _control(series.control), _joined(marks))]


def _shape(number: int, x: float, y: float) -> Markup:
    """A disc, square, triangle, diamond, upside-down triangle, cross, plus or ring."""
    paths = (
        "M-4.2 0a4.2 4.2 0 1 0 8.4 0a4.2 4.2 0 1 0 -8.4 0z",
        "M-3.8-3.8h7.6v7.6h-7.6z",
        "M0-5L4.8 3.8H-4.8z",
        "M0-5.4L5.4 0L0 5.4L-5.4 0z",
        "M0 5L4.8-3.8H-4.8z",
        "M-4-4L4 4M4-4L-4 4",
        "M0-5V5M-5 0H5",
        "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    )
    open_shape = " open" if number % SHAPES >= 5 else ""
    text = '<path class="shape s{}{}" transform="translate({:.1f} {:.1f})" d="{}"/>'
    return _markup(text, number % SHAPES, open_shape, x, y, paths[number % SHAPES])


def _control(control: bool) -> str:
    return " control" if control else ""


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM)


def _line(name: str, axis: Axis, value: float, top: float, bottom: float) -> Markup:
    return _markup('<path class="{}" d="M{:.2f} {}V{}"/>', name, 100 * axis.place(value), top, bottom)


def _markup(text: str, *values: Any) -> Markup:
    """`text` with `values` in its places, escaped."""
    from markupsafe import Markup

    return Markup(text).format(*values)


def _joined(marks: Sequence[Markup]) -> Markup:
    from markupsafe import Markup

    return Markup("").join(marks)


def _svg(attributes: str, marks: Sequence[Markup]) -> Markup:
    """`attributes` are ours, and may hold quotes."""
    from markupsafe import Markup

    return Markup(f"<svg {attributes}>") + _joined(marks) + Markup("</svg>")
