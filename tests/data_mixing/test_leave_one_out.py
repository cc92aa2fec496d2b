"""A source that a capability is made of is missed; what is written reads back; bad input is a sentence."""

import dataclasses
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import runs as programs
import tiny
from etils import epath

from data_mixing import leave_one_out as loo
from data_mixing import methods, probe_sets
from data_mixing.measurements import read_left_out
from data_mixing.probe_sets import Probe, ProbeSets
from data_mixing.run_tables import load_pair
from data_mixing.runs import Measured
from mobilellm_jax.data.plan import Plan, Stage
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import alone
from mobilellm_jax.plan import fill_in
from mobilellm_jax.sweeps.statistics import estimate

KINDS = {"arithmetic": "sums", "language": "words"}
STEPS, EVERY, SEEDS = 12, 6, 2


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A corpus of sums and words, a configuration of a run, and probes of both kinds."""
    folder = tmp_path_factory.mktemp("left_out")
    path = tiny.corpus(folder / "data")
    fill_in(Plan.load(path), folder / "data").save(path)
    changes = {"steps": STEPS, "global_batch": 8, "checkpoint__every": 50}
    programs.config_file(folder, path, **changes)
    write_probes(folder / "probes")
    return folder


def write_probes(folder, halves=probe_sets.HALVES, count=40):
    documents = {
        kind: tuple(
            Probe(text, kind, halves[i % len(halves)])
            for i, text in enumerate(tiny.documents(kind, count, seed=7))
        )
        for kind in KINDS.values()
    }
    folder.mkdir()
    probe_sets.write(ProbeSets({c: (s,) for c, s in KINDS.items()}, documents), {}, folder)


def command(folder, out, *arguments, module="leave_one_out"):
    return programs.program(
        f"data_mixing.{module}",
        f"--config={folder / 'config.py'}",
        f"--probes={folder / 'probes'}",
        f"--out={out}",
        *arguments,
    )


@pytest.fixture(scope="session")
def done(folder):
    """The program's folder and what it said."""
    ended = command(folder, folder / "out", f"--seeds={SEEDS}", f"--measure_every={EVERY}")
    assert ended.status == 0, ended.err
    return folder / "out", ended


@pytest.mark.parametrize("module", ["leave_one_out", "proxies", "pipeline"])
def test_one_program_is_in_a_folder(folder, module, tmp_path):
    with alone(tmp_path / "out", "is training"):
        ended = command(folder, tmp_path / "out", module=module)
    assert ended.status == 1
    assert re.search(r"error: another program is \w+.* in .*out at this moment", ended.err)
    assert not [*(tmp_path / "out").iterdir()]


def test_what_a_capability_is_made_of_is_missed(done):
    found = read_left_out(done[0] / "leave_one_out.json", ("sums", "words"))
    assert (found.capabilities, found.seeds, found.step) == (tuple(KINDS), (0, 1), STEPS)
    for c, source in enumerate(KINDS.values()):
        own = found.rise_SCR[found.sources.index(source), c]
        other = found.rise_SCR[1 - found.sources.index(source), c]
        assert (own > 5 * found.stderr_SCR[found.sources.index(source), c]).all()
        assert (own > 0.2).all() and (other < 0).all()  # the other's place was needed
    weights = methods.leave_one_out(
        dataclasses.replace(
            found,
            capabilities=("arithmetic",),
            rise_SCR=found.rise_SCR[:, :1],
            stderr_SCR=found.stderr_SCR[:, :1],
        )
    )
    assert weights == {"sums": 1.0, "words": 0.0}


def test_the_records_are_differences_of_the_runs(done):
    """Brute force, from what the runs measured."""
    out, _ = done
    raw = json.loads((out / "leave_one_out.json").read_text())
    assert len(raw["records"]) == 2 * 2 * SEEDS * (STEPS // EVERY)
    for record in raw["records"]:
        names = f"without_{record['source']}_{record['seed']}", f"full_{record['seed']}"
        runs = [Measured.load(epath.Path(out) / "runs" / n / "measured.npz") for n in names]
        at = runs[0].steps_M.tolist().index(record["step"])
        without, full = (run.mean(record["capability"])[at] for run in runs)
        assert record["delta"] == pytest.approx(without - full, abs=1e-7)
        assert record["stderr"] > 0


def test_runs_of_a_seed_differ_in_the_mixture_alone(done):
    out, _ = done
    plans = {path.stem: Plan.load(path) for path in (out / "plans").glob("*.json")}
    assert len(plans) == 3 * SEEDS
    for name, plan in plans.items():
        assert plan.seed == int(name[-1]) and plan.tokens == STEPS * 8 * tiny.ROW
        if name.startswith("full"):
            assert plan.stages[0].weights == {"words": 0.5, "sums": 0.5}
        else:
            assert name[len("without_") : -2] not in plan.names and len(plan.names) == 1


def test_tables_and_drawings_tell_the_same(done):
    out, ended = done
    table = (out / "table.md").read_text()
    page = (out / "leave_one_out.html").read_text()
    raw = json.loads((out / "leave_one_out.json").read_text())
    for source in KINDS.values():
        for capability in KINDS:
            delta = np.mean(
                [
                    r["delta"]
                    for r in raw["records"]
                    if (r["source"], r["capability"], r["step"]) == (source, capability, STEPS)
                ]
            )
            for text in (ended.out, table, page):
                assert f"{delta:+.4f} ±" in text
    for capability in KINDS:
        picture = ElementTree.parse(out / f"{capability}.svg").getroot()
        assert picture.tag.endswith("svg")
        assert f"![{capability}]({capability}.svg)" in table


def test_the_same_command_trains_nothing_again(folder, done):
    out, _ = done
    before = programs.files(out)
    ended = command(folder, out, f"--seeds={SEEDS}", f"--measure_every={EVERY}")
    assert ended.status == 0 and "6 are complete" in ended.out
    assert programs.files(out) == before
    other = command(folder, out, "--seeds=1", f"--measure_every={EVERY}")
    assert other.status == 1 and "made with other settings" in other.err


def test_errors_of_ratios_are_those_of_the_bootstrap():
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 60, 80).astype(float)
    sums = counts * 0.3 + rng.normal(0, 2, 80) * np.sqrt(counts)
    chosen = rng.integers(0, 80, (4000, 80))
    expected = (sums[chosen].sum(1) / counts[chosen].sum(1)).std()
    assert loo.ratio_stderr(sums, counts) == pytest.approx(expected, rel=0.05)
    even = loo.ratio_stderr(sums, np.full(80, 7.0))
    assert even == pytest.approx(sums.std(ddof=1) / np.sqrt(80) / 7)
    assert np.isnan(loo.ratio_stderr(sums[:1], counts[:1]))


