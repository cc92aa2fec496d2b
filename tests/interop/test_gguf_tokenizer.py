"""llama.cpp gives the tokenizer's ids, whatever the text."""

import ctypes
import io
import json
import pathlib
import pydoc_data.topics
import random
import re
import unicodedata

import numpy as np
import pytest
import sentencepiece
import tiny
import tokenizer_files
import tokenizers

from mobilellm_jax.data.sentencepiece_tokenizer import train_tokenizer
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.gguf import export
from mobilellm_jax.interop.gguf_reader import inspect
from mobilellm_jax.interop.gguf_tokenizer import vocabulary
from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, Stack

pytest.importorskip("gguf")

TOPICS = list(pydoc_data.topics.topics.values())
RARE = [
    *" \t\n\r\0\x01\x7f\x85'\"#=-_()<>|\\09aeAZ",
    *"\u00a0\u00ad\u200b\u200d\u2028\u202e\u3000\ufeff\ufffd\uffff\ue000\U000e0041\U0010ffff",
    *"\u2585\u0301\u0308\u05d0\u0627\u0e01\u0967\u00b2\u2167\u1100\u1161\u4e2d\u6587\uac00",
    *["  ", "\n\n", "\r\n", "    \n", " \t ", "e\u0301", "A\u030a", "ﬁ", "ß", "İ", "\U00020000"],
    *["\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\U0001f44d\U0001f3fd"],
    *["'s", "'LL", "'Ve", "don't", "I'M", "123456", "3.14", "١٢٣", "x²", "Ⅷ", "naïve", "中文"],
    *["<s>", "</s>", "<unk>", "<0x41>", "<|eot_id|>", "<|im_start|>", "[PAD3]", " the", "self."],
]


def lines(count: int) -> list[str]:
    """Prose and code, mixtures of rare things, and characters of every plane.

    Left out are a literal U+2581, which llama.cpp's SentencePiece reads as a space, and code points
    that Python's Unicode does not know, since each program's tables are of another year.
    """
    rng = random.Random(0)
    code = pathlib.Path(random.__file__).read_text(encoding="utf-8").split("\n")
    plain = [line for topic in TOPICS for line in topic.split("\n")] + code

    def character() -> str:
        while unicodedata.category(found := chr(rng.randrange(0x110000))) in ("Cs", "Cn"):
            pass
        return found

    found = []
    for i in range(count):
        line = rng.choice(plain)
        if i % 4 == 1:
            line = "\n".join(rng.sample(plain, 3))
        elif i % 4 == 2:
            line = "".join(rng.choices([*RARE, *line.split(" ")], k=rng.randint(0, 30)))
        elif i % 4 == 3:
            line = "".join(character() for _ in range(rng.randint(1, 20)))
        found.append(line.replace("\u2581", ""))
    return found


PAIRS = [a + b for a in RARE for b in RARE]
LINES = lines(2000) + RARE + random.Random(1).sample(PAIRS, 2000)


def write(tokenizer: Tokenizer, path: pathlib.Path, size: int | None = None) -> list[str]:
    """A small network of zeros with this tokenizer; the notes on it."""
    model = ModelConfig(size or tokenizer.vocab_size, 256, (Stack(1, 4, 4, 256),))
    shapes = flat(transformer.shapes(model))
    leaves = {name: np.zeros(leaf.shape, np.float32) for name, leaf in shapes.items()}
    return export(leaves, model, tokenizer, path)


def load(path: pathlib.Path) -> object:
    llama_cpp = pytest.importorskip("llama_cpp")
    return llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


def check_same(tokenizer: Tokenizer, path: pathlib.Path, texts: list[str]) -> None:
    loaded = load(path)
    theirs = [loaded.tokenize(text.encode(), add_bos=False, special=False) for text in texts]
    different = [t for t, ids in zip(texts, theirs, strict=True) if tokenizer.encode(t) != ids]
    assert len(texts) >= 1000
    assert not different, f"{len(different)} of {len(texts)} differ, such as {different[0]!r}"


