"""What a run wrote down: `metrics*.jsonl` as columns, one row per step."""

import array
import dataclasses
import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
from etils import epath

from mobilellm_jax.errors import UserError

# What is read of a program's start, as far as its line has it: early runs wrote less.
_START = {
    "time": int | float,
    "parameters": int,
    "flops_per_token": int,
    "steps": int,
    "plan": str,
    "devices": dict,
    "packages": dict,
}


@dataclasses.dataclass(frozen=True)
class Series:
    """Measurements of one kind: increasing steps [N]; columns float64 [N], NaN where absent."""

    steps_N: np.ndarray
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        """Number of steps measured."""
        return len(self.steps_N)

    def column(self, name: str) -> np.ndarray:
        """float64 [N]; all NaN when nothing of this name was ever measured."""
        return self.columns.get(name, np.full(len(self), np.nan))

    def per_source(self, quantity: str) -> dict[str, np.ndarray]:
        """The columns `quantity/<source>` by source, in the order in which they first appeared."""
        prefix = quantity + "/"
        return {k.removeprefix(prefix): v for k, v in self.columns.items() if k.startswith(prefix)}

    def last(self, name: str) -> float:
        """The newest finite value of a column, NaN when there is none."""
        values_N = self.column(name)
        finite = np.flatnonzero(np.isfinite(values_N))
        return float(values_N[finite[-1]]) if len(finite) else math.nan


@dataclasses.dataclass(frozen=True)
class History:
    """All that `metrics*.jsonl` tell: program starts, steps, held-out measurements, tasks, cuts."""

    starts: list[dict[str, Any]]
    train: Series
    heldout: Series
    tasks: Series
    cuts: Series
    torn: int  # lines that are no record: a process was killed while it wrote them

    @property
    def resumes(self) -> list[int]:
        """Steps at which the run was taken up again."""
        return [start["step"] for start in self.starts if start["step"] > 0]

    @property
    def skipped(self) -> list[int]:
        """Steps that were skipped because their loss or gradient was not finite."""
        count_N = np.nan_to_num(self.train.column("skipped"))
        return self.train.steps_N[np.diff(count_N, prepend=0.0) > 0].tolist()

    def tokens_so_far(self) -> np.ndarray:
        """float64 [N]: targets trained on up to and including each training step."""
        per_source = [np.nan_to_num(c) for c in self.train.per_source("tokens").values()]
        return np.cumsum(np.sum(per_source, axis=0)) if per_source else np.zeros(len(self.train))


def read_history(workdir: epath.PathLike) -> History:
    """Reads every `metrics*.jsonl` of a workdir, in the order of their names.

    After a resume a step may occur twice: the last line of a (kind, step) counts.

    Raises:
      UserError: there is no such file, or no training step in any.
    """
    paths = sorted(epath.Path(workdir).glob("metrics*.jsonl"), key=lambda path: path.name)
    if not paths:
        raise UserError(
            f"{workdir} is not the workdir of a run (no metrics.jsonl in it): "
            "name the directory that was given to training as --workdir."
        )
    starts: dict[int, dict[str, Any]] = {}
    kinds = {kind: _Columns() for kind in ("train", "heldout", "tasks", "cut")}
    torn = 0
    for path in paths:
        with path.open("rb") as lines:
            for line in lines:
                record = _parse(line)
                if record is None:
                    torn += 1
                elif record["kind"] == "start":
                    starts[record["step"]] = record
                elif record["kind"] in kinds:
                    kinds[record["kind"]].add(record)
    train, heldout, tasks, cuts = (columns.series() for columns in kinds.values())
    if not len(train):
        raise UserError(f"no training step is recorded in {workdir} yet: wait for the first one.")
    return History([starts[step] for step in sorted(starts)], train, heldout, tasks, cuts, torn)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        whole = isinstance(record["kind"], str) and isinstance(record["step"], int)
        whole = whole and 0 <= record["step"] < 1 << 63
        if whole and record["kind"] == "start":
            whole = all(isinstance(record[key], _START[key]) for key in record.keys() & _START)
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return record if whole else None


class _Columns:
    """Grows columns of doubles line by line: a run of a million steps stays at 8 bytes a number."""

    def __init__(self) -> None:
        self.steps = array.array("q")
        self.columns: dict[str, array.array] = {}

    def add(self, record: dict[str, Any]) -> None:
        row = len(self.steps)
        self.steps.append(record["step"])
        for name, value in record.items():
            if isinstance(value, int | float) and name != "step":
                column = self.columns.setdefault(name, array.array("d"))
                column.extend(_gap(row - len(column)))
                column.append(value)

    def series(self) -> Series:
        steps_N = np.array(self.steps, dtype=np.int64)
        # Over the reversed lines, np.unique's first occurrence is the last line of each step.
        unique_N, from_end_N = np.unique(steps_N[::-1], return_index=True)
        keep_N = len(steps_N) - 1 - from_end_N
        for column in self.columns.values():
            column.extend(_gap(len(steps_N) - len(column)))
        return Series(unique_N, {k: np.array(c)[keep_N] for k, c in self.columns.items()})


def _gap(length: int) -> Iterable[float]:
    return [math.nan] * length
