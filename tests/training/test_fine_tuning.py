"""Conversations in rows: packing changes nothing, none sees another, and what is masked is nothing."""

import dataclasses
import functools

import chats
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from mobilellm_jax.data.chat import ConversationEncoder
from mobilellm_jax.data.packing import UNTRAINED, Whole, counted, segment_ids
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, Stack
from mobilellm_jax.model.transformer import Execution
from mobilellm_jax.training.objectives import Network, cross_entropy, next_token, split_rows
from mobilellm_jax.training.step import init_state, train_step

ROW = 192
TEMPLATES = {"plain": chats.PLAIN, "BOS inside": chats.LLAMA2}
# Weights so large that attention is far from even.
MODEL = ModelConfig(tiny.VOCAB, 16, (Stack(2, 2, 1, 24),), head_dim=8, init_std=0.2)


@functools.cache
def given(name):
    """Conversations as marked ids."""
    tokenizer = dataclasses.replace(tiny.tokenizer(), chat_template=TEMPLATES[name])
    encode = ConversationEncoder(tokenizer)
    said = (encode(chats.conversation(seed, turns=2, longest=4)) for seed in range(30))
    return [ids for ids in said if len(ids) <= ROW + 1]


@functools.cache
def packed(name, bos, eos):
    packer = Whole(ROW, bos, eos)
    packer.add(given(name))
    return packer.finish().rows


def alone(name, bos):
    """A row for each conversation."""
    rows = np.full((len(given(name)), ROW + 1), bos | UNTRAINED, np.int32)
    for row, ids in zip(rows, given(name), strict=True):
        row[: len(ids)] = ids
    return rows


def network(**options):
    model = tiny.tokenizer()
    return Network(MODEL, Execution(dtype="float32"), model.bos_id, model.eos_id, **options)


@functools.cache
def start(tied=True):
    model = dataclasses.replace(MODEL, tied=tied)
    return jax.jit(transformer.init, static_argnums=0)(model, jax.random.key(0))


@functools.cache
def program(objective, microbatches=1, **options):
    """The train step, of plain descent at rate 1."""
    return jax.jit(
        functools.partial(
            train_step,
            network=network(**options),
            objective=objective,
            make_optimizer=optax.sgd,
            schedule=lambda step: 1.0,
            sources=1,
            microbatches=microbatches,
        )
    )


def stepped(rows, objective, **options):
    """Metrics and gradient of the train step."""
    blank = np.full((-len(rows) % 4, ROW + 1), network().bos_id | UNTRAINED)
    tokens = jnp.asarray(np.concatenate([rows, blank]), jnp.int32)
    batch = {"tokens": tokens, "source": jnp.zeros(len(tokens), jnp.int32)}
    state, metrics = program(objective, **options)(
        init_state(start(), optax.sgd), batch, jnp.ones(tiny.VOCAB)
    )
    return metrics, jax.tree.map(jnp.subtract, start(), state.params)


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("BOS inside", {"all_tokens": True, "z_loss": 0.1}),
        pytest.param("plain", {}, marks=pytest.mark.slow),
    ],
)
def test_packed_or_alone_in_a_row_is_the_same_step(name, loss):
    """Loss and gradients to 1e-5, whatever conversations share a row, a microbatch or a chunk."""
    objective = functools.partial(next_token, **loss)
    rows = packed(name, network().bos_id, network().eos_id)
    assert len(rows) < len(given(name)) / 2
    expected, gradient = stepped(alone(name, network().bos_id), objective)
    metrics, found = stepped(rows, objective, microbatches=2, loss_chunks=4)
    assert metrics["tokens"] == expected["tokens"] > 0
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("name", TEMPLATES)
def test_all_tokens_are_all_but_what_begins_a_conversation(name):
    """Counted by hand; BOS inside one is among them, padding is not, whether or not BOS is EOS."""
    bos = network().bos_id
    for eos in (network().eos_id, bos):
        rows = packed(name, bos, eos)
        counts = counted(rows, bos, eos, all_tokens=True)
        assert counts.sum() == sum(len(ids) - 1 for ids in given(name))
        assert (counts >= counted(rows, bos, eos)).all() and (
            rows[:, 1:][~counts] & UNTRAINED
        ).all()
        same = segment_ids(rows, bos)
        assert (same[:, 1:] == same[:, :-1])[counts].all()  # none follows from another conversation
        assert (counted(jnp.asarray(rows), bos, eos, all_tokens=True) == counts).all()


