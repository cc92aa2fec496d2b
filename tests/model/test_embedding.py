"""The look-up over a mesh: plain indexing, its gradient by autodiff, sums in float32, and no more travel."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mobilellm_jax.model.embedding import look_up
from mobilellm_jax.parallel.mesh import make_mesh

ROWS, LENGTH, WIDTH, VOCAB = 16, 12, 32, 50
MESHES = pytest.mark.parametrize("split", [(8, 1), (2, 4), (1, 8)], ids=str)


@pytest.fixture(scope="module")
def case():
    """A table, tokens of which some are frequent and some never come, and a gradient of their rows."""
    keys = jax.random.split(jax.random.key(0), 3)
    tokens = jax.random.randint(keys[1], (ROWS, LENGTH), 0, VOCAB // 2) ** 2 % VOCAB
    return (
        jax.random.normal(keys[0], (VOCAB, WIDTH)),
        tokens,
        jax.random.normal(keys[2], (ROWS, LENGTH, WIDTH)),
    )


def mesh_of(split):
    return make_mesh(dict(zip(("data", "fsdp"), split, strict=True)), jax.devices())


@functools.partial(jax.jit, static_argnums=3)
def looked_up(table, tokens, by_rows, dtype):
    """What is looked up, and the gradient of the table."""
    rows, pull = jax.vjp(lambda table: look_up(table, tokens, dtype), table)
    return rows, pull(by_rows.astype(dtype))[0]


def placed(mesh, table, *by_rows):
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    pieces = NamedSharding(mesh, P(None, "fsdp"))
    return jax.device_put(table, pieces), *(jax.device_put(x, rows) for x in by_rows)


@MESHES
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eight_devices_equal_plain_indexing(case, split, dtype):
    table, tokens, by_rows = case
    rounded = np.asarray(by_rows.astype(dtype), np.float64)
    by_table = np.zeros((VOCAB, WIDTH))
    np.add.at(by_table, np.asarray(tokens), rounded)
    mesh = mesh_of(split)
    with jax.set_mesh(mesh):
        rows, ours = looked_up(*placed(mesh, *case), dtype)
    assert rows.dtype == dtype and ours.dtype == jnp.float32
    np.testing.assert_array_equal(rows, table[tokens].astype(dtype))
    np.testing.assert_allclose(ours, by_table, rtol=1e-5, atol=1e-5)
    alone = looked_up(*case, dtype)
    np.testing.assert_array_equal(rows, alone[0])
    np.testing.assert_allclose(ours, alone[1], rtol=1e-5, atol=1e-5)


@MESHES
def test_the_gradient_is_added_up_in_float32(split):
    """4,096 ones for one token: in bfloat16 they would add up to 256."""
    mesh = mesh_of(split)
    shape = 64, 64
    case = jnp.zeros((VOCAB, WIDTH)), jnp.full(shape, 3), jnp.ones((*shape, WIDTH))
    with jax.set_mesh(mesh):
        _, ours = looked_up(*placed(mesh, *case), "bfloat16")
    np.testing.assert_array_equal(
        ours, np.where(np.arange(VOCAB) == 3, 4096.0, 0.0)[:, None] * np.ones(WIDTH)
    )


@MESHES
def test_the_table_is_gathered_once_and_its_gradient_reduced_in_pieces(case, split):
    mesh = mesh_of(split)
    with jax.set_mesh(mesh):
        arrays = placed(mesh, *case)
        rows, by_table = looked_up(*arrays, "float32")
        text = looked_up.lower(*arrays, "float32").compile().as_text()
    assert rows.sharding.is_equivalent_to(arrays[1].sharding, 3)
    assert by_table.sharding.is_equivalent_to(arrays[0].sharding, 2)
    data, fsdp = (size > 1 for size in split)
    assert text.count(" all-gather(") == fsdp
    assert text.count(" reduce-scatter(") == fsdp
    sums = re.findall(r"= f32\[(\d+),(\d+)\]\S* all-reduce\(", text)
    assert sums == [(f"{VOCAB}", f"{WIDTH // split[1]}")] * data
    assert not any(f" {kind}(" in text for kind in ("all-to-all", "collective-permute"))


def test_rows_that_do_not_divide_are_looked_up_all_the_same(case):
    table, tokens, by_rows = case
    odd = table, tokens[:3], by_rows[:3]
    alone = looked_up(*odd, "float32")
    with jax.set_mesh(mesh_of((2, 4))):
        together = looked_up(*odd, "float32")
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
