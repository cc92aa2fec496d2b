"""Runs that follow each other: a stage starts at the end of the right one, or says why not."""

import pytest
import tiny
from runs import run
from weights import said

from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.stored import open_model, write_checkpoint
from mobilellm_jax.train import train

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def stages(plan, tmp_path_factory):
    """A whole run of a stage, one that was stopped, and one that has no name."""
    out = tmp_path_factory.mktemp("runs")
    run(config(plan, "pretrain"), out / "pretrain")
    run(config(plan, "pretrain"), out / "stopped", stop_at=4)
    run(config(plan, ""), out / "nameless")
    return out


def config(plan, stage, start="", after="", steps=6):
    c = tiny.config(plan, steps)
    c.eval.every = c.checkpoint.every = 2
    c.checkpoint.keep = 10
    c.stage, c.init_from, c.init_stage = stage, str(start), after
    return c


def refused(c, workdir, part):
    with pytest.raises(UserError, match=part) as found:
        run(c, workdir)
    assert str(found.value).count("\n") == 0
    assert not workdir.exists()


def test_a_stage_starts_at_the_end_of_the_one_before(plan, stages, tmp_path):
    c = config(plan, "midtrain", stages / "pretrain", "pretrain")
    _, printed = said(train, c, tmp_path / "run", 1, tiny.one_device())
    assert f"starting at the weights of {stages / 'pretrain'}/checkpoints/6" in printed


def test_a_stage_refuses_the_checkpoint_of_another(plan, stages, tmp_path):
    c = config(plan, "sft", stages / "pretrain", "midtrain")
    part = "is a checkpoint of the stage pretrain, and sft starts at one of midtrain"
    refused(c, tmp_path / "run", part)
    c.init_from = f"{stages / 'pretrain'}@4"  # by its step as well
    refused(c, tmp_path / "run", part)
    c.init_stage = "pretrain"  # as the sentence says
    run(c, tmp_path / "run", stop_at=1)


def test_a_stage_that_follows_another_does_not_start_at_random_weights(plan, tmp_path):
    part = "config.init_from is empty, but sft starts at a checkpoint of the stage midtrain"
    refused(config(plan, "sft", after="midtrain"), tmp_path / "run", part)


def test_a_run_that_has_not_ended_is_no_start_unless_the_step_is_named(plan, stages, tmp_path):
    place = stages / "stopped"
    for start in (place, place / "checkpoints"):
        c = config(plan, "midtrain", start, "pretrain")
        refused(c, tmp_path / "run", r"has not ended: .* of step 4 of 6\. .*@4\.")
    for i, start in enumerate((f"{place}@4", place / "checkpoints" / "4", f"{place}@2")):
        run(config(plan, "midtrain", start, "pretrain"), tmp_path / str(i), stop_at=1)


def test_a_stage_of_another_size_is_refused(plan, stages, tmp_path):
    c = config(plan, "midtrain", stages / "pretrain", "pretrain")
    c.model.width = 64
    refused(c, tmp_path / "run", r"does not fit config.model: .* make config.model the network")


def test_what_is_not_known_of_a_checkpoint_is_no_reason_to_refuse_it(plan, stages, tmp_path):
    """A run without a name, a network without a run, a plan that is gone."""
    run(config(plan, "sft", stages / "nameless", "midtrain"), tmp_path / "a", stop_at=1)
    write_checkpoint(open_model(stages / "pretrain"), tmp_path / "alone")
    run(config(plan, "sft", tmp_path / "alone", "pretrain"), tmp_path / "b", stop_at=1)
