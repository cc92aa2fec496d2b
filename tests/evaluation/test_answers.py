"""What a checkpoint or a server answers: a function of the conversation, wherever it stands."""

import dataclasses
import functools
import json

import chats
import jax
import numpy as np
import pytest
import tiny
from chat_servers import served

from mobilellm_jax.data.chat import ConversationEncoder
from mobilellm_jax.decoding import text as texts
from mobilellm_jax.decoding.sampling import GREEDY, Sampling
from mobilellm_jax.decoding.text import Text
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation import answers as module
from mobilellm_jax.evaluation.answers import of_checkpoint, of_server
from mobilellm_jax.evaluation.endpoint import Endpoint
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import Stack
from mobilellm_jax.training.checkpoint import LoadedModel

MODEL = dataclasses.replace(tiny.MODEL, stacks=(Stack(1, 2, 1, 32),), max_length=200, init_std=0.3)
HOT = Sampling(temperature=1.2)
NEW = 6


@functools.cache
def loaded(seed=0):
    tokenizer = dataclasses.replace(tiny.tokenizer(), chat_template=chats.PLAIN)
    params = jax.jit(functools.partial(transformer.init, MODEL))(jax.random.key(seed))
    return LoadedModel(params, MODEL, tokenizer, 0, {})


@functools.cache
def encoder():
    return ConversationEncoder(loaded().tokenizer)


def asked(*said):
    """A conversation in which user and assistant take turns."""
    return [
        {"role": ("user", "assistant")[turn % 2], "content": content}
        for turn, content in enumerate(said)
    ]


CONVERSATIONS = [
    asked("the model reads rows of small deep text"),
    asked("1", "2", "1 + 1 = 2 and 2"),
    asked("its blocks learn to share thin rows"),
    asked("1 + 1 = 2 and 2"),
]


def test_an_answer_depends_on_conversation_and_seed_alone():
    answer = of_checkpoint(loaded(), HOT, NEW, rows=2)
    whole = answer(CONVERSATIONS)
    assert len(set(whole)) == len(whole)  # also where only what was said before differs
    answer = of_checkpoint(loaded(), HOT, NEW, rows=2)
    assert answer(CONVERSATIONS[1:][::-1]) == whole[1:][::-1]
    assert of_checkpoint(loaded(), HOT, NEW, rows=1)(CONVERSATIONS[3:]) == whole[3:]
    other = of_checkpoint(loaded(), HOT, NEW, seed=1, rows=2)(CONVERSATIONS)
    assert all(a != b for a, b in zip(other, whole, strict=True))


def test_the_oldest_turns_go_where_there_is_no_room(monkeypatch):
    system = [{"role": "system", "content": "be brief"}]
    long = asked("the model " * 5, "reads " * 5, "small", "deep", "thin rows")
    rest = long[2:]
    for beginning in ([], system):
        room = len(encoder().prompt([*beginning, *rest]))
        ids, kept = encoder().fitting([*beginning, *long], room)
        assert (len(ids), list(kept)) == (room, [*beginning, *rest])
        assert encoder().fitting(kept, room - 1)[1] == [*beginning, *rest[2:]]
        # The last message stays, however long.
        assert encoder().fitting([*beginning, *long], 3)[1] == [*beginning, long[-1]]
    asked_for = []

    def kept_in_mind(_, __, prompts, *___, **____):
        asked_for.extend(prompts)
        return [Text(loaded().tokenizer, prompt) for prompt in prompts]

    monkeypatch.setattr(module, "continued", kept_in_mind)
    of_checkpoint(loaded(), GREEDY, MODEL.max_length - len(encoder().prompt(rest)))([long])
    assert asked_for == [encoder().prompt(rest)]


def test_a_message_that_does_not_fit_is_told_before_anything_is_drawn(monkeypatch):
    monkeypatch.setattr(module, "continued", lambda *_, **__: pytest.fail("drawn"))
    answer = of_checkpoint(loaded(), GREEDY, 20)
    with pytest.raises(UserError, match=r"'long long .* context of 200 has 180 .*--max_new_tokens"):
        answer([asked("short"), asked("a", "b", "long " * 90)])
    with pytest.raises(UserError, match="leave no room"):
        of_checkpoint(loaded(), GREEDY, 200)
    plain = dataclasses.replace(loaded(), tokenizer=tiny.tokenizer())
    with pytest.raises(UserError, match="no chat template"):
        of_checkpoint(plain, GREEDY, 20)


def test_a_turn_ends_with_any_token_that_has_no_text(monkeypatch):
    special, (first, *_) = min(encoder().special), loaded().tokenizer.encode("Q")

    def drawn(*_):
        yield from (np.array([first]), np.array([special]), np.array([first]))

    monkeypatch.setattr(texts, "stream", drawn)
    ends = {loaded().tokenizer.bos_id, loaded().tokenizer.eos_id}
    assert special not in ends  # these end every text
    assert of_checkpoint(loaded(), GREEDY, 3)([asked("a")]) == [loaded().tokenizer.decode([first])]


def test_a_killed_run_goes_on_from_its_cache(monkeypatch, tmp_path):
    drawn, killed = [], [True]
    whole = of_checkpoint(loaded(), HOT, NEW, rows=2)(CONVERSATIONS)
    really = module.continued

    def counted(*given, **options):
        if len(drawn) == 1 and killed:
            raise KeyboardInterrupt
        drawn.append(len(given[2]))
        return really(*given, **options)

    monkeypatch.setattr(module, "continued", counted)
    cache = tmp_path / "new" / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        of_checkpoint(loaded(), HOT, NEW, rows=2, cache=cache)(CONVERSATIONS)
    assert drawn == [2]
    drawn.clear()
    killed.clear()
    again = of_checkpoint(loaded(), HOT, NEW, rows=2, cache=cache)
    assert again(CONVERSATIONS) == whole and drawn == [2]
    assert again(CONVERSATIONS) == whole and drawn == [2]
    # Another network, seed or setting finds nothing of its own there.
    for changes in ({"loaded": loaded(1)}, {"seed": 1}, {"max_new_tokens": NEW - 1}):
        drawn.clear()
        given = {"loaded": loaded(), "max_new_tokens": NEW, **changes}
        of_checkpoint(sampling=HOT, **given, rows=2, cache=cache)(CONVERSATIONS[2:])
        assert drawn == [2]


def test_a_server_is_asked_what_was_said(tmp_path):
    def last(messages):
        return f"to {len(messages)}: {messages[-1]['content']}"

    cache = tmp_path / "cache"
    with served(last) as server:
        endpoint = Endpoint(server.url, "m")
        answer = of_server(endpoint, cache, temperature=0.5, seed=3)
        told = answer(CONVERSATIONS)
        assert told == [last(messages) for messages in CONVERSATIONS] == answer(CONVERSATIONS)
    bodies = [body for _, _, body in server.requests]
    assert len(bodies) == len(CONVERSATIONS)
    assert all((body["temperature"], body["seed"]) == (0.5, 3) for body in bodies)
    assert {json.dumps(b["messages"]) for b in bodies} == {json.dumps(c) for c in CONVERSATIONS}
