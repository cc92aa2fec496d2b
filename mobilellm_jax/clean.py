"""Text to less text: without copies, near copies and what evaluation sets hold. Before `prepare`.

    python -m mobilellm_jax.clean --source=web='crawl/*.jsonl.zst' --out=clean/web \
        --dedup=exact,near --decontaminate='eval/*.jsonl.gz'
    python -m mobilellm_jax.prepare --source=web='clean/web/*.jsonl.zst' --out=DIR

reads what `prepare` reads and writes what is left as JSON lines ("id", "text", and the "file" and
"place" it is from), with report.json: what each pass removed, with examples. Near copies need
datatrove (`pip install 'mobilellm-jax[clean]'`). docs/cleaning.md tells what is compared, and the cost.

The passes follow each other: exact copies, evaluation sets, near copies; each sees only what the ones before
have left. Of copies the first in the order of reading stays, however many workers there are. Killed and run
again with the same options, it goes on where it was; the folder gets its name when all is there, and
nothing is ever overwritten.
"""

import collections
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from absl import flags

from mobilellm_jax import cli
from mobilellm_jax.data import cleaning, decontamination
from mobilellm_jax.data.cleaning import EVALUATION, EXACT, KEPT, NEAR, VERDICTS, PartJob
from mobilellm_jax.data.corpora import Corpus
from mobilellm_jax.data.decontamination import EvalIndex, EvalItem, EvalSets
from mobilellm_jax.data.encoding import Workers
from mobilellm_jax.data.ngrams import jaccard
from mobilellm_jax.data.source_flags import corpus_of
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import alone, record_of
from mobilellm_jax.tables import aligned

VERSION = 1  # of what is written; another one is begun anew
DEDUP = ("exact", "near")
EXAMPLES = 20  # in the report, for each pass

Quotes = dict[int, dict[str, Any]]  # documents by number, as they are written


