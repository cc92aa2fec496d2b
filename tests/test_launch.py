"""The launch scripts: sound shell, honest dry runs, one sentence for what is missing."""

import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
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


STAGES = ["pretrain1", "pretrain2", "midtrain1", "midtrain2", "sft_general", "sft_reasoning"]


def test_all_five_are_here():
    assert SCRIPTS == [
        "gke_xpk.sh",
        "local_pod.sh",
        "r1_recipe.sh",
        "slurm_gpu.sbatch",
        "tpu_vm.sh",
    ]


@pytest.mark.parametrize("script", SCRIPTS)
def test_they_are_sound_shell_and_explain_themselves(script):
    assert os.access(LAUNCH / script, os.X_OK)
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)
    status, out, err = launch(script, "--help")
    assert (status, err) == (0, "") and out.startswith("usage: ") and "--dry-run" in out
    if checker := shutil.which("shellcheck", path=f"{BIN}{os.pathsep}{os.environ['PATH']}"):
        subprocess.run([checker, LAUNCH / script], check=True)


def stopped(number, begun, script, *arguments, **environment):
    """How a script ends that a terminal sends a signal when some files are there."""
    process = subprocess.Popen(
        ["bash", LAUNCH / script, *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        # Tests that run in the background ignore it, and so would all that they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 30
    while not all(file.exists() for file in begun):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.1)
    os.killpg(process.pid, number)  # as a terminal does
    return process.wait(timeout=30)


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_each_process_of_the_local_pod_once(tmp_path, number):
    """A second one would end them before they have saved."""
    told = f"echo told >>{tmp_path}/told-$JAX_PROCESS_ID"
    saving = f"trap '{told}' TERM INT; touch {tmp_path}/up-$JAX_PROCESS_ID"
    saving += (
        f"; for i in {{1..20}}; do sleep 0.05; done; echo saved >>{tmp_path}/told-$JAX_PROCESS_ID"
    )
    command = "local_pod.sh", "--processes=2", "--", "bash", "-c", saving
    begun = [tmp_path / f"up-{each}" for each in range(2)]
    assert stopped(number, begun, *command) == 0
    for each in range(2):
        assert (tmp_path / f"told-{each}").read_text().split() == ["told", "saved"]


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


def test_what_an_earlier_command_has_done_does_not_end_the_next(tmp_path):
    """A folder plays the TPU VM, with what another command of the same name has left there."""
    host, programs = tmp_path / "host", tmp_path / "bin"
    (host / "code/.venv/bin").mkdir(parents=True)
    (host / "code/.venv/bin/activate").touch()
    (host / "run.log").write_text("done: step 10\n")
    gone = subprocess.Popen(["true"])
    gone.wait()
    (host / "run.pid").write_text(f"{gone.pid}\n")
    programs.mkdir()
    bodies = {
        "gcloud": 'case "$*" in *describe*) echo ACTIVE ;; *"pip install"*) ;; '
        f'*ssh*) cd {host} && last="${{@: -1}}" && bash -c "${{last#--command=}}" ;; esac',
        "sleep": "exec /bin/sleep 0.1",
    }
    for name, body in bodies.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    command = "--", "bash", "-c", "echo 'done: step 20'"
    arguments = (*CLOUD, "--type=v6e-8", "--keep_trying", *command)
    status, _, err = launch("tpu_vm.sh", *arguments, **environment)
    assert (status, err) == (0, "")
    assert (host / "run.log").read_text() == "done: step 20\n"
    assert (host / "run-before.log").read_text() == "done: step 10\n"


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


@pytest.mark.parametrize(
    ("status", "said", "queued"),
    [
        (0, "the same command goes on", False),
        (1, "config.seed is no number", False),
        (143, "SIGTERM: saving", True),
        (42, "process 3 has died: the same command goes on from the last checkpoint", True),
        (137, "process 3 has died: the same command goes on from the last checkpoint", True),
        (137, "config.seed is no number", False),  # Slurm has ended the others
    ],
)
@pytest.mark.parametrize("more", [0, 190])
def test_a_slurm_job_that_goes_on_is_queued_again(status, said, queued, more, tmp_path):
    """Slurm's programs play along: what a step says is added to the file of the job's output."""
    log = tmp_path / "elsewhere.out"
    log.write_text("process 1 has died: the same command goes on\n")  # an earlier start of the job
    says = tmp_path / "says"  # may be much, behind the sentence as well
    says.write_text("\n".join([*["x" * 197] * more, said, *["y" * 197] * more, ""]))
    programs = {
        "srun": f'[[ "$SRUN_CPUS_PER_TASK" == 6 ]] || exit 9\ncat {says} >>{log}\nexit {status}',
        "scontrol": f'echo "$@" >>{tmp_path}/asked\n[[ "$1" == show ]] && echo "   StdOut={log}"\nexit 0',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "mobilellm", "SLURM_CPUS_PER_TASK": "6"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    for _ in range(5):  # no race decides
        log.write_text(log.read_text().splitlines(keepends=True)[0])
        assert launch("slurm_gpu.sbatch", *TRAIN, PATH=path, **job)[0] == status
    asked = (tmp_path / "asked").read_text() if status else ""
    assert asked.count("requeue 7") == 5 * queued


def settings(line):
    """The flags of a command of training, of which each is there once."""
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "mobilellm_jax.train"]
    found = dict(word.removeprefix("--").split("=", 1) for word in words[3:])
    assert len(found) == len(words) - 3
    return found


@pytest.mark.parametrize("size", ["140m", "360m", "950m", "tiny"])
def test_the_recipe_runs_its_stages_in_order_with_the_paths_of_the_configurations(size):
    """What the script says without options is what the configuration says by itself."""
    status, out, err = launch("r1_recipe.sh", f"--size={size}", "--dry-run", PYTHON="")
    assert (status, err) == (0, "")
    commands = [settings(line) for line in out.splitlines() if "mobilellm_jax.train" in line]
    arguments = [found["config"].partition(":")[2] for found in commands]
    teacher = ["teacher"] if size == "tiny" else []
    assert arguments == [f"{size},{stage}" for stage in (*teacher, *STAGES)]
    get_config = runpy.run_path(str(LAUNCH.parent / "configs" / "mobilellm_r1.py"))["get_config"]
    for argument, found in zip(arguments, commands, strict=True):
        config = get_config(argument)
        assert found.pop("workdir") == f"runs/r1-{size}-{config.stage}"
        assert found.pop("config.plan") == config.plan
        assert found.pop("config.init_from", "") == config.init_from
        assert found.pop("config.teacher.path", "") == config.teacher.path
        assert set(found) == {"config"}


def test_the_recipe_begins_and_ends_where_it_is_told():
    options = ("--from=pretrain2", "--to=midtrain1", "--data=D", "--runs=R", "--teacher=T")
    launcher = "--launcher=launch/local_pod.sh --processes=2 --"
    more = ("--dry-run", "--", "--config.mesh.fsdp=8", "--config.wandb=a b")
    status, out, err = launch("r1_recipe.sh", "--size=950m", *options, launcher, *more, PYTHON="")
    assert (status, err) == (0, "")
    lines = [
        line.removeprefix("launch/local_pod.sh --processes=2 -- ") for line in out.splitlines()
    ]
    first, second = map(settings, lines)
    for found in (first, second):
        assert found.pop("config.mesh.fsdp") == "8" and found.pop("config.wandb") == "a b"
    base = "configs/mobilellm_r1.py:950m"
    assert first == {
        "config": f"{base},pretrain2",
        "workdir": "R/r1-950m-pretrain2",
        "config.plan": "D/pretrain.json",
        "config.init_from": "R/r1-950m-pretrain1",
    }
    assert second == {
        "config": f"{base},midtrain1",
        "workdir": "R/r1-950m-midtrain1",
        "config.plan": "D/midtrain.json",
        "config.init_from": "R/r1-950m-pretrain2",
        "config.teacher.path": "T",
    }


def fake_python(directory, body):
    """An interpreter that notes the stage it is started for, and then does as it is told."""
    path = directory / "python"
    path.write_text(
        "#!/usr/bin/env bash\nfor word; do case $word in --workdir=*) "
        f'echo "${{word##*-}}" >>{directory}/stages ;; esac; done\n{body}\n'
    )
    path.chmod(0o755)
    return str(path)


def test_the_recipe_ends_with_the_stage_that_fails(tmp_path):
    fake = fake_python(tmp_path, f"[[ $(wc -l <{tmp_path}/stages) -lt 3 ]] || exit 7")
    status, out, _ = launch("r1_recipe.sh", "--size=140m", PYTHON=fake)
    assert status == 7
    assert (tmp_path / "stages").read_text().split() == STAGES[:3]
    assert out.splitlines()[-1] == "== midtrain1, 3 of 6: runs/r1-140m-midtrain1"


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_stage_once_and_ends_the_recipe_behind_it(tmp_path, number, status):
    """The stage takes its time to save, is not told twice, and no other stage begins."""
    saving = f'trap "echo told >>{tmp_path}/told" TERM INT\nfor i in {{1..20}}; do sleep 0.05; done'
    fake = fake_python(tmp_path, f"{saving}\necho saved >>{tmp_path}/told")
    begun = [tmp_path / "stages"]
    assert stopped(number, begun, "r1_recipe.sh", "--size=140m", PYTHON=fake) == status
    assert (tmp_path / "told").read_text().split() == ["told", "saved"]
    assert (tmp_path / "stages").read_text().split() == STAGES[:1]


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
        ("r1_recipe.sh", ["--size=141m"], "--size=141m"),
        ("r1_recipe.sh", ["--from=pretrain3"], "pretrain3 is no stage"),
        ("r1_recipe.sh", ["--size=140m", "--from=teacher"], "teacher is no stage"),
        ("r1_recipe.sh", ["--from=midtrain2", "--to=midtrain1"], "--from=midtrain2 comes after"),
        ("r1_recipe.sh", ["--config.steps=3"], "come after --"),
        ("slurm_gpu.sbatch", [], "no command"),
        ("slurm_gpu.sbatch", ["--dryrun", "true"], "--dryrun"),
    ],
)
def test_what_is_missing_is_named_in_one_sentence(script, arguments, sentence):
    status, out, err = launch(script, *arguments)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and sentence in err
