"""The row store as it is written: part by part, on any machine, and then committed.

Each part of a corpus becomes at most one shard per split, written by whoever prepares that part:
the shard, the file that says which documents it holds, and last the part's mark, `parts/NNNNN.json`,
with counts and sizes. Files get their names when they are whole, so a part that is interrupted, or
done twice at once, leaves nothing half. When all marks are there, TFDS's own files are written and
with them the commit mark of the source.
"""

import collections
import contextlib
import dataclasses
import json
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath

from mobilellm_jax.data import documents
from mobilellm_jax.data.packing import UNTRAINED, segment_ids, token_ids
from mobilellm_jax.data.rows import (
    VERSION,
    SourceInfo,
    SplitInfo,
    is_complete,
    read_info,
)
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import alone, record_of, written_records

_WRITE = "group_size:1,zstd:1"  # a row per group: any row is one read
_SCRATCH = "scratch-"  # folders of parts that are being written
_COMMITTED = ("features.json", "metadata.json", "dataset_info.json")


@dataclasses.dataclass(frozen=True)
class Batch:
    """Something to store: rows int32 [n, row_length + 1] of a split and what they were made of.

    `notes` count what was done to documents, see `SourceInfo`. `pieces` says which documents are in
    these and in later rows, as `documents.SCHEMA` has it with rows counted from the first of the
    part; None where that is not to be told.
    """

    split: str
    rows: np.ndarray
    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    pieces: pyarrow.Table | None = None
    notes: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SourceWriter:
    """A source that is being written. Picklable: parts may be written anywhere.

    Locally it grows in `<path>.incomplete` and gets its name when it is whole; on object stores,
    where renaming is copying, it grows in place. Either way the commit mark comes last.

    Attributes:
      path: directory of the source.
      info: name, row_length, vocab_size, bos_id, tokenizer, packing and kind; the rest is ignored.
      settings: JSON, kept to tell whether a source, or what is there of it, is what is asked for.
    """

    path: str
    info: SourceInfo
    settings: Mapping[str, Any]

    @property
    def _made_with(self) -> dict[str, Any]:
        return {"version": VERSION, **self.settings}

    @property
    def _growing(self) -> epath.Path:
        path = epath.Path(self.path)
        return path.parent / f"{path.name}.incomplete" if _is_local(path) else path

    @property
    def _parts(self) -> epath.Path:
        return self._growing / "parts"

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Around everything that one program writes: on this machine no other writes this source meanwhile.

        Raises:
          UserError: another does.
        """
        if epath.Path(self.path).exists():  # `begin` says what that means
            yield
            return
        with alone(self._growing, "is preparing"):
            yield

    def begin(self) -> None:
        """Makes the directory; parts that are there stay.

        Raises:
          UserError: the source exists, its directory holds something that is not ours, or parts that were
            made with other settings.
        """
        path, growing = epath.Path(self.path), self._growing
        if path.exists() and (_is_local(path) or is_complete(path)):
            raise UserError(f"{path} exists already: delete it, or prepare into another directory.")
        if growing.exists():
            begun = self._begun()
            if begun not in (None, self._made_with) and any(self._parts.glob("[0-9]*.json")):
                raise UserError(
                    f"{growing} is a preparation that was interrupted, of other input or with other "
                    "options: give the same ones, or delete it."
                )
            self._clear(everything=begun != self._made_with)
        if self._begun() is None:
            self._parts.mkdir(parents=True, exist_ok=True)
            _write_whole(
                self._parts / "settings.json", json.dumps(self._made_with, indent=2) + "\n"
            )

    def is_written(self, number: int) -> bool:
        """Whether a part is complete: its mark is there and its files are as long as it says."""
        mark = self._parts / _mark(number)
        said = record_of(mark) if mark.exists() else {}
        return bool(said) and all(
            (self._growing / name).exists() and (self._growing / name).stat().length == size
            for shard in said["shards"]
            for name, size in _files(shard).items()
        )

    def write_part(
        self, number: int, batches: Iterable[Batch], unfinished: Mapping[str, int]
    ) -> dict[str, Any]:
        """Writes a part and returns its mark.

        Args:
          number: of the part, in the order of the corpus.
          batches: its rows, in order; splits may alternate.
          unfinished: see `corpora.Part`.

        Raises:
          UserError: the disk is full.
        """
        encoder, notes = _Encoder(self.info), collections.Counter[str]()
        with self._scratch() as scratch:
            writers: dict[str, _ShardWriter] = {}
            for batch in batches:
                notes.update(batch.notes)
                if batch.split not in writers:
                    template = _template(self.info.name, batch.split, scratch)
                    file = template.sharded_filepath(shard_index=number, num_shards=None)
                    writers[batch.split] = _ShardWriter(epath.Path(file), batch.split, encoder)
                writers[batch.split].add(batch)
            shards = [writer.close() for _, writer in sorted(writers.items(), reverse=True)]
            shards = [shard for shard in shards if shard["rows"]]
            for shard in shards:
                for name in _files(shard):
                    self._publish(scratch / name)
        mark = {"shards": shards, "unfinished": dict(unfinished), "notes": notes}
        _write_whole(self._parts / _mark(number), json.dumps(mark, indent=2) + "\n")
        return mark

    def commit(self, parts: int) -> SourceInfo:
        """Makes a source of so many parts and returns its info with the counts filled in.

        Raises:
          UserError: there is no row for `train`.
        """
        marks = [json.loads((self._parts / _mark(i)).read_text()) for i in range(parts)]
        shards: dict[str, dict[int, dict[str, Any]]] = {}  # by split and part
        before: Mapping[str, int] = {}  # lines of a file that earlier parts have read
        for number, mark in enumerate(marks):
            for shard in mark["shards"]:
                shards.setdefault(shard["split"], {})[number] = {**shard, "before": before}
            before = {file: before.get(file, 0) + n for file, n in mark["unfinished"].items()}
        if "train" not in shards:
            raise UserError(f"the source {self.info.name} has no text to train on.")
        shards = dict(sorted(shards.items(), reverse=True))
        notes = sum(
            (collections.Counter(mark["notes"]) for mark in marks), collections.Counter[str]()
        )
        self._write_info(shards, parts, notes)
        path = epath.Path(self.path)
        if self._growing != path:
            self._growing.rename(path)
        (path / "parts").rmtree()
        return read_info(path)

    def _begun(self) -> Any:
        """What the parts that are there were made with."""
        file = self._parts / "settings.json"
        return record_of(file) if file.exists() else None

    def _clear(self, everything: bool) -> None:
        """Removes what interrupted writers have left, or all that they have made, and nothing else."""
        ours = rf"{self.info.name}-.*\.array_record-.*|{_SCRATCH}.*|parts|" + "|".join(_COMMITTED)
        for file in self._growing.iterdir():
            if not re.fullmatch(ours, file.name):
                raise UserError(
                    f"{self._growing} holds {file.name}, which is none of ours: move it away."
                )
        for file in self._growing.iterdir():
            if everything or file.name.startswith(_SCRATCH):
                file.rmtree() if file.is_dir() else file.unlink()

    @contextlib.contextmanager
    def _scratch(self) -> Iterator[epath.Path]:
        """A folder on this machine for files in the making, where they can be renamed from."""
        if not _is_local(self._growing):
            with tempfile.TemporaryDirectory() as folder:
                yield epath.Path(folder)
            return
        folder = self._growing / f"{_SCRATCH}{uuid.uuid4().hex}"
        folder.mkdir()
        try:
            yield folder
        finally:
            folder.rmtree()

    def _publish(self, file: epath.Path) -> None:
        target = self._growing / file.name
        if _is_local(target):
            file.replace(target)
            return
        with file.open("rb") as ours, target.open("wb") as theirs:
            shutil.copyfileobj(ours, theirs, 1 << 24)

    def _write_info(
        self,
        shards: Mapping[str, Mapping[int, dict[str, Any]]],
        parts: int,
        notes: Mapping[str, int],
    ) -> None:
        """Writes metadata.json and TFDS's files, dataset_info.json as the last."""
        described = {k: v for k, v in dataclasses.asdict(self.info).items() if k != "path"}
        described["notes"] = dict(notes)
        described["splits"] = {
            split: {
                key: sum(shard[key] for shard in of_split.values())
                for key in (field.name for field in dataclasses.fields(SplitInfo))
            }
            for split, of_split in shards.items()
        }
        kept = ("split", "rows", "size", "sidecar_size", "before")
        metadata = {
            "version": VERSION,
            "source": described,
            "settings": dict(self.settings),
            "shards": {
                shard["name"]: {key: shard[key] for key in kept if key in shard}
                for of_split in shards.values()
                for shard in of_split.values()
            },
        }
        identity = tfds.core.dataset_info.DatasetIdentity(
            name=self.info.name,
            version=tfds.core.Version("1.0.0"),
            data_dir=str(self._growing),
            module_name=__name__,
        )
        tfds_info = tfds.core.DatasetInfo(
            builder=identity,
            description="Packed rows of token ids; segment ids are cumsum(tokens == bos_id) where no "
            "feature says them.",
            features=_features(self.info),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(metadata),
        )
        tfds_info.set_file_format("array_record")
        splits = [
            tfds.core.SplitInfo(
                name=split,
                # TFDS passes over shards of length 0, which need no file.
                shard_lengths=[of_split[i]["rows"] if i in of_split else 0 for i in range(parts)],
                num_bytes=sum(shard["record_bytes"] for shard in of_split.values()),
                filename_template=_template(self.info.name, split, self._growing),
            )
            for split, of_split in shards.items()
        ]
        tfds_info.set_splits(tfds.core.splits.SplitDict(splits))
        tfds_info.write_to_directory(self._growing)


