"""Conversations: the template's text, its ids, which of them are trained on."""

import dataclasses
import json

import chats
import numpy as np
import pytest
import tiny
import tokenizer_files

from mobilellm_jax.data.chat import ChatTemplate, ConversationEncoder, EncodeChats, read_template
from mobilellm_jax.data.corpora import documents
from mobilellm_jax.data.packing import (
    INSIDE,
    UNTRAINED,
    segment_ids,
    token_ids,
)
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError


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
    for seed in chats.SEEDS:
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
    for name, (template, _, kind) in chats.STYLES.items():
        ours = dataclasses.replace(Tokenizer.load(folders[kind]), chat_template=template)
        theirs = transformers.AutoTokenizer.from_pretrained(folders[kind])
        encode = ConversationEncoder(ours)
        for seed in chats.SEEDS:
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
    for seed in chats.SEEDS:
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
    for none in ("~nobody/mine.jinja", "a\0b", "\ud800"):
        with pytest.raises(UserError, match="neither a file of text nor one of"):
            read_template(none)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content }}", "not valid Jinja: line 1"),
        ("{{ raise_exception('no such talk') }}", "refuses a conversation that asks 'q1': no such"),
        ("{% break %}", "not valid Jinja: 'break' outside loop"),
        (f"{{{{ {'(' * 5000}1{')' * 5000} }}}}", "not valid Jinja: maximum recursion depth"),
        ("{{ 1 / 0 }}", "refuses a conversation that asks 'q1': division by zero"),
        ("{{ range(10**9) }}", "refuses a conversation that asks 'q1': Range too big"),
        ("{{ 'a' * 10**15 }}", "refuses a conversation that asks 'q1': MemoryError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "'q1': maximum recursion depth"),
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