def test_intervals_over_seeds_are_students():
    """Where rows say nothing; and half as many degrees of freedom as sources share them."""
    rng = np.random.default_rng(0)
    delta_SRM = rng.normal(0.2, 0.1, (1, 4, 3))
    nothing = np.zeros((1, 4, 3)), np.zeros((1, 3))
    found = loo.Changes(np.zeros(3), delta_SRM, *nothing)
    for m in range(3):
        expected = estimate(delta_SRM[0, :, m].tolist())
        assert found.mean_SM[0, m] == pytest.approx(expected.mean)
        assert found.half_SM[0, m] == pytest.approx(expected.half_width)
    covered = [
        np.abs(loo.Changes(None, d, None, np.zeros((3, 1))).mean_SM) <= half
        for d in rng.normal(0, 1, (2000, 3, 2, 1))
        for half in [loo.Changes(None, d, None, np.zeros((3, 1))).half_SM]
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)


def test_proxies_are_what_regmix_reads(folder, tmp_path):
    arguments = "--count=3", "--max_epochs=1"
    ended = command(folder, tmp_path / "out", *arguments, module="proxies")
    assert ended.status == 0, ended.err
    tables = tmp_path / "out" / "mixtures.csv", tmp_path / "out" / "losses.csv"
    mixtures, losses = load_pair(*tables)
    assert (set(mixtures.names), losses.names) == ({"words", "sums"}, tuple(KINDS))
    for run, row, found in zip(mixtures.runs, mixtures.values, losses.values, strict=True):
        plan = Plan.load(tmp_path / "out" / "plans" / f"run_{run}.json")
        wanted = {n: w for n, w in zip(mixtures.names, row, strict=True) if w}
        assert plan.stages[0].weights == pytest.approx(wanted)
        measured = Measured.load(epath.Path(tmp_path) / f"out/runs/run_{run}/measured.npz")
        np.testing.assert_allclose(found, [measured.mean(name)[-1] for name in KINDS])
    before = programs.files(tmp_path / "out")
    assert command(folder, tmp_path / "out", *arguments, module="proxies").status == 0
    assert programs.files(tmp_path / "out") == before


def test_bad_input_is_a_sentence(folder, tmp_path):
    plan = Plan.load(folder / "data" / "mixture.json")

    def refused(match, *arguments, at=folder):
        ended = command(at, tmp_path / "out", *arguments)
        assert ended.status == 1 and match in ended.err, ended.err
        assert not (tmp_path / "out" / "runs").exists()

    def other_plan(name, **changes):
        path = folder / "data" / f"{name}.json"
        dataclasses.replace(plan, **changes).save(path)
        return f"--plan={path}"

    stage = plan.stages[0]
    only = dataclasses.replace(stage, weights={"sums": 1.0})
    first = dataclasses.replace(stage, name="first", tokens=320)
    refused("no source code to leave out, only words, sums", "--leave_out=code")
    refused("one source, 'sums'", other_plan("one", sources=plan.sources[1:], stages=(only,)))
    refused("2 stages", other_plan("two", stages=(first, stage)))
    refused("only one source a weight", other_plan("bare", stages=(only,)), "--shares=plan")
    refused("there is no plan", "--config.plan=")
    refused("there are no probe sets", f"--probes={tmp_path / 'none'}")
    refused("more often than max_epochs=0.1", "--max_epochs=0.1")
    refused("without_sums_0", "--max_epochs=0.1")
    refused("the 32 that are stored", "--config.row_length=24")
    refused("cannot be spread over 8 devices", "--group=3")
    write_probes(tmp_path / "probes", halves=("heldout",))
    refused("no probe in the half 'score'", f"--probes={tmp_path / 'probes'}")
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    refused("holds thesis.txt")


def test_shares_of_the_plan_are_kept_in_proportion():
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    without = loo._without(weights, "a")
    assert without == pytest.approx({"a": 0.0, "b": 0.6, "c": 0.4})
    with pytest.raises(UserError, match="on a ramp"):
        stage = Stage("train", 10, weights, weights_end={"a": 1.0})
        loo._weights(Plan((), (stage,), "", ""), "plan")
