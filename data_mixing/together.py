"""Many small training runs, several of them as one program: an axis of runs before the pure step.

The runs differ in their plan and in the seed of their weights alone. Each sees the rows, and comes to
the weights, of `mobilellm_jax.train` with that plan and seed (to rounding). A group of them is
`jax.vmap` of the step of training; its members are spread over the devices, each whole on one of them.
Groups follow one another. Whether a device gains from groups is a matter of measuring
(`python -m benchmarks.together`); with one member a device it is the plain loop. Two CPU cores do not
gain: groups of 2 to 8 are as fast as that loop or up to a third slower (0.2M and 1M parameters).

While they train, the loss of given rows is measured and kept as a sum per row, so that runs can be
compared row by row. What is kept, and where, says `runs.py`.

Axes in names: R runs of a group.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import NamedSharding
from ml_collections import ConfigDict
from tqdm import tqdm

from data_mixing.runs import (
    UNFINISHED,
    Measured,
    Member,
    Runs,
    load_arrays,
    save_arrays,
    set_up,
)
from mobilellm_jax.data.mixture import Mixture
from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel.sharding import ROWS, WHOLE, on_each_device, put_rows
from mobilellm_jax.training.length import Length, stream
from mobilellm_jax.training.objectives import Batch, Network, next_token
from mobilellm_jax.training.provenance import changes, provenance
from mobilellm_jax.training.saving import Checkpoints
from mobilellm_jax.training.signals import Signals
from mobilellm_jax.training.step import TrainState

_AHEAD = 2  # batches of each member that are read ahead


@on_each_device(in_specs=(ROWS,), out_specs=ROWS)
def begin_all(keys_R: jax.Array, *, begin: Callable[..., TrainState]) -> TrainState:
    """The states of step 0 of all members, from the keys of their weights; `begin` is that of one."""
    return jax.vmap(begin)(keys_R)


@on_each_device(in_specs=(ROWS, ROWS, WHOLE), out_specs=(ROWS, ROWS), donate=(0,))
def advance_all(
    state: TrainState, batch: Batch, piece_bytes_V: jax.Array, *, advance: Callable[..., Any]
) -> tuple[TrainState, dict[str, jax.Array]]:
    """A step of all members, on batches [R, B, ...]; `advance` is that of one."""
    return jax.vmap(advance, in_axes=(0, 0, None))(state, batch, piece_bytes_V)


@on_each_device(in_specs=(ROWS, WHOLE), out_specs=ROWS)
def _row_nll(params: Any, tokens: jax.Array, *, network: Network) -> jax.Array:
    """The summed loss of each of the same rows, for every member: [R, rows]."""

    def of_one(params: Any) -> jax.Array:
        losses = next_token(params, {"tokens": tokens}, network)
        return (losses.nll_BT * losses.weight_BT).sum(1)

    return jax.vmap(of_one)(params)


def train_together(
    config: ConfigDict,
    members: Sequence[Member],
    probes: Mapping[str, np.ndarray],
    workdir: epath.PathLike,
    *,
    measure_every: int,
    group: int = 0,
    keep: int = 0,
    devices: Sequence[jax.Device] | None = None,
) -> dict[str, Measured]:
    """Trains the members that are not complete.

    Args:
      config: of every member (`training.config.base_config`), but for its plan and seed. It starts at
        random weights; `config.eval` and `config.mesh` have no effect.
      members: of one tokenizer.
      probes: rows to measure, int32 [N, T + 1], by name; it is the next token's loss, whatever the
        objective.
      workdir: local folder of these runs.
      measure_every: steps between measurements; also at the end.
      group: members that train as one program, over all devices; 0: one a device.
      keep: checkpoints that are kept of each member, at evenly spaced steps, the last one the end.
      devices: to run on; all of this process if None.

    Returns:
      What was measured, by member.

    Raises:
      UserError: bad input, the folder is of other runs, or a run diverged (see `config.max_skipped`).
      SystemExit: stopped by a signal, after saving; its status is 128 + the signal's number.
    """
    devices = devices or jax.local_devices()
    runs = set_up(config, members, probes, workdir, measure_every, group, keep, devices)
    left = [n for n, part in enumerate(runs.groups) if not all(map(runs.complete, part))]
    complete = len(members) - sum(len(runs.groups[n]) for n in left)
    print(
        f"{len(members)} runs of {runs.length.steps:,} steps and {runs.length.tokens:,} tokens, "
        f"{len(runs.groups[0])} at once on {len(devices)} device(s); {complete} are complete, in "
        f"{runs.workdir}",
        flush=True,
    )
    progress = _Progress(runs, complete)
    with Signals() as signals:
        try:
            for number in left:
                _train_group(runs, number, progress, signals)
                if signals.caught:
                    break
        finally:
            progress.close()
    if not all(map(runs.complete, members)):
        assert signals.caught
        print(f"stopped by {signals.caught.name}. The same command goes on from here.", flush=True)
        sys.exit(128 + signals.caught)
    (runs.workdir / UNFINISHED).rmtree(missing_ok=True)
    return {member.name: Measured.load(runs.result(member)) for member in members}


def _train_group(runs: Runs, number: int, progress: "_Progress", signals: Signals) -> None:
    """Trains one group to its end, or until a signal comes, and keeps what it measured."""
    folder, members = runs.workdir / UNFINISHED / str(number), runs.groups[number]
    length, mesh = runs.length, runs.mesh
    # Devices without a member of their own repeat the last one.
    filled = [*members, *[members[-1]] * (-len(members) % mesh.size)]
    place, whole = NamedSharding(mesh, ROWS), NamedSharding(mesh, WHOLE)
    keys_R = jax.device_put(jnp.stack([jax.random.key(member.seed) for member in filled]), place)
    static: dict[str, Any] = {"begin": runs.made.begin, "mesh": mesh}
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(lambda keys_R: begin_all(keys_R, **static), keys_R),
    )
    origin = provenance(mesh.devices.flatten().tolist())
    checkpoints = Checkpoints(
        folder, runs.config.checkpoint.every, runs.config.checkpoint.keep, keep_every=0
    )
    resumed = checkpoints.resume(lambda meta: abstract)
    if resumed is None:
        state, step = begin_all(keys_R, **static), 0
    else:
        state, step = resumed[0], int(resumed[1]["step"])
        for change in changes(resumed[1], origin):
            print(f"resume: {change}; the result may differ in its last bits.")
    progress.begin(number, step)

    def save(how: Callable[..., None]) -> None:
        meta = {"step": step, "rows": length.rows(step), "config": runs.config.to_dict(), **origin}
        how(state, meta, runs.tokenizer)

    measure = _measurement(runs)
    piece_bytes_V = jax.device_put(runs.tokenizer.piece_bytes(), whole)
    batches = stacked([runs.mixtures[m.name] for m in filled], length, step, runs.config.readers)
    pending = None
    try:
        while step < length.steps and not signals.caught:
            batch = put_rows(next(batches), mesh)
            state, metrics = advance_all(
                state, batch, piece_bytes_V, advance=runs.made.advance, mesh=mesh
            )
            step += 1
            if pending:  # one step late, so that the device never waits
                _check_finite(runs, members, *pending)
            pending = step, metrics
            if runs.measures(step):
                save_arrays(folder / "measured" / f"{step}.npz", measure(state.params))
            progress.step(step, metrics)
            if step in runs.kept_steps:
                params = jax.device_get(state.params)
                for i, member in enumerate(members):
                    runs.keep_weights(i, member, step, params, origin)
            if checkpoints.due(step) and step < length.steps:
                save(checkpoints.save)
        if pending:
            _check_finite(runs, members, *pending)
        if step < length.steps:
            save(checkpoints.save_last)
    finally:
        checkpoints.close()
    if step == length.steps:
        _finish(runs, members, folder)


def stacked(
    mixtures: Sequence[Mixture], length: Length, step: int, readers: int
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of all members after a step, [R, B, ...], each member's read ahead by threads."""
    ahead = {"prefetch": _AHEAD, "readers": readers, "workers": 0}
    streams = [stream(mixture, length, step, 0, 1, **ahead) for mixture in mixtures]
    for parts in zip(*streams, strict=True):
        yield {key: np.stack([part[key] for part in parts]) for key in parts[0]}


