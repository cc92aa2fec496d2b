"""Which documents help a network as it is now, and when to stop looking for them.

The benefit of a document is that of its scored pieces together, per token (see `influence`), over
capabilities: each one's benefits are divided by a number and added, so that none decides by its
size. The numbers are the standard deviations of the first round, and stay what they are in every
later one. Were each round divided by its own, its benefits would be as wide as those of the round
before by construction, and that they collapse, which is when co-evolution ends (MobileLLM-R1, arXiv
2509.24945, section 6), would never be seen.

DataInf divides by the squared gradients of single rows, which do not vanish where the network has
learnt what it can; the mean gradient of the probes does. So its benefits shrink as well, whatever
they are divided by.

Axes in names: N scored pieces, M documents.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow

from data_mixing import influence, methods
from data_mixing.measurements import Scored
from data_mixing.methods import Measured

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_DOCUMENT = ("source", "file", "place", "id")  # columns of scores that name one

Key = tuple[str, int, str]  # as `data.subset` has it


@dataclasses.dataclass(frozen=True)
class Rules:
    """When to stop before a stage.

    Attributes:
      least_share: of the tokens, in documents that help; fewer end it. 0: never.
      collapsed: share of the first round's median size of a benefit and of its interquartile range;
        where both are below, it ends. 0: never.
      above_zero: whether it ends where no source has a mean benefit above 0, by a bootstrap
        interval over rows. Each source is looked at, since one that harms would hide others.
    """

    least_share: float = 0.1
    collapsed: float = 0.1
    above_zero: bool = True


@dataclasses.dataclass(frozen=True)
class Judged:
    """Pieces that were scored, and the documents that they are parts of."""

    source_M: np.ndarray  # str
    key_M: Sequence[Key]
    tokens_M: np.ndarray  # float64, targets that were scored
    benefit_M: np.ndarray  # float64, per token; above 0 helps
    document_N: np.ndarray  # int64, which document a piece is of
    row_N: np.ndarray
    tokens_N: np.ndarray
    benefit_N: np.ndarray

    def scored(self, source: str, chosen_M: np.ndarray | None = None) -> Scored:
        """The pieces of a source, or of those of its documents that are chosen."""
        mine_M = self.source_M == source
        here_N = (mine_M if chosen_M is None else mine_M & chosen_M)[self.document_N]
        return Scored(
            self.benefit_N[here_N], self.tokens_N[here_N].astype(np.int64), self.row_N[here_N]
        )

    def table(self, kept_M: np.ndarray) -> pyarrow.Table:
        """A line for each document, and whether it is kept."""
        columns = dict(zip(_DOCUMENT[1:], zip(*self.key_M, strict=True), strict=True))
        return pyarrow.table(
            {
                "source": self.source_M.tolist(),
                **columns,
                "tokens": self.tokens_M.astype(np.int64),
                "benefit": self.benefit_M,
                "kept": kept_M,
            }
        )


def scales_of(
    table: pyarrow.Table, metric: str, capabilities: Sequence[str], standardise: bool
) -> dict[str, float]:
    """What each capability's benefits are divided by, in this round and all that follow.

    Args:
      table: scores of the first round.
      metric: whose.
      capabilities: with a column METRIC/CAPABILITY.
      standardise: False: 1 for each, as in the paper.
    """
    if not standardise:
        return dict.fromkeys(capabilities, 1.0)
    return {c: influence.deviation(table, f"{metric}/{c}") or 1.0 for c in capabilities}


def judged(table: pyarrow.Table, metric: str, scales: Mapping[str, float]) -> Judged:
    """Documents with their benefits over all capabilities.

    Args:
      table: scores, as `influence` gives them with `standardise=False`.
      metric: the one to judge by.
      scales: see `scales_of`.
    """
    parts = [table[f"{metric}/{c}"].to_numpy() / scale for c, scale in scales.items()]
    benefit_N = np.mean(parts, axis=0)
    tokens_N = table["tokens"].to_numpy().astype(np.float64)
    numbers: dict[tuple, int] = {}
    names = zip(*(table[column].to_pylist() for column in _DOCUMENT), strict=True)
    document_N = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)
    tokens_M = np.bincount(document_N, tokens_N)
    return Judged(
        np.array([source for source, *_ in numbers], dtype=object),
        [(file, place, id_) for _, file, place, id_ in numbers],
        tokens_M,
        np.bincount(document_N, benefit_N * tokens_N) / tokens_M,
        document_N,
        table["row"].to_numpy(),
        tokens_N,
        benefit_N,
    )


def quantiles(values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """By name, such as `25%`, the value up to which that share of the weights lies."""
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weights[order])
    at = np.searchsorted(reached, np.array(QUANTILES) * reached[-1])
    found = values[order][np.minimum(at, len(values) - 1)]
    return {f"{q:.0%}": float(value) for q, value in zip(QUANTILES, found, strict=True)}


def by_capability(
    table: pyarrow.Table, metric: str, capabilities: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Quantiles of each capability's benefits as they are, over pieces and divided by nothing."""
    tokens = table["tokens"].to_numpy()
    return {c: quantiles(table[f"{metric}/{c}"].to_numpy(), tokens) for c in capabilities}


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Benefits of a round, each document weighed by its tokens; means by source, with intervals."""

    documents: int
    share: float  # of the tokens, in documents that are kept
    median_size: float
    quantiles: Mapping[str, float]
    best: float
    means: Mapping[str, Measured]

    @property
    def spread(self) -> float:
        """The interquartile range."""
        return self.quantiles["75%"] - self.quantiles["25%"]


def distribution(found: Judged, kept_M: np.ndarray, seed: int) -> Distribution:
    """What is to be known of a round's benefits.

    Args:
      found: them.
      kept_M: which documents are kept.
      seed: of the bootstrap.
    """
    tokens_M = found.tokens_M
    names = dict.fromkeys(found.source_M.tolist())
    return Distribution(
        len(tokens_M),
        float(tokens_M[kept_M].sum() / tokens_M.sum()),
        quantiles(np.abs(found.benefit_M), tokens_M)["50%"],
        quantiles(found.benefit_M, tokens_M),
        float(found.benefit_M.max()),
        {name: methods.density(found.scored(name), name, seed) for name in names},
    )


def stop_reason(first: Distribution, now: Distribution, rules: Rules) -> str:
    """Why to stop before this round's stage; "" for no reason.

    Args:
      first: the first round's.
      now: this round's; in the first round the same.
      rules: see `Rules`.
    """
    if not now.share:
        return (
            f"none of the {now.documents:,} documents helps enough to be kept (--threshold): the best "
            f"has a benefit of {now.best:.3g}"
        )
    if now.share < rules.least_share:
        return (
            f"documents that help have {now.share:.1%} of the tokens, less than "
            f"{rules.least_share:.1%} (--least_share)"
        )
    sizes = _ratio(now.median_size, first.median_size), _ratio(now.spread, first.spread)
    if max(sizes) < rules.collapsed:
        return (
            f"benefits have collapsed: their median size is {sizes[0]:.1%} and their interquartile range "
            f"{sizes[1]:.1%} of the first round's, both less than {rules.collapsed:.1%} (--collapsed)"
        )
    if rules.above_zero and not any(mean.low > 0 for mean in now.means.values()):
        best = max(now.means, key=lambda name: now.means[name].value)
        return (
            f"no source has a mean benefit that is above 0 beyond doubt: the best, {best}, has "
            f"{now.means[best].text} (--noabove_zero goes on)"
        )
    return ""


def _ratio(now: float, first: float) -> float:
    return now / first if first else 1.0
