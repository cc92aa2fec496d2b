"""Words of a text and hashes of the n-grams they make, the same in every process."""

import functools
import hashlib
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

SHINGLE = 5  # words; near copies share many n-grams of so many

_KNOWN_WORDS = 1 << 20  # whose hash a process remembers


def words(text: str) -> list[str]:
    """The words of a text in lower case and without punctuation, as GPT-3 compared texts.

    Punctuation and symbols part words, except apostrophes, which go (`Don't!` is `dont`). What looks the same
    in Unicode is the same (NFKC).
    """
    return unicodedata.normalize("NFKC", text.lower()).translate(_separators()).split()


@functools.lru_cache(1)
def _separators() -> dict[int, str]:
    table = {
        code: " " for code in range(sys.maxunicode) if unicodedata.category(chr(code))[0] in "PS"
    }
    return {**table, **dict.fromkeys(map(ord, "'’ʼ`"), "")}


class _WordHashes(dict[str, int]):
    """Hashes of words, of which the latest are remembered."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _KNOWN_WORDS:
            self.clear()
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        return self.setdefault(word, int.from_bytes(digest, "little"))


_word_hashes = _WordHashes()


def ngram_hashes(sequence: Sequence[str], lengths: Iterable[int]) -> Iterator[np.ndarray]:
    """Hashes of all n-grams of words, in order, for each of the lengths; these must rise."""
    single = np.fromiter(map(_word_hashes.__getitem__, sequence), np.uint64, len(sequence))
    factor = np.uint64(0x9E3779B97F4A7C15)
    hashes, done = np.zeros(len(single) + 1, np.uint64), 0
    for length in lengths:
        for n in range(done, length):
            hashes = hashes[: max(len(single) - n, 0)] * factor + single[n:]
        done = length
        yield hashes


def jaccard(one: str, other: str) -> float:
    """How alike two texts are: the share of their n-grams (see `SHINGLE`) that both have."""
    a, b = (set(next(ngram_hashes(words(text), [SHINGLE])).tolist()) for text in (one, other))
    return len(a & b) / max(len(a | b), 1)
