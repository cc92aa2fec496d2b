"""Means with their standard errors, and pass@k."""

import collections
import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from mobilellm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Score:
    """A mean, with what chance in the choice of problems and samples leaves open.

    Attributes:
      mean: of all values.
      standard_error: of `mean`; nan of a single problem.
      problems: how many independent ones the values are of.
    """

    mean: float
    standard_error: float
    problems: int


def mean_score(values: Sequence[float], problems: Sequence[Hashable] | None = None) -> Score:
    """The mean of values, of which those of the same problem are not independent.

    The standard error is the cluster-robust one (Miller 2024, arXiv 2411.00640, section 2.2) with
    the correction for few clusters, G / (G - 1); with a value per problem it is the usual one.

    Args:
      values: what was measured.
      problems: which problem each value is of; none if each is of one of its own.

    Raises:
      UserError: there are no values.
    """
    if not values:
        raise UserError("there is nothing to average: no problem was graded.")
    mean = math.fsum(values) / len(values)
    deviations: dict[Hashable, float] = collections.defaultdict(float)
    for value, problem in zip(values, problems or range(len(values)), strict=True):
        deviations[problem] += value - mean
    count = len(deviations)
    if count == 1:
        return Score(mean, math.nan, 1)
    square = math.fsum(deviation**2 for deviation in deviations.values()) * count / (count - 1)
    return Score(mean, math.sqrt(square) / len(values), count)


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The chance that of `k` of the samples of one problem, drawn without replacement, one is correct.

    1 - C(samples - correct, k) / C(samples, k) (Chen et al. 2021, arXiv 2107.03374, equation 1),
    which is unbiased for the chance that one of k new samples is correct; as a product of factors
    between 0 and 1, which no number of samples takes out of the range of a float.

    Raises:
      UserError: there are fewer samples than k, or the numbers make no sense.
    """
    if not 1 <= k <= samples:
        raise UserError(
            f"pass@{k} of {samples} samples: k must be from 1 to the number of samples."
        )
    if not 0 <= correct <= samples:
        raise UserError(f"{correct} of {samples} samples cannot be correct.")
    failing = samples - correct
    if failing < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(failing + 1, samples + 1))


def mean_pass_at_k(results: Sequence[Sequence[bool]], k: int = 1) -> Score:
    """pass@k over problems; pass@1 is the share of correct samples, averaged over problems.

    Args:
      results: of each problem, whether each of its samples is correct; numbers of samples may differ.
      k: samples of which one must be correct.

    Raises:
      UserError: a problem has fewer samples than k, or there are no problems.
    """
    return mean_score([pass_at_k(len(of_one), sum(map(bool, of_one)), k) for of_one in results])


def known(value: Any) -> Any:
    """Figures as values that JSON knows: null where there is none, as for a standard error of one problem."""
    if isinstance(value, Mapping):
        return {key: known(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [known(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
