"""Being stopped: a signal asks the loop to save and leave."""

import os
import signal
from typing import Any


class Signals:
    """Remembers the first SIGTERM or SIGINT; a second one ends the program at once."""

    def __enter__(self) -> "Signals":
        self.caught: signal.Signals | None = None
        self._before = {s: signal.signal(s, self._catch) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _catch(self, number: int, frame: Any) -> None:
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        self.caught = signal.Signals(number)
        # Not `print`: the signal may have come in the middle of one.
        os.write(2, f"\n{self.caught.name}: saving after this step ...\n".encode())

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
