"""Pretrain sub-billion-parameter language models in JAX, from raw text to a model a phone runs."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`load` comes from `interop.stored` when it is first asked for: importing this stays light."""
    if name == "load":
        from mobilellm_jax.interop.stored import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
