"""tokenizer.json files: the ids and the text that transformers gives, and nothing lost on the way."""

import dataclasses
import hashlib
import json
import pickle
import random
import shutil
import unicodedata

import numpy as np
import pytest
import tokenizer_files
import tokenizers

from mobilellm_jax.data.sentencepiece_tokenizer import train_tokenizer
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.hf_tokenizer import write_tokenizer

KINDS = sorted(tokenizer_files.FOLDERS)
NASTY = [
    *" \t\n\r\0\x01\x7f\x85'\"#=-_()<>|\\09aeAZ",
    *"\u00a0\u00ad\u200b\u200d\u2028\u202e\u3000\ufeff\ufffd\uffff\ue000\U000e0041\U0010ffff",
    *"\u2581\u2585\u0301\u0308\u05d0\u0627\u0e01\u1100\u1161\u4e2d\u6587\uac00\U00020000\u0120\u010a",
    *[
        "  ",
        "    ",
        "\n\n",
        "\r\n",
        "    \n",
        " \u2581",
        "e\u0301",
        "A\u030a",
        "ﬁ",
        "ß",
        "İ",
        "\u212b",
    ],
    *["\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\U0001f44d\U0001f3fd"],
    *["<0x41>", "self.", " the", "def f(x):\n    ", "0x1F", "1234567", "don't", "I'LL", " ,", " ."],
]


def texts(count):
    """Ordinary lines, hostile mixtures and any code points; no text spells a special token."""
    rng = random.Random(0)
    lines = [line for text in tokenizer_files.texts() for line in text.split("\n")]
    for i in range(count):
        codes = [rng.randrange(0x110000 - 0x800) for _ in range(3)]
        anything = [chr(c if c < 0xD800 else c + 0x800) for c in codes]  # no surrogates
        words = [rng.choice(lines), *rng.sample(NASTY, 4), *anything]
        yield rng.choice(lines) if i % 3 == 0 else "".join(rng.choices(words, k=rng.randint(0, 12)))


def given_back(kind, text):
    """What each kind makes of a text, by its definition."""
    if kind == "qwen2":
        return unicodedata.normalize("NFC", text)
    return text.replace("\u2581", " ") if kind == "llama2" else text


@pytest.fixture
def folder(folders, tmp_path, request):
    """A copy of one, to be changed."""
    kind = getattr(request, "param", "llama3")
    return shutil.copytree(folders[kind], tmp_path / "folder")


