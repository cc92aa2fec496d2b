"""Kernels against the reference, forwards and backwards; on eight devices; compiled for a TPU and a GPU."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilellm_jax.errors import UserError
from mobilellm_jax.model import transformer
from mobilellm_jax.model.attention import KERNELS, PLATFORMS, choose, rope, rope_frequencies
from mobilellm_jax.model.cache import empty_cache
from mobilellm_jax.model.config import ModelConfig, Stack
from mobilellm_jax.model.plain import attention, visible
from mobilellm_jax.model.splash import BLOCK, block_size
from mobilellm_jax.model.transformer import Execution
from mobilellm_jax.parallel.mesh import make_mesh
from mobilellm_jax.parallel.sharding import batch_sharding
from mobilellm_jax.training.objectives import Network, next_token

BOS = 1
LS = ModelConfig(97, 48, (Stack(2, 4, 2, 80, repeats=2),), head_dim=16, qk_norm="unit")


def documents(rows, length, seed=0):
    """Segment ids of documents of all lengths, also of one token, and of padding at the end."""
    begins = np.random.default_rng(seed).random((rows, length)) < 0.05
    begins[:, -7:] = True
    return jnp.asarray(begins.cumsum(1), jnp.int32)


def heads(rows, length, queries, keys, width, seed=0):
    """Queries, keys, values and a cotangent."""
    rng = np.random.default_rng(seed)
    sizes = queries, keys, keys, queries
    return [jnp.asarray(rng.standard_normal((rows, length, n, width)), jnp.float32) for n in sizes]


def reference(q, k, v, ids):
    """As a kernel is called."""
    at = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    return attention(q, k, v, visible(at, at, ids, ids))


@pytest.fixture
def interpreted(monkeypatch):
    """Kernels of all devices run here."""
    for name in PLATFORMS:
        monkeypatch.setitem(KERNELS, name, functools.partial(KERNELS[name], interpret=True))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("segments", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize(
    ("length", "width"), [(200, 64), pytest.param(256, 8, marks=pytest.mark.slow)]
)
def test_kernels_equal_the_reference(kernel, segments, length, width, interpreted):
    """Rows that are no multiple of a tile as well, three query heads to a KV head."""
    q, k, v, cotangent = heads(2, length, 6, 2, width)
    ids = documents(2, length) if segments else None

    @functools.partial(jax.jit, static_argnums=0)
    def outcome(function, q, k, v, ids):
        out, back = jax.vjp(lambda *inputs: function(*inputs, ids), q, k, v)
        return out, *back(cotangent)

    ours = outcome(KERNELS[kernel], q, k, v, ids)
    for a, b in zip(ours, outcome(reference, q, k, v, ids), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()))


def test_positions_are_float32_whatever_is_turned():
    """Of bfloat16 every eighth would be one beyond 2,048."""
    x, _, _, _ = heads(1, 4, 2, 2, LS.head_dim)
    at = jnp.array([[1, 1_001, 2_051, 30_003]])
    turned, exact = (
        rope(given, at, rope_frequencies(LS))
        for given in (x.astype(jnp.bfloat16), x.astype(jnp.bfloat16).astype(jnp.float32))
    )
    assert turned.dtype == jnp.bfloat16
    np.testing.assert_allclose(turned.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def test_scores_of_attention_in_blocks_are_float32():
    """Large ones, which bfloat16 would tell apart by sixteenths: only queries, keys, values are rounded."""
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in heads(1, 64, 4, 2, 64))
    given = 4 * q, k, v  # the square root of the width is a power of 2
    exact = reference(*(x.astype(jnp.float32) for x in given), None)
    # Not as one program: XLA would leave out a rounding between two operations.
    error = jnp.abs(KERNELS["blocks"](*given, None).astype(jnp.float32) - exact)
    assert float(error.max()) < 2**-7 * float(jnp.abs(exact).max())


@pytest.mark.parametrize("segments", [False, True], ids=["one document", "documents"])
def test_attention_in_blocks_has_the_derivative_forwards_of_the_reference(segments):
    """Along two directions at once, and that of the loss's gradient, which is what curvature asks for."""
    length = 136
    inputs = heads(2, length, 6, 2, 64)[:3]
    directions = [
        jnp.stack(pair)
        for pair in zip(*(heads(2, length, 6, 2, 64, s)[:3] for s in (1, 2)), strict=True)
    ]
    ids = documents(2, length) if segments else None

    @functools.partial(jax.jit, static_argnums=0)
    def outcome(attention, inputs, directions):
        def function(*inputs):
            return attention(*inputs, ids)

        def gradient(*inputs):
            return jax.grad(lambda *inputs: jnp.square(function(*inputs)).sum(), (0, 1, 2))(*inputs)

        def along(*direction):
            changes = (jax.jvp(f, tuple(inputs), direction)[1] for f in (function, gradient))
            return jax.tree.leaves(tuple(changes))

        return jax.vmap(along)(*directions)

    ours = outcome(KERNELS["blocks"], inputs, directions)
    for a, b in zip(ours, outcome(reference, inputs, directions), strict=True):
        np.testing.assert_allclose(a, b, atol=4e-6 * float(jnp.abs(b).max()))


