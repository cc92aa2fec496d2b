"""The process that shuts a program in: run by `sandbox.py` as a file of its own, with nothing but Python.

Three processes. This one leaves the host's namespaces; its child is the first process of the new
ones, builds a root directory there, starts the program, watches it and writes the report. When
that first process ends, the kernel kills whatever the program has left behind, daemons included.

The program sees: the host's libraries and this Python, read-only; `/tmp`, empty, in memory, of
bounded size; four devices; no `/proc`, no network but a loopback that is down, no capabilities.
"""

import ctypes
import json
import os
import platform
import resource
import selectors
import signal
import stat
import struct
import sys
import time
from typing import Any, NoReturn

# linux/sched.h, linux/mount.h, linux/prctl.h
_NEW_MOUNT, _NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30
_NOSUID, _NODEV, _REC, _BIND, _PRIVATE, _DETACH = 2, 4, 1 << 14, 1 << 12, 1 << 18, 2
_PDEATHSIG, _DUMPABLE, _SECCOMP, _NO_NEW_PRIVS = 1, 4, 22, 38
_MOUNT_SETATTR, _AT_RECURSIVE, _ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 442, 0x8000, 1, 2, 4

# Per machine: the audit architecture, pivot_root, prlimit64, and what a program is refused: memory
# that no limit counts (shmget, semget, msgget, memfd_create), and parts of the kernel that it has no
# need to reach (add_key, request_key, keyctl, ptrace, bpf, perf_event_open, userfaultfd,
# io_uring_setup, setns, unshare, mount, process_vm_readv, process_vm_writev, memfd_secret).
MACHINES = {
    "x86_64": (
        0xC000003E,
        155,
        302,
        (29, 64, 68, 319, 248, 249, 250, 101, 321, 298, 323, 425, 308, 272, 165, 310, 311, 447),
    ),
    "aarch64": (
        0xC00000B7,
        41,
        261,
        (194, 190, 186, 279, 217, 218, 219, 117, 280, 241, 282, 425, 268, 97, 40, 270, 271, 447),
    ),
}
NOBODY = 65534

# Runs the program and says on a pipe that it came to its end, which an exit status does not.
_RUNNER = """
def _run():
    import os, sys
    descriptor, sign, pid = int(sys.argv[1]), sys.argv[2].encode(), os.getpid()
    sys.argv[:] = ["program.py"]
    with open("/tmp/program.py", encoding="utf-8", errors="surrogatepass") as file:
        code = compile(file.read(), "program.py", "exec")
    try:
        exec(code, globals())
    except MemoryError:
        sign = b"memory"
        raise
    finally:
        if os.getpid() == pid and (sign == b"memory" or not sys.exc_info()[0]):
            os.write(descriptor, sign)

_run()
"""

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Says it has left the host's namespaces, reads what to run from stdin, and reports on stdout."""
    try:
        _call("unshare", _NEW_USER | _NEW_MOUNT | _NEW_PID | _NEW_NET | _NEW_IPC)
    except OSError as error:
        _report({"refused": str(error)})
        return
    print("ready", flush=True)  # and the one who started this maps its users
    spec = json.load(sys.stdin)
    _call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    first = os.fork()
    if first:
        os.waitpid(first, 0)  # which it is only when everything in its namespace is gone
        return
    _call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _call("prctl", _DUMPABLE, 0, 0, 0, 0)  # a program of the same user cannot look into it
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nor interrupt it: what it handles it can be sent
    try:
        processes = _build_root(spec)
        _limit_namespaces(processes)
    except OSError as error:
        _report({"refused": str(error)})
        os._exit(0)
    _report(_run(spec, processes))
    os._exit(0)


def _call(name: str, *arguments: Any) -> int:
    """A function of the C library; raises `OSError` with its name where it fails."""
    result = getattr(_libc, name)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return int(result)


def _mount(what: str, where: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    try:
        _call(
            "mount",
            what.encode(),
            where.encode(),
            kind.encode(),
            ctypes.c_ulong(flags),
            options.encode(),
        )
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} (of {what} on {where})") from None


