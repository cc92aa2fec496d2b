"""Runs as they really go: levels and cooldowns, forks off a checkpoint, ramps, lengths in tokens, traces."""

import importlib.util
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from runs import bits, config_file, files, lines, program, rows_seen, run
from weights import said

from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.stored import open_model
from mobilellm_jax.rows import open_run
from mobilellm_jax.train import train
from mobilellm_jax.training import optimizer
from mobilellm_jax.training.checkpoint import load_model
from mobilellm_jax.training.setup import set_up
from mobilellm_jax.training.start import open_start

pytestmark = pytest.mark.usefixtures("shared_programs")
WSD = "mobilellm_jax.training.optimizer:warmup_stable_decay"


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("data"))


# --- Schedules ------------------------------------------------------------------------------------

SHAPES = {
    "linear": lambda p: 1 - p,
    "cosine": lambda p: np.cos(np.pi * p / 2) ** 2,
    "1-sqrt": lambda p: 1 - p**0.5,
}


@pytest.mark.parametrize("decay", SHAPES)
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_warm_up_stable_decay_at_its_borders(decay, floor):
    rate = optimizer.warmup_stable_decay(1000, 2e-3, 100, floor, decay_steps=200, decay=decay)
    for at in (0, 1, 50, 99, 100, 101, 799, 800, 801, 900, 999, 1000, 1100):
        past = min(max(at - 800, 0) / 200, 1.0)
        exact = 2e-3 * (at / 100 if at < 100 else floor + (1 - floor) * SHAPES[decay](past))
        assert float(jax.jit(rate)(at)) == pytest.approx(exact, rel=2e-5, abs=1e-9)


def test_what_a_schedule_takes_by_itself():
    level = optimizer.warmup_stable_decay(1000, 2e-3, 0, 0.1, decay_steps=0)
    assert [float(level(at)) for at in (0, 500, 1000)] == pytest.approx([2e-3] * 3)
    fifth = optimizer.warmup_stable_decay(1000, 2e-3, 10, 0.0)
    assert float(fifth(800)) == pytest.approx(2e-3) and float(fifth(801)) < 1.9e-3
    only = optimizer.warmup_stable_decay(100, 1.0, 60, 0.0, decay_steps=40, decay="linear")
    assert [float(only(at)) for at in (59, 60, 80, 100)] == pytest.approx([59 / 60, 1, 0.5, 0])


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"decay_steps": 901}, r"decay_steps=901 .* warmup_steps=100 .* 1000 steps"),
        ({"decay_steps": -1}, "decay_steps=-1"),
        ({"decay": "sqrt"}, "decay='sqrt' .* linear, cosine, 1-sqrt"),
    ],
)
def test_a_decay_that_does_not_fit(settings, word):
    with pytest.raises(UserError, match=word):
        optimizer.warmup_stable_decay(1000, 1.0, 100, 0.0, **settings)


SCHEDULES = optimizer.warmup_cosine, optimizer.warmup_linear, optimizer.warmup_stable_decay


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_warm_up_ends_before_the_run_and_no_rate_is_negative(schedule):
    assert float(schedule(1000, 0.0, 0, 0.0)(500)) == 0
    assert float(schedule(1000, 1.0, 999, 0.0, **_level(schedule))(999)) == pytest.approx(1)
    for peak, warmup, word in (
        (-1e-3, 100, "peak=-0.001"),
        (float("nan"), 100, "peak=nan"),
        (1.0, 1000, "warmup_steps=1000 does not lie within the 1000 steps"),
        (1.0, -1, "warmup_steps=-1"),
    ):
        with pytest.raises(UserError, match=word):
            schedule(1000, peak, warmup, 0.0, **_level(schedule))


def _level(schedule):
    """By itself the fall of the last would not fit behind so long a rise."""
    return {"decay_steps": 0} if schedule is optimizer.warmup_stable_decay else {}


# --- A cooldown forked off a checkpoint -----------------------------------------------------------


def wsd(plan, steps, decay_steps, **changes):
    config = tiny.unshared(plan, steps)
    settings = {"use": WSD, "peak": 1e-2, "warmup_steps": 3, "floor": 0.1}
    with config.unlocked():
        config.schedule = ConfigDict({**settings, "decay_steps": decay_steps})
    config.update_from_flattened_dict(changes)
    return config


def forked(plan, source, **changes):
    """The last four of twelve steps as a decay, from step 8 of a run on."""
    return wsd(plan, 12, 4, init_from=f"{source}@8", init_state="all", **changes)


@pytest.fixture(scope="module")
def stable(plan, tmp_path_factory):
    """The workdir of a run that is level for ever, with the checkpoints 4, 8, 12, 16."""
    workdir = tmp_path_factory.mktemp("stable") / "run"
    config = wsd(plan, 40, 0)
    config.checkpoint.keep = 9
    run(config, workdir, stop_at=16)
    return workdir


