"""A sweep: every cell is an ordinary run, what is complete stays, failures are told, the tables are right."""

import itertools
import json
import math
import os
import re
import signal
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import runs
import tiny
from etils import epath

from mobilellm_jax.data.plan import Plan
from mobilellm_jax.errors import UserError
from mobilellm_jax.reporting.history import read_history
from mobilellm_jax.sweeps import outcomes, statistics, summary, tuning
from mobilellm_jax.sweeps.description import Line, Sweep, Table, Tuned, load_sweep, seeded_plan
from mobilellm_jax.sweeps.outcomes import Outcome
from mobilellm_jax.sweeps.processes import core_shares

SWEEP = """
import sys
sys.path.insert(0, {tests!r})
import tiny
from etils import epath
from mobilellm_jax.sweeps.description import Line, Sweep, Table


def get_sweep(argument):
    rows = {{name: tiny.config({plan!r}, steps={steps}) for name in ("low", "high", "broken")}}
    for config in rows.values():
        config.checkpoint.every = config.eval.every = {steps}
        config.first_row = 16  # which other runs have read: no tokens of these
    rows["high"].schedule.peak = {peak}
    rows["broken"].schedule.warmup_steps = 1000
    lines = Line("low", "low peak"), Line("high", "high peak", "low"), Line("broken", "broken")
    return Sweep(rows, (Table("Peaks", lines),), seeds=(0, 1))
"""


def sweep_file(directory, steps=6, peak=2e-2):
    """A sweep of two learning rates, and of a row that fails, with two seeds."""
    plan = directory / PLAN
    if not plan.exists():
        tiny.corpus(plan.parent)
    path = directory / f"sweep_{peak}.py"
    path.write_text(SWEEP.format(tests=str(runs.TESTS), plan=str(plan), steps=steps, peak=peak))
    return path


def flags_of(sweep, workdir, *more):
    return "mobilellm_jax.sweep", f"--sweep={sweep}", f"--workdir={workdir}", *more


def sweep(*arguments):
    """The program; its cells are processes that see one device."""
    with pytest.MonkeyPatch.context() as patch:
        flags = os.environ["XLA_FLAGS"].replace("--xla_force_host_platform_device_count=8", "")
        patch.setenv("XLA_FLAGS", flags)
        patch.setenv("PYTHONPATH", str(runs.TESTS.parent))
        return runs.program(*flags_of(*arguments))


