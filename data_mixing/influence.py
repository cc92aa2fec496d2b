r"""What training on each document does to each capability: MobileLLM-R1's influence, and its rivals.

    python -m data_mixing.influence --plan=data/mixture.json --probes=probes --checkpoints=runs/mine \
        --out=scores
    python -m data_mixing.influence --plan=... --probes=... --out=scores --steps=10 \
        --checkpoints=code=runs/code --checkpoints=math=runs/math --checkpoints=knowledge=runs/know

scores the first rows that the plan's stream would read of each source, and writes OUT/scores.parquet:
a line for each piece of a document in them, with its benefit per token. Positive means helpful.
Columns are METRIC (over all capabilities and checkpoints), METRIC/CAPABILITY, and what they are made
of, such as datainf/code/1000 at step 1000.

    datainf    slope along H^-1 times the probe's gradient, checkpoints weighted by their steps
               (MobileLLM-R1, arXiv 2509.24945, equation 5; DataInf, arXiv 2310.00902)
    tracin     slope along the probe's gradient, weighted by learning rates (arXiv 2002.08484)
    dot        the same at the last checkpoint alone
    loss, embedding, ngrams    cheap rivals, see data_mixing/scorers.py

A checkpoint's own capabilities can be named, as the paper has one specialised model for each; a
directory without a name speaks for all. Killed and started again with the same flags it goes on.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import tqdm
from absl import flags
from etils import epath

from data_mixing import folders, probe_sets, samples
from data_mixing import scorers as scoring
from data_mixing.probe_sets import ProbeSets
from data_mixing.samples import Sample
from data_mixing.scorers import Gradients, Ngrams, Scorer, Settings, States
from mobilellm_jax import cli
from mobilellm_jax.data.opening import open_mixture
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import alone, replaced
from mobilellm_jax.interop.stored import open_model
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.parallel.mesh import local_mesh
from mobilellm_jax.tables import aligned
from mobilellm_jax.training.checkpoint import FOLDER, located, saved_steps
from mobilellm_jax.training.config import configured
from mobilellm_jax.training.length import length_of

GRADIENTS = {"datainf", "tracin", "dot"}
METRICS = ("datainf", "tracin", "dot", "loss", "embedding", "ngrams")
FILE = "scores.parquet"
PART = 256  # rows that are scored between two files


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A network at one step of its training, and the capabilities that it speaks for."""

    path: epath.Path
    step: int
    capabilities: tuple[str, ...]
    model: ModelConfig
    tokenizer: Tokenizer
    learning_rate: float | None  # None: how it was trained is not known
    row_length: int | None


