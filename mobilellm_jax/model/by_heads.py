"""Attention by heads, in plain XLA, for any device: with a cache, and of whole rows in blocks.

Keys and values lie as a cache has them, heads outermost, and the queries that share a KV head are the
rows of one product with it. Axes: R the KV heads of all rows, [K * B]; Q the queries of one, [T * G].

In blocks of queries each meets the keys up to the end of its block alone. The backward pass keeps
whole rows of queries, keys, values and outputs, with the logarithm of what each query's shares are
divided by; from these it has the shares of a block again without their sums (FlashAttention 2, arXiv
2307.08691, section 3.1). Written down is the derivative forwards, of which the backward pass is the
transpose: so there are both.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from mobilellm_jax.model.plain import visible

BLOCKS = 8  # of a row, at most: 9/16 of all pairs are computed, where 1/2 may see each other
LEAST = 64  # queries in a block; smaller ones cost more than they save


def heads_outermost(x_BSKH: jax.Array) -> jax.Array:
    """Keys or values, [K * B, S, H], as a cache has them."""
    x_KBSH = jnp.moveaxis(x_BSKH, 2, 0)
    return x_KBSH.reshape(-1, *x_KBSH.shape[2:])


def attention_by_heads(
    q_BTNH: jax.Array, k_RSH: jax.Array, v_RSH: jax.Array, visible_BTS: jax.Array
) -> jax.Array:
    """What `plain.attention` computes, with keys and values as `heads_outermost` gives them."""
    y_RQH, _ = _attended(_queries(q_BTNH, len(k_RSH)), k_RSH, v_RSH, _bias(visible_BTS))
    return _heads_innermost(y_RQH, q_BTNH).astype(q_BTNH.dtype)


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
    return _in_blocks(q_BTNH, heads_outermost(k_BTKH), heads_outermost(v_BTKH), segment_ids_BT)


def _queries(q_BTNH: jax.Array, keys: int) -> jax.Array:
    """[R, Q, H], of `keys` KV heads in all rows, divided by sqrt(H)."""
    B, T, N, H = q_BTNH.shape
    K = keys // B
    scaled_BTNH = (q_BTNH.astype(jnp.float32) / math.sqrt(H)).astype(q_BTNH.dtype)
    return jnp.moveaxis(scaled_BTNH.reshape(B, T, K, N // K, H), 2, 0).reshape(keys, -1, H)


def _heads_innermost(y_RQH: jax.Array, q_BTNH: jax.Array) -> jax.Array:
    """[B, T, N, H], as the queries are; the width may be another one."""
    (B, T, N, _), (R, _, H) = q_BTNH.shape, y_RQH.shape
    return jnp.moveaxis(y_RQH.reshape(-1, B, T, N * B // R, H), 0, 2).reshape(B, T, N, H)


def _bias(visible_BTS: jax.Array) -> jax.Array:
    """What is added to scores: nothing, or so little that no share is left.

    Added and not chosen: XLA for CPUs keeps what is chosen in the shape of the scores.
    """
    return jnp.where(visible_BTS, 0.0, jnp.finfo(jnp.float32).min)


def _products(q_RQH: jax.Array, k_RSH: jax.Array) -> jax.Array:
    return jnp.einsum("RQH,RSH->RQS", q_RQH, k_RSH, preferred_element_type=jnp.float32)


def _sums(shares_RQS: jax.Array, v_RSH: jax.Array) -> jax.Array:
    shares_RQS = shares_RQS.astype(v_RSH.dtype)
    return jnp.einsum("RQS,RSH->RQH", shares_RQS, v_RSH, preferred_element_type=jnp.float32)


def _scores(q_RQH: jax.Array, k_RSH: jax.Array, bias_BTS: jax.Array) -> jax.Array:
    scores_RQS, (B, T, S) = _products(q_RQH, k_RSH), bias_BTS.shape
    scores_KBTGS = scores_RQS.reshape(-1, B, T, q_RQH.shape[1] // T, S)
    return (scores_KBTGS + bias_BTS[:, :, None]).reshape(scores_RQS.shape)


def _attended(
    q_RQH: jax.Array, k_RSH: jax.Array, v_RSH: jax.Array, bias_BTS: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Outputs [R, Q, H], and log of the sum of exp(scores) [R, Q, 1], float32.

    Outputs are divided and not the shares, which are many more.
    """
    scores_RQS = _scores(q_RQH, k_RSH, bias_BTS)
    highest_RQ1 = scores_RQS.max(axis=-1, keepdims=True)
    shares_RQS = jnp.exp(scores_RQS - highest_RQ1)
    sum_RQ1 = shares_RQS.sum(axis=-1, keepdims=True)
    return _sums(shares_RQS, v_RSH) / sum_RQ1, highest_RQ1 + jnp.log(sum_RQ1)


