"""One part of a corpus to one shard per split: the unit of work, the same on every machine.

`prepare_part` reads, tokenizes, packs and stores a part; it needs nothing but the `PartJob` and can
be done anywhere, twice or again. `prepare_parts` does a source's parts in processes of this machine,
`on_beam.py` those of many sources on a cluster.
"""

import collections
import dataclasses
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow
import tqdm

from mobilellm_jax.data import documents
from mobilellm_jax.data.corpora import Corpus, Document, Part
from mobilellm_jax.data.encoding import (
    Encode,
    Encoded,
    Run,
    Workers,
    encode_texts,
    encoded,
    load_tokenizer,
)
from mobilellm_jax.data.packing import PACKERS, token_ids
from mobilellm_jax.data.shards import Batch, SourceWriter
from mobilellm_jax.data.tokenizers import Tokenizer

Told = Callable[[int, int], None]  # takes progress and tokens


@dataclasses.dataclass(frozen=True)
class PartJob:
    """A part to prepare, with all that this takes; picklable."""

    writer: SourceWriter
    number: int
    part: Part
    tokenizer_path: str
    encode: Encode


def jobs_of(
    corpus: Corpus, writer: SourceWriter, tokenizer_path: str, encode: Encode = encode_texts
) -> list[PartJob]:
    """All parts of a corpus."""
    parts = enumerate(corpus.parts())
    return [PartJob(writer, number, part, tokenizer_path, encode) for number, part in parts]


def prepare_part(job: PartJob, run: Run = map, told: Told = lambda done, tokens: None) -> int:
    """Does a job, whether or not it was done before; returns the number of tokens.

    Args:
      job: what to do.
      run: spreads the tokenizing over processes; the result does not depend on it.
      told: is called with progress and tokens now and then.

    Raises:
      UserError: bad input, or the disk is full.
    """
    tokenizer = load_tokenizer(job.tokenizer_path)
    chunks = encoded(job.part.documents(), job.tokenizer_path, run, job.encode)
    batches = packed(chunks, tokenizer, job.writer.info.row_length, job.writer.info.packing, told)
    mark = job.writer.write_part(job.number, batches, job.part.unfinished())
    return sum(shard["tokens"] for shard in mark["shards"])


def prepare_parts(name: str, jobs: Sequence[PartJob], workers: Workers) -> None:
    """Does those of a source's jobs that are not done yet, and tells how far it is.

    With at least as many as there are workers each worker takes whole parts. Fewer are done one after the
    other, and their tokenizing is spread over the workers.

    Raises:
      UserError: bad input, a full disk, or a process was killed.
    """
    todo = [job for job in jobs if not job.writer.is_written(job.number)]
    with _Progress(name, sum(job.part.size for job in jobs)) as progress:
        progress.add(sum(job.part.size for job in jobs) - sum(job.part.size for job in todo), 0)
        if workers.count == 1 or len(todo) < workers.count:
            for job in todo:
                prepare_part(job, workers.map, progress.add)
        else:
            for job, tokens in zip(todo, workers.map(prepare_part, todo), strict=True):
                progress.add(job.part.size, tokens)


def packed(
    chunks: Iterable[Encoded], tokenizer: Tokenizer, row_length: int, packing: str, told: Told
) -> Iterator[Batch]:
    """Encoded documents as batches of rows, `train` and `heldout` packed apart.

    The tokens of a batch are those of its documents with one BOS and one EOS each (with all that
    its template makes of a conversation); its rows may hold documents of earlier batches, since
    packers hold some back.
    """
    packers = {
        split: PACKERS[packing](row_length, tokenizer.bos_id, tokenizer.eos_id)
        for split in ("train", "heldout")
    }
    origins = {split: _Origins() for split in packers}
    ends, piece_bytes_V = 2, None
    if packing == "whole":  # BOS is in the ids, and the text of a document is that of its ids
        ends, piece_bytes_V = 0, tokenizer.piece_bytes()

    def size(document: Document, ids: np.ndarray) -> int:
        if piece_bytes_V is None:
            return len(document.text.encode())
        return int(piece_bytes_V[token_ids(ids)].sum())

    for texts, encoded_texts in chunks:
        for split in packers:
            of_split = [
                pair for pair in zip(texts, encoded_texts, strict=True) if pair[0].split == split
            ]
            kept = [(document, found.ids) for document, found in of_split if found.ids is not None]
            tokens = [ids for _, ids in kept]
            origins[split].add([document for document, _ in kept])
            rows, placements = packers[split].add(tokens)
            yield Batch(
                split=split,
                rows=rows,
                documents=len(kept),
                bytes=sum(size(document, ids) for document, ids in kept),
                tokens=sum(map(len, tokens)) + ends * len(kept),
                pieces=origins[split].pieces(placements),
                notes=collections.Counter(found.note for _, found in of_split if found.note),
            )
        read = sum(len(found.ids) for found in encoded_texts if found.ids is not None)
        told(sum(document.progress for document in texts), read)
    for split, packer in packers.items():
        rows, placements = packer.finish()
        yield Batch(split, rows, pieces=origins[split].pieces(placements))


class _Origins:
    """Where documents are from, kept until their packer has placed them."""

    def __init__(self) -> None:
        self._known: list[tuple[str, int, str]] = []
        self._first = 0  # number of the first one known

    def add(self, documents: Iterable[Document]) -> None:
        self._known += [(document.file, document.place, document.id) for document in documents]

    def pieces(self, placements: np.ndarray) -> pyarrow.Table:
        """`PLACEMENT`s as lines of `documents.SCHEMA`."""
        numbers = placements["document"] - self._first
        origins = [self._known[i] for i in numbers.tolist()]
        columns: list[Any] = [placements[key] for key in ("row", "offset", "tokens", "piece")]
        columns += [[origin[i] for origin in origins] for i in range(3)]
        if len(numbers):  # all before the last one are placed, see `Packed`
            last = int(numbers.max())
            del self._known[:last]
            self._first += last
        fields = zip(columns, documents.SCHEMA, strict=True)
        return pyarrow.table(
            [pyarrow.array(column, field.type) for column, field in fields], documents.SCHEMA
        )


class _Progress:
    """How far a source is: a bar on a terminal, otherwise a line every ten seconds."""

    def __init__(self, name: str, size: int) -> None:
        self._name, self._size = name, size
        self._start = self._told = time.monotonic()
        self._done = self._tokens = 0
        self._bar = tqdm.tqdm(
            total=self._size,
            desc=name,
            unit="B",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._bar.close()
        if kind is None:
            self._tell(f"done, {self._tokens / 1e6:.2f}M tokens in {self._seconds:.1f} s")

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._start

    def add(self, done: int, tokens: int) -> None:
        self._done, self._tokens = self._done + done, self._tokens + tokens
        self._bar.set_postfix_str(
            f"{self._tokens / self._seconds / 1e6:.2f}M tokens/s", refresh=False
        )
        self._bar.update(done)
        if self._bar.disable and time.monotonic() - self._told > 10:
            self._told = time.monotonic()
            left = self._seconds * (self._size / max(self._done, 1) - 1)
            self._tell(f"{self._done / max(self._size, 1):.0%}, about {max(left, 0):.0f} s left")

    def _tell(self, what: str) -> None:
        print(f"{self._name}: {what}", file=sys.stderr, flush=True)
