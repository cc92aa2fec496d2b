"""The record of documents: for every row, just the documents whose tokens are in it."""

import json
import random

import numpy as np
import pyarrow.parquet
import pytest

from mobilellm_jax.data import documents as sidecars
from mobilellm_jax.data.accounting import documents_placed
from mobilellm_jax.data.contexts import Contexts
from mobilellm_jax.data.corpora import FileCorpus, documents
from mobilellm_jax.data.documents import documents_at, documents_of, find
from mobilellm_jax.data.packing import PACKERS
from mobilellm_jax.data.rows import SourceInfo, open_rows
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.prepare import prepare

ROW = 24
WORDS = "the model reads small rows of text and learns to share its blocks naïvely 😀".split()


def test_long_and_odd_ids_are_found(tmp_path):
    """Those of more than 4 KB have no bounds in Parquet; half a surrogate pair is no text."""
    ids = ["a", "https://x/" + "y" * 5000, "z\ud800"]
    lines = [json.dumps({"text": " ".join(WORDS), "id": id}) for id in ids]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    prepare([FileCorpus("a", f"{tmp_path}/a.jsonl")], tmp_path / "out", ROW, vocab_size=300)
    for id in ("a", ids[1], "z?"):
        assert {piece.id for piece in find(tmp_path / "out" / "a", "train", id=id)} == {id}
    assert find(tmp_path / "out" / "a", "train", id="b") == []


