"""The network against its description: counts, causality, documents, sharing, cache, remat."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import random_leaves

from mobilellm_jax.errors import UserError
from mobilellm_jax.leaves import nested
from mobilellm_jax.model import transformer
from mobilellm_jax.model.cache import empty_cache
from mobilellm_jax.model.config import (
    ModelConfig,
    RopeScaling,
    Stack,
    flops_per_token,
    parameter_count,
)
from mobilellm_jax.model.presets import preset, shared
from mobilellm_jax.model.transformer import Execution

PLAIN = ModelConfig(97, 48, (Stack(3, 4, 2, 80),), head_dim=16, max_length=64)
SHARED = shared(PLAIN)
MIXED = ModelConfig(
    97,
    48,
    (
        Stack(2, 6, 3, 80, repeats=2, order="reverse"),
        Stack(1, 2, 1, 32, repeats=2, rope=False),
    ),
    head_dim=16,
    tied=False,
    qk_norm="scaled",
    rope_scaling=RopeScaling(4.0, 1.0, 4.0, 64),
    mlp="relu",
    qkv_bias=True,
)
NETWORKS = {  # between them every part of a network
    "mixed": MIXED,
    "unit": dataclasses.replace(SHARED, qk_norm="unit"),
    "first pass": dataclasses.replace(SHARED, ls_kv="first_pass"),
}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS.keys())
def config(request):
    return request.param


# Compiled once per network; an eager scan would be compiled at every call.
apply = jax.jit(transformer.apply, static_argnames=("config", "execution"))
apply_cached = jax.jit(transformer.apply_cached, static_argnames=("config", "execution"))


@functools.cache
def random_params(config):
    """Larger than the initialisation, and norm scales that are not one, so that every part matters."""
    return nested(random_leaves(config))


def tokens(config, rows=3, length=12):
    return np.random.default_rng(0).integers(3, config.vocab_size, (rows, length))


def test_parameter_count_of_every_kind_of_network(config):
    params = random_params(config)
    assert parameter_count(config) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_flops_of_the_125m_network_by_hand():
    # 30 x (2 x 576 x 64 x (9 + 3) + 3 x 576 x 1536) + 32000 x 576, and 30 x 9 x 64 x 2048 for
    # attention.
    assert flops_per_token(preset("mobilellm-125m"), 2048) == 6 * (124_600_320 + 35_389_440)


def test_flops_count_every_application_of_a_shared_block():
    head = 6 * PLAIN.vocab_size * PLAIN.width
    once, twice = flops_per_token(PLAIN, 64) - head, flops_per_token(SHARED, 64) - head
    assert twice == 2 * once


def test_no_hidden_state_depends_on_the_future(config):
    params, tokens_BT = random_params(config), tokens(config)
    embedded = params["embedding"][tokens_BT[0]]  # one row of distinct positions
    change_TD = np.random.default_rng(0).standard_normal(embedded.shape, np.float32)

    def hidden(embedding_TD):
        # Give every position a vocabulary entry of its own, so that derivatives tell positions apart.
        table = jnp.concatenate([embedding_TD, params["embedding"][embedding_TD.shape[0] :]])
        ids = jnp.arange(embedding_TD.shape[0])[None]
        return apply({**params, "embedding": table}, config, ids)[0]

    @jax.jit
    @jax.vmap
    def derivative(change_TD):
        return jax.jvp(hidden, (embedded,), (change_TD,))[1]

    by_position_STD = np.asarray(derivative(np.eye(12, dtype=np.float32)[:, :, None] * change_TD))
    reads = np.abs(by_position_STD).sum(2).T > 0
    assert (reads == np.tril(np.ones_like(reads))).all()


def test_nothing_crosses_the_border_of_a_document(config):
    params, row = random_params(config), tokens(config, 1)[0]
    segments = np.array([[0] * 5 + [1] * 4 + [2] * 3])
    together = apply(params, config, row[None], segments)[0]
    borders = ((0, 5), (5, 9), (9, 12))
    begun = np.stack([np.roll(row, -first) for first, _ in borders])  # what follows is not read
    for alone, (first, last) in zip(apply(params, config, begun), borders, strict=True):
        np.testing.assert_allclose(
            together[first:last], alone[: last - first], atol=2e-5, rtol=2e-5
        )


def test_positions_count_from_zero_in_every_document():
    """The same logits as with positions that run on over the row, which only precision can tell apart."""
    config = MIXED
    params, row = random_params(config), tokens(config, 1)
    segments = jnp.array([[0] * 5 + [1] * 4 + [2] * 3])
    context = transformer._context(row, segments)
    assert context.positions_BT.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]
    running = dataclasses.replace(context, positions_BT=jnp.arange(12)[None])
    model = transformer.Transformer(config, Execution())

    @jax.jit
    def logits(params, context):
        hidden_BTD, _ = model.apply({"params": params}, row, context, None)
        return transformer.logits(params, config, hidden_BTD)

    ours, theirs = logits(params, context), logits(params, running)
    np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())
    # Far into a long row, as if 2**20 tokens stood before, a document is still what it is alone.
    far = logits(params, dataclasses.replace(running, positions_BT=running.positions_BT + 2**20))
    assert np.abs(far - ours).max() > 10 * np.abs(theirs - ours).max()


ORDERS = {  # by hand, for blocks 0 and 1
    ("immediate", 2): (0, 0, 1, 1),
    ("immediate", 3): (0, 0, 0, 1, 1, 1),
    ("immediate", 4): (0, 0, 0, 0, 1, 1, 1, 1),
    ("repeat_all", 2): (0, 1, 0, 1),
    ("repeat_all", 3): (0, 1, 0, 1, 0, 1),
    ("repeat_all", 4): (0, 1, 0, 1, 0, 1, 0, 1),
    ("reverse", 2): (0, 1, 1, 0),
    ("reverse", 3): (0, 1, 1, 0, 0, 1),
    ("reverse", 4): (0, 1, 1, 0, 0, 1, 1, 0),
}


@pytest.mark.parametrize(
    ("order", "repeats"),
    [
        pytest.param(
            *case, marks=[] if case in (("immediate", 3), ("reverse", 3)) else pytest.mark.slow
        )
        for case in ORDERS
    ],
)
def test_sharing_equals_the_unrolled_network(order, repeats):
    """Logits within 1e-5; a shared gradient is the sum over the block's copies."""
    applications = ORDERS[order, repeats]
    stack = Stack(2, 4, 2, 48, repeats, order)
    assert stack.applications == applications
    network = dataclasses.replace(PLAIN, stacks=(stack,))
    deep = dataclasses.replace(PLAIN, stacks=(Stack(len(applications), 4, 2, 48),))
    params, row = random_params(network), tokens(network, 1, 8)
    copies = jax.tree.map(lambda x: x[np.array(applications)], params["stack_0"])
    unrolled = {**params, "stack_0": copies}

    logits_BTV, shared_gradient = logits_and_gradient(params, network, row)
    unrolled_BTV, copied_gradient = logits_and_gradient(unrolled, deep, row)
    assert np.abs(logits_BTV - unrolled_BTV).max() <= 1e-5 * np.abs(unrolled_BTV).max()
    summed = jax.tree.map(
        lambda x: np.stack([x[np.array(applications) == block].sum(0) for block in range(2)]),
        copied_gradient["stack_0"],
    )
    pairs = zip(
        jax.tree.leaves(shared_gradient),
        jax.tree.leaves({**copied_gradient, "stack_0": summed}),
        strict=True,
    )
    for shared_, sum_ in pairs:
        assert np.linalg.norm(shared_ - sum_) <= 1e-4 * np.linalg.norm(sum_)


