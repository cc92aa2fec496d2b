"""Some documents of a source: just those, token for token, and known by where they are from."""

import json
import random

import chats
import numpy as np
import pytest
import tiny
import tokenizer_files

from mobilellm_jax.data import documents as sidecars
from mobilellm_jax.data import subset
from mobilellm_jax.data.accounting import documents_placed
from mobilellm_jax.data.chat import read_template
from mobilellm_jax.data.chat_corpus import ChatCorpus
from mobilellm_jax.data.contexts import Contexts
from mobilellm_jax.data.corpora import FileCorpus
from mobilellm_jax.data.documents import documents_of
from mobilellm_jax.data.packing import PACKERS, token_ids
from mobilellm_jax.data.rows import open_rows, read_info
from mobilellm_jax.data.shards import SourceWriter
from mobilellm_jax.data.subset import keep_documents, key_of
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.prepare import prepare

ROW = 24
WORDS = "the model reads small rows of text and learns to share its blocks naïvely 😀".split()


@pytest.fixture(scope="module", params=["concat", "best_fit", "chat"])
def source(request, tmp_path_factory):
    """A source of several parts: (its directory, its tokenizer)."""
    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    if kind == "chat":
        lines = [json.dumps({"messages": chats.conversation(i), "id": f"{i}"}) for i in range(300)]
        (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
        corpus = ChatCorpus("a", f"{folder}/a.jsonl", heldout=0.2, part_size=9_000)
        options = {
            "tokenizer": tokenizer_files.FOLDERS["llama3"](folder / "tokenizer"),
            "chat_template": read_template("llama3"),
        }
        prepare([corpus], folder / "out", 8 * ROW, workers=1, **options)
    else:
        rng, lines = random.Random(7), []
        for i in range(600):
            longest = 400 if i % 50 == 0 else 30
            text = " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))
            text += " yes yes yes" if i % 3 == 0 else f" {i}"
            lines.append(json.dumps({"text": text, "id": f"{i % 550}"}))
        (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
        corpus = FileCorpus("a", f"{folder}/a.jsonl", heldout=0.2, part_size=20_000)
        prepare([corpus], folder / "out", ROW, vocab_size=320, packing=kind, workers=1)
    return folder / "out" / "a", Tokenizer.load(folder / "out")


def told(path, split="train"):
    """Every document of a split by where it is from: the tokens of its pieces, walked through the rows."""
    rows = open_rows(path, split)
    length, joined = rows.info.row_length, PACKERS[rows.info.packing].OVERLAP
    stored, found = rows.read(np.arange(len(rows))), {}
    for piece in sorted(documents_of(path, split, 0, len(rows)), key=lambda p: p.piece):
        row, at, tokens = piece.row, piece.offset, []
        for left in range(piece.tokens, 0, -1):
            if joined and at == length and left > 1:  # its successor begins with this token
                row, at = row + 1, 0
            tokens.append(int(stored[row, at]))
            at += 1
        found.setdefault(key_of(piece), []).append(tokens)
    return found


def test_the_documents_are_those_that_are_wanted_token_for_token(source, tmp_path, monkeypatch):
    path, tokenizer = source
    monkeypatch.setattr(subset, "BLOCK", 10 * ROW)  # many blocks
    before = told(path)
    rng = random.Random(3)
    wanted = rng.sample(sorted(before), len(before) // 3)
    info = keep_documents(path, wanted, tokenizer, tmp_path / "deep" / "new")
    after = told(tmp_path / "deep" / "new")
    assert after == {key: before[key] for key in wanted}
    old = read_info(path)
    assert info.splits["train"].documents == len(wanted)
    assert (info.packing, info.kind, info.row_length) == (old.packing, old.kind, old.row_length)
    assert info.splits["heldout"] == old.splits["heldout"]
    for split in ("train", "heldout"):  # every token of every row is a document's or padding
        contexts = Contexts(open_rows(tmp_path / "deep" / "new", split), info.row_length)
        stored = contexts.read(np.arange(len(contexts)))
        for row, placed in zip(
            stored, documents_placed(contexts, np.arange(len(contexts))), strict=True
        ):
            for one in placed:
                row[one.first : one.last] = info.bos_id
            assert (token_ids(row) == info.bos_id).all()


def test_with_nothing_dropped_it_is_the_same_source(source, tmp_path):
    path, tokenizer = source
    before = told(path)
    keep_documents(path, list(before), tokenizer, tmp_path / "new")
    assert told(tmp_path / "new") == before
    old, new = read_info(path), read_info(tmp_path / "new")
    counts = [
        (i.splits["train"].documents, i.splits["train"].bytes, i.splits["train"].tokens)
        for i in (old, new)
    ]
    assert counts[0] == counts[1]
    if old.packing == "concat":  # whose order packing does not change
        rows = [open_rows(p) for p in (path, tmp_path / "new")]
        np.testing.assert_array_equal(*(r.read(np.arange(len(r))) for r in rows))


def test_what_is_held_out_is_copied_as_it_is(source, tmp_path):
    path, tokenizer = source
    keep_documents(path, sorted(told(path))[:5], tokenizer, tmp_path / "new")
    old, new = (open_rows(p, "heldout") for p in (path, tmp_path / "new"))
    indices = np.arange(len(old))
    assert (old.read(indices) == new.read(np.arange(len(new)))).all()
    assert documents_of(path, "heldout", 0, len(old)) == documents_of(
        tmp_path / "new", "heldout", 0, len(new)
    )


def test_started_again_it_goes_on_and_writes_the_same(source, tmp_path, monkeypatch):
    path, tokenizer = source
    wanted = sorted(told(path))[::2]
    keep_documents(path, wanted, tokenizer, tmp_path / "whole")
    real, calls = SourceWriter.write_part, []

    def failing(self, number, *args):
        calls.append(number)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, number, *args)

    monkeypatch.setattr(SourceWriter, "write_part", failing)
    with pytest.raises(KeyboardInterrupt):
        keep_documents(path, wanted, tokenizer, tmp_path / "again")
    keep_documents(path, wanted, tokenizer, tmp_path / "again")
    assert calls[:4] == [0, 1, 2, 2]
    files = [
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.suffix != ".json"}
        for name in ("whole", "again")
    ]
    assert files[0] == files[1] and files[0]
    count = len(calls)
    keep_documents(path, wanted, tokenizer, tmp_path / "again")  # complete
    assert len(calls) == count
    with pytest.raises(UserError, match="holds another choice of documents"):
        keep_documents(path, wanted[1:], tokenizer, tmp_path / "again")


def test_bad_input(source, tmp_path):
    path, tokenizer = source
    some = sorted(told(path))[:3]
    with pytest.raises(UserError, match="none of the documents"):
        keep_documents(path, [], tokenizer, tmp_path / "a")
    with pytest.raises(UserError, match="has only 3 of the 4 training documents"):
        keep_documents(path, [*some, ("nowhere", 1, "")], tokenizer, tmp_path / "b")
    with pytest.raises(UserError, match="was tokenized by another tokenizer"):
        keep_documents(path, some, tiny.tokenizer(), tmp_path / "c")
    shard = next(path.glob(f"*train*{sidecars.SUFFIX}"))
    content = shard.read_bytes()
    try:
        shard.write_bytes(content[:-9])
        with pytest.raises(UserError, match="cannot be read"):
            keep_documents(path, some, tokenizer, tmp_path / "d")
    finally:
        shard.write_bytes(content)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b", "d.incomplete"]
