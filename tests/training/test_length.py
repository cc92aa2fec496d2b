"""Which rows a step reads, against a loop that takes one step after another."""

import dataclasses
import re

import numpy as np
import pytest
import tiny

from mobilellm_jax.data.opening import open_mixture
from mobilellm_jax.data.plan import Plan, Stage
from mobilellm_jax.errors import UserError
from mobilellm_jax.plan import fill_in
from mobilellm_jax.training import overview
from mobilellm_jax.training.config import base_config, check
from mobilellm_jax.training.length import Length, Phase, length_of, microbatches, stream

RAMP = ((2, 100), (4, 420))


def config(**changes):
    c = {"steps": 12, "row_length": 10, "global_batch": 8, "first_row": 0}
    return {**c, **changes}


def walked(c):
    """(batch, rows consumed) of every step, one after another: the rule as a reader knows it."""
    rows, out = c["first_row"], []
    while True:
        tokens = (rows - c["first_row"]) * c["row_length"]
        if len(out) == (c["steps"] or -1) or tokens >= c.get("tokens", tokens + 1):
            return out
        ramp = [batch for batch, until in c.get("batch_ramp", ()) if tokens < until]
        batch = ramp[0] if ramp else c["global_batch"]
        rows += batch
        out.append((batch, rows))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"first_row": 1000},
        {"steps": 0, "tokens": 321},
        {"steps": 0, "tokens": 320},
        {"batch_ramp": RAMP},
        {"batch_ramp": RAMP, "steps": 3},
        {"batch_ramp": RAMP, "steps": 30, "first_row": 77},
        {"batch_ramp": RAMP, "steps": 0, "tokens": 99},
        {"batch_ramp": RAMP, "steps": 0, "tokens": 419},
        {"batch_ramp": RAMP, "steps": 0, "tokens": 421},
        {"batch_ramp": ((16, 50), (2, 60), (4, 400)), "steps": 0, "tokens": 2000},
        {"batch_ramp": [[8, 160], [2, 200]]},
    ],
    ids=str,
)
def test_steps_and_rows_are_those_of_a_walk(changes):
    c = config(**changes)
    expected, length = walked(c), length_of(c)
    assert length.steps == len(expected)
    steps = range(1, length.steps + 1)
    assert [(length.batch(step), length.rows(step)) for step in steps] == expected
    assert length.rows(0) == c["first_row"]
    assert length.tokens == (expected[-1][1] - c["first_row"]) * c["row_length"]
    for step in steps:
        rows = range(length.rows(step - 1), length.rows(step))
        assert {length.step_of(row) for row in rows} == {step}


def test_the_figures_of_a_long_run_are_exact():
    """Tokens and rows are beyond 32 bits, and no step is walked through."""
    c = config(
        row_length=2048,
        global_batch=2048,
        steps=0,
        tokens=4_200_000_000_000,
        batch_ramp=((512, 10**10), (1024, 10**11)),
    )
    length = length_of(c)
    assert 0 <= length.tokens - c["tokens"] < 2048 * 2048
    assert [phase.batch for phase in length.phases] == [512, 1024, 2048]
    assert length.phases[1].step == -(-(10**10) // (512 * 2048))
    assert length.step_of(length.rows(10**6)) == 10**6 + 1


def test_keys_that_older_runs_do_not_have():
    assert length_of({"steps": 5, "row_length": 8, "global_batch": 4}) == Length(
        (Phase(0, 0, 4),), 5, 8
    )


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"tokens": 100}, "steps=12, config.tokens=100 and config.epochs=0: set one"),
        ({"steps": 0}, "steps=0, config.tokens=0 and config.epochs=0: set one"),
        ({"steps": -1}, "set one of them"),
        ({"epochs": 2.0}, "config.epochs=2: set one"),
        ({"steps": 0, "epochs": -1.0}, "set one of them"),
        ({"steps": 0, "epochs": float("inf")}, "set one of them"),
        ({"steps": 0, "epochs": float("nan")}, "set one of them"),
        ({"steps": 0, "epochs": 2.0}, "config.plan is empty: .*or set config.steps and"),
        ({"steps": 0, "epochs": 2.0, "plan": "/no/mixture.json"}, "no plan at /no/.*config.steps"),
        ({"batch_ramp": ((2, 100), (4, 100))}, r"batch_ramp holds \(4, 100\): .*rising"),
        ({"batch_ramp": ((0, 100),)}, "batch_ramp holds"),
        ({"batch_ramp": (2, 100)}, "batch_ramp holds 2"),
        ({"batch_ramp": ((2, 1e9),)}, "whole numbers"),
    ],
)
def test_what_is_no_length(changes, word):
    with pytest.raises(UserError, match=word):
        length_of(config(**changes))


@pytest.fixture(scope="module")
def sized(tmp_path_factory):
    """A function from shares to the path of a plan over the tiny corpus that knows its sizes."""
    folder = tmp_path_factory.mktemp("sized")
    plan = fill_in(Plan.load(tiny.corpus(folder)), folder)

    def path(**shares):
        known = {s.name: s.rows for s in plan.sources}
        weights = {name: shares.get(name, n / sum(known.values())) for name, n in known.items()}
        out = folder / f"{len(list(folder.iterdir()))}.json"
        dataclasses.replace(plan, stages=(Stage("train", None, weights),)).save(out)
        return str(out)

    return path


