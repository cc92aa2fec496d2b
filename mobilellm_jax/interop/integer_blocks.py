"""Matrices as integers of 8 or 4 bits, 32 of which in a row share a scale: GGUF's q8_0 and q4_0.

As onnxruntime's MatMulNBits reads them: unsigned, around the middle of their range, rows [out] first.
"""

import dataclasses
from typing import Any

import numpy as np

from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.huggingface import ExportedTensor

BLOCK = 32  # weights that share a scale


@dataclasses.dataclass(frozen=True)
class BlocksTensor:
    """A matrix as integers around 2^(bits - 1), [out, in / 32, bytes of 32]; a byte has two of 4 bits."""

    of: ExportedTensor
    bits: int
    turned: bool  # [in, out] in the network
    dtype = np.dtype(np.uint8)

    @property
    def rows(self) -> tuple[int, int]:
        """How many rows, each summed over, and how long they are.

        Raises:
          UserError: a row cannot be cut into blocks.
        """
        rows, length = self.of.shape[::-1] if self.turned else self.of.shape
        if length % BLOCK:
            raise UserError(
                f"{self.of.entry.name} has rows of {length} numbers, which cannot be cut into blocks of "
                f"{BLOCK}: export with f32 instead."
            )
        return rows, length

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the file."""
        rows, length = self.rows
        return rows, length // BLOCK, BLOCK * self.bits // 8

    def __getitem__(self, index: Any) -> np.ndarray:
        """The integers."""
        integers, _ = self.split()
        if self.bits == 4:
            integers = integers[..., 0::2] | (integers[..., 1::2] << 4)
        return integers[index]

    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """The integers, one in a byte, and the scale of each block, float32 [out, in / 32, 1]."""
        rows, length = self.rows
        weight = self.of[:].T if self.turned else self.of[:]
        blocks = weight.reshape(rows, length // BLOCK, BLOCK)
        middle = 2 ** (self.bits - 1)
        if self.bits == 8:
            scale = np.abs(blocks).max(-1, keepdims=True) / (middle - 1)
        else:  # whichever end is further off takes the integer that has no opposite
            furthest = np.abs(blocks).argmax(-1)[..., None]
            scale = np.take_along_axis(blocks, furthest, -1) / -middle
        integers = np.rint(blocks / np.where(scale == 0, 1, scale)) + middle
        return integers.clip(0, 2 * middle - 1).astype(np.uint8), scale


@dataclasses.dataclass(frozen=True)
class BlockScales:
    """The scales of a matrix of integers, [out, in / 32]."""

    of: BlocksTensor
    dtype = np.dtype(np.float16)

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the file."""
        return self.of.shape[:2]

    def __getitem__(self, index: Any) -> np.ndarray:
        """The scales in float16."""
        return self.of.split()[1][..., 0].astype(self.dtype)[index]
