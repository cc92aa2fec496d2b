"""Numbers of 8 bits in a network of floats: W8A8 as a network in float32 sees it.

What an integer runtime computes is a sum of products of integers, times the scales of a channel and of a
token. The same sum comes out of a network of floats that holds nothing but such integers times their
scales, so here a weight and what enters a product are rounded to what 8 bits can hold, and the rest of
the network stays as it is. Ranges are minimum and maximum (MobileLLM, arXiv 2402.14905, table 15, which
says per token; everything else is left to the reader):

    weights        a scale for each output channel, symmetric: absmax is 127
    activations    a scale and a zero point for each token: min is -128 and max is 127
    embedding      a scale for each token of the vocabulary, symmetric; also as the head's output channels

Gradients pass as if nothing had been rounded (the straight-through estimator, arXiv 1308.3432): a network
that is trained so comes to terms with its rounding.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mobilellm_jax.errors import UserError

W8A8 = "w8a8"
# qwix lets absmax be 127.5, between two integers; where it is one, rounding twice is rounding once.
_SYMMETRIC, _BETWEEN = f"absmax,{127.5 / 127}", "minmax"
PARTS = ("blocks", "head", "embedding")  # whose numbers have 8 bits: matrices of blocks, and so on


def parts_of(quantization: str) -> frozenset[str]:
    """The parts whose numbers have 8 bits: all for `w8a8`, some for `w8a8:blocks+head`, `none`.

    Raises:
      UserError: it names something else.
    """
    if quantization == "none":
        return frozenset()
    kind, _, chosen = quantization.partition(":")
    found = frozenset(chosen.split("+")) if ":" in quantization else frozenset(PARTS)
    if kind != W8A8 or not found <= set(PARTS):
        raise UserError(
            f"quantization={quantization!r} is not none, {W8A8}, or {W8A8}: with some of "
            f"{', '.join(PARTS)} behind it, joined by +."
        )
    return found


def weight_of(quantization: str, part: str, weight: jax.Array, inputs: int = 1) -> jax.Array:
    """A matrix of a part as its products read it: its first `inputs` axes are summed over."""
    if part not in parts_of(quantization):
        return weight
    return _rounded(weight, tuple(range(inputs, weight.ndim)), _SYMMETRIC)


def table_of(quantization: str, embedding_VD: jax.Array) -> jax.Array:
    """An embedding as its rows are looked up."""
    if "embedding" not in parts_of(quantization):
        return embedding_VD
    return _rounded(embedding_VD, (0,), _SYMMETRIC)


def factor_of(quantization: str, part: str, x_BT: jax.Array) -> jax.Array:
    """What enters the products of a part, [B, T, ...]."""
    return _rounded(x_BT, (0, 1), _BETWEEN) if part in parts_of(quantization) else x_BT


def integers(x: jax.typing.ArrayLike, channels: tuple[int, ...], ranges: str = _SYMMETRIC) -> Any:
    """An array as integers, scales and perhaps zero points, a `qwix.QArray`.

    Args:
      x: any array of floats.
      channels: axes along which each index has a scale of its own.
      ranges: a method of calibration in qwix's words.

    Raises:
      UserError: qwix is not installed.
    """
    try:
        import qwix
    except ImportError:
        raise UserError(f"{W8A8} needs qwix: pip install 'mobilellm-jax[quantization]'.") from None
    return qwix.quantize(
        jnp.asarray(x, jnp.float32), jnp.int8, channelwise_axes=channels, calibration_method=ranges
    )


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _rounded(x: jax.Array, channels: tuple[int, ...], ranges: str) -> jax.Array:
    found = integers(x, channels, ranges)
    zero = 0 if found.zero_point is None else found.zero_point.astype(jnp.float32)
    return ((found.qvalue.astype(jnp.float32) - zero) * found.scale).astype(x.dtype)


@_rounded.defjvp
def _straight_through(
    channels: tuple[int, ...],
    ranges: str,
    primals: tuple[jax.Array],
    tangents: tuple[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    return _rounded(primals[0], channels, ranges), tangents[0]
