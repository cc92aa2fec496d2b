r"""Tasks whose answers are written out, of which a problem may have several: mathematics, programs, calls.

Each answer is a request of its own, with its number among the settings, so that the harness's cache
keeps them apart and each has draws of its own. Reported are

    pass@1      share of right answers, averaged over the answers to a problem and over problems
    pass@N      chance that one of N answers is right, where N are asked for

A problem is put as one message of the user where the chat template is used, else as
`Question: ...\nAnswer:` with as many examples as asked for.
"""

import base64
import concurrent.futures
import functools
import io
import json
import os
import pickle
import zlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import datasets
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import ConfigurableTask

from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation import api_calls
from mobilellm_jax.evaluation.code_answers import call_tests, extract_code, grade_cases, grade_tests
from mobilellm_jax.evaluation.function_calls import dialogues
from mobilellm_jax.evaluation.math_answers import Grader
from mobilellm_jax.evaluation.scores import mean_score, pass_at_k

Message = api_calls.Message
Config = dict[str, Any]

# As the authors of MobileLLM-R1 draw answers (their evaluation script). The temperature alone says
# that they are drawn: with `do_sample` the harness would not keep them in its cache.
_DRAWS = {"temperature": 0.6, "top_p": 0.95, "max_gen_toks": 30_000}
_NEXT = ["Question:", "</s>", "<|im_end|>"]  # ends an answer that no chat template ends
_PROGRAM = (
    "Solve this problem with a program in Python. Put the whole program into one block that begins "
    "with ```python and ends with ```.{how}\n\n{question}"
)
_READS = " It reads from standard input and prints to standard output."
# What the programs of contests take for granted, their starting code (`List[int]`) among them.
_IMPORTS = """\
import bisect, collections, copy, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from operator import *
from typing import *
from builtins import *
"""
_COMPLETES = " Complete this, and change no name in it:\n\n```python\n{starter}\n```"


class Answered(ConfigurableTask):
    """A task of problems with answers that are written out and graded one by one."""

    several = True  # a problem may have several answers

    def __init__(self, config: Config) -> None:
        """Loads the data; `config` is the harness's of a task, with its class."""
        super().__init__(config={key: value for key, value in config.items() if key != "class"})

    def conversation(self, doc: Mapping[str, Any]) -> list[Message]:
        """What is said before an answer."""
        return [{"role": "user", "content": question(doc)}]

    def right(self, doc: Mapping[str, Any], answers: Sequence[str]) -> list[bool]:
        """Which answers to a problem are right."""
        raise NotImplementedError

    def fewshot_context(self, doc: Any, **how: Any) -> Any:
        """The prompt: the conversation itself where the chat template is used without examples."""
        if how.get("apply_chat_template") and not how["num_fewshot"]:
            return how["chat_template"](self.conversation(doc))
        return super().fewshot_context(doc, **how)

    def construct_requests(self, doc: Any, ctx: Any, **kwargs: Any) -> list[Instance]:
        """A request for each answer."""
        kwargs.pop("chat_template", None)
        ends = [] if kwargs.pop("apply_chat_template", False) else _NEXT
        name, number, count = kwargs.pop("metadata")
        settings = {**(self.config.generation_kwargs or {}), "until": ends}
        return [
            Instance(
                request_type="generate_until",
                doc=doc,
                arguments=(ctx, settings | {"sample": i}),
                idx=i,
                metadata=(name, number, 1),  # the harness would repeat each again
                **kwargs,
            )
            for i in range(count)
        ]

    def process_results(self, doc: Any, results: Any) -> dict[str, float]:
        """The figures of one problem."""
        marks = self.right(doc, results)
        found = {"pass@1": sum(marks) / len(marks)}
        if len(marks) > 1:
            found[f"pass@{len(marks)}"] = pass_at_k(len(marks), sum(marks), len(marks))
        return found

    def aggregation(self) -> dict[str, Any]:
        """Means over problems."""
        return dict.fromkeys(self._names(), mean)

    def higher_is_better(self) -> dict[str, bool]:
        """All are shares."""
        return dict.fromkeys(self._names(), True)

    def _names(self) -> list[str]:
        count = self.config.repeats
        return ["pass@1", *([f"pass@{count}"] if count > 1 else [])]


