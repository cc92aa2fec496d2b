"""Devices that need not be here: a TPU pod slice, GPUs, or simulated devices of this host, to compile for.

A TPU slice needs the package `libtpu` and a GPU JAX's CUDA plugin, whose compilers run on any CPU;
nothing can be run on what they describe.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax

from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel.chips import find_chip

# Generations that JAX knows a topology of, with the chips of a whole pod and the axes of its torus.
GENERATIONS = {"v5e": (256, 2), "v5p": (8960, 3), "v6e": (256, 2), "tpu7x": (9216, 3)}
EXAMPLES = "v5e:16x16, v5p:8x8x16, v6e:16x16, tpu7x:4x4x4, h100:8, cpu:8 or local"


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's compiler asks of a GPU beside `chips.Chip`; as OpenXLA's target_config/specs have it."""

    kind: str  # as CUDA names it
    capability: int  # major; the minor one is 0 in all of these
    cores: int  # streaming multiprocessors, each with:
    units: int  # for float32
    clock: float  # GHz
    shared: int  # bytes of shared memory, and how many of them a block of threads may have
    shared_of_block: int
    cache: int  # bytes, second level


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 167936, 166912, 41943040),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 233472, 232448, 52428800),
    "h200": Gpu("NVIDIA H200", 9, 132, 128, 1.98, 233472, 232448, 52428800),
    "b200": Gpu("NVIDIA B200", 10, 148, 128, 1.965, 233472, 232448, 132644864),
}
NODE = 8  # GPUs that are linked to each other


def topology_devices(name: str, slices: int = 1) -> Sequence[jax.Device]:
    """The devices of a topology, in JAX's order.

    Args:
      name: `GENERATION:AxB` or `GENERATION:AxBxC` for a TPU slice, `h100:N` for N GPUs of a node,
        `cpu:N` for N simulated devices of this host, `local` for what is here.
      slices: how many such slices or nodes, joined by a network.

    Raises:
      UserError: there is no such topology, or its compiler is not installed.
    """
    if slices < 1 or (slices > 1 and name.partition(":")[0] in ("local", "cpu")):
        raise UserError(
            f"--slices={slices} of --topology={name}: several are TPU slices or nodes of GPUs."
        )
    if name == "local":
        return jax.devices()
    kind, _, layout = name.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d{0,3}", layout):
        return _simulated(int(layout))
    if kind in GPUS and re.fullmatch(r"\d{1,4}", layout):
        if not 1 <= int(layout) <= NODE:
            raise UserError(
                f"--topology={name} is no node: take 1 to {NODE} GPUs, and --slices for several nodes."
            )
        return _gpu(name, GPUS[kind], int(layout), slices)
    if kind not in GENERATIONS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", layout):
        raise UserError(f"--topology={name} is no topology: write it as in {EXAMPLES}.")
    pod, axes = GENERATIONS[kind]
    sizes = [int(size) for size in layout.split("x")]
    if len(sizes) != axes or math.prod(sizes) > pod:
        raise UserError(
            f"--topology={name} is no slice of a {kind} pod, which has {axes} axes and {pod:,} chips at most."
        )
    return _tpu(name, slices)


def is_described(device: jax.Device) -> bool:
    """Whether a device can only be compiled for."""
    return type(device.client).__name__ == "CompileOnlyPyClient"


def _tpu(name: str, slices: int) -> Sequence[jax.Device]:
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
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=name, num_slices=slices
        )
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--topology={name} is not known to libtpu ({reason}).") from None
    return described.devices


def _gpu(name: str, gpu: Gpu, count: int, nodes: int) -> Sequence[jax.Device]:
    # The plugin looks for the GPUs of this host, and that there are none is nothing to tell.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from jax.experimental import topologies

    try:
        described = topologies.get_topology_desc(
            "", "cuda", target_config=_target(gpu), topology=f"1x{nodes}x{count}"
        )
    except NotImplementedError:
        raise UserError(
            f"--topology={name} needs JAX's compiler for GPUs: install mobilellm-jax[cuda]."
        ) from None
    except RuntimeError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"--topology={name} is not known to the CUDA plugin ({reason}).") from None
    return described.devices


def _target(gpu: Gpu) -> str:
    """A description of a GPU for XLA: a `GpuTargetConfigProto` as text."""
    chip = find_chip(gpu.kind)
    assert chip is not None
    facts: dict[str, object] = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.units,
        "clock_rate_ghz": gpu.clock,
        "shared_memory_per_core": gpu.shared,
        "shared_memory_per_block": 49152,
        "shared_memory_per_block_optin": gpu.shared_of_block,
        "l2_cache_size": gpu.cache,
        "device_memory_size": int(chip.memory),
        "memory_bandwidth": int(chip.bandwidth),
        "device_address_bits": 64,
        "device_vendor": '"NVIDIA Corporation"',
        "name": f'"{gpu.kind}"',
    }
    lines = [f"  {key}: {value}" for key, value in facts.items()]
    lines.append(f"  cuda_compute_capability {{ major: {gpu.capability} }}")
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 }",
            f'device_description_str: "{gpu.kind}"',
        ]
    )


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
