"""Do scores of data predict what training on them does? The linear datamodelling score, by retraining.

    python -m benchmarks.datamodels --corpora=DIR --out=runs/datamodels --subsets=40

cuts the documents of DIR/*.jsonl[.gz] into groups, trains one network on all groups alike and others on
random halves of the groups (the same tokens and seed each), and measures the loss of held-out documents
of every corpus. Each metric of `data_mixing.influence` scores rows of each group with checkpoints of the
first network. What it predicts of a half is the mean benefit of its groups; the score is Spearman's
correlation of that with what was measured (Park et al. 2023, arXiv 2303.14186, section 2), a mean over
corpora, with a 95 % interval from drawing the halves again. 1 is perfect, 0 says nothing.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from absl import app, flags, logging
from scipy.stats import spearmanr

from data_mixing import experiments, influence, probe_sets
from data_mixing.probe_sets import Probe, ProbeSets
from data_mixing.scorers import Settings
from data_mixing.together import train_together
from mobilellm_jax.data.corpora import FileCorpus, documents, split_of
from mobilellm_jax.data.inputs import text_lines
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.model.config import ModelConfig, Stack, flops_per_token
from mobilellm_jax.prepare import prepare
from mobilellm_jax.tables import aligned
from mobilellm_jax.training.config import base_config

HELDOUT = 0.06
RIVALS = "embedding", "ngrams", "loss"  # which cost next to nothing
NETWORKS = {  # on rows of 128 tokens, with 1,024 pieces
    "tiny": ModelConfig(1024, 64, (Stack(3, 2, 1, 160),), head_dim=32, max_length=512, init_std=0.05),
    "small": ModelConfig(1024, 128, (Stack(4, 2, 1, 320),), head_dim=64, max_length=512, init_std=0.05),
}  # fmt: skip


def grouped(corpora: Path, out: Path, groups: int) -> dict[str, list[str]]:
    """Writes the documents of each corpus in its order as several files; names of groups by corpus."""
    found: dict[str, list[str]] = {}
    texts: dict[str, list[dict[str, str]]] = {}
    for path in sorted(corpora.glob("*.jsonl*")):
        texts[path.name.split(".")[0].lower()] = [json.loads(line) for line in text_lines(path)]
    size = {name: sum(len(d["text"]) for d in some) for name, some in texts.items()}
    for name, some in texts.items():
        # The more text the more groups, but not in proportion: the largest is 25 times the smallest.
        share = math.sqrt(size[name]) / sum(map(math.sqrt, size.values()))
        found[name] = [f"{name}_{i}" for i in range(max(3, round(groups * share)))]
        parts = np.array_split(np.arange(len(some)), len(found[name]))
        for group, part in zip(found[name], parts, strict=True):
            lines = [json.dumps({"id": f"{name}-{i}", "text": some[i]["text"]}) for i in part]
            (out / f"{group}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return found


def probes_of(out: Path, groups: dict[str, list[str]]) -> ProbeSets:
    """The held-out documents of every corpus, a capability each."""
    found, capabilities = {}, {}
    for corpus, names in groups.items():
        some = []
        for name in names:
            for d in documents(FileCorpus(name, str(out / f"{name}.jsonl"), heldout=HELDOUT)):
                if split_of(d.text.encode(), HELDOUT) == "heldout":
                    half = probe_sets.half_of(d.text)
                    some.append(Probe(d.text[:20_000], corpus, half, d.id, d.file, d.place))
        found[corpus] = tuple(some)
        if {p.half for p in some} == set(probe_sets.HALVES):
            capabilities[corpus] = (corpus,)
    return ProbeSets(capabilities, {c: found[c] for c in capabilities})


def configuration(args: Any, plan: Plan) -> Any:
    c = base_config(NETWORKS[args.network])
    c.plan, c.row_length, c.steps, c.global_batch = (
        f"{plan.directory}/mixture.json",
        128,
        args.steps,
        8,
    )
    c.execution.dtype = "float32"
    c.schedule.peak, c.schedule.warmup_steps, c.schedule.floor = 4e-3, args.steps // 20, 0.0
    c.checkpoint.every = args.steps
    return c


def scores_of(table: pyarrow.Table, column: str, groups: list[str]) -> np.ndarray:
    """Mean benefit per token of each group."""
    source = table["source"].to_numpy(zero_copy_only=False)
    values, tokens = table[column].to_numpy(), table["tokens"].to_numpy()
    return np.array([np.average(values[source == g], weights=tokens[source == g]) for g in groups])


def correlations(predicted_MC: np.ndarray, falls_MC: np.ndarray, draws: int = 1000) -> np.ndarray:
    """Spearman's correlation over M halves, a mean over C corpora: first of all halves, then of draws."""

    def mean(rows: np.ndarray) -> float:
        columns = range(falls_MC.shape[1])
        each = [spearmanr(predicted_MC[rows, c], falls_MC[rows, c]).statistic for c in columns]
        return float(np.mean(each))

    count, rng = len(falls_MC), np.random.default_rng(0)
    drawn = [rng.integers(0, count, count) for _ in range(draws)]
    return np.array([mean(rows) for rows in (np.arange(count), *drawn)])


def interval(drawn: np.ndarray) -> str:
    """The central 95 % of all draws."""
    low, high = np.nanpercentile(drawn[1:], [2.5, 97.5])
    return f"{low:.3f} to {high:.3f}"


