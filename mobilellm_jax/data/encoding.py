"""Documents to token ids, in this process or spread over several."""

import collections
import concurrent.futures
import contextlib
import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from mobilellm_jax.data.corpora import Document
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError

CHUNK = 1 << 19  # characters that a process tokenizes at once
LONGEST = 1 << 20  # characters; a longer document is tokenized in parts, for merging needs memory


class Ids(NamedTuple):
    """Of a document: int32 [N], None if it is left out, and what there is to say of that."""

    ids: np.ndarray | None
    note: str = ""


Encoded = tuple[list[Document], list[Ids]]
Encode = Callable[[Tokenizer, Sequence[str]], list[Ids]]  # of texts; picklable
Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]  # a `map`, in order and lazy

load_tokenizer = functools.lru_cache(1)(Tokenizer.load)


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Ids]:
    """Texts to ids, without BOS and EOS: the `Encode` of pre-training."""
    parts = [[t[at : at + LONGEST] for at in range(0, len(t), LONGEST)] for t in texts]
    found = iter(tokenizer.encode_batch([part for some in parts for part in some]))
    return [Ids(next(found) if len(some) == 1 else _joined(found, len(some))) for some in parts]


def _joined(ids: Iterator[np.ndarray], count: int) -> np.ndarray:
    return np.concatenate(list(itertools.islice(ids, count)))


def encoded(
    documents: Iterable[Document],
    tokenizer_path: str,
    run: Run = map,
    encode: Encode = encode_texts,
) -> Iterator[Encoded]:
    """Documents with their ids, chunk by chunk, in order; the chunks do not depend on `run`."""
    chunks, again = itertools.tee(_chunks(documents))
    texts = ([document.text for document in chunk] for chunk in again)
    return zip(chunks, run(functools.partial(_encode, tokenizer_path, encode), texts), strict=True)


class Workers:
    """Processes that work off a list, results in its order.

    A context manager: the processes live as long as it. Where it is left by an exception, Ctrl-C
    among them, they end at once, whatever they are at. With one worker there is none, and the work
    is done in this process.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker is a thread, also this one
        if self.count > 1:
            context = multiprocessing.get_context("spawn")
            leash, self._leash = context.Pipe(duplex=False)
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self.count, context, _start, (leash,)
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._pool:
            if kind:  # the pool itself would wait for what it has handed out, minutes for a part
                self._leash.close()
            self._pool.shutdown(cancel_futures=True)
            self._leash.close()

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """Results of the items in their order; few items are taken ahead, which bounds memory.

        Raises:
          UserError: a process was killed.
        """
        if not self._pool:
            yield from map(function, items)
            return
        waiting: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for item in items:
                with _no_ctrl_c():  # the first starts the processes
                    future = self._pool.submit(function, item)
                waiting.append(future)
                if len(waiting) > 2 * self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except concurrent.futures.BrokenExecutor:
            raise UserError(
                "a worker process was killed, probably for want of memory: give fewer --workers."
            ) from None


@contextlib.contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """Holds SIGINT back; in processes that are started here for good: it is for their parent to act on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(leash: Connection) -> None:
    """Prepares a process of `Workers`, which ends when the other end of the leash is closed or gone."""

    def watch() -> None:
        with contextlib.suppress(EOFError):
            leash.recv()  # ends as well where the process that holds it was ended by kill -9
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _encode(tokenizer_path: str, encode: Encode, texts: list[str]) -> list[Ids]:
    return encode(load_tokenizer(tokenizer_path), texts)


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk, size = [], 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
