"""Attention over documents: causal, grouped-query, never across a document's border.

Whole rows are computed by a kernel of the device they run on, in blocks where there is none, or by
the reference, which is the meaning of all of them. With a cache it is `by_heads.attention_by_heads`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.by_heads import blocks
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.flash_gpu import cudnn, flash
from mobilellm_jax.model.splash import splash
from mobilellm_jax.parallel.sharding import BATCH_AXES, batch_mesh

# Of queries [B, T, N, H], keys and values [B, T, K, H] and segment ids [B, T] or None.
Kernel = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]

KERNELS: dict[str, Kernel] = {"splash": splash, "flash": flash, "cudnn": cudnn, "blocks": blocks}
PLATFORMS = {"splash": "tpu", "flash": "gpu", "cudnn": "gpu"}  # that alone run these
ATTENTIONS = ("auto", "reference", *KERNELS)


def choose(asked: str, platform: str, model: ModelConfig, dtype: str, length: int) -> str:
    """The attention that whole rows get: what is asked for, or the kernel of the devices.

    All honour documents and shared heads.

    Args:
      asked: one of `ATTENTIONS`; "auto" is splash on TPU, flash on GPU, and else blocks.
      platform: of the devices that the program is compiled for, as `jax.Device.platform` says; it
        need not be that of this machine.
      model: the network.
      dtype: of its activations.
      length: tokens in a row.

    Returns:
      "reference" or a key of `KERNELS`.

    Raises:
      UserError: there is no such attention, or it cannot do this on these devices.
    """
    if asked not in ATTENTIONS:
        raise UserError(f"execution.attention={asked!r} is not one of {', '.join(ATTENTIONS)}.")
    if asked == "auto":
        # On GPU the kernel that takes any network, until a measurement says more
        # (`python -m benchmarks.attention`).
        return {"tpu": "splash", "gpu": "flash"}.get(platform, "blocks")
    if PLATFORMS.get(asked, platform) != platform:
        raise UserError(
            f"execution.attention={asked!r} runs on {PLATFORMS[asked]} devices and these are "
            f"{platform}: set it to 'auto' or 'reference'."
        )
    width = model.head_dim
    if asked == "cudnn" and (dtype != "bfloat16" or width % 8 or width > 128 or length % 2):
        raise UserError(
            f"execution.attention='cudnn' needs execution.dtype='bfloat16' (it is {dtype!r}), "
            f"model.head_dim a multiple of 8 up to 128 (it is {width}) and an even row_length (it is "
            f"{length}): set it to 'flash'."
        )
    return asked


def of_rows(
    kernel: str,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
) -> jax.Array:
    """Attention over whole rows by a kernel, each device its own rows: [B, T, N, H]."""
    function = KERNELS[kernel]
    if batch_mesh(q_BTNH.shape[0]) is None:
        return function(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    # XLA cannot split a kernel by itself. Unchecked, because kernels do not say what varies.
    rows = P(BATCH_AXES)
    local = jax.shard_map(function, in_specs=(rows,) * 4, out_specs=rows, check_vma=False)
    return local(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)


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
