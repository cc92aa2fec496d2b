"""Plans: checked where they are read, capped as water fills, changed only from a point on."""

import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pytest
import runs
import tiny

from mobilellm_jax.data.apportion import water_fill
from mobilellm_jax.data.mixture import BLOCK
from mobilellm_jax.data.opening import open_mixture
from mobilellm_jax.data.plan import Plan, PlanSource, Skip, Stage
from mobilellm_jax.errors import UserError
from mobilellm_jax.plan import effective_tokens, fill_in, table, write
from mobilellm_jax.rows import open_run

pytestmark = pytest.mark.usefixtures("shared_programs")
PUBLISHED = pathlib.Path(__file__).parents[2] / "configs" / "plans"


def plan_of(stages, tokens=(1000, 2000, 4000), caps=(None, None, None), **more):
    """Sources a, b, c."""
    sources = tuple(
        PlanSource(n, n, tokens=t, max_epochs=c)
        for n, t, c in zip("abc", tokens, caps, strict=True)
    )
    return Plan(sources, tuple(stages), "tokenizer.model", "f", **more)


def stage(name, tokens, *shares, end=None, fixed=False):
    def named(values):
        return {n: w for n, w in zip("abc", values, strict=True) if w}

    return Stage(name, tokens, named(shares), named(end) if end else None, fixed)


PLAIN = [stage("one", 5000, 0.5, 0.3, 0.2), stage("two", None, 0.2, 0.0, 0.8)]
RAMP = [stage("one", 4000, 0.5, 0.3, 0.2, end=(0.1, 0.1, 0.8)), stage("two", 3000, 0.2, 0.4, 0.4)]


def spoilt(change):
    raw = plan_of(PLAIN).to_dict()
    change(raw)
    return Plan.from_dict(raw, "here")


# --- Reading and writing


@pytest.mark.parametrize("stages", [PLAIN, RAMP])
def test_a_plan_comes_back_as_it_was(tmp_path, stages):
    plan = plan_of(stages, seed=3, skips=(Skip(7, 2, 8, "a spike"),), provenance={"by": "me"})
    plan.save(tmp_path / "mixture.json")
    found = Plan.load(tmp_path / "mixture.json")
    assert found.hash == plan.hash and found.provenance == {"by": "me"}
    assert found == dataclasses.replace(
        plan, directory=str(tmp_path), stages=found.stages, provenance=found.provenance
    )
    found.save(tmp_path / "again.json")
    text = (tmp_path / "again.json").read_text()
    assert text == (tmp_path / "mixture.json").read_text()  # renormalising has a fixed point


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda raw: raw.update(version=1), "has version 1, this program reads 2: prepare again"),
        (lambda raw: raw.pop("stages"), "KeyError: 'stages'"),
        (lambda raw: raw.update(sources=[]), "at least one source and one stage"),
        (lambda raw: raw["sources"].append(raw["sources"][0]), "names a source twice: a, a, b, c"),
        (lambda raw: raw["stages"].append(raw["stages"][0]), "names a stage twice"),
        (lambda raw: raw["sources"][0].update(name="A b"), "cannot be called 'A b'"),
        (lambda raw: raw["sources"][0].update(rows=0), "rows of 'a' is 0, not above 0"),
        (lambda raw: raw["sources"][1].update(max_epochs=-1), "max_epochs of 'b' is -1.0"),
        (lambda raw: raw["sources"][1].update(max_epochs=4), "'two' has no `tokens`, and caps"),
        (lambda raw: raw["stages"][0].update(tokens=None), "'one' has no `tokens`, and others"),
        (lambda raw: raw["stages"][0].update(tokens=0), "tokens of the stage 'one' are not above"),
        (lambda raw: raw["stages"][0].update(wieghts={}), "a stage has no key 'wieghts'"),
        (lambda raw: raw["sources"][0].update(max_epoch=4), "a source has no key 'max_epoch'"),
        (lambda raw: raw.update(skip=[]), "a plan has no key 'skip'"),
        (lambda raw: raw.update(seed=1e999), "OverflowError: cannot convert float infinity"),
        (lambda raw: raw["sources"][0].update(rows=2.5), "2.5 is no whole number"),
        (lambda raw: raw["stages"][0].update(fixed="false"), "fixed is 'false', neither true"),
        (lambda raw: raw.update(skips=[{"at_row": "7", "rows": 2, "row_length": 8}]), "'7' is no"),
        (lambda raw: raw["stages"][0]["weights"].update(d=0.1), "gives d a weight.*are a, b, c"),
        (lambda raw: raw["stages"][0]["weights"].update(a=0.6), "'one' in here sum to 1.1, not"),
        (lambda raw: raw["stages"][0].update(tokens=10**16), "is more than 1,125,899,906,842,624"),
        (lambda raw: raw["sources"][0].update(rows=1e300), "1e.300 is more than"),
        (
            lambda raw: raw.update(skips=[{"at_row": 1 << 60, "rows": 2, "row_length": 8}]),
            "1152921504606846976 is more than",
        ),
        (lambda raw: raw["stages"][0]["weights"].update(a=-0.5), "a has -0.5, but a weight is"),
        (lambda raw: raw["stages"][0]["weights"].pop("a"), "sum to 0.5, not to 1"),
        (
            lambda raw: raw["stages"][1].update(weights_end={"a": 1.0}),
            "'two' has no `tokens`, and caps and ramps",
        ),
        (
            lambda raw: raw.update(skips=[{"at_row": -1, "rows": 2, "row_length": 8}]),
            "the skip at row -1 is not usable",
        ),
        (
            lambda raw: raw.update(
                skips=[{"at_row": at, "rows": 2, "row_length": 8} for at in (9, 3)]
            ),
            "not in the order of the run",
        ),
    ],
)
def test_what_is_wrong_with_a_plan_is_said_where_it_is_read(change, said):
    with pytest.raises(UserError, match=said):
        spoilt(change)


