"""The whole pre-training run of MobileLLM-R1, planned: 2,048,000,000 rows of 2,048 tokens from 14 sources.

    python -m benchmarks.full_run

Nothing is read: the sources of `configs/plans/mobilellm_r1_pretrain.json` are as long as published, in
rows, and hold nothing. Blocks and rows are sampled over both stages; the same plan made 10,000 times
smaller is walked through row by row. Printed: each check with what was seen and the bar. The exit
status is 1 if a bar is missed.
"""

import contextlib
import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
from absl import flags

from mobilellm_jax import cli
from mobilellm_jax.data.apportion import SHARES, fixed_point
from mobilellm_jax.data.mixture import BLOCK, Mixture
from mobilellm_jax.data.plan import Plan

PUBLISHED = Path(__file__).parent.parent / "configs" / "plans" / "mobilellm_r1_pretrain.json"
ROW_LENGTH = 2048
SMALLER = 10_000  # than the whole run is the one that is walked through


@dataclasses.dataclass(frozen=True)
class Check:
    """A property of the stream: what was seen, what it must be."""

    what: str
    seen: str
    bar: str
    passed: bool


class Nothing:
    """A source that has a length and no rows."""

    retries = 0

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return self._rows

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Zeros."""
        return np.zeros((len(indices), ROW_LENGTH + 1), np.int32)


def published(smaller: int = 1) -> Mixture:
    """The published run, sources and stages `smaller` times shorter."""
    with contextlib.redirect_stdout(None):  # it tells that the printed weights sum to 1.0001
        plan = Plan.load(PUBLISHED)
    stages = [dataclasses.replace(s, tokens=(s.tokens or 0) // smaller) for s in plan.stages]
    plan = dataclasses.replace(plan, stages=tuple(stages))
    rows = [(source.tokens or 0) // ROW_LENGTH // smaller for source in plan.sources]
    return Mixture(plan, ROW_LENGTH, [Nothing(n) for n in rows])


def borders(mixture: Mixture) -> np.ndarray:
    """int64 [stages + 1]: the rows at which the stages begin, and the end of the run."""
    tokens = [stage.tokens or 0 for stage in mixture.plan.stages]
    return np.cumsum([0, *tokens]) // mixture.row_length


def check_epochs(mixture: Mixture) -> tuple[list[Check], str]:
    """How often the sources are read, against shares and tokens as the paper prints them; a table of it."""
    raw = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    planned = mixture.given(len(mixture)) / [len(source) for source in mixture.sources]
    lines, apart = ["source              published   planned"], []
    for source, epochs in zip(raw["sources"], planned.tolist(), strict=True):
        tokens = [s["tokens"] * s["weights"].get(source["name"], 0) for s in raw["stages"]]
        told = sum(tokens) / source["tokens"]
        lines.append(f"{source['name']:18} {told:10.3f} {epochs:9.3f}")
        apart.append(abs(told - epochs))
    length = Check(
        "rows of the run", f"{len(mixture):,}", "2,048,000,000", len(mixture) == 2_048_000_000
    )
    seen = f"{max(apart):.4f} at most"
    return [
        length,
        Check("epochs, planned - published", seen, "0.02", max(apart) <= 0.02),
    ], "\n".join(lines)


def check_weights(mixture: Mixture) -> Check:
    """Weights are kept in whole parts of `SHARES`: what rounding does to them."""
    apart = max(
        float(np.abs(fixed_point(weights) / SHARES - weights).max())
        for weights in mixture.plan.weights[0]
    )
    what = "weights, kept - planned"
    return Check(what, f"{apart:.1e} at most", f"{1 / SHARES:.1e}", apart <= 1 / SHARES)


def check_shares(mixture: Mixture, blocks: list[np.ndarray], walk: bool, said: str) -> list[Check]:
    """Each source is within a row of its share where blocks begin and end, counted from their stage's begin.

    Args:
      mixture: with constant stages.
      blocks: of each stage, the numbers of those to look at.
      walk: also locate every row of these blocks and count them.
      said: which blocks these are.
    """
    apart, miscounted, seen = 0.0, 0, 0
    first = borders(mixture)
    for stage, (numbers, weights) in enumerate(zip(blocks, mixture.plan.weights[0], strict=True)):
        share = fixed_point(weights)
        before = mixture.given(int(first[stage]))
        for block in numbers.tolist():
            begin = int(first[stage]) + block * BLOCK
            end = min(begin + BLOCK, int(first[stage + 1]))
            at_begin, at_end = mixture.given(begin), mixture.given(end)
            for row, given in ((begin, at_begin), (end, at_end)):
                due = (row - int(first[stage])) * share / SHARES
                apart = max(apart, float(np.abs(given - before - due).max()))
            if walk:
                source = mixture.locate(np.arange(begin, end)).source
                counts = np.bincount(source, minlength=len(share))
                miscounted += int((counts != at_end - at_begin).any())
            seen += 1
    what = f"{said} ({seen:,}): rows off the share"
    checks = [Check(what, f"{apart:.4f} at most", "below 1", apart < 1)]
    if walk:
        what = f"{said}: blocks whose rows are not those counted"
        checks.append(Check(what, str(miscounted), "0", miscounted == 0))
    return checks


def check_sampled_rows(mixture: Mixture, rng: np.random.Generator, rows: int) -> list[Check]:
    """A row comes once in each epoch, and the stream has it where it is said to come."""
    total, uneven, repeated, lost = 0, 0, 0, 0
    given = mixture.given(len(mixture))
    for source, length in enumerate(len(readable) for readable in mixture.sources):
        planned = given[source] / length
        for row in rng.integers(0, length, rows).tolist():
            found = mixture.occurrences(source, row, len(mixture))
            uneven += len(found) not in (math.floor(planned), math.ceil(planned))
            repeated += sorted(epoch for _, epoch in found) != list(range(len(found)))
            at = mixture.locate(np.array([index for index, _ in found], np.int64))
            epochs = [epoch for _, epoch in found]
            lost += int((at.source != source).sum() + (at.row != row).sum())
            lost += int((at.epoch != epochs).sum())
            total += len(found)
    what = f"sampled rows ({rows * len(mixture.sources):,}): "
    return [
        Check(what + "not the planned epochs, up or down", str(uneven), "0", uneven == 0),
        Check(what + "not once in each epoch", str(repeated), "0", repeated == 0),
        Check(f"places of these rows ({total:,}): another row there", str(lost), "0", lost == 0),
    ]


def check_sampled_places(mixture: Mixture, rng: np.random.Generator, places: int) -> Check:
    """What is at a place of the stream is said to come there."""
    index = rng.integers(0, len(mixture), places)
    at, lost = mixture.locate(index), 0
    for i, source, epoch, row in zip(index, at.source, at.epoch, at.row, strict=True):
        lost += (int(i), int(epoch)) not in mixture.occurrences(int(source), int(row), int(i) + 1)
    return Check(f"sampled places ({places:,}): row not found there", str(lost), "0", lost == 0)


def check_every_row(mixture: Mixture) -> list[Check]:
    """All of a run: every epoch but a source's last has each row once, the last none twice."""
    at = mixture.locate(np.arange(len(mixture)))
    epochs, wrong = 0, 0
    for source, length in enumerate(len(readable) for readable in mixture.sources):
        mine = at.source == source
        last = int(at.epoch[mine].max())
        for epoch in range(last + 1):
            times = np.bincount(at.row[mine & (at.epoch == epoch)], minlength=length)
            least = 0 if epoch == last else 1
            wrong += not (len(times) == length and times.min() >= least and times.max() <= 1)
            epochs += 1
    counted = np.bincount(at.source, minlength=len(mixture.sources))
    apart = int(np.abs(counted - mixture.given(len(mixture))).max())
    said = f"1/{SMALLER:,} of the run, all {len(mixture):,} rows: "
    return [
        Check(f"{said}epochs ({epochs}) that are no permutation", str(wrong), "0", wrong == 0),
        Check(f"{said}rows miscounted", str(apart), "0", apart == 0),
    ]


