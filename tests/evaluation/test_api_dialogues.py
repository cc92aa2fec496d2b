"""The API-calling task: a function of its seed, as large as the paper's, its parts really held out."""

import dataclasses
import json
import random
import re

import pytest
import tokenizer_files
from runs import program

from mobilellm_jax.data.chat import ConversationEncoder, read_template
from mobilellm_jax.data.chat_corpus import ChatCorpus
from mobilellm_jax.data.corpora import documents
from mobilellm_jax.data.packing import UNTRAINED, token_ids
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.api_calls import AGENT, PARSER, read_call, turns
from mobilellm_jax.evaluation.api_dialogues import PARTS, TEST, TRAIN, dialogue
from mobilellm_jax.evaluation.api_table import (
    APIS,
    CORRECTIONS,
    HELD_OUT,
    OPENINGS,
    THANKS,
)
from mobilellm_jax.evaluation.api_values import TYPES

COUNT = 600


def made(split, count=COUNT, seed=0):
    return [dialogue(seed, split, index) for index in range(count)]


def said(dialogues, role="user"):
    return [m["content"] for d in dialogues for m in d["messages"] if m["role"] == role]


def calls(dialogues):
    texts = [text for text in said(dialogues, "assistant") if text.startswith(PARSER)]
    return [read_call(text.removeprefix(PARSER)) for text in texts]


def test_a_dialogue_is_a_function_of_seed_split_and_index():
    assert dialogue(0, TRAIN, 5) == dialogue(0, TRAIN, 5)
    others = [dialogue(1, TRAIN, 5), dialogue(0, TEST, 5), dialogue(0, TRAIN, 6)]
    assert all(other["messages"] != dialogue(0, TRAIN, 5)["messages"] for other in others)
    # Written down, so that what is published of a seed stays what it was.
    assert [m["content"] for m in dialogue(0, TRAIN, 0)["messages"]][1:4] == [
        "Hi! Put on the shopping list these: cheese, pasta and eggs.",
        'PARSER: add_to_list(items = ["cheese", "pasta", "eggs"])',
        "AGENT: Done: your list is longer now: cheese, pasta and eggs.",
    ]


def test_no_test_dialogue_is_one_of_training():
    training = {tuple(said([d])) for d in made(TRAIN, 5000)}
    assert len(training) > 4950
    assert not training & {tuple(said([d])) for d in made(TEST, 2500)}


def test_turns_are_about_eight():
    for split in (TRAIN, TEST):
        lengths = [len(d["messages"]) - 1 for d in made(split, 2500)]
        assert sum(lengths) / len(lengths) == pytest.approx(8, abs=0.15)
        assert min(lengths) >= 6 and max(lengths) <= 11


