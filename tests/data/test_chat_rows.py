"""Rows of conversations: how they are packed, stored, read again, and what a loss of them is."""

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

from mobilellm_jax.data.chat import ConversationEncoder
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
    given = [encode(chats.conversation(seed)) for seed in chats.SEEDS]
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
    template, _, kind = chats.STYLES[name]
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
