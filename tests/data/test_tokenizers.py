"""Tokenizers: lossless on any text, bytes that add up, and an exact Hugging Face twin."""

import pathlib
import pickle
import random

import numpy as np
import pytest

from mobilellm_jax.data import tokenizers
from mobilellm_jax.data.tokenizers import Tokenizer, train_tokenizer
from mobilellm_jax.errors import UserError

SHARED = pathlib.Path(__file__).parents[3] / "shared/data/tokenizers/cc_all_32k.model"
NASTY = (
    *" \n\t\r\0\x01\x85\u2028\u3000\ufeff\u2581\u2585\ue000\ue001\ue002=-#_().:\"'aesf120",
    *(
        "é",
        "e\u0301",
        "中",
        "文",
        "😀",
        "👨‍👩‍👧",
        "ﬁ",
        "\U0010ffff",
        "<s>",
        "</s>",
        "<unk>",
        "<0x41>",
    ),
    *("    ", "\n\n", "the", " of", "self.", "return ", "def f():\n        "),
)


def nasty_texts(count):
    rng = random.Random(0)
    for _ in range(count):
        letters = rng.sample(NASTY, rng.randint(1, 6))
        yield "".join(rng.choice(letters) for _ in range(rng.randint(0, 40)))


@pytest.fixture(scope="module")
def source():
    return [
        path.read_text() for path in sorted(pathlib.Path(tokenizers.__file__).parent.glob("*.py"))
    ]


@pytest.fixture(scope="module")
def tokenizer(source):
    return train_tokenizer(source, 800)


def test_ids_are_where_the_contract_puts_them(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (800, 1, 2)


def test_any_text_survives(tokenizer, source):
    sizes = tokenizer.piece_bytes()
    assert sizes.dtype == np.int32 and sizes.shape == (800,)
    for text in (*source, *nasty_texts(3000)):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert sizes[ids].sum() == len(text.encode())
        assert not {0, tokenizer.bos_id, tokenizer.eos_id} & set(ids)  # whatever the text says
    assert tokenizer.lossless


def test_control_pieces_stand_for_nothing(tokenizer):
    ids = tokenizer.encode("one")
    assert tokenizer.decode([1, *ids, 2, 1]) == "one"
    assert (tokenizer.piece_bytes()[:3] == 0).all()


def test_pieces_are_words_numbers_and_indentation(tokenizer):
    pieces = [piece.piece.replace("\u2581", " ") for piece in tokenizer.proto.pieces[259:]]
    assert all(tokenizers.WORDS.fullmatch(piece) or piece.isspace() for piece in pieces)
    assert not [p for p in pieces if sum(c.isdigit() for c in p) > 1]
    assert [p for p in pieces if p.startswith("\n    ")]  # a line break with its indentation


def test_hugging_face_bpe_of_the_same_merges_gives_the_same_ids(tokenizer, source):
    hf = pytest.importorskip("tokenizers")
    pieces = [
        p.piece.replace("\u2581", " ") if p.type == p.NORMAL else p.piece
        for p in tokenizer.proto.pieces
    ]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    assert len(vocabulary) == 800
    splits = [(p[:i], p[i:]) for p in pieces[259:] for i in range(1, len(p))]
    merges = [pair for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
    model = hf.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    twin = hf.Tokenizer(model)
    for text in (*source, *nasty_texts(3000)):
        assert twin.encode(text).ids == tokenizer.encode(text)


def test_it_travels_by_pickle_and_by_file(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "x.model")
    tokenizer.encode("warm")
    for copy in (pickle.loads(pickle.dumps(tokenizer)), Tokenizer.load(tmp_path / "x.model")):
        assert copy == tokenizer and copy.fingerprint == tokenizer.fingerprint
        assert copy.encode("def f(x):\n    return x") == tokenizer.encode("def f(x):\n    return x")
    assert [path.name for path in tmp_path.iterdir()] == ["x.model"]


def test_training_is_deterministic(source):
    assert train_tokenizer(source, 400) == train_tokenizer(iter(source), 400)


@pytest.mark.parametrize("vocab_size", [50, 100_000])
def test_an_impossible_vocabulary_is_told(source, vocab_size):
    with pytest.raises(UserError, match=f"{vocab_size} pieces cannot be trained"):
        train_tokenizer(source[:1], vocab_size)


def test_bad_files_are_told(tmp_path):
    with pytest.raises(UserError, match="there is no tokenizer at"):
        Tokenizer.load(tmp_path / "absent.model")
    for content in (b"", b"no model at all", bytes(range(256))):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(UserError, match="not a SentencePiece model"):
            Tokenizer.load(tmp_path / "bad.model")


def test_a_model_without_bos_is_refused(source, tmp_path):
    proto = train_tokenizer(source, 400).proto
    proto.trainer_spec.bos_id = -1
    proto.trainer_spec.bos_piece = "<nothing>"
    (tmp_path / "x.model").write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match="no BOS piece"):
        Tokenizer.load(tmp_path / "x.model")


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_a_model_of_other_people_works():
    tokenizer = Tokenizer.load(SHARED)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (2, 1) and not tokenizer.lossless
    text = "Plain words, and a number: 42."
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.piece_bytes()[ids].sum() == len(text) + 1  # the space it puts in front
