"""RegMix: tables, proposals, planted laws that are found again, and no signal that is told as none."""

import dataclasses
import functools
import sys

import numpy as np
import pytest
import runs
import scipy.optimize
import scipy.stats

from data_mixing import regmix, regression
from data_mixing.proposals import proposals, proxies, within
from data_mixing.run_tables import RunTable, load_pair
from mobilellm_jax.data.apportion import water_fill
from mobilellm_jax.errors import UserError

PRIOR = {"web": 0.55, "code": 0.25, "math": 0.15, "wiki": 0.05}
NAMES = tuple(PRIOR)
GIVES = np.array([0.1, 0.4, 0.3, 0.2])  # the optimum of the planted logarithmic law is just this
COSTS = np.array([0.5, 0.1, 0.9, 0.3])  # of the linear law, whose optimum is all code


def linear(weights):
    return 3 + weights @ COSTS


def logarithmic(weights):
    return 3 - np.log(weights + 1e-3) @ GIVES


def losses_of(mixtures, law, noise=0.02, seed=0):
    loss = law(mixtures.values)
    loss = loss + np.random.default_rng(seed).normal(0, noise * loss.std(), len(loss))
    return RunTable(mixtures.runs, ("t",), loss[:, None], "losses.csv")


@functools.cache
def fitted(law, runs=120):
    mixtures = proxies(PRIOR, runs, seed=1)
    return mixtures, regression.fit(mixtures, losses_of(mixtures, law))


# --- Proposals


def test_proposals_are_mixtures_around_the_prior():
    prior = np.array(list(PRIOR.values()))
    drawn = proposals(prior, 40_000, np.random.default_rng(0))
    np.testing.assert_allclose(drawn.sum(1), 1, rtol=1e-12)
    assert (drawn >= 0).all() and drawn[drawn > 0].min() >= 2e-4
    np.testing.assert_allclose(drawn.mean(0), prior, atol=0.01)


@pytest.mark.parametrize("strength", [0.02, 1.0, 50.0])
def test_of_one_strength_they_are_dirichlet_draws(strength):
    """A source's weight has a beta distribution, also where gamma draws underflow."""
    prior = np.array([0.6, 0.4])
    drawn = proposals(prior, 5000, np.random.default_rng(0), (strength,) * 2, minimum=0.0)
    expected = scipy.stats.beta(*(strength * prior))
    middle = (drawn[:, 0] > 1e-9) & (drawn[:, 0] < 1 - 1e-9)  # nearer to a border floats are coarse
    for at in (1e-6, 0.1, 0.5, 0.9):
        assert (drawn[:, 0] < at).mean() == pytest.approx(expected.cdf(at), abs=0.025)
    assert middle.any() and np.isfinite(drawn).all()


def test_bounds_are_kept_as_a_plan_keeps_them():
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(4), 300)
    bound = np.array([0.3, 0.5, 0.2, 0.4])
    kept = within(weights, bound)
    expected = [water_fill(w[None], np.array([1.0]), bound)[0][0] for w in weights]
    np.testing.assert_allclose(kept, expected, atol=1e-12)
    alone = within(np.array([[1.0, 0, 0, 0]]), bound)[0]  # nobody else has a weight to scale
    np.testing.assert_allclose(alone, [0.3, 0.7 * 5 / 11, 0.7 * 2 / 11, 0.7 * 4 / 11])
    with pytest.raises(UserError, match="the caps on epochs allow 90.0% of the run's tokens"):
        within(weights, np.array([0.3, 0.2, 0.2, 0.2]))


def test_proxies_differ_repeat_and_keep_bounds():
    bounds = {"web": 0.9, "code": 0.6, "math": 0.4, "wiki": 0.2}
    table = proxies(PRIOR, 200, 7, bounds=bounds)
    again, other = proxies(PRIOR, 200, 7, bounds=bounds), proxies(PRIOR, 200, 8, bounds=bounds)
    assert (table.values == again.values).all() and not (table.values == other.values).all()
    assert len(np.unique(table.values.round(4), axis=0)) == 200
    assert (table.values <= np.array(list(bounds.values())) + 1e-9).all()
    assert table.names == NAMES and table.runs[:3] == ("0", "1", "2")
    with pytest.raises(UserError, match="only 1 different mixtures of a were found, not 5"):
        proxies({"a": 1.0}, 5, 0)
    with pytest.raises(UserError, match="prior of b is not above 0"):
        proxies({"a": 1.0, "b": 0.0}, 5, 0)


