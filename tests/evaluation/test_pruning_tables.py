"""The tables of the pruning papers: what is there is measured once, what is not is a dash and no error."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from absl import flags

from benchmarks import pruning_tables
from benchmarks.pruning_tables import TABLES, Table, markdown, measured
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluate import evaluate
from mobilellm_jax.evaluation.suites import AVERAGE, SUITES, Entry
from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.training.checkpoint import load_model, write_model

TABLE = Table("A table", "mine", {"here": {"Sums": 41.5, AVERAGE: 50.0}, "absent": {"Sums": 30.0}})
MINE = (
    Entry("sums", "acc,none", "Sums", averaged=True),
    Entry("sums", "acc_norm,none", "Normalised", averaged=True),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with one network, and the data of its tasks beside it."""
    folder = tmp_path_factory.mktemp("models")
    tiny.tasks(folder)
    params = flat(jax.device_get(transformer.init(tiny.MODEL, jax.random.key(0))))
    write_model(params, tiny.MODEL, tiny.tokenizer(), {}, folder / "here")
    return folder


@pytest.fixture
def asked(monkeypatch):
    """Tasks that were asked: each answers with a figure of its own, at once."""
    found, figures = [], {MINE[0]: 0.5, MINE[1]: 0.25}

    def answer(model, entry, limit, **settings):
        found.append((entry, limit))
        if entry not in figures:
            raise UserError("there is no such task.")
        return figures[entry]

    monkeypatch.setattr(pruning_tables, "_asked", answer)
    return found


def test_what_is_there_is_measured_once(models, tmp_path, monkeypatch, asked, capsys):
    monkeypatch.setitem(SUITES, "mine", MINE)
    kept = tmp_path / "results.jsonl"
    found = measured([TABLE], models, kept)
    assert found == {("here", MINE[0]): 0.5, ("here", MINE[1]): 0.25}
    assert not capsys.readouterr().err  # a network that is not there is no error
    kept.write_text(kept.read_text().splitlines()[0] + "\n")  # stopped after the first task
    assert measured([TABLE], models, kept) == found == measured([TABLE], models, kept)
    assert asked == [(MINE[0], None), (MINE[1], None), (MINE[1], None)]
    measured([TABLE], models, kept, limit=2)  # fewer documents: other results
    assert asked[3:] == [(entry, 2) for entry in MINE] and len(kept.read_text().splitlines()) == 4


def test_what_cannot_be_measured_is_told_and_the_rest_goes_on(
    models, tmp_path, monkeypatch, asked, capsys
):
    monkeypatch.setitem(SUITES, "mine", (Entry("nowhere", "acc,none", "Nowhere"), MINE[0]))
    (models / "broken").mkdir()
    table = Table("A table", "mine", {"broken": {}, "here": {}})
    found = measured([table], models, tmp_path / "results.jsonl")
    assert found == {("here", MINE[0]): 0.5} and len(asked) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("broken: there is no checkpoint in")
    assert second == "here, Nowhere: there is no such task."


def test_the_table_has_both_figures(monkeypatch):
    monkeypatch.setitem(SUITES, "mine", MINE)
    text = markdown(TABLE, {("here", MINE[0]): 0.5, ("here", MINE[1]): 0.25})
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert cells[0] == ["network", "Sums", "Normalised", AVERAGE]
    assert cells[2] == ["here", "50.00 / 41.50", "25.00", "37.50 / 50.00"]
    assert cells[3] == ["absent", "- / 30.00", "-", "-"]
    part = markdown(TABLE, {("here", MINE[0]): 0.5})  # an average of all or none
    assert "| here | 50.00 / 41.50 | - | - / 50.00 |" in part


def test_published_averages_are_those_of_their_rows():
    labels = [entry.label for entry in SUITES["efficientllm"] if entry.averaged]
    for name, row in TABLES["efficientllm"].rows.items():
        assert np.mean([row[label] for label in labels]) == pytest.approx(row[AVERAGE], abs=0.02), (
            name
        )


@pytest.mark.slow
def test_the_command_prints_what_evaluation_finds(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SUITES, "mine", MINE)
    monkeypatch.setattr(pruning_tables, "TABLES", {"mine": TABLE})
    values = {"models": str(models), "out": str(tmp_path / "out"), "only": "here", "limit": 3}
    values |= {"data": str(models), "rows": 4, "dtype": "float32"}
    monkeypatch.setattr(flags, "FLAGS", SimpleNamespace(**values))
    pruning_tables.main([])
    printed = capsys.readouterr().out
    assert "here" in printed and "absent" not in printed
    assert (tmp_path / "out" / "tables.md").read_text() == printed
    lines, _ = evaluate(load_model(models / "here"), ["sums"], data=models, limit=3)
    wanted = {line.metric: line.value for line in lines}
    kept = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    found = {record["metric"]: record["value"] for record in map(json.loads, kept)}
    assert found == {"acc,none": wanted["acc"], "acc_norm,none": wanted["acc_norm"]}
