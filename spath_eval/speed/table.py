"""The tables of `spath-eval speed`, from entries of the record's `speed` alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spath_eval.reports.tables import ABOVE_CEILING, Group, Note, Row, Table, estimate, wrapped

Entry = Mapping[str, Any]
WIDEST = 140
"""Columns that the widest table can use."""
PHASES = ("ffn", "prefill", "decode")
LEGEND = (
    "ratio: dense time / sparse time, the median over rounds with its 95% interval. ceiling: what removing those "
    "weights could give at most, by operations for prefill and by bytes read for decode. reached: ratio / ceiling.",
    "FFN: share of the dense operations or bytes that lies in the FFNs. least: what counting allows at the measured "
    "rates, dense and sparse.",
)
MEMORY_LEGEND = ("weights, peak: bytes of each arm, were it alone in memory.",)


def render(entries: Sequence[Entry], width: int) -> str:
    """The tables of `entries`, at most `width` columns wide, and notes on what is suspicious or was not reached."""
    notes: list[str] = []

    def note(text: str) -> str:
        if text not in notes:
            notes.append(text)
        return f"({notes.index(text) + 1})"

    tables = [_times(entries, note), _memory(entries), _switches(entries)]
    tables = [table for table in tables if table.groups]
    parts = [table.text(width, False) for table in tables]
    explained = [wrapped(f"({number}) {text}", width, "    ") for number, text in enumerate(notes, 1)]
    legend = [wrapped(line, width, "  ") for table in tables for line in table.legend]
    about = [wrapped(line, width, "  ") for line in [*_conditions(entries), *_parity(entries), *_self_test(entries)]]
    return "\n\n".join([*parts, *("\n".join(lines) for lines in (explained, about, legend) if lines)]) + "\n"


def timings(entries: Sequence[Entry]) -> Iterator[tuple[Entry, str, Entry]]:
    """Each timing of `entries`, after its entry and phase."""
    return ((entry, phase, entry[phase]) for entry in entries for phase in PHASES if entry.get(phase))


def faults(entries: Sequence[Entry]) -> list[str]:
    """Ratios that what was removed cannot give, a line for each."""
    return [
        f"{entry['subject']}, {_case(entry, phase, timing)}: {timing['fault']}"
        for entry, phase, timing in timings(entries)
        if "fault" in timing
    ]


def _times(entries: Sequence[Entry], note: Note) -> Table:
    groups: dict[str, list[Row]] = {}
    for entry, phase, timing in timings(entries):
        least = timing.get("least_seconds")
        groups.setdefault(entry["subject"], []).append(
            (
                _case(entry, phase, timing),
                estimate({**timing, "value": timing["ratio"]}, note, "{:.3f}".format) + _marks(entry, timing, note),
                f"{timing['ceiling']:.3f}",
                f"{timing['ratio'] / timing['ceiling']:.2f}",
                str(timing["rounds"]),
                duration(statistics.median(timing["dense_seconds"])),
                duration(statistics.median(timing["sparse_seconds"])),
                f"{duration(least['dense'])}, {duration(least['sparse'])}" if least else "-",
                f"{timing['ffn_share']:.2f}",
            )
        )
    header = ("sparsity, batch x tokens", "ratio [95%]", "ceiling", "reached", "rounds", "dense", "sparse", "least")
    subjects = [Group(name, rows) for name, rows in groups.items()]
    return Table("Speed", (*header, "FFN"), subjects, (), LEGEND)


def _case(entry: Entry, phase: str, timing: Entry) -> str:
    compiled = ", compiled" if entry["execution"] == "compiled" else ""
    name = "" if phase == "ffn" else f", {phase}"
    return f"{entry['sparsity']:.3g}, {timing['batch']} x {timing['tokens']}{name}{compiled}"


def _marks(entry: Entry, timing: Entry, note: Note) -> str:
    marks = []
    precision = timing.get("precision")
    if precision and not precision["reached"]:
        asked = f"{100 * precision['requested']:g}%"
        marks.append(note(f"the time budget ended before the interval was narrower than {asked} of the ratio"))
    if "fault" in timing:
        marks.append(note(f"measurement fault: {timing['fault']}"))
    elif timing["ci95"][0] > timing["ceiling"]:
        marks.append(note(ABOVE_CEILING))
    if any(entry.get("compiler", {}).values()):
        found = entry["compiler"]
        marks.append(
            note(
                f"torch.compile gave up: {found['graph_breaks']} graph breaks, {found['skipped_cuda_graphs']} CUDA "
                "graphs skipped"
            )
        )
    if "dense_execution" in timing:
        marks.append(note(f"the fastest dense arm is {timing['dense_execution']}"))
    return "".join(f" {mark}" for mark in marks)


def _memory(entries: Sequence[Entry]) -> Table:
    groups: dict[str, list[Row]] = {}
    for entry in entries:
        timing = entry.get("decode")
        if not timing or "weight_bytes" not in entry or entry["execution"] == "compiled":
            continue
        peak = entry.get("peak_memory") or {}
        groups.setdefault(entry["subject"], []).append(
            (
                f"{entry['sparsity']:.3g}, {timing['batch']} x {timing['tokens']}",
                *(size(found.get(arm)) for found in (entry["weight_bytes"], peak) for arm in ("dense", "sparse")),
            )
        )
    header = ("sparsity, batch x tokens", "weights dense", "weights sparse", "peak dense", "peak sparse")
    return Table("Memory", header, [Group(name, rows) for name, rows in groups.items()], (), MEMORY_LEGEND)


def _switches(entries: Sequence[Entry]) -> Table:
    groups = []
    for entry in entries:
        if not (found := entry.get("switch")):
            continue
        memory, seconds = found["memory"], found["seconds"]
        held = memory["shared"] + memory["dense_ffn"] + sum(memory["pathways"].values())
        row = (
            f"{entry['sparsity']:.3g}, {', '.join(found['domains'])}",
            duration(statistics.median(seconds)),
            duration(max(seconds)),
            size(sum(memory["pathways"].values())),
            size(memory["dense_ffn"]),
            size(memory["shared"]),
            size(held),
        )
        groups.append(Group(entry["subject"], [row]))
    header = ("sparsity, pathways", "switch", "longest", "pathways hold", "dense FFNs", "shared", "in all")
    return Table("Switching", header, groups)


def _conditions(entries: Sequence[Entry]) -> list[str]:
    if not entries:
        return []
    found = [entry["conditions"] for entry in entries]
    rates = [found[0][name] / 1e9 for name in ("bytes_per_second", "flops_per_second")]
    where = f"{entries[0]['device']}, {entries[0]['dtype']}, {found[0]['threads']} threads"
    lines = [f"{where}: reads {rates[0]:.4g} GB/s, multiplies {rates[1]:.4g} GFLOP/s"]
    loads = [value for one in found for value in one.get("load_average", ())]
    clocks = [value for one in found for value in one.get("clock_mhz", ())]
    about = [f"load average {min(loads):.1f} to {max(loads):.1f}"] if loads else []
    about += [f"clock {min(clocks):.0f} to {max(clocks):.0f} MHz"] if clocks else []
    return ["; ".join([*lines, *about])]


def _parity(entries: Sequence[Entry]) -> list[str]:
    found = [entry["parity"] for entry in entries if "parity" in entry]
    if not found:
        return []
    return [
        "Compact equals masked execution: at every site within "
        f"{max(one['max_relative_difference'] for one in found):.1e} of the largest output (tolerance "
        f"{found[0]['tolerance']:.0e}), logits within {max(one['max_logit_difference'] for one in found):.1e}."
    ]


def _self_test(entries: Sequence[Entry]) -> list[str]:
    found = [timing["ci95"] for entry, _, timing in timings(entries) if entry.get("self_test")]
    if not found:
        return []
    holding = sum(low <= 1 <= high for low, high in found)
    return [f"Self-test, dense against dense: {holding} of {len(found)} intervals contain 1."]


def duration(seconds: float) -> str:
    """Three digits, and s, ms or us."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 0.9995 or unit == "us":
            value = seconds * factor
            return f"{value:.{max(0, 2 - (value >= 9.995) - (value >= 99.95))}f} {unit}"
    raise AssertionError


def size(count: int | None) -> str:
    """Three digits, and a unit of bytes."""
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