def _read_only(where: str, attributes: int, recursive: bool = True) -> None:
    attr = struct.pack("QQQQ", attributes | _ATTR_RDONLY, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    _call("syscall", _MOUNT_SETATTR, -100, where.encode(), flags, attr, len(attr))


def _build_root(spec: dict[str, Any]) -> int:
    """Makes what the program sees the root; returns a descriptor of a /proc of the new processes."""
    root = spec["root"]
    _mount("none", "/", flags=_REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=0755")
    os.mkdir(f"{root}/tmp")
    directory = f"size={spec['limits']['disk']},nr_inodes=4096,mode=0777"
    _mount("tmpfs", f"{root}/tmp", "tmpfs", _NOSUID | _NODEV, directory)
    for source in spec["visible"]:
        target = root + source
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.isdir(source):  # or a link to one, whose target need not be visible
            os.makedirs(target, exist_ok=True)
        else:
            os.close(os.open(target, os.O_CREAT))
        _mount(source, target, flags=_BIND | _REC)
        device = stat.S_ISCHR(os.stat(source).st_mode)
        _read_only(target, _ATTR_NOSUID | (0 if device else _ATTR_NODEV))
    os.mkdir(f"{root}/proc")
    _mount("proc", f"{root}/proc", "proc", _NOSUID | _NODEV)
    processes = os.open(f"{root}/proc", os.O_DIRECTORY | os.O_CLOEXEC)
    _call("umount2", f"{root}/proc".encode(), _DETACH)
    _read_only(root, 0, recursive=False)
    os.chdir(root)
    _call("syscall", MACHINES[platform.machine()][1], b".", b".")  # the old root lies on the new
    _call("umount2", b".", _DETACH)
    os.chdir("/tmp")
    return processes


def _limit_namespaces(processes: int) -> None:
    """No user namespaces inside this one: in those a program would have capabilities."""
    path = "sys/user/max_user_namespaces"
    with os.fdopen(os.open(path, os.O_WRONLY, dir_fd=processes), "w") as file:
        file.write("0")


def _run(spec: dict[str, Any], processes: int) -> dict[str, Any]:
    """Starts the program, watches it, and says how it ended and what it wrote."""
    limits = spec["limits"]
    for name, text in (("program.py", spec["program"]), ("stdin", spec["stdin"])):
        with open(name, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
        os.chmod(name, 0o644)
    given = os.open("stdin", os.O_RDONLY)
    os.unlink("stdin")
    pipes = [os.pipe() for _ in range(3)]  # of stdout, stderr and the sign
    sign, failure = os.urandom(16).hex(), os.urandom(16).hex()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(spec, given, [write for _, write in pipes], sign, failure)
    for _, write in pipes:
        os.close(write)
    reads = [read for read, _ in pipes]
    written = {read: bytearray() for read in reads}
    ended, detail, status, usage = "", "", None, None
    with selectors.DefaultSelector() as selector:
        for read in reads:
            os.set_blocking(read, False)
            selector.register(read, selectors.EVENT_READ)
        while not ended and status is None:
            for key, _ in selector.select(0.01):
                data = os.read(key.fd, 65536)
                written[key.fd] += data
                if not data:
                    selector.unregister(key.fd)
            status, usage = _reaped(child)
            if sum(map(len, written.values())) > limits["output"]:
                ended, detail = "killed", f"it wrote more than {limits['output']:,} bytes"
            elif time.monotonic() - start > limits["wall_seconds"]:
                ended, detail = "timeout", f"it ran for {limits['wall_seconds']} s"
            elif _resident_bytes(processes) > limits["memory"]:
                ended, detail = "memory", f"it held more than {limits['memory']:,} bytes"
    seconds = time.monotonic() - start
    for read in reads:  # what was written before the end and is not read yet
        written[read] += _rest(read, limits["output"])
    if not ended:
        assert status is not None and usage is not None
        told = bytes(written[reads[2]])
        cpu = usage.ru_utime + usage.ru_stime
        if told.startswith(failure.encode()):
            ended, detail = "refused", told[len(failure) :].decode(errors="replace")
        else:
            ended, detail = _how(status, told, sign.encode(), cpu, limits["cpu_seconds"])
    out, err = (
        bytes(written[read][: limits["output"]]).decode(errors="replace") for read in reads[:2]
    )
    return {"ended": ended, "detail": detail, "stdout": out, "stderr": err, "seconds": seconds}


def _become(
    spec: dict[str, Any], given: int, writes: list[int], sign: str, failure: str
) -> NoReturn:
    """Turns this process into the program, or writes `failure`, which no program knows, and why."""
    try:
        os.setsid()
        limits = spec["limits"]
        # The two processes above count among those of the program if they are of the same user.
        processes = limits["processes"] + (2 if os.getuid() == NOBODY else 0)
        for target, source in enumerate((given, *writes[:2])):
            os.dup2(source, target)
        os.dup2(writes[2], 3)
        os.set_inheritable(3, True)  # it may have been 3 before
        os.closerange(4, 4096)
        for limit, soft, hard in (
            (resource.RLIMIT_CPU, limits["cpu_seconds"], limits["cpu_seconds"] + 1),
            (resource.RLIMIT_AS, limits["memory"], limits["memory"]),
            (resource.RLIMIT_FSIZE, limits["file_size"], limits["file_size"]),
            (resource.RLIMIT_NOFILE, limits["open_files"], limits["open_files"]),
            (resource.RLIMIT_NPROC, processes, processes),
            (resource.RLIMIT_CORE, 0, 0),
            (resource.RLIMIT_MEMLOCK, 0, 0),
            (resource.RLIMIT_MSGQUEUE, 0, 0),
        ):
            resource.setrlimit(limit, (soft, hard))
        if os.getuid() != NOBODY:  # the host's root, who may become somebody else
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        _call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
        _filter_calls()
        environment = {
            "HOME": "/tmp",
            "TMPDIR": "/tmp",
            "PATH": "/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",  # libraries that start a thread per core count as processes
            "OPENBLAS_NUM_THREADS": "1",
        }
        python = spec["python"]
        os.execve(python, [python, "-I", "-B", "-c", _RUNNER, "3", sign], environment)
    except BaseException as error:
        os.write(3, f"{failure}{error}".encode())
    os._exit(127)


def _filter_calls() -> None:
    """Refuses system calls; see `MACHINES`. Other instruction sets of the same machine are killed."""
    architecture, _, prlimit, refused = MACHINES[platform.machine()]
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06  # BPF
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000  # 1 is EPERM
    code = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (end, 0, 0, kill),
        (load, 0, 0, 0),
        (at_least, len(refused) + 4, 0, 0x40000000),  # x32
        *((equal, len(refused) + 3 - i, 0, number) for i, number in enumerate(refused)),
        (equal, 0, 2, prlimit),
        (load, 0, 0, 16),
        (equal, 0, 1, 0),  # of itself; another of its user is the one who watches it
        (end, 0, 0, allow),
        (end, 0, 0, refuse),
    ]
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in code)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(buffer))
    _call("prctl", _SECCOMP, 2, ctypes.c_char_p(header), 0, 0)


