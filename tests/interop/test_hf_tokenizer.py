"""The exported tokenizer gives our ids, whatever the text and whichever kind it was."""

import dataclasses
import io
import itertools
import json
import pathlib
import pydoc_data.topics
import random
import re

import pytest
import sentencepiece
import tokenizer_files

from mobilellm_jax.data.chat import ConversationEncoder, markers, read_template
from mobilellm_jax.data.sentencepiece_tokenizer import train_tokenizer
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop import hf_tokenizer

TOPICS = list(pydoc_data.topics.topics.values())
SHARED = pathlib.Path(__file__).parents[3] / "shared/data/tokenizers/cc_all_32k.model"
NASTY = [
    *" \t\n\r\0\x01\x7f\x85'\"#=-_()<>|\\09aeAZ",
    *"\u00a0\u00ad\u200b\u200d\u2028\u202e\u3000\ufeff\ufffd\uffff\ue000\U000e0041\U0010ffff",
    *"\u2581\u2585\u0301\u0308\u05d0\u0627\u0e01\u1100\u1161\u4e2d\u6587\uac00\U00020000",
    *["  ", "    ", "\n\n", "\r\n", "    \n", " \u2581", "e\u0301", "A\u030a", "ﬁ", "ß", "İ"],
    *["\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\U0001f44d\U0001f3fd"],
    *[
        "<s>",
        "</s>",
        "<unk>",
        "<0x41>",
        "self",
        "return",
        " the",
        "def f(x):\n    ",
        "0x1F",
        "12345",
    ],
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TOPICS[:60], 1024)


