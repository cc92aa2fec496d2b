"""Worked arithmetic: problems with their solution step by step, drawn from a seed.

Each kind of problem is a function of a random generator that returns (problem, solution). What is
written with an equals sign is always true: `7 + 5 + 1 = 13`, with a letter only at the value that
the solution finds, so a test checks all of it by evaluating. Every solution ends in a line `Answer:
...`.
"""

import math
import random
from collections.abc import Callable, Iterator
from fractions import Fraction

from mobilellm_jax.data.word_problems import STORIES, in_lines

VERSION = 1  # raise it when the text changes: prepared sources record it

PLACES = ("Ones", "Tens", "Hundreds", "Thousands", "Ten thousands", "Hundred thousands")


def documents(seed: int, size: int) -> Iterator[tuple[str, str]]:
    """Different problems of all kinds as (problem, solution), about `size` characters."""
    rng = random.Random(f"arithmetic-{seed}")
    seen: set[str] = set()
    while size > 0:
        problem, solution = rng.choice(KINDS)(rng)
        if problem not in seen:
            seen.add(problem)
            size -= len(problem) + len(solution)
            yield problem, solution


def _column_addition(rng: random.Random) -> tuple[str, str]:
    a, b = sorted((_number(rng), _number(rng)), reverse=True)
    lines = ["Add the columns from right to left."]
    carry = 0
    for place, (x, y) in enumerate(zip(_digits(a), _digits(b, len(str(a))), strict=True)):
        total = x + y + carry
        terms = f"{x} + {y}" + (f" + {carry}" if carry else "")
        carry = total // 10
        tail = f"write {total % 10} and carry {carry}" if carry else f"write {total}"
        lines.append(f"{PLACES[place]}: {terms} = {total}, {tail}.")
    if carry:
        lines.append(f"Write the last carry {carry} in front.")
    return _closed(_sum_question(rng, a, b), lines, f"{a} + {b} = {a + b}", a + b)


def _column_subtraction(rng: random.Random) -> tuple[str, str]:
    a, b = sorted((_number(rng), _number(rng)), reverse=True)
    question = rng.choice(("Work out {} - {}.", "What is {} - {}?", "Subtract {1} from {0}."))
    lines = ["Subtract the columns from right to left."]
    borrow = 0
    for place, (x, y) in enumerate(zip(_digits(a), _digits(b, len(str(a))), strict=True)):
        y += borrow
        borrow = int(x < y)
        if borrow:
            lines.append(
                f"{PLACES[place]}: {x} is less than {y}, borrow 10: {x + 10} - {y} = {x + 10 - y}."
            )
        else:
            lines.append(f"{PLACES[place]}: {x} - {y} = {x - y}.")
    lines.append(f"Check: {a - b} + {b} = {a}.")
    return _closed(question.format(a, b), lines, f"{a} - {b} = {a - b}", a - b)


