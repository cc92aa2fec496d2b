"""The stream is a pure function: exact shares, permuted order, whole epochs, the same for every reader."""

import itertools
import pickle
import time
import zlib

import numpy as np
import pytest
import scipy.stats

from mobilellm_jax.data import mixture as m
from mobilellm_jax.data.apportion import SHARES, fixed_point, just_in_time
from mobilellm_jax.data.permutation import permute
from mobilellm_jax.data.plan import Plan, PlanSource, Skip, Stage
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


def plan_of(weights, seed=0, stages=None, skips=()):
    """Of sources s0, s1, ...; `stages` are (tokens, weights[, weights at the end])."""

    def named(values):
        return {f"s{i}": float(w) for i, w in enumerate(values) if w}

    stages = stages or [(None, weights)]
    described = tuple(
        Stage(f"stage{i}", tokens, named(at[0]), named(at[1]) if len(at) > 1 else None)
        for i, (tokens, *at) in enumerate(stages)
    )
    sources = tuple(PlanSource(f"s{i}", f"s{i}") for i in range(len(stages[0][1])))
    return Plan(sources, described, "t", "f", seed=seed, skips=skips)


def make(weights, rows, seed=0, stages=None, skips=()):
    plan = plan_of(weights, seed, stages, skips)
    return m.Mixture(plan, ROW, [FakeRows(i, n) for i, n in enumerate(rows)])


ROW = 8
GOLDEN_ROWS = [[0, 0, 0, 0], [0, 0, 34, 14000000], [81, 5, 6, 55]]
GOLDEN_TABLE = 3138797397
GOLDEN_8 = [3, 5, 2, 6, 4, 1, 0, 7]
WEIGHTS = [[1.0], [0.5, 0.5], [0.4, 0.35, 0.25], [0.6, 0.3, 0.0998, 0.0002], list(np.ones(14) / 14)]
SMALL = [0.5, 0.2, 0.1, 0.1, 0.05, 0.03, 0.0196, *[0.0001] * 4]  # less than a row in a block


@pytest.mark.parametrize("weights", [*WEIGHTS, SMALL], ids=len)
def test_shares_are_exact_within_one_row_at_every_block(weights):
    shares = fixed_point(weights)
    assert shares.sum() == SHARES
    np.testing.assert_allclose(shares / SHARES, weights, atol=1 / SHARES)
    blocks = np.arange(m.PERIOD + 1)[:, None]
    table = just_in_time(blocks * shares, m.PERIOD)
    assert (table.sum(1) == blocks[:, 0] * m.BLOCK).all()
    assert (np.diff(table, axis=0) >= 0).all()
    assert np.abs(table - blocks * m.BLOCK * shares / SHARES).max() < 1
    assert (table[-1] == shares).all()  # so the next period is exact as well


@pytest.mark.parametrize("seed", range(4))
def test_whole_rows_of_any_shares_are_within_one_of_what_is_due(seed):
    """Also where many small sources fall due at once and large ones might be a row ahead."""
    rng = np.random.default_rng(seed)
    for _ in range(100):
        unit, rows = int(rng.integers(2, 24)), int(rng.integers(1, 4))
        shares = rng.multinomial(rows * unit, rng.dirichlet(np.ones(rng.integers(2, 9))))
        due = np.arange(unit + 1)[:, None] * shares
        table = just_in_time(due, unit)
        assert (table.sum(1) == rows * np.arange(unit + 1)).all()
        assert (np.diff(table, axis=0) >= 0).all()
        assert (np.abs(table * unit - due) < unit).all() and (table[-1] == shares).all()


