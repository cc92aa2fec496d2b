"""Evaluation sets, and which of their items a document holds."""

import collections
import dataclasses
import functools
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from mobilellm_jax.data import inputs
from mobilellm_jax.data.inputs import InputFile
from mobilellm_jax.data.ngrams import ngram_hashes, words
from mobilellm_jax.errors import UserError

_TAIL = np.uint64(44)  # bits of a hash after those that are looked up first


@dataclasses.dataclass(frozen=True)
class EvalSets:
    """Evaluation sets, one a file, and what counts as finding one of their items in a document.

    Attributes:
      patterns: of files, JSON lines or Parquet.
      keys: fields with text, or lists of texts. Each text counts, and so do those of all fields together, in
        this order, as a question with its answer. An item may lack some of them.
      ngram: words in a row that a document must share with a text of an item.
      shortest: a text with fewer words than `ngram` counts when a document has all of it; one with fewer than
        these is not looked for.
    """

    patterns: tuple[str, ...]
    keys: tuple[str, ...]
    ngram: int = 13
    shortest: int = 8

    @property
    def files(self) -> list[InputFile]:
        """The files, in order.

        Raises:
          UserError: no file matches a pattern, or one is neither JSON lines nor Parquet.
        """
        found: dict[str, InputFile] = {}
        for pattern in self.patterns:
            matching = inputs.matching(pattern)
            if not matching:
                raise UserError(f"--decontaminate: no file matches {pattern!r}.")
            found |= {file.path: file for file in matching}
        for file in found.values():
            if _kind(file) not in _READERS:
                raise UserError(
                    f"{file.path}: an evaluation set is a file of JSON lines (.jsonl, .jsonl.gz, "
                    ".jsonl.zst) or Parquet (.parquet)."
                )
        return list(found.values())

    @property
    def fingerprint(self) -> dict[str, Any]:
        """JSON that changes when what is looked for changes."""
        return {
            "files": [[file.name, file.size] for file in self.files],
            "keys": list(self.keys),
            "ngram": self.ngram,
            "shortest": self.shortest,
        }

    def items(self) -> Iterator["EvalItem"]:
        """All items of all sets.

        Raises:
          UserError: a file cannot be read or has no items, an item has none of the keys, or one that is no
            text, with file and line.
        """
        files = self.files
        names = collections.Counter(map(_name, files))
        for file in files:
            name = _name(file) if names[_name(file)] == 1 else file.path
            place = 0
            for place, record in enumerate(_READERS[_kind(file)](file), 1):
                where = f"{file.path}, item {place}"
                if not isinstance(record, dict) or not any(
                    key.partition(".")[0] in record for key in self.keys
                ):
                    there = ", ".join(record) if isinstance(record, dict) else "no fields at all"
                    raise UserError(
                        f"{where}: there is none of the fields {', '.join(self.keys)} (it has {there}); "
                        "see --eval_keys."
                    )
                yield EvalItem(name, place, _texts(record, self.keys, where))
            if not place:
                raise UserError(f"{file.path}: an evaluation set without items finds nothing.")


@dataclasses.dataclass(frozen=True)
class EvalItem:
    """An item: name of its set, place there from 1, and its texts, the longest ones last."""

    set: str
    place: int
    texts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Match:
    """The number of an item that a document holds, and the words that they share."""

    item: int
    shared: str


