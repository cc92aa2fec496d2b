"""Methods: each by hand or by brute force, and what happens where a measure is not above 0."""

import math

import numpy as np
import pytest

from data_mixing import methods
from data_mixing.measurements import LeftOut, Scored
from data_mixing.proposals import proxies
from data_mixing.run_tables import RunTable
from mobilellm_jax.data.plan import Plan, PlanSource, Stage
from mobilellm_jax.errors import UserError

TOKENS = {"web": 8e9, "code": 2e9, "math": 1e6}


def scored(benefits, tokens=None, rows=None):
    n = len(benefits)
    return Scored(
        np.array(benefits, float),
        np.array(tokens or [1] * n),
        np.array(range(n) if rows is None else rows),
    )


def left(rises, stderrs=None, names="ab"):
    """Rises [source][capability][seed]."""
    rise = np.array(rises, float)
    stderr = np.full(rise.shape, np.nan) if stderrs is None else np.array(stderrs, float)
    capabilities = tuple(f"c{i}" for i in range(rise.shape[1]))
    return LeftOut(tuple(names), capabilities, tuple(range(rise.shape[2])), 10, rise, stderr)


def measured(**values):
    return {name: methods.Measured(value) for name, value in values.items()}


# --- Without measures


def test_uniform_and_size():
    assert methods.uniform(TOKENS) == dict.fromkeys(TOKENS, 1 / 3)
    total = sum(TOKENS.values())
    assert methods.size(TOKENS) == pytest.approx({n: t / total for n, t in TOKENS.items()})
    roots = {n: math.sqrt(t) for n, t in TOKENS.items()}
    expected = {n: r / sum(roots.values()) for n, r in roots.items()}
    assert methods.size(TOKENS, temperature=2) == pytest.approx(expected)
    assert methods.size(TOKENS, math.inf) == pytest.approx(methods.uniform(TOKENS))
    cold = methods.size(TOKENS, temperature=1e-3)  # powers of 1,000 do not overflow
    assert cold == {"web": 1.0, "code": 0.0, "math": 0.0}
    assert cold.reasons["code"].startswith("left out: 2,000,000,000 tokens")


def test_a_higher_temperature_is_nearer_to_uniform():
    spread = [np.std(list(methods.size(TOKENS, t).values())) for t in (0.5, 1, 2, 5, 100)]
    assert (np.diff(spread) < 0).all()


@pytest.mark.parametrize("temperature", [0, -1, math.nan])
def test_a_temperature_is_above_0(temperature):
    with pytest.raises(UserError, match="is not above 0"):
        methods.size(TOKENS, temperature)


# --- Influence


def test_equation_6_by_hand():
    samples = {
        "a": scored([0.5, -0.1, 0.2], [10, 30, 60]),  # (5 - 3 + 12) / 100
        "b": scored([0.3, 0.05], [20, 20]),  # (6 + 1) / 40
    }
    weights = methods.influence(samples)
    assert weights.measured["a"].value == pytest.approx(0.14)
    assert weights.measured["b"].value == pytest.approx(0.175)
    assert weights == pytest.approx({"a": 0.14 / 0.315, "b": 0.175 / 0.315})


def test_influence_knows_neither_units_nor_how_rows_are_cut_into_pieces():
    rng = np.random.default_rng(0)
    benefits, tokens = rng.normal(0.2, 1, 200), rng.integers(1, 90, 200)
    samples = {"a": scored(benefits, tokens.tolist()), "b": scored([0.3, 0.1])}
    before = methods.influence(samples)
    scaled = {n: Scored(7 * s.benefit_N, s.tokens_N, s.row_N) for n, s in samples.items()}
    assert methods.influence(scaled) == pytest.approx(before)
    halves = Scored(np.repeat(benefits, 2), np.repeat(tokens / 2, 2), np.repeat(np.arange(200), 2))
    after = methods.influence({"a": halves, "b": samples["b"]})
    assert after == pytest.approx(before)
    assert vars(after.measured["a"]) == pytest.approx(vars(before.measured["a"]))


def test_the_interval_covers_and_counts_rows_not_pieces():
    """Ten equal pieces a row say no more than one; 95 % intervals hold the truth about so often."""
    held, widths = 0, []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        of_row, sizes = rng.normal(0.1, 1, 60), rng.integers(5, 50, 60)
        rows = np.repeat(np.arange(60), 10)
        found = methods.density(Scored(of_row[rows], sizes[rows], rows), "a", seed, 200)
        held += found.low <= 0.1 <= found.high
        single = methods.density(Scored(of_row, sizes, np.arange(60)), "a", seed, 200)
        widths.append((found.high - found.low) / (single.high - single.low))
    assert 175 <= held <= 199  # percentile intervals of 60 rows are slightly narrow
    np.testing.assert_allclose(widths, 1, rtol=1e-9)


