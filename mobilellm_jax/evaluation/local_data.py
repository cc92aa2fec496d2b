"""Data sets of evaluation tasks from local files, where there is no hub or they are to be these.

Two kinds of file are read, below one folder. A data set of the hub is looked for under its own name,
a file for each split:

    DIR/allenai/ai2_arc/ARC-Easy/test.jsonl       also .jsonl.gz, .json, .parquet

and a file of questions that is complete in itself is a task by the name of the file:

    DIR/arc_easy.jsonl.gz      {"query": "...", "choices": ["...", ...], "gold": 0} in every line
"""

import contextlib
import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import datasets

from mobilellm_jax.errors import UserError

_SUFFIXES = {".jsonl": "json", ".jsonl.gz": "json", ".json": "json", ".parquet": "parquet"}
_QUESTION = {"query", "choices", "gold"}


def question_tasks(root: Path | None) -> dict[str, dict[str, Any]]:
    """Tasks of files with questions and choices, as configurations of the harness, by name.

    Raises:
      UserError: there is no such folder, or a file of that kind has a line that is none.
    """
    if root is None:
        return {}
    if not root.is_dir():
        raise UserError(f"--data={root} is not a folder.")
    found = {}
    for path in sorted(root.iterdir()):
        name = path.name.removesuffix(".gz").removesuffix(".jsonl")
        if name != path.name.removesuffix(".gz") and _holds_questions(path):
            found[name] = _task(name, path)
    return found


def _holds_questions(path: Path) -> bool:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        try:
            first = json.loads(next(lines, ""))
            if not isinstance(first, dict) or not set(first) >= _QUESTION:
                return False
            for number, line in enumerate(lines, start=2):  # noqa: B007 (told below)
                question = json.loads(line)
                if not 0 <= question["gold"] < len(question["choices"]):
                    raise ValueError(f"gold={question['gold']} names none of its choices")
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is not JSON in every line ({error}).") from None
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}, line {number}, is no question ({error}): it needs query, choices and gold."
            ) from None
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read ({error}).") from None
    return True


def _task(name: str, path: Path) -> dict[str, Any]:
    measures = [
        {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")
    ]
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
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
