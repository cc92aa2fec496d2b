"""One store, every context length: rows longer or shorter than those that are stored.

A stored row holds one token more than its length. In a concatenated store that is the first token
of the next row: neighbours join without a seam, and longer rows show longer documents whole. In a
best-fit store every row is packed by itself: a longer row shows more documents, and of each row but
its last one the last token is given up. Rows of conversations, which are whole, stay as they are.
"""

import numpy as np

from mobilellm_jax.data.rows import Rows, SourceInfo
from mobilellm_jax.errors import UserError


class Contexts:
    """Rows of a stored split joined to longer ones, or cut into shorter ones. Picklable."""

    def __init__(self, rows: Rows, row_length: int) -> None:
        """Takes stored rows; `row_length` is a multiple or a divisor of theirs.

        Raises:
          UserError: it is neither, or another one, where the rows hold conversations.
        """
        stored = rows.info.row_length
        if rows.info.kind == "chat" and row_length != stored:
            raise UserError(
                f"the conversations in {rows.info.path} are whole in rows of {stored} tokens and cannot "
                f"be had in rows of {row_length}: set config.row_length={stored}, or prepare them "
                f"again with --row_length={row_length}."
            )
        if row_length % stored and stored % row_length:
            raise UserError(
                f"rows of {row_length} tokens cannot be made of the {stored} that are stored in "
                f"{rows.info.path}: set config.row_length to a multiple or a divisor of {stored}."
            )
        self._rows, self.row_length = rows, row_length
        self._joined, self._parts = max(row_length // stored, 1), max(stored // row_length, 1)

    @property
    def retries(self) -> int:
        """How often a read failed and was tried again."""
        return self._rows.retries

    @property
    def split(self) -> str:
        """Of the source."""
        return self._rows.split

    @property
    def info(self) -> SourceInfo:
        """Of the store."""
        return self._rows.info

    def __len__(self) -> int:
        """Number of rows; stored ones at the end that are too few for one more are left out."""
        return len(self._rows) // self._joined * self._parts

    def stored(self, index: int) -> tuple[int, int, int]:
        """The stored rows that a row is made of, first and number, and the token at which it begins."""
        first, part = divmod(index, self._parts)
        return first * self._joined, self._joined, part * self.row_length

    def made_of(self, first: int, last: int) -> range:
        """The rows that hold anything of the stored rows `first` to `last`, both included."""
        begin = first // self._joined * self._parts
        end = (last // self._joined + 1) * self._parts
        return range(begin, min(end, len(self)))

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Rows by number: int64 [n] -> int32 [n, row_length + 1].

        Raises:
          IndexError, UserError: see `Rows.read`.
        """
        first, part = np.divmod(np.asarray(indices, np.int64), self._parts)
        if self._joined == 1 == self._parts:
            return self._rows.read(first)
        stored = first[:, None] * self._joined + np.arange(self._joined)
        tokens = self._rows.read(stored.ravel()).reshape(*stored.shape, -1)
        whole = np.concatenate([tokens[:, :, :-1].reshape(len(first), -1), tokens[:, -1, -1:]], 1)
        at = part[:, None] * self.row_length + np.arange(self.row_length + 1)
        return np.take_along_axis(whole, at, axis=1) if self._parts > 1 else whole
