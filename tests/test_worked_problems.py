"""Conversations of worked arithmetic: prepared, never on both sides, answered in a box."""

import json

import pytest

from mobilellm_jax.data import arithmetic
from mobilellm_jax.data.corpora import split_of
from mobilellm_jax.data.embedded import HELDOUT
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.math_answers import stated_answer
from mobilellm_jax.worked_problems import conversation, write_problems


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_problems_are_on_one_side_and_the_answers_in_a_box(tmp_path):
    write_problems(tmp_path / "out", seed=3, train=300, test=40)
    found = {split: read(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "test")}
    assert {split: len(records) for split, records in found.items()} == {"train": 300, "test": 40}
    solutions = dict(arithmetic.documents(3, 10**6))
    asked = {}
    for split, records in found.items():
        assert len({record["id"] for record in records}) == len(records)
        for record in records:
            user, assistant = record["messages"]
            assert (user["role"], assistant["role"]) == ("user", "assistant")
            steps, _, answer = solutions[user["content"]].rpartition("Answer: ")
            assert assistant["content"].startswith(steps)
            assert stated_answer(assistant["content"]) == answer.strip()
            side = "train" if split == "train" else "heldout"
            assert split_of(user["content"], HELDOUT) == side
        asked[split] = {record["messages"][0]["content"] for record in records}
    assert not asked["train"] & asked["test"]


def test_more_problems_begin_with_the_same_ones(tmp_path):
    write_problems(tmp_path / "few", train=5, test=1)
    write_problems(tmp_path / "many", train=50, test=2)
    for split, count in (("train", 5), ("test", 1)):
        few, many = (read(tmp_path / name / f"{split}.jsonl") for name in ("few", "many"))
        assert few == many[:count]
    write_problems(tmp_path / "other", seed=1, train=5, test=1)
    assert read(tmp_path / "other" / "train.jsonl") != read(tmp_path / "few" / "train.jsonl")


def test_a_solution_keeps_its_steps():
    _, assistant = conversation("2 + 3?", "Add.\n2 + 3 = 5.\nAnswer: 5")
    assert assistant["content"] == "Add.\n2 + 3 = 5.\nThe final answer is \\boxed{5}."


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(UserError, match="--train and --test are numbers"):
        write_problems(tmp_path / "out", train=-1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(UserError, match="exists and is not empty"):
        write_problems(tmp_path / "out", train=1, test=0)
