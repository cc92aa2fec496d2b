"""FLAP (arXiv 2312.11983): one threshold for all groups of a network, and the mean of what goes as a bias.

A channel that hardly fluctuates can be replaced by its mean: that is a constant, which goes into a bias
of the product that it entered. So a channel j of what enters `out` or `down` is worth

    (E[x_j^2] - E[x_j]^2) * sum_d W_jd^2

These values are standardised within a block and a kind, so that all blocks and kinds can be cut at one
threshold, and where much is cut follows from the network.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.pruning.groups import Groups, StackGroups, counts, parameters, sizes
from mobilellm_jax.pruning.strategies import Choice, View, below_all, best

Statistics = Any  # of `activations.statistics`


def flap(view: View, target: int, *, bias: bool = True) -> Choice:
    """Cuts KV heads with their query heads, and channels of MLPs, by one threshold over all blocks.

    Of a KV head counts the mean over what its query heads give, squared before it is standardised, as in
    the authors' code (structure AL-AM).

    Args:
      view: the network.
      target: parameters.
      bias: whether the mean of what goes is kept in biases of `out` and `down`. The network then has such
        biases, and they count among its parameters.

    Raises:
      UserError: the target is below what is left when all that may go is gone.
    """
    found = view.measures.statistics
    config = dataclasses.replace(view.config, out_bias=view.config.out_bias or bias)
    worth = [_worth(found, view, i) for i in range(len(view.config.stacks))]
    number = _numbers(view, config, worth, target)
    scores = Groups(
        np.zeros(view.config.width),
        tuple(StackGroups(mlp_LF, heads_LN, kv_LK) for mlp_LF, heads_LN, kv_LK in worth),
    )
    live = best(view.live, scores, number)

    def update(params: Any) -> Any:
        return compensated(params, view.config, found, view.live, live)

    return Choice(live, None, {}, update if bias else None, config)


def _worth(found: Statistics, view: View, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Standardised values of a stack's MLP channels [L, F] and KV heads [L, K]; zeros for heads [L, N]."""
    weights, live = view.measures.params[f"stack_{i}"], view.live.stacks[i]
    tokens = _applied(found, view.config, i)

    def value(kind: str, weight: str) -> np.ndarray:
        mean, square = (
            np.asarray(found[f"stack_{i}"][kind][k], np.float64) for k in ("sum", "square")
        )
        norms = np.asarray(jnp.square(weights[kind][weight]).sum(-1), np.float64)
        return (square / tokens - np.square(mean / tokens)) * norms

    mlp_LF = standardised(value("mlp", "down"), live.mlp_LF)
    of_LNH = np.square(value("attention", "out"))
    lives_LNH = np.broadcast_to(live.heads_LN[..., None], of_LNH.shape)
    layers, kv_heads = live.kv_heads_LK.shape
    of_LNH = standardised(of_LNH.reshape(layers, -1), lives_LNH.reshape(layers, -1))
    of_LKX = of_LNH.reshape(layers, kv_heads, -1)
    lives_LKX = lives_LNH.reshape(layers, kv_heads, -1)
    kv_LK = (of_LKX * lives_LKX).sum(-1) / np.maximum(lives_LKX.sum(-1), 1)
    return mlp_LF, np.zeros(live.heads_LN.shape), kv_LK


def _applied(found: Statistics, config: ModelConfig, i: int) -> float:
    """Of how many tokens the sums of a stack are: a block that is applied again counts them again."""
    return float(found["tokens"]) * config.stacks[i].repeats


def standardised(value_LX: np.ndarray, live_LX: np.ndarray) -> np.ndarray:
    """Each row's values with mean 0 and deviation 1 over those that live."""
    number_L1 = np.maximum(live_LX.sum(-1, keepdims=True), 1)
    mean_L1 = (value_LX * live_LX).sum(-1, keepdims=True) / number_L1
    spread_L1 = np.sqrt(
        (np.square(value_LX - mean_L1) * live_LX).sum(-1, keepdims=True) / number_L1
    )
    return (value_LX - mean_L1) / np.maximum(spread_L1, np.finfo(np.float64).tiny)


def _numbers(
    view: View, config: ModelConfig, worth: Sequence[tuple[np.ndarray, ...]], target: int
) -> Groups:
    """How many groups of each block stay: the least are cut one by one until the target is met."""
    number = counts(view.live)
    left = parameters(config, number)
    units = []  # value, stack, layer, kind: one for each group that lives
    for i, (mlp_LF, _, kv_LK) in enumerate(worth):
        live = view.live.stacks[i]
        for kind, value, lives in (("F", mlp_LF, live.mlp_LF), ("K", kv_LK, live.kv_heads_LK)):
            units += [
                (value[at], i, int(at[0]), kind) for at in zip(*np.nonzero(lives), strict=True)
            ]
    size = sizes(config, number)
    spared = []  # channels, to be given back where the last head went too far
    for _, i, layer, kind in sorted(units, key=lambda unit: unit[0]):
        if left <= target:
            break
        stays, of = number.stacks[i], size.stacks[i]
        if kind == "F" and stays.mlp_LF[layer] > 1:
            stays.mlp_LF[layer] -= 1
            left -= int(of.mlp_LF[layer])
            spared.append((i, layer))
        elif kind == "K" and stays.kv_heads_LK[layer] > 1:
            each = stays.heads_LN[layer] // stays.kv_heads_LK[layer]
            stays.kv_heads_LK[layer] -= 1
            stays.heads_LN[layer] -= each
            left -= int(of.kv_heads_LK[layer] + each * of.heads_LN[layer])
    if left > target:
        raise below_all(target, left)
    for i, layer in reversed(spared):
        if left + (one := int(size.stacks[i].mlp_LF[layer])) <= target:
            number.stacks[i].mlp_LF[layer] += 1
            left += one
    return number


def compensated(
    params: Any, config: ModelConfig, found: Statistics, before: Groups, after: Groups
) -> Any:
    """Weights whose biases give, from now on, what the groups that die gave on average.

    Args:
      params: the weights; biases of `out` and `down` are made where there are none.
      config: their network.
      found: of `activations.statistics`.
      before: bool, what lives.
      after: bool, what will live.
    """
    params = dict(params)
    for i, (old, new) in enumerate(zip(before.stacks, after.stacks, strict=True)):
        stack = {name: leaf for name, leaf in params[f"stack_{i}"].items()}
        zeros_LD = jnp.zeros((config.stacks[i].layers, config.width), jnp.float32)
        tokens = _applied(found, config, i)
        for kind, weight, axes, dies in (
            ("attention", "out", "LNH,LNHD->LD", (old.heads_LN & ~new.heads_LN)[..., None]),
            ("mlp", "down", "LF,LFD->LD", old.mlp_LF & ~new.mlp_LF),
        ):
            mean = np.asarray(found[f"stack_{i}"][kind]["sum"]) / tokens * dies
            lost_LD = jnp.einsum(axes, mean, stack[kind][weight], precision="highest")
            bias = f"{weight}_bias"
            stack[kind] = {**stack[kind], bias: stack[kind].get(bias, zeros_LD) + lost_LD}
        params[f"stack_{i}"] = stack
    return params
