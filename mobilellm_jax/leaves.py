"""Weights that need not be in memory: read leaf by leaf, slice by slice, onto the devices that need them.

A *leaf* is an array, or anything that is indexed like one and reads what it is asked for. *Leaves*
are a network's weights as a mapping from path (`stack_0/mlp/up`) to leaf.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np

from mobilellm_jax.parallel.sharding import path_name

DTYPES = {  # in which weights are stored
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


class Leaf(Protocol):
    """What is indexed like an array; a numpy array is one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its axes."""

    @property
    def dtype(self) -> np.dtype:
        """Of the values as they are stored."""

    def __getitem__(self, index: Any) -> np.ndarray:
        """The part that a number, a slice or a tuple of such selects.

        Numbers count from the front, and slices have no step.
        """


Leaves = Mapping[str, Leaf]


class Whole(Mapping[str, np.ndarray]):
    """Leaves that are read as a whole; the one asked for last is kept in memory.

    Who asks for slices leaf by leaf reads each leaf once, also where it is stored in one piece.
    """

    def __init__(self, leaves: Leaves) -> None:
        self._leaves = leaves
        self._last: tuple[str, np.ndarray] | None = None

    def __getitem__(self, path: str) -> np.ndarray:
        if self._last is None or self._last[0] != path:
            self._last = None  # before the next one is read
            self._last = path, self._leaves[path][:]
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)


def flat(tree: Any) -> dict[str, Any]:
    """A pytree of nested dicts as a mapping from path to leaf."""
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `flat`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def place(leaves: Leaves, shardings: Any = None, dtype: Any = None) -> dict[str, Any]:
    """Leaves as a pytree of arrays; every device is given its slices and nothing else is read.

    Args:
      leaves: by path.
      shardings: a pytree of shardings like the result; None: all on the default device.
      dtype: of the arrays; None keeps each leaf's own.
    """
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    by_path = flat(shardings) if shardings is not None else dict.fromkeys(leaves, default)

    def placed(leaf: Leaf, sharding: jax.sharding.Sharding) -> jax.Array:
        wanted = np.dtype(dtype or leaf.dtype)

        def part(index: Any) -> np.ndarray:
            return leaf[index].astype(wanted, order="C", copy=False)

        return jax.make_array_from_callback(leaf.shape, sharding, part, dtype=wanted)

    return nested({path: placed(leaf, by_path[path]) for path, leaf in leaves.items()})
