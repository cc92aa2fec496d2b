"""Strategies: targets are met, what is cut is what is worth least, and each does what its paper says."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pruned as networks
import pytest

from mobilellm_jax.errors import UserError
from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import Stack, parameter_count
from mobilellm_jax.pruning import groups, one_shot, slicegpt_full
from mobilellm_jax.pruning.compaction import compacted
from mobilellm_jax.pruning.flap import compensated, flap, standardised
from mobilellm_jax.pruning.names import STRATEGIES
from mobilellm_jax.pruning.slicegpt import folded, slicegpt, turned
from mobilellm_jax.pruning.strategies import View, layerwise

DEEP = dataclasses.replace(networks.PLAIN, stacks=(Stack(8, 6, 3, 40), Stack(2, 4, 2, 24)))
COUNT = parameter_count(DEEP)
RELU = dataclasses.replace(networks.RELU, stacks=(Stack(2, 6, 3, 20),))


def cut(config, strategy, target, rounds=5, seed=0):
    params = jax.tree.map(jnp.copy, networks.parameters(config))
    batches = lambda number: [networks.rows(seed=100 * seed + number)]  # noqa: E731
    return one_shot.prune(params, networks.network(config), strategy, target, rounds, batches, seed)


def view(config, measures=None, live=None, memory=None):
    first = groups.everything(config)
    return View(
        config,
        first if live is None else live,
        groups.counts(first),
        memory,
        measures or networks.measures(config),
    )


QUICK = "adapt", "efficient", "slicegpt"
ONCE = ("slicegpt_full",)
NAMES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in STRATEGIES]


@pytest.mark.parametrize("share", [0.6, pytest.param(0.9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_the_target_is_met_to_within_one_group(name, share):
    strategy, target = STRATEGIES[name], int(COUNT * share)
    if name == "llm_pruner":
        strategy = functools.partial(strategy, protect=(1, 1))
    found = cut(DEEP, strategy, target, rounds=1 if name in ONCE else 4)
    number = groups.parameters(found.config, groups.counts(found.live))
    sizes = groups.sizes(found.config, groups.counts(found.live))
    unit = sizes.residual_D if name.startswith("slicegpt") else sizes.stacks[0].mlp_LF[0]
    if name == "efficient":  # a channel of every MLP, or of the stream where those are gone
        unit = max(sum(s.mlp_LF.sum() for s in sizes.stacks), sizes.residual_D)
    assert target - unit < number <= target
    assert found.events[-1]["parameters"] == number
    smaller = transformer.shapes(compacted(found.config, found.live).config)
    assert sum(leaf.size for leaf in jax.tree.leaves(smaller)) == number


@pytest.mark.parametrize(
    "name",
    [
        "efficient",
        *(
            pytest.param(n, marks=pytest.mark.slow)
            for n in ("adapt", "flap", "slicegpt", "slicegpt_full")
        ),
    ],
)
def test_what_is_left_is_the_network_that_was_cut(name):
    """With all that a strategy does: biases, turned weights, widths of every kind."""
    target, rounds = int(0.6 * parameter_count(networks.PLAIN)), 1 if name in ONCE else 2
    found = cut(networks.PLAIN, STRATEGIES[name], target, rounds)
    compact = compacted(found.config, found.live)
    smaller = networks.smaller(found.params, compact)
    tokens = networks.rows()["tokens"][:, :-1]
    close(logits(smaller, compact.config, tokens), logits(found.params, found.config, tokens), 1e-4)


@functools.partial(jax.jit, static_argnums=1)
def logits(params, config, tokens):
    return transformer.logits(params, config, transformer.apply(params, config, tokens))


def close(found, wanted, share):
    np.testing.assert_allclose(found, wanted, atol=share * float(np.abs(wanted).max()))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_cuts_the_same(name):
    strategy = functools.partial(
        STRATEGIES[name], **({"protect": (0, 0)} if name == "llm_pruner" else {})
    )
    rounds = 1 if name in ONCE else 2
    one, two = (cut(DEEP, strategy, int(COUNT * 0.8), rounds) for _ in range(2))
    assert one.events == two.events
    other = cut(DEEP, strategy, int(COUNT * 0.8), rounds, seed=1)
    assert name in ("magnitude", "slicegpt", "slicegpt_full") or other.events != one.events


def test_sparsity_of_layers_is_that_of_the_paper():
    """Base minus amplitude times importance, of mean zero, on top of what it was; widths follow."""
    settings = {"importance": "cosine", "amplitude": 0.05, "attention": "none"}
    before, live, memory = np.zeros(10), None, None
    for seed, share in enumerate((0.9, 0.7)):
        seen = view(DEEP, networks.measures(DEEP, seed=seed), live, memory)
        found = layerwise(seen, int(COUNT * share), score="taylor", **settings)
        importance = np.array(found.measured["importance"])
        sparsity = np.array(found.measured["sparsity"])
        assert abs(np.mean(importance)) < 1e-12 and np.abs(importance).max() == 1
        base = sparsity - before + 0.05 * importance
        np.testing.assert_allclose(base, base[0], atol=1e-9)
        before, live, memory = sparsity, found.live, found.memory
    number = groups.counts(found.live)
    left = np.concatenate([s.mlp_LF for s in number.stacks])
    first = np.array([40] * 8 + [24] * 2)
    np.testing.assert_allclose(left, first * (1 - sparsity), atol=1.5)
    assert all(
        (s.kv_heads_LK == f.kv_heads).all() for s, f in zip(number.stacks, DEEP.stacks, strict=True)
    )


def test_by_itself_amplitude_is_the_mean_sparsity_that_is_due():
    """Of what may go at all: here the channels of MLPs."""
    target = int(COUNT * 0.9)
    found = layerwise(
        view(DEEP), target, score="magnitude", importance="cosine", attention="none"
    ).measured
    may_go = sum(3 * DEEP.width * s.mlp_width * s.layers for s in DEEP.stacks)
    amplitude = -np.polyfit(found["importance"], found["sparsity"], 1)[0]
    assert amplitude == pytest.approx((COUNT - target) / may_go, rel=0.05)


def test_no_layer_grows_back_and_amplitude_is_at_most_what_the_mean_allows():
    before, found = np.zeros(10), None
    live, memory = groups.everything(DEEP), None
    for number in range(1, 6):
        seen = view(DEEP, networks.measures(DEEP, seed=number), live, memory)
        found = layerwise(seen, COUNT - COUNT // 20 * number, score="taylor", importance="cosine")
        sparsity = np.array(found.measured["sparsity"])
        assert (sparsity >= before).all()
        for old, new in zip(jax.tree.leaves(live), jax.tree.leaves(found.live), strict=True):
            assert not (new & ~old).any()
        before, live, memory = sparsity, found.live, found.memory


def test_a_cut_whose_aim_is_met_already_cuts_nothing():
    """The one before took a whole head: layers of importance owe nothing for it."""
    seen = view(DEEP, memory={"sparsity": np.linspace(0.0, 0.3, 10)})
    found = layerwise(seen, COUNT, score="taylor", importance="cosine")
    assert found.live is seen.live and found.measured == {"sparsity": [*np.linspace(0.0, 0.3, 10)]}
    np.testing.assert_array_equal(found.memory["sparsity"], np.linspace(0.0, 0.3, 10))


@pytest.mark.parametrize("name", ["magnitude", "adapt", "slicegpt"])
def test_what_was_dead_before_stays_dead_and_counts_nothing(name):
    """Norms divide by the channels that live, also when the dead ones are taken out."""
    config = dataclasses.replace(networks.PLAIN, dead_channels=True)
    live = networks.some_dead(config, heads=False)
    params = networks.masked(networks.parameters(config), live)
    whole = groups.parameters(config, groups.counts(live))
    batches = lambda number: [networks.rows(seed=number)]  # noqa: E731
    target = whole - 300
    found = one_shot.prune(params, networks.network(config), STRATEGIES[name], target, 2, batches)
    assert found.events[-1]["parameters"] <= target
    assert found.live.residual_D.sum() <= live.residual_D.sum()
    compact = compacted(found.config, found.live)
    small = networks.smaller(found.params, compact)
    tokens_BT = networks.rows()["tokens"]
    run = jax.jit(
        lambda p, tokens_BT, c: transformer.logits(p, c, transformer.apply(p, c, tokens_BT)),
        static_argnums=2,
    )
    close(run(small, tokens_BT, compact.config), run(found.params, tokens_BT, found.config), 1e-3)


def test_a_target_below_all_is_told_before_anything_is_measured():
    asked = []

    def batches(number):
        asked.append(number)
        return []  # of which nothing could be measured

    params = jax.tree.map(jnp.copy, networks.parameters(DEEP))
    with pytest.raises(UserError, match="the target of 2,000 parameters is below the"):
        one_shot.prune(params, networks.network(DEEP), STRATEGIES["adapt"], 2000, 20, batches)
    assert asked == [0]


def test_heads_are_cut_although_no_layer_by_itself_is_due_one():
    """3 KV heads, 10 %: rounded layer by layer nothing would ever be cut."""
    found = layerwise(view(DEEP), int(COUNT * 0.9), score="magnitude")
    sparsity = np.array(found.measured["sparsity"])
    assert (sparsity * 3 < 0.5).all()
    left = np.concatenate([s.kv_heads_LK for s in groups.counts(found.live).stacks])
    first = np.array([3] * 8 + [2] * 2)
    assert (first - left).sum() == int((first * sparsity).sum() + 1e-9) > 0


def test_query_heads_go_from_every_kv_head_alike():
    found = layerwise(view(DEEP), int(COUNT * 0.8), score="taylor", attention="heads")
    gone = 0
    for stack in found.live.stacks:
        each = stack.heads_LN.reshape(*stack.kv_heads_LK.shape, -1).sum(-1)
        assert stack.kv_heads_LK.all() and (each == each[:, :1]).all()
        gone += int((~stack.heads_LN).sum())
    assert gone


@pytest.mark.parametrize("attention", ["kv_heads", "heads"])
def test_what_goes_is_worth_least(attention):
    measures = networks.measures(DEEP)
    found = layerwise(view(DEEP, measures), int(COUNT * 0.7), score="taylor", attention=attention)
    scores = measures.scores("taylor")
    for live, score in zip(found.live.stacks, scores.stacks, strict=True):
        for lives, worth in ((live.mlp_LF, score.mlp_LF), (live.kv_heads_LK, score.kv_heads_LK)):
            for row, value in zip(lives, worth, strict=True):
                assert row.all() or value[row].min() >= value[~row].max()


def test_what_is_protected_stays():
    found = STRATEGIES["llm_pruner"](view(DEEP), int(COUNT * 0.8))
    left = np.concatenate([s.mlp_LF for s in groups.counts(found.live).stacks])
    assert (left[:4] == 40).all() and (left[8:] == 24).all() and (left[4:8] < 40).all()


def test_widths_are_multiples():
    found = layerwise(view(DEEP), int(COUNT * 0.8), score="taylor", multiple=8)
    assert all((s.mlp_LF % 8 == 0).all() for s in groups.counts(found.live).stacks)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: cut(DEEP, STRATEGIES["adapt"], COUNT), "nothing to prune"),
        (lambda: cut(DEEP, STRATEGIES["adapt"], 0), "nothing to prune"),
        (lambda: cut(DEEP, STRATEGIES["adapt"], 2000), "is below the"),
        (lambda: cut(DEEP, STRATEGIES["llm_pruner"], COUNT // 2), "is below the"),
        (lambda: cut(DEEP, flap, 2000), "is below the"),
        (lambda: cut(DEEP, slicegpt, 200), "is below the"),
        (lambda: layerwise(view(DEEP), COUNT // 2, score="taylr"), "is not one of taylor"),
        (
            lambda: layerwise(view(DEEP), COUNT // 2, score="taylor", attention="kv"),
            "kv_heads, heads",
        ),
        (lambda: layerwise(view(DEEP), COUNT // 2, score="taylor", protect=1), "two numbers"),
        (
            lambda: layerwise(view(DEEP), COUNT // 2, score="taylor", protect=(1, 1, 1)),
            "two numbers",
        ),
        (lambda: layerwise(view(DEEP), COUNT // 2, score="taylor", amplitude="a"), "is no number"),
        (
            lambda: layerwise(view(DEEP), COUNT // 2, score="taylor", multiple=0),
            "multiple=0 is not",
        ),
        (lambda: slicegpt(view(DEEP), COUNT // 2, multiple=0), "multiple=0 is not a whole number"),
        (lambda: STRATEGIES["efficient"](view(DEEP), COUNT // 2, unit=1.5), "unit=1.5 is not a"),
        (
            lambda: layerwise(view(DEEP), COUNT // 2, score="taylor", importance="angle"),
            "cosine, distance",
        ),
    ],
)
def test_bad_input(call, word):
    with pytest.raises(UserError, match=word):
        call()


# --- FLAP


def mean_given(config, params, kind, weight):
    """What the first block's attention or MLP adds to the stream, averaged over tokens: [D]."""
    measured = networks.measures(config, params).statistics
    mean = np.asarray(measured["stack_0"][kind]["sum"][0]) / measured["tokens"]
    of = params["stack_0"][kind]
    given = np.tensordot(mean, np.asarray(of[weight][0]), mean.ndim)
    bias = f"{weight}_bias"
    return given + np.asarray(of[bias][0]) if bias in of else given


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(networks.PLAIN, id="plain"),
        pytest.param(networks.TWO, id="biases", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("kind", "weight"), [("attention", "out"), ("mlp", "down")])