def _reaped(child: int) -> tuple[int | None, Any]:
    """The status of the program, if it has ended; takes in the orphans of this namespace."""
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return None, None
        if pid in (0, child):
            return (status, usage) if pid else (None, None)


def _resident_bytes(processes: int) -> int:
    """Memory of all processes of this namespace but this one."""
    pages = 0
    for pid in os.listdir(processes):
        if pid.isdigit() and pid != "1":
            try:
                with open(
                    os.open(f"{pid}/statm", os.O_RDONLY, dir_fd=processes), encoding="utf-8"
                ) as file:
                    pages += int(file.read().split()[1])
            except OSError:
                continue  # it has just ended
    return pages * resource.getpagesize()


def _rest(read: int, bound: int) -> bytes:
    data = bytearray()
    while len(data) <= bound:
        try:
            more = os.read(read, 65536)
        except BlockingIOError:
            break
        if not more:
            break
        data += more
    return bytes(data)


def _how(status: int, told: bytes, sign: bytes, cpu: float, cpu_limit: int) -> tuple[str, str]:
    """How a program ended that nobody stopped but the kernel."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU or (number == signal.SIGKILL and cpu >= cpu_limit):
            return "timeout", f"it used {cpu_limit} s of CPU"
        return "killed", f"by {signal.Signals(number).name}"
    code = os.WEXITSTATUS(status)
    if told == b"memory":
        return "memory", "it raised MemoryError"
    if code:
        return "error", f"it ended with status {code}"
    if told == sign:
        return "ok", ""
    return "exit", "it ended itself with status 0 before its last statement"


def _report(report: dict[str, Any]) -> None:
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
