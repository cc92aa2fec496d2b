"""What programs share that compare mixtures by training on them: plans, probes, how often data are read."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from data_mixing import probe_sets
from data_mixing.methods import Weights
from data_mixing.probe_sets import ProbeSets
from data_mixing.runs import Member
from data_mixing.samples import packed_texts, some
from data_mixing.weights import planned
from mobilellm_jax.data.opening import open_mixture
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.errors import UserError
from mobilellm_jax.training.length import length_of
from mobilellm_jax.training.setup import tokenizer_of


def open_plan(config: ConfigDict, path: str = "") -> Plan:
    """The plan whose sources are mixed: the one at `path`, or the configuration's.

    Raises:
      UserError: there is none, or it has several stages or sources too few to mix.
    """
    path = path or config.plan
    if not path:
        raise UserError("there is no plan: give --plan, or set config.plan.")
    plan = Plan.load(path)
    if len(plan.stages) > 1:
        raise UserError(f"the plan {path} has {len(plan.stages)} stages: give one with one stage.")
    if len(plan.sources) < 2:
        raise UserError(
            f"the plan {path} has one source, {plan.names[0]!r}, and mixtures differ where there are two: "
            "prepare another beside it."
        )
    return plan


def member_of(
    name: str,
    plan: Plan,
    weights: Mapping[str, float],
    config: ConfigDict,
    seed: int,
    by: str,
) -> Member:
    """A run on a mixture of a plan's sources, as long as the configuration says.

    Caps on repetition would change the weights, so they are taken off: see `epochs`.

    Args:
      name: of the run.
      plan: sources and data.
      weights: of its sources; those of weight 0 are left out.
      config: of the run.
      seed: is added to the configuration's, of initial weights, and to the plan's, of the order of rows.
      by: the program, for the plan's provenance.

    Raises:
      UserError: the weights are not usable.
    """
    length = length_of(config)
    tokens = length.rows(length.steps) * length.row_length
    sources = tuple(dataclasses.replace(source, max_epochs=None) for source in plan.sources)
    base = dataclasses.replace(plan, sources=sources, seed=plan.seed + seed)
    provenance = {"by": by, "run": name, "plan": plan.hash, "data": dict(plan.provenance)}
    made = planned(base, Weights(weights, {}, None), tokens, provenance, f"the plan of {name}")
    return Member(name, made, config.seed + seed)


def epochs(members: Sequence[Member], config: ConfigDict, most: float) -> dict[str, float]:
    """How often each source is read by the run that reads it most.

    Args:
      members: the runs.
      config: of all.
      most: highest number that is allowed.

    Raises:
      UserError: a source is read more often, or its rows are not usable.
    """
    length, found = length_of(config), dict[str, tuple[float, str]]()
    for member in members:
        mixture = open_mixture(member.plan, config.row_length, config.model.vocab_size)
        given = mixture.given(length.rows(length.steps))
        for name, rows, source in zip(member.plan.names, given, mixture.sources, strict=True):
            found[name] = max(found.get(name, (0.0, "")), (float(rows) / len(source), member.name))
    over = {name: pair for name, pair in found.items() if pair[0] > most}
    if over:
        listed = ", ".join(f"{n} {e:.2f} times by {run}" for n, (e, run) in over.items())
        raise UserError(
            f"runs would read {listed}, more often than max_epochs={most:g}: shorten config.steps, take the "
            "source out of the plan, add data, or raise --max_epochs."
        )
    return {name: pair[0] for name, pair in found.items()}


def probe_rows(
    sets: ProbeSets, half: str, plan: Plan, row_length: int, most: int
) -> dict[str, np.ndarray]:
    """The probes of each capability as rows of the plan's tokenizer, int32 [N, row_length + 1].

    Args:
      sets: all probes.
      half: which of them.
      plan: names the tokenizer.
      row_length: tokens of a row.
      most: rows of a capability; of more a random choice is taken, which is told.

    Raises:
      UserError: a capability has no probe, or the tokenizer is not there.
    """
    tokenizer, found = tokenizer_of(plan, plan.directory), {}
    for name, texts in probe_sets.scoring(sets, half).items():
        rows = packed_texts(texts, tokenizer, row_length)
        if len(rows) > most:
            print(f"{name}: {most:,} of its {len(rows):,} rows of probes are measured.", flush=True)
        found[name] = some(rows, most)
    return found


def save_plans(members: Sequence[Member], folder: epath.Path) -> None:
    """Writes the plan of each run, with which `mobilellm_jax.train` trains the same."""
    folder.mkdir(parents=True, exist_ok=True)
    for member in members:
        member.plan.save(folder / f"{member.name}.json")


def define_inputs() -> None:
    """The flags of what such a program reads, and where it writes."""
    config_flags.DEFINE_config_file("config", None, "Configuration of a run.", lock_config=True)
    flags.mark_flag_as_required("config")
    flags.DEFINE_string("plan", "", "mixture.json with the sources; default: config.plan.")
    flags.DEFINE_string("probes", None, "Directory of probe sets.", required=True)
    flags.DEFINE_string("out", None, "Folder for runs and results.", required=True)


def define_flags() -> None:
    """These, and how much is measured."""
    define_inputs()
    flags.DEFINE_enum("half", "score", probe_sets.HALVES, "Half of the probes to measure.")
    flags.DEFINE_integer("probe_rows", 512, "Most rows of a capability that are measured.", 2)
    flags.DEFINE_integer("group", 0, "Runs that train as one program; 0: one a device.", 0)
    flags.DEFINE_integer("keep", 0, "Checkpoints to keep of each run, evenly spaced.", 0)
