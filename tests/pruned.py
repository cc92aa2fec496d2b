"""Networks of every kind that pruning has to do with, and rows for them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, Stack, parameter_count
from mobilellm_jax.model.transformer import Execution
from mobilellm_jax.pruning import groups
from mobilellm_jax.pruning.compaction import taken
from mobilellm_jax.pruning.measures import Measures
from mobilellm_jax.training.objectives import Network

BOS, EOS, VOCAB, ROW = 1, 2, 61, 24
PLAIN = ModelConfig(VOCAB, 24, (Stack(3, 6, 3, 20),), head_dim=4, init_std=0.2, max_length=64)
TWO = dataclasses.replace(
    PLAIN,
    stacks=(Stack(2, 6, 3, 20), Stack(2, 4, 2, 12)),
    tied=False,
    qk_norm="scaled",
    qkv_bias=True,
    out_bias=True,
)
SHARED = dataclasses.replace(PLAIN, stacks=(Stack(2, 6, 3, 20, repeats=2),), qk_norm="unit")
RELU = dataclasses.replace(PLAIN, mlp="relu", stacks=(Stack(2, 6, 3, 20, 2, "reverse"),))
NETWORKS = {"plain": PLAIN, "two stacks, biases": TWO, "shared": SHARED, "relu, reverse": RELU}


@functools.cache
def parameters(config, seed=0):
    """Weights whose biases and scales are not those of the beginning."""
    params = jax.jit(transformer.init, static_argnums=0)(config, jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    moved = [x + 0.1 * rng.standard_normal(x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(tree, moved)


def network(config, **execution):
    return Network(config, Execution(**execution), BOS, EOS)


def rows(count=4, seed=0):
    """A batch of rows with documents in them."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, VOCAB, (count, ROW + 1)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.08] = BOS
    return {"tokens": jnp.asarray(tokens), "source": jnp.zeros(count, jnp.int32)}


masked = jax.jit(groups.masked)  # as cuts have it, but that the weights are kept


def smaller(tree, compact, shapes=None):
    """`taken` as one program: weights, or what has these shapes."""
    shapes = transformer.shapes(compact.config) if shapes is None else shapes
    return jax.jit(lambda tree: taken(tree, compact, shapes))(tree)


def measures(config, params=None, seed=0):
    params = parameters(config) if params is None else params
    return Measures(params, network(config), [rows(seed=seed)], seed)


def some_dead(config, seed=0, residual=True, heads=True):
    """A random third of all groups dead; of query heads alone equally many of each KV head of a block."""
    rng = np.random.default_rng(seed)
    live = groups.everything(config)
    if residual:
        live.residual_D[rng.permutation(config.width)[: config.width // 3]] = False
    for stack in live.stacks:
        layers, kv_heads = stack.kv_heads_LK.shape
        heads_LKG = stack.heads_LN.reshape(layers, kv_heads, -1)
        for layer in range(layers):
            width = stack.mlp_LF.shape[-1]
            dead = rng.permutation(width)[: rng.integers(1, width // 2)]
            stack.mlp_LF[layer, dead] = False
            if layer % 2:
                stack.kv_heads_LK[layer, rng.integers(kv_heads)] = False
            gone = rng.integers(heads_LKG.shape[-1]) if layer and heads else 0
            for head in range(kv_heads):
                heads_LKG[layer, head, rng.permutation(heads_LKG.shape[-1])[:gone]] = False
            heads_LKG[layer] &= stack.kv_heads_LK[layer][:, None]
    return live


# --- Runs that prune `tiny.MODEL`

WHOLE = parameter_count(tiny.MODEL)
TARGET = int(WHOLE * 0.7)


def config(plan, use="mobilellm_jax.pruning.strategies:adapt", **changes):
    """Four cuts, after steps 2, 4, 7 and 9."""
    c = tiny.config(plan)
    c.pruning.target, c.pruning.begin, c.pruning.cuts = TARGET, 2, 4
    c.pruning.strategy.use = use
    with c.unlocked():
        c.update_from_flattened_dict(changes)
    return c


def efficiently(plan, **changes):
    use = "mobilellm_jax.pruning.efficient:efficient"
    changes = {"model.dead_channels": True, "pruning.cuts": 9, "pruning.begin": 1} | changes
    return config(plan, use, **changes)
