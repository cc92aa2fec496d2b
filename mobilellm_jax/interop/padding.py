"""Blocks of different widths for formats that have one width for all: filled up with zeros.

Channels of an MLP and KV heads that are zero add nothing, nor does a query head whose rows of `out` are
zero: so a network is exported exactly, only larger.
"""

import dataclasses
from typing import Any

import numpy as np

from mobilellm_jax.leaves import Leaf, Leaves, flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.axes import axes_of
from mobilellm_jax.model.config import ModelConfig, Stack


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
