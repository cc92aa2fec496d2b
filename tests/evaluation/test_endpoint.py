"""A server is asked what was meant, again if it fails, and never twice for what it has answered."""

import dataclasses
import json
import signal
import threading
import time

import pytest
from chat_servers import served

from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation import endpoint as module
from mobilellm_jax.evaluation.endpoint import Completion, Endpoint, complete, complete_all

HELLO = [{"role": "user", "content": "Hello"}]


def to(server, **changes):
    return dataclasses.replace(Endpoint(server.url, "m", wait=0.001, tries=4), **changes)


def asking(count):
    return [[{"role": "user", "content": f"question {i}"}] for i in range(count)]


def echo(messages):
    return f"to {messages[-1]['content']}"


def in_turn(*answers):
    """Answers one after the other, the last for ever."""
    left = list(answers)
    return lambda messages: left.pop(0) if len(left) > 1 else left[0]


def test_the_server_gets_what_was_meant():
    with served(echo) as server:
        asked = to(server, key="secret", options={"temperature": 0, "max_tokens": 5})
        assert complete(asked, HELLO, max_tokens=7) == Completion("to Hello", "stop")
    (path, headers, body), *others = server.requests
    assert path == "/v1/chat/completions" and not others
    assert headers["Authorization"] == "Bearer secret" and "secret" not in repr(asked)
    assert body == {"model": "m", "messages": HELLO, "temperature": 0, "max_tokens": 7}


def test_an_answer_that_was_cut_off_says_so():
    choice = {"message": {"content": None}, "finish_reason": "length"}
    with served(lambda _: (200, {"choices": [choice]}, {})) as server:
        assert complete(to(server), HELLO) == Completion("", "length")


@pytest.mark.parametrize(
    "failure",
    [
        (500, {"error": {"message": "out of memory"}}, {}),
        (503, b"<html>", {}),
        (429, {}, {}),
        (200, b'{"choices": [{"mess', {}),
        (200, {"choices": []}, {}),
        (200, b"{}", {"Content-Length": "100"}),
        ConnectionError(),
    ],
)
def test_a_server_that_fails_twice_is_asked_a_third_time(failure):
    with served(in_turn(failure, failure, "at last")) as server:
        assert complete(to(server, timeout=1), HELLO).text == "at last"
    assert len(server.requests) == 3


def test_a_server_that_always_fails_is_given_up():
    with served(lambda _: (500, {"error": {"message": "out of\nmemory"}}, {})) as server:
        with pytest.raises(
            UserError, match=r"has not answered in 4 tries \(500 .*: out of memory\)"
        ):
            complete(to(server), HELLO)
    assert len(server.requests) == 4
    with pytest.raises(UserError, match="has not answered in 4 tries"):
        complete(to(server), HELLO)  # nobody there any more


def test_that_it_is_asked_again_is_said_once_of_all_that_ask(capsys):
    with served(echo, delay=0.2) as server:
        url = server.url
    several = Endpoint(url, "m", wait=0.05, tries=3, workers=4)
    with pytest.raises(UserError, match="has not answered in 3 tries"):
        complete_all(several, asking(8))
    [line] = [line for line in capsys.readouterr().err.splitlines() if url in line]
    assert "refused" in line and "try 2 of 3" in line


def test_a_server_that_is_late_counts_as_failing():
    with served(echo, delay=0.5) as server:
        with pytest.raises(UserError, match="timed out"):
            complete(to(server, timeout=0.05, tries=2), HELLO)


def test_a_refusal_is_told_at_once():
    refusal = (401, {"error": {"message": "no such key"}}, {})
    with served(lambda _: refusal) as server:
        with pytest.raises(UserError, match="refuses to answer: 401 .*: no such key") as told:
            complete(to(server, key="secret"), HELLO)
    assert len(server.requests) == 1 and "secret" not in str(told.value)
    with pytest.raises(UserError, match="begins with http"):
        complete(Endpoint("localhost:8000", "m"), HELLO)


def test_waits_grow_and_are_as_long_as_the_server_asks(monkeypatch):
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    busy, asks = (503, {}, {}), (429, {}, {"Retry-After": "30"})
    with served(in_turn(busy, busy, busy, asks, "at last")) as server:
        assert complete(to(server, wait=1.0, tries=9), HELLO).text == "at last"
    expected = [1, 2, 4, 30]
    assert all(0.75 * e <= w <= 1.25 * e for w, e in zip(waits, expected, strict=True))


def test_many_are_asked_at_a_time_and_answers_stay_in_order():
    with served(echo, delay=0.05) as server:
        answers = complete_all(to(server, workers=4), asking(20))
    assert [answer.text for answer in answers] == [f"to question {i}" for i in range(20)]
    assert 2 <= server.most <= 4


def test_a_run_that_broke_off_goes_on_from_its_cache(tmp_path):
    cache = tmp_path / "new" / "cache.jsonl"
    broken = [False]

    def answer(messages):
        number = int(messages[-1]["content"].split()[1])
        return (500, {}, {}) if broken[0] and number > 5 else echo(messages)

    with served(answer) as server:
        asked = to(server, workers=2, tries=1)
        broken[0] = True
        with pytest.raises(UserError):
            complete_all(asked, asking(30), cache=cache)
        assert len(server.requests) < 30  # what had not begun was left
        broken[0] = False
        with cache.open("a") as file:
            file.write('{"key": "a4f3')  # as a kill leaves it
        server.requests.clear()
        first = complete_all(asked, asking(30), cache=cache)
        assert [answer.text for answer in first] == [f"to question {i}" for i in range(30)]
        assert len(server.requests) == 24
        assert complete_all(asked, asking(30), cache=cache) == first
        assert len(server.requests) == 24
        # Other options or another model are other questions.
        complete_all(asked, asking(30), cache=cache, temperature=1)
        complete_all(dataclasses.replace(asked, model="n"), asking(30), cache=cache)
        assert len(server.requests) == 84
    assert "secret" not in cache.read_text()


def test_ctrl_c_waits_for_no_server(tmp_path):
    """Answers under way are given up; those that have come are in the cache."""
    cache, late, began = tmp_path / "cache.jsonl", threading.Event(), time.monotonic()
    main = threading.main_thread().ident
    interrupt = threading.Timer(0.5, signal.pthread_kill, (main, signal.SIGINT))

    def answer(messages):
        if messages[-1]["content"] != "question 0":
            late.wait(20)
        return echo(messages)

    with served(answer) as server:
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            complete_all(to(server, workers=2), asking(6), cache=cache)
        assert time.monotonic() - began < 10
        assert [json.loads(line)["text"] for line in cache.read_text().splitlines()] == [
            "to question 0"
        ]
        assert len(server.requests) == 3
        late.set()


@pytest.mark.parametrize("content", [b'{"a": 1}', b"\xff\xfe", b"[" * 100_000, b"[]\n{}"])
def test_another_file_is_no_cache(tmp_path, content):
    (tmp_path / "notes").write_bytes(content)
    with pytest.raises(UserError, match="line 1 is no cached answer"):
        complete_all(Endpoint("http://localhost:1", "m"), asking(1), cache=tmp_path / "notes")
    assert (tmp_path / "notes").read_bytes() == content
