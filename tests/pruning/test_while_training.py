"""Pruning inside of training: the cuts come when they should, are resumed bit for bit, and hold."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pruned as networks
import pytest
import runs
import tiny
from pruned import TARGET, WHOLE, config, efficiently

from mobilellm_jax.errors import UserError
from mobilellm_jax.leaves import flat
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.pruning import efficient, groups
from mobilellm_jax.pruning.measures import Measures
from mobilellm_jax.pruning.strategies import View
from mobilellm_jax.pruning.while_training import schedule_of
from mobilellm_jax.training.checkpoint import load_model, write_model
from mobilellm_jax.training.objectives import next_token
from mobilellm_jax.training.setup import set_up
from mobilellm_jax.training.step import Pruning, init_state, train_step

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory):
    """A run that prunes: its workdir, its last state."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, runs.run(config(plan), workdir)


def test_cuts_come_when_they_are_due_and_meet_their_targets(whole):
    workdir, state = whole
    cuts = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    cuts = [record for record in cuts if record["kind"] == "cut"]
    assert [record["step"] for record in cuts] == [2, 4, 7, 9]
    for number, record in enumerate(cuts, 1):
        assert record["target"] == WHOLE - (WHOLE - TARGET) * number // 4
        assert record["target"] - 3 * tiny.MODEL.width < record["parameters"] <= record["target"]
    live = jax.device_get(state.pruning.live)
    assert groups.parameters(tiny.MODEL, groups.counts(live)) == cuts[-1]["parameters"]
    gone = [index for record in cuts for index in record["cut"]["mlp"].get("0", [])]
    assert sorted(gone) == np.flatnonzero(~live.stacks[0].mlp_LF[0]).tolist()


def test_what_is_dead_stays_zero_to_the_end(whole):
    state = whole[1]
    live = jax.device_get(state.pruning.live)
    for tree in (state.params, state.opt_state):
        kept = flat(networks.masked(tree, live))
        assert kept and all((leaf == flat(tree)[path]).all() for path, leaf in kept.items())
    assert not live.stacks[0].mlp_LF.all()
    assert (state.params["stack_0"]["mlp"]["up"] == 0).any()


