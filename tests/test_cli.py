"""The programs as a user starts them."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from runs import config_file, finish, program, start_training

from mobilellm_jax import cli

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "mobilellm_jax.prepare": ("out", "source", "row_length"),
    "mobilellm_jax.train": ("config", "workdir", "stop_at", "replay"),
    "mobilellm_jax.generate": ("checkpoint", "prompt", "seed"),
    "mobilellm_jax.convert": ("checkpoint", "to", "out"),
    "mobilellm_jax.report": ("out",),
    "mobilellm_jax.plan": ("data", "out", "change_at"),
    "mobilellm_jax.rows": ("step", "document", "usage", "skip"),
    "mobilellm_jax.sweep": ("sweep", "workdir", "cells", "parallel"),
    "mobilellm_jax.clean": ("out", "source"),
    "mobilellm_jax.evaluate": ("checkpoint", "server", "tasks"),
    "mobilellm_jax.worked_problems": ("out", "seed", "train"),
    "mobilellm_jax.family": ("runs", "out", "to", "tasks"),
    "mobilellm_jax.prune": ("checkpoint", "plan", "strategy", "target_params"),
    "mobilellm_jax.judge": ("judge", "judge_model", "out"),
    "data_mixing.probes": ("out", "source", "capability", "judge"),
    "data_mixing.influence": ("plan", "probes", "checkpoints", "out"),
    "data_mixing.leave_one_out": ("config", "plan", "probes", "seeds"),
    "data_mixing.proxies": ("config", "probes", "count"),
    "data_mixing.regmix": ("mixtures", "losses"),
    "data_mixing.weights": ("plan", "method", "out"),
    "data_mixing.compare": ("config", "plans", "probes", "out"),
    "data_mixing.pipeline": ("config", "probes", "out", "seeds"),
    "data_mixing.coevolve": ("config", "plan", "probes", "init_from", "rounds"),
    "data_mixing.why": ("checkpoint", "prompt", "answer"),
}


def test_a_tilde_behind_the_name_of_a_flag_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    ended = program("mobilellm_jax.worked_problems", "--out=~/made", "--train=20")
    assert ended.status == 0, ended.err
    assert (tmp_path / "made").is_dir() and not (tmp_path / "~").exists()
    assert cli._at_home("--prompt=~/.bashrc is") == "--prompt=~/.bashrc is"


def test_texts_and_names_that_are_not_utf8_are_one_sentence():
    ended = program("mobilellm_jax.generate", "--checkpoint=x", "--prompt=caf\udce9")
    assert ended.status == 2 and "Traceback" not in ended.err
    assert ended.err.endswith("is not UTF-8, or the locale is not (LC_ALL=C.UTF-8 would be).\n")


def test_what_a_locale_has_no_letters_for_is_printed_with_escapes():
    code = "from mobilellm_jax import cli; cli.run(lambda: print('gr\\xf6\\xdfe'))"
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = subprocess.run([sys.executable, "-c", code], env=ascii_only, capture_output=True)
    assert ended.stdout == rb"gr\xf6\xdfe" + b"\n", ended


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_says_what_the_program_does_and_names_its_flags(name):
    ended = program(name, "--help")
    assert ended.status in (0, 1)
    assert f"python -m {name}" in ended.out
    for flag in PROGRAMS[name]:
        assert re.search(rf"--(\[no\])?{flag}: ", ended.out), flag


@pytest.mark.parametrize("name", PROGRAMS)
def test_without_what_it_needs_a_program_says_so_and_fails(name):
    ended = program(name)
    one_of_two = name == "mobilellm_jax.evaluate"  # --checkpoint or --server, which no flag says
    assert ended.status == (1 if one_of_two else 2)
    assert ended.err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in ended.err


def test_a_flag_that_is_no_number_is_refused():
    """It would be within every bound, and a cap of it none."""
    inputs = "--config=configs/mixing.py", "--probes=x", "--out=x"
    ended = program("data_mixing.proxies", *inputs, "--max_epochs=nan")
    assert ended.status == 2
    assert ended.err == "error: flag --max_epochs=nan: that is not a number.\n"


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_program_ends_without_a_word_where_nobody_reads_on(lines, tmp_path):
    """Like `... | head`, while it prints or at its end."""
    code = f"from mobilellm_jax import cli\ncli.run(lambda: [print(i) for i in range({lines})])"
    (tmp_path / "program.py").write_text(code)
    command = [sys.executable, tmp_path / "program.py"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 141


@pytest.mark.skipif(
    importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed: gs:// can be read"
)
def test_a_store_whose_package_is_missing_is_one_sentence():
    ended = program("mobilellm_jax.convert", "--checkpoint=gs://no/run", "--to=hf", "--out=x")
    assert ended.status == 1 and "Traceback" not in ended.err
    assert "gcsfs" in ended.err and "pip install 'mobilellm-jax[gcs]'" in ended.err


COLLECTING = """
import gc, os, signal, time
from mobilellm_jax import cli

def interrupted(phase, info):
    gc.callbacks.remove(interrupted)
    os.kill(os.getpid(), signal.SIGINT)
    len(info)  # where Python looks for signals

def main():
    gc.callbacks.append(interrupted)
    gc.collect()
    time.sleep(30)

cli.run(main)
"""


def test_ctrl_c_while_garbage_is_collected_is_not_lost():
    ended = subprocess.run(
        [sys.executable, "-c", COLLECTING], capture_output=True, text=True, timeout=25
    )
    assert (ended.returncode, ended.stderr) == (130, "error: interrupted.\n")


@pytest.mark.parametrize("name", ["mobilellm_jax.generate", "data_mixing.why"])
def test_ctrl_c_while_a_program_is_imported_ends_it_quietly(name, tmp_path):
    """Also where a library would have lost it."""
    (tmp_path / "jax.py").write_text("""
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    len("")  # where Python looks for signals
except KeyboardInterrupt:
    pass
""")
    ended = subprocess.run(
        [sys.executable, "-m", name, "--checkpoint=x"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        # Tests that run in the background ignore it, and so would all that they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, b"")  # shells say 130 of that


def test_what_training_tells_is_complete_and_nothing_else(tmp_path):
    """Parameters, FLOPs, data, devices, how long, held-out results, where the result is."""
    plan = tiny.corpus(tmp_path / "data")
    ended = finish(start_training(config_file(tmp_path, plan), tmp_path / "run"))
    assert ended.status == 0, ended.err
    for pattern in (
        r"parameter +shape +count +sharding",
        r"embedding +320 x 32 +10,240",
        r"stack_0/mlp/down +2 x 48 x 32 +3,072",
        r"model: 25,760 parameters, 2 blocks applied 4 times, 0\.3 MFLOPs per token",
        r"run: 12 steps x 16 rows x 32 tokens = 6,144 tokens",
        r"data, stage train: words 70\.0%, sums 30\.0%; tokens 0 to 6,144",
        r"devices: 1 x cpu, mesh \{'data': 1, 'fsdp': 1\}",
        r"held-out bits per byte at step 12: all [\d.]+, words [\d.]+, sums [\d.]+",
        r"done: step 12, 192 rows; checkpoint in .*/run/checkpoints/12",
    ):
        assert re.search(pattern, ended.out), pattern
    # On standard error the plain lines of progress, and no word of any library.
    lines = ended.err.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert re.fullmatch(r"step \d+/12  loss .* tokens/s .* bits/byte  ETA [\d:]+", line), line
