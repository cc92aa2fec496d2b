"""What a teacher says of every target of a source, beside its rows: the k likeliest tokens.

`<source>/taught/<name>/` holds ArrayRecord shards of consecutive training rows as a run of that
`row_length` reads them: of each row the ids [T, k] (uint16, or uint32 above 65,536 pieces) and the
log probabilities [T, k] (float16), likeliest first, without padding between. A log probability of
float16 is right to three digits. `taught.json` says what wrote them and how long every shard is; it
comes last and is the commit mark. `teach` writes it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath

from mobilellm_jax.data.contexts import Contexts
from mobilellm_jax.data.readers import Readers
from mobilellm_jax.data.records import Records, check_sizes
from mobilellm_jax.data.rows import count_of
from mobilellm_jax.errors import UserError, in_a_line
from mobilellm_jax.files import replaced, written_records

# Of a batch: int [B, T, k], and float [B, T, k].
TAUGHT_IDS, TAUGHT_LOG_PROBS = "taught_ids", "taught_log_probs"
MARK, SETTINGS = "taught.json", "settings.json"
_WRITE = "group_size:1,zstd:1"  # a row per group: any row is one read


@dataclasses.dataclass(frozen=True)
class TaughtInfo:
    """What was written.

    Attributes:
      teacher: which network, in plain values.
      tokenizer: fingerprint, of the rows.
      rows_of: fingerprint of the source's description, so that rows prepared anew are noticed.
      row_length: of the rows that the teacher read.
      rows: how many there are.
      top_k: likeliest tokens of each target.
      temperature: of the distribution that they are from.
      vocab_size: of the source; sets the type of ids.
    """

    teacher: Mapping[str, Any]
    tokenizer: str
    rows_of: str
    row_length: int
    rows: int
    top_k: int
    temperature: float
    vocab_size: int

    @property
    def id_dtype(self) -> np.dtype:
        """Of ids as they are stored."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)


def folder_of(source: epath.PathLike, name: str) -> epath.Path:
    """Where what was written under a name lies.

    Raises:
      UserError: the name is no name of a folder.
    """
    if not name or set(name) & set("/\\") or name.startswith("."):
        raise UserError(
            f"{name!r} cannot be the name of a folder beside rows: use letters and digits."
        )
    return epath.Path(source) / "taught" / name


def rows_fingerprint(source: epath.PathLike) -> str:
    """Of a source's description, which names every shard and its size."""
    return hashlib.sha256((epath.Path(source) / "metadata.json").read_bytes()).hexdigest()


