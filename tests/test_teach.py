"""What a teacher wrote beside rows: against the teacher, resumed, streamed, trained on, and refused."""

import functools
import json
import pickle
import re
import shutil

import jax
import numpy as np
import pytest
import runs
import tiny

from mobilellm_jax import teach as program
from mobilellm_jax.data.mixture import batches
from mobilellm_jax.data.opening import open_mixture
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.taught import MARK, TAUGHT_IDS, TAUGHT_LOG_PROBS
from mobilellm_jax.errors import UserError
from mobilellm_jax.model import transformer
from mobilellm_jax.teach import teach
from mobilellm_jax.training.checkpoint import load_model
from mobilellm_jax.training.objectives import split_rows

pytestmark = pytest.mark.usefixtures("shared_programs")
DISTILLATION = "mobilellm_jax.training.distillation:distillation"
K = 8


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def teacher(plan, tmp_path_factory):
    """The workdir of a trained network."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    runs.run(tiny.unshared(plan, steps=40), folder)
    return folder


@pytest.fixture(scope="module")
def write(plan, teacher):
    """`teach` with the settings of these tests; others are given by name."""
    settings = {"row_length": tiny.ROW, "top_k": K, "dtype": "float32"}
    return lambda name, **changes: teach(teacher, plan, name, **{**settings, **changes})


@pytest.fixture(scope="module")
def written(write):
    write("few", loss_chunks=4)
    return "few"


def folders(plan, name):
    return [plan.parent / source / "taught" / name for source in ("words", "sums")]


def test_it_is_what_the_teacher_says(plan, teacher, written):
    mixture = open_mixture(Plan.load(plan), tiny.ROW, tiny.VOCAB, written)
    batch = mixture.read(np.arange(40))
    assert batch[TAUGHT_IDS].shape == batch[TAUGHT_LOG_PROBS].shape == (40, tiny.ROW, K)
    assert set(batch["source"]) == {0, 1}
    loaded = load_model(teacher)
    rows = split_rows(batch["tokens"], loaded.tokenizer.bos_id, loaded.tokenizer.eos_id)

    @jax.jit
    def log_probabilities(params, inputs_BT, segment_ids_BT):
        hidden_BTD = transformer.apply(params, loaded.model, inputs_BT, segment_ids_BT)
        return jax.nn.log_softmax(transformer.logits(params, loaded.model, hidden_BTD))

    log_p = log_probabilities(loaded.params, rows.inputs_BT, rows.segment_ids_BT)
    wanted = np.take_along_axis(np.asarray(log_p), batch[TAUGHT_IDS], -1)
    np.testing.assert_allclose(batch[TAUGHT_LOG_PROBS], wanted, rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(wanted, np.asarray(jax.lax.top_k(log_p, K)[0]), atol=1e-5)


def test_it_travels_with_its_rows_to_processes_and_in_parts(plan, written):
    mixture = open_mixture(Plan.load(plan), tiny.ROW, tiny.VOCAB, written)
    whole = mixture.read(np.arange(32, 64))
    sent = pickle.loads(pickle.dumps(mixture))  # as to a process that reads ahead
    part = next(batches(sent, 32, 32, process=1, processes=2))
    assert part.keys() == whole.keys()
    for name, values in part.items():
        np.testing.assert_array_equal(values, whole[name][16:])


def test_interrupted_and_started_again_it_writes_the_same(plan, write, monkeypatch):
    monkeypatch.setattr(program, "SHARD_ROWS", 16)
    write("whole")
    real, calls = program.likeliest, []

    def interrupted(*arguments, **settings):
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "likeliest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write("killed")
    monkeypatch.setattr(program, "likeliest", real)
    first, second = folders(plan, "killed")
    shard = sorted(folders(plan, "whole")[0].glob("*.array_record"))[0]
    (first / shard.name).write_bytes(
        shard.read_bytes()
    )  # what a later interruption would have left
    (first / f"{shard.name}.unfinished").write_bytes(b"half")
    assert calls and not (first / MARK).exists()
    write("killed")
    for one, other in zip(folders(plan, "whole"), (first, second), strict=True):
        names = {p.name for p in one.iterdir()}
        assert names <= {p.name for p in other.iterdir()}
        assert len(names) > 3
        assert all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.mark.slow
def test_one_process_for_each_source(plan, write, capsys):
    write("parted", sources=["sums"])
    words, sums = folders(plan, "parted")
    assert (sums / MARK).exists() and not words.exists()
    write("parted")
    assert (words / MARK).exists()
    write("parted")
    assert "all is written under the name parted already" in capsys.readouterr().out


def student(plan, stored="", path="", steps=25):
    config = tiny.unshared(plan, steps)
    with config.unlocked():
        config.objective = {"use": DISTILLATION, "temperature": 1.0}
    config.teacher.stored, config.teacher.path = stored, str(path)
    return config


@pytest.mark.slow
def test_a_student_learns_from_it_as_from_the_teacher(plan, teacher, write, tmp_path):
    write("all", top_k=tiny.VOCAB)
    runs.run(student(plan, "all"), tmp_path / "stored")
    runs.run(student(plan, path=teacher), tmp_path / "run")
    stored, online = (
        np.array([line["loss"] for _, line in sorted(runs.lines(tmp_path / name).items())])
        for name in ("stored", "run")
    )
    np.testing.assert_allclose(stored, online, atol=5e-3)
    assert online[-1] < 0.5 * online[0]


@pytest.mark.slow
def test_a_few_tokens_teach_as_well(plan, written, tmp_path):
    config = student(plan, written)
    config.microbatches = 2
    runs.run(config, tmp_path / "run")
    lines = sorted(runs.lines(tmp_path / "run").items())
    assert lines[-1][1]["loss"] < 0.5 * lines[0][1]["loss"]


def test_bad_input(plan, teacher, write, written, tmp_path):
    for changes, said in (
        ({"top_k": 0}, "--top_k=0"),
        ({"temperature": 0.0}, "must be positive"),
        ({"row_length": 4096}, "beyond the teacher's context"),
        ({"row_length": 48}, "cannot be made"),
        ({"batch_rows": 3}, "a multiple of the 8 device"),
        ({"sources": ["wards"]}, "has no source wards; it has words, sums"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            write("bad", **changes)
    with pytest.raises(UserError, match="was written with another top_k"):
        write(written, top_k=3)
    with pytest.raises(UserError, match="cannot be the name"):
        write("a/b")
    refused = functools.partial(runs.run, workdir=tmp_path / "run")
    with pytest.raises(UserError, match="no teacher has written .*none to its end"):
        refused(student(plan, "none"))
    hot = student(plan, written)
    hot.objective.temperature = 2.0
    with pytest.raises(UserError, match=r"written for temperature=1.0, the run has 2.0"):
        refused(hot)
    long = student(plan, written)
    long.row_length = 2 * tiny.ROW
    with pytest.raises(UserError, match="written for row_length=32, the run has 64"):
        refused(long)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("info",), None),
        (("info", "top_k"), "8"),
        (("info", "top_k"), 1000),
        (("info", "rows"), 7),
        (("info", "vocab_size"), {}),
        (("shards",), []),
        (("shards", "taught-000000000000.array_record"), 5),
        (("shards", "taught-000000000000.array_record", "rows"), -1),
        (("shards", "taught-000000000000.array_record", "size"), None),
        ((), "[" * 100_000),
        ((), "{"),
    ],
)
def test_a_damaged_description_is_told(plan, written, tmp_path, keys, value):
    data = shutil.copytree(plan.parent, tmp_path / "data")
    mark = data / "words" / "taught" / written / MARK
    raw = place = json.loads(mark.read_text())
    for key in keys[:-1]:
        place = place[key]
    if keys:
        place[keys[-1]] = value
    mark.write_text(json.dumps(raw) if keys else value)
    with pytest.raises(
        UserError, match=r"taught.json is damaged .*put it back, or delete it and run"
    ):
        open_mixture(Plan.load(data / "mixture.json"), tiny.ROW, tiny.VOCAB, written)


def test_records_of_another_shape_and_damaged_settings_are_told(plan, write, written, tmp_path):
    data = shutil.copytree(plan.parent, tmp_path / "data")
    for folder in (data / source / "taught" / written for source in ("words", "sums")):
        raw = json.loads((folder / MARK).read_text())
        raw["info"]["top_k"] -= 1
        (folder / MARK).write_text(json.dumps(raw))
    mixture = open_mixture(Plan.load(data / "mixture.json"), tiny.ROW, tiny.VOCAB, written)
    with pytest.raises(
        UserError, match="is not what taught.json there describes, 7 tokens of each"
    ):
        mixture.read(np.arange(4))
    folder = folders(plan, "spoilt")[0]
    folder.mkdir(parents=True)
    for damaged in ("{", "7", "[" * 100_000):
        (folder / "settings.json").write_text(damaged)
        with pytest.raises(UserError, match="settings.json is damaged: give another --name"):
            write("spoilt")


def test_damage_is_told(plan, write, tmp_path):
    write("damaged")
    folder = folders(plan, "damaged")[0]
    shard = sorted(folder.glob("*.array_record"))[0]
    data = shard.read_bytes()
    shard.write_bytes(data[:-10])
    with pytest.raises(UserError, match="instead of"):
        runs.run(student(plan, "damaged"), tmp_path / "run")
    shard.unlink()
    with pytest.raises(UserError, match="is missing: delete it"):
        runs.run(student(plan, "damaged"), tmp_path / "run")
    (folder / MARK).unlink()
    write("damaged")
    assert shard.read_bytes() == data
    mark = json.loads((folder / MARK).read_text())
    mark["info"]["rows_of"] = "another"
    (folder / MARK).write_text(json.dumps(mark))
    with pytest.raises(UserError, match="the source was prepared again"):
        runs.run(student(plan, "damaged"), tmp_path / "run")
