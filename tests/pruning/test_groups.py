"""Groups: what they weigh, what zeroing them leaves for good, and the smaller network in their place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pruned as networks
import pytest

from mobilellm_jax.errors import UserError
from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import parameter_count
from mobilellm_jax.pruning import groups, one_shot
from mobilellm_jax.pruning.compaction import compacted, taken, uncut
from mobilellm_jax.training import optimizer
from mobilellm_jax.training.objectives import next_token
from mobilellm_jax.training.step import init_state, train_step

ADAMW = functools.partial(optimizer.adamw, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0)
MUON = functools.partial(optimizer.muon, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0)
EACH = pytest.mark.parametrize("config", networks.NETWORKS.values(), ids=networks.NETWORKS)


def pruned(config, seed=0, residual=True, heads=True):
    """The network while it is pruned, its weights with dead groups, and what lives."""
    live = networks.some_dead(config, seed, residual, heads)
    config = dataclasses.replace(config, dead_channels=residual)
    return config, networks.masked(networks.parameters(config), live), live


@functools.partial(jax.jit, static_argnums=1)
def gradient(params, config):
    cost = lambda p: next_token(p, networks.rows(), networks.network(config)).total  # noqa: E731
    return jax.grad(cost)(params)


def begun(params, make_optimizer):
    """The state of a run before its first step."""
    return jax.jit(functools.partial(init_state, make_optimizer=make_optimizer))(params)


def stepped(config, make_optimizer=ADAMW, microbatches=1):
    return functools.partial(
        train_step,
        piece_bytes_V=jnp.ones(networks.VOCAB),
        network=networks.network(config),
        objective=next_token,
        make_optimizer=make_optimizer,
        schedule=optax.constant_schedule(1e-2),
        sources=1,
        microbatches=microbatches,
    )


def layout_of(config):
    """Blocks that are applied in turns have to stay one stack."""
    return "padded" if config.stacks[0].order == "reverse" else "stacks"


@EACH
def test_the_number_of_parameters_is_that_of_the_smaller_network(config):
    whole = groups.everything(config)
    assert groups.parameters(config, groups.counts(whole)) == parameter_count(config)
    if layout_of(config) == "padded":
        config = dataclasses.replace(
            config, stacks=(dataclasses.replace(config.stacks[0], layers=1),)
        )
    live = networks.some_dead(config)
    smaller = compacted(config, live).config
    assert parameter_count(smaller) == groups.parameters(config, groups.counts(live))
    assert parameter_count(smaller) < parameter_count(config)


@EACH
def test_the_size_of_a_group_is_what_a_network_without_it_is_smaller_by(config):
    live = networks.some_dead(config)
    number = groups.counts(live)
    whole, sizes = groups.parameters(config, number), groups.sizes(config, number)
    fewer = dataclasses.replace(number, residual_D=number.residual_D - 1)
    assert whole - groups.parameters(config, fewer) == sizes.residual_D
    for i in range(len(config.stacks)):
        for field in groups.FIELDS.values():
            changed = jax.tree.map(np.copy, number)
            getattr(changed.stacks[i], field)[0] -= 1
            size = getattr(sizes.stacks[i], field)[0]
            assert whole - groups.parameters(config, changed) == size


@pytest.mark.parametrize(
    "make_optimizer",
    [ADAMW, pytest.param(MUON, marks=pytest.mark.slow)],
    ids=["adamw", "muon"],
)
def test_what_is_dead_has_no_gradient_and_stays_zero(make_optimizer):
    config = dataclasses.replace(networks.TWO, dead_channels=True)
    live = networks.some_dead(config, heads=False)
    step = jax.jit(stepped(config, make_optimizer))
    state = begun(networks.parameters(config), make_optimizer)
    for seed in range(3):  # so that there are moments
        state, _ = step(state, networks.rows(seed=seed))
    only_weights = dataclasses.replace(state, params=networks.masked(state.params, live))
    revived, _ = step(only_weights, networks.rows(seed=3))
    assert dead_weights(revived.params, live).any()  # moments would bring them back
    state = networks.masked(state, live)
    assert not dead_weights(gradient(state.params, config), live).any()
    for seed in range(20):
        state, metrics = step(state, networks.rows(seed=seed))
    assert not dead_weights(state.params, live).any() and metrics["gradient_norm"] > 0


def dead_weights(tree, live):
    """The weights of dead groups, in a row."""
    ones = jax.tree.map(np.ones_like, tree)
    dead = jax.tree.map(lambda x: x == 0, networks.masked(ones, live))
    return np.concatenate(
        [np.asarray(x[d]) for x, d in zip(*map(jax.tree.leaves, (tree, dead)), strict=True)]
    )


def test_moments_that_do_not_look_like_weights_are_refused():
    params = networks.parameters(networks.PLAIN)
    state = optax.adafactor(1e-3, min_dim_size_to_factor=4).init(params)
    with pytest.raises(UserError, match="cannot be cut"):
        groups.masked(state, groups.everything(networks.PLAIN))


def test_a_dead_query_head_of_a_kv_head_that_lives_has_a_gradient():
    """Its query is 0, so it attends to all alike and gives their mean: its `out` would come back."""
    live = groups.everything(networks.PLAIN)
    live.stacks[0].heads_LN[0, ::2] = False
    params = networks.masked(networks.parameters(networks.PLAIN), live)
    found = gradient(params, networks.PLAIN)["stack_0"]["attention"]
    assert (found["out"][0, ::2] != 0).any() and not (found["query"][0, :, ::2] != 0).any()


def same_outputs(config, params, live, layout):
    compact = compacted(config, live, layout=layout)
    smaller = networks.smaller(params, compact)
    tokens = networks.rows()["tokens"][:, :-1]

    @functools.partial(jax.jit, static_argnums=1)
    def logits(params, config):
        return transformer.logits(params, config, transformer.apply(params, config, tokens))

    np.testing.assert_allclose(logits(smaller, compact.config), logits(params, config), atol=1e-5)


QUICK = ("two stacks, biases", "stacks"), ("plain", "padded"), ("relu, reverse", "stacks")


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[] if (name, layout) in QUICK else pytest.mark.slow)
        for name in networks.NETWORKS
        for layout in ("stacks", "padded")
    ],
)
def test_the_smaller_network_is_the_same_one(name, layout):
    """Outputs, and all that a training step makes of it, moments and all.

    A step only where no query head is dead whose KV head lives: see the test above.
    """
    config = networks.NETWORKS[name]
    if layout == "stacks" and layout_of(config) == "padded":
        with pytest.raises(UserError, match="applied in turns"):
            compacted(config, networks.some_dead(config), layout=layout)
        return
    in_turns = layout_of(config) == "padded"
    same_outputs(*pruned(config, heads=not in_turns), layout)
    config, params, live = pruned(config, heads=False)
    multiple = 10 if layout == "padded" else 1  # of 16 channels 4 more stay, which are dead
    compact = compacted(config, live, layout=layout, multiple=multiple)
    assert compact.config.width == (20 if layout == "padded" else 16)
    assert compact.config.dead_channels == (layout == "padded")
    smaller = networks.smaller(params, compact)
    state, small = begun(params, ADAMW), begun(smaller, ADAMW)
    step, small_step = jax.jit(stepped(config)), jax.jit(stepped(compact.config))
    for seed in range(2):
        state, metrics = step(state, networks.rows(seed=seed))
        small, of_small = small_step(small, networks.rows(seed=seed))
        np.testing.assert_allclose(of_small["loss"], metrics["loss"], rtol=1e-5)
    expected = networks.smaller(state, compact, jax.eval_shape(lambda: small))
    for path, leaf in flat(expected).items():
        np.testing.assert_allclose(flat(small)[path], leaf, atol=2e-5, err_msg=path)


@pytest.mark.parametrize("layout", ["stacks", "padded"])
def test_taking_out_can_give_up_the_network_as_it_goes(layout):
    """The result is the same, and of the old weights nothing is left."""
    config, params, live = pruned(networks.TWO)
    compact = compacted(config, live, layout=layout)
    shapes = transformer.shapes(compact.config)
    kept = taken(params, compact, shapes)
    given = jax.tree.map(jnp.copy, params)
    found = taken(given, compact, shapes, consumed=True)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    jax.tree.map(np.testing.assert_array_equal, found, kept)


def test_widths_are_rounded_up_with_zeros():
    config, params, live = pruned(networks.PLAIN, residual=False)
    compact = compacted(config, live, multiple=8)
    assert {s.mlp_width % 8 for s in compact.config.stacks} <= {
        0,
        networks.PLAIN.stacks[0].mlp_width % 8,
    }
    smaller = networks.smaller(params, compact)
    number = groups.parameters(config, groups.counts(live))
    zeros = sum(int((leaf == 0).sum()) for leaf in jax.tree.leaves(smaller))
    assert zeros == parameter_count(compact.config) - number > 0


def test_a_network_that_is_uncut_is_itself():
    for dead_channels in (False, True):
        config = dataclasses.replace(networks.TWO, dead_channels=dead_channels)
        params, compact = networks.parameters(config), uncut(config)
        assert compact.config == config
        jax.tree.map(np.testing.assert_array_equal, networks.smaller(params, compact), params)


def test_the_record_says_where_everything_was():
    config, params, live = pruned(networks.TWO)
    compact = compacted(config, live)
    smaller = networks.smaller(params, compact)
    record = compact.to_dict()
    blocks = iter(record["blocks"])
    residual = record["residual"]
    for i, stack in enumerate(compact.config.stacks):
        for layer in range(stack.layers):
            was = next(blocks)
            up_DF = params[f"stack_{was['stack']}"]["mlp"]["up"][was["layer"]]
            found = smaller[f"stack_{i}"]["mlp"]["up"][layer]
            np.testing.assert_array_equal(found, up_DF[np.ix_(residual, was["F"])])
            out_NHD = params[f"stack_{was['stack']}"]["attention"]["out"][was["layer"]]
            found = smaller[f"stack_{i}"]["attention"]["out"][layer]
            np.testing.assert_array_equal(
                found, out_NHD[np.array(was["N"])][:, :, np.array(residual)]
            )
    assert next(blocks, None) is None


def test_what_is_known_of_groups_goes_with_them():
    """The scores of groups are those that their weights have in the smaller network."""
    config, params, live = pruned(networks.TWO)
    compact = compacted(config, live)
    smaller = networks.smaller(params, compact)
    before, after = (
        networks.measures(c, p).scores("magnitude")
        for c, p in ((config, params), (compact.config, smaller))
    )
    equal = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(equal, compact.groups(before), after)


def test_one_program_serves_all_cuts():
    one_shot.cut.clear_cache()  # of what other tests have cut
    for seed in range(3):
        one_shot.cut(
            jax.tree.map(jnp.copy, networks.parameters(networks.PLAIN)),
            networks.some_dead(networks.PLAIN, seed),
        )
    assert one_shot.cut._cache_size() == 1


def test_a_block_whose_groups_are_not_known_is_refused():
    own = dataclasses.replace(networks.PLAIN, block="tests_block:Block")
    with pytest.raises(UserError):
        groups.everything(own)
