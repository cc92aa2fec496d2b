"""Grading of chat answers by another model: win rate against a reference, and scores from 1 to 10.

The win rate is that of AlpacaEval: which of two answers to an instruction is better. A judge that
prefers a position would decide it, so each pair is judged in both orders, and is a tie where the
two disagree. The scores are those of MT-Bench: two turns, each rated from 1 to 10. The prompts are
our own, so figures compare with each other and not with published ones.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mobilellm_jax.errors import UserError
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
    """

    score: Score
    wins: int
    ties: int
    losses: int
    swayed: int
    unreadable: int
    length: float
    reference_length: float


@dataclasses.dataclass(frozen=True)
class Ratings:
    """What a judge says of conversations.

    Attributes:
      score: mean of all turns' ratings; its standard error takes those of a conversation as dependent.
      turns: mean of each turn's.
      unreadable: turns without a rating from 1 to 10; they are left out.
    """

    score: Score
    turns: tuple[Score, ...]
    unreadable: int


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
    for instruction in answers:
        if instruction not in references:
            raise UserError(f"the reference has no answer to the instruction {instruction[:80]!r}.")
    orders = [
        [_pair(instruction, *pair) for instruction, *pair in ordered]
        for ordered in (
            [(i, answers[i], references[i]) for i in answers],
            [(i, references[i], answers[i]) for i in answers],
        )
    ]
    told = _ask(judge, [question for order in orders for question in order], cache)
    points = []
    swayed = unreadable = 0
    for first, second in zip(told[: len(answers)], told[len(answers) :], strict=True):
        ours = [_POINTS[0].get(_last_word(first)), _POINTS[1].get(_last_word(second))]
        if ours[0] is None or ours[1] is None:
            unreadable += 1
            continue
        swayed += ours[0] != ours[1]
        points.append(ours[0] if ours[0] == ours[1] else 0.5)
    return WinRate(
        score=_mean(points, told, "verdict"),
        wins=points.count(1.0),
        ties=points.count(0.5),
        losses=points.count(0.0),
        swayed=swayed,
        unreadable=unreadable,
        length=sum(map(len, answers.values())) / len(answers),
        reference_length=sum(len(references[i]) for i in answers) / len(answers),
    )


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
        (number, turn, messages[: place + 1])
        for number, messages in enumerate(conversations)
        for turn, place in enumerate(
            [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        )
    ]
    told = _ask(judge, [_conversation(messages) for _, _, messages in rated], cache)
    values, of, turns = [], [], []
    for (number, turn, _), text in zip(rated, told, strict=True):
        word = _last_word(text)
        if re.fullmatch(r"\d+(\.\d+)?", word) and 1 <= float(word) <= 10:
            values.append(float(word))
            of.append(number)
            turns.append(turn)
    return Ratings(
        score=_mean(values, told, "rating", of),
        turns=tuple(
            mean_score([value for value, t in zip(values, turns, strict=True) if t == turn])
            for turn in sorted(set(turns))
        ),
        unreadable=len(told) - len(values),
    )


def converse(
    questions: Sequence[Sequence[str]],
    model: Endpoint,
    *,
    cache: epath.PathLike | None = None,
    **options: Any,
) -> list[list[Message]]:
    """Asks a model questions of several turns, as MT-Bench's two, and gives the conversations.

    Args:
      questions: of each conversation, what the user says in each turn.
      model: whom to ask.
      cache: see `complete_all`.
      **options: see `complete`.

    Raises:
      UserError: see `complete`.
    """
    conversations: list[list[Message]] = [[] for _ in questions]
    for turn in range(max(map(len, questions), default=0)):
        going = [i for i, question in enumerate(questions) if turn < len(question)]
        for i in going:
            conversations[i].append({"role": "user", "content": questions[i][turn]})
        told = complete_all(model, [conversations[i] for i in going], cache=cache, **options)
        for i, answer in zip(going, told, strict=True):
            conversations[i].append({"role": "assistant", "content": answer.text})
    return conversations


def read_outputs(path: epath.PathLike) -> dict[str, str]:
    """Answers by instruction, from AlpacaEval's JSON: an array of {"instruction", "output"}.

    Raises:
      UserError: the file is not there or something else, or answers an instruction twice.
    """
    try:
        pairs = [(r["instruction"], r["output"]) for r in json.loads(epath.Path(path).read_text())]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} is no array of {{instruction, output}} in JSON ({type(error).__name__}: {error})."
        ) from None
    if len(dict(pairs)) < len(pairs):
        raise UserError(f"{path} answers an instruction more than once.")
    return dict(pairs)


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


def _mean(
    values: Sequence[float], told: Sequence[str], what: str, of: Sequence[int] | None = None
) -> Score:
    if told and not values:
        raise UserError(
            f"none of the judge's {len(told)} answers holds a {what}; the first is {told[0][:200]!r}: "
            "take a model that keeps to what it is told."
        )
    return mean_score(values, of)
