"""One step of a run again, bit for bit, and which of its rows made it what it was."""

import dataclasses
import json
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mobilellm_jax.data.accounting import seen_rows
from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel.sharding import BATCH_AXES, put_rows
from mobilellm_jax.reporting.history import read_history
from mobilellm_jax.tables import aligned
from mobilellm_jax.training.length import stream
from mobilellm_jax.training.saving import Checkpoints
from mobilellm_jax.training.setup import Setup, set_up, taught
from mobilellm_jax.training.workdir import check_same_run

SHOWN, CHARACTERS = 8, 70  # rows, and characters of their text, in the printed table


@dataclasses.dataclass(frozen=True)
class ReplayedRow:
    """A row of the step, with the state that the step began with."""

    index: int  # in the run
    source: str
    epoch: int
    loss: float  # mean over its targets, as the objective has it
    gradient_norm: float  # of that mean
    targets: int  # that count
    documents: list[dict[str, Any]]
    text: str


@dataclasses.dataclass(frozen=True)
class Replay:
    """A step that was run again; `recorded` holds what the run wrote down, if it did."""

    step: int
    begun_at: int  # step of the checkpoint; 0: fresh weights
    loss: float
    gradient_norm: float
    crc32: int
    recorded: dict[str, float]
    rows: list[ReplayedRow]
    path: str  # of the rows as lines of JSON

    @property
    def exact(self) -> bool | None:
        """Whether loss, gradient norm and rows are those recorded, to the last bit; None: no record."""
        found = {
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "batch_crc32": float(self.crc32),
        }
        return found == self.recorded if self.recorded else None


def replay(
    config: ConfigDict,
    workdir: epath.PathLike,
    step: int,
    devices: Sequence[jax.Device] | None = None,
) -> Replay:
    """Runs a step of a run again, from the nearest checkpoint before it, and looks at its rows.

    Writes `WORKDIR/replay/<step>.jsonl`, a line per row, the largest gradient first, and nothing else.

    Args:
      config: of the run.
      workdir: of the run; it may be training.
      step: from 1 on.
      devices: to run on; all there are if None.

    Raises:
      UserError: the configuration is another run's, the step cannot be reached, or the data do not say
        which documents their rows hold.
    """
    run, workdir = set_up(config, devices or jax.devices()), epath.Path(workdir)
    if not 1 <= step <= run.length.steps:
        raise UserError(f"the run has steps 1 to {run.length.steps:,}, not {step:,}.")
    history = read_history(workdir)
    checkpoints = Checkpoints(workdir, **config.checkpoint, read_only=True)
    with jax.set_mesh(run.mesh):
        meta = checkpoints.newest_meta(before=step)
        if meta is None and config.init_from:
            raise UserError(
                f"no checkpoint in {checkpoints.directory} is from before step {step:,}: replay a "
                "later step, or set config.checkpoint.keep_every in the next run."
            )
        begun_at = 0 if meta is None else int(meta["step"])
        if meta is not None:
            check_same_run(meta, config, run.plan, checkpoints.directory)
        # Before anything is computed, for data need not say which documents their rows hold.
        part = jax.process_index(), jax.process_count()
        count = run.length.batch(step) // part[1]
        first = run.length.rows(step - 1) + part[0] * count
        seen = list(seen_rows(run.mixture, first, first + count))
        print(f"replaying {step - begun_at:,} step(s) from step {begun_at:,} ...", flush=True)
        if meta is None:
            state = run.fresh()
        else:
            run = run.at(meta)
            state = checkpoints.restore(run.abstract, begun_at)
        checkpoints.close()
        parts = stream(run.mixture, run.length, begun_at, *part, prefetch=config.prefetch)
        for done in range(begun_at + 1, step):
            rows = put_rows(next(parts), run.mesh)
            state, _ = run.step(state, rows)
            run, state, _ = run.pruned(done, state, rows)
        batch = next(parts)
        measured = _measure(run, state.params, batch)
        _, metrics = run.step(state, put_rows(batch, run.mesh))
        metrics = jax.device_get(metrics)

    found = [
        ReplayedRow(
            row.index,
            row.source,
            row.epoch,
            *numbers,
            [{"id": d.id, "file": d.file, "place": d.place} for d in row.documents],
            run.tokenizer.decode(row.tokens.tolist()),
        )
        for row, numbers in zip(seen, measured, strict=True)
    ]
    found.sort(key=lambda row: -row.gradient_norm)
    path = workdir / "replay" / f"{step}.jsonl"
    path.parent.mkdir(exist_ok=True)
    lines = (json.dumps(dataclasses.asdict(row), ensure_ascii=False) for row in found)
    path.write_text("".join(line + "\n" for line in lines))
    return Replay(
        step,
        begun_at,
        float(metrics["loss"]),
        float(metrics["gradient_norm"]),
        zlib.crc32(batch["tokens"].data),
        _recorded(history.train, step),
        found,
        str(path),
    )


