r"""Seconds that saving holds up the loop, and seconds and memory of restoring onto another mesh.

    python -m benchmarks.checkpoint --model=mobilellm-350m
    python -m benchmarks.checkpoint --model=mobilellm-1b --saves=1

A train state of random float32 weights and AdamW moments is saved as the trainer does from one
device, then restored in a process of its own onto simulated devices that share every matrix.
"""

import os
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

from absl import app, flags, logging

_MODEL = flags.DEFINE_string("model", "mobilellm-350m", "Preset.")
_FOLDER = flags.DEFINE_string("folder", "", "Where to write; a temporary folder if empty.")
_SAVES = flags.DEFINE_integer("saves", 3, "Saves, one after the other; their median counts.")
_EVERY = flags.DEFINE_float("every", 300.0, "Seconds between saves of a run, for the share.")
_DEVICES = flags.DEFINE_integer("devices", 4, "Simulated devices onto which to restore.")
_ONLY = flags.DEFINE_enum("only", "", ["", "save", "restore"], "One half, in this process.")


def abstract_state() -> Any:
    """The train state of the preset as shapes, over all devices of this process."""
    import jax

    from mobilellm_jax.model import transformer
    from mobilellm_jax.model.presets import preset
    from mobilellm_jax.parallel.mesh import make_mesh
    from mobilellm_jax.parallel.sharding import shardings
    from mobilellm_jax.training.config import base_config, configured
    from mobilellm_jax.training.step import init_state

    model = preset(_MODEL.value)
    make_optimizer = configured(base_config(model).optimizer, "optimizer")
    shapes = jax.eval_shape(
        lambda: init_state(transformer.init(model, jax.random.key(0)), make_optimizer)
    )
    places = shardings(shapes, make_mesh({"data": 1, "fsdp": -1}, jax.devices()))
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )


def save(folder: str) -> None:
    """Prints a line of the first table."""
    import jax
    import numpy as np
    from etils import epath

    from mobilellm_jax.data.sentencepiece_tokenizer import train_tokenizer
    from mobilellm_jax.training.saving import Checkpoints

    rng = np.random.default_rng(0)

    def random(x: jax.ShapeDtypeStruct) -> jax.Array:
        floats = x.dtype == np.float32
        values = rng.standard_normal(x.shape, np.float32) if floats else np.ones(x.shape, x.dtype)
        return jax.device_put(values, x.sharding)

    state = jax.tree.map(random, abstract_state())
    tokenizer = train_tokenizer([f"{i} + {i} = {2 * i}" for i in range(1000)], 273)
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e9
    checkpoints = Checkpoints(epath.Path(folder), every=1, keep=1, keep_every=0)
    renewed = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    blocked, whole = [], []
    for step in range(1, _SAVES.value + 1):
        state = jax.block_until_ready(renewed(state))  # as a step leaves it: not yet on the host
        begun = time.perf_counter()
        checkpoints.save(state, {"step": step}, tokenizer)
        blocked.append(time.perf_counter() - begun)
        checkpoints.save_last(state, {"step": step}, tokenizer)  # waits for it
        whole.append(time.perf_counter() - begun)
    checkpoints.close()
    held, done = (sorted(seconds)[len(seconds) // 2] for seconds in (blocked, whole))
    share = f"{held / _EVERY.value:.2%}"
    print(f"| {_MODEL.value} | {size:.1f} | {held:.2f} | {share} | {done:.1f} | {peak():.1f} |")


def restore(folder: str) -> None:
    """Prints a line of the second table."""
    import jax
    from etils import epath

    from mobilellm_jax.training.checkpoint import FOLDER, saved_steps
    from mobilellm_jax.training.saving import Checkpoints

    checkpoints = Checkpoints(epath.Path(folder), 1, 1, 0, read_only=True)
    (step,) = saved_steps(epath.Path(folder) / FOLDER)
    begun = time.perf_counter()
    state = jax.block_until_ready(checkpoints.restore(abstract_state(), step))
    seconds = time.perf_counter() - begun
    size = sum(x.nbytes for x in jax.tree.leaves(state)) / 1e9
    devices = jax.device_count()
    print(f"| {_MODEL.value} | {size:.1f} | {devices} | {seconds:.1f} | {peak():.1f} |")


def peak() -> float:
    """GB of memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    if _ONLY.value:
        {"save": save, "restore": restore}[_ONLY.value](_FOLDER.value)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = _FOLDER.value or temporary
        heads = {
            "save": f"| saving | GB | loop held up, s | of {_EVERY.value:g} s | on disk after, s | peak GB |",
            "restore": "| restoring | GB | devices | s | peak GB |",
        }
        for only, devices in (("save", 1), ("restore", _DEVICES.value)):
            columns = heads[only].count("|") - 2
            print(f"{heads[only]}\n|---|{'---:|' * columns}", flush=True)
            simulated = f"--xla_force_host_platform_device_count={devices}"
            arguments = [*sys.argv[1:], f"--only={only}", f"--folder={folder}"]
            subprocess.run(
                [sys.executable, "-m", "benchmarks.checkpoint", *arguments],
                env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": simulated},
                check=True,
            )


if __name__ == "__main__":
    app.run(main)
