"""Being stopped: a signal to any process asks the loops of all to save and leave at the same point."""

import os
import signal
import threading
from typing import Any

import jax

from mobilellm_jax.parallel import distributed

_LOOK = 0.5  # seconds between looks at whether another process was stopped
_WAIT = 60  # seconds for another process to say how far it is


class Stopped(BaseException):
    """A signal breaks off what takes long. No `Exception`, so that nobody takes it for a mistake."""


class Signals:
    """Remembers the first SIGTERM or SIGINT; a second one ends the program at once.

    Loops ask whether to leave: between steps, and within what takes long. Several processes, which ask
    at the same points, agree through the store of `parallel.distributed`, so that neither a step nor
    the devices wait for it: the one that was stopped leaves a note; each that finds it holds its
    loop for a moment where it asks, notes the number of its next question, and reads the others'
    notes. All leave at the greatest.
    """

    def __init__(self) -> None:
        self.caught: signal.Signals | None = None
        self._lock, self._over = threading.Lock(), threading.Event()
        self._asked = 0
        self._last: int | None = None  # question at which to leave, once that is agreed
        self._noted = False

    def __enter__(self) -> "Signals":
        self._store = distributed.store()
        self._before = {s: signal.signal(s, self._catch) for s in (signal.SIGTERM, signal.SIGINT)}
        if self._store:
            self._key = distributed.new_key("stop")
            distributed.meet("loop")  # from here on each answers
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def stop(self) -> bool:
        """Whether to leave now; to be asked before each step, equally often by all processes."""
        if not self._store:
            return self.caught is not None
        with self._lock:
            self._asked += 1
            return self._last is not None and self._asked >= self._last

    def check(self) -> None:
        """`stop` for what a step's loop calls.

        Raises:
          Stopped: leave now.
        """
        if self.stop():
            raise Stopped

    def _catch(self, number: int, frame: Any) -> None:
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        self.caught = signal.Signals(number)
        # Not `print`: the signal may have come in the middle of one.
        os.write(2, f"\n{self.caught.name}: saving after this step ...\n".encode())

    def _watch(self) -> None:
        """Brings this process's signal to the others, or theirs to this one."""
        told = False
        while not self._over.wait(_LOOK):
            try:
                if self.caught and not told:
                    told = True
                    note = f"{self._key}/note/{jax.process_index()}"
                    self._store.key_value_set(note, self.caught.name)
                if notes := self._store.key_value_dir_get(f"{self._key}/note/"):
                    self.caught = self.caught or signal.Signals[notes[0][1]]
                    self._agree()
                    return
            except jax.errors.JaxRuntimeError:
                return  # the store is gone, and the run with it

    def _agree(self) -> None:
        with self._lock:
            self._note(self._asked + 1)
            notes = [
                int(self._store.blocking_key_value_get(f"{self._key}/next/{p}", _WAIT * 1000))
                for p in range(jax.process_count())
            ]
            self._last = max(notes)

    def _note(self, question: int) -> None:
        self._noted = True
        self._store.key_value_set(f"{self._key}/next/{jax.process_index()}", str(question))

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
        if self._store:
            self._over.set()
            self._thread.join(timeout=_WAIT)
            if not self._noted:  # nobody is to wait for one that has come to its end
                self._note(self._asked)
