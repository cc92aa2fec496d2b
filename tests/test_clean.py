"""Cleaning: the same whoever does it, whole or not there, and it finds what was planted."""

import gzip
import importlib.util
import itertools
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import runs
from cleaned import (
    contents,
    corpus,
    edited,
    left,
    mixed,
    needs_datatrove,
    text_of,
    write_lines,
)
from runs import alive

from mobilellm_jax.clean import clean
from mobilellm_jax.data import cleaning
from mobilellm_jax.data.corpora import FileCorpus, documents
from mobilellm_jax.data.decontamination import EvalSets
from mobilellm_jax.data.ngrams import jaccard, ngram_hashes, words
from mobilellm_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


# Exact copies.


@pytest.mark.parametrize("size", [7, 64, 1 << 20])
def test_of_exact_copies_the_first_in_the_order_of_reading_stays(tmp_path, monkeypatch, size):
    monkeypatch.setattr(cleaning, "_BIN", size)  # sorted in one go, or in many
    rng = random.Random(1)
    texts = rng.choices([text_of(rng, 9) for _ in range(60)], k=200)
    source = corpus(tmp_path, texts, files=3, part_size=2000)
    assert len(source.parts()) > 3
    report = clean(source, tmp_path / "out", dedup=["exact"], workers=1)
    read = [document.text for document in documents(source)]
    assert [record["text"] for record in left(tmp_path / "out")] == list(dict.fromkeys(read))
    assert report["documents"]["exact"] == len(read) - len(set(read))
    for pair in report["exact"]["examples"]:
        assert pair["removed"]["text"] == pair["kept"]["text"] and pair["jaccard"] == 1


def test_a_difference_of_one_character_is_no_exact_copy(tmp_path):
    source = corpus(tmp_path, ["same text", "same text.", "Same text", "same  text"])
    report = clean(source, tmp_path / "out", dedup=["exact"], workers=1)
    assert report["documents"]["kept"] == 4


def test_different_texts_are_no_exact_copies_however_many():
    assert len({cleaning.text_hash(str(number)) for number in range(300_000)}) == 300_000


def test_each_record_tells_where_it_is_from(tmp_path):
    texts = [text_of(random.Random(i), 10) for i in range(50)]
    source = corpus(tmp_path, texts, part_size=900)
    assert len(source.parts()) > 3  # lines are counted through the parts of a file
    clean(source, tmp_path / "out", dedup=["exact"], workers=1)
    records = left(tmp_path / "out")
    path = f"{tmp_path}/in0.jsonl"
    assert [(r["file"], r["place"], r["id"]) for r in records] == [
        (path, i + 1, f"d{i}") for i in range(50)
    ]


def test_prepare_can_read_what_is_left(tmp_path):
    texts = ["naïve 😀", "a\nb\u2028c", *map(str, range(20))]
    report = clean(corpus(tmp_path, texts), tmp_path / "out", dedup=["exact"], workers=1)
    again = FileCorpus("web", f"{tmp_path}/out/*.jsonl.zst", heldout=0)
    assert [document.text for document in documents(again)] == texts
    assert report["bytes"]["kept"] == sum(len(text.encode()) for text in texts)


# Near copies.


@needs_datatrove
def test_near_copies_are_found_as_often_as_their_jaccard_says(tmp_path):
    rng = random.Random(2)
    originals = [text_of(rng) for _ in range(200)]
    rates = [0.0, 0.01, 0.02, 0.04, 0.08, 0.2]
    copies = [edited(text, rates[i % len(rates)], rng) + "." for i, text in enumerate(originals)]
    source = corpus(tmp_path, originals + copies)
    report = clean(source, tmp_path / "out", dedup=["near"], workers=1)
    kept = {record["place"] - 1 for record in left(tmp_path / "out")}
    assert set(range(200)) <= kept  # the first ones stay
    found = np.array([200 + i not in kept for i in range(200)])
    alike = np.array([jaccard(a, b) for a, b in zip(originals, copies, strict=True)])
    expected = 1 - (1 - alike**cleaning.PER_BUCKET) ** cleaning.BUCKETS
    # Brute force over all other pairs: none is alike, so each removal is one of a planted pair.
    shingles = [set(next(ngram_hashes(words(t), [5])).tolist()) for t in originals + copies]
    others = (
        len(a & b) / len(a | b)
        for (i, a), (j, b) in itertools.combinations(enumerate(shingles), 2)
        if j != i + 200
    )
    assert max(others) < 0.05
    assert found[alike > 0.9].all() and (alike > 0.9).sum() > 50
    assert found[alike > 0.8].mean() > 0.95
    assert not found[alike < 0.3].any() and (alike < 0.3).sum() > 20
    spread = np.sqrt((expected * (1 - expected)).sum())
    assert abs(found.sum() - expected.sum()) < 4 * spread + 1
    assert report["documents"]["near"] == report["near"]["groups"] == found.sum()
    assert report["near"]["largest"] == 2


