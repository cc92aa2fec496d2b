"""Attention over documents: causal, grouped-query, never across a document's border."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from mobilellm_jax.model.config import ModelConfig


def rope_frequencies(config: ModelConfig) -> np.ndarray:
    """By how many radians per position each pair of a head's components turns, float32 [H/2].

    `theta ** (-2i/H)` for pair `i`. With Llama 3.1's scaling a pair that turns fewer than
    `low_freq_factor` times within the original context turns `factor` times slower, one that turns
    more than `high_freq_factor` times stays as it is, and between them the two are blended in
    proportion to the turns.
    """
    half = config.head_dim // 2
    frequency = config.rope_theta ** -(np.arange(half) / half)
    if scaling := config.rope_scaling:
        turns = scaling.original_max_length * frequency / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * (kept + (1 - kept) / scaling.factor)
    return frequency.astype(np.float32)


def rope(x_BTNH: jax.Array, positions_BT: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Rotary position embedding (RoFormer, arXiv 2104.09864), half-rotated as in Hugging Face Llama.

    Component `i` turns together with `i + H/2` by `position * frequencies[i]`, in float32. Only
    distances between positions matter to attention.
    """
    angle = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


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
