"""From files to plans that stream: what is written is what the table says, and bad input is a sentence."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
import tiny

from data_mixing import measurements, regression, weights
from data_mixing.proposals import proxies
from data_mixing.run_tables import RunTable
from data_mixing.weights import Request, parse
from mobilellm_jax.data.opening import open_mixture
from mobilellm_jax.data.plan import Plan, Skip, Stage
from mobilellm_jax.errors import UserError
from mobilellm_jax.plan import fill_in, write

SOURCES = ("words", "sums")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A real store of two sources, its plan, and files of measurements about them."""
    folder = tmp_path_factory.mktemp("mixing")
    path = tiny.corpus(folder / "data")
    plan = fill_in(Plan.load(path), folder / "data")
    write(plan, folder / "data" / "plan.json")
    scores_file(folder / "scores.parquet")
    left_out_file(folder / "loo.json")
    mixtures = proxies({"words": 0.6, "sums": 0.4}, 40, 0)
    mixtures.save(folder / "mixtures.csv")
    loss = 3 - np.log(mixtures.values + 1e-3) @ np.array([0.3, 0.7])
    RunTable(mixtures.runs, ("t",), loss[:, None]).save(folder / "losses.csv")
    return folder


def scores_file(path, change=lambda columns: columns):
    rng = np.random.default_rng(0)
    columns = {
        "source": ["words"] * 40 + ["sums"] * 40 + ["other"] * 5,
        "row": np.tile(np.arange(17), 5).tolist(),
        "offset": [0] * 85,
        "tokens": rng.integers(3, 30, 85).tolist(),
        "datainf": np.r_[rng.normal(0.3, 0.1, 40), rng.normal(0.1, 0.1, 45)].tolist(),
        "datainf/sums/10": np.r_[np.full(40, -1.0), np.full(45, 0.5)].tolist(),
        "datainf/words/10": [-0.5] * 85,
    }
    pq.write_table(pa.table(change(columns)), path)
    return path


def left_out_file(path, change=lambda raw: raw):
    records = [
        {
            "source": s,
            "capability": c,
            "seed": seed,
            "step": step,
            "delta": rise * step,
            "stderr": None,
        }
        for s, rise in (("words", 0.01), ("sums", 0.03))
        for c in ("words", "sums")
        for seed in (0, 1)
        for step in (10, 20)
    ]
    raw = {
        "version": 1,
        "sources": list(SOURCES),
        "capabilities": list(SOURCES),
        "records": records,
    }
    path.write_text(json.dumps(change(raw)))
    return path


def ask(folder, *methods, **options):
    plan = Plan.load(folder / "data" / "plan.json")
    return weights.mixtures_of(plan, [parse(m) for m in methods], **{"tokens": 40_000, **options})


ALL = (
    "uniform",
    "size",
    "size:temperature=2",
    "influence={0}/scores.parquet:column=datainf",
    "leave_one_out={0}/loo.json:standardise=false",
    "regmix={0}/mixtures.csv+{0}/losses.csv:candidates=3000,top=20",
)


def test_every_plan_says_what_the_table_says_and_streams_in_these_shares(folder, tmp_path):
    found = ask(folder, *(m.format(folder) for m in ALL), max_epochs=3)
    weights.write(found, tmp_path / "out")
    names = ["uniform", "size", "size_temperature_2", "influence", "leave_one_out", "regmix"]
    assert [p.name for p in sorted((tmp_path / "out").glob("*.json"))] == sorted(
        f"{n}.json" for n in names
    )
    cells = weights.table(found)
    said = (tmp_path / "out" / "weights.md").read_text()
    for i, name in enumerate(names):
        plan = Plan.load(tmp_path / "out" / f"{name}.json")
        assert plan.names == SOURCES and plan.tokens == 40_000
        capped = plan.weights[0][0]
        assert capped.tolist() == list(found[name].capped.values())
        for line, weight, source in zip(cells[2:], capped, plan.sources, strict=True):
            raw, shown, epochs = line[2 + 3 * i : 5 + 3 * i]
            assert line[0] == source.name and shown == f"{weight:.2%}"
            assert raw == f"{plan.stages[0].weights[source.name]:.2%}"
            assert epochs == f"{40_000 * weight / source.tokens:.2f}"
            assert weight * 40_000 <= 3 * source.tokens * (1 + 1e-9)
            assert (
                f"| {name} | {source.name} | {found[name].weights.reasons[source.name]} |" in said
            )
        mixture = open_mixture(plan, tiny.ROW, tiny.VOCAB)
        rows = mixture.read(np.arange(1200))
        assert rows["tokens"].shape == (1200, tiny.ROW + 1)
        shares = np.bincount(rows["source"], minlength=2) / 1200
        np.testing.assert_allclose(shares, capped, atol=0.05)
    assert plan.provenance["inputs"].keys() == {f"{folder}/mixtures.csv", f"{folder}/losses.csv"}
    assert plan.provenance["inputs"][f"{folder}/losses.csv"] == measurements.sha256(
        folder / "losses.csv"
    )
    assert plan.provenance["explanation"] == found["regmix"].weights.reasons
    given = Plan.load(folder / "data" / "plan.json")
    assert plan.provenance["plan"] == given.hash  # as it lies there, without these caps
    html = (tmp_path / "out" / "weights.html").read_text()
    assert html.count("<svg") == 4  # all weights, and what three methods measured


