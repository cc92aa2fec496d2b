"""Attention on GPU: JAX's flash kernel in Pallas (Triton), which knows segment ids, and cuDNN's."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as kernels

TILE = 128  # queries and keys of a tile of the forward pass


def flash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within segments, of the rows of one device: [B, T, N, H].

    Rows are padded to a multiple of 128; what is padded lies in the future of every token. The
    kernel knows no shared heads, so keys and values are repeated for each query head.

    Args:
      q_BTNH: queries.
      k_BTKH: keys, of fewer heads if query heads share them.
      v_BTKH: values.
      segment_ids_BT: int32; None if a row is one document.
      interpret: run on any device, slowly.
    """
    length, heads, head_dim = q_BTNH.shape[1:]
    padding = -length % TILE

    def padded(x_BTNH: jax.Array) -> jax.Array:
        x_BTNH = jnp.repeat(x_BTNH, heads // x_BTNH.shape[2], axis=2)
        return jnp.pad(x_BTNH, ((0, 0), (0, padding), (0, 0), (0, 0)))

    if segment_ids_BT is not None:
        segment_ids_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, padding)), mode="edge")
    y_BTNH = kernels.mha(
        padded(q_BTNH),
        padded(k_BTKH),
        padded(v_BTKH),
        segment_ids_BT,
        sm_scale=head_dim**-0.5,
        causal=True,
        interpret=interpret,
    )
    return y_BTNH[:, :length]


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
