"""A user's files: the same documents from every format, and one sentence for every mistake."""

import dataclasses
import functools
import gzip
import http.server
import json
import pickle
import threading

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds

from mobilellm_jax.data.corpora import FileCorpus, documents, split_of
from mobilellm_jax.data.inputs import text_lines
from mobilellm_jax.data.tfds_corpus import TfdsCorpus
from mobilellm_jax.errors import UserError

TEXTS = [f"Document {i}: naïve 中文 😀\n" + "word " * (i % 7) for i in range(300)]


def zstd(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def write(folder, kind):
    """The texts as one kind of file, the plain ones in subfolders; returns the pattern."""
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS))
    if kind == "jsonl":
        (folder / "a.jsonl").write_text(lines)
        return f"{folder}/*.jsonl"
    if kind == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        return f"{folder}/a.jsonl.gz"
    if kind == "jsonl.zst":
        half = len(lines) // 2  # frames may follow one another
        frames = [lines[:half], lines[half:]]
        (folder / "a.jsonl.zst").write_bytes(b"".join(zstd(frame.encode()) for frame in frames))
        return f"{folder}/*.zst"
    if kind == "parquet":
        table = pyarrow.table({"id": range(300), "text": TEXTS})
        pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=70)
        return f"{folder}/*.parquet"
    for i, text in enumerate(TEXTS):
        path = folder / f"{i // 100}" / f"{i:03}.{'md' if i % 2 else 'py'}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return f"{folder}/**/*.*"


KINDS = ["jsonl", "jsonl.gz", "jsonl.zst", "parquet", "txt"]


def test_what_cannot_be_named_or_is_inside_of_another_file_is_told(tmp_path):
    (tmp_path / "caf\udce9.jsonl").write_text('{"text": "x"}')
    with pytest.raises(UserError, match="is not UTF-8: rename it"):
        list(documents(FileCorpus("a", f"{tmp_path}/*.jsonl")))
    with pytest.raises(UserError, match="inside of another .*: unpack it"):
        list(documents(FileCorpus("a", f"zip://*.jsonl::file://{tmp_path}/a.zip")))


def test_an_address_is_read_by_its_name(tmp_path):
    """Web servers ask for things behind the name, and do not list how long files are."""
    pytest.importorskip("aiohttp")
    write(tmp_path, "jsonl")
    (tmp_path / "index.html").write_text('<a href="a.jsonl">a</a>')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for pattern in (f"{address}/a.jsonl?download=true", f"{address}/*.jsonl"):
            found = [d.text for d in documents(FileCorpus("a", pattern))]
            assert sorted(found) == sorted(TEXTS)
        server.shutdown()


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_documents(tmp_path, kind):
    corpus = FileCorpus("a", write(tmp_path / "data", kind), heldout=0.2)
    found = list(documents(corpus))
    assert [d.text for d in found] == TEXTS
    assert [d.split for d in found] == [split_of(text, 0.2) for text in TEXTS]
    assert list(documents(corpus)) == found  # it can be read again
    size = sum(part.size for part in corpus.parts())
    assert sum(d.progress for d in found) == pytest.approx(size, rel=0.05)
    named = kind != "txt"
    assert [d.id for d in found] == [str(i) if named else "" for i in range(300)]
    assert [d.place for d in found] == [i + 1 if named else 1 for i in range(300)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt"])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, name):
    text = "größe" if name == "a.txt" else '{"text": "größe"}\n{"text": "two"}\n'
    content = b"\xef\xbb\xbf" + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    found = [document.text for document in documents(FileCorpus("mine", str(tmp_path / name)))]
    assert found == (["größe"] if name == "a.txt" else ["größe", "two"])
    assert "".join(text_lines(tmp_path / name)) == text


def test_a_text_file_that_is_none_is_told(tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"one\ntwo \xff\n")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"one\n" * 1000)[:-9])
    for name in ("bytes.txt", "cut.gz", "nowhere.txt"):
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            list(text_lines(tmp_path / name))


