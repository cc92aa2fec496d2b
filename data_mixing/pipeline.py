r"""From sources to a trained comparison: every measure, every mixture, and whether it helped.

    python -m data_mixing.pipeline --config=configs/mixing.py --plan=data/mixture.json --probes=probes \
        --out=mixing

does, with one training configuration for all runs, what these programs do, each in a folder of OUT:

    base           a run on all sources alike, whose checkpoints score
    scores         data_mixing.influence
    left_out       data_mixing.leave_one_out
    proxies        data_mixing.proxies
    weights        data_mixing.weights, all methods side by side
    compared       data_mixing.compare, on the probes' other half and on --answers

and writes OUT/report.html. Killed and started again with the same flags it goes on; with others it is
refused, for a part is made of those before it. What a step costs in FLOPs goes into the plans that it
makes, and stands in the comparison.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence

import pyarrow
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from data_mixing import compare as comparing
from data_mixing import (
    drawing,
    experiments,
    folders,
    influence,
    leave_one_out,
    probe_sets,
    proxies,
    regression,
    scorers,
)
from data_mixing import weights as weighing
from data_mixing.methods import NothingHelps
from data_mixing.probe_sets import ProbeSets
from data_mixing.scorers import Settings
from data_mixing.together import train_together
from data_mixing.weights import Request
from mobilellm_jax import cli
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.files import alone, replaced
from mobilellm_jax.model.config import ModelConfig, flops_per_token
from mobilellm_jax.tables import aligned
from mobilellm_jax.training.length import length_of

BY = "data_mixing.pipeline"
METRICS = ("datainf", "tracin", "embedding", "ngrams")
SETTINGS, PAGE = "settings.json", "report.html"
OWN = (SETTINGS, "base", "scores", "left_out", "proxies", "weights", "compared", PAGE)


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much of everything.

    Attributes:
      seeds: of the comparison.
      left_out_seeds: of leave-one-out runs.
      proxies: mixtures that RegMix learns from.
      rows: of each source that are scored.
      train_rows: that stand for the training data in DataInf.
      probe_rows: of each capability.
      checkpoints: of the base run that score.
      max_epochs: cap on repetition in the weights.
      group: runs that train as one program; 0: one a device.
    """

    seeds: int = 3
    left_out_seeds: int = 1
    proxies: int = 12
    rows: int = 64
    train_rows: int = 64
    probe_rows: int = 64
    checkpoints: int = 4
    max_epochs: float = 4.0
    group: int = 0


