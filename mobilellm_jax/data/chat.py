"""Conversations to tokens: the chat template, and which tokens of its text are trained on.

A tokenizer's own template, Jinja as Hugging Face runs it, makes one text of a conversation. Trained
on are the turns of the assistant: what the template puts between `{% generation %}` and
`{% endgeneration %}`, or, where it has no such tags, what a turn adds to the text of the messages
before it with the assistant's header: the content and the token that ends the turn.

The text is encoded whole, so its ids are those that a deployed model gets to see; a token is trained
on if any of its characters is.
"""

import dataclasses
import datetime
import functools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np

from mobilellm_jax.data.encoding import Ids
from mobilellm_jax.data.inputs import text_lines
from mobilellm_jax.data.packing import INSIDE, UNTRAINED, token_ids
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError, in_a_line

Message = Mapping[str, Any]  # "role", "content", and whatever else a template reads
Tool = Mapping[str, Any]  # a function that the assistant may call, as OpenAI's API describes it
Span = tuple[int, int]  # characters [begin, end) of a text

TRUNCATED, TOO_LONG, UNTRAINABLE = "truncated", "too long", "nothing of an assistant in it"
KEPT = f"kept with {UNTRAINABLE}"
SHIPPED = Path(__file__).parent / "templates"
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of what is thought before a turn

# What stands for the tags, and for where a turn is still open, while a text is rendered: halves of
# surrogate pairs, which no text has.
_BEGIN, _END, _OPEN = "\ud8fe", "\ud8ff", "\ud8fd"
_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def conversation(text: str) -> tuple[list[Message], list[Tool]]:
    """The messages of a document, and what functions they may call: JSON of a list, or of both by name."""
    found = json.loads(text)
    return (found, []) if isinstance(found, list) else (found["messages"], found["tools"])


def shipped_templates() -> list[str]:
    """Names of the chat templates in `templates/`."""
    return sorted(file.stem for file in SHIPPED.glob("*.jinja"))


def read_template(name: str) -> str:
    """A chat template by name, of those in `templates/`, or by path.

    Raises:
      UserError: there is none.
    """
    shipped = shipped_templates()
    file = SHIPPED / f"{name}.jinja" if name in shipped else Path(os.path.expanduser(name))
    try:
        return "".join(text_lines(file))
    except UserError:
        raise UserError(
            f"--chat_template={name} is neither a file of text nor one of {', '.join(shipped)}."
        ) from None


def markers(template: str) -> list[str]:
    """The special tokens that a template spells, in the form of all that are shipped: `<|im_end|>`."""
    return list(dict.fromkeys(re.findall(r"<\|\w+\|>", template)))