def write_source(
    path: epath.PathLike,
    info: SourceInfo,
    settings: Mapping[str, Any],
    *parts: Iterable[Batch],
) -> SourceInfo:
    """Writes a source whose rows are at hand, part by part; see `SourceWriter`."""
    writer = SourceWriter(str(path), info, settings)
    writer.begin()
    for number, batches in enumerate(parts):
        writer.write_part(number, batches, {})
    return writer.commit(len(parts))


def _features(info: SourceInfo) -> tfds.features.FeaturesDict:
    """The features of a source, as TFDS is to read them."""
    return tfds.features.FeaturesDict(
        {
            name: tfds.features.Tensor(
                shape=(info.row_length + 1,),
                dtype=dtype.type,
                encoding=tfds.features.Encoding.BYTES,
            )
            for name, dtype in info.features.items()
        }
    )


class _Encoder:
    """Rows to serialized TF examples, without TensorFlow: they differ in nothing but the payloads."""

    def __init__(self, info: SourceInfo) -> None:
        self._bos_id, self._dtypes = info.bos_id, info.features
        self._heads = info.heads

    def __call__(self, row: np.ndarray) -> bytes:
        parts = {"tokens": token_ids(row)}
        if len(self._dtypes) > 1:
            parts["loss_mask"] = row & UNTRAINED == 0
            parts["segment_ids"] = segment_ids(row, self._bos_id)
        return b"".join(
            head + parts[name].astype(self._dtypes[name]).tobytes()
            for name, head in self._heads.items()
        )


