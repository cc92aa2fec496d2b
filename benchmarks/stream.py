r"""How fast the training stream is, beside two ways of doing the same with stock Grain.

    python -m benchmarks.stream

Writes sources of random tokens to a temporary directory and reads whole batches as training does:

  whole batches    `mixture.batches`: the Grain element is a process's part of a step, reads grouped by source
  rows             the same mixture as a `grain.MapDataset` of rows, then `.batch`
  stock            no code of ours: TFDS data sources, shuffled, repeated, mixed and batched by Grain

Then it opens a mixture and reads its row 2,000,000,000.
"""

import dataclasses
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, SupportsIndex

import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from tqdm import tqdm

from mobilellm_jax import cli
from mobilellm_jax.data.mixture import Mixture, batches, open_mixture
from mobilellm_jax.data.plan import Plan, PlanSource
from mobilellm_jax.data.rows import Batch, SourceInfo, write_source

VOCAB = 32_000
FAR = 2_000_000_000  # a row of the stream about as far out as MobileLLM-R1's 4.2T tokens reach
SPREAD = 2_000  # the largest weight over the smallest


@dataclasses.dataclass(frozen=True)
class Result:
    """Medians over the repeats."""

    tokens_per_second: dict[str, float]  # by name of the way
    opening_seconds: float  # until the first batch from row `FAR` on has been read


def benchmark(sources: int, rows: int, row_length: int, global_batch: int, repeats: int) -> Result:
    """Runs all of it.

    Args:
      sources: number of sources; their weights fall geometrically, the last is 1 / `SPREAD` of the first.
      rows: rows of each source on disk.
      row_length: targets per row.
      global_batch: rows per batch.
      repeats: timings of each way; the ways take turns, so that a noisy neighbour meets all of them.
    """
    with tempfile.TemporaryDirectory() as directory:
        plan = write(Path(directory), sources, rows, row_length)
        mixture = open_mixture(plan, row_length, VOCAB)
        opening = [opening_seconds(plan, global_batch) for _ in range(repeats)]
        ways: dict[str, Callable[[], Iterator[Any]]] = {
            "whole batches": functools.partial(batches, mixture, 0, global_batch),
            "rows": functools.partial(row_batches, mixture, global_batch),
            "stock": functools.partial(stock_batches, plan, global_batch),
        }
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in tqdm(range(repeats), desc="measuring", disable=not sys.stderr.isatty()):
            for name, way in ways.items():
                speeds[name].append(tokens_per_second(way(), global_batch * row_length))
        medians = {name: statistics.median(values) for name, values in speeds.items()}
    return Result(medians, statistics.median(opening))


def write(directory: Path, sources: int, rows: int, row_length: int) -> Plan:
    """Writes sources whose tokens are distributed as in text (Zipf), so that they compress like text."""
    planned = []
    weights = np.geomspace(SPREAD, 1, sources)
    for i, weight in enumerate(
        tqdm(weights / weights.sum(), "writing", disable=not sys.stderr.isatty())
    ):
        rng = np.random.default_rng(i)
        tokens = np.minimum(rng.zipf(1.2, (rows, row_length + 1)), VOCAB - 1).astype(np.int32)
        info = SourceInfo(f"source_{i}", "", row_length, VOCAB, 1, "random", "concat", {})
        write_source(directory / info.name, info, {}, [Batch("train", tokens)])
        planned.append(PlanSource(info.name, info.name, float(weight)))
    plan = Plan(tuple(planned), row_length, "tokenizer.model", "random")
    plan.save(directory / "mixture.json")
    return Plan.load(directory / "mixture.json")


def opening_seconds(plan: Plan, global_batch: int) -> float:
    """Seconds from a plan on disk to the first batch from row `FAR` on."""
    began = time.perf_counter()
    mixture = open_mixture(Plan.load(Path(plan.directory) / "mixture.json"), plan.row_length, VOCAB)
    mixture.read(np.arange(FAR, FAR + global_batch))
    return time.perf_counter() - began


def tokens_per_second(stream: Iterator[Any], tokens: int, seconds: float = 2.0) -> float:
    """Speed of a stream of batches of so many tokens each, after the first ones."""
    for _ in range(4):
        next(stream)
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        next(stream)
        count += 1
    return count * tokens / spent


class _EachRow:
    """The mixture as Grain's random-access source of single rows."""

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture

    def __len__(self) -> int:
        return FAR

    def __getitem__(self, i: SupportsIndex) -> dict[str, np.ndarray]:
        return self._mixture[i]


def row_batches(mixture: Mixture, global_batch: int) -> Iterator[Any]:
    """Rows of the mixture one by one, batched by Grain, with as many threads as `batches` has."""
    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
    return iter(
        grain.MapDataset.source(_EachRow(mixture)).batch(global_batch).to_iter_dataset(options)
    )


def stock_batches(plan: Plan, global_batch: int) -> Iterator[Any]:
    """The sources as TFDS opens them, shuffled, repeated, mixed and batched by Grain."""
    datasets = []
    for source in plan.sources:
        builder = tfds.builder_from_directory(str(plan.resolve(source.path)))
        rows = grain.MapDataset.source(builder.as_data_source("train"))
        datasets.append(rows.seed(plan.seed).shuffle().repeat())
    mixed = grain.MapDataset.mix(datasets, [source.weight for source in plan.sources])
    options = grain.ReadOptions(num_threads=4, prefetch_buffer_size=4)
    return iter(mixed.batch(global_batch).to_iter_dataset(options))


def main() -> None:
    """Prints the figures."""
    args = flags.FLAGS
    shape = (args.sources, args.rows, args.row_length, args.global_batch, args.repeats)
    result = benchmark(*shape)
    print(
        f"{args.sources} sources x {args.rows} rows of {args.row_length} tokens, batches of "
        f"{args.global_batch} rows, median of {args.repeats}, {os.cpu_count()} CPUs, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    for name, speed in result.tokens_per_second.items():
        print(f"  {name:14} {speed / 1e6:6.2f} M tokens/s")
    print(f"  opening at row {FAR:,}: {result.opening_seconds:.3f} s")


if __name__ == "__main__":
    flags.DEFINE_integer("sources", 14, "Number of sources.", lower_bound=1)
    flags.DEFINE_integer("rows", 2000, "Rows of each source on disk.", lower_bound=1)
    flags.DEFINE_integer("row_length", 2048, "Targets per row.", lower_bound=1)
    flags.DEFINE_integer("global_batch", 512, "Rows per batch.", lower_bound=1)
    flags.DEFINE_integer("repeats", 5, "Timings of each way.", lower_bound=1)
    cli.run(main)
