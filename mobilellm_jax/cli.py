"""How every program starts: parse flags, run `main`, and turn a user's mistake into one sentence."""

import functools
import io
import logging as std_logging
import math
import os
import re
import select
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable

from absl import app, flags, logging

from mobilellm_jax.errors import UserError, mendable

# Flags that are text, in which ~ is a letter.
_TEXTS = ("prompt", "system", "system_prompt", "answer", "stop", "reason")


def run(main: Callable[..., None], positional: str = "") -> None:
    """Parses the command line and calls `main()`, or `main(argument)` where `positional` names one.

    Exits with status 2 for a misspelt flag or key, 1 for a `UserError` or a full disk, and without a word
    where nobody reads its output any more.
    """
    # Libraries tell every detail at INFO; --verbosity=0 shows it.
    logging.set_verbosity(logging.WARNING)
    logging.get_absl_logger().addFilter(_without_traceback)
    std_logging.getLogger("asyncio").addFilter(_without_traceback)  # of tasks that Orbax gave up
    sys.unraisablehook = _unraisable
    if isinstance(sys.stdout, io.TextIOWrapper):  # not every locale has the letters of all texts
        sys.stdout.reconfigure(errors="backslashreplace")
    _show_shared_flags()
    parse = functools.partial(_parse, positional=positional)
    app.run(lambda argv: _guarded(functools.partial(main, *argv[1:])), flags_parser=parse)


def _show_shared_flags() -> None:
    """Makes --help name flags that modules of ours define for several programs, as if they were its own."""
    for module, defined in list(flags.FLAGS.flags_by_module_dict().items()):
        if module.startswith(("mobilellm_jax.", "data_mixing.")):
            for flag in defined:
                flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)


def _unraisable(raised: "sys.UnraisableHookArgs") -> None:
    """Callbacks in threads of libraries stumble over a failure that is raised, and told, in this one."""
    if raised.exc_type is KeyboardInterrupt:
        # A Ctrl-C that met a callback of the garbage collector, which cannot raise it: once more, when
        # that one is over.
        main = threading.main_thread().ident
        again = threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGINT))
        again.daemon = True
        again.start()
        return
    logging.debug("%s: %s", raised.err_msg, raised.exc_value)


def _without_traceback(record: std_logging.LogRecord) -> bool:
    """Orbax logs a failure in each of its threads before it raises it: a line of each is enough."""
    record.exc_info = None
    return True


def _parse(argv: list[str], positional: str) -> list[str]:
    for argument in argv:
        if re.search("[\ud800-\udfff]", argument):  # what Python makes of bytes that it cannot read
            _exit(f"{argument!r} is not UTF-8, or the locale is not (LC_ALL=C.UTF-8 would be).", 2)
    try:
        rest = flags.FLAGS([_at_home(argument) for argument in argv])
        if "config" in flags.FLAGS:
            getattr(flags.FLAGS.config, "lock", None)  # an unreadable file is told of only here
    except UserError as error:
        _exit(str(error), 1)
    except Exception as error:  # whatever a configuration file may raise while it runs
        _exit(_unusable(error), 2)
    for name, value in flags.FLAGS.flag_values_dict().items():
        if isinstance(value, float) and math.isnan(value):  # which no bound keeps out
            _exit(f"flag --{name}=nan: that is not a number.", 2)
    expected = 2 if positional else 1
    if len(rest) > expected:
        unexpected = rest[expected]
        _exit(f"unexpected argument {unexpected!r}: every option is --name=value (see --help).", 2)
    if len(rest) < expected:
        _exit(f"the {positional} is missing: name it on the command line (see --help).", 2)
    return rest


def _at_home(argument: str) -> str:
    """`--out=~/data` with the home directory in it: shells put it in at the beginning of a word alone."""
    name, equals, value = argument.partition("=")
    is_path = equals and value.startswith("~/") and name.lstrip("-") not in _TEXTS
    return f"{name}={os.path.expanduser(value)}" if is_path else argument


def _guarded(main: Callable[[], None]) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see `mobilellm_jax/__init__.py`
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        _exit(str(error), 1)
    except KeyboardInterrupt:
        _exit("interrupted.", 130)
    except (OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError) and _unread():
            sys.exit(141)  # what shells say of a program that SIGPIPE has ended
        if not (sentence := mendable(error)):
            raise
        _exit(sentence, 1)


def _unread() -> bool:
    """Whether nobody reads standard output any more, as behind `| head`; then it goes nowhere from now on."""
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)  # an error is told of, whatever is asked for
    if unread := bool(poll.poll(0)):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return unread


def _unusable(error: BaseException) -> str:
    """What is wrong with a command line or with the configuration file that it names, and where."""
    if "Error whilst parsing config file" in str(error):
        inner = error.__context__  # ml_collections has put a traceback into the text of this one
        error = (inner.__context__ if inner else None) or error
    elif isinstance(error, OSError):
        error = error.__cause__ or error
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.name in ("get_config", "<module>")]
    where = f"{own[-1].filename}:{own[-1].lineno}: " if own else ""
    text = str(error).replace("\\n", " ").replace("\\", "")
    # It lists every other field of a locked configuration: keep what helps.
    text = re.sub(r"Other fields present: .*?(?=Did you mean|$)", "", text, flags=re.DOTALL)
    text = " ".join(text.split())[:500]
    if isinstance(error, flags.Error):
        return text
    if isinstance(error, KeyError | AttributeError) and not where and "get_config" not in text:
        text = re.sub(r"^\W*(\w+)\W+", r"\1. ", text).rstrip("'\"")
        return f"there is no such key in the configuration: {text}"
    return f"the configuration is not usable: {where}{type(error).__name__}: {text}"


def _exit(sentence: str, status: int) -> None:
    # The sentence is the last word, whatever threads of libraries still meet.
    std_logging.disable()
    warnings.simplefilter("ignore")
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(status)
