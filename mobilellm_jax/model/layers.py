"""What the blocks of a network are made of: norms, matrices, the gate of an MLP."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from mobilellm_jax.model.axes import axes_of
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.quantization import weight_of
from mobilellm_jax.model.taps import TAPS, tapped


class RMSNorm(nn.Module):
    """x / rms(x), times a learned scale if `scaled`; statistics in float32 (arXiv 1910.07467).

    With `dead` the mean of squares is that of the channels whose scale is not 0: those of a network that
    is being pruned are as good as gone, and their x is 0.
    """

    eps: float
    scaled: bool = True
    dead: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises the last axis."""
        scale = None
        if self.scaled:
            scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
            scale = with_tap(self, "scale", scale)
        return _rms_norm(x, scale, self.eps, self.dead)


# Cheap functions of large arrays: the backward pass computes them again from their arguments. What
# it would keep instead, such as float32 copies of x, is most of the memory of a layer.
_cheap = functools.partial(jax.checkpoint, prevent_cse=False)


@functools.partial(_cheap, static_argnums=(2, 3))
def _rms_norm(x: jax.Array, scale: jax.Array | None, eps: float, dead: bool) -> jax.Array:
    # One axis of tokens: XLA for CPUs sums rows of [1, T, D] many times as slowly as those of [T, D].
    y = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    if dead and scale is not None:
        live = jnp.maximum(jnp.count_nonzero(scale), 1)
        mean = jnp.sum(y * y, axis=-1, keepdims=True) / live
    else:
        mean = jnp.mean(y * y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(mean + eps)
    return (y if scale is None else y * scale).astype(x.dtype).reshape(x.shape)


@_cheap
def gated(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
    """SwiGLU's, silu(gate) * up, [B, T, F] each."""
    return nn.silu(gate_BTF) * up_BTF


def projection(formula: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """`jnp.einsum` of what a layer reads and a weight, where "BT" stands for one axis of all tokens.

    With two axes, the gradient by the weight is a product of its operands in the other order, for which
    XLA for CPUs transposes activations: a quarter of an MLP's training.
    """
    y = jnp.einsum(formula.replace("BT", "R"), x.reshape(-1, *x.shape[2:]), weight)
    return y.reshape(*x.shape[:2], *y.shape[1:])


def matrix_of(
    module: nn.Module,
    config: ModelConfig,
    dtype: jnp.dtype,
    name: str,
    *shape: int,
    inputs: int = 1,
) -> jax.Array:
    """A float32 matrix of a module's parameters, in the dtype of the product that reads it.

    Its first `inputs` axes are those that the product sums over.
    """
    initialise = nn.initializers.normal(config.init_std)
    weight = with_tap(module, name, module.param(name, initialise, shape, jnp.float32))
    return weight_of(config.quantization, "blocks", weight, inputs).astype(dtype)


def with_tap(module: nn.Module, name: str, weight: jax.Array) -> jax.Array:
    """A weight of a layer, through its tap if there is one (`model.taps`)."""
    if not module.has_variable(TAPS, name):
        return weight
    axes = axes_of("/".join((*module.path, name)))
    assert axes is not None
    return tapped(weight, axes.removeprefix("L"), module.get_variable(TAPS, name))


def with_bias(module: nn.Module, config: ModelConfig, name: str, y_BTD: jax.Array) -> jax.Array:
    """What a module adds to the residual stream, with its bias if the network has such."""
    if not config.out_bias:
        return y_BTD
    bias_D = module.param(name, nn.initializers.zeros, y_BTD.shape[-1:], jnp.float32)
    return y_BTD + with_tap(module, name, bias_D).astype(y_BTD.dtype)
