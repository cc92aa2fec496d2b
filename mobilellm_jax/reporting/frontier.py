"""Sizes of a family of networks against what they cost and what they can: one drawing, one table."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape

from mobilellm_jax.reporting.curves import compact, linear_ticks
from mobilellm_jax.tables import markdown_table

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 320, 64, 24, 40, 52  # of a panel; its margins
_STYLE = """
  svg { background: #fcfcfa; color: #1d2126; font: 13px system-ui, sans-serif; }
  text { fill: currentColor; } .soft { fill: #646b75; font-size: 11px; } .grid { stroke: #e3e4e0; }
  .title { font-size: 15px; font-weight: 600; } .line { stroke: #2f62c4; stroke-width: 2; fill: none; }
  .on { fill: #2f62c4; } .off { fill: none; stroke: #646b75; }
  @media (prefers-color-scheme: dark) {
    svg { background: #14161a; color: #e7e8e6; } .soft { fill: #9aa1ab; } .grid { stroke: #30343b; }
    .line { stroke: #82aaff; } .on { fill: #82aaff; } .off { stroke: #9aa1ab; }
  }
"""


@dataclasses.dataclass(frozen=True)
class Member:
    """A network of a family, measured."""

    name: str
    parameters: int
    bits_per_byte: float  # of held-out rows, all sources
    token_ms: float  # to draw one token, one row at a time
    prompt_ms: float  # to read the prompt
    megabytes: float  # of the exported weights, 10^6 bytes
    accuracy: float = math.nan  # mean over tasks; NaN: none was asked
    checkpoint: str = ""  # what it was made from


def best(members: Sequence[Member], cost: Callable[[Member], float]) -> list[Member]:
    """Those that no other beats in quality at the same cost or less, by rising cost."""
    found: list[Member] = []
    for member in sorted(members, key=lambda m: (cost(m), m.bits_per_byte)):
        if not found or member.bits_per_byte < found[-1].bits_per_byte:
            found.append(member)
    return found


def table(members: Sequence[Member]) -> str:
    """A line for each, the largest first, in Markdown."""
    lines = [
        ["", "parameters", "MB", "bits per byte", "ms per token", "ms for the prompt", "accuracy"]
    ]
    for m in sorted(members, key=lambda m: -m.parameters):
        accuracy = "" if math.isnan(m.accuracy) else f"{m.accuracy:.1%}"
        numbers = f"{m.parameters:,}", f"{m.megabytes:,.1f}", f"{m.bits_per_byte:.3f}"
        lines.append([m.name, *numbers, f"{m.token_ms:.2f}", f"{m.prompt_ms:.1f}", accuracy])
    return markdown_table(lines, "<>>>>>>")


def drawing(members: Sequence[Member]) -> str:
    """Bits per byte against parameters and against the time of a token, as one SVG."""
    panels = (
        ("Size and quality", "parameters", lambda m: m.parameters),
        ("Latency and quality", "ms per token", lambda m: m.token_ms),
    )
    parts = [
        f'<g transform="translate({i * WIDTH} 0)">{_panel(title, axis, members, cost)}</g>'
        for i, (title, axis, cost) in enumerate(panels)
    ]
    size = f'viewBox="0 0 {2 * WIDTH} {HEIGHT}" width="{2 * WIDTH}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<style>{_STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _panel(
    title: str, axis: str, members: Sequence[Member], cost: Callable[[Member], float]
) -> str:
    x, x_ticks = _scale([cost(m) for m in members], LEFT, WIDTH - RIGHT)
    y, y_ticks = _scale([m.bits_per_byte for m in members], HEIGHT - BOTTOM, TOP)
    parts = [f'<text class="title" x="{LEFT}" y="22">{escape(title)}</text>']
    for tick in x_ticks:
        parts.append(f'<path class="grid" d="M{x(tick)} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(_soft(x(tick), HEIGHT - BOTTOM + 16, compact(tick), "middle"))
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick)}H{WIDTH - RIGHT}"/>')
        parts.append(_soft(LEFT - 8, y(tick) + 4, compact(tick), "end"))
    parts.append(_soft(WIDTH - RIGHT, HEIGHT - 12, axis, "end"))
    parts.append(_soft(LEFT, HEIGHT - 12, "bits per byte, held out", "start"))
    frontier = best(members, cost)
    line = " ".join(f"{x(cost(m))},{y(m.bits_per_byte)}" for m in frontier)
    parts.append(f'<polyline class="line" points="{line}"/>')
    for m in members:
        kind = "on" if m in frontier else "off"
        parts.append(
            f'<circle class="{kind}" cx="{x(cost(m))}" cy="{y(m.bits_per_byte)}" r="4.5"/>'
        )
        side = "end" if x(cost(m)) > WIDTH / 2 else "start"
        parts.append(_soft(x(cost(m)), y(m.bits_per_byte) - 9, escape(m.name), side))
    return "".join(parts)


def _soft(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="soft" text-anchor="{anchor}" x="{x}" y="{y}">{text}</text>'


def _scale(
    values: Sequence[float], begin: float, end: float
) -> tuple[Callable[[float], float], list[float]]:
    """From values, with a tenth of room at both ends, to the drawing; and round values to mark."""
    low, high = min(values), max(values)
    room = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - room, high + room
    ticks = linear_ticks(low, high, 5)
    return lambda v: round(begin + (v - low) / (high - low) * (end - begin), 1), ticks
