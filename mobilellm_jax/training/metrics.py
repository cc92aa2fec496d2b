"""The record of a run: `metrics.jsonl` and TensorBoard event files in the workdir."""

import contextlib
import json
import math
import os
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from etils import epath

from mobilellm_jax.errors import UserError
from mobilellm_jax.training.events import EventFile

STDERR = "stderr/"  # before the name of a task's figure: its standard error


def per_source(totals: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Loss (nats per token) and bits per byte, over all sources and for each that has tokens.

    Args:
      totals: `nll`, `tokens`, `bytes`, each [sources].
      names: of the sources.
    """
    nll, tokens, size = (np.asarray(totals[key], np.float64) for key in ("nll", "tokens", "bytes"))
    values = {}
    for name, at in [
        ("", slice(None)),
        *((f"/{name}", slice(s, s + 1)) for s, name in enumerate(names)),
    ]:
        if tokens[at].sum() and size[at].sum():
            values[f"loss{name}"] = nll[at].sum() / tokens[at].sum()
            values[f"bits_per_byte{name}"] = nll[at].sum() / size[at].sum() / math.log(2)
    return {name: float(value) for name, value in values.items()}


def step_values(metrics: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What is recorded of a step's metrics: numbers by name, those of a source as `name/<source>`.

    Args:
      metrics: as `training.step.train_step` returns them, on the host.
      names: of the sources.
    """
    values: dict[str, Any] = dict(per_source(metrics, names))
    values |= {key: float(metrics[key]) for key in ("loss", "gradient_norm", "learning_rate")}
    for key in ("rows", "tokens"):
        values |= {f"{key}/{n}": int(v) for n, v in zip(names, metrics[key], strict=True)}
    return values | {k: int(metrics[k]) for k in ("skipped", "outliers") if k in metrics}


class MetricsWriter:
    """Appends to `metrics.jsonl` and to a TensorBoard event file, one per program start.

    In a local workdir lines are written as they come. Object stores cannot append: there each start
    of the program has a `metrics-<time>-<step>.jsonl`, which is written anew at every `sync` from a
    local copy. A number that is not finite, for which JSON has no word, is `null`.
    """

    def __init__(self, workdir: epath.Path, start: int, wandb_project: str = "") -> None:
        """Opens the record of a program start at step `start`, in Weights & Biases too if asked.

        Raises:
          UserError: it cannot be written, or wandb is not installed.
        """
        self._wandb = _open_wandb(wandb_project, workdir) if wandb_project else None
        self._workdir = workdir
        self._copy = tempfile.TemporaryDirectory() if "://" in str(workdir) else None
        self._local = Path(self._copy.name if self._copy else workdir)
        name = (
            f"metrics-{int(time.time()):011d}-{start:09d}.jsonl" if self._copy else "metrics.jsonl"
        )
        self._path = self._local / name
        board = self._local / "tensorboard"
        with self._explained():
            board.mkdir(exist_ok=True)
            self._file = self._path.open("ab+")
            _cut_torn_line(self._file)
            self._board = EventFile(board)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Records one line; finite numbers of all kinds but `start` also go to TensorBoard.

        Raises:
          UserError: it cannot be written.
        """
        line = {"kind": kind, "step": step} | {
            k: v if _is_json(v) else None for k, v in values.items()
        }
        with self._explained():
            self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            self._file.flush()
            if kind == "start":
                return
            self._board.write(kind, step, _numbers(line))
        if self._wandb:
            self._wandb.log({f"{kind}/{k}": v for k, v in _numbers(line).items()}, step=step)

    def sync(self) -> None:
        """Makes what is recorded so far durable, also in an object store.

        Raises:
          UserError: it cannot be written.
        """
        with self._explained():
            self._board.flush()
            if self._copy:
                for path in filter(Path.is_file, self._local.rglob("*")):
                    target = self._workdir / path.relative_to(self._local).as_posix()
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(path.read_bytes())

    def close(self) -> None:
        """Writes out what is left.

        Raises:
          UserError: it cannot be written.
        """
        try:
            self.sync()
        finally:
            for file in (self._file, self._board):
                with contextlib.suppress(OSError):  # `sync` has told of it
                    file.close()
            if self._copy:
                self._copy.cleanup()
            if self._wandb:
                self._wandb.finish()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the metrics of this run cannot be written below {self._workdir} ({error.strerror}): "
                "mend that and run the same command again; it goes on from the last checkpoint."
            ) from error


class NoMetrics:
    """Stands for the `MetricsWriter` in the processes that write nothing."""

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def _cut_torn_line(file: BinaryIO) -> None:
    """Cuts off what a kill left of a line: its step is repeated, for lines come before checkpoints."""
    end = file.seek(0, os.SEEK_END)
    first = file.seek(max(0, end - (1 << 20)))  # longer than any line
    tail = file.read(end - first)
    whole = tail.rfind(b"\n") + 1
    if whole < len(tail):
        file.truncate(first + whole)


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}


def _open_wandb(project: str, workdir: epath.Path) -> Any:
    """A run of its own for every workdir, which a resumed run goes on with."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"config.wandb={project!r}, but wandb is not installed: install mobilellm-jax[wandb], or "
            "leave that key empty."
        ) from None
    path = workdir / "wandb_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    return wandb.init(project=project, name=workdir.name, id=path.read_text(), resume="allow")