def logits_and_gradient(params, config, row):
    """NumPy arrays: logits, and the gradient of some loss."""
    return jax.device_get(_logits_and_gradient(params, config, row))


@functools.partial(jax.jit, static_argnums=1)
def _logits_and_gradient(params, config, row):
    def loss(params):
        out_BTD = transformer.apply(params, config, row)
        return jnp.sin(out_BTD).mean(), transformer.logits(params, config, out_BTD)

    (_, logits_BTV), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return logits_BTV, gradient


def test_first_pass_keys_serve_every_pass():
    """By hand: the first pass of each block, then queries of the second against the first's keys."""
    network = dataclasses.replace(SHARED, ls_kv="first_pass")
    params, row = random_params(network), tokens(network)
    context = transformer._context(row)
    block = transformer.Block(network, network.stacks[0])

    @jax.jit
    def by_hand(params):
        x_BTD = params["embedding"][row]
        for layer in range(network.stacks[0].layers):
            weights = {"params": jax.tree.map(lambda x, i=layer: x[i], params["stack_0"])}
            kept = empty_cache(network, *row.shape)["stack_0"]
            for own_keys in (True, False):
                where = dataclasses.replace(context, own_keys=own_keys)
                x_BTD, kept = block.apply(weights, x_BTD, where, kept)
        return transformer.RMSNorm(network.norm_eps).apply({"params": params["final_norm"]}, x_BTD)

    out_BTD = apply(params, network, row)
    np.testing.assert_allclose(out_BTD, by_hand(params), atol=1e-5)
    assert jnp.abs(out_BTD - apply(params, SHARED, row)).max() > 0.1


