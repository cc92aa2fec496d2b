"""The look-up in the embedding, whose gradient is formed where the rows are and reduced in pieces.

Left to itself XLA all-reduces the gradient of a look-up, whole [V, D], and cuts its pieces out
afterwards. Here each device adds up the gradient of its own rows, and what is exchanged is what the
sharding of the embedding asks for.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from mobilellm_jax.parallel.sharding import BATCH_AXES, batch_mesh, spec, summed


def look_up(embedding_VD: jax.Array, tokens_BT: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The rows of the embedding that the tokens name, [B, T, D].

    Over a mesh the embedding is gathered once, in `dtype`, each device looks up the tokens of its
    own rows, and the gradient, added up in float32, is reduced once to the embedding's sharding.
    The loss does the same with its share of a tied one (`model.loss`): both are gathered as one,
    and reduced as one where XLA adds before it reduces, as it does for TPU.

    Args:
      embedding_VD: float32, sharded by the table of `parallel.sharding`.
      tokens_BT: int token ids.
      dtype: of the result.
    """
    mesh = batch_mesh(tokens_BT.shape[0])
    if mesh is None:
        return embedding_VD[tokens_BT].astype(dtype)
    return _over_mesh(mesh, dtype, embedding_VD, tokens_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _over_mesh(
    mesh: AbstractMesh, dtype: DTypeLike, embedding_VD: jax.Array, tokens_BT: jax.Array
) -> jax.Array:
    def local(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        return table_VD[tokens_BT]

    rows = P(BATCH_AXES)
    per_device = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), rows), out_specs=rows, check_vma=False
    )
    return per_device(embedding_VD.astype(dtype), tokens_BT)


def _forward(
    mesh: AbstractMesh, dtype: DTypeLike, embedding_VD: jax.Array, tokens_BT: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _over_mesh(mesh, dtype, embedding_VD, tokens_BT), (embedding_VD, tokens_BT)


def _backward(
    mesh: AbstractMesh,
    dtype: DTypeLike,
    residuals: tuple[jax.Array, jax.Array],
    gradient_BTD: jax.Array,
) -> tuple[jax.Array, None]:
    embedding_VD, tokens_BT = residuals  # of the first its shape is read, and nothing else
    place = spec("embedding", embedding_VD.shape, mesh)

    def local(tokens_BT: jax.Array, gradient_BTD: jax.Array) -> jax.Array:
        zeros_VD = jnp.zeros(embedding_VD.shape, jnp.float32)
        by_embedding_VD = zeros_VD.at[tokens_BT].add(gradient_BTD.astype(jnp.float32))
        return summed(by_embedding_VD, place, mesh)

    rows = P(BATCH_AXES)
    per_device = jax.shard_map(
        local, mesh=mesh, in_specs=(rows, rows), out_specs=place, check_vma=False
    )
    return per_device(tokens_BT, gradient_BTD).astype(embedding_VD.dtype), None


_over_mesh.defvjp(_forward, _backward)
