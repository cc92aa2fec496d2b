"""Several processes are one run: the same losses, one voice, and one end."""

import json
import os
import signal
import socket
import time

import jax
import pytest
import tiny
from runs import bits, config_file, finish, lines, rows_seen, run, start, start_pod, wait_for_lines

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import parameter_count
from mobilellm_jax.parallel import distributed
from mobilellm_jax.training.checkpoint import load_model

PATIENCE = 400  # seconds for a pod of processes on a busy machine
GOES_ON = "the same command goes on from the last checkpoint"


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("data"))


def losses(workdir, kind="train"):
    return [record["loss"] for _, record in sorted(lines(workdir, kind).items())]


def pod(folder, config, workdir, *arguments, processes=2, devices=1, status=0):
    """Trains in several processes to their end; what each said."""
    ended = finish(
        start_pod(processes, devices, folder, config, workdir, *arguments), timeout=PATIENCE
    )
    said = [(folder / f"process-{i}.log").read_text() for i in range(processes)]
    assert ended.status == status, "\n\n".join(said)
    return said


@pytest.mark.slow
def test_processes_and_meshes_change_within_a_run(plan, tmp_path):
    """2 processes x 2 devices, 1 x 1, 1 x 4, then 2 x 2 again, against one device throughout."""
    config = config_file(tmp_path, plan, mesh__fsdp=-1, mesh__data=1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def again():
        c = tiny.config(plan)
        c.mesh.data, c.mesh.fsdp = 1, -1
        return c

    run(again(), whole)
    said = pod(tmp_path / "first", config, parts, "--stop_at=4", devices=2)
    assert "devices: 4 x cpu" in said[0] and "processes: 2" in said[0]
    run(again(), parts, stop_at=7)
    run(again(), parts, stop_at=10, devices=jax.devices()[:4])
    pod(tmp_path / "last", config, parts, devices=2)
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-5)
    assert losses(parts, "heldout") == pytest.approx(losses(whole, "heldout"), abs=1e-5)
    assert [r["rows"] for r in lines(parts).values()] == [16 * step for step in range(1, 13)]
    per_source = [
        [[r[f"rows/{n}"] for n in ("words", "sums")] for _, r in sorted(lines(each).items())]
        for each in (whole, parts)
    ]
    assert per_source[0] == per_source[1]
    # One voice: the second process says nothing, and writes nothing.
    assert "step 4" in said[0] and "step" not in said[1] and "parameters" not in said[1]
    assert len(list((parts / "tensorboard").iterdir())) == 4  # one for each start


