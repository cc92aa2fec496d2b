"""Which documents a source's rows hold, and in which rows a document is.

Beside each shard of rows lies `<shard>.documents.parquet`, one line for each piece of a document, in
order of (row, offset): the row of the shard and the index of its BOS there, its tokens (BOS and EOS
included), which piece of its document it is, and where the document is from: file, place and id (see
`corpora.Document`). A shard that begins inside a file of lines counts these from there, since who
wrote it could not know how many came before; metadata.json says how many did.

Files are read one row group at a time, and only those that statistics do not rule out.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet
from etils import epath

from mobilellm_jax.data.packing import PACKERS
from mobilellm_jax.data.rows import read_info, read_metadata, shards_of
from mobilellm_jax.errors import UserError, in_a_line

SUFFIX = ".documents.parquet"
ROW_GROUP = 1 << 16  # lines
SCHEMA = pyarrow.schema(
    [
        ("row", pyarrow.int64()),
        ("offset", pyarrow.int32()),
        ("tokens", pyarrow.int32()),
        ("piece", pyarrow.int32()),
        ("file", pyarrow.string()),
        ("place", pyarrow.int64()),
        ("id", pyarrow.string()),
    ]
)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A document, or what of it is in one row where packing cuts long ones.

    Attributes:
      row: in which it begins, counted over the split as `Rows` does.
      offset: index of its BOS in that row.
      tokens: how many there are from there on, BOS and EOS included; they may go on in later rows.
      piece: its number within the document, from 0.
      file: path or URL of what the document came from.
      place: line, row or record there, from 1.
      id: what the file calls it, "" for nothing.
    """

    row: int
    offset: int
    tokens: int
    piece: int
    file: str
    place: int
    id: str


class Writer:
    """Writes the file beside a shard, tables of `SCHEMA` in order; row groups are of one size."""

    def __init__(self, path: epath.PathLike) -> None:
        self._writer = pyarrow.parquet.ParquetWriter(str(path), SCHEMA, compression="zstd")
        self._held: list[pyarrow.Table] = []
        self._lines = 0

    def add(self, pieces: pyarrow.Table) -> None:
        """Takes more lines in."""
        self._held.append(pieces)
        self._lines += len(pieces)
        while self._lines >= ROW_GROUP:
            self._write(ROW_GROUP)

    def close(self) -> None:
        """Writes what is held back."""
        if self._lines:
            self._write(self._lines)
        self._writer.close()

    def _write(self, count: int) -> None:
        # One chunk: pages must not depend on how the lines came in.
        lines = pyarrow.concat_tables(self._held).combine_chunks()
        self._writer.write_table(lines[:count], row_group_size=count)
        self._held, self._lines = [lines[count:]], self._lines - count


def documents_of(path: epath.PathLike, split: str, first: int, last: int) -> list[Piece]:
    """The pieces with a token in the rows [first, last) of a split, in order.

    Concatenated rows end with the token that the next one begins with, so a document may touch a
    row with its BOS alone.

    Raises:
      UserError: there is no complete source, it lacks the split, or nothing says what its rows hold.
    """
    return [
        piece
        for shard in _shards(path, split)
        for piece in _pieces_in(
            path, shard, np.arange(max(first, shard.first), min(last, shard.first + shard.rows))
        )
    ]


def documents_at(path: epath.PathLike, split: str, rows: np.ndarray) -> list[Piece]:
    """The same of some rows (int64 [n], in any order) anywhere in a split; each file is read once.

    Raises:
      UserError: see `documents_of`.
    """
    rows = np.unique(rows)
    found: list[Piece] = []
    for shard in _shards(path, split):
        ends = np.searchsorted(rows, [shard.first, shard.first + shard.rows])
        found += _pieces_in(path, shard, rows[slice(*ends)])
    return found


