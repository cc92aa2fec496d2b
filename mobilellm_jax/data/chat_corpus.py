"""Conversations in files: JSON lines and Parquet with a list of messages in each record."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mobilellm_jax.data.chat import conversation
from mobilellm_jax.data.corpora import Document, FileCorpus, Reading
from mobilellm_jax.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
TOO_LONG = ("truncate", "drop")
NO_ASSISTANT = ("drop", "keep")
_SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}  # its names of roles


@dataclasses.dataclass(frozen=True)
class ChatReading(Reading):
    """Makes documents whose text is a conversation, in JSON; see `chat.conversation`."""

    system_prompt: str | None = None
    tools_key: str = "tools"

    @property
    def beside(self) -> Sequence[str]:
        """See `Reading`."""
        return (self.tools_key,) if self.tools_key else ()

    def document(
        self, values: Sequence[Any], where: Callable[[], str], **origin: Any
    ) -> Document | None:
        """The document of a list of messages, or of the texts of one or two turns; see `Reading`.

        Messages are {"role", "content"}, or ShareGPT's {"from", "value"}; other fields stay, for
        templates that read them. A conversation without a system message gets the `system_prompt`.
        The functions that it may call stand beside it, in `tools_key`.

        Raises:
          UserError: it is no list of messages, or a turn is no text; or they are no functions.
        """
        tools = []
        if self.beside:
            *values, beside = values
            tools = self._tools(beside, where)
        found = values[0] if len(values) == 1 else self._turns(values, where)
        if not isinstance(found, list):
            raise UserError(
                f"{where()}: {self.text_key!r} is not a list of messages but "
                f"{type(found).__name__}; see --messages_key."
            )
        messages = [self._message(message, i, where) for i, message in enumerate(found, 1)]
        if self.system_prompt and (not messages or messages[0]["role"] not in ROLES[:2]):
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        talk = {"messages": messages, "tools": tools} if tools else messages
        # Dates, which Parquet has and JSON has not, become text.
        text = json.dumps(talk, ensure_ascii=False, default=str)
        return super().document([text], where, **origin)

    def _tools(self, found: Any, where: Callable[[], str]) -> list[dict[str, Any]]:
        """Functions as OpenAI's API describes them: a list, or text with one, as tables often have it."""
        if isinstance(found, str) and found.strip():
            try:
                found = json.loads(found)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where()}: {self.tools_key!r} is not JSON ({error}).") from None
        tools = _set(found or [])
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise UserError(
                f"{where()}: {self.tools_key!r} is not a list of functions: name the field that has "
                "them by --tools_key, or none, --tools_key= ."
            )
        return tools

    def _turns(self, values: Sequence[Any], where: Callable[[], str]) -> list[dict[str, Any]]:
        """Messages of a question and its answer, with a system prompt before them if there are three."""
        roles = ("system", "user", "assistant")[-len(values) :]
        if len(values) > len(roles):
            raise UserError(
                f"--messages_key={self.text_key} names {len(values)} fields: name the one with the "
                "messages, question+answer, or system+question+answer."
            )
        said = [{"role": r, "content": v} for r, v in zip(roles, values, strict=True)]
        return [m for m in said if m["role"] != "system" or m["content"]]

    def _message(self, message: Any, number: int, where: Callable[[], str]) -> dict[str, Any]:
        given = message if isinstance(message, dict) else {}
        if "role" in given or "content" in given:
            role, content, names = given.get("role"), given.get("content"), ("role", "content")
        else:
            role, content, names = given.get("from"), given.get("value"), ("from", "value")
            role = _SHAREGPT.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise UserError(
                f"{where()}: the role of message {number} is {role!r}, not one of "
                f"{', '.join(ROLES)} (or ShareGPT's {', '.join(_SHAREGPT)})."
            )
        if content is None and given.get("tool_calls"):
            content = ""  # a turn that is calls alone
        if not isinstance(content, str):
            raise UserError(
                f"{where()}: the content of message {number} is not a text but "
                f"{type(content).__name__}."
            )
        if (weight := given.get("weight")) not in (None, 0, 1):
            raise UserError(
                f"{where()}: the weight of message {number} is {weight!r}: 1 is trained on, 0 is not."
            )
        others = {key: value for key, value in given.items() if key not in names}
        return {"role": role, "content": content, **_set(others)}


def _set(value: Any) -> Any:
    """What is set of it: a column of Parquet has, at any depth, all fields that one of its records has."""
    if isinstance(value, dict):
        return {key: _set(inner) for key, inner in value.items() if inner is not None}
    return [_set(inner) for inner in value] if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class ChatCorpus(FileCorpus):
    """Files of conversations that match a pattern.

    Attributes:
      text_key: field or column with the list of messages; or `question+answer`, the fields with the
        text of a user's and an assistant's turn, or `system+question+answer`.
      tools_key: field or column with the functions that a conversation may call, as the template writes
        them; it may be missing. None is read if empty.
      system_prompt: what conversations begin with that have no system message.
      too_long: what becomes of one longer than a row: `truncate` cuts its end off, `drop` leaves it
        out.
      no_assistant: what becomes of one in which the assistant says nothing (any more): `drop`, or
        `keep` for a loss on all tokens.
    """

    text_key: str = "messages"
    system_prompt: str | None = None
    too_long: str = "truncate"
    no_assistant: str = "drop"
    tools_key: str = "tools"

    def __post_init__(self) -> None:
        """Raises `UserError` for a `too_long` or `no_assistant` that is none."""
        for key, known in (("too_long", TOO_LONG), ("no_assistant", NO_ASSISTANT)):
            if (value := getattr(self, key)) not in known:
                raise UserError(f"{key} is {' or '.join(known)}, not {value!r}.")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """See `FileCorpus`."""
        own = {key: getattr(self, key) for key in ("system_prompt", "too_long", "tools_key")}
        if self.no_assistant != "drop":  # sources prepared before there was a choice stay complete
            own["no_assistant"] = self.no_assistant
        return {**super().fingerprint, **own}

    def sample(self, budget: int) -> Iterator[str]:
        """What is said in the conversations; see `FileCorpus`."""
        for text in super().sample(budget):
            yield "\n".join(message["content"] for message in conversation(text)[0])

    @property
    def _reading(self) -> ChatReading:
        own = self.system_prompt, self.tools_key
        return ChatReading(self.text_key, self.id_key, self.heldout, self.share, *own)