@pytest.mark.parametrize("blocks", [3, 300, 5000])
def test_a_ramp_is_within_a_row_of_its_line_at_every_period_and_straight_inside(blocks):
    """In short ramps a period is a block: the line itself, within one row."""
    begin, end = np.array([0.7, 0.3, 0.0]), np.array([0.1, 0.6, 0.3])
    stages = [(blocks * m.BLOCK * ROW, begin, end)]
    mix = make(None, [10**9] * 3, stages=stages)
    (stage,) = mix._stages
    every, period = np.arange(blocks + 1), stage.period
    # Where periods begin, and of each twentieth all that is inside.
    border = every[(every % period == 0) | (every // period % 20 == 7)]
    given = np.array([mix.given(int(b) * m.BLOCK) for b in border])
    assert (given.sum(1) == border * m.BLOCK).all() and (np.diff(given, axis=0) >= 0).all()
    whole = -(-blocks // period) * period  # the ramp ends with a period
    first, last = fixed_point(begin) / SHARES, fixed_point(end) / SHARES
    line = border[:, None] * m.BLOCK * (first + (last - first) * (border / whole / 2)[:, None])
    at = border % period == 0
    assert np.abs(given - line)[at].max() < 1
    for first, last in itertools.pairwise(np.flatnonzero(at).tolist()):
        inside = np.linspace(given[first], given[last], last - first + 1)
        assert np.abs(given[first : last + 1] - inside).max() < 1
    assert np.diff(np.flatnonzero(at)).max() == period
    assert stage.period == {3: 1, 300: 1, 5000: 16}[blocks]


def test_the_counts_agree_with_the_rows():
    weights = [0.6, 0.3, 0.0998, 0.0002]
    mix = make(weights, [50, 50, 50, 50])
    for first in (0, 5, m.PERIOD - 1, m.PERIOD, 3 * m.PERIOD + 7):
        at = np.arange(first * m.BLOCK, (first + 1) * m.BLOCK)
        found = np.bincount(mix.locate(at).source, minlength=4)
        assert (found == mix.given(int(at[-1]) + 1) - mix.given(int(at[0]))).all()
        assert np.abs(mix.given(int(at[0])) - at[0] * fixed_point(weights) / SHARES).max() < 1


STAGED = [  # ends inside of rows: a row is of the stage in which it ends
    (10_000 * ROW + 3, [0.6, 0.4, 0.0]),
    (30_001 * ROW - 2, [0.6, 0.4, 0.0], [0.1, 0.2, 0.7]),
    (None, [0.0, 0.5, 0.5]),
]
SKIPS = (Skip(0, 3, ROW), Skip(9_000, 2_000, ROW), Skip(9_000, 1, ROW), Skip(30_000, 7, ROW))


@pytest.mark.parametrize("skips", [(), SKIPS], ids=["whole", "skipping"])
def test_stages_ramps_and_skips_by_brute_force(skips):
    """Counts, epochs and where a row comes, each against a walk through the whole run."""
    mix, end = make(None, [700, 501, 90], stages=STAGED, skips=skips), 50_000
    at = mix.locate(np.arange(end))
    for rows in (0, 1, 4095, 4096, 9_000, 9_001, 10_000, 12_345, 40_001, end):
        assert (np.bincount(at.source[:rows], minlength=3) == mix.given(rows)).all()
    places = {}
    for i, (s, e, r) in enumerate(zip(at.source, at.epoch, at.row, strict=True)):
        places.setdefault((s, r), []).append((i, e))
    rng = np.random.default_rng(0)
    for s, length in enumerate((700, 501, 90)):
        # Rows anywhere, and those with which blocks of the ramp begin.
        begins = [9_999 - sum(skip.rows for skip in skips) + k * m.BLOCK for k in (2, 4, 6)]
        first = [b + np.flatnonzero(at.source[b + 1 :] == s)[0] + 1 for b in begins]
        for r in {*rng.integers(0, length, 8), *at.row[first]}:
            assert mix.occurrences(s, r, end) == places.get((s, r), [])
    if not skips:
        for s, length in enumerate((700, 501, 90)):  # epochs run on over the stages
            mine = at.epoch[at.source == s]
            assert (np.bincount(mine)[:-1] == length).all()
    else:
        whole = make(None, [700, 501, 90], stages=STAGED)
        left = np.delete(
            np.arange(end + 2011), [0, 1, 2, *range(9003, 11004), *range(32004, 32011)]
        )
        kept = whole.locate(left[:end])
        assert (kept.row == at.row).all() and (kept.source == at.source).all()


def test_a_stage_that_is_cut_and_gets_a_successor_keeps_its_past():
    past = 6_007
    before = make([0.7, 0.3], [500, 300])
    after = make(None, [500, 300], stages=[(past * ROW, [0.7, 0.3]), (None, [0.1, 0.9])])
    one, two = (mix.locate(np.arange(past + 4000)) for mix in (before, after))
    assert (one.row[:past] == two.row[:past]).all()
    assert (one.source[:past] == two.source[:past]).all()
    assert (two.source[past:] == 1).mean() > 0.85
    assert before.plan.past(past * ROW) == after.plan.past(past * ROW)
    assert before.plan.past(past * ROW + 1) != after.plan.past(past * ROW + 1)


@pytest.mark.parametrize("hosts", [2, 8, 64])
def test_no_host_or_microbatch_sees_a_pattern(hosts):
    """Chi-square: at a fixed place of the batch, or a fixed host, sources come as their weights say."""
    weights, batch, steps = np.array([0.5, 0.3, 0.15, 0.05]), 256, 512
    mix = make(weights, [10**6] * 4)
    source = mix.locate(np.arange(batch * steps)).source.reshape(steps, hosts, batch // hosts)
    by_host = np.stack([np.bincount(source[:, h].ravel(), minlength=4) for h in range(hosts)])
    expected = weights * steps * batch / hosts
    chi = ((by_host - expected) ** 2 / expected).sum()
    assert chi < scipy.stats.chi2.ppf(0.9999, 3 * hosts)
    first = np.bincount(source[:, 0, 0], minlength=4)
    assert ((first - weights * steps) ** 2 / (weights * steps)).sum() < scipy.stats.chi2.ppf(
        0.9999, 3
    )
    # Counts of a batch vary no more than drawing without replacement from a block lets them.
    every = np.stack([(source.reshape(steps, -1) == s).sum(1) for s in range(4)], 1)
    limit = weights * (1 - weights) * batch * (1 - batch / m.BLOCK)
    ratio = every.var(0) / limit
    assert (ratio < 1.4).all() and (ratio > 0.7).all()


def test_no_source_starves_however_small_its_weight():
    weights = np.array([1 - 3e-6, 1e-6, 2e-6])
    mix = make(weights, [10**7, 10, 10])
    assert (mix.given(2 * SHARES)[1:] >= [2, 4]).all()
    assert (np.abs(mix.given(10**9) - 10**9 * fixed_point(weights) / SHARES) < 1.01).all()


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64, 1000, 4096])
def test_permutations_are_bijections_and_differ_by_key(size):
    one = permute(np.arange(size), size, 1)
    assert (np.sort(one) == np.arange(size)).all()
    if size > 16:
        assert (one != permute(np.arange(size), size, 2)).any()
        assert (one != np.arange(size)).any()
    assert (permute(one, size, 1, inverse=True) == np.arange(size)).all()


def test_permutations_look_random():
    """Where element 0 goes is uniform over keys (chi-square over 16 places, 4,800 keys)."""
    places = permute(np.zeros(4800, np.int64), 16, np.arange(4800, dtype=np.uint64) * 7919 + 1)
    counts = np.bincount(places, minlength=16)
    assert ((counts - 300) ** 2 / 300).sum() < 44.3  # p = 0.0001 at 15 degrees of freedom


def test_permutations_never_change():
    """Golden values: a different order would break every resume across versions."""
    assert permute(np.arange(8), 8, 42).tolist() == GOLDEN_8
    at = make([0.7, 0.3], [100, 100]).locate(np.array([0, 1, 5000, 2_000_000_000]))
    assert np.stack([at.source, at.epoch, at.row]).tolist() == GOLDEN_ROWS
    table = just_in_time(np.arange(m.PERIOD + 1)[:, None] * fixed_point(SMALL), m.PERIOD)
    assert zlib.crc32(table.astype("<i8").tobytes()) == GOLDEN_TABLE


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
    began = time.process_time()
    mix = make(list(np.ones(14) / 14), [2_000_000_000] * 14)
    mix.locate(np.array([2_000_000_000]))
    assert time.process_time() - began < 1


def test_uneven_batches_and_vanishing_weights_are_refused():
    with pytest.raises(UserError, match="3 processes"):
        m.batches(make([1.0], [10]), 0, 8, 0, 3)
    with pytest.raises(UserError, match="resolution"):
        fixed_point([1 - 1e-8, 1e-8])
    least = fixed_point([1 - 1.8 / SHARES, *[0.6 / SHARES] * 3])  # just above it: none is lost
    assert least.tolist() == [SHARES - 3, 1, 1, 1]


def test_first_rows_are_those_of_the_first_block():
    mix = make([0.75, 0.25], [3500, 1100])
    at = mix.locate(np.arange(m.BLOCK))  # inside it, the stream shuffles them
    for number, (name, length) in enumerate([("s0", 3500), ("s1", 1100)]):
        read = at.row[at.source == number]
        assert set(m.first_rows(mix.plan, name, length, len(read))) == set(read)
        assert (np.sort(m.first_rows(mix.plan, name, length, length)) == np.arange(length)).all()
        # From a row on, also into the next epoch: in the stream's order, which a block's ranks tell.
        every = m.first_rows(mix.plan, name, length, length)
        assert (m.first_rows(mix.plan, name, length, 100, 40) == every[40:140]).all()
