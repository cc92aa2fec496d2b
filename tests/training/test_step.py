"""One step: the objective's targets, microbatches, non-finite steps, schedules, the optimizer's mask."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from mobilellm_jax.model import transformer
from mobilellm_jax.model.transformer import Execution
from mobilellm_jax.training import objectives, optimizer
from mobilellm_jax.training.objectives import Losses, Network, split_rows
from mobilellm_jax.training.step import all_finite, init_state, train_step

BOS, EOS = 1, 2
NETWORK = Network(tiny.MODEL, Execution(), BOS, EOS)
ADAMW = functools.partial(optimizer.adamw, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0)


def batch(rows=8, seed=0):
    """Rows with unequal numbers of documents and of padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, tiny.VOCAB, (rows, tiny.ROW + 1)).astype(np.int32)
    tokens[rng.random(tokens.shape) < 0.08] = BOS
    for row in range(rows):
        tokens[row, tiny.ROW - 3 * row :] = BOS
    return {
        "tokens": jnp.asarray(tokens),
        "source": jnp.asarray(rng.integers(0, 2, rows), jnp.int32),
    }


@functools.cache
def step(objective=objectives.next_token, microbatches=1, make_optimizer=ADAMW):
    return jax.jit(
        functools.partial(
            train_step,
            network=NETWORK,
            objective=objective,
            make_optimizer=make_optimizer,
            schedule=lambda step: 1e-2 * (step + 1),
            sources=2,
            microbatches=microbatches,
        )
    )


@functools.cache
def start():
    return init_state(
        jax.jit(transformer.init, static_argnums=0)(tiny.MODEL, jax.random.key(0)), ADAMW
    )


PIECE_BYTES = jnp.arange(tiny.VOCAB) % 5


def test_parts_of_a_step_are_named_in_the_program():
    """As a trace shows them: see docs/profiling.md."""
    program = step().lower(start(), batch(), PIECE_BYTES).compile().as_text()
    names = {part for name in re.findall(r'op_name="([^"]*)"', program) for part in name.split("/")}
    named = {"stack_0", "attention", "attention_norm", "mlp", "mlp_norm", "optimizer"}
    assert named <= names
    for part in ("loss", "final_norm"):
        assert any(part in name for name in names)


def test_rows_become_inputs_targets_documents():
    rows = split_rows(jnp.array([[7, 8, BOS, 5, 6, BOS, BOS, BOS]]), BOS, EOS)
    assert rows.inputs_BT.tolist() == [[7, 8, BOS, 5, 6, BOS, BOS]]
    assert rows.targets_BT.tolist() == [[8, BOS, 5, 6, BOS, BOS, BOS]]
    assert rows.segment_ids_BT.tolist() == [[0, 0, 1, 1, 1, 2, 3]]
    assert rows.weight_BT.tolist() == [[1, 0, 1, 1, 0, 0, 0]]


def test_where_bos_is_eos_the_end_of_a_document_counts():
    rows = split_rows(jnp.array([[7, 8, BOS, BOS, 5, 6, BOS, BOS, BOS, BOS]]), BOS, BOS)
    assert rows.segment_ids_BT.tolist() == [[0, 0, 1, 2, 2, 2, 3, 4, 5]]
    assert rows.weight_BT.tolist() == [[1, 1, 0, 1, 1, 1, 0, 0, 0]]