class MathProblems(Answered):
    """Problems of mathematics, whose final answers are compared by math-verify."""

    @functools.cached_property
    def _grader(self) -> Grader:
        return Grader()

    def right(self, doc: Mapping[str, Any], answers: Sequence[str]) -> list[bool]:
        """See `Answered`."""
        return [self._grader.grade(text, answer(doc)).correct for text in answers]


class Programs(Answered):
    """Problems of LiveCodeBench's format, whose programs are run in the sandbox on all their cases."""

    def conversation(self, doc: Mapping[str, Any]) -> list[Message]:
        """See `Answered`."""
        starter = doc.get("starter_code") or ""
        how = _COMPLETES.format(starter=starter.rstrip()) if starter.strip() else _READS
        text = _PROGRAM.format(how=how, question=doc["question_content"].strip())
        return [{"role": "user", "content": text}]

    def right(self, doc: Mapping[str, Any], answers: Sequence[str]) -> list[bool]:
        """See `Answered`."""
        cases = contest_cases(doc)
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            return list(pool.map(lambda text: _passes(extract_code(text), doc, cases), answers))


class Dialogues(Answered):
    """The assistant's turns in dialogues with functions, each told what was really said before it."""

    several = False  # each is answered once, with the likeliest tokens

    def conversation(self, doc: Mapping[str, Any]) -> list[Message]:
        """See `Answered`."""
        messages: list[Message] = json.loads(doc["messages"])
        return messages

    def fewshot_context(self, doc: Any, **how: Any) -> Any:
        """See `Answered`."""
        if not how.get("apply_chat_template"):
            raise UserError(
                f"{self.config.task} holds conversations: --chat puts them through the chat template."
            )
        return super().fewshot_context(doc, **{**how, "num_fewshot": 0})

    def process_results(self, doc: Any, results: Any) -> dict[str, Any]:
        """The figures of one turn, of a call or of a reply, and again with its dialogue for their errors."""
        turn = api_calls.Turn(self.conversation(doc), doc["expected"], doc["dialogue"])
        found = {name: score.mean for name, score in api_calls.grade_turns([turn], results).items()}
        return found | {f"{name}_stderr": (mark, turn.dialogue) for name, mark in found.items()}

    def aggregation(self) -> dict[str, Any]:
        """Means over turns, and their standard errors over dialogues in the place of the harness's own.

        Those take the turns of a dialogue as independent.
        """
        return super().aggregation() | {f"{name}_stderr": _clustered for name in self._names()}

    def _names(self) -> list[str]:
        return ["EM_intent", "EM_structure", "R1", "RL"]


def _clustered(marks: Sequence[tuple[float, Hashable]]) -> float:
    """The standard error of a mean of marks, of which those of one dialogue are not independent."""
    values, dialogues = zip(*marks, strict=True)
    return mean_score(values, dialogues).standard_error


def answered_tasks() -> dict[str, Config]:
    """The tasks that suites name, as configurations of the harness, by name."""
    contest = "livecodebench/code_generation_lite", "release_v6"
    found = {
        "math500_answers": _problems(MathProblems, dataset_path="HuggingFaceH4/MATH-500"),
        "gsm8k_answers": _problems(MathProblems, dataset_path="openai/gsm8k", dataset_name="main"),
        "aime24_answers": _problems(
            MathProblems, dataset_path="Maxwell-Jia/AIME_2024", test_split="train"
        ),
        "aime25_answers": _problems(MathProblems, dataset_path="math-ai/aime25"),
        "livecodebench": _problems(
            Programs,
            dataset_path=contest[0],
            dataset_name=contest[1],
            doc_to_target="{{question_id}}",
            unsafe_code=True,
        ),
    }
    return {name: {"task": name, **config} for name, config in found.items()}


def problem_file(name: str, path: str) -> Config:
    """The task of a file of problems of mathematics (see `local_data`)."""
    files = {"data_files": {"test": path}}
    found = _problems(MathProblems, dataset_path="json", dataset_kwargs=files, fewshot_split="test")
    return {"task": name, **found}