def test_a_forked_cooldown_is_the_run_that_would_have_decayed_there(plan, stable, tmp_path):
    before = files(stable)
    straight = run(wsd(plan, 12, 4), tmp_path / "straight")
    state, printed = said(train, forked(plan, stable), tmp_path / "fork", 10, jax.devices()[:1])
    assert f"weights, moments and step of {stable}/checkpoints/8" in printed
    state = run(forked(plan, stable), tmp_path / "fork")  # stopped and resumed in between
    assert bits(state) == bits(straight)
    assert rows_seen(tmp_path / "fork") == rows_seen(tmp_path / "straight")[8:]
    recorded = [lines(tmp_path / name) for name in ("straight", "fork")]
    for step in range(9, 13):
        for key in ("loss", "gradient_norm", "learning_rate", "rows"):
            assert recorded[0][step][key] == recorded[1][step][key]
    assert files(stable) == before
    origin = load_model(tmp_path / "fork").meta["init_from"]
    assert origin["step"] == 8 and origin["directory"] == str(stable / "checkpoints" / "8")
    assert open_run(tmp_path / "fork").rows_of(9) == (128, 144)


@pytest.mark.slow
def test_a_named_checkpoint_is_found_from_where_the_user_stands(plan, stable, monkeypatch):
    """A path may be relative, and name the run, its step, or the step's folder."""
    monkeypatch.chdir(stable.parent)

    def begun(name):
        config = wsd(plan, 12, 4, init_from=name, init_state="all")
        return open_start(config, set_up(config, jax.devices()[:1]))[0]

    for name in (f"{stable.name}@8", f"{stable.name}/checkpoints/8", f"./{stable.name}@8"):
        assert begun(name).step == open_model(name).step == 8
    with pytest.raises(UserError, match="no checkpoint of step 9 .* its steps are: 4, 8, 12, 16"):
        open_model(f"{stable}@9")
    with pytest.raises(UserError, match="is a run that has not ended"):
        begun(stable.name)


def test_of_that_checkpoint_the_weights_alone(plan, stable, tmp_path):
    config = tiny.unshared(plan)
    config.init_from = f"{stable}@8"
    state = run(config, tmp_path / "run", stop_at=1)  # at a rate of zero
    assert bits(state.params) == bits(load_model(stable / "checkpoints" / "8").params)
    assert int(state.step) == 1 and lines(tmp_path / "run")[1]["rows"] == 16


def test_a_fork_may_change_its_batch_from_there_on(plan, stable, tmp_path):
    changes = {"global_batch": 32, "batch_ramp": ((16, 8 * 16 * tiny.ROW),)}
    run(forked(plan, stable, **changes), tmp_path / "fork")
    assert [r["rows"] for r in lines(tmp_path / "fork").values()] == [160, 192, 224, 256]


@pytest.mark.slow
def test_a_fork_may_begin_to_skip_outliers(plan, stable, tmp_path):
    state = run(forked(plan, stable, **{"skip.window": 3}), tmp_path / "on")
    assert int(state.window.seen) == 4
    off = wsd(plan, 14, 2, init_from=f"{tmp_path}/on@12", init_state="all")
    assert run(off, tmp_path / "off").window is None


def refused(config, workdir, word):
    with pytest.raises(UserError, match=word) as error:
        run(config, workdir)
    assert str(error.value).endswith(".") and not workdir.exists()


def test_what_cannot_be_gone_on_from(plan, stable, tmp_path):
    """One sentence each, and nothing is written."""
    new = tmp_path / "new"
    config = forked(plan, stable)
    config.init_from = f"{stable}@7"
    refused(config, new, r"no checkpoint of step 7 in .*checkpoints; its steps are: 4, 8, 12, 16\.")
    config.init_from = f"{tmp_path}@7"
    refused(config, new, "its steps are: none")
    config.init_from = f"{stable}@12"
    refused(config, new, "that is step 12 and this run ends at step 12")
    refused(forked(plan, stable, global_batch=32), new, "had read 128 rows .* says 256")
    refused(forked(plan, stable, first_row=16), new, "had read 128 rows .* says 144")
    refused(
        forked(plan, stable, **{"optimizer.mu_dtype": "bfloat16"}), new, "mu_dtype is 'float32'"
    )
    muon = {"optimizer.use": "mobilellm_jax.training.optimizer:muon"}
    refused(
        forked(plan, stable, **muon), new, r"optimizer.use is '.*adamw' there and '.*muon' here"
    )
    alone = shutil.copytree(stable / "checkpoints" / "8", tmp_path / "alone")
    shutil.rmtree(alone / "optimizer")
    refused(wsd(plan, 12, 4, init_from=str(alone), init_state="all"), new, "but no optimizer")
    refused(wsd(plan, 12, 4, init_state="all"), new, "init_state=all needs a checkpoint")
    refused(wsd(plan, 12, 4, init_state="some"), new, "init_state='some' .* weights or all")


def test_a_fork_reads_on_in_the_same_plan_or_in_one_that_changes_from_there_on(
    plan, stable, tmp_path
):
    other = shutil.copytree(plan.parent, tmp_path / "data") / "mixture.json"
    raw = json.loads(other.read_text())
    other.write_text(json.dumps({**raw, "seed": 1}))
    refused(forked(other, stable), tmp_path / "fork", "another plan .* differ in the seed")


