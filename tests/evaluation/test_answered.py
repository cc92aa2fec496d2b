"""Tasks that are answered in text, several times: what is asked, what counts, what a cache keeps."""

import base64
import dataclasses
import json
import pickle
import zlib

import numpy as np
import pytest
import tiny
from chat_servers import served
from runs import program, run

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from lm_eval.api.model import LM

from mobilellm_jax.data.chat import read_template
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluate import evaluate
from mobilellm_jax.evaluation.answered import answered_tasks, contest_cases
from mobilellm_jax.evaluation.api_calls import grade_turns, turns
from mobilellm_jax.evaluation.api_dialogues import TEST, dialogue
from mobilellm_jax.evaluation.harness import request_seeds
from mobilellm_jax.evaluation.suites import SUITES
from mobilellm_jax.training.checkpoint import load_model


class Says(LM):
    """A model that says what `answer(prompt, sample)` is, and keeps what it was asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.asked = answer, []

    def generate_until(self, requests, disable_tqdm=False):
        told = []
        for instance in requests:
            prompt, settings = instance.args
            self.asked.append((prompt, settings))
            told.append(self.answer(prompt, settings["sample"]))
            self.cache_hook.add_partial("generate_until", instance.args, told[-1])
        return told

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        return json.dumps(chat_history)

    def chat_template(self, _=False):
        return "plain"

    tokenizer_name = "plain"


def written(folder, name, records):
    path = folder / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


PROBLEMS = [
    {"question": "What is 1/2 + 1/4?", "answer": "3/4", "solution": "Add them."},
    {"question": "What is 7 * 6?", "answer": "42"},
]


def test_each_answer_counts_and_right_ones_are_right(tmp_path):
    """Of four answers to each of two problems one and none are right, in the words they are given."""
    written(tmp_path, "sums", PROBLEMS)
    lm = Says(lambda prompt, n: r"So \boxed{0.75}" if "1/4" in prompt and n == 2 else "#### 41")
    lines, _ = evaluate(lm, ["sums"], data=tmp_path, samples=4)
    found = {line.metric: line for line in lines}
    assert found["pass@1"].value == pytest.approx(1 / 8) and found["pass@1"].documents == 2
    assert found["pass@4"].value == pytest.approx(1 / 2)
    # Answers to one problem are no problems of their own: the error is that of two values.
    assert found["pass@1"].standard_error == pytest.approx(np.std([0.25, 0], ddof=1) / 2**0.5)
    assert len(lm.asked) == 8
    assert lm.asked[0][0] == "Question: What is 1/2 + 1/4?\nAnswer:"
    assert {settings["sample"] for _, settings in lm.asked} == set(range(4))
    assert lm.asked[0][1]["until"][0] == "Question:"


def test_a_problem_is_a_message_where_there_is_a_template(tmp_path):
    written(tmp_path, "sums", PROBLEMS)
    lm = Says(lambda prompt, n: "42")
    (line,), _ = evaluate(lm, ["sums"], data=tmp_path, chat=True)
    assert line.value == 0.5
    prompts = [json.loads(prompt) for prompt, _ in lm.asked]
    assert prompts == [[{"role": "user", "content": p["question"]}] for p in PROBLEMS]
    assert not lm.asked[0][1]["until"]


def test_examples_show_their_solution_and_are_others(tmp_path):
    written(tmp_path, "sums", PROBLEMS)
    lm = Says(lambda prompt, n: "42")
    evaluate(lm, ["sums"], data=tmp_path, shots=1)
    shown = {prompt for prompt, _ in lm.asked}
    first, second = (f"Question: {p['question']}\nAnswer:" for p in PROBLEMS)
    assert shown == {f"{second} 42\n\n{first}", f"{first} Add them.\n#### 3/4\n\n{second}"}


def test_a_killed_evaluation_keeps_every_answer_apart(tmp_path):
    """A cache that knows a prompt alone would give all answers to a problem as one."""
    written(tmp_path, "sums", PROBLEMS)

    def unlike(prompt, n):
        return "#### 42" if n % 2 else "#### 3/4"

    whole = evaluate(Says(unlike), ["sums"], data=tmp_path, samples=3)[0]

    def killed(prompt, n):
        if len(broken.asked) > 4:
            raise KeyboardInterrupt
        return unlike(prompt, n)

    broken, cache = Says(killed), str(tmp_path / "cache")
    with pytest.raises(KeyboardInterrupt):
        evaluate(broken, ["sums"], data=tmp_path, samples=3, cache=cache)
    again = Says(unlike)
    assert evaluate(again, ["sums"], data=tmp_path, samples=3, cache=cache)[0] == whole
    assert len(again.asked) == 2


def test_draws_follow_from_what_is_asked():
    """Not from the place in a list, which is another one when an evaluation goes on."""

    class Request:
        def __init__(self, prompt, n):
            self.args = prompt, {"sample": n}

    asked = [Request(p, n) for p in ("a", "b") for n in range(8)]
    seeds = request_seeds(3, asked)
    assert len(set(seeds)) == 16
    assert request_seeds(3, asked[5:]) == seeds[5:]
    assert len(set(request_seeds(3, [asked[0]] * 4))) == 4  # the harness repeats a request as it is
    assert request_seeds(4, asked) != seeds


@pytest.fixture(scope="module")
def chatting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run(tiny.config(tiny.corpus(folder / "data"), steps=6), folder / "run")
    loaded = load_model(folder / "run")
    template = {"chat_template": read_template("chatml")}
    return dataclasses.replace(loaded, tokenizer=dataclasses.replace(loaded.tokenizer, **template))


def test_a_network_answers_what_its_context_leaves_room_for(tmp_path, chatting):
    """30,000 tokens are asked for, of a network with a context of 128."""
    written(tmp_path, "sums", PROBLEMS)
    _, results = evaluate(chatting, ["sums"], data=tmp_path, chat=True, samples=2, log=True)
    assert results["cut"] == {"prompts cut": 0, "answers limited": 4}
    samples = results["sums"]["samples"]["sums"]
    assert [len(sample["resps"]) for sample in samples] == [2, 2]
    assert samples[0]["arguments"][0][0].endswith("<|im_start|>assistant\n")


def hidden(cases):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


READS = {
    "question_id": "one",
    "question_content": "Print the sum of two numbers.",
    "starter_code": "",
    "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
    "private_test_cases": hidden([{"input": "-1 -2\n", "output": "-3\n", "testtype": "stdin"}]),
    "metadata": "{}",
}
CALLED = {
    "question_id": "two",
    "question_content": "Sort a list, rising or falling.",
    "starter_code": "class Solution:\n    def put(self, a: List[int], up: bool) -> List[int]:\n",
    "public_test_cases": json.dumps(
        [{"input": "[3, 1]\ntrue", "output": "[1, 3]", "testtype": "functional"}]
    ),
    "private_test_cases": json.dumps(
        [{"input": "[3, 1]\nfalse", "output": "[3, 1]", "testtype": "functional"}]
    ),
    "metadata": json.dumps({"func_name": "put"}),
}


@pytest.mark.usefixtures("isolating")
def test_programs_pass_all_cases_or_none(tmp_path):
    """Public and hidden ones, that read and print and that are called."""
    written(
        tmp_path / "livecodebench" / "code_generation_lite" / "release_v6", "test", [READS, CALLED]
    )
    method = (
        "class Solution:\n    def put(self, a: List[int], up: bool) -> List[int]:\n        return "
    )
    right = {
        "sum": "print(sum(map(int, input().split())))",
        "Sort": method + "sorted(a, reverse=not up)",
    }
    wrong = {"sum": "print(3)", "Sort": method + "sorted(a)"}

    def answer(prompt, n):
        code = next((right if n else wrong)[word] for word in right if word in prompt)
        return f"Like this:\n```python\n{code}\n```"

    lm = Says(answer)
    lines, _ = evaluate(lm, ["livecodebench"], data=tmp_path, chat=True, samples=2, allow_code=True)
    assert {line.metric: line.value for line in lines} == {"pass@1": 0.5, "pass@2": 1.0}
    assert "def put(self" in lm.asked[2][0] and "standard input" in lm.asked[0][0]


def test_cases_that_would_run_something_are_refused():
    harmful = base64.b64encode(zlib.compress(pickle.dumps(print))).decode()
    with pytest.raises(UserError, match="'one' cannot be read .*is no text"):
        contest_cases({**READS, "private_test_cases": harmful})
    with pytest.raises(UserError, match="'one' cannot be read"):
        contest_cases({**READS, "private_test_cases": "!"})
    assert len(contest_cases(READS)) == 2


def test_programs_are_not_run_unasked():
    with pytest.raises(UserError, match="livecodebench run programs .* --allow_code"):
        evaluate(Says(None), ["livecodebench"])


def test_dialogues_with_functions_are_graded_turn_by_turn(tmp_path):
    """Who says what really was said has all, who says the first call always has less."""
    made = [dialogue(0, TEST, i) for i in range(6)]
    written(tmp_path, "api", made)
    truth = {
        json.dumps(d["messages"][:i]): message["content"]
        for d in made
        for i, message in enumerate(d["messages"])
    }
    lm = Says(lambda prompt, n: truth[prompt])
    lines, _ = evaluate(lm, ["api"], data=tmp_path, chat=True, samples=3)
    assert len(lm.asked) == len(set(prompt for prompt, _ in lm.asked))  # once: nothing is drawn
    assert {line.metric: line.value for line in lines} == dict.fromkeys(
        ("EM_intent", "EM_structure", "R1", "RL"), 1.0
    )
    one = next(text for text in truth.values() if text.startswith("PARSER"))
    lines, _ = evaluate(Says(lambda prompt, n: one), ["api"], data=tmp_path, chat=True)
    found = {line.metric: line.value for line in lines}
    assert 0 < found["EM_structure"] <= found["EM_intent"] < 1 and found["R1"] == 0
    graded = [turn for d in made for turn in turns(d["messages"], d["id"])]
    by_hand = grade_turns(graded, [one] * len(graded))
    for line in lines:  # over dialogues, whose turns are not independent
        assert line.standard_error == pytest.approx(by_hand[line.metric].standard_error)
    with pytest.raises(UserError, match="api holds conversations: --chat"):
        evaluate(Says(lambda prompt, n: one), ["api"], data=tmp_path)


def test_a_file_without_a_turn_of_the_assistant_is_told(tmp_path):
    written(tmp_path, "api", [{"messages": [{"role": "user", "content": "Hello"}]}])
    with pytest.raises(UserError, match=r"no message of .*api.jsonl"):
        evaluate(Says(None), ["api"], data=tmp_path, chat=True)


def test_the_suite_of_final_models_asks_as_its_authors_do(tmp_path):
    """One line of each of its data sets; no example, a chat, the paper's number of answers."""
    for name, record in (
        ("HuggingFaceH4/MATH-500/test", {"problem": "1 + 1?", "answer": "2", "solution": "2"}),
        ("openai/gsm8k/main/test", {"question": "1 + 1?", "answer": "It is 2.\n#### 2"}),
        ("Maxwell-Jia/AIME_2024/train", {"Problem": "1 + 1?", "Answer": 2}),
        ("math-ai/aime25/test", {"problem": "1 + 1?", "answer": "2"}),
    ):
        written(tmp_path, name, [record])
    entries = SUITES["r1_final"]
    assert {e.task for e in entries} <= set(answered_tasks())
    lm = Says(lambda prompt, n: r"\boxed{2}")
    for entry in entries[:-1]:
        lines, _ = evaluate(lm, [entry.task], data=tmp_path, chat=True, samples=entry.samples)
        assert [line.value for line in lines] == [1.0] * (2 if entry.samples else 1)
    assert len(lm.asked) == 1 + 1 + 64 + 64
    (prompt, settings) = lm.asked[-1]
    assert json.loads(prompt) == [{"role": "user", "content": "1 + 1?"}]
    assert (settings["temperature"], settings["top_p"], settings["max_gen_toks"]) == (
        0.6,
        0.95,
        30_000,
    )


