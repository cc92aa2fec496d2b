"""Conversations: the template's text, its ids, which of them are trained on, and their rows."""

import dataclasses
import functools
import json

import chats
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tensorflow_datasets as tfds
import tiny
import tokenizer_files

from mobilellm_jax.data.chat import ChatTemplate, ConversationEncoder, EncodeChats, read_template
from mobilellm_jax.data.chat_corpus import ChatCorpus
from mobilellm_jax.data.contexts import Contexts
from mobilellm_jax.data.corpora import FileCorpus, documents
from mobilellm_jax.data.documents import documents_of
from mobilellm_jax.data.opening import open_mixture
from mobilellm_jax.data.packing import (
    INSIDE,
    UNTRAINED,
    Whole,
    counted,
    marked,
    positions,
    segment_ids,
    token_ids,
)
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.rows import open_rows, read_info
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, Stack
from mobilellm_jax.parallel.mesh import make_mesh
from mobilellm_jax.training.evaluation import evaluate
from mobilellm_jax.training.objectives import Network, next_token

LLAMA3_ENDS = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"}
END = "<|endoftext|>"  # the Qwen tokenizer's BOS and EOS
STYLES = {  # template, what it writes by hand, tokenizer
    "llama3": (chats.LLAMA3, chats.llama3, "llama3"),
    "chatml": (chats.CHATML, chats.chatml, "qwen2"),
    "chatml, tagged": (chats.TAGGED, chats.chatml, "qwen2"),
    "mistral": (chats.MISTRAL, functools.partial(chats.mistral, **LLAMA3_ENDS), "llama3"),
    "llama2, BOS inside": (chats.LLAMA2, functools.partial(chats.llama2, **LLAMA3_ENDS), "llama3"),
    "plain, EOS is BOS": (chats.PLAIN, functools.partial(chats.plain, eos=END), "qwen2"),
}
SEEDS = range(40)


@pytest.fixture(params=STYLES)
def style(request, folders):
    """A tokenizer with a template, and the parts of its text by hand."""
    template, by_hand, kind = STYLES[request.param]
    return dataclasses.replace(Tokenizer.load(folders[kind]), chat_template=template), by_hand


def pieces(tokenizer, ids):
    """The bytes that each id is spelled with, special ones included."""
    inner = tokenizer._tokenizer
    added = inner.get_added_tokens_decoder()
    alphabet = {letter: byte for byte, letter in tokenizer_files.byte_letters().items()}
    return [
        added[i].content.encode()
        if i in added
        else bytes(alphabet[letter] for letter in inner.id_to_token(i))
        for i in map(int, ids)
    ]


def test_only_what_the_assistant_says_is_trained_on(style):
    """Byte by byte: the tokens spell the text by hand, and one is trained on if a byte of it is."""
    tokenizer, by_hand = style
    encode = ConversationEncoder(tokenizer)
    for seed in SEEDS:
        parts = by_hand(chats.conversation(seed))
        text = "".join(text for text, _ in parts).encode()
        trained = np.repeat([t for _, t in parts], [len(text.encode()) for text, _ in parts])
        marks = encode(chats.conversation(seed))
        ids = token_ids(marks)
        assert ids[0] == tokenizer.bos_id and marks[0] == tokenizer.bos_id | UNTRAINED
        spelled = pieces(tokenizer, ids)
        if not text.startswith(spelled[0]):  # the template writes no BOS
            spelled[0] = b""
        assert b"".join(spelled) == text
        ends = np.cumsum([len(piece) for piece in spelled])
        expected = [trained[end - len(p) : end].any() for p, end in zip(spelled, ends, strict=True)]
        assert (marks & UNTRAINED == 0).tolist() == [False, *expected[1:]]
        # Only the first BOS begins a document.
        assert (segment_ids(marks, tokenizer.bos_id) == 1).all()
        assert ((marks & INSIDE > 0)[1:] == (ids[1:] == tokenizer.bos_id)).all()


