r"""Judges a checkpoint by tasks of lm-evaluation-harness (extra `[eval]`), or by a suite of them.

    python -m mobilellm_jax.evaluate --checkpoint=runs/mine --tasks=commonsense --out=runs/mine/evaluation
    python -m mobilellm_jax.evaluate --checkpoint=runs/mine --tasks=arc_easy,piqa --data=eval --limit=200

A suite is commonsense (the eight tasks of the papers and their average), mobilellm or r1_base, each
with the papers' shots; any other name is a task or group of the harness. With --data data sets are read
from local files (`evaluation/local_data.py` says which). A table is printed, in Markdown, with standard
errors and beside the published row of that size; --out keeps it with the harness's results in JSON.
--cache=FILE keeps each answer, so that a killed evaluation goes on.
"""

import contextlib
import dataclasses
import difflib
import functools
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from mobilellm_jax import cli
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.suites import AVERAGE, PUBLISHED, SUITES, Entry
from mobilellm_jax.model.config import ModelConfig, parameter_count
from mobilellm_jax.tables import markdown_table
from mobilellm_jax.training.checkpoint import LoadedModel, load_model


@dataclasses.dataclass(frozen=True)
class Line:
    """A figure of the table."""

    label: str
    shots: int
    metric: str
    value: float
    standard_error: float
    averaged: bool = False
    documents: int = 0