def test_the_program_asks_a_server_and_keeps_what_it_said(tmp_path):
    written(tmp_path, "sums", PROBLEMS)
    out = tmp_path / "out"
    flags = ["--tasks=sums", f"--data={tmp_path}", "--chat", "--samples=2", f"--out={out}"]
    with served(lambda messages: "42" if "7" in messages[-1]["content"] else "no idea") as server:
        where = [f"--server={server.url}", "--server_model=mine"]
        ended = program("mobilellm_jax.evaluate", *where, *flags, "--log_samples")
        assert ended.status == 0, ended.err
        again = program("mobilellm_jax.evaluate", *where, *flags)
        few = ["--limit=1", f"--out={tmp_path / 'one'}"]
        program("mobilellm_jax.evaluate", *where, *flags[:-1], *few)
    assert "| sums | 0 | pass@1 | 0.5000 | 0.5000 | 2 |" in ended.out
    assert len(server.requests) == 4 + 2
    seeds = {body["seed"] for _, _, body in server.requests}
    assert len(seeds) == 4  # each answer has draws of its own
    samples = [json.loads(line) for line in (out / "samples_sums.jsonl").open()]
    assert [sample["resps"] for sample in samples] == [[["no idea"]] * 2, [["42"]] * 2]
    results = json.loads((out / "results.json").read_text())
    assert results["subject"] == f"mine at {server.url}"
    assert again.status == 1 and "holds results already" in again.err
    # A single problem has no standard error, of which JSON knows but null.
    one = json.loads((tmp_path / "one" / "results.json").read_text(), parse_constant=pytest.fail)
    assert [line["standard_error"] for line in one["lines"]] == [None, None]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "name either --checkpoint or --server"),
        (["--checkpoint=a", "--server=b"], "name either --checkpoint or --server"),
        (["--checkpoint=a", "--tasks="], "nothing is asked: name --tasks, or --stores"),
        (["--server=http://localhost:1"], "--server needs --server_model"),
        (["--checkpoint=a", "--log_samples"], "--log_samples needs --out"),
    ],
)
def test_the_program_says_what_is_missing(flags, said):
    ended = program("mobilellm_jax.evaluate", *flags)
    assert ended.status == 1 and said in ended.err