@needs_datatrove
def test_a_near_copy_of_what_an_earlier_pass_removed_stays(tmp_path):
    rng = random.Random(3)
    item = text_of(rng, 13)
    text = text_of(rng, 300)
    dirty = f"{text[:900]} {item} {text[900:]}"
    other = text_of(rng, 50)
    evals = write_lines(tmp_path / "sums.jsonl.gz", [{"question": item}])
    source = corpus(tmp_path, [dirty, other, text, other, text + " end"])
    assert jaccard(dirty, text) > 0.9
    sets = EvalSets((str(evals),), ("question",))
    report = clean(source, tmp_path / "out", evals=sets, workers=1)
    assert [record["place"] for record in left(tmp_path / "out")] == [2, 3]
    assert report["documents"] == {"kept": 2, "exact": 1, "evaluation": 1, "near": 1}


@needs_datatrove
def test_documents_linked_over_others_are_copies_of_the_first(tmp_path):
    rng = random.Random(4)
    chain = [text_of(rng, 200)]
    for _ in range(12):
        chain.append(edited(chain[-1], 0.01, rng))
    assert jaccard(chain[0], chain[-1]) < 0.6
    source = corpus(tmp_path, [text_of(rng), *chain, text_of(rng)], part_size=2000)
    report = clean(source, tmp_path / "out", dedup=["near"], workers=1)
    assert len(left(tmp_path / "out")) == 3 and report["near"]["largest"] == 13


@needs_datatrove
def test_texts_of_a_few_words_are_no_near_copies(tmp_path):
    texts = ["two words", "Two words!", "?", "one two three four", "One two three four", *"abc"]
    texts += ["one two three four five", "One two three four five."]  # the fewest that can be
    report = clean(corpus(tmp_path, texts), tmp_path / "out", dedup=["near"], workers=1)
    assert [record["place"] for record in left(tmp_path / "out")] == [*range(1, len(texts))]
    assert report["documents"]["near"] == 1


