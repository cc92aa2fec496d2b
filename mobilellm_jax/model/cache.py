"""The KV cache: what attention has read of the tokens before, of each application of a block.

Applications of a stack's blocks, their KV heads and the rows are one axis: with an axis more, or one of
length 1, XLA would copy the cache at each step. R stands for the heads and rows of one application.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mobilellm_jax.model.by_heads import heads_outermost
from mobilellm_jax.model.config import ModelConfig, Stack

Cache = dict[str, Any]  # per stack: {"key", "value"}, each [A * R, S, H], in order of execution


def empty_cache(config: ModelConfig, rows: int, length: int, dtype: str = "float32") -> Cache:
    """A KV cache of zeros for `length` tokens a row, padding included.

    Each application of a block has its own part, in order of execution; with `ls_kv="first_pass"`
    those of a block share one.
    """
    per_stack = [
        stack.layers if config.ls_kv == "first_pass" else len(stack.applications)
        for stack in config.stacks
    ]
    return {
        f"stack_{i}": zeros(applications, config, stack, rows, length, dtype)
        for i, (applications, stack) in enumerate(zip(per_stack, config.stacks, strict=True))
    }


def zeros(
    applications: int, config: ModelConfig, stack: Stack, rows: int, length: int, dtype: DTypeLike
) -> Cache:
    """The part of one stack in `empty_cache`, for so many applications of its blocks."""
    shape = (applications * stack.kv_heads * rows, length, config.head_dim)
    return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}


def cache_of(cache: Cache, rows: int, chosen_C: jax.Array) -> Cache:
    """A cache of `rows` rows as one of some of them, in any order, repeated or not."""

    def of(leaf: jax.Array) -> jax.Array:
        by_row = leaf.reshape(-1, rows, *leaf.shape[1:])
        return by_row[:, chosen_C].reshape(-1, *leaf.shape[1:])

    return jax.tree.map(of, cache)


def written(
    leaf: jax.Array, new_BTKH: jax.Array, application: jax.Array | int, slot: jax.Array | int
) -> jax.Array:
    """Keys or values of a stack, with those of new tokens in T slots of an application's part."""
    new_RTH = heads_outermost(new_BTKH).astype(leaf.dtype)
    return jax.lax.dynamic_update_slice(leaf, new_RTH, (application * len(new_RTH), slot, 0))


def kept(leaf: jax.Array, count: int, application: jax.Array | int) -> jax.Array:
    """Keys or values [R, S, H] of an application; R is `count`."""
    return jax.lax.dynamic_slice_in_dim(leaf, application * count, count)
