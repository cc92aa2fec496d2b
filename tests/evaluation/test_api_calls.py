"""Calls are read back as they were written, and anything else than the right call is wrong."""

import importlib.util
import json
import math
import random

import pytest

from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.api_calls import (
    AGENT,
    PARSER,
    Call,
    grade_calls,
    grade_turns,
    read_call,
    rouge,
    turns,
    write_call,
)
from mobilellm_jax.evaluation.api_dialogues import TEST, dialogue
from mobilellm_jax.evaluation.function_calls import dialogues, read_function_calls

needs_rouge = pytest.mark.skipif(
    importlib.util.find_spec("rouge_score") is None, reason="needs rouge-score"
)
RIGHT, WRONG_VALUES, WRONG = (
    {"EM_intent": intent, "EM_structure": structure}
    for intent, structure in ((1, 1), (1, 0), (0, 0))
)


def value(rng, depth=0):
    kinds = [
        lambda: rng.choice([None, True, False]),
        lambda: rng.randint(-(10**6), 10**6),
        lambda: rng.choice([1e-5, 0.5, -2.25, 1e300]),
        lambda: "".join(
            rng.choice("ab \"'\\\n\t,=(){}[]:é\u2028日") for _ in range(rng.randint(0, 9))
        ),
        lambda: [value(rng, depth + 1) for _ in range(rng.randint(0, 3))],
        lambda: {str(rng.random()): value(rng, depth + 1) for _ in range(rng.randint(0, 3))},
    ]
    return rng.choice(kinds[: 4 if depth > 2 else 6])()


def test_any_call_is_read_back_as_it_was_written():
    rng = random.Random(0)
    for _ in range(500):
        names = rng.sample(
            ["a", "b_2", "from", "max-results", "x y", "π", "None"], rng.randint(0, 5)
        )
        call = Call(rng.choice(["f", "a.b", "get-it"]), {name: value(rng) for name in names})
        text = write_call(call)
        assert "\n" not in text and read_call(text) == call, text


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("f()", {}),
        (" f ( a=1 , b = 'x' ) ", {"a": 1, "b": "x"}),
        (
            'f(a = true, b = null, c = {"d": [1.5, -2]},)',
            {"a": True, "b": None, "c": {"d": [1.5, -2]}},
        ),
        (r"f(a = 'it\'s \x41')", {"a": "it's A"}),
        ("f(1)", None),
        ("f(a = b)", None),
        ("f(a = 1", None),
        ("f(a = 1) and more", None),
        ("f(a = 1, a = 2)", None),
        ("f(a = 'x)", None),
        ("f(a = __import__('os').getcwd())", None),
        ("f(a = " + "[" * 5000, None),
        ("f(a = " + "9" * 30_000 + ")", None),
    ],
)
def test_other_ways_to_write_and_what_cannot_be_read(text, arguments):
    assert read_call(text) == Call("f", arguments)


@pytest.mark.parametrize("text", ["", "f", "(a = 1)", "call the function f", "\0"])
def test_what_is_no_call(text):
    assert read_call(text) is None


def changed(given):
    """Other values than the given one, close to it."""
    yield str(given) if not isinstance(given, str) else f"{given} "
    yield None if given is not None else False
    if isinstance(given, bool):
        yield not given
        yield int(given)
    elif isinstance(given, int):
        yield from (given + 1, -given - 1, given + 0.5, [given])
    elif isinstance(given, str):
        yield from (given.swapcase(), given[:-1], [given])
        if given.isdigit():
            yield int(given)
    elif isinstance(given, list):
        yield from (given[:-1], [*given, "x"], ", ".join(given))
        if len(given) > 1:
            yield given[::-1]


