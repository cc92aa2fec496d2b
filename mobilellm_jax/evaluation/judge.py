"""Grading of chat answers by another model: win rate against a reference, and scores from 1 to 10.

The win rate is that of AlpacaEval: which of two answers to an instruction is better. A judge that
prefers a position would decide it, so each pair is judged in both orders, and is a tie where the
two disagree. The scores are those of MT-Bench: two turns, each rated from 1 to 10. The prompts are
our own, so figures compare with each other and not with published ones.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence

from etils import epath

from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.answers import Answer
from mobilellm_jax.evaluation.endpoint import Endpoint, Message, complete_all
from mobilellm_jax.evaluation.scores import Score, mean_score

_PAIR = """Two assistants, A and B, have answered the same instruction. Decide whose answer serves the \
one who gave it better: does it do what was asked, is it right, is it clear, is anything missing? \
Neither the order of the answers, nor their length, nor the assistants' names matter. Give your \
reasons in a few sentences. Then end with your verdict alone on a line: [[A]] if A is better, [[B]] \
if B is better, [[C]] if they are equally good."""
_RATE = """Rate the answer of an assistant from 1 (useless) to 10 (could not be better): does it do \
what was asked, is it right, is it clear, is anything missing?{last} Give your reasons in a few \
sentences. Then end with the rating in double square brackets alone on a line, as in [[5]]."""
_LAST = " Rate its last answer alone; what was said before is there to understand it."
_BRACKETS = re.compile(r"\[\[(.*?)\]\]")
_POINTS = ({"A": 1.0, "B": 0.0, "C": 0.5}, {"A": 0.0, "B": 1.0, "C": 0.5})  # of ours, in each order


@dataclasses.dataclass(frozen=True)
class WinRate:
    """What a judge says of answers beside those of a reference.

    Attributes:
      score: share of the instructions on which ours are better, a tie counting half.
      wins: how many.
      ties: how many, those of `swayed` included.
      losses: how many.
      swayed: pairs on which the judge changed its mind as the answers changed places.
      unreadable: pairs without a verdict in one of the orders; they are left out.
      length: mean characters of our answers: judges like long ones.
      reference_length: mean characters of the reference's.
      points: of each instruction 1, 0.5 or 0, None where unreadable.
    """

    score: Score
    wins: int
    ties: int
    losses: int
    swayed: int
    unreadable: int
    length: float
    reference_length: float
    points: tuple[float | None, ...]


@dataclasses.dataclass(frozen=True)
class Ratings:
    """What a judge says of conversations.

    Attributes:
      score: mean of all turns' ratings; its standard error takes those of a conversation as dependent.
      turns: mean of each turn's, None where none can be read.
      unreadable: turns without a rating from 1 to 10; they are left out.
      values: the ratings of each conversation's turns, None where unreadable.
    """

    score: Score
    turns: tuple[Score | None, ...]
    unreadable: int
    values: tuple[tuple[float | None, ...], ...]


def win_rate(
    answers: Mapping[str, str],
    references: Mapping[str, str],
    judge: Endpoint,
    *,
    cache: epath.PathLike | None = None,
) -> WinRate:
    """Compares answers with those of a reference, in both orders.

    Args:
      answers: ours, by instruction.
      references: the reference's; others than to our instructions are not looked at.
      judge: who decides; `temperature=0` unless its options say otherwise.
      cache: see `complete_all`.

    Raises:
      UserError: the reference has no answer to one of the instructions, there are no answers, no
        verdict can be read, or the judge fails.
    """
    see_answered(answers, references)
    orders = [
        [_pair(instruction, *pair) for instruction, *pair in ordered]
        for ordered in (
            [(i, answers[i], references[i]) for i in answers],
            [(i, references[i], answers[i]) for i in answers],
        )
    ]
    told = _ask(judge, [question for order in orders for question in order], cache)
    points: list[float | None] = []
    swayed = 0
    for first, second in zip(told[: len(answers)], told[len(answers) :], strict=True):
        ours = [_POINTS[0].get(_last_word(first)), _POINTS[1].get(_last_word(second))]
        if None in ours:
            points.append(None)
            continue
        swayed += ours[0] != ours[1]
        points.append(ours[0] if ours[0] == ours[1] else 0.5)
    _see_readable(points, told, "verdict")
    return WinRate(
        score=mean_score([value for value in points if value is not None]),
        wins=points.count(1.0),
        ties=points.count(0.5),
        losses=points.count(0.0),
        swayed=swayed,
        unreadable=points.count(None),
        length=sum(map(len, answers.values())) / len(answers),
        reference_length=sum(len(references[i]) for i in answers) / len(answers),
        points=tuple(points),
    )


