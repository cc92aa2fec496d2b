"""Which rows and documents a run has read, and where in it a document comes.

All of it follows from the plan and the number of rows consumed; only the documents of a row are
looked up, beside the shards (`documents.py`).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np

from mobilellm_jax.data.contexts import Contexts
from mobilellm_jax.data.documents import Piece, documents_of, find
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
    for i, s, epoch, row, tokens in zip(
        index.tolist(),
        at.source.tolist(),
        at.epoch.tolist(),
        at.row.tolist(),
        read["tokens"],
        strict=True,
    ):
        found = documents_in(sources[s], row)
        yield SeenRow(i, mixture.plan.names[s], epoch, row, token_ids(tokens), found)


def documents_in(rows: Contexts, row: int) -> list[Piece]:
    """The pieces of documents that have a token in a row.

    Raises:
      UserError: the files beside the shards cannot be read.
    """
    first, count, begin = rows.stored(row)
    stride = _stride(rows)
    end = begin + rows.row_length + 1

    def inside(piece: Piece) -> bool:
        start = (piece.row - first) * stride + piece.offset
        return start < end and start + piece.tokens > begin

    pieces = documents_of(rows.info.path, rows.split, first, first + count)
    return [piece for piece in pieces if inside(piece)]


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