def test_a_call_is_right_in_any_order_and_wrong_after_any_change_of_one_thing():
    changes = 0
    for index in range(60):
        for turn in turns(dialogue(3, TEST, index)["messages"], index):
            if not turn.expected.startswith(PARSER):
                continue
            expected = turn.expected.removeprefix(PARSER)
            call = read_call(expected)
            given = dict(call.arguments)
            reordered = write_call(Call(call.name, dict(reversed(given.items()))))
            assert grade_calls(expected, reordered) == RIGHT
            others = [{**given, name: v} for name in given for v in changed(given[name])]
            others += [{k: v for k, v in given.items() if k != name} for name in given]
            others += [{("x" if k == name else k): v for k, v in given.items()} for name in given]
            others.append({**given, "x": None})
            for arguments in others:
                if str(arguments) == str(given):
                    continue  # such as letters in the other case, of which a time has none
                changes += 1
                assert grade_calls(expected, write_call(Call(call.name, arguments))) == WRONG_VALUES
            assert grade_calls(expected, write_call(Call(call.name + "s", given))) == WRONG
            assert grade_calls(expected, expected + "\n" + expected) == WRONG
            assert grade_calls(expected, expected + " x") == WRONG_VALUES
    assert changes > 1000


def test_several_calls_are_right_in_any_order():
    calls = "f(a = 1)\ng()\nf(a = 2)"
    assert grade_calls(calls, "g()\n\nf(a = 2.0)\nf(a = 1)\n") == RIGHT
    assert grade_calls(calls, "g()\nf(a = 2)\nf(a = 2)") == WRONG_VALUES
    assert grade_calls(calls, "g()\nf(a = 2)") == WRONG
    assert grade_calls("f(a = )", "f(a = )")["EM_structure"] == 0  # unreadable is never right


def test_a_call_ends_at_a_newline_alone():
    """What else Unicode ends a line with may be in a text, which is written as it is."""
    calls = [Call("note", {"text": f"one{end}two"}) for end in "\u2028\x85\x0b\x1c\n"]
    said = "\n".join(map(write_call, calls))
    assert grade_calls(said, said) == {"EM_intent": 1.0, "EM_structure": 1.0}


@needs_rouge
def test_rouge_is_what_it_says():
    assert rouge("the cat sat", "the cat sat") == {"R1": 1, "RL": 1}
    # 3 words in common, 2 of them in order; of 3 and 4 words
    assert rouge("the cat sat", "sat the cat down") == pytest.approx({"R1": 6 / 7, "RL": 4 / 7})
    assert rouge("the cat", "") == {"R1": 0, "RL": 0}


@needs_rouge
def test_dialogues_are_right_against_themselves_and_each_speaker_counts_as_themselves():
    expected = [t for i in range(30) for t in turns(dialogue(0, TEST, i)["messages"], i)]
    scores = grade_turns(expected, [turn.expected for turn in expected])
    assert {name: score.mean for name, score in scores.items()} == {
        "EM_intent": 1,
        "EM_structure": 1,
        "R1": 1,
        "RL": 1,
    }
    assert all(score.problems == 30 and score.standard_error == 0 for score in scores.values())
    without = [turn.expected.removeprefix(PARSER).removeprefix(AGENT) for turn in expected]
    assert grade_turns(expected, without) == scores
    other = [
        turn.expected.replace(PARSER, "X").replace(AGENT, PARSER).replace("X", AGENT)
        for turn in expected
    ]
    assert all(score.mean == 0 for score in grade_turns(expected, other).values())


def test_scores_are_means_over_turns_with_errors_over_dialogues():
    expected = [
        t
        for t in (t for i in range(8) for t in turns(dialogue(0, TEST, i)["messages"], i))
        if t.expected.startswith(PARSER)
    ]
    scores = grade_turns(
        expected, ["" if turn.dialogue % 2 else turn.expected for turn in expected]
    )
    right = sum(turn.dialogue % 2 == 0 for turn in expected)
    assert set(scores) == {"EM_intent", "EM_structure"}
    assert scores["EM_intent"].mean == pytest.approx(right / len(expected))
    assert scores["EM_intent"].problems == 8
    naive = math.sqrt(scores["EM_intent"].mean * (1 - scores["EM_intent"].mean) / len(expected))
    assert scores["EM_intent"].standard_error > 1.2 * naive
    with pytest.raises(UserError, match="no turn"):
        grade_turns([], [])


def test_what_a_model_sees_of_a_turn_is_all_before_it():
    messages = dialogue(0, TEST, 0)["messages"]
    for turn in turns(messages, 0):
        place = len(turn.messages)
        assert turn.messages == messages[:place] and messages[place]["content"] == turn.expected