def test_a_folder_is_no_plan(tmp_path):
    with pytest.raises(UserError, match="there is no plan at"):
        Plan.load(tmp_path)


@pytest.mark.parametrize("path", ["tfds:", "tfds:no_such_data_set", "tfds:../x"])
def test_a_name_that_tfds_does_not_know_is_one_sentence(path):
    with pytest.raises(UserError, match="is no data set of TFDS here") as error:
        Plan.load(PUBLISHED / "mobilellm_r1_midtrain.json").resolve(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["pretrain", "pretrain_capped", "midtrain"])
def test_the_published_plans_are_read_and_the_pretraining_ones_mean_what_the_paper_says(
    name, capsys
):
    plan = Plan.load(PUBLISHED / f"mobilellm_r1_{name}.json")
    assert "renormalised" in capsys.readouterr().out
    text = table(plan)
    if name == "pretrain":
        (line,) = [line for line in text.splitlines() if line.startswith("openwebmath")]
        assert line.split()[2:5] == ["6.93%", "145B", "11.53"]
        assert line.split()[5:8] == ["23.33%", "489B", "38.83"]
        assert "1.704T of 1.784T unique tokens are read, 4.194T tokens in all" in text
        assert "worth 3.562T fresh ones; that is 11.7% of the 36T" in text
    if name == "pretrain_capped":
        seen = plan.read(plan.tokens)
        limit = np.array([4.0 * source.tokens for source in plan.sources])
        assert (seen <= limit * (1 + 1e-9)).all() and (np.isclose(seen, limit).sum() >= 7)


# --- Caps


def test_one_stage_is_filled_like_a_row_of_glasses():
    """By hand: the cap of the first binds at 0.1; 0.9 goes to the others as 0.3 to 0.2."""
    found, missing = water_fill(
        np.array([[0.5, 0.3, 0.2]]), np.array([1000.0]), np.array([100.0, np.inf, np.inf])
    )
    np.testing.assert_allclose(found, [[0.1, 0.54, 0.36]])
    assert missing == [0]