def test_calls_are_trained_on_and_what_they_give_is_not(folders, tmp_path):
    """Of OpenAI's messages: a call in the assistant's turn, what it gave in a turn of the tool."""
    call = {"name": "start_timer", "arguments": {"minutes": 20}}
    talk = [
        {"role": "user", "content": "A timer for 20 minutes."},
        {"role": "assistant", "content": None, "tool_calls": [{"function": call}]},
        {"role": "tool", "content": '{"running": true}', "name": "start_timer"},
        {"role": "assistant", "content": "It is running."},
    ]
    (messages,) = chats.read(chats.corpus_of(tmp_path, {"messages": talk}))
    tokenizer = Tokenizer.load(folders["qwen2"])
    encode = ConversationEncoder(dataclasses.replace(tokenizer, chat_template=chats.CALLS))
    ids = encode(messages)
    said = tokenizer.decode(token_ids(ids[ids & UNTRAINED == 0]))
    assert said == f"<call>{json.dumps(call)}It is running."
    assert '{"running": true}' in tokenizer.decode(token_ids(ids[ids & UNTRAINED != 0]))
    # A template that knows no calls would leave them out.
    refuses = dataclasses.replace(tokenizer, chat_template=read_template("chatml"))
    with pytest.raises(
        UserError, match="asks 'A timer for 20 minutes.' has `tool_calls`, of which"
    ):
        ConversationEncoder(refuses)(messages)


SEEN = """{%- if tools %}{{ '<|im_start|>tools\n' }}
{%- for t in tools %}{{ t | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ '<think>' + m.thinking if m.thinking }}
{{- '<again>' + m.reasoning_content if m.reasoning_content }}
{{- m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}
{%- endfor %}"""


@pytest.mark.parametrize("name", [None, "reasoning_content", "thinking", "reasoning"])
def test_functions_and_reasoning_reach_the_template_as_in_transformers(folders, tmp_path, name):
    transformers = pytest.importorskip("transformers")
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
    said = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    talk = [said[0], {**said[1], **({name: "hm"} if name else {})}]
    theirs = transformers.AutoTokenizer.from_pretrained(folders["qwen2"])
    ours = dataclasses.replace(Tokenizer.load(folders["qwen2"]), chat_template=SEEN)
    encode = EncodeChats(200)
    tables = json.dumps([tool])  # as text, as in tables whose functions differ
    corpus = chats.corpus_of(
        tmp_path,
        {"messages": talk, "tools": [tool]},
        {"messages": talk, "tools": tables},
        {"messages": talk, "tools": None},
        {"messages": talk},
    )
    texts = [document.text for document in documents(corpus)]
    for tools, text in zip(([tool], [tool], None, None), texts, strict=True):
        found = theirs.apply_chat_template(
            talk, tools, chat_template=SEEN, return_dict=True, return_assistant_tokens_mask=True
        )
        marks = encode(ours, [text])[0].ids[1:]  # the template writes no BOS
        assert token_ids(marks).tolist() == found["input_ids"]
        assert (marks & UNTRAINED == 0).tolist() == [m == 1 for m in found["assistant_masks"]]
    for kind in ("tools", "reasoning_content"):
        if kind == "reasoning_content" and not name:
            continue
        refuses = dataclasses.replace(ours, chat_template=read_template("chatml"))
        text = texts[0] if kind == "tools" else texts[3]
        with pytest.raises(UserError, match=f"asks 'q' has `{kind}`, of which"):
            encode(refuses, [text])
    none = dataclasses.replace(corpus, tools_key="")
    assert [document.text for document in documents(none)] == [texts[3]] * 4
    assert none.fingerprint != corpus.fingerprint


@pytest.mark.parametrize("template", ["chatml", SEEN])
def test_turns_of_weight_0_are_read_and_not_trained_on(folders, template):
    source = template if "{" in template else read_template(template)
    ours = dataclasses.replace(Tokenizer.load(folders["qwen2"]), chat_template=source)
    encode = ConversationEncoder(ours)
    talk = [
        {"role": role, "content": role[0] + str(n)}
        for n in (1, 2, 3)
        for role in ("user", "assistant")
    ]
    usual = encode(talk)
    some = encode([{**m, "weight": int(m["content"] != "a2")} for m in talk])
    assert (token_ids(some) == token_ids(usual)).all()
    trained = [ours.decode(token_ids(ids[ids & UNTRAINED == 0])) for ids in (usual, some)]
    assert trained == ["a1a2a3", "a1a3"]


