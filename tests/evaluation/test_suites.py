"""Every suite, whole, from local files in the layout of the hub, asked of a model that knows the answers."""

import json

import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from lm_eval.api.model import LM

from mobilellm_jax.evaluate import evaluate
from mobilellm_jax.evaluation.suites import AVERAGE, SUITES

RIGHT = "the right one"
CHOICES = {"text": [RIGHT, "something else"], "label": ["A", "B"]}
ARC = {"question": "Which?", "choices": CHOICES, "answerKey": "A"}
FUNCTION = "def one():\n    return 1\n"
COMMONSENSE = {
    "allenai/ai2_arc/ARC-Easy": ARC,
    "allenai/ai2_arc/ARC-Challenge": ARC,
    "aps/super_glue/boolq": {"passage": "It is.", "question": "is it", "label": 1},
    "baber/piqa": {"goal": "Do it", "sol1": "wrong", "sol2": RIGHT, "label": 1},
    "lighteval/siqa": {
        "context": "They do.",
        "question": "Why?",
        "answerA": "no",
        "answerB": "nor this",
        "answerC": RIGHT,
        "label": "3",
    },
    "Rowan/hellaswag": {
        "ctx_a": "One",
        "ctx_b": "two",
        "activity_label": "Counting",
        "endings": ["a", "b", RIGHT, "c"],
        "label": "2",
    },
    "allenai/openbookqa/main": {
        "question_stem": "It is",
        "choices": CHOICES,
        "answerKey": "A",
    },
    "allenai/winogrande/winogrande_xl": {
        "sentence": f"{RIGHT} and _ are here",
        "option1": RIGHT,
        "option2": "nobody",
        "answer": "1",
    },
}
OTHERS = {
    "mandarjoshi/trivia_qa/rc.nocontext": {
        "question": "Who",
        "answer": {"aliases": [RIGHT], "value": RIGHT},
    },
    "EleutherAI/race/high": {
        "article": "Long.",
        "problems": repr(
            [{"question": "Who?", "options": ["a", RIGHT, "b", "c"], "answer": "B"}],
        ),
    },
}
BASE = {
    "HuggingFaceH4/MATH-500/default": {
        "problem": "1 + 1?",
        "solution": r"It is $\boxed{2}$.",
        "answer": "2",
    },
    "openai/gsm8k/main": {"question": "1 + 1?", "answer": "It is 2.\n#### 2"},
    "google-research-datasets/mbpp/full": {
        "task_id": 11,
        "text": "Write one.",
        "code": FUNCTION,
        "test_list": ["assert one() == 1"] * 3,
    },
    "openai/openai_humaneval": {
        "task_id": "0",
        "prompt": "def one():\n",
        "canonical_solution": "    return 1\n",
        "test": "def check(f):\n    assert f() == 1\n",
        "entry_point": "one",
    },
}


class Knows(LM):
    """Finds what is right most likely, and writes it where it is asked to write."""

    def loglikelihood(self, requests, disable_tqdm=False):
        right = RIGHT, " yes", " A"
        return [(0.0 if any(r in i.args[1] for r in right) else -9.0, False) for i in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def generate_until(self, requests, disable_tqdm=False):
        return [self.written(instance.args[0]) for instance in requests]

    def written(self, prompt):
        if "Python programmer" in prompt:
            return FUNCTION
        if prompt.startswith("def"):
            return "    return 1\n"
        return RIGHT if "Who" in prompt else r"The final answer is $\boxed{2}$. #### 2"


def hub(folder, *groups):
    """Like examples in each split of data sets; one to be asked, if there is a test."""
    counts = {"train": 10, "dev": 10, "validation": 3, "test": 1}
    for name, record in [item for group in groups for item in group.items()]:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, count in counts.items():
            rows = ({**record, "row": f"{split} {i}"} for i in range(count))
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name / f"{split}.jsonl").write_text(text)
    return folder


@pytest.mark.slow
def test_commonsense_and_mobilellm_from_local_files(tmp_path):
    data = hub(tmp_path, COMMONSENSE, OTHERS)
    lines, _ = evaluate(Knows(), ["commonsense", "mobilellm"], data=data)
    labels = [entry.label for suite in ("commonsense", "mobilellm") for entry in SUITES[suite]]
    assert {line.label: line.value for line in lines} == dict.fromkeys([*labels, AVERAGE], 1.0)
    by = {line.label: line for line in lines}
    assert by["TriviaQA"].shots == 1 and by["RACE"].shots == 0
    assert by[AVERAGE].documents == 3 * 1 + 5 * 3 and by[AVERAGE].metric == "commonsense, mean of 8"


@pytest.mark.slow
@pytest.mark.usefixtures("isolating")
def test_r1_base_from_local_files(tmp_path):
    mmlu = {"question": "Which?", "choices": ["A", "B", "C", "D"], "answer": 0, "subject": "any"}
    from lm_eval.tasks.mmlu._generate_configs import SUBJECTS

    names = {f"cais/mmlu/{name}": mmlu for name in SUBJECTS}
    data = hub(tmp_path, COMMONSENSE, BASE, names)
    lines, _ = evaluate(Knows(), ["r1_base"], data=data, allow_code=True)
    labels = [entry.label for entry in SUITES["r1_base"]]
    assert {line.label: line.value for line in lines} == dict.fromkeys([*labels, AVERAGE], 1.0)
    shots = {line.label: line.shots for line in lines}
    assert [shots[n] for n in ("MATH-500", "GSM8K", "MBPP", "HumanEval")] == [4, 8, 3, 0]


def test_a_label_that_is_published_of_base_models_means_one_way_to_measure():
    """Or a figure of the papers would stand beside one of another task, metric or number of examples."""
    ways = {}
    for name, entries in SUITES.items():
        if name != "r1_final":  # whose labels are those of another table, of final models
            for e in entries:
                ways.setdefault(e.label, set()).add((e.task, e.metric, e.shots))
    assert {label: found for label, found in ways.items() if len(found) > 1} == {}
