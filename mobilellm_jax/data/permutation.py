"""Pseudo-random permutations of any size: random access both ways, no state, no memory.

Feistel networks, the same on every machine and under every version of NumPy.
"""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

_ROUNDS = 6


def permute(
    index: npt.ArrayLike, size: npt.ArrayLike, key: npt.ArrayLike, inverse: bool = False
) -> np.ndarray:
    """A permutation of `range(size)`, evaluated at `index`; all arguments broadcast.

    A Feistel network over the smallest 2k-bit square that holds `size`, walked until it falls
    inside (Black and Rogaway 2002); on average fewer than four walks.

    Args:
      index: int64, in [0, size).
      size: int64, at most 2**40.
      key: uint64; another key, another permutation.
      inverse: find where `index` comes from instead of where it goes.
    """
    index, size, key = np.broadcast_arrays(
        np.asarray(index, np.uint64), np.asarray(size, np.uint64), np.asarray(key, np.uint64)
    )
    half = np.zeros(size.shape, np.uint64)
    while (short := (np.uint64(1) << (np.uint64(2) * half)) < size).any():
        half = half + short.astype(np.uint64)
    out = index.copy()
    todo = np.ones(out.shape, bool)
    network = _inverse_feistel if inverse else _feistel
    while todo.any():
        out[todo] = network(out[todo], half[todo], key[todo])
        todo &= out >= size
    return out.astype(np.int64)


def key_of(*parts: Any) -> np.uint64:
    """A key made of anything that prints the same everywhere."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


def mixed(x: npt.ArrayLike, key: np.ndarray | np.uint64, round_: int = 0) -> np.ndarray:
    """uint64: `x` and a key hashed by the finaliser of SplitMix64; wraps modulo 2**64."""
    with np.errstate(over="ignore"):  # NumPy warns of it where arrays have no axes
        z = np.asarray(x, np.uint64) + key
        z = z + np.uint64((0x9E3779B97F4A7C15 * (round_ + 1)) & 0xFFFFFFFFFFFFFFFF)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _feistel(x: np.ndarray, half: np.ndarray, key: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for round_ in range(_ROUNDS):
        left, right = right, left ^ (mixed(right, key, round_) & mask)
    return (left << half) | right


def _inverse_feistel(x: np.ndarray, half: np.ndarray, key: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for round_ in reversed(range(_ROUNDS)):
        left, right = right ^ (mixed(left, key, round_) & mask), left
    return (left << half) | right
