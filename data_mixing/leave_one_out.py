r"""What each source is good for: training with all sources, and with all but one.

    python -m data_mixing.leave_one_out --config=configs/smoke.py --plan=data/mixture.json --probes=DIR \
        --out=DIR [--seeds=2] [--measure_every=100] [--group=4] [--leave_out=code,math]
    python -m data_mixing.weights --plan=data/mixture.json --method=leave_one_out=DIR/leave_one_out.json ...

MobileLLM-R1 (arXiv 2509.24945), section 5.1.2 and equation 1: without a source D_j the mean loss of the
probes of a capability c changes by

    delta(D_j, c) = E_{z ~ probes of c} [ loss(z; weights trained without D_j) - loss(z; with all) ],

nats per token; above 0, D_j helps c. As there, all sources have equal shares, all runs the same number
of tokens, and no example is repeated: a run that would repeat one is refused (`--max_epochs`). The runs
of a seed begin at the same weights and read each source in the same order.

DIR gets leave_one_out.json, table.md, a drawing per capability of the change along training (the
paper's figure 6) and leave_one_out.html with all. The runs are in DIR/runs, their plans in DIR/plans.
Killed and started again with the same flags it goes on.

Intervals are of 95 %, with both reasons why a change may be chance: other probes (the spread, over rows
of probes, of the paired difference of the two runs) and other seeds (the spread over seeds, pooled over
the sources left out). With one seed only the first is known.

Axes in names: S sources left out, R seeds, M measured steps, N rows of probes.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from data_mixing import drawing, experiments, folders, probe_sets
from data_mixing.measurements import VERSION
from data_mixing.probe_sets import ProbeSets
from data_mixing.runs import Measured
from data_mixing.together import train_together
from mobilellm_jax import cli
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import alone, replaced
from mobilellm_jax.sweeps.statistics import CONFIDENCE
from mobilellm_jax.tables import aligned, markdown_table
from mobilellm_jax.training.length import length_of

FILE, TABLE, PAGE = "leave_one_out.json", "table.md", "leave_one_out.html"
BY = "data_mixing.leave_one_out"
SHARES = ("equal", "plan")


@dataclasses.dataclass(frozen=True)
class Changes:
    """Changes of one capability's mean loss, nats per token, with standard errors over rows."""

    full_M: np.ndarray  # mean loss with all sources, over seeds
    delta_SRM: np.ndarray
    stderr_SRM: np.ndarray  # NaN of a single row
    rows_SM: np.ndarray  # the same of the mean over seeds

    @property
    def mean_SM(self) -> np.ndarray:
        """The change, over seeds."""
        return self.delta_SRM.mean(1)

    @property
    def half_SM(self) -> np.ndarray:
        """Half widths of the intervals."""
        sources, seeds, _ = self.delta_SRM.shape
        if seeds == 1:
            return float(scipy.stats.norm.ppf((1 + CONFIDENCE) / 2)) * self.rows_SM
        # The noise of training is alike whatever is left out; two seeds alone could not tell it.
        seeds_M = self.delta_SRM.var(1, ddof=1).mean(0) / seeds
        quantile = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, sources * (seeds - 1)))
        return quantile * np.sqrt(self.rows_SM**2 + seeds_M)


@dataclasses.dataclass(frozen=True)
class Report:
    """All that was found."""

    sources: tuple[str, ...]  # left out
    seeds: tuple[int, ...]
    steps_M: np.ndarray
    changes: Mapping[str, Changes]  # by capability
    weights: Mapping[str, float]  # of the full mixture
    epochs: Mapping[str, float]  # of the run that reads a source most
    settings: Mapping[str, object]

    def to_dict(self) -> dict[str, object]:
        """As `measurements.read_left_out` reads it."""
        records = [
            {
                "source": source,
                "capability": capability,
                "seed": seed,
                "step": int(step),
                "delta": float(found.delta_SRM[s, r, m]),
                "stderr": _number(found.stderr_SRM[s, r, m]),
            }
            for capability, found in self.changes.items()
            for s, source in enumerate(self.sources)
            for r, seed in enumerate(self.seeds)
            for m, step in enumerate(self.steps_M)
        ]
        return {
            "version": VERSION,
            "sources": list(self.sources),
            "capabilities": list(self.changes),
            "settings": dict(self.settings),
            "records": records,
        }

    @property
    def cells(self) -> list[list[str]]:
        """A table of the last step: a line per source, a column per capability."""
        lines = [["without", "its share", "epochs", *self.changes]]
        full = [f"{found.full_M[-1]:.4f}" for found in self.changes.values()]
        lines.append(["(loss with all)", "", "", *full])
        for s, source in enumerate(self.sources):
            line = [source, f"{self.weights[source]:.1%}", f"{self.epochs[source]:.2f}"]
            for found in self.changes.values():
                half = found.half_SM[s, -1]
                interval = "" if np.isnan(half) else f" ± {half:.4f}"
                line.append(f"{found.mean_SM[s, -1]:+.4f}{interval}")
            lines.append(line)
        return lines

    @property
    def said(self) -> str:
        """What the table shows."""
        seeds = f"{len(self.seeds)} seeds" if len(self.seeds) > 1 else "one seed"
        return (
            f"Change of the mean loss of probes, nats per token, after {self.steps_M[-1]:,} steps without "
            f"a source; above 0 it helps. {seeds}; intervals of {CONFIDENCE:.0%}, over rows of probes"
            + (" and seeds." if len(self.seeds) > 1 else ", not over seeds.")
        )

    def drawing(self, capability: str) -> str:
        """The changes of a capability along training."""
        found = self.changes[capability]
        curves = {}
        for s, source in enumerate(self.sources):
            mean_M, half_M = found.mean_SM[s], found.half_SM[s]
            name = f"without {source}"
            curves[name] = drawing.Curve(self.steps_M, mean_M, mean_M - half_M, mean_M + half_M)
        label = f"change of the loss of {capability}, nats per token"
        return drawing.lines(f"What {capability} loses without a source", curves, "steps", label)


