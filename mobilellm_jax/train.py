r"""Trains a network: every stage of every recipe is this loop under another configuration.

    python -m mobilellm_jax.train --config=configs/smoke.py --workdir=runs/smoke

Started again with the same workdir it goes on where it was. Ctrl-C and SIGTERM save and leave. The
workdir holds config.json, metrics.jsonl, tensorboard/ and checkpoints/.
"""

import functools
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from mobilellm_jax import cli
from mobilellm_jax.data.mixture import (
    batches,
    consumed,
)
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import flops_per_token
from mobilellm_jax.parallel.chips import peak_flops
from mobilellm_jax.parallel.sharding import put_rows
from mobilellm_jax.training import overview
from mobilellm_jax.training.checkpoint import Checkpoints, saved
from mobilellm_jax.training.metrics import MetricsWriter, step_values
from mobilellm_jax.training.progress import Progress
from mobilellm_jax.training.provenance import changes, provenance
from mobilellm_jax.training.replay import replay, report
from mobilellm_jax.training.setup import set_up
from mobilellm_jax.training.signals import Signals
from mobilellm_jax.training.start import open_start
from mobilellm_jax.training.step import TrainState, init_state
from mobilellm_jax.training.workdir import check_same_run, claim


def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    stop_at: int | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> TrainState:
    """Trains as configured, from the workdir's newest checkpoint if there is one.

    Args:
      config: see `training.config.base_config`.
      workdir: local or `gs://` directory of this run and no other.
      stop_at: step after which to save and leave, as if the run had been stopped there.
      devices: to run on; all there are if None.

    Returns:
      The last state.

    Raises:
      UserError: the configuration, the data or the workdir is not usable, or too many steps in a
        row were not finite.
      SystemExit: stopped by a signal, after saving; its status is 128 + the signal's number.
    """
    # --- What is to be trained, on what, with which programs: all checked, nothing written
    run = set_up(config, devices or jax.devices())
    with jax.set_mesh(run.mesh):
        weights = None
        if config.init_from and not saved(workdir):
            weights = open_start(config.init_from, run.model, run.tokenizer)

        # All is checked: from here on the workdir is this run's.
        workdir = claim(workdir, config)

        # --- The state: restored, or made in place
        checkpoints = Checkpoints(workdir, **config.checkpoint)
        meta = checkpoints.newest_meta()
        origin = provenance(run.devices)
        if meta is None and weights:
            params = weights.params(run.shardings.params, np.float32)
            begin = functools.partial(init_state, make_optimizer=run.make_optimizer)
            state = jax.jit(begin, out_shardings=run.shardings, donate_argnums=0)(params)
            rows, origin["init_from"] = config.first_row, weights.identity
            print(f"starting at the weights of {weights.directory} ({weights.family})")
        elif meta is None:
            state, rows = run.fresh(), config.first_row
        else:
            check_same_run(meta, config, run.plan, checkpoints.directory)
            for change in changes(meta, origin):
                print(f"resume: {change}; the result may differ in its last bits.")
            state, rows = checkpoints.restore(run.abstract, meta["step"]), int(meta["rows"])
            origin |= {key: value for key, value in meta.items() if key == "init_from"}
        start = int(state.step)

        # --- What the user sees before the first step
        print(overview.parameter_table(run.abstract.params))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(run.abstract.params))
        size = config.row_length, config.global_batch, config.steps
        print(overview.summary(run.model, parameters, *size))
        ends = config.first_row, config.first_row + config.steps * config.global_batch
        print(overview.data(run.plan, *(row * config.row_length for row in ends)))
        print(f"tokenizer: {run.tokenizer.fingerprint[:12]} of {run.tokenizer.vocab_size:,} ids")
        kind = run.devices[0].device_kind
        print(f"devices: {len(run.devices)} x {kind}, mesh {dict(run.mesh.shape)}")
        if start:
            print(f"resumed at step {start:,} of {config.steps:,} from {checkpoints.directory}")
        sys.stdout.flush()

        # --- The loop
        flops = flops_per_token(run.model, config.row_length)
        peak = peak_flops(kind)
        tokens_per_step = config.global_batch * config.row_length
        last = min(config.steps, stop_at or config.steps)
        writer = MetricsWriter(workdir, start, config.wandb)
        writer.write(
            "start",
            start,
            {"time": time.time(), "parameters": parameters, "flops_per_token": flops}
            | {"plan": run.plan.hash, "tokenizer": run.tokenizer.fingerprint, **origin},
        )
        progress = Progress(start, config.steps, config.log_every)
        described = {
            "config": config.to_dict(),
            "plan": run.plan.to_dict(),
            "plan_hash": run.plan.hash,
            **origin,
        }

        def save() -> None:
            writer.sync()
            checkpoints.save(state, {"step": step, "rows": rows, **described}, run.tokenizer)

        def record(step: int, rows: int, metrics: Any, host: dict[str, float]) -> None:
            """Fetches and writes a step's metrics; called one step late, so that the device never waits."""
            metrics = jax.device_get(metrics)
            seconds = progress.lap()
            speed = tokens_per_step / seconds
            values = step_values(metrics, run.plan.names) | host
            values |= {"rows": rows, "step_seconds": seconds, "tokens_per_second": speed}
            values |= consumed(run.mixture, rows)
            if peak:
                values["mfu"] = speed * flops / (peak * len(run.devices))
            writer.write("train", step, values)
            if not metrics["tokens"].any():
                print(f"step {step:,}: the objective counts no target of these rows.", flush=True)
            progress.show(step, values)
            if metrics["skipped_in_row"] >= config.max_skipped:
                raise UserError(
                    f"stopped at step {step}: the loss or its gradient was not finite "
                    f"{int(metrics['skipped_in_row'])} steps in a row; the weights never saw them. Lower "
                    "config.schedule.peak or look at the rows of these steps; the checkpoints in "
                    f"{checkpoints.directory} are from before."
                )

        step, pending = start, None
        part = jax.process_index(), jax.process_count()
        ahead = {key: config[key] for key in ("prefetch", "readers", "workers")}
        parts = batches(run.mixture, rows, config.global_batch, *part, **ahead)
        stream = _prefetched(parts, run.mesh)
        with Signals() as signals:
            try:
                while step < last and not signals.caught:
                    waited = time.perf_counter()
                    batch, crc = next(stream)
                    waited = time.perf_counter() - waited
                    state, metrics = run.step(state, batch)
                    step, rows = step + 1, rows + config.global_batch
                    if pending:
                        record(*pending)
                    pending = step, rows, metrics, {"data_wait_seconds": waited, "batch_crc32": crc}
                    evaluate_now = step % config.eval.every == 0 or step == config.steps
                    if evaluate_now or checkpoints.due(step):
                        record(*pending)  # before the checkpoint: after it nobody would
                        pending = None
                    if evaluate_now:
                        found = run.evaluate(state.params)
                        writer.write("heldout", step, found)
                        progress.heldout(step, found)
                        progress.lap()
                    if checkpoints.due(step):
                        save()
                if pending:
                    record(*pending)
                if step > start:
                    save()
                checkpoints.wait()
            finally:
                progress.close()
                writer.close()
                checkpoints.close()

    if step < config.steps:
        reason = signals.caught.name if signals.caught else f"--stop_at={stop_at}"
        print(
            f"stopped by {reason} at step {step:,} of {config.steps:,}; saved in {checkpoints.directory}. "
            "The same command goes on from here."
        )
        if signals.caught:
            sys.exit(128 + signals.caught)
    else:
        print(
            f"done: step {step:,}, {rows:,} rows; checkpoint in {checkpoints.directory / str(step)}"
        )
    return state


def _prefetched(
    stream: Iterator[dict[str, np.ndarray]], mesh: jax.sharding.Mesh
) -> Iterator[tuple[dict[str, jax.Array], int]]:
    """Batches on the devices, with the checksum of their tokens by which runs can be compared."""
    for batch in stream:
        yield put_rows(batch, mesh), zlib.crc32(batch["tokens"].data)


def main() -> None:
    """Runs `train` with the flags."""
    args = flags.FLAGS
    if args.replay is not None:
        print(report(replay(args.config, args.workdir, args.replay)))
    else:
        train(args.config, args.workdir, args.stop_at)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Directory of this run, local or gs://.", required=True)
    flags.DEFINE_integer("stop_at", None, "Step after which to save and leave.", lower_bound=1)
    flags.DEFINE_integer(
        "replay",
        None,
        "Train nothing: run this step again from the nearest checkpoint and rank its rows by loss and "
        "gradient.",
        lower_bound=1,
    )
    flags.mark_flag_as_required("config")
    cli.run(main)
