"""The train state and the step: pure functions from pytree to pytree."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mobilellm_jax.data.packing import token_ids
from mobilellm_jax.pruning.groups import Groups, masked
from mobilellm_jax.pruning.scores import attached, read
from mobilellm_jax.pruning.scores import taps as taps_of
from mobilellm_jax.training.objectives import Batch, Losses, Network
from mobilellm_jax.training.outliers import Window, init_window, judge

Objective = Callable[..., Losses]  # of parameters, batch, network[, teacher]
MakeOptimizer = Callable[[Any], optax.GradientTransformation]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pruning:
    """What a run that prunes keeps beside its weights."""

    live: Groups  # bool
    scores: Groups  # float32, added up since the last cut
    memory: Any  # of the strategy: float32 by name, or None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes. The rows consumed are a host integer beside it: they pass 2**31."""

    step: jax.Array  # int32: steps done, skipped ones included
    params: Any  # float32
    opt_state: Any  # as the optimizer made it
    skipped: jax.Array  # int32: non-finite steps so far
    skipped_in_row: jax.Array  # int32: those since the last finite step
    window: Window | None = None  # None: no step is compared with those before
    pruning: Pruning | None = None  # None: nothing is pruned


def init_state(
    params: Any, make_optimizer: MakeOptimizer, window: int = 0, pruning: Pruning | None = None
) -> TrainState:
    """Step 0 of a run that starts at `params` and compares its steps with the `window` before."""
    zero = jnp.zeros((), jnp.int32)
    opt_state = make_optimizer(0.0).init(params)
    return TrainState(zero, params, opt_state, zero, zero, init_window(window), pruning)


def sums(
    losses: Losses, batch: Batch, piece_bytes_V: jax.Array, sources: int
) -> dict[str, jax.Array]:
    """What metrics are made of, added up over a batch, per source: float32 [sources] each.

    Keys: `nll` (nats), `tokens` (targets that count), `bytes` (of text those targets stand for),
    `rows`.
    """
    member = jax.nn.one_hot(batch["source"], sources)  # [B, sources]
    per_row = row_sums(losses, batch["tokens"], piece_bytes_V)
    return {name: value @ member for name, value in per_row.items()}


def row_sums(losses: Losses, tokens: jax.Array, piece_bytes_V: jax.Array) -> dict[str, jax.Array]:
    """The same of each row of int [B, T + 1] tokens: float32 [B] each."""
    targets_BT = token_ids(tokens[:, 1:])
    return {
        "nll": (losses.nll_BT * losses.weight_BT).sum(1),
        "tokens": losses.weight_BT.sum(1),
        "bytes": (piece_bytes_V[targets_BT] * losses.weight_BT).sum(1),
        "rows": jnp.ones(targets_BT.shape[0]),
    }


def train_step(
    state: TrainState,
    batch: Batch,
    piece_bytes_V: jax.Array,
    *,
    network: Network,
    objective: Objective,
    make_optimizer: MakeOptimizer,
    schedule: optax.Schedule,
    sources: int,
    microbatches: int = 1,
    deviations: float = 0.0,
    scored: str = "",
) -> tuple[TrainState, dict[str, Any]]:
    """One optimizer step.

    A step whose loss or gradient is not finite changes neither weights nor moments; it is counted, and it
    keeps its place in the schedule and in the data. What an optimizer makes of finite gradients is looked at
    before it is saved (`all_finite`). A step that stands out of the state's window
    (see `training.outliers`) is treated alike and counted apart.

    Args:
      state: donated by the caller.
      batch: `tokens` int32 [B, T + 1], `source` int32 [B]; B a multiple of `microbatches`.
      piece_bytes_V: bytes of text each token stands for.
      network: what the objective runs.
      objective: see `training.objectives`.
      make_optimizer: see `training.optimizer`.
      schedule: learning rate by step.
      sources: number of sources.
      microbatches: parts of the batch computed one after another; gradients are added in float32.
      deviations: from which on a step stands out.
      scored: kind of the scores of groups that are added up, where the state is one that is pruned; of
        `pruning.scores.KINDS`. A score is that of each microbatch's mean loss per target.

    Returns:
      The next state, and metrics: scalars `loss` (per counted target), `gradient_norm`,
      `learning_rate`, `skipped`, `skipped_in_row`, with a window `outliers`, and the per-source
      sums of `sums`.
    """
    pruning, model = state.pruning, network.model
    taps = taps_of(model, scored) if pruning else {}

    def loss_sum(given: Any, part: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        params, taps = given
        losses = objective(attached(params, taps) if taps else params, part, network)
        return losses.total, {"loss": losses.total, **sums(losses, part, piece_bytes_V, sources)}

    def gradient(params: Any, part: Batch) -> Any:
        (grads, of_taps), totals = jax.grad(loss_sum, has_aux=True)((params, taps), part)
        return (grads, read(of_taps, model, scored) if taps else None), totals

    if microbatches == 1:
        (grads, worth), totals = gradient(state.params, batch)
    else:
        # Part j takes rows j, j + k, j + 2k ...: rows stay on the device that holds them.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch
        )

        def add(carry: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, gradient(state.params, part)), None

        shapes = jax.eval_shape(gradient, state.params, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        ((grads, worth), totals), _ = jax.lax.scan(add, zeros, parts)

    # A batch without any target has loss 0 and gradient 0.
    targets = jnp.maximum(totals["tokens"].sum(), 1.0)
    grads = jax.tree.map(lambda g: g / targets, grads)
    loss = totals.pop("loss") / targets
    if pruning:
        # A query head that is dead in a KV head that lives has a gradient (`pruning.compaction`).
        grads = masked(grads, pruning.live)
        scale = targets**2 if scored == "fisher" else targets
        added = jax.tree.map(lambda s, w: s + w / scale, pruning.scores, worth)
    norm = optax.tree.norm(grads)
    learning_rate = jnp.asarray(schedule(state.step), jnp.float32)
    with jax.named_scope("optimizer"):
        optimizer = make_optimizer(learning_rate)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    # Not of the updates, too: all of them would have to exist before one weight could be written.
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)

    taken, window = finite, state.window
    if window is not None:
        outlier, window = judge(window, loss, norm, finite, deviations)
        taken = finite & ~outlier

    def keep(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(taken, n, o), new, old)

    bad = (~finite).astype(jnp.int32)
    new = TrainState(
        step=state.step + 1,
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        skipped=state.skipped + bad,
        skipped_in_row=(state.skipped_in_row + bad) * bad,
        window=window,
        pruning=dataclasses.replace(pruning, scores=keep(added, pruning.scores))
        if pruning
        else None,
    )
    metrics = {
        "loss": loss,
        "gradient_norm": norm,
        "learning_rate": learning_rate,
        "skipped": new.skipped,
        "skipped_in_row": new.skipped_in_row,
        **({"outliers": window.skipped} if window is not None else {}),
        **totals,
    }
    return new, metrics


@jax.jit
def all_finite(state: TrainState) -> jax.Array:
    """Whether all weights and moments are finite."""
    leaves = jax.tree.leaves((state.params, state.opt_state))
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
