"""The record of a run: right, whole after a kill, readable by others, on any file system."""

import json
import math
import os
import struct
import sys
import types

import numpy as np
import pytest
import tiny
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event

from mobilellm_jax.errors import UserError
from mobilellm_jax.reporting.history import read_history
from mobilellm_jax.training.metrics import MetricsWriter, per_source
from mobilellm_jax.training.workdir import claimed


def record(workdir, start, steps, kind="train", close=True, **values):
    writer = MetricsWriter(epath.Path(workdir), start)
    for step in steps:
        writer.write(kind, step, {"loss": 1.0 / step, "rows": 4 * step, **values})
    if close:
        writer.close()
    return writer


def test_per_source_is_what_a_count_token_by_token_gives():
    """Over random rows of three sources, one of which has no row."""
    rng = np.random.default_rng(0)
    names = ("a", "b", "c")
    source = rng.choice([0, 2], size=50)
    nll, weight = rng.gamma(2.0, size=(50, 7)), rng.integers(0, 2, (50, 7))
    size = rng.integers(1, 9, (50, 7))
    totals = {
        key: [float((value * weight)[source == s].sum()) for s in range(3)]
        for key, value in (("nll", nll), ("tokens", np.ones_like(nll)), ("bytes", size))
    }
    found = per_source(totals, names)
    for name, chosen in (("", source >= 0), ("/a", source == 0), ("/c", source == 2)):
        nats = tokens = text = 0.0
        for row in np.flatnonzero(chosen):
            for t in range(7):
                if weight[row, t]:
                    nats, tokens, text = nats + nll[row, t], tokens + 1, text + size[row, t]
        assert found[f"loss{name}"] == pytest.approx(nats / tokens, rel=1e-12)
        assert found[f"bits_per_byte{name}"] == pytest.approx(nats / math.log(2) / text, rel=1e-12)
    assert not any(name.endswith("/b") for name in found)


@pytest.mark.parametrize("torn", [b'{"kind": "train", "st', b"\0\0\0\0", b"{"])
def test_a_line_torn_by_a_kill_is_cut_off_and_the_rest_stays(tmp_path, torn):
    record(tmp_path, 0, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    record(tmp_path, 3, range(4, 6))
    lines = path.read_bytes().splitlines(keepends=True)
    assert b"".join(lines[:3]) == whole
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("before", [b"", b'{"kind": "tr'])
def test_a_file_without_a_whole_line_is_begun_anew(tmp_path, before):
    (tmp_path / "metrics.jsonl").write_bytes(before)
    record(tmp_path, 0, [1])
    assert [json.loads(s)["step"] for s in (tmp_path / "metrics.jsonl").open()] == [1]


def test_a_line_is_on_disk_when_it_is_written(tmp_path):
    """Not when the file is closed: a kill comes without warning."""
    record(tmp_path, 0, [1, 2], close=False)
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == 2


def test_what_is_not_finite_is_null_in_json(tmp_path):
    record(tmp_path, 0, [1], bad=math.nan, worse=math.inf)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert found["bad"] is None and found["worse"] is None and found["loss"] == 1.0


def events(path):
    """The events of a TensorBoard file: records of length, its checksum, data, its checksum."""

    def masked(data):
        crc = crc32c(data) & 0xFFFFFFFF
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    data = path.read_bytes()
    while data:
        head, (length, check) = data[:8], struct.unpack("<QI", data[:12])
        body, (check_body,) = data[12 : 12 + length], struct.unpack_from("<I", data, 12 + length)
        assert (masked(head), masked(body)) == (check, check_body)
        yield Event.FromString(body)
        data = data[16 + length :]


def test_tensorboard_reads_the_same_numbers(tmp_path):
    record(tmp_path, 0, range(1, 6), kind="train", bad=math.nan)
    record(tmp_path, 5, range(6, 8), kind="heldout")
    found = sorted((tmp_path / "tensorboard").iterdir())
    assert len(found) == 2  # a file for each program start, also within one second
    first, *rest = events(found[0])
    assert first.file_version == "brain.Event:2"
    values = {(v.tag, e.step): v.simple_value for e in rest for v in e.summary.value}
    assert {step for _, step in values} == {1, 2, 3, 4, 5}
    assert {tag for tag, _ in values} == {"train/loss", "train/rows"}
    assert values["train/loss", 4] == pytest.approx(0.25)
    assert {v.tag for e in events(found[1]) for v in e.summary.value} == {
        "heldout/loss",
        "heldout/rows",
    }


def test_a_full_disk_is_told_in_one_sentence(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    writer = MetricsWriter(epath.Path(tmp_path), 0)
    with pytest.raises(UserError, match=f"{tmp_path}.*No space left.*goes on from the last"):
        writer.write("train", 1, {"loss": 1.0})
    writer.close()


class Bucket(MemoryFileSystem):
    """An object store in memory: objects are written whole, never appended to."""

    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))

    def glob(self, path, **kwargs):
        return [found.lstrip("/") for found in super().glob(path, **kwargs)]

    def open(self, path, mode="rb", **kwargs):
        assert mode.rstrip("bt") in ("r", "w"), f"an object store cannot open as {mode!r}"
        return super().open(path, mode=mode, **kwargs)


