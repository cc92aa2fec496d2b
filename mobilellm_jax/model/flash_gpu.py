"""Attention on GPU: JAX's flash kernel in Pallas (Triton), which knows segment ids, and cuDNN's."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as kernels

from mobilellm_jax.model.tiles import in_tiles

# Queries and keys of a tile, forwards and in both parts of the backward pass. Chosen by what the
# compiler makes of them for an H100, not by a clock (docs/results.md): products by the instructions of
# its tensor cores, which tiles of 32, the kernel's own choice backwards, are too small for, and no
# registers spilled to memory.
FORWARD, BACKWARD = (128, 64), (64, 64)
BLOCKS = kernels.BlockSizes(*FORWARD, *BACKWARD, *BACKWARD)


@in_tiles
def flash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within segments, of the rows of one device: [B, T, N, H].

    The kernel knows no shared heads, so keys and values are repeated for each query head.

    Args:
      q_BTNH: queries.
      k_BTKH: keys, of fewer heads if query heads share them.
      v_BTKH: values.
      segment_ids_BT: int32; None if a row is one document.
      interpret: run on any device, slowly.
    """
    heads, head_dim = q_BTNH.shape[2:]
    k_BTNH, v_BTNH = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k_BTKH, v_BTKH))
    return kernels.mha(
        q_BTNH,
        k_BTNH,
        v_BTNH,
        segment_ids_BT,
        sm_scale=head_dim**-0.5,
        causal=True,
        block_sizes=BLOCKS,
        num_warps=4 if head_dim <= 64 else 8,
        interpret=interpret,
    )


def cudnn(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """As `flash`, by cuDNN, which skips the future and gets documents as a mask of its own.

    bfloat16, an even number of tokens, and heads of a multiple of 8 up to 128. JAX's own call for
    documents as sequences of a packed row is not public, needs their largest number, and keeps
    float32 [that number, N, T] of each row for the backward pass.
    """
    mask_BNTS = None
    if segment_ids_BT is not None:
        mask_BNTS = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        mask=mask_BNTS,
        is_causal=True,
        implementation="xla" if interpret else "cudnn",
    )
