"""How long `make run` takes once everything is installed, and how good the network is that it trains.

    python -m benchmarks.smoke --repeats=3

Each repeat starts from nothing in a temporary directory. Printed: seconds of each, their median, and held-out
bits per byte per source beside those of a unigram model, a bigram model and zlib -9.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from absl import app, flags

ROOT = Path(__file__).parent.parent


def run(directory: Path) -> float:
    """`make run` into `directory`; seconds it took. Its output is shown if it fails."""
    began = time.perf_counter()
    command = ["make", "run", f"DATA={directory}/data", f"RUN={directory}/run"]
    command.append(f"VENV={Path(sys.prefix)}")  # of whoever calls, so that nothing is installed
    plain = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # the tests set it
    done = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return time.perf_counter() - began


def bits_per_byte(directory: Path) -> dict[str, float]:
    """Held-out bits per byte per source at the end of the run in `directory`."""
    lines = (directory / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = [line for line in map(json.loads, lines) if line["kind"] == "heldout"][-1]
    prefix = "bits_per_byte/"
    return {k.removeprefix(prefix): v for k, v in last.items() if k.startswith(prefix)}


def main(_: list[str]) -> None:
    seconds, table = [], ""
    for _repeat in range(_REPEATS.value):
        with tempfile.TemporaryDirectory() as directory:
            seconds.append(run(Path(directory)))
            print(f"{seconds[-1]:.0f} s  {bits_per_byte(Path(directory))}", flush=True)
            command = [sys.executable, "-m", "mobilellm_jax.report", f"{directory}/run"]
            table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(f"median of {len(seconds)}: {statistics.median(seconds):.0f} s\n{table}")


if __name__ == "__main__":
    _REPEATS = flags.DEFINE_integer("repeats", 3, "Times to run.", lower_bound=1)
    app.run(main)
