"""What is read from a compiled program: how often it runs what, what it exchanges, what it moves."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import tiny
from compilers import needs_cuda, needs_libtpu
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mobilellm_jax.costs.collectives import KINDS, _members, collectives, summary
from mobilellm_jax.costs.hlo import Program
from mobilellm_jax.costs.step import make_programs
from mobilellm_jax.costs.traffic import memory_bytes
from mobilellm_jax.model.config import ModelConfig, Stack, parameter_count
from mobilellm_jax.parallel.mesh import make_mesh
from mobilellm_jax.parallel.topologies import topology_devices

LAYERS, MATRICES, MICROBATCHES = 3, 7, 2  # matrices of a block
MODEL = ModelConfig(2048, 1024, (Stack(LAYERS, 8, 4, 1536),), head_dim=128, max_length=128)


@functools.cache
def exchanged(topology, fsdp, repeats=1, vocab=MODEL.vocab_size, slices=1):
    """The collectives of a step over eight devices that hold shards of 128 and more."""
    (stack,) = MODEL.stacks
    stack = dataclasses.replace(stack, repeats=repeats)
    config = tiny.config("unused")
    model = dataclasses.replace(MODEL, stacks=(stack,), vocab_size=vocab)
    config.model = model.to_dict()
    config.row_length, config.global_batch, config.microbatches = 128, 16, MICROBATCHES
    config.execution.dtype, config.mesh.fsdp = "bfloat16", fsdp
    made = make_programs(config, topology_devices(topology, slices), 2)
    sizes = jax.ShapeDtypeStruct((vocab,), "int32")
    with jax.set_mesh(made.mesh):
        compiled = made.step.lower(made.abstract, made.abstract_batch, sizes).compile()
    program = Program(compiled.as_text())
    assert not program.unknown_loops
    return collectives(program, 8, slices)


def moved(found, *kinds):
    """How many pieces of matrices these kinds of collectives move in one step."""
    least = MODEL.width * 4 * 128 / 8  # a shard of the smallest matrix
    return sum(
        one.times
        for one in found
        if one.kind in kinds
        for array in one.arrays
        if len(array.shape) > 1 and array.bytes / 2 >= least
    )


def of_the_embedding(found, vocab):
    """The kinds of collectives that move as much as the embedding, or a little more of padding."""
    size = vocab * MODEL.width
    return {
        one.kind
        for one in found
        for array in one.arrays
        if size <= math.prod(array.shape) < 1.1 * size
    }


@pytest.mark.slow
@needs_libtpu
def test_between_slices_go_sums_of_gradients_alone():
    """Of each gradient the piece that its device has after the slice has added it up, once a microbatch."""
    found = exchanged("v5e:2x2", 4, slices=2)
    assert {one.kind for one in found if one.slices == 2} == {"all-reduce"}
    pieces = sum(one.times * one.bytes for one in found if one.slices == 2)
    gradients = 2 * parameter_count(MODEL) / 4  # bfloat16, in four pieces
    assert pieces == pytest.approx(MICROBATCHES * gradients, rel=0.1)
    assert {one.group for one in found if one.slices == 1} <= {2, 4}
    assert sum(one.network for one in found) == pytest.approx(pieces)  # half of it, there and back


TOPOLOGIES = [
    "cpu:8",
    pytest.param("v5e:2x4", marks=[pytest.mark.slow, needs_libtpu]),
]


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("fsdp", [1, pytest.param(4, marks=pytest.mark.slow), 8])
def test_one_gather_per_weight_and_pass_one_reduction_per_gradient(topology, fsdp):
    """Per microbatch. Over two axes a reduction has two parts.

    The tied embedding is used twice and gathered once. XLA for TPU adds the two shares of its
    gradient before it reduces them, XLA for CPU does not.
    """
    found = exchanged(topology, fsdp)
    assert "all-to-all" not in {one.kind for one in found}
    assert "collective-permute" not in {one.kind for one in found}
    gathers = moved(found, "all-gather")
    if fsdp == 1:
        assert gathers == 0
    else:  # that of the embedding once for all microbatches, or in each
        blocks = MATRICES * LAYERS * 2 * MICROBATCHES
        assert blocks + 1 <= gathers <= blocks + MICROBATCHES
    reductions = moved(found, "all-reduce", "reduce-scatter")
    gradients = (MATRICES * LAYERS + (2 if topology.startswith("cpu") else 1)) * MICROBATCHES
    assert reductions == gradients * (2 if fsdp == 4 else 1)
    assert {one.group for one in found} <= ({2, 4, 8} if fsdp == 4 else {8})
    whole = of_the_embedding(found, MODEL.vocab_size)
    assert whole == ({"all-reduce"} if fsdp == 1 else {"all-gather", "reduce-scatter"})


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 4, 8])
def test_gpus_gather_a_weight_and_reduce_its_gradient_once_per_microbatch(fsdp):
    """Of one operation for several weights: their bytes count, of bfloat16; what is gathered is kept
    for the backward pass where no loop lies between. The embedding and its gradient are float32.
    """
    sent = dict.fromkeys(KINDS, 0.0)
    for one in exchanged("h100:8", fsdp):
        assert one.group in ({2, 4, 8} if fsdp == 4 else {8})
        sent[one.kind] += one.times * one.bytes
    embedding = MODEL.vocab_size * MODEL.width
    matrices = 2 * MICROBATCHES * (parameter_count(MODEL) - embedding)
    whole = matrices, 1.02 * (matrices + 4 * MICROBATCHES * embedding)
    pieces = (matrices / 4, whole[1] / 4) if fsdp == 4 else (0.0, 0.01 * matrices)
    bounds = {kind: (0.0, 0.0) for kind in KINDS}
    if fsdp == 1:
        bounds["all-reduce"] = whole
    else:
        bounds |= {"all-gather": whole, "reduce-scatter": (whole[0], 1.3 * whole[1])}
        bounds["all-reduce"] = pieces
    for kind, (least, most) in bounds.items():
        assert least <= sent[kind] <= most, kind


@needs_libtpu
@pytest.mark.slow
def test_an_embedding_of_llama_s_size_is_scattered_as_well():
    """Cut along its width by 8, XLA for TPU would all-reduce it: 128,256 is 2**8 * 3 * 167."""
    found = exchanged("v5e:2x4", 8, vocab=128_256)
    assert of_the_embedding(found, 128_256) == {"all-gather", "reduce-scatter"}


@pytest.mark.slow
def test_a_shared_block_s_gradient_is_reduced_for_each_application():
    """And its weights are gathered as often at most."""
    once, twice = (exchanged("cpu:8", 8, repeats) for repeats in (1, 2))
    assert moved(once, "all-gather") <= moved(twice, "all-gather") < 2 * moved(once, "all-gather")
    more = moved(twice, "all-reduce") - moved(once, "all-reduce")
    assert more == MATRICES * LAYERS * MICROBATCHES


def test_scans_count_their_length_and_bytes_are_those_of_whole_arrays():
    mesh = make_mesh({"data": 1, "fsdp": 8}, jax.devices())
    split = NamedSharding(mesh, P(None, "fsdp"))

    def walk(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    weights = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=split)
    place = NamedSharding(mesh, P("fsdp"))
    text = jax.jit(walk, out_shardings=place).lower(x, weights).compile().as_text()
    found = summary(collectives(Program(text), 8))
    (gather,) = [row for row in found if row["kind"] == "all-gather"]
    assert gather["group"] == 8
    assert gather["bytes"] == 5 * 64 * 64 * 4
    assert gather["sent"] == pytest.approx(gather["bytes"] * 7 / 8)


def test_traffic_of_a_scan_counts_slices():
    """A scan reads and writes each layer once, not the whole stack at every turn."""

    def walk(x, weights):
        return jax.lax.scan(lambda x, w: (x, w + 1.0), x, weights)[1]

    x, weights = jnp.zeros(8), jax.ShapeDtypeStruct((16, 256, 256), jnp.float32)
    text = jax.jit(walk).lower(x, weights).compile().as_text()
    stack = 16 * 256 * 256 * 4
    # Read and written once by the scan; XLA may copy a layer on its way, or clear the result first.
    assert 2 * stack <= memory_bytes(Program(text)) <= 6 * stack


# As the TPU compiler writes: a scan without a noted length, a reduce-scatter as a fusion, a gather
# in two fusions that share a channel, arrays in the core's own memory, S(1).
TPU = (Path(__file__).parent / "tpu_step.hlo").read_text()


def test_the_text_of_the_tpu_compiler():
    program = Program(TPU)
    found = {one.kind: one for one in collectives(program, 8)}
    assert sorted(found) == ["all-gather", "collective-permute", "reduce-scatter"]
    assert len(collectives(program, 8)) == 3
    assert {one.times for one in found.values()} == {30} and not program.unknown_loops
    assert {kind: one.group for kind, one in found.items()} == {
        "all-gather": 4,
        "reduce-scatter": 4,
        "collective-permute": 8,
    }
    assert found["all-gather"].bytes == 64 * 64 * 2
    assert found["reduce-scatter"].bytes == 512 * 64 * 2
    assert found["reduce-scatter"].sent == 30 * 512 * 64 * 2 * 3 / 4
    assert found["collective-permute"].bytes == 128 * 64 * 2
    # In memory: the gather's first fusion reads a shard and writes a whole, its last reads a shard;
    # the rest lies in the core.
    shard, whole = 16 * 64 * 2, 64 * 64 * 2
    assert memory_bytes(program) == 30 * (shard + whole + shard)


def test_a_loop_that_does_not_tell_its_turns_is_remembered():
    for old, new in (("direction=LT", "direction=NE"), ("add(%n, %one)", "add(%n, %n)")):
        program = Program(TPU.replace(old, new))
        assert {one.times for one in collectives(program, 8)} == {1}
        assert program.unknown_loops == {"while"}


def test_a_loop_that_takes_several_turns_at_once_is_counted_by_its_steps():
    """As the TPU compiler writes a product that gathers a weight piece by piece on its way."""
    for step, turns in ((2, 15), (4, 8)):
        program = Program(TPU.replace("constant(1)", f"constant({step})"))
        assert {one.times for one in collectives(program, 8)} == {turns}
        assert not program.unknown_loops


def test_turns_that_were_put_before_the_loop_are_none_of_it():
    program = Program(TPU.replace("%zero.1 = s32[] constant(0)", "%zero.1 = s32[] constant(1)"))
    assert {one.times for one in collectives(program, 8)} == {29} and not program.unknown_loops


def test_a_counter_that_is_copied_on_its_way_is_counted():
    copied = TPU.replace("tuple(%n.1, %x)", "tuple(%n.2, %x)").replace(
        "  %x = bf16[512,64]", "  %n.2 = s32[]{:T(128)} copy(%n.1)\n  %x = bf16[512,64]", 1
    )
    program = Program(copied)
    assert copied != TPU and {one.times for one in collectives(program, 8)} == {30}
    assert not program.unknown_loops


def exchange(opcode, attributes, result="f32[100]{0}", operand="f32[100]{0}", slices=1, header=""):
    """The one collective of a program that does nothing else, over eight devices."""
    text = f"""HloModule one{header}

