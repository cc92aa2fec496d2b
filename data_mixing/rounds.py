"""What co-evolution did in each round: for a terminal, as rounds.json and as report.html."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from data_mixing import drawing
from data_mixing.benefits import Distribution, Judged
from data_mixing.methods import Measured
from mobilellm_jax.files import replaced
from mobilellm_jax.tables import aligned

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Source:
    """What became of one source in a round; weights are None where no stage followed."""

    rows: int  # that were scored
    of_rows: int
    documents: int
    kept: int
    tokens: int
    kept_tokens: int
    benefit: Measured
    weight: float | None = None
    capped: float | None = None  # the weight that training reads, after caps on epochs
    epochs: float | None = None
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Round:
    """One round: what the network of its begin says of the documents, and what it learnt of them.

    Attributes:
      number: from 1.
      checkpoint: that scored.
      found: the documents with their benefits.
      distribution: of these.
      scales: what the benefits of each capability are divided by.
      capabilities: quantiles of each capability's benefits, divided by nothing.
      before: nats per token of each capability's held-out probes.
      sources: by name.
      stop: why no stage followed; "" where one did.
      trained: checkpoint that came of the stage.
      after: as `before`, of that checkpoint.
    """

    number: int
    checkpoint: str
    found: Judged
    distribution: Distribution
    scales: Mapping[str, float]
    capabilities: Mapping[str, Mapping[str, float]]
    before: Mapping[str, float]
    sources: Mapping[str, Source]
    stop: str = ""
    trained: str = ""
    after: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def tables(self) -> list[str]:
        """Of sources, and of capabilities, for a terminal."""
        lines = [["source", "rows", "documents", "kept", "tokens kept", "benefit"]]
        lines[0] += ["weight", "capped", "epochs"]
        for name, of in self.sources.items():
            line = [name, f"{of.rows:,} of {of.of_rows:,}", f"{of.documents:,}", f"{of.kept:,}"]
            line += [f"{of.kept_tokens / of.tokens:.1%}" if of.tokens else "", of.benefit.text]
            line += ["" if of.weight is None else f"{of.weight:.2%}"]
            line += ["" if of.capped is None else f"{of.capped:.2%}"]
            lines.append([*line, "" if of.epochs is None else f"{of.epochs:.2f}"])
        heldout = [["held-out probes", "nats/token before", "after", "change"]]
        for name, before in self.before.items():
            after = self.after.get(name)
            told = ["", ""] if after is None else [f"{after:.4f}", f"{after - before:+.4f}"]
            heldout.append([name, f"{before:.4f}", *told])
        return [aligned(lines, "<>>>>>>>>"), aligned(heldout, "<>>>")]

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        now = self.distribution
        return {
            "round": self.number,
            "checkpoint": self.checkpoint,
            "share_kept": now.share,
            "documents": now.documents,
            "documents_dropped": now.documents - sum(of.kept for of in self.sources.values()),
            "benefit": {
                "quantiles": dict(now.quantiles),
                "median_size": now.median_size,
                "interquartile_range": now.spread,
            },
            "scales": dict(self.scales),
            "quantiles_by_capability": {c: dict(of) for c, of in self.capabilities.items()},
            "sources": {
                name: {**dataclasses.asdict(of), "benefit": _plain(of.benefit)}
                for name, of in self.sources.items()
            },
            "heldout_before": dict(self.before),
            "heldout_after": dict(self.after) or None,
            "stop": self.stop or None,
            "trained": self.trained or None,
        }


def _plain(measured: Measured) -> dict[str, float | None]:
    found = dataclasses.asdict(measured)
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def overview(rounds: Sequence[Round]) -> str:
    """A line for each round, for a terminal."""
    capabilities = list(rounds[0].before)
    lines = [["round", "tokens kept", "5%", "25%", "median", "75%", "95%", *capabilities]]
    for one in rounds:
        q = one.distribution.quantiles
        line = [str(one.number), f"{one.distribution.share:.1%}"]
        line += [f"{q[name]:.3g}" for name in ("5%", "25%", "50%", "75%", "95%")]
        lines.append(line + [f"{one.before[c]:.4f}" for c in capabilities])
    if last := rounds[-1].after:
        lines.append(["after", *[""] * 6, *(f"{last[c]:.4f}" for c in capabilities)])
    return aligned(lines, "<" + ">" * (len(lines[0]) - 1))


def write(
    rounds: Sequence[Round], ended: str, settings: Mapping[str, Any], out: epath.Path
) -> None:
    """Writes rounds.json and report.html; those of fewer rounds are replaced.

    Args:
      rounds: all so far.
      ended: why there is no further one; "" if there is to be.
      settings: what they were made with.
      out: directory.
    """
    described = {
        "version": VERSION,
        "settings": dict(settings),
        "rounds": [one.to_dict() for one in rounds],
        "ended": ended or None,
    }
    for name, text in (
        ("rounds.json", json.dumps(described, indent=2) + "\n"),
        ("report.html", page(rounds, ended)),
    ):
        with replaced(out / name) as unfinished:
            unfinished.write_text(text)


def page(rounds: Sequence[Round], ended: str) -> str:
    """The report: distributions over each other, what was kept, held-out losses, and all tables."""
    named = {f"round {one.number}": one for one in rounds}
    parts = [
        drawing.preformatted(overview(rounds)),
        drawing.histograms(
            "Benefit of documents, per token",
            {name: one.found.benefit_M for name, one in named.items()},
            note="Each document counts once.",
        ),
        drawing.bars(
            "Tokens kept",
            {
                name: {s: of.kept_tokens / of.tokens for s, of in one.sources.items() if of.tokens}
                for name, one in named.items()
            },
        ),
    ]
    if any(one.trained for one in rounds):
        parts.append(
            drawing.bars(
                "Mixture weights, after the caps",
                {
                    name: {s: of.capped or 0.0 for s, of in one.sources.items()}
                    for name, one in named.items()
                    if one.trained
                },
            )
        )
        steps = [one.before for one in rounds] + [one.after for one in rounds[-1:] if one.after]
        parts.append(
            drawing.lines(
                "Held-out probes",
                {
                    c: drawing.Curve(np.arange(len(steps)), np.array([at[c] for at in steps]))
                    for c in rounds[0].before
                },
                "stages",
                "nats per token",
            )
        )
    for name, one in named.items():
        text = [f"{name}, scored by {one.checkpoint}", *one.tables]
        why = [["", "why it has its weight"]]
        why += [[source, of.why] for source, of in one.sources.items() if of.why]
        text += [aligned(why, "<<")] if len(why) > 1 else []
        text += [f"stopped: {one.stop}."] if one.stop else []
        parts.append(drawing.preformatted("\n\n".join(text)))
    parts.append(drawing.preformatted(ended or "to be continued"))
    return drawing.page("Co-evolution of data and model", parts)
