"""Mixtures compared: what is measured, seed by seed, and the pipeline from sources to that."""

import contextlib
import dataclasses
import gzip
import io
import json
import math

import mixing
import numpy as np
import pytest
import runs
import tiny

from data_mixing import compare as comparing
from data_mixing import derivatives, experiments
from data_mixing.compare import Comparison, answer_rows, compare, open_plans
from data_mixing.pipeline import Effort, pipeline
from data_mixing.scorers import Settings
from mobilellm_jax.data.packing import counted, token_ids
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.stored import load_model
from mobilellm_jax.parallel.mesh import one_device

CAPABILITIES = {"math": ("sums",), "language": ("words",)}
QUESTIONS = [
    {"query": "1 + 2 =", "choices": ["3", "4"], "gold": 0},
    {"query": "5 + 5 =", "choices": ["9", "10"], "gold": 1},
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, plan, probe sets, configuration)."""
    folder = tmp_path_factory.mktemp("compare")
    texts = {"sums": tiny.documents("sums", 150), "words": tiny.documents("words", 150)}
    plan = mixing.sources(folder, texts)
    (folder / "eval").mkdir()
    (folder / "eval" / "sums.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)) + "\n")
    problem = {"context": "Add 3 and 4.", "chain_of_thought": "3 + 4 = 7", "answer": "7"}
    with gzip.open(folder / "eval" / "problems.jsonl.gz", "wt") as lines:
        lines.write(json.dumps(problem) + "\n")
    config = tiny.config(folder / "data" / "mixture.json", 10)
    config.checkpoint.every = 10
    return folder, plan, mixing.probes(folder, CAPABILITIES), config


def quietly(function, *args, **settings):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return function(*args, **settings)


def test_of_questions_the_right_answers_count(made):
    tokenizer = tiny.tokenizer()
    found = answer_rows(made[0] / "eval", tokenizer, tiny.ROW, 10)
    assert list(found) == ["answers/problems", "answers/sums"]
    texts = {
        name: [
            tokenizer.decode(
                token_ids(row[1:])[counted(row, tokenizer.bos_id, tokenizer.eos_id)].tolist()
            ).strip()
            for row in rows
        ]
        for name, rows in found.items()
    }
    assert texts == {"answers/problems": ["3 + 4 = 7\n7"], "answers/sums": ["3", "10"]}


@pytest.fixture(scope="module")
def compared(made):
    folder, plan, sets, config = made
    plans = {
        name: experiments.member_of(name, plan, weights, config, 0, "test").plan
        for name, weights in (
            ("uniform", {"sums": 0.5, "words": 0.5}),
            ("sums", {"sums": 0.95, "words": 0.05}),
        )
    }
    for name, one in plans.items():
        one.save(folder / f"{name}.json")
    out = folder / "out"
    settings = {"seeds": 2, "answers": folder / "eval", "probe_rows": 16}
    return quietly(compare, config, plans, sets, out, **settings), plans, out


@pytest.mark.slow
def test_bits_per_byte_are_those_of_training_alone(made, compared):
    """A run of `train` on the same plan and seed, and the losses of its checkpoint."""
    folder, _, sets, config = made
    found, plans, out = compared
    config = config.copy_and_resolve_references()
    config.plan = str(out / "plans" / "sums-1.json")
    config.seed = 1
    runs.run(config, folder / "alone")
    loaded = load_model(folder / "alone")
    rows = quietly(experiments.probe_rows, sets, "heldout", plans["sums"], tiny.ROW, 16)["math"]
    ids = loaded.tokenizer.bos_id, loaded.tokenizer.eos_id
    network = derivatives.network_of(loaded.model, *ids, "float32", 1)
    of = derivatives.differentiated(loaded.params, network, "output", one_device(), 4)
    nll, weight = derivatives.losses(of, rows)
    sizes = loaded.tokenizer.piece_bytes()[token_ids(rows[:, 1:])] * weight
    expected = nll.sum() / math.log(2) / sizes.sum()
    assert found.bits["sums"]["probes/math"][1] == pytest.approx(expected, rel=1e-4)


def test_differences_are_taken_seed_by_seed(compared):
    found, _, out = compared
    assert found.measures == ["probes/math", "probes/language", "answers/problems", "answers/sums"]
    own, base = (np.array(found.bits[n]["probes/math"]) for n in ("sums", "uniform"))
    difference = found.difference("sums", "uniform", "probes/math")
    assert difference.mean == pytest.approx((own - base).mean())
    assert difference.half_width == pytest.approx(
        12.706 * abs(np.diff(own - base)[0]) / 2, rel=1e-3
    )
    # More sums, better at sums.
    assert (own < base).all()
    raw = json.loads((out / comparing.FILE).read_text())
    assert Comparison(**raw) == found
    text = (out / "table.md").read_text()
    assert f"{own.mean():.4f}" in text and "| uniform |" in text
    assert "<svg" in (out / "comparison.html").read_text()


def test_bad_input(made, compared, tmp_path):
    folder, _, _, _ = made
    with pytest.raises(UserError, match="nothing to compare"):
        open_plans(str(folder / "uniform.json"))
    assert list(open_plans(f"{folder}/uniform.json,{folder}/sums.json")) == ["uniform", "sums"]
    (tmp_path / "sums.json").write_bytes((folder / "sums.json").read_bytes())
    with pytest.raises(UserError, match="names two plans 'sums', and results are told apart"):
        open_plans(f"{folder}/uniform.json,{folder}/sums.json,{tmp_path}/sums.json")
    with pytest.raises(UserError, match=r"no .jsonl or .jsonl.gz in"):
        answer_rows(tmp_path, tiny.tokenizer(), tiny.ROW, 4)
    (tmp_path / "x.jsonl").write_text(json.dumps(QUESTIONS[0]) + '\n{"query": "a"}\n')
    with pytest.raises(UserError, match="x.jsonl, line 2, is no question"):
        answer_rows(tmp_path, tiny.tokenizer(), tiny.ROW, 4)
    (tmp_path / "x.jsonl").write_text(json.dumps({"question": "1 + 2", "answer": {"a": 3}}))
    with pytest.raises(UserError, match="line 1, is no question .* neither text nor number"):
        answer_rows(tmp_path, tiny.tokenizer(), tiny.ROW, 4)
    for wrong, said in (
        ({"query": 5}, "the query is no text"),
        ({"choices": "34"}, "the choices are no list of texts"),
        ({"choices": [1]}, "the choices are no list of texts"),
        ({"gold": 0.5}, "gold is 0.5, not the number of a choice"),
        ({"gold": -1}, "gold is -1, not the number of a choice"),
        ({"gold": 2}, "gold is 2, not the number of a choice"),
        ({"gold": "0"}, "gold is '0', not the number of a choice"),
    ):
        (tmp_path / "x.jsonl").write_text(json.dumps(QUESTIONS[0] | wrong))
        with pytest.raises(UserError, match=f"line 1, is no question .*{said}"):
            answer_rows(tmp_path, tiny.tokenizer(), tiny.ROW, 4)
    zipped = gzip.compress(b"{}" * 100)
    for name, content in (
        ("y.jsonl", b"\xff\xfe"),
        ("y.jsonl.gz", b"none"),
        ("y.jsonl.gz", zipped[:-9]),
        ("y.jsonl.gz", zipped[:12] + b"\xff" * 9 + zipped[21:]),
    ):
        (tmp_path / "broken").mkdir(exist_ok=True)
        (tmp_path / "broken" / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            answer_rows(tmp_path / "broken", tiny.tokenizer(), tiny.ROW, 4)
        (tmp_path / "broken" / name).unlink()
    half = json.dumps(QUESTIONS[0] | {"query": "\ud800"}).encode()
    for damage in (half, b"[]", b"[" * 100_000):
        (tmp_path / "x.jsonl").write_bytes(damage)
        with pytest.raises(UserError, match="line 1, is no question"):
            answer_rows(tmp_path, tiny.tokenizer(), tiny.ROW, 4)
    rows = []
    for answer in (3, "3"):
        (tmp_path / "x.jsonl").write_text(json.dumps({"question": "1 + 2", "answer": answer}))
        rows.append(answer_rows(tmp_path, tiny.tokenizer(), tiny.ROW, 4)["answers/x"])
    np.testing.assert_array_equal(*rows)
    (tmp_path / "x.jsonl").write_text(json.dumps({"question": "1 " * 200, "answer": "2"}) + "\n")
    with pytest.raises(UserError, match="no question fits into a row of 32"):
        answer_rows(tmp_path, tiny.tokenizer(), tiny.ROW, 4)


def test_a_refused_run_changes_nothing(made, compared):
    """Other plans into the same folder: those that belong to what lies there stay."""
    folder, _, sets, config = made
    _, plans, out = compared
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = {name: dataclasses.replace(plan, seed=7) for name, plan in plans.items()}
    settings = {"seeds": 2, "answers": folder / "eval", "probe_rows": 16}
    with pytest.raises(UserError, match="made with other settings"):
        quietly(compare, config, other, sets, out, **settings)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_the_whole_pipeline_and_again(made, tmp_path):
    """From sources to the report; started again it computes nothing and says the same."""
    pytest.importorskip("sklearn")
    folder, plan, sets, config = made
    effort = Effort(
        seeds=2, proxies=10, rows=12, train_rows=8, probe_rows=8, checkpoints=2, max_epochs=50
    )
    arguments = (
        config,
        plan,
        sets,
        tmp_path / "out",
        effort,
        Settings(batch_rows=8),
        folder / "eval",
    )
    first = quietly(pipeline, *arguments)
    assert set(first.bits) == {"uniform", "size", "leave_one_out", "regmix", "datainf", "tracin"}
    assert first.flops["uniform"] is None and first.flops["datainf"] > 0
    page = (tmp_path / "out" / "report.html").read_text()
    for said in ("Did it help?", "Mixture weights", "Left out", "<svg"):
        assert said in page
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.npz")}
    assert quietly(pipeline, *arguments) == first
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.npz")}
    before = runs.files(tmp_path / "out")
    for field, value in (("max_epochs", 49), ("seeds", 3), ("rows", 13)):
        other = dataclasses.replace(effort, **{field: value})
        with pytest.raises(UserError, match=rf"other settings .*\(effort.{field}: .* here\)"):
            quietly(pipeline, config, plan, sets, tmp_path / "out", other, *arguments[5:])
    with pytest.raises(
        UserError, match=r"other settings .*judged.answers/sums: .* there, None here"
    ):
        quietly(pipeline, *arguments[:-1])
    assert runs.files(tmp_path / "out") == before


def test_what_a_pipeline_would_only_meet_at_its_end_is_met_before_it_begins(made, tmp_path):
    folder, plan, sets, config = made
    scoring = {
        name: tuple(p for p in of if p.half == "score") for name, of in sets.documents.items()
    }
    (tmp_path / "none").mkdir()
    for said, probes, effort, answers in (
        ("no .jsonl or .jsonl.gz in", sets, Effort(), tmp_path / "none"),
        ("no probe in the half", dataclasses.replace(sets, documents=scoring), Effort(), None),
        ("the caps on epochs allow", sets, Effort(max_epochs=0.01), None),
    ):
        with pytest.raises(UserError, match=said):
            quietly(pipeline, config, plan, probes, tmp_path / "out", effort, Settings(), answers)
        assert not list((tmp_path / "out").iterdir())
