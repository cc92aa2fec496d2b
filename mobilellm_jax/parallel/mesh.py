"""The devices of a run as a `data` x `fsdp` mesh."""

from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from mobilellm_jax.errors import UserError

AXES = ("data", "fsdp")


def make_mesh(data: int, fsdp: int, devices: Sequence[jax.Device]) -> Mesh:
    """A mesh over `devices`; one of the sizes may be -1, "what is left".

    Axes are of type Auto: XLA propagates shardings from the parameters, the batch and the pinned
    activations.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    sizes = [data, fsdp]
    if sizes.count(-1) == 1:
        known = data if fsdp == -1 else fsdp
        if known > 0 and len(devices) % known == 0:
            sizes[sizes.index(-1)] = len(devices) // known
    if min(sizes) < 1 or sizes[0] * sizes[1] != len(devices):
        raise UserError(
            f"config.mesh data={data} x fsdp={fsdp} does not give the {len(devices)} devices there are: "
            "their product must be that number; -1 stands for what is left."
        )
    # An axis of the mesh may be a part of an axis of the machine: 32 x 8 on a torus of 16 x 16.
    grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
