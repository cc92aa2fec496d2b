"""The row store: what was written is read, and nothing half-written is."""

import concurrent.futures
import dataclasses
import json
import os
import pickle
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mobilellm_jax.data import readers, records, rows
from mobilellm_jax.data import shards as store
from mobilellm_jax.data.rows import SourceInfo, SplitInfo, open_rows, read_info
from mobilellm_jax.data.shards import Batch, SourceWriter, write_source
from mobilellm_jax.errors import UserError

INFO = SourceInfo("code", "", 32, 5000, 1, "f" * 64, "concat", {})
RNG = np.random.default_rng(0)
TRAIN = RNG.integers(0, 5000, (1000, 33)).astype(np.int32)
HELDOUT = RNG.integers(0, 5000, (70, 33)).astype(np.int32)


def batches():
    """Splits in turns, in portions, one of them empty."""
    yield Batch("train", TRAIN[:300], documents=3, bytes=40, tokens=20)
    yield Batch("heldout", HELDOUT, documents=2, bytes=30, tokens=10)
    yield Batch("train", TRAIN[:0])
    yield Batch("train", TRAIN[300:], documents=4, bytes=60, tokens=25)


def parts():
    """The same cut in four: one has nothing, one has no training rows, two no held-out ones."""
    train, heldout, empty, rest = batches()
    return [train], [heldout], [], [empty, rest]


@pytest.fixture
def source(tmp_path):
    write_source(tmp_path / "code", INFO, {"a": 1}, *parts())
    return tmp_path / "code"


def shards(source, split="train"):
    return sorted(source.glob(f"code-{split}.array_record-*"))


def test_rows_come_back_in_any_order(source):
    assert [s.name[-5:] for s in shards(source)] == ["00000", "00003"]
    assert [s.name[-5:] for s in shards(source, "heldout")] == ["00001"]
    for split, expected in (("train", TRAIN), ("heldout", HELDOUT)):
        stored = open_rows(source, split)
        assert len(stored) == len(expected)
        for indices in (
            np.arange(len(expected)),
            RNG.integers(0, len(expected), 500),  # unsorted, with repetitions
            np.array([len(expected) - 1]),
            np.array([], np.int64),
        ):
            read = stored.read(indices)
            assert read.dtype == np.int32 and read.shape == (len(indices), 33)
            assert (read == expected[indices]).all()


def test_info_counts(source):
    info = read_info(source)
    assert info == open_rows(source).info
    assert info.splits == {
        "train": SplitInfo(1000, 7, 100, 45),
        "heldout": SplitInfo(70, 2, 30, 10),
    }
    assert dataclasses.replace(info, path="", splits={}) == INFO
    assert rows.read_settings(source) == {"a": 1}


def test_large_vocabularies_take_four_bytes(tmp_path):
    info = dataclasses.replace(INFO, vocab_size=65_537)
    data = np.array([[0, 65_536] * 16 + [65_535]], np.int32)
    write_source(tmp_path / "code", info, {}, [Batch("train", data)])
    assert (open_rows(tmp_path / "code").read(np.array([0])) == data).all()
    written = tfds.builder_from_directory(tmp_path / "code").as_data_source("train")[0]["tokens"]
    assert written.dtype == np.uint32 and (written == data[0]).all()


def test_stock_tfds_reads_it(source):
    builder = tfds.builder_from_directory(source)
    for split, expected in (("train", TRAIN), ("heldout", HELDOUT)):
        data = builder.as_data_source(split)
        assert len(data) == len(expected)
        assert data[0]["tokens"].dtype == np.uint16
        assert all((data[i]["tokens"] == expected[i]).all() for i in range(0, len(expected), 17))
        files = map(readers.array_record_module.ArrayRecordReader, map(str, shards(source, split)))
        records_ = [file.read(range(file.num_records())) for file in files]
        assert builder.info.splits[split].num_bytes == sum(map(len, sum(records_, [])))