def test_influence_reads_whole_rows_of_the_plans_sources(folder, capsys):
    (mixture,) = ask(folder, f"influence={folder}/scores.parquet").values()
    assert "the plan has no source other; not used" in capsys.readouterr().out
    (other,) = ask(folder, f"influence={folder}/scores.parquet", seed=1).values()
    assert other.weights == mixture.weights
    assert other.weights.measured != mixture.weights.measured  # the draws of the intervals
    table = pq.read_table(folder / "scores.parquet").to_pylist()
    density = {}
    for source in SOURCES:
        lines = [line for line in table if line["source"] == source]
        total = sum(line["tokens"] for line in lines)
        density[source] = sum(line["tokens"] * line["datainf"] for line in lines) / total
    expected = {s: d / sum(density.values()) for s, d in density.items()}
    assert mixture.weights == pytest.approx(expected)


def test_leave_one_out_reads_the_last_step_unless_told(folder):
    last, first = ask(
        folder,
        f"leave_one_out={folder}/loo.json",
        f"leave_one_out={folder}/loo.json:step=10",
    ).values()
    assert last.weights == pytest.approx({"words": 0.25, "sums": 0.75})
    assert last.weights.measured["sums"].value == pytest.approx(2 * 0.6)
    assert first.weights.measured["sums"].value == pytest.approx(2 * 0.3)


def test_a_source_of_weight_0_is_left_out_of_the_plan_and_told(folder, tmp_path):
    found = ask(folder, f"influence={folder}/scores.parquet:column=datainf/sums/10")
    weights.write(found, tmp_path / "out")
    plan = Plan.load(tmp_path / "out" / "influence.json")
    assert plan.names == ("sums",) and plan.weights[0].tolist() == [[1.0]]
    assert (
        "| influence | words | left out: benefit -1 (-1 to -1) |"
        in (tmp_path / "out" / "weights.md").read_text()
    )
    assert weights.table(found)[2][2:] == ["0.00%", "0.00%", "0.00"]


def test_caps_move_what_is_too_much_and_impossible_ones_are_told(folder):
    plan = Plan.load(folder / "data" / "plan.json")
    unique = {s.name: s.tokens for s in plan.sources}
    small = min(unique, key=unique.get)
    run = int(1.5 * unique[small] / 0.5)
    (free,) = ask(folder, "uniform", tokens=run).values()
    (capped,) = ask(folder, "uniform", tokens=run, max_epochs=1.2).values()
    assert free.capped == dict(free.weights) == dict(capped.weights)
    assert capped.epochs[small] == pytest.approx(1.2)
    assert sum(capped.capped.values()) == pytest.approx(1)
    with pytest.raises(
        UserError, match="the plan of uniform: the caps on epochs make the plan impos"
    ):
        ask(folder, "uniform", tokens=run * 10, max_epochs=1)
    with pytest.raises(UserError, match="max_epochs"):
        ask(folder, "uniform", tokens=run, max_epochs=0)  # is no plan without caps


def test_regmix_proposes_nothing_that_a_cap_would_cut(folder, monkeypatch):
    """Caps of one source, that the plan has, and of all; what is drawn has the seed."""
    straight = {"linear": regression.models(0)["linear"]}
    monkeypatch.setattr(regression, "models", lambda seed: straight)  # trees take long
    plan = Plan.load(folder / "data" / "plan.json")
    asked = [parse(ALL[-1].format(folder))]
    sums = {s.name: s.tokens for s in plan.sources}["sums"]
    own = [dataclasses.replace(s, max_epochs=2 if s.name == "sums" else None) for s in plan.sources]
    capped = dataclasses.replace(plan, sources=tuple(own))

    def of(plan, **options):
        (found,) = weights.mixtures_of(plan, asked, tokens=4 * sums, **options).values()
        return found

    assert of(plan).weights["sums"] > 0.55
    for found in (of(capped), of(capped, seed=1)):
        assert 0.4 < found.weights["sums"] <= 0.5 and found.capped == pytest.approx(found.weights)
    assert of(capped, seed=1).weights.reasons != of(capped).weights.reasons  # other folds
    assert of(capped, seed=1).plan.provenance["seed"] == 1
    assert of(plan, max_epochs=2.2).weights["sums"] == pytest.approx(0.55, abs=0.02)


