r"""What 8 bits cost (MobileLLM, table 15): bits per byte of one text under every arithmetic.

    python -m benchmarks.eight_bits --checkpoints=runs/plain,runs/ls --plan=data/mixture.json

Each network reads the first rows of the held-out part of each source, a row as one document (as
runtimes without documents in rows do): in float32, in bfloat16, and as `--quantize=w8a8` rounds it, all
of it and some parts. Where llama-cpp-python is installed, llama.cpp reads the same rows from GGUF files of
f16, q8_0 and q4_0, whose sizes stand beside. Changes are in % of the bits per byte in bfloat16.
"""

import dataclasses
import functools
import importlib.util
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from mobilellm_jax.data.opening import open_split
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.interop.gguf import export
from mobilellm_jax.interop.stored import load_model
from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, parameter_count
from mobilellm_jax.tables import markdown_table
from mobilellm_jax.training.checkpoint import LoadedModel

REFERENCE = "bfloat16"
OURS = (  # name, dtype, quantization
    ("float32", "float32", "none"),
    (REFERENCE, "bfloat16", "none"),
    ("w8a8:blocks", "float32", "w8a8:blocks"),
    ("w8a8:blocks+head", "float32", "w8a8:blocks+head"),
    ("w8a8", "float32", "w8a8"),
)
FILES = ("f16", "q8_0", "q4_0")


@functools.partial(jax.jit, static_argnames=("model", "execution"))
def _losses(
    params: Any, tokens_BT: jax.Array, *, model: ModelConfig, execution: transformer.Execution
) -> jax.Array:
    hidden_BTD = transformer.apply(params, model, tokens_BT[:, :-1], execution=execution)
    log_BTV = jax.nn.log_softmax(transformer.logits(params, model, hidden_BTD))
    return -jnp.take_along_axis(log_BTV, tokens_BT[:, 1:, None], -1)[..., 0]


def by_us(loaded: LoadedModel, rows: np.ndarray, dtype: str, quantization: str) -> np.ndarray:
    """Losses [B, T] in nats."""
    model = dataclasses.replace(loaded.model, quantization=quantization)
    run = functools.partial(_losses, model=model, execution=transformer.Execution(dtype))
    parts = (run(loaded.params, rows[i : i + 8]) for i in range(0, len(rows), 8))
    return np.concatenate([np.asarray(part) for part in parts])


def by_llama_cpp(path: Path, rows: np.ndarray) -> np.ndarray:
    """Losses [B, T] in nats."""
    import llama_cpp

    loaded = llama_cpp.Llama(
        str(path), n_ctx=rows.shape[1], logits_all=True, verbose=False, n_threads=1
    )
    found = []
    for row in rows:
        loaded.reset()
        loaded.eval(row[:-1].tolist())
        log_TV = jax.nn.log_softmax(loaded.scores[: len(row) - 1].astype(np.float64))
        found.append(-np.take_along_axis(np.asarray(log_TV), row[1:, None], -1)[:, 0])
    return np.array(found)


def measured(loaded: LoadedModel, rows: np.ndarray) -> Iterator[tuple[str, np.ndarray, int]]:
    """Each arithmetic, its losses, and the bytes of its file (0: none)."""
    for name, dtype, quantization in OURS:
        yield name, by_us(loaded, rows, dtype, quantization), 0
    if importlib.util.find_spec("llama_cpp") is None:
        return
    leaves = flat(jax.device_get(loaded.params))
    with tempfile.TemporaryDirectory() as folder:
        for quantization in FILES:
            path = Path(folder) / f"{quantization}.gguf"
            export(leaves, loaded.model, loaded.tokenizer, path, quantization)
            yield f"GGUF {quantization}", by_llama_cpp(path, rows), path.stat().st_size


def main(_: list[str]) -> None:
    args = flags.FLAGS
    plan = Plan.load(args.plan)
    columns, sizes, titles = {}, {}, [""]
    for checkpoint in args.checkpoints:
        loaded = load_model(checkpoint)
        splits = open_split(plan, "heldout", args.row_length, loaded.model.vocab_size)
        rows = np.concatenate([s.read(np.arange(min(args.rows, len(s)))) for s in splits.values()])
        # The last row of a source may end in padding.
        rows = rows[rows[:, -1] != loaded.tokenizer.bos_id]
        bytes_ = loaded.tokenizer.piece_bytes()[rows[:, 1:]].sum()
        titles += [f"{Path(checkpoint).name}, {parameter_count(loaded.model):,}", "change"]
        found = {}
        for name, losses, size in measured(loaded, rows):
            found[name] = losses.sum() / math.log(2) / bytes_
            sizes.setdefault(name, []).append(size)
        for name, value in found.items():
            cells = columns.setdefault(name, [])
            cells += [f"{value:.4f}", f"{100 * (value / found[REFERENCE] - 1):+.2f} %"]
    lines = [[*titles, "file, MB"]]
    for name, cells in columns.items():
        files = ", ".join(f"{size / 1e6:.2f}" for size in sizes[name] if size)
        lines.append([name, *cells, files])
    print(markdown_table(lines, "<" + ">" * (len(lines[0]) - 1)))


if __name__ == "__main__":
    flags.DEFINE_list("checkpoints", None, "Networks of one vocabulary.", required=True)
    flags.DEFINE_string("plan", None, "mixture.json of held-out rows.", required=True)
    flags.DEFINE_integer("rows", 64, "Of each source, at most.", 1)
    flags.DEFINE_integer("row_length", 256, "In tokens.", 1)
    app.run(main)
