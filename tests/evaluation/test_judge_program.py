"""The program: whose answers are judged, what is kept, what is said of bad input."""

import dataclasses
import functools
import json
import math
import re

import chats
import jax
import pytest
import tiny
from chat_servers import answers_of, prefers_longer, served
from runs import program

from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.chat_files import (
    read_conversations,
    read_instructions,
    read_outputs,
    read_questions,
)
from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import Stack
from mobilellm_jax.training.checkpoint import write_model

INSTRUCTIONS = [
    {"dataset": "mine", "instruction": "Name a colour."},
    {"dataset": "mine", "instruction": "Add.", "input": "1 and 2"},
    {"dataset": "mine", "instruction": "Say nothing."},
]
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Write it anew."]},
    {"question_id": 82, "category": "writing", "turns": ["Rhyme.", "Once more."]},
    {"question_id": 91, "category": "math", "turns": ["Count.", "Go on."]},
]
FASTCHAT = [
    {
        "question_id": question["question_id"],
        "model_id": "vicuna",
        "choices": [{"index": 0, "turns": ["good", "fair"]}],
    }
    for question in QUESTIONS
]


def judge(*arguments):
    return program("mobilellm_jax.judge", *arguments)


@pytest.fixture
def files(tmp_path):
    """The input, by name."""
    reference = [
        {**record, "output": "x" * (2 if number else 90), "generator": "davinci", "price": 1}
        for number, record in enumerate(INSTRUCTIONS)
    ]
    for name, records in (("instructions", INSTRUCTIONS), ("reference", reference)):
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    for name, records in (("questions", QUESTIONS), ("fastchat", FASTCHAT)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return tmp_path


def comparing(files, out="out"):
    where = f"--instructions={files / 'instructions.json'}", f"--out={files / out}"
    return *where, f"--reference={files / 'reference.json'}"


def of(who, server):
    return f"--{who}={server.url}", f"--{who}_model={who} of mine"


def says(messages):
    """Half a character at the end, as some servers leave it."""
    return f"Gladly: {messages[-1]['content']}\ud83d"


def rates(messages):
    """9 for what is good, 4 for what is fair, nothing readable of mathematics."""
    text = messages[-1]["content"]
    last = re.findall(r"<assistant>\n(.*?)\n</assistant>", text, re.DOTALL)[-1]
    return "Well." if "Count." in text else f"[[{9 if 'good' in last else 4}]]"


def rows(text):
    table = [line for line in text.splitlines() if line.startswith("|")]
    header, _, *body = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    return header, body


def test_a_win_rate_of_answers_from_a_server(files):
    with served(says) as server, served(prefers_longer) as decides:
        options = "--temperature=0.3", "--top_p=0.9", "--max_new_tokens=7", "--seed=5"
        ended = judge(*comparing(files), *of("server", server), *of("judge", decides), *options)
    assert ended.status == 0, ended.err
    header, ((name, reference, by, rate, error, *counts),) = rows(ended.out)
    assert header[3:5] == ["win rate", "standard error"]
    assert (name, reference, by) == ("server of mine", "davinci", "judge of mine")
    assert (rate, error) == ("0.6667", f"{math.sqrt(2 / 9 / 2):.4f}")
    assert counts[:5] == ["2", "0", "1", "0", "0"]
    body = server.requests[0][2]
    assert [body[key] for key in ("temperature", "top_p", "max_tokens", "seed")] == [0.3, 0.9, 7, 5]
    assert "top_k" not in body and len(server.requests) == 3 and len(decides.requests) == 6

    out = files / "out"
    assert (out / "results.md").read_text() == ended.out
    answers = json.loads((out / "answers.json").read_text())
    assert {answer["generator"] for answer in answers} == {"server of mine"}
    assert [{key: a[key] for key in r} for a, r in zip(answers, INSTRUCTIONS, strict=True)] == (
        INSTRUCTIONS
    )
    # The input is part of what is asked, and of what is judged.
    assert answers[1]["output"] == "Gladly: Add.\n\n1 and 2\ud83d"
    assert sum(
        "Add.\n\n1 and 2\n" in str(b["messages"][1]["content"]) for *_, b in decides.requests
    )
    results = json.loads((out / "results.json").read_text())
    assert results["win_rate"]["wins"] == 2 and results["judge"]["model"] == "judge of mine"
    assert [of_one["point"] for of_one in results["each"]] == [0, 1, 1]
    assert results["drawn"]["top_p"] == 0.9

    again = judge(*comparing(files), *of("server", server), *of("judge", decides))
    assert again.status == 1 and "holds results already" in again.err


def test_a_killed_run_goes_on_by_the_same_command(files):
    told = []

    def breaks(messages):
        told.append(messages)
        return (401, {}, {}) if len(told) == 4 else prefers_longer(messages)

    with served(says) as server, served(breaks) as decides:
        command = *comparing(files), *of("server", server), *of("judge", decides), "--workers=1"
        ended = judge(*command)
        assert ended.status == 1 and "refuses to answer: 401" in ended.err
        assert not (files / "out" / "results.json").exists()
        assert judge(*command).status == 0
        assert len(server.requests) == 3 and len(told) == 7  # six, and the one that was refused


def test_answers_that_exist_are_judged(files):
    """Those that the program has written, those of the reference itself, and a file without a name."""
    answers = [{**record, "output": "z" * 40} for record in INSTRUCTIONS]
    path = files / "mine.json"
    path.write_text(json.dumps(answers))
    with served(prefers_longer) as decides:
        ended = judge(*comparing(files), f"--answers={path}", *of("judge", decides))
        assert ended.status == 0, ended.err
        _, ((name, *_, rate, _, _, _, _, _, _, length, _),) = rows(ended.out)
        assert (name, rate, length) == ("mine", "0.6667", "40")
        kept = files / "out" / "answers.json"
        ended = judge(*comparing(files, "again"), f"--answers={kept}", *of("judge", decides))
        assert rows(ended.out)[1][0][:4] == ["mine", "davinci", "judge of mine", "0.6667"]
        # The reference may be in the file of instructions, and names may be given; what else is said
        # there of the reference's answers is not said of ours.
        itself = f"--instructions={files / 'reference.json'}", f"--answers={kept}", "--name=ours"
        ended = judge(*itself, *of("judge", decides), f"--out={files / 'itself'}")
        assert rows(ended.out)[1][0][:4] == ["ours", "davinci", "judge of mine", "0.6667"]
        first = json.loads((files / "itself" / "answers.json").read_text())[0]
        assert set(first) == {"dataset", "instruction", "output", "generator"}


def test_ratings_of_conversations(files):
    def model(messages):
        return "good" if len(messages) == 1 else "fair, as I said: " + messages[-2]["content"][:0]

    questions = f"--questions={files / 'questions.jsonl'}"
    with served(model) as server, served(rates) as decides:
        told = '--judge_options={"max_tokens": 99, "temperature": null}'
        by = *of("judge", decides), told
        ended = judge(questions, *of("server", server), *by, f"--out={files / 'out'}")
        assert ended.status == 0, ended.err
        options = [(body["max_tokens"], body["temperature"]) for *_, body in decides.requests]
        assert set(options) == {(99, None)}
        seen = len(decides.requests)
        kept = f"--answers={files / 'out' / 'conversations.jsonl'}"
        again = judge(questions, kept, *by, f"--out={files / 'again'}")
        theirs = f"--answers={files / 'fastchat.jsonl'}"
        other = judge(questions, theirs, *by, f"--out={files / 'other'}")
    assert again.out == ended.out and len(decides.requests) == 3 * seen
    assert "Answers of server of mine, rated by judge of mine:" in ended.out
    assert "Answers of vicuna," in other.out and rows(other.out) == rows(ended.out)

    header, body = rows(ended.out)
    assert header[:6] == [
        *("category", "conversations", "rating", "standard error", "turn 1", "standard error"),
    ]
    figures = {name: cells for name, *cells in body}
    assert list(figures) == ["writing", "math", "all"]
    assert figures["writing"] == ["2", "6.50", "0.00", "9.00", "0.00", "4.00", "0.00", "0"]
    assert figures["all"] == ["3", "6.50", "0.00", "9.00", "0.00", "4.00", "0.00", "2"]
    assert figures["math"] == ["", "", "", "", "", "", "", "all"]
    results = json.loads((files / "out" / "results.json").read_text())
    assert [of_one["ratings"] for of_one in results["each"]] == [[9, 4], [9, 4], [None, None]]
    assert results["categories"]["math"] is None
    assert results["categories"]["writing"]["score"]["mean"] == 6.5
    conversation = json.loads((files / "out" / "conversations.jsonl").read_text().splitlines()[0])
    said = [message["content"] for message in conversation["messages"]]
    assert said[::2] == QUESTIONS[0]["turns"] and said[1] == "good"


@functools.cache
def network():
    model = dataclasses.replace(tiny.MODEL, stacks=(Stack(1, 2, 1, 32),), init_std=0.3)
    params = jax.jit(functools.partial(transformer.init, model))(jax.random.key(0))
    return model, flat(jax.device_get(params))


def test_a_checkpoint_answers(files):
    model, params = network()
    tokenizer = dataclasses.replace(tiny.tokenizer(), chat_template=chats.PLAIN)
    write_model(params, model, tokenizer, {}, files / "run")
    checkpoint = f"--checkpoint={files / 'run'}", "--max_new_tokens=4", "--rows=3"
    with served(prefers_longer) as decides:
        ended = judge(*comparing(files), *checkpoint, *of("judge", decides))
        assert ended.status == 0, ended.err
        answers = read_outputs(files / "out" / "answers.json")
        assert answers.name == str(files / "run") and len(set(answers.texts.values())) == 3
        shown = {text for *_, body in decides.requests for text in answers_of(body["messages"])}
        assert shown >= set(answers.texts.values())
    write_model(params, model, tiny.tokenizer(), {}, files / "plain")
    ended = judge(
        *comparing(files, "plain_out"),
        f"--checkpoint={files / 'plain'}",
        *checkpoint[1:],
        "--judge=http://localhost:1",
        "--judge_model=m",
    )
    assert ended.status == 1 and "no chat template" in ended.err


NOBODY = "--judge=http://localhost:1", "--judge_model=m"
SERVED = "--server=http://localhost:1", "--server_model=m"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (SERVED, "--judge=URL is missing"),
        ((*SERVED, "--judge=http://localhost:1"), "--judge_model=NAME is missing"),
        ((*SERVED, "--judge=localhost", "--judge_model=m"), "begins with http"),
        (NOBODY, "nothing says who answers: give one of --checkpoint, --server, --answers"),
        ((*NOBODY, *SERVED, "--answers=a"), "--server and --answers exclude each other"),
        ((*NOBODY, "--server=http://localhost:1"), "--server_model=NAME is missing"),
        ((*NOBODY, *SERVED, "--questions=q"), "--instructions and --questions exclude"),
        ((*NOBODY, *SERVED, "--instructions="), "nothing says what is asked"),
        ((*NOBODY, *SERVED, "--reference="), "--reference=FILE is missing"),
        ((*NOBODY, *SERVED, "--reference={0}/short.json"), "davinci has no answer .*'Say nothing"),
        ((*NOBODY, "--answers={0}/short.json"), "short.json has no answer to .*'Say nothing"),
        ((*NOBODY, "--answers={0}/silent.json"), "all 3 answers are empty"),
        ((*NOBODY, "--answers={0}/nowhere.json"), "nowhere.json cannot be read"),
        ((*NOBODY, *SERVED, "--judge_key_env=NOT_THERE"), "the environment has no such variable"),
        ((*NOBODY, *SERVED, "--judge_options=[]"), "--judge_options=.* is no object in JSON"),
        ((*NOBODY, *SERVED, "--top_p=2"), "--top_p=2.0 must be above 0"),
    ],
)
def test_bad_input_is_told_before_anybody_is_asked(files, monkeypatch, arguments, said):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("asked"))
    reference = json.loads((files / "reference.json").read_text())
    (files / "short.json").write_text(json.dumps(reference[:2]))
    silent = [{**record, "output": " "} for record in reference]
    (files / "silent.json").write_text(json.dumps(silent))
    ended = judge(*comparing(files), *(argument.format(files) for argument in arguments))
    assert ended.status == 1 and re.search(said, ended.err), ended.err