def test_a_turn_of_weight_0_that_tags_do_not_tell_is_refused():
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% generation %}.{% endgeneration %}{% endif %}{% endfor %}"
    )
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 0}]
    with pytest.raises(UserError, match="turn of weight 0, but the chat template has 2 parts"):
        ChatTemplate(template, {}).trained(talk)


def test_ids_and_mask_are_those_of_transformers(folders):
    transformers = pytest.importorskip("transformers")
    for name, (template, _, kind) in STYLES.items():
        ours = dataclasses.replace(Tokenizer.load(folders[kind]), chat_template=template)
        theirs = transformers.AutoTokenizer.from_pretrained(folders[kind])
        encode = ConversationEncoder(ours)
        for seed in SEEDS:
            messages = chats.conversation(seed)
            found = theirs.apply_chat_template(
                messages,
                chat_template=template,
                return_dict=True,
                return_assistant_tokens_mask="tagged" in name,
            )
            marks = encode(messages)
            written = marks[len(marks) - len(found["input_ids"]) :]
            assert token_ids(written).tolist() == found["input_ids"], name
            assert len(marks) - len(written) == (found["input_ids"][0] != ours.bos_id)
            if "tagged" in name:
                assert (written & UNTRAINED == 0).tolist() == [
                    m == 1 for m in found["assistant_masks"]
                ]


def test_an_exported_tokenizer_of_ours_reads_conversations_alike(tmp_path):
    transformers = pytest.importorskip("transformers")
    from mobilellm_jax.interop import hf_tokenizer

    ours = dataclasses.replace(tiny.tokenizer(), chat_template=chats.MISTRAL)
    hf_tokenizer.write_tokenizer(ours, tmp_path, 128)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    encode = ConversationEncoder(ours)
    for seed in SEEDS:
        messages = chats.conversation(seed)
        marks = encode(messages)
        assert token_ids(marks).tolist() == theirs.apply_chat_template(messages, return_dict=False)
        # What is trained on, as text: the answers with their EOS.
        trained = np.split(marks, np.flatnonzero(np.diff(marks & UNTRAINED)) + 1)[1::2]
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        assert [ours.decode(token_ids(run)) for run in trained] == [f" {text}" for text in said]
        assert all(run[-1] == ours.eos_id for run in trained)


@pytest.mark.parametrize("text", ["a </s> é▁ b<s>👍", "", "</s>", "x\n\n  <unk>"])
def test_special_tokens_are_found_where_they_are_spelled(text):
    tokenizer = tiny.tokenizer()
    ids, begin, end = tokenizer.encode_special(text)
    assert (begin[1:] <= end[1:]).all() and (np.diff(begin) >= 0).all()
    covered = {i for b, e in zip(begin, end, strict=True) for i in range(b, e)}
    assert covered == set(range(len(text)))
    for spelled, i in (("<s>", 1), ("</s>", 2), ("<unk>", 0)):
        at = text.find(spelled)
        assert (i in ids) == (at >= 0)
        if at >= 0:
            (place,) = np.flatnonzero(ids == i)
            assert (begin[place], end[place]) == (at, at + len(spelled))


def test_shipped_templates_are_read_by_name_and_others_by_path(tmp_path):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a "}]
    for name, by_hand in (("llama3", chats.llama3), ("chatml", chats.chatml)):
        template = ChatTemplate(read_template(name), {"bos_token": "<|begin_of_text|>"})
        assert template.trained(messages)[0] == "".join(text for text, _ in by_hand(messages))
    # MobileLLM-R1's: as Llama 3, and its system prompt where there is none.
    template = ChatTemplate(read_template("mobilellm_r1"), {"bos_token": "<|begin_of_text|>"})
    prompt = "Please reason step-by-step and put your final answer within \\boxed{}."
    for own in ([], [{"role": "system", "content": "Mine."}]):
        prompted = [*(own or [{"role": "system", "content": prompt}]), *messages]
        text, ((begin, end),) = template.trained([*own, *messages])
        assert text == "".join(text for text, _ in chats.llama3(prompted))
        assert text[begin:end] == "a<|eot_id|>"
    (tmp_path / "mine.jinja").write_text("mine")
    assert read_template(str(tmp_path / "mine.jinja")) == "mine"
    with pytest.raises(UserError, match="neither a file of text nor one of chatml, llama3"):
        read_template("alpaca")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content }}", "not valid Jinja: line 1"),
        ("{{ raise_exception('no such talk') }}", "refuses a conversation that asks 'q1': no such"),
        ("{{ messages[0].content.nothing.more }}", "refuses a conversation that asks 'q1'"),
        ("{{ messages.append(1) }}", "refuses a conversation that asks 'q1'"),  # sandboxed
        ("{{ messages | length }}{{ messages[-1].content }}", "beginning of a conversation"),
        ("{{ messages[-1].content }}{{ '!' if not add_generation_prompt }}", "assistant's turn 2"),
    ],
)
def test_templates_that_cannot_be_used_are_told(template, message):
    talk = [
        (role, f"{role[0]}{n}".replace("u", "q")) for n in (1, 2) for role in ("user", "assistant")
    ]
    messages = [{"role": role, "content": text} for role, text in talk]
    with pytest.raises(UserError, match=message):
        ChatTemplate(template, {}).trained(messages)


