"""Devices that need not be here: a TPU pod slice, or simulated devices of this host, to compile for.

A TPU slice needs the package `libtpu`, whose compiler runs on any CPU; nothing can be run on it.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax

from mobilellm_jax.errors import UserError

# Generations that JAX knows a topology of, with the chips of a whole pod and the axes of its torus.
GENERATIONS = {"v5e": (256, 2), "v5p": (8960, 3), "v6e": (256, 2), "tpu7x": (9216, 3)}
EXAMPLES = "v5e:16x16, v5p:8x8x16, v6e:16x16, tpu7x:4x4x4, cpu:8 or local"


def topology_devices(name: str) -> Sequence[jax.Device]:
    """The devices of a topology, in JAX's order.

    Args:
      name: `GENERATION:AxB` or `GENERATION:AxBxC` for a TPU slice, `cpu:N` for N simulated devices
        of this host, `local` for what is here.

    Raises:
      UserError: there is no such topology, or libtpu is not installed.
    """
    if name == "local":
        return jax.devices()
    kind, _, layout = name.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d{0,3}", layout):
        return _simulated(int(layout))
    if kind not in GENERATIONS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", layout):
        raise UserError(f"--topology={name} is no topology: write it as in {EXAMPLES}.")
    pod, axes = GENERATIONS[kind]
    sizes = [int(size) for size in layout.split("x")]
    if len(sizes) != axes or math.prod(sizes) > pod:
        raise UserError(
            f"--topology={name} is no slice of a {kind} pod, which has {axes} axes and {pod:,} chips at most."
        )
    return _tpu(name)


def _tpu(name: str) -> Sequence[jax.Device]:
    spec = importlib.util.find_spec("libtpu")
    if spec is None or spec.origin is None:
        raise UserError(
            f"--topology={name} needs the TPU compiler: install mobilellm-jax[preflight]."
        )
    # libtpu looks for the TPU of this host: there is none, or it is not the one that is meant.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--topology={name} is not known to libtpu ({reason}).") from None
    return described.devices


def _simulated(count: int) -> Sequence[jax.Device]:
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        pass  # JAX has started already; what it has may be enough
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"--topology=cpu:{count} needs {count} simulated devices, but JAX has started with "
            f"{len(devices)}: set XLA_FLAGS=--xla_force_host_platform_device_count={count}."
        )
    return devices[:count]