ENTRY %main (a: f32[100]) -> f32[100] {{
  %a = {operand} parameter(0)
  ROOT %out = {result} {opcode}(%a), channel_id=1, {attributes}
}}
"""
    (found,) = collectives(Program(text), 8, slices)
    return found


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", 2),
        ("[4,2]<=[8]", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['data'=2,'fsdp'=4]{'fsdp'}", 4),
        ("mesh['data'=2,'fsdp'=4]{'data','fsdp'}", 8),
        ("mesh['data'=2,'fsdp'=4]{'data','fsdp':(2)2}", 4),
        ("{}", 8),
    ],
)
def test_groups_are_read_however_they_are_written(groups, size):
    found = exchange("all-reduce", f"replica_groups={groups}, to_apply=%add")
    assert found.group == size


@pytest.mark.parametrize(
    ("groups", "members"),
    [
        ("{{0,2},{1,3},{4,6},{5,7}}", [0, 2]),
        ("[4,2]<=[8]", [0, 1]),
        ("[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("[2,4]<=[2,2,2]T(1,2,0)", [0, 4, 1, 5]),
        ("mesh['data'=2,'fsdp'=4] {'data'}", [0, 4]),
        ("mesh['data'=2,'fsdp'=4] {'fsdp':(1)2}", [0, 2]),  # its first half
        ("mesh['data'=2,'fsdp'=4] {'fsdp':(2)2}", [0, 1]),  # its second
        ("mesh['data'=2,'fsdp'=4] {'data','fsdp':(2)2}", [0, 1, 4, 5]),
        # The axes of a mesh may number the devices in another order.
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", [0, 1, 2, 3]),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [0, 4]),
        ("mesh['a'=4,'b'=2], device_ids=([8]) {'b'}", [0, 1]),
    ],
)
def test_members_of_a_group_are_those_that_xla_means(groups, members):
    """And with them which nodes it lies in: here of four devices, of two, of one."""
    attributes = f"replica_groups={groups}, to_apply=%add"
    assert sorted(_members(attributes, 8).tolist()) == sorted(members)
    for slices in (1, 2, 4, 8):
        found = exchange("all-reduce", attributes, slices=slices)
        assert found.slices == len({member // (8 // slices) for member in members})


def test_what_a_ring_sends():
    """Of 400 bytes over 4 devices: a gather three quarters, a reduction to all twice that."""
    four = "replica_groups={{0,1,2,3},{4,5,6,7}}"
    assert exchange("all-reduce", four).sent == 2 * 300
    assert exchange("all-to-all", four).sent == 300
    assert exchange("all-gather", four, operand="f32[25]{0}").sent == 300
    both = "(f32[25]{0}, f32[100]{0})"  # what goes in, and what comes out
    assert exchange("all-gather-start", four, both, "f32[25]{0}").sent == 300
    assert exchange("reduce-scatter", four, result="f32[25]{0}").sent == 300
    assert exchange("collective-permute", "source_target_pairs={{0,1},{1,0}}").sent == 400


def test_what_a_ring_over_nodes_sends_through_the_network():
    """Of each device's part, as much as its adapter has to carry when each starts a ring of its own."""
    everyone = exchange("all-reduce", "replica_groups={}", slices=2)
    assert everyone.passed == 2 * 400 * 7 / 8
    assert everyone.network == everyone.passed / 4  # four devices of a node share it
    assert everyone.sent + everyone.network == everyone.passed
    across = exchange("all-reduce", "replica_groups={{0,4},{1,5},{2,6},{3,7}}", slices=2)
    assert (across.network, across.sent) == (across.passed, 0)
    within = exchange("all-gather", "replica_groups={{0,1,2,3},{4,5,6,7}}", slices=2)
    assert (within.network, within.sent) == (0, within.passed)