def see_answered(
    instructions: Iterable[str], answers: Mapping[str, str], where: str = "the reference"
) -> None:
    """Raises `UserError` if there is no answer to one of the instructions."""
    for instruction in instructions:
        if instruction not in answers:
            raise UserError(f"{where} has no answer to the instruction {instruction[:80]!r}.")


def rate(
    conversations: Sequence[Sequence[Message]],
    judge: Endpoint,
    *,
    cache: epath.PathLike | None = None,
) -> Ratings:
    """Rates each message of the assistant in conversations from 1 to 10.

    Args:
      conversations: messages of `user` and `assistant`; see `converse`.
      judge: who decides; `temperature=0` unless its options say otherwise.
      cache: see `complete_all`.

    Raises:
      UserError: there are no answers, no rating can be read, or the judge fails.
    """
    rated = [
        (number, messages[: place + 1])
        for number, messages in enumerate(conversations)
        for place, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    told = _ask(judge, [_conversation(messages) for _, messages in rated], cache)
    values: list[list[float | None]] = [[] for _ in conversations]
    for (number, _), text in zip(rated, told, strict=True):
        word = _last_word(text)
        readable = re.fullmatch(r"\d+(\.\d+)?", word) and 1 <= float(word) <= 10
        values[number].append(float(word) if readable else None)
    _see_readable([value for of_one in values for value in of_one], told, "rating")
    return ratings(values)


def ratings(values: Sequence[Sequence[float | None]]) -> Ratings:
    """Means of the ratings of conversations, or of some of them.

    Args:
      values: see `Ratings`.

    Raises:
      UserError: there are none.
    """
    found = [
        (value, number, turn)
        for number, of_one in enumerate(values)
        for turn, value in enumerate(of_one)
        if value is not None
    ]
    turns = [
        [value for value, _, its in found if its == turn]
        for turn in range(max(map(len, values), default=0))
    ]
    return Ratings(
        score=mean_score([value for value, _, _ in found], [number for _, number, _ in found]),
        turns=tuple(mean_score(of_turn) if of_turn else None for of_turn in turns),
        unreadable=sum(map(len, values)) - len(found),
        values=tuple(map(tuple, values)),
    )


def converse(questions: Sequence[Sequence[str]], answer: Answer) -> list[list[Message]]:
    """Asks questions of several turns, as MT-Bench's two, and gives the conversations.

    Args:
      questions: of each conversation, what the user says in each turn.
      answer: who answers.

    Raises:
      UserError: see `answer`.
    """
    conversations: list[list[Message]] = [[] for _ in questions]
    for turn in range(max(map(len, questions), default=0)):
        going = [i for i, question in enumerate(questions) if turn < len(question)]
        for i in going:
            conversations[i].append({"role": "user", "content": questions[i][turn]})
        told = answer([conversations[i] for i in going])
        for i, text in zip(going, told, strict=True):
            conversations[i].append({"role": "assistant", "content": text})
    return conversations


def _ask(
    judge: Endpoint, questions: list[list[Message]], cache: epath.PathLike | None
) -> list[str]:
    judge = dataclasses.replace(judge, options={"temperature": 0, **judge.options})
    return [answer.text for answer in complete_all(judge, questions, cache=cache)]


def _last_word(text: str) -> str:
    """What the last double square brackets hold."""
    found = _BRACKETS.findall(text)
    return found[-1].strip() if found else ""


def _pair(instruction: str, a: str, b: str) -> list[Message]:
    parts = (("instruction", instruction), ("answer of A", a), ("answer of B", b))
    return _prompt(_PAIR, parts)


def _conversation(messages: Sequence[Message]) -> list[Message]:
    parts = [(message["role"], message["content"]) for message in messages]
    several = sum(role == "assistant" for role, _ in parts) > 1
    return _prompt(_RATE.format(last=_LAST if several else ""), parts)


def _prompt(task: str, parts: Sequence[tuple[str, str]]) -> list[Message]:
    shown = "\n\n".join(f"<{name}>\n{text}\n</{name}>" for name, text in parts)
    return [{"role": "system", "content": task}, {"role": "user", "content": shown}]


def _see_readable(values: Sequence[float | None], told: Sequence[str], what: str) -> None:
    if told and all(value is None for value in values):
        raise UserError(
            f"none of the judge's {len(told)} answers holds a {what}; the first is {told[0][:200]!r}: "
            "take a model that keeps to what it is told."
        )