def test_scan_equals_a_python_loop_over_layers():
    """Applies a stack of one layer three times by hand, with that layer's slice of the weights."""
    params, row = random_params(PLAIN), tokens(PLAIN)
    single = dataclasses.replace(
        PLAIN, stacks=(dataclasses.replace(PLAIN.stacks[0], layers=1),) * 3
    )
    by_hand = {k: v for k, v in params.items() if k != "stack_0"}
    for layer in range(3):
        by_hand[f"stack_{layer}"] = jax.tree.map(lambda x, i=layer: x[i : i + 1], params["stack_0"])
    scanned = apply(params, PLAIN, row)
    np.testing.assert_allclose(scanned, apply(by_hand, single, row), atol=1e-5)


ONCE = {"mixed": Execution(remat="full"), "unit": Execution(unroll=2)}
ONCE["first pass"] = ONCE["mixed"]


@pytest.mark.parametrize(
    ("name", "execution"),
    [
        pytest.param(name, execution, marks=[] if execution == ONCE[name] else pytest.mark.slow)
        for name in NETWORKS
        for execution in (Execution(remat="full"), Execution(remat="dots"), Execution(unroll=2))
    ],
    ids=str,
)
def test_execution_changes_no_gradient(name, execution):
    config = NETWORKS[name]
    pairs = zip(
        jax.tree.leaves(gradient(config, execution)),
        jax.tree.leaves(gradient(config, Execution())),
        strict=True,
    )
    for a, b in pairs:
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


@functools.cache
def gradient(config, execution):
    def loss(params):
        hidden = transformer.apply(params, config, tokens(config), execution=execution)
        return jnp.sin(hidden).sum()

    return jax.jit(jax.grad(loss))(random_params(config))


@functools.cache
def lowered_gradient(execution):
    def loss(p):
        return transformer.apply(p, SHARED, tokens(SHARED), execution=execution).sum()

    return jax.jit(jax.grad(loss)).lower(transformer.shapes(SHARED)).as_text()


def test_remat_computes_again():
    """A policy that is silently ignored would leave the lowered program as it is."""

    def count(remat):
        return lowered_gradient(Execution(remat=remat)).count("dot_general")

    assert count("full") > count("dots") >= count("none")


def test_what_remat_computes_again_stays_apart_where_no_loop_separates_it():
    """XLA would else find both alike, keep the first, and free nothing (tests/costs/test_gpu.py)."""
    (stack,) = SHARED.stacks
    barriers = {
        (remat, unroll): lowered_gradient(Execution(remat=remat, unroll=unroll)).count(
            "optimization_barrier"
        )
        for remat, unroll in (("full", 1), ("full", stack.layers), ("none", stack.layers))
    }
    assert barriers.pop(("full", stack.layers))
    assert not any(barriers.values())


def test_layers_at_once_are_as_asked_or_as_suits_the_devices():
    deep = dataclasses.replace(PLAIN, stacks=(Stack(2, 2, 1, 96), Stack(5, 2, 1, 96)))
    for platform, remat, chosen in (
        ("gpu", "none", 5),
        ("gpu", "dots", 5),
        ("gpu", "full", 1),
        ("tpu", "none", 1),
        ("cpu", "dots", 1),
    ):
        assert transformer.layers_at_once(0, remat, platform, deep) == chosen
        assert transformer.layers_at_once(3, remat, platform, deep) == 3


def test_bfloat16_is_close_to_float32(config):
    params, row = random_params(config), tokens(config)
    exact = np.asarray(apply(params, config, row))
    rough = apply(params, config, row, execution=Execution("bfloat16"))
    assert rough.dtype == jnp.bfloat16
    error = np.abs(np.asarray(rough, np.float32) - exact).max()
    assert error < 0.06 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("name", "count", "attention"),
    [("mixed", 1, "blocks"), ("unit", 2, "reference"), ("first pass", 1, "blocks")],
)
def test_cached_equals_uncached_with_rows_of_different_lengths(name, count, attention):
    config, execution = NETWORKS[name], Execution(attention=attention)
    params, row = random_params(config), tokens(config)
    whole = np.asarray(apply(params, config, row))
    cache = empty_cache(config, 3, 16)
    lengths = np.array([2, 5, 7])
    close = functools.partial(np.testing.assert_allclose, atol=2e-5, rtol=2e-5)
    padded = np.full((3, 7), 3)
    for b, length in enumerate(lengths):
        padded[b, 7 - length :] = row[b, :length]
    hidden, cache = apply_cached(params, config, padded, cache, 7 - lengths, execution=execution)
    for hidden_TD, whole_TD, length in zip(np.asarray(hidden), whole, lengths, strict=True):
        close(hidden_TD[7 - length :], whole_TD[:length])
    for step in range(0, 4, count):  # one token at a time, or two
        at = lengths[:, None] + step + np.arange(count)
        new = row[np.arange(3)[:, None], at]
        hidden, cache = apply_cached(params, config, new, cache, 7 - lengths, jnp.int32(7 + step))
        close(hidden, whole[np.arange(3)[:, None], at])
    heads = sum(len(leaf) for leaf in jax.tree.leaves(cache)) // 2 // 3
    kept = [s.layers * (1 if config.ls_kv == "first_pass" else s.repeats) for s in config.stacks]
    assert heads == sum(n * s.kv_heads for n, s in zip(kept, config.stacks, strict=True))


