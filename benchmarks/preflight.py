r"""Proof of fit: the published runs compiled for whole TPU slices and for GPUs, on any CPU machine.

    python -m benchmarks.preflight                          every run, and depth against compile time
    python -m benchmarks.preflight --only=950m --out=data/preflight

Prints two tables in Markdown and the command of each line. A line takes half a minute to some
minutes; with `--out` its JSON is kept there and not computed again.
"""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import app, flags

from mobilellm_jax.tables import markdown_table

GIB = 2**30
BASE = "configs/mobilellm.py"
R1 = "configs/mobilellm_r1.py:950m,pretrain1"

# Name, configuration, topology, keys that make it fit.
RUNS = (
    ("125M", f"{BASE}:125m", "v5e:16x16", ("microbatches=4",)),
    ("LS-125M", f"{BASE}:125m,ls", "v5e:16x16", ("microbatches=4", "execution.remat=dots")),
    ("1.5B", f"{BASE}:1.5b", "v5p:4x4x8", ("microbatches=2", "execution.remat=dots")),
    ("R1-950M", R1, "v5p:8x8x16", ("microbatches=1", "execution.remat=dots")),
    ("R1-950M", R1, "v6e:16x16", ("microbatches=8", "execution.remat=dots")),
    ("R1-950M", R1, "tpu7x:4x4x4", ("microbatches=8", "execution.remat=dots")),
)
# On a node of GPUs, with the microbatches of about sixteen rows.
GPUS = tuple(
    (name, config, "h100:8", (f"microbatches={microbatches}",))
    for name, config, microbatches in (
        ("125M", f"{BASE}:125m", 8),
        ("LS-125M", f"{BASE}:125m,ls", 8),
        ("350M", f"{BASE}:350m", 8),
        ("R1-140M", "configs/mobilellm_r1.py:140m,pretrain1", 16),
        ("R1-950M", R1, 32),
    )
)
# Over several slices, or nodes of GPUs, of a thousand chips and less.
SEVERAL = (
    ("125M", f"{BASE}:125m", "2 x v5e:16x16", ("microbatches=2",)),
    ("R1-950M", R1, "4 x v6e:16x16", ("microbatches=2", "execution.remat=dots")),
    ("350M", f"{BASE}:350m", "4 x h100:8", ("microbatches=2",)),
    ("R1-950M", R1, "16 x h100:8", ("microbatches=2",)),
)
# Every stage of MobileLLM-R1; those of SFT with the paper's numbers of steps.
KEYS = {
    "pretrain1": ("v5p:4x4x8", ("microbatches=4",)),
    "midtrain1": ("v5p:4x4x8", ("microbatches=4",)),
    "sft_general": ("v5p:4x4x4", ("steps=3383", "epochs=0")),
    "sft_reasoning": ("v5p:4x4x8", ("steps=24000", "epochs=0", "microbatches=2")),
}
STAGES = tuple(
    (f"R1-{size} {stage}", f"configs/mobilellm_r1.py:{size.lower()},{stage}", *how)
    for size in ("140M", "360M", "950M")
    for stage, how in KEYS.items()
)
# Pruning inside of training, and training of what is left, on a v5p-8: as configured.
PRUNING = tuple(
    (f"pruning: {run}", f"configs/{run}", "v5p:2x2x1", ())
    for run in (
        *(f"adapt_pruner.py:{name}" for name in ("350m", "600m", "1b", "qwen-0.5b", "deepseek")),
        *(f"adapt_pruner.py:8b,{share}" for share in (20, 40, 50, 60)),
        *(
            f"efficientllm.py:{size},{stage}"
            for size in ("134m", "469m", "1.1b")
            for stage in ("prune", "continue")
        ),
    )
)
# The same, and 32k reasoning, on one GPU.
_FEW = ("mesh.fsdp=1", "microbatches=16", "execution.remat=full")
_REASONING = ("steps=24000", "epochs=0", "microbatches=256")
ONE_GPU = tuple(
    (f"one GPU: {run}", f"configs/{run}", "h200:1", keys)
    for run, keys in (
        ("mobilellm_r1.py:950m,sft_reasoning", _REASONING),
        ("mobilellm_r1.py:950m,sft_reasoning", (*_REASONING, "execution.remat=none")),
        ("adapt_pruner.py:1b", ("microbatches=8",)),
        ("adapt_pruner.py:deepseek", ("microbatches=8",)),
        ("adapt_pruner.py:8b,20", (*_FEW, "optimizer.mu_dtype=bfloat16")),
        ("adapt_pruner.py:8b,40", _FEW),
        ("adapt_pruner.py:8b,60", _FEW),
        ("efficientllm.py:469m,prune", ("microbatches=64",)),
        ("efficientllm.py:1.1b,continue", ("microbatches=64",)),
    )
)
# The widths of the 1B network at two depths.
WIDTHS = ("microbatches=4", "execution.remat=dots", "mesh.fsdp=4")
DEPTHS = (
    ("1B, 54 layers", f"{BASE}:1b", "v5e:16x16", WIDTHS),
    ("1B, 12 layers", "benchmarks/depth.py:1b,12", "v5e:16x16", WIDTHS),
)


