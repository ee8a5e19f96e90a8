"""`spath-eval baseline`: the records that later runs are compared with."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from spath_eval.contracts import UsageError

if TYPE_CHECKING:
    from spath_eval.comparison import Evidence

FOLDER = Path("results/baselines")
KEPT = ("case", "task", "filter", "doc_id", "doc_hash", "prompt_hash", "target_hash", "metrics", "filtered_resps")
"""What a baseline keeps of an answer, besides its scores: no text of a benchmark, whose licence need not allow it."""


@click.group()
def command() -> None:
    """Keep a record as the one that later runs are compared with."""


@command.command()
@click.argument("record", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help=f"Where the baseline goes.  [default: {FOLDER}/MODELS-STRATEGIES.json]",
)
def update(record: Path, output: Path | None) -> None:
    """Make RECORD the baseline, and show what that changes.

    Its samples go with it, without the texts of the benchmarks. A record of a run that is not complete, or of code that
    was not committed, is refused, and so is a checkout with changes that are not committed, other baselines apart.
    """
    from spath_eval import comparison, records
    from spath_eval.cli.compare import report

    new = comparison.Evidence.read(record)
    destination = output or FOLDER / f"{_name(new.record)}.json"
    samples = destination.with_name(f"{destination.name.removesuffix('.json')}.samples.jsonl")
    _check(new)
    _check_tree([record, *_samples(new), destination, samples, FOLDER, FOLDER.parent / "runs"])
    records.check_writable(destination)
    old = comparison.Evidence.read(destination) if destination.exists() else None
    kept = records.write_samples(_rows(new), samples)
    entries = {
        name: [entry | {"samples": kept} if entry.get("samples") else entry for entry in new.record[name]]
        for name in ("tasks", "cases")
    }
    records.write({**new.record, **entries}, destination)
    if old:
        report(comparison.compare(old, new))
    else:
        click.echo(f"new baseline: {len(new.record['cases'])} cases")
    click.echo(f"baseline: {destination}", err=True)


def _name(record: Mapping[str, Any]) -> str:
    """Its models and strategies, controls apart."""
    models = dict.fromkeys(case["model"] for case in record["cases"])
    strategies = dict.fromkeys(
        case["strategy"]["name"] for case in record["cases"] if not case["strategy"].get("control")
    )
    return "-".join("+".join(names) for names in (models, strategies) if names) or "baseline"


def _check(new: Evidence) -> None:
    """Raise `UsageError` for a record that is no baseline."""
    status, revision = new.record["status"], new.record["environment"].get("revision")
    if status != "complete":
        raise UsageError(f"{new.path}: a baseline is of a run that is complete, and this one is {status}")
    if new.missing:
        raise UsageError(f"{new.path}: a baseline needs the answers of its run: {new.missing}")
    if revision and revision["dirty"]:
        raise UsageError(f"{new.path}: was made by a checkout of spath-eval with changes that are not committed")


def _check_tree(own: Iterable[Path]) -> None:
    """Raise `UsageError` where the checkout around the working directory has changes, but for files and folders `own`.

    Elsewhere than in a checkout, which is said, a baseline belongs to no commit.
    """
    # A hook or an alias of git points these at another repository.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, env=variables)
        return done.stdout.rstrip("\n")

    try:
        root = Path(git("rev-parse", "--show-toplevel"))
    except (OSError, subprocess.CalledProcessError):
        click.echo("warning: this is no git checkout, so that the baseline belongs to no commit", err=True)
        return
    inside = [path for path in map(_resolved, own) if path.is_relative_to(root)]
    excluded = [f":(top,exclude,literal){path.relative_to(root).as_posix()}" for path in inside]
    if changed := git("--no-optional-locks", "status", "--porcelain", "--", ":(top)", *excluded).splitlines():
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UsageError(f"a baseline belongs to a commit, and this is not committed: {changed[0][3:]}{more}")


def _resolved(path: Path) -> Path:
    """The absolute path of a file that may be a link."""
    return path.parent.resolve() / path.name


def _samples(new: Evidence) -> Iterator[Path]:
    """The record's samples files."""
    named = (entry.get("samples") for entry in [*new.record["tasks"], *new.record["cases"]])
    return (Path(new.path).parent / name for name in dict.fromkeys(samples["path"] for samples in named if samples))


def _rows(new: Evidence) -> Iterator[dict[str, Any]]:
    """The samples that a later comparison needs."""
    grouped_by = {entry["task"]: entry["grouped_by"] for entry in new.record["tasks"] if "grouped_by" in entry}
    for (_, task, _), documents in new.documents.items():
        for row in documents.values():
            kept = {name: row[name] for name in (*KEPT, *row["metrics"]) if name in row}
            answers = row.get("filtered_resps", ())
            if any(isinstance(part, str) for answer in answers if isinstance(answer, list) for part in answer):
                del kept["filtered_resps"]  # programs, which begin with the benchmark's text
            if shared := grouped_by.get(task):
                text = str(row["doc"][shared]).encode("utf-8", "backslashreplace")
                kept["doc"] = {shared: hashlib.sha256(text).hexdigest()}
            yield kept
    for case, texts in new.heldout.items():
        yield from ({"case": case, "heldout": key, "nats": nats, "tokens": n} for key, (nats, n) in texts.items())
