"""Log-likelihoods of continuations, with each context read once however many continuations it has.

A context is read into a KV cache; every one of its continuations starts from a copy of it. Logits are
formed for the tokens of continuations alone, a few at a time. Every device holds the network whole and
has a batch of its own.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mobilellm_jax.decoding.decoder import Placed, bucket
from mobilellm_jax.errors import UserError
from mobilellm_jax.model import transformer
from mobilellm_jax.model.cache import cache_of, empty_cache
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.transformer import Execution, Params
from mobilellm_jax.parallel.sharding import ROWS, WHOLE, gathered, on_each_device

TOKENS = 4096  # of continuations in a batch, padding included
AT_ONCE = 16  # tokens of each row whose logits exist at once
LEAST = 4  # tokens of a continuation, padding included


@dataclasses.dataclass(frozen=True)
class Request:
    """A continuation to score."""

    context: tuple[int, ...]  # at least one token
    continuation: tuple[int, ...]  # likewise


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """What a network makes of a continuation."""

    log_likelihood: float  # natural logarithm, summed over its tokens
    greedy: bool  # whether each of its tokens is the most likely one


def fitted(request: Request, max_length: int) -> Request:
    """The request without what lies too far back: as the harness does, from the left.

    Raises:
      UserError: the continuation alone is longer than the network's context.
    """
    if len(request.continuation) > max_length:
        raise UserError(
            f"a continuation of {len(request.continuation):,} tokens exceeds the network's context of "
            f"{max_length:,}: leave its question out."
        )
    kept = max_length + 1 - len(request.continuation)  # the last token is only a target
    return dataclasses.replace(request, context=request.context[-kept:])


def score(
    network: Placed,
    requests: Sequence[Request],
    rows: int = 32,
    told: Callable[[int], None] = lambda count: None,
) -> Iterator[tuple[int, Likelihood]]:
    """Scores requests, longest first; devices share them.

    Args:
      network: see `decoding.decoder.to_read`.
      requests: see `fitted`.
      rows: continuations in a batch of a device, at most.
      told: is called with the number of requests that are done after each batch.

    Yields:
      number of a request and its likelihood.
    """
    devices = network.mesh.size
    for several in _together(_batches(requests, rows), devices):
        arrays, where = _padded(several, devices)
        found = _score(
            network.params,
            *arrays,
            model=network.model,
            execution=network.execution,
            mesh=network.mesh,
        )
        sums_R, greedy_R = map(np.asarray, found)
        for r, numbers in where.items():
            for number in numbers:
                yield number, Likelihood(float(sums_R[r]), bool(greedy_R[r]))
        told(sum(map(len, where.values())))


Group = tuple[tuple[int, ...], dict[tuple[int, ...], list[int]]]  # context; continuations, requests


def _batches(requests: Sequence[Request], rows: int) -> Iterator[list[Group]]:
    """Contexts of about one length with their continuations, equal ones once."""
    contexts: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for number, request in enumerate(requests):
        group = contexts.setdefault(request.context, {})
        group.setdefault(request.continuation, []).append(number)
    pieces: list[Group] = []
    for context, group in contexts.items():
        items = sorted(group.items(), key=lambda item: -len(item[0]))
        most = max(1, min(rows, TOKENS // _tail(items[0][0])))
        pieces += [(context, dict(items[i : i + most])) for i in range(0, len(items), most)]

    def size(group: Group) -> tuple[int, int]:
        return bucket(len(group[0])), max(map(_tail, group[1]))

    pieces.sort(key=lambda piece: (size(piece), piece[0]), reverse=True)
    batch: list[Group] = []
    for piece in pieces:
        held, longest = _size([[*batch, piece]])
        if batch and (held > rows or held * longest > TOKENS):
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def _together(batches: Iterator[list[Group]], devices: int) -> Iterator[list[list[Group]]]:
    """A batch for each device, as far as the shape they are filled up to is no more than one may be."""
    several: list[list[Group]] = []
    for batch in batches:
        rows, tail = _size([*several, batch])
        if several and (len(several) == devices or (rows > 1 and rows * tail > TOKENS)):
            yield several
            several = []
        several.append(batch)
    if several:
        yield several


def _size(batches: Sequence[Sequence[Group]]) -> tuple[int, int]:
    """The most rows, and the most tokens of a continuation, of any of the batches."""
    rows = max(sum(len(group) for _, group in batch) for batch in batches)
    return rows, max(_tail(c) for batch in batches for _, group in batch for c in group)


def _tail(continuation: Sequence[int]) -> int:
    return bucket(len(continuation), LEAST)


def _padded(
    batches: Sequence[Sequence[Group]], devices: int
) -> tuple[tuple[np.ndarray, ...], dict[int, list[int]]]:
    """Arrays of batches, a device's after another's, and the requests of each row.

    Contexts end, and continuations begin, together. The last token of a context is the first that a
    continuation reads.
    """
    parts = [
        [
            (g, context, c, numbers)
            for g, (context, group) in enumerate(b)
            for c, numbers in group.items()
        ]
        for b in batches
    ]
    everything = [row for part in parts for row in part]
    longest = max(len(context) - 1 for _, context, _, _ in everything)
    width = bucket(longest) if longest else 0
    most, tail = _size(batches)
    rows = 1 << (most - 1).bit_length()  # of a device, as its groups
    groups = 1 << (max(map(len, batches)) - 1).bit_length()
    prefix_GT = np.zeros((devices * groups, width), np.int32)
    begin_G = np.full(devices * groups, max(width - 1, 0), np.int32)
    group_R = np.zeros(devices * rows, np.int32)  # among those of the device
    tokens_RT = np.zeros((devices * rows, tail), np.int32)
    targets_RT = np.full((devices * rows, tail), -1, np.int32)
    where = {}
    for device, part in enumerate(parts):
        for r, (group, context, continuation, numbers) in enumerate(part, device * rows):
            g = device * groups + group
            begin_G[g] = width - len(context) + 1
            prefix_GT[g, begin_G[g] :] = context[:-1]
            group_R[r] = group
            tokens_RT[r, : len(continuation)] = [context[-1], *continuation[:-1]]
            targets_RT[r, : len(continuation)] = continuation
            where[r] = numbers
    return (prefix_GT, begin_G, group_R, tokens_RT, targets_RT), where


@on_each_device(in_specs=(WHOLE, ROWS, ROWS, ROWS, ROWS, ROWS), out_specs=WHOLE)
def _score(
    params: Params,
    prefix_GT: jax.Array,
    begin_G: jax.Array,
    group_R: jax.Array,
    tokens_RT: jax.Array,
    targets_RT: jax.Array,
    *,
    model: ModelConfig,
    execution: Execution,
) -> tuple[jax.Array, jax.Array]:
    """Sum of the targets' log-likelihoods and whether each is the most likely token, [R] each."""
    (groups, width), (rows, tail) = prefix_GT.shape, tokens_RT.shape
    if width:
        cache = empty_cache(model, groups, width + tail, execution.dtype)
        _, cache = transformer.apply_cached(
            params, model, prefix_GT, cache, begin_G, execution=execution
        )
        cache = cache_of(cache, groups, group_R)
        hidden_RTD, _ = transformer.apply_cached(
            params, model, tokens_RT, cache, begin_G[group_R], jnp.int32(width), execution
        )
    else:
        hidden_RTD = transformer.apply(params, model, tokens_RT, execution=execution)

    def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_RtD, targets_Rt = chunk
        logits_RtV = transformer.logits(params, model, hidden_RtD)
        asked_Rt = jnp.maximum(targets_Rt, 0)
        chosen_Rt = jnp.take_along_axis(logits_RtV, asked_Rt[..., None], axis=-1)[..., 0]
        likelihood_Rt = chosen_Rt - jax.nn.logsumexp(logits_RtV, axis=-1)
        return likelihood_Rt, logits_RtV.argmax(-1) == targets_Rt

    def cut(x: Any) -> Any:
        return jnp.moveaxis(x.reshape(rows, -1, math.gcd(tail, AT_ONCE), *x.shape[2:]), 1, 0)

    likelihood_CRt, greedy_CRt = jax.lax.map(of_chunk, (cut(hidden_RTD), cut(targets_RT)))
    counts_CRt = cut(targets_RT) >= 0
    sums_R = jnp.where(counts_CRt, likelihood_CRt, 0.0).sum((0, 2))
    return gathered(sums_R), gathered((greedy_CRt | ~counts_CRt).all((0, 2)))
