r"""Trains a network: every stage of every recipe is this loop under another configuration.

    python -m mobilellm_jax.train --config=configs/smoke.py --workdir=runs/smoke

Started again with the same workdir it goes on where it was. Ctrl-C and SIGTERM save and leave. The
workdir holds config.json, metrics.jsonl, tensorboard/ and checkpoints/. Several processes run the
same command (launch/README.md).
"""

import contextlib
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from mobilellm_jax import cli
from mobilellm_jax.data.mixture import consumed
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation import while_training
from mobilellm_jax.parallel import distributed
from mobilellm_jax.parallel.chips import peak_flops
from mobilellm_jax.parallel.compiled import keep_compiled
from mobilellm_jax.parallel.sharding import put_rows
from mobilellm_jax.training import overview
from mobilellm_jax.training.checkpoint import FOLDER, saved_steps
from mobilellm_jax.training.goodput import Goodput, program_start
from mobilellm_jax.training.length import stream
from mobilellm_jax.training.metrics import MetricsWriter, NoMetrics, step_values
from mobilellm_jax.training.profile import Profiler
from mobilellm_jax.training.progress import Progress
from mobilellm_jax.training.provenance import changes, provenance
from mobilellm_jax.training.replay import replay, report
from mobilellm_jax.training.saving import Checkpoints
from mobilellm_jax.training.setup import Setup, set_up
from mobilellm_jax.training.signals import Signals, Stopped
from mobilellm_jax.training.start import begin, open_start
from mobilellm_jax.training.step import TrainState, all_finite
from mobilellm_jax.training.workdir import check_same_run, claimed