def test_pickles_and_threads_share_it(source):
    stored = open_rows(source)
    stored.read(np.arange(5))
    copy = pickle.loads(pickle.dumps(stored))
    assert copy.retries == stored.retries == 0
    wanted = [RNG.integers(0, 1000, 100) for _ in range(50)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for indices, read in zip(wanted, pool.map(copy.read, wanted), strict=True):
            assert (read == TRAIN[indices]).all()


@pytest.mark.parametrize("bad", [-1, 1000])
def test_rows_that_are_not_there(source, bad):
    with pytest.raises(IndexError, match="from 0 to 999"):
        open_rows(source).read(np.array([3, bad]))


def test_missing_and_truncated_shards_are_told_at_opening(source):
    shard = shards(source)[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"{shard.name} has {len(content) - 1} bytes instead of"):
        open_rows(source)
    assert len(open_rows(source, "heldout")) == 70  # the other split is whole
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        open_rows(source)


def test_damage_within_a_shard_is_told_at_reading(source, monkeypatch):
    monkeypatch.setattr(records, "_PAUSES", (0.001, 0.001))
    shard = shards(source)[0]
    content = bytearray(shard.read_bytes())
    content[10_000] ^= 255  # in the middle of the rows
    shard.write_bytes(content)
    stored = open_rows(source)
    for _ in range(2):
        with pytest.raises(
            UserError, match=rf"record \d+ of the shard .*{shard.name} cannot be read"
        ):
            stored.read(np.arange(1000))
    bad = []
    for row in range(300):
        try:
            stored.read(np.array([row]))
        except UserError as error:
            assert f"record {row} of" in str(error)
            bad.append(row)
    assert 0 < len(bad) < 300 and (stored.read(np.arange(300, 1000)) == TRAIN[300:]).all()


def test_a_read_that_fails_for_a_moment_is_tried_again_and_counted(source, monkeypatch):
    class Failing(readers.array_record_module.ArrayRecordReader):
        """Of the files that are opened the first four stay bad, each in a way of its own."""

        errors = [OSError, RuntimeError, ValueError, IndexError]

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.error = Failing.errors.pop() if Failing.errors else None

        def read(self, positions):
            if self.error:
                raise self.error("the network is away")
            return super().read(positions)

    monkeypatch.setattr(readers.array_record_module, "ArrayRecordReader", Failing)
    monkeypatch.setattr(records, "_PAUSES", (0.001,) * 4)
    stored = open_rows(source)
    assert stored.retries == 0
    assert (stored.read(np.arange(1000)) == TRAIN).all()
    assert stored.retries == 4


def test_rows_that_can_only_be_read_one_by_one_come_in_their_order(source, monkeypatch):
    class Single(readers.array_record_module.ArrayRecordReader):
        def read(self, positions):
            if len(positions) > 1:
                raise OSError("too much at once")
            return super().read(positions)

    monkeypatch.setattr(readers.array_record_module, "ArrayRecordReader", Single)
    monkeypatch.setattr(records, "_PAUSES", (0.001,))
    order = RNG.integers(0, 1000, 50)
    assert (open_rows(source).read(order) == TRAIN[order]).all()


@pytest.mark.parametrize("most", [1, 2, 100])
def test_no_more_files_are_open_than_allowed(tmp_path, most):
    parts = [[Batch("train", TRAIN[i : i + 10])] for i in range(0, 200, 10)]
    write_source(tmp_path / "many", INFO, {}, *parts)
    held = readers.Readers(most)
    stored = open_rows(tmp_path / "many", readers=held)
    order = np.random.default_rng(0).permutation(200)

    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    before = descriptors()
    assert (stored.read(order) == TRAIN[order]).all()
    assert len(held) == min(most, 20)
    assert descriptors() - before <= len(held)
    copy = pickle.loads(pickle.dumps(stored))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:  # what one reads, another gives up
        for rows_, found in zip(
            np.split(order, 20), pool.map(copy.read, np.split(order, 20)), strict=True
        ):
            assert (found == TRAIN[rows_]).all()
    assert descriptors() - before <= 2 * len(held)


def test_a_shard_that_goes_missing_is_named(source, monkeypatch):
    monkeypatch.setattr(records, "_PAUSES", (0.001,) * 4)
    stored = open_rows(source)
    shards(source)[0].unlink()
    with pytest.raises(UserError, match="array_record-00000 is missing"):
        stored.read(np.array([0]))


def test_what_is_no_source_is_refused(source, tmp_path):
    with pytest.raises(UserError, match="no complete source"):
        open_rows(tmp_path / "nothing")
    with pytest.raises(UserError, match="has no split 'test', only train, heldout"):
        open_rows(source, "test")
    metadata = json.loads((source / "metadata.json").read_text())
    for version in (1, 99):
        (source / "metadata.json").write_text(json.dumps({**metadata, "version": version}))
        with pytest.raises(UserError, match=f"version {version}, .* reads 2: prepare it again"):
            read_info(source)
    (source / "metadata.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not written by"):
        read_info(source)
    (source / "metadata.json").unlink()
    with pytest.raises(UserError, match="not written by"):
        read_info(source)


def _train_rows(metadata, rows):
    metadata["shards"]["code-train.array_record-00000"]["rows"] = rows


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda m: m.pop("shards"), "KeyError: 'shards'"),
        (lambda m: m["shards"].popitem(), "rows, not"),
        (lambda m: _train_rows(m, 299), "the shards of train have 999 rows, not 1000"),
        (lambda m: _train_rows(m, None), "rows of code-train.array_record-00000 is None"),
        (lambda m: m.update(source=None), "TypeError"),
        (lambda m: m["source"].pop("row_length"), "row_length"),
        (lambda m: m["source"].update(row_length=0), "row_length is 0"),
        (lambda m: m["source"].update(vocab_size="5000"), "vocab_size is '5000'"),
        (lambda m: m["source"].update(bos_id=5000), "bos_id is 5000"),
        (lambda m: m["source"].update(tokenizer=None), "tokenizer is None"),
        (lambda m: m["source"].update(kind="talk"), "kind is 'talk'"),
        (lambda m: m["source"]["splits"].pop("train"), "KeyError: 'train'"),
        (lambda m: m.update(settings=[]), r"settings is \[\]"),
    ],
)
def test_a_damaged_description_is_refused_where_it_is_read(source, change, said):
    file = source / "metadata.json"
    metadata = json.loads(file.read_text())
    change(metadata)
    file.write_text(json.dumps(metadata))
    with pytest.raises(UserError, match=f"metadata.json is damaged .*{said}.*prepare it again"):
        open_rows(source)