# --- Tables


def write(path, text):
    path.write_text(text)
    return path


def test_a_table_comes_back_as_it_was_whatever_the_order_of_its_rows(tmp_path):
    mixtures = proxies(PRIOR, 12, 0)
    losses = losses_of(mixtures, linear)
    shuffled = losses.ordered(losses.runs[::-1])
    mixtures.save(tmp_path / "a.csv")
    shuffled.save(tmp_path / "b.csv")
    read, read_losses = load_pair(tmp_path / "a.csv", tmp_path / "b.csv")
    np.testing.assert_allclose(read.values, mixtures.values, rtol=1e-12)
    assert (read_losses.values == losses.values).all()
    assert read_losses.runs == read.runs == mixtures.runs and read.names == NAMES
    with pytest.raises(UserError, match="exists: name a new file"):
        mixtures.save(tmp_path / "a.csv")


def test_weights_that_were_rounded_are_normalised(tmp_path):
    mixtures = write(tmp_path / "a.csv", "index,x,y\n1,0.333,0.66\n2,1,0.003\n")
    losses = write(tmp_path / "b.csv", "run,t\n2,3.5\n1,4\n")
    read, losses = load_pair(mixtures, losses)
    np.testing.assert_allclose(
        read.values, [[0.333 / 0.993, 0.66 / 0.993], [1 / 1.003, 0.003 / 1.003]]
    )
    assert losses.values.tolist() == [[4.0], [3.5]]


GOOD = "index,x,y\n1,0.5,0.5\n2,1,0\n"


@pytest.mark.parametrize(
    "mixtures, losses, said",
    [
        (GOOD, "index,t\n1,3\n3,4\n", r"are not of the same runs: 2, 3 in one only"),
        (GOOD, "index,t\n1,3\n", "are not of the same runs: 2 in one only"),
        (GOOD, "index,t\n1,3\n2,nan\n", "b.csv: the column 't' holds no number for the run 2"),
        (GOOD, "index,t\n1,3\n2,\n", "b.csv: the column 't' holds no number for the run 2"),
        (GOOD, "index,t\n1,3\n2,high\n", "b.csv: the column 't' holds no number for the run 2"),
        (GOOD, "index,t\n1,3\n1,4\n", "b.csv has the run 1 twice"),
        (GOOD, "t,u\n1,3\n2,4\n", "b.csv has 2 rows of t, u, but needs one column index or run"),
        (GOOD, "index\n1\n2\n", "b.csv has 2 rows of index, but needs"),
        (GOOD, "index,t,t\n1,3,3\n", "b.csv has 't' twice, but needs"),
        (GOOD, "index,t\n", "b.csv has 0 rows of index, t, but needs"),
        (GOOD, "", "b.csv is no readable CSV file"),
        ("index,x,y\n1,0.5,0.7\n", "index,t\n1,3\n", "weights of the run 1 sum to 1.2"),
        ("index,x,y\n1,-0.5,1.5\n", "index,t\n1,3\n", "weights of the run 1 are below 0"),
    ],
)
def test_what_is_wrong_with_tables_is_said(tmp_path, mixtures, losses, said):
    paths = write(tmp_path / "a.csv", mixtures), write(tmp_path / "b.csv", losses)
    with pytest.raises(UserError, match=said):
        load_pair(*paths)
    with pytest.raises(UserError, match="no table of runs at .*c.csv"):
        load_pair(paths[0], tmp_path / "c.csv")


def test_a_regression_needs_runs_a_target_and_losses_that_differ():
    mixtures = proxies(PRIOR, 12, 0)
    losses = losses_of(mixtures, linear)
    with pytest.raises(UserError, match="losses.csv has no target 'u', only t"):
        regression.fit(mixtures, losses, "u")
    same = dataclasses.replace(losses, values=np.ones_like(losses.values))
    with pytest.raises(UserError, match="all runs have the same loss"):
        regression.fit(mixtures, same)
    few = [t.ordered(t.runs[:9]) for t in (mixtures, losses)]
    with pytest.raises(UserError, match="has 9 runs: a regression needs 10"):
        regression.fit(*few)


def test_without_scikit_learn_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(UserError, match=r"pip install 'mobilellm-jax\[mixing\]'"):
        regression.models(0)


# --- Planted laws


