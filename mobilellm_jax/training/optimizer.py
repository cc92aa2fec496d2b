"""Optimizers and schedules: what `config.optimizer.use` and `config.schedule.use` may name.

An optimizer is `f(learning_rate, **settings) -> optax.GradientTransformation`. It is built anew
inside every step around that step's learning rate, so the schedule follows the step in the train
state and a skipped step keeps its place. A schedule is `f(steps, **settings) -> (step -> learning
rate)`.
"""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel.sharding import path_name

MOMENT_DTYPES = ("float32", "bfloat16")

# Which axes of a weight are the input and the output of its product, by the end of its path; the
# axis left over, L, holds independent matrices. What no line names is no matrix for Muon.
MATRICES: tuple[tuple[str, MuonDimensionNumbers], ...] = (
    (r"attention/(query|key|value)", MuonDimensionNumbers((1,), (2, 3))),  # L D N H
    (r"attention/out", MuonDimensionNumbers((1, 2), (3,))),  # L N H D
    (r"mlp/(gate|up|down)", MuonDimensionNumbers((1,), (2,))),  # L D F, L F D
)
ADAM_RMS = 0.2  # of AdamW's usual update; arXiv 2502.16982, section 2.2


def adamw(
    learning_rate: jax.typing.ArrayLike,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip: float,
    mu_dtype: str = "float32",
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) on gradients clipped to a global norm; norm scales and biases are not decayed.

    `mu_dtype` is that in which the first moment is kept between steps; it is summed in float32, and the
    second moment, whose small values decide the size of a step, is always float32.

    Raises:
      UserError: `mu_dtype` is not one of `MOMENT_DTYPES`.
    """
    dtype = _moment_dtype(mu_dtype)
    return optax.chain(_clipped(clip), _adamw(learning_rate, b1, b2, eps, weight_decay, dtype))


def muon(
    learning_rate: jax.typing.ArrayLike,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip: float,
    mu_dtype: str = "float32",
    beta: float = 0.95,
    ns_steps: int = 5,
) -> optax.GradientTransformation:
    """Muon on the matrices of the blocks, layer by layer, and `adamw` on all else.

    Nesterov momentum of decay `beta`, made nearly orthogonal by `ns_steps` Newton-Schulz iterations (K.
    Jordan et al., "Muon", 2024). Every update is scaled by 0.2 sqrt(max(inputs, outputs)), so that its
    root mean square is that of AdamW's: peak and weight decay of an AdamW run carry over (arXiv
    2502.16982, section 2.2). Embedding, head, norms and biases get AdamW with `b1`, `b2`, `eps`.

    Raises:
      UserError: `mu_dtype` is not one of `MOMENT_DTYPES`.
    """
    dtype = _moment_dtype(mu_dtype)
    orthogonal = optax.chain(
        _kept_as(
            dtype, scale_by_muon(ns_steps=ns_steps, beta=beta, weight_dimension_numbers=matrices)
        ),
        optax.stateless(_as_large_as_adam),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    rest = _adamw(learning_rate, b1, b2, eps, weight_decay, dtype)
    return optax.chain(
        _clipped(clip),
        optax.partition({"matrix": orthogonal, "rest": rest}, _labels),
    )


def _adamw(
    learning_rate: jax.typing.ArrayLike,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    dtype: jax.typing.DTypeLike,
) -> optax.GradientTransformation:
    """`optax.adamw` but for what is said of `mu_dtype` in `adamw`; its state is of the same structure."""
    return optax.chain(
        _kept_as(dtype, optax.scale_by_adam(b1, b2, eps)),
        optax.add_decayed_weights(weight_decay, decayed),
        optax.scale_by_learning_rate(learning_rate),
    )


def _kept_as(
    dtype: jax.typing.DTypeLike, transform: optax.GradientTransformation
) -> optax.GradientTransformation:
    """A transformation whose first moment is kept in a dtype between steps, and summed in float32.

    Of optax's own `mu_dtype` the decay, too, is rounded: 0.999 is 1 in bfloat16.
    """

    def kept(state: Any, dtype: jax.typing.DTypeLike) -> Any:
        return state._replace(mu=optax.tree.cast(state.mu, dtype))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = transform.update(updates, kept(state, jnp.float32), params)
        return updates, kept(state, dtype)

    return optax.GradientTransformation(lambda params: kept(transform.init(params), dtype), update)


def _clipped(clip: float) -> optax.GradientTransformation:
    if not clip > 0:
        raise UserError(
            f"config.optimizer.clip={clip:g} would make every gradient 0: it is the largest norm that one "
            "may have; 1e9 clips nothing."
        )
    return optax.clip_by_global_norm(clip)


def decayed(params: Any) -> Any:
    """True for what weight decay acts on: matrices and embedding, not norm scales and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path_name(path).endswith(("scale", "bias")), params
    )