def test_questions_have_no_reference(files):
    asked = f"--questions={files / 'questions.jsonl'}", f"--out={files / 'out'}"
    ended = judge(*asked, *SERVED, *NOBODY, "--reference=r")
    assert ended.status == 1 and "--reference goes with --instructions" in ended.err


def test_keys_come_from_the_environment(files, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    monkeypatch.setenv("MINE", "open")
    with served(says) as server, served(prefers_longer) as decides:
        keys = *of("server", server), "--server_key_env=MINE", *of("judge", decides)
        assert judge(*comparing(files), *keys).status == 0
    assert {headers["Authorization"] for _, headers, _ in server.requests} == {"Bearer open"}
    assert {headers["Authorization"] for _, headers, _ in decides.requests} == {"Bearer sesame"}
    kept = [path.read_text() for path in (files / "out").iterdir()]
    assert len(kept) == 5 and not any("sesame" in text or "open" in text for text in kept)


@pytest.mark.parametrize("read", [read_instructions, read_outputs, read_questions])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("[]", "is empty"),
        ("[1, 2]", "record 1 is no .*TypeError"),
        ('[{"a": 1}]', "record 1 is no .*KeyError"),
        (
            '{"instruction": 1, "output": "", "question_id": 1, "turns": [1]}',
            "record 1 is no .*'1' is no text",
        ),
        ('\n{"instruction', "line 2 is no .*JSONDecodeError"),
        ("[1,", "it is no .*JSONDecodeError"),
        ("[" * 100_000, "it is no .*RecursionError"),
        (
            r'{"instruction": "\ud800", "output": "", "question_id": 1, "turns": ["\ud800"]}',
            "record 1 is no .*surrogates not allowed",
        ),
    ],
)
def test_files_that_are_something_else_are_told(tmp_path, read, text, said):
    path = tmp_path / "file"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        read(path)


def test_answers_whose_generator_is_no_name_are_called_by_their_file(tmp_path):
    record = {"instruction": "i", "output": "o", "generator": ["a"]}
    (tmp_path / "mine.json").write_text(json.dumps(record))
    assert read_outputs(tmp_path / "mine.json").name == "mine"


def test_files_that_cannot_be_read_are_told(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "bytes", tmp_path / "nothing", tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            read_instructions(path)


def test_what_comes_twice_or_is_missing_is_told(files):
    twice = files / "twice.jsonl"
    twice.write_text("\n".join(json.dumps(record) for record in [*FASTCHAT, FASTCHAT[0]]))
    questions = read_questions(files / "questions.jsonl")
    with pytest.raises(UserError, match="'81' more than once"):
        read_conversations(twice, questions)
    twice.write_text(json.dumps(INSTRUCTIONS[:1] * 2))
    with pytest.raises(UserError, match="'Name a colour.' more than once"):
        read_instructions(twice)
    twice.write_text(json.dumps(FASTCHAT[:2]))
    with pytest.raises(UserError, match="0 answers to the 2 turns of question 91"):
        read_conversations(twice, questions)
