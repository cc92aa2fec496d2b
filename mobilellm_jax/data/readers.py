"""Open files of ArrayRecord: as many as the system lets a process have, the longest unused give way."""

import collections
import contextlib
import resource
import threading
from typing import Any

from array_record.python import array_record_module

_READ = "readahead_buffer_size:0,max_parallelism:0"  # random access


class Readers:
    """Readers of shards by file name, shared by threads; picklable, but what is open stays behind.

    A reader that is being used stays open till it is done, also if others have taken its place.
    """

    def __init__(self, most: int | None = None) -> None:
        """`most` may be open at a time: by default half of what the process may open."""
        self.most = most
        self._open: collections.OrderedDict[str, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the limit."""
        return Readers, (self.most,)

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def get(self, file: str) -> Any:
        """The `ArrayRecordReader` of a file; what opening it raises is the library's."""
        with self._lock:
            reader = self._open.get(file)
            if reader is not None:
                self._open.move_to_end(file)
                return reader
        # Opened outside the lock: far away it takes long, and others may open too.
        reader = array_record_module.ArrayRecordReader(file, _READ, file_reader_buffer_size=1 << 15)
        with self._lock:
            reader = self._open.setdefault(file, reader)
            self.most = self.most or _allowed()
            while len(self._open) > self.most:
                self._open.popitem(last=False)
        return reader

    def forget(self, file: str) -> None:
        """Opens the file anew for the next who asks: a reader that has failed stays failed."""
        with self._lock:
            self._open.pop(file, None)


def _allowed() -> int:
    """Half of the files that this process may have open, after asking for all that it is granted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # as on macOS, whose limit is another
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return max(16, min(soft, 1 << 16) // 2)