def test_caps_hold_exactly_and_what_is_uncapped_keeps_its_proportions():
    rng = np.random.default_rng(0)
    for _ in range(300):
        stages, sources = rng.integers(1, 4), rng.integers(2, 8)
        weights = rng.dirichlet(np.ones(sources) / 2, stages)
        budgets, caps = rng.uniform(1, 10, stages), rng.uniform(0.1, 12, sources)
        caps[rng.integers(sources)] = np.inf
        found, missing = water_fill(weights, budgets, caps)
        given = budgets @ found
        assert (given <= caps * (1 + 1e-9)).all() and (missing >= 0).all()
        np.testing.assert_allclose(found.sum(1) + missing / budgets, 1, rtol=1e-9)
        free = given < caps * (1 - 1e-9)
        ratio = found[:, free] / weights[:, free]  # one factor a stage
        np.testing.assert_allclose(ratio, ratio[:, :1] * np.ones_like(ratio), rtol=1e-9)
        full = ~free & (budgets @ weights > caps)  # lowered: one factor for all stages
        factor = found[:, full] / weights[:, full]
        np.testing.assert_allclose(factor, factor[:1] * np.ones_like(factor), rtol=1e-9)


def test_caps_of_a_plan_count_over_stages_and_ramps():
    stages = [dataclasses.replace(s, tokens=s.tokens or 3000) for s in RAMP]
    plan = Plan.from_dict(plan_of(stages, caps=(0.5, None, 0.7)).to_dict(), "here")
    read = plan.read(7000)
    np.testing.assert_allclose(read, [500, 7000 - 500 - 2800, 2800])
    first, last = plan.weights
    np.testing.assert_allclose([first.sum(1), last.sum(1)], 1)


def test_a_fixed_stage_keeps_its_weights_and_the_others_have_the_rest_of_the_cap():
    stages = [stage("one", 1000, 0.6, 0.2, 0.2, fixed=True), stage("two", 1000, 0.6, 0.2, 0.2)]
    plan = Plan.from_dict(plan_of(stages, caps=(0.7, None, None)).to_dict(), "here")
    np.testing.assert_allclose(plan.weights[0], [[0.6, 0.2, 0.2], [0.1, 0.45, 0.45]])


def test_impossible_caps_are_refused_with_what_is_missing():
    stages = [stage("one", 2000, 0.5, 0.5, 0.0), stage("two", 10_000, 0.0, 0.5, 0.5)]
    raw = plan_of(stages, caps=(1, 1, 1)).to_dict()
    with pytest.raises(
        UserError,
        match="here: the caps .* one by 667 tokens; two by 4,333 tokens more .* max_epochs",
    ):
        Plan.from_dict(raw, "here")
    raw = plan_of(stages, caps=(1, 1, 1), tokens=(1000, None, 4000)).to_dict()
    with pytest.raises(UserError, match="max_epochs of 'b' needs to know its tokens"):
        Plan.from_dict(raw, "here")


# --- What is read, and what may change


def test_what_a_plan_reads_is_the_sum_of_its_shares():
    plan = plan_of(RAMP)
    at = np.linspace(0, 1, 4001)[1:, None] - 0.5 / 4000
    one, end = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.1, 0.8])
    by_token = np.concatenate([one + (end - one) * at, np.tile([0.2, 0.4, 0.4], (3000, 1))])
    for tokens in (0, 1, 1000, 4000, 5500, 7000):
        np.testing.assert_allclose(plan.read(tokens), by_token[:tokens].sum(0), atol=1e-9)


def test_the_past_of_a_plan_knows_what_matters_and_nothing_else():
    plan = plan_of(PLAIN)
    same = [
        dataclasses.replace(plan, stages=(*plan.stages[:1], stage("new", None, 1.0, 0.0, 0.0))),
        dataclasses.replace(plan, stages=(stage("renamed", 6000, 0.5, 0.3, 0.2), plan.stages[1])),
        dataclasses.replace(plan, skips=(Skip(700, 5, 8),), provenance={"x": 1}),
        plan.changed_at(5000, stage("new", None, 0.0, 1.0, 0.0)),
    ]
    other = [
        dataclasses.replace(plan, seed=1),
        dataclasses.replace(plan, tokenizer="g"),
        dataclasses.replace(plan, stages=plan.stages[1:]),
        dataclasses.replace(plan, stages=(stage("one", 4000, 0.5, 0.3, 0.2), plan.stages[1])),
        dataclasses.replace(plan, skips=(Skip(600, 5, 8),)),
        dataclasses.replace(plan, sources=plan.sources[::-1]),
        plan_of(RAMP),
    ]
    for changed in same:
        assert changed.past(5000) == plan.past(5000)
    for changed in other:
        assert changed.past(5000) != plan.past(5000)
    ramp = plan_of(RAMP)
    longer = dataclasses.replace(ramp, stages=(dataclasses.replace(RAMP[0], tokens=4500), RAMP[1]))
    assert longer.past(10) != ramp.past(10)  # another slope from the first row on


