"""Answers to humaneval and mbpp of which it is known whether they pass, through the stock tasks and the sandbox.

The answers are made of the rows' own solutions. What is expected of them, `tests/data/code_verdicts.json`, was found
out without this project's code: an interpreter of its own ran each answer with the row's tests, and what follows them
was reached or not. `python tests/quality/test_code_verdicts.py FOLDER` writes it anew for the rows in a folder; this
executes the benchmarks' own solutions, and the changes below, outside of the sandbox.
"""

import ast
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "shared" / "data" / "benchmarks"
EXPECTED = Path(__file__).resolve().parents[1] / "data" / "code_verdicts.json"
VERDICTS = json.loads(EXPECTED.read_text(encoding="utf-8"))
METRICS = {"humaneval": "pass@1,create_test", "mbpp": "pass_at_1,none"}
SECRET = "SPATH_EVAL_SECRET"
CLOSED = 1
"""A port of this machine at which nobody listens."""
REACHED = "the end was reached"


def solution(row):
    return row["code"] if "code" in row else row["canonical_solution"]


def first_return(row, statement):
    """The solution with `statement` in the place of its first return, or none where it has no return."""
    prompt = row.get("prompt", "")
    text = prompt + solution(row)
    lines = prompt.count("\n")
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Return) and node.lineno > lines]
    if not nodes:
        return None
    first = min(nodes, key=lambda node: (node.lineno, node.col_offset))
    return solution(row).replace(ast.get_source_segment(text, first), statement, 1)


def before_the_tests(row, statement):
    return f"{solution(row)}\n{statement}"


def reading_environment():
    return f"import os; os.environ[{SECRET!r}]"


def connecting(port):
    return f"import socket; socket.create_connection(('127.0.0.1', {port}))"


ANSWERS = {
    "solution": lambda row, port: solution(row),
    "solution with set-up": lambda row, port: before_the_tests(row, row["test_setup_code"]),
    "returns None": lambda row, port: first_return(row, "return None"),
    "raises": lambda row, port: first_return(row, "raise ValueError"),
    "exits in the tests": lambda row, port: first_return(row, "import sys; sys.exit(0)"),
    "exits hard in the tests": lambda row, port: first_return(row, "import os; os._exit(0)"),
    "exits": lambda row, port: before_the_tests(row, "import sys; print('passed'); sys.exit(0)"),
    "exits hard": lambda row, port: before_the_tests(row, "import os; print('passed', flush=True); os._exit(0)"),
    "no Python": lambda row, port: before_the_tests(row, ")"),
    "endless": lambda row, port: before_the_tests(row, "while True: pass"),
    "reads the environment": lambda row, port: before_the_tests(row, reading_environment()),
    "connects": lambda row, port: before_the_tests(row, connecting(port)),
}
"""Kinds of answers; each is made of a row and of the port that it may connect to."""

FOR_ALL = ("solution", "returns None", "exits in the tests")
FOR_SOME = ("raises", "exits hard in the tests", "exits", "exits hard", "no Python")
FOR_FEW = ("endless", "reads the environment", "connects")


def read_rows(folder, task):
    text = (folder / task / "test.jsonl").read_text(encoding="utf-8")
    return {str(row["task_id"]): row for row in map(json.loads, text.splitlines())}


@pytest.fixture
def rows(task):
    """The rows of the task that a test is about, by their ids."""
    if not (BENCHMARKS / task / "test.jsonl").exists():
        pytest.skip(f"no rows of {task} at {BENCHMARKS / task}")
    return read_rows(BENCHMARKS, task)


@pytest.fixture
def open_port(monkeypatch):
    """A port at which this process listens, while the environment has a secret."""
    monkeypatch.setenv(SECRET, "x")
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield server.getsockname()[1]