def command(config: str, topology: str, keys: tuple[str, ...]) -> list[str]:
    """The arguments after `python -m`."""
    slices, _, one = topology.rpartition(" x ")
    place = [f"--topology={one}", *([f"--slices={slices}"] if slices else [])]
    settings = [f"--config.{key}" for key in keys]
    return ["mobilellm_jax.preflight", f"--config={config}", *place, *settings]


def measured(name: str, *described: Any) -> dict[str, Any] | None:
    """What pre-flight says of a line as JSON, with the CPU seconds of its process; None: it failed."""
    arguments = command(*described)
    print("python -m " + " ".join(arguments), file=sys.stderr, flush=True)
    kept = Path(flags.FLAGS.out) / (re.sub(r"\W+", "_", " ".join(arguments)) + ".json")
    if flags.FLAGS.out and kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    ended = subprocess.run(
        [sys.executable, "-m", *arguments, "--json"], capture_output=True, text=True
    )
    if ended.returncode:
        print(ended.stderr[-2000:], file=sys.stderr)
        return None
    found = json.loads(ended.stdout)
    found["cpu_seconds"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
    if flags.FLAGS.out:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found), encoding="utf-8")
    return found


def fit(found: dict[str, Any], name: str, topology: str, keys: tuple[str, ...]) -> list[str]:
    """A line of the table of runs."""
    memory, run = found["memory"], found["run"]
    seconds = found["seconds"]
    slowest = max(seconds, key=seconds.get)
    return [
        name,
        topology,
        " ".join(keys),
        f"{(memory['weights'] + memory['optimizer']) / GIB:.2f}",
        f"{(memory['temporaries'] or 0) / GIB:.2f}",
        f"{memory['peak'] / GIB:.2f} of {memory['capacity'] / GIB:.2f}"
        + ("" if found["fits"] else ", does not fit"),
        f"{found['matmul'] / found['model_matmul']:.3f}",
        f"{found['attention'] / found['model_attention']:.2f}",
        f"{1e3 * seconds[slowest]:,.0f} ms, {slowest}"
        if found["exchanged"] is not None
        else f"{1e3 * seconds[slowest]:,.0f} ms, compute alone",
        f"{run['tokens_per_second']:,.0f}",
        f"{run['days']:.1f}",
        f"{run['chip_hours']:,.0f}",
        f"{found['trace_seconds'] + found['compile_seconds']:.0f} ({found['cpu_seconds']:.0f})",
    ]


def main(argv: list[str]) -> None:
    """Prints the tables."""
    del argv
    header = "run|slice|keys|state, GiB|temporaries, GiB|peak, GiB of a device|matrices / model"
    header += "|attention / causal half|a step at least|tokens/s at 40 %|days|chip-hours"
    lines = [(header + "|seconds (of CPU)").split("|")]
    for name, *described in RUNS + GPUS + SEVERAL + STAGES + PRUNING + ONE_GPU:
        wanted = re.search(flags.FLAGS.only, " ".join([name, *map(str, described)]), re.IGNORECASE)
        if wanted and (found := measured(name, *described)):
            lines.append(fit(found, name, described[1], described[2]))
    print(markdown_table(lines, "<<<>>>>>>>>>>"), flush=True)
    lines = [["network", "seconds", "seconds of CPU", "program, bytes", "compiled, bytes"]]
    for name, *described in DEPTHS:
        wanted = re.search(flags.FLAGS.only, name, re.IGNORECASE)
        if wanted and (found := measured(name, *described)):
            seconds = found["trace_seconds"] + found["compile_seconds"]
            sizes = found["program_bytes"], found["memory"]["code"]
            numbers = f"{seconds:.1f}", f"{found['cpu_seconds']:.1f}"
            lines.append([name, *numbers, *(f"{size:,.0f}" for size in sizes)])
    print("\n" + markdown_table(lines, "<>>>>"))


if __name__ == "__main__":
    flags.DEFINE_string(
        "only", "", "Regular expression: lines in which it is not found are left out."
    )
    flags.DEFINE_string("out", "", "Folder that keeps the JSON of each line.")
    app.run(main)
