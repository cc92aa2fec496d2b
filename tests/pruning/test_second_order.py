"""The local second-order update: what is left of a product gives what the whole gave, as well as it can."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pruned as networks
import pytest

from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.notes import INPUTS
from mobilellm_jax.pruning import groups, one_shot, second_order
from mobilellm_jax.pruning.efficient import efficient
from mobilellm_jax.pruning.strategies import adapt
from mobilellm_jax.training.objectives import next_token

UNTIED = dataclasses.replace(networks.PLAIN, tied=False)
# Weight, and what enters it: by the path of its sums, in the letters of the weight's axes.
READ = {
    "stack_0/attention/out": "stack_0/attention/of_out",
    "stack_0/mlp/down": "stack_0/mlp/of_down",
    "stack_0/attention/value": "stack_0/of_attention",
    "stack_0/mlp/gate": "stack_0/of_mlp",
    "head": "of_head",
}


def inputs(config, names):
    return networks.measures(config).inputs(names)


@pytest.mark.parametrize("weight", READ)
def test_it_is_least_squares_on_what_is_left(weight):
    """Of rows made from the sums' own factor, by numpy in float64; damping draws to the old weights."""
    live = networks.some_dead(UNTIED)
    name = READ[weight]
    before = groups.everything(UNTIED)
    assert name in second_order.needed(UNTIED, before, live)
    sums = np.asarray(inputs(UNTIED, [name])[name], np.float64)
    sums = sums.reshape(-1, *sums.shape[-2:])
    params, damping = networks.parameters(UNTIED), 0.02
    found = second_order.compensated(
        params, UNTIED, inputs(UNTIED, [name]), before, live, damping=damping
    )
    axis, stack = {"out": "N", "down": "F"}.get(weight.split("/")[-1], "D"), 0
    alive = live.of(axis, stack)
    alive = np.repeat(alive, UNTIED.head_dim, -1) if axis == "N" else alive
    alive = np.broadcast_to(alive, sums.shape[:2])
    old = np.asarray(flat(params)[weight], np.float64).reshape(*sums.shape[:2], -1)
    new = np.asarray(flat(found)[weight]).reshape(*sums.shape[:2], -1)
    for layer, keep in enumerate(alive):
        values, vectors = np.linalg.eigh(sums[layer])
        rows = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T  # [rows, X]
        pull = np.sqrt(damping * np.diag(sums[layer])[keep].mean()) * np.eye(keep.sum())
        left = np.concatenate([rows[:, keep], pull])
        right = np.concatenate([rows @ old[layer], pull @ old[layer][keep]])
        expected = np.linalg.lstsq(left, right, rcond=None)[0]
        np.testing.assert_allclose(new[layer][keep], expected, atol=2e-3 * np.abs(expected).max())
    untouched = {path for path in flat(params)} - {weight}
    moved = {p for p in untouched if not np.array_equal(flat(params)[p], flat(found)[p])}
    same_input = {
        w.split("/")[0] + "/" + r
        for w, n in READ.items()
        if n == name
        for _, _, rs in second_order.READERS
        for r in rs
        if weight.endswith(rs)
    }
    assert moved <= same_input


@pytest.mark.parametrize("config", networks.NETWORKS.values(), ids=networks.NETWORKS)
def test_sums_are_those_of_what_enters(config):
    """Their diagonals are the squares that the statistics hold, of heads and channels."""
    batch, network = networks.rows(), networks.network(config)
    given = networks.parameters(config), config, batch["tokens"][:, :-1]
    sums = transformer.statistics(*given, execution=network.execution, collection=INPUTS)
    squares = transformer.statistics(*given, execution=network.execution)
    for i in range(len(config.stacks)):
        of, expected = sums[f"stack_{i}"], squares[f"stack_{i}"]
        diagonal = functools.partial(np.diagonal, axis1=-2, axis2=-1)
        for kind, name in (("attention", "of_out"), ("mlp", "of_down")):
            square = np.asarray(expected[kind]["square"])
            found = diagonal(of[kind][name]).reshape(square.shape)
            np.testing.assert_allclose(found, square, rtol=1e-5)
        read = diagonal(of["of_attention"]) + diagonal(of["of_mlp"])
        np.testing.assert_allclose(read, expected["read"], rtol=1e-5)


@pytest.mark.parametrize("strategy", [efficient, pytest.param(adapt, marks=pytest.mark.slow)])
def test_with_it_a_product_and_the_loss_change_less(strategy):
    """The error of each product against the whole one's is smaller, of every one that lost something."""
    config = dataclasses.replace(UNTIED, dead_channels=True)
    params, target = (
        networks.parameters(config),
        int(0.7 * groups.parameters(config, groups.counts(groups.everything(config)))),
    )

    def pruned(update):
        start = jax.tree.map(jnp.copy, params)
        return one_shot.prune(
            start,
            networks.network(config),
            functools.partial(strategy, update=update),
            target,
            1,
            lambda number: [networks.rows()],
        )

    with_it, without = pruned(True), pruned(False)
    assert all(map(np.array_equal, jax.tree.leaves(with_it.live), jax.tree.leaves(without.live)))
    names = second_order.needed(config, groups.everything(config), with_it.live)
    sums, lost = inputs(config, names), 0
    for name in names:
        readers = next(
            r for n, _, r in (*second_order.READERS, second_order.HEAD) if name.endswith(n)
        )
        stack = name.split("/")[0] + "/" if "/" in name else ""
        product = np.asarray(sums[name]).reshape(-1, *sums[name].shape[-2:])
        for path in (stack + reader for reader in readers):
            if path not in flat(params):
                continue

            def error(found, path=path, product=product):
                change = np.asarray(flat(found.params)[path] - flat(params)[path])
                change = change.reshape(*product.shape[:2], -1)
                return np.einsum("LXZ,LXY,LZY->L", product, change, change)

            assert (error(with_it) <= error(without) * 1.001).all(), path
            lost += 1
    assert lost
    of_loss = {}
    for update, found in ((True, with_it), (False, without)):
        network = networks.network(found.config)
        of_loss[update] = float(next_token(found.params, networks.rows(), network).total)
    whole = float(next_token(params, networks.rows(), networks.network(config)).total)
    assert abs(of_loss[True] - whole) < abs(of_loss[False] - whole)


def test_a_channel_that_is_always_zero_is_no_trouble():
    """Its equation is its own: nothing becomes infinite, and what is left is as without it."""
    weight_XY = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3)), jnp.float32)
    product_XX = jnp.diag(jnp.asarray([1.0, 0.0, 2.0, 3.0]))
    dying = jnp.asarray([False, False, False, True])
    moved = second_order._moved(weight_XY, product_XX, ~dying, dying, 0.0)
    np.testing.assert_allclose(moved, weight_XY, atol=1e-6)
