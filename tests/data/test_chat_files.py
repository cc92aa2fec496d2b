"""Conversations as they come in: files, fields, prompts, what is refused, left out and counted."""

import dataclasses
import datetime
import gzip
import json
import subprocess
import sys

import chats
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny

from mobilellm_jax.data.chat import ConversationEncoder, EncodeChats, read_template
from mobilellm_jax.data.chat_corpus import ChatCorpus
from mobilellm_jax.data.opening import check_templates, open_mixture
from mobilellm_jax.data.packing import (
    token_ids,
)
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.rows import open_rows, read_info
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_all_kinds_of_files_and_both_ways_to_write_messages_are_read(tmp_path):
    sharegpt = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert chats.read(chats.corpus_of(tmp_path, {"c": sharegpt}, {"c": TALK}, text_key="c")) == [
        TALK,
        TALK,
    ]
    with gzip.open(tmp_path / "talk.jsonl.gz", "wt") as file:
        file.write(json.dumps({"messages": TALK}))
    called = [{**TALK[0], "name": "me"}, {**TALK[1], "name": None}]
    pyarrow.parquet.write_table(
        pyarrow.table({"messages": [TALK, called]}), tmp_path / "talk.parquet"
    )
    for ending, expected in (
        ("jsonl.gz", [TALK]),
        ("parquet", [TALK, [{**TALK[0], "name": "me"}, TALK[1]]]),
    ):
        assert chats.read(ChatCorpus("talk", f"{tmp_path}/talk.{ending}")) == expected


def test_a_table_gives_what_lines_give(tmp_path):
    """Also where its records have other fields, which a column has in all of them, and dates."""
    city, sum_ = {"city": "Oslo", "days": [{"of": 1}]}, {"a": 1, "days": [{"to": 2}]}
    talks = [
        [
            {**TALK[0], "at": datetime.datetime(2024, 5, 1)},
            {"role": "assistant", "content": "", "tool_calls": [{"arguments": arguments}]},
        ]
        for arguments in (city, sum_)
    ]
    tools = [
        [{"name": "weather", "reads": {"city": "str"}}],
        [{"name": "sum", "reads": {"a": "int"}}],
    ]
    table = pyarrow.table({"messages": talks, "tools": tools})
    assert "to" in table["messages"][0].as_py()[1]["tool_calls"][0]["arguments"]["days"][0]
    pyarrow.parquet.write_table(table, tmp_path / "talk.parquet")
    both = [{"messages": talk, "tools": own} for talk, own in zip(talks, tools, strict=True)]
    lines = [json.dumps(record, default=str) for record in both]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines))
    found = [
        chats.read(ChatCorpus("talk", f"{tmp_path}/talk.{end}")) for end in ("jsonl", "parquet")
    ]
    assert found[0] == found[1] == list(map(json.loads, lines))


