r"""How fast a training step is, beside PyTorch on the same device: tokens/s and model FLOPs utilisation.

    python -m benchmarks.step --networks=125m,350m,r1-950m          # on a GPU; --help has the rest
    python -m benchmarks.step --networks=smoke --rows=4 --row_length=256 --rounds=5   # on a CPU

Ours is the step that training runs (`training/step.py`: loss, gradient, clipping, AdamW), on rows
packed from real text, with attention masked at the borders of documents, and for comparison without
that mask, which is what the peers compute:

  compiled  the same network in transformers, `torch.compile`, fused attention (SDPA) and fused AdamW
  eager     the same without `torch.compile`

All compute in bfloat16 with float32 weights on a GPU, in float32 on a CPU, unless `--dtype` says
another. Each runs in a process of its own, in turns, at the largest batch that fits (`--rows`
halved until it does). The utilisation is that of `flops_per_token`: 6 FLOPs per matrix weight and
token, attention's causal half, nothing recomputed.

Needs jax, flax, optax, numpy; the peers torch and transformers, and are left out without them.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from mobilellm_jax.data.packing import Concat
from mobilellm_jax.model.config import ModelConfig, Stack, flops_per_token
from mobilellm_jax.model.presets import preset
from mobilellm_jax.tables import aligned

WAYS = ("ours, documents apart", "ours", "compiled", "eager")
ENOUGH = 3  # timings of `steps` steps in a process, of which the median counts
OUT_OF_MEMORY = 17  # exit status
BOS, EOS = 1, 2
# MobileLLM-LS beside what it is made of and what it stands for: 30 blocks, twice each, or 60.
_MORE = {
    "smoke": ModelConfig(2048, 128, (Stack(4, 2, 1, 320, repeats=2),), head_dim=64),
    "60-layers": dataclasses.replace(
        preset("mobilellm-125m"),
        stacks=(dataclasses.replace(preset("mobilellm-125m").stacks[0], layers=60),),
    ),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process measures."""

    network: str
    way: str
    rows: int
    row_length: int
    steps: int
    loss_chunks: int
    remat: str
    unroll: int
    attention: str
    dtype: str


def network(name: str) -> ModelConfig:
    """A network by the name of its preset, `mobilellm-` left out, or one of `_MORE`."""
    return _MORE[name] if name in _MORE else preset(f"mobilellm-{name}")


def packed_rows(count: int, row_length: int, vocab_size: int) -> np.ndarray:
    """Rows int32 [count, row_length + 1] of this Python's own library, a file a document.

    A word is a number of the vocabulary, so documents are as long, and ids as uneven, as in training.
    """
    packer, rows = Concat(row_length, BOS, EOS), np.zeros((0, row_length + 1), np.int32)
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    while len(rows) < count:
        for file in files:
            words = re.findall(
                r"\w+|\s+|[^\w\s]", file.read_text(errors="ignore", encoding="utf-8")
            )
            ids = [3 + hash_of(word) % (vocab_size - 3) for word in words]
            found, _ = packer.add([np.array(ids, np.int32)])
            rows = np.concatenate([rows, found])
            if len(rows) >= count:
                break
    return rows[:count]


@functools.cache
def hash_of(word: str) -> int:
    """A number for a word, the same in every process."""
    return int.from_bytes(word.encode()[:8].ljust(8, b"\0"), "little") * 2654435761 >> 7


def timed(step: Callable[[], Any], wait: Callable[[Any], Any], steps: int) -> tuple[float, float]:
    """Seconds of the first step, and the median seconds of a step after it."""
    began = time.perf_counter()
    wait(step())
    first = time.perf_counter() - began
    seconds = []
    for _ in range(ENOUGH):
        began = time.perf_counter()
        for _ in range(steps):
            result = step()
        wait(result)
        seconds.append((time.perf_counter() - began) / steps)
    return first, statistics.median(seconds)


def measure(job: Job) -> dict[str, Any]:
    """What a job's process finds."""
    tokens = packed_rows(job.rows, job.row_length, network(job.network).vocab_size)
    if job.way.startswith("ours"):
        from benchmarks.step_ours import prepared
    else:
        from benchmarks.step_torch import prepared
    step, wait, device, memory = prepared(job, network(job.network), tokens)
    first, seconds = timed(step, wait, job.steps)
    found = {"device": device, "first": first, "seconds": seconds, "memory": memory()}
    return {**dataclasses.asdict(job), **found, "documents": int((tokens == BOS).sum())}


