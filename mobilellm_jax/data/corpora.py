"""A user's own text: JSON lines, Parquet and plain files as streams of documents.

A corpus is anything with a `name`, a `size` (units of progress) and `documents()`; see `Corpus`.
Documents come in a fixed order, and the held-out ones are chosen by a hash of their text: whatever
the order and the number of files, the same text is on the same side, so a duplicate never stands on
both.
"""

import dataclasses
import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, Protocol

import pyarrow
import pyarrow.parquet
from etils import epath

from mobilellm_jax.errors import UserError

_JSON_LINES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
_UNREADABLE = (
    ".json",
    ".json.gz",
    ".zst",
    ".xz",
    ".bz2",
    ".zip",
    ".tar",
    ".tgz",
    ".tar.gz",
    ".7z",
    ".lz4",
)


@dataclasses.dataclass(frozen=True)
class Document:
    """A text and its side; `progress` is its part in `Corpus.size`."""

    split: str
    text: str
    progress: int


class Corpus(Protocol):
    """A stream of documents that can be read again."""

    @property
    def name(self) -> str:
        """What its source is called."""

    @property
    def size(self) -> int:
        """Sum of `progress` over all documents, for a progress bar; nearly right is enough."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """JSON that changes when the documents (may) have changed."""

    def documents(self) -> Iterator[Document]:
        """All documents, in an order that never changes."""

    def sample(self, budget: int) -> Iterator[str]:
        """Training texts of about `budget` bytes from all over the corpus, always the same."""


@dataclasses.dataclass(frozen=True)
class FileCorpus:
    """Files that match a pattern: JSON lines, Parquet, anything else is one text a file.

    Attributes:
      name: of the source.
      pattern: path with wildcards; `**` goes through folders (local ones). `gs://` works too.
      text_key: field of JSON lines, column of Parquet.
      heldout: share of the documents that is kept out of training, 0 for none.
    """

    name: str
    pattern: str
    text_key: str = "text"
    heldout: float = 0.01

    @property
    def files(self) -> list[epath.Path]:
        """The files, sorted.

        Raises:
          UserError: no file matches, or one is of a kind that cannot be read.
        """
        files = sorted(_glob(self.pattern))
        if not files:
            raise UserError(f"source {self.name}: no file matches {self.pattern!r}.")
        for file in files:
            if file.name.endswith(_UNREADABLE):
                raise UserError(
                    f"source {self.name}: {file} is of a kind that cannot be read; give JSON lines "
                    "(.jsonl, .jsonl.gz), Parquet (.parquet) or plain text, one document a file."
                )
        return files

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().length for file in self.files)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """File names and sizes, not folders: a corpus may be moved."""
        return {
            "files": hashlib.sha256(
                json.dumps([[f.name, f.stat().length] for f in self.files]).encode()
            ).hexdigest(),
            "text_key": self.text_key,
            "heldout": self.heldout,
        }

    def documents(self) -> Iterator[Document]:
        """All documents that are not empty.

        Raises:
          UserError: a file is not what its name says, with file and line.
        """
        for file in self.files:
            yield from self._read(file)

    def sample(self, budget: int) -> Iterator[str]:
        """The beginning of every file, in equal parts."""
        files = self.files
        for file in files:
            left = budget // len(files) + 1
            for document in self._read(file):
                if document.split == "train":
                    yield document.text
                    left -= len(document.text)
                if left <= 0:
                    break

    def _read(self, file: epath.Path) -> Iterator[Document]:
        if file.name.endswith(_JSON_LINES):
            texts = self._json_lines(file)
        elif file.name.endswith(".parquet"):
            texts = self._parquet(file)
        else:
            texts = _plain(file)
        for text, where, progress in texts:
            if not isinstance(text, str):
                raise UserError(
                    f"{where}: {self.text_key!r} is not a text but {type(text).__name__}."
                )
            if text.strip():
                yield Document(split_of(_utf8(text, where), self.heldout), text, progress)

    def _json_lines(self, file: epath.Path) -> Iterator[tuple[Any, str, int]]:
        position = 0
        with file.open("rb") as raw:
            for number, line in enumerate(_lines(file, raw), 1):
                where = f"{file}, line {number}"
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except UnicodeDecodeError:
                    raise UserError(f"{where}: not UTF-8.") from None
                except ValueError as error:
                    raise UserError(f"{where}: not JSON ({error}).") from None
                if not isinstance(record, dict) or self.text_key not in record:
                    keys = ", ".join(record) if isinstance(record, dict) else "no fields at all"
                    raise UserError(
                        f"{where}: there is no field {self.text_key!r} (it has {keys}); see "
                        "--text_key."
                    )
                before, position = position, raw.tell()  # in the compressed file
                yield record[self.text_key], where, position - before

    def _parquet(self, file: epath.Path) -> Iterator[tuple[Any, str, int]]:
        with file.open("rb") as raw:
            try:
                table = pyarrow.parquet.ParquetFile(raw)
                if self.text_key not in table.schema_arrow.names:
                    raise UserError(
                        f"{file}: there is no column {self.text_key!r} "
                        f"(it has {', '.join(table.schema_arrow.names)}); see --text_key."
                    )
                progress = file.stat().length // max(table.metadata.num_rows, 1)
                number = 0
                for batch in table.iter_batches(batch_size=1024, columns=[self.text_key]):
                    for text in batch.column(0).to_pylist():
                        number += 1
                        yield text, f"{file}, row {number}", progress
            except (pyarrow.ArrowInvalid, pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{file} is not a readable Parquet file ({error}).") from None


def split_of(key: str | bytes, heldout: float) -> str:
    """`heldout` for a fixed share of all keys, `train` for the others."""
    digest = hashlib.blake2b(
        key if isinstance(key, bytes) else key.encode(), digest_size=8
    ).digest()
    return "heldout" if int.from_bytes(digest, "big") < heldout * 2**64 else "train"


def _glob(pattern: str) -> Iterable[epath.Path]:
    if "://" not in pattern:
        found = glob.glob(epath.Path(pattern).expanduser().__fspath__(), recursive=True)
        return [path for path in map(epath.Path, found) if path.is_file()]
    parts = epath.Path(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return list(epath.Path(*parts[:fixed]).glob("/".join(parts[fixed:])))


def _lines(file: epath.Path, raw: BinaryIO) -> Iterator[bytes]:
    if not file.name.endswith(".gz"):
        yield from iter(raw.readline, b"")
        return
    try:
        yield from gzip.GzipFile(fileobj=raw)
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{file} is not a whole gzip file ({error}).") from None


def _plain(file: epath.Path) -> Iterator[tuple[str, str, int]]:
    content = file.read_bytes()
    try:
        yield content.decode("utf-8"), str(file), len(content)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{file}, line {line}: not UTF-8.") from None


def _utf8(text: str, where: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{where}: half of a surrogate pair (\\ud800 to \\udfff) is not text."
        ) from None
