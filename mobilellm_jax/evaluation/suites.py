"""Named groups of tasks, each with the shots and the metric that are reported, and what the papers report.

The papers publish neither prompts nor which accuracy they mean. Of lm-evaluation-harness's, the one
that is normalised by length comes nearest for ARC, PIQA, HellaSwag and OpenBookQA.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Entry:
    """A task of a suite."""

    task: str  # the harness's name of it
    metric: str  # the one that is reported, `name,filter`
    label: str  # in tables
    shots: int | None = 0  # examples before each question; None: as many as the task says
    averaged: bool = False  # counts in the suite's average
    runs_code: bool = False  # runs what the model writes, and so has to be asked for
    chat: bool = False  # asked through the chat template
    samples: int | None = None  # answers to each problem, where it is to be answered several times


@dataclasses.dataclass(frozen=True)
class Line:
    """A figure that was measured, with its standard error, nan where there is none.

    `parts` are the labels of what it is the mean of, where it is a suite's.
    """

    label: str
    shots: int
    metric: str
    value: float
    standard_error: float
    documents: int = 0
    parts: tuple[str, ...] = ()


COMMONSENSE = (
    Entry("arc_easy", "acc_norm,none", "ARC-e", averaged=True),
    Entry("arc_challenge", "acc_norm,none", "ARC-c", averaged=True),
    Entry("boolq", "acc,none", "BoolQ", averaged=True),
    Entry("piqa", "acc_norm,none", "PIQA", averaged=True),
    Entry("social_iqa", "acc,none", "SIQA", averaged=True),
    Entry("hellaswag", "acc_norm,none", "HellaSwag", averaged=True),
    Entry("openbookqa", "acc_norm,none", "OBQA", averaged=True),
    Entry("winogrande", "acc,none", "WinoGrande", averaged=True),
)

_LABELLED = {entry.label: entry for entry in COMMONSENSE}
# Adapt-Pruner's code asks these of networks that it prunes; BoolQ is not among them.
_ADAPT = tuple(entry for entry in COMMONSENSE if entry.label != "BoolQ")

SUITES: Mapping[str, tuple[Entry, ...]] = {
    # MobileLLM, table 3.
    "commonsense": COMMONSENSE,
    # MobileLLM, table 4.
    "mobilellm": (
        Entry("triviaqa", "exact_match,remove_whitespace", "TriviaQA", shots=1),
        Entry("race", "acc,none", "RACE"),
    ),
    # Adapt-Pruner, section 4 and the figures of its README.
    "adapt_pruner": (*_ADAPT, Entry("mmlu", "acc,none", "MMLU", shots=5)),
    # EfficientLLM, table 2, without examples. Its figure for TinyLlama's ARC-e, 60.4, is that which is not
    # normalised: TinyLlama's authors give 55.3 normalised, and as it does for all other tasks. Its MMLU of
    # 26 to 30 for networks of 125M says that the answers themselves are scored, not their letters. Both have
    # labels of their own, by which no figure that was measured otherwise stands beside them.
    "efficientllm": (
        Entry("mmlu_continuation", "acc,none", "MMLU, answers"),
        _LABELLED["ARC-c"],
        dataclasses.replace(_LABELLED["ARC-e"], metric="acc,none", label="ARC-e, acc"),
        *(_LABELLED[label] for label in ("BoolQ", "HellaSwag", "OBQA", "PIQA", "WinoGrande")),
    ),
    # MobileLLM-R1, table 6.
    "r1_base": (
        Entry("minerva_math500", "math_verify,none", "MATH-500", shots=4),
        Entry("gsm8k", "exact_match,flexible-extract", "GSM8K", shots=8),
        Entry("mbpp", "pass_at_1,none", "MBPP", shots=3, runs_code=True),
        Entry("humaneval", "pass@1,create_test", "HumanEval", runs_code=True),
        *COMMONSENSE,
        Entry("mmlu", "acc,none", "MMLU", shots=5),
    ),
    # MobileLLM-R1, table 7: no examples, the question alone as a message of the user.
    "r1_final": (
        Entry("math500_answers", "pass@1,none", "MATH-500", chat=True),
        Entry("gsm8k_answers", "pass@1,none", "GSM8K", chat=True),
        Entry("aime24_answers", "pass@1,none", "AIME'24", chat=True, samples=64),
        Entry("aime25_answers", "pass@1,none", "AIME'25", chat=True, samples=64),
        Entry("livecodebench", "pass@1,none", "LiveCodeBench", chat=True, samples=16),
    ),
}

AVERAGE = "average"

# In per cent: MobileLLM, table 3; MobileLLM-R1, tables 6 (base models) and 7 (final ones).
_COLUMNS = (*(entry.label for entry in COMMONSENSE), AVERAGE)
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    name: dict(zip(_COLUMNS, row, strict=True))
    for name, row in {
        "MobileLLM-125M": (43.9, 27.1, 60.2, 65.3, 42.4, 38.9, 39.5, 53.1, 46.3),
        "MobileLLM-LS-125M": (45.8, 28.7, 60.4, 65.7, 42.9, 39.5, 41.1, 52.1, 47.0),
        "MobileLLM-350M": (53.8, 33.5, 62.4, 68.6, 44.7, 49.6, 40.0, 57.6, 51.3),
        "MobileLLM-LS-350M": (54.4, 32.5, 62.8, 69.8, 44.1, 50.6, 45.8, 57.2, 52.1),
        "MobileLLM-600M": (58.1, 35.8, 61.0, 72.3, 44.9, 55.9, 47.9, 58.6, 54.3),
    }.items()
} | {
    "MobileLLM-R1-140M-base": {"MATH-500": 4.6, "GSM8K": 16.3, "MBPP": 5.4, "HumanEval": 15.9}
    | {AVERAGE: 44.3},
    "MobileLLM-R1-360M-base": {"MATH-500": 13.4, "GSM8K": 39.4, "MBPP": 20.8, "HumanEval": 32.9}
    | {AVERAGE: 51.0, "MMLU": 26.8},
    "MobileLLM-R1-950M-base": {"MATH-500": 26.8, "GSM8K": 61.6, "MBPP": 39.2, "HumanEval": 46.3}
    | {AVERAGE: 58.6, "MMLU": 47.4},
    "MobileLLM-R1-140M": {"MATH-500": 6.2, "GSM8K": 4.1, "LiveCodeBench": 1.7},
    "MobileLLM-R1-360M": {"MATH-500": 28.4, "GSM8K": 24.5, "LiveCodeBench": 5.1},
    "MobileLLM-R1-950M": {"MATH-500": 74.0, "GSM8K": 67.5, "LiveCodeBench": 19.9}
    | {"AIME'24": 15.5, "AIME'25": 16.3},
}
