"""The stream: `mixture[i]` is row `i` of a whole run, a pure function of (plan, row length, i).

Rows come in blocks of 4,096, counted from the begin of each stage. Blocks form periods (1,024
blocks, fewer in a short ramp) in which every source has a whole number of rows: in a constant stage
the same in each, its fixed-point weight; on a ramp what the line demands. Inside a period a table
says how many rows each source has given before each block, and at every block border each source is
within one row of its exact share, for ever. Inside a block the order is permuted by (seed, stage,
block). A source's own rows are permuted anew in every epoch by (seed, source, epoch); its epochs
run on over the stages.

So the position in the data is one integer, the rows consumed, and any number of processes sees one
order.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, SupportsIndex

import grain
import numpy as np

from mobilellm_jax.data.apportion import SHARES, fixed_point, just_in_time
from mobilellm_jax.data.permutation import key_of, mixed, permute
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.taught import TAUGHT_IDS, TAUGHT_LOG_PROBS, Taught
from mobilellm_jax.errors import UserError

BLOCK = 4096
PERIOD = SHARES // BLOCK  # blocks after which constant shares repeat
RAMP_PERIODS = 256  # at least, into which a ramp is cut
ENDLESS = 1 << 62


@dataclasses.dataclass(frozen=True)
class Located:
    """Where rows of the stream come from, each field int64 [n]."""

    source: np.ndarray  # index into the plan's sources
    epoch: np.ndarray  # how often that source has been read whole before
    row: np.ndarray  # row of that source's training split


class Readable(Protocol):
    """Rows of one source by number: see `rows.Rows`."""

    @property
    def retries(self) -> int:
        """How often a read failed and was tried again."""

    def __len__(self) -> int:
        """Number of rows."""

    def read(self, indices: np.ndarray) -> np.ndarray:
        """int64 [n] -> int32 [n, row_length + 1]."""


class _Stage:
    """How many rows of each source stand before each block of a stage."""

    def __init__(
        self, number: int, first: int, rows: int, begin: np.ndarray, end: np.ndarray, seed: int
    ) -> None:
        """A stage of `rows` rows from row `first` of the stream on, its shares from `begin` to `end`."""
        self.first, self.rows = first, rows
        self._key = key_of("block", seed, number)
        start, stop = fixed_point(begin), fixed_point(end)
        if (begin == end).all():
            self._constant: np.ndarray | None = start
            self.period = PERIOD
            return
        self._constant, blocks = None, -(-rows // BLOCK)
        self.period = 1
        while self.period < PERIOD and blocks // (2 * self.period) >= RAMP_PERIODS:
            self.period *= 2
        # Over `periods` periods the weight goes from `start` to `stop`; the sum of the first j of
        # them is exact in integers.
        periods = -(-blocks // self.period)
        j = np.arange(periods + 1)[:, None]
        due = start * (2 * periods * j - j * j) + stop * j * j
        self._borders = just_in_time(due, 2 * periods * (PERIOD // self.period))

    def before(self, period: int) -> np.ndarray:
        """int64 [sources]: rows given before a period."""
        if self._constant is not None:
            return period * self._constant
        return self._borders[period]

    def period_of(self, source: int, number: int) -> int:
        """The period that holds the `number`-th row which a source gives in this stage."""
        if self._constant is not None:
            return number // int(self._constant[source])
        return int(np.searchsorted(self._borders[:, source], number, side="right")) - 1

    def table(self, period: int) -> np.ndarray:
        """int64 [blocks + 1, sources]: rows given before each block of a period, from its begin."""
        shares = self.before(period + 1) - self.before(period)
        return _table(shares.tobytes(), self.period)

    def block(self, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a block is made of.

        Returns:
          int64 [BLOCK] source of each row; int64 [BLOCK] how many rows of its source stand before
          it in this stage; int64 [sources] rows that each source has given at the block's begin.
        """
        period, at = divmod(block, self.period)
        table = self.table(period)
        before = self.before(period) + table[at]
        key, given = int(mixed(block, self._key)), table[at + 1] - table[at]
        source, rank = _shuffled(key, given.tobytes())
        return source, before[source] + rank, before


@functools.lru_cache(maxsize=256)
def _table(shares: bytes, blocks: int) -> np.ndarray:
    """Cached, because a constant stage has one table for all its periods; 100 KB for 14 sources."""
    due = np.arange(blocks + 1)[:, None] * np.frombuffer(shares, np.int64)
    return just_in_time(due, blocks)