@pytest.mark.filterwarnings("ignore:.*invalid escape sequence")
@pytest.mark.parametrize("task", VERDICTS)
def test_pass_at_1_of_the_stock_task_is_the_mean_of_the_expected_verdicts(task, rows, open_port, tmp_path):
    import lm_eval
    from lm_eval.models.dummy import DummyLM

    from spath_eval.quality.benchmarks import load_tasks
    from spath_eval.quality.sandbox import unavailable

    if reason := unavailable():
        pytest.skip(f"no sandbox here: {reason}")
    expected = {(kind, name): verdict for kind, known in VERDICTS[task].items() for name, verdict in known.items()}
    folder = tmp_path / task
    folder.mkdir()
    lines = [json.dumps(rows[name]) + "\n" for _, name in expected]
    folder.joinpath("test.jsonl").write_text("".join(lines), encoding="utf-8")
    answers = [ANSWERS[kind](rows[name], open_port) for kind, name in expected]

    class Writer(DummyLM):
        def generate_until(self, requests, disable_tqdm=True):
            texts = [answers[request.doc_id] for request in requests]
            stops = [request.args[1]["until"] for request in requests]
            assert not any(stop in text for text, until in zip(texts, stops, strict=True) for stop in until)
            return texts

    tasks = load_tasks([task], data_dir=tmp_path, allow_code_execution=True)
    settings = {"log_samples": True, "confirm_run_unsafe_code": True, "bootstrap_iters": 0}
    found = lm_eval.evaluate(Writer(), {"tasks": tasks}, **settings)
    metric = METRICS[task]
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    scores = [sample[metric.partition(",")[0]] for sample in samples]
    assert dict(zip(expected, scores, strict=True)) == {key: verdict == "pass" for key, verdict in expected.items()}
    assert found["results"][task][metric] == pytest.approx(mean(verdict == "pass" for verdict in expected.values()))


def test_outside_of_the_sandbox_the_secret_and_the_port_are_reached(open_port):
    """So that it is the sandbox that makes the answers fail which read the one and connect to the other."""
    assert plainly(reading_environment(), dict(os.environ)) == "pass"
    assert plainly(connecting(open_port), {}) == "pass"


@pytest.mark.parametrize("task", VERDICTS)
def test_expected_verdicts_know_right_answers_from_wrong_ones(task):
    known = {kind: set(verdicts.values()) for kind, verdicts in VERDICTS[task].items()}
    without_set_up = {name for name, verdict in VERDICTS[task]["solution"].items() if verdict == "fail"}
    assert without_set_up == VERDICTS[task].get("solution with set-up", {}).keys()
    assert known.get("solution with set-up", {"pass"}) == {"pass"}
    assert known["returns None"] == {"pass", "fail"}  # it need not be the return that the tests reach
    for kind in ("exits", "exits hard", "no Python", "endless", "reads the environment", "connects"):
        assert known[kind] == {"fail"}


# The other way to the verdicts


def plainly(program, environment, timeout=10.0):
    """`pass` where what follows a program is reached in an interpreter of its own, else `fail`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program.py")
        path.write_text(f"{program}\nprint({REACHED!r})\n", encoding="utf-8", newline="")
        try:
            out = subprocess.run(
                [sys.executable, "-I", str(path)],
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=timeout,
            ).stdout
        except subprocess.TimeoutExpired:
            return "fail"
    return "pass" if out.decode(errors="replace").endswith(f"{REACHED}\n") else "fail"


def program_of(row, answer):
    """An answer with the tests of its row, as the papers of the benchmarks have it."""
    if "prompt" in row:
        return f"{row['prompt']}{answer}\n{row['test']}\ncheck({row['entry_point']})"
    return "\n".join([answer, *row["test_list"]])


def expected_verdicts(rows):
    """Of each kind of answer, the verdict for each row that it is made for."""
    names = list(rows)
    shares = [(FOR_ALL, names), (FOR_SOME, names[::8]), (FOR_FEW, names[:32:16])]
    wanted = {kind: share for kinds, share in shares for kind in kinds}
    wanted["solution with set-up"] = [name for name, row in rows.items() if row.get("test_setup_code")]
    verdicts = {}
    for kind, names in wanted.items():
        answers = {name: ANSWERS[kind](rows[name], CLOSED) for name in names}
        known = {name: plainly(program_of(rows[name], text), {}) for name, text in answers.items() if text is not None}
        if known:
            verdicts[kind] = known
    return verdicts


def chosen_rows(folder):
    """Every fifth row of humaneval, every sixteenth of mbpp, and the one of mbpp whose tests need a set-up."""
    humaneval, mbpp = read_rows(folder, "humaneval"), read_rows(folder, "mbpp")
    return {
        "humaneval": {name: humaneval[name] for name in list(humaneval)[::5]},
        "mbpp": {name: mbpp[name] for name in [*list(mbpp)[1::16], "367"]},
    }


if __name__ == "__main__":
    chosen = chosen_rows(Path(sys.argv[1])).items()
    text = json.dumps({task: expected_verdicts(rows) for task, rows in chosen}, indent=1)
    EXPECTED.write_text(f"{text}\n", encoding="utf-8")
