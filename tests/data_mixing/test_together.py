"""Members of a group are solo runs; a group that was stopped comes to the same bits; folders are guarded."""

import dataclasses
import signal

import jax
import numpy as np
import pytest
import runs as solo_runs
import tiny

from data_mixing import derivatives, together
from data_mixing.runs import MEASURED, UNFINISHED, Member
from data_mixing.together import train_together
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.errors import UserError
from mobilellm_jax.leaves import flat
from mobilellm_jax.parallel.mesh import one_device
from mobilellm_jax.training.checkpoint import load_model

STEPS = 5


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The path of a plan."""
    return tiny.corpus(tmp_path_factory.mktemp("together"))


@pytest.fixture(scope="session")
def config(data):
    """Members share this."""
    config = tiny.config(data, STEPS)
    config.global_batch = 8
    config.checkpoint.every = 2
    return config


@pytest.fixture(scope="session")
def probes():
    """Rows of words, and some of sums, more of them than a batch."""
    tokenizer, rng = tiny.tokenizer(), np.random.default_rng(0)
    rows = rng.integers(3, tokenizer.vocab_size, (11, tiny.ROW + 1)).astype(np.int32)
    rows[:, 0] = rows[3, 9:] = tokenizer.bos_id
    return {"words": rows, "sums": rows[:2] + 0}


@pytest.fixture(scope="session")
def members(data):
    """Of different weights, orders of rows, seeds, and one with fewer sources."""
    plan = Plan.load(data)

    def with_(seed, **weights):
        stage = dataclasses.replace(plan.stages[0], weights=weights)
        sources = tuple(s for s in plan.sources if s.name in weights)
        return dataclasses.replace(plan, seed=seed, sources=sources, stages=(stage,))

    plans = with_(0, words=0.7, sums=0.3), with_(5, words=0.2, sums=0.8), with_(0, sums=1.0)
    seeds = 3, 3, 8
    return [Member(f"m{i}", plans[i], seeds[i]) for i in range(3)]


@pytest.fixture(scope="session")
def solo(config, members, data, tmp_path_factory):
    """Final weights of each member by `train`."""
    folder, found = tmp_path_factory.mktemp("solo"), {}
    for member in members:
        path = data.parent / f"{member.name}.json"
        member.plan.save(path)
        own = config.copy_and_resolve_references()
        own.plan, own.seed = str(path), member.seed
        found[member.name] = flat(solo_runs.run(own, folder / member.name).params)
    return jax.device_get(found)


def run(config, members, probes, folder, devices=1, **settings):
    settings = {"measure_every": 2, "devices": jax.devices()[:devices], **settings}
    return train_together(config, members, probes, folder, **settings)


@pytest.fixture(scope="session")
def pair(config, members, probes, tmp_path_factory):
    """Three members in groups of two, with two checkpoints of each."""
    folder = tmp_path_factory.mktemp("pair") / "runs"
    return folder, run(config, members, probes, folder, group=2, keep=2)


def check_as_solo(folder, solo):
    for name, expected in solo.items():
        found = flat(load_model(folder / name).params)
        assert found.keys() == expected.keys()
        for path, leaf in found.items():
            np.testing.assert_allclose(leaf, expected[path], rtol=1e-5, atol=1e-5, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize(("group", "devices"), [(1, 1), (3, 1), (4, 4)])
def test_each_member_is_its_solo_run(group, devices, config, members, probes, solo, pair, tmp_path):
    found = run(config, members, probes, tmp_path / "runs", devices, group=group, keep=1)
    check_as_solo(tmp_path / "runs", solo)
    for name, measured in found.items():
        assert measured.steps_M.tolist() == [2, 4, 5]
        for rows, nll_MN in measured.nll_MN.items():
            other = pair[1][name].nll_MN[rows]
            np.testing.assert_allclose(nll_MN, other, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_members_differ(solo):
    first, second, third = (member["embedding"] for member in solo.values())
    assert np.abs(first - second).max() > 1e-3 and np.abs(first - third).max() > 1e-3


@pytest.mark.slow
def test_measured_losses_are_those_of_the_checkpoints(pair, members, probes, config, solo):
    folder, found = pair
    check_as_solo(folder, solo)
    for member, step in [(members[0], 5), (members[2], 2), (members[2], 5)]:
        loaded = load_model(folder / member.name / "checkpoints" / str(step))
        assert loaded.meta["config"]["seed"] == member.seed
        assert loaded.meta["plan_hash"] == member.plan.hash
        network = derivatives.network_of(loaded.model, 1, 2, "float32", 1)
        of = derivatives.differentiated(loaded.params, network, "all", one_device(), 8)
        measured = found[member.name]
        at = measured.steps_M.tolist().index(step)
        for name, rows in probes.items():
            nll_NT, weight_NT = derivatives.losses(of, rows)
            np.testing.assert_array_equal(measured.targets_N[name], weight_NT.sum(1))
            np.testing.assert_allclose(measured.nll_MN[name][at], nll_NT.sum(1), rtol=1e-5)
            mean = nll_NT.sum() / weight_NT.sum()
            assert measured.mean(name)[at] == pytest.approx(mean, rel=1e-5)


def same_files(folder, other):
    """Measurements and weights, bit for bit."""
    for name in ("m0", "m1", "m2"):
        assert (folder / name / MEASURED).read_bytes() == (other / name / MEASURED).read_bytes()
        for step in ("2", "5"):
            paths = [f / name / "checkpoints" / step for f in (folder, other)]
            a, b = (solo_runs.bits(load_model(path).params) for path in paths)
            assert a == b
    assert not (folder / UNFINISHED).exists()


@pytest.mark.slow
def test_a_stopped_program_goes_on_bit_for_bit(
    pair, config, members, probes, tmp_path, monkeypatch
):
    """It dies in the first group; is told to stop there; dies again while it writes the second's results."""
    folder, put_rows = tmp_path / "runs", together.put_rows

    def stopped(mock):
        with monkeypatch.context() as patched:
            patched.setattr(together, *mock)
            run(config, members, probes, folder, group=2, keep=2)

    with pytest.raises(RuntimeError, match="killed"):
        stopped(("put_rows", dying(put_rows, 4)))  # in step 4: a checkpoint of step 2 is there
    assert (folder / "m1" / "checkpoints" / "2").exists()

    def told(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return put_rows(*arguments)

    with pytest.raises(SystemExit) as end:
        stopped(("put_rows", told))
    assert end.value.code == 128 + signal.SIGTERM
    assert (folder / UNFINISHED / "0" / "checkpoints" / "3").exists()
    assert not (folder / "m0" / MEASURED).exists()

    with pytest.raises(RuntimeError, match="killed"):
        stopped(("_finish", dying(together._finish, 2)))
    assert (folder / "m1" / MEASURED).exists() and not (folder / "m2" / MEASURED).exists()
    partial = folder / "m2" / "checkpoints" / "5.partial-00"
    partial.mkdir()
    found = run(config, members, probes, folder, group=2, keep=2)

    for name in ("m0", "m1", "m2"):
        paths = [f / name for f in (folder, pair[0])]
        assert len({(path / MEASURED).read_bytes() for path in paths}) == 1
        for step in ("2", "5"):
            a, b = (
                solo_runs.bits(load_model(path / "checkpoints" / step).params) for path in paths
            )
            assert a == b
    assert not (folder / UNFINISHED).exists() and not partial.exists()
    monkeypatch.setattr(together, "_train_group", None)  # nothing is left to train
    again = run(config, members, probes, folder, group=2, keep=2)
    np.testing.assert_array_equal(again["m1"].nll_MN["sums"], found["m1"].nll_MN["sums"])


def dying(function, call):
    """The function, which dies at one of its calls."""
    calls = []

    def wrapped(*arguments, **settings):
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("killed")
        return function(*arguments, **settings)

    return wrapped


@pytest.mark.slow
def test_other_settings_are_refused(pair, config, members, probes):
    folder, _ = pair
    other = config.copy_and_resolve_references()
    other.optimizer.b2 = 0.9
    arguments = {"group": 2, "keep": 2}
    with pytest.raises(UserError, match=r"config\.optimizer\.b2: 0\.95 there, 0\.9 here"):
        run(other, members, probes, folder, **arguments)
    with pytest.raises(UserError, match=r"members\.m2\.seed"):
        changed = [*members[:2], dataclasses.replace(members[2], seed=1)]
        run(config, changed, probes, folder, **arguments)
    with pytest.raises(UserError, match=r"probes\.sums"):
        run(config, members, {**probes, "sums": probes["sums"][:1]}, folder, **arguments)
    with pytest.raises(UserError, match="group: 2 there, 3 here"):
        run(config, members, probes, folder, **{**arguments, "group": 3})


def test_bad_input_is_a_sentence(config, members, probes, tmp_path):
    def refused(match, folder="runs", config=config, members=members, probes=probes, **settings):
        with pytest.raises(UserError, match=match):
            run(config, members, probes, tmp_path / folder, **settings)
        assert not (tmp_path / "runs").exists()

    refused("cannot be spread over 2 devices", devices=2, group=3)
    refused("a name of its own", members=[members[0], members[0]])
    refused("a name of its own, not no run", members=[])
    refused("5 steps", keep=6)
    refused("measure_every=0", measure_every=0)
    refused("'words' have 31 tokens", probes={"words": probes["words"][:, 1:]})
    refused("hold no token", probes={"words": np.full((2, tiny.ROW + 1), 1, np.int32)})
    begun = config.copy_and_resolve_references()
    begun.init_from = "somewhere"
    refused("random weights", config=begun)
    other = dataclasses.replace(members[0].plan, tokenizer="another")
    refused("several tokenizers", members=[members[1], Member("other", other, 0)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    refused("holds no runs.json", folder="full")


@pytest.mark.slow  # a program of its own
def test_a_run_that_diverges_is_named(config, members, probes, tmp_path):
    wild = config.copy_and_resolve_references()
    wild.schedule.peak, wild.schedule.warmup_steps, wild.max_skipped = float("inf"), 0, 2
    with pytest.raises(UserError, match="gradient of m0 was not finite 2 steps in a row"):
        run(wild, members, probes, tmp_path / "runs", group=2)