@pytest.fixture(scope="module", params=["concat", "best_fit"])
def source(request, tmp_path_factory):
    """A source of many parts and row groups: (its directory, its documents, its tokenizer)."""
    folder = tmp_path_factory.mktemp(request.param)
    rng = random.Random(7)
    for name in "ab":
        lines = []
        for i in range(500):
            longest = 400 if i % 50 == 0 else 30
            text = " ".join(rng.choices(WORDS, k=rng.randint(1, longest))) + f" {name}{i}"
            lines.append(json.dumps({"text": text, "id": f"{name}-{i % 450}"}) + "\n")
            if i % 7 == 0:
                lines.append("\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sidecars, "ROW_GROUP", 37)
        corpus = FileCorpus("a", f"{folder}/*.jsonl", heldout=0.2, part_size=30_000)
        prepare([corpus], folder / "out", ROW, vocab_size=320, packing=request.param, workers=1)
    whole = list(documents(FileCorpus("a", f"{folder}/*.jsonl", heldout=0.2)))
    return folder / "out" / "a", whole, Tokenizer.load(folder / "out" / "tokenizer.model")


def stored(source, split):
    """All rows of a split."""
    rows = open_rows(source, split)
    return rows.read(np.arange(len(rows)))


def tokens_of(piece, rows, overlap):
    """The tokens that a piece says are its own."""
    width = rows.shape[1] - overlap
    count = -(-(piece.offset + piece.tokens - overlap) // width)
    flat = rows[piece.row : piece.row + count, :width].ravel()
    last = rows[piece.row + count - 1, width:]
    return np.append(flat, last)[piece.offset : piece.offset + piece.tokens]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_document_is_found_where_it_says_it_is(source, split):
    path, whole, tokenizer = source
    rows, info = stored(path, split), open_rows(path, split).info
    overlap = PACKERS[info.packing].OVERLAP
    pieces = documents_of(path, split, 0, len(rows))
    by_document = {}
    for piece in pieces:
        by_document.setdefault((piece.file, piece.place), []).append(piece)
    expected = [document for document in whole if document.split == split]
    assert by_document.keys() == {(d.file, d.place) for d in expected}
    for document in expected:
        own = sorted(by_document[document.file, document.place], key=lambda piece: piece.piece)
        assert [piece.piece for piece in own] == list(range(len(own)))
        assert {piece.id for piece in own} == {document.id}
        ids = [tokens_of(piece, rows, overlap)[1:].tolist() for piece in own]
        assert all(len(some) == piece.tokens - 1 for some, piece in zip(ids, own, strict=True))
        assert all(rows[piece.row, piece.offset] == info.bos_id for piece in own)
        body = [*tokenizer.encode(document.text), tokenizer.eos_id]
        if len(own) > 1 and ids[-1] == body[-2:] and sum(map(len, ids)) == len(body) + 1:
            ids[-1] = ids[-1][1:]  # best-fit packing repeats a token rather than leave EOS alone
        assert sum(ids, []) == body
    assert len(expected) == open_rows(path, split).info.splits[split].documents


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_documents_of_rows_are_those_with_a_token_there(source, split):
    path, _, _ = source
    rows = stored(path, split)
    info = open_rows(path, split).info
    stride = ROW + 1 - PACKERS[info.packing].OVERLAP
    pieces = documents_of(path, split, 0, len(rows))
    shards = [shard["rows"] for shard in shards_of(path, split)]
    ends = np.cumsum(shards)
    assert len(ends) > 1 or split == "heldout"

    begins, offsets, tokens = (
        np.array([getattr(piece, key) for piece in pieces]) for key in ("row", "offset", "tokens")
    )

    def touch(row):
        same_shard = np.searchsorted(ends, begins, "right") == np.searchsorted(ends, row, "right")
        start = (begins - row) * stride + offsets  # rows do not go on from one shard to the next
        return same_shard & (start <= ROW) & (start + tokens > 0)

    rng = np.random.default_rng(0)
    ranges = [(i, i + 1) for i in rng.integers(0, len(rows), 60)]
    ranges += [(end - 1, min(end + 1, len(rows))) for end in ends]
    ranges += [sorted(rng.integers(0, len(rows) + 1, 2)) for _ in range(20)]
    for first, last in ranges:
        inside = np.any([touch(row) for row in range(first, last)] or [np.zeros(len(pieces))], 0)
        expected = [pieces[i] for i in np.flatnonzero(inside)]
        assert documents_of(path, split, first, last) == expected
    # And a row decodes to just what its documents have there.
    for row in rng.integers(0, len(rows), 40).tolist():
        rebuilt = np.full(ROW + 1, info.bos_id)
        for piece in documents_of(path, split, row, row + 1):
            own = tokens_of(piece, rows, PACKERS[info.packing].OVERLAP)
            start = (piece.row - row) * stride + piece.offset
            for i in range(max(start, 0), min(start + piece.tokens, ROW + 1)):
                rebuilt[i] = own[i - start]
        assert (rebuilt == rows[row]).all()


def shards_of(path, split):
    metadata = json.loads((path / "metadata.json").read_text())
    return [shard for shard in metadata["shards"].values() if shard["split"] == split]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_documents_are_found_by_id_file_and_place(source, split):
    path, whole, _ = source
    every = documents_of(path, split, 0, 1 << 40)
    rng = random.Random(1)
    for document in rng.sample([d for d in whole if d.split == split], 25):
        wanted = [p for p in every if (p.file, p.place) == (document.file, document.place)]
        assert find(path, split, file=document.file, place=document.place) == wanted
        same_id = [p for p in every if p.id == document.id]
        assert find(path, split, id=document.id) == same_id
        same_place = [p for p in every if p.place == document.place]
        assert find(path, split, place=document.place) == same_place
    file = whole[0].file
    assert find(path, split, file=file) == [p for p in every if p.file == file]
    assert find(path, split) == every
    assert find(path, split, id="nobody") == find(path, split, place=0) == []


def test_the_files_are_what_they_are_said_to_be(source):
    path, _, _ = source
    files = sorted(path.glob("*.documents.parquet"))
    assert len(files) == len(list(path.glob("*.array_record-?????")))
    for file in files:
        table = pyarrow.parquet.read_table(file)
        assert table.schema.equals(sidecars.SCHEMA)
        order = list(zip(table["row"].to_pylist(), table["offset"].to_pylist(), strict=True))
        assert order == sorted(set(order))
        with pyarrow.parquet.ParquetFile(file) as parquet:
            groups = [parquet.metadata.row_group(i) for i in range(parquet.num_row_groups)]
            assert all(group.num_rows == 37 for group in groups[:-1])
            assert {group.column(0).compression for group in groups} == {"ZSTD"}


def test_no_more_is_read_than_the_rows_need(source, monkeypatch):
    path, _, _ = source
    read, threads = [], []
    usual = pyarrow.parquet.ParquetFile.read_row_group

    def counted(self, i, use_threads=True):
        read.append(i)
        threads.append(use_threads)
        return usual(self, i, use_threads=use_threads)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", counted)
    documents_of(path, "train", 50, 51)
    assert 1 <= len(read) <= 2
    assert not any(threads)  # of Arrow's, which may still hold the file when Python has ended


def test_what_is_not_there_is_told(source):
    path, _, _ = source
    with pytest.raises(UserError, match="no split 'test'"):
        documents_of(path, "test", 0, 1)
    with pytest.raises(UserError, match="no complete source"):
        find(path.parent / "nowhere", "train")
    assert documents_of(path, "train", 5, 5) == []
    file = sorted(path.glob("*train*.documents.parquet"))[0]
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-9])
        with pytest.raises(UserError, match=f"{file.name} cannot be read"):
            find(path, "train")
        file.unlink()
        with pytest.raises(UserError, match=f"{file.name} cannot be read"):
            documents_of(path, "train", 0, 1)
    finally:
        file.write_bytes(content)