def test_rows_of_any_other_length_than_they_were_written_with_are_refused(source):
    file = source / "metadata.json"
    metadata = json.loads(file.read_text())
    for row_length in (*range(1, 32), *range(33, 200), 1 << 20):
        metadata["source"]["row_length"] = row_length
        file.write_text(json.dumps(metadata))
        with pytest.raises(UserError, match=f"are not rows of {row_length:,} tokens; prepare it"):
            open_rows(source).read(np.array([0]))


@pytest.mark.parametrize("kind", ["text", "chat"])
@pytest.mark.parametrize("row_length", [1, 26, 27, 32, 2048, 40_000])
def test_records_are_what_tfds_writes(kind, row_length):
    info = dataclasses.replace(INFO, kind=kind, row_length=row_length)
    row = np.arange(row_length + 1, dtype=np.int32) % info.vocab_size
    payloads = {"tokens": row}
    if kind == "chat":
        segments = np.cumsum(row == info.bos_id)
        payloads |= {"loss_mask": np.ones_like(row), "segment_ids": segments}
    written = b""
    for name, dtype in info.features.items():  # messages that follow each other are one
        feature = tfds.features.FeaturesDict({name: store._features(info)[name]})
        serializer = tfds.core.example_serializer.ExampleSerializer(feature.get_serialized_info())
        payload = {name: payloads[name].astype(dtype)}
        written += serializer.serialize_example(feature.encode_example(payload))
    assert store._Encoder(info)(row) == written


