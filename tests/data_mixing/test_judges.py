"""Judges: the probability of 1 is that of the network's own logits; a classifier's score is transformers'."""

import dataclasses
import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import tiny
import tokenizer_files
from weights import random_leaves

from data_mixing import judges
from data_mixing.judges import COMBINED, REASONING, SHIPPED, Asking, Judge, classifier, read_prompts
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.decoding.decoder import to_read
from mobilellm_jax.errors import UserError
from mobilellm_jax.leaves import nested
from mobilellm_jax.model import transformer
from mobilellm_jax.training import checkpoint
from mobilellm_jax.training.checkpoint import LoadedModel

CONTEXT = 224
VOCABULARY = 600  # of the network, whatever the tokenizer has: it is compiled once for all of them
SHORT = ["1 + 1 = 2", "the deep model reads small rows.", "naïve", "5 + 7 = 12\n7 + 7 = 14"]
DOCUMENTS = [*tiny.documents("sums", 3), *tiny.documents("words", 2), "1 + 1 = 2, naïve. " * 200]
PROMPTS = {
    "short": "{document}\n1 or 0?",
    "braces": 'Is {"this": 1} fit? {document} Say 1 or 0:\n',
    "a space behind": "{document} is ",
}


@pytest.fixture(scope="module", params=["sentencepiece", "llama3", "qwen2", "llama2"])
def tokenizer(request, tmp_path_factory):
    """As many kinds as write a digit in different ways."""
    if request.param == "sentencepiece":
        return tiny.tokenizer()
    folder = getattr(tokenizer_files, f"{request.param}_folder")
    return Tokenizer.load(folder(tmp_path_factory.mktemp("tokenizer") / request.param))


def network(tokenizer):
    model = dataclasses.replace(tiny.MODEL, vocab_size=VOCABULARY, max_length=CONTEXT)
    params = nested(jax.tree.map(jnp.asarray, random_leaves(model)))
    return LoadedModel(params, model, tokenizer, 0, {})


def reader(loaded):
    return to_read(loaded.params, loaded.model)


@pytest.fixture(scope="module")
def loaded(tokenizer):
    return network(tokenizer)


@functools.partial(jax.jit, static_argnums=0)
def all_logits(model, params, tokens_BT):
    return transformer.logits(params, model, transformer.apply(params, model, tokens_BT))


def logits_of(loaded, ids):
    """Of every place of a text, float64; what is behind a token does not change its logits."""
    tokens_BT = np.zeros((1, CONTEXT), np.int32)
    tokens_BT[0, : len(ids)] = ids
    logits_BTV = all_logits(loaded.model, loaded.params, tokens_BT)
    return np.asarray(logits_BTV, np.float64)[0, : len(ids)]


def log_likelihood(loaded, ids):
    """Of a whole text."""
    log_TV = scipy.special.log_softmax(logits_of(loaded, ids[:-1]), axis=-1)
    return log_TV[np.arange(len(ids) - 1), ids[1:]].sum()


def test_the_probability_of_one_is_that_of_the_full_logits(tokenizer, loaded):
    for prompt in PROMPTS.values():
        found = judges.probability_of_one(SHORT, reader(loaded), Asking(prompt, tokenizer, CONTEXT))
        space = "" if prompt[-1].isspace() else " "
        for document, probability in zip(SHORT, found, strict=True):
            text = prompt.replace("{document}", document) + space
            one, zero = (
                log_likelihood(loaded, [tokenizer.bos_id, *tokenizer.encode(text + answer)])
                for answer in "10"
            )
            assert 0 < probability < 1
            np.testing.assert_allclose(probability, scipy.special.expit(one - zero), atol=1e-4)
        assert found.std() > 1e-3  # it depends on the document


