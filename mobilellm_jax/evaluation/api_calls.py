"""Grading of calls and replies in dialogues with functions (MobileLLM, section 3.4 and Table 6).

A dialogue is a list of messages, as `api_dialogues` makes and `function_calls` reads them: each
message of the assistant is one call a line behind `PARSER: `, or a reply behind `AGENT: `. Each is
a turn to be graded; what a model sees of a turn is what was really said before it.

    EM_intent      the functions called are the right ones
    EM_structure   the calls are right: functions, slot names and values, whatever their order
    R1, RL         F-measure of ROUGE-1 and ROUGE-L of the replies, without stemming
"""

import ast
import dataclasses
import importlib
import json
import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.scores import Score, mean_score

Message = dict[str, str]

PARSER, AGENT = "PARSER: ", "AGENT: "
_TOKEN = re.compile(
    r'\s*("(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'|[-+]?\.?\d(?:[eE][-+]|[\w.])*|[\w$][\w$.-]*|[()\[\]{},:=])',
    re.DOTALL,
)
_NAMES = {"None": None, "null": None, "True": True, "true": True, "False": False, "false": False}
_LONGEST = 20_000  # characters of a call that is worth reading


@dataclasses.dataclass(frozen=True)
class Call:
    """A call: the function's name and its arguments, none if they cannot be read."""

    name: str
    arguments: Mapping[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Turn:
    """What the assistant is to say in a dialogue.

    Attributes:
      messages: all that was said before.
      expected: what is to be said, with the speaker's name.
      dialogue: which dialogue it is of.
    """

    messages: list[Message]
    expected: str
    dialogue: Hashable


def write_call(call: Call) -> str:
    """`name(slot = value, ...)`, values as Python writes them, text in double quotes."""
    assert call.arguments is not None
    slots = (f"{_written(k, key=True)} = {_written(v)}" for k, v in call.arguments.items())
    return f"{call.name}({', '.join(slots)})"


def read_call(text: str) -> Call | None:
    """The call that a text is; none if it does not even name a function.

    Values are those of Python and of JSON; a call with anything behind it has no arguments.
    """
    named = re.match(r"\s*([^\s()\"'=]+)\s*\(", text)
    if not named:
        return None
    try:
        return Call(named[1], _Reader(text[named.end() - 1 :]).arguments())
    except (ValueError, RecursionError):
        return Call(named[1], None)


def turns(messages: Sequence[Message], dialogue: Hashable) -> list[Turn]:
    """The turns of the assistant in a dialogue that are to be graded."""
    return [
        Turn(list(messages[:i]), message["content"], dialogue)
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and message["content"].startswith((PARSER, AGENT))
    ]


def grade_turns(expected: Sequence[Turn], written: Sequence[str]) -> dict[str, Score]:
    """Grades what a model says in turns, each told what was really said before.

    Args:
      expected: turns of any number of dialogues, whose turns are not independent of each other.
      written: what the model says in each, with or without the speaker's name.

    Returns:
      of EM_intent and EM_structure, if there are calls among the turns, and of R1 and RL, if there
      are replies, the means and their standard errors, between 0 and 1.

    Raises:
      UserError: rouge-score is needed and not installed, or there are no turns.
    """
    if not expected:
        raise UserError("there is no turn to grade: the dialogues have no message of an assistant.")
    values: dict[str, list[float]] = {}
    dialogues: dict[str, list[Hashable]] = {}
    for turn, text in zip(expected, written, strict=True):
        if turn.expected.startswith(PARSER):
            marks = grade_calls(turn.expected.removeprefix(PARSER), _said(text, PARSER))
        else:
            marks = rouge(turn.expected.removeprefix(AGENT), _said(text, AGENT))
        for name, mark in marks.items():
            values.setdefault(name, []).append(mark)
            dialogues.setdefault(name, []).append(turn.dialogue)
    return {name: mean_score(marks, dialogues[name]) for name, marks in values.items()}


def grade_calls(expected: str, written: str) -> dict[str, float]:
    """EM_intent and EM_structure of calls, one a line, in any order."""
    right, found = (
        [read_call(line) for line in text.split("\n") if line.strip()]
        for text in (expected, written)
    )
    intents, structures = (
        [sorted(key(call) for call in calls) for calls in (right, found)]
        for key in (lambda call: call.name if call else "", _structure)
    )
    # What cannot be read equals nothing, not even the same.
    readable = all(call is not None and call.arguments is not None for call in found)
    return {
        "EM_intent": float(intents[0] == intents[1]),
        "EM_structure": float(readable and structures[0] == structures[1]),
    }


def rouge(expected: str, written: str) -> dict[str, float]:
    """R1 and RL of a reply: F-measures of ROUGE-1 and ROUGE-L by rouge-score, without stemming.

    Raises:
      UserError: it is not installed.
    """
    try:
        scorer = importlib.import_module("rouge_score.rouge_scorer")
    except ImportError:
        raise UserError(
            "grading replies needs rouge-score: pip install 'mobilellm-jax[eval]'."
        ) from None
    scores = scorer.RougeScorer(["rouge1", "rougeL"]).score(expected, written)
    return {"R1": scores["rouge1"].fmeasure, "RL": scores["rougeL"].fmeasure}


def _said(text: str, speaker: str) -> str:
    """What a text says as a speaker: nothing if it is another's."""
    text = text.strip()
    other = AGENT if speaker == PARSER else PARSER
    return "" if text.startswith(other.strip()) else text.removeprefix(speaker.strip()).strip()


def _structure(call: Call | None) -> str:
    """What two equal calls have alike, whatever the order of slots: 5 is 5.0, but not "5" or True."""
    if call is None or call.arguments is None:
        return ""
    return call.name + json.dumps(_canonical(call.arguments), sort_keys=True)


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _canonical(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_canonical(v) for v in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _written(value: Any, key: bool = False) -> str:
    if key and re.fullmatch(r"[A-Za-z_$][\w$.-]*", value):
        return value
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_written(k)}: {_written(v)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_written, value))}]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


