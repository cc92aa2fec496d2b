r"""Data and model in turns: score with the network as it is, keep what helps, train on it, again.

    python -m data_mixing.coevolve --config=configs/smoke.py --plan=data/mixture.json --probes=probes \
        --init_from=runs/base --out=mid --rounds=2

is the mid-training of MobileLLM-R1 (arXiv 2509.24945, section 6):

    D_t         = the documents of D_raw whose benefit under theta_t is above 0            (equation 7)
    weights     = mean benefit per token of what is kept of each source        (equations 5 and 6)
    theta_{t+1} = theta_t trained on D_t                                                  (equation 8)

Positive means helpful, see data_mixing/derivatives.py. D_raw are the sources of --plan, in every round
anew. Each stage is an ordinary run of mobilellm_jax.train of --config, the same for all: its steps or
tokens are those of one stage, its plan and its init_from are set here.

It ends after --rounds, or before a stage when benefits have collapsed: too few documents help
(--least_share), benefits are near 0 beside those of the first round (--collapsed), or no source has a
mean above 0 (--above_zero); see data_mixing/benefits.py, also for how rounds are compared. With --rows
only so many rows of each source are scored, and only documents in these can be kept.

OUT gets rounds.json and report.html, and of each round t

    round-t/scores/              what `data_mixing.influence` writes
    round-t/documents.parquet    every document, its benefit, and whether it is kept
    round-t/data/                a source of what is kept of each, and mixture.json
    round-t/train/               the workdir of the stage

Killed and started again with the same flags it goes on; with more --rounds it goes on further.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import config_flags

from data_mixing import benefits, folders, methods, probe_sets, scorers, stages
from data_mixing.benefits import Judged, Rules
from data_mixing.influence import Checkpoint, influence, open_checkpoints, save_table
from data_mixing.probe_sets import ProbeSets
from data_mixing.rounds import Round, Source, overview, write
from data_mixing.stages import ALL, METRICS, Choices, Given
from mobilellm_jax import cli
from mobilellm_jax.data.contexts import Contexts
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.rows import open_rows
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation import while_training
from mobilellm_jax.files import alone
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.parallel.compiled import keep_compiled
from mobilellm_jax.training.config import FREE, check
from mobilellm_jax.training.length import length_of
from mobilellm_jax.training.setup import programs
from mobilellm_jax.training.start import open_weights


def coevolve(given: Given, init_from: str, out: epath.PathLike, rounds: int = 2) -> list[Round]:
    """Scores, drops, weighs and trains, again and again.

    Args:
      given: configuration, plan, probes, and how all is done.
      init_from: the network to begin with, as `config.init_from` has it, or a workdir.
      out: directory; what an interrupted run left there is used.
      rounds: stages, at most.

    Returns:
      The rounds.

    Raises:
      UserError: configuration, plan, probes and checkpoint do not fit together, or `out` holds
        something else.
    """
    # --- What is given, checked before anything is computed
    out, choices = epath.Path(out), given.choices
    point = _opened(init_from, given.probes)
    totals = _check(given, point)
    described = _described(given, point)
    if not (out / "heldout.json").exists():
        stages.check_probes(given, point)
    folders.claim(out, described)
    if (out / f"round-{rounds + 1}").exists():
        raise UserError(f"{out} holds more than {rounds} rounds: give --rounds as it was, or more.")
    if any(rows > choices.rows for rows in totals.values()):
        print(
            f"{choices.rows:,} rows of each source are scored (--rows); no document outside of them is kept.",
            flush=True,
        )
    heldout = stages.heldout_losses(given, point, out / "heldout.json")

    done: list[Round] = []
    for number in range(1, rounds + 1):
        # --- Scored with the network as it is
        folder = out / f"round-{number}"
        print(f"round {number}: scored by {point.path}", flush=True)
        table = influence(
            given.plan,
            given.probes,
            [point],
            folder / "scores",
            rows=choices.rows,
            train_rows=choices.train_rows,
            row_length=given.config.row_length,
            metrics=[choices.metric],
            standardise=False,  # that a distribution collapses has to be seen, see `benefits`
            settings=given.settings,
        )
        if number == 1:
            scales = benefits.scales_of(table, choices.metric, [*heldout], choices.standardise)
        found = benefits.judged(table, choices.metric, scales)
        kept_M = found.benefit_M > choices.threshold
        save_table(found.table(kept_M), folder / "documents.parquet")
        now = benefits.distribution(found, kept_M, choices.seed)
        this = Round(
            number,
            str(point.path),
            found,
            now,
            scales,
            benefits.by_capability(table, choices.metric, [*scales]),
            heldout,
            _sources(found, kept_M, now.means, totals, choices.rows),
            benefits.stop_reason(done[0].distribution if done else now, now, choices.rules),
        )
        if this.stop:
            done.append(this)
            break

        # --- What helps is kept, and trained on
        decided = folder / "decided.json"
        if decided.exists():
            folders.agree(decided, {"max_epochs": choices.max_epochs})
        this = stages.keep(given, this, kept_M, point.tokenizer, folder / "data")
        folders.agree(decided, {"max_epochs": choices.max_epochs})
        print(this.tables[0], flush=True)
        plan = folder / "data" / "mixture.json"
        path = stages.trained(given, plan, point.path, folder / "train")
        point = _opened(str(path), given.probes)
        heldout = stages.heldout_losses(given, point, folder / "heldout.json")
        done.append(dataclasses.replace(this, trained=str(path), after=heldout))
        print(done[-1].tables[1], flush=True)
        write(done, "", described, out)

    # --- What came of it
    last = done[-1]
    ended = f"ended after round {last.number}: no more were asked for (--rounds)."
    if last.stop:
        ended = f"stopped before the stage of round {last.number}: {last.stop}."
        print(last.tables[0], flush=True)
    write(done, ended, described, out)
    print(overview(done), ended, point.path, out / "report.html", sep="\n", flush=True)
    return done


# What is given, and what is there already.


def _opened(name: str, probes: ProbeSets) -> Checkpoint:
    (point,) = open_checkpoints([name], 1, list(probes.capabilities))
    return point


def _check(given: Given, point: Checkpoint) -> dict[str, int]:
    """Meets what would only be met when the scores are there; the rows of each source."""
    config, plan, metric = given.config, given.plan, given.choices.metric
    devices = given.devices or jax.devices()
    check(config, len(devices))
    if metric not in METRICS:
        raise UserError(f"--metric={metric} is none of {', '.join(METRICS)}.")
    if config.init_state != "weights" or config.first_row:
        raise UserError(
            "each stage begins with the weights of the one before and the first row of a plan of its own: "
            "set config.init_state=weights and config.first_row=0."
        )
    tokenizer = Tokenizer.load(plan.resolve(plan.tokenizer_path))
    made = programs(config, devices, tokenizer.bos_id, tokenizer.eos_id, len(plan.sources))
    while_training.judge(config.eval, made.model, tokenizer, config.execution.dtype, made.mesh)
    open_weights(point.path, ModelConfig.from_dict(config.model), tokenizer)
    paths = {source.name: plan.resolve(source.path) for source in plan.sources}
    totals = {n: len(Contexts(open_rows(path), config.row_length)) for n, path in paths.items()}
    caps = {s.name: given.choices.max_epochs or s.max_epochs or math.inf for s in plan.sources}
    most = sum(caps[name] * rows * config.row_length for name, rows in totals.items())
    if most < (wanted := length_of(config).tokens):
        raise UserError(
            f"a stage has {wanted:,} tokens, and the sources give {most:,.0f} at most with these caps on "
            "epochs: raise --max_epochs, or shorten the stages."
        )
    return totals


def _described(given: Given, point: Checkpoint) -> dict[str, Any]:
    """All that decides the result, but for the number of rounds and what each round is told apart by.

    A cap on epochs that what is kept cannot meet is only met when all is scored, and may then be raised.
    """
    config = {k: v for k, v in given.config.to_dict().items() if k not in (*FREE, "init_from")}
    described = {
        "config": config,
        "plan": given.plan.hash,
        "probes": given.probes.fingerprint,
        "init_from": str(point.path),
        "choices": dataclasses.asdict(dataclasses.replace(given.choices, max_epochs=None)),
        "settings": dataclasses.asdict(given.settings),
    }
    return json.loads(json.dumps(described))


def _sources(
    found: Judged,
    kept_M: np.ndarray,
    means: Mapping[str, methods.Measured],
    totals: Mapping[str, int],
    rows: int,
) -> dict[str, Source]:
    """What is known of each source when it is scored."""
    sources = {}
    for name, total in totals.items():
        mine_M = found.source_M == name
        sources[name] = Source(
            min(rows, total),
            total,
            int(mine_M.sum()),
            int((mine_M & kept_M).sum()),
            int(found.tokens_M[mine_M].sum()),
            int(found.tokens_M[mine_M & kept_M].sum()),
            means.get(name, methods.Measured(0.0)),
        )
    return sources


def main() -> None:
    """The command line around `coevolve`."""
    args = flags.FLAGS
    keep_compiled()
    choices = Choices(
        ALL if args.rows is None else args.rows,
        args.train_rows,
        args.metric,
        args.standardise,
        args.threshold,
        Rules(args.least_share, args.collapsed, args.above_zero),
        args.max_epochs,
        args.seed,
    )
    plan, probes = Plan.load(args.plan), probe_sets.load(args.probes)
    given = Given(args.config, plan, probes, choices, scorers.named_settings())
    with alone(args.out, "is at work"):
        coevolve(given, args.init_from, args.out, args.rounds)


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "Configuration of each stage.", lock_config=True
    )
    flags.DEFINE_string("plan", None, "mixture.json of the raw sources.", required=True)
    flags.DEFINE_string("probes", None, "Directory of probe sets.", required=True)
    flags.DEFINE_string(
        "init_from", None, "Workdir, DIR@STEP or Hugging Face folder to begin with.", required=True
    )
    flags.DEFINE_string("out", None, "Directory to write into.", required=True)
    flags.DEFINE_integer("rounds", 2, "Stages, at most.", 1)
    flags.DEFINE_integer("rows", None, "Rows of each source to score; default: all.", 1)
    flags.DEFINE_integer("train_rows", 256, "Rows for the curvature of DataInf.", 1)
    flags.DEFINE_enum("metric", METRICS[0], METRICS, "See data_mixing/influence.py.")
    flags.DEFINE_bool(
        "standardise",
        True,
        "Bring capabilities to one scale, that of the first round; --nostandardise adds them as they are.",
    )
    flags.DEFINE_float("threshold", 0.0, "Benefit per token above which a document is kept.")
    flags.DEFINE_float(
        "least_share", 0.1, "Stop where less of the tokens is in documents that help.", 0, 1
    )
    flags.DEFINE_float(
        "collapsed",
        0.1,
        "Stop where the median size of benefits and their interquartile range are both less than this "
        "share of the first round's.",
        0,
    )
    flags.DEFINE_bool(
        "above_zero", True, "Stop where no source has a mean benefit above 0 beyond doubt."
    )
    flags.DEFINE_float(
        "max_epochs", None, "Cap on repetition in a stage; default: those of the plan.", 0
    )
    flags.DEFINE_integer("seed", 0, "Of the bootstrap.")
    scorers.define_settings()
    flags.mark_flag_as_required("config")
    cli.run(main)
