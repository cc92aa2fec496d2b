"""Some of a source's documents as a source of their own, in rows packed again.

Documents come whole out of the rows that hold them: what lies in several rows is read from all of
them, and what packing has cut is joined. Nothing is tokenized again, so marks of conversations stay.
A shard of the source becomes a shard of the new one, in the order of its rows; what is held out is
copied as it is.
"""

import collections
import functools
import hashlib
import itertools
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
import tqdm
from etils import epath

from mobilellm_jax.data import documents
from mobilellm_jax.data.corpora import Document
from mobilellm_jax.data.documents import Piece, documents_of
from mobilellm_jax.data.encoding import Encoded, Ids
from mobilellm_jax.data.packing import PACKERS
from mobilellm_jax.data.parts import packed
from mobilellm_jax.data.rows import (
    Rows,
    SourceInfo,
    is_complete,
    open_rows,
    read_info,
    read_metadata,
    read_settings,
    shards_of,
)
from mobilellm_jax.data.shards import Batch, SourceWriter
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError

Key = tuple[str, int, str]  # file, place and id of a document (see `documents.Piece`)
BLOCK = 1 << 22  # tokens of rows that are read at once, about


def keep_documents(
    source: epath.PathLike, wanted: Collection[Key], tokenizer: Tokenizer, out: epath.PathLike
) -> SourceInfo:
    """Writes a source of the training documents that are wanted; started again, it goes on.

    Args:
      source: directory of a source.
      wanted: of its training documents; at least one.
      tokenizer: that of the source.
      out: directory of the new source.

    Returns:
      What the new source says of itself.

    Raises:
      UserError: the source does not say which documents its rows hold, or lacks some that are
        wanted; the tokenizer is another; or `out` holds something else.
    """
    source, out, wanted = epath.Path(source), epath.Path(out), frozenset(wanted)
    info, metadata = read_info(source), read_metadata(source)
    if info.tokenizer != tokenizer.fingerprint:
        raise UserError(
            f"the source {source} was tokenized by another tokenizer ({info.tokenizer[:12]}) than "
            f"{tokenizer.fingerprint[:12]}: give the one that it was prepared with."
        )
    settings = {"subset": _described(metadata, wanted)}
    if is_complete(out):
        if read_settings(out) != settings:
            raise UserError(f"{out} holds another choice of documents: name a new folder.")
        return _checked(read_info(out), source, wanted)
    if not wanted:
        raise UserError(f"none of the documents of {source} is to be kept: there is no source.")
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = SourceWriter(str(out), info, settings)
    writer.begin()
    parts = _by_part(metadata, source)
    with tqdm.tqdm(
        total=len(wanted), desc=info.name, unit=" documents", disable=not sys.stderr.isatty()
    ) as bar:
        for number, shards in enumerate(parts):
            if writer.is_written(number):
                continue
            batches: list[Iterable[Batch]] = []
            if "train" in shards:
                chunks = _kept(open_rows(source), shards["train"], wanted, tokenizer)
                told = functools.partial(_tell, bar)
                batches.append(packed(chunks, tokenizer, info.row_length, info.packing, told))
            if "heldout" in shards:
                batches.append(_copied(open_rows(source, "heldout"), shards["heldout"]))
            writer.write_part(number, itertools.chain(*batches), {})
    return _checked(writer.commit(len(parts)), source, wanted)


def _tell(bar: tqdm.tqdm, documents: int, _: int) -> None:
    bar.update(documents)


def _described(metadata: Mapping[str, Any], wanted: Collection[Key]) -> dict[str, Any]:
    """What tells a choice of documents from every other one."""

    def sha256(value: Any) -> str:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    return {"of": sha256(metadata), "documents": len(wanted), "chosen": sha256(sorted(wanted))}


def _by_part(metadata: Mapping[str, Any], source: epath.Path) -> list[dict[str, range]]:
    """The rows of each part's shard, by split, counted over the split."""
    found: dict[int, dict[str, range]] = {}
    for split in metadata["source"]["splits"]:
        first = 0
        for name, shard in shards_of(metadata, source, split).items():
            number = int(name.rpartition("-")[2])  # as `shards` names them
            found.setdefault(number, {})[split] = range(first, first + shard["rows"])
            first += shard["rows"]
    return [found.get(number, {}) for number in range(max(found) + 1)]