def test_intervals_repeat_and_have_a_seed():
    rng = np.random.default_rng(0)
    samples = {n: scored(rng.normal(0.5, 1, 30)) for n in "ab"}
    first, again = (methods.influence(samples, seed=3) for _ in range(2))
    other = methods.influence(samples, seed=4)
    assert first.measured == again.measured
    assert first.measured != other.measured and first == other
    a, b = (methods.density(samples["a"], name, seed=3) for name in "ab")
    assert a.value == b.value and (a.low, a.high) != (b.low, b.high)  # sources draw apart
    lone = methods.influence({"a": scored([1, 2], rows=[5, 5])}).measured["a"]
    assert math.isinf(lone.high) and "no interval" in lone.text


# --- Zero and below


def test_what_does_not_help_is_left_out_and_told():
    weights = methods.influence(
        {"a": scored([0.3, 0.1]), "b": scored([-0.3, -0.1]), "c": scored([0.0])}
    )
    assert weights == {"a": 1.0, "b": 0.0, "c": 0.0}
    assert weights.reasons["b"].startswith("left out: benefit -0.2 (-0.3 to -0.1)")
    assert weights.reasons["c"].startswith("left out: benefit 0 (no interval)")
    assert not weights.reasons["a"].startswith("left out")


def test_a_floor_raises_what_lies_below_it():
    values = measured(a=0.8, b=0.3, c=0.01, d=-2.0)
    weights = methods.proportional(values, 0.25, "benefit")
    expected = {"a": 0.8 / 1.5, "b": 0.3 / 1.5, "c": 0.2 / 1.5, "d": 0.2 / 1.5}
    assert weights == pytest.approx(expected)
    assert weights.reasons["d"].startswith("raised to the floor, 0.25 of a's: benefit -2")
    assert "raised" not in weights.reasons["b"]
    assert methods.proportional(values, 1.0, "benefit") == pytest.approx(
        dict.fromkeys("abcd", 0.25)
    )


def test_weights_below_the_resolution_of_a_stream_are_left_out():
    weights = methods.proportional(measured(a=1.0, b=1e-8), 0.0, "benefit")
    assert weights == {"a": 1.0, "b": 0.0} and weights.reasons["b"].startswith("left out")


def test_an_interval_that_holds_0_is_told():
    values = {"a": methods.Measured(1, 0.5, 1.5), "b": methods.Measured(1, -0.5, 2.5)}
    weights = methods.proportional(values, 0.0, "benefit")
    assert weights.reasons["b"].endswith("not distinguishable from 0")
    assert weights.reasons["a"] == "benefit 1 (0.5 to 1.5)"
    below = methods.proportional({**values, "c": methods.Measured(-1, -2, -0.5)}, 0.0, "benefit")
    assert below.reasons["c"] == "left out: benefit -1 (-2 to -0.5)"


@pytest.mark.parametrize("values", [(-1.0, -2.0), (0.0, -2.0), (0.0, 0.0)])
def test_where_nothing_helps_no_weights_are_made_up(values):
    with pytest.raises(UserError, match="no source helps: the benefit of the best, a, is .*column"):
        methods.proportional(measured(a=values[0], b=values[1]), 0.5, "benefit")


def test_a_floor_is_a_share():
    with pytest.raises(UserError, match="floor 1.5 is not between 0 and 1"):
        methods.proportional(measured(a=1.0), 1.5, "benefit")


# --- Leave-one-out


def test_leave_one_out_by_hand():
    """Two sources, two capabilities, two seeds."""
    rises = [[[0.1, 0.3], [0.2, 0.2]], [[-0.1, 0.1], [0.1, 0.1]]]
    weights = methods.leave_one_out(left(rises))
    assert weights == pytest.approx({"a": 0.4 / 0.5, "b": 0.1 / 0.5})
    a = weights.measured["a"]  # totals 0.3 and 0.5: standard error 0.1, Student's quantile 12.706
    assert (a.low, a.high) == pytest.approx((0.4 - 1.2706, 0.4 + 1.2706), rel=1e-4)


def test_of_one_seed_the_spread_of_the_probes_is_told():
    one = methods.leave_one_out(left([[[0.3], [0.1]], [[0.2], [0.2]]], np.full((2, 2, 1), 0.05)))
    a = one.measured["a"]
    assert (a.low, a.high) == pytest.approx((0.4 - 0.13859, 0.4 + 0.13859), rel=1e-4)
    unknown = methods.leave_one_out(left([[[0.3]], [[0.2]]])).measured["a"]
    assert math.isinf(unknown.high)


