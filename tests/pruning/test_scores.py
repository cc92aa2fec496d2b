"""Scores: each is that of exactly the weights that go with its group, however it is computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pruned as networks
import pytest

from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, Stack, parameter_count
from mobilellm_jax.parallel.mesh import make_mesh
from mobilellm_jax.parallel.sharding import put_rows, shardings
from mobilellm_jax.pruning import activations, groups, measures, scores
from mobilellm_jax.training.objectives import next_token

QUICK = ("shared",)
EACH = pytest.mark.parametrize(
    "config",
    [
        pytest.param(c, id=name, marks=[] if name in QUICK else pytest.mark.slow)
        for name, c in networks.NETWORKS.items()
    ],
)
ONCE = {name: c for name, c in networks.NETWORKS.items() if all(s.repeats == 1 for s in c.stacks)}


def gradient(config, batch):
    network = networks.network(config)
    cost = lambda p: next_token(p, batch, network).total  # noqa: E731
    return jax.jit(jax.grad(cost))(networks.parameters(config))


def single_groups(config):
    """(path in the scores, everything else alive): each kind of group by itself."""
    everything = groups.everything(config)
    yield "residual", jax.tree.map(np.copy, everything), lambda g: g.residual_D[3]
    for i in range(len(config.stacks)):
        for field in groups.FIELDS.values():
            live = jax.tree.map(np.copy, everything)
            yield f"{i}/{field}", live, lambda g, i=i, f=field: getattr(g.stacks[i], f)[1, 1]


def kill(kind, live, config):
    if kind == "residual":
        live.residual_D[3] = False
        return
    i, field = kind.split("/")
    stack = live.stacks[int(i)]
    getattr(stack, field)[1, 1] = False
    if field == "kv_heads_LK":
        each = config.stacks[int(i)].heads // config.stacks[int(i)].kv_heads
        stack.heads_LN[1, each : 2 * each] = False


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(c, id=name, marks=[] if name == "plain" else pytest.mark.slow)
        for name, c in ONCE.items()
    ],
)
def test_a_score_is_that_of_the_weights_that_a_cut_makes_zero(config):
    """So that what is scored as a KV head's query heads are those which go with it."""
    batch = networks.rows()
    found = networks.measures(config).scores("taylor")
    by_weight = jax.tree.map(
        lambda w, g: jnp.abs(w * g), networks.parameters(config), gradient(config, batch)
    )
    weights = networks.measures(config).scores("magnitude")
    for kind, live, at in single_groups(config):
        kill(kind, live, config)
        left = networks.masked(by_weight, live)
        lost = sum(
            float(a.sum() - b.sum())
            for a, b in zip(*map(jax.tree.leaves, (by_weight, left)), strict=True)
        )
        np.testing.assert_allclose(at(found), lost, rtol=2e-4, err_msg=kind)
        params = networks.parameters(config)
        zeroed = networks.masked(params, live)
        lost = sum(
            float((a**2).sum() - (b**2).sum())
            for a, b in zip(*map(jax.tree.leaves, (params, zeroed)), strict=True)
        )
        np.testing.assert_allclose(at(weights), lost, rtol=2e-4, err_msg=kind)


def with_factors(config, params, factors):
    """Weights by which each group gives `factors` times what it gave; a tied embedding in both its uses."""
    out = {**params, "embedding": params["embedding"] * factors.residual_D}
    for i, of in enumerate(factors.stacks):
        stack = dict(params[f"stack_{i}"])
        heads_LN = of.heads_LN * jnp.repeat(
            of.kv_heads_LK, config.stacks[i].heads // config.stacks[i].kv_heads, axis=1
        )
        stack["attention"] = {
            **stack["attention"],
            "out": stack["attention"]["out"] * heads_LN[..., None, None] * factors.residual_D,
        }
        down_LFD = stack["mlp"]["down"] * of.mlp_LF[..., None] * factors.residual_D
        stack["mlp"] = {**stack["mlp"], "down": down_LFD}
        out[f"stack_{i}"] = stack
    return out


@pytest.mark.parametrize("kind", ["taylor_slice", pytest.param("fisher", marks=pytest.mark.slow)])
@EACH
def test_a_slice_is_the_derivative_by_a_factor_on_the_group(config, kind):
    params, batch = networks.parameters(config), networks.rows()
    ones = groups.of_widths(config, lambda *shape: jnp.ones(shape))

    def cost(factors):
        network = networks.network(config)
        return next_token(with_factors(config, params, factors), batch, network).total

    expected = jax.jit(jax.grad(cost))(ones)
    found = networks.measures(config).scores(kind)
    finish = {"taylor_slice": np.abs, "fisher": np.square}[kind]
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        wanted = finish(b)
        np.testing.assert_allclose(a / wanted.max(), wanted / wanted.max(), atol=1e-5)


def test_random_scores_are_of_each_group_by_itself():
    config = dataclasses.replace(networks.PLAIN, stacks=(Stack(2, 6, 3, 20), Stack(2, 6, 3, 20)))
    leaves = jax.tree.leaves(scores.random(config, jax.random.key(0)))
    found = np.concatenate([np.ravel(leaf) for leaf in leaves])
    assert len(np.unique(found)) == len(found) and 0 <= found.min() < found.max() < 1