def _measurement(runs: Runs) -> Callable[[Any], dict[str, np.ndarray]]:
    """The function that measures the losses of all rows: float32 [R, N] by name."""
    size = runs.config.global_batch // runs.config.microbatches
    whole = NamedSharding(runs.mesh, WHOLE)
    batches: dict[str, list[jax.Array]] = {}
    for name, rows in runs.probes.items():
        # Filled up with rows of BOS, which hold no target.
        filling = ((0, -len(rows) % size), (0, 0))
        filled = np.pad(rows, filling, constant_values=runs.tokenizer.bos_id)
        batches[name] = [jax.device_put(b, whole) for b in np.split(filled, len(filled) // size)]

    def measure(params: Any) -> dict[str, np.ndarray]:
        static: dict[str, Any] = {"network": runs.made.network, "mesh": runs.mesh}
        found = {}
        for name, parts in batches.items():
            nll = [np.asarray(_row_nll(params, part, **static)) for part in parts]
            found[name] = np.concatenate(nll, axis=1)[:, : len(runs.probes[name])]
        return found

    return measure


def _check_finite(
    runs: Runs, members: Sequence[Member], step: int, metrics: Mapping[str, jax.Array]
) -> None:
    skipped_R = np.asarray(metrics["skipped_in_row"])[: len(members)]
    worst = int(skipped_R.argmax())
    if skipped_R[worst] >= runs.config.max_skipped:
        raise UserError(
            f"stopped at step {step}: the loss or the gradient of {members[worst].name} was not finite "
            f"{skipped_R[worst]} steps in a row: lower config.schedule.peak and begin anew in another "
            "folder."
        )


def _finish(runs: Runs, members: Sequence[Member], folder: epath.Path) -> None:
    """Turns what a group measured into what each member did, and clears the rest away."""
    steps = sorted(int(path.stem) for path in (folder / "measured").glob("*.npz"))
    found = [load_arrays(folder / "measured" / f"{step}.npz") for step in steps]
    for i, member in enumerate(members):
        nll_MN = {name: np.stack([at[name][i] for at in found]) for name in runs.probes}
        Measured(np.array(steps), nll_MN, runs.targets).save(runs.result(member))
    folder.rmtree()


class _Progress:
    """Tokens of all runs, on standard error: a bar with ETA, or where there is no terminal lines."""

    def __init__(self, runs: Runs, complete: int) -> None:
        """Starts to count time, with some members complete."""
        self._runs, self._number, self._began = runs, 0, time.perf_counter()
        tokens = runs.length.tokens
        self._total, self._done = len(runs.members) * tokens, complete * tokens
        self._first = self._done  # nothing before it was done in this time
        self._bar = tqdm(
            total=self._total,
            initial=self._done,
            unit="tok",
            unit_scale=True,
            desc="runs",
            disable=None,
            dynamic_ncols=True,
        )

    def begin(self, number: int, step: int) -> None:
        """A group goes on after a step."""
        self._number = number
        before = self._tokens(0, step)
        self._first += before
        self._add(before)

    def step(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """A step of the group is under way; where losses are measured, it is done."""
        self._add(self._tokens(step - 1, step))
        if not self._runs.measures(step):
            return
        loss = float(np.mean(np.asarray(metrics["loss"])))
        groups, steps = len(self._runs.groups), self._runs.length.steps
        said = f"group {self._number + 1}/{groups}, step {step:,}/{steps:,}, loss {loss:.3f}"
        if not self._bar.disable:
            self._bar.set_postfix_str(said)
            return
        speed = (self._done - self._first) / (time.perf_counter() - self._began)
        left = int((self._total - self._done) / speed)
        eta = f"{left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d}"
        print(f"{said}  {speed / 1e3:,.1f}k tokens/s  ETA {eta}", file=sys.stderr, flush=True)

    def _tokens(self, first: int, last: int) -> int:
        length = self._runs.length
        members = len(self._runs.groups[self._number])
        return members * (length.rows(last) - length.rows(first)) * length.row_length

    def _add(self, tokens: int) -> None:
        self._done += tokens
        self._bar.update(tokens)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()
