"""Results that are there whole or not at all, in the place of something else only where that is meant."""

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from typing import Any

from etils import epath

from mobilellm_jax.errors import UserError, in_a_line


@contextlib.contextmanager
def new_folder(out: epath.PathLike) -> Iterator[epath.Path]:
    """A folder to fill that becomes `out` at the end of the `with` block.

    It lies beside `out` and is removed if the block does not get to its end.

    Args:
      out: the folder to make; it may exist if it is empty.

    Raises:
      UserError: `out` is a file, or holds something.
    """
    out = epath.Path(out)
    check_new_folder(out)
    partial = _beside(out)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        partial.rmtree(missing_ok=True)
        raise


def check_new_folder(out: epath.PathLike) -> None:
    """Raises `UserError` where `new_folder` would: for a file, or a folder that holds something."""
    out = epath.Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: name a new folder.")


@contextlib.contextmanager
def new_file(out: epath.PathLike) -> Iterator[epath.Path]:
    """The path of a file to write that becomes `out` at the end of the `with` block.

    It lies beside `out` and is removed if the block does not get to its end.

    Raises:
      UserError: `out` exists.
    """
    out = epath.Path(out)
    if out.exists():
        raise UserError(f"{out} exists: name a new file.")
    partial = _beside(out)
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.rename(out)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replaced(path: epath.PathLike) -> Iterator[epath.Path]:
    """The path of a file to write that takes the place of `path` at the end of the `with` block, in one move.

    It lies beside `path`, which stays as it was if the block does not get to its end.
    """
    path = epath.Path(path)
    unfinished = path.with_name(f"{path.name}.unfinished")
    yield unfinished
    unfinished.replace(path)


@contextlib.contextmanager
def alone(folder: epath.PathLike, doing: str) -> Iterator[None]:
    """Around all that a program writes into a folder of this machine, which it makes: no other does so.

    Args:
      folder: where; of an object store nothing is known.
      doing: what another program would be doing, `is training`.

    Raises:
      UserError: another program is in there, or `folder` is a file.
    """
    folder = epath.Path(folder)
    if "://" in str(folder):
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)  # ends with the process, however that ends
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another program {doing} in {folder} at this moment: wait for its end, or stop it."
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def written_records() -> Iterator[None]:
    """Around what ArrayRecord writes, which tells of a full disk with a RuntimeError.

    Raises:
      UserError: instead of that.
    """
    try:
        yield
    except RuntimeError as error:
        reason = in_a_line(error)
        raise UserError(f"a shard cannot be written ({reason}): mend it and run again.") from None


def record_of(path: epath.PathLike) -> dict[str, Any]:
    """What a JSON object of ours says; empty if it is damaged, and so equal to nothing that was written."""
    try:
        record = json.loads(epath.Path(path).read_text())
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _beside(out: epath.Path) -> epath.Path:
    return out.parent / f"{out.name}.partial-{uuid.uuid4().hex[:8]}"
