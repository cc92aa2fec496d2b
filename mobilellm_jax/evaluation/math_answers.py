r"""Whether a response ends in the right mathematical answer: `grade`.

What a response answers is the content of its last `\boxed{}`, or what stands behind its last `####`
(GSM8K), or else what the library math-verify finds in its end. Two answers are equal if math-verify
says so: fractions, decimals, sets, intervals, matrices and expressions by their value, 50 % as
either 50 or 0.5, units ignored.
"""

import concurrent.futures
import contextlib
import dataclasses
import decimal
import importlib.util
import json
import re
import select
import subprocess
import sys
from collections.abc import Sequence

from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation import math_worker

_START_SECONDS = 300.0  # of a worker, on a machine that is busy with evaluating
_END = 1000  # characters: where a response without a sign says its answer
_BOX = re.compile(r"\\(?:boxed|fbox)\s*(\{|[^\s{}\\])")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # \{ and \} are none
_HASHES = re.compile(r"####\s*(.+)")
_QUANTITY = re.compile(r"((?:\\?\$\s*)?[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+))\s*([A-Za-z][A-Za-z. ]+)")
_PER_CENT = re.compile(r"([-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+))\s*\\?%")
_MIXED = re.compile(r"([-+]?\d+)\s+(\d+)\s*/\s*(\d+)")
# White space between digits is more than layout, unless it is between thousands: 1 1/2 is not 11/2.
_LAYOUT = re.compile(
    r"\\left(?![a-z])|\\right(?![a-z])|\\[!,;: ]|\$|(?<!\d)\s+|\s+(?!\d)|\s+(?=\d{3}(?![\d/]))"
)


@dataclasses.dataclass(frozen=True)
class MathGrade:
    """What became of a response.

    Attributes:
      correct: whether its answer equals the reference.
      answer: what is in its box or behind its hashes; none if it has neither.
      note: why it could not be compared: `no answer`, `timeout`, or an error.
    """

    correct: bool
    answer: str | None
    note: str = ""


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{}` (or `\fbox{}`, or `\boxed 5`) that is closed, or none."""
    # In one pass, because a model that goes round in circles opens thousands.
    opened: list[int] = []
    closed: dict[int, int] = {}
    for match in _BRACE.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closed[opened.pop()] = match.start()
    found = None
    for match in _BOX.finditer(text):
        if match[1] != "{":
            found = match[1]
        elif match.start(1) in closed:
            found = text[match.end() : closed[match.start(1)]]
    return found


def stated_answer(text: str) -> str | None:
    r"""What a text says its answer is: in its last box, or else behind its last `####`."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    hashes = _HASHES.findall(text)
    return hashes[-1].strip().rstrip(".") if hashes else None