class _ShardWriter:
    """Rows of one split into a shard with the file beside it, counted."""

    def __init__(self, file: epath.Path, split: str, encoder: _Encoder) -> None:
        self._file, self._split, self._encoder = file, split, encoder
        self._counts = SplitInfo(0, 0, 0, 0)
        self._record_bytes = 0
        self._sidecar: documents.Writer | None = None
        with written_records():
            self._writer = array_record_module.ArrayRecordWriter(str(file), _WRITE)

    @property
    def _sidecar_file(self) -> epath.Path:
        return self._file.parent / (self._file.name + documents.SUFFIX)

    def add(self, batch: Batch) -> None:
        """Stores a batch."""
        with written_records():
            for row in batch.rows:
                record = self._encoder(row)
                self._writer.write(record)
                self._record_bytes += len(record)
            if batch.pieces is not None:
                self._sidecar = self._sidecar or documents.Writer(self._sidecar_file)
                self._sidecar.add(batch.pieces)
        new = (len(batch.rows), batch.documents, batch.bytes, batch.tokens)
        old = dataclasses.astuple(self._counts)
        self._counts = SplitInfo(*(a + b for a, b in zip(old, new, strict=True)))

    def close(self) -> dict[str, Any]:
        """Ends the shard; what is to be known of it."""
        with written_records():
            self._writer.close()
            if self._sidecar:
                self._sidecar.close()
        shard = {
            "name": self._file.name,
            "split": self._split,
            **dataclasses.asdict(self._counts),
            "record_bytes": self._record_bytes,
            "size": self._file.stat().length,
        }
        return shard | ({"sidecar_size": self._sidecar_file.stat().length} if self._sidecar else {})


def _template(name: str, split: str, folder: epath.Path) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
        data_dir=folder,
        dataset_name=name,
        split=split,
        filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",  # the number of the part
    )


def _mark(number: int) -> str:
    return f"{number:05d}.json"


def _files(shard: Mapping[str, Any]) -> dict[str, int]:
    """The files of a shard with their sizes."""
    files = {shard["name"]: shard["size"]}
    if "sidecar_size" in shard:
        files[shard["name"] + documents.SUFFIX] = shard["sidecar_size"]
    return files


def _write_whole(path: epath.Path, text: str) -> None:
    half = path.parent / f"{path.name}.{uuid.uuid4().hex}"
    half.write_text(text)
    half.replace(path)


def _is_local(path: epath.PathLike) -> bool:
    return not re.match(r"[a-z0-9]+://", str(path))