class EvalIndex:
    """The n-grams of evaluation sets; needs about 16 bytes for each and the text itself.

    Attributes:
      items: all of them.
      too_short: numbers of those that have no text that is long enough.
    """

    def __init__(self, sets: EvalSets) -> None:
        self.items = list(sets.items())
        self.too_short: list[int] = []
        self._words: list[str] = []
        found: dict[int, list[tuple[np.ndarray, int]]] = collections.defaultdict(list)
        for number, item in enumerate(self.items):
            sequences = [sequence for text in item.texts if (sequence := words(text))]
            long = [sequence for sequence in sequences if len(sequence) >= sets.shortest]
            for sequence in long:
                length = min(len(sequence), sets.ngram)
                found[length].append((next(ngram_hashes(sequence, [length])), number))
            if not long:
                self.too_short.append(number)
            self._words.append("".join(f"| {' '.join(sequence)} |" for sequence in long))
        self._lengths = sorted(found)
        self._ngrams = {length: _sorted(found[length]) for length in self._lengths}

    def matches(self, text: str) -> list[Match]:
        """The items that a document holds, in their order."""
        sequence = words(text)
        shared: dict[int, str] = {}
        hashes_of = ngram_hashes(sequence, self._lengths)
        for length, hashes in zip(self._lengths, hashes_of, strict=True):
            known, owners, heads = self._ngrams[length]
            likely = np.flatnonzero(heads[hashes >> _TAIL])  # few, and quickly found
            at = np.searchsorted(known, hashes[likely])
            there = known[np.minimum(at, len(known) - 1)] == hashes[likely]
            for i, begin in zip(likely[there].tolist(), at[there].tolist(), strict=True):
                same = " ".join(sequence[i : i + length])
                end = np.searchsorted(known, hashes[i], side="right")
                for number in owners[begin:end].tolist():
                    # What only shares the hash is no match.
                    if number not in shared and f" {same} " in self._words[number]:
                        shared[number] = same
        return [Match(number, shared[number]) for number in sorted(shared)]


@functools.lru_cache(1)
def load_index(sets: EvalSets) -> EvalIndex:
    """The index, made once per process."""
    return EvalIndex(sets)


def _sorted(found: Sequence[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes in order, the items they are from, and which first bits occur."""
    hashes = np.concatenate([some for some, _ in found])
    owners = np.repeat(np.array([n for _, n in found], np.int32), [len(some) for some, _ in found])
    order = np.argsort(hashes, kind="stable")
    heads = np.zeros(1 << (64 - int(_TAIL)), bool)
    heads[hashes >> _TAIL] = True
    return hashes[order], owners[order], heads


def _texts(record: dict[str, Any], keys: Sequence[str], where: str) -> tuple[str, ...]:
    fields: list[list[str]] = []
    for key in keys:
        values = _inside(record, key.split("."))
        for value in values:
            if isinstance(value, dict):
                raise UserError(
                    f"{where}: {key!r} is not a text but holds {', '.join(value)}: name the ones with "
                    f"text, --eval_keys={key}.{next(iter(value), 'name')}."
                )
        fields.append([str(one) for one in values if one is not None and str(one).strip()])
        if any(re.search("[\ud800-\udfff]", text) for text in fields[-1]):
            raise UserError(
                f"{where}: half of a surrogate pair (\\ud800 to \\udfff) in {key!r} is not text."
            )
    fields = [field for field in fields if field]
    together = (" ".join(choice) for choice in itertools.product(*fields)) if fields else ()
    return tuple(dict.fromkeys([*itertools.chain(*fields), *together]))


def _inside(value: Any, names: Sequence[str]) -> list[Any]:
    """What fields inside of fields hold, through lists: `choices.text`."""
    if isinstance(value, list):
        return [found for one in value for found in _inside(one, names)]
    if not names:
        return [value]
    return _inside(value.get(names[0]), names[1:]) if isinstance(value, dict) else []


def _name(file: InputFile) -> str:
    return file.name.split(".")[0]


def _kind(file: InputFile) -> str:
    name = file.name.removesuffix(".gz").removesuffix(".zst")
    return name.rpartition(".")[2]


def _json_lines(file: InputFile) -> Iterator[Any]:
    read = 0
    try:
        with file.open() as raw:
            lines: Iterable[bytes] = raw
            if file.name.endswith(".gz"):
                lines = gzip.GzipFile(fileobj=raw)
            elif file.name.endswith(".zst"):
                stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")
                lines = io.BufferedReader(stream)
            for line in lines:
                if line.strip():
                    yield json.loads(line)
                read += 1
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise UserError(f"{file.path}, line {read + 1}: not JSON lines ({error}).") from None


def _parquet(file: InputFile) -> Iterator[Any]:
    try:
        with file.open() as raw:
            # Without Arrow's threads, see `documents._read`.
            yield from pyarrow.parquet.read_table(raw, use_threads=False).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file.path} is not a readable Parquet file ({error}).") from None


_READERS = {"jsonl": _json_lines, "ndjson": _json_lines, "parquet": _parquet}
