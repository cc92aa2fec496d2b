"""The one exception for what a user can mend, and what a disk or a store says that a user can."""

import errno


class UserError(Exception):
    """Bad input, told in one sentence: what is wrong, where, and what to do.

    Programs print it as `error: ...` and exit with status 1; anything else that escapes a program
    is a defect of ours and keeps its traceback.
    """


def in_a_line(error: BaseException, most: int = 200) -> str:
    """What an error of a library says, as part of a sentence: without line breaks, at most so long."""
    return " ".join(str(error).split())[:most]


# What the disk says when it is the user who has to act; every other OSError keeps its traceback.
_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a file stands where a folder should be",
}


def mendable(error: BaseException) -> str | None:
    """The sentence for an error of a disk or a store that the user can mend, None for any other."""
    # What fsspec says of gs:// and the like; of what is imported by name, the name would be there.
    if isinstance(error, ImportError) and error.name is None and "install" in str(error):
        reason = str(error).rstrip(".")
        return f"{reason} (gs:// comes with `pip install 'mobilellm-jax[gcs]'`)."
    if not isinstance(error, OSError) or error.errno not in _DISK:
        return None
    where = f" at {error.filename}" if error.filename else ""
    return f"{_DISK[error.errno]}{where}: mend that and run the same command again."