@pytest.mark.slow
def test_processes_judge_together(plan, tmp_path):
    """2 processes x 2 devices that split the weights find what one device finds, and one speaks."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    tiny.tasks(tmp_path)
    judged = {"eval__tasks": "sums,doubles", "eval__data": str(tmp_path), "mesh__fsdp": 2}
    said = pod(
        tmp_path / "logs",
        config_file(tmp_path, plan, **judged),
        tmp_path / "several",
        devices=2,
    )
    one = tiny.config(plan)
    one.eval.tasks, one.eval.data = judged["eval__tasks"], judged["eval__data"]
    run(one, tmp_path / "one")
    expected, found = (lines(tmp_path / name, "tasks")[12] for name in ("one", "several"))
    assert found == pytest.approx(expected) and "sums acc_norm" in found
    assert "tasks at step 12" in said[0] and "tasks" not in said[1]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["magnitude", "adapt"])
def test_processes_prune_together(plan, tmp_path, strategy):
    """Scores are of weights that no process has whole, and others than those that a step adds up."""
    pruning = {
        "target": int(parameter_count(tiny.MODEL) * 0.8),
        "begin": 2,
        "cuts": 3,
        "score": "fisher",
        "strategy.use": f"mobilellm_jax.pruning.strategies:{strategy}",
    }
    keys = {f"pruning__{key.replace('.', '__')}": value for key, value in pruning.items()}
    pod(
        tmp_path / "logs",
        config_file(tmp_path, plan, mesh__fsdp=2, **keys),
        tmp_path / "several",
    )
    one = tiny.config(plan)
    one.update_from_flattened_dict({f"pruning.{key}": value for key, value in pruning.items()})
    run(one, tmp_path / "one")
    expected, found = (lines(tmp_path / name, "cut") for name in ("one", "several"))
    assert len(found) == 3
    assert [r["parameters"] for r in found.values()] == [r["parameters"] for r in expected.values()]
    assert losses(tmp_path / "several") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_fifty_steps_are_those_of_one_process(plan, tmp_path, processes):
    config = config_file(tmp_path, plan, steps=50)
    run(tiny.config(plan, steps=50), tmp_path / "one")
    pod(tmp_path / "logs", config, tmp_path / "several", processes=processes)
    one, several = (losses(tmp_path / name) for name in ("one", "several"))
    difference = max(abs(a - b) for a, b in zip(one, several, strict=True))
    print(f"{processes} processes, 50 steps: losses differ by {difference:.1e} at most")
    assert difference < 1e-4


def killed(processes, victim, config, workdir, logs):
    """Kills one process of a run after some steps; seconds until all have ended, and what they said."""
    process = start_pod(processes, 1, logs, config, workdir)
    wait_for_lines(process, workdir, 8, timeout=PATIENCE)
    os.kill(int((logs / f"process-{victim}.pid").read_text()), signal.SIGKILL)
    since = time.monotonic()
    ended = finish(process, timeout=PATIENCE)
    seconds = time.monotonic() - since
    assert ended.status == 128 + signal.SIGKILL
    assert "ended with status 42" in ended.err  # of the others: start this again
    return seconds, [(logs / f"process-{i}.log").read_text() for i in range(processes)]


@pytest.mark.parametrize(
    "processes, victim",
    [
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(2, 0, marks=pytest.mark.slow),
        pytest.param(4, 2, marks=pytest.mark.slow),
    ],
)
def test_kill_9_of_one_ends_all_and_the_same_command_goes_on(plan, tmp_path, processes, victim):
    config = config_file(tmp_path, plan, steps=40, checkpoint__every=3, eval__every=20)
    pod(tmp_path / "l0", config, tmp_path / "whole", processes=processes)
    workdir = tmp_path / "killed"
    seconds, said = killed(processes, victim, config, workdir, tmp_path / "l1")
    print(f"{processes} processes, {victim} killed: all ended after {seconds:.1f} s")
    assert seconds < 60
    for number, text in enumerate(said):
        if number != victim:
            last = text.splitlines()[-1]
            assert last.startswith(f"error: process {number}: process {victim}"), text
            assert "has died" in last and GOES_ON in last
    pod(tmp_path / "l2", config, workdir, processes=processes)
    assert bits(load_model(workdir).params) == bits(load_model(tmp_path / "whole").params)
    assert rows_seen(workdir) == rows_seen(tmp_path / "whole")


def test_sigterm_to_one_saves_in_all(plan, tmp_path):
    """Wherever they are, for most of the time in an evaluation."""
    small = [{**tiny.MODEL.to_dict()["stacks"][0], "layers": 1, "repeats": 1}]
    often = {"eval__every": 1, "checkpoint__every": 50_000}
    config = config_file(tmp_path, plan, steps=100_000, model__stacks=small, **often)
    process = start_pod(2, 1, tmp_path / "logs", config, tmp_path / "run")
    wait_for_lines(process, tmp_path / "run", 4, timeout=PATIENCE)
    os.kill(int((tmp_path / "logs" / "process-1.pid").read_text()), signal.SIGTERM)
    ended = finish(process, timeout=PATIENCE)
    said = [(tmp_path / "logs" / f"process-{i}.log").read_text() for i in range(2)]
    assert ended.status == 143, said
    assert "process 0 ended with status 143\nprocess 1 ended with status 143" in ended.err
    saved = load_model(tmp_path / "run")
    assert f"stopped by SIGTERM at step {saved.step:,} of" in said[0]
    assert list(lines(tmp_path / "run")) == list(range(1, saved.step + 1))
    measured = {*lines(tmp_path / "run", "heldout")}
    assert {*range(1, saved.step)} <= measured <= {*range(1, saved.step + 1)}
    assert (saved.step in measured) != ("heldout" in saved.meta["unmeasured"])
    assert not any("Traceback" in text for text in said)


def refusals(commands):
    """The last line of each of the processes that are started with these arguments and variables."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [
        start(
            *("-m", "mobilellm_jax.train", *arguments),
            JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}",
            JAX_NUM_PROCESSES=str(len(commands)),
            JAX_PROCESS_ID=str(number),
        )
        for number, arguments in enumerate(commands)
        if arguments
    ]
    ended = [finish(process, timeout=PATIENCE) for process in started]
    assert all(one.status == 1 for one in ended), ended
    return [one.err.splitlines()[-1] for one in ended]


