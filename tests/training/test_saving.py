"""Saves that fail do not stop a run and are not hushed up; damaged checkpoints are set aside."""

import concurrent.futures
import contextlib
import errno
import functools
import json
import os
import re
import shutil
import subprocess
import threading
import time

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from etils import epath
from runs import bits, config_file, files, finish, lines, run, start_pod, start_training

from mobilellm_jax.errors import UserError
from mobilellm_jax.train import train
from mobilellm_jax.training import saving
from mobilellm_jax.training.checkpoint import load_model
from mobilellm_jax.training.saving import Checkpoints
from mobilellm_jax.training.step import init_state

# Threads of Orbax stumble over a checkpoint that cannot be read or written, after it has been told.
pytestmark = [
    pytest.mark.usefixtures("shared_programs"),
    pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnraisableExceptionWarning",
        "ignore::pytest.PytestUnhandledThreadExceptionWarning",
    ),
]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, run(tiny.config(plan), workdir)


@pytest.fixture(scope="module")
def unfinished(plan, tmp_path_factory):
    """The workdir of the same run stopped at step 9, of which tests damage copies."""
    workdir = tmp_path_factory.mktemp("unfinished") / "run"
    run(tiny.config(plan), workdir, stop_at=9)
    return workdir


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(saving, "RETRY", (0.0, 0.0))
    monkeypatch.setattr(saving, "LAST_TRIES", (0.0, 0.01))


def steps_saved(workdir):
    return sorted(p.name for p in (workdir / "checkpoints").iterdir())