def test_loss_and_counts_equal_a_loop_over_targets():
    data = batch()
    _, metrics = step()(start(), data, PIECE_BYTES)
    tokens, source = np.asarray(data["tokens"]), np.asarray(data["source"])
    nll, counted, size = np.zeros(2), np.zeros(2), np.zeros(2)
    forward = jax.jit(transformer.apply, static_argnums=1)
    for b in range(tokens.shape[0]):
        begins = [0, *[t for t in range(1, tiny.ROW + 1) if tokens[b, t] == BOS], tiny.ROW + 1]
        for first, last in zip(begins, begins[1:], strict=False):
            document = tokens[b, first:last]  # alone, and without the next document's BOS
            padded = np.full((1, tiny.ROW + 1), 4)
            padded[0, : len(document)] = document
            hidden = forward(start().params, tiny.MODEL, padded)
            logits = np.asarray(transformer.logits(start().params, tiny.MODEL, hidden), np.float64)
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            for t, target in enumerate(document[1:]):
                nll[source[b]] -= logp[0, t, target]
                counted[source[b]] += 1
                size[source[b]] += int(target) % 5
    np.testing.assert_allclose(metrics["nll"], nll, rtol=1e-5)
    assert metrics["tokens"].tolist() == counted.tolist()
    assert metrics["bytes"].tolist() == size.tolist()
    assert metrics["rows"].tolist() == np.bincount(source, minlength=2).tolist()
    np.testing.assert_allclose(metrics["loss"], nll.sum() / counted.sum(), rtol=1e-5)


