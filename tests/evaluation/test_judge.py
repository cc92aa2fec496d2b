"""What a judge says becomes a figure that its fondness of a position cannot move."""

import math
import re

import pytest
from chat_servers import answers_of, prefers_longer, served

from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.answers import of_server
from mobilellm_jax.evaluation.endpoint import Endpoint
from mobilellm_jax.evaluation.judge import converse, rate, ratings, win_rate

OURS = {f"Task {i}": "x" * (10 + i) for i in range(8)}
SHORTER = {f"Task {i}": "y" * 5 for i in range(9)}
HALF = {f"Task {i}": "y" * (5 if i % 2 else 50) for i in range(8)}


def judged(answer, ours, reference, **options):
    with served(answer) as server:
        return win_rate(
            ours, reference, Endpoint(server.url, "judge", wait=0.001), **options
        ), server


def test_a_judge_that_prefers_a_position_decides_nothing():
    for position in "AB":
        result, server = judged(lambda _, p=position: f"[[{p}]]", OURS, SHORTER)
        assert result.score.mean == 0.5 and result.score.standard_error == 0
        assert (result.wins, result.ties, result.losses, result.swayed) == (0, 8, 0, 8)
        assert len(server.requests) == 16


def test_a_judge_with_reasons_is_followed():
    result, _ = judged(prefers_longer, OURS, SHORTER)
    assert (result.score.mean, result.wins, result.swayed) == (1, 8, 0)
    assert (result.length, result.reference_length) == (13.5, 5)
    mixed, _ = judged(prefers_longer, OURS, HALF)
    assert (mixed.score.mean, mixed.wins, mixed.losses, mixed.ties) == (0.5, 4, 4, 0)
    assert mixed.score.standard_error == pytest.approx(math.sqrt(8 * 0.25 / 7 / 8))
    equal, _ = judged(prefers_longer, OURS, {i: "z" * len(a) for i, a in OURS.items()})
    assert (equal.score.mean, equal.ties, equal.swayed) == (0.5, 8, 0)


def test_answers_to_other_instructions_are_not_looked_at():
    more = {**SHORTER, "Task 99": "y" * 5000}
    result, server = judged(prefers_longer, OURS, more)
    assert (result.wins, result.reference_length, len(server.requests)) == (8, 5, 16)


def test_the_judge_is_asked_with_options_of_its_own_where_it_has_some():
    with served(prefers_longer) as server:
        warm = Endpoint(server.url, "judge", wait=0.001, options={"temperature": 0.7, "seed": 3})
        win_rate(OURS, SHORTER, warm)
    assert {(body["temperature"], body["seed"]) for _, _, body in server.requests} == {(0.7, 3)}


def test_places_changed_the_rate_is_the_rest():
    reference = {i: "y" * (5 if n % 4 else 50) for n, i in enumerate(OURS)}
    ours, _ = judged(prefers_longer, OURS, reference)
    theirs, _ = judged(prefers_longer, reference, OURS)
    assert (ours.score.mean, theirs.score.mean) == (0.75, 0.25)


def test_each_pair_is_shown_whole_and_once_in_each_order():
    _, server = judged(prefers_longer, OURS, SHORTER)
    shown = [body["messages"][-1]["content"] for _, _, body in server.requests]
    for instruction, answer in OURS.items():
        of_it = [answers_of([{"content": c}]) for c in shown if f"\n{instruction}\n" in c]
        assert sorted(of_it) == sorted([[answer, "yyyyy"], ["yyyyy", answer]])
    assert all(body["temperature"] == 0 for _, _, body in server.requests)


def test_a_verdict_that_cannot_be_read_is_left_out_and_counted():
    def garbles(messages):
        return "It depends." if "Task 3" in messages[-1]["content"] else prefers_longer(messages)

    def garbles_one_order(messages):
        garbled = "Task 2" in messages[-1]["content"] and answers_of(messages)[0] == "yyyyy"
        return "[[D]] [A]" if garbled else prefers_longer(messages)

    for answer in (garbles, garbles_one_order):
        result, _ = judged(answer, OURS, SHORTER)
        assert (result.unreadable, result.wins, result.score.problems) == (1, 7, 7)
        assert result.points.count(1.0) == 7 and None in result.points[2:4]
        assert result.score.mean == 1
    with pytest.raises(UserError, match="none of the judge's 16 answers holds a verdict.*Hm"):
        judged(lambda _: "Hm.", OURS, SHORTER)