def dialogue_file(name: str, path: str) -> Config:
    """The task of a file of dialogues with functions (see `local_data`)."""

    def turns(**_: Any) -> dict[str, datasets.Dataset]:
        graded = [t for d in dialogues(path) for t in api_calls.turns(d["messages"], d["id"])]
        if not graded:
            raise UserError(f"no message of {path} is one of an assistant that calls or answers.")
        rows = [
            {"messages": json.dumps(t.messages), "expected": t.expected, "dialogue": t.dialogue}
            for t in graded
        ]
        return {"test": datasets.Dataset.from_list(rows)}

    greedy = {"do_sample": False, "max_gen_toks": 256}
    found = _problems(
        Dialogues,
        custom_dataset=turns,
        doc_to_text="{{messages}}",
        doc_to_target="{{expected}}",
        generation_kwargs=greedy,
    )
    return {"task": name, **found}


def _problems(kind: type[Answered], **settings: Any) -> Config:
    return {
        "class": kind,
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": lambda doc: f"Question: {question(doc)}\nAnswer:",
        "doc_to_target": worked,
        "generation_kwargs": dict(_DRAWS),
        "repeats": 1,
        "metric_list": [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}],
        "process_results": lambda doc, results: {},  # the class's own are used
        "metadata": {"version": 1.0},
        **settings,
    }


def question(doc: Mapping[str, Any]) -> str:
    """What a problem asks, under any of the names that data sets have for it."""
    return str(_first(doc, "question", "problem", "context", "question_content")).strip()


def answer(doc: Mapping[str, Any]) -> str:
    """The answer to a problem, or a solution that states it."""
    return str(_first(doc, "answer")).strip()


def worked(doc: Mapping[str, Any]) -> str:
    """An answer as an example shows it: with its solution where there is one."""
    solution = _first(doc, "solution", "chain_of_thought", default="")
    return f"{str(solution).strip()}\n#### {answer(doc)}" if solution else answer(doc)


def _first(doc: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    lower = {key.lower(): value for key, value in doc.items()}
    found = (lower[name] for name in names if lower.get(name) is not None)
    value = next(found, default)
    if value is None:
        raise UserError(f"a problem has no {' or '.join(names)}, but {', '.join(doc)}.")
    return value


def contest_cases(doc: Mapping[str, Any]) -> list[dict[str, str]]:
    """The public and private cases of a problem of LiveCodeBench: `input`, `output`, `testtype`.

    Private ones are JSON, or JSON that is pickled, compressed and written in base 64.

    Raises:
      UserError: they are neither.
    """
    try:
        private = doc.get("private_test_cases") or "[]"
        try:
            hidden = json.loads(private)
        except ValueError:
            packed = zlib.decompress(base64.b64decode(private))
            hidden = json.loads(_Texts(io.BytesIO(packed)).load())
        return [*json.loads(doc["public_test_cases"]), *hidden]
    except (KeyError, ValueError, TypeError, zlib.error, pickle.UnpicklingError) as error:
        raise UserError(
            f"the cases of the problem {doc.get('question_id')!r} cannot be read "
            f"({type(error).__name__}: {error})."
        ) from None


class _Texts(pickle.Unpickler):
    """Unpickles texts and nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is no text")


def _passes(program: str, doc: Mapping[str, Any], cases: Sequence[Mapping[str, str]]) -> bool:
    """Whether a program passes all cases, of which those of a problem are of one kind."""
    if not cases:
        raise UserError(f"the problem {doc.get('question_id')!r} has no cases.")
    program = _with_imports(program)
    if cases[0]["testtype"] == "stdin":
        pairs = [(case["input"], case["output"]) for case in cases]
        return grade_cases(program, pairs, allowed=True)
    function = json.loads(doc["metadata"])["func_name"]
    calls = [
        ([json.loads(line) for line in case["input"].splitlines()], json.loads(case["output"]))
        for case in cases
    ]
    # One case after another, each with the time of one that reads.
    return all(
        grade_tests(
            [program], [call_tests(f"Solution().{function}", [call])], allowed=True, workers=1
        )[0].passed
        for call in calls
    )


def _with_imports(program: str) -> str:
    """With `_IMPORTS` before everything but what has to be first."""
    lines = program.splitlines(keepends=True)
    at = max(
        (i + 1 for i, line in enumerate(lines) if line.startswith("from __future__")), default=0
    )
    return "".join([*lines[:at], _IMPORTS, *lines[at:]])
