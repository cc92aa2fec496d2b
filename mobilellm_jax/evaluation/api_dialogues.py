"""Dialogues of a user with an assistant that calls functions: the task of MobileLLM's section 3.4.

The paper's data (5,000 dialogues to train on, 2,500 to test, about 8 turns each) is unreleased;
this makes such data: `dialogue(seed, split, index)` is a pure function. Three speak: USER; PARSER,
who writes the call that the user wants, with None for what is not known; and AGENT, who answers.
PARSER and AGENT are both the assistant's messages, which begin with the speaker's name:

    system     what the two do, and the signatures of five functions
    user       Please set a timer called soup.
    assistant  PARSER: start_timer(minutes = None, label = "soup")
    assistant  AGENT: How long should it run?
    user       For 20 minutes.
    assistant  PARSER: start_timer(minutes = 20, label = "soup")
    assistant  AGENT: Done: the timer is running for 20 minutes for the soup.

A third of the test dialogues is like those of training (`seen`), a third says all that the user
says in ways that training never shows (`phrases`), and a third is about functions that it never
shows (`apis`).
"""

import random
import zlib
from collections.abc import Sequence
from typing import Any

from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation import api_table
from mobilellm_jax.evaluation.api_calls import AGENT, PARSER, Call, Message, write_call
from mobilellm_jax.evaluation.api_table import APIS, HELD_OUT, Api, Slot
from mobilellm_jax.evaluation.api_values import TYPES, Said

TRAIN, TEST = "train", "test"
PARTS = ("seen", "phrases", "apis")  # of the test dialogues
SYSTEM = (
    "You help a user by calling functions. As PARSER, write the call that the user wants, with None "
    "for what is not known. As AGENT, answer the user. The functions are:"
)
_LISTED = 5  # functions in the system message
_LONG, _THANKS = 0.25, 0.625  # chances of a third call and of thanks: 8 turns on average


def dialogue(seed: int, split: str, index: int) -> dict[str, Any]:
    """A dialogue: its `id`, the `part` it belongs to (`train`, or of `PARTS`) and its `messages`.

    Raises:
      UserError: `split` is neither `train` nor `test`.
    """
    if split not in (TRAIN, TEST):
        raise UserError(f"the split is {TRAIN} or {TEST}, not {split!r}.")
    rng = random.Random(f"{seed} {split} {index}")
    part = TRAIN if split == TRAIN else PARTS[index % len(PARTS)]
    while True:
        messages = _Speakers(rng, part).messages()
        if _split(messages) == split:
            return {"id": f"{split}-{index}", "part": part, "messages": messages}


def _split(messages: Sequence[Message]) -> str:
    """The side on which a dialogue may be: none is on both, however many there are of each."""
    users = "\n".join(message["content"] for message in messages if message["role"] == "user")
    return TRAIN if zlib.crc32(users.encode()) % 3 else TEST


class _Speakers:
    """Who make up one dialogue, all from the same stream of random numbers."""

    def __init__(self, rng: random.Random, part: str) -> None:
        self.rng, self.part = rng, part
        self.said: list[Message] = []

    def messages(self) -> list[Message]:
        """The whole dialogue."""
        rng = self.rng
        tasks = []
        calls = 3 if rng.random() < _LONG else 2
        while calls:
            task = rng.choice((self._plain, self._incomplete, self._corrected)[: 2 * calls - 1])
            tasks.append(task)
            calls -= 1 if task == self._plain else 2
        apis = rng.sample(HELD_OUT if self.part == "apis" else APIS, len(tasks))
        others = [api for api in APIS if api not in apis]
        listed = [*apis, *rng.sample(others, _LISTED - len(apis))]
        rng.shuffle(listed)
        system = "\n".join([SYSTEM, *(api.signature for api in listed)])
        self.said = [{"role": "system", "content": system}]
        for api, task in zip(apis, tasks, strict=True):
            task(api)
        if rng.random() < _THANKS:
            self._user(self._one(api_table.THANKS))
            self._agent(rng.choice(api_table.FAREWELLS))
        return self.said

    def _plain(self, api: Api) -> dict[str, Said]:
        """The user says all that is needed."""
        given = self._given(api, api.slots)
        self._user(self._request(api, given))
        self._called(api, given)
        return given

    def _incomplete(self, api: Api) -> None:
        """The user leaves out what is needed, and says it when asked."""
        missing = self.rng.choice([slot for slot in api.slots if slot.question])
        given = self._given(api, [slot for slot in api.slots if slot != missing])
        self._user(self._request(api, given))
        self._parser(api, given)
        self._agent(missing.question)
        given |= {missing.name: TYPES[missing.type][1](self.rng)}
        answer = self._phrase(missing, given).lstrip(" :,")
        self._user(f"{answer[:1].upper()}{answer[1:]}.")
        self._called(api, given)

    def _corrected(self, api: Api) -> None:
        """The user changes one thing afterwards."""
        given = self._plain(api)
        slot = self.rng.choice([slot for slot in api.slots if slot.name in given])
        before = given[slot.name]
        while given[slot.name] == before:
            given[slot.name] = TYPES[slot.type][1](self.rng)
        phrase = self._phrase(slot, given).lstrip(" :,")
        self._user(self._one(api_table.CORRECTIONS).format(phrase))
        self._called(api, given)

    def _given(self, api: Api, slots: Sequence[Slot]) -> dict[str, Said]:
        """Values of the slots that the user speaks of: those that are needed, and half of the others."""
        spoken = [slot for slot in slots if slot.question or self.rng.random() < 0.5]
        return {slot.name: TYPES[slot.type][1](self.rng) for slot in spoken}

    def _request(self, api: Api, given: dict[str, Said]) -> str:
        slots = [slot for slot in api.slots if slot.name in given]
        self.rng.shuffle(slots)
        phrases = "".join(self._phrase(slot, given) for slot in slots)
        return f"{self._one(api_table.OPENINGS)}{self._one(api.requests)}{phrases}."

    def _phrase(self, slot: Slot, given: dict[str, Said]) -> str:
        return _attached(self._one(slot.phrases).format(given[slot.name][1]))

    def _one(self, phrases: Sequence[str]) -> str:
        """A way of the user to say something: the last one is not for training."""
        if self.part == "phrases":
            return phrases[-1]
        return self.rng.choice(phrases if self.part == "apis" else phrases[:-1])

    def _called(self, api: Api, given: dict[str, Said]) -> None:
        """The call, and what the agent says it has done."""
        self._parser(api, given)
        phrases = (
            _attached(slot.phrases[0].format(given[slot.name][1]))
            for slot in api.slots
            if slot.name in given
        )
        done = api.done + "".join(phrases)
        self._agent(self.rng.choice(api_table.CONFIRMATIONS).format(done))

    def _user(self, text: str) -> None:
        self.said.append({"role": "user", "content": text})

    def _parser(self, api: Api, given: dict[str, Said]) -> None:
        values = {slot.name: given.get(slot.name, (None, ""))[0] for slot in api.slots}
        self.said.append(
            {"role": "assistant", "content": PARSER + write_call(Call(api.name, values))}
        )

    def _agent(self, text: str) -> None:
        self.said.append({"role": "assistant", "content": AGENT + text})


def _attached(phrase: str) -> str:
    return phrase if phrase[0] in ":," else f" {phrase}"
