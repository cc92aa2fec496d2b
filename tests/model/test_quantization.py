"""Networks of 8-bit numbers: equal to sums of integers, differentiable straight through, part by part."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from weights import random_leaves

pytest.importorskip("qwix", reason="qwix is not installed")

from mobilellm_jax.errors import UserError
from mobilellm_jax.leaves import nested
from mobilellm_jax.model import transformer
from mobilellm_jax.model.cache import empty_cache
from mobilellm_jax.model.config import ModelConfig, Stack
from mobilellm_jax.model.quantization import (
    PARTS,
    factor_of,
    integers,
    parts_of,
    table_of,
    weight_of,
)

PLAIN = ModelConfig(64, 32, (Stack(2, 4, 2, 48),), head_dim=8, max_length=32, init_std=0.3)
LS = dataclasses.replace(PLAIN, stacks=(Stack(2, 4, 2, 48, repeats=2),))
UNTIED = dataclasses.replace(PLAIN, tied=False, mlp="relu")


rounded_weight = functools.partial(weight_of, "w8a8", "blocks")
rounded_tokens = functools.partial(factor_of, "w8a8", "blocks")
rounded_table = functools.partial(table_of, "w8a8")


def eight_bit(model, quantization="w8a8"):
    return dataclasses.replace(model, quantization=quantization)


def random_params(model):
    """With norm scales apart from 1: else rows of the embedding, which are integers, would lie just
    between two other ones."""
    return nested(random_leaves(model, std=0.3))


def tokens_of(model, rows=2, length=12):
    return np.random.default_rng(1).integers(0, model.vocab_size, (rows, length))


@functools.partial(jax.jit, static_argnums=1)
def hidden_and_logits(params, model, tokens_BT):
    hidden_BTD = transformer.apply(params, model, tokens_BT)
    return hidden_BTD, transformer.logits(params, model, hidden_BTD)


def logits(params, model, tokens_BT):
    return np.asarray(hidden_and_logits(params, model, tokens_BT)[1])


# --- The definition, in float64 ---------------------------------------------------------------------


def symmetric(x, axes):
    """-absmax to absmax over what `axes` run over, as -127 to 127."""
    scale = np.abs(x).max(axes, keepdims=True) / 127
    return np.rint(x / scale), scale


def asymmetric(x, axes):
    """From min to max, 0 among them, as -128 to 127."""
    low, high = np.minimum(x.min(axes, keepdims=True), 0), np.maximum(x.max(axes, keepdims=True), 0)
    scale = (high - low) / 255
    zero = np.clip(np.rint(-128 - low / scale), -128, 127)
    return np.clip(np.rint(x / scale + zero), -128, 127), scale, zero


@pytest.mark.parametrize("inputs", [1, 2])
def test_a_product_of_what_is_rounded_is_one_of_integers(inputs):
    """What an integer runtime does: integers are multiplied and added up, and the sums scaled."""
    rng = np.random.default_rng(0)
    x_BTNH, w_NHD = rng.normal(size=(2, 5, 4, 8)) ** 3, rng.normal(size=(4, 8, 6)) ** 3
    if inputs == 1:
        x_BTNH, w_NHD = x_BTNH.reshape(2, 5, 32), w_NHD.reshape(32, 6)
    x, w = (jnp.asarray(array, jnp.float32) for array in (x_BTNH, w_NHD))
    got = jnp.tensordot(rounded_tokens(x), rounded_weight(w, inputs), inputs)
    q_w, scale_w = symmetric(np.float64(w), tuple(range(inputs)))
    q_x, scale_x, zero_x = asymmetric(np.float64(x), tuple(range(2, 2 + inputs)))
    sums = np.tensordot(np.int64(q_x - zero_x), np.int64(q_w), inputs)
    wanted = sums * scale_x.reshape(2, 5, 1) * scale_w.reshape(6)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    exact = np.tensordot(np.float64(x), np.float64(w), inputs)
    assert 0 < np.abs(wanted - exact).max() < 0.02 * np.abs(exact).max()


def test_a_token_of_the_vocabulary_has_a_scale_as_input_and_as_output():
    table_VD = jax.random.normal(jax.random.key(0), (10, 16)) * jnp.arange(1.0, 11)[:, None]
    np.testing.assert_array_equal(rounded_table(table_VD), rounded_weight(table_VD.T, 1).T)
    quanta_V = np.abs(np.asarray(table_VD)).max(1) / 127
    off_VD = np.abs(np.asarray(rounded_table(table_VD) - table_VD))
    assert (off_VD <= 0.5 * quanta_V[:, None] * (1 + 1e-5)).all()


def test_what_is_rounded_is_rounded_to_itself():
    """So integers that were taken for floats are the same integers again."""
    w = jax.random.normal(jax.random.key(0), (64, 48)) ** 3
    once = rounded_weight(w, 1)
    np.testing.assert_allclose(rounded_weight(once, 1), once, rtol=1e-6)
    np.testing.assert_array_equal(integers(once, (1,)).qvalue, integers(w, (1,)).qvalue)


def test_zeros_stay_zeros():
    """Channels that are dead, and padding: whatever the ranges are."""
    x = jnp.asarray([[[0.0, 3.0, -1.0], [0.0, 0.0, 0.0]]])
    assert (np.asarray(rounded_tokens(x))[np.asarray(x) == 0] == 0).all()
    assert np.isfinite(np.asarray(rounded_weight(jnp.zeros((3, 2)), 1))).all()


def test_gradients_pass_straight_through():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    by = jax.random.normal(jax.random.key(1), (2, 3, 4))
    for rounded in (rounded_tokens, lambda x: rounded_weight(x, 1)):
        got = jax.grad(lambda x, r=rounded: (r(x) * by).sum())(x)
        np.testing.assert_array_equal(got, by)
        _, along = jax.jvp(rounded, (x,), (by,))
        np.testing.assert_array_equal(along, by)


# --- Networks -------------------------------------------------------------------------------------------


def plain_w8a8(params, model, tokens_BT):
    """The network by hand in float64, one application of a block after another, every factor rounded."""

    def weight(w, inputs=1):
        q, scale = symmetric(np.float64(w), tuple(range(inputs)))
        return q * scale

    def factor(x):
        q, scale, zero = asymmetric(x, tuple(range(2, x.ndim)))
        return (q - zero) * scale

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + model.norm_eps) * np.float64(scale)

    def turned(x_BTNH):
        half = model.head_dim // 2
        angles_TH = np.arange(x_BTNH.shape[1])[:, None] * model.rope_theta ** (
            -np.arange(half) / half
        )
        cos, sin = np.cos(angles_TH)[:, None], np.sin(angles_TH)[:, None]
        a, b = x_BTNH[..., :half], x_BTNH[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    q_VD, scale_V = symmetric(np.float64(params["embedding"]), (1,))
    x = (q_VD * scale_V)[tokens_BT]
    stack = model.stacks[0]
    for layer in stack.applications:
        p = jax.tree.map(lambda leaf, at=layer: np.float64(leaf[at]), params["stack_0"])
        a, m = p["attention"], p["mlp"]
        y = factor(norm(x, p["attention_norm"]["scale"]))
        q, k, v = (np.einsum("BTD,DNH->BTNH", y, weight(a[n])) for n in ("query", "key", "value"))
        k, v = (np.repeat(z, stack.heads // stack.kv_heads, 2) for z in (turned(k), v))
        scores = np.einsum("BTNH,BSNH->BNTS", turned(q), k) / np.sqrt(model.head_dim)
        scores[..., ~np.tri(scores.shape[-1], dtype=bool)] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        y = np.einsum("BNTS,BSNH->BTNH", shares, v)
        x = x + np.tensordot(factor(y), weight(a["out"], 2), 2)
        y = factor(norm(x, p["mlp_norm"]["scale"]))
        gate, up = y @ weight(m["gate"]), y @ weight(m["up"])
        x = x + factor(gate / (1 + np.exp(-gate)) * up) @ weight(m["down"])
    x = factor(norm(x, params["final_norm"]["scale"]))
    return x @ (q_VD * scale_V).T


@pytest.mark.parametrize("model", [PLAIN, LS], ids=["plain", "shared"])
def test_a_network_equals_the_one_by_hand(model):
    """But for factors that lie between two integers: float32 takes some to the other one.

    A token reads no more than one other here, so that most are equal, and none is far off.
    """
    params, tokens_BT = random_params(model), tokens_of(model, 64, 2)
    wanted = plain_w8a8(params, model, tokens_BT)
    off = np.abs(logits(params, eight_bit(model), tokens_BT) - wanted)
    exact = np.abs(logits(params, model, tokens_BT) - wanted)
    assert np.median(off) < 1e-5 * np.abs(wanted).max()
    assert off.mean() < 0.1 * exact.mean()


@pytest.mark.parametrize(
    "model", [LS, pytest.param(UNTIED, marks=pytest.mark.slow)], ids=["shared", "untied"]
)
def test_each_part_alone_changes_what_is_its_own(model):
    params, tokens_BT = random_params(model), tokens_of(model)
    hidden = {
        q: np.asarray(hidden_and_logits(params, eight_bit(model, q), tokens_BT)[0])
        for q in ("none", *(f"w8a8:{part}" for part in PARTS))
    }
    exact = logits(params, model, tokens_BT)
    np.testing.assert_array_equal(logits(params, eight_bit(model, "none"), tokens_BT), exact)
    for part in PARTS:
        assert (hidden[f"w8a8:{part}"] != hidden["none"]).any()
        off = np.abs(logits(params, eight_bit(model, f"w8a8:{part}"), tokens_BT) - exact).max()
        assert 0 < off < 0.2 * np.abs(exact).max()
    whole = eight_bit(model, "w8a8:" + "+".join(PARTS))
    np.testing.assert_array_equal(
        logits(params, whole, tokens_BT), logits(params, eight_bit(model), tokens_BT)
    )


def test_with_a_cache_as_without():
    """A token's range is its own: what it is read with changes nothing."""
    model = eight_bit(LS)
    params, tokens_BT = random_params(model), tokens_of(model)
    whole = np.asarray(hidden_and_logits(params, model, tokens_BT)[0])
    apply_cached = jax.jit(transformer.apply_cached, static_argnums=1)
    cache = empty_cache(model, 2, 12)
    begin_B = jnp.zeros(2, jnp.int32)
    first, cache = apply_cached(params, model, tokens_BT[:, :7], cache, begin_B)
    parts = [first]
    for t in range(7, 12):
        step, cache = apply_cached(
            params, model, tokens_BT[:, t : t + 1], cache, begin_B, jnp.int32(t)
        )
        parts.append(step)
    off = np.abs(np.concatenate(parts, 1) - whole)
    assert np.median(off) < 1e-5 and off.max() < 0.1 * np.abs(whole).max()


