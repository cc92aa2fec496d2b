"""Attention on TPU: JAX's splash kernel, which never writes the scores to memory."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

LANES = 128  # the kernel works on whole vectors of keys
BLOCK = (
    1024  # most queries and keys of a tile; the tiles of the fused backward pass fit a v5e's VMEM
)


def splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within segments, of the rows of one device: [B, T, N, H].

    Rows are padded to a multiple of 128; what is padded lies in the future of every token.

    Args:
      q_BTNH: queries.
      k_BTKH: keys, of fewer heads if query heads share them.
      v_BTKH: values.
      segment_ids_BT: int32; None if a row is one document.
      interpret: run on any device, slowly.
    """
    length, heads, head_dim = q_BTNH.shape[1:]
    padding = -length % LANES
    block = block_size(length + padding)

    def heads_first(x_BTNH: jax.Array) -> jax.Array:
        return jnp.pad(x_BTNH.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))

    mask = splash_attention_mask.CausalMask((length + padding,) * 2)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            use_fused_bwd_kernel=True,
        ),
        interpret=interpret,
    )
    segments = None
    if segment_ids_BT is not None:
        ids_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, padding)), mode="edge")
        segments = splash_attention_kernel.SegmentIds(ids_BT, ids_BT)
    # The kernel has no scale of its own; a power of two, as 64 ** -0.5 is, rounds nothing.
    q_BNTH = heads_first(q_BTNH * head_dim**-0.5)
    y_BNTH = jax.vmap(kernel)(q_BNTH, heads_first(k_BTKH), heads_first(v_BTKH), segments)
    return y_BNTH.swapaxes(1, 2)[:, :length]


def block_size(length: int) -> int:
    """The largest multiple of 128 that divides a padded row and is at most `BLOCK`."""
    return max(b for b in range(LANES, min(length, BLOCK) + 1, LANES) if length % b == 0)
