"""Python programs that a model wrote, run where they can do no harm: `run_python`.

Each program gets processes, network, file system and user of its own (Linux namespaces), so that
writing outside, reading what is ours and talking to anyone are not forbidden but impossible;
limits on time, memory, processes and files bound what it costs. What is inside is in `jail.py`.
Neither root nor a special installation is needed; where the kernel does not let a user make
namespaces, nothing runs.

It keeps honest and broken programs in. It is no proof against somebody who holds an unknown
defect of the Linux kernel, nor against a program that looks for the sign by which its end is
known (`Outcome.ended`): such a program can claim to have passed, and can do nothing else.
"""

import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation import jail

OK, EXIT, ERROR, TIMEOUT, MEMORY, KILLED = "ok", "exit", "error", "timeout", "memory", "killed"

_KERNEL = (5, 14)  # counts processes per user namespace, and sets mounts read-only as a tree
_GRACE_SECONDS = 20.0  # to start and to clear away, on a busy machine
_VISIBLE = (
    *("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store"),
    *("/etc/ld.so.cache", "/etc/alternatives"),
    *("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom"),
)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
      wall_seconds: from start to end.
      cpu_seconds: of each of its processes.
      memory: bytes; address space of each process, and resident in all of them together, where what
        two share counts twice.
      processes: processes and threads at a time.
      disk: bytes in its directory, which is in memory.
      file_size: bytes of a file.
      open_files: of a process.
      output: bytes on stdout and stderr together.
    """

    wall_seconds: float = 10.0
    cpu_seconds: int = 10
    memory: int = 2 << 30
    processes: int = 16
    disk: int = 64 << 20
    file_size: int = 16 << 20
    open_files: int = 64
    output: int = 1 << 20


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a program ended, and what it wrote.

    Attributes:
      ended: `ok`: it came to its last statement, and its status is 0; `exit`: it ended itself with
        status 0 before that, which a program that reads and prints may do, but by which one that
        is to pass assertions would escape them; `error`: another status, as after an exception;
        `timeout`, of CPU or wall; `memory`; `killed`, by a signal or for its output.
      detail: of `ended`, in words.
      stdout: text.
      stderr: text.
      seconds: wall.
    """

    ended: str
    detail: str
    stdout: str
    stderr: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether it came to its last statement without an error."""
        return self.ended == OK


def run_python(
    program: str, *, allowed: bool, stdin: str = "", limits: Limits | None = None
) -> Outcome:
    """Runs a program in a sandbox of its own with this Python, and waits until all of it is gone.

    May be called from several threads.

    Args:
      program: source.
      allowed: whether the user has asked for code that a model wrote to be run.
      stdin: what the program reads.
      limits: on what it uses; the default is `Limits()`.

    Raises:
      UserError: it is not allowed, or too large, or the machine cannot isolate it.
    """
    if not allowed:
        raise UserError(
            "running code that a model wrote is off: it is run in a sandbox, and only if you allow it."
        )
    limits = limits or Limits()
    if (
        len(program.encode(errors="replace")) + len(stdin.encode(errors="replace"))
        > limits.disk // 2
    ):
        raise UserError(
            f"a program and its input are larger than half of its {limits.disk:,} bytes."
        )
    _check_machine()
    with tempfile.TemporaryDirectory() as root:
        spec = {
            "program": program,
            "stdin": stdin,
            "limits": dataclasses.asdict(limits),
            "root": root,
            "visible": _visible(),
            "python": sys.executable,
        }
        report = _jailed(spec)
    refused = report.get("refused") or (report["detail"] if report["ended"] == "refused" else None)
    if refused:
        raise UserError(
            f"this machine cannot isolate a program ({refused}), so none was run: allow user "
            "namespaces (sysctl user.max_user_namespaces, and on Ubuntu "
            "kernel.apparmor_restrict_unprivileged_userns=0; in a container, run it with "
            "--privileged), or grade on a machine that allows them."
        )
    return Outcome(**report)


def _check_machine() -> None:
    """Raises `UserError` where there are no such namespaces."""
    needs = "running code that a model wrote needs Linux 5.14 or later on x86-64 or AArch64"
    here = f"{platform.system()} {platform.release()} on {platform.machine()}"
    version = re.match(r"(\d+)\.(\d+)", platform.release())
    if (
        sys.platform != "linux"
        or platform.machine() not in jail.MACHINES
        or version is None
        or tuple(map(int, version.groups())) < _KERNEL
    ):
        raise UserError(f"{needs}; this is {here}: grade on such a machine.")


def _visible() -> list[str]:
    """What of this machine a program may read: libraries, and the Python that runs it."""
    python = Path(sys.executable)
    own = {sys.prefix, sys.base_prefix, str(python.parent), str(python.resolve().parent)}
    own |= {path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")}
    paths = [path for path in (*_VISIBLE, *sorted(own)) if os.path.lexists(path)]
    return [
        path
        for i, path in enumerate(paths)
        if not any(Path(path).is_relative_to(other) for other in paths[:i])
    ]


def _jailed(spec: dict[str, Any]) -> dict[str, Any]:
    """Starts `jail.py`, makes it a user of its own namespace, and returns its report."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", jail.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        cwd="/",
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        first = process.stdout.readline().strip()
        if first != b"ready":
            return json.loads(first) if first else _unstarted(process.communicate()[1])
        try:
            _map_users(process.pid)
        except OSError as error:
            return {"refused": f"{error.filename}: {error.strerror}"}
        seconds = spec["limits"]["wall_seconds"] + _GRACE_SECONDS
        try:
            out, err = process.communicate(json.dumps(spec).encode(), seconds)
        except subprocess.TimeoutExpired:
            return _unreported(TIMEOUT, f"its sandbox gave no answer for {seconds} s")
    finally:
        process.kill()  # and with it all of its namespace
        process.communicate()
    return json.loads(out) if out.strip() else _lost(err)


def _unstarted(stderr: bytes) -> dict[str, Any]:
    """Of a jail that ended before it had a program: a Python that needs an environment, for one."""
    lines = stderr.decode(errors="replace").split("\n")
    return {"refused": next(filter(str.strip, reversed(lines)), "its sandbox did not start")}


def _lost(stderr: bytes) -> dict[str, Any]:
    """Of a jail without a report: it broke, or the program brought it down with itself."""
    if b"Traceback" in stderr:
        raise RuntimeError(f"the sandbox failed: {stderr.decode(errors='replace')}")
    return _unreported(KILLED, "with all of its sandbox")


def _unreported(ended: str, detail: str) -> dict[str, Any]:
    return {"ended": ended, "detail": detail, "stdout": "", "stderr": "", "seconds": 0.0}


def _map_users(pid: int) -> None:
    """Gives the user namespace of `pid` its users: nobody, and for a root of ours also root.

    Root needs itself inside to open its own directories while it builds; the program is nobody.
    """
    if os.geteuid() == 0:
        users = groups = f"0 0 1\n{jail.NOBODY} {jail.NOBODY} 1\n"
    else:
        users, groups = f"{jail.NOBODY} {os.geteuid()} 1\n", f"{jail.NOBODY} {os.getegid()} 1\n"
        _write(f"/proc/{pid}/setgroups", "deny")  # without which a user may not map groups
    _write(f"/proc/{pid}/uid_map", users)
    _write(f"/proc/{pid}/gid_map", groups)


def _write(path: str, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(descriptor)
