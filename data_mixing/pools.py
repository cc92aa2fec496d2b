"""The documents of a source with all that becomes of them, and what is written of that."""

import collections
import dataclasses
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import tqdm

from data_mixing import documents, selection
from data_mixing.documents import Documents
from data_mixing.probe_sets import HALVES, Probe, ProbeSets, half_of
from data_mixing.selection import (
    ALIKE,
    COPY,
    DOMAIN,
    KEPT,
    MOST,
    QUALITY,
    REASONING,
    Dropped,
    Verdict,
)
from mobilellm_jax.data.corpora import Corpus
from mobilellm_jax.errors import UserError
from mobilellm_jax.tables import aligned


class Bar(tqdm.tqdm):
    """A bar that leaves a line with the time that was needed."""

    def __init__(self, what: str, total: int) -> None:
        super().__init__(total=total, desc=what, unit="doc", disable=not sys.stderr.isatty())
        self._what, self._begin = what, time.monotonic()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        if raised[0] is None:
            seconds = time.monotonic() - self._begin
            print(f"{self._what}, {seconds:.1f} s", file=sys.stderr, flush=True)


@dataclasses.dataclass
class Pool:
    """The documents of a source, what they were given, and what became of them so far."""

    name: str
    documents: Documents
    scores: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # NaN: not asked
    verdicts: dict[int, Verdict] = dataclasses.field(default_factory=dict)

    @property
    def left(self) -> list[int]:
        """Places of the documents of which nothing is decided."""
        return [n for n in range(len(self.documents)) if n not in self.verdicts]

    def drop(self, stage: str, dropped: Dropped) -> None:
        """Decides."""
        self.verdicts |= {number: Verdict(stage, reason) for number, reason in dropped.items()}

    def count(self, stage: str) -> int:
        """Documents that a stage dropped, or that were kept."""
        return sum(verdict.stage == stage for verdict in self.verdicts.values())


def read(corpus: Corpus, split: str, work: Path) -> Pool:
    """The pool of a source; its documents are copied into the work folder, if they are not there yet.

    Raises:
      UserError: it has none in that split.
    """
    path = work / f"{corpus.name}.arrow"
    if not path.exists():
        documents.copy(corpus, split, path)
    pool = Pool(corpus.name, Documents(path))
    if not len(pool.documents):
        raise UserError(
            f"the source {corpus.name} has no document in its split {split!r}: give a larger --heldout "
            "(that of `prepare`), another --split, or more text."
        )
    pool.drop(COPY, selection.copies(pool.name, pool.documents.keys))
    return pool


# The result.


def kept_sets(pools: Sequence[Pool], capabilities: Mapping[str, Sequence[str]]) -> ProbeSets:
    """The documents that were kept, in the order in which they were."""
    kept = {}
    for pool in pools:
        numbers = [n for n, verdict in pool.verdicts.items() if verdict.stage == KEPT]
        kept[pool.name] = tuple(_probe(pool, number) for number in numbers)
    return ProbeSets({name: tuple(sources) for name, sources in capabilities.items()}, kept)


def _probe(pool: Pool, number: int) -> Probe:
    text = pool.documents.text(number)
    value = functools.partial(pool.documents.value, number=number)
    return Probe(
        text, pool.name, half_of(text), str(value("id")), str(value("file")), int(value("place"))
    )


def write_decisions(pool: Pool, path: Path) -> None:
    """A row for each document that was looked at, in the order of reading."""
    verdicts = [pool.verdicts[n] for n in range(len(pool.documents))]

    def scores(stage: str) -> pyarrow.Array:
        values = pool.scores.get(stage, np.full(len(verdicts), np.nan))
        return pyarrow.array(values, pyarrow.float64(), mask=np.isnan(values))

    table = pyarrow.table(
        {
            "number": pyarrow.array(range(1, len(verdicts) + 1), pyarrow.int64()),
            **{name: pool.documents.column(name) for name in ("id", "file", "place", "bytes")},
            **{stage: scores(stage) for stage in (QUALITY, REASONING, DOMAIN)},
            "similarity": pyarrow.array([v.similarity for v in verdicts], pyarrow.float64()),
            "nearest": pyarrow.array([v.nearest for v in verdicts], pyarrow.string()),
            "kept": [v.stage == KEPT for v in verdicts],
            "stage": [v.stage for v in verdicts],
            "reason": [v.reason for v in verdicts],
        }
    )
    pyarrow.parquet.write_table(table, path)


def counted(pool: Pool, sets: ProbeSets) -> dict[str, int]:
    """How many documents each stage that took place has left."""
    left = {"read": len(pool.documents)}
    remaining = len(pool.documents)
    for stage in (COPY, QUALITY, REASONING, DOMAIN, ALIKE, MOST):
        remaining -= pool.count(stage)
        if stage in pool.scores or stage in (COPY, ALIKE, MOST):
            left[stage] = remaining
    halves = collections.Counter(probe.half for probe in sets.documents[pool.name])
    return {**left, **{half: halves[half] for half in HALVES}}


def funnel(counts: Mapping[str, Mapping[str, int]]) -> str:
    """How many documents of each source are left after each stage, for people."""
    told = {COPY: "different", ALIKE: "unlike", MOST: "kept"}
    columns = list(next(iter(counts.values())))
    lines = [("source", *(told.get(name, name) for name in columns))]
    for source, left in counts.items():
        lines.append((source, *(f"{left[name]:,}" for name in columns)))
    return aligned(lines, "<" + ">" * len(columns))
