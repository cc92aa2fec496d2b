"""How long it takes to bring a network in and out, and how much memory.

    python -m benchmarks.convert --model=mobilellm-1b --dtype=float32

A Hugging Face folder of random weights is made, tensor by tensor, in a temporary directory. Every
conversion is a process of its own. Printed: its seconds, how far its memory rises above what it was
once everything was imported, and that as a multiple of the larger of source and target.
"""

import json
import pydoc_data.topics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from mobilellm_jax.data.sentencepiece_tokenizer import train_tokenizer
from mobilellm_jax.interop import huggingface
from mobilellm_jax.interop.stored import open_model, write_checkpoint
from mobilellm_jax.leaves import DTYPES, flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.presets import preset


class Random:
    """A leaf of random values, made anew whenever it is read."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.dtype = shape, DTYPES[dtype]

    def __getitem__(self, index: Any) -> np.ndarray:
        rng = np.random.default_rng(0)
        out = np.empty(self.shape, self.dtype)
        for row in range(len(out)):
            out[row] = rng.standard_normal(self.shape[1:], np.float32) * 0.02
        return out[index]


def make(out: Path, model_name: str, dtype: str) -> None:
    model = preset(model_name)
    leaves = {p: Random(leaf.shape, dtype) for p, leaf in flat(transformer.shapes(model)).items()}
    tokenizer = train_tokenizer(list(pydoc_data.topics.topics.values())[:10], 512)
    huggingface.export(leaves, model, tokenizer, out)


def to_hf(source: str, out: str, dtype: str | None) -> None:
    stored = open_model(source)
    huggingface.export(
        stored.leaves, stored.model, stored.needed_tokenizer, out, dtype=dtype, meta=stored.meta
    )


def to_checkpoint(source: str, out: str, dtype: str | None) -> None:
    write_checkpoint(open_model(source), out, dtype)


def to_memory(source: str, out: str, dtype: str | None) -> None:
    del out
    for leaf in flat(open_model(source).params(dtype=dtype)).values():
        leaf.block_until_ready()


CONVERSIONS: dict[str, Callable[[str, str, str | None], None]] = {
    "to_hf": to_hf,
    "to_checkpoint": to_checkpoint,
    "to_memory": to_memory,
}


def memory(key: str) -> int:
    """A line of this process's status in bytes: VmRSS now, VmHWM at most since the last reset."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measured(conversion: str, source: str, out: str, dtype: str | None) -> None:
    """Runs one conversion in this process and prints what it took as JSON."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before, began = memory("VmRSS"), time.perf_counter()
    CONVERSIONS[conversion](source, out, dtype)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "bytes": memory("VmHWM") - before}))


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def compare(directory: Path) -> None:
    dtype, narrow = _DTYPE.value, "bfloat16"
    make(directory / "hf", _MODEL.value, dtype)
    print(f"{_MODEL.value}, {dtype}: {size(directory / 'hf') / 1e9:.2f} GB")
    steps = [
        ("to_checkpoint", "hf", "checkpoint", None),
        ("to_hf", "checkpoint", "back", None),
        ("to_hf", "checkpoint", "narrow", narrow),
        ("to_hf", "hf", "copy", narrow),
        ("to_memory", "hf", "", None),
        ("to_memory", "checkpoint", "", narrow),
    ]
    for conversion, source, target, wanted in steps:
        command = [sys.executable, "-m", "benchmarks.convert", f"--child={conversion}"]
        command += [f"--source={directory / source}", f"--out={directory / target}"]
        command += [f"--to_dtype={wanted}"] if wanted else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        found = json.loads(done.stdout.splitlines()[-1])
        largest = max(size(directory / source), size(directory / target) if target else 0)
        print(
            f"{source + ' -> ' + (target or 'memory'):24} {wanted or dtype:9}"
            f"{found['seconds']:7.1f} s {found['bytes'] / 1e9:7.2f} GB of memory, "
            f"{found['bytes'] / largest:.2f} x the larger file",
            flush=True,
        )


def main(_: list[str]) -> None:
    if _CHILD.value:
        measured(_CHILD.value, _SOURCE.value, _OUT.value, _TO_DTYPE.value)
        return
    with tempfile.TemporaryDirectory() as directory:
        compare(Path(directory))


if __name__ == "__main__":
    _MODEL = flags.DEFINE_string("model", "mobilellm-1b", "A preset.")
    _DTYPE = flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Of the weights.")
    _CHILD = flags.DEFINE_enum("child", None, list(CONVERSIONS), "Runs one conversion here.")
    _SOURCE = flags.DEFINE_string("source", None, "Of that conversion.")
    _OUT = flags.DEFINE_string("out", None, "Of that conversion.")
    _TO_DTYPE = flags.DEFINE_string("to_dtype", None, "Of that conversion's result.")
    app.run(main)
