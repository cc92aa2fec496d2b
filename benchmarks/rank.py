"""RankMe of the output embedding beside the learning rate (MobileLLM-R1, appendix B), at small scale.

    python -m benchmarks.rank --plan=data/smoke/mixture.json --peaks=0.0004,0.001,0.002,0.004,0.008

The paper finds that a higher learning rate leaves embeddings of a higher rank, and better MMLU after
mid-training. Here the network of `configs/smoke.py` is trained with each peak; printed are RankMe and
the bits per byte of held-out text at the end.
"""

import contextlib
import io
import json
import tempfile
from pathlib import Path

import jax
from absl import flags

from configs import smoke
from mobilellm_jax import cli
from mobilellm_jax.train import train


def measured(plan: str, steps: int, peak: float, seed: int) -> dict[str, float]:
    """What is measured at the end of a run."""
    config = smoke.get_config()
    config.plan, config.steps, config.seed = plan, steps, seed
    config.schedule.peak, config.schedule.warmup_steps = peak, steps // 20
    config.eval.every = config.checkpoint.every = steps
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train(config, folder, devices=jax.devices()[:1])
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines if '"heldout"' in line]
    return {name: found[-1][name] for name in ("rank_me", "bits_per_byte")}


def main() -> None:
    """See the module."""
    args = flags.FLAGS
    print("peak learning rate  seed  RankMe  held-out bits per byte")
    for peak in map(float, args.peaks):
        for seed in range(args.seeds):
            found = measured(args.plan, args.steps, peak, seed)
            measures = f"{found['rank_me']:6.1f}  {found['bits_per_byte']:22.3f}"
            print(f"{peak:18g}  {seed:4}  {measures}", flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("plan", "data/smoke/mixture.json", "As `make run` prepares it.")
    flags.DEFINE_list("peaks", ["0.0004", "0.001", "0.002", "0.004", "0.008"], "Learning rates.")
    flags.DEFINE_integer("steps", 300, "Of each run.")
    flags.DEFINE_integer("seeds", 2, "Runs of each learning rate.")
    cli.run(main)