def check_pieces(tokenizer: Tokenizer, path: pathlib.Path) -> None:
    """A text's bytes are those of its tokens, one after another."""
    llama_cpp = pytest.importorskip("llama_cpp")
    loaded = load(path)  # holds the memory of what follows
    words = llama_cpp.llama_model_get_vocab(loaded.model)
    buffer = ctypes.create_string_buffer(256)

    def piece(i: int) -> bytes:
        return buffer[: llama_cpp.llama_token_to_piece(words, i, buffer, len(buffer), 0, True)]

    for text in LINES[:500]:
        assert b"".join(map(piece, tokenizer.encode(text))) == text.encode()


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return train_tokenizer(TOPICS[:60], 2048)


def test_our_sentencepiece_models(ours: Tokenizer, tmp_path: pathlib.Path) -> None:
    assert write(ours, tmp_path / "out.gguf") == []
    check_same(ours, tmp_path / "out.gguf", LINES)
    check_pieces(ours, tmp_path / "out.gguf")
    loaded = load(tmp_path / "out.gguf")
    assert loaded.tokenize(b"a <s> b") == [ours.bos_id, *ours.encode("a <s> b")]
    assert loaded.tokenize(b"a</s>", special=True)[-1] == loaded.token_eos() == ours.eos_id
    assert loaded.token_bos() == ours.bos_id
    # The one character that it cannot tell from another.
    assert loaded.tokenize("a\u2581b".encode()) == loaded.tokenize(b"a b")
    assert ours.encode("a\u2581b") != ours.encode("a b")


def foreign(path: pathlib.Path, **options: object) -> Tokenizer:
    """A tokenizer that SentencePiece trained by itself, on lines with marks of HTML."""
    model = io.BytesIO()
    texts = [line for topic in TOPICS[:20] for line in topic.split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts + 80 * ["b<span c<src d<self e<set .<str )<sup g<sx <sy"]),
        model_writer=model,
        vocab_size=600,
        minloglevel=2,
        hard_vocab_limit=False,
        **{
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "add_dummy_prefix": False,
            "remove_extra_whitespaces": False,
            "split_by_unicode_script": False,
            **options,
        },
    )
    (path / "tokenizer.model").write_bytes(model.getvalue())
    return Tokenizer.load(path)


@pytest.mark.parametrize(
    "options",
    [{}, {"add_dummy_prefix": True}, {"user_defined_symbols": ["<|turn|>", "\u2581yes\u2581"]}],
)
def test_foreign_sentencepiece_models(options: dict[str, object], tmp_path: pathlib.Path) -> None:
    tokenizer = foreign(tmp_path, **options)
    (note,) = write(tokenizer, tmp_path / "out.gguf")
    # What the note names, and nothing else, llama.cpp takes for the token of that name.
    names = [piece.piece for piece in tokenizer.proto.pieces if re.fullmatch("<.+>", piece.piece)]
    named = set(re.search("the letters (.*) in a text", note)[1].split(" "))
    assert "<s>" in named and "</s>" not in named
    loaded = load(tmp_path / "out.gguf")
    for name in set(names) - {"<|turn|>"}:
        ids = loaded.tokenize(name.encode(), add_bos=False, special=False)
        assert (ids != tokenizer.encode(name)) == (name in named), name
    texts = [text for text in LINES if not any(name in text for name in named)]
    turns = [f"{a}<|turn|> yes {b}" for a, b in zip(texts, texts[1:], strict=False)]
    check_same(tokenizer, tmp_path / "out.gguf", texts + turns)


