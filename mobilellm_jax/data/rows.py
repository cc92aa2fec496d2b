"""The row store as it is read: one source of packed rows on disk, in any order.

A source is a directory that stock TFDS reads
(`tfds.builder_from_directory(path).as_data_source("train")`): ArrayRecord shards of a `tokens`
feature (uint16, or uint32 above 65,536 pieces), for conversations `loss_mask` (uint8: 1 where a
token is trained on as a target) and `segment_ids` (int32: which conversation of the row) as well,
and TFDS's own JSON files. `dataset_info.json` comes
last and is the commit mark: a directory without it is not a source. `metadata.json` holds what a
reader must know (`SourceInfo`), the settings it was made with, and the size of every shard. Beside
each shard a Parquet file says which documents its rows hold (`documents.py`). `shards.py` writes it.

Reading goes past TFDS's decoder: features are stored as raw bytes, so all records of a source have
one size, and each feature one place in them: a batch of rows is one `frombuffer`. What is not
`tokens` becomes their marks (`packing.marked`).
Reads that fail are tried again (`records.py`).
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mobilellm_jax.data.packing import marked
from mobilellm_jax.data.readers import Readers
from mobilellm_jax.data.records import Records, check_sizes
from mobilellm_jax.errors import UserError

VERSION = 2


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """Counts of one split; `bytes` of UTF-8, `tokens` with a BOS and an EOS per document."""

    rows: int
    documents: int
    bytes: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class SourceInfo:
    """What a reader must know of a source.

    Attributes:
      tokenizer: fingerprint of its model.
      kind: `text` (every token is trained on) or `chat` (some are).
      notes: how many documents were not stored as they came, by what was done to them.
    """

    name: str
    path: str
    row_length: int
    vocab_size: int
    bos_id: int
    tokenizer: str
    packing: str
    splits: Mapping[str, SplitInfo]
    kind: str = "text"
    notes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def features(self) -> dict[str, np.dtype]:
        """The arrays [row_length + 1] of a stored row, in their order in a record."""
        tokens = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        if self.kind == "text":
            return {"tokens": tokens}
        loss_mask, segment_ids = np.dtype(np.uint8), np.dtype(np.int32)
        return {"loss_mask": loss_mask, "segment_ids": segment_ids, "tokens": tokens}

    @property
    def heads(self) -> dict[str, bytes]:
        """What stands in a record before the bytes of each feature, in their order."""
        count = self.row_length + 1
        return {name: _head(name, count * dtype.itemsize) for name, dtype in self.features.items()}


class Rows:
    """One split of one source by row number. Picklable; threads may share it."""

    def __init__(self, info: SourceInfo, split: str, records: Records) -> None:
        """Takes the records of a split; use `open_rows`."""
        self.info, self.split = info, split
        self._records = records
        self._places, self._size = {}, 0  # of each feature in a record; of a record
        for name, head in info.heads.items():
            begin = self._size + len(head)
            self._size = begin + (info.row_length + 1) * info.features[name].itemsize
            self._places[name] = slice(begin, self._size)

    @property
    def retries(self) -> int:
        """How often a read failed and was tried again."""
        return self._records.retries

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._records)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Rows by number, in any order, repeated or not: int64 [n] -> int32 [n, row_length + 1].

        Those of conversations carry marks, see `packing`.

        Raises:
          IndexError: a number is outside of [0, len).
          UserError: a shard cannot be read.
        """
        indices = np.asarray(indices, np.int64)
        if indices.size and not (0 <= indices.min() and indices.max() < len(self)):
            raise IndexError(f"rows of {self.info.name}/{self.split} run from 0 to {len(self) - 1}")
        tokens = np.empty((len(indices), self.info.row_length + 1), np.int32)
        for where, records in self._records.read(indices):
            tokens[where] = self._decoded(records)
        return tokens

    def _decoded(self, records: Sequence[bytes]) -> np.ndarray:
        if sizes := {len(record) for record in records} - {self._size}:
            raise UserError(
                f"the rows of {self.info.path} are not those that its metadata.json describes: records of "
                f"{min(sizes):,} bytes are not rows of {self.info.row_length:,} tokens; prepare it again."
            )
        bytes_NZ = np.frombuffer(b"".join(records), np.uint8).reshape(len(records), -1)
        rows = {
            name: bytes_NZ[:, self._places[name]].view(dtype)
            for name, dtype in self.info.features.items()
        }
        return marked(**rows, bos_id=self.info.bos_id) if len(rows) > 1 else rows["tokens"]


def _head(name: str, length: int) -> bytes:
    """What stands before the payload of a feature in a record, so many bytes.

    A record is a serialized TF example. Serialized messages that follow each other are one message
    with the fields of all, so each feature is written as an example of its own.
    """
    key = b"\n" + _varint(len(name)) + name.encode()
    found = b""
    # From within: the payload in a list of bytes, in a feature, by its name, in features, in an example.
    for field in (b"\n", b"\n", key + b"\x12", b"\n", b"\n"):
        found = field + _varint(len(found) + length) + found
    return found