def influence(
    plan: Plan,
    probes: ProbeSets,
    checkpoints: Sequence[Checkpoint],
    out: epath.PathLike,
    *,
    rows: int = 1024,
    train_rows: int = 256,
    probe_rows: int = 512,
    row_length: int | None = None,
    metrics: Sequence[str] = METRICS,
    standardise: bool = True,
    settings: Settings = Settings(),
) -> pyarrow.Table:
    """Scores rows of every source of a plan and writes what it found.

    Args:
      plan: its sources are scored.
      probes: their half `score` is what the rows are to help.
      checkpoints: see `open_checkpoints`.
      out: directory; what an interrupted run left there is used.
      rows: of each source, at most.
      train_rows: the first of the plan's stream, which stand for the training data in DataInf.
      probe_rows: of each capability's probes, at most; of more, a random choice that never changes.
      row_length: of rows; that of training if None.
      metrics: of `METRICS`.
      standardise: divides each capability's scores at each checkpoint by their standard deviation over rows
        before they are added, so that none decides by its size; the paper adds them as they are.
      settings: see `scorers.Settings`.

    Returns:
      Lines of `samples.SCHEMA` with the columns of benefits.

    Raises:
      UserError: the plan, the probes and the checkpoints do not fit together, or `out` holds something
        else.
    """
    out = epath.Path(out)
    capabilities = _capabilities(probes, checkpoints)
    row_length = row_length or checkpoints[-1].row_length or _stored_length(plan)
    tokenizer, model = _checked(plan, checkpoints)
    if unknown := set(metrics) - set(METRICS):
        raise UserError(f"there is no metric {sorted(unknown)[0]!r}, only {', '.join(METRICS)}.")
    if not metrics:
        raise UserError(f"--metrics names none: give some of {', '.join(METRICS)}.")
    for metric in GRADIENTS & set(metrics):  # what would only be met when all is scored
        for capability in capabilities:
            shares(metric, [point for point in checkpoints if capability in point.capabilities])
    described = {
        "plan": plan.hash,
        "probes": probes.fingerprint,
        "checkpoints": [[str(c.path), c.step, list(c.capabilities)] for c in checkpoints],
        "rows": rows,
        "train_rows": train_rows,
        "probe_rows": probe_rows,
        "row_length": row_length,
        "metrics": list(metrics),
        "standardise": standardise,
        "settings": dataclasses.asdict(settings),
    }
    folders.claim(out, described)
    if (out / FILE).exists():
        done = load_table(out / FILE)
        (out / "parts").rmtree(missing_ok=True)  # if it was killed at the very end
        print(f"{out / FILE}: complete, kept as it is.", flush=True)
        return done

    # --- What is scored, by which scorers
    scored = samples.first_samples(plan, row_length, model.vocab_size, rows)
    texts = {c: probes.of(c, "score") for c in capabilities}
    samples.check_disjoint(texts, scored, tokenizer)
    packed = {
        c: samples.some(
            samples.packed_texts([p.text for p in f], tokenizer, row_length), probe_rows
        )
        for c, f in texts.items()
    }
    train = None
    if "datainf" in metrics:
        mixture = open_mixture(plan, row_length, model.vocab_size)
        train = mixture.read(np.arange(min(train_rows, len(mixture))))["tokens"]
    mesh = local_mesh()
    everything = np.concatenate([s.tokens for s in scored])
    scorers: list[Scorer] = []
    if GRADIENTS & set(metrics):
        for c in checkpoints:
            own = {name: packed[name] for name in c.capabilities}
            scorers.append(Gradients(c.path, str(c.step), own, train, settings, mesh))
    if {"loss", "embedding"} & set(metrics):
        ordinary = samples.some(everything, probe_rows)
        scorers.append(States(checkpoints[-1].path, packed, ordinary, settings, mesh))
    if "ngrams" in metrics:
        scorers.append(Ngrams(packed, everything, tokenizer.bos_id, tokenizer.eos_id))

    # --- Scored, part by part
    costs = _score(scorers, scored, out, tokenizer)
    tables = [_joined(out, scorer) for scorer in scorers]
    table = tables[0]
    for other in tables[1:]:
        for name in other.column_names[len(samples.SCHEMA) :]:
            table = table.append_column(name, other[name])
    table = with_joint(table, metrics, checkpoints, standardise)
    table = table.replace_schema_metadata(
        {"data_mixing": json.dumps({**described, "costs": costs})}
    )
    save_table(table, out / FILE)
    (out / "parts").rmtree()
    print(summary(table, metrics, capabilities), flush=True)
    for name, cost in costs.items():
        print(f"{name}: {cost['flops']:.3g} FLOPs, {cost['seconds']:.1f} s", flush=True)
    print(out / FILE, flush=True)
    return table