# --- Saves that fail ------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(monkeypatch, fails):
    """The disk is full at each save for which `fails(step)` says so, as a thread of Orbax finds it."""
    handler = saving.ocp.StandardCheckpointHandler
    write = handler.async_save

    async def writes(self, directory, *args, **kwargs):
        step = int(directory.parent.name.split(".")[0])
        if fails(step):
            raise OSError(errno.ENOSPC, "No space left on device")
        return await write(self, directory, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(handler, "async_save", writes)
        yield


def test_a_save_that_fails_is_told_counted_and_repeated(
    plan, whole, tmp_path, monkeypatch, impatient, capsys
):
    tried = set()  # steps; the first two fail

    def fails(step):
        tried.add(step)
        return len(tried) <= 2

    with full_disk(monkeypatch, fails):
        state = train(tiny.config(plan), tmp_path / "run", devices=tiny.one_device())
    err = capsys.readouterr().err
    assert bits(state) == bits(whole[1])
    for step in sorted(tried)[:2]:
        assert f"warning: the checkpoint of step {step} could not be written" in err
    assert "No space left" in err and "tries again in 0 s" in err
    assert "no checkpoint is written yet" in err
    assert sorted(tried)[:1] == [4] and {8, 12} <= tried and len(tried) >= 4  # due, and repeated
    assert {*steps_saved(tmp_path / "run")} <= {str(step) for step in sorted(tried)[2:]}
    failed = [record["failed_saves"] for record in lines(tmp_path / "run").values()]
    assert failed[0] == 0 and failed[-1] == 2 and failed == sorted(failed)
    assert bits(load_model(tmp_path / "run").params) == bits(whole[1].params)


def test_what_is_kept_for_ever_need_not_be_due_otherwise(plan, tmp_path):
    config = tiny.config(plan)
    config.checkpoint = {"every": 3, "keep": 1, "keep_every": 5}
    run(config, tmp_path / "run")
    assert steps_saved(tmp_path / "run") == ["10", "12", "5"]


def test_a_last_save_that_fails_is_an_error(plan, tmp_path, monkeypatch, impatient):
    with full_disk(monkeypatch, lambda step: step > 8), pytest.raises(UserError) as error:
        run(tiny.config(plan), tmp_path / "run")
    assert "step, 12, could not be written" in str(error.value)
    assert "goes on from step 8" in str(error.value)
    assert steps_saved(tmp_path / "run") == [
        "4",
        "8",
    ]  # nothing half-written is left to fill the disk
    assert int(run(tiny.config(plan), tmp_path / "run").step) == 12


def test_the_delay_grows_and_a_success_resets_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(saving, "RETRY", (10.0, 30.0))
    now = [0.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    checkpoints = Checkpoints(epath.Path(tmp_path), 1000, 3, 0)
    state = init_state({"w": jnp.arange(3.0)}, lambda rate: optax.adam(rate))
    broken = [True]
    tried = []
    with full_disk(monkeypatch, lambda step: broken[0]):
        checkpoints.save(state, {"step": 1}, tiny.tokenizer())
        for step in range(2, 120):
            checkpoints._settle(wait=True)
            broken[0] = step < 90
            now[0] += 1.0
            if checkpoints.due(step):
                tried.append(step)
                checkpoints.save(state, {"step": step}, tiny.tokenizer())
    checkpoints.close()
    assert np.diff([1, *tried]).tolist() == [
        10,
        20,
        30,
        30,
    ]  # and none after the last, which succeeds
    assert checkpoints.failed == 4
    assert steps_saved(tmp_path) == [str(tried[-1])]


@contextlib.contextmanager
def small_disk(folder):
    """A file system of 1.5 MB in the place of a folder; gives what makes it larger."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        larger = ["mount", "-o", "remount,size=50m", str(folder)]
        yield functools.partial(subprocess.run, larger, check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
@pytest.mark.slow
def test_a_disk_that_is_really_full(plan, tmp_path):
    """Checkpoints on a file system with room for the first few, which then becomes larger."""
    workdir = tmp_path / "run"
    with small_disk(workdir / "checkpoints") as enlarge:
        config = config_file(tmp_path, plan, checkpoint__keep=20, checkpoint__every=1)
        (workdir / "config.json").write_text(json.dumps(tiny.config(plan).to_dict()))
        ended = finish(start_training(config, workdir))
        assert ended.status == 1
        assert "tries again in 10 s" in ended.err
        assert ended.err.splitlines()[-1].startswith("error: the checkpoint of the last step, 12, ")
        assert sorted(lines(workdir)) == list(range(1, 13))  # training went on all the same
        enlarge()
        ended = finish(start_training(config, workdir))
        assert ended.status == 0, ended.err
        assert finish(start_training(config, tmp_path / "whole")).status == 0
        assert bits(load_model(workdir).params) == bits(load_model(tmp_path / "whole").params)


class Store:
    """JAX's coordination service, of threads."""

    def __init__(self, processes):
        self._barriers, self._values = {}, {}
        self._lock, self._processes = threading.Lock(), processes

    def wait_at_barrier(self, key, timeout_ms):
        with self._lock:
            barrier = self._barriers.setdefault(key, threading.Barrier(self._processes))
        barrier.wait(timeout_ms / 1000)

    def key_value_set(self, key, value):
        with self._lock:
            assert key not in self._values
            self._values[key] = value

    def key_value_dir_get(self, folder):
        with self._lock:
            return [(k, v) for k, v in self._values.items() if k.startswith(folder)]


@pytest.mark.parametrize(
    ("failing", "at", "told"),
    [
        ((), "", {}),
        ((2,), "write", {0: "process 2 could", 1: "process 2 could", 2: "disk"}),
        ((0, 1), "write", {0: "disk", 1: "disk", 2: "process 0 could|process 1 could"}),
        ((0, 1, 2), "write", {0: "disk", 1: "disk", 2: "disk"}),
        ((0,), "commit", {0: "disk", 1: "process 0 could", 2: "process 0 could"}),
    ],
)
def test_a_process_that_fails_leaves_no_other_waiting(monkeypatch, failing, at, told):
    """Whoever fails wherever: all come to the end of this save, and of the next."""
    monkeypatch.setattr(saving.distributed, "new_key", lambda name: name)
    store, said, committed = Store(3), [{}, {}], []

    def process(number):
        """What Orbax does in a save, of which the first fails."""
        meeting = saving.Meeting(store, number)
        wait = functools.partial(meeting, timeout_ms=20_000)
        for save in range(2):
            wait(key="set_value_start::1")
            wait(key="set_value_end::1")
            try:
                if save == 0 and at == "write" and number in failing:
                    raise OSError("disk")
                wait(key="async_write_complete.8")
                if number == 0:
                    if save == 0 and at == "commit":
                        raise OSError("disk")
                    committed.append(save)
                wait(key="async_commit_complete.8")
            except (OSError, RuntimeError) as error:
                said[save][number] = str(error)
            finally:
                wait(key="set_value_start::2")
                wait(key="set_value_end::2")

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(process, range(3)))
    assert said[0].keys() == told.keys() and not said[1]
    assert all(re.search(told[number], sentence) for number, sentence in said[0].items())
    assert committed == ([1] if failing else [0, 1])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
@pytest.mark.slow
def test_a_full_disk_stops_no_process_of_several(plan, tmp_path):
    """None waits for another that cannot write its part."""
    logs, workdir = tmp_path / "logs", tmp_path / "run"
    with small_disk(workdir / "checkpoints") as enlarge:
        keys = {"checkpoint.keep": 20, "checkpoint.every": 2, "mesh.fsdp": 2}
        config = config_file(tmp_path, plan, **{k.replace(".", "__"): v for k, v in keys.items()})
        same = tiny.config(plan)
        same.update_from_flattened_dict(keys)
        (workdir / "config.json").write_text(json.dumps(same.to_dict()))
        began = time.monotonic()
        ended = finish(start_pod(2, 1, logs, config, workdir), timeout=400)
        assert ended.status == 1 and time.monotonic() - began < 300
        said = [(logs / f"process-{i}.log").read_text() for i in range(2)]
        assert any("No space left" in text for text in said), said
        assert "the checkpoint of the last step, 12, could not be written" in said[0]
        enlarge()
        ended = finish(start_pod(2, 1, logs, config, workdir), timeout=400)
        assert ended.status == 0
        assert sorted(lines(workdir)) == list(range(1, 13))


# --- Damaged checkpoints ----------------------------------------------------------------------------


def cut(folder):
    for file in (folder / "params").rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)


