"""The local second-order update: what stays of a product's weights takes over what goes (OBS by layers).

Where channels P of what enters a product die, and K are left, the weights of K are moved so that the
product changes least (Hassibi and Stork 1993; SparseGPT, arXiv 2301.00774, section 3):

    W_K + (H_KK + lambda I)^-1 H_KP W_P       with H = sum of x x^T over tokens

That is least squares on the channels that are left, drawn to the old weights by lambda. EfficientLLM's
variant B applies it at every cut (arXiv 2502.06663). Each product is taken by itself, with the inputs it
had before the cut.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mobilellm_jax.leaves import flat, nested
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.pruning.groups import Groups

DAMPING = 0.01  # lambda, of the mean of the diagonal of H, as in SparseGPT's code
# What enters (of `transformer.statistics`), the axis of its groups, and the weights that read it.
READERS = (
    ("attention/of_out", "N", ("attention/out",)),
    ("mlp/of_down", "F", ("mlp/down",)),
    ("of_attention", "D", ("attention/query", "attention/key", "attention/value")),
    ("of_mlp", "D", ("mlp/gate", "mlp/up")),
)
HEAD = ("of_head", "D", ("head",))  # the embedding, where it is tied, must stay what it is


def needed(config: ModelConfig, before: Groups, after: Groups) -> tuple[str, ...]:
    """Which inputs, by path, lose channels between two states, and so are to be measured."""
    found = []
    for i in range(len(config.stacks)):
        for name, axis, _ in READERS:
            if (before.of(axis, i) & ~after.of(axis, i)).any():
                found.append(f"stack_{i}/{name}")
    if not config.tied and (before.residual_D & ~after.residual_D).any():
        found.append(HEAD[0])
    return tuple(found)


def compensated(
    params: Any,
    config: ModelConfig,
    inputs: Mapping[str, jax.Array],
    before: Groups,
    after: Groups,
    damping: float = DAMPING,
) -> Any:
    """The weights with those that are left moved to make up for those that die.

    Args:
      params: the weights.
      config: their network.
      inputs: of `needed` (`activations.inputs`).
      before: bool, what lives.
      after: bool, what will live.
      damping: of the mean of the diagonal of H over what lives.
    """
    weights = dict(flat(params))
    for path, product in inputs.items():
        stack, _, name = path.rpartition("/") if path == HEAD[0] else path.partition("/")
        number = int(stack.removeprefix("stack_")) if stack else None
        _, axis, readers = next(line for line in (*READERS, HEAD) if line[0] == name)
        old, new = before.of(axis, number), after.of(axis, number)
        if axis == "N":
            old, new = (np.repeat(x, config.head_dim, -1) for x in (old, new))
        for reader in readers:
            at = f"{stack}/{reader}" if stack else reader
            if at in weights:
                weights[at] = _moved(weights[at], product, new, old & ~new, damping)
    return nested(weights)


@jax.jit
def _moved(
    weight: jax.Array, product: jax.Array, live: jax.Array, dying: jax.Array, damping: float
) -> jax.Array:
    """Weights whose axes, after L if the product has it, are those of what enters and then others."""
    of_layer = product.ndim == 3
    layers = product.shape[0] if of_layer else 1
    size = product.shape[-1]

    def one(given: tuple[jax.Array, ...]) -> jax.Array:
        weight_XY, product_XX, live_X, dying_X = given
        keep_X, gone_X = live_X.astype(jnp.float32), dying_X.astype(jnp.float32)
        mean = (jnp.diagonal(product_XX) * keep_X).sum() / jnp.maximum(keep_X.sum(), 1)
        # A channel that is not there, or is always 0, gets an equation of its own: it does not move.
        diagonal_X = jnp.where(live_X, jnp.maximum(damping * mean, 1e-30), 1.0)
        left_XX = product_XX * keep_X[:, None] * keep_X + jnp.diag(diagonal_X)
        lost_XY = jnp.einsum(
            "XZ,ZY->XY", product_XX, gone_X[:, None] * weight_XY, precision=_HIGHEST
        )
        factor = jax.scipy.linalg.cho_factor(left_XX)
        return weight_XY + jax.scipy.linalg.cho_solve(factor, keep_X[:, None] * lost_XY)

    given = (
        weight.astype(jnp.float32).reshape(layers, size, -1),
        product.reshape(layers, size, size),
        jnp.broadcast_to(live, (layers, size)),
        jnp.broadcast_to(dying, (layers, size)),
    )
    # One layer after another: their factors are as large as the products.
    return jax.lax.map(one, given).reshape(weight.shape)


_HIGHEST = jax.lax.Precision.HIGHEST
