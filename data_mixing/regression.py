"""Losses of proxy runs, regressed on their mixture weights; and the mixture with the lowest prediction.

Three regressions are tried, and the one with the lowest error on held-out folds is taken: ridge regression
on the weights (`linear`), on the weights and their logarithms (`logarithmic`, in which a source gives less
the more of it there is), and gradient-boosted `trees`, RegMix's own (arXiv 2407.01492). Needs scikit-learn.

Axes in names: N runs, S sources, M models, F folds, K best proposals.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.stats

from data_mixing.proposals import proposals
from data_mixing.run_tables import RunTable
from mobilellm_jax.errors import UserError

FOLDS = 5
FEWEST = 10  # runs
TOP, CANDIDATES = 128, 100_000  # as in RegMix
NEARLY_NONE = 1e-3  # shares below read alike to the logarithmic regression
MEAN = "mean of all"  # of the targets, itself a target

Predict = Callable[[np.ndarray], np.ndarray]  # float64 [N, S] -> [N]


@dataclasses.dataclass(frozen=True)
class Rank:
    """Spearman's rank correlation of predictions and losses, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def text(self) -> str:
        """For people."""
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclasses.dataclass(frozen=True)
class Fit:
    """A regression of one target: the model that was chosen, and what held-out folds say of it and of all."""

    target: str
    model: str
    predict: Predict
    rank: Rank
    error: float  # root of the mean squared error of the held-out folds, in units of the loss
    ranks: Mapping[str, float]  # by model


@dataclasses.dataclass(frozen=True)
class Best:
    """The best predicted mixture, and those it is the mean of."""

    weights_S: np.ndarray
    top_KS: np.ndarray
    predicted: float


def models(seed: int) -> dict[str, Any]:
    """The regressions, not fitted.

    Raises:
      UserError: scikit-learn is missing.
    """
    try:
        from sklearn.ensemble import GradientBoostingRegressor
        from sklearn.linear_model import RidgeCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import FunctionTransformer, StandardScaler
    except ImportError:
        raise UserError(
            "regressions need scikit-learn: pip install 'mobilellm-jax[mixing]'."
        ) from None
    penalties = np.logspace(-6, 3, 19)
    return {
        "linear": RidgeCV(penalties),
        "logarithmic": make_pipeline(
            FunctionTransformer(with_logarithms), StandardScaler(), RidgeCV(penalties)
        ),
        "trees": GradientBoostingRegressor(
            n_estimators=500, learning_rate=0.05, max_depth=4, subsample=0.5, random_state=seed
        ),
    }


def with_logarithms(weights_NS: np.ndarray) -> np.ndarray:
    """float64 [N, 2 S]: weights, and logarithms that are finite where a source is absent."""
    return np.concatenate([weights_NS, np.log(weights_NS + NEARLY_NONE)], axis=1)


def losses_of(losses: RunTable, target: str) -> np.ndarray:
    """float64 [N]: one column, or the mean of all.

    Raises:
      UserError: there is no such column, or all runs have one loss.
    """
    if target and target != MEAN and target not in losses.names:
        raise UserError(f"{losses.where} has no target {target!r}, only {', '.join(losses.names)}.")
    at = losses.names.index(target) if target in losses.names else slice(None)
    loss_N = losses.values[:, at] if target in losses.names else losses.values.mean(1)
    if np.ptp(loss_N) == 0:
        raise UserError(f"{losses.where}: all runs have the same loss of {target or MEAN}.")
    return loss_N


def fit(mixtures: RunTable, losses: RunTable, target: str = "", seed: int = 0) -> Fit:
    """Regresses a target on the weights and says how well the regression ranks unseen runs.

    Every run is predicted by models that were fitted without its fold. The model is the one with the lowest
    squared error there; what a fold adds to the rank correlation is predicted by the model that is best on
    the other folds, so that the choice does not know what it is judged by.

    The mean of several targets is the mean of their predictions: what one source does to one target is
    nearly linear, and a mean in which such effects cancel is hard to learn as it is.

    Args:
      mixtures: weights of each run.
      losses: of the same runs in the same order.
      target: a column of the losses, the mean of all by default.
      seed: of the folds and of the trees.

    Raises:
      UserError: too few runs, no such target, or scikit-learn is missing.
    """
    weights_NS, loss_N = mixtures.values, losses_of(losses, target)
    runs = len(loss_N)
    if runs < FEWEST:
        raise UserError(
            f"{mixtures.where} has {runs} runs: a regression needs {FEWEST} at least, and better several for "
            "each source."
        )
    columns = losses.values.T if target in ("", MEAN) else loss_N[None]
    parts = [_cross_fitted(weights_NS, column_N, seed) for column_N in columns]
    names = list(models(seed))

    def predict(weights_NS: np.ndarray) -> np.ndarray:
        return np.mean([part.final.predict(weights_NS) for part in parts], axis=0)

    mean_N = np.mean([part.mean_N for part in parts], axis=0)
    predicted_MN = np.mean([part.predicted_MN for part in parts], axis=0)
    best_N = np.mean([part.predicted_MN[part.best] for part in parts], axis=0)
    chosen_N = np.mean([part.chosen_N for part in parts], axis=0)
    return Fit(
        target or MEAN,
        " and ".join(name for m, name in enumerate(names) if m in {part.best for part in parts}),
        predict,
        # Runs that test each other's models are not independent: see `rank`.
        rank(chosen_N - mean_N, loss_N, effective=runs / 2),
        math.sqrt(float(((best_N - loss_N) ** 2).mean())),
        {n: spearman(predicted_MN[m] - mean_N, loss_N) for m, n in enumerate(names)},
    )