def test_a_failed_writer_leaves_no_source_and_the_next_one_succeeds(tmp_path):
    def failing():
        yield Batch("train", TRAIN)
        raise KeyboardInterrupt

    path = tmp_path / "code"
    with pytest.raises(KeyboardInterrupt):
        write_source(path, INFO, {}, batches(), failing())
    for place in (path, tmp_path / "code.incomplete"):
        with pytest.raises(UserError, match="no complete source"):
            open_rows(place)
    write_source(path, INFO, {}, batches())
    assert [p.name for p in tmp_path.iterdir()] == ["code"]
    assert (open_rows(path).read(np.arange(1000)) == TRAIN).all()


def test_parts_stay_only_if_they_are_whole_and_of_the_same_settings(tmp_path, monkeypatch):
    writer = SourceWriter(str(tmp_path / "code"), INFO, {"a": 1})
    writer.begin()
    for number, batches_ in enumerate(parts()):
        writer.write_part(number, batches_, {})
    (shard,) = (tmp_path / "code.incomplete").glob("code-heldout*-00001")
    shard.write_bytes(shard.read_bytes()[:-1])
    scratch = tmp_path / "code.incomplete" / "scratch-of-one-that-was-killed"
    scratch.mkdir()
    writer.begin()
    assert not scratch.exists()
    assert [writer.is_written(i) for i in range(5)] == [True, False, True, True, False]
    shard.unlink()
    assert not writer.is_written(1)
    other = SourceWriter(str(tmp_path / "code"), INFO, {"a": 2})
    with pytest.raises(UserError, match="interrupted, of other input or with other options"):
        other.begin()
    with monkeypatch.context() as later, pytest.raises(UserError, match="interrupted, of other"):
        later.setattr(store, "VERSION", 99)
        writer.begin()
    assert [writer.is_written(i) for i in range(5)] == [True, False, True, True, False]
    for mark in (tmp_path / "code.incomplete" / "parts").glob("0*.json"):
        mark.unlink()
    other.begin()  # nothing that was done is lost
    assert not list((tmp_path / "code.incomplete").glob("code-*"))


def test_only_one_program_writes_a_source(tmp_path):
    writer = SourceWriter(str(tmp_path / "code"), INFO, {})
    with writer.alone():
        writer.begin()
        with pytest.raises(UserError, match="another program is preparing .*code"), writer.alone():
            pass
        (batches_,) = parts()[:1]
        writer.write_part(0, batches_, {})
        writer.commit(1)
    with writer.alone(), pytest.raises(UserError, match="exists already"):
        writer.begin()


def test_only_our_own_left_overs_are_removed(tmp_path):
    growing = tmp_path / "code.incomplete"
    growing.mkdir()
    (growing / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="thesis.txt, which is none of ours"):
        write_source(tmp_path / "code", INFO, {}, batches())
    assert (growing / "thesis.txt").read_text() == "dear"


def test_nothing_is_overwritten(source):
    with pytest.raises(UserError, match="exists already"):
        write_source(source, INFO, {}, batches())
    assert len(open_rows(source)) == 1000
    (source.parent / "mine").mkdir()
    with pytest.raises(UserError, match="exists already"):
        write_source(source.parent / "mine", INFO, {}, batches())


def test_a_source_without_training_rows_is_refused(tmp_path):
    with pytest.raises(UserError, match="no text to train on"):
        write_source(tmp_path / "code", INFO, {}, [Batch("heldout", HELDOUT)])


def test_reading_is_fast(tmp_path):
    data = RNG.integers(0, 5000, (4000, 2049)).astype(np.int32)
    info = dataclasses.replace(INFO, row_length=2048)
    write_source(tmp_path / "code", info, {}, [Batch("train", data)])
    stored, best = open_rows(tmp_path / "code"), np.inf
    for _ in range(3):
        indices = RNG.integers(0, 4000, 2000)
        start = time.perf_counter()
        read = stored.read(indices)
        best = min(best, time.perf_counter() - start)
        assert (read == data[indices]).all()
    assert read[:, 1:].size / best > 10e6  # tokens per second; some 100 million on a free core
