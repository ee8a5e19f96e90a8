"""Nothing is fetched from a network in tests, and what is marked `gpu` runs only where there is one."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TQDM_DISABLE="1")

Distribute = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture
def distribute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Distribute:
    """Install a distribution for the length of a test: `distribute(name, entry_points, modules, version="1.0")`.

    `entry_points` maps names to modules, and `modules` modules to their source. The distribution lies on the Python
    path, in the same form in which pip installs one.
    """
    known = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def install(
        name: str, entry_points: Mapping[str, str], modules: Mapping[str, str], *, version: str = "1.0"
    ) -> Path:
        for module, source in modules.items():
            (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
        lines = ["[spath_eval]", *(f"{point} = {module}" for point, module in entry_points.items())]
        (folder / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        importlib.invalidate_caches()
        return folder

    yield install
    for module in set(sys.modules) - known:
        if Path(getattr(sys.modules[module], "__file__", None) or "/").is_relative_to(tmp_path):
            del sys.modules[module]


@pytest.fixture
def sample_plugin(distribute: Distribute) -> Path:
    """The package in `tests/sample_plugin`, installed for the length of a test; the path of its `dist-info`."""
    import tomllib

    folder = Path(__file__).parent / "sample_plugin"
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entry_points = project["entry-points"]["spath_eval"]
    modules = {name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in entry_points.values()}
    return distribute(project["name"], entry_points, modules, version=project["version"])