def run(job: Job) -> dict[str, Any] | None:
    """Measures in a process of its own; None where the device has too little memory."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.step", f"--job={json.dumps(dataclasses.asdict(job))}"],
        env={**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.93"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == OUT_OF_MEMORY:
        return None
    if done.returncode:
        raise RuntimeError(f"{job} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def fitting(job: Job) -> dict[str, Any]:
    """`run` with half of the rows, again and again, until they fit."""
    while (found := run(job)) is None:
        if job.rows == 1:
            raise RuntimeError(f"not even one row fits: {job}")
        print(f"  {job.network}, {job.way}: {job.rows} rows do not fit", flush=True)
        job = dataclasses.replace(job, rows=job.rows // 2)
    return found


def speed(found: list[dict[str, Any]]) -> float:
    """Tokens per second, the median of the rounds."""
    return statistics.median(f["rows"] * f["row_length"] / f["seconds"] for f in found)


def table(found: dict[tuple[str, str], list[dict[str, Any]]], peak: float) -> str:
    """A line for each network and way; `peak` in FLOP/s, 0 where it is not known."""
    used = "of peak" if peak else "GFLOP/s"
    head = ["network", "way", "rows", "ms", "tokens/s", used, "ours / it", "GiB", "first step, s"]
    lines = [head]
    for (name, way), rounds in found.items():
        last = rounds[-1]
        flops = speed(rounds) * flops_per_token(network(name), last["row_length"])
        ours = found.get((name, "ours"))
        lines.append(
            [
                name,
                way,
                f"{last['rows']}",
                f"{1e3 * statistics.median(f['seconds'] for f in rounds):,.1f}",
                f"{speed(rounds):,.0f}",
                f"{flops / peak:.1%}" if peak else f"{flops / 1e9:.1f}",
                f"{speed(ours) / speed(rounds):.2f}" if ours else "",
                f"{last['memory'] / 2**30:.1f}" if last["memory"] else "",
                f"{last['first']:.0f}",
            ]
        )
    return aligned(lines, "<<" + ">" * (len(head) - 2))


def main(_: list[str]) -> None:
    args = flags.FLAGS
    if args.job:
        try:
            print(json.dumps(measure(Job(**json.loads(args.job)))))
        except Exception as error:
            if re.search("out of memory|RESOURCE_EXHAUSTED", str(error), re.IGNORECASE):
                sys.exit(OUT_OF_MEMORY)
            raise
        return
    peers = all(importlib.util.find_spec(module) for module in ("torch", "transformers"))
    ways = [way for way in args.ways if peers or way.startswith("ours")]
    for way in set(args.ways) - set(ways):
        print(f"{way}: left out, for torch and transformers are not installed.")
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for name in args.networks:
        for _round in range(args.rounds):
            for way in ways:
                rounds = found.setdefault((name, way), [])
                rows = rounds[-1]["rows"] if rounds else args.rows
                sizes = rows, args.row_length, args.steps
                how = args.remat, args.unroll, args.attention, args.dtype
                rounds.append(fitting(Job(name, way, *sizes, args.loss_chunks, *how)))
        print(f"{rounds[-1]['device']}, rows of {args.row_length} tokens", flush=True)
        print(table(found, 1e12 * args.peak), flush=True)  # so far: a call may be cut short
    if args.out:
        lines = [json.dumps(each) for rounds in found.values() for each in rounds]
        Path(args.out).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    flags.DEFINE_list(
        "networks", ["125m", "350m", "r1-950m"], "Presets without `mobilellm-`, 60-layers, smoke."
    )
    flags.DEFINE_multi_enum("ways", list(WAYS), list(WAYS), "What to measure.")
    flags.DEFINE_integer("rows", 64, "Rows of a step, halved until they fit.", lower_bound=1)
    flags.DEFINE_integer("row_length", 2048, "Tokens of a row.", lower_bound=8)
    flags.DEFINE_integer(
        "steps", 10, "Steps in a timing, of which a process makes three.", lower_bound=1
    )
    flags.DEFINE_integer("rounds", 1, "Times that each way has its turn.", lower_bound=1)
    flags.DEFINE_integer("loss_chunks", 8, "Of ours: parts of a row whose logits exist at once.")
    flags.DEFINE_string("remat", "none", "Of ours: what the backward pass computes again.")
    flags.DEFINE_integer(
        "unroll", 0, "Of ours: layers in an iteration; 0: all on a GPU, else 1.", 0
    )
    flags.DEFINE_string("attention", "auto", "Of ours: how attention is computed.")
    flags.DEFINE_enum(
        "dtype", "auto", ["auto", "float32", "bfloat16"], "Of activations and products."
    )
    flags.DEFINE_float("peak", 0.0, "Of the device, in TFLOP/s (H100 and H200: 989); 0: not known.")
    flags.DEFINE_string("out", "", "File for all measurements, lines of JSON.")
    flags.DEFINE_string("job", "", "For the processes that this program starts.")
    app.run(main)
