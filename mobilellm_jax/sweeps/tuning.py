"""Which runs a sweep needs next: the values of tuned rows first, then all seeds at the best value.

Everything is a function of what is complete, so a sweep that was stopped goes on as if it never was.
"""

import math
from collections.abc import Collection, Mapping, Sequence

from mobilellm_jax.sweeps.description import Cell, Sweep, Tuned, cell_name
from mobilellm_jax.sweeps.outcomes import Outcome


def untried(values: Sequence[float], start: float, losses: Mapping[float, float]) -> list[float]:
    """Values that must be tried before the best is known to be no worse than both its neighbours.

    Walks downhill from `start`, which finds the lowest loss where there is one valley.

    Args:
      values: the scale, in order.
      start: the value to begin at.
      losses: what the values tried so far gave; infinite where training failed.
    """
    at = values.index(min(losses, key=lambda value: losses[value]) if losses else start)
    return [value for value in values[max(at - 1, 0) : at + 2] if value not in losses]


def losses_of(
    sweep: Sweep, row: str, outcomes: Collection[Outcome], failed: Collection[str]
) -> dict[float, float]:
    """Held-out bits per byte of the values of a tuned row tried so far, infinite where one failed."""
    described = sweep.tuned(row)
    found = {
        o.value: o.bits_per_byte
        for o in outcomes
        if o.row == row and o.seed == sweep.tuning_seed and o.value in described.values
    }
    for value in described.values:
        if cell_name(row, sweep.tuning_seed, value) in failed:
            found[value] = math.inf
    return {value: found[value] for value in described.values if value in found}


def chosen(
    sweep: Sweep, outcomes: Collection[Outcome], failed: Collection[str]
) -> dict[str, float]:
    """The value of each tuned row for which it is known."""
    found = {}
    for name, row in sweep.rows.items():
        if isinstance(row, Tuned):
            losses = losses_of(sweep, name, outcomes, failed)
            if losses and not untried(row.values, row.start, losses):
                best = min(losses, key=lambda value: losses[value])
                if math.isfinite(losses[best]):
                    found[name] = best
    return found


def needed(
    sweep: Sweep, outcomes: Collection[Outcome], failed: Collection[str]
) -> tuple[list[Cell], list[Cell]]:
    """The runs that are still needed.

    Args:
      sweep: the rows and seeds.
      outcomes: of complete cells.
      failed: names of cells that failed, which are not tried again.

    Returns:
      The cells that can be trained now, those that decide a value first, then one seed after the
      other, so that the tables fill evenly; and stand-ins for those whose value is not yet known,
      which tell how much there is to come.
    """
    complete = {(o.row, o.seed, o.value) for o in outcomes}
    best = chosen(sweep, outcomes, failed)
    now, later = [], []
    for name, row in sweep.rows.items():
        if isinstance(row, Tuned) and name not in best:
            losses = losses_of(sweep, name, outcomes, failed)
            values = untried(row.values, row.start, losses)
            now += [sweep.cell(name, sweep.tuning_seed, value) for value in values]
            if values:
                later += [sweep.cell(name, seed, row.start) for seed in sweep.seeds]
    for seed in sweep.seeds:
        for name, row in sweep.rows.items():
            value = best.get(name)
            if isinstance(row, Tuned) and value is None:
                continue
            if (name, seed, value) not in complete and cell_name(name, seed, value) not in failed:
                now.append(sweep.cell(name, seed, value))
    return now, later
