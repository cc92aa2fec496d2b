"""Who answers in conversations: a checkpoint of ours, or a model on a server."""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from mobilellm_jax.data.chat import ConversationEncoder
from mobilellm_jax.decoding.decoder import to_draw
from mobilellm_jax.decoding.sampling import Sampling
from mobilellm_jax.decoding.text import continued
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.endpoint import Cache, Completion, Endpoint, Message, complete_all
from mobilellm_jax.leaves import flat
from mobilellm_jax.training.checkpoint import LoadedModel

# The next message of the assistant in each of several conversations, in order.
Answer = Callable[[Sequence[Sequence[Message]]], list[str]]


def of_checkpoint(
    loaded: LoadedModel,
    sampling: Sampling = Sampling(),
    max_new_tokens: int = 512,
    seed: int = 0,
    rows: int = 16,
    dtype: str = "float32",
    cache: epath.PathLike | None = None,
    mesh: Mesh | None = None,
) -> Answer:
    """Answers of a network, through its tokenizer's chat template.

    What is drawn for a conversation depends on it and the seed: neither its place nor its neighbours
    matter. Where the context is full, the oldest turns are dropped, as in `generate --chat`.

    Args:
      loaded: the network and its tokenizer.
      sampling: how tokens are drawn.
      max_new_tokens: the longest answer.
      seed: of the draws.
      rows: conversations that a device answers together.
      dtype: of weights and activations.
      cache: a file to which the answers of each batch are added, and in which those of an earlier
        run are found: same weights, same prompt, same settings.
      mesh: devices that share the conversations; the first one alone if None.

    Returns:
      the answerer, which raises `UserError` for a last message that alone exceeds the context, and
      for a conversation that the template refuses, before anything is drawn.

    Raises:
      UserError: the tokenizer has no chat template, or `max_new_tokens` fill the context.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    room = model.max_length - max_new_tokens
    if room < 1:
        raise UserError(
            f"--max_new_tokens={max_new_tokens} leave no room for a question in the network's context "
            f"of {model.max_length}: lower them."
        )
    encoder = ConversationEncoder(tokenizer)
    decoder = to_draw(loaded.params, model, dtype, mesh)
    together = rows * decoder.mesh.size
    known = Cache(cache)
    settings = [
        _checksum(loaded.params) if cache else 0,
        repr(model),
        dataclasses.astuple(sampling),
        max_new_tokens,
        dtype,
    ]

    def answer(conversations: Sequence[Sequence[Message]]) -> list[str]:
        prompts = [_prompt(encoder, messages, room, model.max_length) for messages in conversations]
        seeds = [_seed(seed, messages) for messages in conversations]
        keys = [_digest([settings, *asked]).hex() for asked in zip(prompts, seeds, strict=True)]
        missing = [number for number, key in enumerate(keys) if key not in known.known]
        missing.sort(key=lambda number: -len(prompts[number]))
        done = len(keys) - len(missing)
        with tqdm(total=len(keys), initial=done, desc="answers", delay=2) as bar:
            for at in range(0, len(missing), together):
                batch = missing[at : at + together]
                texts = continued(
                    decoder,
                    tokenizer,
                    [prompts[number] for number in batch],
                    max_new_tokens,
                    sampling,
                    [seeds[number] for number in batch],
                    ends=encoder.special,
                )
                for number, text in zip(batch, texts, strict=True):
                    finish = "stop" if text.ended else "length"
                    known.add(keys[number], Completion(text.whole(), finish))
                bar.update(len(batch))
        return [known.known[key].text for key in keys]

    return answer


def of_server(endpoint: Endpoint, cache: epath.PathLike | None = None, **options: Any) -> Answer:
    """Answers of a model on a server.

    Args:
      endpoint: the server and the model's name there.
      cache: see `complete_all`.
      **options: see `complete`.

    Returns:
      the answerer, which raises `UserError` where the server fails.
    """

    def answer(conversations: Sequence[Sequence[Message]]) -> list[str]:
        told = complete_all(endpoint, conversations, cache=cache, **options)
        return [completion.text for completion in told]

    return answer


def server_options(sampling: Sampling, max_new_tokens: int, seed: int) -> dict[str, Any]:
    """What tells a server how to draw; what only some servers know is left out where it is off."""
    options = {"temperature": sampling.temperature, "max_tokens": max_new_tokens, "seed": seed}
    filters = {"top_p": sampling.top_p < 1, "top_k": sampling.top_k > 0}
    return {**options, **{name: getattr(sampling, name) for name, on in filters.items() if on}}


def _prompt(
    encoder: ConversationEncoder, messages: Sequence[Message], room: int, length: int
) -> list[int]:
    ids, _ = encoder.fitting(messages, room)
    if len(ids) > room:
        raise UserError(
            f"the message {messages[-1]['content'][:60]!r} makes a prompt of {len(ids):,} tokens, and the "
            f"network's context of {length:,} has {room:,} for it: lower --max_new_tokens, or leave "
            "the message out."
        )
    return ids


def _seed(seed: int, messages: Sequence[Message]) -> int:
    said = [[message["role"], message["content"]] for message in messages]
    return int.from_bytes(_digest([seed, said])[:4])


def _digest(values: Any) -> bytes:
    return hashlib.sha256(json.dumps(values).encode()).digest()


def _checksum(params: Any) -> int:
    """Of all weights, so that a cache never answers for another network."""
    value = 0
    for _, leaf in sorted(flat(params).items()):
        value = zlib.crc32(np.asarray(leaf).tobytes(), value)
    return value