@needs_datatrove
def test_parts_may_be_more_than_the_files_that_are_open_at_first(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for part in range(30):
        cleaning.write_signatures([f"one two three four five {part % 29}"], tmp_path / "s", part)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        for bucket in range(cleaning.BUCKETS):
            cleaning.write_matches(tmp_path / "s", bucket, tmp_path / "matches")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [29, 0] in cleaning.near_copies(tmp_path / "matches", range(30)).tolist()


@needs_datatrove
def test_a_long_document_needs_little_memory_and_equals_itself(tmp_path, monkeypatch):
    rng = random.Random(5)
    text = text_of(rng, 5000)
    write_texts = [text, text.upper()]
    cleaning.write_signatures(write_texts, tmp_path / "whole", 0)
    monkeypatch.setattr(cleaning, "_BLOCK", 100)
    cleaning.write_signatures(write_texts, tmp_path / "blocks", 0)
    assert contents(tmp_path / "whole") == contents(tmp_path / "blocks")
    for bucket in range(cleaning.BUCKETS):
        cleaning.write_matches(tmp_path / "whole", bucket, tmp_path / "matches")
    assert cleaning.near_copies(tmp_path / "matches", [0, 2]).tolist() == [[1, 0]]


def test_a_typo_in_a_field_leaves_nothing_in_the_way(tmp_path):
    source = corpus(tmp_path, [text_of(random.Random(0))])
    path, out = str(write_lines(tmp_path / "e.jsonl", [{"question": "x"}])), tmp_path / "out"
    how = {"dedup": ["exact"], "workers": 1}
    with pytest.raises(UserError, match="none of the fields questoin"):
        clean(source, out, evals=EvalSets((path,), ("questoin",)), **how)
    clean(source, out, evals=EvalSets((path,), ("question",)), **how)


# The same whoever does it; whole or not there.


@needs_datatrove
def test_the_number_of_workers_does_not_matter(tmp_path):
    texts, item = mixed(random.Random(8))
    sets = EvalSets((str(write_lines(tmp_path / "e.jsonl", [item])),), ("question", "answer"))
    source = corpus(tmp_path, texts, files=2, part_size=20_000)
    reports = [
        clean(source, tmp_path / str(workers), evals=sets, workers=workers) for workers in (1, 2)
    ]
    assert contents(tmp_path / "1") == contents(tmp_path / "2") and reports[0] == reports[1]
    assert sum(reports[0]["documents"].values()) == len(texts)
    assert all(reports[0]["documents"].values())
    assert {path.suffix for path in (tmp_path / "1").iterdir()} == {".zst", ".json"}


def test_again_it_keeps_what_is_complete_and_refuses_what_is_not_the_same(tmp_path, capsys):
    source, out = corpus(tmp_path, ["one", "one", "two"]), tmp_path / "out"
    report = clean(source, out, dedup=["exact"], workers=1)
    before = contents(out)
    assert clean(source, out, dedup=["exact"], workers=1) == report
    assert "complete, kept as it is" in capsys.readouterr().out
    corpus(tmp_path, ["one", "three"])
    with pytest.raises(UserError, match="out exists and was made from other input"):
        clean(source, out, dedup=["exact"], workers=1)
    assert contents(out) == before and not (tmp_path / "out.incomplete").exists()
    for damaged in ("[]", "{", "[" * 100_000):
        (out / "report.json").write_text(damaged)
        with pytest.raises(UserError, match="out exists and is not empty: delete it"):
            clean(source, out, dedup=["exact"], workers=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="mine exists and is not empty"):
        clean(source, tmp_path / "mine", dedup=["exact"], workers=1)
    (tmp_path / "mine").rename(tmp_path / "new.incomplete")
    with pytest.raises(UserError, match="new.incomplete exists and is not ours"):
        clean(source, tmp_path / "new", dedup=["exact"], workers=1)


class Killed(BaseException):
    """What nothing catches: all that a dying process would not do either."""


@needs_datatrove
@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("cleaning.write_json", 0),  # the settings
        ("np.save", 3),
        ("cleaning.write_signatures", 2),
        ("cleaning.write_matches", 5),
        ("cleaning.write_json", 11),
        ("shutil.rmtree", 0),  # all is there but the work is not cleared away
    ],
)
def test_killed_at_any_moment_it_leaves_nothing_half_and_goes_on(tmp_path, name, calls):
    texts, item = mixed(random.Random(9))
    sets = EvalSets((str(write_lines(tmp_path / "e.jsonl", [item])),), ("question", "answer"))
    source = corpus(tmp_path, texts, files=2, part_size=40_000)
    clean(source, tmp_path / "whole", evals=sets, workers=1)
    module, _, function = name.rpartition(".")
    module = {"cleaning": cleaning, "np": np, "shutil": shutil}[module]
    real, done = getattr(module, function), []

    def dying(*args, **options):
        if len(done) == calls:
            raise Killed
        done.append(args)
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Killed):
        patched.setattr(module, function, dying)
        clean(source, tmp_path / "out", evals=sets, workers=1)
    assert (tmp_path / "out").exists() == (name == "shutil.rmtree")
    if name == "np.save":
        with pytest.raises(UserError, match="was begun from other input or with other options"):
            clean(source, tmp_path / "out", dedup=["exact"], workers=1)
    clean(source, tmp_path / "out", evals=sets, workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / "out.incomplete").exists()


@needs_datatrove
def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    source = corpus(tmp_path, mixed(random.Random(11))[0], part_size=20_000)
    real, seen = cleaning.scan, []

    def scan(job):
        if len(seen) == 2:
            raise Killed
        seen.append(job.number)
        real(job)

    monkeypatch.setattr(cleaning, "scan", scan)
    with pytest.raises(Killed):
        clean(source, tmp_path / "out", dedup=["exact"], workers=1)
    monkeypatch.setattr(cleaning, "scan", lambda job: (seen.append(job.number), real(job)))
    clean(source, tmp_path / "out", dedup=["exact"], workers=1)
    assert seen == list(range(len(source.parts()))) and len(seen) > 3


