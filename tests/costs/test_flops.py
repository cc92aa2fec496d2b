"""The count of products against XLA's own, against the formula, and against arithmetic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec as P

from mobilellm_jax.costs.flops import Flops, count
from mobilellm_jax.costs.step import make_programs
from mobilellm_jax.model.by_heads import blocks
from mobilellm_jax.model.config import ModelConfig, Stack, flops_per_token
from mobilellm_jax.model.flash_gpu import BLOCKS, flash
from mobilellm_jax.parallel.mesh import make_mesh


def counted(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return count(jax.make_jaxpr(function)(*arrays))


def chain(x, weights, scanned):
    """x through square matrices, [L, D, D], by a scan or not."""
    if scanned:
        return jax.lax.scan(lambda x, w: (x @ w, None), x, weights)[0]
    for i in range(weights.shape[0]):
        x = x @ weights[i]
    return x


@pytest.mark.parametrize("scanned", [True, False])
def test_products_equal_xla_of_the_unrolled_program(scanned):
    """XLA counts what an unrolled program of products alone computes; a scan it counts once."""
    shapes = (24, 16), (5, 16, 16)

    def gradients(x, weights, scanned):
        return jax.grad(lambda x, w: chain(x, w, scanned)[0, 0], (0, 1))(x, weights)

    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    unrolled = jax.jit(functools.partial(chain, scanned=False)).lower(*arrays)
    forward = counted(functools.partial(chain, scanned=scanned), *shapes)
    assert forward.matmul == unrolled.cost_analysis()["flops"] == 5 * 2 * 24 * 16 * 16
    both = counted(functools.partial(gradients, scanned=scanned), *shapes)
    assert both.matmul in (2 * forward.matmul, 3 * forward.matmul)  # the last output may be dead
    assert both.matmul == counted(functools.partial(gradients, scanned=True), *shapes).matmul


def test_an_unrolled_step_equals_xla_up_to_elementwise_work():
    """XLA's count has every operation on elements too: the share of those shrinks with the width."""
    model = ModelConfig(4096, 1024, (Stack(2, 8, 8, 4096),), head_dim=128, max_length=256)
    config = tiny.config("unused", steps=1001)
    config.model = model.to_dict()
    config.row_length, config.global_batch, config.execution.unroll = 256, 8, 2
    made = make_programs(config, tiny.one_device(), 2)
    sizes = jax.ShapeDtypeStruct((model.vocab_size,), "int32")
    with jax.set_mesh(made.mesh):
        traced = made.step.trace(made.abstract, made.abstract_batch, sizes)
    xla = traced.lower().cost_analysis()["flops"]
    ours = count(traced.jaxpr)
    assert not ours.uncounted
    assert ours.total < xla < 1.05 * ours.total


def step_flops(
    remat="none", microbatches=1, model=tiny.MODEL, devices=1, fsdp=1, optimizer="adamw"
):
    config = tiny.config("unused")
    config.optimizer.use = f"mobilellm_jax.training.optimizer:{optimizer}"
    config.model = model.to_dict()
    config.execution.remat, config.execution.attention = remat, "reference"
    config.microbatches, config.mesh.fsdp = microbatches, fsdp
    made = make_programs(config, jax.devices()[:devices], 2)
    sizes = jax.ShapeDtypeStruct((model.vocab_size,), "int32")
    with jax.set_mesh(made.mesh):
        jaxpr = made.step.trace(made.abstract, made.abstract_batch, sizes).jaxpr
    tokens = config.global_batch * config.row_length
    matmul = tokens * flops_per_token(model, 0)
    return count(jaxpr), matmul, tokens * flops_per_token(model, config.row_length) - matmul


@pytest.mark.parametrize("microbatches, devices", [(1, 1), (4, 1), (2, 8)])
def test_without_remat_the_step_computes_what_the_formula_says(microbatches, devices):
    found, matmul, attention = step_flops("none", microbatches, devices=devices, fsdp=devices)
    assert matmul <= found.matmul <= 1.02 * matmul
    assert found.attention == pytest.approx(2 * attention)  # the reference computes both halves
    assert not found.uncounted


def test_the_products_of_muon_are_those_of_its_iterations_and_no_attention():
    """Per layer and iteration two products with the longer side, and one of the shorter side alone."""
    plain, matmul, attention = step_flops()
    found, _, _ = step_flops(optimizer="muon")
    assert (found.matmul, found.attention) == (plain.matmul, plain.attention)
    assert plain.optimizer == 0
    layers, sides = 2, [(32, 32), (16, 32), (16, 32), (32, 32), (32, 48), (32, 48), (32, 48)]
    one = sum(2 * (2 * short**2 * long + short**3) for short, long in sides)
    assert found.optimizer == 5 * layers * one


def test_remat_recomputes_the_forward_pass():
    whole, matmul, attention = step_flops("full")
    head = 6 * tiny.VOCAB * tiny.MODEL.width * 16 * tiny.ROW
    assert whole.matmul > matmul + 0.8 * (matmul - head) / 3  # less what nobody reads twice
    assert whole.attention == pytest.approx(2 * attention * 4 / 3)
    dots, _, _ = step_flops("dots")
    assert dots.matmul <= 1.02 * matmul
    assert dots.attention == pytest.approx(whole.attention)


