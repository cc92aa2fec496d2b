"""A program in the sandbox can use what it is given, can do no harm, and leaves nothing behind."""

import concurrent.futures
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
import venv
from pathlib import Path

import pytest

from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation import sandbox
from mobilellm_jax.evaluation.sandbox import Limits, run_python

SMALL = Limits(wall_seconds=20, cpu_seconds=10, memory=512 << 20)


pytestmark = pytest.mark.usefixtures("isolating")


def run(program, limits=SMALL, **options):
    return run_python(program, allowed=True, limits=limits, **options)


def named(name):
    """Processes of the host with this name; programs give themselves one."""
    found = []
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            if comm.read_text().strip() == name:
                found.append(comm.parent.name)
        except OSError:
            continue
    return found


def naming(name):
    return f"import ctypes\nctypes.CDLL(None).prctl(15, {name.encode()!r}, 0, 0, 0)\n"


def test_a_program_reads_prints_and_passes():
    outcome = run("name = input()\nprint('hello', name)\nassert name", stdin="x\xe9\n")
    assert outcome.passed and outcome.ended == "ok"
    assert (outcome.stdout, outcome.stderr) == ("hello x\xe9\n", "")


def test_it_is_the_main_module_of_this_python_with_its_libraries():
    program = """
import dataclasses, numpy, pickle, sys
@dataclasses.dataclass
class A:
    x: "int"
assert pickle.loads(pickle.dumps(A(3))) == A(3)
assert __name__ == "__main__" and sys.argv == ["program.py"]
print(sys.version_info[:2], numpy.arange(4) @ numpy.arange(4))
"""
    assert run(program).stdout == f"{sys.version_info[:2]} 14\n"


@pytest.mark.parametrize("way", ["import os; os._exit(0)", "raise SystemExit", "exit()"])
def test_who_leaves_before_the_assertions_has_not_passed_them(way):
    outcome = run(f"print(1, flush=True)\n{way}\nassert False")
    assert outcome.ended == "exit" and not outcome.passed and outcome.stdout == "1\n"


def test_no_program_can_say_that_it_was_not_started():
    outcome = run("import os\nos.write(3, b'start of nothing')\nos._exit(1)")
    assert (outcome.ended, outcome.detail) == ("error", "it ended with status 1")


def test_only_the_end_of_the_first_process_counts():
    program = "import os\nchild = os.fork()\nif child: os.waitpid(child, 0)\n"
    assert run(program).ended == "ok"
    assert run(program + "if child: os._exit(0)").ended == "exit"
    assert run(program + "if not child: os._exit(1)").ended == "ok"


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("raise SystemExit(3)", ""),
        ("def f(:", "SyntaxError"),
        ("import atexit, os\natexit.register(lambda: os._exit(1))", ""),
    ],
)
def test_errors(program, says):
    outcome = run(program)
    assert outcome.ended == "error" and says in outcome.stderr


