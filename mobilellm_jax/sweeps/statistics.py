"""Means with 95 % intervals, and what a difference of two rows says."""

import dataclasses
import math
from collections.abc import Sequence

import scipy.stats

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds and the half width of its interval, which is infinite for a single value."""

    mean: float
    half_width: float
    count: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and Student's interval: the spread of few values is itself uncertain.

    Args:
      values: at least one, independent and about normal.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, math.inf, 1)
    variance = math.fsum((v - mean) ** 2 for v in values) / (count - 1)
    quantile = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    half_width = quantile * math.sqrt(variance / count)
    return Estimate(mean, half_width, count)


def verdict(difference: Estimate) -> str:
    """What a paired difference of losses says: lower is better, and 0 must lie outside the interval."""
    if difference.count == 1:
        return "one seed"
    if abs(difference.mean) <= difference.half_width:
        return "not distinguishable"
    return "better" if difference.mean < 0 else "worse"