def test_biases_keep_what_was_given_on_average(config, kind, weight):
    """Of the first block, whose input is the same; of its MLP if attention has lost nothing."""
    live = groups.everything(config)
    if kind == "attention":
        live.stacks[0].kv_heads_LK[0, 1] = live.stacks[0].heads_LN[0, 2:4] = False
    else:
        live.stacks[0].mlp_LF[0, ::3] = False
    params = networks.parameters(config)
    statistics = networks.measures(config).statistics
    biased = dataclasses.replace(config, out_bias=True)
    made = compensated(params, config, statistics, groups.everything(config), live)
    made = networks.masked(made, live)
    before, after = (mean_given(*of, kind, weight) for of in ((config, params), (biased, made)))
    lost = before - mean_given(config, networks.masked(params, live), kind, weight)
    assert np.abs(lost).max() > 0.01 * np.abs(before).max()
    close(after, before, 1e-4)


def test_a_block_that_is_applied_twice_alike_is_cut_as_one_that_is_applied_once():
    """Sums over tokens are sums over its applications, too."""
    once = networks.PLAIN
    twice = dataclasses.replace(
        once, stacks=tuple(dataclasses.replace(stack, repeats=2) for stack in once.stacks)
    )
    params, live = networks.parameters(once), groups.everything(once)
    found = jax.device_get(networks.measures(once).statistics)
    doubled = {**jax.tree.map(lambda x: 2 * x, found), "tokens": found["tokens"]}
    chosen, made = [], []
    for config, statistics in ((once, found), (twice, doubled)):
        measured = types.SimpleNamespace(params=params, statistics=statistics)
        choice = flap(view(config, measured), int(parameter_count(once) * 0.8))
        chosen.append(choice.live)
        made.append(compensated(params, config, statistics, live, choice.live))
    for one, two in zip(jax.tree.leaves(chosen[0]), jax.tree.leaves(chosen[1]), strict=True):
        np.testing.assert_array_equal(one, two)
    for one, two in zip(jax.tree.leaves(made[0]), jax.tree.leaves(made[1]), strict=True):
        close(one, two, 1e-6)


