r"""Continues prompts with a checkpoint's network.

    python -m mobilellm_jax.generate --checkpoint=runs/smoke --prompt="def main("

Text streams out as it is made. The same checkpoint, prompt, seed and settings give the same text.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from mobilellm_jax import cli
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.transformer import Cache, Params
from mobilellm_jax.training.checkpoint import load_model


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits."""

    temperature: float = 0.8  # 0: always the most likely token
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the fewest tokens that hold this share of the probability; 1: all

    def __post_init__(self) -> None:
        """Raises `UserError` for values that describe no distribution."""
        if self.temperature < 0:
            raise UserError(f"--temperature={self.temperature} must not be negative.")
        if self.top_k < 0:
            raise UserError(f"--top_k={self.top_k} must not be negative; 0 keeps all tokens.")
        if not 0 < self.top_p <= 1:
            raise UserError(
                f"--top_p={self.top_p} must be above 0 and at most 1; 1 keeps all tokens."
            )


def filtered(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits at a temperature above 0, -inf where a token may not be drawn; float32 [B, V] to [B, V].

    Temperature first, then top-k, then top-p (nucleus, arXiv 1904.09751) on what is left, as in Hugging Face.
    """
    logits_BV = logits_BV / sampling.temperature
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, sampling.top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    if sampling.top_p < 1:
        sorted_BV = -jnp.sort(-logits_BV, axis=-1)
        share_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # A token stays if those before it fall short of the share.
        before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV
        least_B1 = jnp.where(before_BV < sampling.top_p, sorted_BV, jnp.inf).min(-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return logits_BV


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token per row, int32 [B].

    Args:
      logits_BV: float32.
      keys_B: one random key per row.
      sampling: static.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys_B, filtered(logits_BV, sampling)).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="cache")
def _advance(
    params: Params,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    start: jax.Array,
    cache: Cache,
    seed: jax.Array,
    *,
    model: ModelConfig,
    sampling: Sampling,
) -> tuple[jax.Array, Cache]:
    """Reads tokens that stand at `start + 0..T-1` of each row and draws the one after `lengths_B` of them."""
    rows, length = tokens_BT.shape
    positions_BT = start[:, None] + jnp.arange(length)
    hidden_BTD, cache = transformer.apply_cached(params, model, tokens_BT, positions_BT, cache)
    last_BD = hidden_BTD[jnp.arange(rows), lengths_B - 1]
    logits_BV = transformer.logits(params, model, last_BD[:, None])[:, 0]
    # A row's randomness depends on the seed, its number and its position, not on its neighbours.
    key = jax.random.key(seed)
    fold = jax.vmap(
        lambda row, position: jax.random.fold_in(jax.random.fold_in(key, row), position)
    )
    keys_B = fold(jnp.arange(rows), start + lengths_B)
    return sample(logits_BV, keys_B, sampling), cache


def stream(
    params: Params,
    model: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
) -> Iterator[np.ndarray]:
    """Draws tokens for all prompts at once, int32 [B] at a time.

    Args:
      params: as trained.
      model: their network.
      prompts: token ids, each at least one (BOS).
      max_new_tokens: tokens drawn per prompt.
      sampling: how.
      seed: of the draws.

    Raises:
      UserError: prompt and continuation exceed the network's context.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    needed = int(lengths.max()) + max_new_tokens
    if needed > model.max_length:
        raise UserError(
            f"the prompt's {lengths.max()} tokens and {max_new_tokens} new ones exceed the network's "
            f"context of {model.max_length}: shorten the prompt or lower --max_new_tokens."
        )
    # Powers of two, so that few programs are compiled.
    width, slots = (1 << (int(n) - 1).bit_length() for n in (lengths.max(), needed))
    tokens_BT = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt

    advance = functools.partial(
        _advance, params, seed=np.uint32(seed), model=model, sampling=sampling
    )

    # The checks above are made when this is called, not when the first token is asked for.
    def draws(tokens_BT: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
        cache = transformer.empty_cache(model, len(prompts), slots)
        start = np.zeros_like(lengths)
        for _ in range(max_new_tokens):
            drawn_B, cache = advance(tokens_BT, lengths, start, cache)
            tokens_B = np.asarray(drawn_B)
            yield tokens_B
            start, lengths, tokens_BT = start + lengths, np.ones_like(lengths), tokens_B[:, None]

    return draws(tokens_BT, lengths)


def generate(
    params: Params,
    model: ModelConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> list[str]:
    """The continuation of each prompt, up to the end of its document or `max_new_tokens`.

    Raises:
      UserError: see `stream`.
    """
    ids = [[tokenizer.bos_id, *tokenizer.encode(prompt)] for prompt in prompts]
    drawn: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for tokens_B in stream(params, model, ids, max_new_tokens, sampling, seed):
        for row in tuple(open_rows):
            if tokens_B[row] in (tokenizer.eos_id, tokenizer.bos_id):
                open_rows.discard(row)
            else:
                drawn[row].append(int(tokens_B[row]))
        if not open_rows:
            break
    return ["".join(whole_characters(tokenizer, *pair)) for pair in zip(ids, drawn, strict=True)]


def whole_characters(
    tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int]
) -> Iterator[str]:
    """The text of tokens as they come, never half a character.

    It is what they add to the prompt's text: a first piece's leading space may depend on what is before it.
    """
    ids = list(prompt)
    shown = len(tokenizer.decode(ids))
    text = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else a character is still incomplete
            yield text[shown:]
            shown = len(text)
    yield text[shown:]


def main() -> None:
    """Streams one continuation to standard output."""
    args = flags.FLAGS
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    loaded = load_model(args.checkpoint)
    tokenizer = loaded.tokenizer
    prompt = [tokenizer.bos_id, *tokenizer.encode(args.prompt)]
    draws = stream(loaded.params, loaded.model, [prompt], args.max_new_tokens, sampling, args.seed)
    ends = (tokenizer.eos_id, tokenizer.bos_id)
    tokens = itertools.takewhile(lambda token: token not in ends, (int(row[0]) for row in draws))
    print(args.prompt, end="", flush=True)
    for text in whole_characters(tokenizer, prompt, tokens):
        print(text, end="", flush=True)
    print()


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "A workdir or a checkpoint.", required=True)
    flags.DEFINE_string("prompt", "", "Text to continue; empty: a document from its beginning.")
    flags.DEFINE_integer("max_new_tokens", 128, "Most tokens to draw.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token every time.")
    flags.DEFINE_integer("top_k", 0, "Keep the k most likely tokens; 0 keeps all.")
    flags.DEFINE_float("top_p", 0.95, "Keep the fewest tokens that hold this share; 1 keeps all.")
    flags.DEFINE_integer("seed", 0, "Seed of the draws.", lower_bound=0)
    cli.run(main)