def evaluate(
    loaded: LoadedModel,
    tasks: Sequence[str],
    data: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    rows: int = 32,
    dtype: str = "float32",
    cache: str = "",
    seed: int = 0,
    chat: bool = False,
    allow_code: bool = False,
) -> tuple[list[Line], dict[str, Any]]:
    """Runs tasks and suites.

    Args:
      loaded: the network and its tokenizer.
      tasks: names of suites, and of tasks and groups of the harness.
      data: folder with data sets in local files.
      limit: documents of each task; None: all.
      shots: examples before each question; None: what suite or task say.
      rows: texts that are computed together.
      dtype: of activations and products.
      cache: file of answers that are not computed again; none if empty.
      seed: of the draws of tasks that sample.
      chat: ask through the tokenizer's chat template.
      allow_code: tasks may run what the network writes, in the sandbox.

    Returns:
      lines of the table, and the harness's results.

    Raises:
      UserError: the harness is not installed, a task does not exist, its data cannot be had, or it
        would run code and may not.
    """
    try:
        import lm_eval

        from mobilellm_jax.evaluation.code_answers import in_place_of_code_eval
        from mobilellm_jax.evaluation.harness import HarnessModel
        from mobilellm_jax.evaluation.local_data import local_datasets, question_tasks
    except ImportError as error:
        raise UserError(
            f"evaluation needs lm-evaluation-harness ({error}): pip install 'mobilellm-jax[eval]'."
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager, own = _harness_tasks(), question_tasks(data)
    known = {*own, *manager.all_tasks}
    # What several suites ask for is computed, and counts in an average, once.
    entries = list(dict.fromkeys(entry for name in tasks for entry in _entries(name, known)))
    if (code := [e.task for e in entries if e.runs_code]) and not allow_code:
        raise UserError(
            f"{', '.join(code)} run programs that the network writes: --allow_code runs them in a "
            "sandbox without network and without your files."
        )
    lm = HarnessModel(loaded.params, loaded.model, loaded.tokenizer, dtype, rows, seed)
    results: dict[str, Any] = {}
    lines = []
    sandbox = in_place_of_code_eval(allowed=True) if code else contextlib.nullcontext()
    with local_datasets(data), sandbox:
        for entry in entries:
            given: Any = own.get(entry.task, entry.task)
            found: Any = lm_eval.simple_evaluate(
                lm,
                tasks=[given],
                num_fewshot=entry.shots if shots is None else shots,
                limit=limit,
                use_cache=cache or None,
                log_samples=False,
                apply_chat_template=chat,
                task_manager=manager,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                bootstrap_iters=1000,
                confirm_run_unsafe_code=allow_code,
            )
            results[entry.task] = {
                key: found[key] for key in ("results", "n-shot", "n-samples", "versions")
            }
            lines += _lines(entry, found)
    results["cut"] = dict(lm.counts)
    return [*lines, *_averages(lines)], results


@functools.cache
def _harness_tasks() -> Any:
    """The harness's index of its tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _entries(name: str, known: Iterable[str]) -> tuple[Entry, ...]:
    if name in SUITES:
        return SUITES[name]
    names = {*known}
    if name not in names:
        near = difflib.get_close_matches(name, [*SUITES, *names], 5, 0.5)
        raise UserError(
            f"--tasks: there is no suite or task {name!r}"
            + (f"; near are {', '.join(near)}." if near else f"; suites are {', '.join(SUITES)}.")
        )
    return (Entry(name, "", name, shots=None),)


def _lines(entry: Entry, found: Mapping[str, Any]) -> list[Line]:
    """The figure that a suite reports of a task, or all figures of what is asked for by name."""
    results, counts = found["results"], found["n-samples"]
    # A task or group has figures under its name; a tag has none, but its tasks have.
    names = [entry.task] if entry.task in results else list(results)
    lines = []
    for name in names:
        label = entry.label if name == entry.task else name
        shots = found["n-shot"].get(name) or 0
        parts = [counts[name]] if name in counts else counts.values()
        documents = sum(part["effective"] for part in parts)
        for key, value in results[name].items():
            metric, _, filtered = key.partition(",")
            if not isinstance(value, float | int) or metric.endswith("_stderr") or not filtered:
                continue
            if entry.metric and key != entry.metric:
                continue
            error = results[name].get(f"{metric}_stderr,{filtered}")
            error = float(error) if isinstance(error, float | int) else math.nan
            shown = metric if filtered == "none" else f"{metric} ({filtered})"
            lines.append(Line(label, shots, shown, float(value), error, entry.averaged, documents))
    if not lines:
        raise UserError(
            f"the task {entry.task} reports no {entry.metric}, but {', '.join(results[names[0]])}: the "
            "harness's version may differ from the one that suites were written for."
        )
    return lines


def _averages(lines: Sequence[Line]) -> list[Line]:
    """The unweighted mean of a suite's tasks, whose errors are independent."""
    parts = [line for line in lines if line.averaged]
    if not parts:
        return []
    mean = sum(line.value for line in parts) / len(parts)
    error = math.sqrt(sum(line.standard_error**2 for line in parts)) / len(parts)
    documents = sum(line.documents for line in parts)
    return [Line(AVERAGE, 0, f"mean of {len(parts)}", mean, error, False, documents)]


def nearest_published(model: ModelConfig) -> str:
    """The published network of that kind whose number of parameters is nearest."""
    sizes = {"125M": 124.6, "140M": 140, "350M": 345.3, "360M": 360, "600M": 603.1, "950M": 949}
    shared = any(stack.repeats > 1 for stack in model.stacks)
    reasons = model.qk_norm == "unit"

    def fits(name: str) -> bool:
        return ("-LS-" in name) == shared and ("-R1-" in name) == reasons

    size = math.log(parameter_count(model) / 1e6)
    names = [name for name in PUBLISHED if fits(name)] or list(PUBLISHED)
    return min(
        names,
        key=lambda name: abs(math.log(next(m for s, m in sizes.items() if s in name)) - size),
    )


def table(lines: Sequence[Line], model: ModelConfig) -> str:
    """The figures in Markdown, beside the published ones of the nearest size where there are any."""
    name = nearest_published(model)
    published = PUBLISHED[name] if any(line.label in PUBLISHED[name] for line in lines) else {}
    header = ["task", "shots", "metric", "value", "standard error", "documents"]
    rows = [[*header, name] if published else header]
    for line in lines:
        error = "" if math.isnan(line.standard_error) else f"{line.standard_error:.4f}"
        row = [line.label, str(line.shots), line.metric, f"{line.value:.4f}", error]
        row.append(f"{line.documents:,}")
        if published:
            figure = published.get(line.label)
            row.append("" if figure is None else f"{figure / 100:.3f}")
        rows.append(row)
    return markdown_table(rows, "<><>>>>"[: len(rows[0])])


def main() -> None:
    """See the module."""
    args = flags.FLAGS
    out = Path(args.out) if args.out else None
    if out is not None and (out / "results.json").exists():
        raise UserError(f"--out={out} holds results already: name another folder.")
    loaded = load_model(args.checkpoint)
    lines, results = evaluate(
        loaded,
        args.tasks,
        Path(args.data) if args.data else None,
        args.limit,
        args.shots,
        args.rows,
        args.dtype,
        args.cache,
        args.seed,
        args.chat,
        args.allow_code,
    )
    text = table(lines, loaded.model)
    print(text)
    for what, count in results["cut"].items():
        if count:
            print(f"{what} to fit the context of {loaded.model.max_length:,}: {count:,}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        described = {
            "checkpoint": str(args.checkpoint),
            "step": loaded.step,
            "lines": [dataclasses.asdict(line) for line in lines],
            "harness": results,
        }
        (out / "results.md").write_text(text + "\n")
        (out / "results.json").write_text(json.dumps(described, indent=2, default=str) + "\n")


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "A workdir or a checkpoint.", required=True)
    flags.DEFINE_list("tasks", ["commonsense"], "Suites, and tasks of the harness.")
    flags.DEFINE_string("data", "", "Folder with data sets in local files.")
    flags.DEFINE_string("out", "", "Folder for results.md and results.json.")
    flags.DEFINE_integer("limit", None, "Documents of each task; all unless given.", 1)
    flags.DEFINE_integer("shots", None, "Examples before each question, for all tasks.", 0)
    flags.DEFINE_integer("rows", 32, "Texts that are computed together.", 1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and activations.")
    flags.DEFINE_string("cache", "", "File that keeps answers, for one checkpoint.")
    flags.DEFINE_integer("seed", 0, "Seed of examples and draws.", 0)
    flags.DEFINE_bool("chat", False, "Ask through the tokenizer's chat template.")
    flags.DEFINE_bool("allow_code", False, "Run programs that the network writes, in a sandbox.")
    cli.run(main)