def test_of_text_all_tokens_count_anyhow():
    rng = np.random.default_rng(0)
    rows = rng.integers(1, 5, (20, 33)).astype(np.int32)
    for eos in (1, 2):
        expected = counted(rows, 1, eos)
        assert (counted(rows, 1, eos, all_tokens=True) == expected).all()
        assert 0 < expected.mean() < 1


@pytest.mark.parametrize("all_tokens", [False, True])
def test_no_gradient_crosses_the_border_of_a_conversation(all_tokens):
    """By the input embedding at every position: that of each is the row of an id which no other has.

    Of what one conversation costs, those of the others have a gradient of exactly zero, before it as
    behind it, and its own have one up to the token before its last target.
    """
    net = network()
    net = dataclasses.replace(net, model=dataclasses.replace(MODEL, tied=False))  # targets apart
    sizes = (50, 30, 40)
    ids, owner = np.arange(10, 10 + sum(sizes)), np.repeat(np.arange(3), sizes)
    row = np.full(ROW + 1, net.bos_id | UNTRAINED, np.int32)
    row[np.arange(sum(sizes)) + 1 + owner] = ids  # a BOS before each conversation
    rows = split_rows(jnp.asarray(row)[None], net.bos_id, net.eos_id, all_tokens=all_tokens)

    params = start(tied=False)

    @jax.jit
    def gradient(mine_T):
        only = dataclasses.replace(rows, weight_BT=rows.weight_BT * mine_T)
        return jax.grad(lambda p: cross_entropy(p, only, net, 0.1).total)(params)["embedding"]

    for one in range(3):
        found = np.abs(gradient(np.isin(row[1:], ids[owner == one])))[ids].max(1)
        assert (found[owner != one] == 0).all()
        (mine,) = np.nonzero(owner == one)
        assert (found[mine[:-1]] > 0).all() and found[mine[-1]] == 0


def test_what_is_masked_is_nothing_to_the_bit():
    """Whatever id a masked target is, loss and updated weights have the same bits; trained ones matter."""
    rows = packed("plain", network().bos_id, network().eos_id)

    def with_targets(params, batch, network, masked):
        found = split_rows(batch["tokens"], network.bos_id, network.eos_id)
        other_BT = jax.random.randint(jax.random.key(7), found.targets_BT.shape, 0, tiny.VOCAB)
        change_BT = (found.weight_BT == 0) == masked
        targets_BT = jnp.where(change_BT, other_BT, found.targets_BT)
        found = dataclasses.replace(found, targets_BT=targets_BT)
        return cross_entropy(params, found, network, z_loss=0.1)

    def bits(objective):
        metrics, gradient = stepped(rows, objective)
        return [np.asarray(x).tobytes() for x in (metrics["loss"], *jax.tree.leaves(gradient))]

    expected = bits(functools.partial(next_token, z_loss=0.1))
    assert bits(functools.partial(with_targets, masked=True)) == expected
    changed = bits(functools.partial(with_targets, masked=False))
    assert not any(a == b for a, b in zip(changed, expected, strict=True))


def test_the_last_token_of_a_row_is_a_target_only():
    """Masked it may be any token: what the row costs, and its gradient, keep their bits."""
    ids = np.random.default_rng(0).integers(10, tiny.VOCAB, ROW + 1).astype(np.int32)
    ids[0] = network().bos_id | UNTRAINED

    def bits(last):
        row = np.append(ids[:-1], last).astype(np.int32)[None]
        metrics, gradient = stepped(row, next_token)
        return [np.asarray(x).tobytes() for x in (metrics["loss"], *jax.tree.leaves(gradient))]

    assert bits(20 | UNTRAINED) == bits(30 | UNTRAINED)
    assert bits(20) != bits(30)
