"""Text as streams of documents, cut into parts that can be read apart, on any machine.

A corpus is anything with a `name`, a `fingerprint`, a `size`, `parts()` and a `sample()`; see
`Corpus`. Its parts follow from its inputs alone, and their documents, part after part, come in a
fixed order. The held-out ones are chosen by a hash of their text: whatever the order and the number
of files, the same text is on the same side, so a duplicate never stands on both.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from mobilellm_jax.data import inputs
from mobilellm_jax.data.inputs import InputFile, Slice
from mobilellm_jax.errors import UserError

PART = 256 << 20  # bytes of input of which about one part is made


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, its side and where it is from.

    Attributes:
      split: `train` or `heldout`.
      text: never empty.
      progress: its part in `Part.size`.
      file: path, URL or name of what holds it.
      place: line, row or record there, from 1; 1 where a file is one document. In a part that begins
        inside a file of lines, the first line of the part is 1.
      id: what its file calls it, "" for nothing.
    """

    split: str
    text: str
    progress: int
    file: str = ""
    place: int = 1
    id: str = ""


class Part(Protocol):
    """Some of a corpus; picklable, small, and read again and again with the same result."""

    @property
    def size(self) -> int:
        """Sum of `progress` over its documents, for a progress bar; nearly right is enough."""

    def documents(self) -> Iterator[Document]:
        """Its documents, in order."""

    def unfinished(self) -> Mapping[str, int]:
        """Lines of this part in a file with which the next one goes on; empty if it ends with a file."""


class Corpus(Protocol):
    """A stream of documents that can be read again."""

    @property
    def name(self) -> str:
        """What its source is called."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """JSON that changes when the documents, or how they are cut, (may) have changed."""

    def parts(self) -> Sequence[Part]:
        """All of it, cut by the inputs alone; documents come in an order that never changes."""

    def sample(self, budget: int) -> Iterator[str]:
        """Training texts of about `budget` bytes from all over the corpus, always the same."""


def documents(corpus: Corpus) -> Iterator[Document]:
    """All documents of a corpus, part after part."""
    return (document for part in corpus.parts() for document in part.documents())


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is made of records.

    Attributes:
      text_key: field of the text; `a+b` joins two.
      id_key: field of the id.
      heldout: share of the documents that is held out.
      share: of the documents that are read at all: a proxy of the corpus, chosen by a hash of the
        text, so that a smaller share is part of a larger one.
    """

    text_key: str
    id_key: str
    heldout: float
    share: float = 1.0

    @property
    def beside(self) -> Sequence[str]:
        """Fields that are read as well, if they are there."""
        return ()

    def document(
        self, values: Sequence[Any], where: Callable[[], str], **origin: Any
    ) -> Document | None:
        """The document of what `text_key` and `beside` name, None if it is empty; `origin` are its fields.

        Raises:
          UserError: it is no text.
        """
        text = inputs.joined(values)
        if not isinstance(text, str):
            kind = type(text).__name__
            raise UserError(f"{where()}: {self.text_key!r} is not a text but {kind}.")
        try:
            encoded = text.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{where()}: half of a surrogate pair (\\ud800 to \\udfff) is not text."
            ) from None
        if not text.strip() or not chosen(encoded, self.share):
            return None
        return Document(split_of(encoded, self.heldout), text, **origin)


@dataclasses.dataclass(frozen=True)
class FilePart:
    """Slices of files, one after the other."""

    slices: tuple[Slice, ...]
    reading: Reading

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(piece.size for piece in self.slices)

    def documents(self) -> Iterator[Document]:
        """All that are not empty.

        Raises:
          UserError: a file is not what its name says, with file and line.
        """
        for piece in self.slices:
            reading = self.reading
            for record in inputs.records(piece, reading.text_key, reading.id_key, reading.beside):
                document = reading.document(
                    record.values,
                    functools.partial(inputs.where, piece, record.place),
                    progress=record.progress,
                    file=piece.file.path,
                    place=record.place,
                    id=record.id,
                )
                if document:
                    yield document

    def unfinished(self) -> Mapping[str, int]:
        """See `Part`."""
        return inputs.unfinished(self.slices[-1])


