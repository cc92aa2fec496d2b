"""The one exception for what a user can mend, and what the disk says that a user can."""

import errno


class UserError(Exception):
    """Bad input, told in one sentence: what is wrong, where, and what to do.

    Programs print it as `error: ...` and exit with status 1; anything else that escapes a program
    is a defect of ours and keeps its traceback.
    """


# What the disk says when it is the user who has to act; every other OSError keeps its traceback.
_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a file stands where a folder should be",
}


def of_the_disk(error: BaseException) -> str | None:
    """The sentence for an error of the disk that the user can mend, None for any other."""
    if not isinstance(error, OSError) or error.errno not in _DISK:
        return None
    where = f" at {error.filename}" if error.filename else ""
    return f"{_DISK[error.errno]}{where}: mend that and run the same command again."