def test_what_a_tpu_hands_to_its_host_goes_to_the_other_slices():
    """Its program is that of one slice, which counts its own devices alone."""
    handed = (
        'is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    found = exchange("send", handed, "(f32[100]{0}, u32[], token[])", slices=2)
    assert (found.kind, found.group, found.slices) == ("all-reduce", 2, 2)
    assert (found.network, found.sent) == (400, 0)  # half of it there and back
    one = ", num_partitions=4"
    for attributes in ("replica_groups={}", "replica_groups={{0,1,2,3}}"):
        found = exchange("all-reduce", attributes, slices=2, header=one)
        assert (found.group, found.slices, found.network) == (4, 1, 0)


def test_the_summary_counts_what_runs_and_begins_with_what_sends_most():
    program = Program(TPU)
    rows = summary(collectives(program, 8))
    assert [(row["operations"], row["arrays"]) for row in rows] == [(30, 30)] * 3
    assert [row["kind"] for row in rows] == ["reduce-scatter", "collective-permute", "all-gather"]
    twice = summary(2 * collectives(program, 8))
    assert [row["sent"] for row in twice] == [2 * row["sent"] for row in rows]


def moves(*instructions, fused=""):
    """Bytes that a program of these instructions moves; of arrays of 1,024 bytes a layer."""
    body = "\n".join(f"  {line}" for line in instructions)
    text = f"""HloModule one
{fused}
ENTRY %main (a: f32[16,256]) -> f32[16,256] {{
  %a = f32[16,256]{{1,0}} parameter(0)
  %w = f32[1,256]{{1,0}} parameter(1)
  %near = f32[16,256]{{1,0:S(1)}} parameter(2)
  %i = s32[] constant(3)
{body}
}}
"""
    return memory_bytes(Program(text))


LAYER, STACK = 1024, 16 * 1024


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("f32[16,256]{1,0} add(%a, %a)", 3 * STACK),
        ("f32[16,256]{1,0:S(1)} add(%a, %near)", STACK),
        ("f32[16,256]{1,0} bitcast(%a)", 0),
        # Of a slice what is sliced out is read and written, of an update what is new.
        ("f32[1,256]{1,0} dynamic-slice(%a, %i, %i)", 2 * LAYER),
        ("f32[1,256]{1,0} dynamic-slice(%near, %i, %i)", LAYER),
        ("f32[1,256]{1,0:S(1)} dynamic-slice(%a, %i, %i)", LAYER),
        ("f32[16,256]{1,0} dynamic-update-slice(%a, %w, %i, %i)", 2 * LAYER),
        ("f32[16,256]{1,0:S(1)} dynamic-update-slice(%near, %w, %i, %i)", LAYER),
        # Between the two memories, as the TPU compiler writes it: the copy, its source, a semaphore.
        ("(f32[16,256]{1,0:S(1)}, f32[16,256]{1,0}, u32[]{:S(2)}) copy-start(%a)", STACK),
        ("(f32[16,256]{1,0}, f32[16,256]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%near)", STACK),
        ("(f32[16,256]{1,0}, f32[16,256]{1,0}, u32[]{:S(2)}) copy-start(%a)", 2 * STACK),
    ],
)
def test_traffic_of_an_instruction(instruction, expected):
    assert moves(f"ROOT %out = {instruction}") == expected


