"""What a teacher says of every target of a source, beside its rows: the k likeliest tokens.

`<source>/taught/<name>/` holds ArrayRecord shards of consecutive training rows as a run of that
`row_length` reads them: of each row the ids [T, k] (uint16, or uint32 above 65,536 pieces) and the
log probabilities [T, k] (float16), likeliest first, without padding between. A log probability of
float16 is right to three digits. `taught.json` says what wrote them and how long every shard is; it
comes last and is the commit mark. `teach` writes it.
"""

import bisect
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath

from mobilellm_jax.data.contexts import Contexts
from mobilellm_jax.data.readers import Readers
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import replaced

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
          UserError: it holds something that another teacher or other settings wrote.
        """
        self._folder, self._info, self._shard_rows = folder, info, shard_rows
        settings = json.loads(json.dumps({**dataclasses.asdict(info), "shard_rows": shard_rows}))
        path = folder / SETTINGS
        if path.exists():
            there = json.loads(path.read_text())
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
    def missing(self) -> list[range]:
        """The rows of each shard that is not there yet."""
        starts = range(0, self._info.rows, self._shard_rows)
        shards = [range(i, min(i + self._shard_rows, self._info.rows)) for i in starts]
        return [rows for rows in shards if not self._file(rows).exists()]

    def write(self, rows: range, ids_RTK: np.ndarray, log_probs_RTK: np.ndarray) -> None:
        """Writes the shard of these rows."""
        with replaced(self._file(rows)) as unfinished:
            writer = array_record_module.ArrayRecordWriter(str(unfinished), _WRITE)
            for ids_TK, log_probs_TK in zip(ids_RTK, log_probs_RTK, strict=True):
                ids, log_probs = ids_TK.astype(self._info.id_dtype), log_probs_TK.astype(np.float16)
                writer.write(ids.tobytes() + log_probs.tobytes())
            writer.close()

    def commit(self) -> None:
        """Writes the mark, when every shard is there."""
        assert not self.missing
        starts = range(0, self._info.rows, self._shard_rows)
        files = [self._file(range(i, i)) for i in starts]
        shards = {
            file.name: {"first": first, "size": file.stat().length}
            for first, file in zip(starts, files, strict=True)
        }
        with replaced(self._folder / MARK) as unfinished:
            text = json.dumps({"info": dataclasses.asdict(self._info), "shards": shards}, indent=2)
            unfinished.write_text(text + "\n")

    def _file(self, rows: range) -> epath.Path:
        return self._folder / f"taught-{rows.start:012d}.array_record"


class Taught:
    """What was written of a source's training rows, by row number. Picklable; threads may share it."""

    def __init__(
        self, folder: epath.Path, info: TaughtInfo, firsts: Sequence[int], readers: Readers
    ) -> None:
        """Takes the first rows of the shards, in order; use `open_taught`."""
        self.info = info
        self._files = [str(folder / f"taught-{first:012d}.array_record") for first in firsts]
        self._firsts, self._readers = list(firsts), readers

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows by number: ids int32 [n, T, k] and log probabilities float16 [n, T, k].

        Raises:
          UserError: a shard cannot be read.
        """
        shape = len(indices), self.info.row_length, self.info.top_k
        ids_NTK, log_probs_NTK = np.empty(shape, np.int32), np.empty(shape, np.float16)
        for n, index in enumerate(np.asarray(indices).tolist()):
            shard = bisect.bisect_right(self._firsts, index) - 1
            try:
                reader = self._readers.get(self._files[shard])
                record = reader.read([index - self._firsts[shard]])[0]
            except (OSError, RuntimeError, ValueError, IndexError) as error:
                self._readers.forget(self._files[shard])
                raise UserError(
                    f"{self._files[shard]} cannot be read ({' '.join(str(error).split())[:200]}): delete it "
                    f"and {MARK} beside it, and run `python -m mobilellm_jax.teach` again."
                ) from None
            ids = np.frombuffer(record, self.info.id_dtype, count=shape[1] * shape[2])
            ids_NTK[n] = ids.reshape(shape[1:])
            log_probs_NTK[n] = np.frombuffer(record[ids.nbytes :], np.float16).reshape(shape[1:])
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
    for file, shard in shards.items():
        path = folder / file
        size = path.stat().length if path.exists() else None
        if size != shard["size"]:
            state = "is missing" if size is None else f"has {size} bytes instead of {shard['size']}"
            raise UserError(
                f"{path} {state}: delete it and {MARK} beside it, and run `python -m mobilellm_jax.teach` "
                "again, which writes what is missing."
            )
    return Taught(folder, info, [shard["first"] for shard in shards.values()], readers)


def read_info(source: epath.PathLike, name: str) -> TaughtInfo:
    """What was written of a source.

    Raises:
      UserError: there is nothing whole.
    """
    return _read(folder_of(source, name))[0]


def _read(folder: epath.Path) -> tuple[TaughtInfo, dict[str, Any]]:
    try:
        raw = json.loads((folder / MARK).read_text())
        return TaughtInfo(**raw["info"]), raw["shards"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"config.teacher.stored: no teacher has written {folder} to its end: run `python -m "
            "mobilellm_jax.teach` (again), it takes up what an interrupted run has left."
        ) from None
