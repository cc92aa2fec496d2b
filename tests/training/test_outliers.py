"""A step that stands out is skipped as if it had not been, and no run gets stuck behind such steps."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from runs import bits, lines, run

from mobilellm_jax.data.opening import open_mixture
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.errors import UserError
from mobilellm_jax.training.outliers import init_window, judge
from mobilellm_jax.training.setup import set_up

SPIKE = 9  # the step whose loss is far too high
WINDOW = 5


def judged(losses, norms, size, deviations):
    """Which steps stand out, on the device."""
    step = jax.jit(functools.partial(judge, deviations=deviations))
    window, found = init_window(size), []
    for loss, norm in zip(losses, norms, strict=True):
        loss, norm = jnp.float32(loss), jnp.float32(norm)
        outlier, window = step(window, loss, norm, jnp.isfinite(loss) & jnp.isfinite(norm))
        found.append(bool(outlier))
    assert int(window.skipped) == sum(found)
    return found


def by_hand(losses, norms, size, deviations):
    """The same in numpy, from the lists of all steps before."""
    seen, found = [], []
    for pair in zip(losses, norms, strict=True):
        finite, outlier = bool(np.isfinite(pair).all()), False
        if finite and len(seen) >= size:
            last = np.array(seen[-size:])
            median = np.median(last, axis=0)
            spread = 1.4826 * np.median(np.abs(last - median), axis=0)
            outlier = bool((pair > median + deviations * np.maximum(spread, 0.01 * median)).any())
        if finite:
            seen.append(pair)
        found.append(outlier)
    return found


@pytest.mark.parametrize("size, deviations", [(2, 3.0), (7, 4.0), (32, 6.0)])
def test_what_stands_out_is_what_a_loop_over_the_steps_before_says(size, deviations):
    rng = np.random.default_rng(size)
    losses = 3 + np.exp(-np.arange(150) / 30) + 0.05 * rng.standard_normal(150)
    norms = 1 + 0.2 * rng.standard_normal(150) ** 2
    losses[[40, 90, 91]] += 4
    norms[[60, 91, 120]] *= 50
    losses[[70, 100]] = np.nan, np.inf
    found = judged(losses, norms, size, deviations)
    assert found == by_hand(losses, norms, size, deviations)
    assert all(found[step] for step in (40, 60, 90, 120)) and not any(found[:size])


def test_a_level_that_rises_for_good_is_the_level_after_half_a_window():
    losses = [2.0] * 20 + [5.0] * 20
    found = judged(losses, [1.0] * 40, 10, 6.0)
    assert found == [False] * 20 + [True] * 5 + [False] * 15


def test_steps_that_hardly_differ_do_not_stand_out():
    losses = [2.0] * 20 + [2.05, 1.0, 2.0]
    assert not any(judged(losses, [1.0] * 23, 10, 6.0))


def test_the_first_step_behind_a_full_window_is_judged():
    for at in (4, 5):  # of a window of 5
        losses = [2.0] * at + [9.0]
        assert judged(losses, [1.0] * (at + 1), 5, 6.0) == [False] * at + [at == 5]


# --- In a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", autouse=True)
def users_emitters():
    """Steps as users compile them: with the quick emitters of other tests a guard adds up otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        if "--xla_cpu_use_fusion_emitters=false" in os.environ["XLA_FLAGS"]:
            options = {"xla_cpu_use_fusion_emitters": True}
            patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=options))
        yield


@pytest.fixture(scope="module")
def config_of(plan, tmp_path_factory):
    """Configurations whose objective multiplies the loss of step `SPIKE` by a factor."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "spiked.py").write_text(
        "import dataclasses\n"
        "import jax.numpy as jnp\n"
        "from mobilellm_jax.training.objectives import next_token\n\n\n"
        "def objective(params, batch, network, spike, factor):\n"
        "    losses = next_token(params, batch, network)\n"
        "    times = jnp.where(batch['tokens'].sum() == spike, float(factor), 1.0)\n"
        "    return dataclasses.replace(losses, total=losses.total * times)\n"
    )
    mixture = open_mixture(Plan.load(plan), tiny.ROW, tiny.VOCAB)
    spike = int(mixture.read(np.arange(16) + 16 * (SPIKE - 1))["tokens"].sum())

    def of(factor, window=WINDOW):
        c = tiny.config(plan)
        with c.unlocked():
            c.objective.use, c.objective.spike, c.objective.factor = (
                "spiked:objective",
                spike,
                factor,
            )
            del c.objective["z_loss"], c.objective["all_tokens"]
        c.skip.window = window
        return c

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield of


@pytest.fixture(scope="module")
def guarded(config_of, tmp_path_factory):
    workdir, config = tmp_path_factory.mktemp("guarded") / "run", config_of("40")
    config.max_skipped = 1  # of steps that are not finite
    return workdir, run(config, workdir)


def test_a_spike_is_skipped_and_the_run_is_that_without_its_update(config_of, guarded, tmp_path):
    workdir, state = guarded
    left_out = run(config_of("nan", window=0), tmp_path / "left out")
    assert bits((state.params, state.opt_state)) == bits((left_out.params, left_out.opt_state))
    assert (int(state.window.skipped), int(state.skipped), int(left_out.skipped)) == (1, 0, 1)
    recorded = lines(workdir)
    assert [r["outliers"] for r in recorded.values()] == [0] * (SPIKE - 1) + [1] * (13 - SPIKE)
    assert recorded[SPIKE]["loss"] > 20 * recorded[SPIKE - 1]["loss"]


@pytest.mark.slow
def test_without_the_guard_a_spike_changes_the_weights(config_of, guarded, tmp_path):
    unguarded = run(config_of("40", window=0), tmp_path / "unguarded")
    assert bits(unguarded.params) != bits(guarded[1].params)


@pytest.mark.slow
def test_without_a_spike_the_guard_changes_no_bit(config_of, tmp_path):
    off, on = (run(config_of("1", size), tmp_path / str(size)) for size in (0, WINDOW))
    assert off.window is None and int(on.window.skipped) == 0
    assert bits((off.params, off.opt_state)) == bits((on.params, on.opt_state))


@pytest.mark.slow
def test_a_resume_goes_on_with_the_same_window(config_of, guarded, tmp_path):
    for stop_at in (SPIKE - 1, SPIKE, None):
        resumed = run(config_of("40"), tmp_path / "run", stop_at)
    assert bits(resumed) == bits(guarded[1])
    with pytest.raises(UserError, match="belongs to another run .*config.skip.window: 5 there, 7"):
        run(config_of("40", window=7), tmp_path / "run")


def test_outliers_do_not_count_as_steps_that_are_not_finite(guarded):
    """As many as end a run are skipped, and this one has not ended."""
    assert int(guarded[1].window.skipped) == 1


@pytest.mark.slow
def test_the_guard_is_part_of_the_one_compiled_step(config_of):
    """Nothing is fetched to decide: under a guard against transfers two steps run all the same."""
    setup = set_up(config_of("40"), tiny.one_device())
    with jax.set_mesh(setup.mesh):
        batch = jax.device_put(dict(setup.mixture.read(np.arange(16))))
        state, _ = setup.step(setup.fresh(), batch)
        with jax.transfer_guard_device_to_host("disallow_explicit"):
            state, _ = setup.step(state, batch)
    assert int(state.window.seen) == 2
    assert optax.tree.norm(state.params) > 0