# --- Ramps and lengths in tokens ------------------------------------------------------------------


def ramp(plan):
    """4, then 8, then 16 rows per step, 21 steps: 5 + 6 + 10."""
    config = tiny.unshared(plan)
    config.batch_ramp = ((4, 20 * tiny.ROW), (8, 68 * tiny.ROW))
    config.steps, config.tokens = 0, (68 + 9 * 16 + 1) * tiny.ROW
    config.microbatches = 2
    return config


@pytest.fixture(scope="module")
def ramped(plan, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("ramped") / "run"
    return workdir, *said(train, ramp(plan), workdir, None, jax.devices()[:1])


def test_a_ramp_reads_the_stream_in_larger_and_larger_steps(plan, ramped):
    workdir, state, printed = ramped
    assert int(state.step) == 21
    assert "run: 21 steps x 4, then 8, then 16 rows x 32 tokens = 7,296 tokens" in printed
    recorded = lines(workdir)
    sizes = [sum(r[f"rows/{name}"] for name in ("words", "sums")) for r in recorded.values()]
    assert sizes == [4] * 5 + [8] * 6 + [16] * 10
    assert [r["rows"] for r in recorded.values()] == np.cumsum(sizes).tolist()
    speeds = [r["tokens_per_second"] * r["step_seconds"] for r in recorded.values()]
    np.testing.assert_allclose(speeds, np.array(sizes) * tiny.ROW)


def test_the_compilation_of_each_size_is_no_progress(ramped):
    spent = {n: r["seconds/compile"] for n, r in lines(ramped[0], "goodput").items()}
    assert 0 < spent[4] < spent[8] < spent[12] == spent[16] == spent[21]


@pytest.mark.parametrize("stops", [(3, 8), pytest.param((5, 11), marks=pytest.mark.slow)])
def test_a_ramp_that_is_stopped_and_resumed_changes_no_bit(plan, ramped, tmp_path, stops):
    for stop_at in (*stops, None):
        resumed = run(ramp(plan), tmp_path / "run", stop_at)
    assert bits(resumed) == bits(ramped[1])
    assert rows_seen(tmp_path / "run") == rows_seen(ramped[0])


def test_what_a_ramp_has_read_is_known(ramped):
    known = open_run(ramped[0])
    assert known.rows_of(11) == (60, 68) and known.length.step_of(68) == 12
    assert (known.done, known.consumed, known.whole) == (21, 228, 228)


@pytest.mark.slow
def test_a_length_in_tokens_is_that_in_steps(plan, tmp_path):
    tokens = tiny.unshared(plan)
    tokens.steps, tokens.tokens = 0, 12 * 16 * tiny.ROW
    steps = run(tiny.unshared(plan), tmp_path / "steps")
    assert bits(run(tokens, tmp_path / "tokens")) == bits(steps)


@pytest.mark.slow
def test_a_ramp_and_tokens_on_the_command_line(plan, tmp_path):
    config = config_file(tmp_path, plan)
    ended = program(
        "mobilellm_jax.train",
        *(f"--config={config}", f"--workdir={tmp_path / 'run'}", "--stop_at=1"),
        *("--config.steps=0", f"--config.tokens={16 * 16 * tiny.ROW}"),
        f"--config.batch_ramp=((8, {8 * 8 * tiny.ROW}),)",
    )
    assert ended.status == 0, ended.err
    assert "run: 20 steps x 8, then 16 rows" in ended.out


# --- Traces ---------------------------------------------------------------------------------------


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is not None,
    reason="JAX's profiler crashes where libtpu has been loaded and there is no TPU",
)
@pytest.mark.slow
def test_a_trace_of_chosen_steps_changes_no_bit(plan, tmp_path):
    plain = run(tiny.unshared(plan), tmp_path / "plain", stop_at=6)
    config = tiny.unshared(plan)
    config.profile = "4:5"
    state, printed = said(train, config, tmp_path / "traced", 6, jax.devices()[:1])
    assert bits(state) == bits(plain)
    assert rows_seen(tmp_path / "traced") == rows_seen(tmp_path / "plain")
    traces = list((tmp_path / "traced" / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000
    assert f"profile: steps up to 5 are in {tmp_path / 'traced' / 'profile'}" in printed
    assert not (tmp_path / "plain" / "profile").exists()
    steps = {
        dict(event.stats).get("step_num")
        for plane in jax.profiler.ProfileData.from_file(str(traces[0])).planes
        for line in plane.lines
        for event in line.events
        if event.name == "train"
    }
    assert steps == {4, 5}


def test_a_run_that_ends_inside_of_a_trace_still_writes_it(plan, tmp_path):
    config = tiny.unshared(plan)
    config.profile = "2:50"
    run(config, tmp_path / "run", stop_at=3)
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("text", ["5", "0:3", "5:4", "a:b", "1:2:3"])
def test_what_names_no_steps_to_trace(plan, tmp_path, text):
    config = tiny.unshared(plan)
    config.profile = text
    refused(config, tmp_path / "run", f"config.profile='{text}' names no steps")
