"""Hierarchical rejection sampling: which documents stand for a source, and why the others do not.

MobileLLM-R1 (arXiv 2509.24945, section 5.1.1) narrows each source down: above a threshold of quality,
then the top tenth by the probability that a judge calls it fit for probing reasoning, then the top
tenth by the same for a domain, then no document close in meaning to another of any source, then so
many a source. The functions here say that of scores and vectors alone: each returns what it drops,
with the reason.

One order serves all ties and all choices: better scored first, equal ones by a seeded hash of the
text. So what is chosen does not depend on the order of files and documents.
"""

import collections
import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from data_mixing.embeddings import Kept
from mobilellm_jax.errors import UserError

COPY, QUALITY, REASONING, DOMAIN, ALIKE, MOST, KEPT = STAGES = (
    "copy",
    "quality",
    "reasoning",
    "domain",
    "alike",
    "most",
    "kept",
)
CHUNK = 512  # documents that are compared with those kept at a time

Dropped = dict[int, str]  # numbers of documents of a source, each with the reason


@dataclasses.dataclass(frozen=True)
class Rules:
    """What scores have to be.

    Attributes:
      quality_above: the quality of a document has to be above this.
      fraction: of a source that a prompt leaves, the best.
      alike: cosine similarity from which on a document is dropped for one that is kept.
      whiten: compare vectors after whitening; see `embeddings.Whitening`.
      most: documents of a source, at most.
      seed: of the order of documents with equal scores, or with none.
    """

    quality_above: float = 4.0
    fraction: float = 0.1
    alike: float = 0.9
    whiten: bool = False
    most: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises `UserError` for a rule that cannot be kept."""
        if not math.isfinite(self.quality_above):
            raise UserError(f"--quality_threshold={self.quality_above} is not a number.")
        if not 0 < self.fraction <= 1:
            raise UserError(f"--fraction={self.fraction} is not above 0 and at most 1.")
        if not 0 < self.alike <= 1:
            raise UserError(f"--alike={self.alike} is not above 0 and at most 1.")
        if self.most < 1:
            raise UserError(f"--per_source={self.most}: a source needs a document or more.")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A document that every stage before has left.

    Attributes:
      source: it is from.
      number: in that source, from 1, as in its decisions.
      key: of its text.
      score: the last it was given, None where nothing was asked.
    """

    source: str
    number: int
    key: bytes
    score: float | None = None

    @property
    def name(self) -> str:
        """By which reasons call it."""
        return f"{self.source}:{self.number}"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of a candidate.

    Attributes:
      stage: that dropped it, or `KEPT`.
      reason: in words.
      similarity: to the nearest document that was kept before it, None where none was compared.
      nearest: that document's name.
    """

    stage: str
    reason: str
    similarity: float | None = None
    nearest: str | None = None


def copies(source: str, keys: Sequence[bytes]) -> Dropped:
    """Documents with the text of an earlier one, by place in `keys`."""
    first: dict[bytes, int] = {}
    dropped = {}
    for number, key in enumerate(keys):
        if first.setdefault(key, number) != number:
            dropped[number] = f"a copy of {source}:{first[key] + 1}"
    return dropped


def not_above(scores: Mapping[int, float], threshold: float) -> Dropped:
    """Documents whose quality is not above the threshold."""
    return {
        number: f"{QUALITY} {score:.4g}, not above {threshold:g}"
        for number, score in scores.items()
        if not score > threshold
    }


def not_top(
    stage: str, scores: Mapping[int, float], keys: Sequence[bytes], rules: Rules
) -> Dropped:
    """Documents that are not in the top fraction, rounded up."""
    count = math.ceil(round(rules.fraction * len(scores), 9))
    ordered = sorted(scores, key=lambda n: (-scores[n], draw(keys[n], rules.seed)))
    return {
        number: f"{stage} {scores[number]:.4g}, not in the top {100 * rules.fraction:g}%"
        for number in ordered[count:]
    }


def ranked(candidates: Sequence[Candidate], seed: int) -> list[Candidate]:
    """Better scored first; equal ones, and all where there are no scores, in a seeded random order."""
    return sorted(
        candidates,
        key=lambda c: (-(c.score or 0.0), draw(c.key, seed), c.source, c.number),
    )


def chosen(
    candidates: Sequence[Candidate],
    rules: Rules,
    vectors: Callable[[Sequence[Candidate]], np.ndarray] | None = None,
    told: Callable[[int], object] = lambda count: None,
    chunk: int = CHUNK,
) -> dict[Candidate, Verdict]:
    """The greedy choice over all sources, best first.

    A candidate is kept unless its source has all that it may have, its text is that of a kept one, or
    its cosine similarity to a kept one is `rules.alike` or more. So no document is dropped for the
    sake of one that is not among the probes. Vectors are asked for as they are needed, `chunk`
    candidates at a time; the size changes no verdict.

    Args:
      candidates: in order, see `ranked`.
      rules: how many and how alike.
      vectors: unit vectors [N, D] of candidates; without it only equal texts are found.
      told: is called with the number of candidates as they are decided.
      chunk: candidates that are compared at a time.
    """
    verdicts: dict[Candidate, Verdict] = {}
    counts: collections.Counter[str] = collections.Counter()
    texts: dict[bytes, Candidate] = {}
    near, order = Kept(), list[Candidate]()

    def full(candidate: Candidate) -> Verdict | None:
        if counts[candidate.source] < rules.most:
            return None
        among = "first" if candidate.score is None else "best"
        return Verdict(MOST, f"not among the {among} {rules.most:,}")

    def copied(candidate: Candidate) -> Verdict | None:
        if candidate.key not in texts:
            return None
        first = texts[candidate.key].name
        return Verdict(ALIKE, f"a copy of {first}", 1.0, first)

    left = collections.deque(candidates)
    while left:
        batch: list[Candidate] = []
        while left and len(batch) < chunk:
            candidate = left.popleft()
            if verdict := full(candidate):  # which it will be when its turn comes
                verdicts[candidate] = verdict
                told(1)
            else:
                batch.append(candidate)
        vectors_CD = None if vectors is None or not batch else vectors(batch)
        if vectors_CD is not None:
            similarity_C, nearest_C = near.nearest(vectors_CD)
            among_CC = vectors_CD @ vectors_CD.T
        kept: list[int] = []
        for i, candidate in enumerate(batch):
            verdict = full(candidate) or copied(candidate)
            like: tuple = ()
            if vectors_CD is not None and nearest_C[i] >= 0:
                like = float(similarity_C[i]), order[nearest_C[i]].name
            if verdict is None and like and like[0] >= rules.alike:
                verdict = Verdict(ALIKE, f"like {like[1]} ({like[0]:.2f})", *like)
            if verdict is None:
                counts[candidate.source] += 1
                verdict = Verdict(KEPT, f"kept as number {counts[candidate.source]:,}", *like)
                texts[candidate.key] = candidate
                if vectors_CD is not None:
                    closer_C = among_CC[i] > similarity_C
                    similarity_C = np.where(closer_C, among_CC[i], similarity_C)
                    nearest_C = np.where(closer_C, len(order), nearest_C)
                kept.append(i)
                order.append(candidate)
            verdicts[candidate] = verdict
            told(1)
        if vectors_CD is not None:
            near.add(vectors_CD[kept])
    return verdicts


def draw(key: bytes, seed: int) -> bytes:
    """Where the text of a key stands in a random order of all texts, the same whatever others there are."""
    return hashlib.blake2b(key, digest_size=8, salt=np.int64(seed).tobytes()).digest()
