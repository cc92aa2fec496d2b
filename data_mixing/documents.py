"""The documents that probes are chosen from, in a file that is read at any place.

They are the documents of one split of a corpus, copied once: what is asked of them later, in whatever
order, needs the memory of the texts asked for and no second reading of the corpus.
"""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import tqdm

from mobilellm_jax.data.corpora import Corpus
from mobilellm_jax.files import replaced

SPLITS = ("heldout", "train", "all")
BATCH = 1024  # documents in a batch of the file

_SCHEMA = pyarrow.schema(
    {
        "key": pyarrow.binary(),
        "bytes": pyarrow.int64(),
        "id": pyarrow.string(),
        "file": pyarrow.string(),
        "place": pyarrow.int64(),
        "text": pyarrow.large_string(),
    }
)


class Documents:
    """The documents in a file of `copy`, by number; texts stay in the file until they are asked for."""

    def __init__(self, path: Path) -> None:
        """Opens the file; it is mapped, not read."""
        self._table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
        self.keys: list[bytes] = self._table["key"].to_pylist()

    def __len__(self) -> int:
        """How many."""
        return len(self.keys)

    def column(self, name: str) -> pyarrow.ChunkedArray:
        """`bytes`, `id`, `file` or `place` of all."""
        return self._table[name]

    def value(self, name: str, number: int) -> str | int:
        """The same of one document; also its `text`."""
        found: str | int = self._table[name][number].as_py()
        return found

    def text(self, number: int) -> str:
        """The text of one document."""
        return str(self.value("text", number))


def key(text: str) -> bytes:
    """16 bytes by which texts are told apart."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def copy(corpus: Corpus, split: str, path: Path) -> None:
    """Writes the documents of a split into a file, in the order of the corpus.

    Args:
      corpus: what to read.
      split: `heldout`, `train` or `all`.
      path: the file to make; it is there whole or not at all.
    """
    with (
        replaced(path) as unfinished,
        pyarrow.OSFile(str(unfinished), "wb") as raw,
        pyarrow.ipc.new_file(raw, _SCHEMA) as writer,
    ):
        rows: list[tuple] = []
        for row in _rows(corpus, split):
            rows.append(row)
            if len(rows) == BATCH:
                writer.write_batch(_batch(rows))
                rows = []
        writer.write_batch(_batch(rows))


def _batch(rows: list[tuple]) -> pyarrow.RecordBatch:
    columns = zip(*rows, strict=True) if rows else [()] * len(_SCHEMA)
    return pyarrow.record_batch(
        [pyarrow.array(c, field.type) for c, field in zip(columns, _SCHEMA, strict=True)],
        schema=_SCHEMA,
    )


def _rows(corpus: Corpus, split: str) -> Iterator[tuple]:
    parts = corpus.parts()
    before: dict[str, int] = {}  # lines of a file in the parts before
    with tqdm.tqdm(
        total=sum(part.size for part in parts),
        desc=f"{corpus.name}: read",
        unit="B",
        unit_scale=True,
        disable=not sys.stderr.isatty(),
    ) as bar:
        for part in parts:
            for document in part.documents():
                bar.update(document.progress)
                if split not in (document.split, "all"):
                    continue
                size = len(document.text.encode())
                place = document.place + before.get(document.file, 0)
                named = document.id, document.file, place
                yield key(document.text), size, *named, document.text
            before = {file: before.get(file, 0) + n for file, n in part.unfinished().items()}
