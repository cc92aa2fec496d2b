"""Tokens from a network with a KV cache: prompts are read at once, then a few tokens per program call.

Prompts are padded on the left, so all rows write the same slot of the cache. Lengths are rounded up
to a few sizes, and the cache grows as the text does, so that few programs are compiled and little is
read that is empty.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mobilellm_jax.decoding.sampling import Sampling, sample
from mobilellm_jax.errors import UserError
from mobilellm_jax.model import transformer
from mobilellm_jax.model.attention import choose
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.transformer import Cache, Execution, Params

SLOTS = 128  # of a cache, at least
CHUNK = 16  # tokens drawn by one call of a program


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A network made ready to draw tokens: every weight by itself, in the dtype of its products."""

    params: Params
    model: ModelConfig
    execution: Execution


def ready(params: Params, model: ModelConfig, dtype: str = "float32") -> Decoder:
    """Prepares a network, once, for all that is drawn from it.

    Args:
      params: as trained, float32.
      model: their network.
      dtype: of activations, of the cache, and of the matrices; norm scales stay in float32.
    """
    # Before weights are un-stacked, or a block that is shared would be cast for each application.
    cast = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if path[-1].key == "scale" else leaf.astype(dtype), params
    )
    flat, single = transformer.unstacked(cast, model)
    return Decoder(flat, single, execution_here(model, dtype))


def execution_here(model: ModelConfig, dtype: str) -> Execution:
    """How a network is run on this machine's devices."""
    kernel = choose("auto", jax.devices()[0].platform, model, dtype, model.max_length)
    return Execution(dtype, attention=kernel)


def bucket(length: int, least: int = 16) -> int:
    """The size that a length is rounded up to: four to every doubling."""
    step = max(least, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


@functools.partial(
    jax.jit, static_argnames=("model", "execution", "sampling"), donate_argnames="cache"
)
def _read(
    params: Params,
    tokens_BT: jax.Array,
    begin_B: jax.Array,
    cache: Cache,
    seeds_B: jax.Array,
    *,
    model: ModelConfig,
    execution: Execution,
    sampling: Sampling,
) -> tuple[jax.Array, Cache]:
    """Reads prompts, padded on the left, into an empty cache and draws the first token of each."""
    hidden_BTD, cache = transformer.apply_cached(
        params, model, tokens_BT, cache, begin_B, execution=execution
    )
    logits_BV = transformer.logits(params, model, hidden_BTD[:, -1:])[:, 0]
    keys_B = _keys(seeds_B, tokens_BT.shape[1] - begin_B)
    return sample(logits_BV, keys_B, sampling), cache


@functools.partial(
    jax.jit, static_argnames=("model", "execution", "sampling", "count"), donate_argnames="cache"
)
def _draw(
    params: Params,
    tokens_B: jax.Array,
    begin_B: jax.Array,
    slot: jax.Array,
    cache: Cache,
    seeds_B: jax.Array,
    *,
    model: ModelConfig,
    execution: Execution,
    sampling: Sampling,
    count: int,
) -> tuple[jax.Array, Cache]:
    """Draws `count` tokens after one that comes into `slot`, int32 [T, B]."""

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        tokens_B, slot, cache = carry
        hidden_BTD, cache = transformer.apply_cached(
            params, model, tokens_B[:, None], cache, begin_B, slot, execution
        )
        logits_BV = transformer.logits(params, model, hidden_BTD)[:, 0]
        tokens_B = sample(logits_BV, _keys(seeds_B, slot + 1 - begin_B), sampling)
        return (tokens_B, slot + 1, cache), tokens_B

    (_, _, cache), drawn_TB = jax.lax.scan(step, (tokens_B, slot, cache), length=count)
    return drawn_TB, cache


def _keys(seeds_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """A row's randomness depends on its seed and its position, not on its neighbours."""
    return jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(
        seeds_B, positions_B
    )


@functools.partial(jax.jit, static_argnames="slots")
def _grown(cache: Cache, *, slots: int) -> Cache:
    return jax.tree.map(
        lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, slots - x.shape[2]), (0, 0))), cache
    )


def row_seeds(seed: int, rows: int) -> np.ndarray:
    """Seeds of the rows of a batch, uint32; those of the first rows are the same in a larger batch."""
    return np.random.SeedSequence(seed).generate_state(rows)


def stream(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seeds: Sequence[int] | np.ndarray,
    chunk: int = CHUNK,
) -> Iterator[np.ndarray]:
    """Draws tokens for all prompts at once, int32 [B] at a time.

    Args:
      decoder: the network.
      prompts: token ids, each at least one (BOS).
      max_new_tokens: tokens drawn per prompt.
      sampling: how.
      seeds: of the draws, one for each prompt; see `row_seeds`.
      chunk: tokens that one call of the program draws before any of them is seen here.

    Raises:
      UserError: prompt and continuation exceed the network's context.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if int(lengths.max()) + max_new_tokens > decoder.model.max_length:
        raise UserError(
            f"the prompt's {lengths.max()} tokens and {max_new_tokens} new ones exceed the network's "
            f"context of {decoder.model.max_length}: shorten the prompt or lower --max_new_tokens."
        )
    width = bucket(int(lengths.max()))
    tokens_BT = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[width - len(prompt) :] = prompt
    begin_B, seeds_B = width - lengths, np.asarray(seeds, np.uint32)
    how = {"model": decoder.model, "execution": decoder.execution, "sampling": sampling}

    # The checks above are made when this is called, not when the first token is asked for.
    def draws() -> Iterator[np.ndarray]:
        slots = max(SLOTS, 1 << width.bit_length())
        cache = transformer.empty_cache(decoder.model, len(prompts), slots, decoder.execution.dtype)
        tokens_B, cache = _read(decoder.params, tokens_BT, begin_B, cache, seeds_B, **how)
        yield np.asarray(tokens_B)
        for slot in range(width, width + max_new_tokens - 1, chunk):
            if slot + chunk > slots:
                slots *= 2
                cache = _grown(cache, slots=slots)
            drawn_TB, cache = _draw(
                decoder.params,
                tokens_B,
                begin_B,
                np.int32(slot),
                cache,
                seeds_B,
                count=chunk,
                **how,
            )
            tokens_B = drawn_TB[-1]
            yield from np.asarray(drawn_TB)[: width + max_new_tokens - 1 - slot]

    return draws()
