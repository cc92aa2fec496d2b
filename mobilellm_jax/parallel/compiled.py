"""Compiled programs are kept on disk, so that a restarted run does not compile them again."""

import os
from pathlib import Path

import jax


def keep_compiled() -> None:
    """Switches JAX's persistent compilation cache on, in the user's cache folder.

    `JAX_COMPILATION_CACHE_DIR` names another folder (for a pod: one that all hosts see, or `gs://`),
    `JAX_ENABLE_COMPILATION_CACHE=0` switches it off. On CPUs it stays off unless a folder is named:
    a program compiled there uses the instructions of that very processor, and home folders travel.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") or jax.default_backend() == "cpu":
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(cache / "mobilellm_jax" / "compiled"))