def test_where_answers_are_single_tokens_it_is_a_softmax_over_two_logits(tmp_path):
    tokenizer = Tokenizer.load(tokenizer_files.qwen2_folder(tmp_path / "qwen2"))
    loaded, prompt = network(tokenizer), "{document}\nAnswer:\n"
    found = judges.probability_of_one(SHORT, reader(loaded), Asking(prompt, tokenizer, CONTEXT))
    one, zero = (tokenizer.encode(answer) for answer in "10")
    assert len(one) == len(zero) == 1
    for document, probability in zip(SHORT, found, strict=True):
        text = prompt.replace("{document}", document)
        logits_V = logits_of(loaded, [tokenizer.bos_id, *tokenizer.encode(text)])[-1]
        expected = scipy.special.softmax(logits_V[[*one, *zero]])[0]
        np.testing.assert_allclose(probability, expected, atol=1e-4)


def text_of(tokenizer, request):
    return tokenizer.decode(request.context[1:] + request.continuation)


@pytest.mark.parametrize("longest", [5, 60, 10_000])
def test_a_long_document_is_cut_so_that_the_prompt_fits(tokenizer, longest):
    prompt, context, document = "Document:\n{document}\nEnd. 1 or 0?", 128, DOCUMENTS[-1]
    one, zero = Asking(prompt, tokenizer, context, longest).requests(document)
    assert one.context == zero.context and one.continuation != zero.continuation
    sizes = [len(r.context) + len(r.continuation) for r in (one, zero)]
    assert max(sizes) <= context + 1  # the last token is not read
    if longest == 10_000:
        assert max(sizes) > context - 8  # and no more is cut than need be
    begin, end = prompt.split("{document}")
    text = text_of(tokenizer, one)
    assert text.startswith(begin) and text.endswith(f"{end} 1")
    inside = text.removeprefix(begin).removesuffix(f"{end} 1")
    assert document.startswith(inside) and len(inside) > longest / 4 if longest < 100 else inside
    assert len(tokenizer.encode(inside)) <= longest


def test_a_short_document_is_asked_as_it_is(tokenizer):
    document, prompt = DOCUMENTS[0], "Document:\n{document}\n1 or 0?"
    one, zero = Asking(prompt, tokenizer, 256).requests(document)
    for request, answer in ((one, "1"), (zero, "0")):
        text = prompt.replace("{document}", document) + f" {answer}"
        assert (*request.context, *request.continuation) == (
            tokenizer.bos_id,
            *tokenizer.encode(text),
        )


def test_a_chat_is_what_its_template_writes_with_the_answer_behind(tmp_path):
    tokenizer = Tokenizer.load(tokenizer_files.llama3_folder(tmp_path / "llama3"))
    one, _ = Asking("Fit?\n{document}", tokenizer, 256, chat=True).requests("Two words.")
    text = (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nFit?\nTwo words.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n1"
    )
    expected = tokenizer.encode_special(text)[0].tolist()
    assert list(one.context + one.continuation) == expected and expected[0] == tokenizer.bos_id


def test_a_prompt_that_leaves_no_room_and_answers_that_are_one_are_refused():
    tokenizer = tiny.tokenizer()
    with pytest.raises(UserError, match="context of 32: give a shorter one with --prompt"):
        Asking("many words " * 20 + "{document}", tokenizer, 32)

    class Blind(type(tokenizer)):
        def encode(self, text):
            return [5 for _ in text]

    blind = Blind(**{f.name: getattr(tokenizer, f.name) for f in dataclasses.fields(tokenizer)})
    with pytest.raises(UserError, match="writes the answers 1 and 0 with the same tokens"):
        Asking("{document}", blind, 32)


# Prompts.


def test_every_capability_of_the_paper_has_a_prompt():
    names = [REASONING, "code", "math", "knowledge", COMBINED]
    prompts = read_prompts(names)
    assert len(set(prompts.values())) == len(names) == len(list(SHIPPED.glob("*.txt")))


def test_prompts_of_ones_own_take_their_place(tmp_path):
    (tmp_path / "mine.txt").write_text("{document} {or} not?\n")
    found = read_prompts(["code", "law"], [f"law={tmp_path}/mine.txt"])
    assert (
        found["law"] == "{document} {or} not?" and found["code"] == read_prompts(["code"])["code"]
    )