def test_flap_sets_one_threshold_for_all():
    found = flap(view(DEEP), int(COUNT * 0.9), bias=False)
    kept, gone = [], []
    statistics, tokens = (
        networks.measures(DEEP).statistics,
        networks.measures(DEEP).statistics["tokens"],
    )
    for i, live in enumerate(found.live.stacks):
        of = statistics[f"stack_{i}"]["mlp"]
        variance = of["square"] / tokens - (of["sum"] / tokens) ** 2
        down = np.asarray(networks.parameters(DEEP)[f"stack_{i}"]["mlp"]["down"])
        value = variance * (down**2).sum(-1)
        value = (value - value.mean(-1, keepdims=True)) / value.std(-1, keepdims=True)
        kept.append(value[live.mlp_LF])
        gone.append(value[~live.mlp_LF])
    kept, gone = np.sort(np.concatenate(kept)), np.sort(np.concatenate(gone))
    assert len(gone) > 10
    assert gone[-1] <= kept[0] + 1e-6 or (kept < gone[-1]).sum() <= len(found.live.stacks) * 8


def test_standardised_values():
    live = np.array([[True, True, True, False]])
    found = standardised(np.array([[1.0, 2.0, 3.0, 99.0]]), live)[live]
    np.testing.assert_allclose([found.mean(), found.std()], [0, 1], atol=1e-12)


