"""`spath-eval models`: the families, where their small checkpoints stand, and how those score.

Nothing is loaded: sizes are read from the header of the safetensors files, scores from the table in the model card.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from spath_eval.cli import load_registry, plugin_options
from spath_eval.cli.terminal import columns
from spath_eval.contracts import Architecture, UsageError

SCORE_ROW = re.compile(r"^\| (\S+) \| (\S+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE)
"""A row of a model card's table: task, metric, items, chance, score."""


@dataclass(frozen=True)
class CardScore:
    """What a model card says of one task."""

    task: str
    metric: str
    items: int
    chance: float
    score: float


@dataclass(frozen=True)
class Checkpoint:
    """A family's small trained checkpoint."""

    folder: str
    file_bytes: int
    """Of its safetensors files."""
    parameters: int
    scores: tuple[CardScore, ...]
    """The dense model's; none without a model card."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@plugin_options
def command(as_json: bool, plugin_names: tuple[str, ...], strict_plugins: bool) -> None:
    """List the model families: types, FFN shapes, reference shapes, and small checkpoints with their scores."""
    families = list(load_registry(plugin_names, strict_plugins).architectures.values())
    checkpoints = [read_checkpoint(family.checkpoint) for family in families]
    click.echo((_as_json if as_json else _as_text)(families, checkpoints))


def read_checkpoint(folder: Path | None) -> Checkpoint | None:
    """What stands in a checkpoint's folder; none where there is no folder, or are no weights in it.

    Raises `UsageError` where the weights cannot be read.
    """
    files = sorted(folder.glob("*.safetensors")) if folder else []
    if folder is None or not files:
        return None
    card = folder / "README.md"
    rows = SCORE_ROW.findall(card.read_text(encoding="utf-8")) if card.is_file() else []
    return Checkpoint(
        folder=str(folder),
        file_bytes=sum(file.stat().st_size for file in files),
        parameters=sum(map(_parameters, files)),
        scores=tuple(
            CardScore(task, metric, int(items), float(chance), float(score))
            for task, metric, items, chance, score in rows
        ),
    )


def _parameters(file: Path) -> int:
    """Numbers in a safetensors file: eight bytes say how long the header is, JSON that gives each tensor's shape."""
    try:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise UsageError(f"{file}: not a readable safetensors file ({type(error).__name__})") from error


def _shapes(family: Architecture) -> list[str]:
    return list(dict.fromkeys(ffn.shape for ffn in family.ffns))


def _as_json(families: Sequence[Architecture], checkpoints: Sequence[Checkpoint | None]) -> str:
    content = [
        {
            "name": family.name,
            "model_types": family.model_types,
            "shapes": _shapes(family),
            "reference_shapes": [shape.name for shape in family.reference_shapes],
            "checkpoint": checkpoint and asdict(checkpoint),
        }
        for family, checkpoint in zip(families, checkpoints, strict=True)
    ]
    return json.dumps({"architectures": content}, indent=2)


def _as_text(families: Sequence[Architecture], checkpoints: Sequence[Checkpoint | None]) -> str:
    from tabulate import tabulate

    rows = [
        (
            family.name,
            ", ".join(family.model_types),
            ", ".join(_shapes(family)) or "-",
            ", ".join(shape.name for shape in family.reference_shapes) or "-",
            f"{checkpoint.file_bytes / 1e6:.1f} MB" if checkpoint else "-",
            f"{checkpoint.parameters:,}" if checkpoint else "-",
        )
        for family, checkpoint in zip(families, checkpoints, strict=True)
    ]
    text = tabulate(
        rows,
        ("family", "model types", "FFN shapes", "reference shapes", "checkpoint", "parameters"),
        disable_numparse=True,
        maxcolwidths=[None, 24, 14, 20, None, None],
        colalign=("left", "left", "left", "left", "right", "right"),
    )
    scores = {family.name: one.scores for family, one in zip(families, checkpoints, strict=True) if one}
    return f"{text}\n\n{_score_table(scores)}" if any(scores.values()) else text


def _score_table(scores: Mapping[str, Sequence[CardScore]]) -> str:
    """Tasks down, families across."""
    from spath_eval.reports.tables import Group, Table

    by_task = {name: {row.task: row for row in rows} for name, rows in scores.items()}
    about = {row.task: row for rows in scores.values() for row in rows}
    lines = [
        (
            task,
            row.metric,
            str(row.items),
            f"{row.chance:g}",
            *(f"{rows[task].score:.3f}" if task in rows else "-" for rows in by_task.values()),
        )
        for task, row in about.items()
    ]
    header = ("task", "metric", "items", "chance", *scores)
    return Table("Dense scores of the checkpoints", header, [Group("", lines)]).text(columns(), False)
