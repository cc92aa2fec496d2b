r"""How fast the training stream is, beside other libraries, far from its files, and what planning costs.

    python -m benchmarks.stream --streaming_python=A/bin/python --levanter_python=B/bin/python

Sources of random tokens take the places of the 14 of `configs/plans/mobilellm_r1_pretrain.json`, with
their weights in both stages, and whole batches are read as training does:

  warm      files in the page cache; ours, stock Grain, MosaicML Streaming and Levanter, each at its best
            setting, in turns. The last two run in interpreters of their own (`benchmarks/stream_peers.py`)
  distant   nothing in the page cache, and every record takes 30 ms longer, as over a network
  planning  finding which rows a batch is made of, with sources as long as published; nothing is read
"""

import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import grain
import numpy as np
import tensorflow_datasets as tfds
from absl import flags
from array_record.python import array_record_module
from tqdm import tqdm

from benchmarks.full_run import ROW_LENGTH, borders, published
from benchmarks.stream_peers import tokens_per_second
from mobilellm_jax import cli
from mobilellm_jax.data import mixture as mixture_module
from mobilellm_jax.data.mixture import BLOCK, Mixture, batches
from mobilellm_jax.data.opening import open_mixture
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.rows import SourceInfo
from mobilellm_jax.data.shards import Batch, write_source
from mobilellm_jax.tables import aligned

VOCAB = 128_256  # tokens are stored in 4 bytes
FAR = 2_000_000_000  # a row of the stream near the end of the run
DELAY = 0.03  # seconds more that a distant record takes
PEERS = Path(__file__).parent / "stream_peers.py"
INSTALL = {
    "mosaicml": "mosaicml-streaming",
    "levanter": "levanter==1.2.dev1644 gitpython chex async-lru==2.0.5",  # it forgets to ask for these
}
SETTINGS: dict[str, dict[str, tuple[str, ...]]] = {  # of each way, see `stream_peers`
    "mosaicml": {"MosaicML Streaming": ("0", "1", "2")},
    "levanter": {"Levanter": ("cache",), "Levanter, no files": ("memory",)},
}

Way = Callable[[int, str], float]  # tokens per second by number of the stage and setting


def write(directory: Path, rows: int) -> Plan:
    """Writes sources whose tokens are distributed as in text (Zipf), so that they compress like text.

    Args:
      directory: gets sources and plan, and for other libraries the same rows as `rows/NAME.npy` and
        the weights of each stage as `stages.json`.
      rows: of each source.
    """
    plan = published().plan
    (directory / "rows").mkdir()
    for i, name in enumerate(tqdm(plan.names, "writing", disable=not sys.stderr.isatty())):
        rng = np.random.default_rng(i)
        tokens = np.minimum(rng.zipf(1.2, (rows, ROW_LENGTH + 1)), VOCAB - 1).astype(np.int32)
        info = SourceInfo(name, "", ROW_LENGTH, VOCAB, 1, "random", "concat", {})
        write_source(directory / name, info, {}, [Batch("train", tokens)])
        np.save(directory / "rows" / f"{name}.npy", tokens.astype(np.uint32))
    stages = [dict(stage.weights) for stage in plan.stages]
    (directory / "stages.json").write_text(json.dumps(stages), encoding="utf-8")
    dataclasses.replace(plan, tokenizer="random").save(directory / "mixture.json")
    os.sync()  # only what is on the disk can leave the page cache
    return Plan.load(directory / "mixture.json")


# Warm.


def ours(mixture: Mixture, global_batch: int, start: int, setting: str) -> Iterator[Any]:
    """`setting` says how many batches are read ahead, and by how many processes."""
    prefetch, workers = map(int, setting.split("+"))
    return batches(mixture, start, global_batch, prefetch=prefetch, workers=workers)


