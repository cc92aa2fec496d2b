"""The table of an evaluation, beside what the papers report of a network of that size."""

import math
from collections.abc import Collection, Sequence

from mobilellm_jax.evaluation.suites import COMMONSENSE, PUBLISHED, Line
from mobilellm_jax.model.config import ModelConfig, parameter_count
from mobilellm_jax.tables import markdown_table

_SIZES = {"125M": 124.6, "140M": 140, "350M": 345.3, "360M": 360, "600M": 603.1, "950M": 949}


def nearest_published(model: ModelConfig, labels: Collection[str]) -> str | None:
    """The published network of that kind and nearest size of which most of these figures are known."""
    shared = any(stack.repeats > 1 for stack in model.stacks)
    reasons = model.qk_norm == "unit"
    known = {name: sum(label in row for label in labels) for name, row in PUBLISHED.items()}
    if not any(known.values()):
        return None
    of_kind = [
        n for n in known if ("-LS-" in n) == shared and ("-R1-" in n) == reasons and known[n]
    ]
    size = math.log(parameter_count(model) / 1e6)

    def far(name: str) -> tuple[float, int]:
        published = next(millions for text, millions in _SIZES.items() if text in name)
        return abs(math.log(published) - size), -known[name]

    return min(of_kind or [name for name in known if known[name]], key=far)


def table(lines: Sequence[Line], model: ModelConfig | None) -> str:
    """The figures in Markdown, beside the published ones of the nearest size where there are any.

    Args:
      lines: what was measured.
      model: the network; None if it is not known.
    """
    name = nearest_published(model, {line.label for line in lines}) if model else None
    header = ["task", "shots", "metric", "value", "standard error", "documents"]
    rows = [[*header, name] if name else header]
    for line in lines:
        error = "" if math.isnan(line.standard_error) else f"{line.standard_error:.4f}"
        row = [line.label, str(line.shots), line.metric, f"{line.value:.4f}", error]
        row.append(f"{line.documents:,}" if line.documents else "")
        if name:
            figure = _published(name, line)
            row.append("" if figure is None else f"{figure / 100:.3f}")
        rows.append(row)
    return markdown_table(rows, "<><>>>>"[: len(rows[0])])


def _published(name: str, line: Line) -> float | None:
    """What is published of a network beside a line, in per cent: an average is that of the same tasks."""
    figures = PUBLISHED[name]
    if not line.parts or sorted(line.parts) == sorted(entry.label for entry in COMMONSENSE):
        return figures.get(line.label)
    known = [figures[task] for task in line.parts if task in figures]
    return sum(known) / len(known) if len(known) == len(line.parts) else None