def _parts(
    q_RQH: jax.Array, k_RTH: jax.Array, segment_ids_BT: jax.Array | None
) -> Iterator[tuple[slice, int, jax.Array]]:
    """Of each block: the slice of its queries, the number of its keys, and its bias."""
    length = k_RTH.shape[1]
    group, size = q_RQH.shape[1] // length, max(LEAST, -(-length // BLOCKS))
    slots_1T = jnp.arange(length)[None]
    for start in range(0, length, size):
        end = min(start + size, length)
        ids_Bt = ids_BS = None
        if segment_ids_BT is not None:
            ids_Bt, ids_BS = segment_ids_BT[:, start:end], segment_ids_BT[:, :end]
        visible_BtS = visible(slots_1T[:, start:end], slots_1T[:, :end], ids_Bt, ids_BS)
        yield slice(start * group, end * group), end, _bias(visible_BtS)


def _forward(
    q_BTNH: jax.Array, k_RTH: jax.Array, v_RTH: jax.Array, segment_ids_BT: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    q_RQH = _queries(q_BTNH, len(k_RTH))
    found = [
        _attended(q_RQH[:, at], k_RTH[:, :end], v_RTH[:, :end], bias_BTS)
        for at, end, bias_BTS in _parts(q_RQH, k_RTH, segment_ids_BT)
    ]
    y_RQH, log_sum_RQ1 = (jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True))
    return _heads_innermost(y_RQH, q_BTNH).astype(q_BTNH.dtype), log_sum_RQ1


@jax.custom_jvp
def _in_blocks(
    q_BTNH: jax.Array, k_RTH: jax.Array, v_RTH: jax.Array, segment_ids_BT: jax.Array | None
) -> jax.Array:
    return _forward(q_BTNH, k_RTH, v_RTH, segment_ids_BT)[0]


@_in_blocks.defjvp
def _with_derivative(
    primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
    y_BTNH, log_sum_RQ1 = _forward(*primals)
    return y_BTNH, _derivative(*primals, y_BTNH, log_sum_RQ1, *tangents[:3])


# Once transposed, what it computes of its first six arguments is computed in the backward pass.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _derivative(
    q_BTNH: jax.Array,
    k_RTH: jax.Array,
    v_RTH: jax.Array,
    segment_ids_BT: jax.Array | None,
    y_BTNH: jax.Array,
    log_sum_RQ1: jax.Array,
    dq_BTNH: jax.Array,
    dk_RTH: jax.Array,
    dv_RTH: jax.Array,
) -> jax.Array:
    """How the output changes with queries, keys and values."""
    q_RQH, dq_RQH = (_queries(x, len(k_RTH)) for x in (q_BTNH, dq_BTNH))
    found = []
    for at, end, bias_BTS in _parts(q_RQH, k_RTH, segment_ids_BT):
        q_RqH, k_RSH, v_RSH = q_RQH[:, at], k_RTH[:, :end], v_RTH[:, :end]
        shares_RqS = jnp.exp(_scores(q_RqH, k_RSH, bias_BTS) - log_sum_RQ1[:, at])
        dscores_RqS = _products(dq_RQH[:, at], k_RSH) + _products(q_RqH, dk_RTH[:, :end])
        change_RqS = shares_RqS * dscores_RqS
        dy_RqH = _sums(change_RqS, v_RSH) + _sums(shares_RqS, dv_RTH[:, :end])
        found.append((dy_RqH, change_RqS.sum(axis=-1, keepdims=True)))
    dy_BTNH, change_BTN1 = (
        _heads_innermost(jnp.concatenate(parts, axis=1), q_BTNH)
        for parts in zip(*found, strict=True)
    )
    return (dy_BTNH - y_BTNH * change_BTN1).astype(q_BTNH.dtype)