def main(_: list[str]) -> None:
    args = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    groups = grouped(Path(args.corpora), out, args.groups)
    names = [group for of_one in groups.values() for group in of_one]
    corpora = [FileCorpus(name, str(out / f"{name}.jsonl"), heldout=HELDOUT) for name in names]
    plan = prepare(corpora, out / "data", 128, vocab_size=1024)
    sets, config = probes_of(out, groups), configuration(args, plan)

    # --- Retrained on halves of the groups
    rng = np.random.default_rng(args.seed)
    inside_MG = np.array(
        [rng.permutation(len(names)) < len(names) // 2 for _ in range(args.subsets)]
    )
    every = dict.fromkeys(names, 1 / len(names))
    members = [experiments.member_of("all", plan, every, config, 0, "benchmarks.datamodels")]
    for m, inside_G in enumerate(inside_MG):
        chosen = [name for name, inside in zip(names, inside_G, strict=True) if inside]
        shares = dict.fromkeys(chosen, 1 / len(chosen))
        members.append(experiments.member_of(f"half_{m}", plan, shares, config, 0, "benchmarks"))
    rows = experiments.probe_rows(sets, "heldout", plan, 128, args.probe_rows)
    began = time.monotonic()
    measured = train_together(
        config,
        members,
        rows,
        out / "runs",
        measure_every=args.steps,
        group=args.group,
        keep=args.keep,
    )
    print(f"{len(members)} runs: {time.monotonic() - began:.0f} s")
    falls_MC = -np.array(
        [[measured[f"half_{m}"].mean(c)[-1] for c in rows] for m in range(args.subsets)]
    )
    print(
        "nats per token, all groups:",
        {c: round(float(measured["all"].mean(c)[-1]), 3) for c in rows},
    )
    print(
        "spread over halves:",
        {c: round(float(s), 4) for c, s in zip(rows, falls_MC.std(0), strict=True)},
    )

    # --- Predicted from scores
    points = influence.open_checkpoints([str(out / "runs" / "all")], args.keep, list(rows))
    lines = [["metric", "layers", "score", "95 % interval", "- best rival", "95 % interval"]]
    lines[0] += [*rows, "FLOPs", "of a run"]
    found: dict[tuple[str, str], np.ndarray] = {}
    run_flops = flops_per_token(NETWORKS[args.network], 128) * args.steps * 8 * 128
    for layers in args.layers:
        metrics = [*RIVALS] if layers == args.layers[0] else []
        metrics += ["datainf", "tracin", "dot"]
        settings = Settings(layers, batch_rows=16, own_gradients=4)
        table = influence.influence(
            plan,
            sets,
            points,
            out / f"scores-{layers}",
            rows=args.rows,
            train_rows=args.train_rows,
            probe_rows=args.probe_rows,
            metrics=metrics,
            standardise=True,
            settings=settings,
        )
        costs = json.loads(table.schema.metadata[b"data_mixing"])["costs"]
        for metric in metrics:
            column = [metric if metric == "loss" else f"{metric}/{c}" for c in rows]
            benefit_GC = np.stack([scores_of(table, name, names) for name in column], axis=1)
            predicted_MC = inside_MG @ benefit_GC / inside_MG.sum(1, keepdims=True)
            found[metric, layers] = drawn = correlations(predicted_MC, falls_MC)
            each = [
                spearmanr(predicted_MC[:, i], falls_MC[:, i]).statistic for i in range(len(rows))
            ]
            kind = {"loss": "states", "embedding": "states", "ngrams": "ngrams"}.get(
                metric, "gradients"
            )
            flops = sum(cost["flops"] for name, cost in costs.items() if name.startswith(kind))
            shown = layers if kind == "gradients" else ""
            cells = [metric, shown, f"{drawn[0]:.3f}", interval(drawn)]
            rivals = [
                found[name, args.layers[0]] for name in RIVALS if (name, args.layers[0]) in found
            ]
            apart = drawn - max(rivals, key=lambda of: of[0])
            cells += [f"{apart[0]:+.3f}", interval(apart)] if kind == "gradients" else ["", ""]
            cells += [f"{x:.2f}" for x in each]
            lines.append([*cells, f"{flops:.2g}", f"{flops / run_flops:.2f}"])
    print(aligned(lines, "<<" + ">" * (len(lines[0]) - 2)))


if __name__ == "__main__":
    flags.DEFINE_string("corpora", None, "Folder of corpora.", required=True)
    flags.DEFINE_string("out", None, "Folder for data, runs and scores.", required=True)
    flags.DEFINE_enum("network", "tiny", list(NETWORKS), "Its size.")
    flags.DEFINE_integer("groups", 60, "Groups of documents, about.")
    flags.DEFINE_integer("subsets", 40, "Halves that are trained on.", 4)
    flags.DEFINE_integer("steps", 300, "Of every run.")
    flags.DEFINE_integer("rows", 24, "Rows of each group that are scored.")
    flags.DEFINE_integer("train_rows", 128, "Rows that stand for the training data in DataInf.")
    flags.DEFINE_integer("probe_rows", 128, "Most rows of held-out text of a corpus.")
    flags.DEFINE_integer("keep", 4, "Checkpoints that score.")
    flags.DEFINE_integer("group", 0, "Runs that train as one program.")
    flags.DEFINE_integer("seed", 0, "Of the halves.")
    flags.DEFINE_list("layers", ["embedding+output", "all"], "Choices of weights.")
    app.run(main)
