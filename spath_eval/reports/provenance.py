"""Where a record's figures come from, as tables: the run, its models, texts, tasks, gates and plugins."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spath_eval.reports.tables import Group, Row, Table, decimals

Entry = Mapping[str, Any]


def provenance(record: Mapping[str, Any]) -> list[Table]:
    """The tables, empty ones left out."""
    tables = [
        _table("Run", ("what", "value"), _run(record)),
        _table("Packages", ("package", "version"), sorted(record.get("environment", {}).get("packages", {}).items())),
        _table(
            "Models",
            (
                "model",
                "family",
                "reference",
                "revision",
                "fingerprint",
                "parameters",
                "layers",
                "FFN sites",
                "FFN share",
            ),
            [_model(model) for model in record.get("models", [])],
        ),
        _table(
            "Profile texts",
            ("model", "domain", "tokens", "text", "profile"),
            [row for profile in record.get("profiles", []) for row in _profile(profile)],
        ),
        _table(
            "Tasks",
            ("task", "metric", "filter", "version", "documents", "limit", "few-shot", "chance", "digest"),
            dict.fromkeys(_task(task) for task in record.get("tasks", [])),
        ),
        _table(
            "Gates and masks",
            ("case", "execution", "mask applied", "compact = masked", "texts disjoint", "mask"),
            [_case(case) for case in record.get("cases", [])],
        ),
        _table("Samples", ("file", "SHA-256"), dict.fromkeys(_samples(record))),
        _table(
            "Plugins",
            ("plugin", "distribution", "version"),
            [
                (one["name"], _text(one.get("distribution")), _text(one.get("version")))
                for one in record.get("plugins", [])
            ],
        ),
    ]
    return [table for table in tables if table.groups]


def _table(title: str, header: Row, rows: Iterable[Row]) -> Table:
    found = list(rows)
    return Table(title, header, [Group("", found)] if found else [])


def _run(record: Mapping[str, Any]) -> list[Row]:
    environment = record.get("environment", {})
    machine = environment.get("machine", {})
    revision = environment.get("revision")
    if revision:
        commit = revision["commit"] + (" with uncommitted changes" if revision["dirty"] else "")
    else:
        commit = f"- ({environment.get('revision_reason', 'not recorded')})"
    given = record.get("command", {}).get("given", [])
    command = ["spath-eval", *([] if given[:1] == ["run"] else ["run"]), *given]
    rows = {
        "status": record.get("status"),
        "created": record.get("created"),
        "command": shlex.join(command),
        "seed": record.get("seed"),
        "revision": commit,
        "Python": environment.get("python"),
        "processor": machine.get("processor"),
        "GPU": machine.get("gpu"),
        "system": machine.get("system"),
        "cores": machine.get("cores"),
        "device": environment.get("device"),
        "dtype": environment.get("dtype"),
        "threads": environment.get("threads"),
    }
    return [(name, str(value)) for name, value in rows.items() if value is not None]


def _model(model: Entry) -> Row:
    experts = sum(bool(site.get("experts")) for site in model.get("sites", []))
    sites = f"{len(model.get('sites', []))}" + (f" ({experts} of experts)" if experts else "")
    return (
        _text(model.get("name")),
        _text(model.get("arch")),
        _text(model.get("reference")),
        _text(model.get("revision")),
        _text(model.get("fingerprint")),
        f"{model['parameters']:,}" if "parameters" in model else "-",
        _text(model.get("layers")),
        sites,
        f"{model['ffn_share']:.1%}" if "ffn_share" in model else "-",
    )


def _profile(profile: Entry) -> list[Row]:
    return [
        (
            _text(profile.get("model")),
            domain,
            _text(profile.get("tokens", {}).get(domain)),
            _text(profile.get("texts", {}).get(domain)),
            _text(profile.get("fingerprint")),
        )
        for domain in profile.get("domains", [])
    ]


def _task(task: Entry) -> Row:
    names = ("task", "metric", "filter", "version", "documents", "limit", "num_fewshot")
    about = [_text(task.get(name)) for name in names]
    return (*about, decimals(task.get("chance")), _text(task.get("digest")))


def _case(case: Entry) -> Row:
    gates = case.get("gates") or {}
    exercised, parity, disjoint = (gates.get(name) for name in ("exercised", "parity", "disjoint"))
    return (
        _text(case["id"]),
        _text(case.get("execution")),
        _verdict(exercised) + (f" at {exercised['sites']} sites" if exercised and "sites" in exercised else ""),
        _verdict(parity) + (f", to {parity['max_relative_difference']:.1e}" if parity else ""),
        "no, allowed" if disjoint and disjoint.get("allowed") and not disjoint["ok"] else _verdict(disjoint),
        _text((case.get("mask") or {}).get("digest")),
    )


def _samples(record: Mapping[str, Any]) -> list[Row]:
    found: Sequence[Entry] = [*record.get("tasks", []), *record.get("cases", [])]
    return [(entry["samples"]["path"], entry["samples"]["sha256"]) for entry in found if entry.get("samples")]


def _verdict(gate: Entry | None) -> str:
    return "-" if not gate else "yes" if gate["ok"] else "NO"


def _text(value: Any) -> str:
    return "-" if value is None else str(value)