@dataclasses.dataclass(frozen=True)
class _CrossFitted:
    """One column of losses: what models say of runs that they have not seen, and the best of all."""

    predicted_MN: np.ndarray
    chosen_N: np.ndarray  # by the model that is best on the other folds
    mean_N: np.ndarray  # of the losses that the models of a run's fold were fitted on
    best: int
    final: Any  # fitted on all runs


def _cross_fitted(weights_NS: np.ndarray, loss_N: np.ndarray, seed: int) -> _CrossFitted:
    runs = len(loss_N)
    fold_N = np.random.default_rng(seed).permutation(runs) % FOLDS
    unfitted = models(seed)
    predicted_MN = np.empty((len(unfitted), runs))
    for fold in range(FOLDS):
        train_N, test_N = fold_N != fold, fold_N == fold
        for m, model in enumerate(models(seed).values()):
            model.fit(weights_NS[train_N], loss_N[train_N])
            predicted_MN[m, test_N] = model.predict(weights_NS[test_N])
    squares_MN = (predicted_MN - loss_N) ** 2
    by_fold_MF = np.stack([squares_MN[:, fold_N == f].sum(1) for f in range(FOLDS)], axis=1)
    best = int(np.argmin(by_fold_MF.sum(1)))
    chosen_N = predicted_MN[best_elsewhere(by_fold_MF)[fold_N], np.arange(runs)]
    # A fold whose runs are bad was fitted on runs that are good, and its mean prediction lies too low:
    # without signal that would be a negative correlation. What counts is the distance from that mean.
    mean_N = np.array([loss_N[fold_N != f].mean() for f in range(FOLDS)])[fold_N]
    final = list(unfitted.values())[best].fit(weights_NS, loss_N)
    return _CrossFitted(predicted_MN, chosen_N, mean_N, best, final)


def best_elsewhere(errors_MF: np.ndarray) -> np.ndarray:
    """int64 [F]: for each fold, the model with the lowest error on all others."""
    return np.argmin(errors_MF.sum(1, keepdims=True) - errors_MF, axis=0)


def rank(predicted_N: np.ndarray, loss_N: np.ndarray, effective: float | None = None) -> Rank:
    """Spearman's correlation and the interval of Bonett and Wright (Psychometrika 2000).

    Args:
      predicted_N: predictions.
      loss_N: what came true.
      effective: as how many independent runs they count, all by default. In cross-validation half as many:
        of a linear smoother without signal, what run i says of j and j of i are the same product of their
        losses, which doubles the variance.
    """
    value = spearman(predicted_N, loss_N)
    count = len(loss_N) if effective is None else effective
    if count <= 3:
        return Rank(value, -1.0, 1.0)
    z = math.atanh(min(max(value, -1 + 1e-12), 1 - 1e-12))
    half = scipy.stats.norm.ppf(0.975) * math.sqrt((1 + value**2 / 2) / (count - 3))
    return Rank(value, math.tanh(z - half), math.tanh(z + half))


def spearman(first_N: np.ndarray, second_N: np.ndarray) -> float:
    """Rank correlation, 0 where one does not vary."""
    if np.ptp(first_N) == 0 or np.ptp(second_N) == 0:
        return 0.0
    return float(scipy.stats.spearmanr(first_N, second_N).statistic)


def best(
    fitted: Fit,
    prior: Mapping[str, float],
    bounds: Mapping[str, float] | None = None,
    *,
    top: int = TOP,
    candidates: int = CANDIDATES,
    seed: int = 0,
) -> Best:
    """The mean of the proposals with the lowest predicted loss.

    Args:
      fitted: a regression.
      prior: share of each source, in the order of the regression's weights.
      bounds: highest weight of each source.
      top: how many proposals are averaged, which evens out what single predictions have of luck.
      candidates: how many are drawn.
      seed: of the draws.

    Raises:
      UserError: the bounds are impossible.
    """
    if not 1 <= top <= candidates:
        raise UserError(f"the best {top} of {candidates} candidates are not to be had.")
    prior_S = np.array(list(prior.values()))
    bound_S = None if bounds is None else np.array([bounds[name] for name in prior])
    rng = np.random.default_rng(seed)
    drawn_KS = proposals(prior_S / prior_S.sum(), candidates, rng, bound_S=bound_S)
    top_KS = drawn_KS[np.argsort(fitted.predict(drawn_KS), kind="stable")[:top]]
    weights_S = top_KS.mean(0)
    return Best(weights_S, top_KS, float(fitted.predict(weights_S[None])[0]))