@pytest.mark.parametrize("law, optimum", [(linear, np.eye(4)[1]), (logarithmic, GIVES)])
def test_the_optimum_of_a_planted_law_is_found(law, optimum):
    mixtures, fit = fitted(law)
    assert fit.rank.value > 0.95 and fit.rank.low > 0.9
    found = regression.best(fit, PRIOR)
    assert np.abs(found.weights_S - optimum).sum() < 0.15
    losses = law(mixtures.values)
    regret = (law(found.weights_S[None])[0] - law(optimum[None])[0]) / losses.std()
    assert regret < 0.05
    prior = np.array(list(PRIOR.values()))
    assert law(found.weights_S[None])[0] < law(prior[None])[0] - 0.3 * losses.std()


@pytest.mark.parametrize("law", [linear, logarithmic])
def test_the_error_is_that_of_the_noise(law):
    """Of the model that is chosen, in units of the loss: a fiftieth of its spread was planted."""
    mixtures, fit = fitted(law)
    assert 0.015 < fit.error / law(mixtures.values).std() < 0.035


def test_a_straight_line_cannot_find_an_optimum_inside():
    """So the choice of the regression matters, and is made."""
    assert fitted(linear)[1].model == "linear"
    _, fit = fitted(logarithmic)
    assert fit.model != "linear" and fit.ranks["linear"] < fit.rank.low


def test_under_caps_the_linear_optimum_is_that_of_linear_programming():
    bounds = {"web": 0.5, "code": 0.35, "math": 1.0, "wiki": 0.3}
    found = regression.best(fitted(linear)[1], PRIOR, bounds)
    limits = [(0, bounds[name]) for name in NAMES]
    exact = scipy.optimize.linprog(COSTS, A_eq=np.ones((1, 4)), b_eq=[1], bounds=limits).x
    np.testing.assert_allclose(exact, [0.35, 0.35, 0, 0.3])
    np.testing.assert_allclose(found.weights_S, exact, atol=0.02)
    assert (found.top_KS <= np.array(list(bounds.values())) + 1e-9).all()
    assert found.top_KS.mean(0) == pytest.approx(found.weights_S)
    assert len(found.top_KS) == regression.TOP
    alone = regression.best(fitted(linear)[1], PRIOR, bounds, top=1)
    assert (alone.weights_S == found.top_KS[0]).all()
    assert alone.predicted <= fitted(linear)[1].predict(found.top_KS).min() + 1e-12


def test_what_is_drawn_has_a_seed():
    mixtures, fit = fitted(logarithmic)
    again = regression.fit(mixtures, losses_of(mixtures, logarithmic))
    assert again.rank == fit.rank and again.ranks == fit.ranks
    first, second, other = (regression.best(fit, PRIOR, seed=s).weights_S for s in (0, 0, 1))
    assert (first == second).all() and not (first == other).all()


def test_a_fold_has_no_say_in_the_model_that_it_judges():
    errors = np.random.default_rng(0).uniform(size=(3, 5))
    found = regression.best_elsewhere(errors)
    for fold in range(5):
        others = [m.sum() for m in np.delete(errors, fold, axis=1)]
        assert found[fold] == np.argmin(others)
        changed = errors.copy()
        changed[:, fold] = [9, 0, 5]
        assert regression.best_elsewhere(changed)[fold] == found[fold]


def without_trees(monkeypatch):
    all_of = regression.models
    cheap = ("linear", "logarithmic")
    monkeypatch.setattr(regression, "models", lambda seed: {n: all_of(seed)[n] for n in cheap})


def test_of_shuffled_losses_the_interval_holds_0(monkeypatch):
    mixtures = proxies(PRIOR, 60, seed=1)
    losses = losses_of(mixtures, logarithmic)

    def shuffled(seed):
        order = np.random.default_rng(seed).permutation(60)
        ranks = regression.fit(
            mixtures, dataclasses.replace(losses, values=losses.values[order])
        ).rank
        assert ranks.low < ranks.value < ranks.high
        return ranks

    with_trees = shuffled(0)
    assert with_trees.low < 0 < with_trees.high
    without_trees(monkeypatch)
    found = [shuffled(seed) for seed in range(100)]
    assert (
        sum(r.low <= 0 <= r.high for r in found) >= 88
    )  # 95 % of them, and four standard deviations
    # Folds predicted without the distance from their own means would agree on about -0.3.
    assert abs(np.mean([r.value for r in found])) < 0.12
    # Independent runs would be told too narrowly: some 84 % of their intervals hold 0.
    half = 1.96 / np.sqrt(57)
    assert sum(abs(r.value) < half for r in found) <= 93


