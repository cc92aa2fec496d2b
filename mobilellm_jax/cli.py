"""How every program starts: parse flags, run `main`, and turn a user's mistake into one sentence."""

import errno
import functools
import re
import sys
from collections.abc import Callable

from absl import app, flags, logging

from mobilellm_jax.errors import UserError

# What the disk says when it is the user who has to act; every other OSError keeps its traceback.
_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission is denied",
    errno.EROFS: "the file system is read-only",
}


def run(main: Callable[..., None], positional: str = "") -> None:
    """Parses the command line and calls `main()`, or `main(argument)` where `positional` names one.

    Exits with status 2 for a misspelt flag or key, 1 for a `UserError` or a full disk.
    """
    logging.set_verbosity(
        logging.WARNING
    )  # libraries tell every detail at INFO; --verbosity=0 shows it
    parse = functools.partial(_parse, positional=positional)
    app.run(lambda argv: _guarded(functools.partial(main, *argv[1:])), flags_parser=parse)


def _parse(argv: list[str], positional: str) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        _exit(str(error), 2)
    except UserError as error:
        _exit(str(error), 1)
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        # ml_collections reports a misspelt key, a wrong type or a missing file as one of these.
        _exit(f"the configuration is not usable: {_short(error)}", 2)
    expected = 2 if positional else 1
    if len(rest) > expected:
        unexpected = rest[expected]
        _exit(f"unexpected argument {unexpected!r}: every option is --name=value (see --help).", 2)
    if len(rest) < expected:
        _exit(f"the {positional} is missing: name it on the command line (see --help).", 2)
    return rest


def _guarded(main: Callable[[], None]) -> None:
    try:
        main()
    except UserError as error:
        _exit(str(error), 1)
    except KeyboardInterrupt:
        _exit("interrupted.", 130)
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = f" at {error.filename}" if error.filename else ""
        _exit(f"{_DISK[error.errno]}{where}: free it and run the same command again.", 1)


def _short(error: Exception) -> str:
    """ml_collections lists every other field of a locked configuration: keep what helps."""
    text = " ".join(str(error.args[0] if error.args else error).split())
    text = re.sub(r" Other fields present: .*?(?=Did you mean|$)", " ", text)
    return text[:500].strip().strip('"')


def _exit(sentence: str, status: int) -> None:
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(status)
