"""Preparation through Apache Beam: the same bytes as in processes of one machine."""

import dataclasses
import importlib.util
import json
import sys

import pytest

from mobilellm_jax.data.corpora import FileCorpus
from mobilellm_jax.data.parts import jobs_of, prepare_part
from mobilellm_jax.data.rows import read_info
from mobilellm_jax.data.shards import SourceWriter
from mobilellm_jax.errors import UserError
from mobilellm_jax.prepare import prepare

# In this process and without a server to fetch.
RUNNER = ["--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner"]
needs_beam = pytest.mark.skipif(
    importlib.util.find_spec("apache_beam") is None, reason="needs mobilellm-jax[beam]"
)


@pytest.fixture
def corpora(tmp_path):
    for name in "ab":
        texts = (
            f"{name} {i}: the rows of this text " + "learn and share " * (i % 9) for i in range(300)
        )
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    return [FileCorpus(n, f"{tmp_path}/{n}.jsonl", heldout=0.1, part_size=4000) for n in "ab"]


def run(corpora, out, **options):
    return prepare(corpora, out, 32, vocab_size=300, workers=1, **options)


def contents(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


@needs_beam
@pytest.mark.parametrize("options", [RUNNER, ["--runner=DirectRunner"]])
def test_beam_makes_the_same_bytes(corpora, tmp_path, options):
    run(corpora, tmp_path / "here")
    run(corpora, tmp_path / "beam", beam=options)
    assert contents(tmp_path / "here") == contents(tmp_path / "beam")
    assert len(list((tmp_path / "beam" / "a").glob("*train*"))) > 10


@needs_beam
def test_what_another_run_has_left_is_taken_up(corpora, tmp_path):
    run(corpora, tmp_path / "here")
    given = {"tokenizer": tmp_path / "here" / "tokenizer.model"}
    lines = (tmp_path / "b.jsonl").read_text()
    (tmp_path / "b.jsonl").write_text(lines[:-3] + "###")  # as long as before
    with pytest.raises(UserError, match=r"line 300: not JSON .* The parts that are done stay"):
        run(corpora, tmp_path / "beam", beam=RUNNER, **given)
    (tmp_path / "b.jsonl").write_text(lines)
    # Processes of this machine finish what Beam began.
    run(corpora, tmp_path / "beam", **given)
    for name in "ab":
        assert contents(tmp_path / "here" / name) == contents(tmp_path / "beam" / name)


def test_a_part_done_twice_or_again_is_the_same(corpora, tmp_path):
    run(corpora, tmp_path / "here")
    corpus = dataclasses.replace(corpora[0], name="again")
    info = dataclasses.replace(read_info(tmp_path / "here" / "a"), name="again", splits={})
    writer = SourceWriter(str(tmp_path / "again"), info, {})
    writer.begin()
    jobs = jobs_of(corpus, writer, str(tmp_path / "here" / "tokenizer.model"))
    for job in (*jobs, *reversed(jobs)):
        prepare_part(job)
    writer.commit(len(jobs))
    ours, theirs = contents(tmp_path / "again"), contents(tmp_path / "here" / "a")
    data = {name for name in theirs if "array_record" in name}
    assert all(ours[name.replace("a-", "again-", 1)] == theirs[name] for name in data)


def test_beam_that_is_not_installed_is_told(corpora, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install 'mobilellm-jax\[beam\]'"):
        run(corpora, tmp_path / "out", beam=RUNNER)
