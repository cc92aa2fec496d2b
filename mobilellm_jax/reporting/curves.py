"""Curves as stretchable inline SVG, with the numbers a reader sees when pointing at them.

The SVG of a chart holds lines only, in a fixed box that the browser stretches to any width; labels
are HTML beside it, so that text keeps its size on a phone. Long runs are thinned to bins that keep
the lowest and the highest value, so that no spike is lost.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

WIDTH, HEIGHT = 2000, 1000  # the box of a chart; one unit is below half a pixel on any screen
MAX_BINS = 1000
MAX_NUMBERS = 24_000  # bins times lines of one page, which bounds its size whatever the run
LOG_RATIO = 3.0  # above this ratio of highest to lowest value a logarithmic scale reads better
MAX_MARKS = 60


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve: float64 [N] values at the steps of its chart, in a colour, 0 to 7, of the page."""

    name: str
    values_N: np.ndarray
    colour: int = 0
    dashed: bool = False


@dataclasses.dataclass(frozen=True)
class Axis:
    """The x axis of several charts: measured steps, and how they are thinned.

    Bin c holds the measurements `edges_C[c]` up to the next edge; it is shown at its middle one.
    The axis runs over `domain`, which charts of other steps share: all can be read together.
    """

    steps_N: np.ndarray
    tokens_N: np.ndarray
    edges_C: np.ndarray
    domain: tuple[int, int]

    @property
    def middle_C(self) -> np.ndarray:
        """int64 [C]: index of the measurement that stands for a bin on the x axis."""
        return (self.edges_C + np.append(self.edges_C[1:], len(self.steps_N)) - 1) // 2

    def place(self, steps: np.ndarray | float) -> np.ndarray:
        """Where steps lie on the x axis, from 0 to 1."""
        first, last = self.domain
        return (np.asarray(steps) - first) / max(last - first, 1)

    def ticks(self) -> list[dict[str, Any]]:
        """Round steps, with the tokens trained on until there."""
        first, last = self.domain
        found = linear_ticks(first, last, 5)
        tokens = np.interp(found, self.steps_N, self.tokens_N)
        short = found[-1] >= 100_000 and all(s % 1000 == 0 for s in found)
        return [
            {
                "at": 100 * float(self.place(s)),
                "step": compact(s) if short else f"{s:,.0f}",
                "tokens": compact(t),
            }
            for s, t in zip(found, tokens, strict=True)
            if s == int(s)
        ]

    def numbers(self) -> dict[str, list[Any]]:
        """What the page's script needs to say where the pointer is."""
        return {
            "step": self.steps_N[self.middle_C].tolist(),
            "tokens": [compact(t) for t in self.tokens_N[self.middle_C]],
        }


