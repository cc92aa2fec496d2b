"""Tokens from a network with a KV cache: prompts are read at once, then a few tokens per program call.

Prompts are padded on the left, so all rows write the same slot of the cache. Lengths are rounded up
to a few sizes, and the cache grows as the text does, so that few programs are compiled and little is
read that is empty; where it grows, rows whose text has ended are left out.

Every device holds the network whole and draws its own rows: nothing crosses devices for a token.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mobilellm_jax.decoding.sampling import Sampling, sample
from mobilellm_jax.errors import UserError
from mobilellm_jax.model import transformer
from mobilellm_jax.model.attention import choose
from mobilellm_jax.model.cache import Cache, cache_of, empty_cache
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.padding import joined
from mobilellm_jax.model.transformer import Execution, Params
from mobilellm_jax.parallel.mesh import one_device
from mobilellm_jax.parallel.sharding import ROWS, WHOLE, gathered, on_each_device

SLOTS = 128  # of a cache, at least
CHUNK = 16  # tokens drawn by one call of a program


@dataclasses.dataclass(frozen=True)
class Placed:
    """A network on devices that each have it whole, in the dtype of its products."""

    params: Params
    model: ModelConfig
    execution: Execution
    mesh: Mesh


def to_draw(
    params: Params, model: ModelConfig, dtype: str = "float32", mesh: Mesh | None = None
) -> Placed:
    """Prepares a network, once, for all that is drawn from it: every weight by itself.

    Args:
      params: as trained, float32.
      model: their network.
      dtype: of activations, of the cache, and of the matrices; norm scales stay in float32.
      mesh: devices that share the rows; the first one alone if None.
    """
    mesh = mesh or one_device()
    # Before weights are un-stacked, or a block that is shared would be cast for each application.
    flat, single = transformer.unstacked(whole(params, dtype, mesh), model)
    return Placed(flat, single, execution_on(mesh, model, dtype), mesh)


def to_read(
    params: Params, model: ModelConfig, dtype: str = "float32", mesh: Mesh | None = None
) -> Placed:
    """Prepares a network, once, for texts of many lengths: in as few stacks as can be.

    Args:
      params: as trained, float32.
      model: their network.
      dtype: of activations and of the matrices; norm scales stay in float32.
      mesh: devices that share the texts; the first one alone if None.
    """
    mesh = mesh or one_device()
    params, model = joined(params, model)
    return Placed(whole(params, dtype, mesh), model, execution_on(mesh, model, dtype), mesh)


def whole(params: Params, dtype: str, mesh: Mesh) -> Params:
    """A network's weights, all on every device, matrices in the dtype of their products."""
    cast = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if path[-1].key == "scale" else leaf.astype(dtype), params
    )
    return jax.device_put(cast, NamedSharding(mesh, WHOLE))


def execution_on(mesh: Mesh, model: ModelConfig, dtype: str) -> Execution:
    """How a network is run on the devices of a mesh."""
    platform = mesh.devices.flat[0].platform
    return Execution(dtype, attention=choose("auto", platform, model, dtype, model.max_length))