def open_checkpoints(
    named: Sequence[str], steps: int, capabilities: Sequence[str]
) -> list[Checkpoint]:
    """The networks that score: of each directory so many checkpoints, evenly spaced up to the last.

    Args:
      named: DIR, DIR@STEP, a Hugging Face folder, or one of these behind CAPABILITY[+CAPABILITY]=.
      steps: checkpoints of each directory, at most.
      capabilities: those that a directory without names speaks for.

    Raises:
      UserError: there is no checkpoint, or an unknown capability is named.
    """
    found = []
    for name in named:
        own, equals, where = name.partition("=")
        if "/" in own:  # lies before the sign, which is then part of a path
            own, equals, where = "", "", name
        of = tuple(own.split("+")) if equals else tuple(capabilities)
        if unknown := set(of) - set(capabilities):
            raise UserError(
                f"--checkpoints={name}: there is no capability {sorted(unknown)[0]!r}, only "
                f"{', '.join(capabilities)}."
            )
        directory = epath.Path(where if equals else name)
        saved = saved_steps(directory / FOLDER)
        chosen = np.unique(np.linspace(0, len(saved), min(steps, len(saved)) + 1).round()[1:] - 1)
        paths = [directory / FOLDER / str(saved[int(i)]) for i in chosen]
        for path in paths or [epath.Path(located(directory))]:
            found.append(_opened(path, of))
    return found


def _opened(path: epath.Path, capabilities: tuple[str, ...]) -> Checkpoint:
    stored = open_model(path)
    config: Mapping[str, Any] = stored.meta["config"]
    rate = None
    if "schedule" in config:
        schedule = configured(config["schedule"], "schedule")(length_of(config).steps)
        rate = float(schedule(stored.step))
    return Checkpoint(
        epath.Path(path),
        stored.step,
        capabilities,
        stored.model,
        stored.needed_tokenizer,
        rate,
        config.get("row_length"),
    )


def with_joint(
    table: pyarrow.Table,
    metrics: Sequence[str],
    checkpoints: Sequence[Checkpoint],
    standardise: bool,
) -> pyarrow.Table:
    """Adds columns METRIC/CAPABILITY, over checkpoints, and METRIC, over capabilities as well.

    Weights of a capability's checkpoints sum to 1: in proportion to their steps for DataInf
    (MobileLLM-R1, equation 5), to their learning rates for TracIn, all on the last one for `dot`.
    Capabilities weigh the same; of cosines the largest counts, for what is near one probe is far from
    another.

    Raises:
      UserError: TracIn is asked for, and the learning rates are not known or all zero.
    """
    capabilities = list(dict.fromkeys(c for point in checkpoints for c in point.capabilities))

    def column(name: str) -> np.ndarray:
        values = table[name].to_numpy()
        if not standardise:
            return values
        spread = deviation(table, name)
        return values / spread if spread else values

    for metric in metrics:
        per_capability = {}
        for capability in capabilities if metric != "loss" else ():
            if metric in ("embedding", "ngrams"):
                per_capability[capability] = column(f"{metric}/{capability}")
                continue
            points = [point for point in checkpoints if capability in point.capabilities]
            kind = "datainf" if metric == "datainf" else "gradient"
            parts = [column(f"{kind}/{capability}/{point.step}") for point in points]
            share = shares(metric, points)
            per_capability[capability] = sum(w * x for w, x in zip(share, parts, strict=True))
        for capability, values in per_capability.items():
            if (name := f"{metric}/{capability}") not in table.column_names:
                table = table.append_column(name, pyarrow.array(values))
        if per_capability:
            joined = np.max if metric == "embedding" else np.mean
            joint = joined(list(per_capability.values()), axis=0)
            table = table.append_column(metric, pyarrow.array(joint))
    return table


def shares(metric: str, points: Sequence[Checkpoint]) -> np.ndarray:
    """The weights of a capability's checkpoints, see `with_joint`."""
    if metric == "dot":
        weights = np.array([float(i == len(points) - 1) for i in range(len(points))])
    elif metric == "datainf":
        weights = np.array([float(max(point.step, 1)) for point in points])
    else:
        if None in (rates := [point.learning_rate for point in points]):
            raise UserError(
                "tracin needs the learning rates of its checkpoints, and "
                f"{points[rates.index(None)].path} does not say how it was trained: ask for dot instead."
            )
        weights = np.array(rates, np.float64)
        if not weights.any():
            raise UserError(
                "tracin weighs checkpoints by their learning rates, and all of them are 0: give "
                "checkpoints from before the end of the schedule, or ask for dot instead."
            )
    return weights / weights.sum()


