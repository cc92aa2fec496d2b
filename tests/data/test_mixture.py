"""The stream is a pure function: exact shares, permuted order, whole epochs, the same for every reader."""

import pickle
import time

import numpy as np
import pytest

from mobilellm_jax.data import mixture as m
from mobilellm_jax.data.plan import Plan, PlanSource
from mobilellm_jax.errors import UserError


class FakeRows:
    """Row `r` of source `s` is [s, r, 0, 0, ...]."""

    def __init__(self, source, rows, width=9):
        self.source, self.rows, self.width = source, rows, width

    def __len__(self):
        return self.rows

    def read(self, indices):
        out = np.zeros((len(indices), self.width), np.int32)
        out[:, 0], out[:, 1] = self.source, indices
        return out


def make(weights, rows, seed=0):
    sources = tuple(PlanSource(f"s{i}", f"s{i}", w) for i, w in enumerate(weights))
    plan = Plan(sources, row_length=8, tokenizer_path="t", tokenizer="f", seed=seed)
    return m.Mixture(plan, [FakeRows(i, n) for i, n in enumerate(rows)])


GOLDEN_8 = [3, 5, 2, 6, 4, 1, 0, 7]
GOLDEN_ROWS = [[1, 0, 0, 0], [6, 0, 36, 13999994], [93, 84, 59, 20]]
WEIGHTS = [[1.0], [0.5, 0.5], [0.4, 0.35, 0.25], [0.6, 0.3, 0.0998, 0.0002], list(np.ones(14) / 14)]


@pytest.mark.parametrize("weights", WEIGHTS, ids=len)
def test_shares_are_exact_within_one_row_at_every_block(weights):
    shares = m.fixed_point(weights)
    assert shares.sum() == m.SHARES
    np.testing.assert_allclose(shares / m.SHARES, weights, atol=1 / m.SHARES)
    table = m.rows_before_blocks(shares)
    blocks = np.arange(m.PERIOD + 1)[:, None]
    assert (table.sum(1) == blocks[:, 0] * m.BLOCK).all()
    assert (np.diff(table, axis=0) >= 0).all()
    assert np.abs(table - blocks * m.BLOCK * shares / m.SHARES).max() < 1
    assert (table[-1] == shares).all()  # so the next period is exact as well


def test_the_table_agrees_with_the_rows():
    weights = [0.6, 0.3, 0.0998, 0.0002]
    mix = make(weights, [50, 50, 50, 50])
    table = m.rows_before_blocks(m.fixed_point(weights))
    for first in (0, 5, m.PERIOD - 1, m.PERIOD, 3 * m.PERIOD + 7):
        found = mix.locate(np.arange(first * m.BLOCK, (first + 1) * m.BLOCK)).source
        block = first % m.PERIOD
        assert (np.bincount(found, minlength=4) == table[block + 1] - table[block]).all()


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 1000, 4096])
def test_permutations_are_bijections_and_differ_by_key(size):
    one = m.permute(np.arange(size), size, 1)
    assert (np.sort(one) == np.arange(size)).all()
    if size > 16:
        assert (one != m.permute(np.arange(size), size, 2)).any()
        assert (one != np.arange(size)).any()


def test_permutations_look_random():
    """Where element 0 goes is uniform over keys (chi-square over 16 places, 4,800 keys)."""
    places = m.permute(np.zeros(4800, np.int64), 16, np.arange(4800, dtype=np.uint64) * 7919 + 1)
    counts = np.bincount(places, minlength=16)
    assert ((counts - 300) ** 2 / 300).sum() < 44.3  # p = 0.0001 at 15 degrees of freedom


def test_permutations_never_change():
    """Golden values: a different order would break every resume across versions."""
    assert m.permute(np.arange(8), 8, 42).tolist() == GOLDEN_8
    at = make([0.7, 0.3], [100, 100]).locate(np.array([0, 1, 5000, 2_000_000_000]))
    assert np.stack([at.source, at.epoch, at.row]).tolist() == GOLDEN_ROWS


def test_every_epoch_reads_every_row_once_in_a_new_order():
    mix = make([0.75, 0.25], [1000, 333])
    at = mix.locate(np.arange(3 * m.BLOCK))
    for source, rows in ((0, 1000), (1, 333)):
        mine = at.source == source
        epochs = [np.sort(at.row[mine & (at.epoch == e)]) for e in range(3)]
        assert (epochs[0] == np.arange(rows)).all()
        assert (epochs[1] == np.arange(rows)).all()
    order = [at.row[(at.source == 0) & (at.epoch == e)] for e in (0, 1)]
    assert (order[0] != order[1]).mean() > 0.9


def test_random_access_equals_sequential_reading():
    mix = make([0.5, 0.3, 0.2], [100, 70, 9])
    whole = mix.read(np.arange(10_000))
    rng = np.random.default_rng(0)
    for i in rng.integers(0, 10_000, 50):
        assert (mix[i]["tokens"] == whole["tokens"][i]).all()
        assert mix[i]["source"] == whole["source"][i] == whole["tokens"][i][0]


def test_seed_changes_the_order_and_nothing_else():
    one, two = make([0.5, 0.5], [4000, 4000]), make([0.5, 0.5], [4000, 4000], seed=1)
    a, b = (mix.locate(np.arange(m.BLOCK)) for mix in (one, two))
    assert (a.source != b.source).any()
    assert (np.bincount(a.source) == np.bincount(b.source)).all()


def test_a_pickled_mixture_is_the_same():
    mix = make([0.5, 0.5], [10, 20])
    copy = pickle.loads(pickle.dumps(mix))
    assert (copy.read(np.arange(100))["tokens"] == mix.read(np.arange(100))["tokens"]).all()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_read_the_global_order(processes):
    mix = make([0.6, 0.4], [100, 50])
    streams = [m.batches(mix, 24, 8, p, processes) for p in range(processes)]
    for step in range(5):
        parts = np.concatenate([next(stream)["tokens"] for stream in streams])
        first = 24 + 8 * step
        assert (parts == mix.read(np.arange(first, first + 8))["tokens"]).all()


def test_resume_is_one_integer():
    mix = make([0.6, 0.4], [100, 50])
    through = m.batches(mix, 0, 8)
    for _ in range(6):
        next(through)
    resumed = m.batches(mix, 48, 8)
    for _ in range(5):
        assert (next(through)["tokens"] == next(resumed)["tokens"]).all()


def test_two_billion_rows_open_in_a_second():
    began = time.perf_counter()
    mix = make(list(np.ones(14) / 14), [2_000_000_000] * 14)
    mix.locate(np.array([2_000_000_000]))
    assert time.perf_counter() - began < 1


def test_uneven_batches_and_vanishing_weights_are_refused():
    with pytest.raises(UserError, match="3 processes"):
        m.batches(make([1.0], [10]), 0, 8, 0, 3)
    with pytest.raises(UserError, match="resolution"):
        m.fixed_point([1 - 1e-8, 1e-8])


def test_first_rows_are_those_of_the_first_block():
    mix = make([0.75, 0.25], [3500, 1100])
    at = mix.locate(np.arange(m.BLOCK))  # inside it, the stream shuffles them
    for number, (name, length) in enumerate([("s0", 3500), ("s1", 1100)]):
        read = at.row[at.source == number]
        assert set(m.first_rows(mix.plan, name, length, len(read))) == set(read)
        assert (np.sort(m.first_rows(mix.plan, name, length, length)) == np.arange(length)).all()
