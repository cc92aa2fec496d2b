"""Attention on TPU: JAX's splash kernel, which never writes the scores to memory."""

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from mobilellm_jax.model.tiles import TILE, in_tiles

BLOCK = (
    1024  # most queries and keys of a tile; the tiles of the fused backward pass fit a v5e's VMEM
)


@in_tiles
def splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within segments, of the rows of one device: [B, T, N, H].

    Args:
      q_BTNH: queries.
      k_BTKH: keys, of fewer heads if query heads share them.
      v_BTKH: values.
      segment_ids_BT: int32; None if a row is one document.
      interpret: run on any device, slowly.
    """
    length, heads, head_dim = q_BTNH.shape[1:]
    block = block_size(length)
    mask = splash_attention_mask.CausalMask((length, length))
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
        segments = splash_attention_kernel.SegmentIds(segment_ids_BT, segment_ids_BT)
    # The kernel has no scale of its own; a power of two, as 64 ** -0.5 is, rounds nothing.
    heads_first = (x.swapaxes(1, 2) for x in (q_BTNH * head_dim**-0.5, k_BTKH, v_BTKH))
    return jax.vmap(kernel)(*heads_first, segments).swapaxes(1, 2)


def block_size(length: int) -> int:
    """The largest multiple of 128 that divides a padded row and is at most `BLOCK`."""
    return max(b for b in range(TILE, min(length, BLOCK) + 1, TILE) if length % b == 0)