def test_heldout_is_a_fixed_share_and_duplicates_are_on_one_side(tmp_path):
    texts = [f"text {i}" for i in range(3000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl").write_text(lines)
    sides = {}
    for share in (0.0, 0.1, 0.3):
        found = list(documents(FileCorpus("a", f"{tmp_path}/*.jsonl", heldout=share)))
        sides[share] = {d.text for d in found if d.split == "heldout"}
        assert not sides[share] & {d.text for d in found if d.split == "train"}
        assert len(sides[share]) / 3000 == pytest.approx(share, abs=0.03)
    assert sides[0.1] < sides[0.3]  # a larger share keeps what was held out


def test_a_sample_is_bounded_and_never_held_out(tmp_path):
    corpus = FileCorpus("a", write(tmp_path / "data", "txt"), heldout=0.5)
    train = {d.text for d in documents(corpus) if d.split == "train"}
    sample = list(corpus.sample(1 << 20))
    assert set(sample) == train
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    corpus = FileCorpus("b", f"{tmp_path}/b.jsonl")
    sample = list(corpus.sample(1000))
    assert 1000 <= sum(map(len, sample)) <= 1000 + max(map(len, TEXTS))


def test_fingerprint_follows_the_files_and_not_their_folder(tmp_path):
    one = FileCorpus("a", write(tmp_path / "one", "jsonl"))
    two = FileCorpus("a", write(tmp_path / "two", "jsonl"))
    assert one.fingerprint == two.fingerprint
    assert FileCorpus("a", one.pattern, "body").fingerprint != one.fingerprint
    assert FileCorpus("a", one.pattern, heldout=0.1).fingerprint != one.fingerprint
    before = one.fingerprint
    with (tmp_path / "one" / "a.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    assert one.fingerprint != before


def test_empty_documents_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": " \\n"}\n\n{"text": ""}\n{"text": "x"}\n')
    assert [d.text for d in documents(FileCorpus("a", f"{tmp_path}/a.jsonl"))] == ["x"]


BAD_FILES = [
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl, line 2: not JSON"),
    (
        "a.jsonl",
        b'{"text": "x"}\n{"body": "y", "n": 1}\n',
        r"line 2: there is no field 'text' \(it ",
    ),
    ("a.jsonl", b"[1]\n", r"line 1: there is no field 'text'"),
    ("a.jsonl", b'{"text": ' + b"[" * 90_000, r"line 1: not JSON \(maximum recursion"),
    ("a.jsonl", b'{"text": null}\n', r"line 1: 'text' is not a text but NoneType"),
    ("a.jsonl", b'{"text": "\xff"}\n', r"line 1: not UTF-8"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', r"line 1: half of a surrogate pair"),
    (
        "a.jsonl.gz",
        gzip.compress(b'{"text": "x"}\n' * 9000)[:-20],
        r"a.jsonl.gz is not a whole gzip",
    ),
    ("a.jsonl.gz", b'{"text": "x"}\n', r"a.jsonl.gz is not a whole gzip"),
    ("a.parquet", b"PAR1 nothing", r"a.parquet is not a readable Parquet"),
    ("a.txt", b"good\nb\xe4d\n", r"a.txt, line 2: not UTF-8"),
    ("a.json", b"{}", r"a.json is of a kind that cannot be read"),
    ("a.txt.zst", b"", r"a.txt.zst is of a kind that cannot be read"),
    ("a.jsonl.zst", zstd(b'{"text": "x"}\n' * 9000)[:-5], r"a.jsonl.zst is not a whole Zstandard"),
    ("a.jsonl.zst", b'{"text": "x"}\n', r"a.jsonl.zst is not a whole Zstandard"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_a_bad_file_is_told_in_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(documents(FileCorpus("a", f"{tmp_path}/{name}")))


def test_missing_files_and_columns_are_told(tmp_path):
    with pytest.raises(UserError, match="no file matches"):
        list(documents(FileCorpus("a", f"{tmp_path}/*.txt")))
    with pytest.raises(UserError, match=r"no column 'body' \(it has id, text\); see --text_key"):
        list(documents(FileCorpus("a", write(tmp_path / "data", "parquet"), "body")))


# Parts.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 100, 777, 5000, 1 << 20])
def test_parts_hold_every_document_once_and_in_order(tmp_path, kind, size):
    pattern = write(tmp_path / "data", kind)
    corpus = FileCorpus("a", pattern, part_size=size)
    parts = pickle.loads(pickle.dumps(corpus.parts()))
    whole = list(documents(FileCorpus("a", pattern, part_size=1 << 30)))
    found, before = [], {}
    for part in parts:
        for document in part.documents():
            place = document.place + before.get(document.file, 0)
            found.append(dataclasses.replace(document, place=place, progress=0))
        before = {f: before.get(f, 0) + n for f, n in part.unfinished().items()}
    assert found == [dataclasses.replace(document, progress=0) for document in whole]
    assert not before
    # What can be cut is, and parts are no larger than they must be.
    if kind in ("jsonl", "txt") and size >= 777:
        assert max(part.size for part in parts) <= size
    if kind in ("jsonl", "parquet") and size == 777:
        assert len(parts) > 3


def test_lines_of_any_kind_are_cut_anywhere(tmp_path):
    content = b'\n\n{"text": "a"}\r\n\n{"text": "' + b"b" * 40 + b'"}\n{"text": "c"}'
    (tmp_path / "a.jsonl").write_bytes(content)
    for size in range(1, len(content) + 2):
        corpus = FileCorpus("a", f"{tmp_path}/a.jsonl", part_size=size)
        assert [d.text for d in documents(corpus)] == ["a", "b" * 40, "c"]


def test_a_bad_line_is_told_by_its_number_in_the_file(tmp_path):
    lines = ['{"text": "x"}\n'] * 1000
    lines[700] = "oh\n"
    (tmp_path / "a.jsonl").write_text("".join(lines))
    with pytest.raises(UserError, match="line 701: not JSON"):
        list(documents(FileCorpus("a", f"{tmp_path}/a.jsonl", part_size=500)))


def test_files_behind_any_url_are_read(tmp_path):
    pattern = write(tmp_path / "data", "jsonl")
    system = fsspec.filesystem("memory")
    for name in ("b", "a"):
        system.pipe(f"/corpus/{name}.jsonl", (tmp_path / "data" / "a.jsonl").read_bytes())
    system.pipe("/corpus/c.parquet", b"")
    corpus = FileCorpus("a", "memory://corpus/*.jsonl", part_size=2000)
    assert [d.text for d in documents(corpus)] == 2 * TEXTS
    assert [file.path for file in corpus.files] == [f"memory:///corpus/{n}.jsonl" for n in "ab"]
    one = FileCorpus("a", pattern).fingerprint
    assert FileCorpus("a", "memory://corpus/a.jsonl").fingerprint == one
    with pytest.raises(UserError, match="nowhere://x/y cannot be read"):
        FileCorpus("a", "nowhere://x/y").parts()


# TFDS.


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """The texts as a TFDS dataset in ArrayRecord."""
    folder = tmp_path_factory.mktemp("tfds")
    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "id": np.int64})
    records = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
    writer = tfds.core.SequentialWriter(
        tfds.core.DatasetInfo(
            builder=tfds.core.dataset_info.DatasetIdentity(
                name="texts", version=tfds.core.Version("1.0.0"), data_dir=folder, module_name="x"
            ),
            features=features,
            disable_shuffling=True,
        ),
        max_examples_per_shard=70,
        overwrite=True,
        file_format="array_record",
    )
    writer.initialize_splits(["train"])
    writer.add_examples({"train": records})
    writer.close_all()
    return folder


@pytest.mark.parametrize("size", [500, 1 << 20])
def test_a_tfds_dataset_gives_the_same_documents(dataset, size):
    corpus = TfdsCorpus("a", f"{dataset}:train", heldout=0.2, part_size=size)
    found = list(documents(corpus))
    assert [d.text for d in found] == TEXTS
    assert [d.split for d in found] == [split_of(text, 0.2) for text in TEXTS]
    assert [d.id for d in found] == [str(i) for i in range(300)]
    assert [d.place for d in found] == list(range(1, 301))
    assert len(corpus.parts()) > 5 if size == 500 else len(corpus.parts()) == 1
    assert pickle.loads(pickle.dumps(corpus.parts())) == corpus.parts()
    train = {d.text for d in found if d.split == "train"}
    assert set(corpus.sample(1 << 20)) == train
    assert 0 < sum(map(len, corpus.sample(1000))) < 3000


def test_a_dataset_that_cannot_be_read_is_told(dataset):
    for where, key, message in (
        (f"{dataset}:test", "text", "/.*:test cannot be read"),
        (f"{dataset}:train", "body", r"no feature 'body' \(it has .*\); see --text_key"),
        ("no_such_dataset:train", "text", "no dataset 'no_such_dataset'"),
        (f"{dataset}:train", "id", "record 1: 'id' is not a text but int"),
    ):
        with pytest.raises(UserError, match=message):
            list(documents(TfdsCorpus("a", where, key)))


def test_a_share_of_a_corpus_is_a_part_of_every_larger_one_and_keeps_the_split(tmp_path):
    lines = [json.dumps({"text": f"document {i}"}) for i in range(4000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))

    def read(share):
        corpus = FileCorpus("a", str(tmp_path / "a.jsonl"), heldout=0.2, share=share)
        return {d.text: d.split for d in documents(corpus)}

    whole, tenth, hundredth = read(1.0), read(0.1), read(0.01)
    assert len(whole) == 4000
    assert 330 < len(tenth) < 470 and 20 < len(hundredth) < 62
    assert hundredth.items() <= tenth.items() <= whole.items()
    assert 0.14 < sum(split == "heldout" for split in tenth.values()) / len(tenth) < 0.26


def test_several_fields_are_joined_and_packed_json_is_lines(tmp_path):
    records = [{"q": "Why?", "a": "So."}, {"q": "How?", "a": None}, {"q": "", "a": "Yes."}]
    expected = ["Why?\n\nSo.", "How?", "Yes."]
    with gzip.open(tmp_path / "a.json.gz", "wt") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    for name in ("a.json.gz", "a.parquet"):
        corpus = FileCorpus("a", str(tmp_path / name), "q+a", heldout=0.0)
        assert [d.text for d in documents(corpus)] == expected
        with pytest.raises(UserError, match="no (field|column) 'b'"):
            list(documents(FileCorpus("a", str(tmp_path / name), "q+b")))
    (tmp_path / "b.jsonl").write_text(json.dumps({"q": "x", "a": 3}))
    with pytest.raises(UserError, match=r"'q\+a' is not a text but int"):
        list(documents(FileCorpus("a", str(tmp_path / "b.jsonl"), "q+a")))