def garble(folder):
    rng = np.random.default_rng(0)
    for file in (folder / "optimizer").rglob("d/*"):
        data = np.frombuffer(file.read_bytes(), np.uint8).copy()
        data[len(data) // 4 : len(data) // 2] = rng.integers(
            0, 256, len(data) // 2 - len(data) // 4
        )
        file.write_bytes(data.tobytes())


DAMAGES = {
    "cut": cut,
    "garbled": garble,
    "no weights": lambda folder: shutil.rmtree(folder / "params"),
    "no description": lambda folder: (folder / "meta" / "metadata").unlink(),
    "torn description": lambda folder: os.truncate(folder / "meta" / "metadata", 100),
}


@pytest.mark.parametrize(
    "damage",
    [pytest.param(d, marks=[pytest.mark.slow] if d.startswith("torn") else []) for d in DAMAGES],
)
def test_a_damaged_newest_is_set_aside_and_the_one_before_used(
    plan, whole, unfinished, tmp_path, capsys, damage
):
    shutil.copytree(unfinished, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "9"
    DAMAGES[damage](newest)
    content = {p.relative_to(newest): data for p, data in files(newest).items()}
    capsys.readouterr()
    state = train(tiny.config(plan), tmp_path / "run", devices=tiny.one_device())
    out = capsys.readouterr().out
    aside = newest.with_name("9.damaged")
    assert f"warning: the checkpoint {newest} is damaged (" in out
    assert f"it is now {aside}, and the one before it is used" in out
    assert "resumed at step 8 of 12" in out
    assert {p.relative_to(aside): data for p, data in files(aside).items()} == content
    assert bits(state) == bits(whole[1])
    assert int(run(tiny.config(plan), tmp_path / "run").step) == 12  # it hinders nobody


def test_another_runs_checkpoint_is_refused_and_not_taken_for_damaged(plan, unfinished, tmp_path):
    shutil.copytree(unfinished, tmp_path / "run")
    meta = tmp_path / "run" / "checkpoints" / "9" / "meta" / "metadata"
    told = json.loads(meta.read_text())
    told["config"]["seed"] = 7
    meta.write_text(json.dumps(told))
    with pytest.raises(UserError, match="another run .*config.seed: 7 there, 0 here"):
        run(tiny.config(plan), tmp_path / "run")
    assert steps_saved(tmp_path / "run") == ["4", "8", "9"]
