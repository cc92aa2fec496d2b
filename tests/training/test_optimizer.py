"""Optimizers against their definitions in float64, layer by layer; where and how their state is kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from runs import bits, lines, run

from mobilellm_jax.errors import UserError
from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import Stack
from mobilellm_jax.parallel.mesh import make_mesh
from mobilellm_jax.parallel.sharding import path_name, shardings
from mobilellm_jax.training import optimizer

SETTINGS = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip": 1e9}
ADAMW = functools.partial(optimizer.adamw, **SETTINGS)
MUON = functools.partial(optimizer.muon, **SETTINGS)
MUON_PATH = "mobilellm_jax.training.optimizer:muon"

# A pruned network's stacks of unequal shapes, with biases and a head of its own.
MODEL = dataclasses.replace(
    tiny.MODEL, stacks=(Stack(3, 4, 2, 48), Stack(2, 2, 1, 24)), tied=False, qkv_bias=True
)
MATRICES = ("query", "key", "value", "out", "gate", "up", "down")


@functools.cache
def params():
    return jax.jit(transformer.init, static_argnums=0)(MODEL, jax.random.key(0))


def gradients(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape), jnp.float32), params())


@functools.partial(jax.jit, static_argnums=0)
def updated(make, gradients, state, p, rate):
    """Updates and parameters after them, and optimizer state."""
    updates, state = make(rate).update(gradients, state, p)
    return updates, optax.apply_updates(p, updates), state


def begun(make, p):
    """Optimizer state before the first step."""
    return jax.jit(make(0.0).init)(p)


def trained(make, steps=3, rate=1e-2):
    """Parameters and optimizer state after a few steps on random gradients."""
    p, state = params(), begun(make, params())
    for step in range(steps):
        _, p, state = updated(make, gradients(step), state, p, rate)
    return p, state


def orthogonal(x):
    """Five Newton-Schulz iterations on one matrix, with K. Jordan's coefficients."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def as_matrix(name, weight):
    """One layer's weight as [inputs, outputs]."""
    return (
        weight.reshape(-1, weight.shape[-1]) if name == "out" else weight.reshape(len(weight), -1)
    )


def muon_of_a_layer(name, weight, gradients, rate=1e-2):
    """Steps of Muon on one layer's weight, by the book."""
    w, m = as_matrix(name, weight.astype(np.float64)), 0.0
    for t, g in enumerate(gradients, 1):
        g = as_matrix(name, g.astype(np.float64))
        m = 0.95 * m + 0.05 * g
        ahead = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
        update = 0.2 * np.sqrt(max(w.shape)) * orthogonal(ahead)
        w = w - rate * (update + 0.1 * w)
    return w.reshape(weight.shape)


def test_muon_equals_its_definition_on_each_layer_alone_and_is_adamw_on_the_rest():
    found, adamw = flat(trained(MUON)[0]), flat(trained(ADAMW)[0])
    given = [flat(gradients(step)) for step in range(3)]
    by_muon = 0
    for path, begin in flat(params()).items():
        name = path.split("/")[-1]
        if name in MATRICES:
            for layer in range(len(begin)):
                each = [np.asarray(g[path][layer]) for g in given]
                exact = muon_of_a_layer(name, np.asarray(begin[layer]), each)
                np.testing.assert_allclose(found[path][layer], exact, atol=2e-5, err_msg=path)
            by_muon += 1
        else:
            np.testing.assert_array_equal(found[path], adamw[path], err_msg=path)
    assert by_muon == 2 * len(MATRICES)


def test_an_update_of_muon_is_as_large_as_one_of_adamw():
    """So that a peak carries over: 0.2 per element and unit of rate, as AdamW's usually is."""
    make = functools.partial(optimizer.muon, **{**SETTINGS, "weight_decay": 0.0})
    updates, _, _ = updated(make, gradients(0), begun(make, params()), params(), 1.0)
    for path, update in flat(updates).items():
        if path.split("/")[-1] in MATRICES:
            assert 0.15 < float(jnp.sqrt(jnp.mean(update**2))) < 0.23, path


@pytest.mark.parametrize("make", [ADAMW, MUON])
def test_gradients_count_as_if_they_were_given_clipped(make):
    """To a norm of all of them together; a spike would else stand in the moments."""
    rng = np.random.default_rng(0)
    sizes = {"embedding": (5, 8), "stack_0": {"mlp": {"up": (2, 8, 12)}}}

    def drawn(scale):
        draw = lambda size: jnp.asarray(scale * rng.standard_normal(size), jnp.float32)  # noqa: E731
        return jax.tree.map(draw, sizes, is_leaf=lambda x: isinstance(x, tuple))

    p, raw = drawn(1.0), [drawn(0.01), drawn(50.0), drawn(0.01)]
    assert optax.tree.norm(raw[0]) < 1 < optax.tree.norm(raw[1])
    by_hand = [jax.tree.map(lambda g, n=optax.tree.norm(x): g / max(n, 1.0), x) for x in raw]

    def after(gradients, clip):
        new, state = p, make(0.0, clip=clip).init(p)
        for gradient in gradients:
            _, new, state = updated(functools.partial(make, clip=clip), gradient, state, new, 0.1)
        return flat(new)

    clipped, spiked, exact = after(raw, 1.0), after(raw, 1e9), after(by_hand, 1e9)
    for path, weight in exact.items():
        np.testing.assert_allclose(clipped[path], weight, atol=1e-4, err_msg=path)
        assert np.abs(spiked[path] - weight).max() > 1e-2, path