def bucket(length: int, least: int = 16) -> int:
    """The size that a length is rounded up to: four to every doubling."""
    step = max(least, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


@on_each_device(in_specs=(WHOLE, ROWS, ROWS, ROWS), out_specs=(WHOLE, ROWS))
def _read(
    params: Params,
    tokens_BT: jax.Array,
    begin_B: jax.Array,
    seeds_B: jax.Array,
    *,
    model: ModelConfig,
    execution: Execution,
    sampling: Sampling,
    slots: int,
) -> tuple[jax.Array, Cache]:
    """Reads prompts, padded on the left, into a cache and draws the first token of each."""
    cache = empty_cache(model, len(tokens_BT), slots, execution.dtype)
    hidden_BTD, cache = transformer.apply_cached(
        params, model, tokens_BT, cache, begin_B, execution=execution
    )
    logits_BV = transformer.logits(params, model, hidden_BTD[:, -1:])[:, 0]
    keys_B = _keys(seeds_B, tokens_BT.shape[1] - begin_B)
    return gathered(sample(logits_BV, keys_B, sampling)), cache


@on_each_device(
    in_specs=(WHOLE, ROWS, ROWS, WHOLE, ROWS, ROWS), out_specs=(WHOLE, ROWS), donate=(4,)
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
    return gathered(drawn_TB, axis=1), cache


def _keys(seeds_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """A row's randomness depends on its seed and its position, not on its neighbours."""
    return jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(
        seeds_B, positions_B
    )


@on_each_device(in_specs=(ROWS, ROWS), out_specs=ROWS)
def _grown(cache: Cache, kept_B: jax.Array, *, rows: int, slots: int) -> Cache:
    """A larger cache, of some of each device's `rows` rows."""
    return jax.tree.map(
        lambda leaf: jnp.pad(leaf, ((0, 0), (0, slots - leaf.shape[1]), (0, 0))),
        cache_of(cache, rows, kept_B),
    )


def row_seeds(seed: int, rows: int) -> np.ndarray:
    """Seeds of the rows of a batch, uint32; those of the first rows are the same in a larger batch."""
    return np.random.SeedSequence(seed).generate_state(rows)


def check_room(
    decoder: Placed, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int]
) -> None:
    """Raises `UserError` where a prompt and as many new tokens exceed the network's context."""
    for prompt, limit in zip(prompts, max_new_tokens, strict=True):
        if len(prompt) + limit > decoder.model.max_length:
            raise UserError(
                f"the prompt's {len(prompt)} tokens and {limit} new ones exceed the network's "
                f"context of {decoder.model.max_length}: shorten the prompt or lower --max_new_tokens."
            )


def stream(
    decoder: Placed,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    sampling: Sampling,
    seeds: Sequence[int] | np.ndarray,
    chunk: int = CHUNK,
    ended: Callable[[], Sequence[bool]] | None = None,
) -> Iterator[np.ndarray]:
    """Draws tokens for all prompts at once, int32 [B] at a time.

    Args:
      decoder: the network.
      prompts: token ids, each at least one (BOS).
      max_new_tokens: tokens drawn per prompt; where each has a number of its own, as many come for all
        as for the one with most, and what is beyond its own may be anything.
      sampling: how.
      seeds: of the draws, one for each prompt; see `row_seeds`.
      chunk: tokens that one call of the program draws before any of them is seen here.
      ended: says of each prompt whether what is drawn for it from now on is of no use; it may then
        be anything.

    Raises:
      UserError: prompt and continuation exceed the network's context.
    """
    limits = np.broadcast_to(max_new_tokens, len(prompts)).tolist()
    check_room(decoder, prompts, limits)
    most = max(limits)
    width, devices = bucket(max(map(len, prompts))), decoder.mesh.size
    # The prompt of each row: devices have equally many.
    rows_B = np.resize(np.arange(len(prompts)), -(-len(prompts) // devices) * devices)
    tokens_BT = np.zeros((len(rows_B), width), np.int32)
    for row, number in zip(tokens_BT, rows_B.tolist(), strict=True):
        row[width - len(prompts[number]) :] = prompts[number]
    begin_N = width - np.array([len(prompt) for prompt in prompts], np.int32)
    seeds_N = np.asarray(seeds, np.uint32)
    how = {
        "model": decoder.model,
        "execution": decoder.execution,
        "mesh": decoder.mesh,
        "sampling": sampling,
    }

    # The checks above are made when this is called, not when the first token is asked for.
    def draws(rows_B: np.ndarray) -> Iterator[np.ndarray]:
        slots = max(SLOTS, 1 << width.bit_length())
        first = begin_N[rows_B], seeds_N[rows_B]
        tokens_B, cache = _read(decoder.params, tokens_BT, *first, slots=slots, **how)
        last_B = np.asarray(tokens_B)
        yield last_B[: len(prompts)]
        for slot in range(width, width + most - 1, chunk):
            if slot + chunk > slots:
                while slot + chunk > slots:
                    slots *= 2
                kept_B, own_B = _going(rows_B, ended() if ended else (), devices)
                rows = len(rows_B) // devices
                cache = _grown(cache, own_B, mesh=decoder.mesh, rows=rows, slots=slots)
                rows_B, last_B = rows_B[kept_B], last_B[kept_B]
            drawn_TB, cache = _draw(
                decoder.params,
                last_B,
                begin_N[rows_B],
                np.int32(slot),
                cache,
                seeds_N[rows_B],
                count=chunk,
                **how,
            )
            drawn = np.asarray(drawn_TB)
            last_B = drawn[-1]
            for tokens in drawn[: width + most - 1 - slot]:
                shown_N = np.zeros(len(prompts), np.int32)
                shown_N[rows_B] = tokens
                yield shown_N

    return draws(rows_B)


def _going(
    rows_B: np.ndarray, ended: Sequence[bool], devices: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows to go on with, and their numbers among their device's.

    Each device keeps a power of two of its rows, or all: so that few programs are compiled.
    """
    over = np.array([bool(len(ended) and ended[row]) for row in rows_B]).reshape(devices, -1)
    going = max(1, int((~over).sum(1).max()))
    count = min(over.shape[1], 1 << (going - 1).bit_length())
    own = np.sort(np.argsort(over, axis=1, kind="stable")[:, :count])
    kept = own + over.shape[1] * np.arange(devices)[:, None]
    return kept.ravel(), own.ravel()
