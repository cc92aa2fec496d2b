"""A user's files: the same documents from every format, and one sentence for every mistake."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from mobilellm_jax.data.corpora import FileCorpus, split_of
from mobilellm_jax.errors import UserError

TEXTS = [f"Document {i}: naïve 中文 😀\n" + "word " * (i % 7) for i in range(300)]


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
    if kind == "parquet":
        table = pyarrow.table({"n": range(300), "text": TEXTS})
        pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=70)
        return f"{folder}/*.parquet"
    for i, text in enumerate(TEXTS):
        path = folder / f"{i // 100}" / f"{i:03}.{'md' if i % 2 else 'py'}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return f"{folder}/**/*.*"


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "txt"])
def test_every_format_gives_the_same_documents(tmp_path, kind):
    corpus = FileCorpus("a", write(tmp_path / "data", kind), heldout=0.2)
    documents = list(corpus.documents())
    assert [d.text for d in documents] == TEXTS
    assert [d.split for d in documents] == [split_of(text, 0.2) for text in TEXTS]
    assert list(corpus.documents()) == documents  # it can be read again
    assert sum(d.progress for d in documents) == pytest.approx(corpus.size, rel=0.05)


def test_heldout_is_a_fixed_share_and_duplicates_are_on_one_side(tmp_path):
    texts = [f"text {i}" for i in range(3000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl").write_text(lines)
    sides = {}
    for share in (0.0, 0.1, 0.3):
        documents = list(FileCorpus("a", f"{tmp_path}/*.jsonl", heldout=share).documents())
        sides[share] = {d.text for d in documents if d.split == "heldout"}
        assert not sides[share] & {d.text for d in documents if d.split == "train"}
        assert len(sides[share]) / 3000 == pytest.approx(share, abs=0.03)
    assert sides[0.1] < sides[0.3]  # a larger share keeps what was held out


def test_a_sample_is_bounded_and_never_held_out(tmp_path):
    corpus = FileCorpus("a", write(tmp_path / "data", "txt"), heldout=0.5)
    train = {d.text for d in corpus.documents() if d.split == "train"}
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
    assert [d.text for d in FileCorpus("a", f"{tmp_path}/a.jsonl").documents()] == ["x"]


BAD_FILES = [
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl, line 2: not JSON"),
    (
        "a.jsonl",
        b'{"text": "x"}\n{"body": "y", "n": 1}\n',
        r"line 2: there is no field 'text' \(it ",
    ),
    ("a.jsonl", b"[1]\n", r"line 1: there is no field 'text'"),
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
    ("a.jsonl.zst", b"", r"a.jsonl.zst is of a kind that cannot be read"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_a_bad_file_is_told_in_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(FileCorpus("a", f"{tmp_path}/{name}").documents())


def test_missing_files_and_columns_are_told(tmp_path):
    with pytest.raises(UserError, match="no file matches"):
        list(FileCorpus("a", f"{tmp_path}/*.txt").documents())
    with pytest.raises(UserError, match=r"no column 'body' \(it has n, text\); see --text_key"):
        list(FileCorpus("a", write(tmp_path / "data", "parquet"), "body").documents())