def test_what_was_cut_to_zero_stays_zero_under_muon():
    """Rows and columns without weight, gradient or moment, as pruning leaves them."""
    cut = params()
    mlp = {name: cut["stack_0"]["mlp"][name] for name in ("gate", "up", "down")}
    mlp = {
        "gate": mlp["gate"].at[:, :, 7].set(0),
        "up": mlp["up"].at[:, :, 7].set(0),
        "down": mlp["down"].at[:, 7].set(0),
    }
    zero = {"gate": jnp.s_[:, :, 7], "up": jnp.s_[:, :, 7], "down": jnp.s_[:, 7]}
    cut = {**cut, "stack_0": {**cut["stack_0"], "mlp": mlp}}
    grads = gradients(0)
    for name, at in zero.items():
        grads["stack_0"]["mlp"][name] = grads["stack_0"]["mlp"][name].at[at].set(0)
    state = begun(MUON, cut)
    for _ in range(3):
        _, cut, state = updated(MUON, grads, state, cut, 1e-2)
    for name, at in zero.items():
        assert not cut["stack_0"]["mlp"][name][at].any()


@pytest.mark.parametrize("make", [ADAMW, pytest.param(MUON, marks=pytest.mark.slow)])
def test_first_moments_may_be_kept_in_bfloat16(make):
    half = functools.partial(make, mu_dtype="bfloat16")
    (wide, _), (narrow, state) = trained(make), trained(half)
    dtypes = {"mu": jnp.bfloat16, "nu": jnp.float32}
    found = [
        (part, leaf.dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        for part in dtypes
        if part in path_name(path).split("/")
    ]
    assert found and all(dtype == dtypes[part] for part, dtype in found)
    for path, weight in flat(wide).items():
        moved = np.abs(np.asarray(weight - flat(params())[path]))
        error = np.abs(np.asarray(weight - flat(narrow)[path]))
        assert error.mean() < 0.02 * moved.mean(), path
        assert error.any(), "nothing was rounded"


@pytest.mark.parametrize("b1", [0.9, 0.99, 0.995])
def test_moments_in_bfloat16_decay_as_those_in_float32(b1):
    """Also where the decay itself is no number of bfloat16."""
    rng = np.random.default_rng(0)
    gradients = [{"w": jnp.asarray(1 + rng.standard_normal(500), jnp.float32)} for _ in range(1200)]
    size = {}
    for dtype in ("float32", "bfloat16"):
        make = ADAMW(1.0, b1=b1, weight_decay=0.0, clip=1e9, mu_dtype=dtype)
        run = jax.jit(make.update)
        p = {"w": jnp.zeros(500)}
        state, sizes = make.init(p), []
        for gradient in gradients:
            updates, state = run(gradient, state, p)
            sizes.append(float(updates["w"].mean()))
        size[dtype] = np.mean(sizes[-200:])
    assert size["bfloat16"] == pytest.approx(size["float32"], rel=0.005)


@pytest.mark.parametrize("make", [ADAMW, MUON])
def test_a_norm_of_gradients_that_cuts_all_is_refused(make):
    with pytest.raises(UserError, match="clip=0 would make every gradient 0"):
        make(0.0, clip=0.0)


def test_another_dtype_of_moments_is_refused():
    with pytest.raises(UserError, match=r"optimizer.mu_dtype='float16' .* float32, bfloat16"):
        ADAMW(0.0, mu_dtype="float16")


@pytest.mark.parametrize("make", [ADAMW, MUON])
def test_moments_are_sharded_as_their_parameters(make):
    mesh = make_mesh({"data": 2, "fsdp": 4}, jax.devices())
    specs = {path_name(k): s.spec for k, s in _leaves(shardings(params(), mesh))}
    state = jax.eval_shape(make(0.0).init, params())
    moments = {path_name(k): s.spec for k, s in _leaves(shardings(state, mesh))}
    sharded = 0
    for name, spec in moments.items():
        owner = [path for path in specs if name.endswith(f"/{path}")]
        if owner:
            assert spec == specs[owner[0]], name
            sharded += any(axis for axis in spec)
    assert sharded >= 16


def _leaves(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


# --- In a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("data"))


def muon_run(plan, workdir, stop_at=None, devices=None, **changes):
    config = tiny.config(plan)
    config.optimizer.use = MUON_PATH
    config.update_from_flattened_dict(changes)
    state = run(config, workdir, stop_at, devices)
    return state, np.array([record["loss"] for record in lines(workdir).values()])


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory):
    return muon_run(plan, tmp_path_factory.mktemp("muon") / "run")


def test_muon_is_a_name_on_the_command_line_and_learns(whole):
    assert whole[1][-1] < 0.75 * whole[1][0]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"mesh.data": 2, "mesh.fsdp": 4}, {"microbatches": 4}])
def test_muon_trains_alike_however_a_step_is_computed(plan, whole, tmp_path, changes):
    devices = jax.devices() if "mesh.fsdp" in changes else None
    _, losses = muon_run(plan, tmp_path / "run", devices=devices, **changes)
    np.testing.assert_allclose(losses, whole[1], rtol=0, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "use", [MUON_PATH, pytest.param(MUON_PATH.replace("muon", "adamw"), marks=pytest.mark.slow)]
)
def test_a_resume_restores_moments_in_their_dtype(plan, tmp_path, use):
    config = tiny.config(plan)
    config.optimizer.use, config.optimizer.mu_dtype = use, "bfloat16"
    expected = run(config, tmp_path / "whole")
    run(config, tmp_path / "run", stop_at=5)
    resumed = run(config, tmp_path / "run")
    assert bits(resumed) == bits(expected)
    narrow = [leaf for leaf in jax.tree.leaves(resumed.opt_state) if leaf.dtype == jnp.bfloat16]
    assert len(narrow) == len(jax.tree.leaves(resumed.params))
