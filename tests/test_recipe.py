"""The six stages of MobileLLM-R1 in small, as a user starts them: to the end, killed, and again."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import bits, lines

from mobilellm_jax.training.checkpoint import load_model, saved_steps

ROOT = Path(__file__).parents[1]
STAGES = ("pretrain1", "pretrain2", "midtrain1", "midtrain2", "sft_general", "sft_reasoning")

pytestmark = pytest.mark.slow


def start(data, runs, *options):
    """The script in a session of its own, with programs compiled as for users, on one device."""
    return subprocess.Popen(
        [ROOT / "launch" / "r1_recipe.sh", f"--data={data}", f"--runs={runs}", *options],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process):
    """What it said, once it has ended well."""
    out, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, out[-3000:]
    return out


def kill_session(leader):
    """kill -9 of the script and all that it has started."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == leader.pid:
                    os.kill(int(folder.name), signal.SIGKILL)
            except (OSError, ProcessLookupError):
                pass  # it has ended by itself
    leader.communicate()


def steps_done(runs):
    """Steps recorded in all stages."""
    files = runs.glob("r1-tiny-*/metrics.jsonl")
    return sum(path.read_text().count('"train"') for path in files)


def weights(runs, stage):
    return bits(load_model(runs / f"r1-tiny-{stage}").params)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Data and all stages, from nothing to the end."""
    out = tmp_path_factory.mktemp("whole")
    finish(start(out / "data", out / "runs"))
    return out


def test_every_stage_ends_and_starts_where_the_one_before_has_ended(whole):
    for before, stage in zip((None, *STAGES), STAGES, strict=False):
        loaded = load_model(whole / "runs" / f"r1-tiny-{stage}")
        assert loaded.meta["config"]["stage"] == stage
        if before:
            ended = load_model(whole / "runs" / f"r1-tiny-{before}").step
            assert loaded.meta["init_from"]["step"] == ended
            assert loaded.meta["init_from"]["directory"].endswith(
                f"r1-tiny-{before}/checkpoints/{ended}"
            )


def test_every_stage_learns_what_it_reads(whole):
    """Held-out bits per byte fall within each stage, the teacher's too."""
    for stage in ("teacher", *STAGES):
        heldout = lines(whole / "runs" / f"r1-tiny-{stage}", "heldout")
        first, *_, last = (found for _, found in sorted(heldout.items()))
        key = next(key for key in first if key.startswith("bits_per_byte"))
        assert last[key] < first[key], stage


def test_a_chain_that_is_done_says_so_and_changes_nothing(whole):
    before = {stage: weights(whole / "runs", stage) for stage in STAGES}
    out = finish(start(whole / "data", whole / "runs"))
    assert out.count("\ndone: step ") == 1 + len(STAGES)
    assert before == {stage: weights(whole / "runs", stage) for stage in STAGES}


def test_kill_9_at_a_random_moment_changes_no_bit(whole, tmp_path):
    """Three kills, each at a random step of what is left; the data and the teacher are kept."""
    runs = tmp_path / "runs"
    shutil.copytree(whole / "runs" / "r1-tiny-teacher", runs / "r1-tiny-teacher")
    taught = steps_done(runs)
    total = steps_done(whole / "runs")
    rng = random.Random(0)
    moments = sorted(rng.randrange(taught + 1, total) for _ in range(3))
    for moment in moments:
        process = start(whole / "data", runs)
        while steps_done(runs) < moment:
            assert process.poll() is None, process.communicate()[0][-3000:]
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1))
        kill_session(process)
    finish(start(whole / "data", runs))
    for stage in STAGES:
        assert weights(runs, stage) == weights(whole / "runs", stage), stage
        kept = (
            saved_steps(place / f"r1-tiny-{stage}" / "checkpoints")
            for place in (runs, whole / "runs")
        )
        assert len({max(steps) for steps in kept}) == 1