def axis(steps_N: np.ndarray, tokens_N: np.ndarray, domain: tuple[int, int], lines: int) -> Axis:
    """The x axis of charts with `lines` curves in all: at most 1,000 bins of equally many steps."""
    n = len(steps_N)
    bins = min(n, MAX_BINS, max(MAX_NUMBERS // max(lines, 1), 100))
    return Axis(steps_N, tokens_N, np.arange(bins, dtype=np.int64) * n // max(bins, 1), domain)


def extremes(values_N: np.ndarray, edges_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest finite value of each bin, float64 [C]; NaN where a bin has none."""
    finite_N = np.where(np.isfinite(values_N), values_N, np.nan)
    return np.fmin.reduceat(finite_N, edges_C), np.fmax.reduceat(finite_N, edges_C)


def smooth(values_N: np.ndarray, geometric: bool = False) -> np.ndarray:
    """Moving average over 4 % of the steps, float64 [N]; NaN where the window is empty.

    The window is centred and narrows towards the first step, where curves are steepest; values that
    are not finite (or, for a geometric mean, not positive) are left out.
    """
    if geometric:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.exp(smooth(np.log(values_N)))
    n = len(values_N)
    index_N = np.arange(n)
    reach_N = np.minimum(index_N, max(n // 50, 1))
    low_N, high_N = index_N - reach_N, np.minimum(index_N + reach_N + 1, n)
    finite_N = np.isfinite(values_N)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite_N, values_N, 0.0))])
    count = np.concatenate([[0], np.cumsum(finite_N)])
    inside_N = count[high_N] - count[low_N]
    mean_N = (total[high_N] - total[low_N]) / np.maximum(inside_N, 1)
    return np.where(inside_N > 0, mean_N, np.nan)


def chart(
    title: str,
    lines: Sequence[Line],
    axis: Axis,
    unit: str = "",
    from_zero: bool = False,
    exact: bool = False,
    geometric: bool = False,
    wide: bool = False,
) -> dict[str, Any] | None:
    """All that the page needs to draw one chart; None when no line has a finite value.

    Args:
      title: what is shown.
      lines: the curves, each with a value per step of the axis.
      axis: the x axis.
      unit: of the values.
      from_zero: the y axis starts at zero and is linear; otherwise it fits the values and is
        logarithmic when they span more than a factor of `LOG_RATIO`.
      exact: a few precise measurements, shown as dots on an unsmoothed line.
      geometric: the thick line is the geometric mean, which one spike does not carry away.
      wide: takes the whole width of the page.
    """
    bands = [extremes(line.values_N, axis.edges_C) for line in lines]
    finite = np.concatenate([[], *(band[np.isfinite(band)] for pair in bands for band in pair)])
    if not len(finite):
        return None
    scale = _scale(float(finite.min()), float(finite.max()), from_zero)
    x_C = np.rint(WIDTH * axis.place(axis.steps_N[axis.middle_C]))
    drawn = []
    for line, (low_C, high_C) in zip(lines, bands, strict=True):
        if not np.isfinite(low_C).any():
            continue
        centre_C = (line.values_N if exact else smooth(line.values_N, geometric))[axis.middle_C]
        raw = np.stack([low_C, high_C], axis=1).ravel()
        drawn.append(
            {
                "name": line.name,
                "colour": line.colour,
                "dashed": line.dashed,
                "path": _path(x_C, scale.place(centre_C)),
                "raw": "" if exact else _path(np.repeat(x_C, 2), scale.place(raw)),
                "dots": _dots(x_C, scale.place(centre_C)) if exact else "",
                "numbers": {
                    "name": line.name,
                    "colour": line.colour,
                    "centre": _rounded(centre_C),
                    "low": [] if exact else _rounded(low_C),
                    "high": [] if exact else _rounded(high_C),
                },
            }
        )
    return {
        "title": title,
        "unit": unit,
        "logarithmic": scale.logarithmic,
        "wide": wide,
        "lines": drawn,
        "y": [{"at": 100 * float(1 - scale.share(v)), "label": compact(v)} for v in scale.ticks],
        "x": axis.ticks(),
    }


def marks(axis: Axis, resumed: Sequence[int], skipped: Sequence[int]) -> list[dict[str, Any]]:
    """Vertical lines for resumes and skipped steps; of very many, some that are evenly spread."""
    found = []
    for kind, steps in (("resumed", resumed), ("skipped", skipped)):
        inside = [s for s in steps if axis.domain[0] <= s <= axis.domain[1]]
        stride = math.ceil(len(inside) / MAX_MARKS) or 1
        found += [{"kind": kind, "step": s, "at": float(axis.place(s))} for s in inside[::stride]]
    return found


def compact(value: float) -> str:
    """A number for people, three digits: 950, 12.4k, 3.1M, 4.2T, 0.0031, 6e-05."""
    if not math.isfinite(value):
        return "–"
    rounded = float(f"{value:.3g}")
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(rounded) >= max(unit, 10_000):
            return f"{rounded / unit:.3g}{suffix}"
    return f"{value:,.0f}" if abs(rounded) >= 1000 else f"{rounded:.3g}"


def linear_ticks(low: float, high: float, about: int) -> list[float]:
    """About so many round numbers from `low` to `high`, 1, 2 or 5 times a power of ten apart."""
    if high <= low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    distance = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / distance - 1e-9), math.floor(high / distance + 1e-9)
    return [round(i * distance, 12) for i in range(first, last + 1)]


@dataclasses.dataclass(frozen=True)
class _Scale:
    """The y axis: `low` at the bottom, `high` at the top."""

    low: float
    high: float
    logarithmic: bool
    ticks: list[float]

    def share(self, values: np.ndarray | float) -> np.ndarray:
        values = np.asarray(values, dtype=np.float64)
        if self.logarithmic:
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.log(values / self.low) / math.log(self.high / self.low)
        return (values - self.low) / (self.high - self.low)

    def place(self, values: np.ndarray) -> np.ndarray:
        return np.rint(HEIGHT * (1 - self.share(values)))


def _scale(low: float, high: float, from_zero: bool) -> _Scale:
    if from_zero:
        top = (max(high, 0.0) or 1.0) * 1.06
        return _Scale(0.0, top, False, linear_ticks(0.0, top, 4))
    if low > 0 and high / low > LOG_RATIO:
        low, high = low / (high / low) ** 0.04, high * (high / low) ** 0.04
        return _Scale(low, high, True, _log_ticks(low, high))
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - room, high + room
    return _Scale(low, high, False, linear_ticks(low, high, 4))


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        found = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(found) >= 4:
            stride = math.ceil(len(found) / 8)
            return [float(f"{value:.3g}") for value in found[::stride]]
    return linear_ticks(low, high, 4)


def _path(x_C: np.ndarray, y_C: np.ndarray) -> str:
    """SVG path through the finite points; a gap is bridged, for a source may miss many steps."""
    keep = np.isfinite(y_C)
    points = [f"{int(x)} {int(y)}" for x, y in zip(x_C[keep], y_C[keep], strict=True)]
    # A run whose neighbouring points fall together needs them only once.
    points = [p for i, p in enumerate(points) if i == 0 or p != points[i - 1]]
    return "M" + " ".join(points)


def _dots(x_C: np.ndarray, y_C: np.ndarray) -> str:
    """SVG path of lines without length, which round caps turn into dots of any stretched box."""
    keep = np.isfinite(y_C)
    return "".join(f"M{int(x)} {int(y)}h0" for x, y in zip(x_C[keep], y_C[keep], strict=True))


def _rounded(values_C: np.ndarray) -> list[float | None]:
    return [float(f"{v:.4g}") if math.isfinite(v) else None for v in values_C.tolist()]
