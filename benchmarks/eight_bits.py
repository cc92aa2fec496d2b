r"""What 8 bits cost (MobileLLM, table 15): bits per byte of one text under every arithmetic.

    python -m benchmarks.eight_bits --checkpoints=runs/plain,runs/ls --plan=data/mixture.json

Each network reads the first rows of the held-out part of each source, a row as one document (as
runtimes without documents in rows do): in float32, in bfloat16, and as `--quantize=w8a8` rounds it, all
of it and some parts. Those of llama-cpp-python, onnxruntime and executorch that are installed read the
same rows from files, whose sizes stand beside. Changes are in % of the bits per byte in bfloat16.
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
from scipy.special import log_softmax

from benchmarks.children import size_of
from benchmarks.on_device import empty_cache
from mobilellm_jax.data.opening import open_split
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.interop import executorch, gguf, onnx
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


def of_next(logits_TV: np.ndarray, row: np.ndarray) -> np.ndarray:
    """Losses [T] in nats of a runtime's logits behind the tokens of a row, [T + 1]."""
    log_TV = log_softmax(logits_TV.astype(np.float64), axis=-1)
    return -np.take_along_axis(log_TV, row[1:, None].astype(np.int64), -1)[:, 0]


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
        found.append(of_next(loaded.scores[: len(row) - 1], row))
    return np.array(found)


def by_onnxruntime(folder: Path, rows: np.ndarray) -> np.ndarray:
    """Losses [B, T] in nats."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / onnx.GRAPH)
    empty = empty_cache(session)
    places_1T = np.arange(rows.shape[1] - 1)[None]
    found = []
    for row in rows:
        given = {"input_ids": row[None, :-1].astype(np.int64), "position_ids": places_1T}
        given |= {"attention_mask": np.ones_like(places_1T)} | empty
        found.append(of_next(session.run(["logits"], given)[0][0], row))
    return np.array(found)


def by_executorch(folder: Path, rows: np.ndarray) -> np.ndarray:
    """Losses [B, T] in nats, token by token."""
    import torch
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
    from executorch.runtime import Runtime

    forward = Runtime.get().load_program(folder / executorch.PROGRAM).load_method("forward")
    found = []
    for row in rows:
        logits_TV = [
            forward.execute((torch.tensor([[token]]), torch.tensor([at])))[0][0].clone()
            for at, token in enumerate(row[:-1].tolist())
        ]
        found.append(of_next(torch.stack(logits_TV).numpy(), row))
    return np.array(found)


# Name, package, what writes the file, its quantizations, what reads it.
RUNTIMES = (
    ("GGUF", "llama_cpp", gguf.export, ("f16", "q8_0", "q4_0"), by_llama_cpp),
    ("ONNX", "onnxruntime", onnx.export, ("f16", "q8_0", "q4_0"), by_onnxruntime),
    ("ExecuTorch", "executorch", executorch.export, ("f16", "8da8w", "8da4w-32"), by_executorch),
)


def measured(loaded: LoadedModel, rows: np.ndarray) -> Iterator[tuple[str, np.ndarray, int]]:
    """Each arithmetic, its losses, and the bytes of its file (0: none)."""
    for name, dtype, quantization in OURS:
        yield name, by_us(loaded, rows, dtype, quantization), 0
    leaves = flat(jax.device_get(loaded.params))
    floats = dataclasses.replace(loaded.model, quantization="none")  # the file rounds them itself
    for name, package, export, quantizations, read in RUNTIMES:
        if importlib.util.find_spec(package) is None:
            continue
        for quantization in quantizations:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "file"
                export(leaves, floats, loaded.tokenizer, path, quantization)
                yield f"{name} {quantization}", read(path, rows), size_of(path)


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
