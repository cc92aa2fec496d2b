"""Answers of a model behind any OpenAI-compatible server of chat completions (llama.cpp, vLLM)."""

import dataclasses
import hashlib
import http.client
import json
import math
import multiprocessing.pool
import random
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from tqdm import tqdm

from mobilellm_jax.errors import UserError

Message = Mapping[str, str]  # role and content

_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # what a server says that may answer later
_LONGEST_WAIT = 60.0
_QUIET = 10.0  # seconds between two lines about a server that fails
_BEGIN = b'{"key": "'  # of a line of a cache


class _Told:
    """Says that a server fails: once of all that ask at the same time."""

    def __init__(self) -> None:
        self._lock, self._last = threading.Lock(), -math.inf

    def __call__(self, line: str) -> None:
        with self._lock:
            if time.monotonic() - self._last > _QUIET:
                self._last = time.monotonic()
                tqdm.write(line, file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A model on a server, and how to ask it.

    Attributes:
      url: what comes before `/chat/completions`, as `http://localhost:8000/v1`.
      model: its name there.
      key: sent as a bearer token; never stored.
      options: what else the server is told, as temperature, max_tokens, top_p.
      timeout: seconds for one answer.
      tries: how often a server that fails is asked before giving up.
      wait: seconds before the second try; each further one waits twice as long, up to a minute.
      workers: questions under way at a time.
      told: says on stderr that the server fails and is asked again.
    """

    url: str
    model: str
    key: str | None = dataclasses.field(default=None, repr=False)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    timeout: float = 600.0
    tries: int = 7
    wait: float = 1.0
    workers: int = 8
    told: _Told = dataclasses.field(default_factory=_Told, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Raises `UserError` for what cannot be the address of a server."""
        if not self.url.startswith(("http://", "https://")):
            raise UserError(
                f"{self.url!r} is no address of a server: it begins with http:// or https://."
            )


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a model said, and why it stopped: `stop`, or `length` if it was cut off."""

    text: str
    finish: str


def complete(endpoint: Endpoint, messages: Sequence[Message], **options: Any) -> Completion:
    """Asks for the next message of a conversation.

    Args:
      endpoint: whom.
      messages: what was said before.
      **options: as `Endpoint.options`, and before them.

    Raises:
      UserError: the server cannot be reached, refuses, or fails again and again.
    """
    body = _body(endpoint, messages, options)
    failure, asked = "", 0.0
    for attempt in range(endpoint.tries):
        if attempt:
            pause = _pause(endpoint.wait, attempt, asked)
            endpoint.told(
                f"{endpoint.url} does not answer ({failure}): it is asked again in {pause:.0f} s, "
                f"try {attempt + 1} of {endpoint.tries}."
            )
            time.sleep(pause)
        asked = 0.0
        try:
            with urllib.request.urlopen(
                _request(endpoint, body), timeout=endpoint.timeout
            ) as reply:
                choice = json.load(reply)["choices"][0]
                text, finish = choice["message"]["content"], choice.get("finish_reason")
                return Completion(str(text or ""), str(finish or "stop"))
        except urllib.error.HTTPError as error:
            failure = f"{error.code} {error.reason}: {_told(error)}"
            if error.code not in _AGAIN:
                raise UserError(f"{endpoint.url} refuses to answer: {failure}") from None
            asked = _seconds(error.headers.get("Retry-After"))
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            failure = f"{type(error).__name__}: {error}"
    raise UserError(
        f"{endpoint.url} has not answered in {endpoint.tries} tries ({failure}): see that the server "
        "runs there, and start again."
    )


def complete_all(
    endpoint: Endpoint,
    conversations: Sequence[Sequence[Message]],
    *,
    cache: epath.PathLike | None = None,
    **options: Any,
) -> list[Completion]:
    """The next message of each conversation, in order; `endpoint.workers` are asked for at a time.

    Args:
      endpoint: whom to ask.
      conversations: what was said before.
      cache: a file of JSON lines to which each answer is added when it comes, and in which those of
        an earlier run are found: same server, model, messages and options. A run that was killed
        goes on from there.
      **options: see `complete`.

    Raises:
      UserError: see `complete`; what is answered by then is in the cache.
    """
    answers = completions(endpoint, conversations, [options] * len(conversations), cache=cache)
    bar = tqdm(answers, f"answers of {endpoint.model}", len(conversations), delay=2)
    return list(bar)


def completions(
    endpoint: Endpoint,
    conversations: Sequence[Sequence[Message]],
    options: Sequence[Mapping[str, Any]],
    *,
    cache: epath.PathLike | None = None,
) -> Iterator[Completion]:
    """`complete_all` with options of each conversation; an answer is given when all before it are."""
    answers = Cache(cache)

    def answer(asked: tuple[Sequence[Message], Mapping[str, Any]]) -> Completion:
        messages, of_one = asked
        body = _body(endpoint, messages, of_one)
        key = hashlib.sha256(json.dumps([endpoint.url, body], sort_keys=True).encode()).hexdigest()
        if key not in answers.known:
            answers.add(key, complete(endpoint, messages, **of_one))
        return answers.known[key]

    # Its threads end with the process: Ctrl-C does not wait for them, however long the server lets them.
    with multiprocessing.pool.ThreadPool(endpoint.workers) as pool:
        try:
            yield from pool.imap(answer, zip(conversations, options, strict=True))
        except UserError:
            pool.terminate()  # what has not begun is left
            pool.join()  # what is under way comes into the cache
            raise


class Cache:
    """Answers by what was asked, in memory and, where one is named, in a file of JSON lines."""

    def __init__(self, file: epath.PathLike | None) -> None:
        """Reads what the file holds.

        Raises:
          UserError: it holds something else.
        """
        self.known: dict[str, Completion] = {}
        path = self._path = epath.Path(file) if file else None
        self._lock = threading.Lock()
        self._before = ""  # ends what a killed run has left of a line
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                if line:
                    record = json.loads(line)
                    answer = Completion(record["text"], record["finish"])
                    "".join((record["key"], answer.text, answer.finish))  # they are texts
                    self.known[record["key"]] = answer
            except (ValueError, LookupError, TypeError, RecursionError):
                if line[: len(_BEGIN)] == _BEGIN[: len(line)]:
                    continue  # what a killed run has left of a line
                raise UserError(
                    f"{path}, line {number} is no cached answer: name another file, or remove it."
                ) from None
        self._before = "\n" if lines and lines[-1] else ""

    def add(self, key: str, answer: Completion) -> None:
        """Takes an answer, and keeps it in the file at once."""
        with self._lock:
            self.known[key] = answer
            if self._path is None:
                return
            record = {"key": key, **dataclasses.asdict(answer)}
            with self._path.open("a") as file:
                file.write(f"{self._before}{json.dumps(record)}\n")
            self._before = ""


def _body(
    endpoint: Endpoint, messages: Sequence[Message], options: Mapping[str, Any]
) -> dict[str, Any]:
    messages = [dict(message) for message in messages]
    return {"model": endpoint.model, "messages": messages, **endpoint.options, **options}


def _request(endpoint: Endpoint, body: Mapping[str, Any]) -> urllib.request.Request:
    headers = {"Content-Type": "application/json"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    url = f"{endpoint.url.rstrip('/')}/chat/completions"
    return urllib.request.Request(url, json.dumps(body).encode(), headers)


def _pause(wait: float, attempt: int, asked: float) -> float:
    """Seconds before a try: longer each time, not the same for all, and at least what was asked."""
    backoff = wait * 2 ** (attempt - 1) * random.uniform(0.75, 1.25)
    return min(max(backoff, asked), _LONGEST_WAIT)


def _seconds(header: str | None) -> float:
    try:
        return float(header or 0)
    except ValueError:  # a date
        return 0.0


def _told(error: urllib.error.HTTPError) -> str:
    """What a server says of its error."""
    try:
        text = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""
    try:
        text = str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        pass
    return " ".join(text.split())[:300]
