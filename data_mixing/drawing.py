"""Small drawings as inline SVG, light and dark: bars, points with intervals, histograms, lines with bands.

Each function returns one <svg> element, ready for a file of its own or for a page of HTML. Series get the
colours of the reports in their order; numbers stand beside what is drawn or appear when it is pointed at.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from xml.sax.saxutils import escape

import numpy as np

from mobilellm_jax.reporting.curves import compact, linear_ticks

WIDTH, RIGHT, TOP = 900, 24, 36  # of a drawing; its margins
LETTER = 8.0  # about the width of one, at most
COLOURS = 7
_STYLE = """
  svg.mix { background: #fcfcfa; color: #1d2126; font: 13px system-ui, sans-serif; }
  .mix text { fill: currentColor; } .mix .soft { fill: #646b75; font-size: 11px; }
  .mix .title { font-size: 15px; font-weight: 600; } .mix .grid { stroke: #e3e4e0; }
  .mix .zero { stroke: #646b75; } .mix .c1 { color: #2f62c4; } .mix .c2 { color: #d2650c; }
  .mix .c3 { color: #1d8f6c; } .mix .c4 { color: #9a45b5; } .mix .c5 { color: #c2334f; }
  .mix .c6 { color: #0f86a8; } .mix .c7 { color: #857410; } .mix .full { fill: currentColor; }
  .mix .line { stroke: currentColor; stroke-width: 2; fill: none; }
  .mix .hollow { stroke: currentColor; fill: none; stroke-dasharray: 3 2; }
  .mix .band { fill: currentColor; opacity: 0.18; }
  @media (prefers-color-scheme: dark) {
    svg.mix { background: #14161a; color: #e7e8e6; } .mix .soft { fill: #9aa1ab; }
    .mix .grid { stroke: #30343b; } .mix .zero { stroke: #9aa1ab; } .mix .c1 { color: #82aaff; }
    .mix .c2 { color: #ff9d5c; } .mix .c3 { color: #52cfa5; } .mix .c4 { color: #d08ff0; }
    .mix .c5 { color: #ff7f96; } .mix .c6 { color: #55c8e8; } .mix .c7 { color: #d4c04f; }
  }
"""

Interval = tuple[float, float, float]  # value, low, high; the ends may be infinite


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line through float64 [N] points, with a band around it or none; NaN is a gap."""

    x_N: np.ndarray
    y_N: np.ndarray
    low_N: np.ndarray | None = None
    high_N: np.ndarray | None = None


def bars(
    title: str,
    series: Mapping[str, Mapping[str, float]],
    outlines: Mapping[str, Mapping[str, float]] | None = None,
    form: str = ".1%",
    note: str = "",
) -> str:
    """Horizontal bars in groups: per row, such as a source, one of each series, such as a method.

    Args:
      title: above.
      series: by its name, the value of each row, from 0 on; a row may be missing in some.
      outlines: what the values were before, drawn as hollow bars where it differs.
      form: how values are written.
      note: below, what full and hollow bars are.
    """
    outlines = outlines or {}
    rows = _rows(series)
    values = [v for of in [*series.values(), *outlines.values()] for v in of.values()]
    left, thick = _left(rows), 14
    x = _axis(0.0, max([*values, 1e-9]), left, RIGHT + 130)
    legend, y = _legend(series)
    parts, begin = [legend], y
    for row in rows:
        inside = [name for name in series if row in series[name]]
        parts.append(_label(row, left, y + len(inside) * thick / 2 + 4))
        for name in inside:
            value, outline = series[name][row], outlines.get(name, {}).get(row)
            said = f"{value:{form}}"
            width = round(x(value) - left, 1)
            drawn = (
                f'<rect class="full" x="{left}" y="{y + 2}" width="{width}" height="{thick - 4}"/>'
            )
            end = width
            if outline is not None and f"{outline:{form}}" != said:
                said = f"{outline:{form}} → {said}"
                hollow = round(x(outline) - left, 1)
                end = max(end, hollow)
                drawn += (
                    f'<rect class="hollow" x="{left}" y="{y + 1}" width="{hollow}" '
                    f'height="{thick - 2}"/>'
                )
            drawn += f"<title>{escape(f'{row}, {name}: {said}')}</title>"
            parts.append(f'<g class="{_colour(series, name)}">{drawn}</g>')
            parts.append(
                f'<text class="soft" x="{left + end + 5:.1f}" y="{y + thick - 3}">{said}</text>'
            )
            y += thick
        y += 8
    parts.append(f'<path class="zero" d="M{left} {begin}V{y - 8}"/>')
    if note:
        parts.append(f'<text class="soft" x="12" y="{y + 12}">{escape(note)}</text>')
        y += 20
    return _svg(title, parts, y + 6)


def points(
    title: str, series: Mapping[str, Mapping[str, Interval]], form: str = ".3g", note: str = ""
) -> str:
    """Per row and series a dot with its interval, over a line at 0; intervals are cut at the drawing's ends.

    Args:
      title: above.
      series: by its name, value and ends of the interval of each row; a row may be missing in some.
      form: how values are written.
      note: below the axis.
    """
    rows = _rows(series)
    known = [i for of in series.values() for i in of.values() if math.isfinite(i[0])]
    values = [0.0, *(i[0] for i in known)]
    span = (max(values) - min(values)) or 1.0
    ends = [e for i in known for e in i[1:] if math.isfinite(e)] + values
    low = max(min(values) - span, min(ends)) - 0.03 * span
    high = min(max(values) + span, max(ends)) + 0.03 * span
    left = _left(rows)
    x = _axis(low, high, left, RIGHT + 190)
    legend, y = _legend(series)
    bottom = y + sum(16 * sum(row in of for of in series.values()) + 6 for row in rows)
    parts = [legend, *_ticks(low, high, x, y, bottom, form)]
    for row in rows:
        inside = [name for name in series if row in series[name]]
        parts.append(_label(row, left, y + 8 * len(inside) + 4))
        for name in inside:
            value, first, last = series[name][row]
            y += 16
            if not math.isfinite(value):
                continue
            said = f"{value:{form}}"
            if math.isfinite(first) and math.isfinite(last):
                said += f" ({first:{form}} to {last:{form}})"
            at, y_dot = round(x(value), 1), y - 8
            parts.append(
                f'<g class="{_colour(series, name)}">'
                f'<path class="line" d="M{x(max(first, low)):.1f} {y_dot}H{x(min(last, high)):.1f}"/>'
                f'<circle class="full" cx="{at}" cy="{y_dot}" r="4"/>'
                f"<title>{escape(f'{row}, {name}: {said}')}</title></g>"
            )
            parts.append(f'<text class="soft" x="{WIDTH - RIGHT - 182}" y="{y - 4}">{said}</text>')
        y += 6
    if note:
        parts.append(f'<text class="soft" x="12" y="{bottom + 30}">{escape(note)}</text>')
    return _svg(title, parts, bottom + (40 if note else 24))


def histograms(
    title: str, samples: Mapping[str, np.ndarray], bins: int = 48, note: str = ""
) -> str:
    """Histograms of several samples over each other in the same bins, with the share of each above 0.

    The bins hold the central 99 % of all values, and a border of theirs is 0; what lies beyond is counted.

    Args:
      title: above.
      samples: by its name, finite float [N], at least one value.
      bins: about how many.
      note: below the axis.
    """
    together = np.concatenate([np.asarray(s, np.float64) for s in samples.values()])
    low, high = np.percentile(together, [0.5, 99.5])
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    width = (high - low) / bins or 1.0
    first, last = math.floor(low / width), math.ceil(high / width)
    edges = np.arange(first, max(last, first + 1) + 1) * width
    shares = {n: np.histogram(s, edges)[0] / len(s) for n, s in samples.items()}
    names = {n: f"{n}: {np.mean(np.asarray(s) > 0):.1%} above 0" for n, s in samples.items()}
    beyond = np.mean((together < edges[0]) | (together > edges[-1]))
    left, plot = 70, 200
    x = _axis(float(edges[0]), float(edges[-1]), left, RIGHT)
    legend, y = _legend(samples, names)
    bottom, top = y + plot, max(float(s.max()) for s in shares.values()) or 1.0
    up = _axis(0.0, top, bottom, 0, plot_end=y)
    parts = [legend, *_ticks(float(edges[0]), float(edges[-1]), x, y, bottom, ".3g")]
    parts += _levels(0.0, top, up, left, lambda tick: f"{tick:.3g}" if tick else "0")
    for name, share in shares.items():
        path = f"M{x(edges[0]):.1f} {bottom}"
        for begin, end, value in zip(edges[:-1], edges[1:], share, strict=True):
            path += f"H{x(begin):.1f}V{up(value):.1f}H{x(end):.1f}"
        path += f"V{bottom}"
        parts.append(
            f'<g class="{_colour(samples, name)}"><path class="band" d="{path}Z"/>'
            f'<path class="line" d="{path}"/><title>{escape(names[name])}</title></g>'
        )
    said = " ".join([note, f"Share of the values in each bin; {beyond:.1%} lie beyond the ends."])
    parts.append(f'<text class="soft" x="12" y="{bottom + 30}">{escape(said.strip())}</text>')
    return _svg(title, parts, bottom + 40)


def lines(title: str, series: Mapping[str, Curve], x_label: str = "", y_label: str = "") -> str:
    """Curves over one axis, each with a band or none; the legend has their last values.

    Args:
      title: above.
      series: the curves by name; one has a finite point at least.
      x_label: what the x axis is.
      y_label: what the y axis is.
    """
    ys = [
        np.asarray(v, np.float64)
        for c in series.values()
        for v in (c.y_N, c.low_N, c.high_N)
        if v is not None
    ]
    finite = np.concatenate([v[np.isfinite(v)] for v in ys])
    room = 0.05 * float(np.ptp(finite)) or 0.05 * abs(float(finite[0])) or 1.0
    low, high = float(finite.min()) - room, float(finite.max()) + room
    xs = np.concatenate([np.asarray(c.x_N, np.float64) for c in series.values()])
    left, plot = 70, 240
    x_low, x_high = float(xs.min()), float(xs.max())
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    x = _axis(x_low, x_high, left, RIGHT)
    names = {}
    for name, curve in series.items():
        known = np.flatnonzero(np.isfinite(curve.y_N))
        names[name] = f"{name}: {curve.y_N[known[-1]]:.4g}" if len(known) else f"{name}: none"
    legend, y = _legend(series, names)
    bottom = y + plot
    up = _axis(low, high, bottom, 0, plot_end=y)
    parts = [legend, *_ticks(x_low, x_high, x, y, bottom, "")]
    parts += _levels(low, high, up, left, compact)
    for name, curve in series.items():
        drawn = ""
        if curve.low_N is not None and curve.high_N is not None:
            ok = np.isfinite(curve.low_N) & np.isfinite(curve.high_N)
            there = [(x(a), up(b)) for a, b in zip(curve.x_N[ok], curve.high_N[ok], strict=True)]
            back = [(x(a), up(b)) for a, b in zip(curve.x_N[ok], curve.low_N[ok], strict=True)]
            if there:
                drawn += f'<path class="band" d="{_path([*there, *back[::-1]])}Z"/>'
        ok = np.isfinite(curve.y_N)
        dots = [(x(a), up(b)) for a, b in zip(curve.x_N[ok], curve.y_N[ok], strict=True)]
        if dots:
            drawn += f'<path class="line" d="{_path(dots)}"/>'
        if len(dots) <= 40:
            drawn += "".join(
                f'<circle class="full" cx="{a:.1f}" cy="{b:.1f}" r="2.5"/>' for a, b in dots
            )
        parts.append(
            f'<g class="{_colour(series, name)}">{drawn}<title>{escape(names[name])}</title></g>'
        )
    said = "; ".join(filter(None, [y_label, f"over {x_label}" if x_label else ""]))
    parts.append(f'<text class="soft" x="12" y="{bottom + 30}">{escape(said)}</text>')
    return _svg(title, parts, bottom + 40)


def page(title: str, parts: Sequence[str]) -> str:
    """A page of HTML that refers to nothing outside; the parts are elements, the title is text."""
    style = (
        ":root { color-scheme: light dark; } body { max-width: 940px; margin: 2rem auto; padding: 0 1rem; "
        "background: #fcfcfa; color: #1d2126; font: 15px/1.5 system-ui, sans-serif; } svg { max-width: 100%; "
        "height: auto; } pre { overflow-x: auto; font-size: 12px; } "
        "@media (prefers-color-scheme: dark) { body { background: #14161a; color: #e7e8e6; } }"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{style}</style></head>\n<body><h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def preformatted(text: str) -> str:
    """A table of a terminal as an element of a page."""
    return f"<pre>{escape(text)}</pre>"


def _rows(series: Mapping[str, Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(row for of in series.values() for row in of))


def _colour(series: Mapping[str, object], name: str) -> str:
    return f"c{list(series).index(name) % COLOURS + 1}"


def _left(rows: Sequence[str]) -> int:
    return min(int(LETTER * max(map(len, rows), default=0)) + 24, WIDTH // 2)


def _axis(
    low: float, high: float, begin: float, margin: float, plot_end: float | None = None
) -> Callable[[float], float]:
    """From values to places between `begin` and the right margin, or `plot_end` where one is given."""
    end = WIDTH - margin if plot_end is None else plot_end
    return lambda value: begin + (float(value) - low) / (high - low) * (end - begin)


def _ticks(
    low: float, high: float, x: Callable[[float], float], top: float, bottom: float, form: str
) -> list[str]:
    """Lines of the grid with numbers below, and the one at 0."""
    parts = []
    for tick in linear_ticks(low, high, 6):
        at, kind = f"{x(tick):.1f}", "grid" if tick else "zero"
        said = f"{tick:{form}}" if form else compact(tick)
        parts.append(f'<path class="{kind}" d="M{at} {top}V{bottom}"/>')
        parts.append(
            f'<text class="soft" text-anchor="middle" x="{at}" y="{bottom + 14}">{said}</text>'
        )
    return parts


def _levels(
    low: float, high: float, up: Callable[[float], float], left: float, said: Callable[[float], str]
) -> list[str]:
    parts = []
    for tick in linear_ticks(low, high, 4):
        at = f"{up(tick):.1f}"
        parts.append(f'<path class="grid" d="M{left} {at}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text class="soft" text-anchor="end" x="{left - 6}" y="{up(tick) + 4:.1f}">{said(tick)}</text>'
        )
    return parts


def _label(row: str, left: float, y: float) -> str:
    return f'<text text-anchor="end" x="{left - 10}" y="{y:g}">{escape(row)}</text>'


def _path(places: Sequence[tuple[float, float]]) -> str:
    return "M" + " ".join(f"{a:.1f} {b:.1f}" for a, b in places)


def _legend(
    series: Mapping[str, object], names: Mapping[str, str] | None = None
) -> tuple[str, int]:
    """A square and a name per series, in as many lines as they need; and where the drawing begins."""
    parts, x, y = [], 12.0, TOP
    for name in series:
        said = (names or {}).get(name, name)
        width = LETTER * len(said) + 34
        if x > 12 and x + width > WIDTH:
            x, y = 12.0, y + 18
        parts.append(
            f'<g class="{_colour(series, name)}"><rect class="full" x="{x:.0f}" y="{y}" width="10" '
            f'height="10"/></g><text x="{x + 15:.0f}" y="{y + 9}">{escape(said)}</text>'
        )
        x += width
    return "".join(parts), y + 22


def _svg(title: str, parts: Sequence[str], height: float) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="mix" viewBox="0 0 {WIDTH} {height:g}" '
        f'width="{WIDTH}">\n<style>{_STYLE}</style>\n'
        f'<text class="title" x="12" y="22">{escape(title)}</text>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )
