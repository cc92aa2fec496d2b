r"""The tables of the pruning papers: every network that is there, measured, beside its published figures.

    python -m benchmarks.pruning_tables --models=models --out=runs/pruning-tables
    python -m benchmarks.pruning_tables --models=models --out=... --only=469m --data=eval --limit=200

--models is a folder of checkpoints and Hugging Face folders by the names in the first columns of the
tables below (`TABLES`); those that are absent stand as `-`, and are no error. Each cell is ours and,
behind a stroke, the published figure, in per cent. What cannot be measured is said in one sentence on
the error stream. OUT gets results.jsonl, a line for each task of each network, by which a command that
was stopped goes on (delete lines to measure again), and tables.md.

Published: EfficientLLM (arXiv 2502.06663), table 2, those rows whose networks this program reads;
Adapt-Pruner (arXiv 2502.03460), the README of its code: MMLU with five examples. Of its Llama-3.1-8B
tables, at 20 to 60 % fewer parameters, no figure was found beyond the abstract's: it is 1 to 7 points
ahead of LLM-Pruner, FLAP and SliceGPT on average.
"""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluate import evaluate
from mobilellm_jax.evaluation.suites import AVERAGE, SUITES, Entry
from mobilellm_jax.interop.stored import load_model
from mobilellm_jax.tables import markdown_table


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a paper."""

    title: str
    suite: str
    rows: Mapping[str, Mapping[str, float]]  # by folder: published figures by label, in per cent


_COLUMNS = (*(entry.label for entry in SUITES["efficientllm"]), AVERAGE)
_TABLE_2 = {
    "SmolLM-135M": (30.05, 29.35, 61.32, 59.85, 42.67, 34.40, 68.55, 52.96, 49.87),
    "efficientllm-134m-500b": (30.54, 30.97, 62.88, 60.40, 43.81, 33.60, 68.82, 53.28, 50.54),
    "SmolLM-360M": (33.89, 36.26, 70.16, 55.23, 53.51, 37.60, 71.38, 57.22, 54.48),
    "Qwen2-0.5B": (31.85, 28.50, 55.05, 61.25, 49.16, 32.80, 69.75, 57.22, 50.53),
    "Qwen2.5-0.5B": (33.37, 32.17, 64.44, 61.99, 52.09, 35.20, 70.29, 56.20, 53.20),
    "efficientllm-469m-50b": (33.09, 35.92, 70.50, 59.85, 53.16, 35.00, 72.69, 56.27, 54.77),
    "efficientllm-469m-500b": (34.54, 38.40, 72.10, 62.42, 56.84, 40.40, 73.83, 57.46, 57.35),
    "TinyLlama-1.1B": (32.30, 30.29, 60.40, 56.85, 59.13, 35.80, 73.07, 59.04, 53.51),
    "Sheared-LLaMA-1.3B": (31.51, 29.44, 61.07, 61.83, 59.33, 34.40, 73.94, 58.01, 54.00),
    "Llama-3.2-1B": (36.31, 31.48, 65.28, 63.88, 63.69, 37.40, 74.59, 60.54, 56.69),
    "efficientllm-1.1b-50b": (36.71, 40.36, 73.61, 62.39, 60.24, 40.20, 75.19, 61.25, 59.03),
    "efficientllm-1.1b-320b": (37.71, 42.24, 73.48, 67.09, 64.09, 41.80, 75.41, 61.17, 60.75),
}
_MMLU = {"adapt-350m-125m": 25.35, "adapt-600m-350m": 32.25, "adapt-1b-600m": 37.34}
_STRATEGIES = ("adapt", "llm_pruner", "flap", "slicegpt")
TABLES = {
    "efficientllm": Table(
        "EfficientLLM, table 2",
        "efficientllm",
        {name: dict(zip(_COLUMNS, row, strict=True)) for name, row in _TABLE_2.items()},
    ),
    "adapt_pruner": Table(
        "Adapt-Pruner, interleaved",
        "adapt_pruner",
        {name: {"MMLU": value} for name, value in _MMLU.items()},
    ),
    "one_shot": Table(
        "Adapt-Pruner, Llama-3.1-8B in one shot",
        "adapt_pruner",
        {"Llama-3.1-8B": {}}
        | {f"8b-{share}-{name}": {} for share in (20, 40, 50, 60) for name in _STRATEGIES},
    ),
}


def measured(
    tables: Sequence[Table],
    models: Path,
    kept: Path,
    limit: int | None = None,
    **settings: Any,
) -> dict[tuple[str, Entry], float]:
    """Measures what is there and was not measured before.

    Args:
      tables: whose networks and tasks are asked for.
      models: folder of the networks.
      kept: file of results, a line for each; what is in it is not measured again.
      limit: documents of each task; None: all. Results with another limit do not count.
      settings: see `evaluate.evaluate`.

    Returns:
      By folder and task, shares of one.
    """
    lines = (
        [json.loads(x) for x in kept.read_text(encoding="utf-8").splitlines()]
        if kept.exists()
        else []
    )
    done = {
        (x["model"], x["task"], x["shots"], x["metric"]): x["value"]
        for x in lines
        if x["limit"] == limit
    }
    found, unusable = {}, set()
    for table in tables:
        for name in table.rows:
            model = None
            for entry in SUITES[table.suite]:
                key = name, entry.task, entry.shots, entry.metric
                if key not in done and (models / name).exists() and name not in unusable:
                    try:
                        model = model or load_model(models / name)
                    except UserError as error:
                        unusable.add(name)
                        print(f"{name}: {error}", file=sys.stderr)
                        continue
                    try:
                        done[key] = _asked(model, entry, limit, **settings)
                    except UserError as error:
                        print(f"{name}, {entry.label}: {error}", file=sys.stderr)
                        continue
                    record = dict(zip(("model", "task", "shots", "metric"), key, strict=True))
                    with kept.open("a", encoding="utf-8") as file:
                        file.write(
                            json.dumps({**record, "limit": limit, "value": done[key]}) + "\n"
                        )
                if key in done:
                    found[name, entry] = done[key]
    return found


def _asked(model: Any, entry: Entry, limit: int | None, **settings: Any) -> float:
    """A figure of a suite, by itself."""
    lines, _ = evaluate(model, [entry.task], shots=entry.shots, limit=limit, **settings)
    metric = entry.metric.partition(",")[0]
    (value,) = [line.value for line in lines if line.metric == metric]
    return value


def markdown(table: Table, found: Mapping[tuple[str, Entry], float]) -> str:
    """A table with ours and the published figures; the average where all its tasks were measured."""
    entries = SUITES[table.suite]
    labels = [*(entry.label for entry in entries), AVERAGE]
    lines = [["network", *labels]]
    for name, published in table.rows.items():
        ours = {entry.label: found.get((name, entry), math.nan) for entry in entries}
        averaged = [ours[entry.label] for entry in entries if entry.averaged]
        ours[AVERAGE] = sum(averaged) / len(averaged)
        lines.append([name, *(_cell(ours[label], published.get(label)) for label in labels)])
    return f"{table.title}\n\n" + markdown_table(lines, "<" + ">" * len(labels))


def _cell(ours: float, published: float | None) -> str:
    text = "-" if math.isnan(ours) else f"{100 * ours:.2f}"
    return text if published is None else f"{text} / {published:.2f}"


def main(_: list[str]) -> None:
    """Measures and prints, with the flags."""
    args = flags.FLAGS
    tables = [
        dataclasses.replace(table, rows=rows)
        for table in TABLES.values()
        if (rows := {name: row for name, row in table.rows.items() if re.search(args.only, name)})
    ]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    found = measured(
        tables,
        Path(args.models),
        out / "results.jsonl",
        args.limit,
        data=Path(args.data) if args.data else None,
        rows=args.rows,
        dtype=args.dtype,
    )
    text = "\n\n".join(markdown(table, found) for table in tables)
    (out / "tables.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    flags.DEFINE_string("models", None, "Folder of the networks.", required=True)
    flags.DEFINE_string("out", None, "Folder of what is found.", required=True)
    flags.DEFINE_string("only", "", "Regular expression: other networks are left out.")
    flags.DEFINE_string("data", "", "Folder with data sets in local files.")
    flags.DEFINE_integer("limit", None, "Documents of each task; all unless given.", 1)
    flags.DEFINE_integer("rows", 32, "Texts that a device computes together.", 1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and activations.")
    app.run(main)