def test_the_system_prompt_is_for_conversations_that_have_none(tmp_path):
    own = [{"role": "system", "content": "mine"}, *TALK]
    corpus = chats.corpus_of(tmp_path, {"messages": TALK}, {"messages": own}, system_prompt="yours")
    assert chats.read(corpus) == [[{"role": "system", "content": "yours"}, *TALK], own]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "talk.jsonl, line 2: there is no field 'messages'"),
        ({"messages": "x"}, "line 2: 'messages' is not a list of messages but str"),
        ({"messages": ["x"]}, "line 2: the role of message 1 is None"),
        ({"messages": [*TALK, {"content": "x"}]}, "line 2: the role of message 3 is None"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "message 1 is 'bot', not one of system"),
        ({"messages": [{"role": "user"}]}, "the content of message 1 is not a text but NoneType"),
        ({"messages": [{"role": "user", "content": [1]}]}, "message 1 is not a text but list"),
        ({"messages": [{"from": "human"}]}, "the content of message 1 is not a text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
        ({"messages": [{**TALK[1], "weight": "0"}]}, "the weight of message 1 is '0': 1 is"),
        ({"messages": [{**TALK[1], "weight": 0.5}]}, "the weight of message 1 is 0.5: 1 is"),
        ({"messages": TALK, "tools": 3}, "line 2: 'tools' is not a list of functions: name"),
        ({"messages": TALK, "tools": ["f"]}, "line 2: 'tools' is not a list of functions"),
        ({"messages": TALK, "tools": "[f]"}, "line 2: 'tools' is not JSON"),
        ({"messages": TALK, "tools": "[" * 100_000}, "line 2: 'tools' is not JSON"),
    ],
)
def test_bad_records_are_told_with_their_line(tmp_path, record, message):
    with pytest.raises(UserError, match=message):
        chats.read(chats.corpus_of(tmp_path, {"messages": TALK}, record))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [{"role": "user"', "talk.jsonl, line 3: not JSON"),
        ('["role"]', "line 3: there is no field 'messages' .it has no fields at all"),
    ],
)
def test_broken_lines_are_told_with_their_number(folders, tmp_path, line, message):
    corpus = chats.corpus_of(tmp_path, {"messages": TALK}, {"messages": TALK})
    with (tmp_path / "talk.jsonl").open("a") as file:
        file.write(line + "\n")
    corpus = ChatCorpus("talk", f"{tmp_path}/talk.jsonl", heldout=0)
    with pytest.raises(UserError, match=message):
        chats.run([corpus], tmp_path / "out", folders["llama3"])


def test_a_source_of_another_tokenizer_or_template_is_refused(folders, tmp_path):
    """Conversations that were prepared elsewhere and put beside a plan's own."""
    corpus = chats.corpus_of(tmp_path, {"messages": TALK})
    for name, kind, template in (
        ("ours", "qwen2", "chatml"),
        ("tokenizer", "llama3", "chatml"),
        ("template", "qwen2", "llama3"),
    ):
        out = tmp_path / name
        chats.run([corpus], out, folders[kind], chat_template=read_template(template))
    plan, tokenizer = Plan.load(tmp_path / "ours" / "mixture.json"), tmp_path / "ours"
    check_templates(plan, Tokenizer.load(tokenizer))
    (source,) = plan.sources
    for other, message in (
        ("tokenizer", "was tokenized by another tokenizer"),
        ("template", "was written with another chat template than that of the tokenizer"),
    ):
        moved = dataclasses.replace(source, path=str(tmp_path / other / "talk"))
        mixed = dataclasses.replace(plan, sources=(moved,))
        with pytest.raises(UserError, match=message):
            open_mixture(mixed, 256, 1000)
            check_templates(mixed, Tokenizer.load(tokenizer))


def test_what_cannot_be_trained_on_is_left_out_and_counted(folders, tmp_path, capsys):
    long = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "word " * 300}]
    asked = [{"role": "user", "content": "word " * 300}, TALK[1]]
    talks = [TALK, TALK[:1], [], long, asked]
    records = [{"messages": talk} for talk in talks]
    for too_long, notes, kept in (
        ("truncate", {"nothing of an assistant in it": 3, "truncated": 1}, 2),
        ("drop", {"nothing of an assistant in it": 2, "too long": 2}, 1),
    ):
        corpus = chats.corpus_of(tmp_path, *records, too_long=too_long)
        chats.run([corpus], tmp_path / too_long, folders["llama3"], row_length=128)
        info = read_info(tmp_path / too_long / "talk")
        assert dict(info.notes) == notes and info.splits["train"].documents == kept
        told = capsys.readouterr().out
        assert all(f"{count} {note}" in told for note, count in notes.items())
    (cut, _) = sorted(
        chats.conversations(open_rows(tmp_path / "truncate" / "talk"), info.bos_id), key=len
    )[::-1]
    whole = ConversationEncoder(Tokenizer.load(tmp_path / "drop"))(long)
    assert cut == whole[:129].tolist()
    # For a loss on all tokens: what has a message is kept, cut or not.
    corpus = chats.corpus_of(tmp_path, *records, no_assistant="keep")
    chats.run([corpus], tmp_path / "keep", folders["llama3"], row_length=128)
    info = read_info(tmp_path / "keep" / "talk")
    kept = "kept with nothing of an assistant in it"
    assert dict(info.notes) == {"nothing of an assistant in it": 1, "truncated": 1, kept: 2}
    assert info.splits["train"].documents == 4 and f"2 {kept}" in capsys.readouterr().out
    with pytest.raises(UserError, match="no text to train on"):
        chats.run([chats.corpus_of(tmp_path, records[1])], tmp_path / "none", folders["llama3"])
    with pytest.raises(UserError, match="no_assistant is drop or keep, not 'ask'"):
        chats.corpus_of(tmp_path, no_assistant="ask")
    with pytest.raises(UserError, match="too_long is truncate or drop, not 'split'"):
        chats.corpus_of(tmp_path, too_long="split")


