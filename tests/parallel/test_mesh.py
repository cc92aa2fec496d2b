"""How devices become a mesh: slices, and an axis more."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from mobilellm_jax.errors import UserError
from mobilellm_jax.model import transformer
from mobilellm_jax.model.transformer import Execution
from mobilellm_jax.parallel import mesh as meshes
from mobilellm_jax.parallel import sharding
from mobilellm_jax.parallel.mesh import make_mesh, shape_within
from mobilellm_jax.training.objectives import Network, next_token


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as arranging them looks at."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


@pytest.mark.parametrize("shape", [(8, 2), (4, 4), (2, 8)], ids=str)
def test_only_data_crosses_slices(shape, monkeypatch):
    monkeypatch.setattr(meshes, "Mesh", lambda devices, names, axis_types: devices)
    devices = [Device(i, slice_index=i % 2) for i in range(16)]  # not in the order of their slices
    arranged = make_mesh({"data": shape[0], "fsdp": -1}, devices)
    assert arranged.shape == shape
    assert {device.id for device in arranged.flat} == set(range(16))
    slices = np.vectorize(lambda device: device.slice_index)(arranged)
    assert (slices == slices[:, :1]).all()  # an fsdp group lies within one slice
    assert (slices[: shape[0] // 2] == 0).all() and (slices[shape[0] // 2 :] == 1).all()


def test_data_must_be_a_multiple_of_the_slices():
    assert shape_within((6, 4), 3) == (2, 4)
    with pytest.raises(UserError, match=r"config\.mesh\.data=2 is not a multiple of the 4 slices"):
        make_mesh({"data": 2, "fsdp": -1}, [Device(i, i // 4) for i in range(16)])


def test_rows_lie_in_the_order_of_the_devices():
    """So the first process has the first rows of a batch, as the stream hands them out."""
    mesh = make_mesh({"data": 4, "fsdp": 2}, jax.devices())
    places = sharding.batch_sharding(mesh).devices_indices_map((16,))
    starts = [places[device][0].start or 0 for device in jax.devices()]
    assert starts == list(range(0, 16, 2))


def test_a_third_axis_is_a_line_more(monkeypatch):
    """`tensor` over the MLP's width: one name in AXES, and in the rules; the same loss and gradient."""
    monkeypatch.setattr(meshes, "AXES", ("data", "fsdp", "tensor"))
    wide = (
        (r"mlp/(gate|up)", P(None, "fsdp", "tensor")),
        (r"mlp/down", P(None, "tensor", "fsdp")),
    )
    monkeypatch.setattr(sharding, "RULES", wide + sharding.RULES)
    (stack,) = tiny.MODEL.stacks
    model = dataclasses.replace(tiny.MODEL, stacks=(dataclasses.replace(stack, repeats=1),))
    params = jax.jit(transformer.init, static_argnums=0)(model, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (8, 17), 1, tiny.VOCAB)
    batch = {"tokens": np.asarray(tokens), "source": np.zeros(8, np.int32)}
    network = Network(model, Execution("float32"), 1, 2, 1)

    def loss(params, batch):
        return next_token(params, batch, network).total

    expected = jax.jit(jax.value_and_grad(loss))(params, batch)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": -1}, jax.devices())
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, sharding.shardings(params, mesh))
        found = jax.jit(jax.value_and_grad(loss))(placed, sharding.put_rows(batch, mesh))
    gate = placed["stack_0"]["mlp"]["gate"]
    assert gate.addressable_shards[0].data.shape[1:] == (gate.shape[1] // 2, gate.shape[2] // 2)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert jnp.allclose(a, b, atol=1e-5)
