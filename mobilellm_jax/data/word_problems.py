"""Problems of daily life in words, solved step by step; `arithmetic.py` says what holds of them."""

import random

WOMEN = ("Anna", "Chloe", "Emma", "Grace", "Ines", "Kira", "Maya", "Olga")
MEN = ("Ben", "David", "Farid", "Hugo", "Jonas", "Leo", "Noah", "Pedro")
GOODS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pencils", "shells", "stamps")
SHOPS = ("bakery", "market", "bookshop", "garden centre", "toy shop", "post office")


def _percentage(rng: random.Random) -> tuple[str, str]:
    percent, whole = rng.randint(1, 19) * 5, rng.randint(1, 60) * 20
    part = whole * percent // 100
    lines = [
        f"1 percent of {whole} is {whole} / 100 = {_decimal(whole, 100)}.",
        f"{percent} percent is {percent} times that: {whole} * {percent} / 100 = {part}.",
    ]
    return f"What is {percent}% of {whole}?", in_lines(*lines, f"Answer: {part}")


def _price_change(rng: random.Random) -> tuple[str, str]:
    percent, price = rng.randint(1, 12) * 5, rng.randint(2, 60) * 20
    change = price * percent // 100
    thing = rng.choice(("coat", "bicycle", "radio", "lamp", "table", "tent", "camera", "carpet"))
    up = rng.random() < 0.4
    new, sign, verb = (price + change, "+", "rises") if up else (price - change, "-", "falls")
    problem = (
        f"A {thing} costs {price} dollars. Its price {verb} by {percent}%. What does it cost now?"
    )
    lines = (
        f"{percent}% of {price} is {price} * {percent} / 100 = {change}.",
        f"The price {verb} by {change} dollars: {price} {sign} {change} = {new}.",
        f"Answer: {new} dollars",
    )
    return problem, in_lines(*lines)


def _shopping(rng: random.Random) -> tuple[str, str]:
    name, she, _ = _person(rng)
    first, second = rng.sample(GOODS, 2)
    n, m, p, q = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 12), rng.randint(2, 12)
    total = n * p + m * q
    paid = -(-(total + 1) // 50) * 50
    problem = (
        f"At the {rng.choice(SHOPS)} {name} buys {n} {first} at {p} dollars each and {m} {second} "
        "at "
        f"{q} dollars each. {she.capitalize()} pays with {paid} dollars. How much change does "
        f"{she} get?"
    )
    lines = (
        f"The {first} cost {n} * {p} = {n * p} dollars.",
        f"The {second} cost {m} * {q} = {m * q} dollars.",
        f"Together that is {n * p} + {m * q} = {total} dollars.",
        f"The change is {paid} - {total} = {paid - total} dollars.",
        f"Answer: {paid - total} dollars",
    )
    return problem, in_lines(*lines)


def _sharing(rng: random.Random) -> tuple[str, str]:
    name, she, her = _person(rng)
    thing, friends = rng.choice(GOODS), rng.randint(3, 9)
    have = rng.randint(20, 150)
    given = rng.randint(2, have // 2)
    each, rest = divmod(have - given, friends)
    problem = (
        f"{name} has {have} {thing}. {she.capitalize()} gives {given} of them to {her} brother and "
        "shares the "
        f"others equally among {friends} friends. How many {thing} does each friend get, and how "
        "many are left?"
    )
    lines = (
        f"After the gift {she} has {have} - {given} = {have - given} {thing}.",
        f"{have - given} = {friends} * {each} + {rest}.",
        f"Each friend gets {each} and {rest} are left.",
        f"Answer: {each} each, {rest} left",
    )
    return problem, in_lines(*lines)


def _journey(rng: random.Random) -> tuple[str, str]:
    vehicle = rng.choice(("train", "bus", "car", "ship", "lorry"))
    v, w, s, t = (
        rng.randint(4, 24) * 5,
        rng.randint(4, 24) * 5,
        rng.randint(1, 6),
        rng.randint(1, 6),
    )
    problem = (
        f"A {vehicle} travels for {_hours(s)} at {v} kilometres per hour and then for {_hours(t)} "
        f"at {w} "
        "kilometres per hour. How far does it travel?"
    )
    lines = (
        f"First part: {s} * {v} = {s * v} kilometres.",
        f"Second part: {t} * {w} = {t * w} kilometres.",
        f"In all: {s * v} + {t * w} = {s * v + t * w} kilometres.",
        f"Answer: {s * v + t * w} kilometres",
    )
    return problem, in_lines(*lines)


def _ages(rng: random.Random) -> tuple[str, str]:
    name, other = rng.sample((*WOMEN, *MEN), 2)
    young, gap = rng.randint(4, 30), rng.randint(2, 25)
    total = 2 * young + gap
    problem = (
        f"{name} is {gap} years older than {other}. Together they are {total} years old. "
        "How old are they?"
    )
    lines = (
        f"Let x be the age of {other}. Then {name} is x + {gap} years old.",
        f"Together: 2 * x + {gap} = {total}.",
        f"So 2 * x = {total - gap} and x = {young}.",
        f"{other} is {young} and {name} is {young} + {gap} = {young + gap} years old.",
        f"Answer: {other} is {young}, {name} is {young + gap}",
    )
    return problem, in_lines(*lines)


def _rectangle(rng: random.Random) -> tuple[str, str]:
    thing = rng.choice(("garden", "field", "room", "playground", "carpet", "courtyard"))
    a, b = rng.randint(3, 60), rng.randint(3, 60)
    problem = (
        f"A rectangular {thing} is {a} metres long and {b} metres wide. "
        "Find its perimeter and its area."
    )
    lines = (
        f"Perimeter: 2 * ({a} + {b}) = 2 * {a + b} = {2 * (a + b)} metres.",
        f"Area: {a} * {b} = {a * b} square metres.",
        f"Answer: {2 * (a + b)} metres and {a * b} square metres",
    )
    return problem, in_lines(*lines)


def _mean(rng: random.Random) -> tuple[str, str]:
    n, mean = rng.choice((3, 4, 5)), rng.randint(8, 60)
    offsets = [rng.randint(-7, 7) for _ in range(n - 1)]
    values = [mean + offset for offset in (*offsets, -sum(offsets))]
    if min(values) < 0:
        values = [mean] * n
    thing = rng.choice(
        ("The marks of a class test", "The numbers of visitors", "The temperatures", "Scores")
    )
    total = sum(values)
    problem = f"{thing} are {', '.join(map(str, values))}. What is their average?"
    lines = (
        f"The sum is {' + '.join(map(str, values))} = {total}.",
        f"There are {n} numbers: {total} / {n} = {mean}.",
        f"Answer: {mean}",
    )
    return problem, in_lines(*lines)


STORIES = (_price_change, _shopping, _sharing, _journey, _ages, _rectangle, _mean, _percentage)


def _person(rng: random.Random) -> tuple[str, str, str]:
    if rng.random() < 0.5:
        return rng.choice(WOMEN), "she", "her"
    return rng.choice(MEN), "he", "his"


def _hours(n: int) -> str:
    return "1 hour" if n == 1 else f"{n} hours"


def in_lines(*lines: str) -> str:
    """The lines of a solution as its text."""
    return "\n".join(lines) + "\n"


def _decimal(top: int, bottom: int) -> str:
    return f"{top / bottom:.2f}".rstrip("0").rstrip(".")