def clean(
    corpus: Corpus,
    out: str | os.PathLike,
    *,
    dedup: Sequence[str] = DEDUP,
    evals: EvalSets | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Removes copies and evaluation items from a corpus and writes what is left.

    Args:
      corpus: what to read.
      out: folder on this machine to make; `<out>.incomplete` beside it holds the work until it is done.
      dedup: `exact` removes documents with the same text as an earlier one, `near` those that share most of
        their words.
      evals: evaluation sets; documents that hold an item of them are removed. None for none.
      workers: processes on this machine; the result does not depend on it.

    Returns:
      The report, as OUT/report.json has it.

    Raises:
      UserError: bad input or options, a package is missing, or `out` holds something else.
    """
    _check(dedup, evals)
    settings = {
        "version": VERSION,
        "inputs": corpus.fingerprint,
        "dedup": [name for name in DEDUP if name in dedup],
        "evaluation": evals.fingerprint if evals else None,
    }
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _complete(out, settings)
    decontamination.load_index.cache_clear()  # the files may have changed since an earlier run
    if evals:
        decontamination.load_index(evals)  # which tells of bad ones before anything is written
    growing = out.parent / f"{out.name}.incomplete"
    with alone(growing, "is cleaning"), Workers(workers or os.cpu_count() or 1) as processes:
        _take_up(growing, settings)
        report = {"settings": settings, **_Passes(corpus, growing, evals, processes).all(dedup)}
        cleaning.write_json(growing / "report.json", report)
        growing.rename(out)
    shutil.rmtree(cleaning.work_folder(out))
    return report


def _check(dedup: Sequence[str], evals: EvalSets | None) -> None:
    if unknown := [name for name in dedup if name not in DEDUP]:
        raise UserError(f"--dedup={','.join(dedup)}: {unknown[0]!r} is neither exact nor near.")
    if not dedup and not evals:
        raise UserError("there is nothing to remove: give --dedup or --decontaminate.")
    if "near" in dedup and not importlib.util.find_spec("datatrove"):
        raise UserError(
            "--dedup=near needs the package datatrove: pip install 'mobilellm-jax[clean]', or give "
            "--dedup=exact."
        )
    if evals and not 1 <= evals.shortest <= evals.ngram:
        raise UserError(
            f"--shortest={evals.shortest} is not between 1 and --ngram={evals.ngram}: it is the number of "
            "words from which on a short item is looked for."
        )
    if evals and not (evals.keys and all(evals.keys)):
        raise UserError("--eval_keys names no field: give the ones with text, a,b.")


def _complete(out: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    path = out / "report.json"
    report = record_of(path) if path.exists() else {}
    if report.get("settings") != settings:
        made = "was made from other input or with other options" if report else "is not empty"
        raise UserError(f"{out} exists and {made}: delete it, or name another folder.")
    shutil.rmtree(cleaning.work_folder(out), ignore_errors=True)  # if it was killed at the very end
    print(f"{out}: complete, kept as it is.", flush=True)
    return report


def _take_up(growing: Path, settings: Mapping[str, Any]) -> None:
    path = cleaning.work_folder(growing) / "settings.json"
    if not path.exists():
        if any(file.is_file() and file.suffix != ".unfinished" for file in growing.rglob("*")):
            raise UserError(f"{growing} exists and is not ours: delete it, or name another folder.")
        path.parent.mkdir(parents=True, exist_ok=True)
        cleaning.write_json(path, settings)
    elif record_of(path) != settings:
        raise UserError(
            f"{growing} was begun from other input or with other options: delete it, or give the same ones."
        )


class _Passes:
    """The passes over a corpus, one after the other; what they decide is one byte a document."""

    def __init__(self, corpus: Corpus, out: Path, evals: EvalSets | None, workers: Workers) -> None:
        self._name, self._out, self._workers = corpus.name, out, workers
        self._index = decontamination.load_index(evals) if evals else None
        self._jobs = [PartJob(part, n, out, evals) for n, part in enumerate(corpus.parts())]

    def all(self, dedup: Sequence[str]) -> dict[str, Any]:
        """Does what is not done yet and reports what was done."""
        self._spread("scan", cleaning.scan, self._jobs)
        hashes = [job.file("hashes.npy") for job in self._jobs]
        self._starts = np.cumsum([0, *(len(np.load(file, mmap_mode="r")) for file in hashes)])
        self._verdicts = np.full(self._starts[-1], KEPT, np.uint8)
        none = np.zeros((0, 2), np.int64)
        exact = self._remove_exact(hashes) if "exact" in dedup else none
        matches = self._remove_matching() if self._index else none
        near = self._remove_near() if "near" in dedup else none

        quoted = {*exact.ravel().tolist(), *near[:EXAMPLES].ravel().tolist()}
        quoted |= set(_firsts(matches)[:EXAMPLES, 0].tolist())
        self._spread("write", cleaning.write, list(self._decided(quoted)))
        counts = {name: np.zeros(2, np.int64) for name in VERDICTS}
        quotes: Quotes = {}
        for job, start in zip(self._jobs, self._starts.tolist(), strict=False):
            written = json.loads(job.file("write").read_text(encoding="utf-8"))
            counts = {name: counts[name] + written["counts"][name] for name in VERDICTS}
            quotes |= {int(number) + start: quote for number, quote in written["quotes"].items()}

        report: dict[str, Any] = {
            "source": self._name,
            "documents": {name: int(count[0]) for name, count in counts.items()},
            "bytes": {name: int(count[1]) for name, count in counts.items()},
        }
        if "exact" in dedup:
            report["exact"] = {"examples": [_pair(quotes, *pair) for pair in exact.tolist()]}
        if self._index:
            report["evaluation"] = _evaluation(self._index, matches, quotes)
        if "near" in dedup:
            sizes = np.unique(near[:, 1], return_counts=True)[1]
            examples = [_pair(quotes, *pair) for pair in near[:EXAMPLES].tolist()]
            report["near"] = {
                "groups": len(sizes),
                "largest": int(sizes.max(initial=0)) + bool(len(sizes)),
                "examples": examples,
            }
        return report

    def _remove_exact(self, hashes: Sequence[Path]) -> np.ndarray:
        """The first pairs of copy and original."""
        first = np.zeros((0, 2), np.int64)
        for pairs in cleaning.copies(hashes, len(self._verdicts)):
            self._verdicts[pairs[:, 0]] = EXACT
            first = np.concatenate([first, pairs])
            first = first[np.argsort(first[:, 0])][:EXAMPLES]
        return first

    def _remove_matching(self) -> np.ndarray:
        """Pairs of document and item, of documents that are no copies."""
        starts = self._starts.tolist()
        found = [np.load(job.file("matches.npy")) + [starts[job.number], 0] for job in self._jobs]
        matches = np.concatenate(found)
        matches = matches[self._verdicts[matches[:, 0]] == KEPT]
        self._verdicts[matches[:, 0]] = EVALUATION
        return matches

    def _remove_near(self) -> np.ndarray:
        """Pairs of copy and original."""
        self._spread("sign", cleaning.sign, list(self._decided()))
        work = cleaning.work_folder(self._out)
        match = functools.partial(
            cleaning.write_matches, work / "signatures", folder=work / "matches"
        )
        for _ in self._workers.map(match, range(cleaning.BUCKETS)):
            pass
        pairs = cleaning.near_copies(work / "matches", self._starts.tolist())
        self._verdicts[pairs[:, 0]] = NEAR
        return pairs

    def _decided(self, quoted: Collection[int] = ()) -> Iterator[PartJob]:
        """The jobs with what is decided so far."""
        lines: dict[str, int] = {}
        for job in self._jobs:
            start, stop = self._starts[job.number : job.number + 2].tolist()
            yield dataclasses.replace(
                job,
                verdicts=self._verdicts[start:stop],
                quoted=tuple(sorted(n - start for n in quoted if start <= n < stop)),
                lines_before=lines,
            )
            unfinished = json.loads(job.file("scan").read_text(encoding="utf-8"))
            lines = {file: lines.get(file, 0) + n for file, n in unfinished.items()}

    def _spread(self, mark: str, work: Callable[[PartJob], None], jobs: Sequence[PartJob]) -> None:
        """Does the jobs that have no mark yet, in the processes."""
        start = time.monotonic()
        todo = [job for job in jobs if not job.file(mark).exists()]
        total, left = (sum(job.part.size for job in some) for some in (jobs, todo))
        with tqdm.tqdm(
            total=total,
            initial=total - left,
            desc=f"{self._name}: {mark}",
            unit="B",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
        ) as bar:
            for job, _ in zip(todo, self._workers.map(work, todo), strict=True):
                bar.update(job.part.size)
        seconds = time.monotonic() - start
        print(f"{self._name}: {mark}, {seconds:.1f} s", file=sys.stderr, flush=True)


# The report.


def _firsts(matches: np.ndarray) -> np.ndarray:
    """The first match of each document."""
    return matches[np.unique(matches[:, 0], return_index=True)[1]]


def _evaluation(index: EvalIndex, matches: np.ndarray, quotes: Quotes) -> dict[str, Any]:
    """Which sets and items were found, and where."""
    sets = [item.set for item in index.items]
    short = collections.Counter(sets[item] for item in index.too_short)
    found = collections.Counter(sets[item] for item in set(matches[:, 1].tolist()))
    held = {(document, sets[item]) for document, item in matches.tolist()}
    documents = collections.Counter(name for _, name in held)
    often = collections.Counter(matches[:, 1].tolist()).most_common(EXAMPLES)
    examples = []
    for document, item in _firsts(matches)[:EXAMPLES].tolist():
        shared = {m.item: m.shared for m in index.matches(quotes[document]["text"])}
        removed = {"removed": _begin(quotes[document]), "shared": shared[item]}
        examples.append({**removed, **_named(index.items[item])})
    return {
        "sets": {
            name: {
                "items": count,
                "too_short": short[name],
                "found": found[name],
                "documents": documents[name],
            }
            for name, count in collections.Counter(sets).items()
        },
        "examples": examples,
        "often": [{"documents": count, **_named(index.items[item])} for item, count in often],
    }


def _pair(quotes: Quotes, copy: int, original: int) -> dict[str, Any]:
    return {
        "removed": _begin(quotes[copy]),
        "kept": _begin(quotes[original]),
        "jaccard": round(jaccard(quotes[copy]["text"], quotes[original]["text"]), 3),
    }


def _begin(quote: Mapping[str, Any]) -> dict[str, Any]:
    return {**quote, "text": quote["text"][:200]}


def _named(item: EvalItem) -> dict[str, Any]:
    return {"set": item.set, "item": item.place, "item_text": item.texts[-1][:200]}


def table(report: Mapping[str, Any]) -> str:
    """What each pass removed, for people."""
    told = {"exact": "exact copies", "evaluation": "evaluation items", "near": "near copies"}
    columns = [report[unit] for unit in ("documents", "bytes")]
    totals = [sum(column.values()) for column in columns]

    def line(name: str, counts: Sequence[int]) -> tuple[str, ...]:
        cells = ((f"{n:,}", f"{n / max(of, 1):.2%}") for n, of in zip(counts, totals, strict=True))
        return name, *itertools.chain(*cells)

    lines = [("", "documents", "", "bytes", ""), line("read", totals)]
    for name in (*(name for name in told if name in report), "kept"):
        lines.append(line(told.get(name, name), [column[name] for column in columns]))
    tables = [aligned(lines, "<>>>>")]
    if "evaluation" in report:
        header = ("evaluation set", "items", "too short", "found", "in documents")
        sets = report["evaluation"]["sets"].items()
        rows = [(name, *(f"{n:,}" for n in counts.values())) for name, counts in sets]
        tables.append(aligned([header, *rows], "<>>>>"))
    return "\n\n".join(tables)


# The command line.


def main() -> None:
    """The command line around `clean`."""
    args = flags.FLAGS
    corpus = corpus_of(args.source, args.text_key, 0.0, args.id_key)
    evals = EvalSets(
        tuple(args.decontaminate), tuple(args.eval_keys), ngram=args.ngram, shortest=args.shortest
    )
    report = clean(
        corpus,
        args.out,
        dedup=args.dedup,
        evals=evals if args.decontaminate else None,
        workers=args.workers,
    )
    print(table(report))


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Folder to make, on this machine.", required=True)
    flags.DEFINE_string(
        "source",
        None,
        "What to read: name=PATTERN, name=tfds:NAME:SPLIT or name=tfds:DIRECTORY:SPLIT.",
        required=True,
    )
    flags.DEFINE_string(
        "text_key",
        "text",
        "Field of JSON lines, column of Parquet files, feature of TFDS datasets.",
    )
    flags.DEFINE_string(
        "id_key", "id", "The same for what a document is called; it may be missing."
    )
    flags.DEFINE_list("dedup", list(DEDUP), "Copies to remove: exact, near, or both.")
    flags.DEFINE_multi_string(
        "decontaminate", [], "Files of evaluation sets, JSON lines or Parquet. May be repeated."
    )
    flags.DEFINE_list("eval_keys", ["question", "answer"], "Their fields with text.")
    flags.DEFINE_integer("ngram", 13, "Words in a row that a document shares with an item.")
    flags.DEFINE_integer(
        "shortest", 8, "Words from which on an item shorter than --ngram is looked for, whole."
    )
    flags.DEFINE_integer("workers", None, "Processes; default: one per core.", 1)
    cli.run(main)
