"""Optimizers and schedules: what `config.optimizer.use` and `config.schedule.use` may name.

An optimizer is `f(learning_rate, **settings) -> optax.GradientTransformation`. It is built anew
inside every step around that step's learning rate, so the schedule follows the step in the train
state and a skipped step keeps its place. A schedule is `f(steps, **settings) -> (step -> learning
rate)`.
"""

from typing import Any

import jax
import optax

from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel.sharding import path_name


def adamw(
    learning_rate: jax.typing.ArrayLike,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip: float,
) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) on gradients clipped to a global norm; norm scales are not decayed."""
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=decayed),
    )


def decayed(params: Any) -> Any:
    """True for what weight decay acts on: matrices and embedding, not norm scales."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path_name(path).endswith("scale"), params
    )


def warmup_cosine(steps: int, peak: float, warmup_steps: int, floor: float) -> optax.Schedule:
    """From 0 linearly to `peak` at `warmup_steps`, then half a cosine to `floor * peak` at `steps`."""
    _check_warmup(warmup_steps, steps)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, steps, floor * peak)


def warmup_linear(steps: int, peak: float, warmup_steps: int, floor: float) -> optax.Schedule:
    """From 0 linearly to `peak` at `warmup_steps`, then linearly to `floor * peak` at `steps`."""
    _check_warmup(warmup_steps, steps)
    up = optax.linear_schedule(0.0, peak, warmup_steps)
    down = optax.linear_schedule(peak, floor * peak, steps - warmup_steps)
    return optax.join_schedules([up, down], [warmup_steps])


def _check_warmup(warmup_steps: int, steps: int) -> None:
    if not 0 <= warmup_steps < steps:
        raise UserError(
            f"config.schedule.warmup_steps={warmup_steps} does not lie within config.steps={steps}: "
            "lower it."
        )
