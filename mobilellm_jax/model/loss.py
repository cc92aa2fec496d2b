"""Sums of per-token losses over the vocabulary, whose gradient is formed in the forward pass.

For a 128,256-row vocabulary the logits of one row of 2,048 tokens take 1 GiB, and in a sub-billion
model the products with the output embedding are up to half of all work. So the tokens of a device
are walked in chunks, each against the whole vocabulary, and while the logits of a chunk are at hand
the gradients by its hidden states and by the output embedding are formed as well. What is minimised
is a sum, whose gradient needs nothing from later: three products in all, none computed twice.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel.sharding import BATCH_AXES, batch_mesh, spec, summed

# What targets cost, given their float32 logits [N, V], arrays [N, ...] of their own and arrays that
# all share: (cost_N, shown_N, gradient_NV), float32, the last of the sum of costs by the logits.
Cost = Callable[[jax.Array, Any, Any], tuple[jax.Array, jax.Array, jax.Array]]


@jax.named_scope("loss")
def summed_loss(
    hidden_BTD: jax.Array,
    unembedding_DV: jax.Array,
    targets_BT: jax.Array,
    weight_BT: jax.Array,
    z_loss: float = 0.0,
    chunks: int = 1,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy, summed: `sum(weight * (nll + z_loss * log_z**2))`.

    Args:
      hidden_BTD: hidden states after the final norm; products are in their dtype, sums in float32.
      unembedding_DV: output embedding, float32.
      targets_BT: int token ids.
      weight_BT: of each target, float32.
      z_loss: weight of the squared log normaliser (PaLM, arXiv 2204.02311, section 5).
      chunks: as in `sum_over_chunks`.

    Returns:
      float32 scalar, the sum, and float32 [B, T], the negative log-likelihood of every target in
      nats, weighted or not; see `sum_over_chunks` for what has a gradient.

    Raises:
      UserError: `chunks` does not divide T.
    """
    cost = functools.partial(_cross_entropy, z_loss=z_loss)
    return sum_over_chunks(cost, hidden_BTD, unembedding_DV, (targets_BT, weight_BT), chunks)


def _cross_entropy(
    logits_NV: jax.Array, given: tuple[jax.Array, jax.Array], whole: Any, *, z_loss: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    targets_N, weight_N = given
    log_z_N = jax.nn.logsumexp(logits_NV, axis=-1)
    nll_N = log_z_N - jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
    cost_N = weight_N * (nll_N + z_loss * log_z_N**2)
    scale_N = weight_N * (1 + 2 * z_loss * log_z_N)
    softmax_NV = jnp.exp(logits_NV - log_z_N[:, None])
    is_target_NV = jnp.arange(logits_NV.shape[-1]) == targets_N[:, None]
    gradient_NV = scale_N[:, None] * softmax_NV - jnp.where(is_target_NV, weight_N[:, None], 0.0)
    return cost_N, nll_N, gradient_NV


def sum_over_chunks(
    cost: Cost,
    hidden_BTD: jax.Array,
    unembedding_DV: jax.Array,
    given: Any,
    chunks: int,
    whole: Any = (),
) -> tuple[jax.Array, jax.Array]:
    """The sum of what every target costs, a chunk of the tokens at a time.

    Over a mesh each device walks the tokens of its own rows: the output embedding is gathered once
    before, in the dtype of the hidden states, and its gradient, added up in float32, is reduced
    once after.

    Args:
      cost: of a chunk of N targets, and its gradient; it closes over no array that is traced.
      hidden_BTD: hidden states.
      unembedding_DV: output embedding, float32.
      given: pytree of arrays [B, T, ...], which the cost sees as [N, ...].
      chunks: parts into which each row is cut; the logits of one part exist at once. 1: all.
      whole: pytree of arrays that the cost sees as they are, the same in every chunk.

    Returns:
      The sum, float32, and what the cost shows of each target, float32 [B, T]. The sum is
      differentiable in reverse, once, by hidden states and output embedding alone; what is shown
      has no gradient.

    Raises:
      UserError: `chunks` does not divide T.
    """
    _check_chunks(hidden_BTD, chunks)
    # Turned to lie as an embedding does: a tied one's gradients here and in its look-up have one
    # shape, and XLA may add them before it reduces.
    total, shown_BT = _sum(cost, chunks, hidden_BTD, unembedding_DV.T, given, whole)
    return total, jax.lax.stop_gradient(shown_BT)


def over_chunks(function: Callable[..., Any], chunks: int, *arrays: jax.Array) -> Any:
    """A function of parts of rows, one after another, so that what it forms exists for a part at a time.

    Args:
      function: of parts [B, N, ...] of the arrays to a pytree of arrays [B, N, ...].
      chunks: parts into which each row is cut.
      *arrays: [B, T, ...].

    Returns:
      What it gives for whole rows, [B, T, ...].

    Raises:
      UserError: `chunks` does not divide T.
    """
    _check_chunks(arrays[0], chunks)

    def cut(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [C, B, N, ...]
        return jnp.moveaxis(x.reshape(len(x), chunks, -1, *x.shape[2:]), 1, 0)

    def joined(x: jax.Array) -> jax.Array:  # [C, B, N, ...] -> [B, T, ...]
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], chunks * x.shape[2], *x.shape[3:])

    found = jax.lax.map(lambda parts: function(*parts), tuple(map(cut, arrays)))
    return jax.tree.map(joined, found)


