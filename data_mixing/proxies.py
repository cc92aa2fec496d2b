r"""Trains proxies for RegMix (arXiv 2407.01492): short runs on mixtures around the sizes of the sources.

    python -m data_mixing.proxies --config=configs/smoke.py --plan=data/mixture.json --probes=DIR \
        --count=32 --out=DIR
    python -m data_mixing.regmix --mixtures=DIR/mixtures.csv --losses=DIR/losses.csv

DIR gets mixtures.csv and losses.csv, a row per run and in the second a column per capability: nats per
token of its probes at the end. The runs are in DIR/runs, their plans in DIR/plans. Killed and started
again with the same flags it goes on.
"""

import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from data_mixing import experiments, folders, probe_sets
from data_mixing.probe_sets import ProbeSets
from data_mixing.proposals import STRENGTHS, TEMPERATURE, proxies
from data_mixing.regmix import bounds_of, sizes
from data_mixing.run_tables import RunTable
from data_mixing.together import train_together
from mobilellm_jax import cli
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.files import alone
from mobilellm_jax.training.length import length_of

MIXTURES, LOSSES = "mixtures.csv", "losses.csv"
BY = "data_mixing.proxies"


def train_proxies(
    config: ConfigDict,
    plan: Plan,
    sets: ProbeSets,
    out: epath.PathLike,
    *,
    count: int,
    seed: int = 0,
    max_epochs: float | None = None,
    temperature: float = TEMPERATURE,
    half: str = "score",
    probe_rows: int = 512,
    group: int = 0,
    keep: int = 0,
) -> tuple[RunTable, RunTable]:
    """Draws mixtures, trains on each, and writes what `regmix` reads.

    Args:
      config: of a run; its seed is that of all initial weights.
      plan: sources and data.
      sets: the probes.
      out: folder for runs and tables.
      count: number of mixtures.
      seed: of the draws.
      max_epochs: how often a run may read a source; None: any number of times, which is told.
      temperature: see `proposals.proxies`.
      half: of the probes.
      probe_rows: most rows of a capability.
      group: see `together.train_together`.
      keep: see there.

    Returns:
      Mixtures and losses.

    Raises:
      UserError: bad input, or the folder is of other runs.
    """
    out = folders.holding(out, ("runs", "plans", MIXTURES, LOSSES))
    length = length_of(config)
    mixtures = drawn(config, plan, count, seed=seed, max_epochs=max_epochs, temperature=temperature)
    members = [
        experiments.member_of(
            f"run_{run}", plan, dict(zip(mixtures.names, row.tolist(), strict=True)), config, 0, BY
        )
        for run, row in zip(mixtures.runs, mixtures.values, strict=True)
    ]
    rows = experiments.probe_rows(sets, half, plan, config.row_length, probe_rows)
    often = experiments.epochs(members, config, float("inf"))
    said = ", ".join(f"{name} {epochs:.2f}" for name, epochs in often.items())
    print(f"most epochs of a source in a run: {said}", flush=True)
    found = train_together(
        config,
        members,
        rows,
        out / "runs",
        measure_every=length.steps,
        group=group,
        keep=keep,
    )
    experiments.save_plans(members, out / "plans")
    last = [[found[member.name].mean(name)[-1] for name in rows] for member in members]
    losses = RunTable(mixtures.runs, tuple(rows), np.array(last))
    for table, name in ((mixtures, MIXTURES), (losses, LOSSES)):
        (out / name).unlink(missing_ok=True)  # of these very runs, from a run of this before
        table.save(out / name)
    return mixtures, losses


def drawn(
    config: ConfigDict,
    plan: Plan,
    count: int,
    *,
    seed: int = 0,
    max_epochs: float | None = None,
    temperature: float = TEMPERATURE,
) -> RunTable:
    """The mixtures that `train_proxies` trains on.

    Raises:
      UserError: the plan does not know its sizes, caps on epochs are impossible, or there are not that
        many different mixtures.
    """
    prior, tokens = sizes(plan), length_of(config).tokens
    bounds = None if max_epochs is None else bounds_of(prior, max_epochs, tokens)
    return proxies(prior, count, seed, bounds=bounds, temperature=temperature, strengths=STRENGTHS)


def main() -> None:
    """The command line."""
    args = flags.FLAGS
    plan, sets = experiments.open_plan(args.config, args.plan), probe_sets.load(args.probes)
    with alone(args.out, "is training"):
        train_proxies(
            args.config,
            plan,
            sets,
            args.out,
            count=args.count,
            seed=args.seed,
            max_epochs=args.max_epochs,
            temperature=args.temperature,
            half=args.half,
            probe_rows=args.probe_rows,
            group=args.group,
            keep=args.keep,
        )
    print(f"{args.out}/{MIXTURES}, {args.out}/{LOSSES}: written.", flush=True)


if __name__ == "__main__":
    experiments.define_flags()
    flags.DEFINE_integer("count", 32, "Mixtures to train on.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of the draws.")
    flags.DEFINE_float("max_epochs", None, "How often a run may read a source; default: any.", 0)
    flags.DEFINE_float("temperature", TEMPERATURE, "Flattens the sizes of the sources.", 1)
    cli.run(main)