class Writer:
    """Writes shards in order, takes up what an interrupted run has left, and commits."""

    def __init__(self, folder: epath.Path, info: TaughtInfo, shard_rows: int) -> None:
        """Makes the folder.

        Raises:
          UserError: it holds something that another teacher or other settings wrote, or damaged ones.
        """
        self._folder, self._info, self._shard_rows = folder, info, shard_rows
        settings = json.loads(json.dumps({**dataclasses.asdict(info), "shard_rows": shard_rows}))
        path = folder / SETTINGS
        if path.exists():
            try:
                there = dict(json.loads(path.read_text()))
            except (ValueError, TypeError, RecursionError):
                raise UserError(
                    f"{path} is damaged: give another --name, or delete {folder}."
                ) from None
            if differ := [key for key, value in settings.items() if there.get(key) != value]:
                raise UserError(
                    f"{folder} was written with another {', '.join(differ)}: give another --name, or delete "
                    "that folder."
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with replaced(path) as unfinished:
                unfinished.write_text(json.dumps(settings, indent=2) + "\n")

    @property
    def complete(self) -> bool:
        """Whether it is committed."""
        return (self._folder / MARK).exists()

    @property
    def _shards(self) -> list[range]:
        """The rows of each shard."""
        starts = range(0, self._info.rows, self._shard_rows)
        return [range(i, min(i + self._shard_rows, self._info.rows)) for i in starts]

    @property
    def missing(self) -> list[range]:
        """The rows of each shard that is not there yet."""
        return [rows for rows in self._shards if not self._file(rows).exists()]

    def write(self, rows: range, ids_RTK: np.ndarray, log_probs_RTK: np.ndarray) -> None:
        """Writes the shard of these rows.

        Raises:
          UserError: the disk is full.
        """
        with replaced(self._file(rows)) as unfinished, written_records():
            writer = array_record_module.ArrayRecordWriter(str(unfinished), _WRITE)
            for ids_TK, log_probs_TK in zip(ids_RTK, log_probs_RTK, strict=True):
                ids, log_probs = ids_TK.astype(self._info.id_dtype), log_probs_TK.astype(np.float16)
                writer.write(ids.tobytes() + log_probs.tobytes())
            writer.close()

    def commit(self) -> None:
        """Writes the mark, when every shard is there."""
        assert not self.missing
        files = {self._file(rows): len(rows) for rows in self._shards}
        shards = {
            file.name: {"rows": rows, "size": file.stat().length} for file, rows in files.items()
        }
        with replaced(self._folder / MARK) as unfinished:
            text = json.dumps({"info": dataclasses.asdict(self._info), "shards": shards}, indent=2)
            unfinished.write_text(text + "\n")

    def _file(self, rows: range) -> epath.Path:
        return self._folder / f"taught-{rows.start:012d}.array_record"


class Taught:
    """What was written of a source's training rows, by row number. Picklable; threads may share it."""

    def __init__(self, info: TaughtInfo, records: Records, where: str) -> None:
        """Takes a record for each row, and in which folder they are; use `open_taught`."""
        self.info, self._records, self._where = info, records, where

    @property
    def retries(self) -> int:
        """How often a read failed and was tried again."""
        return self._records.retries

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows by number: ids int32 [n, T, k] and log probabilities float16 [n, T, k].

        Raises:
          UserError: a shard cannot be read, or holds other rows than are described.
        """
        shape = len(indices), self.info.row_length, self.info.top_k
        ids_NTK, log_probs_NTK = np.empty(shape, np.int32), np.empty(shape, np.float16)
        width = shape[1] * shape[2] * self.info.id_dtype.itemsize
        size = width + shape[1] * shape[2] * log_probs_NTK.itemsize
        for where, records in self._records.read(np.asarray(indices, np.int64)):
            if {len(record) for record in records} != {size}:
                raise UserError(
                    f"what a teacher wrote into {self._where} is not what {MARK} there describes, "
                    f"{self.info.top_k} tokens of each target: write it again."
                )
            bytes_MZ = np.frombuffer(b"".join(records), np.uint8).reshape(len(records), size)
            ids_M, log_probs_M = bytes_MZ[:, :width], bytes_MZ[:, width:]
            ids_NTK[where] = ids_M.view(self.info.id_dtype).reshape(-1, *shape[1:])
            log_probs_NTK[where] = log_probs_M.view(np.float16).reshape(-1, *shape[1:])
        return ids_NTK, log_probs_NTK


def open_taught(rows: Contexts, name: str, temperature: float, readers: Readers) -> Taught:
    """Opens what was written under a name of these training rows, as a run reads them.

    Raises:
      UserError: there is nothing whole, or it is of other rows, another length or temperature.
    """
    folder = folder_of(rows.info.path, name)
    info, shards = _read(folder)
    for key, wanted, mend in (
        ("row_length", rows.row_length, f"set config.row_length={info.row_length}"),
        ("temperature", temperature, f"set config.objective.temperature={info.temperature}"),
        ("tokenizer", rows.info.tokenizer, "take a teacher with the tokenizer of the rows"),
        ("rows", len(rows), "the source was prepared again"),
        ("rows_of", rows_fingerprint(rows.info.path), "the source was prepared again"),
    ):
        if getattr(info, key) != wanted:
            raise UserError(
                f"{folder} was written for {key}={getattr(info, key)!r}, the run has {wanted!r}: {mend}, or "
                "run `python -m mobilellm_jax.teach` with another --name."
            )
    again = f"delete it and {MARK} beside it, and run `python -m mobilellm_jax.teach` again"
    check_sizes(folder, {name: shard["size"] for name, shard in shards.items()}, again)
    files = {str(folder / name): shard["rows"] for name, shard in shards.items()}
    return Taught(info, Records(files, again, readers), str(folder))


def read_info(source: epath.PathLike, name: str) -> TaughtInfo:
    """What was written of a source.

    Raises:
      UserError: there is nothing whole.
    """
    return _read(folder_of(source, name))[0]


def _read(folder: epath.Path) -> tuple[TaughtInfo, dict[str, Any]]:
    path = folder / MARK
    if not path.exists():
        raise UserError(
            f"config.teacher.stored: no teacher has written {folder} to its end: run `python -m "
            "mobilellm_jax.teach` (again), it takes up what an interrupted run has left."
        )
    try:
        raw = json.loads(path.read_text())
        info, shards = TaughtInfo(**raw["info"]), dict(raw["shards"])
        for key in ("row_length", "top_k", "vocab_size"):
            count_of(key, getattr(info, key), 1)
        if info.top_k > info.vocab_size:
            raise ValueError(f"top_k is {info.top_k}, of {info.vocab_size} pieces")
        for name, shard in shards.items():
            count_of(f"size of {name}", shard["size"], 1)
        rows = sum(count_of(f"rows of {name}", shard["rows"], 1) for name, shard in shards.items())
        if rows != info.rows:
            raise ValueError(f"the shards have {rows} rows, not {info.rows}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {in_a_line(error)}): put it back, or delete it and "
            "run `python -m mobilellm_jax.teach` again."
        ) from None
    return info, shards
