"""The HTML report: a record as one page that needs nothing but itself, on a desk or a phone, in light or dark.

It has no script, and its content security policy lets nothing be loaded. Whatever comes from a record or a model is
escaped by the template; control characters are shown by their pictures.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spath_eval.contracts import Register
from spath_eval.hookspecs import hookimpl
from spath_eval.reports.charts import VIRIDIS, Axis, Panel, Point, Series, key, panel, shade, tick_text, track
from spath_eval.reports.console import content
from spath_eval.reports.matrices import Case, arm, is_own, label, mean_retention, perplexity_ratio
from spath_eval.reports.provenance import provenance
from spath_eval.reports.tables import estimate, short
from spath_eval.reports.verdict import judged, of_model, verdicts

if TYPE_CHECKING:
    from markupsafe import Markup

MOST_TASKS = 30
"""Tasks up to which a chart has a line for each, below the mean of its case."""
CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}


@dataclass(frozen=True)
class Measured:
    """What becomes a line of a chart of intervals."""

    label: str
    found: Mapping[str, Any]
    """Its `value` and `ci95`, or the reason why it has none."""
    remark: str = ""
    ceiling: float | None = None
    level: int = 0
    """0 for a case, 1 for a part of it."""


@dataclass(frozen=True)
class Line:
    """One line of a chart of intervals."""

    label: str
    figure: str
    remark: str
    level: int
    track: Markup | None
    """None where there is no estimate."""


@dataclass(frozen=True)
class Tick:
    """A number below an axis."""

    percent: float
    text: str


@dataclass(frozen=True)
class Forest:
    """Estimates with their intervals, one below the other on one axis."""

    title: str
    unit: str
    lines: Sequence[Line]
    ticks: Sequence[Tick]


@dataclass(frozen=True)
class Strategy:
    """An entry of the legend of the trade-off charts."""

    name: str
    key: Markup


@dataclass(frozen=True)
class TradeOff:
    """Charts over sparsity, and what their marks stand for."""

    rows: Sequence[Sequence[Markup]]
    """Quantity by quantity, a chart for each domain."""
    legend: Sequence[Strategy]


@dataclass(frozen=True)
class Cell:
    """A share in a heat map."""

    text: str
    style: str


@dataclass(frozen=True)
class HeatMap:
    """Shares of specialised neurons: FFN sites as rows, domains as columns."""

    source: str
    """The profile and how much text it is of."""
    domains: Sequence[str]
    rows: Mapping[str, Sequence[Cell]]
    highest: str
    """The share that has the brightest colour."""


class HtmlReport:
    """The report `html`."""

    name = "html"

    def render(self, record: Mapping[str, Any], *, width: int = 100, colour: bool = False) -> str:
        """The page on `record`. It is as wide as its window, and coloured as the reader's system asks for."""
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        environment = Environment(
            autoescape=True,
            loader=FileSystemLoader(Path(__file__).parent),
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=StrictUndefined,
        )
        found = content(record)
        sentences = verdicts(record)
        resolved = record.get("command", {}).get("resolved", {})
        page = environment.get_template("report.html.jinja").render(
            record=record,
            content=found,
            missed=[case for case in record.get("cases", []) if case["outcome"] != "passed"],
            legend=found.legend(),
            scale=[f"rgb({red} {green} {blue})" for red, green, blue in VIRIDIS],
            models=[
                {
                    "name": model,
                    "verdict": sentences[model],
                    "tables": tables,
                    **_pictures(model, record),
                }
                for model, tables in found.tables.items()
            ],
            provenance=provenance(record),
            resolved=json.dumps(resolved, indent=1, ensure_ascii=False) if resolved else "",
        )
        return page.translate(CONTROL_PICTURES)


@hookimpl
def spath_register_reports(register: Register) -> None:
    register(HtmlReport())


