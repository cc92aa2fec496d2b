"""How long a run is, and which rows each of its steps reads: arithmetic on the configuration alone.

Only a length in epochs asks for more, the number of rows, which the plan knows. All that asks for
the rows of a step asks here: the loop, a replay, the record of what was read, the check against the
plan's end. So a resumed run, a forked one and a replay read the same rows.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from mobilellm_jax.data.mixture import Mixture, batches
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Phase:
    """Steps of one size, up to the next phase."""

    step: int  # steps done before it
    rows: int  # rows of the plan consumed before it
    batch: int  # rows of each of its steps, over all devices


@dataclasses.dataclass(frozen=True)
class Length:
    """The steps of a run, 1 to `steps`; phases in order, the first one at step 0."""

    phases: tuple[Phase, ...]
    steps: int
    row_length: int

    def batch(self, step: int) -> int:
        """Rows that a step reads."""
        return self._phase(step - 1).batch

    def rows(self, step: int) -> int:
        """Rows of the plan consumed when a step is done, with those of runs before (`first_row`)."""
        phase = self._phase(step)
        return phase.rows + (step - phase.step) * phase.batch

    def step_of(self, row: int) -> int:
        """The step that reads a row of the plan, from `rows(0)` on."""
        phase = [phase for phase in self.phases if phase.rows <= row][-1]
        return phase.step + (row - phase.rows) // phase.batch + 1

    @property
    def tokens(self) -> int:
        """Targets of the whole run, padding included."""
        return (self.rows(self.steps) - self.rows(0)) * self.row_length

    def _phase(self, done: int) -> Phase:
        """The phase in which the run is after so many steps."""
        return [phase for phase in self.phases if phase.step <= max(done, 0)][-1]


def length_of(config: Mapping[str, Any]) -> Length:
    """The length that a configuration describes; older ones, which lack keys, too.

    A phase of `batch_ramp` ends with the first step that reaches its tokens, and a run of
    `config.tokens` or `config.epochs` ends likewise: no step is cut.

    Raises:
      UserError: not exactly one of steps, tokens and epochs is set, the ramp does not rise, or the
        rows of an epoch are not known.
    """
    steps, tokens = config.get("steps", 0), config.get("tokens", 0)
    epochs = config.get("epochs", 0.0)
    given = steps, tokens, epochs
    if sum(value > 0 for value in given) != 1 or min(given) < 0 or not math.isfinite(epochs):
        raise UserError(
            f"config.steps={steps}, config.tokens={tokens} and config.epochs={epochs:g}: set one of "
            "them, the length of the run (steps and tokens to at least 1), and the others to 0."
        )
    if epochs:  # of the decimal number that is written there: 0.1 of 30 rows are 3
        tokens = math.ceil(Fraction(str(epochs)) * epoch_rows(config)) * config["row_length"]
    row_length = config["row_length"]
    phases = [Phase(0, config.get("first_row", 0), config["global_batch"])]
    before = 0  # tokens
    for entry in config.get("batch_ramp", ()):
        rows, until = _ramp_entry(entry, before)
        done, before = phases[-1], until
        read = (done.rows - phases[0].rows) * row_length
        count = max(-((read - until) // (rows * row_length)), 0)
        phases[-1] = dataclasses.replace(done, batch=rows)
        after = Phase(done.step + count, done.rows + count * rows, config["global_batch"])
        phases.append(after)
    if tokens:
        begun = [p for p in phases if (p.rows - phases[0].rows) * row_length < tokens]
        last = begun[-1]
        left = tokens - (last.rows - phases[0].rows) * row_length
        steps = last.step + -(-left // (last.batch * row_length))
    found = [phase for phase in phases if phase.step < steps]
    # Of phases that begin at the same step only the last has steps.
    kept = {phase.step: phase for phase in found}.values()
    return Length(tuple(kept), steps, row_length)


def epoch_rows(config: Mapping[str, Any]) -> int:
    """Rows of the run's length that the sources of its plan have together; no source is opened.

    Sources without a share in any stage are left out.

    Raises:
      UserError: there is no plan, or it does not know how much its sources hold.
    """
    epochs, path = config["epochs"], config.get("plan", "")
    instead = "or set config.steps and config.epochs=0."
    if not path:
        raise UserError(
            f"config.epochs={epochs:g} counts the rows of a plan, and config.plan is empty: name a "
            f"mixture.json, {instead}"
        )
    try:
        plan = Plan.load(path)
    except UserError as error:
        raise UserError(
            f"config.epochs={epochs:g} counts the rows of a plan, but {str(error).rstrip('.')}; "
            f"{instead}"
        ) from None
    shares = np.sum(plan.weights, axis=(0, 1))
    read = [source for source, share in zip(plan.sources, shares, strict=True) if share > 0]
    if unknown := [source.name for source in read if source.tokens is None]:
        raise UserError(
            f"config.epochs={epochs:g} counts the rows of {path}, which does not know how many "
            f"{', '.join(unknown)} has: tie it to prepared data (`python -m mobilellm_jax.plan`), "
            f"{instead}"
        )
    # Longer or shorter rows than those that are stored: as many as `data.contexts` makes of them.
    return sum(int(source.tokens or 0) // config["row_length"] for source in read)


def microbatches(config: Mapping[str, Any], rows: int) -> int:
    """Parts of a step of so many rows: as few as let none be larger than those of `global_batch`."""
    return -(-rows * config["microbatches"] // config["global_batch"])


def possible_microbatches(config: Mapping[str, Any], devices: int) -> list[int]:
    """The numbers of microbatches, rising, with which steps of every size split evenly over devices."""
    whole = config["global_batch"]
    batches = {phase.batch for phase in length_of(config).phases} | {whole}

    def even(count: int, rows: int) -> bool:
        parts = microbatches({"microbatches": count, "global_batch": whole}, rows)
        return rows % (parts * devices) == 0

    most = whole // devices
    return [k for k in range(1, most + 1) if all(even(k, rows) for rows in batches)]


def stream(
    mixture: Mixture, length: Length, step: int, process: int, processes: int, **ahead: int
) -> Iterator[dict[str, np.ndarray]]:
    """This process's part of the batch of every step after `step`, without end.

    Args:
      mixture: what is read.
      length: which rows, by step.
      step: steps already done.
      process: see `data.mixture.batches`, as for those below.
      processes: number of processes.
      **ahead: `prefetch`, `readers`, `workers`.
    """
    ends = [phase.step for phase in length.phases[1:]]
    for phase, end in itertools.zip_longest(length.phases, ends):
        if end is None or step < end:
            parts = batches(mixture, length.rows(step), phase.batch, process, processes, **ahead)
            with contextlib.closing(parts):  # what reads ahead ends with its phase
                yield from parts if end is None else itertools.islice(parts, end - step)
            step = end


def _ramp_entry(entry: Any, before: int) -> tuple[int, int]:
    """(rows per step, tokens at which they end), checked."""
    if isinstance(entry, tuple | list) and len(entry) == 2:
        rows, until = entry
        if isinstance(rows, int) and isinstance(until, int) and rows > 0 and until > before:
            return rows, until
    raise UserError(
        f"config.batch_ramp holds {entry!r}: it is a tuple of (rows per step, tokens at which they end), "
        "both whole numbers, the tokens rising; behind the last one comes config.global_batch."
    )
