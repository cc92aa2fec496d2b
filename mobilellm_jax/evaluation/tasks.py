"""Tasks of lm-evaluation-harness, and those like them in `answered.py`: opened once, put to any network."""

import contextlib
import dataclasses
import difflib
import functools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.answered import Answered, answered_tasks
from mobilellm_jax.evaluation.code_answers import SandboxedCodeEval, in_place_of_code_eval
from mobilellm_jax.evaluation.local_data import local_datasets, local_tasks
from mobilellm_jax.evaluation.suites import AVERAGE, SUITES, Entry, Line


@dataclasses.dataclass(frozen=True)
class Opened:
    """A task or a group of tasks, with its data."""

    entry: Entry
    loaded: Sequence[Any]  # the harness's tasks or group
    chat: bool  # asked through the chat template
    shots: int | None  # None: what the task says
    suites: Sequence[str]  # those asked for that count it in their average


def open_tasks(
    names: Sequence[str],
    data: Path | None = None,
    shots: int | None = None,
    chat: bool = False,
    samples: int | None = None,
    allow_code: bool = False,
) -> list[Opened]:
    """Opens suites and tasks, so that all that is missing is missed before a network is asked.

    Args:
      names: of suites, of tasks and groups of the harness, of ours, and of files in `data`.
      data: folder with data sets in local files.
      shots: examples before each question; None: what suite or task say.
      chat: ask through the tokenizer's chat template, also where the suite does not say so.
      samples: answers to each problem that may have several; None: what suite or task say.
      allow_code: tasks may run what the network writes, in the sandbox.

    Raises:
      UserError: a task does not exist, its data cannot be had, or it would run code and may not.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager, own = _harness_tasks(), {**answered_tasks(), **local_tasks(data)}
    known = {*own, *manager.all_tasks}
    suites: dict[Entry, list[str]] = {}  # what several suites ask for is asked once
    for name in dict.fromkeys(names):
        for entry in _entries(name, known):
            suites.setdefault(entry, []).extend([name] if entry.averaged else [])
    code = [e.task for e in suites if e.runs_code or own.get(e.task, {}).get("unsafe_code")]
    if code and not allow_code:
        raise _runs_code(code)
    opened = []
    # The harness's tasks of programs try out what runs them when they are loaded.
    with local_datasets(data), in_place_of_code_eval(allowed=True):
        for entry, counting in suites.items():
            spec: Any = entry.task
            if entry.task in own:
                spec = dict(own[entry.task])
                if getattr(spec.get("class"), "several", False):
                    spec["repeats"] = samples or entry.samples or spec["repeats"]
            found = manager.load([spec])
            _check_code(found["tasks"], allow_code)
            group = found["groups"].get(entry.task)
            loaded = [group] if group else list(found["tasks"].values())
            asked = entry.shots if shots is None else shots
            opened.append(Opened(entry, loaded, chat or entry.chat, asked, counting))
    return opened


def ask(
    tasks: Iterable[Opened],
    lm: LM,
    limit: int | None = None,
    cache: str = "",
    seed: int = 0,
    log: bool = False,
) -> tuple[list[Line], dict[str, Any]]:
    """Puts tasks to a network.

    Args:
      tasks: opened; they can be put again, to this network or another.
      lm: the network.
      limit: documents of each task; None: all.
      cache: file of answers that are not computed again; none if empty.
      seed: of the choice of examples.
      log: keep what was asked and answered, too.

    Returns:
      lines of the table, and the harness's results by task.

    Raises:
      UserError: a task has fewer examples than are to stand before a question.
    """
    results: dict[str, Any] = {}
    lines: list[Line] = []
    of_suites: dict[str, list[Line]] = {}
    for task in tasks:
        lm.chat = task.chat  # conversations spell special tokens, other texts do not
        with _enough_examples(task):
            found: Any = lm_eval.simple_evaluate(
                lm,
                tasks=list(task.loaded),
                num_fewshot=task.shots,
                limit=limit,
                use_cache=cache or None,
                log_samples=log,
                apply_chat_template=task.chat,
                task_manager=_harness_tasks(),
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                bootstrap_iters=1000,
                confirm_run_unsafe_code=True,  # allowed when they were opened
            )
        kept = ("results", "n-shot", "n-samples", "versions", *(["samples"] if log else []))
        results[task.entry.task] = {key: found[key] for key in kept}
        told = _lines(task.entry, found)
        lines += told
        for suite in task.suites:
            of_suites.setdefault(suite, []).extend(told)
    return [*lines, *(_average(suite, parts) for suite, parts in of_suites.items())], results


@contextlib.contextmanager
def _enough_examples(task: Opened) -> Iterator[None]:
    """Around a task that is put: the harness draws examples before it asks, and lets `random` complain."""
    try:
        yield
    except ValueError as error:
        if "Sample larger than population" not in str(error):
            raise
        raise UserError(
            f"{task.entry.task} has fewer examples than the {task.shots} that are to stand before each "
            "question: lower --shots."
        ) from None


def _check_code(tasks: Mapping[str, Any], allowed: bool) -> None:
    """Refuses tasks that run programs, unless that is allowed and they run in the sandbox."""
    code = {name: task for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)}
    if code and not allowed:
        raise _runs_code(list(code))
    for name, task in code.items():
        metrics = [m["metric"] for m in task.config.metric_list or ()]
        used = [value for m in metrics if callable(m) for value in m.__globals__.values()]
        if not isinstance(task, Answered) and not any(
            isinstance(value, SandboxedCodeEval) for value in used
        ):
            raise UserError(
                f"{name} runs programs that the network writes by means of its own, which the sandbox "
                "does not hold: it cannot be asked here."
            )


def _runs_code(names: Sequence[str]) -> UserError:
    return UserError(
        f"{', '.join(names)} run programs that the network writes: --allow_code runs them in a "
        "sandbox without network and without your files."
    )


@functools.cache
def _harness_tasks() -> Any:
    """The harness's index of its tasks, which takes seconds to make."""
    return TaskManager()


def _entries(name: str, known: Iterable[str]) -> tuple[Entry, ...]:
    if name in SUITES:
        return SUITES[name]
    names = {*known}
    if name not in names:
        near = difflib.get_close_matches(name, [*SUITES, *names], 5, 0.5)
        raise UserError(
            f"there is no suite or task {name!r}"
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
            lines.append(Line(label, shots, shown, float(value), error, documents))
    if not lines:
        raise UserError(
            f"the task {entry.task} reports no {entry.metric}, but {', '.join(results[names[0]])}: the "
            "harness's version may differ from the one that suites were written for."
        )
    return lines


def _average(suite: str, parts: Sequence[Line]) -> Line:
    """The unweighted mean of a suite's tasks, whose errors are independent."""
    mean = sum(line.value for line in parts) / len(parts)
    error = math.sqrt(sum(line.standard_error**2 for line in parts)) / len(parts)
    documents = sum(line.documents for line in parts)
    labels = tuple(line.label for line in parts)
    return Line(AVERAGE, 0, f"{suite}, mean of {len(parts)}", mean, error, documents, labels)
