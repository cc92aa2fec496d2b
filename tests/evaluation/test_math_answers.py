"""The answer of a response is found, and equals a reference if it means the same."""

import contextlib
import importlib.util
import threading
import time

import pytest

from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation import math_answers
from mobilellm_jax.evaluation.math_answers import Grader, grade, last_boxed, stated_answer

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="needs math-verify"
)


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so \boxed{18}.", "18"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}} is it", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\text{a}\}}", r"\text{a}\}"),
        (r"\fbox {3}", "3"),
        (r"$\boxed 7$", "7"),
        (r"\boxed{1}, or \boxed{\frac{1", "1"),  # cut off
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{}", ""),
        ("18", None),
        (r"\boxed{", None),
        pytest.param("\\boxed{" * 20_000 + "5}", "5", id="thousands of boxes, one pass"),
        ("", None),
    ],
)
def test_the_last_closed_box_counts(text, boxed):
    assert last_boxed(text) == boxed


def test_a_box_goes_before_hashes_and_the_last_hashes_count():
    assert stated_answer("#### 17\n#### 18.\nNext") == "18"
    assert stated_answer("\\boxed{3}\n#### 18") == "3"
    assert stated_answer("The answer is 18.") is None


EQUAL = [
    (r"\frac{1}{2}", ["0.5", r"\frac12", "1/2", r"\dfrac{1}{2}", r"\frac{2}{4}", r"\frac 1 2"]),
    (
        "1234",
        ["1,234", "1{,}234", "1234.0", r"\$1,234", "$1,234$", "1,234 dollars", r"1234\text{ m}"],
    ),
    ("50", [r"50\%", "50%", "50.00", "50 percent"]),
    (r"0.5", [r"50\%", "50%"]),
    (r"12.5\%", ["12.5", r"0.125", r"\frac{1}{8}", "12.50%"]),
    (r"2\sqrt{3}", [r"\sqrt{12}", r"\sqrt{3}\cdot 2"]),
    ("(x+1)^2", ["x^2+2x+1", "(1+x)(x+1)"]),
    (r"\{1,2\}", [r"\{2,1\}"]),
    ("(3, -2)", ["(3,-2)", r"\left(3, -2\right)"]),
    ("90", [r"90^\circ", r"90^{\circ}"]),
    ("5", ["x=5", "x = 5", "5.", "+5"]),
    (r"\text{(C)}", ["C", r"\text{C}", "(C)"]),
    (r"\text{Evelyn}", ["Evelyn", r"\textbf{Evelyn}"]),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"]),
    (r"\frac{11}{4}", ["2 3/4", r"2\frac{3}{4}", r"2 \frac34", "2.75"]),
    ("1 1/2", ["3/2", "1.5", "1  1 / 2"]),
    ("10000", ["10 000", r"10\,000"]),
    ("A full solution.\n#### 1,000", ["1000"]),
    (r"A full solution in \boxed{\frac{3}{4}}.", ["0.75"]),
]
DIFFERENT = [
    ("18", ["19", "180", "-18", "1.8", r"\text{eighteen hundred}", "18x", "18 + 1"]),
    ("(1,2)", ["(2,1)", "[1,2]", "1"]),
    (r"\frac{1}{3}", ["0.3", "3"]),
    ("50%", ["0.5%", "5", "0.05", r"5000\%"]),
    (r"\text{(C)}", ["D", r"\text{(D)}"]),
    ("5 dollars", ["6 dollars"]),
    (r"\{1,2\}", [r"\{1,2,3\}"]),
    ("11/2", ["1 1/2"]),
    ("12", ["1 2"]),
]


@pytest.fixture(scope="module")
def graded():
    """Grades in one process of comparisons, which takes seconds to start."""
    with contextlib.closing(Grader()) as grader:
        yield lambda responses, references: [
            grader.grade(*pair) for pair in zip(responses, references, strict=True)
        ]


