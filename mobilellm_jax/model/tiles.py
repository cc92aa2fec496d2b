"""Rows of any length for attention kernels that work on whole tiles of tokens."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

TILE = 128  # tokens


def in_tiles(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A kernel of causal attention that pads its rows to a multiple of `TILE` and cuts them again.

    What is padded lies in the future of every token.
    """

    @functools.wraps(kernel)
    def of_any_length(
        q_BTNH: jax.Array,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        segment_ids_BT: jax.Array | None,
        interpret: bool = False,
    ) -> jax.Array:
        length = q_BTNH.shape[1]
        padding = -length % TILE
        rows = (
            jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKH)
        )
        if segment_ids_BT is not None:
            segment_ids_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, padding)), mode="edge")
        return kernel(*rows, segment_ids_BT, interpret)[:, :length]

    return of_any_length