@pytest.fixture(scope="module")
def loaded(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> object:
    """What a user gets: AutoTokenizer of a folder that says it holds a Llama."""
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("hf")
    (directory / "config.json").write_text('{"model_type": "llama"}')
    hf_tokenizer.write_tokenizer(tokenizer, directory, max_length=77)
    return transformers.AutoTokenizer.from_pretrained(directory)


def character(rng: random.Random) -> str:
    """A code point of any plane, surrogates excepted."""
    code = rng.randrange(0x110000 - 0x800)
    return chr(code if code < 0xD800 else code + 0x800)


def texts(count: int) -> list[str]:
    """Ordinary lines, hostile mixtures, runs of few different things, and any code points."""
    rng = random.Random(0)
    lines = [line for topic in TOPICS for line in topic.split("\n")]
    found = []
    for i in range(count):
        words = [rng.choice(lines), *rng.sample(NASTY, 4), character(rng)]
        if i % 4 == 0:
            found.append(
                rng.choice(["", " ", "  ", "\t"]) + rng.choice(lines) + rng.choice(["", " \n"])
            )
        elif i % 4 == 1:
            found.append("".join(rng.choices(NASTY, k=rng.randint(0, 40))))
        elif i % 4 == 2:
            found.append("".join(rng.choices(rng.sample(words, 3), k=rng.randint(1, 12))))
        else:
            found.append("".join(character(rng) for _ in range(rng.randint(1, 20))))
    return found


def test_ids_and_text_are_the_same(tokenizer: Tokenizer, loaded: object) -> None:
    lines = texts(2000) + NASTY + [a + b for a, b in itertools.product(NASTY, repeat=2)]
    encoded = loaded(lines, add_special_tokens=False)["input_ids"]
    different = [t for t, ids in zip(lines, encoded, strict=True) if tokenizer.encode(t) != ids]
    assert not different, f"{len(different)} of {len(lines)} differ, such as {different[0]!r}"
    back = loaded.batch_decode(encoded)
    lost = [t for t, text in zip(lines, back, strict=True) if t != text]
    assert not lost, f"{len(lost)} of {len(lines)} are not given back, such as {lost[0]!r}"


def test_long_documents(tokenizer: Tokenizer, loaded: object) -> None:
    for text in ("\n".join(TOPICS), "".join(texts(3000)), " " * 5001, "=" * 4999 + "\n" * 3001):
        ids = loaded(text, add_special_tokens=False)["input_ids"]
        assert ids == tokenizer.encode(text)
        assert loaded.decode(ids) == text


def test_bos_stands_in_front_unless_asked_not_to(tokenizer: Tokenizer, loaded: object) -> None:
    ids = tokenizer.encode("a <s> b")
    assert loaded("a <s> b")["input_ids"] == [tokenizer.bos_id, *ids]
    assert loaded("a <s> b", "c")["input_ids"].count(tokenizer.bos_id) == 2
    generated = [tokenizer.bos_id, *ids, tokenizer.eos_id]
    assert loaded.decode(generated, skip_special_tokens=True) == "a <s> b"


def test_what_the_loaded_tokenizer_says_of_itself(tokenizer: Tokenizer, loaded: object) -> None:
    assert len(loaded) == loaded.vocab_size == tokenizer.vocab_size
    assert (loaded.bos_token_id, loaded.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert (loaded.unk_token_id, loaded.model_max_length) == (0, 77)
    assert loaded.is_fast and loaded.clean_up_tokenization_spaces is False


def test_saved_again_it_is_still_the_same(
    tokenizer: Tokenizer, loaded: object, tmp_path: pathlib.Path
) -> None:
    loaded.save_pretrained(tmp_path)
    again = type(loaded).from_pretrained(tmp_path)
    for text in texts(100):
        assert again(text)["input_ids"] == [tokenizer.bos_id, *tokenizer.encode(text)]


def join(symbols: list[str], rank: dict[tuple[str, str], int]) -> list[str]:
    """Byte pair encoding: always the pair of best rank, the leftmost of several."""
    while pairs := [pair for pair in itertools.pairwise(symbols) if pair in rank]:
        best = min(pairs, key=lambda pair: rank[pair])
        i = list(itertools.pairwise(symbols)).index(best)
        symbols = [*symbols[:i], "".join(best), *symbols[i + 2 :]]
    return symbols


def join_by_score(symbols: list[str], scores: dict[str, float]) -> list[str]:
    """SentencePiece's rule: the two neighbours that make the piece of highest score."""
    while True:
        made = [
            (scores.get(a + b, -1e9), -i) for i, (a, b) in enumerate(itertools.pairwise(symbols))
        ]
        if not made or max(made)[0] == -1e9:
            return symbols
        i = -max(made)[1]
        symbols = [*symbols[:i], symbols[i] + symbols[i + 1], *symbols[i + 2 :]]


@pytest.mark.parametrize("seed", range(20))
def test_one_merge_per_piece_says_all(seed: int) -> None:
    rng = random.Random(seed)
    words = ["".join(p) for n in (2, 3, 4, 5) for p in itertools.product("ab", repeat=n)]
    chosen = rng.sample(words, rng.randint(1, len(words)))  # unlike a trained one, unordered
    scores = {"a": -1e6, "b": -1e6} | {word: -float(i) for i, word in enumerate(chosen)}
    merges = hf_tokenizer.merges(scores)
    assert len({left + right for left, right in merges}) == len(merges)
    rank = {pair: i for i, pair in enumerate(merges)}
    for _ in range(100):
        text = rng.choices("ab", k=rng.randint(1, 30))
        assert join(text, rank) == join_by_score(text, scores)


def foreign(tmp_path: pathlib.Path, **options: object) -> Tokenizer:
    """A tokenizer that SentencePiece trained by itself."""
    model = io.BytesIO()
    plain = {
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    }
    lines = [line for topic in TOPICS[:20] for line in topic.split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=500,
        minloglevel=2,
        hard_vocab_limit=False,
        **{**plain, **options},
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    return Tokenizer.load(tmp_path / "tokenizer.model")


def test_a_model_with_a_dummy_prefix_converts(tmp_path: pathlib.Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = foreign(tmp_path, add_dummy_prefix=True)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    hf_tokenizer.write_tokenizer(tokenizer, tmp_path, max_length=77)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in texts(500):
        ids = loaded(text, add_special_tokens=False)["input_ids"]
        assert ids == tokenizer.encode(text)
        assert loaded.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("options", "obstacle"),
    [
        ({"model_type": "unigram"}, "not a BPE model"),
        ({"byte_fallback": False}, "no byte pieces"),
        ({"normalization_rule_name": "nfkc"}, "normalises text (nfkc)"),
        ({"remove_extra_whitespaces": True}, "removes extra spaces"),
        ({"treat_whitespace_as_suffix": True}, "marks spaces behind words"),
        ({"user_defined_symbols": ["<x>"]}, "user-defined or unused pieces"),
    ],
)
def test_what_cannot_be_exact_is_refused(
    tmp_path: pathlib.Path, options: dict[str, object], obstacle: str
) -> None:
    with pytest.raises(UserError, match=re.escape(obstacle)):
        hf_tokenizer.tokenizer_json(foreign(tmp_path, **options))


CHAT = [{"role": "user", "content": "Hi <s>?"}, {"role": "assistant", "content": "Yes.\n"}]


def test_a_chat_template_goes_out_with_the_model(
    tokenizer: Tokenizer, tmp_path: pathlib.Path
) -> None:
    """It makes one text of a conversation, in which the special tokens must be found."""
    transformers = pytest.importorskip("transformers")
    template = tokenizer_files.LLAMA2_CHAT + "é"
    chatty = dataclasses.replace(tokenizer, chat_template=template)
    hf_tokenizer.write_tokenizer(chatty, tmp_path, max_length=77)
    assert (tmp_path / "chat_template.jinja").read_bytes() == template.encode()
    assert Tokenizer.load(tmp_path) == chatty
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.chat_template == template
    ids = loaded.apply_chat_template(CHAT[1:], return_dict=False)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert ids == [bos, *tokenizer.encode(" Yes.\n "), eos, *tokenizer.encode("é")]
    assert loaded("Hi")["input_ids"] == [bos, *tokenizer.encode("Hi")]


def test_marks_of_a_template_are_special_tokens_of_ours(tmp_path: pathlib.Path) -> None:
    """A tokenizer that was trained with them, in transformers: the same ids, and turns that end."""
    transformers = pytest.importorskip("transformers")
    template = read_template("chatml")
    trained = train_tokenizer(TOPICS, 700, markers(template))
    tokenizer = dataclasses.replace(trained, chat_template=template)
    hf_tokenizer.write_tokenizer(tokenizer, tmp_path, max_length=77)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    encoder = ConversationEncoder(tokenizer)
    ids = loaded.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert [tokenizer.bos_id, *ids] == encoder.prompt(CHAT)
    (end,) = encoder.turn_ends
    assert (
        tokenizer.pieces[end] == "<|im_end|>"
        and end in ids
        and end not in trained.encode("<|im_end|>")
    )
    assert trained.decode(trained.encode("a <|im_end|>")) == "a <|im_end|>"
    assert hf_tokenizer.generation_config(tokenizer)["eos_token_id"] == [tokenizer.eos_id, end]
    assert hf_tokenizer.generation_config(trained)["eos_token_id"] == tokenizer.eos_id
    plain = dataclasses.replace(tokenizer, chat_template=read_template("plain"))
    assert ConversationEncoder(plain).turn_ends == [tokenizer.eos_id]
    letters = dataclasses.replace(train_tokenizer(TOPICS, 700), chat_template=template)
    assert ConversationEncoder(letters).turn_ends == []


@pytest.mark.parametrize("kind", sorted(tokenizer_files.FOLDERS))
def test_what_came_from_hugging_face_goes_back_as_it_came(
    kind: str, tmp_path: pathlib.Path
) -> None:
    transformers = pytest.importorskip("transformers")
    came = tokenizer_files.FOLDERS[kind](tmp_path / "came")
    (tmp_path / "goes").mkdir()
    hf_tokenizer.write_tokenizer(Tokenizer.load(came), tmp_path / "goes", max_length=77)
    for file in came.iterdir():
        assert (tmp_path / "goes" / file.name).read_bytes() == file.read_bytes()
    before, after = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("came", "goes")
    )
    assert type(after) is type(before) and len(after) == len(before)
    assert after.chat_template == before.chat_template == Tokenizer.load(came).chat_template
    assert after.special_tokens_map == before.special_tokens_map
    assert after.model_max_length == before.model_max_length == 4096
    lines = texts(300)
    assert after(lines)["input_ids"] == before(lines)["input_ids"]
    assert after.apply_chat_template(CHAT) == before.apply_chat_template(CHAT)


def test_what_hugging_face_needs_is_added(tmp_path: pathlib.Path) -> None:
    """A tokenizer.json whose BOS and EOS only config.json knew, and no context length."""
    transformers = pytest.importorskip("transformers")
    came = tokenizer_files.llama3_folder(tmp_path / "came")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (came / name).unlink()
    (came / "config.json").write_text('{"bos_token_id": 594, "eos_token_id": [595, 598]}')
    tokenizer = Tokenizer.load(came)
    (tmp_path / "goes").mkdir()
    hf_tokenizer.write_tokenizer(tokenizer, tmp_path / "goes", max_length=77)
    (tmp_path / "goes/config.json").write_text('{"model_type": "llama"}')
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "goes")
    assert (loaded.bos_token_id, loaded.eos_token_id) == (594, 595)
    assert loaded.model_max_length == 77
    for text in texts(100):
        assert loaded(text)["input_ids"] == [594, *tokenizer.encode(text)]
        assert loaded.decode(tokenizer.encode(text)) == text


def test_of_several_chat_templates_the_default_goes_out(tmp_path: pathlib.Path) -> None:
    transformers = pytest.importorskip("transformers")
    came = tokenizer_files.qwen2_folder(tmp_path / "came")
    config = json.loads((came / "tokenizer_config.json").read_text())
    several = {"default": tokenizer_files.CHATML, "tool_use": "tools"}
    config["chat_template"] = [{"name": k, "template": v} for k, v in several.items()]
    (came / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "goes").mkdir()
    hf_tokenizer.write_tokenizer(Tokenizer.load(came), tmp_path / "goes", max_length=77)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "goes")
    assert loaded.chat_template == tokenizer_files.CHATML


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_a_published_unigram_model_is_refused() -> None:
    with pytest.raises(UserError, match="not a BPE model"):
        hf_tokenizer.tokenizer_json(Tokenizer.load(SHARED))
