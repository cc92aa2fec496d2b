"""Attention in plain XLA, for any device: the reference, by heads, and in blocks of queries.

The reference computes all pairs of a query and a key and keeps their scores for the backward pass.
By heads it computes them in one product for each KV head, with keys and values as a cache has them. In
blocks a query meets the keys up to the end of its block alone, and the backward pass forms the scores
of one block at a time again.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

BLOCKS = 8  # of a row, at most: 9/16 of all pairs are computed, where 1/2 may see each other
LEAST = 64  # queries in a block; smaller ones cost more than they save


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


def heads_outermost(x_BSKH: jax.Array) -> jax.Array:
    """[K * B, S, H], as a cache has it."""
    x_KBSH = jnp.moveaxis(x_BSKH, 2, 0)
    return x_KBSH.reshape(-1, *x_KBSH.shape[2:])


def attention_by_heads(
    q_BTNH: jax.Array, k_RSH: jax.Array, v_RSH: jax.Array, visible_BTS: jax.Array
) -> jax.Array:
    """What `attention` computes, with the keys and values of a cache, or in their order.

    The queries of a KV head are the rows of one product, so that a cache is read as it lies.

    Args:
      q_BTNH: queries.
      k_RSH: keys of all rows and KV heads, see `heads_outermost`.
      v_RSH: values.
      visible_BTS: see `attention`.
    """
    B, T, N, H = q_BTNH.shape
    K = len(k_RSH) // B
    q_KBTGH = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 2, 0)
    q_RQH = q_KBTGH.reshape(K * B, -1, H)
    scores_RQS = jnp.einsum("RQH,RSH->RQS", q_RQH, k_RSH, preferred_element_type=jnp.float32)
    visible_BQS = jnp.repeat(visible_BTS, N // K, axis=1)
    visible_RQS = jnp.tile(visible_BQS, (K, 1, 1))
    lowest = jnp.finfo(jnp.float32).min
    scores_RQS = jnp.where(visible_RQS, scores_RQS / math.sqrt(H), lowest)
    shares_RQS = jax.nn.softmax(scores_RQS, axis=-1).astype(v_RSH.dtype)
    y_RQH = jnp.einsum("RQS,RSH->RQH", shares_RQS, v_RSH)
    y_BTKGH = jnp.moveaxis(y_RQH.reshape(K, B, T, N // K, H), 0, 2)
    return y_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype)


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


def blocks(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None
) -> jax.Array:
    """Attention over whole rows, a block of queries after the other.

    Args:
      q_BTNH: queries.
      k_BTKH: keys.
      v_BTKH: values.
      segment_ids_BT: int, equal inside a document; None: a row is one document.

    Returns:
      [B, T, N, H] in the dtype of `q_BTNH`.
    """
    count, length = q_BTNH.shape[:2]
    size = max(LEAST, -(-length // BLOCKS))
    slots_BT = jnp.broadcast_to(jnp.arange(length), (count, length))

    # Of the whole rows, so that these and not their parts are kept for the backward pass.
    @functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
    def block(start: int, rows: tuple[Any, ...]) -> jax.Array:
        def part(first: int) -> Any:
            return jax.tree.map(lambda x: x[:, first : start + size], rows)

        q_BTNH, _, _, at_BT, segment_ids_BT = part(start)
        _, k_RSH, v_RSH, at_BS, segment_ids_BS = part(0)
        visible_BTS = visible(at_BT, at_BS, segment_ids_BT, segment_ids_BS)
        return attention_by_heads(q_BTNH, k_RSH, v_RSH, visible_BTS)

    k_RTH, v_RTH = heads_outermost(k_BTKH), heads_outermost(v_BTKH)
    rows = q_BTNH, k_RTH, v_RTH, slots_BT, segment_ids_BT
    return jnp.concatenate([block(start, rows) for start in range(0, length, size)], axis=1)
