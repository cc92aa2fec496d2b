"""The sources of a run: planned against realised shares, held-out scores beside baselines."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mobilellm_jax.data import baselines
from mobilellm_jax.data.contexts import Contexts
from mobilellm_jax.data.mixture import first_rows
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.rows import open_rows
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.reporting.history import History

COUNTED_TOKENS = 4_000_000  # the n-gram models need no more, and a report should not take minutes


@dataclasses.dataclass(frozen=True)
class Baselines:
    """Held-out bits per byte of models that need no training run.

    `rows` of the `seen` training rows were counted by the unigram and bigram models.
    """

    unigram: float
    bigram: float
    zlib: float
    rows: int
    seen: int

    @property
    def scores(self) -> dict[str, float]:
        """Bits per byte by name."""
        return {"bigram": self.bigram, "unigram": self.unigram, "zlib": self.zlib}

    @property
    def best(self) -> tuple[str, float]:
        """Name and bits per byte of the strongest."""
        return min(self.scores.items(), key=lambda pair: pair[1])


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of the run; what is not known is None, or NaN where it is a measurement."""

    name: str
    planned: float | None
    rows: int
    row_share: float
    tokens: int
    token_share: float
    heldout: float
    available: int | None = None
    baselines: Baselines | None = None

    @property
    def epochs(self) -> float | None:
        """How often the run went over the rows of this source."""
        return self.rows / self.available if self.available else None

    @property
    def verdict(self) -> str:
        """Beats every baseline: "good"; the unigram model: "fair"; nothing: "poor"; unknown: ""."""
        if self.baselines is None or not math.isfinite(self.heldout):
            return ""
        if self.heldout < self.baselines.best[1]:
            return "good"
        return "fair" if self.heldout < self.baselines.unigram else "poor"


def realised(
    history: History, plan: Plan | None, row_length: int, first_row: int = 0
) -> list[Source]:
    """Counts what training consumed of each source; those of the plan come first, in its order.

    Args:
      history: of the run.
      plan: the plan of the run, if there is one.
      row_length: trained tokens of its rows.
      first_row: of the plan's stream that the run has read.
    """
    rows = {n: int(np.nansum(c)) for n, c in history.train.per_source("rows").items()}
    tokens = {n: int(np.nansum(c)) for n, c in history.train.per_source("tokens").items()}
    total_rows, total_tokens = max(sum(rows.values()), 1), max(sum(tokens.values()), 1)
    planned: dict[str, float] = {}
    if plan:
        begin, length = first_row * row_length, total_rows * row_length
        shares = (plan.read(begin + length) - plan.read(begin)) / length
        planned = dict(zip(plan.names, shares.tolist(), strict=True))
    names = dict.fromkeys([*planned, *rows])
    return [
        Source(
            name=name,
            planned=planned.get(name, 0.0) if plan else None,
            rows=rows.get(name, 0),
            row_share=rows.get(name, 0) / total_rows,
            tokens=tokens.get(name, 0),
            token_share=tokens.get(name, 0) / total_tokens,
            heldout=history.heldout.last(f"bits_per_byte/{name}"),
        )
        for name in names
    ]


def with_data(
    sources: Sequence[Source],
    plan: Plan,
    row_length: int,
    heldout_rows: int,
    cache: epath.Path,
    first_row: int = 0,
) -> tuple[list[Source], list[str]]:
    """Adds what takes the prepared rows: how many there are, and the baselines.

    Args:
      sources: those of the run.
      plan: the plan of the run.
      row_length: trained tokens of its rows.
      heldout_rows: how many held-out rows of each source training evaluates.
      cache: JSON file that keeps the baselines until the run has gone on or the plan is another.
      first_row: of the plan's stream that the run has read.

    Returns:
      the sources, and one sentence for each whose rows cannot be read any more.
    """
    key = {"plan": plan.hash, "heldout_rows": heldout_rows, "counted_tokens": COUNTED_TOKENS}
    key["row_length"] = row_length
    if first_row:
        key["first_row"] = first_row
    given = dict(zip(plan.names, plan.read(first_row * row_length) // row_length, strict=True))
    key["seen"] = {source.name: source.rows for source in sources}
    known = _read_cache(cache, key)
    paths = {source.name: plan.resolve(source.path) for source in plan.sources}
    found, notes = [], []
    for source in sources:
        try:
            train = Contexts(open_rows(paths[source.name], "train"), row_length)
            source = dataclasses.replace(source, available=len(train))
            if source.name not in known and source.rows:
                heldout = Contexts(open_rows(paths[source.name], "heldout"), row_length)
                count = min(source.rows, len(train))
                begin = int(given[source.name])  # to within a row
                seen = first_rows(plan, source.name, len(train), count, begin)
                known[source.name] = measure(train, seen, heldout, heldout_rows, plan)
                _write_cache(cache, key, known)
            source = dataclasses.replace(source, baselines=known.get(source.name))
        except UserError as error:
            notes.append(f"Some rows of {source.name} cannot be read: {error}")
        found.append(source)
    return found, notes


def describe(sources: Sequence[Source]) -> str:
    """Which sources were too large for the n-gram models to count in full; empty when none was."""
    part = [s for s in sources if s.baselines and s.baselines.rows < s.baselines.seen]
    if not part:
        return ""
    names = ", ".join(s.name for s in part)
    return f"Of {names} the n-gram models count the first {COUNTED_TOKENS:,} tokens."


def measure(
    train: Contexts, seen: np.ndarray, heldout: Contexts, heldout_rows: int, plan: Plan
) -> Baselines:
    """Baselines of one source, in bits per byte of the held-out rows that training evaluates.

    The n-gram models count as many rows of the source as the run has `seen`, in the stream's order,
    each once, up to `COUNTED_TOKENS` tokens.
    """
    tokenizer = Tokenizer.load(plan.resolve(plan.tokenizer_path))
    counted = seen[: math.ceil(COUNTED_TOKENS / train.row_length)]
    train_RT = train.read(counted)
    heldout_RT = heldout.read(np.arange(min(len(heldout), heldout_rows), dtype=np.int64))
    ends = tokenizer.bos_id, tokenizer.eos_id
    arguments = (train_RT, heldout_RT, tokenizer.piece_bytes(), *ends)
    return Baselines(
        unigram=baselines.unigram_bits_per_byte(*arguments),
        bigram=baselines.bigram_bits_per_byte(*arguments),
        zlib=baselines.zlib_bits_per_byte(heldout_RT, tokenizer),
        rows=len(counted),
        seen=len(seen),
    )


def _read_cache(cache: epath.Path, key: Mapping[str, Any]) -> dict[str, Baselines]:
    try:
        raw = json.loads(cache.read_text())
        if raw["key"] != key:
            return {}
        found = {name: Baselines(**values) for name, values in raw["sources"].items()}
        damaged = any(v <= 0 for values in found.values() for v in dataclasses.astuple(values))
        return {} if damaged else found
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}  # a cache that is missing, damaged or of another version is made anew


def _write_cache(cache: epath.Path, key: Mapping[str, Any], known: Mapping[str, Baselines]) -> None:
    sources = {name: dataclasses.asdict(values) for name, values in known.items()}
    cache.write_text(json.dumps({"key": key, "sources": sources}, indent=2) + "\n")