def test_standardised_capabilities_count_alike():
    rng = np.random.default_rng(0)
    rises = rng.normal(1, 0.4, (3, 2, 2))
    scaled = rises * np.array([1, 50])[:, None]  # the second capability in another unit
    plain = methods.leave_one_out(left(rises, names="abc"), standardise=True)
    assert methods.leave_one_out(left(scaled, names="abc"), standardise=True) == pytest.approx(
        plain
    )
    assert methods.leave_one_out(left(scaled, names="abc")) != pytest.approx(plain, rel=1e-2)
    apart = np.array(
        [[[1.0, -1.0]], [[5.0, -5.0]], [[-2.0, 2.0]]]
    )  # of seeds, with their mean kept
    assert methods.leave_one_out(left(rises + apart, names="abc"), standardise=True) == (
        pytest.approx(plain)
    )
    one = rises[:, :, :1]
    stderr = np.full(one.shape, 0.1)
    spread = one.mean(2).std(0)
    a = methods.leave_one_out(left(one, stderr, "abc"), standardise=True).measured["a"]
    assert a.high - a.value == pytest.approx(1.96 * np.sqrt(((0.1 / spread) ** 2).sum()))
    with pytest.raises(UserError, match="'c0' are the same for all sources"):
        methods.leave_one_out(left([[[0.1]], [[0.1]]]), standardise=True)


def test_a_source_without_which_the_loss_falls_is_left_out():
    weights = methods.leave_one_out(left([[[0.3]], [[-0.2]]]))
    assert weights == {"a": 1.0, "b": 0.0} and weights.reasons["b"].startswith(
        "left out: rise -0.2"
    )
    with pytest.raises(UserError, match="no source helps: the rise of the best, b"):
        methods.leave_one_out(left([[[-0.3]], [[-0.2]]]))


# --- RegMix


def test_regmix_knows_sources_by_name_and_hands_its_settings_on(monkeypatch):
    pytest.importorskip("sklearn")
    straight = {name: methods.regression.models(0)[name] for name in ("linear", "logarithmic")}
    monkeypatch.setattr(methods.regression, "models", lambda seed: straight)  # trees take long
    tokens = {"web": 70.0, "code": 20.0, "math": 10.0}
    mixtures = proxies(tokens, 20, 0)
    losses = RunTable(mixtures.runs, ("t",), mixtures.values @ np.array([[1.0], [0.9], [0.8]]))

    def found(tokens=tokens, **settings):
        settings = {"top": 10, "candidates": 300, **settings}
        return methods.regmix(tokens, mixtures, losses, **settings)

    weights = found()
    turned = found(dict(reversed(tokens.items())))
    assert turned == weights and list(turned) == ["math", "code", "web"]
    other = found(seed=1)
    assert other != weights
    ranks = [w.reasons["web"].split("rank correlation ")[1] for w in (weights, other)]
    assert ranks[0] != ranks[1]  # other folds
    assert found(bounds={"web": 0.5, "code": 0.4, "math": 0.3})["math"] <= 0.3 < weights["math"]
    with pytest.raises(UserError, match="the best 10 of 9 candidates are not to be had"):
        found(candidates=9)


# --- Caps


@pytest.mark.parametrize("seed", range(6))
def test_capped_weights_equal_water_poured_drop_by_drop(seed):
    """A plan's capped weights: the run given in small parts, by weight, to the sources that have room."""
    rng = np.random.default_rng(seed)
    weights = rng.dirichlet(np.ones(5))
    tokens = rng.integers(50, 400, 5) * 1000
    run, epochs = 1_000_000, 4.0
    caps = epochs * tokens / run
    if caps.sum() < 1.05:
        tokens, caps = tokens * 4, caps * 4
    poured, drop = np.zeros(5), 1e-4
    for _ in range(round(1 / drop)):
        room = np.where(poured < caps - 1e-12, weights, 0)
        left_over = drop
        while left_over > 1e-15:
            share = left_over * room / room.sum()
            given = np.minimum(share, caps - poured)
            poured, left_over = poured + given, left_over - given.sum()
            room = np.where(poured < caps - 1e-12, weights, 0)
    names = "abcde"
    plan = Plan(
        tuple(
            PlanSource(n, n, tokens=int(t), max_epochs=epochs)
            for n, t in zip(names, tokens, strict=True)
        ),
        (Stage("s", run, dict(zip(names, weights.tolist(), strict=True))),),
        "t",
        "f",
    )
    np.testing.assert_allclose(plan.weights[0][0], poured, atol=1e-9)
    assert (plan.weights[0][0] <= caps * (1 + 1e-9)).all()