def leave_one_out(
    config: ConfigDict,
    plan: Plan,
    sets: ProbeSets,
    out: epath.PathLike,
    *,
    leave_out: Sequence[str] = (),
    seeds: int = 1,
    measure_every: int = 0,
    shares: str = "equal",
    max_epochs: float = 1.0,
    half: str = "score",
    probe_rows: int = 512,
    group: int = 0,
    keep: int = 0,
) -> Report:
    """Trains with all sources and without each, measures, and writes the report.

    Args:
      config: of every run.
      plan: sources and data.
      sets: the probes.
      out: folder for runs and results.
      leave_out: sources to leave out, one at a time; all by default.
      seeds: of initial weights and the order of rows, from the configuration's and the plan's on.
      measure_every: steps between measurements, a tenth of the run by default; also at the end.
      shares: `equal`, or `plan`: its weights, without the source in proportion.
      max_epochs: how often a run may read a source.
      half: of the probes.
      probe_rows: most rows of a capability.
      group: see `together.train_together`.
      keep: see there.

    Raises:
      UserError: bad input, a source would be repeated, or the folder is of other runs.
    """
    if unknown := set(leave_out) - set(plan.names):
        raise UserError(
            f"there is no source {', '.join(sorted(unknown))} to leave out, only {', '.join(plan.names)}."
        )
    drawings = {name: f"{re.sub(r'[^a-zA-Z0-9_-]+', '_', name)}.svg" for name in sets.capabilities}
    out = folders.holding(out, ("runs", "plans", FILE, TABLE, PAGE, *drawings.values()))
    weights = _weights(plan, shares)
    sources = tuple(leave_out or weights)
    if no_part := set(sources) - set(weights):
        raise UserError(f"the plan gives {', '.join(no_part)} no weight: it is left out already.")
    mixtures = {"full": weights} | {f"without_{s}": _without(weights, s) for s in sources}
    members = {
        (name, seed): experiments.member_of(f"{name}_{seed}", plan, mixture, config, seed, BY)
        for seed in range(seeds)
        for name, mixture in mixtures.items()
    }
    often = experiments.epochs(list(members.values()), config, max_epochs)
    rows = experiments.probe_rows(sets, half, plan, config.row_length, probe_rows)
    steps = length_of(config).steps
    measured = train_together(
        config,
        list(members.values()),
        rows,
        out / "runs",
        measure_every=measure_every or max(steps // 10, 1),
        group=group,
        keep=keep,
    )
    experiments.save_plans(list(members.values()), out / "plans")
    changes = {}
    for capability in rows:
        full = [measured[members["full", r].name] for r in range(seeds)]
        others = [
            [measured[members[f"without_{s}", r].name] for r in range(seeds)] for s in sources
        ]
        changes[capability] = changes_of(capability, full, others)
    report = Report(
        sources,
        tuple(config.seed + r for r in range(seeds)),
        full[0].steps_M,
        changes,
        weights,
        often,
        {"by": BY, "plan": plan.hash, "probes": sets.fingerprint, "half": half, "shares": shares}
        | {"config": config.to_dict()},
    )
    _write(report, out, drawings)
    return report


def _weights(plan: Plan, shares: str) -> dict[str, float]:
    """Of the full mixture; each source has one above 0."""
    if shares == "equal":
        return dict.fromkeys(plan.names, 1 / len(plan.sources))
    stage = plan.stages[0]
    if stage.weights_end:
        raise UserError("the plan's weights are on a ramp: take equal shares, or a constant stage.")
    found = {name: stage.weights[name] for name in plan.names if name in stage.weights}
    if len(found) < 2:
        raise UserError("the plan gives only one source a weight: take equal shares.")
    return found


def _without(weights: Mapping[str, float], source: str) -> dict[str, float]:
    """The mixture without a source, the others in proportion."""
    return {n: 0.0 if n == source else w / (1 - weights[source]) for n, w in weights.items()}


def changes_of(
    name: str, full: Sequence[Measured], others: Sequence[Sequence[Measured]]
) -> Changes:
    """Compares runs row by row.

    Args:
      name: of the measured rows.
      full: the runs with all sources, by seed.
      others: those without one, by source and seed.
    """
    targets_N = full[0].targets_N[name].astype(np.float64)
    full_RMN = np.stack([run.nll_MN[name] for run in full]).astype(np.float64)
    other_SRMN = np.stack([[run.nll_MN[name] for run in of] for of in others])
    difference_SRMN = other_SRMN - full_RMN
    return Changes(
        full_M=full_RMN.mean(0).sum(-1) / targets_N.sum(),
        delta_SRM=difference_SRMN.sum(-1) / targets_N.sum(),
        stderr_SRM=ratio_stderr(difference_SRMN, targets_N),
        rows_SM=ratio_stderr(difference_SRMN.mean(1), targets_N),
    )


def ratio_stderr(sums: np.ndarray, counts_N: np.ndarray) -> np.ndarray:
    """The standard error of sum(sums) / sum(counts) where rows are a random choice; NaN of a single one.

    By linearisation: that of the mean of `sums - ratio * counts`, over the mean count.

    Args:
      sums: float [..., N].
      counts_N: float.
    """
    rows = len(counts_N)
    if rows < 2:
        return np.full(sums.shape[:-1], np.nan)
    ratio = sums.sum(-1, keepdims=True) / counts_N.sum()
    residuals = sums - ratio * counts_N
    return np.sqrt((residuals**2).sum(-1) * rows / (rows - 1)) / counts_N.sum()


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _write(report: Report, out: epath.Path, drawings: Mapping[str, str]) -> None:
    alignment = "<" + ">" * (len(report.cells[0]) - 1)
    pictures = {name: report.drawing(name) for name in report.changes}
    table = markdown_table(report.cells, alignment)
    shown = "\n".join(f"![{name}]({drawings[name]})" for name in pictures)
    parts = [drawing.preformatted(f"{report.said}\n\n{aligned(report.cells, alignment)}")]
    files = {
        FILE: json.dumps(report.to_dict(), indent=1) + "\n",
        TABLE: f"# Leaving one source out\n\n{report.said}\n\n{table}\n\n{shown}\n",
        PAGE: drawing.page("Leaving one source out", [*parts, *pictures.values()]),
    }
    files |= {drawings[name]: picture for name, picture in pictures.items()}
    for name, text in files.items():
        with replaced(out / name) as unfinished:
            unfinished.write_text(text)


def main() -> None:
    """The command line."""
    args = flags.FLAGS
    plan, sets = experiments.open_plan(args.config, args.plan), probe_sets.load(args.probes)
    with alone(args.out, "is training"):
        report = leave_one_out(
            args.config,
            plan,
            sets,
            args.out,
            leave_out=args.leave_out,
            seeds=args.seeds,
            measure_every=args.measure_every,
            shares=args.shares,
            max_epochs=args.max_epochs,
            half=args.half,
            probe_rows=args.probe_rows,
            group=args.group,
            keep=args.keep,
        )
    print(f"{report.said}\n\n{aligned(report.cells, '<' + '>' * (len(report.cells[0]) - 1))}")
    print(
        f"\n{epath.Path(args.out) / FILE}: written, with {TABLE}, {PAGE} and drawings.", flush=True
    )


if __name__ == "__main__":
    experiments.define_flags()
    flags.DEFINE_list("leave_out", [], "Sources to leave out, one at a time; default: each.")
    flags.DEFINE_integer("seeds", 1, "Runs of each mixture, with other seeds.", lower_bound=1)
    flags.DEFINE_integer("measure_every", 0, "Steps; 0: a tenth of the run.", lower_bound=0)
    flags.DEFINE_enum("shares", "equal", SHARES, "Of the full mixture: equal, or the plan's.")
    flags.DEFINE_float("max_epochs", 1.0, "How often a run may read a source.", lower_bound=0)
    cli.run(main)
