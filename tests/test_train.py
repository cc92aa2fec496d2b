"""What training promises, whatever is trained: how it is split, over what and when, does not matter."""

import json
import random

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from runs import bits, lines, rows_seen, run

from mobilellm_jax.data.opening import open_mixture
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.errors import UserError
from mobilellm_jax.training.checkpoint import load_model
from mobilellm_jax.training.saving import Checkpoints

pytestmark = pytest.mark.usefixtures("shared_programs")
POISONED = (4, 7, 8)  # steps whose loss is made NaN


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory):
    """Workdir and last state of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, run(tiny.config(plan), workdir)


def test_a_run_learns_and_records_every_step(whole):
    workdir, state = whole
    recorded = lines(workdir)
    assert list(recorded) == list(range(1, 13))
    assert recorded[12]["loss"] < 0.75 * recorded[1]["loss"]
    assert list(lines(workdir, "heldout")) == [6, 12]
    for step, record in recorded.items():
        assert record["rows"] == 16 * step
        assert sum(record[f"rows/{name}"] for name in ("words", "sums")) == 16
        assert record["tokens_per_second"] > 0 and record["data_wait_seconds"] >= 0
    assert int(state.step) == 12


def test_the_same_configuration_gives_the_same_bits(plan, whole, tmp_path):
    workdir, state = whole
    again = run(tiny.config(plan), tmp_path / "again")
    assert bits(again) == bits(state)
    assert rows_seen(tmp_path / "again") == rows_seen(workdir)


def test_stopping_anywhere_changes_no_bit(plan, whole, tmp_path):
    workdir, state = whole
    stops = sorted(random.Random(0).sample(range(1, 12), 3))
    for stop_at in (*stops, None):
        stopped = run(tiny.config(plan), tmp_path / "run", stop_at)
        assert int(stopped.step) == (stop_at or 12)
    assert bits(stopped) == bits(state)  # weights, moments, counters
    assert rows_seen(tmp_path / "run") == rows_seen(workdir)
    for kind in ("train", "heldout"):
        timeless = [
            {
                step: {k: v for k, v in r.items() if "second" not in k}
                for step, r in lines(each, kind).items()
            }
            for each in (workdir, tmp_path / "run")
        ]
        assert timeless[0] == timeless[1]


def test_a_step_is_recorded_before_it_is_saved(plan, tmp_path, monkeypatch):
    """Killed right after a checkpoint, a run would else never record the step that it resumes after."""
    saved = []

    def checked(self, state, meta, tokenizer):
        recorded = lines(tmp_path / "run")
        assert list(recorded) == list(range(1, meta["step"] + 1))
        assert recorded[meta["step"]]["rows"] == meta["rows"]
        saved.append(meta["step"])
        return save(self, state, meta, tokenizer)

    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", checked)
    run(tiny.config(plan), tmp_path / "run", stop_at=9)
    assert saved == [4, 8, 9]


def test_a_finished_run_started_again_changes_nothing(plan, whole):
    workdir, state = whole
    saved = {p: p.read_bytes() for p in (workdir / "checkpoints").rglob("*") if p.is_file()}
    assert bits(run(tiny.config(plan), workdir)) == bits(state)
    assert saved == {p: p.read_bytes() for p in (workdir / "checkpoints").rglob("*") if p.is_file()}


def test_a_checkpoint_moves_to_another_mesh(plan, whole):
    """Restored on 8 devices as 2 x 4, bit for bit; `config.mesh` may change in a run."""
    workdir, state = whole
    config = tiny.config(plan)
    config.mesh.data, config.mesh.fsdp = 2, 4
    moved = run(config, workdir, devices=jax.devices())
    assert len(moved.params["embedding"].sharding.device_set) == 8
    assert bits(moved) == bits(state)
    run(tiny.config(plan), workdir)


# --- The same losses however a step is computed ---------------------------------------------------


def losses(workdir):
    return np.array([record["loss"] for record in lines(workdir).values()])


def found(plan, workdir, devices, **changes):
    """The losses of the run `whole`, computed in another way."""
    config = tiny.config(plan)
    config.update_from_flattened_dict(changes)
    run(config, workdir, devices=devices)
    return losses(workdir)


@pytest.mark.parametrize(
    "data, fsdp",
    [
        (2, 4),
        pytest.param(8, 1, marks=pytest.mark.slow),
        pytest.param(1, 8, marks=pytest.mark.slow),
        pytest.param(4, 2, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_train_like_one(plan, whole, tmp_path, data, fsdp):
    changes = {"mesh.data": data, "mesh.fsdp": fsdp}
    computed = found(plan, tmp_path / "run", jax.devices(), **changes)
    np.testing.assert_allclose(computed, losses(whole[0]), rtol=0, atol=1e-5)


def test_microbatches_train_like_one_batch(plan, whole, tmp_path):
    """With parts that hold different numbers of targets, so that a mean of means would differ."""
    mixture = open_mixture(Plan.load(plan), tiny.ROW, tiny.VOCAB)
    tokens = mixture.read(np.arange(16))["tokens"][:, 1:]
    bos = tiny.tokenizer().bos_id
    parts = [(tokens[part::4] != bos).sum() for part in range(4)]
    assert max(parts) > min(parts)
    computed = found(plan, tmp_path / "run", tiny.one_device(), microbatches=4)
    np.testing.assert_allclose(computed, losses(whole[0]), rtol=0, atol=1e-5)


# --- Steps that are not finite --------------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned(plan, tmp_path_factory):
    """A configuration whose objective, a user's own, is NaN at the steps `POISONED`."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "poisoned.py").write_text(
        "import dataclasses\n"
        "import jax.numpy as jnp\n"
        "from mobilellm_jax.training.objectives import next_token\n\n\n"
        "def objective(params, batch, network, sums):\n"
        "    losses = next_token(params, batch, network)\n"
        "    bad = jnp.isin(batch['tokens'].sum(), jnp.array(sums))\n"
        "    factor = jnp.where(bad, jnp.nan, 1.0)\n"
        "    return dataclasses.replace(losses, total=losses.total * factor)\n"
    )
    mixture = open_mixture(Plan.load(plan), tiny.ROW, tiny.VOCAB)
    sums = [int(mixture.read(np.arange(16) + 16 * s)["tokens"].sum()) for s in range(12)]
    assert len(set(sums)) == 12
    config = tiny.config(plan)
    with config.unlocked():
        config.objective = ConfigDict(
            {"use": "poisoned:objective", "sums": [sums[step - 1] for step in POISONED]}
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield config


def finite(workdir):
    """Whether every number in every checkpoint of a run is finite, weights and moments."""
    saved = load_model(workdir)
    assert saved.step
    return all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(saved.params)))


