"""Programs that try to do harm, or to pass without passing, in the real sandbox."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spath_eval.quality import sandbox
from spath_eval.quality.sandbox import run, run_all, unavailable


@pytest.fixture(scope="module", autouse=True)
def sandbox_or_skip():
    if reason := unavailable():
        pytest.skip(f"no sandbox here: {reason}")


def sandboxes_of(caller):
    """Processes of the sandboxes that process `caller` has made, as seen from outside."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(sandbox.SCRIPT).encode() in words and str(caller).encode() in words:
            found.append(path.parent.name)
    return found


FAILURES = {
    "infinite loop": ("while True: pass", "timed out"),
    "infinite loop that catches everything": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "timed out",
    ),
    "sleep": ("import time; time.sleep(60)", "timed out"),
    "stop": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", "timed out"),
    "fork bomb": ("import os\nwhile True: os.fork()", "failed: BlockingIOError"),
    "patient fork bomb": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "timed out",
    ),
    "threads": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=[60]).start()",
        "failed: RuntimeError",
    ),
    "10 GB": ("bytearray(10 * 2**30)", "out of memory"),
    "kill the parent": ("import os; os.kill(os.getppid(), 9)", "killed by signal 9"),
    "terminate the parent": ("import os; os.kill(os.getppid(), 15)", "killed by signal 15"),
    "kill everything": ("import os; os.kill(-1, 9)", "killed by signal 9"),
    "kill itself": ("import os; os.kill(os.getpid(), 9)", "killed by signal 9"),
    "abort": ("import os; os.abort()", "killed by signal 6"),
    "read the list of users": ("open('/etc/passwd')", "failed: FileNotFoundError"),
    "read this project": (f"open({sandbox.__file__!r})", "failed: FileNotFoundError"),
    "read processes": ("open('/proc/self/environ')", "failed: FileNotFoundError"),
    "leave a file outside": ("open('/file', 'w')", "failed: OSError"),
    "become root": ("import os; os.setuid(0)", "failed: PermissionError"),
    "change the root": ("import os; os.chroot('.')", "failed: PermissionError"),
    "huge file": ("open('huge', 'wb').write(bytes(100 << 20))", "failed: OSError"),
    "many files": (
        "for n in range(8):\n    with open(str(n), 'wb') as file: file.write(bytes(8 << 20))",
        "failed: OSError",
    ),
    "open files": ("files = [open(str(n), 'w') for n in range(100)]", "failed: OSError"),
    "look up a host": ("import socket; socket.getaddrinfo('example.org', 80)", "failed: gaierror"),
    "flood of output": ("while True: print('x' * 1_000_000)", "timed out"),
    "read input": ("input()", "failed: EOFError"),
    "wrong": ("assert 1 + 1 == 3", "failed: AssertionError"),
    "not Python": ("def f(:", "failed: SyntaxError"),
    "null byte": ("x = 1\0", "failed: SyntaxError"),
    "half a character": ("x = '\ud800'", "failed: UnicodeEncodeError"),
    "deeply nested": ("(" * 100_000, "failed: SyntaxError"),
    "early exit": ("import sys; sys.exit(0)\nassert False", "exited before its end"),
    "early hard exit": ("import os; os._exit(0)\nassert False", "exited before its end"),
    "early exit with a status": ("import os; os._exit(3)", "exited with status 3 before its end"),
    "exit at the interpreter's hands": ("raise SystemExit", "exited before its end"),
    "claim to have passed": (
        "import os\nfor fd in range(64):\n    try: os.write(fd, b'passed')\n    except OSError: pass\nos._exit(0)",
        "exited before its end",
    ),
    "child in its place": ("import os\nif os.fork(): os._exit(0)", "exited before its end"),
    "odd exception": ("raise type('a\\tb\\nc', (Exception,), {})", "failed: a\tb\nc"),
    "exception without a name": (
        "class Meta(type):\n    @property\n    def __name__(cls): raise ValueError\n"
        "class Odd(Exception, metaclass=Meta): pass\nraise Odd",
        "exited before its end",
    ),
}


@pytest.mark.parametrize(("program", "reason"), FAILURES.values(), ids=FAILURES)
def test_harm_is_contained_and_scored_as_failure(program, reason):
    begin = time.monotonic()
    outcome = run(program, timeout=1.0)
    assert not outcome.passed
    assert outcome.reason == reason
    assert time.monotonic() - begin < 10
    assert sandboxes_of(os.getpid()) == []


