"""Worked arithmetic: every equation of every problem is evaluated."""

import random
import re
from fractions import Fraction

import pytest

from mobilellm_jax.data import arithmetic
from mobilellm_jax.data.corpora import split_of
from mobilellm_jax.data.embedded import HELDOUT

TOKEN = re.compile(r"\d+(?:\.\d+)?|[A-Za-z]+|\S")
LETTERS = set("xyznt")  # of unknowns; none is an English word


def equations(text):
    """Chains `a = b = ...` of numbers, operators and unknowns, as lists of sides."""
    for line in text.splitlines():
        chain = []
        for token in [*TOKEN.findall(line), "."]:
            if re.fullmatch(r"[\d.]*\d|[-+*/()=]", token) or token in LETTERS:
                chain.append(token)
                continue
            sides = " ".join(chain).split("=")
            if len(sides) > 1:
                assert all(side.strip() for side in sides), line
                yield sides
            chain = []


def value(side, unknowns):
    return eval(
        re.sub(r"\d+(?:\.\d+)?", r"Fraction('\g<0>')", side), {"Fraction": Fraction, **unknowns}
    )


def check(problem, solution):
    """Number of equations that hold; fails at one that does not."""
    unknowns = {}
    for letter, number in re.findall(r"(?<!\* )\b([xyznt]) = (-?\d+)\b", solution):
        assert unknowns.setdefault(letter, Fraction(number)) == Fraction(number)
    count = 0
    for sides in equations(f"{problem}\n{solution}"):
        assert len({value(side, unknowns) for side in sides}) == 1, (sides, problem, solution)
        count += 1
    return count


@pytest.mark.parametrize("kind", arithmetic.KINDS, ids=lambda kind: kind.__name__)
def test_every_equation_is_true(kind):
    rng = random.Random(1)
    for _ in range(300):
        problem, solution = kind(rng)
        assert check(problem, solution) > 0, solution
        answer = re.fullmatch(r".*\nAnswer: ([^\n]+)\n", solution, re.DOTALL).group(1)
        # An answer is read off the steps before it.
        before = problem + solution[: solution.rindex("Answer:")]
        assert set(re.findall(r"\d+", answer)) <= set(re.findall(r"\d+", before)) | {"0"}
        asked = re.fullmatch(
            r"(?:Work out|Evaluate|What is|Find the value of) ([\d\s/*()+-]+)[.?]", problem
        )
        if asked:
            assert value(asked.group(1), {}) == Fraction(answer)


def test_the_check_can_fail():
    assert check("What is 2 + 3?", "Ones: 2 + 3 = 5.\nSo 2 + 3 = 5.\n") == 2
    for wrong in ("So 2 + 3 = 6.\n", "1/2 = 2/3.\n", "2 * x = 5.\nx = 2.\n", "2 - 3 = 1.\n"):
        with pytest.raises(AssertionError):
            check("", wrong)


def test_problems_are_different_and_follow_the_seed():
    one, again, other = (list(arithmetic.documents(seed, 200_000)) for seed in (0, 0, 1))
    assert one == again != other
    problems = [problem for problem, _ in one]
    assert len(set(problems)) == len(problems)
    assert 200_000 <= sum(len(p) + len(s) for p, s in one) < 201_000
    assert 0.5 * HELDOUT < sum(split_of(p, HELDOUT) == "heldout" for p in problems) / len(one) < 0.1