# --- SliceGPT


def rotation(width, seed=0):
    return jnp.asarray(
        np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0], jnp.float32
    )


@pytest.mark.parametrize("config", networks.NETWORKS.values(), ids=networks.NETWORKS)
def test_a_turned_network_is_the_same_function(config):
    params, tokens = networks.parameters(config), networks.rows()["tokens"][:, :-1]
    untied = dataclasses.replace(config, tied=False)

    before = logits(params, config, tokens)
    close(logits(folded(params, config), untied, tokens), before, 1e-5)
    made = turned(params, config, rotation(config.width))
    close(logits(made, untied, tokens), before, 1e-4)
    assert flat(made)["embedding"].shape == flat(params)["embedding"].shape
    assert not np.allclose(made["embedding"], params["embedding"], atol=0.1)


@pytest.mark.parametrize("config", [networks.TWO, RELU], ids=["two stacks", "relu"])
def test_a_network_turned_block_by_block_is_the_same_function(config):
    """In logits, in what is measured, and in the parameters that are counted."""
    view_of = view(config)
    bases = slicegpt_full._bases(networks.parameters(config), view_of)
    for basis in (*(b for of in bases[0] for b in of.values()), bases[1]):
        identity = np.broadcast_to(np.eye(config.width), basis.shape)
        np.testing.assert_allclose(basis @ basis.swapaxes(-1, -2), identity, atol=1e-9)
    changed = slicegpt_full.turned(networks.parameters(config), config, bases)
    config_of = dataclasses.replace(config, tied=False, block=slicegpt_full.BLOCK)
    tokens = networks.rows()["tokens"][:, :-1]
    before, after = (
        logits(params, c, tokens)
        for params, c in ((networks.parameters(config), config), (changed, config_of))
    )
    np.testing.assert_allclose(before, after, atol=2e-4 * float(jnp.abs(before).max()))
    count = sum(leaf.size for leaf in jax.tree.leaves(changed))
    assert count == groups.parameters(config_of, groups.counts(groups.everything(config_of)))


