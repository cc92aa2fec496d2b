"""Copies and near copies, and what the processes that clean a corpus do with one part of it.

`mobilellm_jax/clean.py` is the program.
"""

import dataclasses
import hashlib
import json
import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from scipy import sparse

from mobilellm_jax.data import decontamination
from mobilellm_jax.data.corpora import Part
from mobilellm_jax.data.decontamination import EvalSets
from mobilellm_jax.data.ngrams import SHINGLE, ngram_hashes, words
from mobilellm_jax.files import replaced

BUCKETS, PER_BUCKET = 14, 8  # MinHash: two documents are near if all 8 hashes of any of 14 agree

VERDICTS = ("kept", "exact", "evaluation", "near")  # what becomes of a document
KEPT, EXACT, EVALUATION, NEAR = range(len(VERDICTS))

_BIN = 1 << 24  # document hashes that are sorted at once
_BLOCK = 1 << 13  # n-grams whose MinHash is computed at once


# Exact copies.


def text_hash(text: str) -> int:
    """64 bits; among N texts two different ones share theirs with a chance of N^2 / 2^65."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def copies(files: Sequence[Path], total: int) -> Iterator[np.ndarray]:
    """The copies among documents, as pairs (number of the copy, number of the first one).

    Args:
      files: the hashes of the documents, in their order (uint64, saved by NumPy); read once per
        16M documents, so the memory is about 0.5 GB whatever their number.
      total: how many documents there are.
    """
    bins = -(-total // _BIN)
    for chosen in range(bins):
        hashes, numbers, before = [], [], 0
        for file in files:
            stored = np.load(file)
            there = np.flatnonzero(stored % np.uint64(bins) == chosen)
            hashes.append(stored[there])
            numbers.append(there + before)
            before += len(stored)
        values, number = np.concatenate(hashes), np.concatenate(numbers)
        order = np.argsort(values, kind="stable")  # equal ones stay in the order of the documents
        values, number = values[order], number[order]
        new = np.append(True, values[1:] != values[:-1])[: len(values)]
        first = np.maximum.accumulate(np.where(new, np.arange(len(values)), 0))
        yield np.stack([number[~new], number[first[~new]]], axis=1)


# Near copies, by datatrove's MinHash on disk.


def write_signatures(texts: Iterable[str], folder: Path, part: int) -> None:
    """Writes the MinHash signatures of a part's documents; "" stands for one that does not matter."""
    from datatrove.data import Document
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):
        """The library's own ones load models from the net."""

        def word_tokenize(self, text: str) -> list[str]:
            return words(text)

        def sent_tokenize(self, text: str) -> list[str]:
            raise NotImplementedError

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            raise NotImplementedError

    class Signature(MinhashDedupSignature):
        """Hashes n-grams ten times as fast, and needs little memory for a long document."""

        def get_shingles(self, text: str) -> np.ndarray:
            (hashes,) = ngram_hashes(self.word_tokenizer.word_tokenize(text), [SHINGLE])
            return np.unique(hashes).reshape(-1, 1)

        def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
            blocks = (shingles[i : i + _BLOCK] for i in range(0, len(shingles), _BLOCK))
            return np.min([super(Signature, self).get_signature(b) for b in blocks], 0).tolist()

    _silence()
    step = Signature(str(folder), _minhash(), language=Words())
    step.run((Document(text=text, id="") for text in texts), part, part + 1)


def write_matches(signatures: Path, bucket: int, folder: Path) -> None:
    """Writes which documents have equal signatures in a bucket."""
    from datatrove.pipeline.dedup import MinhashDedupBuckets

    _silence()
    # All signature files of the bucket, one a part, are open at once.
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    step = MinhashDedupBuckets(
        str(signatures), str(folder), config=_minhash(), lines_to_buffer=1024
    )
    step.run(None, bucket, BUCKETS)


