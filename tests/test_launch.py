"""The launch scripts: sound shell, honest dry runs, one sentence for what is missing."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
BIN = Path(sys.executable).parent
TRAIN = ["python", "-m", "mobilellm_jax.train", "--config=a config.py", "--workdir=gs://b/run"]
CLOUD = ["--name=one", "--project=p", "--zone=z"]


def launch(script, *arguments, **environment):
    """(status, output, error) of a launch script."""
    named = ("PROJECT", "ZONE", "CLUSTER", "LIBTPU_INIT_ARGS", "JAX_COMPILATION_CACHE_DIR")
    clean = {k: v for k, v in os.environ.items() if k not in named}
    done = subprocess.run(
        ["bash", LAUNCH / script, *arguments],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_all_four_are_here():
    assert SCRIPTS == ["gke_xpk.sh", "local_pod.sh", "slurm_gpu.sbatch", "tpu_vm.sh"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_they_are_sound_shell_and_explain_themselves(script):
    assert os.access(LAUNCH / script, os.X_OK)
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    status, out, err = launch(script, "--help")
    assert (status, err) == (0, "") and out.startswith("usage: ") and "--dry-run" in out
    if checker := shutil.which("shellcheck", path=f"{BIN}{os.pathsep}{os.environ['PATH']}"):
        subprocess.run([checker, LAUNCH / script], check=True)


def test_the_local_pod_numbers_its_processes():
    arguments = ("--processes=3", "--devices=2", "--port=20001", "--dry-run", "--", *TRAIN)
    status, out, _ = launch("local_pod.sh", *arguments)
    assert status == 0
    for number, line in enumerate(out.splitlines()):
        words = shlex.split(line)
        assert f"JAX_PROCESS_ID={number}" in words and "JAX_NUM_PROCESSES=3" in words
        assert "JAX_COORDINATOR_ADDRESS=127.0.0.1:20001" in words
        assert words[-len(TRAIN) :] == TRAIN
    assert number == 2


def test_the_local_pod_ends_with_the_worst_status():
    worst = "import os, sys; sys.exit(int(os.environ['JAX_PROCESS_ID']) * 3)"
    status, _, err = launch("local_pod.sh", "--processes=3", "--", sys.executable, "-c", worst)
    assert status == 6
    assert "process 1 ended with status 3" in err and "process 0" not in err


def test_a_pod_slice_is_queued_installed_and_started():
    environment = {"LIBTPU_INIT_ARGS": "--a=1 --b=2"}
    arguments = (*CLOUD, "--type=v5litepod-256", "--spot", "--dry-run", "--", *TRAIN)
    status, out, err = launch("tpu_vm.sh", *arguments, **environment)
    assert (status, err) == (0, "")
    create, tar, copy, install, start, _ = [shlex.split(line) for line in out.splitlines()]
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "one"]
    assert {"--project=p", "--zone=z", "--accelerator-type=v5litepod-256", "--spot"} <= {*create}
    assert tar[0] == "tar" and "scp" in copy
    for step in (copy, install, start):
        assert {"--project=p", "--zone=z", "--worker=all"} <= {*step}
    there = shlex.split(start[-1].removeprefix("--command="))
    begin = there.index("nohup")
    assert there[begin - 1] == "LIBTPU_INIT_ARGS=--a=1 --b=2"
    assert there[begin + 1 :][: len(TRAIN) + 1] == [*TRAIN, "--distributed=on"]


def test_a_workload_is_submitted():
    arguments = (*CLOUD, "--cluster=c", "--type=v5p-1024", "--slices=2", "--image=i", "--dry-run")
    status, out, err = launch("gke_xpk.sh", *arguments, "--", *TRAIN)
    assert (status, err) == (0, "")
    words = shlex.split(out)
    assert words[:3] == ["xpk", "workload", "create"]
    assert {"--workload=one", "--cluster=c", "--num-slices=2", "--docker-image=i"} <= {*words}
    there = shlex.split(words[-1].removeprefix("--command="))
    assert there == [*TRAIN, "--distributed=on"]


def test_a_slurm_job_runs_the_command_as_it_is():
    status, out, _ = launch("slurm_gpu.sbatch", "--dry-run", *TRAIN)
    assert status == 0
    assert shlex.split(out)[0] == "srun" and shlex.split(out)[-len(TRAIN) :] == TRAIN
    status, _, err = launch("slurm_gpu.sbatch", *TRAIN, SLURM_JOB_ID="")
    assert status == 2 and "sbatch" in err


@pytest.mark.parametrize("script, more", [("tpu_vm.sh", []), ("gke_xpk.sh", ["--cluster=c"])])
def test_logs_and_delete(script, more):
    for action, words in (("--logs", {"gcloud", "kubectl"}), ("--delete", {"gcloud", "xpk"})):
        status, out, _ = launch(script, *CLOUD, *more, action, "--dry-run")
        assert status == 0
        assert shlex.split(out)[0] in words and "one" in out


@pytest.mark.parametrize(
    "script, arguments, sentence",
    [
        ("local_pod.sh", [], "no command"),
        ("local_pod.sh", ["--processes=none", "--", "true"], "--processes=none"),
        ("local_pod.sh", ["--proceses=2", "--", "true"], "--proceses=2"),
        ("tpu_vm.sh", [], "--name is missing"),
        ("tpu_vm.sh", ["--name=one"], "--project is missing"),
        ("tpu_vm.sh", ["--name=one", "--project=p"], "--zone is missing"),
        ("tpu_vm.sh", [*CLOUD, "--", "true"], "--type is missing"),
        ("tpu_vm.sh", [*CLOUD, "--type=v6e-8"], "no command"),
        ("gke_xpk.sh", CLOUD, "--cluster is missing"),
        ("gke_xpk.sh", [*CLOUD, "--cluster=c", "--", "true"], "--type is missing"),
        ("slurm_gpu.sbatch", [], "no command"),
        ("slurm_gpu.sbatch", ["--dryrun", "true"], "--dryrun"),
    ],
)
def test_what_is_missing_is_named_in_one_sentence(script, arguments, sentence):
    status, out, err = launch(script, *arguments)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and sentence in err