PASSES = {
    "nothing": "",
    "a test": "def add(a, b): return a + b\nassert add(2, 3) == 5",
    "non-ASCII": "größe = '日本語 ✓'\nassert len(größe) == 5",
    "windows line ends": "if True:\r\n    x = 1\r\nassert x == 1",
    "libraries": "import collections, ctypes, decimal, hashlib, heapq, itertools, json, math, re, typing, zlib",
    "a file of its own": "open('a.txt', 'w').write('a')\nassert open('a.txt').read() == 'a'",
    "temporary file": "import tempfile\nwith tempfile.TemporaryDirectory() as folder: open(folder + '/a', 'w').close()",
    "a few threads": "import threading\n[threading.Thread(target=print).start() for _ in range(4)]",
    "output": "import sys\nprint('x' * 10_000_000)\nsys.stderr.write('x')",
    "no module is named": "assert __name__ == 'builtins'",
    "no future imports": "def f(x: int): pass\nassert f.__annotations__ == {'x': int}",
    "changed modules": "import os\nos.write = os._exit = os.getpid = None",
    "a read-only system": "import os\nfor path in ('/', os.__file__): assert os.statvfs(path).f_flag & os.ST_RDONLY",
    "no packages": "import os, glob\nassert not glob.glob(os.path.dirname(os.__file__) + '/*-packages/*')",
}


@pytest.mark.parametrize("program", PASSES.values(), ids=PASSES)
def test_what_runs_to_its_end_passes(program):
    outcome = run(program, timeout=10)
    assert (outcome.passed, outcome.reason) == (True, "passed")
    assert 0 < outcome.seconds < 10


def test_files_outside_are_not_there(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    assert run(f"open({str(secret)!r})").reason == "failed: FileNotFoundError"


def test_only_libraries_are_there():
    libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{sys.base_prefix}/lib"]
    program = f"""import os
for path, folders, files in os.walk("/"):
    assert not files, files
    folders[:] = [name for name in folders if os.path.join(path, name) not in {libraries}]
"""
    assert run(program, timeout=10).passed
    assert run("open('file', 'w')\n" + program, timeout=10).reason == "failed: AssertionError"


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    assert run("import os\nassert os.environ['SECRET']").reason == "failed: KeyError"
    assert run("import os, subprocess\nassert not os.environ and not os.environb").passed


def test_nothing_outside_is_reached_through_a_socket():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        name = f"\0spath-{os.getpid()}"
        local.bind(name)
        local.listen()
        port = server.getsockname()[1]
        assert run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}))").reason == "failed: OSError"
        connect = f"import socket\nsocket.socket(socket.AF_UNIX).connect({name!r})"
        assert run(connect).reason == "failed: ConnectionRefusedError"


def test_the_limit_on_memory_is_the_one_asked_for():
    growing = "parts = []\nfor _ in range(20): parts.append(bytearray(10 << 20))"
    assert run(growing, memory=1 << 29, timeout=10).passed
    assert run(growing, memory=1 << 27, timeout=10).reason == "out of memory"


def test_a_daemon_does_not_outlive_its_program():
    daemon = (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(600)\n    os._exit(0)"
    )
    assert run(daemon).passed
    assert sandboxes_of(os.getpid()) == []


def test_the_sandbox_dies_with_its_caller():
    script = "from spath_eval.quality import sandbox; sandbox.run('while True: pass', timeout=60)"
    with subprocess.Popen([sys.executable, "-c", script]) as caller:
        deadline = time.monotonic() + 10
        while len(sandboxes_of(caller.pid)) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(sandboxes_of(caller.pid)) == 4
        caller.kill()
    while sandboxes_of(caller.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert sandboxes_of(caller.pid) == []


def test_sets_have_the_same_order_each_time():
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    fixed = subprocess.run(
        [sys.executable, "-c", "print(hash('word'))"], env=environment, capture_output=True, text=True
    )
    assert run(f"assert hash('word') == {fixed.stdout}").passed


def test_all_run_side_by_side_and_come_in_order():
    programs = [f"import time; time.sleep({0.8 - 0.2 * n}); assert {n} != 2" for n in range(4)]
    begin = time.monotonic()
    outcomes = run_all(programs, workers=4)
    assert [outcome.passed for outcome in outcomes] == [True, True, False, True]
    assert time.monotonic() - begin < 1.8


def test_a_kernel_that_refuses_is_quoted():
    """In a user namespace in which no further ones may be made."""
    script = """if True:
        import ctypes
        from spath_eval.quality.sandbox import unavailable
        assert ctypes.CDLL(None).unshare(0x10000000) == 0
        open("/proc/sys/user/max_user_namespaces", "w").write("0")
        print(unavailable())
    """
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert said.stdout.startswith("new user, pid, network, mount, ipc and uts namespaces: "), said.stderr
    assert "; /proc/sys/user/max_user_namespaces is 0" in said.stdout
