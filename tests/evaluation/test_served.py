"""A server as a model of the harness: what it is asked, what becomes of its answers."""

import json
import logging

import pytest
from chat_servers import served

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.tasks import TaskManager

from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.endpoint import Endpoint
from mobilellm_jax.evaluation.served import ServedModel

SETTINGS = {"until": ["\n\n", "Q:"], "max_gen_toks": 9, "do_sample": False}
SAMPLED = {**SETTINGS, "do_sample": True, "temperature": 0.6, "top_p": 0.9}


def to(server, **options):
    return ServedModel(Endpoint(server.url, "m"), **options)


def instances(*arguments):
    return [Instance("generate_until", {}, given, i) for i, given in enumerate(arguments)]


def says(messages):
    return f"to {messages[-1]['content']}"


def bodies(server):
    """What was asked, by the last message."""
    return {body["messages"][-1]["content"]: body for _, _, body in server.requests}


def test_a_task_s_settings_reach_the_server():
    with served(says) as server:
        lm = to(server)
        turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "é"}]
        chat = lm.apply_chat_template(turns)
        requests = instances(("plain", SETTINGS), (chat, SAMPLED), (json.dumps(turns), {}))
        assert lm.generate_until(requests) == ["to plain", "to é", f"to {json.dumps(turns)}"]
    asked = bodies(server)
    plain, sampled, text = asked["plain"], asked["é"], asked[json.dumps(turns)]
    assert plain["messages"] == [{"role": "user", "content": "plain"}]
    assert (plain["temperature"], plain["max_tokens"]) == (0, 9)
    assert plain["stop"] == SETTINGS["until"] and "top_p" not in plain
    assert sampled["messages"] == turns
    assert (sampled["temperature"], sampled["top_p"], sampled["max_tokens"]) == (0.6, 0.9, 9)
    # A prompt that looks like a conversation is a prompt.
    assert text["messages"][0]["role"] == "user" and len(text["messages"]) == 1
    assert text["max_tokens"] == 256 and "stop" not in text


def test_text_ends_before_the_first_stop_string():
    said = "one STOP two\n\nthree"
    with served(lambda _: said) as server:
        until = ["a", "b", "c", "d", "\n\n", "STOP"]
        requests = instances(
            ("a", {"until": until}),
            ("b", {"until": "\n\n"}),
            ("c", {}),
            ("d", {"until": ["", "x"]}),
        )
        found = to(server).generate_until(requests)
    assert found == ["one ", "one STOP two", said, said]
    assert bodies(server)["a"]["stop"] == until[:4]  # OpenAI's server takes no more
    assert bodies(server)["d"]["stop"] == ["x"]


def test_a_seed_belongs_to_what_is_asked():
    def seeds(seed, *arguments):
        with served(says) as server:
            to(server, seed=seed).generate_until(instances(*arguments))
        return {
            (body["messages"][-1]["content"], body["temperature"]): body["seed"]
            for _, _, body in server.requests
        }

    first = seeds(1, ("a", SAMPLED), ("b", SAMPLED), ("a", SETTINGS))
    assert len(set(first.values())) == 3
    assert seeds(1, ("b", SAMPLED), ("c", SAMPLED), ("a", SETTINGS), ("a", SAMPLED)).items() >= (
        first.items()
    )
    assert not set(seeds(2, ("a", SAMPLED), ("b", SAMPLED)).values()) & set(first.values())
    assert all(0 <= seed < 2**31 for seed in first.values())
    # What a task asks several times is drawn several times.
    with served(says) as server:
        to(server, seed=1).generate_until(instances(*[("a", SAMPLED)] * 3))
    repeated = [body["seed"] for _, _, body in server.requests]
    assert len(set(repeated)) == 3 and first["a", 0.6] in repeated


@pytest.mark.parametrize("whose", ["the harness's", "ours"])
def test_a_killed_evaluation_goes_on_from_a_cache(tmp_path, whose):
    requests = instances(*[(f"question {i}", SETTINGS) for i in range(6)])
    broken = [True]

    def breaks(messages):
        return (401, {}, {}) if broken and "3" in messages[-1]["content"] else says(messages)

    def model(server):
        endpoint = Endpoint(server.url, "m", workers=1)
        if whose == "ours":
            return ServedModel(endpoint, tmp_path / "cache")
        return CachingLM(ServedModel(endpoint), str(tmp_path / "cache.db"))

    with served(breaks) as server:
        lm = model(server)
        with pytest.raises(UserError, match="refuses to answer: 401"):
            lm.generate_until(requests)
        if whose != "ours":
            lm.dbdict.close()
        broken.clear()
        server.requests.clear()
        assert model(server).generate_until(requests) == [f"to question {i}" for i in range(6)]
    assert "question 3" in bodies(server)
    assert not {f"question {i}" for i in range(3)} & set(bodies(server))


def test_log_likelihoods_need_a_checkpoint():
    lm = ServedModel(Endpoint("http://localhost:1", "m"))
    asked = [Instance("loglikelihood", {}, ("a", "b"), 0, ("arc_easy", 0, 1))]
    for refuse in (lm.loglikelihood, lm.loglikelihood_rolling):
        with pytest.raises(UserError, match="arc_easy: log-likelihoods .* take a --checkpoint"):
            refuse(asked)


@pytest.mark.parametrize("chat", [False, True])
def test_a_task_of_the_harness_is_graded(tmp_path, chat):
    """Shots and a system message come as turns; the metric is the harness's."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with (tmp_path / "sums.jsonl").open("w") as file:
        for i in range(6):
            file.write(json.dumps({"question": f"{i} + 1 =", "answer": str(i + 1)}) + "\n")
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sums.jsonl")}},
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }

    def adds(messages):
        number = int(messages[-1]["content"].split("\n")[-1].split()[0])
        return f"{number + 1 if number < 3 else 0}\nand so on"

    with served(adds) as server:
        found = lm_eval.simple_evaluate(
            to(server),
            tasks=[task],
            num_fewshot=2,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            system_instruction="Add." if chat else None,
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
            log_samples=False,
        )
    assert found["results"]["sums"]["exact_match,none"] == 0.5
    roles = [[message["role"] for message in body["messages"]] for _, _, body in server.requests]
    assert len(roles) == 6
    turns = ["system", *["user", "assistant"] * 2, "user"] if chat else ["user"]
    assert all(of_one == turns for of_one in roles)