def _kept(
    rows: Rows, shard: range, wanted: Collection[Key], tokenizer: Tokenizer
) -> Iterator[Encoded]:
    """The wanted documents of a shard with their ids as a packer takes them, some at a time."""
    info = rows.info
    found = documents_of(info.path, "train", shard.start, shard.stop)
    pieces = [piece for piece in found if key_of(piece) in wanted]
    read = _read(rows, pieces)
    if info.packing == "best_fit":
        read = _joined(read, collections.Counter(map(key_of, pieces)))
    held: list[tuple[Document, Ids]] = []
    size = 0
    for piece, tokens in read:
        ids = tokens if info.packing == "whole" else tokens[1:-1]
        text = "" if info.packing == "whole" else tokenizer.decode(ids.tolist())
        document = Document("train", text, 1, piece.file, piece.place, piece.id)
        held.append((document, Ids(ids)))
        size += len(ids)
        if size >= BLOCK:
            yield _unzipped(held)
            held, size = [], 0
    yield _unzipped(held)


def _unzipped(held: Sequence[tuple[Document, Ids]]) -> Encoded:
    return [document for document, _ in held], [ids for _, ids in held]


def key_of(piece: Piece) -> Key:
    """Of which document a piece is."""
    return piece.file, piece.place, piece.id


def _read(rows: Rows, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, np.ndarray]]:
    """Pieces, which are in order, with all their tokens; only rows that hold one are read."""
    overlap = PACKERS[rows.info.packing].OVERLAP
    stride = rows.info.row_length + 1 - overlap

    def ends(piece: Piece) -> int:
        return piece.row - (overlap - piece.offset - piece.tokens) // stride

    for some in _blocks(pieces, stride):
        needed = np.unique(np.concatenate([np.arange(p.row, ends(p)) for p in some]))
        tokens = rows.read(needed)
        for piece in some:
            first = int(np.searchsorted(needed, piece.row))
            own = tokens[first : first + ends(piece) - piece.row]
            whole = np.append(own[:, :stride].ravel(), own[-1, stride:])
            yield piece, whole[piece.offset : piece.offset + piece.tokens]


def _blocks(pieces: Iterable[Piece], stride: int) -> Iterator[list[Piece]]:
    """Pieces whose rows are near enough together to be read at once."""
    some: list[Piece] = []
    for piece in pieces:
        if some and (piece.row - some[0].row) * stride > BLOCK:
            yield some
            some = []
        some.append(piece)
    if some:
        yield some


def _joined(
    read: Iterable[tuple[Piece, np.ndarray]], count: Mapping[Key, int]
) -> Iterator[tuple[Piece, np.ndarray]]:
    """Documents that best-fit packing has cut into so many pieces, whole; each when all have come."""
    waiting: dict[Key, list[tuple[Piece, np.ndarray]]] = {}
    for piece, tokens in read:
        own = waiting.setdefault(key_of(piece), [])
        own.append((piece, tokens))
        if len(own) < count[key_of(piece)]:
            continue
        del waiting[key_of(piece)]
        own.sort(key=lambda found: found[0].piece)
        parts = [own[0][1], *(part[1:] for _, part in own[1:])]  # each has a BOS
        # A last piece of a token and EOS may begin with a token that was repeated (`BestFit`), or
        # that comes twice: cut again it is the same.
        if len(parts) > 1 and len(parts[-1]) == 2 and parts[-1][0] == parts[-2][-1]:
            parts[-1] = parts[-1][1:]
        yield own[0][0], np.concatenate(parts)


def _copied(rows: Rows, shard: range) -> Iterator[Batch]:
    """The rows of a shard as they are; the first one has the counts of the split."""
    info = rows.info
    counts = info.splits[rows.split]
    step = max(BLOCK // info.row_length, 1)
    for first in range(shard.start, shard.stop, step):
        last = min(first + step, shard.stop)
        touching = documents_of(info.path, rows.split, first, last)
        found = [piece for piece in touching if first <= piece.row < last]
        columns = {
            field.name: [getattr(piece, field.name) for piece in found]
            for field in documents.SCHEMA
        }
        columns["row"] = [row - shard.start for row in columns["row"]]
        yield Batch(
            rows.split,
            rows.read(np.arange(first, last)),
            *((counts.documents, counts.bytes, counts.tokens) if not first else (0, 0, 0)),
            pieces=pyarrow.table(columns, documents.SCHEMA),
        )


def _checked(info: SourceInfo, source: epath.Path, wanted: Collection[Key]) -> SourceInfo:
    found = info.splits["train"].documents
    if found != len(wanted):
        raise UserError(
            f"{source} has only {found:,} of the {len(wanted):,} training documents that are to be kept: "
            f"delete {info.path}, and choose among those that it has."
        )
    return info
