"""How the next token is drawn from the logits."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from mobilellm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits."""

    temperature: float = 0.8  # 0: always the most likely token
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the fewest tokens that hold this share of the probability; 1: all

    def __post_init__(self) -> None:
        """Raises `UserError` for values that describe no distribution."""
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"--temperature={self.temperature} must be a number that is not negative."
            )
        if self.top_k < 0:
            raise UserError(f"--top_k={self.top_k} must not be negative; 0 keeps all tokens.")
        if not 0 < self.top_p <= 1:
            raise UserError(
                f"--top_p={self.top_p} must be above 0 and at most 1; 1 keeps all tokens."
            )


GREEDY = Sampling(temperature=0)


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