def test_unstacked_is_the_same_network(config):
    """In rows and with a cache; no weight is there twice, however often its block is applied."""
    params, row = random_params(config), tokens(config)
    single, flat = transformer.unstacked(params, config)
    assert {stack.layers for stack in flat.stacks} == {1} and flat.depth == config.depth
    expected = apply(params, config, row)
    np.testing.assert_allclose(apply(single, flat, row), expected, atol=1e-5, rtol=1e-5)
    cache = empty_cache(flat, *row.shape)
    out, cache = apply_cached(single, flat, row, cache, np.zeros(3, np.int32))
    np.testing.assert_allclose(out, expected, atol=1e-5, rtol=1e-5)
    caches = [
        sum(leaf.size for leaf in jax.tree.leaves(one))
        for one in (cache, empty_cache(config, *row.shape))
    ]
    assert caches[0] == caches[1]
    buffers = {id(leaf): leaf.size for leaf in jax.tree.leaves(single)}
    assert sum(buffers.values()) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_cache_slots_lie_in_order_of_execution():
    """The slots of the unrolled network, one after another, are those of the shared one."""
    for order in ("immediate", "repeat_all", "reverse"):
        stack = Stack(2, 4, 2, 48, 3, order)
        network = dataclasses.replace(PLAIN, stacks=(stack,))
        deep = dataclasses.replace(PLAIN, stacks=(Stack(6, 4, 2, 48),))
        params, row = random_params(network), tokens(network, 1, 8)
        copies = jax.tree.map(lambda x, s=stack: x[np.array(s.applications)], params["stack_0"])
        both = {network: params, deep: {**params, "stack_0": copies}}
        one, other = (
            apply_cached(p, c, row, empty_cache(c, 1, 8), np.zeros(1, int))[1]
            for c, p in both.items()
        )
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_first_pass_keys_are_not_reused():
    """Second passes have keys of their own; reusing the first pass's is a known defect."""
    params, row = random_params(SHARED), tokens(SHARED, 1, 8)
    cache = empty_cache(SHARED, 1, 8)
    _, cache = apply_cached(params, SHARED, row, cache, np.zeros(1, int))
    keys = np.asarray(cache["stack_0"]["key"]).reshape(SHARED.depth, -1)
    assert np.abs(keys[0::2] - keys[1::2]).max() > 0.1


def test_configurations_survive_json(config):
    assert ModelConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    "change",
    [
        {"stacks": ()},
        {"stacks": (Stack(2, 4, 3, 8),)},
        {"head_dim": 15},
        {"qk_norm": "l2"},
        {"mlp": "gelu"},
        {"ls_kv": "second_pass"},
        {"stacks": (Stack(2, 4, 2, 8, order="backwards"),)},
        {"stacks": (Stack(2, 4, 2, 8, 2, "reverse"),), "ls_kv": "first_pass"},
        {"vocab_size": 0},
        {"stacks": (Stack(0, 4, 2, 8),)},
        {"stacks": (Stack(2, 4, 2, 8.0),)},
        {"width": PLAIN.width / 2},
        {"vocab_size": "97"},
        {"rope_theta": 0.0},
        {"rope_theta": float("nan")},
        {"norm_eps": -1e-5},
        {"init_std": -0.02},
    ],
    ids=str,
)
def test_what_is_no_network_is_refused(change):
    with pytest.raises(UserError):
        dataclasses.replace(PLAIN, **change)


def test_what_stretches_no_rotation_is_refused():
    RopeScaling(8.0, 1.0, 4.0, 32)
    for wrong in ((0.5, 1, 4, 32), (8, 4, 1, 32), (float("inf"), 1, 4, 32), (8, 1, 4, 0)):
        with pytest.raises(UserError, match="rope_scaling"):
            RopeScaling(*wrong)


@pytest.mark.parametrize("unroll", [0, -1, 1.5])
def test_how_many_layers_an_iteration_has_is_a_whole_number(unroll):
    with pytest.raises(UserError, match="execution.unroll"):
        Execution(unroll=unroll)


def test_unknown_keys_are_refused():
    with pytest.raises(UserError, match="widht"):
        ModelConfig.from_dict({**PLAIN.to_dict(), "widht": 3})
    with pytest.raises(UserError, match="mobilellm-125m"):
        preset("mobilellm-125")
