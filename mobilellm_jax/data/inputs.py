"""Files to read, here or behind any URL that fsspec knows, and the records in slices of them.

JSON lines may be plain (then a file can be cut at any byte), gzip or Zstandard; a Parquet file can
be cut between row groups; anything else is one text a file. Text is UTF-8; the byte order mark that
some editors put before it is no part of it.
"""

import dataclasses
import glob
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import fsspec
import pyarrow
import pyarrow.parquet
from etils import epath

from mobilellm_jax.errors import UserError

_PLAIN_LINES = (".jsonl", ".ndjson")
_PACKED = (".gz", ".zst")
# What is published as .json.gz holds JSON lines; a plain .json is more often one value.
_LINES = (*_PLAIN_LINES, *(f"{end}{p}" for end in (*_PLAIN_LINES, ".json") for p in _PACKED))
_UNREADABLE = (".json", ".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".tgz", ".7z", ".lz4")
_BUFFER = 1 << 20  # bytes that are read at once


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file by path or URL, with its size in bytes."""

    path: str
    size: int

    @property
    def name(self) -> str:
        """Without its folder, and without what a web address asks for behind it (`?download=true`)."""
        path = self.path
        if path.startswith(("http://", "https://")):
            path = path.partition("#")[0].partition("?")[0]
        return PurePosixPath(path).name

    @property
    def readable(self) -> bool:
        """Whether it is of a kind that is known, by its name."""
        return self.name.endswith(_LINES) or not self.name.endswith(_UNREADABLE)

    def open(self) -> BinaryIO:
        """The file for reading.

        Raises:
          UserError: it is gone.
        """
        try:
            if "://" not in self.path:
                return open(self.path, "rb", buffering=_BUFFER)
            return io.BufferedReader(fsspec.open(self.path, "rb").open(), _BUFFER)
        except FileNotFoundError:
            raise UserError(f"{self.path} is no longer there: prepare again.") from None


@dataclasses.dataclass(frozen=True)
class Slice:
    """A file or part of one: bytes [start, stop) of JSON lines, row groups [start, stop) of Parquet.

    `stop` is None where it reaches to the end. `size` is how many bytes of the file it is, nearly.
    """

    file: InputFile
    start: int
    stop: int | None
    size: int


@dataclasses.dataclass(frozen=True)
class Record:
    """What stands at one place of a slice.

    Attributes:
      values: of the fields that make up the document, as the file has them.
      id: what the file calls it, "" for nothing.
      place: line, counted from the begin of the slice, or row of the file, both from 1.
      progress: bytes of the file that were read for it.
    """

    values: Sequence[Any]
    id: str
    place: int
    progress: int


def matching(pattern: str) -> list[InputFile]:
    """The files that match a pattern with wildcards, sorted; `**` goes through folders.

    Raises:
      UserError: the pattern is a URL whose file system is not known, not installed, or does not say how
        long its files are; or a name is not UTF-8.
    """
    if "::" in pattern:
        raise UserError(
            f"{pattern} is a file inside of another (::), which is not read: unpack it first."
        )
    if "://" not in pattern:
        found = glob.glob(str(Path(pattern).expanduser()), recursive=True)
        files = [
            InputFile(path, Path(path).stat().st_size) for path in found if Path(path).is_file()
        ]
    else:
        try:
            system, path = fsspec.core.url_to_fs(pattern)
        except (ImportError, ValueError) as error:
            raise UserError(f"{pattern} cannot be read ({error}).") from None
        files = [
            InputFile(system.unstrip_protocol(name), _size(system, name, details))
            for name, details in system.glob(path, detail=True).items()
            if details["type"] == "file"
        ]
    for file in files:
        try:
            file.path.encode()
        except UnicodeEncodeError:
            raise UserError(f"the name of {file.path!r} is not UTF-8: rename it.") from None
    return sorted(files, key=lambda file: PurePosixPath(file.path))


def _size(system: fsspec.AbstractFileSystem, name: str, details: Mapping[str, Any]) -> int:
    """Bytes of a file, also where a listing of its folder does not tell them, as of web servers."""
    size = details["size"]
    size = system.size(name) if size is None else size
    if size is None:
        raise UserError(
            f"{system.unstrip_protocol(name)} does not say how long it is: download it first."
        )
    return int(size)


def text_lines(path: epath.PathLike) -> Iterator[str]:
    """The lines of a text file, which may be gzip by its name, each with the newline that ends it.

    Raises:
      UserError: it is not there, not UTF-8 or not whole.
    """
    try:
        with epath.Path(path).open("rb") as raw:
            content: Any = gzip.GzipFile(fileobj=raw) if str(path).endswith(".gz") else raw
            yield from io.TextIOWrapper(content, encoding="utf-8-sig")
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}).") from None


def slices(file: InputFile, size: int) -> list[Slice]:
    """A file cut into slices of about `size` bytes, as far as its kind can be cut."""
    if file.size > size and file.name.endswith(_PLAIN_LINES):
        count = -(-file.size // size)
        bounds = [file.size * i // count for i in range(count + 1)]
        return [
            Slice(file, start, None if stop == file.size else stop, stop - start)
            for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
        ]
    if file.size > size and file.name.endswith(".parquet"):
        return _row_groups(file, size)
    return [Slice(file, 0, None, file.size)]


def records(
    piece: Slice, text_key: str, id_key: str, beside: Sequence[str] = ()
) -> Iterator[Record]:
    """What is in a slice, in order.

    Args:
      piece: the slice.
      text_key: field of JSON lines or column of Parquet with the text; `a+b` joins two.
      id_key: field or column of what a document is called; it may be missing.
      beside: further ones that may be missing, whose values, or None, come behind those of the text.

    Raises:
      UserError: a file is not what its name says, with file and line.
    """
    if piece.file.name.endswith(_LINES):
        return _json_lines(piece, text_key, id_key, beside)
    if piece.file.name.endswith(".parquet"):
        return _parquet(piece, text_key, id_key, beside)
    return _plain(piece.file, beside)


def where(piece: Slice, place: int) -> str:
    """A place of a slice, for people."""
    if piece.file.name.endswith(".parquet"):
        return f"{piece.file.path}, row {place}"
    if not piece.file.name.endswith(_LINES):
        return piece.file.path
    before = _count(Slice(piece.file, 0, piece.start, piece.start)) if piece.start else 0
    return f"{piece.file.path}, line {before + place}"


def unfinished(piece: Slice) -> dict[str, int]:
    """How many lines of its file a slice has, if it ends inside one of lines; reads it."""
    if piece.stop is None or not piece.file.name.endswith(_PLAIN_LINES):
        return {}
    return {piece.file.path: _count(piece)}


def keys_of(text_key: str) -> list[str]:
    """The fields or columns that a text is made of: `a+b` names two."""
    return text_key.split("+")


def joined(values: Sequence[Any]) -> Any:
    """The text of several fields, a blank line between them; those that are empty are left out.

    What is no text comes back as it is, to be told of.
    """
    if len(values) == 1:
        return values[0]
    wrong = [value for value in values if not isinstance(value, str | None)]
    return wrong[0] if wrong else "\n\n".join(filter(None, values))


def text_of(value: Any) -> str:
    """An id as text, "" for none; half a surrogate pair in it becomes a question mark."""
    return "" if value is None else str(value).encode("utf-8", "replace").decode()


def _json_lines(
    piece: Slice, text_key: str, id_key: str, beside: Sequence[str]
) -> Iterator[Record]:
    file, keys = piece.file, keys_of(text_key)
    with file.open() as raw:
        position = piece.start
        for number, line in enumerate(_lines(piece, raw), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except UnicodeDecodeError:
                raise UserError(f"{where(piece, number)}: not UTF-8.") from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where(piece, number)}: not JSON ({error}).") from None
            known = record if isinstance(record, dict) else {}
            if missing := [key for key in keys if key not in known]:
                there = ", ".join(known) or "no fields at all"
                raise UserError(
                    f"{where(piece, number)}: there is no field {missing[0]!r} (it has {there}); see "
                    "--text_key, or --messages_key for conversations."
                )
            before, position = position, raw.tell()  # in the compressed file
            progress = max(position - before, 0)
            values = [record.get(key) for key in (*keys, *beside)]
            yield Record(values, text_of(record.get(id_key)), number, progress)


def _lines(piece: Slice, raw: BinaryIO) -> Iterator[bytes]:
    file = piece.file
    kinds: Mapping[str, tuple[str, Callable[[], Iterable[bytes]]]] = {
        ".gz": ("gzip", lambda: gzip.GzipFile(fileobj=raw)),
        ".zst": ("Zstandard", lambda: _unpacked(raw)),
    }
    suffix = PurePosixPath(file.name).suffix
    if suffix not in kinds:
        yield from _lines_between(raw, piece)
        return
    kind, opened = kinds[suffix]
    try:
        yield from opened()
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{file.path} is not a whole {kind} file ({error}).") from None


def _unpacked(raw: BinaryIO) -> Iterable[bytes]:
    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
    return io.BufferedReader(stream, _BUFFER)


def _lines_between(raw: BinaryIO, piece: Slice) -> Iterator[bytes]:
    """The lines that begin in the slice: what a line before has left at its begin is skipped."""
    position = piece.start
    if position:
        raw.seek(position - 1)
        position += len(raw.readline()) - 1
    stop = piece.file.size if piece.stop is None else piece.stop
    while position < stop and (line := raw.readline()):
        position += len(line)
        yield line


def _count(piece: Slice) -> int:
    with piece.file.open() as raw:
        return sum(1 for _ in _lines_between(raw, piece))


def _row_groups(file: InputFile, size: int) -> list[Slice]:
    with file.open() as raw, _parquet_file(file, raw) as table:
        groups = [table.metadata.row_group(i) for i in range(table.num_row_groups)]
    stored = [
        sum(group.column(i).total_compressed_size for i in range(group.num_columns))
        for group in groups
    ]
    cuts, held = [0], 0
    for i, group_size in enumerate(stored):
        if held and held + group_size > size:
            cuts.append(i)
            held = 0
        held += group_size
    stops = [*cuts[1:], None]
    return [
        Slice(file, start, stop, sum(stored[start:stop]))
        for start, stop in zip(cuts, stops, strict=True)
    ]


def _parquet(piece: Slice, text_key: str, id_key: str, beside: Sequence[str]) -> Iterator[Record]:
    file = piece.file
    with file.open() as raw, _parquet_file(file, raw) as table:
        names = table.schema_arrow.names
        keys = keys_of(text_key)
        if missing := [key for key in keys if key not in names]:
            raise UserError(
                f"{file.path}: there is no column {missing[0]!r} (it has {', '.join(names)}); see "
                "--text_key, or --messages_key for conversations."
            )
        rows = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        number = sum(rows[: piece.start])
        groups = range(table.num_row_groups)[piece.start : piece.stop]
        progress = piece.size // max(sum(rows[piece.start : piece.stop]), 1)
        there = [key for key in (*beside, id_key) if key in names]
        columns = list(dict.fromkeys([*keys, *there]))
        try:
            for batch in table.iter_batches(1024, list(groups), columns, use_threads=False):
                read = {key: batch.column(key).to_pylist() for key in columns}
                none = [None] * len(batch)
                values = [read.get(key, none) for key in (id_key, *keys, *beside)]
                for name, *found in zip(*values, strict=True):
                    number += 1
                    yield Record(found, text_of(name), number, progress)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"{file.path} is not a readable Parquet file ({error}).") from None


def _parquet_file(file: InputFile, raw: BinaryIO) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(raw)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file.path} is not a readable Parquet file ({error}).") from None


def _plain(file: InputFile, beside: Sequence[str]) -> Iterator[Record]:
    with file.open() as raw:
        content = raw.read()
    try:
        yield Record([content.decode("utf-8-sig"), *[None] * len(beside)], "", 1, len(content))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{file.path}, line {line}: not UTF-8.") from None
