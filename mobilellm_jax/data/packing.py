"""Documents to rows of `row_length + 1` tokens: inputs are `row[:-1]`, targets `row[1:]`.

Of text nothing but tokens is stored. Readers derive the rest by one rule: segment ids are
`cumsum(row == BOS)`, and a target that is BOS is never trained on. So BOS begins every document and
also fills what stays free. Where BOS and EOS are one token, a target that is BOS is the end of a
document if its input is anything else (`counted`).

Rows of conversations say more than text does, by two marks in the high bits of a token: `UNTRAINED`
on all that is context and no target, `INSIDE` on a BOS that begins nothing, since chat templates may
put BOS between turns. So rows of every kind are one int32 array, and the four functions that follow
are all that knows of marks: `token_ids`, `segment_ids`, `positions` and `counted`.

A packer is a small object with `add(documents)` and `finish()`, both of which give the rows that
are ready and say where documents went; what it holds back between calls is bounded, whatever the
size of the corpus.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np

WINDOW = 1 << 23  # tokens that best-fit packing sees at once (32 MB)

# Where a piece of a document went: the row and the index of its BOS there, how many tokens it has,
# BOS and EOS included, which piece it is of which document; rows and documents count from 0.
PLACEMENT = np.dtype(
    [
        ("row", np.int64),
        ("offset", np.int32),
        ("tokens", np.int32),
        ("piece", np.int32),
        ("document", np.int64),
    ]
)


UNTRAINED = 1 << 30  # mark of a token that is never a target
INSIDE = 1 << 29  # mark of a BOS within a document


def token_ids(tokens: Any) -> Any:
    """The ids of rows or parts of them, without marks: int [...] to int [...], of NumPy or JAX."""
    return tokens & (INSIDE - 1)


def segment_ids(tokens: Any, bos_id: int) -> Any:
    """Numbers the documents of rows: int [..., T] to int [..., T], of NumPy or JAX.

    0 is the end of a document that began in a row before; each BOS of padding has a number too.
    """
    return ((tokens & ~UNTRAINED) == bos_id).cumsum(-1)


def positions(segment_ids: Any) -> Any:
    """Where tokens stand in their documents, from 0: int [..., T] to int32 [..., T], of NumPy or JAX.

    What a row begins with counts from 0 as well, also where it is the end of a document.
    """
    xp: Any = np
    running_max: Any = np.maximum.accumulate
    if not isinstance(segment_ids, np.ndarray):
        import jax  # takes a second, which readers of rows need not spend

        xp, running_max = jax.numpy, jax.lax.cummax
    at_T = xp.arange(segment_ids.shape[-1], dtype=np.int32)
    begins = xp.diff(segment_ids, prepend=segment_ids[..., :1]) != 0
    return at_T - running_max(xp.where(begins, at_T, 0), axis=segment_ids.ndim - 1)


def counted(tokens: Any, bos_id: int, eos_id: int, *, all_tokens: bool = False) -> Any:
    """Which targets of rows are trained on.

    Args:
      tokens: int [..., T + 1], of NumPy or JAX.
      bos_id: begins documents and fills rows.
      eos_id: ends documents; may be the same.
      all_tokens: also those that are marked as no target, but for what begins a document or fills
        a row.

    Returns:
      bool [..., T] of the same kind.
    """
    inputs, targets = tokens[..., :-1], tokens[..., 1:]
    counts = targets != bos_id
    counts = counts | (inputs != bos_id) if eos_id == bos_id else counts
    if all_tokens:  # a marked BOS that is not inside a conversation begins one, or is padding
        return counts & (targets != bos_id | UNTRAINED)
    return counts & (targets & UNTRAINED == 0)


def marked(
    tokens: np.ndarray, loss_mask: np.ndarray, segment_ids: np.ndarray, bos_id: int
) -> np.ndarray:
    """Tokens with marks.

    Args:
      tokens: int [..., T], ids.
      loss_mask: bool [..., T], which of them are trained on as targets.
      segment_ids: int [..., T], one more where a document begins.
      bos_id: begins documents.

    Returns:
      int32 [..., T].
    """
    begins = np.diff(segment_ids, prepend=0) != 0
    inside = (tokens == bos_id) & ~begins
    return (tokens | np.where(loss_mask, 0, UNTRAINED) | np.where(inside, INSIDE, 0)).astype(
        np.int32
    )


class Packed(NamedTuple):
    """What a packer gives: rows int32 [n, row_length + 1] and `PLACEMENT`s [m].

    Placements come in order of (row, offset) and may be ahead of their rows. Once a document is
    named, those before it have been placed to their last piece.
    """

    rows: np.ndarray
    placements: np.ndarray


class Packer(Protocol):
    """Turns documents (int32 token ids without BOS and EOS, but see `Whole`) into rows."""

    OVERLAP: ClassVar[
        int
    ]  # tokens at the end of a row that are also those its successor begins with

    def add(self, documents: Sequence[np.ndarray]) -> Packed:
        """Takes documents in; returns the rows that are complete."""

    def finish(self) -> Packed:
        """Returns the rows of all that was held back."""


class Concat:
    """One stream, BOS document EOS BOS document EOS ..., cut with stride `row_length`.

    Neighbouring rows overlap by one token, so that every token of the stream but its first is a
    target exactly once. The last row is filled up with BOS.
    """

    OVERLAP = 1

    def __init__(self, row_length: int, bos_id: int, eos_id: int) -> None:
        self._row_length, self._bos, self._eos = row_length, [bos_id], [eos_id]
        self._rest = np.empty(0, np.int32)
        self._rows = self._documents = 0

    def add(self, documents: Sequence[np.ndarray]) -> Packed:
        """See `Packer`."""
        placements = self._placed(np.array([len(d) + 2 for d in documents], np.int64))
        parts = [part for document in documents for part in (self._bos, document, self._eos)]
        stream = np.concatenate([self._rest, *parts]).astype(np.int32)
        count = max(len(stream) - 1, 0) // self._row_length
        self._rest = stream[count * self._row_length :].copy()
        self._rows += count
        if not count:
            return Packed(_no_rows(self._row_length), placements)
        windows = np.lib.stride_tricks.sliding_window_view(stream, self._row_length + 1)
        return Packed(windows[:: self._row_length][:count], placements)

    def finish(self) -> Packed:
        """See `Packer`."""
        rest, self._rest = self._rest, np.empty(0, np.int32)
        if len(rest) < 2:  # a single token is the last target of the row before
            return Packed(_no_rows(self._row_length), np.empty(0, PLACEMENT))
        self._rows += 1
        return Packed(_row([rest], self._row_length, self._bos[0])[None], np.empty(0, PLACEMENT))

    def _placed(self, sizes: np.ndarray) -> np.ndarray:
        """Where documents of so many tokens begin that follow what is held back."""
        placements = np.zeros(len(sizes), PLACEMENT)
        starts = self._rows * self._row_length + len(self._rest) + np.cumsum(sizes) - sizes
        placements["row"], placements["offset"] = np.divmod(starts, self._row_length)
        placements["tokens"] = sizes
        placements["document"] = self._documents + np.arange(len(sizes))
        self._documents += len(sizes)
        return placements


class BestFit:
    """Whole documents where they fit best: best-fit-decreasing within windows of the corpus.

    A document longer than a row is cut; each further piece begins with BOS again and EOS stands
    only at the real end. A piece of EOS alone would be an empty document: there the last token is
    repeated. No piece is ever split over two rows, and no context of another document precedes it.
    """

    OVERLAP = 0

    def __init__(self, row_length: int, bos_id: int, eos_id: int, window: int = WINDOW) -> None:
        self._row_length, self._bos, self._eos, self._window = row_length, bos_id, eos_id, window
        self._fill = bos_id
        self._pieces: list[np.ndarray] = []
        self._origins: list[tuple[int, int]] = []  # of each piece: document, number in it
        self._held = self._rows = self._documents = 0

    def add(self, documents: Sequence[np.ndarray]) -> Packed:
        """See `Packer`."""
        ready = [Packed(_no_rows(self._row_length), np.empty(0, PLACEMENT))]
        for document in documents:
            for number, piece in enumerate(self._cut(document)):
                self._pieces.append(piece.astype(np.int32))
                self._origins.append((self._documents, number))
                self._held += len(piece)
                if self._held >= self._window:
                    ready.append(self.finish())
            self._documents += 1
        return Packed(*map(np.concatenate, zip(*ready, strict=True)))

    def _cut(self, document: np.ndarray) -> Iterator[np.ndarray]:
        """The pieces of a document, each with its BOS."""
        body = np.append(document, self._eos)
        for start in range(0, len(body), self._row_length):
            start = min(start, max(len(body) - 2, 0))
            yield np.append(self._bos, body[start : start + self._row_length])

    def finish(self) -> Packed:
        """See `Packer`."""
        pieces, self._pieces, self._held = self._pieces, [], 0
        origins, self._origins = self._origins, []
        bins = best_fit_decreasing([len(piece) for piece in pieces], self._row_length + 1)
        if not bins:
            return Packed(_no_rows(self._row_length), np.empty(0, PLACEMENT))
        rows = [
            _row([pieces[i] for i in members], self._row_length, self._fill) for members in bins
        ]
        placements = np.array(
            [
                (self._rows + row, offset, len(pieces[i]), origins[i][1], origins[i][0])
                for row, members in enumerate(bins)
                for i, offset in zip(members, _offsets(pieces, members), strict=True)
            ],
            PLACEMENT,
        )
        self._rows += len(rows)
        return Packed(np.stack(rows), placements)


class Whole(BestFit):
    """Conversations where they fit best, whole and with marks; each comes with its BOS.

    None is longer than a row of `row_length + 1` tokens, none gets an EOS: its last turn has ended.
    """

    def __init__(self, row_length: int, bos_id: int, eos_id: int, window: int = WINDOW) -> None:
        super().__init__(row_length, bos_id, eos_id, window)
        self._fill = bos_id | UNTRAINED  # or, where it is EOS too, the first would be a target

    def _cut(self, document: np.ndarray) -> Iterator[np.ndarray]:
        """The document itself."""
        yield document


PACKERS: dict[str, type[Concat] | type[BestFit]] = {
    "concat": Concat,
    "best_fit": BestFit,
    "whole": Whole,
}
TEXT_PACKERS = ("concat", "best_fit")


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


def _offsets(pieces: Sequence[np.ndarray], members: Sequence[int]) -> Iterator[int]:
    """Where each of these pieces begins in a row of them."""
    return itertools.accumulate((len(pieces[i]) for i in members[:-1]), initial=0)


def _no_rows(row_length: int) -> np.ndarray:
    return np.empty((0, row_length + 1), np.int32)