@pytest.mark.parametrize("every", [1, 100])
def test_what_an_optimizer_makes_not_finite_is_not_saved_and_ends_the_run(
    plan, tmp_path, monkeypatch, every
):
    """Of finite gradients; when it is to be saved, or when no step after it can be taken."""
    (tmp_path / "bursting.py").write_text(
        "import jax.numpy as jnp\n"
        "import optax\n\n\n"
        "def optimizer(learning_rate, rate):\n"
        "    grown = jnp.where(learning_rate > rate, jnp.inf, 1.0)\n"
        "    return optax.chain(optax.sgd(learning_rate), optax.scale(grown))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = tiny.config(plan, steps=20)
    config.checkpoint.every, config.eval.every = every, 100
    config.schedule.warmup_steps = 10
    rate = config.schedule.peak * 0.35  # up to step 4
    with config.unlocked():
        config.optimizer = ConfigDict({"use": "bursting:optimizer", "rate": rate})
    with pytest.raises(UserError, match="config.optimizer made them so"):
        run(config, tmp_path / "run")
    if every == 1:
        assert load_model(tmp_path / "run").step == 4 and finite(tmp_path / "run")
    else:
        assert not any((tmp_path / "run" / "checkpoints").iterdir())
    assert max(lines(tmp_path / "run")) == (5 if every == 1 else 5 + config.max_skipped)


def test_a_step_that_is_not_finite_changes_nothing_but_its_place(poisoned, whole, tmp_path):
    workdir = tmp_path / "run"
    before = run(poisoned, workdir, stop_at=6)
    after = run(poisoned, workdir, stop_at=8)  # steps 7 and 8 are NaN
    assert bits(after.params) == bits(before.params)
    assert bits(after.opt_state) == bits(before.opt_state)
    assert (int(before.skipped), int(after.skipped), int(after.skipped_in_row)) == (1, 3, 2)
    last = run(poisoned, workdir)
    assert bits(last.params) != bits(after.params)
    assert (int(last.skipped), int(last.skipped_in_row)) == (3, 0)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(last)))
    assert finite(workdir)
    # Rows and schedule went on as if nothing had happened.
    assert rows_seen(workdir) == rows_seen(whole[0])
    rates = [
        {step: record["learning_rate"] for step, record in lines(each).items()}
        for each in (workdir, whole[0])
    ]
    assert rates[0] == rates[1]
    recorded = lines(workdir)
    for key in ("loss", "gradient_norm"):
        assert [step for step, r in recorded.items() if r[key] is None] == list(POISONED)
    assert recorded[12]["skipped"] == 3


@pytest.mark.slow
def test_too_many_such_steps_in_a_row_stop_the_run_also_across_a_resume(poisoned, tmp_path):
    config = poisoned.copy_and_resolve_references()
    config.max_skipped = 2
    with pytest.raises(UserError, match=r"stopped at step 8: .* 2 steps in a row"):
        run(config, tmp_path / "whole")
    with pytest.raises(UserError, match="stopped at step 8"):  # it goes on, to the same end
        run(config, tmp_path / "whole")
    assert int(run(config, tmp_path / "parts", stop_at=7).skipped_in_row) == 1
    with pytest.raises(UserError, match=r"stopped at step 8: .* 2 steps in a row"):
        run(config, tmp_path / "parts")
    for workdir in (tmp_path / "whole", tmp_path / "parts"):
        assert finite(workdir)
        assert 8 in lines(workdir), "the step that ended the run is recorded"
        for line in (workdir / "metrics.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
