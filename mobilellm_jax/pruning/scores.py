"""What groups are worth: from the weights, from their gradients, from the activations they give rise to.

Every score is a `Groups` of float32, larger for what is worth more; that of a KV head includes its
query heads, because they go together.

From gradients (`KINDS`), of the summed loss of each microbatch, by `model.taps`:

    taylor        sum of |w g| over all weights of the group (LLM-Pruner's `param_first`, which
                  Adapt-Pruner uses)
    taylor_slice  |sum of w g| over what the group writes: rows of `down` and `out`; that is the
                  magnitude of the loss's derivative by a factor on the group (Michel et al., arXiv
                  1905.10650)
    fisher        the square of that derivative

A shared block is scored at each of its applications, and a tied embedding for both its uses at once.
"""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from mobilellm_jax.leaves import flat, nested
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.taps import TAPS, Tap, tapped
from mobilellm_jax.pruning.groups import (
    GROUPED,
    Groups,
    StackGroups,
    added,
    named,
    of_widths,
    reduced,
)

KINDS = ("taylor", "taylor_slice", "fisher")
# Of the weights of a group, those by which it acts on the rest.
WRITERS = ("embedding", "attention/out", "mlp/down")


def taps(config: ModelConfig, kind: str) -> dict[str, Tap]:
    """A tap for each weight that a kind of score looks at, by path; zeros."""
    found = {}
    for path, shape in flat(transformer.shapes(config)).items():
        if kind != "taylor" and not path.endswith(WRITERS):
            continue
        axes, _ = named(path)
        if len({*axes}) < len(axes):  # a turn of the residual stream is of each channel twice
            continue
        layers = shape.shape[:1] if "L" in axes else ()
        sums = {
            axis: jnp.zeros((*layers, shape.shape[axes.index(axis)]), jnp.float32)
            for axis in axes
            if axis in GROUPED
        }
        if sums:
            found[path] = Tap(sums, kind == "taylor")
    return found


def attached(params: Any, taps: dict[str, Tap]) -> Any:
    """Parameters that a network is run with to have its taps read.

    Weights outside of the stacks go through theirs here, those of the stacks where they are used.
    """
    inside = {path: tap for path, tap in taps.items() if "L" in named(path)[0]}
    outside = {
        path: tapped(leaf, named(path)[0], taps[path])
        for path, leaf in flat(
            {k: v for k, v in params.items() if not k.startswith("stack_")}
        ).items()
        if path in taps
    }
    return {**params, **nested(outside), TAPS: nested(inside)}


def read(gradients: dict[str, Tap], config: ModelConfig, kind: str) -> Groups:
    """The scores of one microbatch, from the gradients of its taps.

    Args:
      gradients: of `taps`, of a sum of losses.
      config: the network.
      kind: of `KINDS`.
    """
    sums = of_widths(config, lambda *shape: jnp.zeros(shape, jnp.float32))
    for path, tap in gradients.items():
        axes, stack = named(path)
        found = {
            axis: value.sum(0) if axis == "D" and "L" in axes else value
            for axis, value in tap.sums.items()
        }
        sums = added(sums, found, stack)
    sums = with_heads(sums)
    finish = {"taylor": lambda x: x, "taylor_slice": jnp.abs, "fisher": jnp.square}[kind]
    return jax.tree.map(finish, sums)


def magnitude(params: Any, config: ModelConfig) -> Groups:
    """Sum of squared weights."""
    return with_heads(reduced(params, config, jnp.square))


def random(config: ModelConfig, key: jax.Array) -> Groups:
    """Uniform in [0, 1), of a KV head as of any other group."""
    count = itertools.count()
    return of_widths(
        config, lambda *shape: jax.random.uniform(jax.random.fold_in(key, next(count)), shape)
    )


def with_heads(groups: Groups) -> Groups:
    """Each KV head's value plus those of the query heads that read it."""

    def of(stack: StackGroups) -> StackGroups:
        return dataclasses.replace(stack, kv_heads_LK=stack.kv_heads_LK + stack.heads_LKG.sum(-1))

    return Groups(groups.residual_D, tuple(map(of, groups.stacks)))
