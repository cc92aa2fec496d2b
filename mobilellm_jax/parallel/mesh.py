"""The devices of a run as a `data` x `fsdp` mesh."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel.topologies import is_described

# Outermost first: `data` runs over slices, between which the network is slow. A third axis is one
# more name here, its size in `config.mesh`, and its rules in `parallel/sharding.py`.
AXES = ("data", "fsdp")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> Mesh:
    """A mesh over `devices`; one of the sizes may be -1, "what is left".

    Axes are of type Auto: XLA propagates shardings from the parameters, the batch and the pinned
    activations. Devices of several slices, or nodes of GPUs, are arranged so that only `data` crosses them.

    Args:
      sizes: of each axis of `AXES`, by name.
      devices: all of them are used.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `data` is not a multiple of
        the number of slices.
    """
    slices = in_slices(devices)
    within = shape_within(_shape(sizes, len(devices)), len(slices))
    # An axis of the mesh may be a part of an axis of the machine: 32 x 8 on a torus of 16 x 16.
    arranged = [
        mesh_utils.create_device_mesh(within, one, allow_split_physical_axes=True) for one in slices
    ]
    return Mesh(np.concatenate(arranged), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def one_device() -> Mesh:
    """A mesh of this process's first device."""
    return make_mesh(dict.fromkeys(AXES, 1), jax.local_devices()[:1])


def local_mesh() -> Mesh:
    """A mesh of all of this process's devices, which share rows."""
    devices = jax.local_devices()
    return make_mesh(dict.fromkeys(AXES, 1) | {AXES[0]: len(devices)}, devices)


def in_slices(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """Devices by the TPU slice or the node of GPUs that they are in, within which links are fast.

    XLA tells nodes apart when the processes of a run meet. Where GPUs are only described, each process
    stands for a node.
    """
    found: dict[int, list[jax.Device]] = {}
    for device in devices:
        described = device.platform == "gpu" and is_described(device)
        place = device.process_index if described else getattr(device, "slice_index", 0)
        found.setdefault(place, []).append(device)
    return [found[place] for place in sorted(found)]


def shape_within(shape: Sequence[int], slices: int) -> tuple[int, ...]:
    """The part of a mesh that is in each slice: slices follow each other along the first axis.

    Raises:
      UserError: the first axis is not a multiple of the number of slices.
    """
    if shape[0] % slices:
        raise UserError(
            f"config.mesh.{AXES[0]}={shape[0]} is not a multiple of the {slices} slices (nodes of GPUs): "
            f"weights would be gathered between them; make config.mesh.{AXES[0]} a multiple of {slices}."
        )
    return (shape[0] // slices, *shape[1:])


def _shape(sizes: Mapping[str, Any], devices: int) -> tuple[int, ...]:
    shape = [sizes[axis] for axis in AXES]
    if shape.count(-1) == 1:
        known = math.prod(size for size in shape if size != -1)
        if known > 0 and devices % known == 0:
            shape[shape.index(-1)] = devices // known
    if min(shape) < 1 or math.prod(shape) != devices:
        asked = " x ".join(f"{axis}={sizes[axis]}" for axis in AXES)
        raise UserError(
            f"config.mesh {asked} does not give the {devices} devices there are: "
            "their product must be that number; -1 stands for what is left."
        )
    return tuple(shape)
