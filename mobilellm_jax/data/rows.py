"""The row store: one source of packed rows on disk, written once, read in any order.

A source is a directory that stock TFDS reads
(`tfds.builder_from_directory(path).as_data_source("train")`): ArrayRecord shards of a `tokens`
feature (uint16, or uint32 above 65,536 pieces) and TFDS's own JSON files. `dataset_info.json` comes
last and is the commit mark: a directory without it is not a source. `metadata.json` holds what a
reader must know (`SourceInfo`), the settings it was made with, and the size of every shard.

Reading goes past TFDS's decoder: the feature is stored as raw bytes at the end of each record, so a
batch of rows is one `frombuffer`.
"""

import contextlib
import dataclasses
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath

from mobilellm_jax.errors import UserError

VERSION = 1
SHARD_BYTES = 1 << 30  # of tokens; a shard is closed above this
_WRITE = "group_size:1,zstd:1"  # a row per group: any row is one read
_READ = "readahead_buffer_size:0,max_parallelism:0"  # random access


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """Counts of one split; `bytes` of UTF-8, `tokens` with a BOS and an EOS per document."""

    rows: int
    documents: int
    bytes: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class SourceInfo:
    """What a reader must know of a source; `tokenizer` is the fingerprint of its model."""

    name: str
    path: str
    row_length: int
    vocab_size: int
    bos_id: int
    tokenizer: str
    packing: str
    splits: Mapping[str, SplitInfo]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Something to store: rows int32 [n, row_length + 1] of a split and what they were made of."""

    split: str
    rows: np.ndarray
    documents: int = 0
    bytes: int = 0
    tokens: int = 0


class Rows:
    """One split of one source by row number. Picklable; threads may share it."""

    def __init__(self, info: SourceInfo, split: str, files: Mapping[str, int]) -> None:
        """Takes shard files with their number of rows, in order; use `open_rows`."""
        self.info = info
        self.split = split
        self._files = [str(epath.Path(info.path) / file) for file in files]
        self._ends = np.cumsum(list(files.values()), dtype=np.int64)
        self._dtype = _dtype(info.vocab_size)
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Pickles everything but what is open."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Opens nothing; readers come with the first read."""
        self.__dict__.update(state, _readers={}, _lock=threading.Lock())

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._ends[-1])

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Rows by number, in any order, repeated or not: int64 [n] -> int32 [n, row_length + 1].

        Raises:
          IndexError: a number is outside of [0, len).
          UserError: a shard cannot be read.
        """
        indices = np.asarray(indices, np.int64)
        if indices.size and not (0 <= indices.min() and indices.max() < len(self)):
            raise IndexError(f"rows of {self.info.name}/{self.split} run from 0 to {len(self) - 1}")
        tokens = np.empty((len(indices), self.info.row_length + 1), np.int32)
        shards = np.searchsorted(self._ends, indices, side="right")
        for shard in np.unique(shards):
            where = np.flatnonzero(shards == shard)
            first = self._ends[shard - 1] if shard else 0
            tokens[where] = self._read_shard(int(shard), (indices[where] - first).tolist())
        return tokens

    def _read_shard(self, shard: int, positions: list[int]) -> np.ndarray:
        try:
            records = b"".join(self._reader(shard).read(positions))
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(
                f"the shard {self._files[shard]} cannot be read "
                f"({' '.join(str(error).split())[:200]}): "
                "delete its source and prepare it again."
            ) from None
        bytes_NZ = np.frombuffer(records, np.uint8).reshape(len(positions), -1)
        payload = (
            self.info.row_length + 1
        ) * self._dtype.itemsize  # the end of a record, see `_Encoder`
        return bytes_NZ[:, -payload:].view(self._dtype)

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = array_record_module.ArrayRecordReader(
                    self._files[shard], _READ, file_reader_buffer_size=1 << 15
                )
            return self._readers[shard]


def is_complete(path: epath.PathLike) -> bool:
    """Whether a directory carries the commit mark of a source."""
    return (epath.Path(path) / "dataset_info.json").exists()


def read_info(path: epath.PathLike) -> SourceInfo:
    """What a source says of itself.

    Raises:
      UserError: there is no complete source, or it is not one of ours.
    """
    return _source_info(path, _read_metadata(path))


def read_settings(path: epath.PathLike) -> dict[str, Any]:
    """The settings a source was made with, as they were given to `write_source`."""
    return _read_metadata(path)["settings"]


def open_rows(path: epath.PathLike, split: str = "train") -> Rows:
    """Opens a split of a source; reads no row yet.

    Raises:
      UserError: there is no complete source, it lacks the split, or a shard is missing or
        truncated.
    """
    metadata = _read_metadata(path)
    info = _source_info(path, metadata)
    if split not in info.splits:
        raise UserError(f"the source {path} has no split {split!r}, only {', '.join(info.splits)}.")
    shards = {name: shard for name, shard in metadata["shards"].items() if shard["split"] == split}
    for name, shard in shards.items():
        file = epath.Path(path) / name
        size = file.stat().length if file.exists() else None
        if size != shard["size"]:
            state = "is missing" if size is None else f"has {size} bytes instead of {shard['size']}"
            raise UserError(
                f"the shard {file} {state}: delete the source {path} and prepare it again."
            )
    return Rows(info, split, {name: shard["rows"] for name, shard in shards.items()})


def write_source(
    path: epath.PathLike,
    info: SourceInfo,
    settings: Mapping[str, Any],
    batches: Iterable[Batch],
    shard_bytes: int = SHARD_BYTES,
) -> SourceInfo:
    """Writes a source and returns its info with the counts filled in.

    Locally it grows in `<path>.incomplete` and gets its name when it is whole; on object stores,
    where renaming is copying, it grows in place. Either way the commit mark comes last.

    Args:
      path: directory of the source; must not exist.
      info: name, row_length, vocab_size, bos_id, tokenizer and packing; its path and splits are
        ignored.
      settings: JSON, kept to tell later whether a source is what a user asks for.
      batches: the rows, in order; splits may alternate.
      shard_bytes: a shard is closed when its tokens take more than this.

    Raises:
      UserError: the path exists, or there is no row for `train`.
    """
    path = epath.Path(path)
    if path.exists() and (_is_local(path) or is_complete(path)):
        raise UserError(f"{path} exists already: delete it, or prepare into another directory.")
    growing = path.parent / f"{path.name}.incomplete" if _is_local(path) else path
    if growing.exists():
        _clear(growing, info.name)
    growing.mkdir(parents=True)
    encoder = _Encoder(info)
    writers: dict[str, _SplitWriter] = {}
    for batch in batches:
        if batch.split not in writers:
            writers[batch.split] = _SplitWriter(
                growing, info.name, batch.split, encoder, shard_bytes
            )
        writers[batch.split].add(batch)
    for writer in writers.values():
        writer.close_shard()
    writers = {split: w for split, w in sorted(writers.items(), reverse=True) if w.counts.rows}
    if "train" not in writers:
        raise UserError(f"the source {info.name} has no text to train on.")
    info = dataclasses.replace(
        info, path=str(path), splits={s: w.counts for s, w in writers.items()}
    )
    _commit(growing, info, settings, writers.values(), encoder.features)
    if growing != path:
        growing.rename(path)
    return info


def _clear(directory: epath.Path, name: str) -> None:
    """Removes what an interrupted writer has left, and nothing else."""
    for file in directory.iterdir():
        shard = file.name.startswith(f"{name}-") and ".array_record-" in file.name
        if not shard and file.name not in ("features.json", "metadata.json", "dataset_info.json"):
            raise UserError(f"{directory} holds {file.name}, which is none of ours: move it away.")
    directory.rmtree()


class _Encoder:
    """Rows to serialized TF examples, without TensorFlow.

    All rows of a source have one length, so their examples differ in nothing but the payload at the
    end: TFDS serializes one, and its head is put before every row.
    """

    def __init__(self, info: SourceInfo) -> None:
        self._dtype = _dtype(info.vocab_size)
        tensor = tfds.features.Tensor(
            shape=(info.row_length + 1,),
            dtype=self._dtype.type,
            encoding=tfds.features.Encoding.BYTES,
        )
        self.features = tfds.features.FeaturesDict({"tokens": tensor})
        serializer = tfds.core.example_serializer.ExampleSerializer(
            self.features.get_serialized_info()
        )
        row = np.arange(info.row_length + 1).astype(self._dtype)
        example = serializer.serialize_example(self.features.encode_example({"tokens": row}))
        if not example.endswith(row.tobytes()):
            raise RuntimeError("TFDS no longer ends an example with the bytes of its tensor")
        self._head = example[: -row.nbytes]

    def __call__(self, row: np.ndarray) -> bytes:
        return self._head + row.astype(self._dtype).tobytes()


class _SplitWriter:
    """Rows of one split into shards, counted."""

    def __init__(
        self, directory: epath.Path, name: str, split: str, encoder: _Encoder, shard_bytes: int
    ) -> None:
        self._encoder, self._shard_bytes = encoder, shard_bytes
        self.template = tfds.core.ShardedFileTemplate(
            data_dir=directory,
            dataset_name=name,
            split=split,
            filetype_suffix="array_record",
            template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",  # how many is not known
        )
        self.split = split
        self.counts = SplitInfo(0, 0, 0, 0)
        self.shards: dict[str, dict[str, Any]] = {}
        self.num_bytes = 0
        self._writer: Any = None
        self._rows = self._written = 0

    def add(self, batch: Batch) -> None:
        for row in batch.rows:
            record = self._encoder(row)
            with self._disk_errors():
                if self._writer is None:
                    self._open_shard()
                self._writer.write(record)
            self._rows, self._written = self._rows + 1, self._written + len(record)
            if self._written >= self._shard_bytes:
                self.close_shard()
        new = (len(batch.rows), batch.documents, batch.bytes, batch.tokens)
        self.counts = SplitInfo(*map(sum, zip(dataclasses.astuple(self.counts), new, strict=True)))

    def close_shard(self) -> None:
        if self._writer is None:
            return
        with self._disk_errors():
            self._writer.close()
        size = self._file.stat().length
        self.shards[self._file.name] = {"split": self.split, "rows": self._rows, "size": size}
        self.num_bytes += self._written
        self._writer, self._rows, self._written = None, 0, 0

    def _open_shard(self) -> None:
        file = self.template.sharded_filepath(shard_index=len(self.shards), num_shards=None)
        self._file = epath.Path(file)
        self._writer = array_record_module.ArrayRecordWriter(str(file), _WRITE)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """The writer tells of a full disk with a RuntimeError."""
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"a shard cannot be written ({reason}): mend it and run again."
            ) from None


def _commit(
    directory: epath.Path,
    info: SourceInfo,
    settings: Mapping[str, Any],
    writers: Iterable[_SplitWriter],
    features: Any,
) -> None:
    described = {k: v for k, v in dataclasses.asdict(info).items() if k != "path"}
    shards = {name: shard for writer in writers for name, shard in writer.shards.items()}
    metadata = {
        "version": VERSION,
        "source": described,
        "settings": dict(settings),
        "shards": shards,
    }
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=info.name,
        version=tfds.core.Version("1.0.0"),
        data_dir=str(directory),
        module_name=__name__,
    )
    tfds_info = tfds.core.DatasetInfo(
        builder=identity,
        description="Packed rows of token ids; segment ids are cumsum(tokens == bos_id).",
        features=features,
        disable_shuffling=True,
        metadata=tfds.core.MetadataDict(metadata),
    )
    tfds_info.set_file_format("array_record")
    splits = [
        tfds.core.SplitInfo(
            name=writer.split,
            shard_lengths=[shard["rows"] for shard in writer.shards.values()],
            num_bytes=writer.num_bytes,
            filename_template=writer.template,
        )
        for writer in writers
    ]
    tfds_info.set_splits(tfds.core.splits.SplitDict(splits))
    tfds_info.write_to_directory(directory)  # dataset_info.json is the last file it writes


def _read_metadata(path: epath.PathLike) -> dict[str, Any]:
    path = epath.Path(path)
    if not is_complete(path):
        raise UserError(
            f"there is no complete source at {path}: run `python -m mobilellm_jax.prepare` "
            "(again), it takes up what an interrupted run has left."
        )
    try:
        metadata = json.loads((path / "metadata.json").read_text())
        version = metadata["version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} was not written by `python -m mobilellm_jax.prepare`.") from None
    if version != VERSION:
        raise UserError(f"the source {path} has version {version}, this program reads {VERSION}.")
    return metadata


def _source_info(path: epath.PathLike, metadata: Mapping[str, Any]) -> SourceInfo:
    source = metadata["source"]
    splits = {split: SplitInfo(**counts) for split, counts in source["splits"].items()}
    return SourceInfo(**{**source, "path": str(path), "splits": splits})


def _dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def _is_local(path: epath.Path) -> bool:
    return not re.match(r"[a-z0-9]+://", str(path))
