"""Preparation: whole, repeatable, never half-done, never overwriting."""

import dataclasses

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tokenizer_files
from prepared import contents, decoded, run, two_corpora, write_corpus
from runs import program

from mobilellm_jax.data import encoding
from mobilellm_jax.data.corpora import FileCorpus, documents
from mobilellm_jax.data.embedded import SHORTEST, embedded_corpora, squeezed
from mobilellm_jax.data.packing import counted
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.rows import open_rows, read_info
from mobilellm_jax.data.sentencepiece_tokenizer import train_tokenizer
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.plan import plan_of
from mobilellm_jax.prepare import parse_weights, prepare


@pytest.fixture
def corpora(tmp_path):
    return two_corpora(tmp_path)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def test_all_documents_come_back_from_the_rows(corpora, out):
    plan = run(corpora, out)
    assert plan == Plan.load(out / "mixture.json")
    tokenizer = Tokenizer.load(plan.resolve(plan.tokenizer_path))
    assert plan.tokenizer == tokenizer.fingerprint and plan.names == ("a", "b")
    for corpus, source in zip(corpora, plan.sources, strict=True):
        info = read_info(plan.resolve(source.path))
        assert (info.row_length, info.vocab_size, info.bos_id) == (32, 320, 1)
        assert info.tokenizer == tokenizer.fingerprint
        for split in ("train", "heldout"):
            expected = [d.text for d in documents(corpus) if d.split == split]
            assert decoded(open_rows(info.path, split), tokenizer) == expected
            counts = info.splits[split]
            assert counts.documents == len(expected)
            assert counts.bytes == sum(len(text.encode()) for text in expected)
            assert counts.tokens == sum(len(tokenizer.encode(t)) + 2 for t in expected)
            builder = tfds.builder_from_directory(info.path)
            assert len(builder.as_data_source(split)) == counts.rows


@pytest.mark.parametrize(
    ("part_size", "packing"), [(5_000, "concat"), (1 << 20, "best_fit")], ids=str
)
def test_the_number_of_workers_does_not_matter(corpora, tmp_path, monkeypatch, packing, part_size):
    """Neither where each takes whole parts nor where they share the chunks of one."""
    monkeypatch.setattr(encoding, "CHUNK", 3000)  # some dozen chunks
    corpora = [dataclasses.replace(corpus, part_size=part_size) for corpus in corpora]
    for workers in (1, 2):
        run(corpora, tmp_path / str(workers), workers=workers, packing=packing)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    shards = list((tmp_path / "1" / "a").glob("a-train.array_record-?????"))
    assert len(shards) > 5 if part_size == 5_000 else len(shards) == 1


def test_a_document_of_any_length_is_whole(tmp_path, out, monkeypatch):
    monkeypatch.setattr(encoding, "LONGEST", 100)
    texts = write_corpus(tmp_path / "x.jsonl", 3)
    (tmp_path / "long.txt").write_text("".join(texts))
    plan = run([FileCorpus("long", f"{tmp_path}/long.txt", heldout=0)], out)
    tokenizer = Tokenizer.load(out / "tokenizer.model")
    assert decoded(open_rows(plan.resolve("long")), tokenizer) == ["".join(texts)]
    with pytest.raises(UserError, match="no split 'heldout'"):
        open_rows(plan.resolve("long"), "heldout")


def test_again_it_keeps_what_is_complete(corpora, out, capsys):
    run(corpora[:1], out, tokenizer=None)
    before = contents(out)
    run(corpora[:1], out)
    told = capsys.readouterr().out
    assert contents(out) == before
    assert "tokenizer: complete" in told and "a: complete" in told
    # Another source joins; the plan that is there is kept and that is said.
    run(corpora, out, tokenizer=out / "tokenizer.model")
    assert before.items() <= contents(out).items()
    assert len(open_rows(out / "b")) > 0
    told = capsys.readouterr().out
    assert "kept as it is" in told and f"mobilellm_jax.plan {out} --out" in told
    assert set(plan_of(out).names) == {"a", "b"}


def test_what_was_made_with_other_settings_is_refused(corpora, out, tmp_path):
    run(corpora, out)
    before = contents(out)
    model = out / "tokenizer.model"
    with pytest.raises(UserError, match="row_length 32 instead of 64"):
        run(corpora, out, row_length=64)
    with pytest.raises(UserError, match="packing concat instead of best_fit"):
        run(corpora, out, packing="best_fit")
    with pytest.raises(UserError, match="other settings or from other text"):
        run(corpora, out, vocab_size=330)
    other = train_tokenizer(["some other text " + "abc" * i for i in range(50)], 275)
    (tmp_path / "t.model").write_bytes(other.model_bytes)
    with pytest.raises(UserError, match="other settings or from other text"):
        run(corpora, out, tokenizer=tmp_path / "t.model")
    settings = (out / "tokenizer.settings.json").read_bytes()
    (out / "tokenizer.settings.json").write_text("{")
    with pytest.raises(UserError, match="other settings or from other text"):
        run(corpora, out)
    (out / "tokenizer.settings.json").write_bytes(settings)
    write_corpus(tmp_path / "a.jsonl", 5)
    with pytest.raises(UserError, match="other settings or from other text"):
        run(corpora, out)
    with pytest.raises(UserError, match="/a was made with other input: delete it"):
        run(corpora, out, tokenizer=model)
    model.unlink()
    with pytest.raises(UserError, match="was made with another tokenizer and other input"):
        run(corpora, out)
    model.write_bytes(before["tokenizer.model"])
    (out / "tokenizer.settings.json").write_bytes(before["tokenizer.settings.json"])
    assert contents(out) == before


