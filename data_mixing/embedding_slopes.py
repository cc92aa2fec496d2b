"""Slopes along directions of the input and output embedding alone, all directions for one backward pass.

`derivatives.slopes` takes a forward pass for each direction. MobileLLM-R1 chooses the two embeddings,
and of these the gradient is known in pieces: with e the error at the output (softmax less target,
[T, V]), h the hidden states before it and d the gradient by the looked-up embeddings,

    by the output embedding:  sum over t of h_t e_t^T      so along W:  sum over t of h_t W e_t
    by the input embedding:   d_t, added to row tok_t      so along E:  sum over t of d_t . E[tok_t]

Neither sum has to be formed: every token gives its own term, and e and d are had once. A term of the
input's belongs to the token that was read, one of the output's to the token that was to be said:
summed over a document they are the slope of its loss, by token they are shares of it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mobilellm_jax.leaves import nested
from mobilellm_jax.model import transformer
from mobilellm_jax.model.loss import over_chunks
from mobilellm_jax.parallel.sharding import ROWS, WHOLE, on_each_device
from mobilellm_jax.training.objectives import Network, split_rows

EMBEDDINGS = frozenset({"embedding", "output"})


@on_each_device(in_specs=(WHOLE, WHOLE, WHOLE, ROWS), out_specs=ROWS)
def embedding_slopes(
    chosen: dict[str, jax.Array],
    rest: dict[str, jax.Array],
    directions: dict[str, jax.Array],
    tokens: jax.Array,
    *,
    network: Network,
) -> jax.Array:
    """What every token of rows adds to the slope of its document's loss along each direction.

    Args:
      chosen: `embedding` [V, D], `output` [D, V] or both.
      rest: the other weights.
      directions: like `chosen`, [K, ...] each.
      tokens: int [B, T + 1], rows as they are stored.
      network: what is run.

    Returns:
      float32 [B, K, T].
    """
    weights, model = {**rest, **chosen}, network.model
    rows = split_rows(tokens, network.bos_id, network.eos_id)
    shape = rows.inputs_BT.shape
    # Each token reads a row of its own, by which the network is then differentiated.
    looked_up_ND = weights["embedding"][rows.inputs_BT.reshape(-1)]
    numbers_BT = jnp.arange(looked_up_ND.shape[0]).reshape(shape)
    reading = dataclasses.replace(model, vocab_size=looked_up_ND.shape[0], tied=True)
    others = nested({n: leaf for n, leaf in weights.items() if n not in EMBEDDINGS})

    def hidden(looked_up_ND: jax.Array) -> jax.Array:
        return transformer.apply(
            {**others, "embedding": looked_up_ND},
            reading,
            numbers_BT,
            rows.segment_ids_BT,
            network.execution,
        )

    hidden_BTD, backwards = jax.vjp(hidden, looked_up_ND)
    along_output = directions.get("output", jnp.zeros((0, *weights["output"].shape)))
    dtype = hidden_BTD.dtype
    output_DV, along_KDV = weights["output"].astype(dtype), along_output.astype(dtype)

    def of_chunk(
        hidden_BND: jax.Array, targets_BN: jax.Array, weight_BN: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        def product(matrix_DV: jax.Array) -> jax.Array:
            return jnp.einsum(
                "BND,DV->BNV", hidden_BND, matrix_DV, preferred_element_type=jnp.float32
            )

        is_target_BNV = jnp.arange(output_DV.shape[1]) == targets_BN[..., None]
        error_BNV = jax.nn.softmax(product(output_DV)) - is_target_BNV
        error_BNV = error_BNV * weight_BN[..., None]
        by_output_KBN = jax.lax.map(lambda m: (product(m) * error_BNV).sum(-1), along_KDV)
        by_hidden_BND = jnp.einsum(
            "BNV,DV->BND", error_BNV.astype(dtype), output_DV, preferred_element_type=jnp.float32
        )
        return jnp.moveaxis(by_output_KBN, 0, -1), by_hidden_BND

    by_output_BTK, by_hidden_BTD = over_chunks(
        of_chunk, network.loss_chunks, hidden_BTD, rows.targets_BT, rows.weight_BT
    )
    by_output_BKT = jnp.moveaxis(by_output_BTK, -1, 1)
    if "embedding" not in directions:
        return by_output_BKT
    (by_input_ND,) = backwards(by_hidden_BTD.astype(dtype))
    by_input_BTD = by_input_ND.reshape(*shape, -1)
    along_KBTD = directions["embedding"][:, rows.inputs_BT]
    by_input_BKT = jnp.einsum("BTD,KBTD->BKT", by_input_BTD, along_KBTD)
    return by_input_BKT + by_output_BKT if "output" in directions else by_input_BKT