# Compiling kernels for whole networks takes long: of those that are interpreted one is quick.
FLASH_QUICK = [
    kernel if kernel == "blocks" else pytest.param(kernel, marks=pytest.mark.slow)
    for kernel in KERNELS
]


@pytest.mark.parametrize("kernel", FLASH_QUICK)
def test_eight_devices_with_a_kernel_train_as_one_without(kernel, interpreted):
    """A shared block, QK-norm, remat, documents: loss and gradients of all weights."""
    tokens = np.random.default_rng(0).integers(2, 97, (8, 41)).astype(np.int32)
    tokens[np.random.default_rng(1).random(tokens.shape) < 0.1] = BOS
    params = jax.jit(transformer.init, static_argnums=0)(LS, jax.random.key(0))

    def outcome(name, tokens):
        network = Network(LS, Execution(remat="full", attention=name), BOS, 2, 4)

        def loss(params):
            return next_token(params, {"tokens": tokens}, network).total

        return jax.jit(jax.value_and_grad(loss))(params)

    alone = outcome("reference", tokens)
    mesh = make_mesh({"data": 2, "fsdp": 4}, jax.devices())
    with jax.set_mesh(mesh):
        together = outcome(kernel, jax.device_put(tokens, batch_sharding(mesh)))
    for a, b in zip(*map(jax.tree.leaves, (together, alone)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("kernel", FLASH_QUICK)
def test_keys_of_the_first_pass_reach_the_kernel(kernel, interpreted):
    model = dataclasses.replace(LS, ls_kv="first_pass")
    params = jax.jit(transformer.init, static_argnums=0)(model, jax.random.key(0))
    row = jax.random.randint(jax.random.key(1), (1, 24), 2, 97)
    apply = jax.jit(transformer.apply, static_argnums=(1, 4))
    out, expected = (
        apply(params, model, row, documents(1, 24), Execution(attention=name))
        for name in (kernel, "reference")
    )
    np.testing.assert_allclose(out, expected, atol=1e-4)


def test_decoding_needs_no_kernel():
    """With a cache it is the same program, of the reference: a kernel would not run here at all."""
    row, begin, slot = jnp.arange(8)[None] + 5, jnp.zeros(1, jnp.int32), jnp.int32(0)
    apply_cached = jax.jit(transformer.apply_cached, static_argnums=(1, 6))
    given = transformer.shapes(LS), LS, row, empty_cache(LS, 1, 8), begin, slot
    programs = [
        apply_cached.lower(*given, Execution(attention=name)).as_text()
        for name in ("splash", "reference")
    ]
    assert programs[0] == programs[1]


def equations(jaxpr):
    """All equations of a program, those inside loops and calls as well, but not inside kernels."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values() if eqn.primitive.name != "pallas_call" else ():
            for sub in value if isinstance(value, tuple | list) else (value,):
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"):
                    yield from equations(sub)


@functools.cache
def train_program(kernel):
    """The gradient of a bfloat16 network, as JAX sees it."""
    network = Network(LS, Execution("bfloat16", attention=kernel), BOS, 2, 4)
    batch = {"tokens": jax.ShapeDtypeStruct((2, 201), jnp.int32)}
    gradient = jax.grad(lambda params, batch: next_token(params, batch, network).total)
    return list(equations(jax.make_jaxpr(gradient)(transformer.shapes(LS), batch).jaxpr))


def test_splash_and_flash_make_no_mask():
    def squares(kernel):
        shapes = [v.aval.shape for eqn in train_program(kernel) for v in eqn.outvars]
        return [shape for shape in shapes if shape[-2:] in ((200, 200), (256, 256))]

    assert squares("reference")
    assert not squares("splash") and not squares("flash")


@pytest.mark.parametrize("kernel", ["reference", "splash", "flash"])
def test_all_products_are_in_bfloat16(kernel):
    """Forwards and backwards, but for the reference's gradient by its float32 scores."""
    found, sums, exceptions = 0, 0, 0
    for eqn in train_program(kernel):
        if eqn.primitive.name == "dot_general":
            if "BSNH->BNTS" in str(eqn.source_info.name_stack) and kernel == "reference":
                exceptions += {v.aval.dtype for v in eqn.invars} != {jnp.dtype("bfloat16")}
                continue
            if len(eqn.params["dimension_numbers"][1][0]) == eqn.outvars[0].aval.ndim:
                continue  # sums of products, row by row, around a kernel
            assert {v.aval.dtype for v in eqn.invars} == {jnp.dtype("bfloat16")}, eqn
            found += 1
            if LS.vocab_size in eqn.outvars[0].aval.shape:  # logits, and what is added over chunks
                assert eqn.outvars[0].aval.dtype == jnp.float32
                sums += 1
    # Of each application 7 weights, three products each; of the loss three.
    assert sums == 2
    assert found == 2 * 7 * 3 + 3 + (2 * 3 if kernel == "reference" else 0)
    assert exceptions == (2 * 2 if kernel == "reference" else 0)


def test_a_layer_keeps_no_float32_copy_of_its_activations():
    kept = [
        v.aval
        for eqn in train_program("splash")
        if eqn.primitive.name == "scan" and eqn.params["length"] == 2
        for v in eqn.outvars
    ]
    large = [aval for aval in kept if math.prod(aval.shape) >= 2 * 2 * 200 * LS.width]
    assert large and {aval.dtype for aval in large} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(
    ("asked", "platform", "chosen"),
    [
        ("auto", "tpu", "splash"),
        ("auto", "gpu", "flash"),
        ("auto", "cpu", "blocks"),
        ("reference", "tpu", "reference"),
        ("blocks", "tpu", "blocks"),
        ("splash", "tpu", "splash"),
        ("flash", "gpu", "flash"),
        ("cudnn", "gpu", "cudnn"),
    ],
)
def test_the_devices_choose(asked, platform, chosen):
    assert choose(asked, platform, LS, "bfloat16", 256) == chosen


@pytest.mark.parametrize(
    ("asked", "platform", "said"),
    [("splash", "cpu", "tpu"), ("flash", "tpu", "gpu"), ("fast", "gpu", "splash, flash")],
)
def test_what_does_not_run_there_is_refused(asked, platform, said):
    with pytest.raises(UserError, match=said):
        choose(asked, platform, LS, "bfloat16", 256)


@pytest.mark.parametrize(
    ("width", "dtype", "length", "said"),
    [(16, "float32", 256, "'float32'"), (20, "bfloat16", 256, "20"), (16, "bfloat16", 255, "255")],
)
def test_what_cudnn_cannot_do_is_refused(width, dtype, length, said):
    model = dataclasses.replace(LS, head_dim=width)
    with pytest.raises(UserError, match=said):
        choose("cudnn", "gpu", model, dtype, length)


def test_tiles_divide_rows():
    for length in range(128, 5000, 128):
        block = block_size(length)
        assert length % block == 0 and block % 128 == 0 and block <= BLOCK
    assert (block_size(2048), block_size(256), block_size(1152)) == (1024, 256, 384)


def test_the_gpu_kernel_lowers_without_a_gpu():
    q, k, v, _ = heads(1, 128, 2, 1, 64)
    ids = documents(1, 128)

    def total(q, k, v):
        return KERNELS["flash"](q, k, v, ids).sum()

    gpu = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=gpu)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(q, k, v)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@__gpu$xla.gpu.triton(") == 3  # forwards, and two passes backwards


def test_the_train_step_compiles_for_a_tpu(monkeypatch):
    """Four chips that are not here: their platform decides, and the kernel is in the program."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = make_mesh({"data": 2, "fsdp": 2}, devices)
    kernel = choose("auto", mesh.devices.flat[0].platform, LS, "bfloat16", 256)
    assert kernel == "splash"
    model = dataclasses.replace(LS, width=128, head_dim=64)
    network = Network(model, Execution("bfloat16", "dots", attention=kernel), BOS, 2, 2)
    with jax.set_mesh(mesh):
        tokens = jax.ShapeDtypeStruct((8, 257), jnp.int32, sharding=batch_sharding(mesh))

        def loss(params, tokens):
            return next_token(params, {"tokens": tokens}, network).total

        lowered = jax.jit(jax.grad(loss)).lower(transformer.shapes(model), tokens)
        text = lowered.compile().as_text()
    assert text.count("tpu_custom_call") >= 4  # two applications, forwards and backwards
