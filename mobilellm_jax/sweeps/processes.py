"""Runs cells, several at once, each in a process with cores of its own."""

import collections
import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from mobilellm_jax.errors import UserError
from mobilellm_jax.sweeps.description import Cell
from mobilellm_jax.training.signals import Signals

POLL = 0.2  # seconds


@dataclasses.dataclass(frozen=True)
class Order:
    """What a process is told."""

    config: ConfigDict
    workdir: str
    compiled: str  # directory of compiled programs, which the seeds of a network share
    cores: tuple[int, ...]  # to run on; none: wherever the system wants
    shared: bool  # the machine with other cells


@dataclasses.dataclass(frozen=True)
class _Running:
    cell: Cell
    process: subprocess.Popen
    cores: tuple[int, ...]
    began: float


def core_shares(parallel: int) -> list[tuple[int, ...]]:
    """Equal shares of the cores this process may use, one for each of `parallel` cells.

    Equal, because the number of threads decides the last bits of a result on a CPU. A share is
    empty where the system cannot bind a process to cores.

    Raises:
      UserError: there are fewer cores than cells.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [()] * parallel
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // parallel
    if not each:
        raise UserError(
            f"--parallel={parallel} cells need as many cores; there are {len(cores)}: lower it."
        )
    return [tuple(cores[i * each : (i + 1) * each]) for i in range(parallel)]


def run_cells(
    needed: Callable[[], Sequence[Cell]],
    workdir: Path,
    parallel: int,
    ended: Callable[[Cell, float, str], None],
) -> signal.Signals | None:
    """Trains cells while any are needed, `parallel` at once, each in `workdir/<its name>`.

    A signal to this process stops the cells, which save, and no other is started. Should this
    process die, its cells save and leave as well.

    Args:
      needed: the cells that may be run now, in order; asked again whenever one ended, because what
        it gave may decide what is needed. Those that are running may be among them, those that
        ended may not.
      workdir: local directory of the sweep; what a cell prints goes to `workdir/logs/<name>.log`.
      parallel: cells at once.
      ended: called with each cell that ended by itself, its seconds, and the sentence with which it
        failed, "" where it did not.

    Returns:
      The signal that stopped it, None if nothing did.

    Raises:
      UserError: there are fewer cores than cells to run at once.
    """
    free = core_shares(parallel)
    running: dict[str, _Running] = {}
    stopped = False
    waiting = collections.deque(needed())
    with Signals() as signals:
        while running or waiting:
            while free and waiting:
                cell, cores = waiting.popleft(), free.pop(0)
                process = _start(cell, workdir, cores, parallel > 1)
                running[cell.name] = _Running(cell, process, cores, time.monotonic())
            time.sleep(POLL)
            if signals.caught and not stopped:
                stopped = True
                waiting.clear()
                for each in running.values():
                    each.process.terminate()
            for each in [r for r in running.values() if r.process.poll() is not None]:
                del running[each.cell.name]
                free.insert(0, each.cores)
                if not stopped:
                    ended(each.cell, time.monotonic() - each.began, _failure(each, workdir))
                    waiting = collections.deque(c for c in needed() if c.name not in running)
    return signals.caught


def _start(cell: Cell, workdir: Path, cores: tuple[int, ...], shared: bool) -> subprocess.Popen:
    """Starts a cell in a session of its own, so that Ctrl-C reaches it through this process alone."""
    compiled = workdir / f"compiled-{len(cores)}"  # programs depend on the number of threads
    order = Order(cell.config, str(workdir / cell.name), str(compiled), cores, shared)
    log = _log(cell, workdir)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "mobilellm_jax.sweeps.cell"],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    assert process.stdin
    process.stdin.write(pickle.dumps(order))
    process.stdin.flush()  # and stays open: its end is the sign that this process is gone
    return process


def _failure(ended: _Running, workdir: Path) -> str:
    """The sentence with which a cell failed; "" where it did not."""
    assert ended.process.stdin
    ended.process.stdin.close()
    status, log = ended.process.returncode, _log(ended.cell, workdir)
    if status == 0:
        return ""
    lines = log.read_text(errors="replace", encoding="utf-8").splitlines()
    said = lines[-1] if lines else ""
    if said.startswith("error: "):
        return said.removeprefix("error: ")
    how = f"status {status}" if status > 0 else signal.Signals(-status).name
    return f"ended with {how}: read {log}."


def _log(cell: Cell, workdir: Path) -> Path:
    return workdir / "logs" / f"{cell.name}.log"