def grade(
    responses: Sequence[str],
    references: Sequence[str],
    *,
    seconds: float = 10.0,
    workers: int = 1,
) -> list[MathGrade]:
    """Grades responses, each against its reference.

    Args:
      responses: what a model wrote.
      references: answers, or solutions that state theirs in a box or behind `####`.
      seconds: for a comparison; what takes longer counts as wrong.
      workers: processes that compare side by side; each takes a second to start, once per call.

    Raises:
      UserError: math-verify is not installed, or a reference is empty.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            "grading mathematical answers needs math-verify: pip install 'mobilellm-jax[eval]'."
        )
    pairs = list(zip(responses, references, strict=True))
    for i, reference in enumerate(references):
        if not reference.strip():
            raise UserError(f"the reference answer of problem {i} is empty.")
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        parts = pool.map(lambda part: _graded(part, seconds), _parts(pairs, workers))
    return [result for part in parts for result in part]


def _parts(pairs: list[tuple[str, str]], count: int) -> list[list[tuple[str, str]]]:
    size = -(-len(pairs) // count) or 1
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]


def _graded(pairs: list[tuple[str, str]], seconds: float) -> list[MathGrade]:
    with contextlib.closing(Grader(seconds)) as grader:
        return [grader.grade(*pair) for pair in pairs]


class Grader:
    """Compares answers in a process of its own, which starts when it is needed and ends with `close`."""

    def __init__(self, seconds: float = 10.0) -> None:
        """What takes longer than `seconds` counts as wrong."""
        self._seconds = seconds
        self._worker: subprocess.Popen[str] | None = None

    def grade(self, response: str, reference: str) -> MathGrade:
        """Grades a response; a worker that gives no answer is replaced.

        Raises:
          UserError: math-verify cannot be imported.
        """
        stated = stated_answer(response)
        expected = stated_answer(reference)
        expected = reference.strip() if expected is None else expected
        if stated is not None and _plain(stated) == _plain(expected):
            return MathGrade(True, stated)
        if not response.strip() or stated == "":
            return MathGrade(False, stated, "no answer")
        if stated is None:
            return self._compared(_box(expected), response[-_END:], None)
        grade = MathGrade(False, stated)
        for reference, answer in _per_cent(expected, stated):
            grade = self._compared(_box(reference), _box(answer), stated)
            if grade.correct or grade.note:
                break
        return grade

    def _compared(self, reference: str, answer: str, stated: str | None) -> MathGrade:
        self._worker = self._worker or _start()
        told = _ask(self._worker, {"reference": reference, "answer": answer}, self._seconds)
        if told is None:
            self.close()
            return MathGrade(False, stated, "timeout")
        return MathGrade(**{"answer": stated, **json.loads(told)})

    def close(self) -> None:
        """Ends the process."""
        _stop(self._worker)
        self._worker = None


def _per_cent(expected: str, stated: str) -> list[tuple[str, str]]:
    """Pairs of which one has to be equal: where one alone is per cent, it is its number or a share.

    Not left to math-verify, which knows the sign with some of the parsers it may have and not with
    others.
    """
    found = [_PER_CENT.fullmatch(text.strip()) for text in (expected, stated)]
    numbers = [
        match[1] if match else text for match, text in zip(found, (expected, stated), strict=True)
    ]
    pairs = [(numbers[0], numbers[1])]
    if sum(map(bool, found)) == 1:
        shares = [
            str(decimal.Decimal(match[1].replace(",", "")) / 100) if match else text
            for match, text in zip(found, numbers, strict=True)
        ]
        pairs.append((shares[0], shares[1]))
    return pairs


def _plain(answer: str) -> str:
    """An answer without what only lays it out."""
    return _LAYOUT.sub("", answer).rstrip(".").replace("dfrac", "frac").replace("tfrac", "frac")


def _box(answer: str) -> str:
    """An answer as math-verify reads it best: in a box, with a unit that is not a product of letters.

    It knows a mixed number, as 4 3/4, by the command of its fraction.
    """
    answer = answer.rstrip(".")
    if mixed := _MIXED.fullmatch(answer):
        answer = rf"{mixed[1]}\frac{{{mixed[2]}}}{{{mixed[3]}}}"
    quantity = _QUANTITY.fullmatch(answer)
    return (
        f"\\boxed{{{quantity[1]}\\text{{ {quantity[2]}}}}}" if quantity else f"\\boxed{{{answer}}}"
    )


def _start() -> "subprocess.Popen[str]":
    worker = subprocess.Popen(
        [sys.executable, "-P", math_worker.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    if _line(worker, _START_SECONDS) != "ready\n":
        _stop(worker)
        raise UserError(
            "math-verify cannot be imported: reinstall it with pip install 'mobilellm-jax[eval]'."
        )
    return worker


def _ask(worker: "subprocess.Popen[str]", question: dict[str, str], seconds: float) -> str | None:
    assert worker.stdin is not None
    try:
        worker.stdin.write(json.dumps(question) + "\n")
        worker.stdin.flush()
    except BrokenPipeError:
        return None
    return _line(worker, seconds)


def _line(worker: "subprocess.Popen[str]", seconds: float) -> str | None:
    """The next line of a worker that writes one at a time; none if it is late or has died."""
    assert worker.stdout is not None
    if not select.select([worker.stdout], [], [], seconds)[0]:
        return None
    return worker.stdout.readline() or None


def _stop(worker: "subprocess.Popen[str] | None") -> None:
    if worker is not None:
        worker.kill()
        worker.communicate()
