"""Curves of a report: what is thinned keeps its extremes, axes hold what they show."""

import math

import numpy as np
import pytest

from mobilellm_jax.reporting import curves


@pytest.mark.parametrize("n", [1, 7, 999, 1000, 1001, 12_345])
def test_thinning_keeps_extremes(n):
    rng = np.random.default_rng(n)
    values = np.where(rng.uniform(size=n) < 0.3, np.nan, rng.normal(size=n))
    values[rng.integers(n)] = 50.0
    values[0] = math.inf if n > 1 else values[0]  # never drawn
    along = curves.axis(np.arange(n), np.arange(n), (0, n - 1), lines=3)
    low, high = curves.extremes(values, along.edges_C)
    assert len(low) == min(n, curves.MAX_BINS) and (along.edges_C <= along.middle_C).all()
    assert np.nanmax(high) == 50.0
    for at, end, a, b in zip(along.edges_C, [*along.edges_C[1:], n], low, high, strict=True):
        inside = values[at:end][np.isfinite(values[at:end])]
        assert (a, b) == (inside.min(), inside.max()) if len(inside) else np.isnan([a, b]).all()


def test_a_single_spike_of_a_long_run_is_drawn():
    values = np.ones(1_000_000)
    values[777_777] = 1.5
    along = curves.axis(np.arange(1_000_000), np.arange(1_000_000), (0, 999_999), lines=1)
    drawn = curves.chart("it", [curves.Line("it", values)], along)
    heights = [int(y) for y in drawn["lines"][0]["raw"][1:].split()[1::2]]
    assert max(heights) - min(heights) > 0.8 * curves.HEIGHT


def test_smoothing_is_the_mean_of_what_is_near():
    rng = np.random.default_rng(4)
    values = np.where(rng.uniform(size=301) < 0.2, np.nan, rng.uniform(1, 2, 301))
    smoothed, geometric = curves.smooth(values), curves.smooth(values, geometric=True)
    for i in range(301):
        near = values[max(0, i - min(i, 6)) : i + min(i, 6) + 1]
        near = near[np.isfinite(near)]
        if len(near):
            assert smoothed[i] == pytest.approx(near.mean())
            assert geometric[i] == pytest.approx(np.exp(np.log(near).mean()))


@pytest.mark.parametrize(
    "low, high",
    [(0, 1), (0.002, 0.0031), (1, 1e6), (-3, 3), (2.4, 8.1), (7, 7), (1e-6, 40), (0, 0)],
)
def test_axes_hold_what_they_show_and_have_ticks_inside(low, high):
    along = curves.axis(np.arange(2), np.arange(2), (0, 1), lines=1)
    line = curves.Line("it", np.array([low, high], dtype=float))
    for how in ({}, {"from_zero": True}) if low >= 0 else ({},):
        drawn = curves.chart("it", [line], along, **how)
        heights = [int(y) for y in drawn["lines"][0]["raw"][1:].split()[1::2]]
        assert all(0 <= y <= curves.HEIGHT for y in heights)
        assert all(-0.01 <= tick["at"] <= 100.01 for tick in drawn["y"])
        labels = [tick["label"] for tick in drawn["y"]]
        assert 2 <= len(labels) <= 10 and len(set(labels)) == len(labels)


@pytest.mark.parametrize(
    "value, text",
    [(0, "0"), (950, "950"), (9980.4, "9,980"), (12_345, "12.3k"), (999_999, "1M"),
     (3.14159e6, "3.14M"), (4.2e12, "4.2T"), (0.00312, "0.00312"), (math.nan, "–")],
)  # fmt: skip
def test_compact_numbers(value, text):
    assert curves.compact(value) == text
