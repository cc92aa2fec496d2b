"""Compaction inside of a run: the same run with less to compute, from the cut on."""

import json
import shutil

import jax
import numpy as np
import pruned as networks
import pytest
import runs
import tiny
from pruned import TARGET, WHOLE, config, efficiently

from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.stored import open_model
from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import parameter_count
from mobilellm_jax.pruning import groups
from mobilellm_jax.pruning.compaction import Compact, compacted, uncut
from mobilellm_jax.training.checkpoint import saved_steps

pytestmark = pytest.mark.usefixtures("shared_programs")
HALF_WAY = WHOLE - (WHOLE - TARGET) // 2  # that of the second of four cuts, after step 4
SIZES = {"pruning.compact_at": (HALF_WAY, TARGET), "checkpoint.keep": 1}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory):
    """A run that prunes and compacts twice: its workdir, its last state."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, runs.run(config(plan, **SIZES), workdir)


@pytest.fixture(scope="module")
def zeros(plan, tmp_path_factory):
    """The workdir of the same run without compaction."""
    workdir = tmp_path_factory.mktemp("zeros")
    runs.run(config(plan), workdir)
    return workdir


@pytest.fixture(scope="module")
def stopped(plan, tmp_path_factory):
    """The same run stopped between its compactions and resumed: its last state.

    And the sizes of the networks that tasks were asked of, which are no part of training.
    """
    asked = []

    def judge(config, run):
        def judged(params, between):
            assert jax.tree.map(np.shape, params) == jax.tree.map(
                lambda x: x.shape, transformer.shapes(run.model)
            )
            asked.append(parameter_count(run.model))
            return {"task acc": 0.0}

        return judged

    c, workdir = config(plan, **SIZES, **{"eval.tasks_every": 3}), tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mobilellm_jax.train._judge", judge)
        runs.run(c, workdir, stop_at=5)
        return runs.run(c, workdir), asked


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(config, id="adapt"),
        pytest.param(efficiently, id="efficient", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "layout",
    [
        {},
        pytest.param({"pruning.layout": "padded"}, marks=pytest.mark.slow),
        pytest.param({"pruning.multiple": 8}, marks=pytest.mark.slow),
    ],
    ids=["stacks", "padded", "rounded"],
)
def test_a_run_that_compacts_is_the_run_that_does_not(plan, whole, zeros, tmp_path, make, layout):
    """Losses, scores and so cuts, weights: all of it, but for the order in which sums are formed."""
    cuts = {"pruning.cuts": 4, "pruning.begin": 2}
    before, (after, state) = zeros, whole
    if make is not config:
        before = tmp_path / "zeros"
        runs.run(make(plan, **cuts), before)
    if make is not config or layout:
        after = tmp_path / "out"
        state = runs.run(make(plan, **SIZES, **layout, **cuts), after)
    for kind in ("train", "cut"):
        old, new = (runs.lines(workdir, kind) for workdir in (before, after))
        assert list(old) == list(new)
        for step in old:
            if kind == "cut":
                assert {k: v for k, v in old[step].items() if k in ("parameters", "cut")} == {
                    k: v for k, v in new[step].items() if k in ("parameters", "cut")
                }
            else:
                for name in ("loss", "gradient_norm"):
                    np.testing.assert_allclose(old[step][name], new[step][name], rtol=2e-5)
    facts = runs.lines(after, "compaction")
    assert list(facts) == [4, 9]
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert size == facts[9]["parameters"] and facts[9]["live"] <= TARGET
    if not layout:
        assert size == facts[9]["live"]


def test_a_stopped_run_goes_on_bit_for_bit(whole, stopped):
    """Between two compactions; at one a fork does, below."""
    assert runs.bits(stopped[0]) == runs.bits(whole[1])


@pytest.mark.slow
@pytest.mark.parametrize("stop", [4, 6, 9])
def test_a_run_stopped_anywhere_goes_on_bit_for_bit(plan, whole, tmp_path, stop):
    """At a compaction, and between two."""
    runs.run(config(plan, **SIZES), tmp_path, stop_at=stop)
    state = runs.run(config(plan, **SIZES), tmp_path)
    assert runs.bits(state) == runs.bits(whole[1])


def test_every_size_is_left_as_a_checkpoint_of_a_smaller_network(whole):
    for step, size in ((4, HALF_WAY), (9, TARGET), (12, TARGET)):
        stored = open_model(whole[0] / "checkpoints" / str(step))
        assert size - 3 * tiny.MODEL.width < parameter_count(stored.model) <= size
        assert all((np.asarray(leaf[:]) != 0).any() for leaf in stored.leaves.values())
    assert saved_steps(whole[0] / "checkpoints") == [4, 9, 12]


def test_the_record_says_where_everything_was_at_the_beginning(whole):
    """What was cut and what is kept are together all there was, numbered as in the first network."""
    kept = open_model(whole[0]).meta["pruning"]["kept"]
    for kind, axis in (("mlp", "F"), ("kv_heads", "K"), ("heads", "N")):
        for number, block in enumerate(kept["blocks"]):
            cuts = runs.lines(whole[0], "cut").values()
            gone = [i for cut in cuts for i in cut["cut"].get(kind, {}).get(str(number), [])]
            stack = tiny.MODEL.stacks[block["stack"]]
            count = {"F": stack.mlp_width, "K": stack.kv_heads, "N": stack.heads}[axis]
            assert sorted([*gone, *block[axis]]) == list(range(count))


def test_tasks_are_asked_of_the_network_as_it_is(stopped):
    """Before, between and behind compactions, and after a resume."""
    asked = stopped[1]
    assert len(asked) == 4 and WHOLE == asked[0] > asked[1] > asked[2] == asked[3]


def test_two_compactions_are_one():
    """Of a random network: taken out twice, the leaves are those that the record of both names."""
    params = networks.parameters(networks.TWO)
    one = compacted(networks.TWO, networks.some_dead(networks.TWO))
    two = compacted(one.config, networks.some_dead(one.config, seed=1), multiple=2)
    after = networks.smaller(params, one)
    after = networks.smaller(after, two)
    both = two.after(one.after(uncut(networks.TWO)))
    again = Compact.from_dict(both.config, both.to_dict())
    at_once = networks.smaller(params, again)
    for path, leaf in flat(after).items():
        np.testing.assert_array_equal(leaf, flat(at_once)[path])
    live = groups.everything(networks.TWO)
    of_groups = jax.tree.map(lambda x: np.arange(x.size).reshape(x.shape), live)
    found = both.groups(of_groups)
    assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, groups.everything(both.config))


def test_a_size_is_cooled_down_by_a_run_of_its_own(plan, whole, zeros, tmp_path):
    """From its compaction on with moments and rows, without pruning; from elsewhere it is refused."""
    model = open_model(whole[0] / "checkpoints/4").model
    forked = {"init_from": f"{whole[0]}@4", "init_state": "all", "pruning.target": 0}
    c = config(plan, **forked, **{"schedule.peak": 0.0})
    with c.unlocked():
        c.model = model.to_dict()
    state = runs.run(c, tmp_path / "cooled")
    assert state.pruning is None and int(state.step) == 12
    stored = flat(open_model(whole[0] / "checkpoints/4").params())
    for path, leaf in flat(state.params).items():  # no rate: the weights are those
        np.testing.assert_array_equal(leaf, stored[path])
    shutil.copytree(zeros, tmp_path / "dead")
    forked["init_from"] = f"{tmp_path / 'dead'}@8"
    described = tmp_path / "dead/checkpoints/8/meta/metadata"
    for before in (False, True):  # as runs were described that could not compact yet
        if before:
            meta = json.loads(described.read_text())
            for key in ("compact_at", "layout", "multiple"):
                del meta["config"]["pruning"][key]
            described.write_text(json.dumps(meta))
        with pytest.raises(UserError, match="parts are dead"):
            runs.run(config(plan, **forked), tmp_path / "refused")


def test_a_fork_goes_on_pruning_where_the_network_is_smaller(plan, whole, tmp_path):
    c = config(plan, **SIZES, init_from=f"{whole[0]}@4", init_state="all")
    assert runs.bits(runs.run(c, tmp_path)) == runs.bits(whole[1])


@pytest.mark.slow
@pytest.mark.parametrize("use", [{}, {"pruning.strategy.update": True}], ids=["", "update"])
def test_eight_devices_compact_like_one(plan, tmp_path, use):
    """Weights in pieces, also through the second-order update."""
    states = [
        runs.run(config(plan, **SIZES, **use, **mesh), tmp_path / str(len(mesh)), devices=devices)
        for mesh, devices in (
            ({}, tiny.one_device()),
            ({"mesh.data": 2, "mesh.fsdp": 4}, jax.devices()),
        )
    ]
    one, eight = (flat(state.params) for state in states)
    assert {p: x.shape for p, x in one.items()} == {p: x.shape for p, x in eight.items()}
    for path, leaf in one.items():
        np.testing.assert_allclose(leaf, eight[path], atol=4e-4, err_msg=path)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"pruning.compact_at": (TARGET, HALF_WAY)}, "must be falling"),
        ({"pruning.compact_at": (WHOLE,)}, "must be falling"),
        ({"pruning.compact_at": (TARGET - 1,)}, "not below config.pruning.target"),
        ({"pruning.compact_at": (TARGET + 2, TARGET + 1)}, "passed in one cut"),
        ({"pruning.layout": "ragged"}, "stacks, padded"),
        ({"pruning.multiple": 0}, "at least 1"),
    ],
)
def test_bad_input_is_met_before_anything_is_computed(plan, tmp_path, changes, word):
    with pytest.raises(UserError, match=word):
        runs.run(config(plan, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
