"""Records of ArrayRecord shards by number, in any order; a read that fails is tried again.

Network file systems do fail: only after a few tries is it told, with the record that is bad.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from mobilellm_jax.data.readers import Readers
from mobilellm_jax.errors import UserError

_FAILURES = (OSError, RuntimeError, ValueError, IndexError)  # of ArrayRecord
_PAUSES = (0.1, 0.3, 0.9, 2.7)  # seconds before each further try of a read that failed


class Records:
    """Shards that follow each other. Picklable; threads may share it.

    `retries` counts the reads that failed and were tried again.
    """

    def __init__(self, files: Mapping[str, int], again: str, readers: Readers) -> None:
        """Takes shard files with their number of records, in order.

        Args:
          files: by path.
          again: what to do about a bad shard, as the end of a sentence.
          readers: that open them.
        """
        self.retries = 0
        self._files, self._again, self._readers = list(files), again, readers
        self._ends = np.cumsum(list(files.values()), dtype=np.int64)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Pickles everything but what is open."""
        return {k: v for k, v in self.__dict__.items() if k != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Opens nothing; readers come with the first read."""
        self.__dict__.update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        """Number of records."""
        return int(self._ends[-1])

    def read(self, indices: np.ndarray) -> Iterator[tuple[np.ndarray, list[bytes]]]:
        """Records by number, in any order, repeated or not, shard by shard.

        Args:
          indices: int64 [n], each from 0 to the last.

        Yields:
          Places in `indices`, int64 [m], and the records that they ask for.

        Raises:
          UserError: a shard cannot be read.
        """
        shards = np.searchsorted(self._ends, indices, side="right")
        for shard in np.unique(shards).tolist():
            where = np.flatnonzero(shards == shard)
            first = self._ends[shard - 1] if shard else 0
            yield where, self._of_shard(shard, (indices[where] - first).tolist())

    def _of_shard(self, shard: int, positions: list[int]) -> list[bytes]:
        for pause in _PAUSES:
            try:
                return self._readers.get(self._files[shard]).read(positions)
            except _FAILURES:
                self._readers.forget(self._files[shard])
                with self._lock:
                    self.retries += 1
                time.sleep(pause)
        return [self._record(shard, position) for position in positions]

    def _record(self, shard: int, position: int) -> bytes:
        """One of the records that cannot be read together; those that are not bad are found so."""
        try:
            return self._readers.get(self._files[shard]).read([position])[0]
        except _FAILURES as error:
            file = self._files[shard]
            if not epath.Path(file).exists():
                raise UserError(f"the shard {file} is missing: {self._again}.") from None
            raise UserError(
                f"record {position} of the shard {file} cannot be read "
                f"({' '.join(str(error).split())[:200]}): {self._again}."
            ) from None


def check_sizes(folder: epath.Path, sizes: Mapping[str, int], again: str) -> None:
    """Shards must be as long as they were when they were written.

    Args:
      folder: where they are.
      sizes: bytes by name.
      again: see `Records`.

    Raises:
      UserError: one is not, or is missing.
    """
    for name, wanted in sizes.items():
        file = folder / name
        size = file.stat().length if file.exists() else None
        if size != wanted:
            state = "is missing" if size is None else f"has {size} bytes instead of {wanted}"
            raise UserError(f"the shard {file} {state}: {again}.")
