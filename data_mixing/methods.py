"""From measurements to mixture weights: one function per method, all alike.

A method gives every source a weight, from 0 to 1, together 1, and says why. What it measures of a source
becomes its weight in proportion (MobileLLM-R1, arXiv 2509.24945, equation 6):

    w_g = rho_g / sum of rho over all sources

A measure of 0 or below would be a share below 0, of which the paper says nothing: here it counts as the
`floor`, a share of the largest measure; with a floor of 0 the source is left out. Caps on repetition are no
matter of a method: the plan has them (`max_epochs`), and training obeys.

Axes in names: N pieces, S sources, C capabilities, R seeds of a run.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping

import numpy as np

from data_mixing import regression
from data_mixing.measurements import LeftOut, Scored
from data_mixing.run_tables import RunTable
from mobilellm_jax.data.apportion import SHARES
from mobilellm_jax.errors import UserError
from mobilellm_jax.sweeps.statistics import CONFIDENCE, estimate

RESAMPLES = 1000
RESOLUTION = 0.5 / SHARES  # a weight below cannot be told from 0 by the stream
TAILS = (100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2)  # of an interval, in per cent
NORMAL = 1.96  # half a 95 % interval in standard errors


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured of a source, with its 95 % interval, infinite where nothing tells its width."""

    value: float
    low: float = -math.inf
    high: float = math.inf

    @property
    def text(self) -> str:
        """For people."""
        if not math.isfinite(self.high - self.low):
            return f"{self.value:.3g} (no interval)"
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


class NothingHelps(UserError):
    """By what was measured no source helps, so there are no weights."""


class Weights(dict[str, float]):
    """Weight by source, 0 where one is left out; why, by source; and what was measured, if anything was."""

    def __init__(
        self,
        weights: Mapping[str, float],
        reasons: Mapping[str, str],
        measured: Mapping[str, Measured] | None = None,
    ) -> None:
        super().__init__(weights)
        self.reasons = dict(reasons)
        self.measured = dict(measured or {})


Method = Callable[..., Weights]


def uniform(tokens: Mapping[str, float]) -> Weights:
    """The same weight for all."""
    share = 1 / len(tokens)
    return Weights(
        dict.fromkeys(tokens, share), dict.fromkeys(tokens, f"one of {len(tokens)} sources")
    )


def size(tokens: Mapping[str, float], temperature: float = 1.0) -> Weights:
    """In proportion to tokens ** (1 / temperature): 1 reads all sources equally often, infinity is uniform.

    Raises:
      UserError: the temperature is not above 0.
    """
    if not temperature > 0:
        raise UserError(f"the temperature {temperature:g} is not above 0.")
    logs = {name: math.log(count) / temperature for name, count in tokens.items()}
    largest = max(logs.values())  # of any temperature, however near to 0, the largest is a number
    powers = {name: math.exp(value - largest) for name, value in logs.items()}
    total = math.fsum(powers.values())
    reasons = {name: f"{count:,.0f} tokens" for name, count in tokens.items()}
    if temperature != 1:
        reasons = {name: f"{said} ** {1 / temperature:.3g}" for name, said in reasons.items()}
    return _told({name: power / total for name, power in powers.items()}, reasons)


def influence(
    scored: Mapping[str, Scored], floor: float = 0.0, seed: int = 0, resamples: int = RESAMPLES
) -> Weights:
    """By benefit per token of the pieces that were scored (arXiv 2509.24945, equation 6).

        rho_g = sum over pieces of (benefit * tokens) / sum over pieces of tokens

    A positive benefit is a helpful one, the opposite sign of the paper's equation 2.

    Args:
      scored: the scored pieces of each source.
      floor: least measure of a source, as a share of the largest.
      seed: of the bootstrap, from which the intervals are.
      resamples: of the bootstrap.

    Raises:
      UserError: no source has a positive measure.
    """
    measured = {name: density(of, name, seed, resamples) for name, of in scored.items()}
    return proportional(measured, floor, "benefit")


def density(scored: Scored, name: str = "", seed: int = 0, resamples: int = RESAMPLES) -> Measured:
    """Mean benefit per token of one source, with a bootstrap interval over rows.

    Pieces of one row are not independent: rows are drawn, with all their pieces.

    Args:
      scored: the pieces.
      name: of the source: sources of one seed draw different rows.
      seed: of the draws.
      resamples: number of draws.
    """
    rows, of_row_N = np.unique(scored.row_N, return_inverse=True)
    benefit_R = np.bincount(of_row_N, scored.benefit_N * scored.tokens_N)
    tokens_R = np.bincount(of_row_N, scored.tokens_N)
    value = float(benefit_R.sum() / tokens_R.sum())
    if len(rows) < 2:
        return Measured(value)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    drawn = []
    for _ in range(resamples):
        at = rng.integers(len(rows), size=len(rows))
        drawn.append(benefit_R[at].sum() / tokens_R[at].sum())
    low, high = np.percentile(drawn, TAILS)
    return Measured(value, float(low), float(high))