def test_a_change_keeps_what_was_read_also_under_caps():
    stages = [stage("one", 3000, 0.6, 0.2, 0.2), stage("two", 3000, 0.6, 0.2, 0.2)]
    plan = Plan.from_dict(plan_of(stages, caps=(2.0, None, None)).to_dict(), "here")
    for at in (1000, 3000, 4000):
        changed = plan.changed_at(at, stage("three", 4000, 0.5, 0.5, 0.0))
        changed = Plan.from_dict(changed.to_dict(), "there")
        np.testing.assert_allclose(changed.read(at), plan.read(at))
        assert changed.read(at + 4000)[0] <= 2000 + 1e-6
        assert changed.past(at) == plan.past(at)
    with pytest.raises(UserError, match="no point at 7,000 tokens: it ends at 6,000"):
        plan.changed_at(7000, stages[0])
    with pytest.raises(UserError, match="'one' is a ramp, and 100 tokens lie inside it"):
        plan_of(RAMP).changed_at(100, stages[1])


def test_a_run_goes_on_when_its_plan_changes_ahead_of_it_and_not_behind(tmp_path, capsys):
    path = tiny.corpus(tmp_path / "data")
    config = tiny.config(path)
    runs.run(config, tmp_path / "run", stop_at=6)
    plan, done = Plan.load(path), 6 * 16 * tiny.ROW
    new = Stage("later", None, {"sums": 1.0})
    plan.changed_at(done - tiny.ROW, new).save(path)
    with pytest.raises(UserError, match="differ in the stages"):
        runs.run(config, tmp_path / "run")
    plan.changed_at(done, new).save(path)
    runs.run(config, tmp_path / "run")
    seen = {step: line for step, line in runs.lines(tmp_path / "run").items() if step > 6}
    assert all(line["rows/words"] == 0 and line["stage"] == 1 for line in seen.values())
    # And it is as if the plan had always been this one.
    runs.run(config, tmp_path / "whole")
    assert runs.rows_seen(tmp_path / "whole") == runs.rows_seen(tmp_path / "run")


def test_a_run_that_begins_inside_a_plan_reads_what_is_left_of_it(tmp_path):
    """Two runs, the second at the row where the first ended, read what one would have read."""
    path = tiny.corpus(tmp_path / "data")
    raw = json.loads(path.read_text())
    first = 6 * 16
    raw["stages"][0]["tokens"] = first * tiny.ROW
    raw["stages"].append({"name": "later", "tokens": first * tiny.ROW, "weights": {"sums": 1.0}})
    path.write_text(json.dumps(raw))
    runs.run(tiny.config(path, 12), tmp_path / "whole")
    config = tiny.config(path, 6)
    config.first_row = first
    config.init_from = str(tmp_path / "whole")
    runs.run(config, tmp_path / "second")
    whole, second = (runs.rows_seen(tmp_path / name) for name in ("whole", "second"))
    assert [(rows, crc) for _, rows, crc in second] == [(r, c) for _, r, c in whole[6:]]
    assert all(line["rows/words"] == 0 for line in runs.lines(tmp_path / "second").values())
    run = open_run(tmp_path / "second")
    assert run.rows_of(1) == (first, first + 16) and run.length.step_of(first + 16) == 2
    config.first_row = first + 1
    with pytest.raises(UserError, match="wants 96 rows .* from row 97 on, .* ends after 192"):
        runs.run(config, tmp_path / "third")


def test_epochs_are_logged(tmp_path):
    path = tiny.corpus(tmp_path / "data")
    runs.run(tiny.config(path), tmp_path / "run")
    mixture = open_mixture(Plan.load(path), tiny.ROW, tiny.VOCAB)
    lengths, total = [len(rows) for rows in mixture.sources], np.zeros(2)
    for line in runs.lines(tmp_path / "run").values():
        total += [line["rows/words"], line["rows/sums"]]
        found = [line["epochs/words"], line["epochs/sums"]]
        np.testing.assert_allclose(found, total / lengths)
        assert line["stage"] == 0


# --- Context lengths


