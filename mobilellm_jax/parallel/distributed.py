"""Several processes as one run: how they find each other, agree, and end together.

Every process runs the same command. Process 0 keeps a small store of keys and values (JAX's
coordination service) over which they agree on all that must not pass through the devices. Only
process 0 speaks and writes; the others print their errors alone, each with its number.

A process that fails says so in the store and all end. One that dies without a word (killed, out of
memory, its machine gone) is missed by its pulse, and one sentence says which it was. Process 0 is
missed at once, because the store has gone with it.
"""

import contextlib
import ctypes
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax._src import distributed as _service  # the store has no public name

from mobilellm_jax.errors import UserError, mendable

TIMEOUT = 300  # seconds in which all processes must have come
PULSE, DEAD = 3, 25  # seconds between signs of life, and without one until a process is given up
_HEARTBEAT = 45  # seconds until JAX itself gives a process up, should we not have noticed
_LAST = 600  # seconds that the first process to finish waits for the others
_MILLISECONDS = 1000

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# What a failed exchange with another process looks like: then it is the other one that has failed.
_SYMPTOMS = re.compile("gloo|nccl|UNAVAILABLE|coordination|barrier|[Cc]onnection", re.IGNORECASE)
_GOES_ON = "the same command goes on from the last checkpoint"
LOST = 42  # status where that is so: what xpk's workloads start again, and no mistake of ours has
_uses = (
    itertools.count()
)  # keys and barriers of the store are new each time; alike in all processes


