"""SentencePiece models: lossless on any text, bytes that add up, and an exact Hugging Face twin."""

import base64
import dataclasses
import hashlib
import json
import pathlib
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest

from mobilellm_jax.data import sentencepiece_tokenizer
from mobilellm_jax.data.sentencepiece_tokenizer import train_tokenizer
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.hf_tokenizer import write_tokenizer

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
        path.read_text()
        for path in sorted(pathlib.Path(sentencepiece_tokenizer.__file__).parent.glob("*.py"))
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


def test_many_at_once_get_the_ids_of_each_alone(tokenizer, source):
    texts = [*source, *nasty_texts(3000), "", " "]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.dtype == np.int32 and ids.tolist() == tokenizer.encode(text)


def test_control_pieces_stand_for_nothing(tokenizer):
    ids = tokenizer.encode("one")
    assert tokenizer.decode([1, *ids, 2, 1]) == "one"
    assert (tokenizer.piece_bytes()[:3] == 0).all()


def test_pieces_are_words_numbers_and_indentation(tokenizer):
    pieces = [piece.piece.replace("\u2581", " ") for piece in tokenizer.proto.pieces[259:]]
    assert all(
        sentencepiece_tokenizer.WORDS.fullmatch(piece) or piece.isspace() for piece in pieces
    )
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


@pytest.mark.parametrize(
    "template", [None, "{{ bos_token }}\r\n{% for m in messages %}é{% endfor %}\n"]
)
def test_it_travels_in_every_way(tokenizer, tmp_path, template):
    tokenizer = dataclasses.replace(tokenizer, chat_template=template)
    tokenizer.encode("warm")
    tokenizer.write(tmp_path)
    ways = {
        "pickle": pickle.loads(pickle.dumps(tokenizer)),
        "file": Tokenizer.load(tmp_path / "tokenizer.model"),
        "folder": Tokenizer.load(tmp_path),
        "checkpoint": Tokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict()))),
    }
    for way, copy in ways.items():
        assert copy == tokenizer and copy.fingerprint == tokenizer.fingerprint, way
        assert copy.chat_template == template, way
        assert copy.encode("def f(x):\n    return x") == tokenizer.encode("def f(x):\n    return x")
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert files.pop("tokenizer.model") == tokenizer.model_bytes
    assert files == ({} if template is None else {"chat_template.jinja": template.encode()})


def test_the_fingerprint_is_that_of_the_model_file_alone(tokenizer):
    other = dataclasses.replace(tokenizer, chat_template="x")
    assert other != tokenizer
    expected = hashlib.sha256(tokenizer.model_bytes).hexdigest()
    assert other.fingerprint == tokenizer.fingerprint == expected


def test_it_reads_what_checkpoints_held_before_there_were_chat_templates(tokenizer):
    packed = {"sentencepiece": base64.b64encode(tokenizer.model_bytes).decode()}
    assert Tokenizer.from_dict(packed) == tokenizer


def test_ids_of_padded_embeddings_stand_for_nothing(tokenizer):
    ids = tokenizer.encode("one two")
    assert tokenizer.decode([*ids[:2], 800, *ids[2:], 100_000]) == "one two"


def test_the_other_library_is_not_loaded(tokenizer, tmp_path):
    tokenizer.write(tmp_path)
    program = (
        "import sys\n"
        "from mobilellm_jax.data.tokenizers import Tokenizer\n"
        f"tokenizer = Tokenizer.load({str(tmp_path)!r})\n"
        "Tokenizer.from_dict(tokenizer.to_dict()).encode('text')\n"
        "print(sorted({'tokenizers', 'sentencepiece'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['sentencepiece']"


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


@pytest.mark.parametrize("spoilt", [b"\xd6", b"\xff"])
def test_a_model_whose_pieces_are_no_text_is_told(tokenizer, tmp_path, spoilt):
    """Where a byte has changed in a file that can be parsed otherwise."""
    piece = next(p.piece for p in tokenizer.proto.pieces[300:] if len(p.piece) > 3).encode()
    (tmp_path / "t.model").write_bytes(tokenizer.model_bytes.replace(piece, spoilt + piece[1:], 1))
    with pytest.raises(UserError, match="not a SentencePiece model, or is damaged"):
        Tokenizer.load(tmp_path / "t.model")


def test_a_folder_without_tokenizer_is_told(tokenizer, tmp_path):
    with pytest.raises(UserError, match="neither a tokenizer.model nor a tokenizer.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="there is no tokenizer at"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    tokenizer.write(tmp_path)
    with pytest.raises(UserError, match="chat_template.jinja is damaged"):
        Tokenizer.load(tmp_path)


def test_of_two_files_in_a_folder_the_one_that_knows_more_counts(tokenizer, tmp_path):
    write_tokenizer(tokenizer, tmp_path, 77)
    file = tmp_path / "tokenizer.json"
    assert Tokenizer.load(tmp_path) == tokenizer
    content = json.loads(file.read_text())
    content["added_tokens"].append(
        {**content["added_tokens"][-1], "id": 800, "content": "<|im_start|>"}
    )
    file.write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path) == Tokenizer.load(file) != tokenizer
    assert Tokenizer.load(tmp_path / "tokenizer.model") == tokenizer
    (tmp_path / "tokenizer.model").unlink()
    assert Tokenizer.load(tmp_path).vocab_size == 801


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
