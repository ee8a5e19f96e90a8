"""The picture of `spath-eval speed`: measured ratios and their ceilings over sparsity, as PNG and SVG.

A row of panels for each subject, prefill to the left and decode to the right; a line for each batch and context, in
colours that can be told apart by everybody (Okabe & Ito 2008) and with markers of their own. Nothing of matplotlib's
global state is used, and the same entries give the same SVG.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spath_eval.contracts import UsageError
from spath_eval.reports.charts import Axis
from spath_eval.speed.table import timings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

Entry = Mapping[str, Any]
Line = tuple[int, int, str]
"""Batch, context in tokens, execution."""
Points = list[tuple[float, Entry]]
"""Sparsity and timing."""
Panels = dict[str, dict[str, dict[Line, Points]]]
"""By subject, phase and line."""

ENDINGS = (".png", ".svg")
PHASES = ("prefill", "decode")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
MARKERS = "osD^vPX"
NUDGE = 3.0
"""Points, of which an inch has 72, between lines: their intervals would lie upon each other."""
CEILING: dict[str, Any] = {"ls": "--", "lw": 0.8, "marker": "_", "ms": 10, "mew": 1.6}
FAULT: dict[str, Any] = {"ls": "none", "marker": "x", "color": "black", "ms": 9, "zorder": 5}
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "figure.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "spath-eval",
}


def check_picture(path: Path) -> None:
    """Raise the `UsageError` that `speed_picture` would raise, before anything is measured."""
    from spath_eval.records import check_writable

    if find_spec("matplotlib") is None:
        raise UsageError("a picture is drawn with matplotlib: pip install 'spath-eval[report]'")
    for file in picture_files(path):
        check_writable(file)


def picture_files(path: Path) -> list[Path]:
    """Where a picture named `path` goes: there if it ends in .png or .svg, else into a file of either kind."""
    if path.suffix.lower() in ENDINGS:
        return [path]
    return [path.with_name(path.name + ending) for ending in ENDINGS]


def speed_picture(entries: Sequence[Entry], path: Path) -> list[Path]:
    """Draw `entries`, a list as `spath-eval speed` makes it, and return the files that were written.

    Raises `UsageError` where matplotlib is missing, or a file cannot be written.
    """
    check_picture(path)
    import matplotlib

    files = picture_files(path)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = _figure(entries)
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            # a date would make each SVG another one
            figure.savefig(file, dpi=200, metadata={"Date": None} if file.suffix.lower() == ".svg" else None)
    return files


def _figure(entries: Sequence[Entry]) -> Figure:
    from matplotlib.figure import Figure

    panels, lines = _panels(entries)
    styles = {line: (COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]) for n, line in enumerate(lines)}
    figure = Figure(figsize=(7.0, 0.9 + 2.3 * len(panels)), layout="constrained")
    rows = figure.subfigures(len(panels), squeeze=False)[:, 0]
    for row, (subject, phases) in zip(rows, panels.items(), strict=True):
        row.suptitle("the whole model" if subject == "model" else subject, weight="bold")
        _draw_row(row, phases, styles)
    _explain(figure, entries, styles)
    return figure


def _panels(entries: Sequence[Entry]) -> tuple[Panels, list[Line]]:
    """What is drawn where, and all lines.

    An FFN alone has no context: a token at a time is a step of decoding, and goes with the batch's first context.
    """
    found = [
        (entry, phase, timing, phase == "ffn" and timing["tokens"] == 1) for entry, phase, timing in timings(entries)
    ]
    lines = sorted({_line(entry, timing) for entry, _, timing, is_step in found if not is_step})
    panels: Panels = {}
    for entry, phase, timing, is_step in found:
        batch, tokens, execution = _line(entry, timing)
        if is_step:
            tokens = next((one[1] for one in lines if (one[0], one[2]) == (batch, execution)), tokens)
        line = batch, tokens, execution
        if line not in lines:
            lines.append(line)
        column = phase if phase in PHASES else "decode" if is_step else "prefill"
        panel = panels.setdefault(entry["subject"], {}).setdefault(column, {})
        panel.setdefault(line, []).append((entry["sparsity"], timing))
    return panels, lines


def _line(entry: Entry, timing: Entry) -> Line:
    return timing["batch"], timing["tokens"], entry["execution"]


def _draw_row(row: SubFigure, phases: Mapping[str, Mapping[Line, Points]], styles: Mapping[Line, Any]) -> None:
    """Both phases of a subject, to one scale, from which a few wide intervals may run out."""
    both = row.subplots(1, len(PHASES), sharex=True, sharey=True, squeeze=False)[0]
    for axes, phase in zip(both, PHASES, strict=True):
        alone = any(
            line[1] != timing["tokens"] for line, points in phases.get(phase, {}).items() for _, timing in points
        )
        axes.set_title(f"{phase}, whatever the context" if alone else phase)
        axes.set_xlabel("FFN neurons removed, %")
        axes.set_ylabel("dense time / sparse time")
        axes.tick_params(labelleft=True)
        axes.axhline(1, color="0.4", linewidth=0.8, linestyle=":")
        if phase not in phases:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="0.4")
        for number, (line, points) in enumerate(sorted(phases.get(phase, {}).items())):
            middle = (len(phases[phase]) - 1) / 2
            _draw_line(axes, sorted(points, key=lambda point: point[0]), styles[line], NUDGE * (number - middle))
    found = [point for lines in phases.values() for points in lines.values() for point in points]
    most = max(100 * sparsity for sparsity, _ in found) or 10
    both[0].set_xlim(-0.04 * most, 1.08 * most)
    heights = [1.0, *(timing[name] for _, timing in found for name in ("ratio", "ceiling"))]
    scale = Axis.around(heights, [timing["ci95"] for _, timing in found])
    both[0].set_ylim(scale.low, scale.high)


def _draw_line(axes: Axes, points: Points, style: tuple[str, str], shift: float) -> None:
    from matplotlib.transforms import ScaledTranslation

    colour, marker = style
    place = axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
    x = [100 * sparsity for sparsity, _ in points]
    ratios = [timing["ratio"] for _, timing in points]
    below = [timing["ratio"] - timing["ci95"][0] for _, timing in points]
    above = [timing["ci95"][1] - timing["ratio"] for _, timing in points]
    ceilings = [timing["ceiling"] for _, timing in points]
    axes.plot(x, ceilings, color=colour, transform=place, **CEILING)
    axes.errorbar(
        x, ratios, (below, above), color=colour, marker=marker, ms=4, lw=1.2, elinewidth=1, capsize=2, transform=place
    )
    wrong = [(at, timing["ratio"]) for at, (_, timing) in zip(x, points, strict=True) if "fault" in timing]
    if wrong:
        axes.plot(*zip(*wrong, strict=True), transform=place, **FAULT)


def _explain(figure: Figure, entries: Iterable[Entry], styles: Mapping[Line, tuple[str, str]]) -> None:
    """The legend, and below all where it was measured."""
    from matplotlib.lines import Line2D

    handles = []
    for (batch, tokens, execution), (colour, marker) in styles.items():
        compiled = ", compiled" if execution == "compiled" else ""
        label = f"batch {batch}, context {tokens}{compiled}"
        handles.append(Line2D([], [], color=colour, marker=marker, ms=4, lw=1.2, label=label))
    handles.append(Line2D([], [], color="0.4", label="ceiling", **CEILING))
    if any("fault" in timing for _, _, timing in timings(list(entries))):
        handles.append(Line2D([], [], label="measurement fault", **FAULT))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 4), handlelength=3)
    found = (f"{one['device']}, {one['dtype']}, threads: {one['conditions']['threads']}" for one in entries)
    where = "; ".join(dict.fromkeys(found))
    figure.supxlabel(f"{where}. Vertical lines: 95% intervals over rounds. Dotted: as fast as dense.", size=7)
