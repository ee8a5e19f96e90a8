"""The program that makes the sandbox of `spath_eval.quality.sandbox`, and runs another program in it.

It is a script of its own, started for each program in a fresh interpreter: only a process with a single thread may
enter a user namespace, and this file is then all that the program could find in its memory. Four processes:

- the **supervisor** enters the namespaces, watches the clock and reports on stdout; it stays outside of what it made;
- the **init** is process 1 of the new pid namespace: it builds the file system and gives up all privileges, and when
  it ends the kernel kills whatever is left in the namespace;
- the **witness** is the parent of the program, so that killing one's parent is possible there, and shows;
- the **runner** compiles and executes the program, and gives the verdict.

Arguments: pid of the caller, timeout, memory, processes, file size. stdin: the program. stdout: one line, `passed`,
`failed` or `refused`, the seconds it took, and the reason, with tabs between.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import resource
import select
import signal
import sys
import time

TYPE_CHECKING = False  # importing typing would add a fifth to the start-up
if TYPE_CHECKING:
    from typing import Any, NoReturn

WORK = "/tmp"
"""The working folder in the sandbox, where programs expect a folder for temporary files."""
ROOT = "/proc"
"""Where the new root is put together: nothing that a program is shown can lie under it."""
NOBODY = 65534
"""User and group of the program, inside the user namespace."""
MESSAGE = 4096
"""Most bytes read of what another of the processes says."""

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
SYS_MOUNT_SETATTR = 442  # the same on every architecture that torch is built for; the C library knows it since 2.36
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
LINUX_CAPABILITY_VERSION_3 = 0x20080522

libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):
    """The kernel refused a part of the sandbox; the message names the part and the kernel's reason."""


def call(what: str, function: Any, *arguments: Any) -> None:
    """Call the C library. Raises `Refused`, naming `what` was tried, where it fails."""
    if function(*arguments) == -1:
        raise Refused(f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    first, second, third = (value and value.encode() for value in (source, target, kind))
    call(f"mount at {target}", libc.mount, first, second, third, ctypes.c_ulong(flags), options.encode())


def prctl(option: int, value: int) -> None:
    call(f"prctl {option}", libc.prctl, option, *map(ctypes.c_ulong, (value, 0, 0, 0)))


def write(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
    except OSError as error:
        raise Refused(f"write to {path}: {error.strerror}") from error


def enter_namespaces() -> None:
    """Enter new namespaces; the next child is process 1 of the pid namespace.

    An ordinary user may map only itself, and does so as nobody. Root maps nobody besides itself, and the program will
    be nobody: root outside is exempt from the limit on the number of processes.
    """
    supervisor, ids = os.getpid(), {"uid": os.geteuid(), "gid": os.getegid()}
    is_root = ids["uid"] == 0
    waiting, entered = os.pipe()
    answer, answering = os.pipe()
    if (mapper := os.fork()) == 0:  # mapping more than oneself takes a process that has stayed outside
        os.close(entered)
        os.read(waiting, 1)
        try:
            if not is_root:
                write(f"/proc/{supervisor}/setgroups", "deny")
            for kind, outside in ids.items():
                lines = f"0 {outside} 1\n{NOBODY} {NOBODY} 1\n" if is_root else f"{NOBODY} {outside} 1\n"
                write(f"/proc/{supervisor}/{kind}_map", lines)
        except Refused as error:
            os.write(answering, str(error).encode())
        os._exit(0)
    os.close(waiting)
    os.close(answering)
    try:
        flags = CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS
        call("new user, pid, network, mount, ipc and uts namespaces", libc.unshare, flags)
    finally:
        os.close(entered)
        os.waitpid(mapper, 0)
    problem = os.read(answer, MESSAGE)
    os.close(answer)
    if problem:
        raise Refused(problem.decode())


def shown_folders() -> tuple[list[str], list[str]]:
    """The folders a program is shown, and those within them that are hidden.

    Shown are the interpreter's library and the system's shared libraries; hidden are the packages in them, for this
    project may be one of those.
    """
    folders = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{sys.base_prefix}/lib", *sys.path]
    shown = [folder for folder in dict.fromkeys(folders) if os.path.isdir(folder)]
    packages = [f"{folder}/{name}" for folder in shown for name in ("site-packages", "dist-packages")]
    packages.append("/usr/lib/python3/dist-packages")
    return shown, [folder for folder in packages if os.path.isdir(folder)]


def build_file_system(file_size: int) -> None:
    """Make the root a read-only view of the shown folders, with an empty working folder of `file_size` bytes."""
    shown, hidden = shown_folders()
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for folder in [*shown, WORK]:
        os.makedirs(ROOT + folder, exist_ok=True)
        if folder != WORK and not os.listdir(ROOT + folder):  # else it lies in one that is already there
            mount(folder, ROOT + folder, None, MS_BIND | MS_REC)
    for folder in hidden:
        mount("tmpfs", ROOT + folder, "tmpfs", MS_NOSUID | MS_NODEV, "size=4k,mode=755")
    wanted = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV)
    arguments = AT_FDCWD, ROOT.encode(), AT_RECURSIVE, wanted, ctypes.c_size_t(ctypes.sizeof(wanted))
    call("mount_setattr (new in Linux 5.12)", libc.syscall, ctypes.c_long(SYS_MOUNT_SETATTR), *arguments)
    options = f"size={file_size},nr_inodes=1k,mode=700,uid={NOBODY},gid={NOBODY}"
    mount("tmpfs", ROOT + WORK, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options)
    os.chdir(ROOT)
    call("pivot_root", libc.pivot_root, b".", b".")
    call("unmounting the old root", libc.umount2, b".", MNT_DETACH)
    os.chdir(WORK)


def forbid_namespaces() -> None:
    """Allow no user namespace within this one, where the program would have privileges again, if only over that.

    Where /proc/sys is read-only, as in some containers, it does without: what is hidden stays so in any case.
    """
    with contextlib.suppress(Refused):
        write("/proc/sys/user/max_user_namespaces", "0")


def set_limits(timeout: float, memory: int, processes: int, file_size: int) -> None:
    """Set the limits that each process has for itself, and the one on the number of processes."""
    limits = {
        resource.RLIMIT_CPU: math.ceil(timeout) + 1,
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_NPROC: processes + 4,  # the four processes of this file count as well
        resource.RLIMIT_FSIZE: file_size,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for kind, most in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))


