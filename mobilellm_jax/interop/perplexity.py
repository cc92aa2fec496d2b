"""The perplexity of a text, by which the two readings of an official MobileLLM-LS are told apart."""

import functools
from typing import Any

import jax
import numpy as np

from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.loss import summed_loss


def perplexity(
    params: Any, model: ModelConfig, tokenizer: Tokenizer, text: str, window: int
) -> float:
    """exp(mean loss) of a text cut into windows that do not overlap, as MobileLLM measured it.

    The text gets one BOS; every window begins anew and predicts all of its tokens but the first;
    tokens after the last whole window are left out.

    Args:
      params: weights.
      model: their network.
      tokenizer: theirs.
      text: at least a window long.
      window: tokens, at most the network's context; MobileLLM's is 2048.

    Raises:
      UserError: the text is shorter than a window.
    """
    tokens = [tokenizer.bos_id, *tokenizer.encode(text)]
    count = len(tokens) // window
    if not count:
        raise UserError(
            f"the text has {len(tokens):,} tokens, fewer than a window of {window:,}: give a "
            "longer one."
        )
    windows = np.asarray(tokens[: count * window], np.int32).reshape(count, 1, window)
    return float(np.exp(np.mean([_mean_loss(params, w, model=model) for w in windows])))


@functools.partial(jax.jit, static_argnames="model")
def _mean_loss(params: Any, tokens_BT: jax.Array, *, model: ModelConfig) -> jax.Array:
    hidden_BTD = transformer.apply(params, model, tokens_BT[:, :-1])
    unembedding_DV = transformer.unembedding(params, model)
    targets_BT = tokens_BT[:, 1:]
    weight_BT = jax.numpy.ones(targets_BT.shape)
    return summed_loss(hidden_BTD, unembedding_DV, targets_BT, weight_BT)[1].mean()