def leave_one_out(left: LeftOut, standardise: bool = False, floor: float = 0.0) -> Weights:
    """By the rise of the loss where a source is left out, added over capabilities (equation 1).

    Args:
      left: rises of mean NLL per token.
      standardise: a capability's rises are divided by their standard deviation over sources, so that one
        whose losses move much does not decide alone.
      floor: least measure of a source, as a share of the largest.

    Raises:
      UserError: no source has a positive measure, or a capability cannot be standardised.
    """
    rise_SCR, stderr_SCR = left.rise_SCR, left.stderr_SCR
    if standardise:
        scale_C = rise_SCR.mean(2).std(0)
        if not (scale_C > 0).all():
            flat = left.capabilities[int(np.argmin(scale_C))]
            raise UserError(
                f"the rises of {flat!r} are the same for all sources and cannot be standardised: leave "
                "standardise out."
            )
        rise_SCR, stderr_SCR = rise_SCR / scale_C[:, None], stderr_SCR / scale_C[:, None]
    total_SR = rise_SCR.sum(1)
    measured = {}
    for name, total_R, stderr_CR in zip(left.sources, total_SR, stderr_SCR, strict=True):
        if len(total_R) > 1:
            found = estimate(total_R.tolist())
            mean, half = found.mean, found.half_width
        else:  # of one seed only the spread of the probes is known
            mean, half = float(total_R[0]), NORMAL * math.sqrt(float((stderr_CR**2).sum()))
            half = math.inf if math.isnan(half) else half
        measured[name] = Measured(mean, mean - half, mean + half)
    return proportional(measured, floor, "rise")


def regmix(
    tokens: Mapping[str, float],
    mixtures: RunTable,
    losses: RunTable,
    target: str = "",
    bounds: Mapping[str, float] | None = None,
    top: int = regression.TOP,
    candidates: int = regression.CANDIDATES,
    seed: int = 0,
) -> Weights:
    """The mixture whose predicted loss is lowest (RegMix, arXiv 2407.01492).

    Args:
      tokens: of each source; proposals lie around their shares.
      mixtures: weights of the proxy runs, a column per source, checked by `run_tables.load_pair`.
      losses: their losses.
      target: column to lower, the mean of all by default.
      bounds: highest weight of each source.
      top: how many of the best proposals are averaged.
      candidates: how many are looked at.
      seed: of folds, trees and proposals.

    Raises:
      UserError: the mixtures have other sources, or see `regression.fit` and `regression.best`.
    """
    if set(mixtures.names) != set(tokens):
        odd = sorted(set(mixtures.names) ^ set(tokens))
        raise UserError(
            f"the columns of {mixtures.where} are not the sources of the plan: {', '.join(odd)} "
            f"{'is' if len(odd) == 1 else 'are'} in one only; rename the columns, or choose another plan."
        )
    fitted = regression.fit(mixtures, losses, target, seed)
    prior = {name: tokens[name] / sum(tokens.values()) for name in mixtures.names}
    found = regression.best(fitted, prior, bounds, top=top, candidates=candidates, seed=seed)
    low_S, high_S = np.percentile(found.top_KS, TAILS, axis=0)
    measured = {
        name: Measured(float(value), float(low), float(high))
        for name, value, low, high in zip(
            mixtures.names, found.weights_S, low_S, high_S, strict=True
        )
    }
    said = (
        f"{fitted.model} regression of {len(losses.runs)} runs, rank correlation {fitted.rank.text}"
    )
    reasons = {
        name: f"mean of the best {len(found.top_KS)} proposals, {m.low:.2%} to {m.high:.2%}; {said}"
        for name, m in measured.items()
    }
    weights = {name: measured[name].value for name in tokens}  # in the order of the plan
    return _told(weights, reasons, measured)


def proportional(measured: Mapping[str, Measured], floor: float, what: str) -> Weights:
    """Weights in proportion to what was measured; what is not above 0 counts as the floor.

    Args:
      measured: of each source; above 0 is helpful.
      floor: least measure, as a share of the largest; with 0 a source that does not help is left out.
      what: name of the measure, for people.

    Raises:
      UserError: no source helps (`NothingHelps`), or the floor is not between 0 and 1.
    """
    if not 0 <= floor <= 1:
        raise UserError(
            f"the floor {floor:g} is not between 0 and 1: it is a share of the largest."
        )
    best = max(measured, key=lambda name: measured[name].value)
    largest = measured[best].value
    if not largest > 0:
        raise NothingHelps(
            f"no source helps: the {what} of the best, {best}, is {measured[best].text}. Measure with "
            "more rows, other probes or a model that is trained further, choose another column, or take "
            "a method that needs no measure (uniform, size)."
        )
    values = {name: max(m.value, floor * largest) for name, m in measured.items()}
    total = math.fsum(values.values())
    reasons = {}
    for name, m in measured.items():
        reasons[name] = f"{what} {m.text}"
        if floor and m.value < floor * largest:
            reasons[name] = f"raised to the floor, {floor:.3g} of {best}'s: {reasons[name]}"
        elif m.low <= 0 <= m.high and math.isfinite(m.high - m.low):
            reasons[name] += ", not distinguishable from 0"
    return _told({name: value / total for name, value in values.items()}, reasons, measured)


def _told(
    weights: Mapping[str, float],
    reasons: Mapping[str, str],
    measured: Mapping[str, Measured] | None = None,
) -> Weights:
    """The weights without those that the stream cannot tell from 0, which is said."""
    kept = {name: w if w >= RESOLUTION else 0.0 for name, w in weights.items()}
    total = math.fsum(kept.values())
    said = {n: said if kept[n] else f"left out: {said}" for n, said in reasons.items()}
    return Weights({name: w / total for name, w in kept.items()}, said, measured)
