"""Pretrain sub-billion-parameter language models in JAX, from raw text to a model a phone runs."""

import signal
import sys
from typing import Any

__version__ = "0.1.0"

# Python is looking for a program of ours, whose imports take seconds: Ctrl-C ends it at once and quietly
# until `cli` has taken over. An exception would be printed in full, or lost in a callback of a library.
if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def __getattr__(name: str) -> Any:
    """`load` comes from `interop.stored` when it is first asked for: importing this stays light."""
    if name == "load":
        from mobilellm_jax.interop.stored import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