@pytest.mark.parametrize(
    ("execution", "kind"),
    [
        pytest.param(
            execution, kind, marks=[] if (name, kind) == ("remat", "taylor") else pytest.mark.slow
        )
        for name, execution in {"remat": {"remat": "full"}, "unroll": {"unroll": 2}}.items()
        for kind in ("taylor", "activation")
    ],
    ids=str,
)
def test_how_a_network_is_run_changes_no_score(execution, kind):
    network = networks.network(networks.TWO, **execution)
    params = networks.parameters(networks.TWO)
    found = measures.Measures(params, network, [networks.rows()], 0).scores(kind)
    wanted = networks.measures(networks.TWO).scores(kind)
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "taylor",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("fisher", "activation", "magnitude")),
    ],
)
def test_eight_devices_score_like_one(name):
    config = networks.TWO
    mesh = make_mesh({"data": 2, "fsdp": 4}, jax.devices())
    batch = {key: np.asarray(x) for key, x in networks.rows(8).items()}
    with jax.set_mesh(mesh):
        places = shardings(transformer.shapes(config), mesh)
        params = jax.device_put(networks.parameters(config), places)
        spread = measures.Measures(params, networks.network(config), [put_rows(batch, mesh)], 0)
        found = spread.scores(name)
    alone = measures.Measures(networks.parameters(config), networks.network(config), [batch], 0)
    for a, b in zip(*map(jax.tree.leaves, (found, alone.scores(name))), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6 * float(np.abs(b).max()))


def test_batches_add_up():
    """Of gradients the magnitudes do, because each batch has a gradient of its own."""
    parts = [networks.rows(seed=seed) for seed in (0, 1)]
    params, network = networks.parameters(networks.PLAIN), networks.network(networks.PLAIN)
    both = measures.Measures(params, network, parts, 0)
    each = [measures.Measures(params, network, [part], 0) for part in parts]
    for kind in ("taylor", "fisher"):
        alone = [m.scores(kind).residual_D for m in each]
        np.testing.assert_allclose(both.scores(kind).residual_D, sum(alone), rtol=1e-5)
    together = {k: jnp.concatenate([p[k] for p in parts]) for k in parts[0]}
    whole = measures.Measures(params, network, [together], 0)
    np.testing.assert_allclose(whole.importance("cosine"), both.importance("cosine"), rtol=1e-5)


@EACH
def test_statistics_are_those_of_the_activations(config):
    """Against the same network walked through block by block with every activation at hand."""
    params, batch = networks.parameters(config), networks.rows()
    network = networks.network(config)
    statistics = jax.jit(activations.statistics, static_argnames="network")
    found = jax.device_get(statistics(params, batch, network=network))
    singles, single = transformer.unstacked(params, config)
    seen = {f"stack_{i}": [] for i in range(len(config.stacks))}
    order = [(i, layer) for i, s in enumerate(config.stacks) for layer in s.applications]
    for depth, (i, layer) in enumerate(order):
        until = dataclasses.replace(single, stacks=single.stacks[: depth + 1])
        part = {k: v for k, v in singles.items() if not k.startswith("stack_")}
        part |= {f"stack_{j}": singles[f"stack_{j}"] for j in range(depth + 1)}
        own = statistics(part, batch, network=dataclasses.replace(network, model=until))
        seen[f"stack_{i}"].append((layer, jax.device_get(own[f"stack_{depth}"])))
    for i, stack in enumerate(config.stacks):
        for layer in range(stack.layers):
            own = [s for at, s in seen[f"stack_{i}"] if at == layer]
            wanted = jax.tree.map(lambda *x: np.sum(x, 0)[0], *own)
            got = jax.tree.map(lambda x, at=layer: x[at], found[f"stack_{i}"])
            for path, value in flat(wanted).items():
                np.testing.assert_allclose(
                    flat(got)[path], value, rtol=1e-4, atol=1e-4, err_msg=path
                )


def test_blocks_are_as_important_however_often_they_are_applied_alike():
    rng = np.random.default_rng(0)
    once, twice = rng.random(3), rng.random(2)
    stacks = Stack(3, 6, 3, 20), Stack(2, 6, 3, 20, repeats=2)
    config = dataclasses.replace(networks.PLAIN, stacks=stacks)
    found = {"tokens": 9.0, "stack_0": {"cosine": once}, "stack_1": {"cosine": 2 * twice}}
    expected = activations.IMPORTANCE["cosine"] * np.concatenate([once, twice])
    np.testing.assert_allclose(activations.importance(found, config, "cosine"), expected)


def test_importance_is_that_of_the_definition():
    """One block without weights to speak of hardly turns its input."""
    params = networks.parameters(networks.PLAIN)
    weak = functools.partial(jax.tree_util.tree_map_with_path, _weaker)
    found = networks.measures(networks.PLAIN, weak(params))
    for measure in activations.IMPORTANCE:
        raw = found.importance(measure)
        assert raw.argmin() == 1 and len(raw) == 3
    tokens = float(found.statistics["tokens"])
    assert abs(found.importance("cosine")[1] / tokens + 1) < 1e-3


def _weaker(path, leaf):
    names = [key.key for key in path]
    return leaf.at[1].multiply(1e-4) if names[-1] in ("out", "down") else leaf


@pytest.mark.parametrize("name", ["taylor", "activation", "magnitude"])
def test_no_score_holds_the_gradients_or_squares_of_all_weights(name):
    """What a program needs beside the weights is little more than one of twelve blocks, and the embedding."""
    config = ModelConfig(networks.VOCAB, 256, (Stack(12, 4, 2, 768),), head_dim=64, max_length=64)
    network = networks.network(config, remat="full")
    shapes, batch = transformer.shapes(config), networks.rows(1)
    programs = {
        "taylor": (functools.partial(measures._gradients.lower, kind="taylor"), (shapes, batch)),
        "activation": (measures._statistics.lower, (shapes, batch)),
        "magnitude": (measures._magnitude.lower, (shapes,)),
    }
    lower, given = programs[name]
    needed = lower(*given, network=network).compile().memory_analysis().temp_size_in_bytes
    assert needed < 4 * parameter_count(config) / 4