def stock(plan: Plan, global_batch: int, start: int, setting: str) -> Iterator[Any]:
    """No code of ours; `setting` says how many threads read, and how many processes."""
    threads, workers = map(int, setting.split("+"))
    mixed = stock_rows(plan, start).batch(global_batch)
    ahead = mixed.to_iter_dataset(grain.ReadOptions(threads, threads))
    if workers:
        ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(workers))
    return iter(ahead)


def stock_rows(plan: Plan, start: int) -> grain.MapDataset:
    """TFDS data sources, shuffled, repeated and mixed by Grain with the weights of the run's row `start`."""
    first = np.cumsum([0, *(stage.tokens or 0 for stage in plan.stages)]) // ROW_LENGTH
    weights = plan.stages[int(np.searchsorted(first, start, side="right")) - 1].weights
    datasets = []
    for name in weights:
        builder = tfds.builder_from_directory(str(plan.resolve(name)))
        rows = grain.MapDataset.source(builder.as_data_source("train"))
        datasets.append(rows.seed(plan.seed).shuffle().repeat())
    return grain.MapDataset.mix(datasets, list(weights.values()))


class Peer:
    """Another library in an interpreter of its own; see `stream_peers`."""

    def __init__(self, library: str, python: str, directory: Path, global_batch: int) -> None:
        command = [python, str(PEERS), library, str(directory)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        self._library, self._global_batch = library, global_batch
        self._errors = (directory / f"{library}.log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"{self._library} has failed:\n{self._errors.read()}")
        return json.loads(line)

    def measure(self, stage: int, setting: str) -> float:
        """Tokens per second."""
        assert self._process.stdin
        question = {"stage": stage, "setting": setting, "global_batch": self._global_batch}
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._answer()["tokens_per_second"]

    def close(self) -> None:
        """Ends it."""
        self._process.terminate()
        self._process.wait()
        self._errors.close()


def warm(plan: Plan, pythons: dict[str, str], global_batch: int, repeats: int) -> list[list[str]]:
    """Cells of a table: each way, at the setting that was fastest in two first rounds, in turns.

    Args:
      plan: of `write`.
      pythons: interpreters that have other libraries.
      global_batch: rows per batch.
      repeats: timings of each way and stage after these.
    """
    mixture = open_mixture(plan, ROW_LENGTH, VOCAB)
    starts = borders(mixture)[:-1].tolist()
    tokens = global_batch * ROW_LENGTH

    def timed(way: Callable[..., Iterator[Any]], of: Any) -> Way:
        return lambda stage, setting: tokens_per_second(
            way(of, global_batch, starts[stage], setting), tokens
        )

    ways: dict[str, tuple[Way, tuple[str, ...]]] = {
        "ours": (timed(ours, mixture), ("4+0", "8+0", "4+2")),
        "stock Grain": (timed(stock, plan), ("4+0", "16+0", "4+2")),
    }
    with contextlib.ExitStack() as stack:
        for library, python in pythons.items():
            if python:
                peer = Peer(library, python, Path(plan.directory), global_batch)
                stack.callback(peer.close)
                for name, settings in SETTINGS[library].items():
                    ways[name] = peer.measure, settings
        pairs = list(itertools.product(ways, range(len(starts))))
        best = {}
        for name, stage in tqdm(pairs, "settings", disable=not sys.stderr.isatty()):
            way, settings = ways[name]
            tried = [(way(stage, setting), setting) for setting in settings * 2]
            best[name, stage] = max(tried)[1]
        speeds: dict[tuple[str, int], list[float]] = {pair: [] for pair in pairs}
        for pair in tqdm(pairs * repeats, "measuring", disable=not sys.stderr.isatty()):
            name, stage = pair
            speeds[pair].append(ways[name][0](stage, best[pair]))
    cells = []
    for name in ways:
        cells.append([name])
        for stage in range(len(starts)):
            cells[-1] += [f"{statistics.median(speeds[name, stage]) / 1e6:.1f}", best[name, stage]]
            ratios = [
                a / b for a, b in zip(speeds["ours", stage], speeds[name, stage], strict=True)
            ]
            cells[-1].append(f"{statistics.median(ratios):.1f}")
    return cells


# Distant.


class Distant:
    """An ArrayRecord reader each of whose records takes `DELAY` longer, one after the other."""

    near = array_record_module.ArrayRecordReader

    def __init__(self, *args: Any, **options: Any) -> None:
        self._reader = self.near(*args, **options)

    def read(self, positions: list[int]) -> list[bytes]:
        """Records by position."""
        time.sleep(DELAY * len(positions))
        return self._reader.read(positions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


def distant(plan: Plan, global_batch: int, repeats: int, readers: int) -> list[list[str]]:
    """Cells of a table: ours and stock Grain with so many threads that read, and what the disk gave."""
    tokens = global_batch * ROW_LENGTH
    with mock.patch.object(array_record_module, "ArrayRecordReader", Distant):
        mixture = open_mixture(plan, ROW_LENGTH, VOCAB)
        threads = grain.ReadOptions(readers, readers)
        ways: dict[str, Callable[[int], Iterator[Any]]] = {
            "ours": lambda start: batches(mixture, start, global_batch, readers=readers),
            "stock Grain": lambda start: iter(
                stock_rows(plan, start).to_iter_dataset(threads).batch(global_batch)
            ),
        }
        cells = {name: [name] for name in ways}
        for start in borders(mixture)[:-1].tolist():
            speeds: dict[str, list[float]] = {name: [] for name in ways}
            for name in list(ways) * repeats:
                stream = forgetful(ways[name](start), Path(plan.directory))
                speeds[name].append(tokens_per_second(stream, tokens))
            for name, cell in cells.items():
                cell.append(f"{statistics.median(speeds[name]) / 1e6:.1f}")
        for name, way in ways.items():
            stream, before = forgetful(way(0), Path(plan.directory)), bytes_read()
            for _ in range(8):
                next(stream)
            cells[name].append(f"{(bytes_read() - before) / (8 * global_batch) / 1e3:.1f}")
    return list(cells.values())


def forgetful(stream: Iterator[Any], directory: Path) -> Iterator[Any]:
    """The same batches; before each the page cache is emptied."""
    while True:
        forget(directory)
        yield next(stream)


def forget(directory: Path) -> None:
    """Drops the files of the sources from the page cache."""
    for file in directory.rglob("*.array_record*"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bytes_read() -> int:
    """From the disk, by this process."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("read_bytes"))


# Planning.


def opening_seconds(plan: Plan, global_batch: int) -> float:
    """Seconds from a plan on disk to the first batch from row `FAR` on, with nothing in any cache."""
    forget(Path(plan.directory))
    _forget_tables()
    began = time.perf_counter()
    mixture = open_mixture(Plan.load(Path(plan.directory) / "mixture.json"), ROW_LENGTH, VOCAB)
    mixture.read(np.arange(FAR, FAR + global_batch))
    return time.perf_counter() - began


def planning_seconds(global_batch: int) -> float:
    """Seconds from the published plan on disk to the origins of a batch's rows from row `FAR` on."""
    _forget_tables()
    began = time.perf_counter()
    published().locate(np.arange(FAR, FAR + global_batch))
    return time.perf_counter() - began


def locating_seconds(rows: int) -> tuple[float, float]:
    """Seconds of CPU, and by the clock, per row when both stages are located in the order of the run.

    So many rows at once.
    """
    mixture, blocks, spent = published(), 64, np.zeros(2)
    for start in borders(mixture)[:-1].tolist():
        began = np.array([time.process_time(), time.perf_counter()])
        for first in range(start, start + blocks * BLOCK, rows):
            mixture.locate(np.arange(first, first + rows))
        spent += [time.process_time(), time.perf_counter()] - began
    processor, clock = spent / (len(mixture.plan.stages) * blocks * BLOCK)
    return processor, clock


def planning_bytes(global_batch: int) -> tuple[int, int]:
    """What planning takes at most: the arrays and objects of Python, and all memory of this process."""
    _forget_tables()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    before = _status("VmRSS")
    _plan_parts(global_batch)
    resident = _status("VmHWM") - before
    _forget_tables()
    tracemalloc.start()
    _plan_parts(global_batch)
    _, traced = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return traced, resident


def _plan_parts(global_batch: int) -> None:
    mixture = published()
    for start in np.linspace(0, len(mixture) - global_batch, 200).astype(np.int64).tolist():
        mixture.locate(np.arange(start, start + global_batch))
    mixture.given(len(mixture))


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _forget_tables() -> None:
    mixture_module._table.cache_clear()
    mixture_module._shuffled.cache_clear()


def planning(global_batch: int, repeats: int) -> list[list[str]]:
    """Cells of a table: what, seen, bar."""

    def per_row(rows: int) -> list[str]:
        spent = [locating_seconds(rows) for _ in range(repeats)]
        processor, clock = (1e6 * statistics.median(each) for each in zip(*spent, strict=True))
        seen = f"{processor:.2f} us of CPU, {clock:.2f} by the clock"
        return [f"a row, {rows} at once", seen, "5 us"]

    traced, resident = planning_bytes(global_batch)
    cold = statistics.median(planning_seconds(global_batch) for _ in range(repeats))
    return [
        per_row(global_batch // 2),
        per_row(global_batch),
        [f"cold start at row {FAR:,}", f"{cold:.3f} s", "1 s"],
        ["memory, objects of Python", f"{traced / 1e6:.1f} MB", "200 MB"],
        ["memory, all of it", f"{resident / 1e6:.1f} MB", "200 MB"],
    ]


def main() -> None:
    """Prints the tables."""
    args, batch = flags.FLAGS, flags.FLAGS.global_batch
    print(
        f"14 sources, rows of {ROW_LENGTH} tokens, {batch} per step; medians of {args.repeats}; "
        f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}"
    )
    lines = [["planning", "seen", "bar"], *planning(batch, args.repeats)]
    print("\n" + aligned(lines, "<>>"), flush=True)
    pythons = {"mosaicml": args.streaming_python, "levanter": args.levanter_python}
    with tempfile.TemporaryDirectory() as directory:
        plan = write(Path(directory), args.rows)
        names = [stage.name for stage in plan.stages]
        opening = statistics.median(opening_seconds(plan, batch) for _ in range(args.repeats))
        print(f"\nfrom the plan to a batch read at row {FAR:,}, nothing cached: {opening:.3f} s")
        head = [f"distant, {args.readers} readers, M tokens/s (bar: 3)", *names, "kB of disk a row"]
        lines = [head, *distant(plan, batch, args.repeats, args.readers)]
        print("\n" + aligned(lines, "<>>>"), flush=True)
        head = ["warm, M tokens/s (bar: 8)"]
        for name in names:
            head += [name, "setting", "ours / it"]
        lines = [head, *warm(plan, pythons, batch, args.repeats)]
        print("\n" + aligned(lines, "<>>>>>>"))
    for library, python in pythons.items():
        if not python:
            print(
                f"left out: {library}. `python -m venv V && V/bin/pip install {INSTALL[library]}`, then "
                f"--{'streaming' if library == 'mosaicml' else library}_python=V/bin/python"
            )
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    flags.DEFINE_integer("rows", 2000, "Rows of each source on disk.", lower_bound=1)
    flags.DEFINE_integer("global_batch", 512, "Rows per batch.", lower_bound=2)
    flags.DEFINE_integer("repeats", 5, "Timings of each way.", lower_bound=1)
    flags.DEFINE_integer("readers", 96, "Threads that read distant files.", lower_bound=1)
    flags.DEFINE_string("streaming_python", "", "Interpreter that has MosaicML Streaming.")
    flags.DEFINE_string("levanter_python", "", "Interpreter that has Levanter.")
    cli.run(main)
