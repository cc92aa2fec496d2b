"""Taps: what every group's weights are worth, read off a backward pass where their gradients appear.

A tap is a zero of the size of a weight's groups that the weight is passed through together with. The
weight comes out as it went in; of the tap's gradient we say that it is the sum, over each group, of
`weight * gradient` (or of its magnitude). So the gradient of a tap alone is a score of groups: of a
stack it is formed layer by layer inside the backward scan, and no gradient as large as the weights
exists unless somebody else asks for it.

Parameters carry taps under the key "taps", beside the stacks they belong to.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

TAPS = "taps"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tap:
    """Zeros by axis, and what their gradient is to be."""

    sums: Mapping[str, jax.Array]  # by axis: float32, one for each of its groups
    magnitudes: bool = dataclasses.field(metadata={"static": True})


def tapped(weight: jax.Array, axes: str, tap: Tap) -> jax.Array:
    """The weight, whose gradient is read by the tap.

    Args:
      weight: of these axes.
      axes: a letter each.
      tap: of some of these axes.
    """
    kept = tuple(tap.sums)
    return _tapped(axes, kept, tap.magnitudes, weight, [tap.sums[axis] for axis in kept])


Sums = list[jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _tapped(
    axes: str, kept: tuple[str, ...], magnitudes: bool, weight: jax.Array, sums: Sums
) -> jax.Array:
    return weight


def _forward(
    axes: str, kept: tuple[str, ...], magnitudes: bool, weight: jax.Array, sums: Sums
) -> tuple[jax.Array, jax.Array]:
    return weight, weight


def _backward(
    axes: str, kept: tuple[str, ...], magnitudes: bool, weight: jax.Array, gradient: jax.Array
) -> tuple[jax.Array, Sums]:
    product = weight * gradient
    product = jnp.abs(product) if magnitudes else product
    others = [tuple(i for i, a in enumerate(axes) if a != axis) for axis in kept]
    return gradient, [product.sum(over, dtype=jnp.float32) for over in others]


_tapped.defvjp(_forward, _backward)