@needs_library
def test_answers_that_mean_the_same_are_equal_and_others_are_not(graded):
    cases = [(a, r, True) for r, answers in EQUAL for a in answers]
    cases += [(a, r, False) for r, answers in DIFFERENT for a in answers]
    responses = [f"1 + 2 = 3, 9. So we get $\\boxed{{{answer}}}$." for answer, _, _ in cases]
    grades = graded(responses, [reference for _, reference, _ in cases])
    wrong = [case for case, g in zip(cases, grades, strict=True) if g.correct != case[2]]
    assert not wrong
    assert [g.answer for g in grades] == [answer for answer, _, _ in cases]


@needs_library
def test_answers_without_a_box(graded):
    texts = {
        "16 - 3 - 4 = 9 and 9 * 2 = 18.\n#### 18": True,
        "She makes $18 every day. The answer is 18.": True,
        "The final answer is $18$. I hope it is correct.": True,
        "So she makes 18 dollars": True,
        "The answer is 17.": False,
        "#### $18.00": True,
        "#### 1,8": False,
        "18 eggs, so #### 17": False,
    }
    grades = graded(list(texts), ["...\n#### 18"] * len(texts))
    assert dict(zip(texts, (g.correct for g in grades), strict=True)) == texts


@needs_library
def test_without_a_sign_the_end_of_a_response_is_its_answer(graded):
    prose = "This is how the sum is made, and nothing is left over. "
    begun, ended = "The answer is 17. ", "The answer is 18. "
    responses = [begun + 40 * prose + ended, begun + ended + 5 * prose, ended + 40 * prose + begun]
    assert [g.correct for g in graded(responses, ["18"] * 3)] == [True, True, False]


@needs_library
def test_per_cent_of_more_than_a_thousand(graded):
    grades = graded([r"\boxed{1,250\%}", r"\boxed{12.5}"], ["12.5", "1,250%"])
    assert [g.correct for g in grades] == [True, True]


@needs_library
@pytest.mark.parametrize(
    "response", ["\\boxed{} #### 18", "", " \n", "I do not know", r"\boxed{}", "####"]
)
def test_no_answer_is_wrong_and_told(graded, response):
    assert not (found := graded([response], ["18"])[0]).correct and found.note == "no answer"


@needs_library
def test_what_takes_for_ever_is_wrong_and_what_comes_after_it_is_graded():
    start = time.monotonic()
    responses = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{10^{10^{10}}}", r"\boxed{\frac{4}{8}}"]
    grades = grade(responses, ["3", "4", r"\frac{1}{2}"], seconds=3)
    assert [g.correct for g in grades] == [False, False, True]
    assert time.monotonic() - start < 100


@needs_library
def test_a_worker_that_hangs_is_replaced(tmp_path, monkeypatch):
    hanging = tmp_path / "hanging.py"
    hanging.write_text(
        "import json, sys, time\nprint('ready', flush=True)\n"
        "for line in sys.stdin:\n"
        "    if 'hang' in line: time.sleep(600)\n"
        "    if 'die' in line: sys.exit(1)\n"
        "    print(json.dumps({'correct': True, 'note': ''}), flush=True)\n"
    )
    monkeypatch.setattr(math_answers.math_worker, "__file__", str(hanging))
    grades = grade(
        [r"\boxed{hang}", r"\boxed{2}", r"\boxed{die}", r"\boxed{2}"], ["1"] * 4, seconds=2
    )
    assert [g.correct for g in grades] == [False, True, False, True]
    assert [g.note for g in grades] == ["timeout", "", "timeout", ""]


@needs_library
def test_workers_and_threads_change_nothing():
    responses = [rf"\boxed{{\frac{{{i}}}{{2}}}}" for i in range(7)]
    references = [str(i / 2) if i % 3 else "100" for i in range(7)]
    expected = grade(responses, references)
    assert [g.correct for g in expected] == [bool(i % 3) for i in range(7)]
    results = []
    thread = threading.Thread(
        target=lambda: results.extend(grade(responses, references, workers=3))
    )
    thread.start()
    thread.join()
    assert results == expected and grade([], []) == []


@needs_library
def test_an_empty_reference_is_refused():
    with pytest.raises(UserError, match="reference answer of problem 1 is empty"):
        grade(["1", "2"], ["1", " "])


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mobilellm-jax\[eval\]'"):
        grade(["1"], ["1"])
