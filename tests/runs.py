"""What tests of training share: runs made quickly, what they recorded, and programs as a user starts them."""

import contextlib
import dataclasses
import io
import json
import logging
import os
import runpy
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import tiny
from absl import app, flags

from mobilellm_jax.train import train

TESTS = Path(__file__).parent


def run(config, workdir, stop_at=None, devices=None):
    """`train` on one device (or those given), saying nothing; the last state."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return train(config, workdir, stop_at, devices or tiny.one_device())


def lines(workdir, kind="train"):
    """The records of one kind by step; the last line of a step counts."""
    text = (Path(workdir) / "metrics.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    return {r["step"]: r for r in records if r["kind"] == kind}


def rows_seen(workdir):
    """(step, rows consumed, checksum of the batch) of every step."""
    return [(step, r["rows"], r["batch_crc32"]) for step, r in sorted(lines(workdir).items())]


def bits(tree):
    """The bytes of every leaf, by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


def files(directory):
    """Every file below a directory with its content."""
    return {p: p.read_bytes() for p in Path(directory).rglob("*") if p.is_file()}


@dataclasses.dataclass
class Ended:
    """How a program ended and what it said."""

    status: int
    out: str
    err: str


def program(module, *arguments):
    """Runs `python -m module arguments` inside this process, command line and all."""
    app.define_help_flags()
    known = set(flags.FLAGS)
    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, [module, *map(str, arguments)]
    hook = sys.unraisablehook
    status = 0
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # that the module was imported before
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv, sys.unraisablehook = argv, hook
        logging.disable(logging.NOTSET)
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
        flags.FLAGS.unparse_flags()
        sys.modules.pop("config_config", None)  # ml_collections keeps the file it has read
    return Ended(status, out.getvalue(), err.getvalue())


def config_file(directory, plan, **changes):
    """Writes a configuration file: `tiny.config` with keys changed (`checkpoint__every=2`)."""
    body = "".join(f"    c.{k.replace('__', '.')} = {v!r}\n" for k, v in changes.items())
    path = Path(directory) / "config.py"
    path.write_text(
        f"import sys\nsys.path.insert(0, {str(TESTS)!r})\nimport tiny\n\n\n"
        f"def get_config():\n    c = tiny.config({str(plan)!r})\n{body}    return c\n"
    )
    return path


def start(*arguments, program=(sys.executable,), **environment):
    """Starts Python (or another program) with these arguments as a process of its own, on one device."""
    simulated = "--xla_force_host_platform_device_count=8"
    environment = {
        **os.environ,
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(simulated, ""),
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        **environment,
    }
    return subprocess.Popen(
        [*program, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_training(config, workdir):
    """Starts the training program."""
    return start("-m", "mobilellm_jax.train", f"--config={config}", f"--workdir={workdir}")


def start_pod(processes, devices, logs, config, workdir, *arguments):
    """Starts training as several processes, each with its log below `logs`."""
    return start(
        f"--processes={processes}",
        f"--devices={devices}",
        f"--logs={logs}",
        "--",
        *(sys.executable, "-m", "mobilellm_jax.train"),
        *(f"--config={config}", f"--workdir={workdir}", *arguments),
        program=("bash", TESTS.parent / "launch" / "local_pod.sh"),
    )


def finish(process, timeout=120):
    """Waits for the end of a started program."""
    out, err = process.communicate(timeout=timeout)
    return Ended(process.returncode, out, err)


def wait_for_lines(process, workdir, more, timeout=120):
    """Waits until `more` further lines are recorded or the process has ended."""
    path = Path(workdir) / "metrics.jsonl"

    def count():
        return path.read_bytes().count(b"\n") if path.exists() else 0

    goal, deadline = count() + more, time.monotonic() + timeout
    while count() < goal and process.poll() is None:
        assert time.monotonic() < deadline, "the run does not go on"
        time.sleep(0.002)


def alive(pid):
    """Whether there is such a process, and it has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