def test_a_crash_is_told_by_its_signal():
    outcome = run("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    assert (outcome.ended, outcome.detail) == ("killed", "by SIGSEGV")


def test_a_loop_ends_at_its_limit_of_cpu_even_if_it_ignores_the_signal():
    ignore = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"
    for before in ("", ignore):
        outcome = run(before + "while True: pass", Limits(wall_seconds=60, cpu_seconds=1))
        assert outcome.ended == "timeout" and "CPU" in outcome.detail


def test_waiting_ends_at_the_limit_of_wall_time():
    outcome = run("print('a', flush=True)\nimport time; time.sleep(60)", Limits(wall_seconds=0.5))
    assert outcome.ended == "timeout" and 0.5 <= outcome.seconds < 5 and outcome.stdout == "a\n"


def test_a_memory_hog_gets_no_more_than_its_limit():
    assert run("x = bytearray(1 << 30)").ended == "memory"
    assert run("x = []\nwhile True: x.append(bytearray(1 << 20))").ended == "memory"


def test_memory_is_that_of_all_processes_together():
    program = """
import os, time
for _ in range(6):
    if not os.fork():
        x = bytearray(b"x" * (75 << 20))
        time.sleep(60)
time.sleep(60)
"""
    assert run(program, Limits(memory=300 << 20)).ended == "memory"


def test_memory_that_belongs_to_no_process_is_refused():
    program = """
import ctypes
libc = ctypes.CDLL(None)
assert libc.memfd_create(b"x", 0) == -1
assert libc.shmget(0, 1 << 20, 0o1600) == -1
assert libc.semget(0, 32000, 0o1600) == -1
assert libc.msgget(0, 0o1600) == -1
"""
    assert run(program).passed


def test_a_fork_bomb_is_bounded_and_nothing_of_it_is_left():
    name = f"bomb{uuid.uuid4().hex[:8]}"
    program = f"""{naming(name)}
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(run, program, Limits(wall_seconds=3, processes=10))
        most = 0
        while not running.done():
            most = max(most, len(named(name)))
            time.sleep(0.05)
    assert 2 <= most <= 10
    assert running.result().ended == "timeout"
    assert named(name) == []


def test_a_daemon_does_not_outlive_its_program():
    name = f"daemon{uuid.uuid4().hex[:8]}"
    program = f"""{naming(name)}
import os, signal, time
if not os.fork():
    os.setsid()
    if os.fork():
        os._exit(0)
    for number in set(signal.Signals) - {{signal.SIGKILL, signal.SIGSTOP}}:
        signal.signal(number, signal.SIG_IGN)
    os.open("/tmp/daemon", os.O_CREAT)
    time.sleep(600)
while not os.path.exists("/tmp/daemon"):
    time.sleep(0.01)
time.sleep(0.5)
"""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        running = pool.submit(run, program)
        most = 0
        while not running.done():
            most = max(most, len(named(name)))
            time.sleep(0.02)
    assert most >= 2
    assert running.result().passed
    assert named(name) == []


def test_it_writes_nowhere_but_in_its_own_empty_directory(tmp_path):
    name = f"written{uuid.uuid4().hex}"
    places = ["/", "/usr", "/etc", "/dev", "/dev/shm", "/var/tmp", "/proc", "/tmp"]
    places += [sys.prefix, sys.base_prefix, str(tmp_path), str(Path(__file__).parent)]
    program = f"""
import os
print(os.getcwd(), [name for name in os.listdir() if "." in name])
for place in {places}:
    try:
        open(place + "/{name}", "w").write("x")
        print(place)
    except OSError:
        pass
"""
    assert run(program).stdout.splitlines() == ["/tmp ['program.py']", "/tmp"]
    assert not any(os.path.exists(f"{place}/{name}") for place in places)


def test_its_directory_and_its_files_are_bounded():
    program = """
for i in range(100):
    with open(f"f{i}", "wb") as file:
        file.write(bytes(1 << 20))
"""
    assert "No space left" in run(program, Limits(disk=8 << 20)).stderr
    outcome = run("open('f', 'wb').write(bytes(9 << 20))", Limits(file_size=8 << 20))
    assert "File too large" in outcome.stderr or outcome.detail == "by SIGXFSZ"
    outcome = run("x = [open('/dev/null') for _ in range(99)]", Limits(open_files=30))
    assert "Too many open files" in outcome.stderr


def test_it_reads_nothing_of_ours(tmp_path, monkeypatch):
    monkeypatch.setenv("OUR_SECRET", "abc123")
    (tmp_path / "secret").write_text("abc123")
    files = ["/etc/shadow", "/etc/passwd", f"{tmp_path}/secret", __file__]
    files += [f"/proc/{pid}/environ" for pid in ("self", "1", "2", os.getpid())]
    program = f"""
import os
assert "OUR_SECRET" not in os.environ
for name in {files}:
    try:
        print(name, open(name, "rb").read())
    except OSError:
        pass
"""
    outcome = run(program)
    assert outcome.passed and outcome.stdout == ""


def test_it_reaches_no_network(tmp_path):
    abstract = f"\0{uuid.uuid4().hex}"
    with (
        socket.create_server(("127.0.0.1", 0)) as inet,
        socket.socket(socket.AF_UNIX) as local,
        socket.socket(socket.AF_UNIX) as hidden,
    ):
        local.bind(f"{tmp_path}/s")
        hidden.bind(abstract)
        for listener in (local, hidden):
            listener.listen()
        addresses = [inet.getsockname(), f"{tmp_path}/s", abstract]
        socket.create_connection(addresses[0]).close()  # so the test itself would notice
        program = f"""
import socket
for address in {addresses!r}:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    try:
        socket.socket(family).connect(address)
        print("connected", address)
    except OSError:
        pass
try:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("8.8.8.8", 53))
    print("sent")
except OSError:
    pass
"""
        outcome = run(program)
    assert outcome.passed and outcome.stdout == ""


def test_a_flood_of_output_is_cut_and_ends_it():
    for stream in ("stdout", "stderr"):
        program = f"import sys\nwhile True: sys.{stream}.write('x' * 1000)"
        outcome = run(program, Limits(output=50_000))
        assert outcome.ended == "killed" and "50,000" in outcome.detail
        assert set(getattr(outcome, stream)) == {"x"} and len(getattr(outcome, stream)) == 50_000
    flood = "import os\nwhile True: os.write(3, b'x' * 1000)"  # where its end is told
    assert run(flood, Limits(output=50_000)).ended == "killed"


PRIVILEGES = """
import ctypes, os
libc = ctypes.CDLL(None)
assert 0 not in os.getresuid() + os.getresgid()
for call in (
    lambda: libc.unshare(1 << 28),  # a user namespace, with capabilities in it
    lambda: libc.syscall(56 if os.uname().machine == "x86_64" else 220, 1 << 28 | 17, 0, 0, 0, 0),
    lambda: libc.mount(b"none", b"/tmp", b"tmpfs", 0, None),
    lambda: libc.umount2(b"/usr", 2),
    lambda: libc.ptrace(16, 1, 0, 0),
    lambda: libc.chroot(b"/tmp"),
    lambda: libc.setuid(0),
    lambda: libc.kill(1, 9) or -1,  # it may be sent, but not to effect
):
    assert call() == -1