def check(blocks: int, rows: int, seed: int) -> tuple[list[Check], str]:
    """All checks, and the table of epochs.

    Args:
      blocks: sampled from each stage.
      rows: sampled from each source.
      seed: of the samples.
    """
    rng = np.random.default_rng(seed)
    whole, small = published(), published(SMALLER)
    checks, epochs = check_epochs(whole)
    checks.append(check_weights(whole))
    sampled = []
    for length in np.diff(borders(whole)).tolist():
        last = -(-length // BLOCK) - 1
        sampled.append(np.append(rng.integers(0, last, blocks - 2), [0, last]))
    checks += check_shares(whole, sampled, True, "sampled blocks")
    checks += check_sampled_rows(whole, rng, rows)
    checks.append(check_sampled_places(whole, rng, rows * len(whole.sources)))
    every = [np.arange(-(-length // BLOCK)) for length in np.diff(borders(small)).tolist()]
    checks += check_shares(small, every, True, f"1/{SMALLER:,} of the run, all blocks")
    return checks + check_every_row(small), epochs


def main() -> None:
    """Prints the tables."""
    args, began = flags.FLAGS, time.perf_counter()
    checks, epochs = check(args.blocks, args.rows, args.seed)
    print(f"{epochs}\n")
    width = max(len(c.what) for c in checks)
    print(f"{'check':{width}}  {'seen':>16}  {'bar':>14}")
    for c in checks:
        print(f"{c.what:{width}}  {c.seen:>16}  {c.bar:>14}{'' if c.passed else '  MISSED'}")
    print(f"{time.perf_counter() - began:.0f} s")
    sys.exit(0 if all(c.passed for c in checks) else 1)


if __name__ == "__main__":
    flags.DEFINE_integer("blocks", 2000, "Blocks sampled from each stage.", lower_bound=2)
    flags.DEFINE_integer("rows", 50, "Rows sampled from each source.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the samples.")
    cli.run(main)
