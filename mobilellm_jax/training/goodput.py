"""Goodput: which share of the seconds a run takes is spent on steps that count, and what the rest goes to.

The host's time is cut into laps, each named for what it was spent on; no lap waits for the devices.
Steps run on the devices while the host is ahead, so that their time shows where the loop waits for
them: when it fetches the metrics of the step before.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from mobilellm_jax.files import replaced

# What seconds go to; only the first are productive.
PRODUCTIVE = "train"
KINDS = (
    PRODUCTIVE,
    "start",  # the program, the data, the state
    "compile",  # the first step of each size
    "restore",  # reading a checkpoint
    "data",  # waiting for rows while the devices had nothing to do
    "evaluate",
    "save",  # the loop held up by a checkpoint
    "redone",  # steps that an earlier start had done and not saved
)
FILE = "goodput.json"
_EVERY = 10.0  # seconds between records, so that a kill takes little with it


class Goodput:
    """The laps of this start of a run, on top of those of the starts before."""

    def __init__(self, workdir: epath.Path, began: float, writes: bool = True) -> None:
        """Goes on with the record in the workdir; `began` is the time.time() of the program's start."""
        self._path, self._writes = workdir / FILE, writes
        self._began = self._last = began
        self._epoch = time.time() - time.monotonic()  # a clock that is set must not count as work
        self._written = 0.0
        self._seconds = dict.fromkeys(KINDS, 0.0)
        earlier = _read(self._path)
        self._earlier = earlier["seconds"]
        self._first = earlier["began"] or began
        self._starts = earlier["starts"] + 1
        self._seen = earlier["step"]  # steps done by the starts before

    def lap(self, kind: str) -> None:
        """The seconds since the last lap went to `kind`, one of `KINDS`."""
        now = self._epoch + time.monotonic()
        self._seconds[kind] += now - self._last
        self._last = now

    def stepped(self, step: int) -> None:
        """The seconds since the last lap went to training, and `step` is done; records it now and then."""
        self.lap("redone" if step <= self._seen else PRODUCTIVE)
        if self._last - self._written > _EVERY:
            self.record(step)

    def record(self, step: int) -> None:
        """Writes what the next start goes on from."""
        self._written = self._last
        if self._writes:
            total = {kind: self._earlier[kind] + self._seconds[kind] for kind in KINDS}
            state = {"began": self._first, "starts": self._starts, "seconds": total}
            text = json.dumps(state | {"step": max(step, self._seen)}, indent=1)
            # Of a full disk the metrics tell, or the next save.
            with contextlib.suppress(OSError), replaced(self._path) as unfinished:
                unfinished.write_text(text + "\n")

    def values(self) -> dict[str, Any]:
        """For the record: shares of this start and of all starts, and the seconds of both.

        `goodput` and `run/goodput` are productive seconds by those of the clock, since this program
        and since the first one started. `seconds/<kind>` and `run/seconds/<kind>` are what they went
        to; `run/seconds/down` is the time in which no program ran, or one that was killed before it
        could record.
        """
        run = {kind: self._earlier[kind] + self._seconds[kind] for kind in KINDS}
        wall = self._last - self._began
        # The sum is more where the clock was set between starts.
        total = max(self._last - self._first, sum(run.values()))
        return {
            "goodput": self._seconds[PRODUCTIVE] / max(wall, 1e-9),
            "run/goodput": run[PRODUCTIVE] / max(total, 1e-9),
            "run/starts": self._starts,
            **{f"seconds/{kind}": seconds for kind, seconds in self._seconds.items()},
            **{f"run/seconds/{kind}": seconds for kind, seconds in run.items()},
            "run/seconds/down": total - sum(run.values()),
        }

    def summary(self) -> str:
        """One line for the end of a program."""
        values = self.values()
        line = f"goodput: {values['goodput']:.1%} of {_duration(self._last - self._began)}"
        line += _rest(values, "seconds/")
        if self._starts > 1:
            total = _duration(self._last - self._first)
            line += f"\ngoodput over {self._starts} starts: {values['run/goodput']:.1%} of {total}"
            line += _rest(values, "run/seconds/")
        return line


def program_start() -> float:
    """When this process was started, as time.time(); now, where the system does not say."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
        return time.time() - uptime + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return time.time()


def _read(path: epath.Path) -> Mapping[str, Any]:
    """The record of the starts before; none, or a damaged one, counts as none: nothing depends on it."""
    with contextlib.suppress(Exception):  # whatever a damaged one may raise
        found = json.loads(path.read_text())
        seconds = {kind: float(found["seconds"].get(kind, 0.0)) for kind in KINDS}
        began, starts, step = float(found["began"]), int(found["starts"]), int(found["step"])
        if all(math.isfinite(number) for number in (began, *seconds.values())):
            return {"began": began, "starts": starts, "seconds": seconds, "step": step}
    return {"began": 0.0, "starts": 0, "seconds": dict.fromkeys(KINDS, 0.0), "step": 0}


def _rest(values: Mapping[str, float], prefix: str) -> str:
    parts = {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}
    total = max(sum(parts.values()), 1e-9)
    lost = {k: v / total for k, v in parts.items() if k != PRODUCTIVE and v / total >= 0.001}
    listed = ", ".join(f"{k} {v:.1%}" for k, v in sorted(lost.items(), key=lambda item: -item[1]))
    return f"; the rest: {listed}" if listed else ""


def _duration(seconds: float) -> str:
    hours, minutes = int(seconds // 3600), int(seconds % 3600 // 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds % 60:.0f} s"
