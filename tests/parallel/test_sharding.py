"""What the table promises is what the compiled step does: weights in pieces, rows at home."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from mobilellm_jax.errors import UserError
from mobilellm_jax.model import transformer
from mobilellm_jax.model.presets import PRESETS, preset
from mobilellm_jax.model.transformer import Execution
from mobilellm_jax.parallel.mesh import AXES, make_mesh
from mobilellm_jax.parallel.sharding import batch_sharding, path_name, shardings, spec
from mobilellm_jax.training.config import configured
from mobilellm_jax.training.objectives import Network, next_token
from mobilellm_jax.training.step import init_state, train_step

CONFIG = tiny.config("unused")
MAKE_OPTIMIZER = configured(CONFIG.optimizer, "optimizer")
# Blocks are pinned wherever they are applied, which a test of its own counts: here once is enough.
MODEL = dataclasses.replace(
    tiny.MODEL, stacks=(dataclasses.replace(tiny.MODEL.stacks[0], repeats=1),)
)
# No dimension of a weight is 20 or 20 / 4, so that activations are known by their shape.
ROWS, LENGTH, CHUNKS, MICROBATCHES = 32, 20, 4, 2
UNTIED = dataclasses.replace(preset("mobilellm-125m"), tied=False)
SCALED = dataclasses.replace(preset("mobilellm-ls-125m"), qk_norm="scaled")


def fresh(model=MODEL):
    return init_state(transformer.init(model, jax.random.key(0)), MAKE_OPTIMIZER)


def named(tree):
    """Leaves by their path."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@functools.cache
def compiled_step(data, fsdp):
    """The train step over eight devices, and its train state as shapes with shardings."""
    mesh = make_mesh({"data": data, "fsdp": fsdp}, jax.devices())
    step = functools.partial(
        train_step,
        network=Network(MODEL, Execution("float32"), 1, 2, CHUNKS),
        objective=next_token,
        make_optimizer=MAKE_OPTIMIZER,
        schedule=configured(CONFIG.schedule, "schedule")(12),
        sources=2,
        microbatches=MICROBATCHES,
    )
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(fresh)
        places = shardings(shapes, mesh)
        rows = batch_sharding(mesh)
        batch = {
            "tokens": jax.ShapeDtypeStruct((ROWS, LENGTH + 1), jnp.int32, sharding=rows),
            "source": jax.ShapeDtypeStruct((ROWS,), jnp.int32, sharding=rows),
        }
        state = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
        )
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
        sizes = jax.ShapeDtypeStruct((tiny.VOCAB,), jnp.int32)
        return jitted.lower(state, batch, sizes).compile(), state


