"""Whether programs that a model wrote are right, found out by running them in the sandbox.

`grade_tests` is for HumanEval and MBPP, whose tests are assertions behind the program;
`grade_cases` for contest problems, which read and print; `call_tests` makes assertions of cases that
call a function. `in_place_of_code_eval` gives lm-evaluation-harness's tasks this sandbox.
"""

import concurrent.futures
import contextlib
import decimal
import importlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.sandbox import EXIT, OK, Limits, Outcome, run_python
from mobilellm_jax.evaluation.scores import mean_pass_at_k

_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_CALLS = """
def _check_calls():
    import json
    cases = json.loads({cases!r})
    for arguments, expected in cases:
        found = {function}(*arguments)
        assert json.loads(json.dumps(found)) == expected, (arguments, found, expected)

_check_calls()
"""


def extract_code(response: str) -> str:
    """The last fenced block of a response, also one that is cut off, or all of it if there is none."""
    blocks = _FENCE.findall(response)
    return blocks[-1] if blocks else response


def call_tests(function: str, cases: Sequence[tuple[Sequence[Any], Any]]) -> str:
    """Tests that call a function.

    Args:
      function: how to call it, as `add` or `Solution().add`.
      cases: arguments and what is to come back, values of JSON; a tuple that comes back is a list.
    """
    return _CALLS.format(function=function, cases=json.dumps(cases))


def grade_tests(
    programs: Sequence[str],
    tests: Sequence[str],
    *,
    allowed: bool,
    limits: Limits | None = None,
    workers: int | None = None,
) -> list[Outcome]:
    """Runs each program with its tests behind it: it is right if its outcome has `passed`.

    Args:
      programs: source.
      tests: source that raises an exception if the program is wrong.
      allowed: see `run_python`.
      limits: see `run_python`.
      workers: how many to run at a time; by default one for each core.

    Raises:
      UserError: see `run_python`.
    """
    pairs = list(zip(programs, tests, strict=True))
    with concurrent.futures.ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        run = [
            pool.submit(run_python, f"{program}\n{test}\n", allowed=allowed, limits=limits)
            for program, test in pairs
        ]
        try:
            return [future.result() for future in run]
        finally:
            pool.shutdown(cancel_futures=True)


def grade_cases(
    program: str,
    cases: Sequence[tuple[str, str]],
    *,
    allowed: bool,
    limits: Limits | None = None,
) -> bool:
    """Whether a program prints what it is to print for each input; stops at the first that it fails.

    Args:
      program: source.
      cases: what it reads, and what it is to print; white space at the ends of lines and numbers
        written in another way do not matter.
      allowed: see `run_python`.
      limits: for each of the cases; see `run_python`.

    Raises:
      UserError: see `run_python`, or there are no cases.
    """
    if not cases:
        raise UserError("a program cannot be graded by its output without a case.")
    for stdin, expected in cases:
        outcome = run_python(program, allowed=allowed, stdin=stdin, limits=limits)
        if outcome.ended not in (OK, EXIT) or not _same(outcome.stdout, expected):
            return False
    return True


class SandboxedCodeEval:
    """What the library evaluate calls the metric `code_eval`, in the sandbox."""

    def __init__(
        self, *, allowed: bool, limits: Limits | None = None, workers: int | None = None
    ) -> None:
        self._options: dict[str, Any] = {"allowed": allowed, "limits": limits, "workers": workers}

    def compute(
        self,
        references: Sequence[str],
        predictions: Sequence[Sequence[str]],
        k: Sequence[int] = (1, 10, 100),
    ) -> tuple[dict[str, float], dict[int, list[Outcome]]]:
        """pass@k, for each k of which there are enough samples, and the outcomes of each problem.

        Args:
          references: the tests of each problem.
          predictions: its samples.
          k: as in pass@k.

        Raises:
          UserError: see `run_python`.
        """
        programs = [program for samples in predictions for program in samples]
        tests = [t for t, samples in zip(references, predictions, strict=True) for _ in samples]
        outcomes = iter(grade_tests(programs, tests, **self._options))
        of = {i: [next(outcomes) for _ in samples] for i, samples in enumerate(predictions)}
        passed = [[outcome.passed for outcome in of[i]] for i in of]
        enough = [n for n in k if all(len(samples) >= n for samples in passed)]
        return {f"pass@{n}": mean_pass_at_k(passed, n).mean for n in enough}, of


@contextlib.contextmanager
def in_place_of_code_eval(
    *, allowed: bool, limits: Limits | None = None, workers: int | None = None
) -> Iterator[None]:
    """While it lasts, who loads `code_eval` gets `SandboxedCodeEval`.

    lm-evaluation-harness's tasks of programs load it when they are loaded, from the hub, and it runs
    what a model wrote as the user it is run by. They keep what they have loaded here.

    Raises:
      UserError: the library evaluate is not installed.
    """
    try:
        library = importlib.import_module("evaluate")
    except ImportError:
        raise UserError("this needs evaluate: pip install 'mobilellm-jax[eval]'.") from None
    load = library.load

    def loaded(path: str, *arguments: Any, **options: Any) -> Any:
        if path == "code_eval":
            return SandboxedCodeEval(allowed=allowed, limits=limits, workers=workers)
        return load(path, *arguments, **options)

    with mock.patch.object(library, "load", loaded):
        yield


def _same(found: str, expected: str) -> bool:
    """Whether two outputs are the same, line by line."""
    both = [[line.rstrip() for line in text.rstrip().splitlines()] for text in (found, expected)]
    return len(both[0]) == len(both[1]) and all(
        a == b or (_numbers(a) is not None and _numbers(a) == _numbers(b))
        for a, b in zip(*both, strict=True)
    )


def _numbers(line: str) -> list[decimal.Decimal] | None:
    try:
        return [decimal.Decimal(word) for word in line.split()]
    except decimal.InvalidOperation:
        return None
