"""Shares to whole rows: fixed-point weights, rows due at every border, and caps on repetition."""

from collections.abc import Sequence

import numpy as np

from mobilellm_jax.errors import UserError

SHARES = 1 << 22  # fixed-point weights sum to this


def fixed_point(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """int64 weights that sum to `SHARES`, by largest remainder; 0 stays 0, none else falls below 1.

    Raises:
      UserError: a weight is too small to be told from zero (1 / 8,388,608).
    """
    exact = np.asarray(weights, np.float64)
    positive = exact > 0
    exact = exact / exact.sum() * SHARES
    if exact[positive].min() < 0.5:
        raise UserError(
            f"a weight of {exact[positive].min() / SHARES:.3g} is below the resolution of a mixture, "
            f"{0.5 / SHARES:.3g}: leave that source out or raise its weight."
        )
    whole = np.maximum(np.floor(exact).astype(np.int64), positive)
    order = np.argsort(np.where(positive, whole - exact, 1.0), kind="stable")  # remainders, falling
    # `whole` may exceed the sum by the few weights that were lifted to 1: those are last in this
    # order.
    missing = SHARES - int(whole.sum())
    if missing >= 0:
        whole[order[:missing]] += 1
    else:
        whole[np.argmax(whole)] += missing
    return whole


def just_in_time(due: np.ndarray, unit: int) -> np.ndarray:
    """Whole rows of each source at every border, each within one of what is due.

    The just-in-time sequencing problem (Steiner and Yeomans 1993): from border to border, each
    source gets the rows that are overdue, and those that are left over go to the sources whose next
    row falls due first.

    Args:
      due: int64 [borders, sources], from zeros on, never falling: what is due of each source, in
        `1 / unit` of a row. Every border's sum is a multiple of `unit`.
      unit: what makes a row.

    Returns:
      int64 [borders, sources]: never falling, every border's sum that of `due`, and each entry
      within one row of it; exact where `due` is whole for all.
    """
    borders, sources = due.shape
    totals = due.sum(axis=1) // unit
    table = np.zeros_like(due)
    # The border at which each source's next row must have been given.
    deadline, every = np.zeros(sources, np.int64), np.arange(sources)
    for border in range(1, borders):
        count = np.maximum(table[border - 1], due[border] // unit)
        while True:
            early = deadline < borders
            at = np.minimum(deadline, borders - 1)
            early &= due[at, every] < (count + 1) * unit
            if not early.any():
                break
            deadline += early
        room = -(-due[border] // unit) > count  # at most one row ahead of what is due
        spare = int(totals[border] - count.sum())
        order = np.argsort(np.where(room, deadline, borders + 1), kind="stable")
        count[order[:spare]] += 1
        table[border] = count
    return table


def water_fill(
    weights: np.ndarray, budgets: np.ndarray, caps: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weights under which no source gives more than its cap; the excess goes to the others.

    A source that would give more is lowered by one factor in all stages, and what it leaves in a
    stage goes to the sources that are not at their cap, in proportion to their weights there; until
    none gives more. With one stage: w' = min(w, cap / budget), the rest in proportion.

    Args:
      weights: [stages, sources], each stage summing to 1.
      budgets: [stages], tokens.
      caps: [sources], tokens that each source may give in all stages; infinite for no cap.

    Returns:
      The weights, [stages, sources], and the tokens of each stage that no source may give, [stages]:
      zero unless the caps are impossible.
    """
    wanted = budgets @ weights
    capped = np.zeros(len(caps), bool)
    while True:
        factor = np.where(capped, caps / np.where(wanted > 0, wanted, 1), 1.0)
        held = (weights * factor * capped).sum(axis=1)
        free = (weights * ~capped).sum(axis=1)
        scale = np.where(free > 0, (1 - held) / np.where(free > 0, free, 1), 0.0)
        out = np.where(capped, weights * factor, weights * scale[:, None])
        over = ~capped & (budgets @ out > caps * (1 + 1e-12))
        if not over.any():
            return out, budgets * np.maximum(1 - out.sum(axis=1), 0.0) * (free <= 0)
        capped |= over