def test_the_plans_own_caps_and_length_hold_unless_told(folder):
    plan = Plan.load(folder / "data" / "plan.json")
    with pytest.raises(UserError, match="does not say how long the run is: give --tokens"):
        weights.mixtures_of(plan, [Request("uniform")])
    staged = Plan(
        plan.sources,
        (Stage("one", 100, {"words": 1.0}), Stage("two", 100, {"sums": 1.0})),
        plan.tokenizer_path,
        plan.tokenizer,
    )
    with pytest.raises(UserError, match="has 2 stages, and weights are for one"):
        weights.mixtures_of(staged, [Request("uniform")])
    unknown = Plan.load(folder / "data" / "mixture.json")
    with pytest.raises(UserError, match="does not know the tokens of words, sums: fill them in"):
        weights.mixtures_of(unknown, [Request("uniform")], tokens=100)


def test_what_belonged_to_the_old_run_is_gone(folder):
    """Its ramp and fixed shares, and the rows that it skipped; seed, name and data stay."""
    plan = Plan.load(folder / "data" / "plan.json")
    even = {"words": 0.5, "sums": 0.5}
    stage = Stage("mine", 64_000, even, {"words": 1.0}, fixed=True)
    old = dataclasses.replace(plan, stages=(stage,), skips=(Skip(4, 4, tiny.ROW),), seed=5)
    (found,) = weights.mixtures_of(old, [Request("uniform")]).values()
    assert found.plan.stages == (Stage("mine", 64_000, even),)
    assert found.plan.skips == () and found.plan.seed == 5
    assert found.plan.tokenizer == plan.tokenizer


# --- Requests


def test_requests_are_read_as_they_are_written():
    found = parse("influence=gs://bucket/a.parquet:column=datainf/code/1000,floor=0.1")
    assert found.inputs == ("gs://bucket/a.parquet",)
    assert found.options == {"column": "datainf/code/1000", "floor": 0.1}
    assert parse("influence=gs://b/a.parquet").inputs == ("gs://b/a.parquet",)
    assert parse("leave_one_out=a b.json:step=5,standardise=true").options == {
        "step": 5,
        "standardise": True,
    }
    assert parse("regmix=a.csv+b.csv:top=3").inputs == ("a.csv", "b.csv")
    assert parse("influence=a+b/c.parquet:column=x").inputs == ("a+b/c.parquet",)
    assert parse("uniform") == Request("uniform", text="uniform")


@pytest.mark.parametrize(
    "text, said",
    [
        ("unifrom", "there is no method 'unifrom', only uniform, size"),
        ("uniform=a.csv", "uniform reads 0 files, not 1"),
        ("regmix=a.csv", "regmix reads 2 files, not 1"),
        ("size:temp=2", "size has no option 'temp'; it has temperature"),
        ("uniform:a=2", "uniform has no option 'a'; it has none"),
        ("size:temperature=hot", "temperature=hot is not usable"),
        ("leave_one_out=a:standardise=maybe", "standardise=maybe is not usable"),
        ("size:temperature", "is not of the form METHOD"),
    ],
)
def test_bad_requests_are_told(text, said):
    with pytest.raises(UserError, match=said):
        parse(text)


def test_two_requests_of_one_name_are_refused(folder):
    with pytest.raises(UserError, match="two of the methods would get one name: uniform, uniform"):
        ask(folder, "uniform", "uniform")


# --- Inputs


def without(name):
    return lambda columns: {k: v for k, v in columns.items() if k != name}


def with_(name, index, value):
    def change(columns):
        values = list(columns[name])
        values[index] = value
        return {**columns, name: values}

    return change


