"""Local files of function calling as the dialogues that `api_calls` grades.

Files are JSON lines or one JSON array, of records of two shapes:

    OpenAI's    {"messages": [{"role", "content", "tool_calls": [...]}, ...], "tools": [...]}
    xlam's      {"query": text, "tools": [...], "answers": [{"name", "arguments"}, ...]}

where tools, answers and arguments may also be texts of JSON, as both are often stored.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from mobilellm_jax.data.inputs import text_lines
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.api_calls import AGENT, PARSER, Call, Message, read_call, write_call
from mobilellm_jax.evaluation.api_dialogues import SYSTEM


def read_function_calls(path: epath.PathLike) -> Iterator[dict[str, Any]]:
    """Dialogues of a file, each with its `id` (or number) and `messages`.

    The system message names the functions with their parameters; calls are what the PARSER says,
    one a line; what the assistant says otherwise is the AGENT's.

    Raises:
      UserError: there is no such file, or a record has neither shape; says which.
    """
    return _dialogues(epath.Path(path), _messages_of)


def dialogues(path: epath.PathLike) -> Iterator[dict[str, Any]]:
    """Dialogues of a file: of function calling, or as `api_dialogues` makes them, which come as they are.

    Raises:
      UserError: see `read_function_calls`.
    """
    first: Mapping[str, Any] = next(_records(epath.Path(path)), {})
    messages = first.get("messages")
    listed = messages if isinstance(messages, list) else []
    said = [m.get("content") for m in listed if isinstance(m, Mapping)]
    made = any(str(text).startswith((PARSER, AGENT)) for text in said)
    read = (lambda record: record["messages"]) if made else _messages_of
    return _dialogues(epath.Path(path), read)


def _dialogues(
    path: epath.Path, read: Callable[[Mapping[str, Any]], list[Message]]
) -> Iterator[dict[str, Any]]:
    for number, record in enumerate(_records(path), 1):
        where = f"{path}, record {number}"
        if "messages" not in record and not {"query", "answers"} <= set(record):
            raise UserError(
                f"{where} has neither messages nor query and answers but "
                f"{', '.join(record) or 'nothing'}."
            )
        try:
            messages = read(record)
            for message in messages:
                " ".join((message["role"], message["content"])).encode()  # both are text
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{where} is not of the shape that it begins with ({type(error).__name__}: {error})."
            ) from None
        yield {"id": str(record.get("id", number)), "messages": messages}


def _messages_of(record: Mapping[str, Any]) -> list[Message]:
    """A record's dialogue behind a system message that names the functions."""
    if "query" in record and "answers" in record:
        asked = {"role": "user", "content": record["query"]}
        messages = [asked, _called(_json(record["answers"]))]
    else:
        messages = [m for message in record["messages"] for m in _messages(message)]
    signatures = [_signature(tool) for tool in _json(record.get("tools") or [])]
    system = "\n".join([SYSTEM, *signatures])
    if messages and messages[0]["role"] == "system":
        system += f"\n{messages.pop(0)['content']}"
    return [{"role": "system", "content": system}, *messages]


def _records(path: epath.Path) -> Iterator[Mapping[str, Any]]:
    text = "".join(text_lines(path))
    try:
        if text.lstrip()[:1] == "[":
            records = json.loads(text)
        else:
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is neither JSON lines nor an array of JSON: {error}.") from None
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise UserError(f"{path}, record {number} is no object but {type(record).__name__}.")
        yield record


def _json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _messages(message: Mapping[str, Any]) -> Iterator[Message]:
    """What a message says, and what it calls."""
    role, content = message["role"], message.get("content")
    if role != "assistant":
        yield {"role": role, "content": content or ""}
        return
    calls = [call["function"] for call in message.get("tool_calls") or []]
    if calls:
        yield _called(calls)
    if content:
        yield {"role": "assistant", "content": AGENT + content}


def _called(calls: list[Mapping[str, Any]]) -> Message:
    lines = []
    for given in calls:
        call = Call(given["name"], dict(_json(given["arguments"])))
        lines.append(write_call(call))
        if read_call(lines[-1]) != call:
            raise ValueError(f"{given['name']!r} and its arguments cannot be written as a call")
    return {"role": "assistant", "content": PARSER + "\n".join(lines)}


def _signature(tool: Mapping[str, Any]) -> str:
    """A function's name, parameters and description in one line."""
    function = tool.get("function", tool)
    parameters = function.get("parameters") or {}
    properties = parameters.get("properties", parameters)
    required = parameters.get("required")
    slots = []
    for name, about in properties.items():
        # xlam has no list of what is required: what has a default is not.
        needed = name in required if required is not None else "default" not in about
        kind = about.get("type", "any")
        default = "" if needed else f" = {json.dumps(about.get('default'))}"
        slots.append(f"{name}: {kind if isinstance(kind, str) else '|'.join(kind)}{default}")
    description = " ".join(str(function.get("description") or "").split())
    return f"{function['name']}({', '.join(slots)})" + (f"  # {description}" if description else "")