def test_a_folder_of_the_users_is_not_touched(corpora, out):
    (out / "a").mkdir(parents=True)
    (out / "a" / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="/a exists already"):
        run(corpora, out)
    assert (out / "a" / "thesis.txt").read_text() == "dear"


def test_a_tokenizer_can_be_given(corpora, out, tmp_path):
    given = train_tokenizer((d.text for d in documents(corpora[1])), 305)
    (tmp_path / "given.model").write_bytes(given.model_bytes)
    for _ in range(2):
        plan = run(corpora, out, tokenizer=tmp_path / "given.model")
        assert (
            plan.tokenizer
            == given.fingerprint
            == Tokenizer.load(out / "tokenizer.model").fingerprint
        )


@pytest.mark.parametrize(
    ("kind", "packing"),
    [
        ("llama2", "concat"),
        ("llama3", "best_fit"),
        ("qwen2", "concat"),  # whose BOS is its EOS, which packing has to do with
        ("qwen2", "best_fit"),
    ],
)
def test_a_tokenizer_of_hugging_face_can_be_given(corpora, tmp_path, kind, packing):
    folder = tokenizer_files.FOLDERS[kind](tmp_path / kind)
    given = Tokenizer.load(folder)
    ways = {"folder": folder, "file": folder / "tokenizer.json", "again": folder}
    for way, path in ways.items():
        out = tmp_path / way.replace("again", "folder")
        workers = 2 if way == "file" else 1
        plan = run(corpora, out, tokenizer=path, packing=packing, workers=workers)
    assert contents(tmp_path / "folder") == contents(tmp_path / "file")
    out = tmp_path / "file"
    assert (plan.tokenizer_path, plan.tokenizer) == ("tokenizer.json", given.fingerprint)
    assert Tokenizer.load(plan.resolve(plan.tokenizer_path)) == given
    assert not list(out.glob("tokenizer.model"))
    for corpus in corpora:
        info = read_info(out / corpus.name)
        assert (info.vocab_size, info.bos_id) == (600, given.bos_id)
        for split in ("train", "heldout"):
            rows = open_rows(info.path, split)
            expected = [d.text for d in documents(corpus) if d.split == split]
            if packing == "concat":
                assert decoded(rows, given) == expected
            # All tokens of a document and its end are targets, whether or not BOS is EOS.
            counts = counted(rows.read(np.arange(len(rows))), given.bos_id, given.eos_id)
            cut = sum(len(given.encode(text)) % 32 == 0 for text in expected)
            repeated = cut if packing == "best_fit" else 0
            assert counts.sum() == info.splits[split].tokens - len(expected) + repeated


def test_another_tokenizer_than_the_one_there_is_refused(corpora, out, tmp_path):
    folder = tokenizer_files.qwen2_folder(tmp_path / "qwen2")
    run(corpora, out, tokenizer=folder)
    before = contents(out)
    with pytest.raises(UserError, match="tokenizer.json was made with other settings"):
        run(corpora, out)
    with pytest.raises(UserError, match="tokenizer.json was made with other settings"):
        run(corpora, out, tokenizer=tokenizer_files.llama3_folder(tmp_path / "llama3"))
    (folder / "chat_template.jinja").write_text("another")
    with pytest.raises(UserError, match="tokenizer.json was made with other settings"):
        run(corpora, out, tokenizer=folder)
    run(corpora, out, tokenizer=out)
    assert contents(out) == before


# The plan.


def test_weights_are_by_tokens_unless_given(corpora, out, capsys):
    plan = run(corpora, out)
    tokens = [read_info(out / name).splits["train"].tokens for name in "ab"]
    shares = np.array(tokens) / sum(tokens)
    assert list(plan.stages[0].weights.values()) == pytest.approx(shares)
    edited = plan.hash
    # Asked for again without weights, a plan is kept whatever a user has made of it.
    text = (out / "mixture.json").read_text().replace('"seed": 0', '"seed": 7')
    (out / "mixture.json").write_text(text)
    assert run(corpora, out).seed == 7
    assert (out / "mixture.json").read_text() == text
    # With weights it gives way, and lies beside.
    plan = run(corpora, out, weights={"a": 0.25, "b": 0.75})
    assert Plan.load(out / "mixture.json").stages[0].weights == {"a": 0.25, "b": 0.75}
    (kept,) = out.glob("mixture.*.json")
    assert Plan.load(kept).seed == 7 and kept.name in capsys.readouterr().out
    assert plan.hash != edited and plan.seed == 0
    # The same weights once more change nothing.
    before = contents(out)
    run(corpora, out, weights={"a": 0.25, "b": 0.75})
    assert contents(out) == before