def wanted(mode: str) -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`, or None where this is the only process.

    Args:
      mode: `off`; `on`, which leaves to JAX to find out (a TPU pod); `auto`, which looks for the
        three variables `VARIABLES`, then for Slurm, Open MPI and TPU workers on Kubernetes.

    Raises:
      UserError: some of the variables are missing or no numbers.
    """
    if mode == "off":
        return None
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if given:
        if missing := [name for name in VARIABLES if name not in given]:
            raise UserError(
                f"{', '.join(given)} is set and {', '.join(missing)} is not: set all three in every "
                "process, or none (--distributed=off ignores them)."
            )
        address, *numbers = given.values()
        if not all(number.isdecimal() for number in numbers) or int(numbers[1]) >= int(numbers[0]):
            raise UserError(
                f"JAX_NUM_PROCESSES={numbers[0]} and JAX_PROCESS_ID={numbers[1]} do not fit: the "
                "processes are numbered from 0 to their number less one."
            )
        if not re.fullmatch(r".+:\d+", address):
            raise UserError(f"JAX_COORDINATOR_ADDRESS={address} is not of the form HOST:PORT.")
        return {
            "coordinator_address": address,
            "num_processes": int(numbers[0]),
            "process_id": int(numbers[1]),
        }
    sizes = (os.environ.get(n, "") for n in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    several = any(size.isdecimal() and int(size) > 1 for size in sizes)
    several |= "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
    several |= os.environ.get("MEGASCALE_NUM_SLICES", "1") != "1"
    return {} if mode == "on" or several else None


@contextlib.contextmanager
def joined(mode: str, timeout: int = TIMEOUT) -> Iterator[None]:
    """Makes this process one of several for the `with` block, if it is (see `wanted`).

    Nothing may have touched a device before. An exception ends this process, and with it all
    others, with status 1, and with `LOST` where it is not this run's mistake that it ends; `SystemExit` is
    an end that all have agreed on.

    Args:
      mode: see `wanted`.
      timeout: seconds in which all must have come.

    Raises:
      UserError: see `wanted`; or there are others that this process does not know of.
    """
    found = wanted(mode)
    if found is None:
        if jax.process_count() > 1:
            raise UserError(
                f"these are the devices of {jax.process_count()} processes, which have not found each "
                "other: run every one of them with --distributed=on."
            )
        yield
        return
    name = f"process {found['process_id']}" if found else "this process"
    with _aborts() as abort:
        abort.sentence = (
            f"{name}: not all processes came within {timeout} s"
            + (f" to {found['coordinator_address']}" if found else "")
            + ": start as many as were announced, all with the same coordinator's address."
        )
        jax.distributed.initialize(
            **found,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_HEARTBEAT,
        )
        number = jax.process_index()
        abort.sentence = f"process {number} was aborted, see above; {_GOES_ON}."
        if number:
            abort.sentence = (
                f"process {number}: process 0, which holds the others together, has died or cannot be "
                f"reached: the run ends here; {_GOES_ON}."
            )
        silence = contextlib.ExitStack()
        if number:
            silence.enter_context(contextlib.redirect_stdout(silence.enter_context(_nowhere())))
        pulse = _Pulse(_service.global_state.client, number, jax.process_count(), abort)
        with silence:
            try:
                yield
            except SystemExit:
                pulse.leave()
                raise
            except BaseException as error:
                _fail(error, pulse)
            pulse.leave()


def leads() -> bool:
    """Whether this process is the one that speaks and writes; nobody else does."""
    return jax.process_index() == 0


def store() -> Any:
    """The client of the store, None where there is one process."""
    return _service.global_state.client if jax.process_count() > 1 else None


def new_key(name: str) -> str:
    """A key nobody has used; the same in all processes if all ask in the same order."""
    return f"{name}/{next(_uses)}"


def meet(name: str, timeout: float = _LAST) -> None:
    """Returns when all processes have got here; at once where there is one."""
    if client := store():
        client.wait_at_barrier(new_key(name), int(timeout * _MILLISECONDS))


def all_of(name: str, ok: bool) -> bool:
    """Whether `ok` holds in every process; all get the same answer."""
    client = store()
    if client is None:
        return ok
    key = new_key(name)
    if not ok:
        client.key_value_set(f"{key}/{jax.process_index()}", "no")
    meet(name)
    return not client.key_value_dir_get(f"{key}/")


def check_same(description: Mapping[str, Any]) -> None:
    """Every process must be about to do the same thing; asked before anything is compiled.

    Args:
      description: what is to be the same, as JSON values by name.

    Raises:
      UserError: in all processes, if one of them differs from process 0; it says in what.
    """
    client = store()
    if client is None:
        return
    key, number = new_key("description"), jax.process_index()
    mine = json.loads(json.dumps(description))
    if number == 0:
        client.key_value_set(key, json.dumps(mine))
    else:
        there = json.loads(client.blocking_key_value_get(key, _LAST * _MILLISECONDS))
        if differs := list(_differences(there, mine)):
            client.key_value_set(f"{key}/{number:06d}", "; ".join(differs[:5]))
    meet("described")
    if different := client.key_value_dir_get(f"{key}/"):
        path, first = sorted(different)[0]
        more = f"; so do {len(different) - 1} more" if len(different) > 1 else ""
        raise UserError(
            f"process {int(path.rsplit('/', 1)[1])} differs from process 0: {first}{more}. Start every "
            "process with the same command, code, packages, plan and workdir."
        )


def _differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            inner = f"{name}.{key}" if name else key
            yield from _differences(there.get(key), here.get(key), inner)
    elif there != here:
        yield f"{name} is {here!r}, not {there!r}"


class _Pulse:
    """Signs of life of this process, and the news that the run has ended."""

    def __init__(self, client: Any, number: int, processes: int, abort: "_Abort") -> None:
        self._client, self._number, self._processes = client, number, processes
        self._abort = abort
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=target, daemon=True) for target in (self._beat, self._listen)
        ]
        for thread in self._threads:
            thread.start()

    def _beat(self) -> None:
        seen: dict[str, tuple[str, float]] = {}
        usual = self._abort.sentence
        for count in itertools.count():
            if self._over.wait(PULSE):
                return
            try:
                mine = f"pulse/{self._number}"
                self._client.key_value_set(mine, str(count), allow_overwrite=True)
                if self._number:
                    continue
                now = time.monotonic()
                for key, value in self._client.key_value_dir_get("pulse/"):
                    if seen.get(key, ("", 0.0))[0] != value:
                        seen[key] = value, now
                key, (_, last) = min(seen.items(), key=lambda item: item[1][1])
                news = (
                    f"process {key.rsplit('/', 1)[1]} has died (no sign of life for {now - last:.0f} s): "
                    f"the run ends here; {_GOES_ON}."
                )
                # On a busy machine JAX may notice before us.
                quiet = now - last > DEAD / 2
                self._abort.sentence = f"process {self._number}: {news}" if quiet else usual
                if now - last > DEAD:
                    self.end(news)
                    return
            except jax.errors.JaxRuntimeError:
                return  # the store is gone; JAX ends this process

    def _listen(self) -> None:
        while True:
            try:
                news = self._client.blocking_key_value_get("end", 3600 * _MILLISECONDS)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE" in str(error):
                    continue
                return
            if news and not self._over.is_set():
                _exit(f"process {self._number}: {news}", linger=self._number == 0)
            return

    def end(self, news: str) -> None:
        """Tells all processes why they end; empty: nothing is wrong. The first to tell is heard."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set("end", news)

    def stop(self) -> None:
        """Gives no more signs of life and heeds no news."""
        self._over.set()

    def leave(self) -> None:
        """Waits until all have finished, so that nobody is missed who has merely been quicker."""
        meet("left")
        self.stop()
        if self._number == 0:
            self.end("")
        for thread in self._threads:
            thread.join(timeout=2 * PULSE)
        jax.distributed.shutdown()


def _fail(error: BaseException, pulse: _Pulse) -> None:
    """Ends this process and so all; where the error says that another has failed, waits to hear which."""
    number = jax.process_index()
    first = (str(error).strip().splitlines() or [""])[0]
    lost = isinstance(error, jax.errors.JaxRuntimeError) and _SYMPTOMS.search(str(error))
    if lost:
        told = f"process {number}: lost touch with another process ({first[:200]}) ..."
        print(told, file=sys.stderr, flush=True)
        time.sleep(_HEARTBEAT)  # the news, or JAX, end this process meanwhile
    if isinstance(error, UserError):
        sentence = str(error)
    else:
        known = mendable(error)
        if known is None:
            traceback.print_exception(error)
        sentence = known or f"{type(error).__name__}: {first[:300]}"
        if lost:
            sentence = f"{sentence.rstrip('.')}; {_GOES_ON}."
    pulse.stop()  # this process has a sentence of its own
    pulse.end(f"process {number} has failed ({sentence.rstrip('.')}): the run ends here.")
    _exit(f"process {number}: {sentence}", linger=number == 0)


def _exit(sentence: str, linger: bool = False) -> None:
    """Ends this process as it stands: what others hold up cannot be tidied up.

    With status `LOST` where the same command goes on, else 1.
    """
    if linger:
        time.sleep(PULSE)  # the store goes with this process; the others are to read the news
    sys.stdout.flush()
    os.write(2, f"error: {sentence}\n".encode())  # last: other threads may speak until then
    os._exit(LOST if _GOES_ON in sentence else 1)


class _Abort:
    """What is said when JAX aborts this process, as it does when it misses another."""

    sentence = ""


@contextlib.contextmanager
def _aborts() -> Iterator[_Abort]:
    """JAX prints a stack and aborts; a handler for that signal has the last word and sets the status.

    Python's own handlers run in the main thread, which may be waiting in a collective operation.
    """
    abort = _Abort()

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def last_word(_: int) -> None:
        _exit(abort.sentence)

    library = ctypes.CDLL(None)
    library.signal.restype = ctypes.c_void_p
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    before = library.signal(signal.SIGABRT, ctypes.cast(last_word, ctypes.c_void_p))
    try:
        yield abort
    finally:
        library.signal(signal.SIGABRT, before)


@contextlib.contextmanager
def _nowhere() -> Iterator[Any]:
    with open(os.devnull, "w", encoding="utf-8") as file:
        yield file