@functools.lru_cache(maxsize=64)
def _shuffled(key: int, given: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Sources of the rows of a block in the order of a key, and the rank of each among its source's.

    A source's rows come in their order, so that a stage may end anywhere inside a block without
    leaving any of them out.
    """
    counts = np.frombuffer(given, np.int64)
    place = permute(np.arange(BLOCK), BLOCK, np.uint64(key))
    source = np.repeat(np.arange(len(counts)), counts)[place]
    rank = np.empty(BLOCK, np.int64)
    rank[np.argsort(source, kind="stable")] = np.arange(BLOCK)
    return source, rank - (np.cumsum(counts) - counts)[source]


class Mixture:
    """The rows of a plan in the order of training: random access, picklable, no state."""

    def __init__(
        self,
        plan: Plan,
        row_length: int,
        sources: Sequence[Readable],
        taught: Sequence[Taught] = (),
    ) -> None:
        """Opens a mixture.

        Args:
          plan: sources, stages, seed, skips.
          row_length: trained tokens per row.
          sources: the training rows of each source of the plan, in its order.
          taught: likewise what a teacher says of them, or nothing.

        Raises:
          UserError: a weight is too small, a skip is of rows of another length, or teachers kept
            different numbers of tokens.
        """
        self.plan, self.row_length = plan, row_length
        self.sources, self.taught = tuple(sources), tuple(taught)
        kept = {of.info.top_k for of in self.taught}
        if len(kept) > 1:
            raise UserError(
                f"teachers kept {', '.join(map(str, sorted(kept)))} tokens of the sources of "
                f"{plan.directory}: write them again with one --top_k."
            )
        self.top_k = max(kept, default=0)  # tokens that a teacher wrote of each target; 0: none
        self._lengths = np.array([len(rows) for rows in self.sources], np.int64)
        self._source_keys = np.array([_source_key(plan, name) for name in plan.names])
        for skip in plan.skips:
            if skip.row_length != row_length:
                raise UserError(
                    f"the plan in {plan.directory} skips rows of {skip.row_length} tokens, the run has "
                    f"rows of {row_length}: its skips are of another run; remove them in a copy."
                )
        # Skips in rows of the run and of the stream: run row i is stream row i + rows left out.
        skipped = np.cumsum([0, *(skip.rows for skip in plan.skips)])
        self._skip_at = np.array([skip.at_row for skip in plan.skips], np.int64)
        self._skipped = skipped.astype(np.int64)
        self._stages: list[_Stage] = []
        given = [np.zeros(len(self.sources), np.int64)]
        tokens = 0
        for number, (stage, begin, end) in enumerate(zip(plan.stages, *plan.weights, strict=True)):
            first = tokens // row_length
            tokens = ENDLESS if stage.tokens is None else tokens + stage.tokens
            rows = (tokens if tokens == ENDLESS else tokens // row_length) - first
            self._stages.append(_Stage(number, first, rows, begin, end, plan.seed))
            if stage.tokens is not None:
                given.append(given[-1] + self._given_in(self._stages[-1], rows))
        self._given = given  # rows that the stages before each have given
        self._firsts = np.array([stage.first for stage in self._stages])
        self._end = self._stages[-1].first + self._stages[-1].rows

    def __len__(self) -> int:
        """Rows of the run, very many if its last stage has no end."""
        return self._end - int(self._skipped[-1])

    def stage(self, index: int) -> int:
        """Which of the plan's stages a row of the run belongs to."""
        stream = self._stream_index(np.array([index]))
        return int(np.searchsorted(self._firsts, stream, side="right")[0]) - 1

    def locate(self, index: np.ndarray) -> Located:
        """Source, epoch and row of the run's rows `index` (int64 [n])."""
        index = self._stream_index(np.asarray(index, np.int64))
        source, number = np.empty_like(index), np.empty_like(index)
        of_stage = np.searchsorted(self._firsts, index, side="right") - 1
        for s in np.unique(of_stage):
            stage, mine = self._stages[s], np.flatnonzero(of_stage == s)
            block, inside = np.divmod(index[mine] - stage.first, BLOCK)
            for b in np.unique(block):
                here = block == b
                of_block, number_of_block, _ = stage.block(int(b))
                source[mine[here]] = found = of_block[inside[here]]
                number[mine[here]] = self._given[s][found] + number_of_block[inside[here]]
        return Located(source, *_order(number, self._lengths[source], self._source_keys[source]))

    def occurrences(self, source: int, row: int, rows: int) -> list[tuple[int, int]]:
        """Where a row of a source comes among the first `rows` rows of the run: (index, epoch)s."""
        return sorted(self._occurrences(source, row, rows))

    def _occurrences(self, source: int, row: int, rows: int) -> Iterator[tuple[int, int]]:
        length, key = int(self._lengths[source]), self._source_keys[source]
        total = int(self.given(rows)[source] + self._left_out(rows)[source])
        for epoch in range(-(-total // length)):
            position = permute(row, length, _epoch_key(np.int64(epoch), key), inverse=True)
            number = epoch * length + int(position)
            if number >= total:
                continue
            s = max(k for k, given in enumerate(self._given) if given[source] <= number)
            stage, number = self._stages[s], number - int(self._given[s][source])
            period = stage.period_of(source, number)
            given = stage.table(period)[:, source] + stage.before(period)[source]
            block = period * stage.period + int(np.searchsorted(given, number, side="right")) - 1
            of_block, numbers, _ = stage.block(block)
            inside = int(np.flatnonzero((of_block == source) & (numbers == number))[0])
            index = self._run_index(stage.first + block * BLOCK + inside)
            if index is not None and index < rows:
                yield index, epoch

    def given(self, rows: int) -> np.ndarray:
        """int64 [sources]: how many rows each source has given to the first `rows` rows of the run."""
        stream = int(self._stream_index(np.array([rows - 1]))[0]) + 1 if rows else 0
        return self._given_to_stream(stream) - self._left_out(rows)

    def _left_out(self, rows: int) -> np.ndarray:
        """int64 [sources]: rows that skips among the first `rows` rows of the run have left out."""
        found = np.zeros(len(self.sources), np.int64)
        for skip, skipped in zip(self.plan.skips, self._skipped, strict=False):
            if skip.at_row < rows:
                first = skip.at_row + int(skipped)
                found += self._given_to_stream(first + skip.rows) - self._given_to_stream(first)
        return found

    def _given_to_stream(self, rows: int) -> np.ndarray:
        if not rows:
            return np.zeros(len(self.sources), np.int64)
        s = int(np.searchsorted(self._firsts, rows - 1, side="right")) - 1
        return self._given[s] + self._given_in(self._stages[s], rows - self._stages[s].first)

    def _given_in(self, stage: _Stage, rows: int) -> np.ndarray:
        """int64 [sources]: what a stage's first rows are made of."""
        if not rows:  # a stage of fewer tokens than a row has
            return np.zeros(len(self.sources), np.int64)
        block, last = divmod(rows - 1, BLOCK)
        source, _, given = stage.block(block)
        return given + np.bincount(source[: last + 1], minlength=len(given))

    def _stream_index(self, index: np.ndarray) -> np.ndarray:
        return index + self._skipped[np.searchsorted(self._skip_at, index, side="right")]

    def _run_index(self, stream: int) -> int | None:
        """The row of the run that a row of the stream is, None if it is left out."""
        for at, skipped in zip([*self._skip_at.tolist(), ENDLESS], self._skipped, strict=True):
            index = stream - int(skipped)
            if index < at:
                return index if self._stream_index(np.array([index]))[0] == stream else None
        return None

    def read(self, index: np.ndarray, readers: int = 0) -> dict[str, np.ndarray]:
        """Rows `index` of the run: `tokens` int32 [n, row_length + 1] and `source` int32 [n].

        Where a teacher wrote what it says, that as well: `taught_ids` int32 [n, row_length, k] and
        `taught_log_probs` float16 [n, row_length, k].

        So many threads as `readers` read a row each at a time, which hides how long distant ones take
        to come; without them all rows of a source are one read.
        """
        at = self.locate(index)
        tokens = np.empty((len(index), self.row_length + 1), np.int32)
        found = {"tokens": tokens, "source": at.source.astype(np.int32)}
        if self.taught:
            shape = len(index), self.row_length, self.top_k
            found |= {TAUGHT_IDS: np.empty(shape, np.int32)}
            found |= {TAUGHT_LOG_PROBS: np.empty(shape, np.float16)}

        def fill(source: int, here: np.ndarray) -> None:
            tokens[here] = self.sources[source].read(at.row[here])
            if self.taught:
                ids, log_probs = self.taught[source].read(at.row[here])
                found[TAUGHT_IDS][here], found[TAUGHT_LOG_PROBS][here] = ids, log_probs

        if readers:
            list(_threads(readers).map(fill, at.source, np.arange(len(index))[:, None]))
        else:
            for s in np.unique(at.source):
                fill(s, at.source == s)
        return found

    def __getitem__(self, i: SupportsIndex) -> dict[str, np.ndarray]:
        """Row `i` of the run."""
        return {name: rows[0] for name, rows in self.read(np.array([int(i)])).items()}


@functools.cache
def _threads(readers: int) -> ThreadPoolExecutor:
    """Of this process, for all that is read in it."""
    return ThreadPoolExecutor(readers, "reader")


def first_rows(plan: Plan, source: str, length: int, count: int, begin: int = 0) -> np.ndarray:
    """The first `count` rows that a source gives to the stream, as rows of its training split.

    Args:
      plan: with its seed.
      source: name in the plan.
      length: rows of its training split.
      count: at most `length`, for one epoch.
      begin: rows that it has given before.
    """
    return _order(np.arange(begin, begin + count), np.int64(length), _source_key(plan, source))[1]


def _source_key(plan: Plan, source: str) -> np.uint64:
    return key_of("rows", plan.seed, source)


def _epoch_key(epoch: np.ndarray | np.int64, key: np.ndarray | np.uint64) -> np.ndarray:
    return mixed(epoch.astype(np.uint64), key, 1)


def _order(
    number: np.ndarray, length: np.ndarray | np.int64, key: np.ndarray | np.uint64
) -> tuple[np.ndarray, np.ndarray]:
    """Epoch and row of the `number`-th row that a source gives; each epoch in an order of its own."""
    epoch, position = np.divmod(number, length)
    return epoch, permute(position, length, _epoch_key(epoch, key))


def consumed(mixture: Mixture, rows: int) -> dict[str, Any]:
    """For the record, when `rows` rows of the run are consumed.

    Returns:
      `stage`: that of the last of them; `epochs/<source>`: how often each source has been read;
      `read_retries`: reads of this process that had to be tried again.
    """
    epochs = mixture.given(rows) / np.array([len(source) for source in mixture.sources])
    found = {f"epochs/{n}": float(e) for n, e in zip(mixture.plan.names, epochs, strict=True)}
    retries = sum(of.retries for of in mixture.sources) + sum(of.retries for of in mixture.taught)
    return {"stage": mixture.stage(rows - 1), "read_retries": retries, **found}


class _Parts:
    """Element `k` is this process's part of global batch `k` after the `start` rows already consumed."""

    def __init__(
        self, mixture: Mixture, start: int, global_batch: int, part: slice, readers: int
    ) -> None:
        self._mixture, self._part, self._readers = mixture, part, readers
        self._start, self._global_batch = start, global_batch

    def __len__(self) -> int:
        return np.iinfo(np.int64).max // (2 * self._global_batch)

    def __getitem__(self, k: SupportsIndex) -> dict[str, np.ndarray]:
        first = self._start + int(k) * self._global_batch
        index = np.arange(first, first + self._global_batch)[self._part]
        return self._mixture.read(index, self._readers)


def batches(
    mixture: Mixture,
    start: int,
    global_batch: int,
    process: int = 0,
    processes: int = 1,
    prefetch: int = 4,
    readers: int = 0,
    workers: int = 0,
) -> grain.DatasetIterator:
    """This process's part of each global batch, from row `start` on, read ahead by threads.

    Args:
      mixture: the stream.
      start: rows of the stream already consumed; the whole state of the iterator.
      global_batch: rows per step over all processes.
      process: which part, of `processes` equal and consecutive ones.
      processes: number of parts.
      prefetch: batches read ahead.
      readers: threads over which the rows of the batches are spread, where the files are far away;
        0 reads them source by source, the fastest where they are near.
      workers: processes that read, each with threads of its own; 0 for none. They change no row.

    Returns:
      An endless iterator over {"tokens": int32 [rows, T + 1], "source": int32 [rows]}.

    Raises:
      UserError: the batch cannot be split evenly over the processes.
    """
    if global_batch % processes:
        raise UserError(
            f"config.global_batch={global_batch} is not a multiple of the {processes} processes."
        )
    rows = global_batch // processes
    part = slice(process * rows, (process + 1) * rows)
    options = grain.ReadOptions(num_threads=min(prefetch, 4), prefetch_buffer_size=prefetch)
    dataset = grain.MapDataset.source(_Parts(mixture, start, global_batch, part, readers))
    ahead = dataset.to_iter_dataset(options)
    if workers:
        ahead = ahead.mp_prefetch(grain.MultiprocessingOptions(workers, prefetch))
    return iter(ahead)