def test_a_norm_keeps_the_most_variance_that_so_many_channels_can():
    """Of what it gives, by the eigenvalues of its own sums; one rotation for all keeps no more."""
    config, width = dataclasses.replace(networks.PLAIN, tied=False), 15
    seen = view(config)
    bases, head_DE = slicegpt_full._bases(networks.parameters(config), seen)
    gram_DD = np.asarray(seen.measures.residual_gram, np.float64)
    one_DE = np.linalg.eigh(gram_DD)[1][:, ::-1]
    names = [*(f"stack_0/{of}" for of in slicegpt_full.INPUTS.values()), "of_head"]
    folded_params = folded(networks.parameters(config), config)
    sums = networks.measures(config, folded_params).inputs(names)
    own = [*(bases[0][norm] for norm in slicegpt_full.INPUTS), head_DE[None]]
    for name, basis_LDE in zip(names, own, strict=True):
        for of_DD, basis_DE in zip(np.reshape(sums[name], basis_LDE.shape), basis_LDE, strict=True):
            kept, at_most, of_one = (
                np.einsum("DE,DC,CE->", b[:, :width], np.float64(of_DD), b[:, :width])
                for b in (basis_DE, np.linalg.eigh(of_DD)[1][:, ::-1], one_DE)
            )
            np.testing.assert_allclose(kept, at_most, rtol=1e-6)
            assert of_one <= kept * (1 + 1e-6)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (networks.SHARED, "shared blocks"),
        (dataclasses.replace(networks.TWO, block=slicegpt_full.BLOCK), "cuts once"),
    ],
)
def test_what_cannot_be_turned_block_by_block_is_refused(config, word):
    with pytest.raises(UserError, match=word):
        slicegpt_full.slicegpt_full(view(config, measures=object()), 1000)


def test_a_stream_that_fills_a_part_of_its_channels_loses_nothing():
    """Two thirds, turned out of sight: found and cut, and the network is the same function."""
    config = dataclasses.replace(networks.TWO, norm_eps=1e-12)
    width = config.width * 2 // 3
    live = groups.everything(config)
    narrow = groups.Groups(np.arange(config.width) < width, live.stacks)
    params = turned(
        networks.masked(networks.parameters(config), narrow), config, rotation(config.width)
    )
    found = slicegpt(view(config, networks.measures(config, params)), parameters_of(config, width))
    assert found.live.residual_D.sum() == width
    made = networks.masked(found.update(params), found.live)
    compact = compacted(found.config, found.live)
    smaller = networks.smaller(made, compact)
    assert compact.config.width == width and not compact.config.dead_channels
    tokens = networks.rows()["tokens"][:, :-1]

    close(logits(smaller, compact.config, tokens), logits(params, config, tokens), 1e-3)


def parameters_of(config, width):
    number = groups.counts(groups.everything(config))
    return groups.parameters(config, dataclasses.replace(number, residual_D=np.asarray(width)))