def near_copies(folder: Path, starts: Sequence[int]) -> np.ndarray:
    """Near copies as pairs (number of the copy, number of the first one), from all matches.

    Documents that are linked by matches, over however many others, are copies of the first of them. Needs
    about 100 bytes a match, of which a copy has at most 14.

    Args:
      folder: what `write_matches` wrote.
      starts: number of the first document of each part.
    """
    matches = np.concatenate(
        [np.fromfile(file, "<u4").reshape(-1, 4) for file in sorted(folder.glob("*.dups"))]
    )
    first_of = np.array(starts, np.int64)
    ends = np.stack([first_of[matches[:, i]] + matches[:, i + 1] for i in (0, 2)], axis=1)
    nodes, links = np.unique(ends, return_inverse=True)
    links = links.reshape(-1, 2).T
    graph = sparse.coo_matrix((np.ones(len(ends), bool), tuple(links)), (len(nodes),) * 2)
    count, groups = sparse.csgraph.connected_components(graph, directed=False)
    first = np.full(count, len(nodes))
    np.minimum.at(first, groups, np.arange(len(nodes)))
    kept = first[groups]
    return np.stack([nodes, nodes[kept]], axis=1)[kept != np.arange(len(nodes))]


def _minhash() -> Any:
    from datatrove.pipeline.dedup import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    return MinhashConfig(SHINGLE, BUCKETS, PER_BUCKET, hash_config=HashConfig(64, "sha1"))


def _silence() -> None:
    from loguru import logger

    logger.disable("datatrove")


# One part: what the processes do. A mark comes last, when all that it stands for is there.


@dataclasses.dataclass(frozen=True)
class PartJob:
    """A part with what is decided of it so far; picklable.

    Attributes:
      part: what to read.
      number: its number.
      out: folder of the text that is left.
      evals: evaluation sets, if they are to be looked for.
      verdicts: what becomes of each document, as a number in `VERDICTS`.
      quoted: documents that the report quotes.
      lines_before: lines of a file in the parts before.
    """

    part: Part
    number: int
    out: Path
    evals: EvalSets | None
    verdicts: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint8))
    quoted: tuple[int, ...] = ()
    lines_before: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def file(self, name: str) -> Path:
        """A result of this part, or the mark that one is there."""
        return work_folder(self.out) / f"{self.number:05d}.{name}"


def work_folder(out: Path) -> Path:
    """Where all is that is not needed when the text is complete."""
    return out / "work"


def scan(job: PartJob) -> None:
    """Hashes of the texts, pairs of document and item found in it, and lines of a file that goes on."""
    hashes, matches = [], []
    index = decontamination.load_index(job.evals) if job.evals else None
    for number, document in enumerate(job.part.documents()):
        hashes.append(text_hash(document.text))
        if index:
            matches += [(number, match.item) for match in index.matches(document.text)]
    np.save(job.file("hashes.npy"), np.array(hashes, np.uint64))
    np.save(job.file("matches.npy"), np.array(matches, np.int64).reshape(-1, 2))
    write_json(job.file("scan"), dict(job.part.unfinished()))


def sign(job: PartJob) -> None:
    """MinHash signatures of the documents that are left."""
    texts = (
        document.text if verdict == KEPT else ""
        for document, verdict in zip(job.part.documents(), job.verdicts, strict=True)
    )
    write_signatures(texts, work_folder(job.out) / "signatures", job.number)
    write_json(job.file("sign"), {})


def write(job: PartJob) -> None:
    """The documents that are left; counts of all, and those that the report quotes."""
    counts = {name: [0, 0] for name in VERDICTS}
    quotes: dict[int, dict[str, Any]] = {}
    target = job.out / f"part-{job.number:05d}.jsonl.zst"
    with pyarrow.CompressedOutputStream(str(target), "zstd") as packed:
        documents = zip(job.part.documents(), job.verdicts, strict=True)
        for number, (document, verdict) in enumerate(documents):
            count = counts[VERDICTS[verdict]]
            count[0] += 1
            count[1] += len(document.text.encode())
            record: dict[str, Any] = {
                "id": document.id,
                "text": document.text,
                "file": document.file,
                "place": document.place + job.lines_before.get(document.file, 0),
            }
            if number in job.quoted:
                quotes[number] = record
            if verdict == KEPT:
                packed.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
    write_json(job.file("write"), {"counts": counts, "quotes": quotes})


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is there whole or not at all."""
    with replaced(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
