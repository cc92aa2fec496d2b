"""Runs that are killed or told to stop, and go on as if nothing had happened."""

import os
import random
import signal
import threading
import time

import jax
import pytest
import tiny
from runs import (
    bits,
    config_file,
    finish,
    lines,
    rows_seen,
    run,
    start,
    start_training,
    wait_for_lines,
)

from mobilellm_jax.training import evaluation
from mobilellm_jax.training.checkpoint import load_model, saved_steps
from mobilellm_jax.training.signals import Signals

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("data"))


def unending(plan, every=1000):
    """A run that is always stopped before its end: all that are, are one, and share its programs."""
    config = tiny.unshared(plan, steps=1000)
    config.eval.every = config.checkpoint.every = every
    return config


def kill(process, workdir, count, seconds):
    """Kills a run so long after so many further lines; whether that left a half-written checkpoint behind."""
    wait_for_lines(process, workdir, count + 1)  # and the line of the start
    time.sleep(seconds)
    process.kill()
    ended = finish(process)
    assert ended.status == -signal.SIGKILL, ended.err or "it ended before it was killed"
    return any("tmp" in path.name for path in (workdir / "checkpoints").iterdir())


def kills(number, steps, seed):
    """Random delays that fall inside of the training of `steps` steps."""
    rng = random.Random(seed)
    return [(rng.randrange(1, steps // (number + 1)), rng.uniform(0, 0.1)) for _ in range(number)]


def test_kill_9_changes_no_bit(plan, tmp_path):
    """Of a process with devices like those here, where the run goes on from a checkpoint of that one."""
    run_it = "import runs, sys, test_resume as t; runs.run(t.unending(sys.argv[1], 2), sys.argv[2])"
    workdir, flags = tmp_path / "killed", os.environ["XLA_FLAGS"]
    kill(
        start("-c", run_it, plan, workdir, XLA_FLAGS=flags),
        workdir,
        30,
        random.Random(1).uniform(0, 0.1),
    )
    assert saved_steps(workdir / "checkpoints")
    stop_at = max(lines(workdir)) + 4
    resumed, whole = (
        run(unending(plan, 2), path, stop_at) for path in (workdir, tmp_path / "whole")
    )
    assert bits(resumed) == bits(whole)
    assert rows_seen(workdir) == rows_seen(tmp_path / "whole")
    assert not [p for p in (workdir / "checkpoints").iterdir() if "tmp" in p.name]


def trained(config, workdir, delays=()):
    """Trains to the end in programs of its own, killed after each delay: (lines recorded, seconds).

    Returns the weights, the rows seen, and how many kills left a half-written checkpoint behind.
    """
    torn = sum(kill(start_training(config, workdir), workdir, *delay) for delay in delays)
    ended = finish(start_training(config, workdir))
    assert ended.status == 0, ended.err
    assert not [p for p in (workdir / "checkpoints").iterdir() if "tmp" in p.name]
    return bits(load_model(workdir).params), rows_seen(workdir), torn


@pytest.mark.slow
def test_kill_9_ten_times_changes_no_bit(plan, tmp_path):
    config = config_file(tmp_path, plan, steps=300, checkpoint__every=1, eval__every=50)
    weights, rows, _ = trained(config, tmp_path / "whole")
    killed, seen, torn = trained(config, tmp_path / "killed", kills(10, 300, seed=2))
    assert torn, "no kill fell into the writing of a checkpoint: the test proves too little"
    assert killed == weights
    assert seen == rows


def signal_after(workdir, number, count, done):
    """Sends this process a signal once `count` lines are recorded."""
    path = workdir / "metrics.jsonl"
    while not done.is_set():
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            os.kill(os.getpid(), number)
            return
        time.sleep(0.001)


@pytest.mark.parametrize(
    "number, status",
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_leaves_and_the_next_start_goes_on(plan, tmp_path, number, status):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    done = threading.Event()
    watcher = threading.Thread(
        target=signal_after, args=(tmp_path / "run", number, 5, done), daemon=True
    )
    watcher.start()
    with pytest.raises(SystemExit) as end:
        run(unending(plan), tmp_path / "run")
    done.set()
    watcher.join()
    assert end.value.code == status
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    saved = load_model(tmp_path / "run")
    assert 0 < saved.step < 1000
    assert list(lines(tmp_path / "run")) == list(range(1, saved.step + 1))  # each step is recorded
    resumed = run(unending(plan), tmp_path / "run", stop_at=saved.step + 3)
    whole = run(unending(plan), tmp_path / "whole", stop_at=saved.step + 3)
    assert bits(resumed) == bits(whole)
    assert rows_seen(tmp_path / "run") == rows_seen(tmp_path / "whole")


def eight(plan):
    config = tiny.unshared(plan, steps=8)
    config.eval.every, config.checkpoint.every = 4, 1000
    return config


@pytest.fixture(scope="module")
def measured(plan, tmp_path_factory):
    """The run of eight steps."""
    workdir = tmp_path_factory.mktemp("measured") / "run"
    run(eight(plan), workdir)
    return workdir


@pytest.mark.parametrize("at, batches", [(4, 1), (8, 3)])
def test_a_signal_breaks_off_an_evaluation_and_the_next_start_makes_up_for_it(
    plan, measured, tmp_path, monkeypatch, at, batches
):
    """Notice is given for half a minute, and tasks can take longer: they must not cost the run its steps."""
    config = eight(plan)
    expected = {step: r["loss"] for step, r in lines(measured, "heldout").items()}
    assert list(expected) == [4, 8]
    put, read = evaluation.put_rows, []

    def put_rows(batch, mesh):
        started = len(list(lines(tmp_path / "run"))) == at
        read.extend([batch] if started else [])
        if len(read) == batches:
            os.kill(os.getpid(), signal.SIGTERM)
        return put(batch, mesh)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(evaluation, "put_rows", put_rows)
        run(config, tmp_path / "run")
    assert end.value.code == 143 and len(read) == batches
    assert load_model(tmp_path / "run").step == at
    assert at not in lines(tmp_path / "run", "heldout")
    resumed = run(config, tmp_path / "run")
    found = {step: r["loss"] for step, r in lines(tmp_path / "run", "heldout").items()}
    assert found == expected
    assert bits(resumed.params) == bits(load_model(measured).params)


@pytest.mark.slow
def test_the_program_tells_that_a_signal_stopped_it(plan, tmp_path):
    config = config_file(
        tmp_path, plan, steps=100_000, eval__every=100_000, checkpoint__every=50_000
    )
    process = start_training(config, tmp_path / "run")
    wait_for_lines(process, tmp_path / "run", 4)
    process.terminate()
    ended = finish(process)
    assert ended.status == 143
    assert "SIGTERM: saving after this step" in ended.err
    assert "stopped by SIGTERM at step" in ended.out and "same command goes on" in ended.out
    assert str(load_model(tmp_path / "run").step) in ended.out
    assert "Traceback" not in ended.err


def test_a_second_signal_ends_at_once():
    waiting = (
        "import time\nfrom mobilellm_jax.training.signals import Signals\n"
        "with Signals():\n    print('ready', flush=True)\n"
        "    while True:\n        time.sleep(0.01)\n"
    )
    process = start("-c", waiting)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == "\n"
    assert "SIGINT: saving" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert finish(process, timeout=10).status == -signal.SIGTERM


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        assert signals.caught is None and signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_a_resume_may_change_is_announced(plan, tmp_path, capsys):
    """Other devices or packages may change the last bits; nothing else than that is let through."""
    from mobilellm_jax.train import train

    config = eight(plan)
    run(config, tmp_path / "run", stop_at=1)
    config.checkpoint.keep = 5
    train(config, tmp_path / "run", stop_at=1, devices=jax.devices()[:2])
    out = capsys.readouterr().out
    assert "resume: config.checkpoint.keep was 3, is 5." in out
    assert "devices.count: 1 -> 2; the result may differ in its last bits" in out
    assert "resumed at step 1 of 8" in out