def _check_chunks(rows_BT: jax.Array, chunks: int) -> None:
    if rows_BT.shape[1] % chunks:
        raise UserError(f"loss_chunks={chunks} does not divide the row length {rows_BT.shape[1]}.")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sum(
    cost: Cost,
    chunks: int,
    hidden_BTD: jax.Array,
    unembedding_VD: jax.Array,
    given: Any,
    whole: Any,
) -> tuple[jax.Array, jax.Array]:
    walk = functools.partial(_walk, cost, chunks, False)
    total, shown_BT = _per_device(walk, hidden_BTD, unembedding_VD, given, whole)
    return total, shown_BT


def _sum_forward(
    cost: Cost,
    chunks: int,
    hidden_BTD: jax.Array,
    unembedding_VD: jax.Array,
    given: Any,
    whole: Any,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    walk = functools.partial(_walk, cost, chunks, True)
    total, shown_BT, *gradients = _per_device(walk, hidden_BTD, unembedding_VD, given, whole)
    return (total, shown_BT), (gradients[0], gradients[1].astype(unembedding_VD.dtype))


def _sum_backward(
    cost: Cost,
    chunks: int,
    gradients: tuple[jax.Array, jax.Array],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, None, None]:
    by_hidden_BTD, by_unembedding_VD = ((g * cotangents[0]).astype(g.dtype) for g in gradients)
    return by_hidden_BTD, by_unembedding_VD, None, None


_sum.defvjp(_sum_forward, _sum_backward)


def _per_device(
    walk: Callable[..., tuple[jax.Array, ...]],
    hidden_BTD: jax.Array,
    unembedding_VD: jax.Array,
    given: Any,
    whole: Any,
) -> tuple[jax.Array, ...]:
    """`walk` over the rows that each device has, and the sums over devices."""
    rounded_VD = unembedding_VD.astype(hidden_BTD.dtype)
    mesh = batch_mesh(hidden_BTD.shape[0])
    if mesh is None:
        return walk(hidden_BTD, rounded_VD, given, whole)
    place = spec("embedding", unembedding_VD.shape, mesh)

    def local(*arrays: Any) -> tuple[jax.Array, ...]:
        total, shown_BT, *gradients = walk(*arrays)
        total = summed(total, P(), mesh)
        if not gradients:
            return total, shown_BT
        return total, shown_BT, gradients[0], summed(gradients[1], place, mesh)

    rows = P(BATCH_AXES)
    outputs = jax.eval_shape(walk, hidden_BTD, rounded_VD, given, whole)
    return jax.shard_map(
        local,
        in_specs=(rows, P(), rows, P()),
        out_specs=(P(), rows, rows, place)[: len(outputs)],
        check_vma=False,  # sums over devices are ours, and nothing is differentiated through here
    )(hidden_BTD, rounded_VD, given, whole)


def _walk(
    cost: Cost,
    chunks: int,
    gradients: bool,
    hidden_BTD: jax.Array,
    unembedding_VD: jax.Array,
    given: Any,
    whole: Any,
) -> tuple[jax.Array, ...]:
    """The sum, what is shown [B, T] and, if asked for, the gradients [B, T, D] and float32 [V, D]."""
    dtype = hidden_BTD.dtype

    def chunk(by_unembedding_VD: Any, arrays: Any) -> tuple[Any, tuple[jax.Array, ...]]:
        hidden_ND, given_N = arrays
        logits_NV = jnp.einsum(
            "ND,VD->NV", hidden_ND, unembedding_VD, preferred_element_type=jnp.float32
        )
        cost_N, shown_N, gradient_NV = cost(logits_NV, given_N, whole)
        if not gradients:
            return (), (cost_N, shown_N)
        gradient_NV = gradient_NV.astype(dtype)
        by_hidden_ND = jnp.einsum("NV,VD->ND", gradient_NV, unembedding_VD)
        by_unembedding_VD += jnp.einsum(
            "ND,NV->VD", hidden_ND, gradient_NV, preferred_element_type=jnp.float32
        )
        return by_unembedding_VD, (cost_N, shown_N, by_hidden_ND)

    def cut(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [C, N, ...]
        return x.reshape(chunks, -1, *x.shape[2:])

    start: Any = jnp.zeros(unembedding_VD.shape, jnp.float32) if gradients else ()
    by_unembedding_VD, (cost_CN, shown_CN, *by_hidden) = jax.lax.scan(
        chunk, start, jax.tree.map(cut, (hidden_BTD, given))
    )
    sums = cost_CN.sum(), shown_CN.reshape(hidden_BTD.shape[:2])
    if not gradients:
        return sums
    return *sums, by_hidden[0].reshape(hidden_BTD.shape), by_unembedding_VD