@pytest.mark.parametrize(
    ("names", "given", "said"),
    [
        (["law"], [], "no prompt for 'law', only for .*--prompt=law=FILE"),
        (["law"], ["law=nowhere.txt"], "nowhere.txt cannot be read"),
        (["code"], ["code=none.txt"], "none.txt has no {document}"),
        (["code"], ["code=two.txt"], "two.txt has 2 {document}"),
        (["code"], ["math=two.txt"], "--prompt=math=two.txt is not asked: .* are code"),
        (["code"], ["code"], "--prompt=code is not of the form"),
    ],
)
def test_a_prompt_that_cannot_be_asked_is_refused(names, given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none.txt").write_text("no place")
    (tmp_path / "two.txt").write_text("{document} {document}")
    with pytest.raises(UserError, match=said):
        read_prompts(names, given)


# A judge in files.


def test_a_stored_judge_is_read_when_it_is_needed(tmp_path, monkeypatch):
    loaded = network(tiny.tokenizer())
    checkpoint.write_model(
        random_leaves(loaded.model), loaded.model, loaded.tokenizer, {}, tmp_path / "judge"
    )
    measure = Judge(tmp_path / "judge", longest=50).asked(PROMPTS["short"])
    asking = Asking(PROMPTS["short"], loaded.tokenizer, CONTEXT, 50)
    np.testing.assert_allclose(
        measure.of(DOCUMENTS),
        judges.probability_of_one(DOCUMENTS, reader(loaded), asking),
        atol=1e-5,
    )
    other = Judge(tmp_path / "judge", longest=50).asked(PROMPTS["braces"])
    assert measure.identity["tokenizer"] == loaded.tokenizer.fingerprint
    assert measure.identity != other.identity
    json.dumps(measure.identity)
    with pytest.raises(UserError, match="no chat template"):
        Judge(tmp_path / "judge", chat=True)


# Quality.


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny random BERT with one output, as FineWeb-Edu's classifier has."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("bert")
    words = sorted({w for text in DOCUMENTS for w in text.lower().replace(".", " ").split()})
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", *words])}
    made = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_max_length=512
    ).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=1,
        initializer_range=0.5,
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def test_a_classifier_gives_the_scores_of_transformers(bert, monkeypatch):
    import torch
    import transformers

    monkeypatch.setattr(judges, "TOGETHER", 3)
    found = classifier(str(bert)).of(DOCUMENTS)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert).eval()
    for document, number in zip(DOCUMENTS, found, strict=True):
        ids = tokenizer(document, return_tensors="pt", truncation=True, max_length=512)
        assert ids["input_ids"].shape[1] <= 512
        with torch.no_grad():
            np.testing.assert_allclose(number, model(**ids).logits[0, 0], atol=1e-5)
    assert found.std() > 1e-3


def test_what_is_no_classifier_is_refused(bert, tmp_path):
    def edited(name, **changes):
        folder = tmp_path / name
        folder.mkdir()
        for file in bert.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        raw = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(raw))
        return str(folder)

    with pytest.raises(UserError, match="neither an import path"):
        classifier(str(tmp_path))
    with pytest.raises(UserError, match="no classifier of sequences but BertModel"):
        classifier(edited("model", architectures=["BertModel"]))
    two = edited("two", id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1})
    with pytest.raises(UserError, match="has 2 outputs"):
        classifier(two)


def test_a_classifier_without_torch_is_told_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": ["BertForSequenceClassification"]})
    )
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else found(name)
    )
    with pytest.raises(UserError, match=r"needs torch .*mobilellm-jax\[torch\]"):
        judges.quality(str(tmp_path))


def test_a_function_of_ones_own_gives_finite_numbers(tmp_path, monkeypatch):
    (tmp_path / "my_quality.py").write_text(
        "def length(texts):\n    return [len(t) for t in texts]\n"
        "def short(texts):\n    return [1.0]\n"
        "def nan(texts):\n    return [float('nan') for _ in texts]\n"
        "def broken(texts):\n    return [None for _ in texts]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert judges.quality("my_quality:length").of(["ab", "c"]).tolist() == [2, 1]
    for name in ("short", "nan", "broken"):
        with pytest.raises(UserError, match=f"--quality=my_quality:{name}"):
            judges.quality(f"my_quality:{name}").of(["ab", "c"])
    with pytest.raises(UserError, match="--quality='my_quality:missing'.*has no 'missing'"):
        judges.quality("my_quality:missing")