@pytest.mark.parametrize(
    ("options", "obstacle"),
    [
        ({"model_type": "unigram"}, "not a BPE model"),
        ({"byte_fallback": False}, "no byte pieces"),
        ({"normalization_rule_name": "nfkc"}, "normalises text (nfkc)"),
        ({"remove_extra_whitespaces": True}, "removes extra spaces"),
        ({"treat_whitespace_as_suffix": True}, "marks spaces behind words"),
        (
            {"user_defined_symbols": ["<x>"], "add_dummy_prefix": True},
            "user-defined pieces and puts a space",
        ),
    ],
)
def test_sentencepiece_models_that_would_differ_are_refused(
    options: dict[str, object], obstacle: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(UserError, match=re.escape(obstacle)):
        vocabulary(foreign(tmp_path, **options), 1000)


def changed(folder: pathlib.Path, **changes: object) -> Tokenizer:
    """A folder's tokenizer.json with other entries, those of `model` one by one."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"] |= changes.pop("model", {})
    (folder / "tokenizer.json").write_text(json.dumps(content | changes))
    return Tokenizer.load(folder)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
GPT2 = BYTE_LEVEL | {"use_regex": True}
SMOLLM = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2],
}


@pytest.mark.parametrize(
    ("folder", "changes", "pre"),
    [
        ("llama3", {}, "llama-bpe"),
        ("llama3", {"model": {"ignore_merges": False}}, "dbrx"),
        ("qwen2", {}, "qwen2"),
        ("qwen2", {"pre_tokenizer": GPT2, "normalizer": None}, "gpt-2"),
        ("qwen2", {"pre_tokenizer": SMOLLM, "normalizer": None}, "smollm"),
    ],
)
def test_byte_level_bpe(
    folder: str, changes: dict[str, object], pre: str, tmp_path: pathlib.Path
) -> None:
    tokenizer = changed(tokenizer_files.FOLDERS[folder](tmp_path, 1500), **changes)
    write(tokenizer, tmp_path / "out.gguf")
    assert inspect(tmp_path / "out.gguf").keys["tokenizer.ggml.pre"] == pre
    texts = LINES + [f"a <think>{text}<tool_call>" for text in LINES[:200]]
    if pre == "qwen2":
        texts = [text for text in texts if unicodedata.is_normalized("NFC", text)]
        assert load(tmp_path / "out.gguf").tokenize("e\u0301".encode()) != tokenizer.encode("é")
    else:
        check_pieces(tokenizer, tmp_path / "out.gguf")
    check_same(tokenizer, tmp_path / "out.gguf", texts)


@pytest.mark.parametrize("whole", [True, False])
def test_words_that_merges_do_not_make(whole: bool, tmp_path: pathlib.Path) -> None:
    folder = tokenizer_files.llama3_folder(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"] | {"\u0120xylophone": 600}
    tokenizer = changed(folder, model={"vocab": vocab, "ignore_merges": whole})
    write(tokenizer, tmp_path / "out.gguf")
    ids = load(tmp_path / "out.gguf").tokenize(b"a xylophone", add_bos=False)
    assert ids == tokenizer.encode("a xylophone")
    assert (600 in ids) == whole


def test_special_tokens_of_llama_3(tmp_path: pathlib.Path) -> None:
    tokenizer = Tokenizer.load(tokenizer_files.llama3_folder(tmp_path))
    assert write(tokenizer, tmp_path / "out.gguf", 610) == []
    keys = inspect(tmp_path / "out.gguf").keys
    tokens = dict(
        zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True)
    )
    assert len(tokens) == 610 and list(tokens)[-1] == "[PAD609]" and tokens["[PAD609]"] == 5
    assert keys["tokenizer.ggml.eot_token_id"] == list(tokens).index("<|eot_id|>")
    assert tokens["<|eot_id|>"] == 3 and list(tokens.values()).count(1) == 594
    assert keys["tokenizer.chat_template"] == tokenizer_files.LLAMA3_CHAT
    loaded = load(tmp_path / "out.gguf")
    assert loaded.tokenize(b"a") == [tokenizer.bos_id, *tokenizer.encode("a")]
    assert loaded.token_eos() == tokenizer.eos_id
    turn = loaded.tokenize(b"a<|eot_id|>", add_bos=False, special=True)
    assert turn == [*tokenizer.encode("a"), 598]
    assert 598 not in loaded.tokenize(b"a<|eot_id|>", add_bos=False, special=False)


def test_special_tokens_of_qwen(tmp_path: pathlib.Path) -> None:
    tokenizer = Tokenizer.load(tokenizer_files.qwen2_folder(tmp_path))
    composed, in_front = write(tokenizer, tmp_path / "out.gguf")
    assert "(NFC)" in composed and "begin with <|endoftext|>" in in_front
    keys = inspect(tmp_path / "out.gguf").keys
    tokens = dict(
        zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True)
    )
    assert tokens["<|im_end|>"] == 3 and tokens["<think>"] == 4
    assert keys["tokenizer.ggml.eot_token_id"] == list(tokens).index("<|im_end|>")
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["tokenizer.chat_template"] == tokenizer_files.CHATML
    loaded = load(tmp_path / "out.gguf")
    assert loaded.tokenize(b"a") == tokenizer.encode("a")
    # Found in every text, by both.
    assert loaded.tokenize(b"a<think>") == tokenizer.encode("a<think>")
    assert len(tokenizer.encode("<think>")) == 1


def test_ids_that_no_token_has_are_filled(tmp_path: pathlib.Path) -> None:
    folder = tokenizer_files.llama3_folder(tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][-1]["id"] = 620
    tokenizer = changed(folder, added_tokens=content["added_tokens"])
    words = vocabulary(tokenizer, 640)
    assert len(words.tokens) == len(words.types) == len(set(words.tokens)) == 640
    assert words.tokens[599] == "[PAD599]" and words.types[599] == 5
    assert words.tokens[620] == content["added_tokens"][-1]["content"] and words.types[620] == 3


OTHER_SPLIT = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {"Regex": r"\p{Han}+|\s"},
            "behavior": "Isolated",
            "invert": False,
        },
        BYTE_LEVEL | {"use_regex": False},
    ],
}


@pytest.mark.parametrize(
    ("folder", "changes", "obstacle"),
    [
        ("llama2", {}, "put tokenizer.model in its place"),
        ("qwen2", {"pre_tokenizer": OTHER_SPLIT}, r"cuts text into words by \p{Han}+|\s, which"),
        ("qwen2", {"pre_tokenizer": None}, "cuts text into words by null, which"),
        ("qwen2", {"pre_tokenizer": GPT2 | {"add_prefix_space": True}}, '"add_prefix_space": true'),
        ("qwen2", {"model": {"ignore_merges": True}}, "and looks whole words up"),
        (
            "qwen2",
            {"normalizer": {"type": "Lowercase"}},
            'normalises text by {"type": "Lowercase"}',
        ),
        ("qwen2", {"model": {"end_of_word_suffix": "</w>"}}, "marks where words begin or end"),
    ],
)
def test_byte_level_bpe_that_would_differ_is_refused(
    folder: str, changes: dict[str, object], obstacle: str, tmp_path: pathlib.Path
) -> None:
    tokenizer = changed(tokenizer_files.FOLDERS[folder](tmp_path), **changes)
    with pytest.raises(UserError, match=re.escape(obstacle)):
        vocabulary(tokenizer, 1000)


def test_other_models_are_refused(tmp_path: pathlib.Path) -> None:
    folder = tokenizer_files.qwen2_folder(tmp_path)
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<|endoftext|>": 1}, "a"))
    made.save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match="its model is WordLevel"):
        vocabulary(Tokenizer.load(folder), 1000)


def test_more_tokens_than_embeddings_are_refused() -> None:
    with pytest.raises(UserError, match=f"has {tiny.VOCAB} tokens and the model 319 embeddings"):
        vocabulary(tiny.tokenizer(), 319)