def generation_ends(tokenizer: Tokenizer) -> list[int]:
    """Ids that end what a network says: EOS, and that with which its chat template ends a turn, if any."""
    ends = [tokenizer.eos_id]
    if tokenizer.chat_template is not None:
        ends += ConversationEncoder(tokenizer).turn_ends
    return list(dict.fromkeys(ends))


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, named_tokens: Mapping[str, str]) -> None:
        """Compiles.

        Args:
          source: Jinja.
          named_tokens: what templates know as `bos_token`, `eos_token` and so on.

        Raises:
          UserError: it is not Jinja.
        """
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"the chat template is not valid Jinja: line {error.lineno}: {error.message}."
            ) from None
        except (SyntaxError, RecursionError) as error:  # of the Python that Jinja makes of it
            raise UserError(f"the chat template is not valid Jinja: {in_a_line(error)}.") from None
        self.tagged = _TAG.search(source) is not None  # whether it has generation tags
        # What a conversation may have that not every template writes, by name.
        self._unwritten = {
            kind: not any(name in source for name in names)
            for kind, names in (
                ("tools", ("tools",)),
                ("tool_calls", ("tool_calls",)),
                ("reasoning_content", REASONING),
            )
        }
        self._named_tokens = dict(named_tokens)

    def trained(
        self, messages: Sequence[Message], tools: Sequence[Tool] = ()
    ) -> tuple[str, list[Span]]:
        """The text of a conversation, and which of it the assistant says, in order.

        Turns of `weight` 0, as OpenAI's API has it, are left out of what it says.

        Raises:
          UserError: the template refuses the conversation, or says nothing of its turns: it has no
            generation tags, and renders a beginning of the conversation to something else than a
            beginning of the text; or its tags do not tell a turn of weight 0.
        """
        text, spans = self._rendered(messages, tools)
        weights = [m.get("weight", 1) for m in messages if m["role"] == "assistant"]
        if self.tagged:
            if 0 not in weights:
                return text, spans
            if len(spans) != len(weights):
                raise UserError(
                    f"a conversation{_which(messages)} has a turn of weight 0, but the chat template has "
                    f"{len(spans)} parts between generation tags of {len(weights)} turns of the "
                    "assistant, so nothing says which part it is: put one pair of tags around each turn."
                )
            return text, [span for span, weight in zip(spans, weights, strict=True) if weight]
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or message.get("weight") == 0:
                continue
            before, _ = self._rendered(messages[:i], tools, prompt=True)
            after = self._rendered(messages[: i + 1], tools)[0] if i + 1 < len(messages) else text
            if not (after.startswith(before) and text.startswith(after)):
                raise UserError(
                    "the chat template does not render the beginning of a conversation to the "
                    "beginning of its text, so nothing says which tokens the assistant's turn "
                    f"{i + 1} is{_which(messages)}: put {{% generation %}} and "
                    "{% endgeneration %} around what the template makes of these turns."
                )
            spans.append((len(before), len(after)))
        return text, spans

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text of a conversation with the assistant's header at its end.

        Raises:
          UserError: the template refuses the conversation.
        """
        return self._rendered(messages, prompt=True)[0]

    def opened(self, messages: Sequence[Message]) -> str:
        """The text of a conversation up to what its last message says, for the network to go on with.

        White space at its end goes where the template trims messages, as in Hugging Face.

        Raises:
          UserError: the template refuses the conversation, or leaves its last message out.
        """
        last = {**messages[-1], "content": f"{messages[-1]['content']}{_OPEN} "}
        text, _ = self._rendered([*messages[:-1], last])
        before, sign, after = text.rpartition(_OPEN)
        if not sign:
            raise UserError(
                "the chat template writes nothing of the last message of a conversation"
                f"{_which(messages)}, so the network cannot go on with it."
            )
        return before if after.startswith(" ") else before.rstrip()

    def _rendered(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), prompt: bool = False
    ) -> tuple[str, list[Span]]:
        messages = [_by_all_names(message) for message in messages]
        for kind, unwritten in self._unwritten.items():
            there = tools if kind == "tools" else [m for m in messages if m.get(kind)]
            if unwritten and there:
                raise UserError(
                    f"a conversation{_which(messages)} has `{kind}`, of which the chat template writes "
                    "nothing: use a template that does, or put them into the content of messages."
                )
        try:
            raw = self._template.render(
                messages=messages,
                tools=[*tools] or None,
                documents=None,
                add_generation_prompt=prompt,
                **self._named_tokens,
            )
        except Exception as error:  # whatever the program that a template is may raise
            reason = in_a_line(error).rstrip(".") or type(error).__name__
            raise UserError(
                f"the chat template refuses a conversation{_which(messages)}: {reason}."
            ) from None
        text, spans, begin = "", [], 0
        for part in re.split(f"([{_BEGIN}{_END}])", raw):
            if part == _BEGIN:
                begin = len(text)
            elif part == _END:
                spans.append((begin, len(text)))
            else:
                text += part
        return text, spans


@dataclasses.dataclass(frozen=True)
class EncodeChats:
    """Conversations, in JSON, to marked ids, BOS first; see `conversation` and `packing`. Picklable."""

    row_length: int
    drop_long: bool = False  # rather than cut at their end
    keep_untrainable: bool = False  # what the assistant says nothing in, for a loss on all tokens

    def __call__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> list[Ids]:
        """See `encoding.Encode`.

        Raises:
          UserError: see `ChatTemplate.trained`.
        """
        talks = [conversation(text) for text in texts]
        return [
            self._encoded(_encoder(tokenizer)(*talk)) if talk[0] else Ids(None, UNTRAINABLE)
            for talk in talks
        ]

    def _encoded(self, ids: np.ndarray) -> Ids:
        note = ""
        if len(ids) > self.row_length + 1:
            if self.drop_long:
                return Ids(None, TOO_LONG)
            ids, note = ids[: self.row_length + 1], TRUNCATED
        if (ids & UNTRAINED).all():
            return Ids(ids, KEPT) if self.keep_untrainable else Ids(None, UNTRAINABLE)
        return Ids(ids, note)


class ConversationEncoder:
    """Conversations to ids, with one tokenizer and its chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Compiles the template.

        Raises:
          UserError: there is none, or it is not Jinja.
        """
        if tokenizer.chat_template is None:
            raise UserError(
                "the tokenizer has no chat template: name one with --chat_template when conversations are "
                f"prepared, {', '.join(shipped_templates())} or a file."
            )
        self.template = ChatTemplate(tokenizer.chat_template, tokenizer.named_tokens)
        self._tokenizer = tokenizer
        self._special_V = tokenizer.piece_bytes() == 0
        self.special = frozenset(np.flatnonzero(self._special_V).tolist())  # ids without a text

    @functools.cached_property
    def turn_ends(self) -> list[int]:
        """The special token that ends a turn of the assistant: one id, or none."""
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            marked_N = self(turns)
        except UserError:  # a template for conversations of another kind
            return []
        said_N = token_ids(marked_N[(marked_N & UNTRAINED) == 0])
        return [int(i) for i in said_N[-1:] if self._special_V[i]]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation up to where the assistant begins its next turn, one BOS before them.

        Raises:
          UserError: the template refuses the conversation.
        """
        ids_N, _, _ = self._tokenizer.encode_special(self.template.prompt(messages))
        bos, ids = self._tokenizer.bos_id, ids_N.tolist()
        return ids if ids[:1] == [bos] else [bos, *ids]

    def fitting(
        self, messages: Sequence[Message], room: int
    ) -> tuple[list[int], Sequence[Message]]:
        """`prompt` of what fits of a conversation: without its oldest turns where there is no room.

        What the system says stays, and so does the last message, however long it is.

        Args:
          messages: the conversation so far; the user's are every second one.
          room: most ids.

        Returns:
          the ids, and the messages that they are of.

        Raises:
          UserError: the template refuses the conversation.
        """
        begin = 1 if messages and messages[0]["role"] == "system" else 0
        while len(ids := self.prompt(messages)) > room and len(messages) > begin + 2:
            messages = [*messages[:begin], *messages[begin + 2 :]]
        return ids, messages

    def __call__(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> np.ndarray:
        """Ids with marks, int32 [tokens]: one BOS, whether or not the template writes it, and the text.

        Raises:
          UserError: see `ChatTemplate.trained`.
        """
        text, spans = self.template.trained(messages, tools)
        ids_N, begin_N, end_N = self._tokenizer.encode_special(text)
        end_N = np.maximum(
            end_N, begin_N + 1
        )  # some of the bytes of a character, or cut white space
        trained_N = np.zeros(len(ids_N), bool)
        for begin, end in spans:
            if not self.template.tagged:
                end = self._end_of_turn(text, begin, end, ids_N, begin_N, end_N)
            trained_N |= (begin_N < end) & (end_N > begin)
        bos = self._tokenizer.bos_id
        marks_N = np.where(trained_N, 0, UNTRAINED) | np.where(ids_N == bos, INSIDE, 0)
        begins = len(ids_N) > 0 and ids_N[0] == bos
        rest = (ids_N | marks_N)[1 if begins else 0 :]
        return np.append(bos | UNTRAINED, rest).astype(np.int32)

    def _end_of_turn(
        self,
        text: str,
        begin: int,
        end: int,
        ids_N: np.ndarray,
        begin_N: np.ndarray,
        end_N: np.ndarray,
    ) -> int:
        """Leaves out what templates put between turns, white space behind the token that ends one."""
        inside_N = (begin_N >= begin) & (end_N <= end) & self._special_V[ids_N]
        if not inside_N.any():
            return end
        last = int(end_N[inside_N][-1])
        return end if text[last:end].strip() else last


_encoder = functools.lru_cache(1)(ConversationEncoder)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: puts a sign at both ends of what is inside."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_between"), [], [], body).set_lineno(line)

    def _between(self, caller: Callable[[], str]) -> str:
        return f"{_BEGIN}{caller()}{_END}"


@functools.cache
def _environment() -> jinja2.Environment:
    """What chat templates are written for: Hugging Face's settings and functions."""

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        # Not Jinja's own, which escapes for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _by_all_names(message: Message) -> Message:
    """A message whose reasoning, however it is called, is there by the names that templates read."""
    said = [message[name] for name in REASONING if message.get(name) is not None]
    return {"thinking": said[0], **message, "reasoning_content": said[0]} if said else message


def _which(messages: Sequence[Message]) -> str:
    """By what a conversation can be found again."""
    first = next((m["content"] for m in messages if m["role"] == "user"), "")
    return f" that asks {first[:60]!r}" if first else ""