def test_what_templates_are_written_for_is_there():
    template = (
        "{%- for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{{ m | tojson }}{{ m | tojson(indent=1) }}{% endfor %}{{ strftime_now('%Y')[:2] }}"
        "{{ tools is none }}"
    )
    messages = [{"role": "user", "content": "<é>"}] * 3
    text, spans = ChatTemplate(template, {}).trained(messages)
    one = json.dumps(messages[0], ensure_ascii=False)
    assert text == 2 * (one + json.dumps(messages[0], ensure_ascii=False, indent=1)) + "20True"
    assert spans == []


# Rows.


def test_segment_ids_and_positions_are_alike_in_numpy_and_jax_and_by_hand():
    rng = np.random.default_rng(0)
    rows = rng.choice([1, 1 | UNTRAINED, 1 | INSIDE, 1 | INSIDE | UNTRAINED, 7, 8], (50, 33))
    rows = rows.astype(np.int32)
    segments = segment_ids(rows, 1)
    assert (segments == jax.jit(segment_ids)(rows, 1)).all()
    places = positions(segments)
    assert places.dtype == np.int32 and (places == jax.jit(positions)(segments)).all()
    assert (token_ids(rows) == jax.jit(token_ids)(rows)).all()
    for row, of_row, at in zip(rows, segments, places, strict=True):
        number, place = 0, -1
        for token, segment, position in zip(row, of_row, at, strict=True):
            begins = token in (1, 1 | UNTRAINED)
            number, place = (number + 1, 0) if begins else (number, place + 1)
            assert (segment, position) == (number, place)


def test_marks_come_back_from_what_is_stored():
    rng = np.random.default_rng(0)
    rows = rng.choice(
        [1 | UNTRAINED, 1 | INSIDE, 1 | INSIDE | UNTRAINED, 7, 8 | UNTRAINED], (50, 33)
    )
    rows = rows.astype(np.int32)
    again = marked(token_ids(rows), rows & UNTRAINED == 0, segment_ids(rows, 1), 1)
    assert again.dtype == np.int32 and (again == rows).all()


@pytest.mark.parametrize("window", [300, 1 << 20])
def test_every_conversation_is_in_one_row_once_and_whole(style, window):
    tokenizer, _ = style
    encode, row_length = ConversationEncoder(tokenizer), 200
    given = [encode(chats.conversation(seed)) for seed in SEEDS]
    given = [conversation for conversation in given if len(conversation) <= row_length + 1]
    packer = Whole(row_length, tokenizer.bos_id, tokenizer.eos_id, window)
    rows = np.concatenate(
        [packer.add(given[:7]).rows, packer.add(given[7:]).rows, packer.finish().rows]
    )
    found = []
    for row in rows:
        segments = segment_ids(row, tokenizer.bos_id)
        found += [row[segments == segment].tolist() for segment in range(1, segments[-1] + 1)]
        assert segments[0] == 1
    padding = [tokenizer.bos_id | UNTRAINED]
    assert sorted(c for c in found if c != padding) == sorted(c.tolist() for c in given)
    # As many targets as tokens that are trained on, whether or not BOS is EOS.
    targets = counted(rows, tokenizer.bos_id, tokenizer.eos_id)
    assert targets.sum() == sum((c & UNTRAINED == 0).sum() for c in given)


