r"""What pruning inside of training costs a step: with scores added up and without, in turns.

    python -m benchmarks.prune_scoring --model=mobilellm-125m --rows=2 --row_length=512

Both steps are those of `mobilellm_jax.train`, on the same random weights and rows; they run in turns, so
that what else the machine does meets both. Printed are medians, and the median over turns of their ratio.
"""

import statistics
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

from mobilellm_jax.model.config import parameter_count
from mobilellm_jax.model.presets import preset
from mobilellm_jax.parallel.sharding import put_rows
from mobilellm_jax.pruning.measures import batch_of
from mobilellm_jax.tables import aligned
from mobilellm_jax.training.config import base_config
from mobilellm_jax.training.setup import programs


def configuration(args: Any, score: str) -> Any:
    """A run of the model, which prunes by this score, or not if it is empty."""
    c = base_config(preset(args.model))
    c.row_length, c.global_batch, c.steps = args.row_length, args.rows, 1000
    c.schedule.warmup_steps = 10
    c.loss_chunks, c.execution.dtype = args.loss_chunks, args.dtype
    c.execution.remat = args.remat
    if score:
        c.pruning.target = int(0.8 * parameter_count(preset(args.model)))
        c.pruning.score = score
    return c


def main(_: list[str]) -> None:
    args = flags.FLAGS
    vocab = preset(args.model).vocab_size
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, vocab, (args.rows, args.row_length + 1)).astype(np.int32)
    piece_bytes_V = jax.numpy.ones(vocab)
    seconds: dict[str, list[float]] = {}
    kinds = ["", *args.scores]
    runs = {kind: programs(configuration(args, kind), jax.devices()[:1], 1, 2, 1) for kind in kinds}
    with jax.set_mesh(runs[""].mesh):
        batch = put_rows(batch_of(tokens), runs[""].mesh)
        states = {kind: run.fresh() for kind, run in runs.items()}
        for turn in range(args.turns + 1):
            for kind in kinds if turn % 2 else kinds[::-1]:
                began = time.perf_counter()
                states[kind], metrics = runs[kind].step(states[kind], batch, piece_bytes_V)
                jax.block_until_ready((states[kind], metrics))
                if turn:  # the first one compiles
                    seconds.setdefault(kind, []).append(time.perf_counter() - began)
    lines = [["score", "seconds of a step", "ratio"]]
    for kind in kinds:
        ratio = statistics.median(a / b for a, b in zip(seconds[kind], seconds[""], strict=True))
        lines.append([kind or "none", f"{statistics.median(seconds[kind]):.3f}", f"{ratio:.3f}"])
    print(aligned(lines, "<>>"))


if __name__ == "__main__":
    flags.DEFINE_string("model", "mobilellm-125m", "A preset.")
    flags.DEFINE_integer("rows", 2, "Of a step.")
    flags.DEFINE_integer("row_length", 512, "In tokens.")
    flags.DEFINE_integer("loss_chunks", 4, "Parts of a row whose logits exist at once.")
    flags.DEFINE_string("dtype", "float32", "Of activations.")
    flags.DEFINE_string("remat", "none", "What the backward pass computes again.")
    flags.DEFINE_integer("turns", 9, "Steps of each kind.")
    flags.DEFINE_list("scores", ["taylor", "taylor_slice"], "Of pruning.scores.KINDS.")
    app.run(main)