class _Reader:
    """Reads arguments and values; raises `ValueError` where there are none."""

    def __init__(self, text: str) -> None:
        if len(text) > _LONGEST:
            raise ValueError("too long")
        self.tokens: list[str] = []
        end = 0
        for match in _TOKEN.finditer(text):
            if match.start() != end:
                break
            self.tokens.append(match[1])
            end = match.end()
        if text[end:].strip():
            raise ValueError(f"what is {text[end : end + 20]!r}?")
        self.at = 0

    def arguments(self) -> dict[str, Any]:
        """The arguments of a call that is all of the text."""
        self._next("(")
        found = self._pairs(")", "=")
        if self.at != len(self.tokens):
            raise ValueError("something follows the call")
        return found

    def _pairs(self, end: str, between: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not self._is(end):
            key = self._next()
            key = self._text(key) if key[0] in "\"'" else key
            self._next(between)
            if key in found:
                raise ValueError(f"{key} twice")
            found[key] = self._value()
            if not self._is(end):
                self._next(",")
        self._next(end)
        return found

    def _value(self) -> Any:
        token = self._next()
        if token == "{":
            return self._pairs("}", ":")
        if token == "[":
            values = []
            while not self._is("]"):
                values.append(self._value())
                if not self._is("]"):
                    self._next(",")
            self._next("]")
            return values
        if token[0] in "\"'":
            return self._text(token)
        if token in _NAMES:
            return _NAMES[token]
        try:
            return int(token)
        except ValueError:
            return float(token)

    def _text(self, token: str) -> str:
        try:
            return str(json.loads(token, strict=False))
        except ValueError:
            try:
                return str(ast.literal_eval(token))  # in single quotes, or with Python's escapes
            except SyntaxError:
                raise ValueError(f"what is {token[:20]!r}?") from None

    def _is(self, token: str) -> bool:
        return self.at < len(self.tokens) and self.tokens[self.at] == token

    def _next(self, expected: str | None = None) -> str:
        if self.at == len(self.tokens) or expected not in (None, self.tokens[self.at]):
            raise ValueError(f"expected {expected}")
        self.at += 1
        return self.tokens[self.at - 1]
