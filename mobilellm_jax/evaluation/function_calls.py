"""Local files of function calling as the dialogues that `api_calls` grades.

Files are JSON lines or one JSON array, of records of two shapes:

    OpenAI's    {"messages": [{"role", "content", "tool_calls": [...]}, ...], "tools": [...]}
    xlam's      {"query": text, "tools": [...], "answers": [{"name", "arguments"}, ...]}

where tools, answers and arguments may also be texts of JSON, as both are often stored.
"""

import json
from collections.abc import Iterator, Mapping
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
    for number, record in enumerate(_records(epath.Path(path)), 1):
        where = f"{path}, record {number}"
        try:
            if "query" in record and "answers" in record:
                messages = [
                    {"role": "user", "content": record["query"]},
                    _called(_json(record["answers"])),
                ]
            elif "messages" in record:
                messages = [m for message in record["messages"] for m in _messages(message)]
            else:
                raise UserError(
                    f"{where} has neither messages nor query and answers but "
                    f"{', '.join(record) or 'nothing'}."
                )
            signatures = [_signature(tool) for tool in _json(record.get("tools") or [])]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{where} is not of the shape that it begins with ({type(error).__name__}: {error})."
            ) from None
        system = "\n".join([SYSTEM, *signatures])
        if messages and messages[0]["role"] == "system":
            system += f"\n{messages.pop(0)['content']}"
        messages.insert(0, {"role": "system", "content": system})
        yield {"id": str(record.get("id", number)), "messages": messages}


def dialogues(path: epath.PathLike) -> Iterator[dict[str, Any]]:
    """Dialogues of a file: of function calling, or as `api_dialogues` makes them, which come as they are.

    Raises:
      UserError: see `read_function_calls`.
    """
    first: Mapping[str, Any] = next(_records(epath.Path(path)), {})
    said = [str(m.get("content")) for m in first.get("messages") or [] if isinstance(m, Mapping)]
    if any(text.startswith((PARSER, AGENT)) for text in said):
        yield from map(dict, _records(epath.Path(path)))
    else:
        yield from read_function_calls(path)


def _records(path: epath.Path) -> Iterator[Mapping[str, Any]]:
    text = "".join(text_lines(path))
    try:
        if text.lstrip()[:1] == "[":
            records = json.loads(text)
        else:
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
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
        call = Call(given["name"], _json(given["arguments"]))
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
