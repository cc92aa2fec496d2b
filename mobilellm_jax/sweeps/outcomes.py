"""What became of a cell, read from the record of its run."""

import dataclasses
import json
import math
from typing import Any

from etils import epath

from mobilellm_jax.data.plan import Plan
from mobilellm_jax.errors import UserError
from mobilellm_jax.reporting.history import History, read_history
from mobilellm_jax.sweeps.description import Cell
from mobilellm_jax.training.checkpoint import FOLDER
from mobilellm_jax.training.config import FREE, differences
from mobilellm_jax.training.length import length_of
from mobilellm_jax.training.workdir import complete


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A complete cell in numbers; bits per byte are those of the held-out rows at the last step."""

    row: str
    seed: int
    value: float | None  # of what is tuned in the row
    bits_per_byte: float
    bits_per_byte_of: dict[str, float]  # by source
    parameters: int  # of the network that was measured, after all cuts
    flops_per_token: int
    tokens: int  # targets, padding included
    seconds: float  # of training steps, the first one's compilation included, evaluation not
    devices: dict[str, Any]  # kind, count, processes, cpu_threads: on these the last bits depend
    commit: str
    plan: str  # hash of what decided the data and their order

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def read_outcome(cell: Cell, directory: epath.Path) -> Outcome | None:
    """The outcome of a cell, or None while there is something left for training to do, or to refuse.

    Raises:
      UserError: the cell is complete, but nothing finite was measured, or not on the rows asked for.
    """
    steps = length_of(cell.config).steps
    changed = _changed(cell, directory)
    if not (directory / FOLDER / str(steps)).exists() or changed is None:
        return None
    if not all(key.split(".")[0] in FREE for key in changed):
        return None
    history = read_history(directory)
    start = history.starts[-1] if history.starts else {}
    if (
        start.get("plan") != Plan.load(cell.config.plan).hash
        or steps not in history.heldout.steps_N
    ):
        return None
    if "eval.rows" in changed:
        there, here = changed["eval.rows"]
        raise UserError(
            f"{directory} was measured on {there} held-out rows of each source, and config.eval.rows is "
            f"{here:,} now, so its cells would not compare: set it back, or choose another --workdir."
        )
    bits = float(history.heldout.column("bits_per_byte")[-1])  # of the last step, a number or not
    if not math.isfinite(bits):
        raise UserError(
            f"{directory} has no held-out bits per byte at its last step: prepare sources with "
            "held-out rows, or see in metrics.jsonl where the loss left the finite numbers."
        )
    of = history.heldout.per_source("bits_per_byte")
    return Outcome(
        row=cell.row,
        seed=cell.seed,
        value=cell.value,
        bits_per_byte=bits,
        bits_per_byte_of={source: float(values_N[-1]) for source, values_N in of.items()},
        parameters=_parameters(history),
        flops_per_token=history.starts[0]["flops_per_token"],  # before it compacts, if it does
        tokens=(int(history.train.last("rows")) - cell.config.first_row) * cell.config.row_length,
        seconds=float(history.train.column("step_seconds").sum()),
        devices=start["devices"],
        commit=start["commit"],
        plan=start["plan"],
    )


def _parameters(history: History) -> int:
    """What is left after the last cut, or what the run began with."""
    left = history.cuts.last("parameters")
    return int(left) if math.isfinite(left) else history.starts[-1]["parameters"]


def _changed(cell: Cell, directory: epath.Path) -> dict[str, tuple[Any, Any]] | None:
    """In what the configuration of the run there differs from the cell's; None: there is no run."""
    try:
        old = json.loads((directory / "config.json").read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    if not isinstance(old, dict) or not isinstance(old.get("eval"), dict):
        return None  # training tells of it
    return differences(complete(old), complete(cell.config.to_dict()))
