"""Steps that stand out: a loss or a gradient norm far above those of the steps before.

The idea is OLMo-core's (its optimizers that skip steps); here the measure is a median and the
median distance from it, which the outliers in the window hardly move. All is on the device, inside
the compiled step.
"""

import dataclasses

import jax
import jax.numpy as jnp

NORMAL = 1.4826  # standard deviations of a normal distribution per median distance
AT_LEAST = 0.01  # of the median: below such a spread nothing stands out


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """Loss and gradient norm of the last W finite steps."""

    values_2W: jax.Array  # float32; a ring
    seen: jax.Array  # int32: finite steps so far
    skipped: jax.Array  # int32: outliers so far


def init_window(size: int) -> Window | None:
    """A window in which nothing has been seen; None for the size 0, which skips no step."""
    if not size:
        return None
    zero = jnp.zeros((), jnp.int32)
    return Window(jnp.zeros((2, size), jnp.float32), zero, zero)


def judge(
    window: Window, loss: jax.Array, gradient_norm: jax.Array, finite: jax.Array, deviations: float
) -> tuple[jax.Array, Window]:
    """Whether a step stands out of the window, and the window with that step in it.

    Nothing stands out until the window is full. What stands out enters the window as well: if the
    level has risen for good, it is the level after half a window.

    Args:
      window: of the steps before.
      loss: float32 scalar.
      gradient_norm: float32 scalar.
      finite: bool scalar; a step that is not finite is no outlier and leaves the window alone.
      deviations: robust standard deviations above the median from which on a step stands out.
    """
    size = window.values_2W.shape[1]
    new_2 = jnp.stack([loss, gradient_norm])
    median_2 = jnp.median(window.values_2W, axis=1)
    distance_2 = jnp.median(jnp.abs(window.values_2W - median_2[:, None]), axis=1)
    spread_2 = jnp.maximum(NORMAL * distance_2, AT_LEAST * jnp.abs(median_2))
    above = (new_2 > median_2 + deviations * spread_2).any()
    outlier = finite & (window.seen >= size) & above
    values_2W = window.values_2W.at[:, window.seen % size].set(new_2)
    return outlier, Window(
        values_2W=jnp.where(finite, values_2W, window.values_2W),
        seen=window.seen + finite.astype(jnp.int32),
        skipped=window.skipped + outlier.astype(jnp.int32),
    )