def test_a_source_of_weight_zero_is_not_in_the_plan(corpora, out):
    assert run(corpora, out, weights={"a": 1, "b": 0}).names == ("a",)
    assert len(open_rows(out / "b"))


def test_the_plan_of_another_tokenizer_is_refused(corpora, out):
    fingerprint = run(corpora, out).tokenizer
    text = (out / "mixture.json").read_text().replace(fingerprint, "f" * 64)
    (out / "mixture.json").write_text(text)
    with pytest.raises(UserError, match="rows of another tokenizer"):
        run(corpora, out)
    assert (out / "mixture.json").read_text() == text


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 0.5, "b": 0.4}, "sum to 0.9, not to 1"),
        ({"a": 1.0}, "give every source a weight"),
        ({"a": 0.5, "b": 0.3, "c": 0.2}, "weights are given for a, b, c"),
        ({"a": 1.5, "b": -0.5}, "a number from 0 on"),
        ({"a": float("nan"), "b": 1}, "a number from 0 on"),
    ],
)
def test_bad_weights_are_told_before_any_work(corpora, out, weights, message):
    with pytest.raises(UserError, match=message):
        run(corpora, out, weights=weights)
    assert not out.exists()


def test_almost_one_is_renormalised_and_said(corpora, out, capsys):
    plan = run(corpora, out, weights={"a": 0.4004, "b": 0.6})
    assert sum(plan.stages[0].weights.values()) == pytest.approx(1, abs=1e-12)
    assert "1.0004; they are renormalised" in capsys.readouterr().out


def test_weights_are_parsed():
    assert parse_weights("code=0.5, prose=.5") == {"code": 0.5, "prose": 0.5}
    for bad in ("code", "code=", "code=x", "=1", "a=1,,"):
        with pytest.raises(UserError, match="not of the form name=number"):
            parse_weights(bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row_length": 1}, "row_length must be at least 2"),
        ({"packing": "tetris"}, "packing is concat or best_fit"),
        ({"tokenizer": "/nowhere/x.model"}, "no tokenizer at /nowhere/x.model"),
        ({"vocab_size": 10}, "10 pieces cannot be trained"),
    ],
)
def test_bad_requests_are_told(corpora, out, options, message):
    with pytest.raises(UserError, match=message):
        run(corpora, out, **options)


def test_bad_sources_are_told(corpora, out, tmp_path):
    with pytest.raises(UserError, match="nothing to prepare"):
        run([], out)
    with pytest.raises(UserError, match="two sources have one name"):
        run([corpora[0], corpora[0]], out)
    with pytest.raises(UserError, match="cannot be called '../a'"):
        run([FileCorpus("../a", corpora[0].pattern)], out)
    with pytest.raises(UserError, match="no file matches"):
        run([FileCorpus("c", f"{tmp_path}/c.*")], out)
    assert not out.exists()


# The command line and the embedded data.


def test_the_command_line(tmp_path):
    write_corpus(tmp_path / "a.jsonl", 1)
    options = (f"--source=a={tmp_path}/*.jsonl", f"--out={tmp_path}/out")
    done = program("mobilellm_jax.prepare", *options, "--row_length=32", "--vocab_size=320")
    assert done.status == 0, done.err
    assert "bytes/token" in done.out and "a: done" in done.err
    assert Plan.load(tmp_path / "out" / "mixture.json").names == ("a",)
    refused = program("mobilellm_jax.prepare", *options, "--row_length=16", "--vocab_size=320")
    assert refused.status == 1
    (line,) = [line for line in refused.err.splitlines() if line.startswith("error:")]
    assert "row_length 32 instead of 16" in line and "Traceback" not in refused.err


@pytest.mark.slow
def test_no_training_row_holds_a_heldout_docstring(tmp_path):
    corpora = embedded_corpora(0)
    prepare(corpora, tmp_path, 256, vocab_size=2048, workers=2)
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.model")
    training = {
        corpus.name: decoded(open_rows(tmp_path / corpus.name), tokenizer) for corpus in corpora
    }
    for corpus in corpora:
        assert training[corpus.name] == [d.text for d in documents(corpus) if d.split == "train"]
    everything = squeezed("\n".join(text for texts in training.values() for text in texts))
    heldout = decoded(open_rows(tmp_path / "prose", "heldout"), tokenizer)
    docstrings = [part.partition("\n\n")[2] for text in heldout for part in text.split("\n\n\n")]
    docstrings = [doc for doc in map(squeezed, docstrings) if len(doc) >= SHORTEST]
    assert len(docstrings) > 100
    assert not [doc for doc in docstrings if doc in everything]
    problems = [
        t.partition("\n")[0] for t in decoded(open_rows(tmp_path / "math", "heldout"), tokenizer)
    ]
    assert len(problems) > 500 and not [p for p in problems if f" {p} " in everything]