def _pieces_in(path: epath.PathLike, shard: "_Shard", rows: np.ndarray) -> list[Piece]:
    """The pieces of a shard with a token in any of its rows, which rise and are counted over the split."""
    if not len(rows):
        return []
    info = read_info(path)
    width = info.row_length + 1
    stride = width - PACKERS[info.packing].OVERLAP
    rows = rows - shard.first
    found: list[Piece] = []
    with shard.open() as table:
        lows = np.array([low for low, _ in _bounds(table, "row")])
        for group, low in enumerate(lows):
            # Pieces of a group begin in its rows and go on up to where the next one begins.
            high = lows[group + 1] if group + 1 < len(lows) else shard.rows
            if np.searchsorted(rows, low - 1) == np.searchsorted(rows, high, "right"):
                continue
            lines = _read(table, group)
            starts = lines["row"].to_numpy() * stride + lines["offset"].to_numpy()
            ends = starts + lines["tokens"].to_numpy()
            least, most = -(-(starts - width + 1) // stride), (ends - 1) // stride  # rows touched
            inside = np.searchsorted(rows, least) < np.searchsorted(rows, most, "right")
            found += shard.pieces(lines.filter(pyarrow.array(inside)))
    return found


def find(
    path: epath.PathLike,
    split: str,
    id: str | None = None,
    file: str | None = None,
    place: int | None = None,
) -> list[Piece]:
    """The pieces of the documents of this id, file and place, in order; None stands for any.

    Raises:
      UserError: there is no complete source, it lacks the split, or nothing says what its rows hold.
    """
    found: list[Piece] = []
    for shard in _shards(path, split):
        after = max(shard.before.values(), default=0)
        with shard.open() as table:
            possible = set(range(table.num_row_groups))
            wanted: list[tuple[str, Any, Any]] = [("id", id, id), ("file", file, file)]
            wanted.append(("place", place, None if place is None else place - after))
            for key, high, low in wanted:
                if high is not None:
                    bounds = enumerate(_bounds(table, key))
                    possible &= {
                        i
                        for i, (least, most) in bounds
                        # Parquet does not tell those that are longer than 4 KB.
                        if (least is None or least <= high) and (most is None or low <= most)
                    }
            for group in sorted(possible):
                lines = _read(table, group)
                for key, value in (("id", id), ("file", file)):
                    if value is not None:
                        lines = lines.filter(pyarrow.compute.equal(lines[key], value))
                pieces = shard.pieces(lines)
                found += [piece for piece in pieces if place in (None, piece.place)]
    return found


@dataclasses.dataclass(frozen=True)
class _Shard:
    """The file beside a shard: rows of the split before it and in it, lines of files before it."""

    path: epath.Path
    first: int
    rows: int
    before: Mapping[str, int]

    @contextlib.contextmanager
    def open(self) -> Iterator[pyarrow.parquet.ParquetFile]:
        try:
            with self.path.open("rb") as raw, pyarrow.parquet.ParquetFile(raw) as table:
                yield table
        except (pyarrow.ArrowException, OSError) as error:
            reason = in_a_line(error)
            raise UserError(
                f"{self.path} cannot be read ({reason}): delete its source and prepare it again."
            ) from None

    def pieces(self, lines: pyarrow.Table) -> list[Piece]:
        return [
            Piece(
                **{
                    **line,
                    "row": self.first + line["row"],
                    "place": line["place"] + self.before.get(line["file"], 0),
                }
            )
            for line in lines.to_pylist()
        ]


def _shards(path: epath.PathLike, split: str) -> Iterator[_Shard]:
    first = 0
    for name, shard in shards_of(read_metadata(path), path, split).items():
        if "sidecar_size" not in shard:
            raise UserError(
                f"{path} does not say which documents its rows hold: prepare it again "
                "(`python -m mobilellm_jax.prepare`)."
            )
        file = epath.Path(path) / (name + SUFFIX)
        yield _Shard(file, first, shard["rows"], shard["before"])
        first += shard["rows"]


def _read(table: pyarrow.parquet.ParquetFile, group: int) -> pyarrow.Table:
    """A row group, in this thread: one of Arrow's may let go of a file of Python's after Python's end.

    That aborts the program.
    """
    return table.read_row_group(group, use_threads=False)


def _bounds(table: pyarrow.parquet.ParquetFile, key: str) -> Iterator[tuple[Any, Any]]:
    """The least and the greatest value of a column in each row group, None where that is not told."""
    column = SCHEMA.get_field_index(key)
    for i in range(table.num_row_groups):
        statistics = table.metadata.row_group(i).column(column).statistics
        yield statistics.min, statistics.max
