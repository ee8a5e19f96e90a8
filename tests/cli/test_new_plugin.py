"""`spath-eval new-plugin`: the packages it writes are whole, pass their tests, and load."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from spath_eval import plugins, records
from spath_eval.cli import main
from spath_eval.cli.new_plugin import FILES
from spath_eval.testing import SIZES, tiny_model

HEAVY = ("torch", "transformers", "lm_eval", "pandas", "numpy", "scipy", "datasets")
NAMES = {"strategy": "quiet-one", "architecture": "olmo-2", "domain": "night_sky", "report": "few"}


@pytest.fixture
def package(tmp_path, monkeypatch, capsys):
    """Writes a package of a kind: the folder, and what was printed."""
    monkeypatch.chdir(tmp_path)

    def write(kind: str, name: str | None = None) -> tuple[Path, str]:
        name = name or NAMES[kind]
        assert main(["new-plugin", name, "--kind", kind]) == 0
        return tmp_path / name, capsys.readouterr().out

    return write


@pytest.mark.parametrize("kind", FILES)
def test_each_file_is_printed_and_is_there(package, kind):
    folder, printed = package(kind)
    written = sorted(str(path.relative_to(folder.parent)) for path in folder.rglob("*") if path.is_file())
    assert sorted(printed.splitlines()) == written
    tops = {Path(path).relative_to(folder.name).parts[0] for path in written}
    assert {"README.md", "setup.cfg", "pyproject.toml", "tests", ".github"} <= tops
    for path in written:
        text = (folder.parent / path).read_text(encoding="utf-8")
        assert text.endswith("\n")
        assert not text.endswith("\n\n")
        assert "{{" not in text
        assert "{%" not in text
        assert "\n\n\n\n" not in text


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ["x", "rather-long_name-of-a-plugin-2", "true"])
def test_what_is_written_is_as_ruff_has_it_by_default(package, kind, name):
    ruff = shutil.which("ruff", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if ruff is None:
        pytest.skip("ruff is not installed")
    folder, _ = package(kind, name)
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run([ruff, *command, "--isolated", "--no-cache"], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", FILES)
def test_a_package_passes_its_own_tests_as_it_is(package, kind):
    folder, _ = package(kind)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::DeprecationWarning"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


@pytest.mark.parametrize("kind", FILES)
def test_a_package_loads_and_registers_its_object_by_its_name(package, kind, monkeypatch, capsys):
    folder, _ = package(kind)
    module = f"spath_eval_{folder.name.replace('-', '_')}"
    monkeypatch.syspath_prepend(folder)
    assert main(["plugins", "--json", "-p", module]) == 0
    (plugin,) = [one for one in json.loads(capsys.readouterr().out)["plugins"] if one["name"] == module]
    assert plugin["status"] == "active"
    assert plugin["provides"] == {kind: [folder.name]}
    del sys.modules[module]


@pytest.mark.parametrize("kind", FILES)
def test_a_package_says_how_it_is_built_and_found(package, kind):
    import configparser
    import tomllib

    folder, _ = package(kind)
    parser = configparser.ConfigParser()
    parser.read(folder / "setup.cfg", encoding="utf-8")
    module = f"spath_eval_{folder.name.replace('-', '_')}"
    assert parser["options.entry_points"]["spath_eval"].strip() == f"{folder.name} = {module}"
    assert parser["options"].get("py_modules") == (None if kind == "domain" else module)
    assert tomllib.loads((folder / "pyproject.toml").read_text())["build-system"]["requires"] == ["setuptools>=77"]


def test_packages_of_all_kinds_can_be_installed_run_and_removed(package, tmp_path, monkeypatch):
    """In an environment of their own, which shares the libraries of this one."""
    pytest.importorskip("setuptools", minversion="77", reason="installing a package needs setuptools 77")
    environment = tmp_path / "environment"
    venv.create(environment)
    (libraries,) = environment.glob("lib/python*/site-packages")
    (libraries / "shared.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    monkeypatch.setenv("SPATH_CACHE_DIR", str(tmp_path / "cache"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()

    def pip(command, *arguments):
        pip = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python", command, "--quiet"]
        subprocess.run([*pip, *arguments], check=True, capture_output=True)

    def spath_eval(*arguments):
        command = [environment / "bin" / "python", "-m", "spath_eval", *arguments]
        done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def listed():
        plugins = json.loads(spath_eval("plugins", "--json", "--strict-plugins"))["plugins"]
        return {plugin["name"]: plugin for plugin in plugins if plugin["distribution"].endswith(tuple(distributions))}

    distributions = [f"spath-eval-{name.replace('_', '-')}" for name in NAMES.values()]
    pip("install", "--no-deps", "--no-build-isolation", "--no-index", *(package(kind)[0] for kind in NAMES))
    assert {name: plugin["provides"] for name, plugin in listed().items()} == {
        name: {kind: [name]} for kind, name in NAMES.items()
    }

    save_tiny_model("olmo2", elsewhere / "tiny")
    chosen = ["--model", "tiny", "--arch", NAMES["architecture"], "--strategy", NAMES["strategy"]]
    brief = "--no-speed --no-controls --limit 4 --profile-tokens 500 --preservation-tokens 200 -o record.json".split()
    spath_eval("run", *chosen, "--domain", NAMES["domain"], *brief)
    record = records.read(elsewhere / "record.json")
    assert {plugin["distribution"] for plugin in record["plugins"]} == {"spath-eval", *distributions}
    assert spath_eval("report", "record.json", "--format", NAMES["report"]).split() == [
        "passed",
        "-",
        "tiny/night_sky/quiet-one@0.15",
    ]

    pip("uninstall", "--yes", *distributions)
    assert listed() == {}


def save_tiny_model(model_type: str, folder: Path) -> None:
    """A tiny model with the tokenizer of the project's own."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(plugins.__file__).parent / "zoo" / "tokenizer")
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
    sizes = {**SIZES, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 512}
    tiny_model(model_type, sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "cause"),
    [
        ("Quiet", "'Quiet' cannot name a package: write small letters and digits, joined by - or _"),
        ("2nd", "cannot name a package"),
        ("two words", "cannot name a package"),
        ("a--b", "cannot name a package"),
        ("../up", "cannot name a package"),
        ("", "cannot name a package"),
        ("naïve", "cannot name a package"),
        ("wanda", "the name 'wanda' is taken by plugin 'wanda' (spath-eval "),
        ("gemma", "the name 'gemma' is taken by plugin 'gemma' (spath-eval "),
    ],
)
def test_a_bad_name_is_refused(tmp_path, monkeypatch, capsys, name, cause):
    monkeypatch.chdir(tmp_path)
    assert main(["new-plugin", "--kind", "strategy", "--", name]) == 4
    output, errors = capsys.readouterr()
    assert output == ""
    assert cause in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("there", ["folder", "file", "link"])
def test_what_exists_already_is_left_alone(tmp_path, monkeypatch, capsys, there):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine"
    if there == "folder":
        path.mkdir()
    elif there == "file":
        path.write_text("mine")
    else:
        path.symlink_to(tmp_path / "nowhere")
    assert main(["new-plugin", "mine", "--kind", "report"]) == 4
    assert "mine exists already" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.rglob("*")] == ["mine"]


def test_a_kind_is_needed_and_must_be_known(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["new-plugin", "mine"]) == main(["new-plugin", "mine", "--kind", "strategi"]) == 4
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def refuse(*arguments, **settings):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert main(["new-plugin", "mine", "--kind", "report"]) == 4
    assert capsys.readouterr().err == "error: cannot write mine: Permission denied\n"


def test_nothing_heavy_is_imported(tmp_path):
    program = "\n".join(
        [
            "import sys",
            "from spath_eval.cli import main",
            "assert main(['new-plugin', 'mine', '--kind', 'domain']) == 0",
            f"print(*[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)",
        ]
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[1:] == [""]