def give_up_privileges() -> None:
    """Become nobody without capabilities, for good."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header = (ctypes.c_uint32 * 2)(LINUX_CAPABILITY_VERSION_3, 0)
    call("capset", libc.capset, header, (ctypes.c_uint32 * 6)())
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_DUMPABLE, 0)  # so that no process looks into another


def run_program(program: str, verdict: int, nonce: str) -> NoReturn:
    """Execute `program` in an empty namespace, and write how that went to the pipe `verdict`, behind `nonce`.

    Only the end of the program leads to the nonce, and only in this process: no early exit does, and no child that
    carries on in its parent's place.
    """
    this, current, send, leave = os.getpid(), os.getpid, os.write, os._exit  # before the program changes the module
    try:
        try:
            exec(compile(program, "<program>", "exec", dont_inherit=True), {})
            reason = "passed"
        except MemoryError:
            reason = "out of memory"
        except SystemExit:
            reason = "exited before its end"
        except BaseException as error:
            reason = f"failed: {type(error).__name__[:100]}"
        if current() == this:
            send(verdict, f"{nonce} {reason}".encode(errors="replace"))
    finally:
        leave(0)


def be_witness(program: str, verdict: int, nonce: str) -> NoReturn:
    """Start the runner, and end the way it ends."""
    if (runner := os.fork()) == 0:
        run_program(program, verdict, nonce)
    status = os.waitpid(runner, 0)[1]
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


def be_init(program: str, limits: tuple[float, int, int, int], ending: int, verdict: int, nonce: str) -> NoReturn:
    """Build the sandbox, start the witness in it, and write to the pipe `ending` how that ended."""
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(nothing, stream)
        os.close(nothing)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # process 1 is deaf to the signals that it leaves as they are
        write("/proc/self/oom_score_adj", "1000")  # where memory runs out all the same, the sandbox goes first
        forbid_namespaces()
        build_file_system(limits[-1])
        set_limits(*limits)
        give_up_privileges()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which takes it back
        os.environ.clear()
        if (witness := os.fork()) == 0:
            os.close(ending)
            be_witness(program, verdict, nonce)
        while (ended := os.wait())[0] != witness:  # orphans come to process 1
            pass
        os.write(ending, str(os.waitstatus_to_exitcode(ended[1])).encode())
    except (Refused, OSError) as error:
        os.write(ending, f"refused {error}".encode())
    os._exit(0)


def judge(ending: str, verdict: str, nonce: str, in_time: bool) -> tuple[str, str]:
    """`passed`, `failed` or `refused`, and the reason."""
    if ending.startswith("refused "):
        return "refused", ending.removeprefix("refused ")
    if not in_time or ending == str(-signal.SIGXCPU):
        return "failed", "timed out"
    if not ending:
        return "failed", "killed with its sandbox"
    if ending != "0":
        killed = ending.startswith("-")
        return "failed", f"killed by signal {ending[1:]}" if killed else f"exited with status {ending} before its end"
    said, _, reason = verdict.partition(" ")
    if said != nonce:
        return "failed", "exited before its end"
    return "passed" if reason == "passed" else "failed", reason


def supervise(program: str, limits: tuple[float, int, int, int]) -> tuple[str, float, str]:
    """Run `program` in a sandbox; `passed`, `failed` or `refused`, the seconds it took, and the reason."""
    ending, be_told_ending = os.pipe()
    verdict, be_told_verdict = os.pipe()
    nonce = os.urandom(16).hex()
    enter_namespaces()
    begin = time.monotonic()
    if (init := os.fork()) == 0:
        os.close(ending)
        os.close(verdict)
        be_init(program, limits, be_told_ending, be_told_verdict, nonce)
    os.close(be_told_ending)
    os.close(be_told_verdict)
    watch = select.poll()
    watch.register(os.pidfd_open(init), select.POLLIN)
    in_time = bool(watch.poll(limits[0] * 1000))
    if not in_time:
        os.kill(init, signal.SIGKILL)
    os.waitpid(init, 0)  # which returns when no process is left in its namespace
    seconds = time.monotonic() - begin
    said = [os.read(pipe, MESSAGE).decode(errors="replace") for pipe in (ending, verdict)]
    outcome, reason = judge(said[0], said[1], nonce, in_time)
    return outcome, seconds, reason


def main(caller: str, timeout: str, *limits: str) -> None:
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(caller):
        return
    program = sys.stdin.buffer.read().decode("utf-8", errors="surrogatepass")
    memory, processes, file_size = map(int, limits)
    try:
        outcome = supervise(program, (float(timeout), memory, processes, file_size))
    except (Refused, OSError) as error:
        outcome = "refused", 0.0, str(error)
    print(*outcome, sep="\t")


if __name__ == "__main__":
    main(*sys.argv[1:])
