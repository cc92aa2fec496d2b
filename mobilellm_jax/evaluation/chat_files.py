"""Files of instructions, questions and answers, as AlpacaEval and MT-Bench have them.

    AlpacaEval   {"instruction": ..., "output": ..., "generator": ...}           `input` may follow
    MT-Bench     {"question_id": ..., "category": ..., "turns": [...]}           questions
                 {"question_id": ..., "choices": [{"turns": [...]}]}             answers to them
    ours         {"question_id": ..., "messages": [{"role", "content"}, ...]}    answers to them

Each file is an array in JSON, or a record in every line.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from mobilellm_jax.data.inputs import text_lines
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.endpoint import Message

Record = Mapping[str, Any]

_ASKED = ("dataset", "datasplit", "id", "instruction", "input")  # of a record, not of an answer


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Answers by instruction, and the name of who gave them."""

    name: str
    texts: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Question:
    """What the user says in each turn of a conversation."""

    id: str | int
    category: str
    turns: tuple[str, ...]


def instruction_of(record: Record) -> str:
    """The instruction of a record of AlpacaEval's, with the input that it is about."""
    given = record.get("input") or ""
    return f"{record['instruction']}\n\n{given}" if given else record["instruction"]


def read_instructions(path: epath.PathLike) -> list[Record]:
    """Records of AlpacaEval's, answered or not, each instruction once.

    Raises:
      UserError: the file cannot be read, or has something else in it, or nothing.
    """

    def check(record: Record) -> None:
        _text(record["instruction"])
        _text(record.get("input") or "")

    records = _records(path, "instruction of AlpacaEval, {instruction}", check)
    _once(path, [instruction_of(record) for record in records])
    return records


def read_outputs(path: epath.PathLike) -> Outputs:
    """Answers in AlpacaEval's format; their name is their one generator, or else that of the file.

    Raises:
      UserError: see `read_instructions`; or a record has no answer.
    """

    def check(record: Record) -> None:
        for value in (record["instruction"], record.get("input") or "", record["output"]):
            _text(value)

    records = _records(path, "answer of AlpacaEval, {instruction, output}", check)
    _once(path, [instruction_of(record) for record in records])
    return Outputs(
        _name(path, records, "generator"),
        {instruction_of(record): record["output"] for record in records},
    )


def outputs_of(
    records: Sequence[Record], answers: Sequence[str], generator: str
) -> list[dict[str, Any]]:
    """What AlpacaEval reads answers from: what identifies each instruction, with these answers."""
    return [
        {key: record[key] for key in _ASKED if key in record}
        | {"output": answer, "generator": generator}
        for record, answer in zip(records, answers, strict=True)
    ]


def read_questions(path: epath.PathLike) -> list[Question]:
    """MT-Bench's questions; what has no category is of the category "".

    Raises:
      UserError: see `read_instructions`.
    """

    def check(record: Record) -> None:
        _identity(record["question_id"])
        _text(record.get("category") or "")
        if not _texts(record["turns"]):
            raise ValueError("it has no turns")

    records = _records(path, "question of MT-Bench, {question_id, category, turns}", check)
    _once(path, [record["question_id"] for record in records])
    return [
        Question(record["question_id"], record.get("category") or "", tuple(record["turns"]))
        for record in records
    ]


def read_conversations(
    path: epath.PathLike, questions: Sequence[Question]
) -> tuple[str, list[list[Message]]]:
    """Conversations that answer questions, in MT-Bench's format or ours.

    Returns:
      the name of who answers, and a conversation for each question.

    Raises:
      UserError: see `read_instructions`; or a question is not answered in all its turns.
    """

    def check(record: Record) -> None:
        _identity(record["question_id"])
        _texts(_answers(record))

    records = _records(path, "answered question, {question_id, choices} or {.., messages}", check)
    _once(path, [record["question_id"] for record in records])
    answers = {record["question_id"]: _answers(record) for record in records}
    conversations = []
    for question in questions:
        given = answers.get(question.id, [])
        if len(given) != len(question.turns):
            raise UserError(
                f"{path} has {len(given)} answers to the {len(question.turns)} turns of question "
                f"{question.id}."
            )
        messages: list[Message] = []
        for turn, answer in zip(question.turns, given, strict=True):
            messages.append({"role": "user", "content": turn})
            messages.append({"role": "assistant", "content": answer})
        conversations.append(messages)
    return _name(path, records, "generator", "model_id"), conversations


def conversations_of(
    questions: Sequence[Question], conversations: Sequence[Sequence[Message]], generator: str
) -> list[dict[str, Any]]:
    """What `read_conversations` reads."""
    return [
        {
            "question_id": question.id,
            "category": question.category,
            "generator": generator,
            "messages": [dict(message) for message in messages],
        }
        for question, messages in zip(questions, conversations, strict=True)
    ]


def _records(path: epath.PathLike, what: str, check: Callable[[Record], None]) -> list[Record]:
    """The records of a file, each of them such that `check` raises nothing."""
    text = "".join(text_lines(path))
    where = "it"
    try:
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            records = []
            for at, line in enumerate(text.split("\n"), start=1):
                where = f"line {at}"
                if line.strip():
                    records.append(json.loads(line))
        for number, record in enumerate(records, start=1):
            where = f"record {number}"
            check(record)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path}: {where} is no {what} ({type(error).__name__}: {error})."
        ) from None
    if not records:
        raise UserError(f"{path} is empty.")
    return records


def _once(path: epath.PathLike, keys: Sequence[Any]) -> None:
    seen = set()
    for key in keys:
        if key in seen:
            raise UserError(f"{path} has {str(key)[:80]!r} more than once.")
        seen.add(key)


def _name(path: epath.PathLike, records: Sequence[Record], *keys: str) -> str:
    """The one name that all records give under one of the keys, or else that of the file."""
    for key in keys:
        name, *others = (record.get(key) for record in records)
        if isinstance(name, str) and name and all(other == name for other in others):
            return name
    return epath.Path(path).stem


def _answers(record: Record) -> list[str]:
    if "messages" in record:
        messages = record["messages"]
        return [message["content"] for message in messages if message["role"] == "assistant"]
    return record["choices"][0]["turns"]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:60]!r} is no text")
    value.encode()  # half of a surrogate pair, which JSON can spell, is none either
    return value


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list):
        raise TypeError(f"{str(values)[:60]!r} is no list of texts")
    return [_text(value) for value in values]


def _identity(value: Any) -> None:
    if not isinstance(value, str | int):
        raise TypeError(f"{str(value)[:60]!r} is neither text nor number")
