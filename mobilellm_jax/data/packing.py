"""Documents to rows of `row_length + 1` tokens: inputs are `row[:-1]`, targets `row[1:]`.

Nothing but tokens is stored. Readers derive the rest by one rule: segment ids are `cumsum(row ==
BOS)`, and a target that is BOS is never trained on. So BOS begins every document and also fills
what stays free. Where BOS and EOS are one token, a target that is BOS is the end of a document if its
input is anything else (`counted`).

A packer is a small object with `add(documents)` and `finish()`, both of which give the rows that
are ready; what it holds back between calls is bounded, whatever the size of the corpus.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

WINDOW = 1 << 23  # tokens that best-fit packing sees at once (32 MB)


def counted(tokens: Any, bos_id: int, eos_id: int) -> Any:
    """Which targets of rows are trained on.

    Args:
      tokens: int [..., T + 1], of NumPy or JAX.
      bos_id: begins documents and fills rows.
      eos_id: ends documents; may be the same.

    Returns:
      bool [..., T] of the same kind.
    """
    inputs, targets = tokens[..., :-1], tokens[..., 1:]
    counts = targets != bos_id
    return counts | (inputs != bos_id) if eos_id == bos_id else counts


class Packer(Protocol):
    """Turns documents (token ids without BOS and EOS) into rows [n, row_length + 1], all int32."""

    def add(self, documents: Sequence[np.ndarray]) -> np.ndarray:
        """Takes documents in; returns the rows that are complete."""

    def finish(self) -> np.ndarray:
        """Returns the rows of all that was held back."""


class Concat:
    """One stream, BOS document EOS BOS document EOS ..., cut with stride `row_length`.

    Neighbouring rows overlap by one token, so that every token of the stream but its first is a
    target exactly once. The last row is filled up with BOS.
    """

    def __init__(self, row_length: int, bos_id: int, eos_id: int) -> None:
        self._row_length, self._bos, self._eos = row_length, [bos_id], [eos_id]
        self._rest = np.empty(0, np.int32)

    def add(self, documents: Sequence[np.ndarray]) -> np.ndarray:
        """See `Packer`."""
        parts = [part for document in documents for part in (self._bos, document, self._eos)]
        stream = np.concatenate([self._rest, *parts]).astype(np.int32)
        rows = max(len(stream) - 1, 0) // self._row_length
        self._rest = stream[rows * self._row_length :].copy()
        windows = (
            np.lib.stride_tricks.sliding_window_view(stream, self._row_length + 1) if rows else None
        )
        return (
            _no_rows(self._row_length) if windows is None else windows[:: self._row_length][:rows]
        )

    def finish(self) -> np.ndarray:
        """See `Packer`."""
        rest, self._rest = self._rest, np.empty(0, np.int32)
        if len(rest) < 2:  # a single token is the last target of the row before
            return _no_rows(self._row_length)
        return _row([rest], self._row_length, self._bos[0])[None]


class BestFit:
    """Whole documents where they fit best: best-fit-decreasing within windows of the corpus.

    A document longer than a row is cut; each further piece begins with BOS again and EOS stands
    only at the real end. A piece of EOS alone would be an empty document: there the last token is
    repeated. No piece is ever split over two rows, and no context of another document precedes it.
    """

    def __init__(self, row_length: int, bos_id: int, eos_id: int, window: int = WINDOW) -> None:
        self._row_length, self._bos, self._eos, self._window = row_length, bos_id, eos_id, window
        self._pieces: list[np.ndarray] = []
        self._held = 0

    def add(self, documents: Sequence[np.ndarray]) -> np.ndarray:
        """See `Packer`."""
        ready = [_no_rows(self._row_length)]
        for document in documents:
            body = np.append(document, self._eos)
            for start in range(0, len(body), self._row_length):
                start = min(start, max(len(body) - 2, 0))
                inside = body[start : start + self._row_length]
                piece = np.append(self._bos, inside).astype(np.int32)
                self._pieces.append(piece)
                self._held += len(piece)
                if self._held >= self._window:
                    ready.append(self.finish())
        return np.concatenate(ready)

    def finish(self) -> np.ndarray:
        """See `Packer`."""
        pieces, self._pieces, self._held = self._pieces, [], 0
        bins = best_fit_decreasing([len(piece) for piece in pieces], self._row_length + 1)
        rows = [_row([pieces[i] for i in members], self._row_length, self._bos) for members in bins]
        return np.stack(rows) if rows else _no_rows(self._row_length)


PACKERS = {"concat": Concat, "best_fit": BestFit}


def best_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `sizes` in bins: longest first, each into the fullest bin that still takes it.

    A bit of `open_bits` says that some bin has just so much space left, which finds that bin in one
    step instead of a search: a million pieces take seconds.
    """
    bins: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # bins with so much space left
    open_bits = 0
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[index]
        if size > capacity:
            raise ValueError(f"a piece of {size} tokens does not fit into a row of {capacity}")
        fitting = open_bits >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            chosen = by_space[space].pop()
            if not by_space[space]:
                open_bits ^= 1 << space
        else:
            space, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        by_space[space - size].append(chosen)
        open_bits |= 1 << (space - size)
    return bins


def _row(pieces: Sequence[np.ndarray], row_length: int, fill: int) -> np.ndarray:
    row = np.full(row_length + 1, fill, np.int32)
    tokens = np.concatenate(pieces)
    row[: len(tokens)] = tokens
    return row


def _no_rows(row_length: int) -> np.ndarray:
    return np.empty((0, row_length + 1), np.int32)
