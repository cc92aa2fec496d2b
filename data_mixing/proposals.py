"""Mixtures drawn around a prior, as RegMix draws them (arXiv 2407.01492).

Every proposal is a Dirichlet draw whose mean is the prior; how far it strays is drawn as well: its
concentration is between two `strengths`, evenly on a logarithmic scale. A low one gives nearly all to one
source, a high one stays near the prior.

Axes in names: R proposals, S sources.
"""

from collections.abc import Mapping

import numpy as np

from data_mixing.run_tables import RunTable
from mobilellm_jax.errors import UserError

STRENGTHS = (0.1, 5.0)
MINIMUM = 2e-4  # a weight below is 0: too few rows of a source to learn anything of it
TEMPERATURE = 2.0  # of the prior of proxies, so that small sources are measured too


def proposals(
    prior_S: np.ndarray,
    count: int,
    rng: np.random.Generator,
    strengths: tuple[float, float] = STRENGTHS,
    bound_S: np.ndarray | None = None,
    minimum: float = MINIMUM,
) -> np.ndarray:
    """float64 [R, S]: mixtures around a prior, each summing to 1, within the bounds.

    Args:
      prior_S: above 0, sums to 1.
      count: number of proposals.
      rng: where they are drawn from.
      strengths: lowest and highest concentration.
      bound_S: highest weight of each source; what a draw has beyond goes to the others. None for none.
      minimum: a lower weight becomes 0.

    Raises:
      UserError: the bounds sum to less than 1.
    """
    log_low, log_high = np.log(strengths)
    strength_R1 = np.exp(rng.uniform(log_low, log_high, (count, 1)))
    alpha_RS = strength_R1 * prior_S
    # Gamma(a) is Gamma(a + 1) * U ** (1 / a): of a small a its logarithm exists where it is itself 0.
    log_RS = (
        np.log(rng.standard_gamma(alpha_RS + 1)) - rng.exponential(size=alpha_RS.shape) / alpha_RS
    )
    weights_RS = np.exp(log_RS - log_RS.max(1, keepdims=True))
    weights_RS /= weights_RS.sum(1, keepdims=True)
    weights_RS[weights_RS < minimum] = 0.0  # the largest is at least 1 / S
    weights_RS /= weights_RS.sum(1, keepdims=True)
    return weights_RS if bound_S is None else within(weights_RS, bound_S)


def within(weights_RS: np.ndarray, bound_S: np.ndarray) -> np.ndarray:
    """Mixtures lowered to bounds; the others take the excess, in proportion to their weights.

    It is `apportion.water_fill` for many mixtures of one stage. Where no other source of a mixture may take
    more, the sources that have no weight in it do, in proportion to their bounds.

    Raises:
      UserError: the bounds sum to less than 1.
    """
    bound_S = np.minimum(bound_S, 1.0)
    if bound_S.sum() < 1:
        raise UserError(
            f"the caps on epochs allow {bound_S.sum():.1%} of the run's tokens: raise max_epochs, add a "
            "source, or shorten the run."
        )
    capped_RS = np.zeros(weights_RS.shape, bool)
    while True:
        held_R1 = np.where(capped_RS, bound_S, 0.0).sum(1, keepdims=True)
        free_RS = np.where(capped_RS, 0.0, weights_RS)
        stuck_R1 = free_RS.sum(1, keepdims=True) <= 0
        free_RS = np.where(stuck_R1 & ~capped_RS, bound_S, free_RS)
        total_R1 = free_RS.sum(1, keepdims=True)
        scaled_RS = free_RS * (1 - held_R1) / np.where(total_R1 > 0, total_R1, 1.0)
        out_RS = np.where(capped_RS, bound_S, scaled_RS)
        over_RS = ~capped_RS & (out_RS > bound_S * (1 + 1e-12))
        if not over_RS.any():
            return out_RS
        capped_RS |= over_RS


def proxies(
    prior: Mapping[str, float],
    count: int,
    seed: int,
    *,
    bounds: Mapping[str, float] | None = None,
    temperature: float = TEMPERATURE,
    strengths: tuple[float, float] = STRENGTHS,
    minimum: float = MINIMUM,
) -> RunTable:
    """The mixtures to train proxies on, all different: the table that `regmix` reads.

    Args:
      prior: tokens, or shares, of each source.
      count: number of proxies.
      seed: of the draws.
      bounds: highest weight of each source.
      temperature: draws lie around prior ** (1 / temperature).
      strengths: see `proposals`.
      minimum: see `proposals`.

    Raises:
      UserError: a share of the prior is not above 0, the bounds are impossible, or there are not that many
        different mixtures.
    """
    if low := [name for name, share in prior.items() if not share > 0]:
        raise UserError(
            f"the prior of {', '.join(low)} is not above 0: leave what is not there out."
        )
    flat_S = np.array(list(prior.values()), np.float64) ** (1 / temperature)
    bound_S = None if bounds is None else np.array([bounds[name] for name in prior])
    rng = np.random.default_rng(seed)
    drawn_RS = proposals(flat_S / flat_S.sum(), 20 * count, rng, strengths, bound_S, minimum)
    _, first = np.unique(drawn_RS.round(4), axis=0, return_index=True)
    if len(first) < count:
        raise UserError(
            f"only {len(first)} different mixtures of {', '.join(prior)} were found, not {count}: ask for "
            "fewer, raise the highest strength, or loosen the bounds."
        )
    values_RS = drawn_RS[np.sort(first)[:count]]
    return RunTable(tuple(map(str, range(count))), tuple(prior), values_RS)
