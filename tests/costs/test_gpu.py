"""Steps compiled for GPUs that are not here, by XLA's own compiler for them."""

import jax
import pytest
import tiny
from compilers import needs_cuda

from mobilellm_jax.costs.step import capacity, make_programs, measure
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig, Stack
from mobilellm_jax.parallel.chips import find_chip
from mobilellm_jax.parallel.mesh import in_slices, make_mesh
from mobilellm_jax.parallel.topologies import GPUS, topology_devices

pytestmark = needs_cuda
LAYERS = 8
MODEL = ModelConfig(512, 128, (Stack(LAYERS, 4, 2, 512),), head_dim=64, max_length=512)


def compiled(slices=1, gpus=1, fsdp=1, **execution):
    config = tiny.config("unused")
    config.model = MODEL.to_dict()
    config.row_length, config.global_batch = 512, 8
    config.execution.update({"dtype": "bfloat16", "attention": "auto", "unroll": 0} | execution)
    config.mesh.data, config.mesh.fsdp = -1, fsdp
    return measure(make_programs(config, topology_devices(f"h100:{gpus}", slices), 2), config)


@pytest.mark.parametrize("name", GPUS)
def test_a_node_is_gpus_of_its_kind(name, monkeypatch):
    devices = topology_devices(f"{name}:8")
    assert len(devices) == 8 and {d.platform for d in devices} == {"gpu"}
    chip = find_chip(devices[0].device_kind)
    assert name.upper() in devices[0].device_kind and chip.kind == name.upper()
    assert capacity(devices[0]) == 0.75 * chip.memory
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert capacity(devices[0]) == 0.9 * chip.memory


def test_nodes_are_slices_that_a_network_joins():
    devices = topology_devices("h100:8", 4)
    assert [len(node) for node in in_slices(devices)] == [8] * 4
    mesh = make_mesh({"data": -1, "fsdp": 8}, devices)
    assert all(len(in_slices(row)) == 1 for row in mesh.devices)
    with pytest.raises(UserError, match="data=2 is not a multiple of the 4 slices"):
        make_mesh({"data": -1, "fsdp": 16}, devices)


@pytest.mark.slow
def test_between_nodes_go_sums_of_gradients_alone():
    """They are in pieces over the two GPUs of a node, each of which has an adapter to the network."""
    found = compiled(slices=2, gpus=2, fsdp=2, unroll=1)
    across = [row for row in found.exchanged if row["slices"] == 2]
    assert {row["kind"] for row in across} <= {"all-reduce", "reduce-scatter"}
    whole = 2 * found.parameters  # bfloat16
    assert sum(row["network"] for row in across) == pytest.approx(whole / 2, rel=0.2)
    assert found.seconds["network"] > 0 and found.slices == 2
    assert any(row["kind"] == "all-gather" and row["slices"] == 1 for row in found.exchanged)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["flash", "cudnn"])
def test_every_kernel_of_a_step_is_priced(attention):
    if attention == "cudnn":
        pytest.importorskip("nvidia.cudnn", reason="cuDNN is not installed")
    found = compiled(attention=attention)
    assert not found.uncounted and found.memory.fits
    assert found.matmul == pytest.approx(found.model_matmul)
    assert 1 < found.attention / found.model_attention < 2
    assert found.traffic > found.memory.arguments


@pytest.mark.slow
def test_without_a_loop_less_is_moved_and_remat_frees_what_it_frees_in_one():
    loop = {remat: compiled(remat=remat, unroll=1) for remat in ("none", "dots", "full")}
    flat = {remat: compiled(remat=remat, unroll=LAYERS) for remat in loop}
    auto = compiled(remat="none")
    assert auto.traffic == flat["none"].traffic < 0.9 * loop["none"].traffic
    peaks = {remat: (loop[remat].memory.peak, flat[remat].memory.peak) for remat in loop}
    for looped, written_out in peaks.values():
        assert written_out < 1.2 * looped
    assert peaks["none"][1] > peaks["dots"][1] > peaks["full"][1]


@pytest.mark.slow
def test_attention_alone_compiles_for_every_gpu():
    from mobilellm_jax.model.flash_gpu import flash

    for name in GPUS:
        mesh = jax.sharding.Mesh(topology_devices(f"{name}:1"), ("data",))
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        for width in (32, 64, 128):
            q = jax.ShapeDtypeStruct((1, 300, 4, width), "bfloat16", sharding=place)
            k = jax.ShapeDtypeStruct((1, 300, 2, width), "bfloat16", sharding=place)
            ids = jax.ShapeDtypeStruct((1, 300), "int32", sharding=place)
            total = jax.grad(lambda q, k, v, ids: flash(q, k, v, ids).astype("float32").sum())
            with jax.set_mesh(mesh):  # by which the kernel knows its GPU
                text = jax.jit(total).lower(q, k, k, ids).compile().as_text()
            assert "mha_backward" in text