def test_documents_anywhere_are_those_of_each_row(source):
    path, _, _ = source
    rows = np.array([7, 3, 50, 51, 52, 3])
    expected = []
    for row in np.unique(rows):
        expected += [p for p in documents_of(path, "train", row, row + 1) if p not in expected]
    assert documents_at(path, "train", rows) == expected
    assert documents_at(path, "train", np.empty(0, np.int64)) == []


@pytest.mark.parametrize("length", [ROW // 4, ROW, 2 * ROW])
def test_documents_are_placed_where_their_tokens_are(source, length):
    """In rows of any length, each token of a row belongs to the document that says so, or is padding."""
    path, _, _ = source
    contexts = Contexts(open_rows(path, "train"), length)
    overlap, whole = PACKERS[contexts.info.packing].OVERLAP, stored(path, "train")
    indices = np.random.default_rng(2).integers(0, len(contexts), 40)
    found = documents_placed(contexts, indices)
    for tokens, placed in zip(contexts.read(indices), found, strict=True):
        rebuilt = np.full(length + 1, contexts.info.bos_id)
        for one in placed:
            own = tokens_of(one.piece, whole, overlap)[one.begin :]
            rebuilt[one.first : one.last] = own[: one.last - one.first]
        assert (rebuilt == tokens).all()


class Stream:
    """Thirteen stored rows of 8 tokens of a stream that counts: each begins with the last one's last."""

    info = SourceInfo("a", "there", 8, 200, 1, "t", "concat", {})

    def __len__(self):
        return 13

    def read(self, rows):
        return np.asarray(rows)[:, None] * 8 + np.arange(9)


@pytest.mark.parametrize("length", [1, 2, 4, 8, 16, 24, 32])
def test_rows_of_any_length_are_the_same_stream(length):
    contexts = Contexts(Stream(), length)
    assert len(contexts) == 13 // max(length // 8, 1) * max(8 // length, 1)
    rows = np.random.default_rng(0).permutation(len(contexts))
    np.testing.assert_array_equal(
        contexts.read(rows), rows[:, None] * length + np.arange(length + 1)
    )
    holds = []  # of each row, the stored rows that it is made of
    for row in range(len(contexts)):
        first, number, token = contexts.stored(row)
        assert first * 8 + token == row * length
        holds.append({first + i for i in range(number)})
    for first in range(13):
        for last in range(first, 13):
            wanted = [row for row, of in enumerate(holds) if of & {*range(first, last + 1)}]
            assert [*contexts.made_of(first, last)] == wanted