def change(path, **values):
    """Sets keys of a JSON file; None takes a key away."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content = {k: v for k, v in {**content, **values}.items() if v is not None}
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_those_of_transformers(folders, kind):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(folders[kind])
    tokenizer = Tokenizer.load(folders[kind])
    sizes = tokenizer.piece_bytes()
    for text in texts(1500):
        ids = tokenizer.encode(text)
        assert ids == reference(text, add_special_tokens=False)["input_ids"], repr(text)
        assert tokenizer.decode(ids) == reference.decode(ids) == given_back(kind, text), repr(text)
        prefix = kind == "llama2" and text != ""  # it puts a space in front
        assert sizes[ids].sum() == len(given_back(kind, text).encode()) + prefix, repr(text)
    batch = tokenizer.encode_batch(texts(1500))
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in texts(1500)]
    assert tokenizer.vocab_size == len(reference) == 600
    assert sizes.shape == (600,) and sizes.dtype == np.int32


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_ids_and_never_text(folders, kind):
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(folders[kind])
    tokenizer = Tokenizer.load(folders[kind])
    special = {t.content: i for i, t in reference.added_tokens_decoder.items() if t.special}
    ordinary = {t.content: i for i, t in reference.added_tokens_decoder.items() if not t.special}
    assert len(special) >= 3 and bool(ordinary) == (kind == "qwen2")
    for token, i in special.items():
        text = f"a {token}b\n{token}"
        ids = tokenizer.encode(text)
        split = reference(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == split and not set(special.values()) & set(ids)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([i, *ids, i]) == text and tokenizer.piece_bytes()[i] == 0
    for token, i in ordinary.items():
        text = f"a {token}b"
        assert i in tokenizer.encode(text) and tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.piece_bytes()[i] == len(token)


def test_pieces_that_are_special_are_never_text(tmp_path):
    """Vocabularies of words and of Unigram hold BOS and EOS as pieces like any other."""
    spelled = "it <s>was</s> and is <s>"
    made = tokenizers.Tokenizer(tokenizers.models.Unigram())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    letters = [f"{spelled} {text}" for text in tokenizer_files.texts()]
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>"
    )
    made.train_from_iterator(letters, trainer)
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "it": 3}, unk_token="<unk>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(["<unk>", "<s>", "</s>"])
    for name, each in (("unigram", made), ("words", words)):
        (tmp_path / name).mkdir()
        each.save(str(tmp_path / name / "tokenizer.json"))
        config = {"bos_token": "<s>", "eos_token": "</s>"}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = Tokenizer.load(tmp_path / name)
        assert {1, 2} & set(each.encode(spelled.replace("<s>w", "<s> w")).ids)
        ids = tokenizer.encode(spelled)
        assert len(ids) > 5 and not {1, 2} & set(ids)
        if name == "unigram":
            assert tokenizer.decode(ids).replace(" ", "") == spelled.replace(" ", "")
        unknown = tokenizer.encode("it \u0416")
        assert 0 in unknown  # stays


def test_where_each_begins_and_ends(folders):
    ends = {k: (t.bos_id, t.eos_id) for k in KINDS if (t := Tokenizer.load(folders[k]))}
    assert ends == {"llama3": (594, 595), "qwen2": (595, 595), "llama2": (1, 2)}
    assert {k: Tokenizer.load(folders[k]).lossless for k in KINDS} == {
        "llama3": True,
        "qwen2": False,
        "llama2": False,
    }


BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"  # 594, 595
SAID = [  # tokenizer_config.json, special_tokens_map.json, config.json; BOS and EOS
    ({"bos_token": BEGIN, "eos_token": END}, {}, {}, (594, 595)),
    ({"bos_token": {"content": BEGIN}, "eos_token": {"content": END}}, {}, {}, (594, 595)),
    ({}, {"bos_token": BEGIN, "eos_token": {"content": END}}, {}, (594, 595)),
    ({}, {}, {"bos_token_id": 594, "eos_token_id": [598, 595]}, (594, 598)),
    ({"eos_token": END}, {}, {"bos_token_id": 594, "eos_token_id": [598]}, (594, 595)),
    ({"eos_token": END, "bos_token": BEGIN}, {"eos_token": BEGIN}, {"bos_token_id": 3}, (594, 595)),
    ({"eos_token": END}, {"bos_token": BEGIN}, {"bos_token_id": 3}, (594, 595)),
    ({"eos_token": END}, {}, {"bos_token_id": None}, (595, 595)),
    ({"bos_token": BEGIN}, {}, {"eos_token_id": []}, (594, 594)),
    ({}, {}, {"bos_token_id": 0}, (0, 0)),
]


@pytest.mark.parametrize(("config", "special", "model", "ends"), SAID)
def test_who_says_what_begins_and_ends_a_document(folder, tmp_path, config, special, model, ends):
    files = {
        "tokenizer_config.json": config,
        "special_tokens_map.json": special,
        "config.json": model,
    }
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)
        if content:
            (folder / name).write_text(json.dumps(content))
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == ends
    # What was in config.json, which belongs to the model, is not lost on the way.
    (tmp_path / "copy").mkdir()
    tokenizer.write(tmp_path / "copy")
    again = Tokenizer.load(tmp_path / "copy")
    assert again == tokenizer and (again.bos_id, again.eos_id) == ends
    assert again.fingerprint == tokenizer.fingerprint
    assert not (tmp_path / "copy/config.json").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_it_travels_in_every_way(folders, tmp_path, kind):
    tokenizer = Tokenizer.load(folders[kind])
    assert tokenizer.chat_template
    tokenizer.encode("warm")
    tokenizer.write(tmp_path)
    ways = {
        "pickle": pickle.loads(pickle.dumps(tokenizer)),
        "file": Tokenizer.load(tmp_path / "tokenizer.json"),
        "folder": Tokenizer.load(tmp_path),
        "checkpoint": Tokenizer.from_dict(json.loads(json.dumps(tokenizer.to_dict()))),
    }
    for way, copy in ways.items():
        assert copy == tokenizer and hash(copy) == hash(tokenizer), way
        assert copy.fingerprint == tokenizer.fingerprint, way
        assert copy.chat_template == tokenizer.chat_template, way
        assert (copy.bos_id, copy.eos_id) == (tokenizer.bos_id, tokenizer.eos_id), way
        assert copy.encode("def f(x):\n    return é") == tokenizer.encode("def f(x):\n    return é")
    before = {path.name: path.read_bytes() for path in folders[kind].iterdir()}
    template = {"chat_template.jinja": tokenizer.chat_template.encode()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before | template


def test_the_fingerprint_is_of_what_decides_the_ids(folder):
    def print_of():
        return Tokenizer.load(folder).fingerprint

    first = print_of()
    content = (folder / "tokenizer.json").read_bytes()
    assert first == hashlib.sha256(content + b" 594 595").hexdigest()
    change(folder / "tokenizer_config.json", chat_template="x", model_max_length=7, other=1)
    assert print_of() == first
    assert dataclasses.replace(Tokenizer.load(folder), chat_template="y").fingerprint == first
    change(folder / "tokenizer_config.json", eos_token="<|eot_id|>")
    ended = print_of()
    content = json.loads(content)
    content["model"]["merges"][0], content["model"]["merges"][1] = content["model"]["merges"][1::-1]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert len({first, ended, print_of()}) == 3


def test_the_vocabulary_is_that_of_a_chat_version_too(folder, tmp_path):
    """Which has other special tokens and another end, and stands for the same text."""
    base = Tokenizer.load(folder)
    chat = tmp_path / "chat"
    shutil.copytree(folder, chat)
    raw = json.loads((chat / "tokenizer.json").read_text())
    last = raw["added_tokens"][-1]
    assert last["special"]
    last["content"] = "<|another|>"
    (chat / "tokenizer.json").write_text(json.dumps(raw))
    other = Tokenizer.load(chat)
    assert other.fingerprint != base.fingerprint and other.vocabulary == base.vocabulary
    vocabulary = raw["model"]["vocab"]
    ids = [i for i, size in enumerate(base.piece_bytes().tolist()) if size == 3][:2]
    names = {i: piece for piece, i in vocabulary.items()}
    vocabulary[names[ids[0]]], vocabulary[names[ids[1]]] = ids[1], ids[0]
    (chat / "tokenizer.json").write_text(json.dumps(raw))
    assert Tokenizer.load(chat).vocabulary != base.vocabulary


def test_settings_for_other_uses_are_not_ours(folder):
    """A file may say that texts are truncated, padded, or merged at random."""
    text = "\n".join(tokenizer_files.texts())[:20_000]
    expected = Tokenizer.load(folder).encode(text)
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.enable_truncation(5)
    plain.enable_padding(length=100_000)
    plain.model.dropout = 0.5
    plain.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode(text) == expected and tokenizer.lossless


def test_ids_of_padded_embeddings_stand_for_nothing(folders):
    for kind in KINDS:
        tokenizer = Tokenizer.load(folders[kind])
        ids = tokenizer.encode("one two")
        assert tokenizer.decode([*ids[:2], 600, *ids[2:], np.int32(100_000)]) == "one two"


# Lossless or not: each change of the file with a text that it loses.


def rewritten(folder, edit):
    content = json.loads((folder / "tokenizer.json").read_text())
    edit(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return Tokenizer.load(folder)


def add_token(file, **flags):
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    file["added_tokens"].append({"id": 600, "special": False, **token, **flags})


def without_a_byte(content):
    content["model"]["merges"] = []
    content["model"]["vocab"].pop("a")


LOSSY = {
    "normalizer": (lambda c: c.update(normalizer={"type": "Lowercase"}), "A"),
    "space in front": (
        lambda c: c["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        "a",
    ),
    "parts fall off": (
        lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
        "a b",
    ),
    "another decoder": (lambda c: c.update(decoder={"type": "Fuse"}), "a b"),
    "no decoder": (lambda c: c.update(decoder=None), "a b"),
    "no pre-tokenizer": (lambda c: c.update(pre_tokenizer=None), "a b"),
    "greedy added token": (lambda c: add_token(c, content="<x>", lstrip=True), "a  <x>"),
    "added token of bytes": (lambda c: add_token(c, content="é"), "é"),
    "a byte without token": (without_a_byte, "a"),
}


@pytest.mark.parametrize("what", LOSSY)
def test_what_may_lose_text_is_not_called_lossless(folder, what):
    edit, text = LOSSY[what]
    tokenizer = rewritten(folder, edit)
    assert not tokenizer.lossless
    assert tokenizer.decode(tokenizer.encode(text)) != text


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
KEPT = {
    "as GPT-2": lambda c: c.update(pre_tokenizer=BYTES),
    "as SmolLM": lambda c: c["pre_tokenizer"].update(
        pretokenizers=[{"type": "Digits", "individual_digits": True}, BYTES]
    ),
    "cut at marks": lambda c: c["pre_tokenizer"].update(
        pretokenizers=[{"type": "Punctuation", "behavior": "Isolated"}, BYTES]
    ),
}


@pytest.mark.parametrize("what", KEPT)
def test_other_ways_to_cut_text_lose_nothing(folder, what):
    tokenizer = rewritten(folder, KEPT[what])
    assert tokenizer.lossless
    for text in texts(300):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_added_token_that_is_text_loses_nothing(folder):
    tokenizer = rewritten(folder, lambda content: add_token(content, content="<think>"))
    assert tokenizer.lossless and tokenizer.vocab_size == 601
    assert tokenizer.encode("a <think>")[-1] == 600
    assert tokenizer.decode(tokenizer.encode("a <think>")) == "a <think>"
    assert tokenizer.piece_bytes()[600] == 7


def test_ours_is_lossless_in_this_form_too(tmp_path):
    ours = train_tokenizer(tokenizer_files.texts(), 600)
    write_tokenizer(ours, tmp_path, 77)
    theirs = Tokenizer.load(tmp_path / "tokenizer.json")
    assert theirs.lossless and (theirs.bos_id, theirs.eos_id) == (1, 2)
    assert (theirs.piece_bytes() == ours.piece_bytes()).all()
    for text in texts(300):
        assert theirs.encode(text) == ours.encode(text) and theirs.decode(ours.encode(text)) == text
    greedy = rewritten(tmp_path, lambda content: content["model"].update(ignore_merges=True))
    assert Tokenizer.load(tmp_path) == ours  # that of the folder is the model
    greedy = Tokenizer.load(tmp_path / "tokenizer.json")
    assert not greedy.lossless and greedy.decode(greedy.encode("<0x41>")) == "A"


# Chat templates, other kinds, bad input.


SEVERAL = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]


@pytest.mark.parametrize(
    ("in_config", "in_file", "expected"),
    [
        (None, None, None),
        ("a\r\n", None, "a\r\n"),
        ("a", "b\r\n", "b\r\n"),
        (None, "é", "é"),
        (SEVERAL, None, "d"),
        (SEVERAL[:1], None, None),
    ],
)
def test_chat_templates(folder, in_config, in_file, expected):
    change(folder / "tokenizer_config.json", chat_template=in_config)
    if in_file is not None:
        (folder / "chat_template.jinja").write_bytes(in_file.encode())
    assert Tokenizer.load(folder).chat_template == expected
    ours = train_tokenizer(tokenizer_files.texts(), 600)
    (folder / "tokenizer.model").write_bytes(ours.model_bytes)
    assert Tokenizer.load(folder / "tokenizer.model").chat_template == expected


def test_a_tokenizer_of_another_model_works_but_may_lose_text(tmp_path):
    vocabulary = {"[UNK]": 0, "[BOS]": 1, "one": 2, "two": 3, "##s": 4}
    words = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.decoder = tokenizers.decoders.WordPiece()
    words.add_special_tokens(["[UNK]", "[BOS]"])
    words.save(str(tmp_path / "tokenizer.json"))
    change(tmp_path / "tokenizer_config.json", bos_token="[BOS]")
    tokenizer = Tokenizer.load(tmp_path)
    assert not tokenizer.lossless and (tokenizer.bos_id, tokenizer.eos_id) == (1, 1)
    assert tokenizer.encode("ones three two") == [2, 4, 0, 3]
    assert tokenizer.decode([1, 2, 4, 0, 3]) == "ones two"


BAD = {
    "damaged": ({"tokenizer.json": "{"}, "tokenizer.json is damaged, or no tokenizer.json"),
    "other JSON": ({"tokenizer.json": "[1]"}, "tokenizer.json is damaged, or no tokenizer.json"),
    "no model": ({"tokenizer.json": "{}"}, "tokenizer.json is damaged, or no tokenizer.json"),
    "damaged config": ({"tokenizer_config.json": "{"}, "tokenizer_config.json is damaged"),
    "config of a list": ({"tokenizer_config.json": "[]"}, "tokenizer_config.json is damaged"),
    "damaged map": ({"special_tokens_map.json": "\0"}, "special_tokens_map.json is damaged"),
    "deep config": ({"tokenizer_config.json": "[" * 100_000}, "tokenizer_config.json is damaged"),
    "no template": (
        {"tokenizer_config.json": '{"chat_template": 5}'},
        "its chat_template is neither",
    ),
    "no templates": (
        {"tokenizer_config.json": '{"chat_template": [{"name": "default"}]}'},
        "its chat_template is neither a text nor a list of named ones",
    ),
    "damaged model": ({"config.json": "nothing"}, "/config.json is damaged"),
    "no ends": (
        {"tokenizer_config.json": "{}", "special_tokens_map.json": "{}"},
        "nothing says which tokens of .*tokenizer.json begin and end a document",
    ),
    "no such token": (
        {"tokenizer_config.json": '{"bos_token": "<bos>"}'},
        "the bos_token of .*tokenizer_config.json is '<bos>', which tokenizer.json does not know",
    ),
    "a token of no text": (
        {"tokenizer_config.json": '{"eos_token": 5555}'},
        "the eos_token of .*tokenizer_config.json is 5555, which tokenizer.json does not know",
    ),
    "no id": (
        {"tokenizer_config.json": "{}", "special_tokens_map.json": "{}"}
        | {"config.json": '{"bos_token_id": -1, "eos_token_id": 1.5}'},
        "the bos_token of .*config.json is -1, which tokenizer.json does not know",
    ),
    "no whole id": (
        {"tokenizer_config.json": "{}", "special_tokens_map.json": "{}"}
        | {"config.json": '{"eos_token_id": 1.5}'},
        "the eos_token of .*config.json is 1.5, which tokenizer.json does not know",
    ),
    "no such id": (
        {"tokenizer_config.json": "{}", "special_tokens_map.json": "{}"}
        | {"config.json": '{"eos_token_id": [600]}'},
        "the eos_token of .*config.json is 600, which tokenizer.json does not know",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_files_are_told_in_one_sentence(folder, what):
    files, sentence = BAD[what]
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=sentence) as told:
        Tokenizer.load(folder)
    assert "\n" not in str(told.value)