FUSIONS = {  # the body of a fusion of the stack p, the layer q and the number n; what it moves
    "all of it": ("ROOT %r = f32[16,256]{1,0} negate(%p)", 2 * STACK),
    "a layer": (
        "%s = f32[1,256]{1,0} dynamic-slice(%p, %n, %n)\n"
        "  ROOT %r = f32[1,256]{1,0} multiply(%s, %q)",
        LAYER + LAYER + LAYER,
    ),
    "a layer, behind a view": (
        "%v = f32[16,256]{1,0} bitcast(%p)\n"
        "  %s = f32[1,256]{1,0} dynamic-slice(%v, %n, %n)\n"
        "  ROOT %r = f32[1,256]{1,0} negate(%s)",
        LAYER + LAYER,
    ),
    "a layer, and all of it": (
        "%s = f32[1,256]{1,0} dynamic-slice(%p, %n, %n)\n"
        "  %sum = f32[1,256]{1,0} reduce-window(%p, %n)\n"
        "  ROOT %r = f32[1,256]{1,0} add(%s, %sum)",
        STACK + LAYER,
    ),
    "a layer is written": (
        "ROOT %r = f32[16,256]{1,0} dynamic-update-slice(%p, %q, %n, %n)",
        LAYER + LAYER,
    ),
    "a layer is written, before a view": (
        "%u = f32[16,256]{1,0} dynamic-update-slice(%p, %q, %n, %n)\n"
        "  ROOT %r = f32[16,256]{1,0} bitcast(%u)",
        LAYER + LAYER,
    ),
    "a layer is added to": (
        "%s = f32[1,256]{1,0} dynamic-slice(%p, %n, %n)\n"
        "  %sum = f32[1,256]{1,0} add(%s, %q)\n"
        "  ROOT %r = f32[16,256]{1,0} dynamic-update-slice(%p, %sum, %n, %n)",
        LAYER + LAYER + LAYER,
    ),
    "a layer is written behind a view, and all of it read": (
        "%v = f32[16,256]{1,0} copy(%p)\n"
        "  %sum = f32[1,256]{1,0} reduce-window(%p, %q)\n"
        "  ROOT %r = f32[16,256]{1,0} dynamic-update-slice(%v, %sum, %n, %n)",
        STACK + LAYER + LAYER,
    ),
    "one of two is passed on": (
        "%t = f32[1,256]{1,0} negate(%q)\n"
        "  ROOT %r = (f32[16,256]{1,0}, f32[1,256]{1,0}) tuple(%p, %t)",
        LAYER + LAYER,
    ),
}


@pytest.mark.parametrize("name", FUSIONS)
def test_traffic_of_a_fusion(name):
    body, expected = FUSIONS[name]
    result = body.rpartition("%r = ")[2]
    result = result[: result.index(")") + 1] if result[0] == "(" else result.split()[0]
    fused = f"""
%fused (p: f32[16,256]) -> f32[16,256] {{
  %p = f32[16,256]{{1,0}} parameter(0)
  %q = f32[1,256]{{1,0}} parameter(1)
  %n = s32[] parameter(2)
  {body}
}}
"""
    # Numbers are no traffic worth counting: four bytes each.
    found = moves(f"ROOT %out = {result} fusion(%a, %w, %i), calls=%fused", fused=fused)
    assert expected <= found <= expected + 8
