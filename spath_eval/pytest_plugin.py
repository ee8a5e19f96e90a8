"""The pytest plugin: tests that hold a model to what a run of spath-eval measures.

The fixture `spath` runs what `spath-eval run` would, in the process of the tests, and hands out its figures. A figure
of a case that failed its gates, and one that is not defined, fails the test that asks for it. The models that were run
stay in memory until the session ends, and the same run is made once. Nothing heavy is imported before the first run.
"""

from __future__ import annotations

import json
import logging
import os
import random
import textwrap
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import click

    from spath_eval.collection import Case
    from spath_eval.contracts import LoadRequest, Report
    from spath_eval.registry import Registry
    from spath_eval.session import Load, Session

DOCUMENTS = 3
"""Of each metric, the documents whose score changed that a failure shows."""
LONGEST = 400
"""Characters of a prompt or an answer that a failure shows; the end is kept."""
PHASES = ("prefill", "decode", "ffn")
USED = pytest.StashKey[list["Run"]]()
"""What a test has run."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("spath-eval")
    group.addoption(
        "--spath-output",
        metavar="DIR",
        help="Where the records of the fixture `spath` go, instead of a temporary folder.",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        'spath(**options): options of `spath.run` that a test does not give itself, e.g. arch="gemma", sparsity=0.15.',
    )


@pytest.fixture(scope="session")
def _spath_runner(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> _Runner:
    return _Runner(pytestconfig, tmp_path_factory)


@pytest.fixture
def spath(request: pytest.FixtureRequest, _spath_runner: _Runner) -> Spath:
    """Runs spath-eval: `spath.run(model=..., strategy="negative", sparsity=0.15)["math"].retention.lower`."""
    return Spath(request.node, _spath_runner)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for run in item.stash.get(USED, ()):
            try:
                text = run.explained()
            except Exception as error:  # must not take the place of what failed
                text = f"its record cannot be shown: {type(error).__name__}: {error}"
            if add := getattr(report.longrepr, "addsection", None):  # part of the message, where it is no mere text
                add(f"spath-eval: {run.path}", text)
            else:
                report.sections.append((f"spath-eval: {run.path}", text))
    return report


@dataclass(frozen=True)
class Interval:
    """A figure with its 95% interval. Whatever is not there fails the test that asks for it."""

    name: str
    found: Mapping[str, Any]
    """`value`, `ci95` and `reason` as in the record."""

    @property
    def value(self) -> float:
        """The estimate."""
        __tracebackhide__ = True
        if self.found.get("value") is None:
            pytest.fail(f"{self.name} is not defined: {self.found.get('reason') or 'it was not measured'}")
        return self.found["value"]

    @property
    def lower(self) -> float:
        """The lower end of the interval."""
        __tracebackhide__ = True
        return self._ends[0]

    @property
    def upper(self) -> float:
        """The upper end of the interval."""
        __tracebackhide__ = True
        return self._ends[1]

    @property
    def _ends(self) -> tuple[float, float]:
        __tracebackhide__ = True
        value, interval = self.value, self.found.get("ci95")
        if interval is None:
            reason = self.found.get("reason") or "the record has none"
            pytest.fail(f"{self.name} is {value:.3f} without an interval: {reason}")
        return interval[0], interval[1]

    def __str__(self) -> str:
        value, interval = self.found.get("value"), self.found.get("ci95")
        if value is None:
            return f"not defined: {self.found.get('reason') or 'not measured'}"
        return f"{value:.4f}" + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")

    def __repr__(self) -> str:
        return f"<{self.name}: {self}>"


class Speed(dict[str, Interval]):
    """Dense time / sparse time of the whole model, by phase: `prefill`, `decode`, `ffn`.

    A phase that was not measured fails the test that asks for it.
    """

    def __init__(self, timings: Mapping[str, Interval], reasons: Mapping[str, str], otherwise: str) -> None:
        super().__init__(timings)
        self._reasons, self._otherwise = reasons, otherwise

    def __missing__(self, phase: str) -> Interval:
        __tracebackhide__ = True
        pytest.fail(f"there is no speed of {phase}: {self._reasons.get(phase, self._otherwise)}")


@dataclass(frozen=True)
class CaseResult:
    """What a run found out about one case."""

    record: Mapping[str, Any]
    """The case in the record."""

    @property
    def id(self) -> str:
        """`model/domain/strategy@sparsity`."""
        return self.record["id"]

    @property
    def outcome(self) -> str:
        """`passed`, `failed` or `error`."""
        return self.record["outcome"]

    @property
    def message(self) -> str:
        """Why it did not pass."""
        return self.record.get("message", "")

    @property
    def retention(self) -> Interval:
        """The mean retention of the tasks that have one."""
        from spath_eval.reports.matrices import mean_retention

        __tracebackhide__ = True
        self._check()
        entries = self.record.get("quality", [])
        undefined = [f"{one['task']}: {reason}" for one in entries if (reason := one["retention"].get("reason"))]
        reason = "; ".join(dict.fromkeys(undefined)) or self.record.get("quality_reason")
        return Interval(f"retention of {self.id}", {"reason": reason, **mean_retention(self.record)})

    @property
    def perplexity_ratio(self) -> Interval:
        """Sparse / dense perplexity of held-out text."""
        from spath_eval.reports.matrices import perplexity_ratio

        __tracebackhide__ = True
        self._check()
        return Interval(f"perplexity ratio of {self.id}", perplexity_ratio(self.record))

    @property
    def speed(self) -> Speed:
        """How much faster the model runs, where that was measured."""
        __tracebackhide__ = True
        self._check()
        otherwise = self.record.get("speed_reason", "not measured")
        of_model = [entry for entry in self.record.get("speed", []) if entry["subject"] == "model"]
        entry: Mapping[str, Any] = of_model[0] if of_model else {}
        timings, reasons = {}, {}
        for phase in PHASES:
            timing = entry.get(phase)
            if timing and "fault" not in timing:
                found = {"value": timing["ratio"], "ci95": timing["ci95"], "reason": timing.get("ci95_reason")}
                timings[phase] = Interval(f"{phase} speed of {self.id}", found)
            elif timing or f"{phase}_reason" in entry:
                reasons[phase] = timing["fault"] if timing else entry[f"{phase}_reason"]
        return Speed(timings, reasons, otherwise)

    def _check(self) -> None:
        """Fail the test where the case has not passed its gates."""
        __tracebackhide__ = True
        if self.outcome != "passed":
            pytest.fail(f"{self.id} {self.outcome}: {self.message}")

    def __repr__(self) -> str:
        return f"<case {self.id}, {self.outcome}>"


class NoSuchCase(KeyError):
    """A key that names no case, or several."""

    def __str__(self) -> str:
        return self.args[0]


class Run(Mapping[Any, CaseResult]):
    """What a run found out, by domain.

    A domain stands for its case where there is one, controls apart that were not asked for. Else a key is
    `(strategy, sparsity, domain)` or the id of a case. Raises `NoSuchCase` where it names none, or several.
    """

    def __init__(self, record: Mapping[str, Any], path: Path, cases: Mapping[str, Case], report: Report) -> None:
        self.record = record
        """All of the record."""
        self.path = path
        """Its file; the samples lie beside it."""
        self.cases = {case["id"]: CaseResult(case) for case in record["cases"]}
        """All cases by id."""
        self.regression: str | None = None
        """What is worse than the baseline, where one was given."""
        self._declared, self._report = cases, report

    def __getitem__(self, key: Any) -> CaseResult:
        __tracebackhide__ = True
        if key in self.cases:
            return self.cases[key]
        found = [self.cases[id] for id, case in self._competing.items() if self._is_named(key, case)]
        if len(found) == 1:
            return found[0]
        if found:
            ids = ", ".join(repr(case.id) for case in found)
            raise NoSuchCase(f"{key!r} names several cases: index by (strategy, sparsity, domain), or by id: {ids}")
        raise NoSuchCase(f"{key!r} names no case: there are {', '.join(map(repr, self.cases))}")

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(case.domain.name for case in self._competing.values()))

    def __len__(self) -> int:
        return len(list(iter(self)))

    @property
    def _competing(self) -> dict[str, Case]:
        """The cases without those that only accompany others: controls, and masks on domains that are not theirs."""
        own = {id: case for id, case in self._declared.items() if case.is_own}
        return {id: case for id, case in own.items() if not case.strategy.control} or own

    def _is_named(self, key: Any, case: Case) -> bool:
        from spath_eval.collection import spell

        if isinstance(key, tuple) and len(key) == 3:
            strategy, sparsity, domain = key
            named = strategy in (case.strategy.name, spell(case.strategy))
            return named and (sparsity, domain) == (case.sparsity, case.domain.name)
        return key == case.domain.name

    def explained(self) -> str:
        """The tables of the run, and the documents whose score changed in the cases that are no controls."""
        from spath_eval.cli.compare import UNPRINTABLE
        from spath_eval.reports.flips import with_flips

        text = self._report.render(self.record, width=100, colour=False)
        shown = [case for case in self.record["cases"] if case["id"] in self._competing]
        found = with_flips({**self.record, "cases": shown}, self.path.parent, DOCUMENTS)
        lines = [f"No documents are shown: {found['flips_reason']}."] if found["flips"] is None else []
        for id, entries in (found["flips"] or {}).items():
            for entry in entries:
                lines += _flipped(id, entry)
        return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", "\n".join([text, *lines])).rstrip()

    def figures(self) -> Iterator[tuple[str, str]]:
        """The main figures of all cases as properties of a test case."""
        yield "spath record", str(self.path)
        for id, case in self.cases.items():
            if case.outcome != "passed":
                yield f"{id} {case.outcome}", case.message
                continue
            yield f"{id} retention", str(case.retention)
            yield f"{id} perplexity ratio", str(case.perplexity_ratio)
            for phase, speed in case.speed.items():
                yield f"{id} {phase} speed", str(speed)

    def __repr__(self) -> str:
        return f"<run of {', '.join(self.cases)}>"


class Spath:
    """What the fixture `spath` is."""

    def __init__(self, item: pytest.Item, runner: _Runner) -> None:
        self._item, self._runner = item, runner

    def run(self, **options: Any) -> Run:
        """Run what the options ask for: those of `spath-eval run` by their names, as in a suite file.

        What is not given comes from the marker `spath`, then from the suite file `config`. Relative paths are relative
        to pytest's root folder. Raises `UsageError` for what cannot be run. Fails the test where the run is worse than
        `baseline`.
        """
        from spath_eval.contracts import UsageError

        __tracebackhide__ = True
        asked: dict[str, Any] = {}
        for marker in reversed(list(self._item.iter_markers("spath"))):  # the closest one last
            if marker.args:
                raise UsageError("the marker spath takes options by their names")
            asked |= _by_key(marker.kwargs)
        run = self._runner.run(asked | _by_key(options))
        used = self._item.stash.setdefault(USED, [])
        if not any(run is other for other in used):
            used.append(run)
            self._item.user_properties += run.figures()
        if run.regression:
            pytest.fail(f"worse than the baseline\n\n{run.regression}")
        return run

    def forget(self) -> None:
        """Let go of all models in memory; a later run loads its model again."""
        self._runner.models.clear()


class _Runner:
    """What the tests of a session share."""

    def __init__(self, config: pytest.Config, temporary: pytest.TempPathFactory) -> None:
        self._config, self._temporary = config, temporary
        self._folder: Path | None = None
        self._runs: dict[Any, Run] = {}
        self.models: dict[Any, Any] = {}
        """Models with their tokenizers, by all that they depend on."""

    def run(self, asked: dict[str, Any]) -> Run:
        """The run of these options, which is made unless it was made before and its files are the same still."""
        import click

        from spath_eval.cli.run import command
        from spath_eval.contracts import UsageError
        from spath_eval.suite import Suite

        __tracebackhide__ = True
        file = asked.pop("config", None)
        suites = [Suite.read(self._config.rootpath / file)] if file else []
        suites.append(Suite(asked, "spath.run", self._config.rootpath))
        try:
            context = command.with_suites(suites)
            key = repr(context.params), _state(context.params)
            if key not in self._runs:
                with _undisturbed():
                    self._runs[key] = self._make(context)
        except click.ClickException as error:
            raise UsageError(error.format_message()) from None
        except UsageError as error:
            raise UsageError(str(error)) from None  # where it was found says nothing to the test's author
        return self._runs[key]

    def _make(self, context: click.Context) -> Run:
        from spath_eval.cli.compare import render
        from spath_eval.cli.run import comparison_with, make_session
        from spath_eval.contracts import UsageError

        given = context.params
        session = make_session(context, self._loading(context.meta["registry"]))
        if not session.cases:
            raise UsageError("no cases selected")
        if given["output"] is None:
            session.output = self._output(session)
        conclude = comparison_with(given["baseline"], given["fail_on"])
        record = session.run()
        if record["status"] == "interrupted":
            raise KeyboardInterrupt
        cases = {case.id: case for case in session.cases}
        run = Run(record, session.output, cases, session.registry.report("console"))
        if conclude and (found := conclude(session.output)).exit_status:
            run.regression = render(found, "text")
        return run

    def _loading(self, registry: Registry) -> Load:
        """Loads a model unless it is in memory."""
        plugins = tuple(plugin.name for plugin in registry.plugins if plugin.status == "active")

        def load(request: LoadRequest) -> Any:
            key = repr(request), plugins, _state({"models": (request.reference,)})
            if key not in self.models:
                self.models[key] = registry.hook.spath_load_model(request=request)
            return self.models[key]

        return load

    def _output(self, session: Session) -> Path:
        """A file for the record, which no other run and no other worker of xdist writes to."""
        if self._folder is None:
            asked = self._config.getoption("--spath-output")
            start = self._config.invocation_params.dir
            self._folder = start / asked if asked else self._temporary.mktemp("spath")
        worker = os.environ.get("PYTEST_XDIST_WORKER")
        name = [session.output.stem, *([worker] if worker else []), str(len(self._runs) + 1)]
        return self._folder / f"{'-'.join(name)}.json"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Neither do the filters of the tests' warnings decide on a run, nor does a run leave the tests other than they
    were."""
    from spath_eval.cli.run import LIBRARIES

    levels = {name: logging.getLogger(name).level for name in LIBRARIES}
    state = random.getstate()
    try:
        for name in levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            yield
    finally:
        random.setstate(state)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _by_key(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in the types that a suite file has; none stands for what is not given."""
    named = {name.replace("-", "_"): value for name, value in options.items() if value is not None}
    return json.loads(json.dumps(named, default=os.fspath))


def _state(params: Mapping[str, Any]) -> tuple[Any, ...]:
    """Sizes and times of the files that a run reads, by which it is seen that they are other ones."""
    texts = [text.partition("=")[2] for text in params.get("profile_text", ())]
    alone = [params.get(name) for name in ("mask", "data_dir", "baseline")]
    found = []
    for path in [Path(one) for one in (*params["models"], *params.get("include_path", ()), *texts, *alone) if one]:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        found += [(str(file), (about := file.stat()).st_size, about.st_mtime_ns) for file in files if file.is_file()]
    return tuple(found)


def _flipped(case: str, entry: Mapping[str, Any]) -> Iterator[str]:
    """Lines on the documents of one metric."""
    yield f"{case} {entry['task']} {entry['metric']}: {entry['lost']} lost, {entry['gained']} gained"
    for document in entry["documents"]:
        yield f"  {document['change']}, document {document['doc_id']}"
        texts = {"prompt": document["prompt"], "target": document["target"]}
        for arm in ("dense", "sparse"):
            answer = document[arm]
            texts[arm] = answer["answer"] + (f"\n(read as {answer['read_as']})" if "read_as" in answer else "")
        for name, text in texts.items():
            shown = text if len(text) <= LONGEST else f"... {text[-LONGEST:]}"
            yield textwrap.indent(shown, " " * 13, lambda line: True).replace(" " * 13, f"    {name + ':':9}", 1)
    if more := entry["lost"] + entry["gained"] - len(entry["documents"]):
        yield f"  and {more} more"