@pytest.mark.parametrize("length", [8, 16, 32, 64, 96])
def test_one_store_gives_rows_of_every_length(tmp_path, length):
    """The concatenated source, read in order, is the same stream of tokens at every length."""
    plan = Plan.load(tiny.corpus(tmp_path))
    stored = open_mixture(plan, tiny.ROW, tiny.VOCAB).sources[0]
    rows = open_mixture(plan, length, tiny.VOCAB).sources[0]
    assert len(rows) == len(stored) * tiny.ROW // length
    tokens = rows.read(np.arange(len(rows)))
    whole = stored.read(np.arange(len(stored)))
    stream = np.append(whole[:, :-1].ravel(), whole[-1, -1])
    for row, at in zip(tokens, itertools.count(0, length), strict=False):
        assert (row == stream[at : at + length + 1]).all()
    shuffled = np.random.default_rng(0).permutation(len(rows))
    assert (rows.read(shuffled) == tokens[shuffled]).all()
    for index in (0, len(rows) - 1):
        first, count, begin = rows.stored(index)
        found = np.append(whole[first : first + count, :-1].ravel(), whole[first + count - 1, -1])
        assert (found[begin : begin + length + 1] == tokens[index]).all()


# --- The program


def test_the_price_of_repetition():
    unique = np.array([100.0, 100.0, 100.0, 100.0])
    found = effective_tokens(unique, np.array([0.0, 50.0, 100.0, 400.0]))
    np.testing.assert_allclose(found[:3], [0, 50, 100])
    assert found[3] == pytest.approx(100 + 1539 * (1 - np.exp(-3 / 15.39)))


@pytest.mark.parametrize(
    ("count", "shown"),
    [(999_999_488, "1B"), (999_499_999, "999M"), (999_600, "1M"), (999_700_000_000, "1.000T")],
)
def test_counts_of_tokens_are_written_without_powers_of_ten(count, shown):
    text = table(plan_of([stage("one", 5000, 0.5, 0.3, 0.2)], tokens=(count, 2000, 4000)))
    (line,) = [line for line in text.splitlines() if line.startswith("a ")]
    assert line.split()[1] == shown


def test_a_published_plan_is_tied_to_prepared_data_and_trained_on(tmp_path):
    data = tiny.corpus(tmp_path / "data").parent
    template = tmp_path / "template.json"
    Plan(
        (PlanSource("words", "words", tokens=10**9), PlanSource("sums", "sums", max_epochs=2.0)),
        (Stage("one", 4000, {"words": 0.5, "sums": 0.5}),),
        "tokenizer.json",
        "",
    ).save(template)
    with pytest.raises(UserError, match="max_epochs of 'sums' needs to know its tokens"):
        Plan.load(template)
    raw = json.loads(template.read_text())
    raw["sources"][1]["tokens"] = 10**9
    template.write_text(json.dumps(raw))
    out = data / "tied.json"
    ended = runs.program("mobilellm_jax.plan", str(template), f"--data={data}", f"--out={out}")
    assert ended.status == 0, ended.err
    assert "sums" in ended.out and f"{out}: written." in ended.out
    plan = Plan.load(out)
    assert (
        plan.tokenizer == tiny.tokenizer().fingerprint and plan.tokenizer_path == "tokenizer.model"
    )
    assert len(open_mixture(plan, tiny.ROW, tiny.VOCAB)) == 125
    again = runs.program("mobilellm_jax.plan", str(template), f"--data={data}", f"--out={out}")
    assert again.status == 1 and "exists already" in again.err


def test_a_plan_of_all_that_was_prepared_reads_each_source_as_often(tmp_path):
    data = tiny.corpus(tmp_path / "data").parent
    (data / "mixture.json").unlink()  # nothing but the sources themselves says what is there
    shown = runs.program("mobilellm_jax.plan", str(data))
    assert shown.status == 0 and "words" in shown.out and "sums" in shown.out, shown.err
    assert not list(data.glob("*.json"))  # a table alone
    out = data / "all.json"
    assert runs.program("mobilellm_jax.plan", str(data), f"--out={out}").status == 0
    plan = Plan.load(out)
    rows = {source.name: source.rows for source in plan.sources}
    assert set(rows) == {"words", "sums"} and all(rows.values())
    given = open_mixture(plan, tiny.ROW, tiny.VOCAB).given(BLOCK)
    epochs = given / np.array(list(rows.values()))
    assert epochs == pytest.approx([BLOCK / sum(rows.values())] * 2, abs=0.01)