@pytest.mark.parametrize("epochs", [0.1, 1.0, 2.5])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"first_row": 77},
        {"batch_ramp": ((2, 100), (4, 1000))},
        {"row_length": 16},
        {"row_length": 16, "global_batch": 1},  # a row too few would be a step too few
        {"row_length": 8 * tiny.ROW, "global_batch": 1},  # of each source some rows are left over
    ],
)
def test_epochs_end_with_the_first_step_that_has_read_them(sized, epochs, changes):
    plan = sized()
    c = config(**{"plan": plan, "steps": 0, "epochs": epochs, "row_length": tiny.ROW, **changes})
    sources = open_mixture(Plan.load(plan), c["row_length"], tiny.VOCAB).sources
    rows = -(-round(10 * epochs) * sum(map(len, sources)) // 10)
    length = length_of(c)
    read = [length.rows(length.steps - i) - c["first_row"] for i in (0, 1)]
    assert read[1] < rows <= read[0]
    assert length == length_of({**c, "epochs": 0.0, "tokens": rows * c["row_length"]})


def test_every_row_is_read_as_often_as_there_are_epochs(sized):
    """Where the shares are those of the rows; the rest of the last step begins another reading."""
    plan = sized()
    mixture = open_mixture(Plan.load(plan), tiny.ROW, tiny.VOCAB)
    c = config(plan=plan, steps=0, epochs=3.0, row_length=tiny.ROW)
    length = length_of(c)
    at = mixture.locate(np.arange(length.rows(length.steps)))
    for source, rows in enumerate(mixture.sources):
        times = np.bincount(at.row[at.source == source], minlength=len(rows))
        # Sources are within one row of their shares: then and there one ends a row late or early.
        assert np.abs(times - 3).sum() <= c["global_batch"] + 1
    text = overview.data(Plan.load(plan), 0, length.tokens)
    assert re.search(r"epochs of each source: words 3(\.0\d)?, sums 3(\.0\d)?$", text)


def test_shares_say_how_often_a_source_is_read(sized):
    plan = Plan.load(sized(words=1.0, sums=0.0))
    (words,) = (source for source in plan.sources if source.name == "words")
    c = config(plan=sized(words=1.0, sums=0.0), steps=0, epochs=2.0, row_length=tiny.ROW)
    assert 0 <= length_of(c).rows(length_of(c).steps) - 2 * words.rows < c["global_batch"]
    uneven = Plan.load(sized(words=0.75, sums=0.25))
    sizes = np.array([source.tokens for source in uneven.sources])
    tokens = 2 * sizes.sum()
    often = " ".join(f"{e:.3g}" for e in tokens * np.array([0.75, 0.25]) / sizes)
    found = overview.data(uneven, 0, tokens).split("epochs of each source: words ")[1]
    assert found.replace(", sums", "") == often
    # From where a run begins; and nothing is said of sizes that nobody knows.
    halves = overview.data(uneven, tokens // 2, tokens).split("words ")[-1].split(",")[0]
    assert float(halves) == pytest.approx(float(often.split()[0]) / 2, rel=0.01)
    unsized = dataclasses.replace(
        uneven, sources=tuple(dataclasses.replace(s, tokens=None) for s in uneven.sources)
    )
    assert "epochs" not in overview.data(unsized, 0, tokens)
    unsized.save(f"{plan.directory}/unsized.json")
    with pytest.raises(UserError, match="does not know how many words, sums has: tie it"):
        length_of({**c, "plan": f"{plan.directory}/unsized.json"})


def test_every_size_of_a_ramp_is_split_evenly_or_refused():
    c = base_config(tiny.MODEL)
    c.plan, c.row_length = "mixture.json", 64
    c.global_batch, c.microbatches, c.batch_ramp = 64, 4, ((16, 10**4), (24, 10**5))
    assert [microbatches(c, rows) for rows in (8, 16, 24, 32, 64)] == [1, 1, 2, 2, 4]
    check(c, devices=4)
    with pytest.raises(UserError, match=r"batch_ramp=24 cannot be split into .*=2 parts over 8"):
        check(c, devices=8)


def test_the_stream_of_a_ramp_is_the_mixture_cut_elsewhere(tmp_path):
    """From any step on, in any number of processes: the same rows as in one piece."""
    mixture = open_mixture(Plan.load(tiny.corpus(tmp_path)), tiny.ROW, tiny.VOCAB)
    length = Length((Phase(0, 5, 2), Phase(3, 11, 4), Phase(5, 19, 6)), 8, tiny.ROW)
    for step in (0, 2, 3, 4, 5, 6):
        parts = [stream(mixture, length, step, k, 2, prefetch=2) for k in range(2)]
        for s in range(step + 1, 9):
            halves = [next(part)["tokens"] for part in parts]
            exact = mixture.read(np.arange(length.rows(s - 1), length.rows(s)))["tokens"]
            np.testing.assert_array_equal(np.concatenate(halves), exact)
            assert len(exact) == length.batch(s)