def test_training_sees_the_rounding():
    """A few steps of descent on the loss of the rounded network lower that loss."""
    model = eight_bit(PLAIN)
    params, tokens_BT = random_params(model), tokens_of(model, 4, 16)

    @jax.jit
    def loss(params):
        hidden_BTD = transformer.apply(params, model, tokens_BT[:, :-1])
        log_q = jax.nn.log_softmax(transformer.logits(params, model, hidden_BTD))
        return -jnp.take_along_axis(log_q, tokens_BT[:, 1:, None], -1).mean()

    before, step = float(loss(params)), jax.jit(jax.value_and_grad(loss))
    for _ in range(20):
        _, gradient = step(params)
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)
    assert float(loss(params)) < 0.8 * before


# --- What is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "int8", "w8a8:", "w8a8:blocks+heads", "w4a16:blocks"])
def test_what_is_no_quantization(name):
    with pytest.raises(UserError, match=r"quantization=.* is not none, w8a8, or w8a8: with"):
        dataclasses.replace(PLAIN, quantization=name)


def test_what_is():
    assert parts_of("none") == frozenset() and parts_of("w8a8") == set(PARTS)
    assert parts_of("w8a8:head+blocks") == {"head", "blocks"}


def test_without_qwix_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "qwix", None)
    with pytest.raises(UserError, match=r"mobilellm-jax\[quantization\]"):
        integers(jnp.ones((2, 2)), (1,))