def _varint(value: int) -> bytes:
    """A number as protocol buffers write it: seven bits a byte, the lowest first."""
    more, last = divmod(value, 128)
    return bytes([last | 128]) + _varint(more) if more else bytes([last])


def is_complete(path: epath.PathLike) -> bool:
    """Whether a directory carries the commit mark of a source."""
    return (epath.Path(path) / "dataset_info.json").exists()


def read_info(path: epath.PathLike) -> SourceInfo:
    """What a source says of itself.

    Raises:
      UserError: there is no complete source, or it is not one of ours.
    """
    return _source_info(path, read_metadata(path))


def read_settings(path: epath.PathLike) -> dict[str, Any]:
    """The settings a source was made with, as they were given to `shards.SourceWriter`."""
    return read_metadata(path)["settings"]


def open_rows(path: epath.PathLike, split: str = "train", readers: Readers | None = None) -> Rows:
    """Opens a split of a source, whose open files count among those of `readers`; reads no row yet.

    Raises:
      UserError: there is no complete source, it lacks the split, or a shard is missing or
        truncated.
    """
    metadata = read_metadata(path)
    info = _source_info(path, metadata)
    shards = shards_of(metadata, path, split)
    again = f"delete the source {path} and prepare it again"
    check_sizes(epath.Path(path), {name: shard["size"] for name, shard in shards.items()}, again)
    files = {os.path.join(path, name): shard["rows"] for name, shard in shards.items()}
    readers = Readers() if readers is None else readers
    return Rows(info, split, Records(files, again, readers))


def shards_of(
    metadata: Mapping[str, Any], path: epath.PathLike, split: str
) -> dict[str, dict[str, Any]]:
    """What `metadata` says of a split's shards, by file name, in order.

    Raises:
      UserError: the source lacks the split.
    """
    splits = metadata["source"]["splits"]
    if split not in splits:
        raise UserError(f"the source {path} has no split {split!r}, only {', '.join(splits)}.")
    return {name: shard for name, shard in metadata["shards"].items() if shard["split"] == split}


def read_metadata(path: epath.PathLike) -> dict[str, Any]:
    """All that a source's metadata.json says: version, source, settings, shards.

    Raises:
      UserError: there is no complete source, or it is not one of ours.
    """
    path = epath.Path(path)
    if not is_complete(path):
        raise UserError(
            f"there is no complete source at {path}: run `python -m mobilellm_jax.prepare` "
            "(again), it takes up what an interrupted run has left."
        )
    try:
        metadata = json.loads((path / "metadata.json").read_text())
        version = metadata["version"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} was not written by `python -m mobilellm_jax.prepare`.") from None
    if version != VERSION:
        raise UserError(
            f"the source {path} has version {version}, this program reads {VERSION}: prepare it again "
            "into another directory."
        )
    try:
        _check(metadata)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path / 'metadata.json'} is damaged ({type(error).__name__}: {error}): put it back, or "
            f"delete the source {path} and prepare it again."
        ) from None
    return metadata


def _check(metadata: Mapping[str, Any]) -> None:
    """Raises a plain error where the parts of a metadata.json are not there, or do not fit together."""
    info = _source_info("", metadata)
    for name in ("name", "tokenizer", "packing"):
        if not isinstance(getattr(info, name), str):
            raise TypeError(f"{name} is {getattr(info, name)!r}")
    if info.kind not in ("text", "chat"):
        raise ValueError(f"kind is {info.kind!r}")
    count_of("row_length", info.row_length, 1, 1 << 24)
    count_of("bos_id", info.bos_id, 0, count_of("vocab_size", info.vocab_size, 1) - 1)
    rows = dict.fromkeys(info.splits, 0)
    for name, shard in metadata["shards"].items():
        count_of(f"size of {name}", shard["size"], 1)
        rows[shard["split"]] += count_of(f"rows of {name}", shard["rows"], 1)
    for split, counts in info.splits.items():
        if rows[split] != counts.rows:
            raise ValueError(f"the shards of {split} have {rows[split]} rows, not {counts.rows}")
    if not rows.get("train"):
        raise ValueError("there is no row to train on")
    if not isinstance(metadata["settings"], Mapping):
        raise TypeError(f"settings is {metadata['settings']!r}")


def count_of(name: str, value: Any, least: int, most: int = (1 << 40) - 1) -> int:
    """A number that a file says, checked.

    Raises:
      ValueError: it is no whole number of that size.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}")
    return value


def _source_info(path: epath.PathLike, metadata: Mapping[str, Any]) -> SourceInfo:
    source = metadata["source"]
    splits = {split: SplitInfo(**counts) for split, counts in source["splits"].items()}
    return SourceInfo(**{**source, "path": str(path), "splits": splits})