def pipeline(
    config: ConfigDict,
    plan: Plan,
    sets: ProbeSets,
    out: epath.PathLike,
    effort: Effort = Effort(),
    settings: Settings = Settings(),
    answers: epath.PathLike | None = None,
) -> comparing.Comparison:
    """Measures sources in every way, makes mixtures of that, trains on each, and writes the report.

    Args:
      config: of every run.
      plan: sources and data.
      sets: the probes; their half `score` measures, their half `heldout` judges.
      out: folder of all results.
      effort: how much of everything.
      settings: how gradients are taken.
      answers: folder of questions, see `compare`.

    Raises:
      UserError: see the functions of each step; or `out` was made with other settings, or holds
        something else.
    """
    out = folders.holding(out, OWN)
    # What would only be met when much is computed.
    judged = comparing.measured_rows(config, plan, sets, answers, effort.probe_rows)
    proxies.drawn(config, plan, effort.proxies, max_epochs=effort.max_epochs)
    regression.models(seed=0)
    # All that decides the result, but for the configuration, which the base run is told apart by.
    described = {
        "plan": plan.hash,
        "probes": sets.fingerprint,
        "judged": {
            name: hashlib.sha256(rows.tobytes()).hexdigest() for name, rows in judged.items()
        },
        "effort": dataclasses.asdict(effort),
        "settings": dataclasses.asdict(settings),
    }
    folders.claim(out, described, SETTINGS)
    length = length_of(config)
    run = flops_per_token(ModelConfig.from_dict(config.model), config.row_length) * length.tokens

    _title("Base run")
    alike = dict.fromkeys(plan.names, 1 / len(plan.names))
    member = experiments.member_of("uniform", plan, alike, config, 0, BY)
    rows = experiments.probe_rows(sets, "score", plan, config.row_length, effort.probe_rows)
    train_together(
        config,
        [member],
        rows,
        out / "base",
        measure_every=length.steps,
        keep=effort.checkpoints,
    )

    _title("Influence, and what it has to beat")
    checkpoints = influence.open_checkpoints(
        [str(out / "base" / "uniform")], effort.checkpoints, list(sets.capabilities)
    )
    table = influence.influence(
        plan,
        sets,
        checkpoints,
        out / "scores",
        rows=effort.rows,
        train_rows=effort.train_rows,
        probe_rows=effort.probe_rows,
        metrics=METRICS,
        settings=settings,
    )
    costs = json.loads(table.schema.metadata[b"data_mixing"])["costs"]
    gradients = sum(cost["flops"] for name, cost in costs.items() if name.startswith("gradients"))

    _title("Leave one out")
    left_out = leave_one_out.leave_one_out(
        config,
        plan,
        sets,
        out / "left_out",
        seeds=effort.left_out_seeds,
        measure_every=max(length.steps // 4, 1),
        max_epochs=float("inf"),
        probe_rows=effort.probe_rows,
        group=effort.group,
    )

    _title("Proxies")
    proxies.train_proxies(
        config,
        plan,
        sets,
        out / "proxies",
        count=effort.proxies,
        max_epochs=effort.max_epochs,
        probe_rows=effort.probe_rows,
        group=effort.group,
    )

    _title("Weights")
    scores = str(out / "scores" / influence.FILE)
    pair = [str(out / "proxies" / name) for name in (proxies.MIXTURES, proxies.LOSSES)]
    changes = [str(out / "left_out" / leave_one_out.FILE)]
    runs_left_out = (len(left_out.sources) + 1) * effort.left_out_seeds
    asked = {
        "uniform": (_request("uniform"), None),
        "size": (_request("size"), None),
        "leave_one_out": (_request("leave_one_out", changes), run * runs_left_out),
        "regmix": (_request("regmix", pair), run * effort.proxies),
        "datainf": (_request("influence", [scores], column="datainf"), run + gradients),
        "tracin": (_request("influence", [scores], column="tracin"), run + gradients),
    }
    found: dict[str, weighing.Mixture] = {}
    left: dict[str, str] = {}  # methods without weights, and why
    for name, (request, flops) in asked.items():
        try:
            mixture = weighing.mixtures_of(
                plan, [request], tokens=length.tokens, max_epochs=effort.max_epochs
            )
        except NothingHelps as error:
            left[name] = str(error)
            print(f"{name} is left out: {error}", flush=True)
            continue
        (made,) = mixture.values()
        provenance = {**made.plan.provenance, "flops": flops}
        found[name] = dataclasses.replace(
            made, plan=dataclasses.replace(made.plan, provenance=provenance)
        )
    if not (out / "weights").exists():
        weighing.write(found, out / "weights")
    cells = weighing.table(found)
    print(aligned(cells, "<" + ">" * (len(cells[0]) - 1)), flush=True)

    _title("Compared")
    compared = comparing.compare(
        config,
        {name: mixture.plan for name, mixture in found.items()},
        sets,
        out / "compared",
        seeds=effort.seeds,
        answers=answers,
        probe_rows=effort.probe_rows,
        group=effort.group,
    )
    with replaced(out / PAGE) as unfinished:
        unfinished.write_text(_report(plan, table, left_out, found, left, compared))
    print(out / PAGE, flush=True)
    return compared


def _request(method: str, inputs: Sequence[str] = (), **options: str) -> Request:
    """As `weights.parse` reads it, for files of any name."""
    told = "".join(f":{key}={value}" for key, value in options.items())
    text = f"{method}={'+'.join(inputs)}{told}" if inputs else method
    return Request(method, tuple(inputs), options, text)


def _title(text: str) -> None:
    print(f"\n--- {text}", flush=True)


def _report(
    plan: Plan,
    scores: pyarrow.Table,
    left_out: leave_one_out.Report,
    found: Mapping[str, weighing.Mixture],
    left: Mapping[str, str],
    compared: comparing.Comparison,
) -> str:
    source = scores["source"].to_numpy(zero_copy_only=False)
    by_source = {
        metric: {name: scores[metric].to_numpy()[source == name] for name in plan.names}
        for metric in ("datainf", "tracin")
    }
    cells = comparing.table(compared)
    parts = [
        "<h2>Did it help?</h2>",
        comparing.drawn(compared),
        drawing.preformatted(aligned(cells, "<" + ">" * (len(cells[0]) - 1))),
        "<h2>Mixtures</h2>",
        *weighing.drawings(found),
        *(drawing.preformatted(f"{name} has none: {why}") for name, why in left.items()),
        "<h2>Benefit of documents</h2>",
        *(
            drawing.histograms(f"{metric}, a document's benefit per token", samples)
            for metric, samples in by_source.items()
        ),
        "<h2>Left out</h2>",
        drawing.preformatted(aligned(left_out.cells, "<" + ">" * (len(left_out.cells[0]) - 1))),
        *map(left_out.drawing, left_out.changes),
    ]
    sources = ", ".join(plan.names)
    return drawing.page(f"Mixtures of {sources}", parts)


def main() -> None:
    """The command line."""
    args = flags.FLAGS
    names = [field.name for field in dataclasses.fields(Effort)]
    effort = Effort(**{name: getattr(args, name) for name in names})
    plan, sets = experiments.open_plan(args.config, args.plan), probe_sets.load(args.probes)
    with alone(args.out, "is at work"):
        pipeline(args.config, plan, sets, args.out, effort, scorers.named_settings(), args.answers)


if __name__ == "__main__":
    experiments.define_inputs()
    flags.DEFINE_string(
        "answers", None, "Folder of questions with answers, see data_mixing.compare."
    )
    flags.DEFINE_integer("seeds", 3, "Of the comparison.", 1)
    flags.DEFINE_integer("left_out_seeds", 1, "Of leave-one-out runs.", 1)
    flags.DEFINE_integer("proxies", 12, "Mixtures that RegMix learns from.", 10)
    flags.DEFINE_integer("rows", 64, "Rows of each source that are scored.", 2)
    flags.DEFINE_integer("train_rows", 64, "Rows for the curvature of DataInf.", 1)
    flags.DEFINE_integer("probe_rows", 64, "Most rows of a capability.", 2)
    flags.DEFINE_integer("checkpoints", 4, "Of the base run, that score.", 1)
    flags.DEFINE_float("max_epochs", 4.0, "Cap on repetition in the weights.", 0)
    flags.DEFINE_integer("group", 0, "Runs that train as one program; 0: one a device.", 0)
    scorers.define_settings()
    cli.run(main)