@pytest.mark.parametrize("k", [2, 4])
def test_microbatches_equal_one_batch(k):
    data = batch()
    valid = np.asarray(split_rows(data["tokens"], BOS, EOS).weight_BT).sum(1)
    assert len({valid[i::k].sum() for i in range(k)}) > 1  # unequal numbers of targets
    whole, metrics = step()(start(), data, PIECE_BYTES)
    parts, metrics_k = step(microbatches=k)(start(), data, PIECE_BYTES)
    for name in metrics:
        np.testing.assert_allclose(
            metrics_k[name], metrics[name], rtol=1e-5, atol=1e-5, err_msg=name
        )
    for a, b in zip(jax.tree.leaves(parts.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def spoilt(params, batch, network):
    """Infinite where the first token is 9."""
    losses = objectives.next_token(params, batch, network)
    bad = jnp.where(batch["tokens"][:, :1] == 9, jnp.inf, 0.0)
    return Losses(losses.total + bad.sum(), losses.nll_BT, losses.weight_BT)


def test_a_non_finite_step_changes_nothing_but_the_counts():
    good = {**batch(), "tokens": batch()["tokens"].at[:, 0].set(8)}
    bad = {**good, "tokens": good["tokens"].at[0, 0].set(9)}
    run = step(spoilt)
    one, _ = run(start(), good, PIECE_BYTES)
    two, metrics = run(one, bad, PIECE_BYTES)
    assert not np.isfinite(metrics["loss"])
    for a, b in zip(
        jax.tree.leaves((two.params, two.opt_state)),
        jax.tree.leaves((one.params, one.opt_state)),
        strict=True,
    ):
        assert (a == b).all()
    three, _ = run(two, bad, PIECE_BYTES)
    assert (three.step, three.skipped, three.skipped_in_row) == (3, 2, 2)
    four, metrics = run(three, good, PIECE_BYTES)
    assert (four.step, four.skipped, four.skipped_in_row) == (4, 2, 0)
    assert float(metrics["learning_rate"]) == pytest.approx(
        4e-2
    )  # its place in the schedule was kept


def steep(params, batch, network):
    """A finite loss, and a finite gradient whose norm is beyond float32."""
    losses = objectives.next_token(params, batch, network)
    return Losses(1e30 * losses.total, losses.nll_BT, losses.weight_BT)


def test_a_step_of_finite_loss_is_skipped_for_its_norm():
    begun = start()
    state, metrics = step(steep)(begun, batch(), PIECE_BYTES)
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["gradient_norm"])
    assert (state.step, state.skipped) == (1, 1)
    jax.tree.map(
        np.testing.assert_array_equal,
        (state.params, state.opt_state),
        (begun.params, begun.opt_state),
    )


@pytest.mark.parametrize("where", ["params", "opt_state"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_number_makes_a_state_that_is_not_finite(where, value):
    state = start()
    assert all_finite(state)
    leaves, structure = jax.tree.flatten(getattr(state, where))
    leaves[-1] = leaves[-1].at[(-1,) * leaves[-1].ndim].set(value)
    assert not all_finite(dataclasses.replace(state, **{where: structure.unflatten(leaves)}))


def test_a_batch_of_padding_alone_has_no_loss_and_no_gradient():
    empty = {"tokens": jnp.full((8, tiny.ROW + 1), BOS), "source": jnp.zeros(8, jnp.int32)}
    state, metrics = step()(start(), empty, PIECE_BYTES)
    assert metrics["loss"] == 0 and metrics["gradient_norm"] == 0 and state.skipped == 0


def test_z_loss_is_minimised_but_not_reported():

    @functools.partial(jax.jit, static_argnames="z_loss")
    def losses(params, batch, **settings):
        found = objectives.next_token(params, batch, NETWORK, **settings)
        return found.total, found.nll_BT, found.weight_BT

    plain, nll_BT, weight_BT = losses(start().params, batch())
    with_z, nll_with_z_BT, _ = losses(start().params, batch(), z_loss=0.1)
    np.testing.assert_array_equal(nll_BT, nll_with_z_BT)

    @jax.jit
    def logits(params, tokens):
        segment_ids_BT = split_rows(tokens, BOS, EOS).segment_ids_BT
        hidden = transformer.apply(params, tiny.MODEL, tokens[:, :-1], segment_ids_BT)
        return transformer.logits(params, tiny.MODEL, hidden)

    log_z = jax.nn.logsumexp(logits(start().params, batch()["tokens"]), -1)
    added = (0.1 * log_z**2 * weight_BT).sum()
    np.testing.assert_allclose(with_z - plain, added, rtol=1e-4)
    np.testing.assert_allclose(plain, (nll_BT * weight_BT).sum(), rtol=1e-6)


def test_decay_acts_on_matrices_and_embedding_only():
    biased = dataclasses.replace(tiny.MODEL, qkv_bias=True, out_bias=True)
    mask = optimizer.decayed(transformer.shapes(biased))
    flat = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(mask)}
    assert {k for k, v in flat.items() if not v} == {k for k in flat if "norm" in k or "_bias" in k}
    zero = jax.tree.map(jnp.zeros_like, start().params)
    updates, _ = jax.jit(lambda p: ADAMW(0.5).update(zero, ADAMW(0.5).init(p), p))(start().params)
    np.testing.assert_allclose(updates["embedding"], -0.05 * start().params["embedding"], rtol=1e-6)
    assert not updates["final_norm"]["scale"].any()


@pytest.mark.parametrize(
    ("schedule", "shape"),
    [
        (optimizer.warmup_cosine, lambda p: (1 + np.cos(np.pi * p)) / 2),
        (optimizer.warmup_linear, lambda p: 1 - p),
    ],
)
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_schedules(schedule, shape, floor):
    rate = schedule(1000, peak=2e-3, warmup_steps=100, floor=floor)
    for at in (0, 1, 50, 100, 101, 550, 999, 1000, 1100):
        left = floor + (1 - floor) * shape(min((at - 100) / 900, 1.0))
        exact = 2e-3 * (at / 100 if at < 100 else left)
        assert float(rate(at)) == pytest.approx(exact, rel=1e-5, abs=1e-9)


def test_adamw_equals_its_definition():
    """Three steps in float64, by the book."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.standard_normal((3, 4)), jnp.float32)}
    tx = ADAMW(1e-2)
    state, p = tx.init(params), np.asarray(params["w"], np.float64)
    m, v = np.zeros((3, 4)), np.zeros((3, 4))
    for t in range(1, 4):
        g = rng.standard_normal((3, 4)).astype(np.float32)
        updates, state = tx.update({"w": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, updates)
        g = g.astype(np.float64) / max(1.0, np.sqrt((g.astype(np.float64) ** 2).sum()))
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        p = p - 1e-2 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + 0.1 * p)
    np.testing.assert_allclose(params["w"], p, rtol=1e-5)