@pytest.mark.parametrize(
    "change, column, said",
    [
        (without("row"), "", "has no column row, only source, offset"),
        (
            without("datainf"),
            "",
            "has 0 joint columns: choose one by column=..., of datainf/sums/10",
        ),
        (lambda c: {**c, "tracin": c["datainf"]}, "", "has 2 joint columns: choose one"),
        (
            lambda c: c,
            "tracin",
            "no column 'tracin' of benefits: choose one by column=..., of datainf",
        ),
        (lambda c: c, "tokens", "no column 'tokens' of benefits"),
        (
            with_("datainf", 3, float("nan")),
            "",
            "'datainf' of 'words' has 1 values that are no numbers",
        ),
        (with_("datainf", 50, float("inf")), "", "'datainf' of 'sums' has 1 values"),
        (with_("tokens", 2, 0), "", "a piece of 'words' has no tokens"),
        (lambda c: {**c, "source": ["words"] * 85}, "", "has no piece of the source 'sums'"),
        (
            lambda c: c,
            "datainf/words/10",
            "no source helps: the benefit of the best, words, is -0.5",
        ),
    ],
)
def test_what_is_wrong_with_scores_is_said(folder, tmp_path, change, column, said):
    path = scores_file(tmp_path / "scores.parquet", change)
    with pytest.raises(UserError, match=said):
        ask(folder, f"influence={path}" + (f":column={column}" if column else ""))


def test_scores_may_be_another_file_or_none(folder, tmp_path):
    with pytest.raises(UserError, match="there are no scores at"):
        ask(folder, f"influence={tmp_path}/none.parquet")
    with pytest.raises(UserError, match="is no readable Parquet file"):
        ask(folder, f"influence={folder}/losses.csv")
    with pytest.raises(UserError, match="there are no leave-one-out runs at"):
        ask(folder, f"leave_one_out={tmp_path}/none.json")


def dropped(raw, **keys):
    kept = [r for r in raw["records"] if any(r[k] != v for k, v in keys.items())]
    return {**raw, "records": kept}


@pytest.mark.parametrize(
    "change, options, said",
    [
        (lambda raw: {**raw, "version": 2}, "", "has version 2, this program reads 1"),
        (lambda raw: {**raw, "records": []}, "", "has no record"),
        (lambda raw: {**raw, "records": raw["records"] * 2}, "", "has 16 records twice"),
        (lambda raw: {**raw, "records": [{}]}, "", "is not usable .KeyError: 'source'"),
        (lambda raw: raw, ":step=15", "has no step 15, only 10, 20"),
        (
            lambda raw: dropped(raw, source="sums", seed=1, step=20, capability="words"),
            "",
            "no rise of 'words' without 'sums' of seed 1 at step 20",
        ),
        (
            lambda raw: dropped(raw, source="sums"),
            "",
            "no rise of 'words' without 'sums' of seed 0",
        ),
    ],
)
def test_what_is_wrong_with_leave_one_out_runs_is_said(folder, tmp_path, change, options, said):
    path = left_out_file(tmp_path / "loo.json", change)
    with pytest.raises(UserError, match=said):
        ask(folder, f"leave_one_out={path}{options}")
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="is not usable .RecursionError"):
        ask(folder, f"leave_one_out={path}{options}")


def test_proxies_must_have_the_sources_of_the_plan(folder, tmp_path):
    table = RunTable.load(folder / "mixtures.csv")
    RunTable(table.runs, ("words", "math"), table.values).save(tmp_path / "m.csv")
    with pytest.raises(
        UserError, match="are not the sources of the plan: math, sums are in one only"
    ):
        ask(folder, f"regmix={tmp_path}/m.csv+{folder}/losses.csv")


# --- The program


def test_the_program_from_another_folder_with_relative_paths(folder):
    command = [sys.executable, "-m", "data_mixing.weights", "--plan=data/plan.json", "--tokens=4e4"]
    command += ["--method=influence=scores.parquet:column=datainf/sums/10", "--out=mixtures/a"]
    root = str(weights.__file__).rsplit("/", 2)[0]
    environment = {"PYTHONPATH": root, "PATH": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    assert "influence: words left out: benefit -1" in done.stdout
    plan = Plan.load(folder / "mixtures" / "a" / "influence.json")
    assert open_mixture(plan, tiny.ROW, tiny.VOCAB).read(np.arange(5))["tokens"].any()
    again = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert again.returncode == 1 and "exists and is not empty" in again.stderr


def test_a_run_without_end_has_no_weights(folder):
    flags = f"--plan={folder}/data/plan.json", "--method=uniform", f"--out={folder}/endless"
    ended = runs.program("data_mixing.weights", *flags, "--tokens=inf")
    assert ended.status == 1 and "--tokens=inf is no length of a run" in ended.err
    assert not (folder / "endless").exists()