def results(workdir):
    lines = (workdir / "results.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


PLAN = "corpus/mixture.json"
PARALLEL = min(2, len(os.sched_getaffinity(0)))


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep file, a workdir in which all cells but one were trained, and how that ended."""
    directory = tmp_path_factory.mktemp("swept")
    file, only = sweep_file(directory), "--cells=low|high|broken-s1"
    return file, directory / "out", sweep(file, directory / "out", only, f"--parallel={PARALLEL}")


def test_a_network_that_was_cut_has_the_parameters_that_are_left(tmp_path):
    begun = [{"kind": "start", "step": 0, "parameters": 100}, {"kind": "train", "step": 1}]
    cuts = [{"kind": "cut", "step": step, "parameters": left} for step, left in ((2, 80), (4, 60))]
    for records, wanted in ((begun, 100), ([*begun, *cuts], 60)):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        assert outcomes._parameters(read_history(tmp_path)) == wanted


def test_a_cell_that_was_measured_on_other_rows_is_not_compared(tmp_path):
    config = tiny.config(tiny.corpus(tmp_path / "corpus"), steps=4)
    cell = Sweep({"a": config}, (), seeds=(0,)).cell("a", 0)
    directory = epath.Path(tmp_path / cell.name)
    (directory / "checkpoints/4").mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(cell.config.to_dict()))
    start = {"plan": Plan.load(cell.config.plan).hash, "parameters": 1, "flops_per_token": 6}
    records = [
        {"kind": "start", "step": 0, **start, "devices": {}, "commit": ""},
        {"kind": "train", "step": 4, "rows": 64, "step_seconds": 1.0},
        {"kind": "heldout", "step": 4, "bits_per_byte": 2.0},
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    found = outcomes.read_outcome(cell, directory)
    assert found is not None and found.bits_per_byte == 2.0
    config.eval.every += 1  # decides no figure
    assert outcomes.read_outcome(Sweep({"a": config}, (), seeds=(0,)).cell("a", 0), directory)
    config.eval.rows += 1
    with pytest.raises(UserError, match="measured on 20 held-out rows .*config.eval.rows is 21"):
        outcomes.read_outcome(Sweep({"a": config}, (), seeds=(0,)).cell("a", 0), directory)


@pytest.mark.slow
def test_an_outcome_is_what_the_run_recorded_at_its_last_step(swept):
    file, workdir, _ = swept
    found = {(r["row"], r["seed"]): r for r in results(workdir) if "row" in r}
    assert set(found) == set(itertools.product(("low", "high"), (0, 1)))
    for (row, seed), outcome in found.items():
        last = runs.lines(workdir / f"{row}-s{seed}", "heldout")[6]
        assert outcome["bits_per_byte"] == last["bits_per_byte"]
        of = outcome["bits_per_byte_of"]
        assert of == {name: last[f"bits_per_byte/{name}"] for name in ("words", "sums")}
        start = runs.lines(workdir / f"{row}-s{seed}", "start")[0]
        assert outcome["parameters"] == start["parameters"]
        assert outcome["plan"] == Plan.load(seeded_plan(str(file.parent / PLAN), seed)).hash
        assert outcome["tokens"] == 6 * 16 * tiny.ROW


@pytest.mark.slow
def test_a_seed_changes_weights_and_order_and_rows_of_a_seed_see_the_same(swept):
    _, workdir, _ = swept
    seen = {name: runs.rows_seen(workdir / name) for name in ("low-s0", "high-s0", "low-s1")}
    assert seen["low-s0"] == seen["high-s0"] != seen["low-s1"]
    loss = {name: runs.lines(workdir / name)[1]["loss"] for name in seen}
    assert loss["low-s0"] == loss["high-s0"] != loss["low-s1"]


@pytest.mark.slow
def test_a_failing_cell_stops_no_other_and_is_told(swept):
    _, workdir, ended = swept
    assert ended.status == 1
    assert "error: 1 cells failed: broken-s1: config.schedule.warmup_steps=1000" in ended.err
    assert "broken-s1  failed: config.schedule" in ended.out
    assert [r["cell"] for r in results(workdir) if "error" in r] == ["broken-s1"]


@pytest.mark.slow
def test_cells_at_once_have_equal_shares_of_the_cores(swept):
    _, workdir, _ = swept
    share = len(os.sched_getaffinity(0)) // PARALLEL
    assert {r["devices"]["cpu_threads"] for r in results(workdir) if "row" in r} == {share}
    assert f"{share} CPU thread" in (workdir / "table.md").read_text()


@pytest.mark.slow
def test_what_is_complete_is_not_run_again(swept):
    file, workdir, _ = swept
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.name == "metrics.jsonl"}
    table = (workdir / "table.md").read_text()
    again = sweep(file, workdir, "--cells=low|high")
    assert again.status == 0, again.err
    assert len(before) == 4 and "4 cells are complete, 0 to train" in again.out
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert (workdir / "table.md").read_text() == table


@pytest.mark.slow
def test_the_tables_say_what_the_cells_gave(swept):
    _, workdir, ended = swept
    bits = {(r["row"], r["seed"]): r["bits_per_byte"] for r in results(workdir) if "row" in r}
    mean = statistics.estimate([bits["high", 0], bits["high", 1]])
    difference = statistics.estimate([bits["high", s] - bits["low", s] for s in (0, 1)])
    expected = f"{mean.mean:.3f} ± {mean.half_width:.3f}"
    assert expected in ended.out
    page = (workdir / "table.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| high peak")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[6] == expected
    assert cells[7].replace("−", "-") == f"{difference.mean:+.3f} ± {difference.half_width:.3f}"
    assert cells[8:10] == ["low peak", statistics.verdict(difference)]
    drawn = ElementTree.parse(workdir / "table.svg").getroot()
    assert {"Peaks", "high peak", "broken"} <= set(drawn.itertext())
    assert sum(e.get("class") == "seed" for e in drawn.iter()) == 4


@pytest.mark.slow
def test_another_configuration_is_refused_with_the_sentence_of_training(swept):
    file, workdir, _ = swept
    ended = sweep(sweep_file(file.parent, peak=3e-2), workdir, "--cells=high-s0")
    assert ended.status == 1
    assert "high-s0: " in ended.err and "belongs to another run" in ended.err
    assert "config.schedule.peak: 0.02 there, 0.03 here" in ended.err


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def recorded(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.slow
def test_a_stopped_sweep_stops_its_cells_which_save_and_only_what_is_missing_is_done(tmp_path, how):
    """Also when the sweep itself is killed, so that it can tell its cells nothing."""
    file, workdir = sweep_file(tmp_path, steps=600), tmp_path / "out"
    process = runs.start("-m", *flags_of(file, workdir, "--cells=low-s0"))
    metrics, log = workdir / "low-s0" / "metrics.jsonl", workdir / "logs" / "low-s0.log"
    wait_for(lambda: recorded(metrics) > 10, process)
    process.send_signal(how)
    ended = runs.finish(process)
    assert ended.status == (130 if how == signal.SIGINT else -9), ended.err
    if how == signal.SIGINT:
        assert "stopped by SIGINT" in ended.out
    deadline = time.monotonic() + 60
    while "The same command goes on from here." not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    saved = max(json.loads(line)["step"] for line in metrics.read_text().splitlines())
    assert saved < 600

    again = sweep(file, workdir, "--cells=low-s0")
    assert again.status == 0, again.err
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "start"] == [0, saved]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 601))


def test_shares_of_the_cores_are_equal_and_apart(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 4, 5, 7, 9}, raising=False)
    assert core_shares(2) == [(3, 4), (5, 7)]
    assert core_shares(5) == [(3,), (4,), (5,), (7,), (9,)]
    with pytest.raises(UserError, match="--parallel=6 cells need as many cores; there are 5"):
        core_shares(6)


# --- statistics


def test_the_interval_by_hand():
    """Three values, 4.302653 from a printed table: 4.302653 * 1 / sqrt(3)."""
    found = statistics.estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.count == 3
    assert found.half_width == pytest.approx(2.484138, abs=1e-6)
    assert statistics.estimate([5.0]).half_width == math.inf


def test_the_interval_holds_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    samples = rng.normal(3.0, 2.0, (4000, 3))
    held = [abs((e := statistics.estimate(s)).mean - 3.0) < e.half_width for s in samples.tolist()]
    assert np.mean(held) == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize(
    "values, said",
    [
        ([-0.1, -0.11, -0.12], "better"),
        ([0.1, 0.11, 0.12], "worse"),
        ([-0.1, 0.11, 0.0], "not distinguishable"),
        ([-0.1], "one seed"),
        ([0.0, 0.0], "not distinguishable"),
    ],
)
def test_verdicts(values, said):
    assert statistics.verdict(statistics.estimate(values)) == said


def outcome(row, seed, bits, value=None):
    devices = {"kind": "cpu", "count": 1, "processes": 1, "cpu_threads": 1}
    return Outcome(row, seed, value, bits, {}, 10, 5, 100, 1.0, devices, "", "")


def test_differences_are_taken_seed_by_seed_over_the_seeds_that_both_have():
    table = Table("t", (Line("a", "A"), Line("b", "B", "a"), Line("c", "C", "a")))
    outcomes = [outcome("a", s, v) for s, v in ((0, 1.0), (1, 2.0), (2, 3.0))]
    outcomes += [outcome("b", s, v) for s, v in ((2, 2.5), (1, 1.6), (7, 0.0))]
    a, b, c = summary.results(table, outcomes)
    assert a.difference is None and a.verdict == ""
    assert b.difference.count == 2 and b.difference.mean == pytest.approx(-0.45)
    summed = summary.Summary({table: [a, b, c]})
    (last,) = [line for line in summary.text(summed).splitlines() if line.startswith("C")]
    assert c.difference is None and last.split() == ["C", *"----", "0", "-"]
    shuffled = summary.results(table, outcomes[::-1])
    assert [r.difference for r in shuffled] == [None, b.difference, None]


def test_a_label_cannot_break_the_page():
    table = Table("t", (Line("a", "a | b"),))
    found = summary.results(table, [outcome("a", 0, 1.0)])
    page = summary.markdown(summary.Summary({table: found}), "x.svg")
    (row,) = [line for line in page.splitlines() if line.startswith(r"| a \| b |")]
    assert row.replace(r"\|", "").count("|") == len(summary.HEADER) + 1


def test_the_drawing_stays_in_its_frame_whatever_the_intervals():
    table = Table("two <seeds>", (Line("a", "A & B"), Line("b", "B", "a"), Line("c", "none", "a")))
    outcomes = [outcome("a", s, v) for s, v in ((0, 1.0), (1, 2.0))] + [outcome("b", 0, 1.5)]
    found = summary.Summary({table: summary.results(table, outcomes)})
    drawn = ElementTree.fromstring(summary.drawing(found))
    places = [float(e.get("cx")) for e in drawn.iter() if e.get("cx")]
    for path in (e.get("d") for e in drawn.iter() if e.get("class") == "interval"):
        places += [float(x) for x in re.match(r"M([\d.]+) \d+H([\d.]+)", path).groups()]
    assert len(places) == 7
    assert all(summary.LEFT <= x <= summary.WIDTH - summary.RIGHT for x in places)


# --- tuning


def walk(values, start, loss):
    """The values tried, in rounds as a sweep does it."""
    losses = {}
    while missing := tuning.untried(values, start, losses):
        losses |= {value: loss(value) for value in missing}
    return losses


def test_the_search_ends_at_the_bottom_of_a_valley_wherever_it_begins():
    values = (1.0, 2.0, 4.0, 8.0, 16.0)
    for best, start in itertools.product(values, values):
        tried = walk(values, start, lambda value, best=best: abs(math.log2(value / best)))
        assert min(tried, key=tried.get) == best
        at = values.index(best)
        assert set(values[max(at - 1, 0) : at + 2]) <= set(tried)
        assert len(tried) <= 3 + abs(values.index(start) - at)


def test_a_value_at_which_training_fails_is_worse_than_any_other():
    values = (1.0, 2.0, 4.0)
    assert set(walk(values, 2.0, lambda value: math.inf if value > 1 else 3.0)) == {*values}
    config = tiny.config("x")
    sweep = Sweep({"a": Tuned(config, "schedule.peak", values, 2.0)}, ())
    tried = [outcome("a", 100, 3.0, 1.0), outcome("a", 100, 2.9, 2.0)]
    assert tuning.chosen(sweep, tried, []) == {}
    assert tuning.chosen(sweep, tried, ["a-4-s100"]) == {"a": 2.0}
    assert tuning.chosen(sweep, [], ["a-1-s100", "a-2-s100", "a-4-s100"]) == {}


TUNED = """
import sys
sys.path.insert(0, {tests!r})
import tiny
from etils import epath
from mobilellm_jax.sweeps.description import Line, Sweep, Table, Tuned


def get_sweep(argument):
    config = tiny.config({plan!r}, steps=6)
    config.checkpoint.every = config.eval.every = 6
    # The highest leaves the finite numbers: it may fail without failing the sweep.
    tuned = Tuned(config, "schedule.peak", (1e-4, 1e-2, 1e12), start=1e-2)
    rows = {{"plain": config, "tuned": tuned}}
    lines = Line("plain", "plain"), Line("tuned", "tuned", "plain")
    return Sweep(rows, (Table("T", lines),), seeds=(0, 1), tuning_seed=7)
"""


@pytest.mark.slow
def test_a_tuned_row_is_tuned_on_a_seed_of_its_own_and_shown_at_its_best(tmp_path):
    file, workdir = tmp_path / "sweep.py", tmp_path / "out"
    plan = tiny.corpus(tmp_path / "corpus")
    file.write_text(TUNED.format(tests=str(runs.TESTS), plan=str(plan)))
    first = sweep(file, workdir, "--cells=s7")
    assert first.status == 0, first.err
    ended = sweep(file, workdir, f"--parallel={PARALLEL}")
    assert ended.status == 0, ended.err
    found = {(r["row"], r["seed"], r["value"]): r for r in results(workdir) if "row" in r}
    tried = {v: r["bits_per_byte"] for (row, s, v), r in found.items() if s == 7}
    assert set(tried) >= {1e-4, 1e-2}
    best = min(tried, key=tried.get)
    assert best == 1e-2
    others = {key for key in found if key[1] != 7}
    assert others == {(row, s, v) for row, v in (("plain", None), ("tuned", best)) for s in (0, 1)}
    page = (workdir / "table.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| tuned (0.01) |")]
    mean = statistics.estimate([found["tuned", s, best]["bits_per_byte"] for s in (0, 1)])
    assert f"{mean.mean:.3f} ± {mean.half_width:.3f}" in row
    (row,) = [line for line in page.splitlines() if line.startswith("| tuned | ")]
    assert f"| {tried[1e-4]:.3f} | **{tried[1e-2]:.3f}** | " in row
    again = sweep(file, workdir)
    assert again.status == 0 and "7 to train" not in again.out
    assert (workdir / "table.md").read_text() == page


# --- bad input


def test_descriptions_that_do_not_hang_together():
    config = tiny.config("x")
    with pytest.raises(UserError, match="a row named 'a/b'"):
        Sweep({"a/b": config}, ())
    with pytest.raises(UserError, match="seeds that differ"):
        Sweep({"a": config}, (), seeds=(1, 1))
    with pytest.raises(UserError, match="tuning_seed=1 is one of the seeds"):
        Sweep({"a": config}, (), seeds=(0, 1), tuning_seed=1)
    for key, values, start, said in (
        ("schedule.peak", (2.0, 1.0), 1.0, "rising order"),
        ("schedule.peak", (1.0, 2.0), 3.0, "start at one of them"),
        ("schedule.peek", (1.0, 2.0), 1.0, "'a' is tuned by 'schedule.peek'"),
        ("global_batch", (16, 24.5), 16, "'a' is tuned by 'global_batch'"),
        ("schedule.peak", (1e-3, 1.0000001e-3), 1e-3, "alike to six digits"),
    ):
        with pytest.raises(UserError, match=said):
            Sweep({"a": Tuned(config, key, values, start)}, ())
    for row in (None, {}, config.to_dict()):
        with pytest.raises(UserError, match="the row 'a' of the sweep is a .*give a ConfigDict or"):
            Sweep({"a": row}, ())
    for seeds in (("a",), (0.5, 1), (None,)):
        with pytest.raises(UserError, match="whole numbers"):
            Sweep({"a": config}, (), seeds=seeds)
    line = Line("a", "A")
    for table in (line, "t", Table(1, (line,)), Table("t", [line]), Table("t", (Line("a", 1),))):
        with pytest.raises(UserError, match="each a Table of a title and a tuple of Lines"):
            Sweep({"a": config}, (table,))
    with pytest.raises(UserError, match="'t' speaks of the row 'z'.*it has a"):
        Sweep({"a": config}, (Table("t", (Line("a", "A", "z"),)),))


@pytest.mark.parametrize(
    "text, part",
    [
        ("x = 1\n", "no attribute 'get_sweep'"),
        ("def get_sweep(argument):\n    return argument.nothing\n", ":2: AttributeError"),
        ("def get_sweep(argument):\n    return 1\n", "must return"),
        ("def get_sweep(:\n", "SyntaxError"),
    ],
)
def test_files_that_are_no_sweep(tmp_path, text, part):
    path = tmp_path / "sweep.py"
    path.write_text(text)
    with pytest.raises(UserError, match=part):
        load_sweep(f"{path}:x")


def test_bad_flags(tmp_path):
    with pytest.raises(UserError, match="there is no sweep at 'none.py'"):
        load_sweep("none.py:x")
    file = sweep_file(tmp_path)
    for flag, part in (
        ("--cells=nothing", "is found in no cell: there are low-s0, high-s0"),
        ("--cells=(", "no regular expression"),
        ("--parallel=999", "--parallel=999 cells need as many cores"),
    ):
        ended = sweep(file, tmp_path / "out", flag)
        assert ended.status == 1 and part in ended.err, ended.err


def test_a_seeded_plan_is_the_plan_with_another_seed(tmp_path):
    path = str(tiny.corpus(tmp_path))
    assert seeded_plan(path, 0) == path
    beside = seeded_plan(path, 5)
    assert seeded_plan(path, 5) == beside
    one, other = Plan.load(path).to_dict(), Plan.load(beside).to_dict()
    assert other == {**one, "seed": 5}
    Path(beside).write_text(
        Path(beside).read_text(encoding="utf-8").replace("0.7", "0.71"), encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"mixture-seed5.json is not .*mixture.json with seed 5"):
        seeded_plan(path, 5)
