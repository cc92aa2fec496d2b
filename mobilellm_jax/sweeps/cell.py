"""The process of one cell; `processes.py` starts it and tells it through standard input what to do."""

import os
import pickle
import signal
import sys
import threading

import jax

from mobilellm_jax import cli
from mobilellm_jax.errors import UserError
from mobilellm_jax.train import train


def main() -> None:
    """Reads a pickled `processes.Order` and trains."""
    order = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if order.cores:
        os.sched_setaffinity(0, order.cores)  # XLA makes as many threads as it may use cores
    if order.shared and jax.default_backend() != "cpu":
        raise UserError(
            f"--parallel is for CPUs, and this is a {jax.default_backend()}: one cell at a time uses "
            "it best (or set JAX_PLATFORMS=cpu)."
        )
    jax.config.update("jax_compilation_cache_dir", order.compiled)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    train(order.config, order.workdir)


def _end_with_parent() -> None:
    """Standard input ends when the sweep is gone, however it went: save and leave."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    cli.run(main)