def _multiplication(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(12, 999), rng.randint(12, 99)
    tens, ones = b // 10 * 10, b % 10
    question = rng.choice(("Work out {} * {}.", "What is {} times {}?", "Multiply {} by {}."))
    if not ones:
        lines = [f"{a} * {tens // 10} = {a * tens // 10}, and ten times that is {a * tens}."]
    else:
        lines = [
            f"Split {b} into {tens} and {ones}.",
            f"{a} * {tens} = {a * tens}.",
            f"{a} * {ones} = {a * ones}.",
            f"Add the parts: {a * tens} + {a * ones} = {a * b}.",
        ]
    return _closed(question.format(a, b), lines, f"{a} * {b} = {a * b}", a * b)


def _long_division(rng: random.Random) -> tuple[str, str]:
    divisor = rng.randint(2, 12)
    number = rng.randint(divisor * 11, 9999)
    lines: list[str] = []
    rest = 0
    for digit in str(number):
        part = rest * 10 + int(digit)
        quotient = part // divisor
        rest = part - quotient * divisor
        if quotient or lines:
            lines.append(
                f"{divisor} goes {_times(quotient)} into {part}: "
                f"{quotient} * {divisor} = {quotient * divisor}, {part} - {quotient * divisor} = "
                f"{rest}."
            )
    quotient, rest = divmod(number, divisor)
    question = rng.choice(("Divide {} by {}.", "Work out {} divided by {} with remainder."))
    lines.append(f"The remainder is {rest}.")
    answer = f"{quotient} remainder {rest}" if rest else f"{quotient}"
    return _closed(
        question.format(number, divisor),
        lines,
        f"{number} = {quotient} * {divisor} + {rest}",
        answer,
    )


def _fraction_sum(rng: random.Random) -> tuple[str, str]:
    b, d = rng.randint(2, 12), rng.randint(2, 12)
    a, c = rng.randint(1, b - 1), rng.randint(1, d - 1)
    sign = rng.choice("+-")
    if sign == "-" and a * d <= c * b:
        (a, b), (c, d) = (c, d), (a, b)
    if a * d == c * b:
        sign = "+"
    common = math.lcm(b, d)
    x, y = a * common // b, c * common // d
    top = x + y if sign == "+" else x - y
    lines = []
    if b != d:
        lines.append(f"The least common multiple of {b} and {d} is {common}.")
        for p, q, r in ((a, b, x), (c, d, y)):
            if q != common:
                lines.append(f"{p}/{q} = {r}/{common}.")
    lines.append(f"{x}/{common} {sign} {y}/{common} = {top}/{common}.")
    lines += _reduced(top, common)
    result = Fraction(top, common)
    return _closed(
        f"Work out {a}/{b} {sign} {c}/{d}.", lines, f"{a}/{b} {sign} {c}/{d} = {result}", result
    )


def _fraction_product(rng: random.Random) -> tuple[str, str]:
    b, d = rng.randint(2, 12), rng.randint(2, 12)
    a, c = rng.randint(1, 11), rng.randint(1, 11)
    if rng.random() < 0.5:
        question, lines = f"Work out {a}/{b} * {c}/{d}.", []
        claim = f"{a}/{b} * {c}/{d}"
    else:
        question = f"Divide {a}/{b} by {d}/{c}."
        lines = [f"To divide by {d}/{c}, multiply by {c}/{d}."]
        claim = f"({a}/{b}) / ({d}/{c})"
    lines += [
        f"Numerators: {a} * {c} = {a * c}.",
        f"Denominators: {b} * {d} = {b * d}.",
        *_reduced(a * c, b * d),
    ]
    result = Fraction(a * c, b * d)
    return _closed(question, lines, f"{claim} = {result}", result)


def _equation(rng: random.Random) -> tuple[str, str]:
    x, letter = rng.randint(-9, 20), rng.choice("xyznt")
    a, b = rng.randint(2, 12), rng.randint(1, 40) * rng.choice((1, -1))
    c = a * x + b
    verb = f"Subtract {b} from" if b > 0 else f"Add {-b} to"
    lines = [
        f"{verb} both sides: {a} * {letter} = {c - b}.",
        f"Divide both sides by {a}: {letter} = {x}.",
        f"Check: {a} * {_in_brackets(x)} {_signed(b)} = {c}.",
    ]
    question = rng.choice(("Solve {} for {}.", "Find {1} if {0}."))
    return _closed(
        question.format(f"{a} * {letter} {_signed(b)} = {c}", letter), lines, f"{letter} = {x}", x
    )


def _equation_two_sides(rng: random.Random) -> tuple[str, str]:
    x, letter = rng.randint(-9, 12), rng.choice("xyznt")
    c = rng.randint(1, 8)
    a, b = c + rng.randint(2, 9), rng.randint(1, 30)
    d = (a - c) * x + b
    right = f"{c} * {letter} {_signed(d)}" if d else f"{c} * {letter}"
    lines = [
        f"Subtract {c} * {letter} from both sides: {a - c} * {letter} + {b} = {d}.",
        f"Subtract {b} from both sides: {a - c} * {letter} = {d - b}.",
        f"Divide both sides by {a - c}: {letter} = {x}.",
    ]
    question = f"Solve {a} * {letter} + {b} = {right} for {letter}."
    return _closed(question, lines, f"{letter} = {x}", x)


def _arithmetic_sequence(rng: random.Random) -> tuple[str, str]:
    start, step, n = (
        rng.randint(1, 50),
        rng.randint(2, 15) * rng.choice((1, 1, -1)),
        rng.randint(8, 40),
    )
    shown = [start + step * i for i in range(4)]
    last = start + (n - 1) * step
    problem = (
        f"A sequence begins {', '.join(map(str, shown))} and goes on in the same way. "
        f"What is term {n}?"
    )
    lines = (
        f"The difference of neighbours is {shown[1]} - {_in_brackets(shown[0])} = {step}.",
        f"Term {n} is {n - 1} steps after the first: "
        f"{start} + {n - 1} * {_in_brackets(step)} = {start} {_signed((n - 1) * step)} = {last}.",
        f"Answer: {last}",
    )
    return problem, in_lines(*lines)


def _geometric_sequence(rng: random.Random) -> tuple[str, str]:
    start, ratio = rng.randint(1, 60), rng.choice((2, 2, 3, 4, 5, 10))
    shown = [start * ratio**i for i in range(6)]
    problem = f"Continue the sequence {', '.join(map(str, shown[:3]))} by three terms."
    lines = [
        f"Every term is {ratio} times the one before: {shown[0]} * {ratio} = {shown[1]} and "
        f"{shown[1]} * {ratio} = {shown[2]}."
    ]
    lines += [f"{a} * {ratio} = {b}." for a, b in zip(shown[2:5], shown[3:], strict=True)]
    return problem, in_lines(*lines, f"Answer: {', '.join(map(str, shown[3:]))}")


def _order_of_operations(rng: random.Random) -> tuple[str, str]:
    a, b, c, d = rng.randint(2, 30), rng.randint(2, 12), rng.randint(2, 12), rng.randint(1, 30)
    if rng.random() < 0.5:
        text, result = f"{a} + {b} * {c} - {d}", a + b * c - d
        lines = [
            f"Multiply first: {b} * {c} = {b * c}.",
            f"Then add from left to right: {a} + {b * c} = {a + b * c}, {a + b * c} - {d} = "
            f"{result}.",
        ]
    else:
        text, result = f"({a} + {b}) * {c} + {d}", (a + b) * c + d
        lines = [
            f"Brackets first: {a} + {b} = {a + b}.",
            f"Then multiply: {a + b} * {c} = {(a + b) * c}.",
            f"Then add: {(a + b) * c} + {d} = {result}.",
        ]
    question = rng.choice(("Evaluate {}.", "Work out {}.", "Find the value of {}."))
    return _closed(question.format(text), lines, f"{text} = {result}", result)


def _common_divisor(rng: random.Random) -> tuple[str, str]:
    factor = rng.randint(1, 24)
    a, b = sorted((factor * rng.randint(2, 40), factor * rng.randint(2, 40)), reverse=True)
    lines, x, y = ["Divide with remainder until the remainder is zero."], a, b
    while y:
        lines.append(f"{x} = {x // y} * {y} + {x % y}.")
        x, y = y, x % y
    lines.append(f"The last divisor is {x}.")
    return f"Find the greatest common divisor of {a} and {b}.", in_lines(*lines, f"Answer: {x}")


def _prime_factors(rng: random.Random) -> tuple[str, str]:
    number = rest = math.prod(
        rng.choice((2, 2, 3, 3, 5, 7, 11, 13)) for _ in range(rng.randint(2, 5))
    )
    lines, factors, prime = [], [], 2
    while rest > 1:
        while rest % prime == 0:
            lines.append(f"{rest} = {prime} * {rest // prime}.")
            factors.append(str(prime))
            rest //= prime
        prime += 1
    question = rng.choice(("Write {} as a product of primes.", "Find the prime factors of {}."))
    product = " * ".join(factors)
    return _closed(question.format(number), lines, f"{number} = {product}", product)


BASIC = (_column_addition, _column_subtraction, _multiplication, _long_division)
NUMBERS = (_fraction_sum, _fraction_product, _order_of_operations, _common_divisor, _prime_factors)
LETTERS = (_equation, _equation_two_sides, _arithmetic_sequence, _geometric_sequence)

KINDS: tuple[Callable[[random.Random], tuple[str, str]], ...]
KINDS = (*BASIC, *BASIC, *NUMBERS, *LETTERS, *STORIES)


def _closed(problem: str, lines: list[str], claim: str, answer: object) -> tuple[str, str]:
    return problem, in_lines(*lines, f"So {claim}.", f"Answer: {answer}")


def _sum_question(rng: random.Random, a: int, b: int) -> str:
    forms = (
        "Work out {} + {}.",
        "What is {} + {}?",
        "Find the sum of {} and {}.",
        "Add {} and {}.",
    )
    return rng.choice(forms).format(a, b)


def _number(rng: random.Random) -> int:
    digits = rng.randint(2, 5)
    return rng.randint(10 ** (digits - 1), 10**digits - 1)


def _digits(number: int, width: int = 0) -> list[int]:
    return [int(digit) for digit in reversed(str(number).zfill(width))]


def _reduced(top: int, bottom: int) -> list[str]:
    factor = math.gcd(top, bottom)
    if factor == 1:
        return []
    return [f"Divide both by {factor}: {top}/{bottom} = {Fraction(top, bottom)}."]


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"


def _signed(n: int) -> str:
    return f"- {-n}" if n < 0 else f"+ {n}"


def _in_brackets(n: int) -> str:
    return f"({n})" if n < 0 else str(n)