@pytest.mark.parametrize(("length", "share"), [(1024, 9 / 16), (128, 3 / 4), (64, 1)])
def test_attention_in_blocks_computes_little_of_the_future(length, share):
    def attend(q, k, v):
        return blocks(q, k, v, None)

    shape = 2, length, 2, 16
    pairs = 2 * 2 * length**2
    forward = counted(attend, shape, shape, shape)
    assert forward.attention == 2 * 2 * pairs * 16 * share
    back = counted(jax.grad(lambda *x: attend(*x).sum(), (0, 1, 2)), shape, shape, shape)
    assert back.attention == forward.attention * (2 + 4 + 1) / 2  # the scores are formed twice


def test_control_flow():
    def branches(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    def turns(x):
        return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x)

    product = 2 * 8**3
    assert counted(branches, (8, 8)) == Flops(2 * product)
    assert counted(turns, (8, 8)) == Flops(
        product, uncounted={"while loop, counted as one turn": 1}
    )
    three = counted(lambda x: jax.lax.fori_loop(0, 3, lambda i, x: x @ x, x), (8, 8))
    assert three == Flops(3 * product)


def test_what_runs_per_device_counts_on_each():
    mesh = make_mesh({"data": 2, "fsdp": 4}, jax.devices())
    places = P(("data", "fsdp")), P()
    local = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=places, out_specs=places[0])
    assert counted(local, (16, 4), (4, 4)) == Flops(2 * 16 * 4 * 4)
    # Over one axis alone shapes inside are whole along the other.
    rows = jax.shard_map(
        lambda x, w: x @ w,
        mesh=mesh,
        in_specs=(P("data"), P()),
        out_specs=P("data"),
        axis_names={"data"},
    )
    assert counted(rows, (16, 4), (4, 4)) == Flops(2 * 16 * 4 * 4)


def test_batched_products_are_attention_and_convolutions_matrices():
    scores = counted(lambda q, k: jnp.einsum("BTH,BSH->BTS", q, k), (2, 8, 4), (2, 16, 4))
    assert scores == Flops(attention=2 * 2 * 8 * 16 * 4)

    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1,), "SAME", dimension_numbers=("NTC", "TIO", "NTC")
        )

    assert counted(convolve, (2, 10, 3), (5, 3, 7)) == Flops(2 * 2 * 10 * 7 * 5 * 3)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("block", "keys"), [(128, 128), (256, 256), (128, 256), (512, 128)])
def test_splash_attention_is_priced_by_visited_blocks(block, keys, fused):
    rows, heads, length, width = 2, 4, 512, 64
    own = {} if fused else {"block_q_dq": block, "block_kv_dq": keys}
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=keys,
        block_kv_compute=keys,
        block_q_dkv=block,
        block_kv_dkv=keys,
        block_kv_dkv_compute=keys,
        use_fused_bwd_kernel=fused,
        **own,
    )
    kernel = splash.make_splash_mha(
        mask=masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=sizes,
    )

    def attend(q, k, v):
        return jax.vmap(kernel)(q, k, v).sum()

    shapes = (rows, heads, length, width), (rows, 2, length, width), (rows, 2, length, width)
    visited = np.tril(np.ones((length, length))).reshape(length // block, block, -1, keys)
    product = 2 * rows * heads * width * visited.any((1, 3)).sum() * block * keys
    assert counted(attend, *shapes) == Flops(attention=2 * product)
    backward = 5 if fused else 7  # fused: the weights and their gradient serve both
    both = counted(jax.grad(attend, (0, 1, 2)), *shapes)
    sums = 2 * rows * heads * length * width  # output times its gradient, outside of the kernels
    assert both == Flops(attention=(2 + backward) * product + sums)


@pytest.mark.parametrize("length", [512, 450])
def test_flash_attention_is_priced_by_visited_blocks(length):
    rows, heads, width, padded = 2, 4, 64, 512

    def attend(q, k, v):
        return flash(q, k, v, None).sum()

    def product(queries, keys):
        visited = np.tril(np.ones((padded, padded))).reshape(padded // queries, queries, -1, keys)
        return 2 * rows * heads * width * visited.any((1, 3)).sum() * queries * keys

    shapes = (rows, length, heads, width), (rows, length, 2, width), (rows, length, 2, width)
    forward = 2 * product(BLOCKS.block_q, BLOCKS.block_k)
    assert counted(attend, *shapes) == Flops(attention=forward)
    backward = 4 * product(BLOCKS.block_q_dkv, BLOCKS.block_kv_dkv)
    backward += 3 * product(BLOCKS.block_q_dq, BLOCKS.block_kv_dq)
    assert counted(jax.grad(attend, (0, 1, 2)), *shapes) == Flops(attention=forward + backward)


def test_an_unknown_kernel_is_named_and_not_counted():
    from jax.experimental import pallas as pl

    def double(x_ref, out_ref):
        out_ref[...] = 2 * x_ref[...]

    def run(x):
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.lax.fori_loop(
            0, 3, lambda i, x: pl.pallas_call(double, out_shape=out, name="twice")(x), x
        )

    assert counted(run, (8, 8)) == Flops(uncounted={"kernel twice": 3})
