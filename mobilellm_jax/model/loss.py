"""Cross-entropy in float32, chunked over tokens so that the logits never exist whole.

For a 128,256-row vocabulary the logits of one row of 2,048 tokens take 1 GiB; in a sub-billion
model the projection onto them is up to half of all work. Chunks split the tokens and keep the
vocabulary whole, so every product stays large.
"""

import jax
import jax.numpy as jnp

from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel.sharding import gathered


@jax.named_scope("loss")
def token_losses(
    hidden_BTD: jax.Array, unembedding_DV: jax.Array, targets_BT: jax.Array, chunks: int = 1
) -> tuple[jax.Array, jax.Array]:
    """Negative log-likelihood of every target and the log of the softmax's normaliser.

    Args:
      hidden_BTD: hidden states after the final norm; products are in their dtype, sums in float32.
      unembedding_DV: output embedding.
      targets_BT: int token ids.
      chunks: parts into which T is cut; the backward pass computes each part's logits again. 1
        keeps them.

    Returns:
      float32 [B, T] losses in nats, and float32 [B, T] log normalisers (for the z-loss).

    Raises:
      UserError: `chunks` does not divide T.
    """
    rows, length, width = hidden_BTD.shape
    unembedding_DV = unembedding_DV.astype(hidden_BTD.dtype)

    def losses(hidden_BtD: jax.Array, targets_Bt: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BtV = jnp.einsum(
            "BtD,DV->BtV", hidden_BtD, unembedding_DV, preferred_element_type=jnp.float32
        )
        log_z_Bt = jax.nn.logsumexp(logits_BtV, axis=-1)
        target_logit_Bt = jnp.take_along_axis(logits_BtV, targets_Bt[..., None], axis=-1)[..., 0]
        return log_z_Bt - target_logit_Bt, log_z_Bt

    if chunks == 1:
        return losses(hidden_BTD, targets_BT)
    if length % chunks:
        raise UserError(f"loss_chunks={chunks} does not divide the row length {length}.")
    unembedding_DV = gathered(unembedding_DV)
    # Rows stay the outermost axis inside a chunk, so that a batch sharded over devices is not
    # moved.
    hidden_CBtD = hidden_BTD.reshape(rows, chunks, -1, width).swapaxes(0, 1)
    targets_CBt = targets_BT.reshape(rows, chunks, -1).swapaxes(0, 1)
    nll_CBt, log_z_CBt = jax.lax.map(
        jax.checkpoint(lambda xs: losses(*xs)), (hidden_CBtD, targets_CBt)
    )
    return (
        nll_CBt.swapaxes(0, 1).reshape(rows, length),
        log_z_CBt.swapaxes(0, 1).reshape(rows, length),
    )