@pytest.fixture(scope="module")
def prepared(folders, tmp_path_factory):
    """A directory with a source of conversations and one of text, and the tokenizer."""
    root = tmp_path_factory.mktemp("prepared")
    chats.write_chats(root / "talk.jsonl", range(150))
    texts = [{"text": text} for text in tokenizer_files.texts()[:10]]
    (root / "web.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    corpora = [
        ChatCorpus("talk", f"{root}/talk.jsonl", heldout=0.2),
        FileCorpus("web", f"{root}/web.jsonl", heldout=0.2),
    ]
    chats.run(corpora, root / "out", folders["llama3"], row_length=512)
    return root / "out", Tokenizer.load(root / "out")


def test_conversations_come_back_from_the_store(prepared):
    out, tokenizer = prepared
    info = read_info(out / "talk")
    assert (info.kind, info.packing, read_info(out / "web").kind) == ("chat", "whole", "text")
    encode, corpus = (
        ConversationEncoder(tokenizer),
        ChatCorpus("talk", f"{out.parent}/talk.jsonl", heldout=0.2),
    )
    for split, counts in info.splits.items():
        given = [json.loads(d.text) for d in documents(corpus) if d.split == split]
        expected = [encode(messages) for messages in given]
        rows = open_rows(out / "talk", split)
        assert chats.conversations(rows, info.bos_id) == sorted(c.tolist() for c in expected)
        assert counts.documents == len(expected) and counts.tokens == sum(map(len, expected))
        sizes = tokenizer.piece_bytes()
        assert counts.bytes == sum(sizes[token_ids(c)].sum() for c in expected)
        # And decoded: a template of Llama 3 keeps all but white space around what is said.
        said = sorted(
            "".join(f"{m['role']}\n\n{m['content'].strip()}" for m in talk) for talk in given
        )
        read = [
            tokenizer.decode(token_ids(np.array(c))) for c in chats.conversations(rows, info.bos_id)
        ]
        assert sorted(read) == said
    # Which conversation is where is known as it is of texts.
    tokens = open_rows(out / "talk").read(np.array([0]))[0]
    for piece in documents_of(out / "talk", "train", 0, 1):
        inside = tokens[piece.offset : piece.offset + piece.tokens]
        assert inside.tolist() == encode(chats.conversation(int(piece.id[5:]))).tolist()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("system", [False, True])
def test_turns_may_lie_in_fields_of_their_own(tmp_path, kind, system):
    said = [
        {"s": s, "q": f"What is {i}?", "a": f"It is {i}."}
        for i, s in enumerate(["Be brief.", "", None])
    ]
    file = tmp_path / f"pairs.{kind}"
    if kind == "jsonl":
        file.write_text("".join(json.dumps(line) + "\n" for line in said))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(said), file)
    key = "s+q+a" if system else "q+a"
    found = [json.loads(d.text) for d in documents(ChatCorpus("talk", str(file), key))]
    for line, messages in zip(said, found, strict=True):
        expected = [("user", line["q"]), ("assistant", line["a"])]
        if system and line["s"]:
            expected.insert(0, ("system", line["s"]))
        assert [(m["role"], m["content"]) for m in messages] == expected
    prompted = ChatCorpus("talk", str(file), key, system_prompt="Be kind.")
    first = [json.loads(d.text)[0] for d in documents(prompted)]
    kept = "Be brief." if system else "Be kind."
    assert [m["content"] for m in first] == [kept, "Be kind.", "Be kind."]


@pytest.mark.parametrize(
    ("key", "said"), [("q+n", "message 2 is not a text but int"), ("a+b+c+d", "names 4 fields")]
)
def test_turns_that_are_none(tmp_path, key, said):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"q": "Why?", "n": 1, "a": "", "b": "", "c": "", "d": ""}) + "\n")
    with pytest.raises(UserError, match=said):
        list(documents(ChatCorpus("talk", str(file), key)))