def _pictures(model: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """The charts of a model, and the reasons for those that it has not."""
    cases = [case for case in record.get("cases", []) if case["model"] == model]
    own = sorted(filter(is_own, cases), key=_is_control)
    controls = [case for case in cases if _is_control(case)]
    rivals = [case for case in cases if not _is_control(case)]
    profiles = [profile for profile in record.get("profiles", []) if profile["model"] == model]
    return {
        "quality": _quality([*filter(is_own, rivals)]),
        "quality_of_controls": _quality([*filter(is_own, controls)]),
        "trade_off": _trade_off(own),
        "speed": _speed(rivals),
        "speed_of_controls": _speed(controls),
        "speed_reasons": _untimed(cases),
        "heat_maps": [_heat_map(profile) for profile in _specialised(profiles)],
        "heat_map_reasons": dict.fromkeys(
            profile.get("specialisation_reason", "the record has none") for profile in profiles or [{}]
        ),
    }


def _quality(cases: Sequence[Case]) -> list[Forest]:
    """Retention and perplexity ratio, where any case has them."""
    in_parts = sum(len(case.get("quality", [])) for case in cases) <= MOST_TASKS
    kept = [line for case in cases if case.get("quality") for line in _retentions(case, in_parts)]
    changed = [Measured(label(case), perplexity_ratio(case)) for case in cases if case.get("preservation")]
    forests = (
        _forest("Retention", "1: all that dense scores above chance, 0: chance", kept, "{:.2f}".format),
        _forest("Perplexity ratio", "sparse / dense, held-out text; 1: no change", changed, short, logarithmic=True),
    )
    return [forest for forest in forests if forest]


def _retentions(case: Case, in_parts: bool) -> Iterator[Measured]:
    """The mean over tasks, and with `in_parts` each task below it."""
    entries = case["quality"]
    if len(entries) == 1:
        yield Measured(label(case), entries[0]["retention"], _counted(entries[0]))
        return
    yield Measured(label(case), mean_retention(case), f"mean of {len(entries)} scores")
    for entry in entries if in_parts else ():
        name = entry["task"] + (f", {entry['metric']}" if entry["metric"] != "acc" else "")
        yield Measured(name, entry["retention"], _counted(entry), level=1)


def _counted(entry: Mapping[str, Any]) -> str:
    difference = entry["difference"]
    text = f"{entry['documents']} documents"
    if difference.get("lost") is not None:
        text += f", {difference['lost']} lost, {difference['gained']} gained"
    reason = entry["retention"].get("reason")
    return f"{text}; {reason}" if reason else text


def _speed(cases: Sequence[Case]) -> list[Forest]:
    """What was timed, one chart each; a measurement that several cases share is one line."""
    subjects: dict[str, dict[str, Measured]] = {}
    shared: Counter[str] = Counter()
    for case in cases:
        for entry in case.get("speed", []):
            compiled = ", compiled" if entry.get("execution") == "compiled" else ""
            for phase in ("prefill", "decode", "ffn"):
                if timing := entry.get(phase):
                    lines = subjects.setdefault(entry["subject"], {})
                    measurement = repr(timing)
                    shared[measurement] += 1
                    more = shared[measurement] - 1
                    line = lines.get(measurement) or Measured(
                        f"{label(case)}, {phase}{compiled}",
                        {**timing, "value": timing["ratio"]},
                        judged(timing),
                        timing.get("ceiling"),
                    )
                    also = f"; timed once for {more + 1} cases" if more else ""
                    lines[measurement] = replace(line, remark=judged(timing) + also)
    forests = (
        _forest(
            "The whole model" if subject == "model" else subject[0].upper() + subject[1:],
            "dense time / sparse time, 1: as fast as dense; bar: ceiling",
            [*lines.values()],
            "{:.2f}".format,
        )
        for subject, lines in subjects.items()
    )
    return [forest for forest in forests if forest]


def _untimed(cases: Sequence[Case]) -> list[str]:
    """Why masks were not timed, each reason once; a mask that was timed in another case needs none."""
    timed = {(case["domain"], arm(case)) for case in cases if case.get("speed")}
    untimed = [case for case in cases if (case["domain"], arm(case)) not in timed]
    return list(dict.fromkeys(case["speed_reason"] for case in untimed if "speed_reason" in case))


def _forest(
    title: str,
    unit: str,
    measured: Sequence[Measured],
    form: Callable[[float], str],
    *,
    logarithmic: bool = False,
) -> Forest | None:
    """A chart of what was measured; none where nothing was."""
    axis = _axis([{**line.found, "ceiling": line.ceiling} for line in measured], logarithmic)
    if axis is None:
        return None
    lines = [
        Line(
            line.label,
            estimate(line.found, lambda reason: "", form).strip() + _of(line.ceiling, form),
            line.remark,
            line.level,
            track(axis, line.found["value"], line.found.get("ci95"), line.ceiling)
            if line.found.get("value") is not None
            else None,
        )
        for line in measured
    ]
    ticks = [Tick(100 * axis.place(tick), tick_text(tick)) for tick in axis.ticks()]
    return Forest(title, unit, lines, ticks)


def _axis(found: Sequence[Mapping[str, Any]], logarithmic: bool) -> Axis | None:
    """An axis for estimates and their ceilings, that holds 1; none where there is no estimate."""
    estimates = [one for one in found if one.get("value") is not None]
    if not estimates:
        return None
    points = [one["value"] for one in estimates] + [one["ceiling"] for one in estimates if one.get("ceiling")]
    intervals = [one["ci95"] for one in estimates if one.get("ci95")]
    return Axis.around([1.0, *points], intervals, logarithmic=logarithmic)


def _of(ceiling: float | None, form: Callable[[float], str]) -> str:
    return "" if ceiling is None else f" of {form(ceiling)}"


def _trade_off(cases: Sequence[Case]) -> TradeOff | None:
    """Charts by quantity and domain; none where nothing was measured."""
    placed = [case for case in cases if case.get("sparsity", {}).get("achieved") is not None]
    names = list(dict.fromkeys(_strategy(case) for case in placed))
    domains = list(dict.fromkeys(case["domain"] for case in placed))
    rows = []
    x_axis = Axis.around([0.0, *(case["sparsity"]["achieved"] for case in placed)], [])
    for title, of, form, logarithmic in (
        ("mean retention", mean_retention, "{:.2f}".format, False),
        ("perplexity ratio", perplexity_ratio, short, True),
        ("decode speed / dense", _decode, "{:.2f}".format, False),
    ):
        y_axis = _axis([of(case) for case in placed if not _is_control(case)] or [*map(of, placed)], logarithmic)
        if y_axis is None:
            continue
        charts = []
        for domain in domains:
            found = [case for case in placed if case["domain"] == domain and of(case).get("value") is not None]
            series = []
            for number, name in enumerate(names):
                own = [case for case in found if _strategy(case) == name]
                if own:
                    series.append(Series(number, [_point(case, of(case), form) for case in own], _is_control(own[0])))
            charts.append(panel(Panel(domain, title, x_axis, y_axis, series)))
        rows.append(charts)
    controls = {_strategy(case): _is_control(case) for case in placed}
    legend = [Strategy(_named_strategy(name, controls[name]), key(i, controls[name])) for i, name in enumerate(names)]
    return TradeOff(rows, legend) if rows else None


def _point(case: Case, found: Mapping[str, Any], form: Callable[[float], str]) -> Point:
    ceiling = found.get("ceiling")
    figure = estimate(found, lambda reason: "", form) + _of(ceiling, form)
    achieved = case["sparsity"]["achieved"]
    return Point(
        achieved, found["value"], f"{label(case)}, {achieved:.1%} removed: {figure}", found.get("ci95"), ceiling
    )


def _decode(case: Case) -> Mapping[str, Any]:
    timing = of_model(case).get("decode")
    return {**timing, "value": timing["ratio"]} if timing else {}


def _specialised(profiles: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The profiles that have shares of specialised neurons, and not the same as one before."""
    found: list[Mapping[str, Any]] = []
    for profile in profiles:
        shares = profile.get("specialisation")
        if shares and all(shares != other["specialisation"] for other in found):
            found.append(profile)
    return found


def _heat_map(profile: Mapping[str, Any]) -> HeatMap:
    found: Mapping[str, Mapping[str, float]] = profile["specialisation"]
    shares = {site: found[site] for site in sorted(found, key=_natural)}
    domains = list(dict.fromkeys(domain for row in shares.values() for domain in row))
    highest = max((share for row in shares.values() for share in row.values()), default=0.0)
    layers = {site: re.findall(r"(?<=\.)\d+(?=\.)", site) for site in shares}
    numbers = [found[0] for found in layers.values() if len(found) == 1]
    by_layer = len(set(numbers)) == len(shares)

    def cell(share: float | None) -> Cell:
        return Cell("-", "") if share is None else Cell(f"{share:.1%}", shade(share / highest if highest else 0.0))

    rows = {
        f"layer {layers[site][0]}" if by_layer else site: [cell(row.get(domain)) for domain in domains]
        for site, row in shares.items()
    }
    tokens = sorted({profile.get("tokens", {}).get(domain, 0) for domain in domains})
    counts = " to ".join(f"{count:,}" for count in dict.fromkeys([tokens[0], tokens[-1]]))
    source = f"profile {profile.get('fingerprint', '-')[:12]}, {counts} tokens of each domain"
    return HeatMap(source, domains, rows, f"{highest:.1%}")


def _natural(text: str) -> list[str | int]:
    """A key by which layer 2 comes before layer 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]


def _is_control(case: Case) -> bool:
    return bool(case["strategy"].get("control"))


def _named_strategy(name: str, control: bool) -> str:
    return f"{name} (control)" if control else name


def _strategy(case: Case) -> str:
    return arm(case).partition("@")[0]