@pytest.fixture
def bucket(monkeypatch):
    """A workdir in a `gs://` that is kept in memory."""
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: Bucket())
    return epath.Path("gs://bucket/run")


def test_an_object_store_gets_a_file_for_each_start(bucket, monkeypatch):
    monkeypatch.setattr("mobilellm_jax.training.metrics.time.time", lambda: 100.0)
    first = record(bucket, 0, range(1, 6), close=False)
    first.sync()  # then it is killed; what came after the last `sync` is lost
    first.write("train", 6, {"loss": 1.0})
    monkeypatch.setattr("mobilellm_jax.training.metrics.time.time", lambda: 200.0)
    record(bucket, 4, range(5, 9))
    assert len([p for p in bucket.iterdir() if p.name.startswith("metrics-")]) == 2
    assert len(list((bucket / "tensorboard").iterdir())) == 2
    history = read_history(bucket)
    assert history.train.steps_N.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert history.torn == 0


def test_a_later_start_at_an_earlier_step_counts(bucket, monkeypatch):
    """As after a damaged checkpoint was moved away: the order is that of time, not of steps."""
    for now, start, value in ((100.0, 50, 1.0), (200.0, 8, 2.0)):
        monkeypatch.setattr("mobilellm_jax.training.metrics.time.time", lambda now=now: now)
        record(bucket, start, range(start + 1, 53), value=value)
    assert set(read_history(bucket).train.column("value")) == {2.0}


def test_a_workdir_in_an_object_store_is_claimed_and_defended(bucket):
    config = tiny.config("mixture.json")
    for _ in range(2):
        with claimed(bucket, config) as workdir:
            assert workdir == bucket
    written = json.loads((bucket / "config.json").read_text())
    assert written == json.loads(json.dumps(config.to_dict()))  # with lists for tuples
    assert [p.name for p in bucket.iterdir()] == ["config.json"]
    config.seed = 1
    said = "belongs to another run .config.seed: 0 there, 1 here"
    with pytest.raises(UserError, match=said), claimed(bucket, config):
        pass


def test_who_comes_to_a_workdir_in_which_a_run_goes_on_changes_nothing_there(tmp_path):
    config = tiny.config("mixture.json")
    with claimed(tmp_path / "run", config) as workdir:
        before = (workdir / "config.json").read_bytes()
        config.log_every += 1
        said = "another program is training in .*run at this"
        with pytest.raises(UserError, match=said), claimed(tmp_path / "run", config):
            pass
        assert (workdir / "config.json").read_bytes() == before
    with claimed(tmp_path / "run", config):
        assert (tmp_path / "run/config.json").read_bytes() != before


def test_wandb_gets_what_is_recorded_and_a_resumed_run_goes_on_in_its_run(tmp_path, monkeypatch):
    logged, runs = [], []

    class Run:
        def log(self, values, step):
            logged.append((step, values))

        def finish(self):
            logged.append("finished")

    def init(**settings):
        runs.append(settings)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for start in (0, 1):
        writer = MetricsWriter(epath.Path(tmp_path), start, "project")
        writer.write("start", start, {"time": 1.0})
        writer.write("train", start + 1, {"loss": 2.5})
        writer.close()
    assert logged == [(1, {"train/loss": 2.5}), "finished", (2, {"train/loss": 2.5}), "finished"]
    assert runs[0] == runs[1] and runs[0]["project"] == "project"


def test_wandb_that_is_not_installed_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"mobilellm-jax\[wandb\]"):
        MetricsWriter(epath.Path(tmp_path), 0, "project")