@dataclasses.dataclass(frozen=True)
class FileCorpus:
    """Files that match a pattern: JSON lines, Parquet, anything else is one text a file.

    Attributes:
      name: of the source.
      pattern: path or URL (of any file system that fsspec knows) with wildcards; `**` goes through
        folders.
      text_key: field of JSON lines, column of Parquet.
      heldout: share of the documents that is kept out of training, 0 for none.
      id_key: field or column of what a document is called; it may be missing.
      share: of the documents that are read at all, see `Reading`.
      part_size: bytes of a part.
    """

    name: str
    pattern: str
    text_key: str = "text"
    heldout: float = 0.01
    id_key: str = "id"
    share: float = 1.0
    part_size: int = PART

    @property
    def files(self) -> list[InputFile]:
        """The files, sorted.

        Raises:
          UserError: no file matches, or one is of a kind that cannot be read.
        """
        files = inputs.matching(self.pattern)
        if not files:
            raise UserError(f"source {self.name}: no file matches {self.pattern!r}.")
        for file in files:
            if not file.readable:
                raise UserError(
                    f"source {self.name}: {file.path} is of a kind that cannot be read; give JSON "
                    "lines (.jsonl, .jsonl.gz, .jsonl.zst), Parquet (.parquet) or plain text, one "
                    "document a file."
                )
        return files

    @property
    def fingerprint(self) -> dict[str, Any]:
        """File names and sizes, not folders: a corpus may be moved."""
        return {
            "files": hashlib.sha256(
                json.dumps([[file.name, file.size] for file in self.files]).encode()
            ).hexdigest(),
            "text_key": self.text_key,
            "id_key": self.id_key,
            "heldout": self.heldout,
            "share": self.share,
            "part_size": self.part_size,
        }

    def parts(self) -> list[FilePart]:
        """See `Corpus`: as many slices as make up `part_size`, at least one."""
        pieces = (piece for file in self.files for piece in inputs.slices(file, self.part_size))
        return [FilePart(some, self._reading) for some in _grouped(pieces, self.part_size)]

    def sample(self, budget: int) -> Iterator[str]:
        """The beginning of every file, in equal parts."""
        files = self.files
        for file in files:
            whole = FilePart((Slice(file, 0, None, file.size),), self._reading)
            yield from first_texts(whole.documents(), budget // len(files) + 1)

    @property
    def _reading(self) -> Reading:
        return Reading(self.text_key, self.id_key, self.heldout, self.share)


def first_texts(documents: Iterable[Document], characters: int) -> Iterator[str]:
    """The texts to train on that come first, until they have so many characters."""
    for document in documents:
        if document.split == "train":
            yield document.text
            characters -= len(document.text)
        if characters <= 0:
            break


def chosen(text: bytes, share: float) -> bool:
    """Whether a text is in a share of all texts, whatever its split."""
    if share >= 1:
        return True
    digest = hashlib.blake2b(text, digest_size=8, person=b"share").digest()
    return int.from_bytes(digest, "big") < share * 2**64


def split_of(key: str | bytes, heldout: float) -> str:
    """`heldout` for a fixed share of all keys, `train` for the others."""
    digest = hashlib.blake2b(
        key if isinstance(key, bytes) else key.encode(), digest_size=8
    ).digest()
    return "heldout" if int.from_bytes(digest, "big") < heldout * 2**64 else "train"


def _grouped(pieces: Iterable[Slice], size: int) -> Iterator[tuple[Slice, ...]]:
    group: list[Slice] = []
    held = 0
    for piece in pieces:
        if group and held + piece.size > size:
            yield tuple(group)
            group, held = [], 0
        group.append(piece)
        held += piece.size
    if group:
        yield tuple(group)
