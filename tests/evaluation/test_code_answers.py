"""Programs are right if they pass their tests, and only in the sandbox."""

import importlib.util
import sys

import pytest

from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.code_answers import (
    SandboxedCodeEval,
    call_tests,
    extract_code,
    grade_cases,
    grade_tests,
    in_place_of_code_eval,
)
from mobilellm_jax.evaluation.sandbox import Limits

ADD = "def add(a, b):\n    return a + b\n"
TEST = "def check(candidate):\n    assert candidate(2, 3) == 5\n    assert candidate(-1, 1) == 0\n"
CHECK = f"{TEST}\ncheck(add)"


pytestmark = pytest.mark.usefixtures("isolating")


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("x = 1", "x = 1"),
        ("So:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```py\nx = 1\n```\nBetter:\n```\nx = 2\n```", "x = 2\n"),
        ("```python\nx = 1\nfor i in", "x = 1\nfor i in"),
        ("```python\ns = '``'\n```", "s = '``'\n"),
        ("1. So:\n   ```python\n   x = 1\n   ```\n", "   x = 1\n"),
        ("", ""),
    ],
)
def test_the_last_block_of_code_counts(response, code):
    assert extract_code(response) == code


def test_programs_pass_their_own_tests_only():
    programs = [
        ADD,
        ADD.replace("+", "-"),
        "import sys; sys.exit(0)",
        "import os\n" + ADD + "os._exit(0)",
        "def add(",
        "while True: pass",
        "def add(a, b):\n    while a: a += 1\n    return b",
        ADD,
    ]
    tests = [CHECK] * 7 + ["assert add(2, 2) == 5"]
    outcomes = grade_tests(
        programs, tests, allowed=True, limits=Limits(wall_seconds=5, cpu_seconds=1)
    )
    assert [o.passed for o in outcomes] == [True] + [False] * 7
    assert [o.ended for o in outcomes[2:6]] == ["exit", "exit", "error", "timeout"]


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("class S:\n    def f(self, a, b):\n        return (a, b[::-1])", True),
        ("class S:\n    def f(self, a, b):\n        return (a, b)", False),
        ("class S:\n    def f(self, a, b):\n        return {a}", False),  # nothing of JSON
    ],
)
def test_functions_are_called(program, passes):
    tests = call_tests("S().f", [([1, [2, 3]], [1, [3, 2]]), (["'\"\\", []], ["'\"\\", []])])
    assert grade_tests([program], [tests], allowed=True)[0].passed == passes


def test_programs_that_print():
    program = "a, b = map(int, input().split())\nprint(a + b)\nprint(a / b)\n"
    cases = [("1 2\n", "3\n0.5\n"), ("4 2\n", "6 \n2\n\n")]
    assert grade_cases(program, cases, allowed=True)
    assert grade_cases(program + "exit()", cases, allowed=True)
    assert not grade_cases(program + "exit(1)", cases, allowed=True)
    assert not grade_cases(program, [*cases, ("1 2\n", "3")], allowed=True)
    assert not grade_cases(program, [("1 2\n", "3\n0.51\n")], allowed=True)
    assert not grade_cases(program, [("1\n", "")], allowed=True)
    assert not grade_cases("print('3 x')", [("", "3 y")], allowed=True)
    with pytest.raises(UserError, match="without a case"):
        grade_cases(program, [], allowed=True)


def test_pass_at_k_over_samples():
    wrong = ADD.replace("+", "-")
    metric = SandboxedCodeEval(allowed=True)
    figures, outcomes = metric.compute(
        [CHECK, CHECK], [[ADD, wrong, wrong], [ADD] * 3], k=[1, 2, 10]
    )
    assert figures == pytest.approx({"pass@1": (1 / 3 + 1) / 2, "pass@2": (2 / 3 + 1) / 2})
    assert [o.passed for o in outcomes[0]] == [True, False, False]


def test_nothing_is_run_unless_asked_for():
    for grade in (
        lambda: grade_tests([ADD], [CHECK], allowed=False),
        lambda: grade_cases(ADD, [("", "")], allowed=False),
        lambda: SandboxedCodeEval(allowed=False).compute([CHECK], [[ADD]]),
    ):
        with pytest.raises(UserError, match="is off"):
            grade()


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")
@pytest.mark.parametrize("task", ["humaneval", "mbpp"])
def test_the_harness_runs_programs_in_the_sandbox(task):
    name = f"lm_eval.tasks.{task}.utils"
    sys.modules.pop(name, None)
    spy = "import os\nassert os.getuid() == 65534 and not os.path.exists('/proc/self')\n"
    with in_place_of_code_eval(allowed=True):
        utils = importlib.import_module(name)
    try:
        metric = utils.pass_at_k if task == "humaneval" else utils.pass_at_1
        for program, value in ((spy + ADD, 1.0), (ADD.replace("+", "*"), 0.0)):
            if task == "humaneval":
                found = metric([CHECK], [[program]], [1])
            else:
                found = metric([CHECK], [[program]])
            assert found in (value, {"pass@1": value})
    finally:
        del sys.modules[name]
    with in_place_of_code_eval(allowed=False), pytest.raises(UserError, match="is off"):
        importlib.import_module(name)