def test_a_missing_reference_is_told_before_anybody_is_asked():
    with pytest.raises(UserError, match="no answer to the instruction 'Task 8'"):
        win_rate(SHORTER, OURS, Endpoint("http://localhost:1", "judge"))
    with pytest.raises(UserError, match="nothing to average"):
        win_rate({}, OURS, Endpoint("http://localhost:1", "judge"))


def test_verdicts_come_from_the_cache(tmp_path):
    first, server = judged(prefers_longer, OURS, HALF, cache=tmp_path / "c")
    again = win_rate(OURS, HALF, Endpoint(server.url, "judge"), cache=tmp_path / "c")
    assert again == first  # though the server is gone


def test_a_model_is_asked_turn_after_turn():
    def model(messages):
        return f"answer {len(messages)} to {messages[-1]['content']}"

    with served(model) as server:
        answer = of_server(Endpoint(server.url, "m"), max_tokens=9)
        conversations = converse([["a", "b"], ["c"]], answer)
    assert [[m["content"] for m in c] for c in conversations] == [
        ["a", "answer 1 to a", "b", "answer 3 to b"],
        ["c", "answer 1 to c"],
    ]
    assert all(body["max_tokens"] == 9 for _, _, body in server.requests)


CONVERSATIONS = [
    [
        {"role": "user", "content": f"first question {i}"},
        {"role": "assistant", "content": "good" if i < 2 else "bad"},
        {"role": "user", "content": "second question"},
        {"role": "assistant", "content": "fair"},
    ]
    for i in range(4)
]
MARKS = {"good": "9", "fair": "5.5", "bad": "2"}


def rates_the_last(messages):
    last = re.findall(r"<assistant>\n(.*?)\n</assistant>", messages[-1]["content"])[-1]
    return f"From [[1]] to [[10]], I say [[{MARKS[last]}]]."


def test_each_turn_is_rated_by_its_last_answer():
    with served(rates_the_last) as server:
        ratings = rate(CONVERSATIONS, Endpoint(server.url, "judge"))
    first, second = ratings.turns
    assert (first.mean, second.mean, ratings.unreadable) == (5.5, 5.5, 0)
    assert second.standard_error == 0 and first.standard_error == pytest.approx(
        math.sqrt(4 * 3.5**2 / 3 / 4)
    )
    # Half of a conversation's two ratings moves: so does half of its mean.
    assert ratings.score.mean == 5.5 and ratings.score.problems == 4
    assert ratings.score.standard_error == pytest.approx(first.standard_error / 2)
    shown = [body["messages"] for _, _, body in server.requests]
    assert sum("last answer alone" in system["content"] for system, _ in shown) == 4
    assert sum("second question" in user["content"] for _, user in shown) == 4


@pytest.mark.parametrize("garbage", ["11", "0", "0.5", "-3", "ten", "5/10", ""])
def test_ratings_that_cannot_be_read_are_left_out_and_counted(monkeypatch, garbage):
    monkeypatch.setitem(MARKS, "bad", garbage)
    with served(rates_the_last) as server:
        ratings = rate(CONVERSATIONS, Endpoint(server.url, "judge"))
    assert ratings.unreadable == 2
    assert [turn.mean for turn in ratings.turns] == [9, 5.5]
    assert [turn.problems for turn in ratings.turns] == [2, 4]


def test_a_judge_that_rates_nothing_is_told():
    with served(lambda _: "ten") as server:
        with pytest.raises(UserError, match="holds a rating"):
            rate(CONVERSATIONS, Endpoint(server.url, "judge"))


def test_means_are_of_what_can_be_read():
    """A turn that nobody could rate has no mean; some of the conversations have means of their own."""
    found = ratings([(4.0, None), (6.0,), (None, None)])
    assert (found.score.mean, found.score.problems, found.unreadable) == (5, 2, 3)
    first, second = found.turns
    assert (first.mean, second) == (5, None)
    assert ratings(found.values[:1]).score.mean == 4
    with pytest.raises(UserError, match="nothing to average"):
        ratings(found.values[2:])
