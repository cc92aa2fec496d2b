"""Seconds are counted once each, and what a kill undid is not counted as progress."""

import json
import subprocess
import sys
import time

import pytest
import tiny
from etils import epath
from runs import lines, run

from mobilellm_jax.training import goodput
from mobilellm_jax.training.goodput import KINDS, Goodput


@pytest.fixture
def clock(monkeypatch):
    now, turned_on = [1000.0], [70.0]
    monkeypatch.setattr(goodput.time, "time", lambda: now[0])
    monkeypatch.setattr(goodput.time, "monotonic", lambda: turned_on[0])

    def wait(seconds, clock_is_set=0.0):
        now[0] += seconds + clock_is_set
        turned_on[0] += seconds

    return wait


def seconds(values, prefix):
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def test_every_second_goes_somewhere(tmp_path, clock):
    counted = Goodput(epath.Path(tmp_path), began=990.0)
    for kind, taken in (("start", 5), ("compile", 7), ("data", 1), ("save", 2), ("evaluate", 3)):
        clock(taken)
        counted.lap(kind)
    for step in (1, 2, 3):
        clock(4)
        counted.stepped(step)
    values = counted.values()
    spent = seconds(values, "seconds/")
    assert spent["start"] == 15 and spent["train"] == 12 and spent["redone"] == 0
    assert sum(spent.values()) == 10 + 18 + 12
    assert values["goodput"] == values["run/goodput"] == 12 / 40
    assert counted.summary().startswith("goodput: 30.0% of 0 min 40 s; the rest: start 37.5%")


def test_steps_done_again_and_time_without_a_program_are_lost(tmp_path, clock):
    first = Goodput(epath.Path(tmp_path), began=1000.0)
    for step in range(1, 6):
        clock(10)
        first.stepped(step)
    first.record(5)
    clock(100)  # killed here, with a checkpoint of step 3
    second = Goodput(epath.Path(tmp_path), began=1150.0)
    for step in range(4, 8):
        clock(10)
        second.stepped(step)
    values = second.values()
    assert seconds(values, "seconds/")["redone"] == 20
    assert values["goodput"] == 20 / 40
    assert values["run/starts"] == 2
    assert values["run/seconds/down"] == 100
    assert values["run/goodput"] == (50 + 20) / 190
    assert "goodput over 2 starts" in second.summary()


def test_steps_stay_undone_until_a_start_has_come_past_them(tmp_path, clock):
    for steps in (
        range(1, 6),
        range(3, 5),
    ):  # the second is killed before it is as far as the first
        began = Goodput(epath.Path(tmp_path), began=goodput.time.time())
        for step in steps:
            clock(10)
            began.stepped(step)
        began.record(steps[-1])
    third = Goodput(epath.Path(tmp_path), began=goodput.time.time())
    for step in range(3, 8):
        clock(10)
        third.stepped(step)
    values = third.values()
    assert (values["seconds/redone"], values["seconds/train"]) == (30, 20)
    assert (values["run/seconds/redone"], values["run/seconds/train"]) == (50, 70)
    assert values["run/seconds/down"] == 0 and values["run/goodput"] == 70 / 120


def test_a_kill_takes_little_and_few_steps_write(tmp_path, clock):
    counted = Goodput(epath.Path(tmp_path), began=1000.0)
    recorded = []
    for step in range(1, 31):
        clock(3)
        counted.stepped(step)
        recorded.append(json.loads((tmp_path / goodput.FILE).read_text())["step"])
        assert 3 * (step - recorded[-1]) < 12
    assert len(set(recorded)) <= 10


def test_of_many_processes_one_writes(tmp_path, clock):
    silent = Goodput(epath.Path(tmp_path), began=1000.0, writes=False)
    clock(100)
    silent.stepped(1)
    silent.record(1)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_clock_that_is_set_is_no_work(tmp_path, clock, hours):
    counted = Goodput(epath.Path(tmp_path), began=1000.0)
    clock(10, clock_is_set=hours * 3600)
    counted.lap("start")
    clock(30)
    counted.stepped(1)
    values = counted.values()
    assert seconds(values, "seconds/")["start"] == 10
    assert values["goodput"] == values["run/goodput"] == 30 / 40
    counted.record(1)
    clock(0, clock_is_set=-10 * 3600)  # before the next start
    again = Goodput(epath.Path(tmp_path), began=goodput.time.time())
    clock(40)
    again.stepped(2)
    values = again.values()
    assert values["run/goodput"] == 70 / 80 and values["run/seconds/down"] == 0


_WHOLE = {"began": 1.0, "starts": 3, "seconds": {"train": 2.0}, "step": 7}


@pytest.mark.parametrize(
    "text",
    ['{"began": 1', "[]", "[" * 100_000]
    + [json.dumps({**_WHOLE, key: "x"}) for key in _WHOLE]
    + [json.dumps({**_WHOLE, key: float("nan")}) for key in _WHOLE]
    + [json.dumps({**_WHOLE, "seconds": {"train": [1]}})],
)
def test_a_damaged_record_stops_nothing(tmp_path, clock, text):
    (tmp_path / goodput.FILE).write_text(json.dumps(_WHOLE))
    assert Goodput(epath.Path(tmp_path), began=1000.0).values()["run/starts"] == 4
    (tmp_path / goodput.FILE).write_text(text)
    counted = Goodput(epath.Path(tmp_path), began=1000.0)
    assert counted.values()["run/starts"] == 1 and "goodput" in counted.summary()


def test_a_run_records_it(tmp_path, capsys):
    plan = tiny.corpus(tmp_path / "data")
    for stop_at in (5, None):
        run(tiny.config(plan), tmp_path / "run", stop_at)
    found = lines(tmp_path / "run", "goodput")
    assert list(found) == [4, 5, 8, 12]
    last = found[12]
    assert last["run/starts"] == 2 and last["run/seconds/redone"] == 0
    assert 0 < last["goodput"] < 1 and 0 < last["run/goodput"] < 1
    assert {*seconds(last, "seconds/")} == {*KINDS} and last["seconds/restore"] > 0
    assert json.loads((tmp_path / "run" / goodput.FILE).read_text())["step"] == 12


def test_the_start_of_a_program_is_when_it_was_started():
    code = "from mobilellm_jax.training.goodput import program_start; print(program_start())"
    before = time.time()
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert before - 1 < float(told.stdout) < time.time()