def test_a_plan_of_prepared_sources_in_given_shares(tmp_path):
    data = tiny.corpus(tmp_path / "data").parent
    for given, shares in (
        ("sums=0.75,words=0.25", {"sums": 0.75, "words": 0.25}),
        ("words=1,sums=0", {"words": 1.0}),
    ):
        out = data / f"{len(shares)}.json"
        ended = runs.program("mobilellm_jax.plan", str(data), f"--weights={given}", f"--out={out}")
        assert ended.status == 0, ended.err
        plan = Plan.load(out)
        assert plan.stages == (Stage("train", None, shares),) and set(plan.names) == set(shares)
    changed = data / "changed.json"
    flags = "--change_at=3072", "--weights=sums=1", f"--out={changed}"
    assert runs.program("mobilellm_jax.plan", str(data), *flags).status == 0
    first, second = Plan.load(changed).stages
    assert set(first.weights) == {"words", "sums"} and second.weights == {"sums": 1.0}


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--weights=words=0.5",), "sum to 0.5"),
        (("--weights=prose=1",), "no complete source for prose"),
        (("--data=elsewhere",), "is a directory of them"),
        (("--name=later",), "--change_at"),
    ],
)
def test_what_a_directory_of_sources_cannot_be_asked(tmp_path, flags, said):
    data = tiny.corpus(tmp_path / "data").parent
    ended = runs.program("mobilellm_jax.plan", str(data), *flags)
    assert ended.status == 1 and said in ended.err


def test_a_directory_without_sources_and_shares_of_no_stage_are_refused(tmp_path):
    ended = runs.program("mobilellm_jax.plan", str(tmp_path))
    assert ended.status == 1 and "holds no complete source" in ended.err
    path = tiny.corpus(tmp_path / "data")
    ended = runs.program("mobilellm_jax.plan", str(path), "--weights=words=1")
    assert ended.status == 1 and "--change_at" in ended.err


def test_a_plan_in_another_folder_finds_its_data(tmp_path):
    path = tiny.corpus(tmp_path / "data")
    (tmp_path / "plans").mkdir()
    out = tmp_path / "plans" / "new.json"
    flags = f"--data={tmp_path / 'data'}", f"--out={out}"
    assert runs.program("mobilellm_jax.plan", str(path), *flags).status == 0
    plans = Plan.load(path), Plan.load(out)
    first, again = (open_mixture(plan, tiny.ROW, tiny.VOCAB).read(np.arange(9)) for plan in plans)
    np.testing.assert_array_equal(first["tokens"], again["tokens"])


def test_a_stage_shorter_than_a_row_has_none(tmp_path):
    path = tiny.corpus(tmp_path)
    flags = "--change_at=10", "--weights=sums=1.0", f"--out={tmp_path / 'new.json'}"
    assert runs.program("mobilellm_jax.plan", str(path), *flags).status == 0
    mixture = open_mixture(Plan.load(tmp_path / "new.json"), tiny.ROW, tiny.VOCAB)
    sums = mixture.plan.names.index("sums")
    np.testing.assert_array_equal(mixture.read(np.arange(50))["source"], sums)
    assert mixture.given(50)[sums] == 50


def test_the_program_changes_a_plan_into_a_new_file(tmp_path):
    path = tiny.corpus(tmp_path)
    flags = "--change_at=3072", "--weights=sums=1.0", "--name=later"
    without = runs.program("mobilellm_jax.plan", str(path), *flags)
    assert without.status == 1 and "--out" in without.err and "later" in without.out
    out = tmp_path / "new.json"
    ended = runs.program("mobilellm_jax.plan", str(path), *flags, f"--out={out}")
    assert ended.status == 0, ended.err
    assert Plan.load(out).past(3072) == Plan.load(path).past(3072)
    assert [s.name for s in Plan.load(out).stages] == ["train", "later"]


def test_what_cannot_be_tied_is_said(tmp_path):
    plan = plan_of(PLAIN)
    with pytest.raises(UserError, match="no complete source for a, b, c"):
        fill_in(plan, tmp_path)
    path = tiny.corpus(tmp_path)
    with pytest.raises(UserError, match="exists already"):
        write(Plan.load(path), path)
