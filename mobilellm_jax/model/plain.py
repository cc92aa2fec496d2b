"""Attention in plain XLA over all pairs of a query and a key: what every other attention means."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    visible_BTS: ArrayLike,
) -> jax.Array:
    """Softmax attention; query head `n` reads KV head `n // (N / K)`; softmax in float32.

    Args:
      q_BTNH: queries.
      k_BSKH: keys.
      v_BSKH: values.
      visible_BTS: bool, which keys a query may read; every query must see at least one.

    Returns:
      [B, T, N, H] in the dtype of `q_BTNH`.
    """
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=jnp.asarray(visible_BTS)[:, None]
    )


def visible(
    positions_BT: jax.Array,
    key_positions_BS: jax.Array,
    segment_ids_BT: jax.Array | None,
    key_segment_ids_BS: jax.Array | None,
) -> jax.Array:
    """Bool [B, T, S]: a query sees a key that is not in its future and, given segments, in its document."""
    causal_BTS = key_positions_BS[:, None, :] <= positions_BT[:, :, None]
    if segment_ids_BT is None or key_segment_ids_BS is None:
        return causal_BTS
    return causal_BTS & (key_segment_ids_BS[:, None, :] == segment_ids_BT[:, :, None])