def test_stock_tfds_reads_tokens_mask_and_segments(prepared):
    out, tokenizer = prepared
    data = tfds.builder_from_directory(out / "talk").as_data_source("train")
    rows = open_rows(out / "talk").read(np.arange(len(data)))
    for example, row in zip(data, rows, strict=True):
        assert example["tokens"].dtype == np.uint16 and (example["tokens"] == token_ids(row)).all()
        assert example["loss_mask"].dtype == np.uint8
        assert (example["loss_mask"] == (row & UNTRAINED == 0)).all()
        assert (example["segment_ids"] == segment_ids(row, tokenizer.bos_id)).all()


def test_conversations_and_text_are_mixed(prepared):
    out, tokenizer = prepared
    plan = Plan.load(out / "mixture.json")
    read = open_mixture(plan, 512, 600).read(np.arange(400))
    weights = counted(read["tokens"], tokenizer.bos_id, tokenizer.eos_id).mean(1)
    for name, low, high in (("talk", 0.1, 0.9), ("web", 0.9, 1.0)):
        of_source = weights[read["source"] == plan.names.index(name)]
        assert len(of_source) and low < of_source.mean() <= high
    with pytest.raises(
        UserError, match="whole in rows of 512 tokens and cannot be had in rows of 128"
    ):
        open_mixture(plan, 128, 600)


def alone(params, model, conversation):
    """Negative log-likelihoods of a conversation in a row of its own, summed where it is trained on."""
    ids = jnp.asarray(token_ids(conversation))[None]
    hidden = transformer.apply(params, model, ids[:, :-1])
    log_p = jax.nn.log_softmax(transformer.logits(params, model, hidden))[0]
    nll = -jnp.take_along_axis(log_p, ids[0, 1:, None], 1)[:, 0]
    return jnp.where(conversation[1:] & UNTRAINED == 0, nll, 0).sum()


@pytest.mark.parametrize("name", ["llama3", "llama2, BOS inside", "plain, EOS is BOS"])
def test_loss_gradient_and_evaluation_are_those_of_the_answers_alone(folders, tmp_path, name):
    """Of conversations in rows of their own, without packing: no other target and no other context."""
    template, _, kind = STYLES[name]
    chats.write_chats(tmp_path / "talk.jsonl", range(24), longest=4, turns=2)
    corpus = ChatCorpus("talk", f"{tmp_path}/talk.jsonl", heldout=0.3)
    chats.run([corpus], tmp_path / "out", folders[kind], chat_template=template, row_length=96)
    tokenizer = Tokenizer.load(tmp_path / "out")
    model = ModelConfig(600, 16, (Stack(1, 2, 1, 24),), head_dim=8)
    params = jax.jit(transformer.init, static_argnums=0)(model, jax.random.key(0))
    params = jax.tree.map(lambda x: 5 * x, params)
    network = Network(model, transformer.Execution(), tokenizer.bos_id, tokenizer.eos_id)
    heldout = open_rows(tmp_path / "out" / "talk", "heldout")
    rows = heldout.read(np.arange(len(heldout)))
    given = [np.array(c, np.int32) for c in chats.conversations(heldout, tokenizer.bos_id)]
    width = max(map(len, given))  # what is behind a conversation changes nothing, and compiles once
    padded = [np.pad(c, (0, width - len(c)), constant_values=UNTRAINED) for c in given]

    def together(params):
        losses = next_token(params, {"tokens": jnp.asarray(rows)}, network)
        return losses.total

    one = jax.jit(jax.value_and_grad(lambda params, c: alone(params, model, c)))
    value, gradient = jax.jit(jax.value_and_grad(together))(params)
    values, gradients = zip(*(one(params, c) for c in padded), strict=True)
    np.testing.assert_allclose(value, sum(values), rtol=1e-5)
    expected = jax.tree.map(lambda *leaves: sum(leaves), *gradients)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())

    found = evaluate(
        params,
        network=network,
        heldout={0: Contexts(heldout, 96)},
        names=("talk",),
        rows=len(heldout),
        batch_rows=2,
        piece_bytes_V=jnp.asarray(tokenizer.piece_bytes()),
        mesh=make_mesh({"data": 1, "fsdp": 1}, tiny.one_device()),
    )
    targets = sum((c & UNTRAINED == 0).sum() for c in given)
    np.testing.assert_allclose(found["loss"], sum(values) / targets, rtol=1e-5)
