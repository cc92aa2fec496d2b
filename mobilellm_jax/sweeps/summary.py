"""Outcomes as tables: for a terminal, for a page in Markdown, and drawn with their intervals."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from xml.sax.saxutils import escape

from mobilellm_jax.reporting.curves import compact, linear_ticks
from mobilellm_jax.sweeps import tuning
from mobilellm_jax.sweeps.description import Line, Sweep, Table, Tuned
from mobilellm_jax.sweeps.outcomes import Outcome
from mobilellm_jax.sweeps.statistics import Estimate, estimate, verdict
from mobilellm_jax.tables import aligned, markdown_table

HEADER: tuple[str, ...] = (
    "row",
    "parameters",
    "tokens",
    "MFLOP/token",
    "seconds",
    "seeds",
    "bits/byte",
)
HEADER += ("difference", "from", "verdict")
ALIGNMENT = "<>>>>>>><<"

TUNING_NOTE = (
    "Held-out bits per byte of each value on seed {seed}, which no other table shows. From the value where "
    "it began the search went on until both neighbours of the best were worse or the scale ended; the "
    "value in bold was taken for all seeds."
)

NOTE = (
    "Bits per byte of the held-out rows at the last step, mean over seeds; lower is better. A seed decides "
    "initial weights and order of the data, the same order for all rows. ± is Student's 95 % interval. "
    "Differences are taken seed by seed, and called better or worse where their interval leaves out 0; "
    "each interval holds by itself, so about one verdict in twenty is chance."
)

WIDTH, LEFT, RIGHT, LINE_HEIGHT = 900, 240, 230, 24  # of the drawing
_STYLE = """
  svg { background: #fcfcfa; color: #1d2126; font: 13px system-ui, sans-serif; }
  .soft { fill: #646b75; font-size: 11px; } .grid { stroke: #e3e4e0; } text { fill: currentColor; }
  .title { font-size: 15px; font-weight: 600; } .better { color: #1a7f4b; } .worse { color: #c0342c; }
  .interval { stroke: currentColor; stroke-width: 2; } .seed { fill: currentColor; opacity: 0.35; }
  .mean { fill: currentColor; }
  @media (prefers-color-scheme: dark) {
    svg { background: #14161a; color: #e7e8e6; } .soft { fill: #9aa1ab; } .grid { stroke: #30343b; }
    .better { color: #4cc38a; } .worse { color: #f2766d; }
  }
"""


@dataclasses.dataclass(frozen=True)
class Result:
    """A line of a table with all that is known of it; `outcomes` by seed, none while none is complete."""

    line: Line
    outcomes: Mapping[int, Outcome]
    difference: Estimate | None  # from the row it is compared with, over the seeds both have
    against: str  # label of that row

    @property
    def bits(self) -> list[float]:
        """Bits per byte of each seed."""
        return [outcome.bits_per_byte for outcome in self.outcomes.values()]

    @property
    def verdict(self) -> str:
        """In words; "" where the row is compared with none."""
        return verdict(self.difference) if self.difference else ""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """How the value of a tuned row was found."""

    row: str
    tuned: Tuned
    losses: Mapping[float, float]  # infinite where training failed
    chosen: float | None


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is known of a sweep."""

    tables: Mapping[Table, Sequence[Result]]
    tunings: Sequence[Tuning] = ()
    tuning_seed: int = 0

    @classmethod
    def of(cls, sweep: Sweep, outcomes: Sequence[Outcome], failed: Collection[str]) -> "Summary":
        """Orders outcomes by table and line.

        Args:
          sweep: the tables and rows.
          outcomes: of complete cells.
          failed: names of the cells that failed.
        """
        chosen = tuning.chosen(sweep, outcomes, failed)
        found = [
            Tuning(name, row, tuning.losses_of(sweep, name, outcomes, failed), chosen.get(name))
            for name, row in sweep.rows.items()
            if isinstance(row, Tuned)
        ]
        shown = [o for o in outcomes if o.seed in sweep.seeds and o.value == chosen.get(o.row)]
        tables = {table: results(table, shown) for table in sweep.tables}
        return cls(tables, found, sweep.tuning_seed)


def results(table: Table, outcomes: Sequence[Outcome]) -> list[Result]:
    """The lines of a table, in order."""
    by_row: dict[str, dict[int, Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.seed):
        by_row.setdefault(outcome.row, {})[outcome.seed] = outcome
    labels = {line.row: line.label for line in table.lines}
    found = []
    for line in table.lines:
        own, other = by_row.get(line.row, {}), by_row.get(line.against, {})
        pairs = [own[s].bits_per_byte - other[s].bits_per_byte for s in own if s in other]
        difference = estimate(pairs) if pairs else None
        found.append(Result(line, own, difference, labels.get(line.against, line.against)))
    return found


def text(summed: Summary) -> str:
    """The tables for a terminal."""
    parts = [
        f"{table.title}\n{aligned([HEADER, *map(_texts, lines)], ALIGNMENT)}"
        for table, lines in summed.tables.items()
    ]
    parts += [f"{key}\n{aligned(lines, sides)}" for key, lines, sides in _tuning_tables(summed)]
    return "\n\n".join(parts)


def markdown(summed: Summary, drawing: str) -> str:
    """A page with all tables, the name of their drawing, and what the numbers are."""
    parts = [f"![{' '.join(NOTE.split()[:4])}]({drawing})"]
    for table, lines in summed.tables.items():
        cells = markdown_table([HEADER, *map(_texts, lines)], ALIGNMENT)
        parts.append(f"## {table.title}\n\n{cells}")
    everything = [o for lines in summed.tables.values() for r in lines for o in r.outcomes.values()]
    parts.append(f"{NOTE} {_machines(everything)}")
    for key, tried, sides in _tuning_tables(summed):
        bold = [[f"**{c[1:]}**" if c.startswith("*") else c for c in line] for line in tried]
        parts.append(f"## How {key} was chosen\n\n{markdown_table(bold, sides)}")
    if summed.tunings:
        parts.append(TUNING_NOTE.format(seed=summed.tuning_seed))
    return "\n\n".join(parts) + "\n"


def _tuning_tables(summed: Summary) -> list[tuple[str, list[list[str]], str]]:
    """Per tuned key: its name, cells with a column per value, the chosen with `*`, and alignment."""
    found = []
    for key in dict.fromkeys(t.tuned.key for t in summed.tunings):
        tunings = [t for t in summed.tunings if t.tuned.key == key]
        values = sorted({value for t in tunings for value in t.tuned.values})
        lines = [["row", *(f"{value:g}" for value in values)]]
        for t in tunings:
            texts = {
                value: "*" * (value == t.chosen)
                + (f"{loss:.3f}" if math.isfinite(loss) else "failed")
                for value, loss in t.losses.items()
            }
            lines.append([t.row, *(texts.get(value, "") for value in values)])
        found.append((key, lines, "<" + ">" * len(values)))
    return found


def _machines(outcomes: Sequence[Outcome]) -> str:
    """What the cells ran on; the last bits of a result depend on it."""
    kinds = [(o.devices["count"], o.devices["kind"], o.devices["cpu_threads"]) for o in outcomes]
    each = [
        f"{count} x {kind}, {threads} CPU thread{'s' * (threads != 1)}"
        for count, kind, threads in dict.fromkeys(kinds)
    ]
    return f"A cell ran on {'; another on '.join(each)}." if each else ""


def _texts(result: Result) -> list[str]:
    """The cells of a line."""
    label, known = _label(result), list(result.outcomes.values())
    if not known:
        return [label, *["-"] * 4, "0", "-", "", "", ""]
    first = known[0]
    seconds = sum(outcome.seconds for outcome in known) / len(known)
    return [
        label,
        f"{first.parameters:,}",
        compact(first.tokens),
        f"{first.flops_per_token / 1e6:.2f}",
        f"{seconds:.0f}",
        str(len(known)),
        _text(estimate(result.bits), ".3f"),
        _text(result.difference, "+.3f") if result.difference else "",
        result.against if result.difference else "",
        result.verdict,
    ]


def _label(result: Result) -> str:
    """With the value of what was tuned."""
    values = {o.value for o in result.outcomes.values()} - {None}
    return result.line.label + "".join(f" ({value:g})" for value in values)


def _text(value: Estimate, form: str) -> str:
    width = "" if math.isinf(value.half_width) else f" ± {value.half_width:.3f}"
    return f"{value.mean:{form}}".replace("-", "−") + width


def drawing(summed: Summary) -> str:
    """All tables as one SVG: a dot per seed, the mean and its interval, in the colour of the verdict."""
    parts, top = [], 10
    for table, lines in summed.tables.items():
        part, height = _plot(table.title, lines)
        parts.append(f'<g transform="translate(0 {top})">{part}</g>')
        top += height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}">\n'
        f"<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _plot(title: str, lines: Sequence[Result]) -> tuple[str, int]:
    """One table as SVG, with its height."""
    parts = [f'<text class="title" x="12" y="20">{escape(title)}</text>']
    bits = [value for result in lines for value in result.bits]
    bottom = 36 + LINE_HEIGHT * len(lines)
    if not bits:
        return parts[0], bottom + 40
    means = {r.line.row: estimate(r.bits) for r in lines if r.bits}
    # The interval of two seeds may be wider than all else: it is cut at a span beyond the dots.
    span = max(bits) - min(bits) or 0.1
    ends = [m.mean + side * m.half_width for m in means.values() for side in (-1, 1)]
    low = max(min(bits) - span, min([*filter(math.isfinite, ends), min(bits)])) - 0.03 * span
    high = min(max(bits) + span, max([*filter(math.isfinite, ends), max(bits)])) + 0.03 * span

    def x(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    for tick in linear_ticks(low, high, 6):
        parts.append(f'<path class="grid" d="M{x(tick)} 32V{bottom}"/>')
        parts.append(
            f'<text class="soft" text-anchor="middle" x="{x(tick)}" y="{bottom + 14}">{tick:g}</text>'
        )
    parts.append(
        f'<text class="soft" x="{WIDTH - RIGHT + 12}" y="{bottom + 14}">bits per byte; difference</text>'
    )
    for number, result in enumerate(lines):
        y = 48 + LINE_HEIGHT * number
        parts.append(f'<g class="{result.verdict.split(" ")[0]}">')
        parts.append(
            f'<text x="{LEFT - 12}" y="{y + 4}" text-anchor="end">{escape(_label(result))}</text>'
        )
        if result.bits:
            mean = means[result.line.row]
            if math.isfinite(mean.half_width):
                ends_x = x(mean.mean - mean.half_width), x(mean.mean + mean.half_width)
                parts.append(f'<path class="interval" d="M{ends_x[0]} {y}H{ends_x[1]}"/>')
            parts += [f'<circle class="seed" cx="{x(v)}" cy="{y}" r="3"/>' for v in result.bits]
            parts.append(
                f'<circle class="mean" cx="{x(mean.mean)}" cy="{y}" r="4.5">'
                f"<title>{escape(_text(mean, '.4f'))}</title></circle>"
            )
        if result.difference:
            said = f"{_text(result.difference, '+.3f')} {result.verdict}"
            parts.append(f'<text class="soft" x="{WIDTH - RIGHT + 12}" y="{y + 4}">{said}</text>')
        parts.append("</g>")
    return "\n".join(parts), bottom + 40