import resource
try:
    resource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))  # of the one who watches
    raise AssertionError(1)
except OSError:
    pass
libc.kill(1, 2)  # nor does it end at an interrupt
assert resource.prlimit(0, resource.RLIMIT_CORE) == (0, 0)
for limit in (resource.RLIMIT_NPROC, resource.RLIMIT_AS, resource.RLIMIT_CPU):
    try:
        resource.setrlimit(limit, (1 << 40, 1 << 40))
        raise AssertionError(limit)
    except (ValueError, OSError):
        pass
"""
FORKS = """
import os, time
for count in range(1, 99):
    try:
        if not os.fork():
            time.sleep(60)
    except OSError:
        break
assert count == 16, count
"""


@pytest.mark.parametrize("program", [PRIVILEGES, FORKS])
def test_it_has_no_privileges_and_gets_none(program):
    outcome = run(program)
    assert outcome.passed, outcome


def test_programs_side_by_side_do_not_mix():
    program = "import time\nopen('f', 'x').write(input())\ntime.sleep(.2)\nprint(open('f').read())"
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(lambda i: run(program, stdin=f"{i}\n"), range(12)))
    assert [outcome.stdout for outcome in outcomes] == [f"{i}\n" for i in range(12)]


def test_it_is_off_unless_asked_for():
    with pytest.raises(TypeError):
        run_python("print(1)")
    with pytest.raises(UserError, match="is off"):
        run_python("print(1)", allowed=False)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="larger than half"):
        run("print(1)", Limits(disk=1 << 20), stdin="x" * (1 << 20))
    assert run("print(len(input()))", Limits(disk=4 << 20), stdin="x" * (1 << 20)).passed


def test_another_machine_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox.platform, "release", lambda: "5.4.0-26-generic")
    with pytest.raises(UserError, match=r"needs Linux 5\.14.*this is Linux 5\.4\.0"):
        run("print(1)")


def elsewhere(python, program):
    """Calls `run_python` in a process of its own, and says what came of it."""
    code = f"""
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.sandbox import run_python
try:
    print(run_python({program!r}, allowed=True))
except UserError as error:
    print("refused:", error)
"""
    return [str(python), "-c", code]


def test_a_program_dies_with_the_process_that_runs_it():
    name = f"orphan{uuid.uuid4().hex[:8]}"
    ours = subprocess.Popen(elsewhere(sys.executable, naming(name) + "while True: pass"))
    deadline = time.monotonic() + 60
    while not named(name) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert named(name)
    ours.kill()
    ours.wait()
    while named(name) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not named(name)


def test_a_virtual_environment_may_lie_behind_a_link(tmp_path):
    venv.create(tmp_path / "there", symlinks=True, with_pip=False)
    (tmp_path / "here").symlink_to(tmp_path / "there")
    done = subprocess.run(elsewhere(tmp_path / "here/bin/python", "print(12345)"), **ROOT)
    assert "ended='ok'" in done.stdout, done


def test_a_python_that_does_not_start_alone_is_refused(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'python: no libpython3.so' >&2\nexit 127\n")
    python.chmod(0o755)
    monkeypatch.setattr(sandbox.sys, "executable", str(python))
    with pytest.raises(UserError, match="cannot isolate a program .*no libpython3.so"):
        run("print(1)")


ROOT = {"cwd": Path(__file__).parents[2], "capture_output": True, "text": True, "timeout": 100}


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs the program unshare")
def test_where_the_kernel_refuses_namespaces_nothing_runs():
    forbid = "echo 0 > /proc/sys/user/max_user_namespaces && exec "
    inside = ["unshare", "-U", "--map-root-user", "sh", "-c", forbid + '"$@"', "sh"]
    done = subprocess.run(inside + elsewhere(sys.executable, "print(12345)"), **ROOT)
    assert done.stdout.startswith("refused: this machine cannot isolate"), done
    assert "unshare: No space left" in done.stdout and "max_user_namespaces" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("program", ["print(1 + 1)", PRIVILEGES, FORKS])
def test_an_ordinary_user_can_do_it_too(program):
    for python in (sys.executable, "/usr/bin/python3"):
        check = [
            python,
            "-c",
            "import sys, mobilellm_jax.errors; assert sys.version_info >= (3, 11)",
        ]
        user = {"user": 1000, "group": 1000, "extra_groups": [], **ROOT}
        try:
            if subprocess.run(check, **user).returncode == 0:
                break
        except OSError:
            continue
    else:
        pytest.skip("an ordinary user can start no Python here")
    done = subprocess.run(elsewhere(python, program), **user)
    assert "ended='ok'" in done.stdout, done
