"""Blocks of different widths as blocks of one width: filled up with zeros.

Channels of an MLP and KV heads that are zero add nothing, nor does a query head whose rows of `out` are
zero: so it is the same network, only larger, for formats that have one width for all blocks and for
programs that are compiled once for all of them.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np

from mobilellm_jax.leaves import Leaf, Leaves, flat, nested
from mobilellm_jax.model import transformer
from mobilellm_jax.model.axes import axes_of
from mobilellm_jax.model.config import ModelConfig, Stack
from mobilellm_jax.model.transformer import Params


def widest(model: ModelConfig) -> ModelConfig:
    """The network whose blocks all have the widths of its widest."""
    each = max(stack.heads // stack.kv_heads for stack in model.stacks)
    kv_heads = max(stack.kv_heads for stack in model.stacks)
    mlp_width = max(stack.mlp_width for stack in model.stacks)
    stacks = (
        dataclasses.replace(stack, heads=kv_heads * each, kv_heads=kv_heads, mlp_width=mlp_width)
        for stack in model.stacks
    )
    return dataclasses.replace(model, stacks=tuple(stacks))


def padded(leaves: Leaves, model: ModelConfig) -> tuple[Leaves, ModelConfig]:
    """A network as one whose blocks have equal widths, its leaves filled up when they are read."""
    wide = widest(model)
    shapes = flat(transformer.shapes(wide))
    return {
        path: _of(path, leaf, shapes[path].shape, model, wide) for path, leaf in leaves.items()
    }, wide


def joined(params: Params, model: ModelConfig) -> tuple[Params, ModelConfig]:
    """The same network in few stacks: those that follow each other are one, as wide as the widest of them.

    A stack is compiled once, however many blocks it has. A pruned network is a stack for each block, which
    takes minutes to compile for each shape of a batch, and more than the zeros ever cost.

    Args:
      params: stacked as trained; leaves of stacks that stay alone are returned as they are.
      model: their network.
    """
    few = {name: leaf for name, leaf in params.items() if not name.startswith("stack_")}
    stacks: list[Stack] = []
    numbers = range(len(model.stacks))
    for _, group in itertools.groupby(numbers, key=lambda i: _kind(i, model)):
        run = list(group)
        weights, stack = params[f"stack_{run[0]}"], model.stacks[run[0]]
        if len(run) > 1:
            part = dataclasses.replace(model, stacks=tuple(model.stacks[i] for i in run))
            own = {f"stack_{j}": params[f"stack_{i}"] for j, i in enumerate(run)}
            filled, wide = padded(flat(own), part)
            layers = sum(stack.layers for stack in wide.stacks)
            stack = dataclasses.replace(wide.stacks[0], layers=layers)
            weights = nested(
                {
                    path: np.concatenate([filled[f"stack_{j}/{path}"][:] for j in range(len(run))])
                    for path in flat(weights)
                }
            )
        few[f"stack_{len(stacks)}"] = weights
        stacks.append(stack)
    return few, dataclasses.replace(model, stacks=tuple(stacks))


def _kind(number: int, model: ModelConfig) -> tuple[Any, ...]:
    """Equal for stacks whose blocks are applied alike, one stack's after the other's."""
    stack = model.stacks[number]
    in_a_row = stack.repeats == 1 or stack.order == "immediate"
    # A query head that is filled up reads values, which integers' scales would see before `out` drops them.
    each = stack.heads // stack.kv_heads if model.quantization != "none" else None
    return stack.repeats, stack.rope, each, None if in_a_row else number


def _of(
    path: str, leaf: Leaf, shape: tuple[int, ...], model: ModelConfig, wide: ModelConfig
) -> Leaf:
    if not path.startswith("stack_"):
        return leaf
    number = int(path.split("/")[0].removeprefix("stack_"))
    return _Padded(leaf, shape, axes_of(path) or "", model.stacks[number], wide.stacks[number])


@dataclasses.dataclass(frozen=True)
class _Padded:
    """A leaf of a stack with zeros behind what it has."""

    leaf: Leaf
    shape: tuple[int, ...]
    axes: str
    stack: Stack
    wide: Stack

    @property
    def dtype(self) -> np.dtype:
        """That of the weights as they are stored."""
        return self.leaf.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        """The part that a number or slice of layers, or a tuple that begins with one, selects."""
        first, *rest = index if isinstance(index, tuple) else (index,)
        one = isinstance(first, int | np.integer)
        array, axes = self.leaf[first], self.axes[1:] if one else self.axes
        shape = self.shape[len(self.shape) - len(axes) :]
        if "N" in axes:  # those of a KV head stay together
            at = axes.index("N")
            groups = self.stack.kv_heads, self.stack.heads // self.stack.kv_heads
            array = array.reshape(*array.shape[:at], *groups, *array.shape[at + 1 :])
            wider = self.wide.kv_heads, self.wide.heads // self.wide.kv_heads
            shape = *shape[:at], *wider, *shape[at + 1 :]
        if not one:
            shape = len(array), *shape[1:]
        more = [(0, new - old) for new, old in zip(shape, array.shape, strict=True)]
        array = np.pad(array, more)
        if "N" in axes:
            array = array.reshape(*array.shape[:at], -1, *array.shape[at + 2 :])
        return array[tuple(rest) if one else (slice(None), *rest)]
