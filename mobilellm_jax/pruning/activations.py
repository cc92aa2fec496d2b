"""What a forward pass says of a network's parts: how large what they give is, and how far it moves.

The blocks of `model.transformer` add up over tokens, where they are asked to, the sums and the sums of
squares of what enters `out` and `down`, the sums of squares of what their norms give, and how they
change their input. No activation is kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mobilellm_jax.errors import UserError
from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.notes import GRAMS, INPUTS, STATISTICS
from mobilellm_jax.pruning.groups import Groups, StackGroups
from mobilellm_jax.pruning.scores import with_heads
from mobilellm_jax.training.objectives import Batch, Network, split_rows

# Of a block, larger for a more important one: from which statistic, and with which sign. A cosine near
# 1 means that it hardly turns its input. (The code of Adapt-Pruner negates its distances as well, so that
# a layer which moves its input further counts less there.)
IMPORTANCE = {"cosine": -1.0, "distance": 1.0}


def statistics(params: Any, batch: Batch, network: Network) -> dict[str, Any]:
    """The sums over the tokens of a batch; batches may be added.

    Returns:
      By stack as `transformer.statistics` has them, and under "tokens" how many tokens they are of.
    """
    found, tokens = _noted(params, batch, network, STATISTICS)
    return {**found, "tokens": jnp.asarray(tokens, jnp.float32)}


def residual_gram(params: Any, batch: Batch, network: Network) -> jax.Array:
    """The sum of x x^T over tokens and over all that norms of blocks read, float32 [D, D]."""
    found, _ = _noted(params, batch, network, GRAMS)
    return sum((x.sum(0) for x in jax.tree.leaves(found)), jnp.zeros(()))


def inputs(
    params: Any, batch: Batch, network: Network, names: Sequence[str]
) -> dict[str, jax.Array]:
    """The sums of x x^T over tokens of what enters products, by path, float32 [L, X, X] or [X, X].

    Args:
      params: the weights.
      batch: rows.
      network: how they are run.
      names: which, as `second_order.needed` gives them.
    """
    found = flat(_noted(params, batch, network, INPUTS)[0])
    return {name: found[name] for name in names}


def _noted(
    params: Any, batch: Batch, network: Network, collection: str
) -> tuple[dict[str, Any], int]:
    """What `transformer.statistics` gives of a batch, and of how many tokens."""
    rows = split_rows(batch["tokens"], network.bos_id, network.eos_id)
    given = network.model, rows.inputs_BT, rows.segment_ids_BT, network.execution, collection
    return transformer.statistics(params, *given), rows.inputs_BT.size


def activation(found: Mapping[str, Any], config: ModelConfig) -> Groups:
    """Root mean square of what each group gives (after Minitron, arXiv 2407.14679, section 2).

    A channel of an MLP by what enters `down`, a query head by the norm of what enters `out`, a KV head by
    that of its query heads, a channel of the residual stream by what the norms of all blocks give.

    Args:
      found: of `statistics`.
      config: the network.
    """
    tokens = found["tokens"]
    stacks, residual_D = [], jnp.zeros(config.width)
    for i, stack in enumerate(config.stacks):
        of = found[f"stack_{i}"]
        heads_LN = of["attention"]["square"].sum(-1)
        kv_heads_LK = jnp.zeros((stack.layers, stack.kv_heads))
        stacks.append(StackGroups(of["mlp"]["square"], heads_LN, kv_heads_LK))
        residual_D = residual_D + of["read"].sum(0)
    squares = with_heads(Groups(residual_D, tuple(stacks)))
    return jax.tree.map(lambda x: jnp.sqrt(x / tokens), squares)


def importance(found: Mapping[str, Any], config: ModelConfig, measure: str) -> np.ndarray:
    """Of each block, as float64; of one that is applied several times a mean.

    Raises:
      UserError: there is no such measure.
    """
    if measure not in IMPORTANCE:
        raise UserError(f"importance={measure!r} is not one of {', '.join(IMPORTANCE)}.")
    by_stack = [
        np.asarray(found[f"stack_{i}"][measure]) / stack.repeats
        for i, stack in enumerate(config.stacks)
    ]
    return IMPORTANCE[measure] * np.concatenate(by_stack).astype(np.float64)
