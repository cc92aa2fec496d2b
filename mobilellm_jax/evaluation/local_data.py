"""Data sets of evaluation tasks from local files, where there is no hub or they are to be these.

Two kinds of file are read, below one folder. A data set of the hub is looked for under its own name,
a file for each split:

    DIR/allenai/ai2_arc/ARC-Easy/test.jsonl       also .jsonl.gz, .json, .parquet

and a file that is complete in itself is a task by the name of the file:

    DIR/arc_easy.jsonl.gz      {"query": "...", "choices": ["...", ...], "gold": 0} in every line
    DIR/gsm8k.jsonl            {"question": "...", "answer": "..."}: a problem of mathematics
    DIR/api.jsonl              {"messages": [...]}: a dialogue with functions
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import datasets

from mobilellm_jax.data.inputs import text_lines
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.answered import dialogue_file, problem_file

_ASKED = ("question", "problem", "context")  # names of what a problem asks
_SUFFIXES = {".jsonl": "json", ".jsonl.gz": "json", ".json": "json", ".parquet": "parquet"}


def local_tasks(root: Path | None) -> dict[str, dict[str, Any]]:
    """Tasks of files that are complete in themselves, as configurations of the harness, by name.

    Raises:
      UserError: there is no such folder, or a file begins like one of these and goes on otherwise.
    """
    if root is None:
        return {}
    if not root.is_dir():
        raise UserError(f"--data={root} is not a folder.")
    found = {}
    for path in sorted(root.iterdir()):
        name = path.name.removesuffix(".gz").removesuffix(".jsonl")
        if name != path.name.removesuffix(".gz") and (kind := _kind_of(path)):
            found[name] = kind(name, str(path))
    return found


def _kind_of(path: Path) -> Callable[[str, str], dict[str, Any]] | None:
    """What a file holds: what its first line holds, as all others have to."""
    number, lines = 1, text_lines(path)
    try:
        kind = _kind(first := json.loads(next(lines, "null")))
        if kind in (None, dialogue_file):  # whose reader looks at every line
            return kind
        _check(first)
        for number, line in enumerate(lines, start=2):  # noqa: B007 (told below)
            record = json.loads(line)
            if _kind(record) != kind:
                raise ValueError(f"it has {', '.join(record) or 'nothing'}")
            _check(record)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not JSON in every line ({error}).") from None
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path}, line {number}, is not like the first line ({error}): questions need query, "
            "choices and gold; problems need question and answer."
        ) from None
    return kind


def _kind(record: Any) -> Callable[[str, str], dict[str, Any]] | None:
    keys = set(record) if isinstance(record, dict) else set()
    if keys >= {"query", "choices", "gold"}:
        return _question_file
    if "messages" in keys or keys >= {"query", "answers"}:
        return dialogue_file
    if "answer" in keys and keys.intersection(_ASKED):
        return problem_file
    return None


def _check(record: dict[str, Any]) -> None:
    """Raises `ValueError` where a question or a problem has another kind of value than it needs."""
    asked = next(record[key] for key in ("query", *_ASKED) if key in record)
    if not isinstance(asked, str):
        raise ValueError("what it asks is no text")
    if "gold" not in record:
        if not isinstance(record["answer"], str | int | float):
            raise ValueError("its answer is neither text nor number")
        return
    choices, gold = record["choices"], record["gold"]
    if not isinstance(choices, list):
        raise ValueError("its choices are no list")
    if type(gold) is not int or not 0 <= gold < len(choices):  # true is no number of a choice
        raise ValueError(f"gold={gold!r} names none of its choices")
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError("one of its choices is no text, or empty")


def _question_file(name: str, path: str) -> dict[str, Any]:
    measures = [
        {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")
    ]
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": path}},
        "test_split": "test",
        "fewshot_split": "test",  # the same, so that no question is an example for itself
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": measures,
        "metadata": {"version": 1.0},
    }


@contextlib.contextmanager
def local_datasets(root: Path | None) -> Iterator[None]:
    """While it lasts, tasks read their data sets below `root` where they are there, else from the hub.

    Raises:
      UserError: a data set is in neither place; it says which file to put where.
    """
    load = datasets.load_dataset

    def loaded(path: str, name: str | None = None, *arguments: Any, **options: Any) -> Any:
        if path in ("json", "parquet", "csv", "text"):
            return load(path, name, *arguments, **options)
        folder = Path(path) / (name or "")
        if root is not None and (files := _splits(root / folder)):
            kind = _SUFFIXES[_suffix(next(iter(files.values())))]
            return load(kind, data_files={s: str(f) for s, f in files.items()})
        try:
            return load(path, name, *arguments, **options)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"the data set {folder} cannot be had from the hub ({reason[:200].rstrip('.')}): put its "
                f"splits into DIR/{folder}/test.jsonl, train.jsonl, validation.jsonl (or .jsonl.gz, "
                ".parquet) and give --data=DIR."
            ) from None

    with mock.patch.object(datasets, "load_dataset", loaded):
        yield


def _suffix(path: Path) -> str:
    return next((suffix for suffix in _SUFFIXES if path.name.endswith(suffix)), "")


def _splits(folder: Path) -> Mapping[str, Path]:
    if not folder.is_dir():
        return {}
    files = sorted(path for path in folder.iterdir() if _suffix(path))
    return {path.name.removesuffix(_suffix(path)): path for path in files}
