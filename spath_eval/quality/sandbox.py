"""Runs programs that a model wrote, without trusting them, and tells which of them pass.

Each program runs in kernel namespaces of its own (user, pid, network, mount, ipc, uts), without privileges, network,
environment and output, and sees no files but the interpreter's, read-only, and an empty working folder. CPU time,
address space, number of processes and size of files are limited, and when the time is over, or the program, all its
processes are killed. It needs Linux 5.12 that lets the user make user namespaces, and no other software;
`unavailable` says where that is not so.

A program passes only if it runs to its end without an exception: how it exits says nothing. That holds for programs
that are wrong, and for those that try an easy way out; one that searches its interpreter's memory could find how a
pass is reported, just as it could change what its tests compare. It could not leave the sandbox.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).with_name("_sandboxed.py")
GRACE = 30.0
"""Seconds beyond its timeout after which a sandbox is given up that does not report."""
SETTINGS = {
    "/proc/sys/user/max_user_namespaces": "0",
    "/proc/sys/kernel/unprivileged_userns_clone": "0",
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": "1",
}
"""Kernel settings, with the value at which they forbid user namespaces."""


class SandboxRefused(Exception):
    """The system refused a part of the sandbox, so that nothing was run; the message says which part, and why."""


@dataclass(frozen=True)
class Outcome:
    """How a program fared."""

    passed: bool
    reason: str
    """`passed`, `failed: NAME OF THE EXCEPTION`, `timed out`, `out of memory`, `exited before its end`,
    `exited with status N before its end`, `killed by signal N` or `killed with its sandbox`."""
    seconds: float
    """Wall-clock time from the making of the file system to the end of the last process."""


def run(
    program: str,
    *,
    timeout: float = 3.0,
    memory: int = 1 << 30,
    processes: int = 8,
    file_size: int = 16 << 20,
) -> Outcome:
    """Execute `program` in a sandbox of its own.

    `timeout` is in seconds of wall-clock time; its default is that of the `code_eval` metric. `memory` is the address
    space of each process, in bytes. `processes` is how many processes and threads there may be besides the program
    itself; together they may use as many times `memory`. `file_size` is the size in bytes of a file and of all files.
    Raises `SandboxRefused`.
    """
    limits = [str(limit) for limit in (os.getpid(), timeout, memory, processes, file_size)]
    command = [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", str(SCRIPT), *limits]
    # What starting the interpreter may need, and a fixed seed, so that sets have the same order each time.
    environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PYTHONHOME") if name in os.environ}
    environment["PYTHONHASHSEED"] = "0"
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd="/",
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(program.encode("utf-8", errors="surrogatepass"), timeout + GRACE)
        except BaseException as error:
            process.kill()  # and the kernel kills the sandbox with it
            if isinstance(error, subprocess.TimeoutExpired):
                return Outcome(False, "timed out", timeout + GRACE)
            raise
    if not out:
        raise SandboxRefused(err.decode(errors="replace").strip() or f"it ended with status {process.returncode}")
    outcome, seconds, reason = out.decode().removesuffix("\n").split("\t", maxsplit=2)
    if outcome == "refused":
        raise SandboxRefused(reason)
    return Outcome(outcome == "passed", reason, float(seconds))


def run_all(programs: Iterable[str], *, workers: int | None = None, timeout: float = 3.0) -> list[Outcome]:
    """The outcomes of `programs`, in their order; `workers` (as many as there are cores) run at a time."""
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda program: run(program, timeout=timeout), programs))


def unavailable() -> str | None:
    """Why this system has no sandbox, or none where it has one: found out by making one."""
    if sys.platform != "linux":
        return f"it is made of Linux namespaces, and this is {sys.platform}"
    try:
        outcome = run("import decimal, zlib", timeout=GRACE)  # one module of Python and one of C
    except SandboxRefused as refused:
        forbidding = [name for name, value in SETTINGS.items() if _setting(name) == value]
        return f"{refused}" + "".join(f"; {name} is {SETTINGS[name]}" for name in forbidding)
    return None if outcome.passed else f"the interpreter does not work in it: {outcome.reason}"


def _setting(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return None