def matrices(params: Any) -> Any:
    """The `MATRICES` entry of every parameter, None for those that Muon leaves to AdamW."""

    def of(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        for pattern, axes in MATRICES:
            if re.search(rf"(^|/){pattern}$", path_name(path)):
                return axes
        return None

    return jax.tree_util.tree_map_with_path(of, params)


def _labels(params: Any) -> Any:
    axes = matrices(params)
    return jax.tree.map(lambda _, a: "rest" if a is None else "matrix", params, axes)


def _as_large_as_adam(updates: Any, _: Any) -> Any:
    """Gives an orthogonal update of [inputs, outputs] the root mean square `ADAM_RMS`."""

    def scaled(u: jax.Array, axes: MuonDimensionNumbers) -> jax.Array:
        sides = axes.reduction_axis, axes.output_axis
        size = max(math.prod(u.shape[axis] for axis in side) for side in sides)
        return ADAM_RMS * math.sqrt(size) * u

    return jax.tree.map(scaled, updates, matrices(updates))


def _moment_dtype(name: str) -> jax.typing.DTypeLike:
    if name not in MOMENT_DTYPES:
        raise UserError(
            f"config.optimizer.mu_dtype={name!r} is not a dtype for moments: choose one of "
            f"{', '.join(MOMENT_DTYPES)}."
        )
    return jnp.dtype(name)


def warmup_cosine(steps: int, peak: float, warmup_steps: int, floor: float) -> optax.Schedule:
    """From 0 linearly to `peak` at `warmup_steps`, then half a cosine to `floor * peak` at `steps`."""
    _check_warmup(warmup_steps, steps, peak)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, steps, floor * peak)


def warmup_linear(steps: int, peak: float, warmup_steps: int, floor: float) -> optax.Schedule:
    """From 0 linearly to `peak` at `warmup_steps`, then linearly to `floor * peak` at `steps`."""
    _check_warmup(warmup_steps, steps, peak)
    up = optax.linear_schedule(0.0, peak, warmup_steps)
    down = optax.linear_schedule(peak, floor * peak, steps - warmup_steps)
    return optax.join_schedules([up, down], [warmup_steps])


# Shares of the way from floor to peak, by the share `p` of the decay that is past.
DECAYS = {
    "linear": lambda p: 1 - p,
    "cosine": lambda p: (1 + jnp.cos(jnp.pi * p)) / 2,
    "1-sqrt": lambda p: 1 - jnp.sqrt(p),
}


def warmup_stable_decay(
    steps: int,
    peak: float,
    warmup_steps: int,
    floor: float,
    decay_steps: int | None = None,
    decay: str = "1-sqrt",
) -> optax.Schedule:
    """From 0 linearly to `peak`, level, then over the last `decay_steps` to `floor * peak` at `steps`.

    Args:
      steps: of the run.
      peak: learning rate of the level part.
      warmup_steps: of the rise.
      floor: share of the peak that is left at the end.
      decay_steps: of the fall; None: a fifth of `steps`; 0: it stays level to the end.
      decay: shape of the fall, of `DECAYS`. The schedule is MiniCPM's (arXiv 2404.06395); `1-sqrt`
        over 10 to 20 % of a run did best in arXiv 2405.18392.

    Raises:
      UserError: rise and fall do not fit into the run, or there is no such shape.
    """
    _check_warmup(warmup_steps, steps, peak)
    fall = steps // 5 if decay_steps is None else decay_steps
    if not 0 <= fall <= steps - warmup_steps:
        raise UserError(
            f"config.schedule.decay_steps={fall} does not fit behind warmup_steps={warmup_steps} into "
            f"the {steps} steps of the run: lower one of them."
        )
    if decay not in DECAYS:
        raise UserError(
            f"config.schedule.decay={decay!r} is no shape of a decay: choose one of {', '.join(DECAYS)}."
        )

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        up = jnp.minimum(step / warmup_steps, 1.0) if warmup_steps else 1.0
        past = jnp.clip((step - (steps - fall)) / max(fall, 1), 0.0, 1.0)
        return peak * jnp.where(past > 0, floor + (1 - floor) * DECAYS[decay](past), up)

    return schedule


def _check_warmup(warmup_steps: int, steps: int, peak: float) -> None:
    if not peak >= 0:
        raise UserError(
            f"config.schedule.peak={peak:g} is negative: it is the highest learning rate."
        )
    if not 0 <= warmup_steps < steps:
        raise UserError(
            f"config.schedule.warmup_steps={warmup_steps} does not lie within the {steps} steps of the "
            "run: lower it."
        )