def train(
    config: ConfigDict,
    workdir: epath.PathLike,
    stop_at: int | None = None,
    devices: Sequence[jax.Device] | None = None,
    began: float | None = None,
) -> TrainState:
    """Trains as configured, from the workdir's newest checkpoint if there is one.

    Args:
      config: see `training.config.base_config`.
      workdir: local or `gs://` directory of this run and no other.
      stop_at: step after which to save and leave, as if the run had been stopped there.
      devices: to run on; all there are if None.
      began: time.time() of the program's start, from which goodput counts; now if None.

    Returns:
      The last state.

    Raises:
      UserError: the configuration, the data or the workdir is not usable, the processes are not
        about to do the same, too many steps in a row were not finite, or the last checkpoint could
        not be written.
      SystemExit: stopped by a signal, after saving; its status is 128 + the signal's number.
    """
    # --- What is to be trained, on what, with which programs: all checked, nothing written
    began, leads = began or time.time(), distributed.leads()
    run = set_up(config, devices or jax.devices())
    origin = provenance(run.devices)
    judge, checked = _judge(config, run), run
    with jax.set_mesh(run.mesh), contextlib.ExitStack() as held:
        steps_saved = saved_steps(epath.Path(workdir) / FOLDER)
        distributed.check_same(
            {"config": config.to_dict(), "plan": run.plan.hash, "workdir": str(workdir)}
            | {"stop_at": stop_at, "steps saved": steps_saved}
            | {key: origin[key] for key in ("commit", "packages")}
        )
        source = None
        if config.init_from and not steps_saved:
            source, run = open_start(config, run)

        # All is checked: from here on the workdir is this run's.
        workdir = held.enter_context(claimed(workdir, config))

        # --- The state: restored, or made in place
        clock = Goodput(workdir, began, writes=leads)
        always = run.pruner.schedule.compactions if run.pruner else ()
        checkpoints = Checkpoints(workdir, **config.checkpoint, always=always)
        clock.lap("start")
        beginning = run

        def expected(meta: Mapping[str, Any]) -> TrainState:
            check_same_run(meta, config, run.plan, checkpoints.directory)
            return beginning.at(meta).abstract

        resumed, unmeasured = checkpoints.resume(expected), []
        if resumed is None and source:
            state, origin["init_from"] = begin(source, config, run), source.identity
            taken = "the weights" if config.init_state == "weights" else "weights, moments and step"
            print(f"starting at {taken} of {source.directory} ({source.family})")
        elif resumed is None:
            state = run.fresh()
        else:
            state, meta = resumed
            run, unmeasured = beginning.at(meta), meta.get("unmeasured", [])
            for change in changes(meta, origin):
                print(f"resume: {change}; the result may differ in its last bits.")
            origin |= {key: value for key, value in meta.items() if key == "init_from"}
        if run is not checked:
            judge = _judge(config, run)  # the network has become smaller
        length, start = run.length, int(state.step)
        rows = length.rows(start)
        clock.lap("restore" if resumed else "start")

        # --- What the user sees before the first step
        print(overview.parameter_table(run.abstract.params))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(run.abstract.params))
        flops = run.flops_per_token(config.row_length)
        print(overview.summary(run.model, flops, parameters, length))
        ends = (length.rows(step) * config.row_length for step in (0, length.steps))
        print(overview.data(run.plan, *ends))
        print(f"tokenizer: {run.tokenizer.fingerprint[:12]} of {run.tokenizer.vocab_size:,} ids")
        kind = run.devices[0].device_kind
        kernel = run.network.execution.attention
        print(
            f"devices: {len(run.devices)} x {kind}, mesh {dict(run.mesh.shape)}, attention {kernel}"
        )
        if jax.process_count() > 1:
            print(f"processes: {jax.process_count()}, each with its part of every batch")
        if start:
            place = source.directory if source else checkpoints.directory
            print(f"resumed at step {start:,} of {length.steps:,} from {place}")
        sys.stdout.flush()

        # --- The loop
        peak = peak_flops(kind)
        last = min(length.steps, stop_at or length.steps)
        writer = MetricsWriter(workdir, start, config.wandb) if leads else NoMetrics()
        writer.write(
            "start",
            start,
            {"time": time.time(), "parameters": parameters, "flops_per_token": flops}
            | {"steps": length.steps}
            | {"plan": run.plan.hash, "tokenizer": run.tokenizer.fingerprint, **origin},
        )
        if run.evaluate_teacher and resumed is None:
            theirs = run.evaluate_teacher()
            writer.write("teacher", start, theirs)
            print(overview.teacher(theirs, run.evaluate(state.params)), flush=True)
        progress = Progress(start, length, config.log_every, shown=leads)
        profiler = Profiler(config.profile, workdir)
        described = {
            "config": config.to_dict(),
            "plan": run.plan.to_dict(),
            "plan_hash": run.plan.hash,
            **origin,
        }

        def check_finite() -> None:
            """What is not finite in spite of finite gradients is neither measured nor saved."""
            if not all_finite(state):
                raise UserError(
                    f"stopped at step {step}: weights or moments are not finite, though the loss and the "
                    "gradient of every step that changed them were: config.optimizer made them so (its eps, "
                    f"its learning rate). The checkpoints in {checkpoints.directory} are from before."
                )

        def save(how: Callable[..., None]) -> None:
            clock.record(step)
            writer.write("goodput", step, clock.values())
            writer.sync()
            meta = {"step": step, "rows": rows, "unmeasured": unmeasured}
            meta |= {**described, **run.describe()}
            how(state, meta, run.tokenizer)
            clock.lap("save")

        def measures() -> dict[str, tuple[int, Callable[..., Any], Callable[..., None]]]:
            """What the network as it is, is measured by: every so many steps, how, and where it is shown."""
            found = {"heldout": (config.eval.every, run.evaluate, progress.heldout)}
            if judge:
                found["tasks"] = (config.eval.tasks_every, judge, progress.tasks)
            return found

        def measure(kinds: Sequence[str]) -> list[str]:
            """Measures and records; what a signal has broken off is left to the next start."""
            left = [kind for kind in kinds if kind in measures()]
            while left:
                _, measured, shown = measures()[left[0]]
                try:
                    found = measured(state.params, signals.check)
                except Stopped:
                    break
                writer.write(left[0], step, found)
                shown(step, found)
                left.pop(0)
            if kinds:
                progress.lap()
                clock.lap("evaluate")
            return left

        def record(step: int, rows: int, metrics: Any, host: dict[str, float], ran: Setup) -> None:
            """Fetches and writes a step's metrics; called one step late, so that the device never waits."""
            metrics = jax.device_get(metrics)
            clock.stepped(step)
            seconds = progress.lap()
            speed = length.batch(step) * config.row_length / seconds
            values = step_values(metrics, run.plan.names) | host
            values |= {"rows": rows, "step_seconds": seconds, "tokens_per_second": speed}
            values["failed_saves"] = checkpoints.failed
            values |= consumed(run.mixture, rows)
            if peak:
                flops = ran.flops_per_token(config.row_length)
                values["mfu"] = speed * flops / (peak * len(run.devices))
            writer.write("train", step, values)
            if not metrics["tokens"].any():
                print(f"step {step:,}: the objective counts no target of these rows.", flush=True)
            progress.show(step, values)
            if metrics["skipped_in_row"] >= config.max_skipped:
                check_finite()
                raise UserError(
                    f"stopped at step {step}: the loss or its gradient was not finite "
                    f"{int(metrics['skipped_in_row'])} steps in a row; the weights never saw them. Lower "
                    "config.schedule.peak or look at the rows of these steps; the checkpoints in "
                    f"{checkpoints.directory} are from before."
                )

        step, pending = start, None
        compiled: set[int] = set()  # sizes of steps, of the network as it is
        part = jax.process_index(), jax.process_count()
        ahead = {key: config[key] for key in ("prefetch", "readers", "workers")}
        batches = _prefetched(stream(run.mixture, length, start, *part, **ahead), run.mesh)
        with Signals() as signals:
            try:
                unmeasured = measure(unmeasured)
                while step < last and not signals.stop():
                    waited = time.perf_counter()
                    batch, crc = next(batches)
                    waited = time.perf_counter() - waited
                    if step > start and not (pending and not pending[2]["loss"].is_ready()):
                        clock.lap("data")  # the devices were waiting for it
                    state, metrics = profiler.call(step + 1, run.step, state, batch)
                    if (size := length.batch(step + 1)) not in compiled:
                        clock.lap("compile")
                        compiled.add(size)
                    step, rows = step + 1, length.rows(step + 1)
                    if pending:
                        record(*pending)
                    ran = run
                    run, state, cut = run.pruned(step, state, batch)
                    if cut:
                        writer.write("cut", step, cut)
                        progress.cut(step, cut)
                        if run is not ran:
                            judge, compiled = _judge(config, run), set()
                            facts = overview.compaction(run.model, cut["parameters"])
                            writer.write("compaction", step, facts)
                            progress.compaction(step, facts)
                    host = {"data_wait_seconds": waited, "batch_crc32": crc}
                    pending = step, rows, metrics, host, ran
                    due = [
                        kind
                        for kind, (every, *_) in measures().items()
                        if step % every == 0 or step == length.steps
                    ]
                    save_now = checkpoints.due(step)
                    if due or save_now:
                        record(*pending)  # before the checkpoint: after it nobody would
                        pending = None
                        check_finite()
                    unmeasured = measure(due)
                    if save_now and step < last:
                        save(checkpoints.save)
                if pending:
                    record(*pending)
                if step > start:
                    check_finite()
                    save(checkpoints.save_last)
                clock.record(step)
            finally:
                profiler.close()
                progress.close()
                writer.close()
                checkpoints.close()

    print(clock.summary())
    if step < length.steps or unmeasured:
        reason = signals.caught.name if signals.caught else f"--stop_at={stop_at}"
        print(
            f"stopped by {reason} at step {step:,} of {length.steps:,}; saved in {checkpoints.directory}. "
            "The same command goes on from here."
        )
        if signals.caught:
            sys.exit(128 + signals.caught)
    else:
        print(
            f"done: step {step:,}, {rows:,} rows; checkpoint in {checkpoints.directory / str(step)}"
        )
    return state


def _judge(config: ConfigDict, run: Setup) -> Callable[..., dict[str, float]] | None:
    """What measures a run's weights on tasks, as `Setup.evaluate` does on rows; None: there are none."""
    return while_training.judge(
        config.eval, run.model, run.tokenizer, config.execution.dtype, run.mesh
    )


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
        return
    began = program_start()
    with distributed.joined(args.distributed, args.distributed_timeout):
        keep_compiled()
        train(args.config, args.workdir, args.stop_at, began=began)


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
    flags.DEFINE_enum(
        "distributed",
        "auto",
        ["auto", "on", "off"],
        "Whether this is one of several processes: `auto` looks for JAX_COORDINATOR_ADDRESS, "
        "JAX_NUM_PROCESSES and JAX_PROCESS_ID, Slurm, Open MPI and Kubernetes; `on` lets JAX find "
        "out, as on a TPU pod.",
    )
    flags.DEFINE_integer(
        "distributed_timeout",
        distributed.TIMEOUT,
        "Seconds in which all processes must have come.",
        lower_bound=1,
    )
    flags.mark_flag_as_required("config")
    cli.run(main)
