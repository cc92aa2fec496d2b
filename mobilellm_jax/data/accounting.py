"""Which rows and documents a run has read, and where in it a document comes.

All of it follows from the plan and the number of rows consumed; only the documents of a row are
looked up, beside the shards (`documents.py`).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np

from mobilellm_jax.data.contexts import Contexts
from mobilellm_jax.data.documents import Piece, documents_at, find
from mobilellm_jax.data.mixture import Mixture
from mobilellm_jax.data.packing import PACKERS, token_ids


@dataclasses.dataclass(frozen=True)
class SeenRow:
    """A row of the run: its number, where it is from, what is in it."""

    index: int  # in the run
    source: str
    epoch: int
    row: int  # of the source's training split, at the run's row length
    tokens: np.ndarray  # int32 [row_length + 1], ids without marks
    documents: list[Piece]


@dataclasses.dataclass(frozen=True)
class Occurrence:
    """A row of the run that holds a part of a document."""

    source: str
    piece: Piece
    index: int  # in the run
    epoch: int


def seen_rows(mixture: Mixture, first: int, last: int) -> Iterator[SeenRow]:
    """The rows [first, last) of a run with their documents.

    Raises:
      UserError: rows or the files beside them cannot be read.
    """
    index = np.arange(first, last)
    sources = cast(Sequence[Contexts], mixture.sources)
    at, read = mixture.locate(index), mixture.read(index)
    found: dict[int, list[Piece]] = {}
    for s in np.unique(at.source).tolist():
        mine = np.flatnonzero(at.source == s)
        of_rows = documents_placed(sources[s], at.row[mine])
        found |= {
            n: [one.piece for one in placed]
            for n, placed in zip(mine.tolist(), of_rows, strict=True)
        }
    for n, i in enumerate(index.tolist()):
        name, row = mixture.plan.names[at.source[n]], int(at.row[n])
        yield SeenRow(i, name, int(at.epoch[n]), row, token_ids(read["tokens"][n]), found[n])


def documents_in(rows: Contexts, row: int) -> list[Piece]:
    """The pieces of documents that have a token in a row.

    Raises:
      UserError: the files beside the shards cannot be read.
    """
    return [placed.piece for placed in documents_placed(rows, np.array([row]))[0]]


@dataclasses.dataclass(frozen=True)
class Placed:
    """A piece of a document in a row: the tokens [first, last) of the row are its own, from `begin` on."""

    piece: Piece
    first: int
    last: int
    begin: int


def documents_placed(rows: Contexts, indices: np.ndarray) -> list[list[Placed]]:
    """The pieces of documents that have a token in some rows, of each row in order.

    Args:
      rows: of a source.
      indices: int64 [n], numbers of rows, in any order.

    Raises:
      UserError: the files beside the shards cannot be read.
    """
    ranges = [rows.stored(index) for index in indices.tolist()]
    stored = [np.arange(first, first + count) for first, count, _ in ranges]
    pieces = documents_at(rows.info.path, rows.split, np.concatenate(stored)) if ranges else []
    stride, length = _stride(rows), rows.info.row_length
    starts = np.array([piece.row * stride + piece.offset for piece in pieces], np.int64)
    longest = max((piece.tokens for piece in pieces), default=0)
    found = []
    for first, count, begin in ranges:
        near = np.searchsorted(starts, [first * stride - longest, (first + count) * stride])
        placed = []
        for piece in pieces[slice(*near)]:
            # Each stored row gives `length` tokens to a longer one, see `contexts`.
            start = (piece.row - first) * length + piece.offset - begin
            end = start + piece.tokens
            if stride > length and piece.row < first + count - 1:
                end = min(end, (piece.row - first + 1) * length - begin)
            first_token, last_token = max(start, 0), min(end, rows.row_length + 1)
            if first_token < last_token:
                placed.append(Placed(piece, first_token, last_token, first_token - start))
        found.append(placed)
    return found


def occurrences(
    mixture: Mixture,
    rows: int,
    id: str | None = None,
    file: str | None = None,
    place: int | None = None,
) -> list[Occurrence]:
    """Where among the first `rows` rows of a run the documents of an id, file and place come.

    Raises:
      UserError: the files beside the shards cannot be read.
    """
    found = []
    for s, source in enumerate(cast(Sequence[Contexts], mixture.sources)):
        for piece in find(source.info.path, source.split, id, file, place):
            start = piece.row * _stride(source) + piece.offset
            last = (start + max(piece.tokens, 2) - 2) // _stride(source)
            for row in source.made_of(piece.row, last):
                if piece in documents_in(source, row):
                    for index, epoch in mixture.occurrences(s, row, rows):
                        found.append(Occurrence(mixture.plan.names[s], piece, index, epoch))
    return sorted(found, key=lambda occurrence: occurrence.index)


def _stride(rows: Contexts) -> int:
    """Tokens from the begin of a stored row to that of the next."""
    return rows.info.row_length + 1 - PACKERS[rows.info.packing].OVERLAP