@pytest.mark.parametrize("stop", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_bit_for_bit(plan, whole, tmp_path, stop):
    """At a cut, and between two."""
    runs.run(config(plan), tmp_path, stop_at=stop)
    state = runs.run(config(plan), tmp_path)
    assert runs.bits(state) == runs.bits(whole[1])


def test_another_schedule_is_another_run(plan, whole):
    with pytest.raises(UserError, match="belongs to another run .*pruning.target"):
        runs.run(config(plan, **{"pruning.target": TARGET + 1}), whole[0])


def test_one_program_serves_all_cuts(plan, tmp_path, monkeypatch):
    made = []
    from mobilellm_jax import train

    def noted(*given):
        made.append(set_up(*given))
        return made[-1]

    monkeypatch.setattr(train, "set_up", noted)
    traces = []
    monkeypatch.setattr(
        "mobilellm_jax.training.step.attached",
        lambda *given, f=train_attached(): traces.append(1) or f(*given),
    )
    runs.run(config(plan, steps=6, **{"pruning.cuts": 3, "pruning.begin": 1}), tmp_path)
    assert len(made) == 1 and len(traces) == 1


def train_attached():
    from mobilellm_jax.training import step

    return step.attached


def test_a_fork_goes_on_pruning_or_says_why_not(plan, whole, tmp_path):
    forked = {"init_from": f"{whole[0]}@4", "init_state": "all", "schedule.peak": 0.0}
    state = runs.run(config(plan, **forked), tmp_path / "fork")
    before = load_model(whole[0] / "checkpoints" / "4").params
    live = jax.device_get(state.pruning.live)
    for path, leaf in flat(networks.masked(before, live)).items():  # no rate: only the cuts act
        np.testing.assert_array_equal(flat(state.params)[path], leaf)
    runs.run(tiny.config(plan, 8), tmp_path / "plain")
    with pytest.raises(UserError, match="that run does not prune and this one does"):
        forked["init_from"] = f"{tmp_path / 'plain'}@4"
        runs.run(config(plan, **forked), tmp_path / "refused")


@pytest.mark.parametrize(
    ("key", "value"),
    [("score", "fisher"), ("strategy.use", "mobilellm_jax.pruning.efficient:efficient")],
)
def test_a_fork_keeps_what_is_added_up_and_remembered(plan, whole, tmp_path, key, value):
    changed = {f"pruning.{key}": value, "model.dead_channels": True}
    forked = {"init_from": f"{whole[0]}@4", "init_state": "all", **changed}
    with pytest.raises(UserError, match=f"config.pruning.{key} is .* there and '{value}' here"):
        runs.run(config(plan, **forked), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


# --- Scores in the step


def stepped(config, microbatches=1, scored="taylor"):
    return functools.partial(
        train_step,
        piece_bytes_V=jnp.ones(networks.VOCAB),
        network=networks.network(config),
        objective=next_token,
        make_optimizer=lambda rate: optax.sgd(rate),
        schedule=optax.constant_schedule(0.0),
        sources=1,
        microbatches=microbatches,
        scored=scored,
    )


def pruning_state(config, live=None):
    zeros = groups.of_widths(config, lambda *shape: jnp.zeros(shape))
    live = groups.everything(config) if live is None else live
    pruning = Pruning(jax.tree.map(jnp.asarray, live), zeros, None)
    return init_state(networks.parameters(config), optax.sgd, pruning=pruning)


@pytest.mark.parametrize(
    ("scored", "microbatches"),
    [
        ("taylor", 2),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in (("fisher", 2), ("fisher", 1))),
    ],
)
def test_steps_add_up_the_scores_of_their_microbatches(scored, microbatches):
    config, batch = networks.TWO, networks.rows(4)
    state = pruning_state(config)
    step = jax.jit(stepped(config, microbatches, scored))
    for _ in range(2):
        state, metrics = step(state, batch)
    parts = [{k: x[i::microbatches] for k, x in batch.items()} for i in range(microbatches)]
    params = networks.parameters(config)
    wanted = Measures(params, networks.network(config), parts, 0).scores(scored)
    scale = float(metrics["tokens"].sum()) ** (2 if scored == "fisher" else 1)
    for a, b in zip(*map(jax.tree.leaves, (state.pruning.scores, wanted)), strict=True):
        np.testing.assert_allclose(a, 2 * b / scale, rtol=1e-4)
    # A step that is not finite adds nothing.
    spoilt = dataclasses.replace(state, params=jax.tree.map(lambda x: x * np.nan, state.params))
    after, metrics = step(spoilt, batch)
    assert metrics["skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, after.pruning, state.pruning)


def test_dead_query_heads_stay_dead():
    live = groups.everything(networks.PLAIN)
    live.stacks[0].heads_LN[1, ::2] = False
    state = pruning_state(networks.PLAIN, live)
    state = dataclasses.replace(state, params=networks.masked(state.params, live))
    step = functools.partial(stepped(networks.PLAIN), schedule=optax.constant_schedule(0.1))
    state, _ = jax.jit(step)(state, networks.rows())
    for path, leaf in flat(networks.masked(state.params, live)).items():
        np.testing.assert_array_equal(leaf, flat(state.params)[path])


@pytest.mark.slow
def test_eight_devices_prune_like_one(plan, whole, tmp_path):
    changes = {"mesh.data": 2, "mesh.fsdp": 4}
    state = runs.run(config(plan, **changes), tmp_path, devices=jax.devices())
    for a, b in zip(
        *map(jax.tree.leaves, (state.pruning.live, whole[1].pruning.live)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    for path, leaf in flat(state.params).items():
        np.testing.assert_allclose(leaf, flat(whole[1].params)[path], atol=2e-4, err_msg=path)


# --- EfficientLLM


def test_efficient_cuts_the_least_kind_in_all_layers(plan, tmp_path):
    state = runs.run(efficiently(plan), tmp_path)
    live = jax.device_get(state.pruning.live)
    number = groups.counts(live)
    for of in number.stacks:
        for count in (of.mlp_LF, of.heads_LN, of.kv_heads_LK):
            assert (count == count[0]).all()
    records = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    cuts = [r for r in records if r["kind"] == "cut"]
    assert len(cuts) == 9 and cuts[-1]["parameters"] <= TARGET
    for record in cuts:
        worth = {k.partition("/")[2]: v for k, v in record.items() if k.startswith("saliency/")}
        assert not worth or record["types"][-1] == min(worth, key=worth.get)
    assert any("types" in record for record in cuts)


def test_a_network_that_was_trained_without_begins_to_prune_its_stream(plan, tmp_path):
    runs.run(tiny.config(plan, 4), tmp_path / "before")
    changes = {"init_from": str(tmp_path / "before"), "pruning.target": int(0.9 * WHOLE)}
    changes |= {"pruning.strategy.types": ("residual",), "steps": 6, "pruning.cuts": 2}
    state = runs.run(efficiently(plan, **changes), tmp_path / "after")
    live = np.asarray(state.pruning.live.residual_D)
    assert not live.all()
    assert not np.asarray(state.params["final_norm"]["scale"])[~live].any()


def test_a_scale_of_zero_is_refused_where_it_would_mean_death(plan, tmp_path):
    runs.run(tiny.config(plan, 4), tmp_path / "before")
    loaded = load_model(tmp_path / "before")
    leaves = dict(flat(jax.device_get(loaded.params)))
    leaves["final_norm/scale"] = np.where(np.arange(tiny.MODEL.width) == 3, 0, 1).astype(np.float32)
    write_model(leaves, loaded.model, loaded.tokenizer, {}, tmp_path / "zero")
    with pytest.raises(UserError, match="final_norm/scale has a scale of exactly 0"):
        runs.run(efficiently(plan, init_from=str(tmp_path / "zero")), tmp_path / "after")


def test_units_by_brute_force():
    config = dataclasses.replace(networks.PLAIN, dead_channels=True)
    live = groups.everything(config)
    rng = np.random.default_rng(3)
    scores = groups.of_widths(config, lambda *shape: rng.random(shape) + 0.1)

    class Fixed:
        def scores(self, name):
            return scores

    number = groups.counts(live)
    size = groups.sizes(config, number)
    stack, score = size.stacks[0], scores.stacks[0]
    by_hand = {
        "mlp": np.mean([row.min() / stack.mlp_LF[0] for row in score.mlp_LF]),
        "residual": scores.residual_D.min() / size.residual_D,
        "kv_heads": np.mean(
            [r.min() / (stack.kv_heads_LK[0] + 2 * stack.heads_LN[0]) for r in score.kv_heads_LK]
        ),
        "heads": np.mean(
            [
                min(r[2 * k : 2 * k + 2]) / stack.heads_LN[0]
                for r in score.heads_LN
                for k in range(3)
            ]
        ),
    }
    whole = groups.parameters(config, number)
    found = efficient.efficient(View(config, live, number, None, Fixed()), whole - 1)
    for kind, value in by_hand.items():
        np.testing.assert_allclose(found.measured[f"saliency/{kind}"], value)
    (kind,) = found.measured["types"]
    assert kind == min(by_hand, key=by_hand.get)


def sorted_worth(kind, live, scores, number, size, unit):
    """Saliency per parameter of a kind's next unit, by sorting everything."""
    if kind == "residual":
        if number.residual_D <= unit:
            return np.inf
        return np.sort(scores.residual_D[live.residual_D])[:unit].mean() / size.residual_D
    found = []
    for of, score, each in zip(live.stacks, scores.stacks, size.stacks, strict=True):
        for layer in range(len(of.mlp_LF)):
            alive = getattr(of, {"mlp": "mlp_LF"}.get(kind, "kv_heads_LK"))[layer]
            heads_KG, score_KG = of.heads_LKG[layer], score.heads_LKG[layer]
            fewest = heads_KG[alive].sum(-1).min() if kind == "heads" else alive.sum()
            if fewest <= (unit if kind == "mlp" else 1):
                return np.inf
            if kind == "mlp":
                least = np.sort(score.mlp_LF[layer][alive])[:unit].mean()
                found.append(least / each.mlp_LF[layer])
            elif kind == "kv_heads":
                weight = each.kv_heads_LK[layer] + heads_KG.sum(-1).max() * each.heads_LN[layer]
                found.append(score.kv_heads_LK[layer][alive].min() / weight)
            else:
                least = [s[h].min() for s, h in zip(score_KG[alive], heads_KG[alive], strict=True)]
                found.append(np.mean(least) / each.heads_LN[layer])
    return np.mean(found)


def sorted_without(live, score, unit):
    """Of the last axis all that live but the `unit` least; of equals the last go."""
    flat_live, flat_score = live.reshape(-1, live.shape[-1]), score.reshape(-1, live.shape[-1])
    left = np.zeros_like(flat_live)
    for row, alive, value in zip(left, flat_live, flat_score, strict=True):
        at = [i for i in np.argsort(-value, kind="stable") if alive[i]]
        row[at[: alive.sum() - unit]] = True
    return left.reshape(live.shape)


@pytest.mark.parametrize("unit", [1, 3])
@pytest.mark.parametrize("levels", [4, 10_000], ids=["equals", "unequal"])
@pytest.mark.parametrize("network", [networks.PLAIN, networks.TWO], ids=["plain", "two stacks"])
def test_many_units_are_those_that_sorting_everything_gives(network, levels, unit):
    config = dataclasses.replace(network, dead_channels=True)
    live = groups.everything(config)
    rng = np.random.default_rng(levels)
    # In units of what a group weighs, so that every kind has its turn.
    sizes = groups.sizes(config, groups.counts(live))
    scores = groups.of_widths(
        config, lambda *shape: rng.integers(1, levels, shape).astype(np.float32)
    )
    scores = jax.tree.map(lambda x, n: x * np.asarray(n)[..., None], scores, sizes)

    class Fixed:
        def scores(self, name):
            return scores

    whole = groups.parameters(config, groups.counts(live))
    target = int(0.35 * whole)
    found = efficient.efficient(View(config, live, None, None, Fixed()), target, unit=unit)
    order = []
    while groups.parameters(config, number := groups.counts(live)) > target:
        size = groups.sizes(config, number)
        worth = {
            kind: sorted_worth(kind, live, scores, number, size, unit) for kind in efficient.TYPES
        }
        order.append(kind := min(worth, key=worth.get))
        residual, stacks = live.residual_D, live.stacks
        if kind == "residual":
            residual = sorted_without(residual, scores.residual_D, unit)
        else:
            stacks = tuple(
                without(kind, of, score, unit)
                for of, score in zip(stacks, scores.stacks, strict=True)
            )
        live = groups.Groups(residual, stacks)
    assert found.measured["types"] == order and len({*order}) > 2
    for a, b in zip(*map(jax.tree.leaves, (found.live, live)), strict=True):
        np.testing.assert_array_equal(a, b)


def without(kind, of, score, unit):
    mlp, heads, kv_heads = of.mlp_LF, of.heads_LN, of.kv_heads_LK
    if kind == "mlp":
        mlp = sorted_without(mlp, score.mlp_LF, unit)
    elif kind == "kv_heads":
        kv_heads = sorted_without(kv_heads, score.kv_heads_LK, 1)
        heads = (of.heads_LKG & kv_heads[..., None]).reshape(heads.shape)
    else:
        heads = sorted_without(of.heads_LKG, score.heads_LKG, 1).reshape(heads.shape)
    return groups.StackGroups(mlp, heads, kv_heads)


# --- Schedules


def test_growing_spacing_gives_each_cut_a_linearly_larger_share(plan):
    c = config(
        plan, steps=2101, **{"pruning.begin": 1, "pruning.cuts": 20, "pruning.spacing": "growing"}
    )
    found = schedule_of(c, 2101)
    lengths = np.diff([*found.steps, 2101])
    np.testing.assert_allclose(lengths, 2100 * 2 * np.arange(1, 21) / (20 * 21), atol=1)
    assert found.targets[-1] == TARGET and len(found.steps) == 20


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"pruning.target": WHOLE}, "below the"),
        ({"pruning.target": -5}, "must be positive"),
        ({"pruning.target": 100}, "is below the"),
        ({"pruning.spacing": "cubic"}, "even, growing"),
        ({"pruning.begin": 12}, "must be steps of the run"),
        ({"pruning.end": 50}, "must be steps of the run"),
        ({"pruning.cuts": 50}, "do not fit"),
        ({"pruning.cuts": 0}, "do not fit"),
        ({"pruning.score": "magnitude"}, "taylor, taylor_slice, fisher"),
        ({"pruning.strategy.use": "mobilellm_jax.pruning.flap:flap"}, "prune in one shot"),
        ({"pruning.strategy.use": "mobilellm_jax.pruning.slicegpt:slicegpt"}, "prune in one shot"),
        ({"pruning.strategy.use": "mobilellm_jax.pruning.strategies:adapted"}, "has no 'adapted'"),
        ({"pruning.strategy.scores": "taylor"}, "not an argument of"),
        ({"pruning.strategy.score": "taylr"}, "is not one of taylor"),
        (
            {"pruning.strategy.use": "mobilellm_jax.pruning.efficient:efficient"},
            "dead_channels=True",
        ),
    ],
)
def test_bad_input_is_met_before_anything_is_computed(plan, tmp_path, changes, word):
    with pytest.raises(UserError, match=word):
        runs.run(config(plan, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_network_without_pruning_is_as_it_was():
    assert ModelConfig.from_dict(tiny.MODEL.to_dict()) == tiny.MODEL