@pytest.mark.slow
def test_processes_with_different_configurations_are_refused_before_they_compile(plan, tmp_path):
    config = config_file(tmp_path, plan)
    same = [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    found = refusals([same, [*same, "--config.seed=1", "--stop_at=5"]])
    for number, last in enumerate(found):
        assert last.startswith(f"error: process {number}: process ")
        assert "differs from process 0: config.seed is 1, not 0; stop_at is 5, not None" in last
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_batch_that_the_processes_cannot_share_is_refused(plan, tmp_path):
    config = config_file(tmp_path, plan, global_batch=3)
    same = [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    for last in refusals([same, same]):
        assert "config.global_batch=3 cannot be split" in last and "2 device(s)" in last


@pytest.mark.slow
def test_a_process_whose_others_do_not_come_says_so(plan, tmp_path):
    config = config_file(tmp_path, plan)
    alone = [f"--config={config}", f"--workdir={tmp_path}", "--distributed_timeout=3"]
    (last,) = refusals([None, alone])
    assert last.startswith("error: process 1: not all processes came within 3 s to 127.0.0.1:")


# --- How a process finds out that it is one of several ----------------------------------------------


@pytest.fixture
def clean(monkeypatch):
    for name in (*distributed.VARIABLES, "SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    "mode, environment, expected",
    [
        ("auto", {}, None),
        ("off", {"JAX_COORDINATOR_ADDRESS": "a:1"}, None),
        ("on", {}, {}),
        ("auto", {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ("auto", {"SLURM_STEP_NUM_TASKS": "16"}, {}),
        ("auto", {"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ("auto", {"TPU_WORKER_HOSTNAMES": "w-0,w-1"}, {}),
        (
            "auto",
            dict(zip(distributed.VARIABLES, ("host:1234", "4", "3"), strict=True)),
            {"coordinator_address": "host:1234", "num_processes": 4, "process_id": 3},
        ),
    ],
)
def test_what_the_environment_says(clean, mode, environment, expected):
    for name, value in environment.items():
        clean.setenv(name, value)
    assert distributed.wanted(mode) == expected


@pytest.mark.parametrize(
    "values, sentence",
    [
        (("host:1234", "4"), "JAX_PROCESS_ID is not"),
        (("host:1234", "4", "4"), "do not fit"),
        (("host:1234", "four", "0"), "do not fit"),
        (("host", "4", "0"), "HOST:PORT"),
    ],
)
def test_variables_that_make_no_sense_are_refused(clean, values, sentence):
    for name, value in zip(distributed.VARIABLES, values, strict=False):
        clean.setenv(name, value)
    with pytest.raises(UserError, match=sentence):
        distributed.wanted("auto")


def test_one_process_agrees_with_itself():
    assert distributed.all_of("anything", True) and not distributed.all_of("anything", False)
    distributed.check_same({"config": json.loads("{}")})
    distributed.meet("nobody")
    assert distributed.leads() and distributed.store() is None