OPENAI = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather in Rome and Oslo?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "type": "function",
                    "function": {"name": "weather", "arguments": json.dumps({"city": city})},
                }
                for city in ("Rome", "Oslo")
            ],
        },
        {"role": "tool", "content": "[30, 10]", "tool_call_id": "1"},
        {"role": "assistant", "content": "30 and 10 degrees."},
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "The weather\nof a city.",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string"}, "day": {"type": ["string", "null"]}},
                    "required": ["city"],
                },
            },
        }
    ],
}
XLAM = {
    "id": 7,
    "query": "Find giveaways",
    "answers": json.dumps([{"name": "live_giveaways", "arguments": {"type": "beta", "from": 3}}]),
    "tools": json.dumps(
        [
            {
                "name": "live_giveaways",
                "description": "Lists them.",
                "parameters": {"type": {"type": "str"}, "from": {"type": "int", "default": 1}},
            }
        ]
    ),
}


@pytest.mark.parametrize("form", ["lines", "array"])
def test_function_calling_files_become_dialogues(tmp_path, form):
    path = tmp_path / "calls.json"
    records = [OPENAI, XLAM]
    path.write_text(json.dumps(records) if form == "array" else "\n".join(map(json.dumps, records)))
    openai, xlam = read_function_calls(path)
    system, user, calls, tool, reply = openai["messages"]
    assert system["content"].endswith(
        "weather(city: string, day: string|null = null)  # The weather of a city.\nBe brief."
    )
    assert user["content"] == "Weather in Rome and Oslo?" and tool["role"] == "tool"
    assert calls["content"] == 'PARSER: weather(city = "Rome")\nweather(city = "Oslo")'
    assert reply["content"] == "AGENT: 30 and 10 degrees."
    assert [len(turn.messages) for turn in turns(openai["messages"], 0)] == [2, 4]
    assert (openai["id"], xlam["id"]) == ("1", "7")
    system, user, calls = xlam["messages"]
    assert system["content"].endswith("live_giveaways(type: str, from: int = 1)  # Lists them.")
    assert calls["content"] == 'PARSER: live_giveaways(type = "beta", from = 3)'
    wanted = 'live_giveaways(from = 3, type = "beta")'
    assert grade_calls(calls["content"].removeprefix(PARSER), wanted) == RIGHT


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1}', "record 1 has neither messages nor query and answers but a"),
        ('{"query": "x", "answers": "[1]"}', "record 1 is not of the shape"),
        ('{"query": "x", "answers": "no JSON"}', "record 1 is not of the shape"),
        ('{"query": "x", "answers": [{"name": "a b", "arguments": {}}]}', "cannot be written"),
        ("[1]", "record 1 is no object but int"),
        ("{", "neither JSON lines nor an array"),
        ("[" * 100_000, "neither JSON lines nor an array"),
        ('{"query": 1, "answers": []}', "record 1 is not of the shape .*expected str"),
        ('{"query": "x", "answers": [{"name": "f", "arguments": null}]}', "not of the shape"),
        ('{"messages": 1}', "record 1 is not of the shape"),
        ('{"messages": [{"role": false}]}', "record 1 is not of the shape"),
        (r'{"messages": [{"role": "user", "content": "\ud800"}]}', "surrogates not allowed"),
    ],
)
def test_files_of_another_shape(tmp_path, text, says):
    (tmp_path / "f.json").write_text(text)
    for read in (read_function_calls, dialogues):
        with pytest.raises(UserError, match=says):
            list(read(tmp_path / "f.json"))
    with pytest.raises(UserError, match="cannot be read"):
        list(read_function_calls(tmp_path / "other.json"))


def test_dialogues_that_are_made_already_come_as_they_are_or_are_told(tmp_path):
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"{AGENT}a"}]
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps({"id": "7", "messages": said}))
    assert list(dialogues(path)) == [{"id": "7", "messages": said}]
    for damaged in (None, 1, [{"role": "user"}], [{**said[0], "content": None}]):
        second = json.dumps({"id": "8", "messages": damaged})
        path.write_text(f"{json.dumps({'id': '7', 'messages': said})}\n{second}")
        with pytest.raises(UserError, match="record 2 is not of the shape"):
            list(dialogues(path))