def report(found: Replay) -> str:
    """What a person looks at first: was it the same step, and which rows stand out."""
    said = {
        None: "the run has no record of it",
        True: "as recorded, bit for bit, and of the same rows",
        False: f"but recorded as {found.recorded}: other devices, threads or packages",
    }[found.exact]
    lines = [["row", "source", "epoch", "loss", "gradient", "documents", "text"]]
    by_loss = sorted(found.rows, key=lambda row: -row.loss)[: SHOWN // 2]
    shown = [*found.rows[:SHOWN], *(row for row in by_loss if row not in found.rows[:SHOWN])]
    for row in shown:
        named = ", ".join(d["id"] or f"{d['file']}:{d['place']}" for d in row.documents)
        text = " ".join(row.text.split())[:CHARACTERS]
        numbers = f"{row.loss:.3f}", f"{row.gradient_norm:.3f}"
        lines.append([f"{row.index:,}", row.source, str(row.epoch), *numbers, named[:40], text])
    return (
        f"step {found.step:,}: loss {found.loss:.4f}, gradient norm {found.gradient_norm:.4f}, {said}\n"
        f"rows with the largest gradients, then with the largest losses, of {len(found.rows)}; all "
        f"with their text in {found.path}\n\n{aligned(lines, '><>>><<')}"
    )


def _measure(
    run: Setup, params: Any, batch: dict[str, np.ndarray]
) -> list[tuple[float, float, int]]:
    """(loss, gradient norm, targets) of each row by itself, one at a time on each device."""

    def one(params: Any, teacher: Any, row: dict[str, jax.Array]) -> tuple[jax.Array, ...]:
        def mean(params: Any) -> tuple[jax.Array, jax.Array]:
            losses = taught(run.objective, teacher)(params, row, run.network)
            targets = losses.weight_BT.sum()
            return losses.total / jnp.maximum(targets, 1), targets

        (loss, targets), gradient = jax.value_and_grad(mean, has_aux=True)(params)
        return loss[None], optax.tree.norm(gradient)[None], targets[None]

    rows, each = len(batch["tokens"]), jax.local_device_count()
    each = min(len(run.devices), each)
    # Unchecked: gradients of a row are not to be summed over devices.
    specs: Any = {
        "in_specs": (P(), P(), P(BATCH_AXES)),
        "out_specs": P(BATCH_AXES),
        "check_vma": False,
    }
    several = jax.jit(jax.shard_map(one, mesh=run.mesh, **specs))
    teacher = run.load_teacher and run.load_teacher()
    found: list[tuple[float, float, int]] = []
    for first in range(0, rows, each):
        at = np.minimum(np.arange(first, first + each), rows - 1)
        part = put_rows({name: values[at] for name, values in batch.items()}, run.mesh)
        loss, norm, targets = jax.device_get(several(params, teacher, part))
        found += zip(loss.tolist(), norm.tolist(), map(int, targets), strict=True)
    return found[:rows]


def _recorded(series: Any, step: int) -> dict[str, float]:
    at = np.flatnonzero(series.steps_N == step)
    if not len(at):
        return {}
    names = ("loss", "gradient_norm", "batch_crc32")
    return {name: float(series.column(name)[at[0]]) for name in names}
