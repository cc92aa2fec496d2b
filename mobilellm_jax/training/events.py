"""TensorBoard's event files, by tensorboardX."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def _tensorboard() -> tuple[Any, Any, Any]:
    """The parts of tensorboardX that are used; with them it would import torch where that is installed."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary
    finally:
        if hidden:
            del sys.modules["torch"]
    return EventsWriter, Event, Summary


_EventsWriter, _Event, _Summary = _tensorboard()


class EventFile:
    """One file of events. Not tensorboardX's SummaryWriter: its thread would hang for ever on a full disk.

    Raises:
      OSError: it cannot be written; likewise each method.
    """

    def __init__(self, folder: Path) -> None:
        self._file = _EventsWriter(str(folder / "events"), f".{time.time_ns()}")

    def write(self, kind: str, step: int, numbers: Mapping[str, float]) -> None:
        """Adds the numbers of a step, as `kind/name`."""
        values = [
            _Summary.Value(tag=f"{kind}/{name}", simple_value=value)
            for name, value in numbers.items()
        ]
        event = _Event(wall_time=time.time(), step=step, summary=_Summary(value=values))
        self._file.write_event(event)

    def flush(self) -> None:
        """Makes what was written durable."""
        self._file.flush()

    def close(self) -> None:
        """Writes out what is left."""
        self._file.close()
