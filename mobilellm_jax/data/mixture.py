"""The stream: `mixture[i]` is row `i` of a whole run, a pure function of (plan, i).

Rows come in blocks of 4,096. Weights are fixed-point integers that sum to 2**22, so the shares
repeat every 1,024 blocks, and a table made when the mixture is opened says how many rows each
source has given before each block of that period: at every block border each source is within one
row of its exact share, for ever. Inside a block the order is permuted by (seed, block). A source's
own rows are permuted anew in every epoch by (seed, source, epoch). The permutations are Feistel
networks: random access, no state, no memory, and the same on every machine and under every version
of NumPy.

So the position in the data is one integer, the rows consumed, and any number of processes sees one
order.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, SupportsIndex

import grain
import numpy as np
import numpy.typing as npt

from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.rows import Rows, open_rows, read_info
from mobilellm_jax.errors import UserError

BLOCK = 4096
SHARES = 1 << 22
PERIOD = SHARES // BLOCK  # blocks after which the shares repeat
_ROUNDS = 6


def fixed_point(weights: Sequence[float]) -> np.ndarray:
    """int64 weights that sum to `SHARES`, by largest remainder; none below 1.

    Raises:
      UserError: a weight is too small to be told from zero (1 / 4,194,304).
    """
    exact = np.asarray(weights, np.float64) * SHARES
    if exact.min() < 0.5:
        raise UserError(
            f"a weight of {min(weights):.3g} is below the resolution of a mixture, "
            f"{0.5 / SHARES:.3g}: leave that source out or raise its weight."
        )
    whole = np.maximum(np.floor(exact).astype(np.int64), 1)
    order = np.argsort(whole - exact, kind="stable")  # largest remainder first
    # `whole` may exceed the sum by the few weights that were lifted to 1: those are last in this
    # order.
    missing = SHARES - int(whole.sum())
    if missing >= 0:
        whole[order[:missing]] += 1
    else:
        whole[np.argmax(whole)] += missing
    return whole


def rows_before_blocks(shares: np.ndarray) -> np.ndarray:
    """How many rows each source gives before each block of a period.

    Entry [b, s] is within one row of the exact `b * BLOCK * share`, rows of the table sum to `b *
    BLOCK` and columns never fall. This is the just-in-time sequencing problem (Steiner and Yeomans
    1993); block by block, the rows that are not yet due go to the sources whose next row falls due
    first.

    Args:
      shares: int64 [sources], summing to `SHARES`.

    Returns:
      int64 [PERIOD + 1, sources].
    """
    table = np.zeros((PERIOD + 1, len(shares)), np.int64)
    for block in range(1, PERIOD + 1):
        due = block * BLOCK * shares  # in units of 1 / SHARES of a row
        count = np.maximum(table[block - 1], due // SHARES)
        room = -(-due // SHARES) - count  # up to the share rounded up
        spare = block * BLOCK - int(count.sum())
        # The next row, number `count + 1`, must have been given when its share is reached.
        deadline = np.where(room > 0, ((count + 1) * SHARES - 1) // shares, np.iinfo(np.int64).max)
        count[np.argsort(deadline, kind="stable")[:spare]] += 1
        table[block] = count
    return table


def permute(index: npt.ArrayLike, size: npt.ArrayLike, key: npt.ArrayLike) -> np.ndarray:
    """A pseudo-random permutation of `range(size)`, evaluated at `index`; all arguments broadcast.

    A Feistel network over the smallest 2k-bit square that holds `size`, walked until it falls
    inside (Black and Rogaway 2002); on average fewer than four walks.

    Args:
      index: int64, in [0, size).
      size: int64, at most 2**40.
      key: uint64; another key, another permutation.
    """
    index, size, key = np.broadcast_arrays(
        np.asarray(index, np.uint64), np.asarray(size, np.uint64), np.asarray(key, np.uint64)
    )
    half = np.zeros(size.shape, np.uint64)
    while (short := (np.uint64(1) << (np.uint64(2) * half)) < size).any():
        half = half + short.astype(np.uint64)
    out = index.copy()
    todo = np.ones(out.shape, bool)
    while todo.any():
        out[todo] = _feistel(out[todo], half[todo], key[todo])
        todo &= out >= size
    return out.astype(np.int64)


def _feistel(x: np.ndarray, half: np.ndarray, key: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = x >> half, x & mask
    for round_ in range(_ROUNDS):
        left, right = right, left ^ (_hash(right, key, round_) & mask)
    return (left << half) | right


def _hash(x: np.ndarray, key: np.ndarray | np.uint64, round_: int) -> np.ndarray:
    """The finaliser of SplitMix64, keyed; wraps modulo 2**64."""
    z = x + key + np.uint64((0x9E3779B97F4A7C15 * (round_ + 1)) & 0xFFFFFFFFFFFFFFFF)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _key(*parts: Any) -> np.uint64:
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


@dataclasses.dataclass(frozen=True)
class Located:
    """Where rows of the stream come from, each field int64 [n]."""

    source: np.ndarray  # index into the plan's sources
    epoch: np.ndarray  # how often that source has been read whole before
    row: np.ndarray  # row of that source's training split


def first_rows(plan: Plan, source: str, length: int, count: int) -> np.ndarray:
    """The first `count` rows that a source gives to the stream, as rows of its training split.

    Args:
      plan: with its seed.
      source: name in the plan.
      length: rows of its training split.
      count: at most `length`, for one epoch.
    """
    return _order(np.arange(count), np.int64(length), _source_key(plan, source))[1]


def _source_key(plan: Plan, source: str) -> np.uint64:
    return _key("rows", plan.seed, source)


def _order(
    number: np.ndarray, length: np.ndarray | np.int64, key: np.ndarray | np.uint64
) -> tuple[np.ndarray, np.ndarray]:
    """Epoch and row of the `number`-th row that a source gives; each epoch in an order of its own."""
    epoch, position = np.divmod(number, length)
    return epoch, permute(position, length, _hash(epoch.astype(np.uint64), key, 1))


class Mixture:
    """The rows of a plan in the order of training: random access, picklable, no state."""

    def __init__(self, plan: Plan, sources: Sequence[Rows]) -> None:
        """Opens a mixture.

        Args:
          plan: sources, weights, seed.
          sources: the training rows of each source of the plan, in its order.
        """
        self.plan = plan
        self.sources = tuple(sources)
        self._lengths = np.array([len(rows) for rows in self.sources], np.int64)
        shares = fixed_point([source.weight for source in plan.sources])
        self._before = rows_before_blocks(shares)
        self._block_key = _key("block", plan.seed)
        self._source_keys = np.array([_source_key(plan, name) for name in plan.names])

    def locate(self, index: np.ndarray) -> Located:
        """Source, epoch and row of the stream's rows `index` (int64 [n])."""
        index = np.asarray(index, np.int64)
        period, block = np.divmod(index // BLOCK, PERIOD)
        block_key = _hash((index // BLOCK).astype(np.uint64), self._block_key, 0)
        place = permute(index % BLOCK, BLOCK, block_key)
        # Inside a block, places are laid out source after source; the permutation has shuffled
        # them.
        given = self._before[block + 1] - self._before[block]
        ends = np.cumsum(given, axis=1)
        source = (place[:, None] >= ends).sum(axis=1)
        picked = np.arange(len(index)), source
        rank = place - (ends - given)[picked]
        number = period * self._before[-1][source] + self._before[block, source] + rank
        return Located(source, *_order(number, self._lengths[source], self._source_keys[source]))

    def read(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """Rows `index` of the stream: `tokens` int32 [n, row_length + 1] and `source` int32 [n]."""
        at = self.locate(index)
        tokens = np.empty((len(index), self.plan.row_length + 1), np.int32)
        for s in np.unique(at.source):
            here = at.source == s
            tokens[here] = self.sources[s].read(at.row[here])
        return {"tokens": tokens, "source": at.source.astype(np.int32)}

    def __getitem__(self, i: SupportsIndex) -> dict[str, np.ndarray]:
        """Row `i` of the stream."""
        return {name: rows[0] for name, rows in self.read(np.array([int(i)])).items()}


def open_mixture(plan: Plan, row_length: int, vocab_size: int) -> Mixture:
    """Opens and checks the sources of a plan.

    Raises:
      UserError: a source is missing, incomplete or truncated, was tokenized by another tokenizer,
        its rows have another length than the run's, or more tokens than the model.
    """
    if plan.row_length != row_length:
        raise UserError(
            f"the plan in {plan.directory} has rows of {plan.row_length} tokens, the run wants "
            f"config.row_length={row_length}: set that key, or prepare the data with that length."
        )
    sources = open_split(plan, "train", vocab_size)
    return Mixture(plan, [sources[i] for i in range(len(plan.sources))])


def open_split(plan: Plan, split: str, vocab_size: int) -> dict[int, Rows]:
    """One split of the sources that have it, by number, checked against plan and vocabulary.

    Every source has rows to train on; a held-out part is the choice of who prepared it.

    Raises:
      UserError: see `open_mixture`.
    """
    opened = {}
    for number, source in enumerate(plan.sources):
        path = plan.resolve(source.path)
        info, where = read_info(path), f"source {source.name!r} at {path}"
        if info.tokenizer != plan.tokenizer:
            raise UserError(
                f"{where} was tokenized by another tokenizer ({info.tokenizer[:12]}) than the plan's "
                f"({plan.tokenizer[:12]}): prepare it again with the plan's {plan.tokenizer_path}."
            )
        if info.row_length != plan.row_length:
            raise UserError(
                f"{where} has rows of {info.row_length} tokens, the plan says {plan.row_length}: "
                "prepare it again with that row length."
            )
        if info.vocab_size > vocab_size:
            raise UserError(
                f"{where} has a vocabulary of {info.vocab_size} pieces, the model one of only "
                f"{vocab_size}: set config.model.vocab_size={info.vocab_size} or more."
            )
        if split in info.splits or split == "train":
            opened[number] = open_rows(path, split)
    return opened


class _Parts:
    """Element `k` is this process's part of global batch `k` after the `start` rows already consumed."""

    def __init__(self, mixture: Mixture, start: int, global_batch: int, part: slice) -> None:
        self._mixture, self._part = mixture, part
        self._start, self._global_batch = start, global_batch

    def __len__(self) -> int:
        return np.iinfo(np.int64).max // (2 * self._global_batch)

    def __getitem__(self, k: SupportsIndex) -> dict[str, np.ndarray]:
        first = self._start + int(k) * self._global_batch
        return self._mixture.read(np.arange(first, first + self._global_batch)[self._part])


def batches(
    mixture: Mixture,
    start: int,
    global_batch: int,
    process: int = 0,
    processes: int = 1,
    prefetch: int = 4,
) -> grain.DatasetIterator:
    """This process's part of each global batch, from row `start` on, read ahead by threads.

    Args:
      mixture: the stream.
      start: rows of the stream already consumed; the whole state of the iterator.
      global_batch: rows per step over all processes.
      process: which part, of `processes` equal and consecutive ones.
      processes: number of parts.
      prefetch: batches read ahead.

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
    dataset = grain.MapDataset.source(_Parts(mixture, start, global_batch, part))
    return iter(dataset.to_iter_dataset(options))