@pytest.mark.parametrize("truth", [0.0, 0.6, 0.95])
def test_the_interval_of_a_rank_correlation_covers_it(truth):
    rng = np.random.default_rng(0)
    pearson = 2 * np.sin(np.pi * truth / 6)  # of a normal pair with that rank correlation
    held = 0
    for _ in range(400):
        a, b = rng.multivariate_normal([0, 0], [[1, pearson], [pearson, 1]], 50).T
        found = regression.rank(a, b)
        held += found.low <= truth <= found.high
    assert 363 <= held <= 397
    assert regression.rank(np.arange(3), np.arange(3)) == regression.Rank(
        pytest.approx(1), -1.0, 1.0
    )
    assert regression.rank(np.zeros(9), np.arange(9.0)).value == 0


# --- The program


def test_the_program_prints_tables_and_writes_them_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    without_trees(monkeypatch)
    mixtures = proxies(PRIOR, 40, 0)
    mixtures.save(tmp_path / "a.csv")
    losses = losses_of(mixtures, linear)
    two = dataclasses.replace(
        losses, names=("t", "u"), values=np.c_[losses.values, logarithmic(mixtures.values)]
    )
    two.save(tmp_path / "b.csv")
    command = (
        *("data_mixing.regmix", "--mixtures=a.csv", "--losses=b.csv", "--out=out"),
        *("--candidates=2000", "--heldout_mixtures=a.csv", "--heldout_losses=b.csv"),
    )
    done = runs.program(*command)
    assert done.status == 0, done.err
    assert "held-out rank correlation" in done.out and "on other runs" in done.out
    assert [line.split()[0] for line in done.out.splitlines()[1:4]] == ["mean", "t", "u"]
    best = RunTable.load(tmp_path / "out" / "best.csv")
    assert best.names == NAMES and best.values.sum() == pytest.approx(1)
    said = (tmp_path / "out" / "regmix.md").read_text()
    for name, weight in zip(NAMES, best.values[0], strict=True):
        assert f"| {name} |" in said and f"{weight:.2%}" in said
    again = runs.program(*command)
    assert again.status == 1 and "error: out exists" in again.err


def test_other_runs_must_have_the_same_columns():
    mixtures = proxies(PRIOR, 20, 0)
    losses = losses_of(mixtures, linear)
    renamed = dataclasses.replace(mixtures, names=("a", "b", "c", "d"))
    with pytest.raises(UserError, match="must have the columns of"):
        regmix.report(mixtures, losses, unseen=(renamed, losses))
    with pytest.raises(UserError, match="do not both have wiki, wikis"):
        regmix.report(mixtures, losses, prior={"web": 1, "code": 1, "math": 1, "wikis": 1})


def test_few_runs_for_many_sources_are_doubted(monkeypatch):
    without_trees(monkeypatch)
    mixtures = proxies(PRIOR, 40, 0)
    losses = losses_of(mixtures, linear)
    assert "doubt" not in regmix.report(mixtures, losses, candidates=500).said
    few = mixtures.ordered(mixtures.runs[:39]), losses.ordered(losses.runs[:39])
    assert "39 runs are few for 4 sources: doubt it." in regmix.report(*few, candidates=500).said


@pytest.mark.slow
def test_the_mean_of_targets_is_learned_target_by_target():
    """Each source lowers its own loss and raises the other: the mean says little, its parts say all."""
    rng = np.random.default_rng(0)
    weights_NS = rng.dirichlet([1.0, 1.0, 1.0], 24)
    values = np.stack([-np.log(weights_NS[:, s] + 0.05) for s in range(3)], axis=1)
    runs = tuple(map(str, range(24)))
    mixtures = RunTable(runs, ("a", "b", "c"), weights_NS)
    losses = RunTable(runs, ("x", "y", "z"), values)
    fitted = regression.fit(mixtures, losses)
    apart = [regression.fit(mixtures, losses, name) for name in losses.names]
    expected = np.mean([one.predict(weights_NS) for one in apart], axis=0)
    np.testing.assert_allclose(fitted.predict(weights_NS), expected)
    assert fitted.rank.value > 0.8
    found = regression.best(fitted, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3})
    assert np.abs(found.weights_S - 1 / 3).max() < 0.15


def test_a_table_that_is_no_utf8_is_told(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"index,a,\xffb\n0,0.5,0.5\n")
    with pytest.raises(UserError, match=r"a.csv is no readable CSV file"):
        RunTable.load(tmp_path / "a.csv")
