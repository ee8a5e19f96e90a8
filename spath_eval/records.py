"""The record: everything a run found out, in one versioned JSON file from which every report is made.

Fields may be added to a version. An absent field was not measured; a null has a `reason` (or `FIELD_reason`) beside
it; NaN and infinity never occur. `record.schema.json` beside this module describes all of it. Files are written whole
or not at all: to a temporary file in the same folder, which then takes the place of the old one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import secrets
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from spath_eval.contracts import UsageError

VERSION = 1
OTHER_KINDS = ("speed", "findings")
"""What `kind` is in the files of commands that make no record, by which they are named."""
SCHEMA = Path(__file__).with_name("record.schema.json")
PACKAGES = (
    "spath-eval",
    "torch",
    "transformers",
    "lm_eval",
    "tokenizers",
    "datasets",
    "accelerate",
    "numpy",
    "scipy",
    "safetensors",
)
"""Distributions whose versions can change a result."""


def write(record: Mapping[str, Any], path: str | Path) -> None:
    """Write `record` to `path` as UTF-8 JSON, whole or not at all; missing folders are made.

    Values of numpy and torch, tuples, paths and dataclasses become what JSON has. Raises `ValueError` with the key
    path of a number that is not finite, `TypeError` with that of a value JSON has no form for, and `UsageError` where
    the file cannot be written.
    """
    text = json.dumps(_plain(record), indent=1, ensure_ascii=False, allow_nan=False)
    with _replacing(Path(path)) as file:
        file.write(_encoded(text))


def write_samples(rows: Iterable[Mapping[str, Any]], path: str | Path, *, folder: Path | None = None) -> dict[str, str]:
    """Write one JSON line per row, whole or not at all, and return its `{path, sha256}` for the record.

    `folder` is the record's, which the returned path is relative to; without it, the record lies beside the samples.
    Rows are converted and errors raised as in `write`.
    """
    path = Path(path)
    digest = hashlib.sha256()
    with _replacing(path) as file:
        for number, row in enumerate(rows):
            line = _encoded(json.dumps(_plain(row, f"row {number}"), ensure_ascii=False, allow_nan=False))
            digest.update(line)
            file.write(line)
    return {"path": Path(os.path.relpath(path, folder or path.parent)).as_posix(), "sha256": digest.hexdigest()}


def check_writable(path: str | Path) -> None:
    """Raise the `UsageError` that `write` would raise, before a run is spent on it; leaves nothing behind."""
    path = Path(path)
    with _explained(path):
        folder = _destination(path).parent
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder):
            pass


def read(path: str | Path, *kinds: str) -> dict[str, Any]:
    """The record in the file `path`, or what another command wrote there, if its `kind` is among `kinds`.

    Raises `UsageError` where there is none, or one of a newer version.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not a record: {error}") from error
    kind = record.get("kind") if isinstance(record, dict) else None
    if kind in kinds:
        return record
    if kind in OTHER_KINDS:
        raise UsageError(f"{path} is not a record of a run: `spath-eval {kind}` wrote it")
    version = record.get("version") if isinstance(record, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise UsageError(f"{path} is not a record: it has no version")
    if version > VERSION:
        raise UsageError(f"{path} has newer version {version}: upgrade spath-eval, which reads up to {VERSION}")
    return record


def validate(record: Mapping[str, Any]) -> None:
    """Raise `ValueError` naming the first places where `record` departs from the schema. Needs `jsonschema`."""
    try:
        from jsonschema import Draft202012Validator
        from jsonschema.exceptions import relevance
    except ImportError as error:
        raise UsageError("validating a record needs jsonschema: pip install 'spath-eval[test]'") from error
    validator = Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
    errors = sorted(validator.iter_errors(_plain(record)), key=relevance)
    if errors:
        shown = "; ".join(f"{error.json_path}: {error.message[:200]}" for error in errors[:5])
        raise ValueError(f"not a version {VERSION} record ({len(errors)} problems): {shown}")


def environment(device: str, dtype: str) -> dict[str, Any]:
    """Where a run takes place: package versions, machine, threads, and the revision of this package's checkout."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    machine = {"system": platform.system(), "architecture": platform.machine(), "cores": _cores()}
    if processor := _processor():
        machine["processor"] = processor
    if device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name(device)
    return {
        "packages": versions,
        "python": platform.python_version(),
        "machine": machine,
        "device": device,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        **_revision(Path(__file__).parent),
    }


def _plain(value: Any, where: str = "") -> Any:
    """`value` in the types JSON has; `where` is its key path, for messages."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where or 'the record'} is {value}, which a record cannot hold")
        return float(value)
    if isinstance(value, Mapping):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise TypeError(f"{where or 'the record'} has the key {odd[0]!r}, which is not text")
        return {key: _plain(item, f"{where}.{key}" if where else key) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, where)
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), where)
    raise TypeError(f"{where or 'the record'} is a {type(value).__name__}, which a record cannot hold")


def _encoded(text: str) -> bytes:
    # Only lone surrogates cannot be encoded, and their backslash form is JSON's own escape for them.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"it contains {name}")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


def _destination(path: Path) -> Path:
    """The file that `path` stands for, links followed. Raises `OSError` where a file cannot take that place."""
    path = Path(os.path.realpath(path))
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return path
    if stat.S_ISDIR(mode):
        raise OSError("it is a folder")
    if not stat.S_ISREG(mode):
        raise OSError("it is not a regular file")
    return path


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which becomes `path` at the end of the block, or vanishes where the block raises."""
    with _explained(path):
        destination = _destination(path)
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = destination.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            with temporary.open("xb") as file:
                yield file
            os.replace(temporary, destination)
        finally:
            temporary.unlink(missing_ok=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    """The processor's model, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _revision(package: Path) -> dict[str, Any]:
    """`{revision: {commit, dirty}}` of the git checkout that tracks the folder `package`, or null and the reason."""
    # A hook or an alias of git points these at another repository.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(package), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30, env=variables)
        return done.stdout.strip()

    try:
        # A virtual environment inside somebody's checkout is not that checkout's work.
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"revision": {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}}
    except FileNotFoundError:
        reason = "git is not installed"
    except subprocess.CalledProcessError:
        reason = "no git checkout that tracks the package could be read"
    except (OSError, subprocess.SubprocessError) as error:
        reason = f"git failed: {error}"
    return {"revision": None, "revision_reason": reason}
