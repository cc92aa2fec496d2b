"""Co-evolution as a program that is stopped at any moment ends as if it never was."""

import signal
import time

import pytest
import runs
from coevolving import STEPS, coevolving

from data_mixing import probe_sets
from mobilellm_jax.interop.stored import load_model


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return coevolving(tmp_path_factory.mktemp("coevolve"))


@pytest.mark.slow
def test_the_program_stopped_in_every_part_ends_as_if_it_never_was(given, tmp_path):
    """Killed, interrupted and terminated while it scores, stores what is kept, trains and goes on."""
    found, base = given
    (tmp_path / "probes").mkdir()
    probe_sets.write(found.probes, {}, tmp_path / "probes")
    changes = {"steps": STEPS, "checkpoint__every": 2, "eval__every": STEPS}
    config = runs.config_file(tmp_path, "", **changes)
    plan = f"{found.plan.directory}/mixture.json"

    def start(out):
        return runs.start(
            *("-m", "data_mixing.coevolve", f"--config={config}", f"--plan={plan}"),
            *(f"--probes={tmp_path / 'probes'}", f"--init_from={base}", f"--out={out}"),
            *("--rows=300", "--train_rows=16", "--layers=output", "--batch_rows=16"),
        )

    whole, out = tmp_path / "whole", tmp_path / "stopped"
    ended = runs.finish(start(whole))
    assert ended.status == 0 and "no more were asked for" in ended.out, ended.err
    for reached, sent in (
        ("round-1/scores/parts/*/00000.parquet", signal.SIGINT),
        ("round-1/scores/parts/*/00001.parquet", signal.SIGKILL),
        ("round-1/data*/*", signal.SIGKILL),
        ("round-1/train/metrics.jsonl", signal.SIGKILL),
        ("round-1/train/checkpoints/*", signal.SIGINT),
        ("round-1/heldout.json", signal.SIGTERM),
        ("round-2/decided.json", signal.SIGKILL),
    ):
        process = start(out)
        while process.poll() is None and not [*out.glob(reached)]:
            time.sleep(0.002)
        process.send_signal(sent)
        ended = runs.finish(process)
        assert "Traceback" not in ended.err and ended.status in (0, 130, 143, -sent), ended
    assert runs.finish(start(out)).status == 0

    def made(folder):
        """What does not tell of times and places."""
        paths = [
            *folder.glob("*.json"),
            *folder.glob("round-*/*.*"),
            *folder.glob("round-*/data/**/*"),
        ]
        here = str(folder).encode()
        files = {
            p.relative_to(folder): p.read_bytes().replace(here, b"") for p in paths if p.is_file()
        }
        workdirs = [folder / f"round-{number}" / "train" for number in (1, 2)]
        return files, [runs.bits(load_model(w).params) for w in workdirs], [
            [(step, r["loss"], r["batch_crc32"]) for step, r in runs.lines(w).items()]
            for w in workdirs
        ]  # fmt: skip

    assert made(out) == made(whole)