def row_means(table: pyarrow.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A column's mean over the tokens of each row, and the tokens: float64 [rows] each."""
    keys = [table["source"].to_numpy(zero_copy_only=False), table["row"].to_numpy()]
    sources = np.unique(keys[0], return_inverse=True)[1]
    _, row = np.unique(np.stack([sources, keys[1]]), axis=1, return_inverse=True)
    tokens = table["tokens"].to_numpy().astype(np.float64)
    total = np.bincount(row.ravel(), tokens)
    return np.bincount(row.ravel(), table[name].to_numpy() * tokens) / total, total


def deviation(table: pyarrow.Table, name: str) -> float:
    """The standard deviation of a column over rows, about their mean."""
    means, tokens = row_means(table, name)
    centre = np.average(means, weights=tokens)
    return float(np.sqrt(np.average((means - centre) ** 2, weights=tokens)))


def summary(table: pyarrow.Table, metrics: Sequence[str], capabilities: Sequence[str]) -> str:
    """Mean benefit per token of each source: by each metric, and by the first for each capability."""
    names = [*metrics, *(f"{metrics[0]}/{c}" for c in capabilities)]
    names = [name for name in names if name in table.column_names]
    source = table["source"].to_numpy(zero_copy_only=False)
    tokens = table["tokens"].to_numpy()
    text = [["source", "tokens", *names]]
    for one in dict.fromkeys(source.tolist()):
        here = source == one
        means = [np.average(table[name].to_numpy()[here], weights=tokens[here]) for name in names]
        text.append([one, f"{tokens[here].sum():,}", *(f"{mean:.3g}" for mean in means)])
    return aligned(text, "<" + ">" * (len(names) + 1))


# What fits together, and what is there already.


def _capabilities(probes: ProbeSets, checkpoints: Sequence[Checkpoint]) -> list[str]:
    named = {c for point in checkpoints for c in point.capabilities}
    if not named or not checkpoints:
        raise UserError("there is no checkpoint to score with: name one with --checkpoints.")
    return [c for c in probes.capabilities if c in named]


def _checked(plan: Plan, checkpoints: Sequence[Checkpoint]) -> tuple[Tokenizer, ModelConfig]:
    first = checkpoints[0]
    for other in checkpoints[1:]:
        if other.model != first.model:
            raise UserError(
                f"the checkpoints {first.path} and {other.path} are of different networks, whose scores "
                "cannot be added: score with each by itself."
            )
    seen: dict[tuple[str, int], Checkpoint] = {}
    for point in checkpoints:
        for capability in point.capabilities:
            other = seen.setdefault((capability, point.step), point)
            if other is not point:
                raise UserError(
                    f"{other.path} and {point.path} both speak for {capability!r} at step {point.step}: "
                    "name the capabilities of each, or score with one of them."
                )
        if point.tokenizer.fingerprint != plan.tokenizer:
            raise UserError(
                f"the checkpoint {point.path} was trained with another tokenizer "
                f"({point.tokenizer.fingerprint[:12]}) than the plan's rows have "
                f"({plan.tokenizer[:12]}): prepare the sources with that of the checkpoint."
            )
    return first.tokenizer, first.model


def _stored_length(plan: Plan) -> int:
    from mobilellm_jax.data.rows import read_info

    return read_info(plan.resolve(plan.sources[0].path)).row_length


def _score(
    scorers: Sequence[Scorer], scored: Sequence[Sample], out: epath.Path, tokenizer: Tokenizer
) -> dict[str, dict[str, float]]:
    """Writes a file for each scorer and part that is not there yet; what each scorer cost."""
    parts = [(s, slice(i, i + PART)) for s in scored for i in range(0, len(s), PART)]
    ends = tokenizer.bos_id, tokenizer.eos_id
    total = sum(scorer.rows_before + sum(map(len, scored)) for scorer in scorers)
    costs = {}
    with tqdm.tqdm(total=total, unit=" rows", disable=not sys.stderr.isatty()) as bar:
        for scorer in scorers:
            bar.set_description(scorer.name)
            folder = out / "parts" / scorer.name
            cost_file = folder / "cost.json"
            if cost_file.exists():
                bar.update(scorer.rows_before + sum(map(len, scored)))
                costs[scorer.name] = json.loads(cost_file.read_text())
                continue
            start = time.monotonic()
            if bar.disable:  # no terminal, but perhaps a log
                print(
                    f"{scorer.name}: {scorer.rows_before + sum(map(len, scored)):,} rows ...",
                    flush=True,
                )
            values, before, each = scorer.open(bar.update)
            folder.mkdir(parents=True, exist_ok=True)
            for number, (sample, part) in enumerate(parts):
                path = folder / f"{number:05d}.parquet"
                if not path.exists():
                    found = values(sample.tokens[part])
                    save_table(samples.lines(sample, part, found, scorer.columns, *ends), path)
                bar.update(len(sample.rows_N[part]))
            flops = before + each * sum(map(len, scored))
            costs[scorer.name] = {"flops": flops, "seconds": time.monotonic() - start}
            with replaced(cost_file) as unfinished:
                unfinished.write_text(json.dumps(costs[scorer.name]))
    return costs


def _joined(out: epath.Path, scorer: Scorer) -> pyarrow.Table:
    files = sorted((out / "parts" / scorer.name).glob("*.parquet"))
    return pyarrow.concat_tables([load_table(file) for file in files])


def save_table(table: pyarrow.Table, path: epath.Path) -> None:
    """Writes a Parquet file, whole or not at all."""
    with replaced(path) as unfinished, unfinished.open("wb") as stream:
        pyarrow.parquet.write_table(table, stream, compression="zstd")


def load_table(path: epath.Path) -> pyarrow.Table:
    """Reads what `save_table` has written."""
    with path.open("rb") as stream:
        # Without Arrow's threads, see `documents._read`.
        return pyarrow.parquet.read_table(stream, use_threads=False)


def main() -> None:
    """The command line around `influence`."""
    args = flags.FLAGS
    probes = probe_sets.load(args.probes)
    checkpoints = open_checkpoints(args.checkpoints, args.steps, list(probes.capabilities))
    plan, settings = Plan.load(args.plan), scoring.named_settings()
    with alone(args.out, "is scoring"):
        influence(
            plan,
            probes,
            checkpoints,
            args.out,
            rows=args.rows,
            train_rows=args.train_rows,
            probe_rows=args.probe_rows,
            row_length=args.row_length,
            metrics=args.metrics,
            standardise=args.standardise,
            settings=settings,
        )


if __name__ == "__main__":
    flags.DEFINE_string("plan", None, "mixture.json whose sources are scored.", required=True)
    flags.DEFINE_string("probes", None, "Directory of probe sets.", required=True)
    flags.DEFINE_multi_string(
        "checkpoints",
        None,
        "Workdir, DIR@STEP or Hugging Face folder; with CAPABILITY= before it, it speaks for that one. "
        "May be repeated.",
        required=True,
    )
    flags.DEFINE_string("out", None, "Directory to write into.", required=True)
    flags.DEFINE_integer("steps", 10, "Checkpoints of each workdir, evenly spaced.", 1)
    flags.DEFINE_integer("rows", 1024, "Rows of each source to score.", 1)
    flags.DEFINE_integer(
        "train_rows", 256, "Rows of the plan's stream that stand for the training data.", 1
    )
    flags.DEFINE_integer("probe_rows", 512, "Rows of each capability's probes, at most.", 1)
    flags.DEFINE_integer("row_length", None, "Of rows; default: that of training.", 2)
    flags.DEFINE_list("metrics", list(METRICS), "Any of these, joined by commas.")
    flags.DEFINE_bool(
        "standardise",
        True,
        "Divide the scores of each capability and checkpoint by their standard deviation before they "
        "are added; --nostandardise is as in the paper.",
    )
    scoring.define_settings()
    cli.run(main)