@pytest.mark.slow
@needs_datatrove
def test_after_kill_9_it_goes_on_and_its_processes_are_gone(tmp_path):
    rng = random.Random(10)
    source = corpus(tmp_path, [text_of(rng, 400) for _ in range(6000)], files=4, part_size=1 << 20)
    command = [sys.executable, "-m", "mobilellm_jax.clean", f"--source=web={tmp_path}/in*.jsonl"]
    command += [f"--out={tmp_path}/out", "--workers=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    deadline = time.monotonic() + 60
    with subprocess.Popen(command, env=environment, **quiet) as process:
        work = tmp_path / "out.incomplete" / "work"
        while not list(work.glob("*.sign")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        tasks = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(
            encoding="utf-8"
        )
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists() and tasks
    while any(map(alive, tasks.split())):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    subprocess.run([*command, "--workers=1"], env=environment, check=True, **quiet)
    assert len(left(tmp_path / "out")) == len(list(documents(source)))


# Bad input.


def program(tmp_path, *arguments):
    """The program on one small file."""
    write_lines(tmp_path / "in0.jsonl", ["one", "two", "one"])
    flags = [f"--out={tmp_path}/out", "--workers=1", "--dedup=exact", *arguments]
    if not any(argument.startswith("--source") for argument in arguments):
        flags.append(f"--source=web={tmp_path}/in*.jsonl")
    return runs.program("mobilellm_jax.clean", *flags)


def test_the_program_prints_what_each_pass_removed(tmp_path):
    ended = program(tmp_path)
    assert ended.status == 0
    lines = [line.split() for line in ended.out.splitlines()]
    assert ["exact", "copies", "1", "33.33%", "3", "33.33%"] in lines
    assert ["kept", "2", "66.67%", "6", "66.67%"] in lines


def test_in_a_locale_without_its_letters_a_text_is_read_and_written_all_the_same(tmp_path):
    corpus(tmp_path, ["größe", "größe"])
    ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    flags = ["--dedup=exact", "--workers=1", f"--source=web={tmp_path}/in*.jsonl"]
    command = [sys.executable, "-m", "mobilellm_jax.clean", f"--out={tmp_path}/out", *flags]
    subprocess.run(command, cwd=ROOT, env=ascii_only, check=True, capture_output=True)
    assert [record["text"] for record in left(tmp_path / "out")] == ["größe"]
    told = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert told["exact"]["examples"][0]["kept"]["text"] == "größe"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--source=web"], ["--source=web", "name=PATTERN"]),
        (["--source=web=/nowhere/*.jsonl"], ["no file matches '/nowhere/*.jsonl'"]),
        (["--dedup=exact,fuzzy"], ["'fuzzy' is neither exact nor near"]),
        (["--dedup="], ["nothing to remove", "--decontaminate"]),
        (["--text_key=body"], ["in0.jsonl, line 1", "no field 'body'", "--text_key"]),
        (["--decontaminate=/nowhere/*"], ["--decontaminate", "no file matches '/nowhere/*'"]),
        (["--decontaminate={}/e.jsonl"], ["e.jsonl, item 1", "question, answer (it has q)"]),
        (["--decontaminate={}/bad.jsonl"], ["bad.jsonl, line 2", "not JSON lines"]),
        (["--decontaminate={}/half.jsonl.gz"], ["half.jsonl.gz, line 2", "not JSON lines"]),
        (["--decontaminate={}/x.parquet"], ["x.parquet is not a readable Parquet file"]),
        (["--decontaminate={}/note.txt"], ["note.txt", "JSON lines", "Parquet"]),
        (["--decontaminate={}/none.jsonl"], ["none.jsonl", "without items"]),
        (["--decontaminate={}/half.jsonl"], ["half.jsonl, item 1", "surrogate pair", "'answer'"]),
        (["--decontaminate={}/e.jsonl", "--ngram=5"], ["--shortest=8", "--ngram=5"]),
        (["--decontaminate={}/e.jsonl", "--eval_keys="], ["--eval_keys names no field"]),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_one_sentence_and_nothing_is_made(tmp_path, arguments, parts):
    write_lines(tmp_path / "e.jsonl", [{"q": "what"}])
    (tmp_path / "bad.jsonl").write_text('{"question": "a"}\n{"question"\n')
    (tmp_path / "half.jsonl.gz").write_bytes(gzip.compress(b'{"question": "a"}\n')[:-9])
    (tmp_path / "x.parquet").write_text("no")
    (tmp_path / "none.jsonl").write_text("\n")
    (tmp_path / "half.jsonl").write_text('{"question": "a", "answer": "\\ud83d"}\n')
    (tmp_path / "note.txt").write_text("no")
    ended = program(tmp_path, *(argument.format(tmp_path) for argument in arguments))
    assert ended.status == 1 and ended.err.count("error: ") == 1
    for part in parts:
        assert part in ended.err, ended.err
    assert not (tmp_path / "out").exists()


def test_without_datatrove_near_copies_are_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mobilellm-jax\[clean\]'"):
        clean(corpus(tmp_path, ["one"]), tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
