"""The stream of other libraries, timed for `benchmarks.stream` by an interpreter that has them.

    OTHER/bin/python benchmarks/stream_peers.py mosaicml|levanter DIRECTORY

It imports nothing of ours. In DIRECTORY lie `rows/NAME.npy` ([rows, row_length + 1], a file per source)
and `stages.json` ([{NAME: weight}, ...]). The rows are brought into the library's own format; then each
line of standard input, {"stage", "setting", "global_batch"}, is answered by {"tokens_per_second"}.
"""

import functools
import itertools
import json
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np

GROUP = 4  # batches that a library may fetch at once: it is timed by whole groups


def tokens_per_second(stream: Iterator[Any], tokens: int, seconds: float = 2.0) -> float:
    """Speed of a stream of batches of so many tokens each, once it has emptied what it had read ahead."""
    for _ in range(4 * GROUP):
        next(stream)
    count, began = 0, time.perf_counter()
    while count % GROUP or (time.perf_counter() - began) < seconds:
        next(stream)
        count += 1
    return count * tokens / (time.perf_counter() - began)


class Mosaicml:
    """MosaicML Streaming: MDS shards, uncompressed; `setting` is the number of DataLoader workers."""

    def __init__(self, directory: Path, rows: dict[str, np.ndarray]) -> None:
        import streaming

        self._directory = directory / "mds"
        for name, of_source in rows.items():
            columns = {"tokens": f"ndarray:{of_source.dtype}:{of_source.shape[1]}"}
            with streaming.MDSWriter(out=str(self._directory / name), columns=columns) as out:
                for row in of_source:
                    out.write({"tokens": row})

    def stream(self, weights: dict[str, float], global_batch: int, setting: str) -> Iterator[Any]:
        """Shuffled batches, drawn in proportion to the weights, endlessly."""
        import streaming
        import torch
        from streaming.base.util import clean_stale_shared_memory
        from torch.utils.data import DataLoader

        def stack(rows: list[dict[str, np.ndarray]]) -> Any:
            return torch.from_numpy(np.stack([row["tokens"] for row in rows]))

        clean_stale_shared_memory()
        torch.set_num_threads(1)
        streams = [
            streaming.Stream(local=str(self._directory / name), proportion=weight)
            for name, weight in weights.items()
        ]
        dataset = streaming.StreamingDataset(
            streams=streams, epoch_size=512 * global_batch, batch_size=global_batch, shuffle=True
        )
        loader = DataLoader(dataset, global_batch, num_workers=int(setting), collate_fn=stack)
        return itertools.chain.from_iterable(itertools.repeat(loader))


class Levanter:
    """Levanter: its mixture of shuffled sources and its loader; `setting` is where the rows are.

    `cache` is its token cache on disk, as it trains from it; `memory` a list of arrays.
    """

    def __init__(self, directory: Path, rows: dict[str, np.ndarray]) -> None:
        import levanter.data
        from levanter.data.text import TokenSeqDataset
        from levanter.store.cache import SerialCacheWriter

        self._sources: dict[str, dict[str, Any]] = {"memory": {}, "cache": {}}
        for name, of_source in rows.items():
            of_source = of_source.astype(np.int32)
            self._sources["memory"][name] = levanter.data.ListAsyncDataset(
                list(of_source), is_complete=True
            )
            exemplar = {"input_ids": np.zeros(0, np.int32)}
            with SerialCacheWriter(str(directory / "levanter" / name), exemplar) as writer:
                writer.write_batch([{"input_ids": row} for row in of_source])
            cache = TokenSeqDataset(writer.result(), of_source.shape[1])
            self._sources["cache"][name] = cache

    def stream(self, weights: dict[str, float], global_batch: int, setting: str) -> Iterator[Any]:
        """Batches as arrays of JAX, on one device."""
        import jax
        from levanter.data.loader import DataLoader
        from levanter.data.mixture import MixtureDataset

        sources = self._sources[setting]
        shuffled = {
            name: sources[name].shuffle(jax.random.PRNGKey(i)) for i, name in enumerate(weights)
        }
        mixture = MixtureDataset(shuffled, weights, block_size=2048, key=0)
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
        loader = DataLoader(
            mixture,
            global_batch,
            max_buffered_batches=GROUP,
            prefetch_size=GROUP,
            mesh=mesh,
            axis_resources={"batch": "data"},
        )
        batches = iter(loader)
        try:
            yield from batches
        finally:
            batches._batches.stop()  # or its thread, which refers to it, would never end


def main(library: str, directory: Path) -> None:
    """Answers until its standard input ends."""
    rows = {file.stem: np.load(file) for file in sorted((directory / "rows").glob("*.npy"))}
    row_length = next(iter(rows.values())).shape[1] - 1
    stages = json.loads((directory / "stages.json").read_text(encoding="utf-8"))
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print too
    say = functools.partial(print, file=answers, flush=True)
    peer = Mosaicml(directory, rows) if library == "mosaicml" else Levanter(directory, rows)
    say(json.dumps({"ready": library}))
    for line in sys.stdin:
        asked = json.loads(line)
        batch = asked["global_batch"]
        stream = peer.stream(stages[asked["stage"]], batch, asked["setting"])
        say(json.dumps({"tokens_per_second": tokens_per_second(stream, batch * row_length)}))
        if isinstance(stream, Generator):
            stream.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
