"""What the blocks of a network note of their activations, added up over tokens, where somebody asks."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

# Collections; see `transformer.statistics`.
STATISTICS, GRAMS, INPUTS = "statistics", "grams", "inputs"


def note(module: nn.Module, collection: str, **sums: Callable[[], jax.Array]) -> None:
    """Adds to what `statistics` gives of a collection, where it asks for that."""
    if module.is_mutable_collection(collection):
        for name, value in sums.items():
            module.sow(collection, name, value(), jnp.add, lambda: jnp.zeros(()))


def moments(x: jax.Array) -> dict[str, Callable[[], jax.Array]]:
    """Sum and sum of squares over rows and tokens, float32, of [B, T, ...]."""
    return {
        "sum": lambda: x.astype(jnp.float32).sum((0, 1)),
        "square": lambda: jnp.square(x.astype(jnp.float32)).sum((0, 1)),
    }


def gram(x_BTD: jax.Array) -> Callable[[], jax.Array]:
    """Sum over rows and tokens of x x^T, each x scaled to a mean square of 1; float32 [D, D]."""

    def value() -> jax.Array:
        y = x_BTD.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.maximum(jnp.mean(y * y, -1, keepdims=True), 1e-30))
        return jnp.einsum("BTD,BTE->DE", y, y, precision=jax.lax.Precision.HIGHEST)

    return value


def products(x: jax.Array) -> Callable[[], jax.Array]:
    """Sum over rows and tokens of x x^T, float32 [X, X] where x is [B, T, ...] of X numbers."""

    def value() -> jax.Array:
        x_BTX = x.astype(jnp.float32).reshape(*x.shape[:2], -1)
        return jnp.einsum("BTX,BTY->XY", x_BTX, x_BTX, precision=jax.lax.Precision.HIGHEST)

    return value


def movement(x_BTD: jax.Array, y_BTD: jax.Array) -> dict[str, Callable[[], jax.Array]]:
    """Sums over tokens: of the cosine between what enters and leaves a block, and of the distance."""
    x, y = x_BTD.astype(jnp.float32), y_BTD.astype(jnp.float32)

    def cosine() -> jax.Array:
        norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1)
        return (jnp.sum(x * y, axis=-1) / jnp.maximum(norms, 1e-30)).sum()

    return {"cosine": cosine, "distance": lambda: jnp.linalg.norm(y - x, axis=-1).sum()}
