"""Documents to packed rows: tokenized in parallel, packed in order, with progress told."""

import collections
import concurrent.futures
import functools
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tqdm
from etils import epath

from mobilellm_jax.data.corpora import Corpus, Document
from mobilellm_jax.data.packing import PACKERS
from mobilellm_jax.data.rows import Batch
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError

CHUNK = 1 << 19  # characters that a worker gets at once
LONGEST = 1 << 20  # characters; a longer document is tokenized in parts, for merging needs memory

Chunk = list[Document]


def packed(
    corpus: Corpus, encoder: "Encoder", tokenizer: Tokenizer, row_length: int, packing: str
) -> Iterator[Batch]:
    """All of a corpus as batches of rows, `train` and `heldout` packed apart.

    The tokens of a batch are those of its documents with one BOS and one EOS each; its rows may
    hold documents of earlier batches, since packers hold some back.
    """
    packers = {
        split: PACKERS[packing](row_length, tokenizer.bos_id, tokenizer.eos_id)
        for split in ("train", "heldout")
    }
    with _Progress(corpus) as progress:
        for documents, encoded in encoder(_chunks(corpus.documents())):
            for split in packers:
                chosen = [i for i, document in enumerate(documents) if document.split == split]
                tokens = [encoded[i] for i in chosen]
                yield Batch(
                    split=split,
                    rows=packers[split].add(tokens),
                    documents=len(chosen),
                    bytes=sum(len(documents[i].text.encode()) for i in chosen),
                    tokens=sum(map(len, tokens)) + 2 * len(chosen),
                )
            progress.add(sum(d.progress for d in documents), sum(map(len, encoded)))
        for split, held_back in packers.items():
            yield Batch(split, held_back.finish())


class Encoder:
    """Tokenizes chunks of documents in processes; results come in the order of the chunks.

    A context manager: the processes live as long as it. With one worker there is none.
    """

    def __init__(self, count: int, tokenizer_path: epath.Path) -> None:
        self._count, self._encode = count, functools.partial(_encode, str(tokenizer_path))
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> "Encoder":
        if self._count > 1:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self._count, multiprocessing.get_context("spawn"), _end_with_parent
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def __call__(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, list[np.ndarray]]]:
        """Chunks with the ids of their documents, int32, without BOS and EOS."""
        if not self._pool:
            yield from ((chunk, self._encode([d.text for d in chunk])) for chunk in chunks)
            return
        waiting: collections.deque[tuple[Chunk, concurrent.futures.Future]] = collections.deque()
        for chunk in chunks:
            waiting.append((chunk, self._pool.submit(self._encode, [d.text for d in chunk])))
            if len(waiting) > 2 * self._count:  # bounds the text in memory
                yield self._result(*waiting.popleft())
        while waiting:
            yield self._result(*waiting.popleft())

    @staticmethod
    def _result(chunk: Chunk, future: concurrent.futures.Future) -> tuple[Chunk, list[np.ndarray]]:
        try:
            return chunk, future.result()
        except concurrent.futures.BrokenExecutor:
            raise UserError(
                "a process that tokenizes was killed, probably for want of memory: give fewer "
                "--workers."
            ) from None


def _end_with_parent() -> None:
    """Ends this process when the one that started it is gone, even by kill -9."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_cached_tokenizer = functools.lru_cache(1)(Tokenizer.load)


def _encode(tokenizer_path: str, texts: Sequence[str]) -> list[np.ndarray]:
    tokenizer = _cached_tokenizer(tokenizer_path)

    def ids(text: str) -> np.ndarray:
        parts = (text[start : start + LONGEST] for start in range(0, len(text), LONGEST))
        return np.concatenate([np.asarray(tokenizer.encode(part), np.int32) for part in parts])

    return [ids(text) for text in texts]


def _chunks(documents: Iterable[Document]) -> Iterator[Chunk]:
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _Progress:
    """How far a corpus is: a bar on a terminal, otherwise a line every ten seconds."""

    def __init__(self, corpus: Corpus) -> None:
        self._name, self._size = corpus.name, corpus.size
        self._start = self._told = time.monotonic()
        self._done = self._tokens = 0
        self._bar = tqdm.tqdm(
            total=self._size,
            desc=corpus.name,
            unit="B",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self._bar.close()
        if kind is None:
            self._tell(f"done, {self._tokens / 1e6:.2f}M tokens in {self._seconds:.1f} s")

    @property
    def _seconds(self) -> float:
        return time.monotonic() - self._start

    def add(self, done: int, tokens: int) -> None:
        self._done, self._tokens = self._done + done, self._tokens + tokens
        self._bar.set_postfix_str(
            f"{self._tokens / self._seconds / 1e6:.2f}M tokens/s", refresh=False
        )
        self._bar.update(done)
        if self._bar.disable and time.monotonic() - self._told > 10:
            self._told = time.monotonic()
            left = self._seconds * (self._size / max(self._done, 1) - 1)
            self._tell(f"{self._done / max(self._size, 1):.0%}, about {max(left, 0):.0f} s left")

    def _tell(self, what: str) -> None:
        print(f"{self._name}: {what}", file=sys.stderr, flush=True)