def collectives(compiled):
    """(kind, result, origin in the source) of every collective operation in a compiled program."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = []
    for result, kind, rest in re.findall(
        rf"= (.*?) ({kinds})(?:-start)?\((.*)", compiled.as_text()
    ):
        origin = re.search(r'op_name="([^"]*)"', rest)
        found.append((kind, result, origin[1] if origin else ""))
    return found


def rows_in(found):
    """Those of the collectives that move something with an axis of tokens."""
    tokens = {str(LENGTH), str(LENGTH + 1), str(LENGTH // CHUNKS)}

    def sizes(result):
        return {size for shape in re.findall(r"\[([\d,]+)\]", result) for size in shape.split(",")}

    return [one for one in found if tokens & sizes(one[1])]


@pytest.mark.parametrize(
    "model", [*PRESETS.values(), UNTIED, SCALED], ids=[*PRESETS, "untied", "scaled"]
)
def test_every_matrix_is_sharded_and_every_norm_replicated(model):
    mesh = make_mesh({"data": 1, "fsdp": 8}, jax.devices())
    state = jax.eval_shape(functools.partial(fresh, model))
    places = named(shardings(state.params, mesh))
    for name, leaf in named(state.params).items():
        place = places[name]
        place.shard_shape(leaf.shape)  # raises where an axis does not divide its dimension
        if name.endswith("scale"):
            assert place.spec == P(), name
        else:
            assert [axis for axis in place.spec if axis] == ["fsdp"], name
            split = place.spec.index("fsdp")
            assert leaf.shape[split] == model.width, f"{name} is not split along D"
            assert not (name.startswith("stack") and split == 0), f"{name} is split over layers"


def test_moments_follow_their_parameters():
    mesh = make_mesh({"data": 2, "fsdp": 4}, jax.devices())
    places = shardings(jax.eval_shape(fresh), mesh)
    parameters = {name: place.spec for name, place in named(places.params).items()}
    followed = 0
    for name, place in named(places.opt_state).items():
        owner = next((p for p in parameters if name.endswith(f"/{p}")), None)
        assert place.spec == (parameters[owner] if owner else P()), name
        followed += owner is not None
    assert followed == 2 * len(parameters)  # AdamW's two moments


def test_what_no_rule_names_is_replicated():
    mesh = make_mesh({"data": 1, "fsdp": 8}, jax.devices())
    assert spec("params/stack_0/router/weights", (4, 64, 8), mesh) == P()
    assert spec("params/stack_0/attention/query", (64, 8), mesh) == P()  # not that rule's axes
    assert spec("params/overhead", (64, 8), mesh) == P()  # `head` is a whole name, not an ending


def test_an_axis_that_does_not_divide_is_left_out():
    mesh = make_mesh({"data": 1, "fsdp": 8}, jax.devices())
    assert spec("embedding", (100, 64), mesh) == P(None, "fsdp")
    assert spec("embedding", (100, 60), mesh) == P(None, None)


def lowered_constraints(repeats, mesh=None):
    model = dataclasses.replace(
        tiny.MODEL, stacks=(dataclasses.replace(tiny.MODEL.stacks[0], repeats=repeats),)
    )
    shapes = jax.eval_shape(functools.partial(fresh, model)).params
    tokens = jax.ShapeDtypeStruct((8, 4), jnp.int32)

    def lower():
        return jax.jit(lambda p, t: transformer.apply(p, model, t)).lower(shapes, tokens).as_text()

    if mesh is None:
        return lower().count("sharding_constraint")
    with jax.set_mesh(mesh):
        return lower().count("sharding_constraint")


def test_activations_are_pinned_at_every_application_of_a_block():
    """A constraint outside of `jax.set_mesh` is silently nothing: count them in the lowered program."""
    mesh = make_mesh({"data": 2, "fsdp": 4}, jax.devices())
    once, thrice = (lowered_constraints(repeats, mesh) for repeats in (1, 3))
    assert (once, thrice) == (1, 3)  # the look-up gives rows where they belong by itself
    assert lowered_constraints(3) == 0


def test_weights_and_moments_live_in_eight_pieces():
    compiled, state = compiled_step(1, 8)
    places = jax.tree.map(lambda x: x.sharding, state)
    tokens = np.random.default_rng(0).integers(1, tiny.VOCAB, (ROWS, LENGTH + 1), np.int32)
    batch = {"tokens": tokens, "source": np.zeros(ROWS, np.int32)}
    batch = jax.device_put(batch, batch_sharding(make_mesh({"data": 1, "fsdp": 8}, jax.devices())))
    new, _ = compiled(
        jax.device_put(jax.jit(fresh)(), places), batch, np.ones(tiny.VOCAB, np.int32)
    )
    sharded = 0
    for name, leaf in named((new.params, new.opt_state)).items():
        pieces = {str(shard.index) for shard in leaf.addressable_shards}
        sizes = {shard.data.size for shard in leaf.addressable_shards}
        if leaf.ndim < 2 or name.endswith("scale"):
            assert len(pieces) == 1 and sizes == {leaf.size}, name
        else:
            assert len(pieces) == 8 and sizes == {leaf.size // 8}, name
            sharded += 1
    assert sharded == 3 * 8  # embedding and seven matrices, each with two moments


def test_weights_are_gathered_and_gradients_reduced():
    kinds = {kind for kind, _, _ in collectives(compiled_step(1, 8)[0])}
    assert "all-gather" in kinds
    assert kinds & {"all-reduce", "reduce-scatter"}


def test_data_parallel_devices_exchange_sums_alone():
    """Neither cutting a batch into microbatches nor cutting rows into parts moves a row."""
    found = collectives(compiled_step(8, 1)[0])
    assert found and {kind for kind, _, _ in found} == {"all-reduce"}
    assert not rows_in(found)


@pytest.mark.parametrize("split", [(1, 8), (2, 4)], ids=str)
def test_sharded_weights_travel_and_rows_do_not(split):
    found = collectives(compiled_step(*split)[0])
    assert not {kind for kind, _, _ in found} & {"all-to-all", "collective-permute"}
    assert not rows_in(found)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((-1, 1), (8, 1)), ((1, -1), (1, 8)), ((2, -1), (2, 4)), ((-1, 4), (2, 4)), ((4, 2), (4, 2))],
)
def test_meshes(sizes, expected):
    assert (
        tuple(make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices()).shape.values())
        == expected
    )


@pytest.mark.parametrize(
    "sizes", [(3, -1), (-1, -1), (2, 2), (0, 8), (16, 1), (-1, 0), (-2, -4)], ids=str
)
def test_what_is_no_mesh_is_refused(sizes):
    with pytest.raises(UserError, match=rf"data={sizes[0]} x fsdp={sizes[1]}.* 8 devices"):
        make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices())