def test_functions_that_are_held_out_are_in_no_dialogue_of_training():
    held = {api.name for api in HELD_OUT}
    assert not held & {api.name for api in APIS}
    parts = {part: [d for d in made(TEST) if d["part"] == part] for part in PARTS}
    assert {part: len(of) for part, of in parts.items()} == dict.fromkeys(PARTS, COUNT // 3)
    assert {call.name for call in calls(parts["apis"])} == held
    for dialogues in (made(TRAIN), parts["seen"], parts["phrases"]):
        assert {call.name for call in calls(dialogues)} == {api.name for api in APIS}
        assert not any(name in text for text in said(dialogues, "system") for name in held)


def test_phrases_that_are_held_out_are_said_by_no_user_in_training():
    ways = [OPENINGS, CORRECTIONS, THANKS, *(api.requests for api in APIS)]
    ways += [slot.phrases for api in APIS for slot in api.slots]
    fixed = [re.sub(r"\{\}.*|^.*: ?$", "", way[-1]).strip() for way in ways]
    fixed = [text for text in fixed if len(text) > 12]
    assert len(fixed) > 30
    phrases = [d for d in made(TEST) if d["part"] == "phrases"]
    seen = [d for d in made(TEST) if d["part"] == "seen"]
    for dialogues, held_out in ((phrases, True), (made(TRAIN, 2000), False), (seen, False)):
        users = "\n".join(said(dialogues)).lower()
        assert [text for text in fixed if (text.lower() in users) != held_out] == []
    for api in APIS:
        for request in api.requests[:-1]:
            assert not any(f"{request}{end}" in text for text in said(phrases) for end in " ,:.")


def test_every_call_is_of_a_function_that_is_listed_with_values_of_its_types():
    apis = {api.name: api for api in (*APIS, *HELD_OUT)}
    kinds = {"text": str, "number": int, "bool": bool, "list": list, "HH:MM": str}
    for d in made(TEST):
        listed = d["messages"][0]["content"].splitlines()[1:]
        assert len(set(listed)) == 5
        for call in calls([d]):
            api = apis[call.name]
            assert api.signature in listed and list(call.arguments) == [s.name for s in api.slots]
            for slot in api.slots:
                found = call.arguments[slot.name]
                assert found is None or type(found) is kinds[TYPES[slot.type][0]]


def test_all_that_a_call_says_was_said_by_the_user():
    """Texts as they are; a call gets what is asked for, and nothing comes from nowhere."""
    for d in made(TEST, 300):
        before = ""
        for message in d["messages"][1:]:
            if message["role"] == "user":
                before += message["content"].lower() + "\n"
            elif message["content"].startswith(PARSER):
                for name, value in calls([{"messages": [message]}])[0].arguments.items():
                    texts = [value] if isinstance(value, str) else value
                    if isinstance(texts, list) and name not in ("time", "style"):
                        assert all(text.lower() in before for text in texts), (d["id"], name)


def test_the_parser_asks_for_what_is_missing_and_then_knows_it():
    asked = 0
    apis = {api.name: api for api in (*APIS, *HELD_OUT)}
    for d in made(TEST, 300):
        expected = turns(d["messages"], d["id"])
        for first, second in zip(expected, expected[1:], strict=False):
            if first.expected.startswith(PARSER):
                call = read_call(first.expected.removeprefix(PARSER))
                needed = [s for s in apis[call.name].slots if s.question]
                missing = [s for s in needed if call.arguments[s.name] is None]
                questions = [AGENT + slot.question for slot in missing]
                assert len(missing) <= 1 and second.expected.startswith(AGENT)
                assert (second.expected in questions) == bool(missing)
                asked += len(missing)
    assert asked > 100


def test_what_people_say_means_one_value():
    """The same words never stand for two values, or no model could be right."""
    for name, (_, draw) in TYPES.items():
        rng, meant = random.Random(0), {}
        for _ in range(2000):
            value, words = draw(rng)
            assert meant.setdefault(words, value) == value, name


def test_the_program_writes_files_that_preparation_reads_as_conversations(tmp_path):
    out = tmp_path / "api"
    ended = program(
        "mobilellm_jax.api_dialogues", f"--out={out}", "--seed=4", "--train=20", "--test=9"
    )
    assert ended.status == 0 and "20 dialogues of " in ended.out
    for split, count in ((TRAIN, 20), (TEST, 9)):
        lines = (out / f"{split}.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == made(split, count, seed=4)
    corpus = ChatCorpus("api", str(out / "train.jsonl"), heldout=0.0)
    read = [json.loads(document.text) for document in documents(corpus)]
    assert read == [d["messages"] for d in made(TRAIN, 20, seed=4)]
    again = program("mobilellm_jax.api_dialogues", f"--out={out}")
    assert again.status == 1 and "not empty" in again.err


@pytest.mark.parametrize("template", ["chatml", "llama3"])
def test_what_parser_and_agent_say_is_trained_on_and_nothing_else(tmp_path, template):
    make = tokenizer_files.FOLDERS["llama3" if template == "llama3" else "qwen2"]
    tokenizer = Tokenizer.load(make(tmp_path / "tokenizer"))
    tokenizer = dataclasses.replace(tokenizer, chat_template=read_template(template))
    encode = ConversationEncoder(tokenizer)
    for d in made(TRAIN, 20):
        marked = encode(d["messages"])
        trained = tokenizer.decode(token_ids(marked[(marked & UNTRAINED) == 0]))
        assert trained == "".join(said([d], "assistant"))


def test_another_split():
    with pytest.raises(UserError, match="train or test"):
        dialogue(0, "validation", 0)
