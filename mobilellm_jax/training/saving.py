"""The checkpoints of a run while it goes: when they are saved, and what happens when one fails."""

import contextlib
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel import distributed
from mobilellm_jax.training.checkpoint import (
    FOLDER,
    FORMAT,
    Damaged,
    damaged,
    explained,
    first_line,
    read_meta,
    saved_steps,
)
from mobilellm_jax.training.step import TrainState

PIECE = 1 << 24  # bytes of an array that are stored, and so read, at once
READ_GB = 4  # of a checkpoint that are being read at once, to bound the memory beside the state
RETRY = 10.0, 600.0  # seconds from a save that failed to the next, doubled up to the second number
LAST_TRIES = (0.0, 1.0, 4.0, 15.0)  # seconds before each try to save the last state


class Checkpoints:
    """The checkpoints of one run, saved asynchronously.

    The newest `keep` stay, every `keep_every`-th and those of the steps `always`.

    A save that cannot be written is told of at once and tried again: after some seconds, which grow,
    where there is one process, and at the next due step where there are several, which must save
    together. Training goes on meanwhile. `failed` counts such saves.
    """

    def __init__(
        self,
        workdir: epath.Path,
        every: int,
        keep: int,
        keep_every: int,
        always: Sequence[int] = (),
        read_only: bool = False,
    ) -> None:
        """Opens (and creates) `workdir/checkpoints` and clears away what killed saves left there.

        With `read_only` it does neither: another program may be writing there.

        Raises:
          UserError: the directory cannot be written.
        """
        self.directory = (workdir / FOLDER).resolve()  # Orbax refuses relative paths
        self.failed = 0
        self._every, self._always = [n for n in (every, keep_every) if n], {*always}
        self._saving: int | None = None  # step that is being written
        self._delay, self._retry_at = RETRY[0], float("inf")
        self._broken = False  # what a failed save left in Orbax would fail the next one too
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(
                [
                    policies.LatestN(keep),
                    policies.CustomSteps([*always]),
                    *([policies.EveryNSteps(keep_every)] if keep_every else []),
                ]
            ),
            create=not read_only,
            read_only=read_only,
        )
        self._options = options
        self._read_only = read_only
        with explained(self.directory), _quiet(read_only):
            self._manager = self._open()

    def due(self, step: int) -> bool:
        """Whether to save after this step: it is one of those, or a save that failed is to be repeated."""
        self._settle()
        due = any(step % n == 0 for n in self._every) or step in self._always
        return due or time.monotonic() >= self._retry_at

    def save(self, state: TrainState, meta: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        """Starts to save, unless this step is saved; returns as soon as the state may be changed."""
        self._settle(wait=True)
        self._mend()
        step = int(meta["step"])
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(
            params=_pieces(state.params),
            optimizer=_pieces(_as_dict(state)),
            meta=ocp.args.JsonSave({"format": FORMAT, **meta}),
            tokenizer=ocp.args.JsonSave(tokenizer.to_dict()),
        )
        try:
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            self._fail(step, error)
        else:
            self._saving = step

    def save_last(self, state: TrainState, meta: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        """Saves, with a few tries, and returns when it is on disk.

        Raises:
          UserError: it could not be written.
        """
        step = int(meta["step"])
        for seconds in LAST_TRIES:
            time.sleep(seconds)
            self.save(state, meta, tokenizer)
            self._settle(wait=True)
            if distributed.all_of("saved", step in self._manager.all_steps()):
                return
        raise UserError(
            f"the checkpoint of the last step, {step:,}, could not be written to {self.directory} in "
            f"{len(LAST_TRIES)} tries: free the disk or mend the permissions and start again; it goes "
            f"on from {self._newest_whole()}."
        )

    def _settle(self, wait: bool = False) -> None:
        """Takes note of how the save under way has ended, if it has."""
        if self._saving is None or not (wait or not self._manager.is_saving_in_progress()):
            return
        step, self._saving = self._saving, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._fail(step, error)
        else:
            self._delay, self._retry_at = RETRY[0], float("inf")

    def _fail(self, step: int, error: Exception) -> None:
        self.failed += 1
        when = "at the next due step"
        if jax.process_count() == 1:
            when = f"in {self._delay:g} s"
            self._retry_at = time.monotonic() + self._delay
            self._delay = min(2 * self._delay, RETRY[1])
        self._broken = True
        if jax.process_count() == 1:
            self._mend()  # at once: what was written of it would keep the disk full
        who = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
        print(
            f"warning: {who}the checkpoint of step {step:,} could not be written to {self.directory} "
            f"({first_line(error)}): training goes on and tries again {when}; until then a stop goes "
            f"back to {self._newest_whole()}. Free the disk or mend the permissions.",
            file=sys.stderr,
            flush=True,
        )

    def _mend(self) -> None:
        """Opens the checkpoints anew, in all processes, if a save has failed in one of them."""
        if distributed.all_of("saves", not self._broken):
            return
        with contextlib.suppress(Exception):  # it has been told of
            self._manager.close()
        try:
            self._manager = self._open()
            self._broken = False
        except Exception as error:
            logging.debug("checkpoints cannot be opened yet: %s", error)

    def _open(self) -> ocp.CheckpointManager:
        self._clear()
        store = distributed.store()
        asynchronous = ocp.AsyncOptions(
            # A thread that makes them could still do so when a save that failed is cleared away.
            create_directories_asynchronously=False,
            barrier_sync_fn=None if store is None else Meeting(store, jax.process_index()),
        )
        return ocp.CheckpointManager(
            self.directory,
            options=dataclasses.replace(self._options, async_options=asynchronous),
            item_names=("params", "optimizer", "meta", "tokenizer"),
        )

    def _clear(self) -> None:
        """Removes what saves that were killed or failed have left, which would keep a disk full.

        Orbax can do so too, in a thread that outlives its manager.
        """
        if self._read_only or not distributed.leads() or not self.directory.exists():
            return
        for path in self.directory.iterdir():
            if ocp.utils.is_tmp_checkpoint(path):
                path.rmtree(missing_ok=True)

    def _newest_whole(self) -> str:
        steps = saved_steps(self.directory)
        return f"step {steps[-1]:,}" if steps else "the start, for no checkpoint is written yet"

    def close(self) -> None:
        """Releases what saving used, when all that was saved is on disk or has failed."""
        self._settle(wait=True)
        with explained(self.directory):
            self._manager.close()
            self._clear()

    def newest_meta(self, before: int | None = None) -> dict[str, Any] | None:
        """The description of the newest checkpoint (before a step), None where there is none."""
        steps = [s for s in self._manager.all_steps() if before is None or s < before]
        return read_meta(self.directory / str(max(steps))) if steps else None

    def resume(
        self, expected: Callable[[Mapping[str, Any]], TrainState]
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """State and description of the newest whole checkpoint, None where there is none at all.

        Those that are damaged are told of and renamed to `<step>.damaged`; nothing is deleted.

        Args:
          expected: what a checkpoint of this description holds, as `restore` wants it; raises a
            UserError if it is not this run's.

        Raises:
          UserError: see `expected`; or there are checkpoints and none is whole.
        """
        broken: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            found, fact = None, f"another process could not read its part of checkpoint {step:,}"
            try:
                meta = read_meta(self.directory / str(step))
                found = self.restore(expected(meta), step), meta
            except Damaged as error:
                fact = error.fact
            if distributed.all_of("restored", found is not None):
                self._set_aside(broken)
                return found
            broken[step] = fact
        if broken:
            first, *others = broken.values()
            more = f"; so are {len(others)} more" if others else ""
            raise UserError(
                f"{first}{more}, and no other is left: move that folder away to begin anew."
            )
        return None

    def _set_aside(self, broken: Mapping[int, str]) -> None:
        for step, fact in broken.items():
            folder = self.directory / str(step)
            aside = next(
                p for p in _numbered(folder.with_name(f"{step}.damaged")) if not p.exists()
            )
            if distributed.leads():
                folder.rename(aside)
            print(f"warning: {fact}; it is now {aside}, and the one before it is used.", flush=True)
        if broken:
            distributed.meet("aside")
            self._manager.reload()

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """A checkpoint's state, straight into the shardings of `abstract`.

        Args:
          abstract: a state of `ShapeDtypeStruct`s with shardings.
          step: of the checkpoint.

        Raises:
          Damaged: the checkpoint is damaged.
        """
        return restore_state(self.directory / str(step), abstract)


class Meeting:
    """Where processes wait for each other in a save, so that one that fails does not leave them waiting.

    Orbax lets all meet before a save (`start`, `end`), when each has `written`, when the first has
    `committed`, and behind it (`start`, `end`). A process that fails skips what lies between and comes to
    the last: it says so there, goes to the meeting that it has skipped, in which the others wait, and
    these find what it has said.
    """

    def __init__(self, store: Any, number: int) -> None:
        """All processes, of which this is the `number`-th, make theirs at the same time."""
        self._store, self._number = store, number
        self._name = distributed.new_key("saving")
        self._saves, self._begun = 0, False
        self._passed: list[str] = []  # meetings of this save

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits for all; the key is Orbax's.

        Raises:
          RuntimeError: another process has failed.
        """
        if "async_write_complete" in key:
            self._meet("written", timeout_ms)
        elif "async_commit_complete" in key:
            self._meet("committed", timeout_ms)
        elif not self._begun:
            self._wait(f"before {self._is_end(key)}", timeout_ms)
            self._begun = self._is_end(key)
        else:
            skipped = [name for name in ("written", "committed") if name not in self._passed]
            if skipped and "failed" not in self._passed:
                self._store.key_value_set(
                    f"{self._key}/failed/{skipped[0]}/{self._number}", "failed"
                )
                self._passed.append("failed")
                self._wait(skipped[0], timeout_ms)
            self._wait(f"behind {self._is_end(key)}", timeout_ms)
            if self._is_end(key):
                self._saves, self._begun, self._passed = self._saves + 1, False, []

    @property
    def _key(self) -> str:
        return f"{self._name}/{self._saves}"

    @staticmethod
    def _is_end(key: str) -> bool:
        return "set_value_end" in key

    def _meet(self, name: str, timeout_ms: int) -> None:
        self._wait(name, timeout_ms)
        self._passed.append(name)
        if failed := self._store.key_value_dir_get(f"{self._key}/failed/{name}/"):
            self._passed.append("failed")
            number = failed[0][0].rsplit("/", 1)[1]
            raise RuntimeError(f"process {number} could not write its part")

    def _wait(self, name: str, timeout_ms: int) -> None:
        self._store.wait_at_barrier(f"{self._key}/{name}", timeout_ms)


def restore_state(path: epath.Path, abstract: TrainState) -> TrainState:
    """The state of the checkpoint in a step's folder, straight into the shardings of `abstract`.

    Raises:
      Damaged: the checkpoint is damaged.
    """
    # Not a manager's: where one process fails the others would wait for it.
    reader = ocp.StandardCheckpointHandler(restore_concurrent_gb=READ_GB)
    with damaged(path):
        params = reader.restore(path / "params", args=ocp.args.StandardRestore(abstract.params))
        optimizer = ocp.args.StandardRestore(_as_dict(abstract))
        fields = reader.restore(path / "optimizer", args=optimizer)
        return dataclasses.replace(abstract, params=params, **fields)


def stored_shapes(path: epath.Path, field: str, sharding: Any) -> Any:
    """A field of the state in a step's folder, as `ShapeDtypeStruct`s of one sharding in plain containers.

    Raises:
      Damaged: the checkpoint is damaged.
    """
    with damaged(path):
        found = ocp.StandardCheckpointHandler().metadata(path / "optimizer").tree[field]
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), found
        )


def _numbered(path: epath.Path) -> Iterator[epath.Path]:
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.name}.{number}")


def _pieces(tree: Any) -> ocp.args.StandardSave:
    """Arrays stored in pieces, so that each device of another mesh reads little more than its part."""
    pieces = ocp.SaveArgs(chunk_byte_size=PIECE)
    return ocp.args.StandardSave(tree, save_args=jax.tree.map(lambda _: pieces, tree))


def _as_dict(state: TrainState) -> dict[str, Any]:
    """The fields of a state but for the parameters and what it does not have, as Orbax stores them."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {name: value for name, value in fields.items() if name != "params" and value is not None}


@contextlib.contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Orbax warns at length of what reading alone means."""
    before = logging.get_verbosity()
    try:
        if quiet:
            logging.set_verbosity(logging.ERROR)
        yield
    finally:
        logging.set_verbosity(before)