def test_without_a_template_one_must_be_named(tmp_path):
    (tmp_path / "t.model").write_bytes(tiny.tokenizer().model_bytes)
    corpus, out = chats.corpus_of(tmp_path, {"messages": TALK}), tmp_path / "out"
    with pytest.raises(UserError, match="no chat template: name one with --chat_template"):
        chats.run([corpus], out, tmp_path / "t.model")
    assert not list(out.iterdir())  # nothing that the corrected command would stumble over
    for _ in range(2):
        chats.run([corpus], out, tmp_path / "t.model", chat_template=read_template("llama3"))
    tokenizer = Tokenizer.load(out)
    assert tokenizer.chat_template == read_template("llama3")  # goes on into checkpoints
    (found,) = chats.conversations(open_rows(out / "talk"), tokenizer.bos_id)
    assert tokenizer.decode(token_ids(np.array(found))).count("<|eot_id|>") == 2
    with pytest.raises(UserError, match="tokenizer.model was made with other settings"):
        chats.run([corpus], out, tmp_path / "t.model", chat_template=read_template("chatml"))


def test_the_number_of_workers_does_not_matter(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("mobilellm_jax.data.encoding.CHUNK", 3000)
    chats.write_chats(tmp_path / "talk.jsonl", range(60))
    corpus = ChatCorpus("talk", f"{tmp_path}/talk.jsonl", heldout=0.2)
    for workers in (1, 2):
        chats.run([corpus], tmp_path / str(workers), folders["qwen2"], workers=workers)
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / w / "talk").iterdir()} for w in "12")
    assert one == other


def test_encoders_are_told_apart_by_their_tokenizer(folders):
    texts = [json.dumps(TALK)]
    for kind in ("llama3", "qwen2"):
        tokenizer = Tokenizer.load(folders[kind])
        (found,) = EncodeChats(64, drop_long=False)(tokenizer, texts)
        assert (found.ids == ConversationEncoder(tokenizer)(TALK)).all()


def test_the_command_line(folders, tmp_path):
    chats.write_chats(tmp_path / "talk.jsonl", range(20), key="turns")
    options = (
        *(f"--chat=talk={tmp_path}/talk.jsonl", f"--tokenizer={folders['qwen2']}", "--heldout=0"),
        *(f"--out={tmp_path}/out", "--row_length=512", "--workers=1", "--system_prompt=Think."),
        "--chat_template=chatml",
    )

    def command_line(*more):
        command = [sys.executable, "-m", "mobilellm_jax.prepare", *options, *more]
        return subprocess.run(command, capture_output=True, text=True)

    refused = command_line()
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "there is no field 'messages' (it has turns, id)" in refused.stderr
    done = command_line("--messages_key=turns", "--too_long=drop")
    assert done.returncode == 0, done.stderr
    tokenizer = Tokenizer.load(tmp_path / "out")
    first, *_ = chats.conversations(open_rows(tmp_path / "out" / "talk"), tokenizer.bos_id)
    assert tokenizer.decode(token_ids(np.array(first))).startswith("system\n")
    assert tokenizer.chat_template == read_template("chatml")
