"""What is installed is what is in the repository."""

from __future__ import annotations

import configparser
import importlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import spath_eval

ROOT = Path(__file__).parents[1]
FOLDERS = {"spath_eval": "spath_eval", "plugins": "spath_eval.plugins", "tasks": "spath_eval.tasks"}
"""Top-level folders and the packages they are."""


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the project, unpacked."""
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools 77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignore = shutil.ignore_patterns("__pycache__", ".*")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", folder, source], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def sources() -> list[Path]:
    """Every file of the packages, relative to the root."""
    paths = [path.relative_to(ROOT) for name in FOLDERS for path in (ROOT / name).rglob("*") if path.is_file()]
    return [path for path in paths if not any(part.startswith((".", "__pycache__")) for part in path.parts)]


def installed(path: Path) -> Path:
    """Where a file of the repository is found after installation."""
    top, *rest = path.parts
    return Path(*FOLDERS[top].split("."), *rest)


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_every_folder_with_code_is_a_package(setup):
    folders = {installed(path).parent for path in sources() if path.suffix == ".py"}
    assert sorted(".".join(folder.parts) for folder in folders) == sorted(lines(setup["options"]["packages"]))


def test_every_entry_point_is_there(setup):
    section = setup["options.entry_points"]
    for line in lines(section["console_scripts"]) + lines(section["pytest11"]) + lines(section["spath_eval"]):
        module, _, attribute = line.partition("=")[2].strip().partition(":")
        found = importlib.import_module(module)
        assert not attribute or hasattr(found, attribute), line


def test_constraints_pin_every_requirement_within_its_range(setup):
    pins = {}
    for line in lines((ROOT / "constraints.txt").read_text(encoding="utf-8")):
        name, version = line.split("==")
        assert "+" not in version, "a local version cannot be installed from the package index"
        pins[canonicalize_name(name)] = version
    requirements = lines(setup["options"]["install_requires"])
    for extra in setup["options.extras_require"].values():
        requirements += lines(extra)
    for requirement in map(Requirement, requirements):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_the_version_is_cited(setup):
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {spath_eval.__version__}\n" in citation
    assert f"\nlicense: {setup['metadata']['license']}\n" in citation


def test_a_wheel_holds_every_file_and_the_licence(wheel):
    missing = [str(path) for path in sources() if not (wheel / installed(path)).is_file()]
    assert missing == []
    (info,) = wheel.glob("*.dist-info")
    assert (info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_a_wheel_works_in_an_empty_folder(wheel, tmp_path):
    modules = "spath_eval, spath_eval.plugins.zoo, spath_eval.tasks"
    program = f"import {modules}\nfor module in {modules}: print(module.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(wheel)}
    run = {"cwd": tmp_path, "env": environment, "check": True, "capture_output": True, "text": True}
    output = subprocess.run([sys.executable, "-c", program], **run).stdout
    assert [Path(path).is_relative_to(wheel) for path in output.split()] == [True, True, True]
    output = subprocess.run([sys.executable, "-m", "spath_eval", "plugins", "--json"], **run).stdout
    content = json.loads(output)
    assert content["problems"] == []
    assert {plugin["distribution"] for plugin in content["plugins"]} >= {"spath-eval"}
