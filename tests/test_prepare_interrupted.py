"""Preparation that is interrupted leaves nothing half and goes on; and its memory does not grow."""

import concurrent.futures
import dataclasses
import gzip
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
from prepared import ENVIRONMENT, contents, run, stream, two_corpora, write_corpus
from runs import alive

from mobilellm_jax.data.corpora import FileCorpus
from mobilellm_jax.data.encoding import Workers
from mobilellm_jax.data.rows import open_rows
from mobilellm_jax.data.sentencepiece_tokenizer import train_tokenizer
from mobilellm_jax.data.shards import SourceWriter
from mobilellm_jax.errors import UserError

KILLED = """
import os, sys
from mobilellm_jax.data import shards
from mobilellm_jax.data.corpora import FileCorpus
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.prepare import prepare

folder, *moments = sys.argv[1:]
def die(*_, **__):
    os._exit(9)

def killed(moment):
    if moment == "tokenizer":
        Tokenizer.write = die
    elif moment == "commit":
        shards.tfds.core.DatasetInfo.write_dataset_info_json = die
    elif moment == "plan":
        Plan.save = die
    else:
        what, left = moment.split()
        kind = shards._ShardWriter if what == "add" else shards.SourceWriter
        usual, left = getattr(kind, what), int(left)
        def counted(self, *arguments):
            nonlocal left
            left -= 1
            if left < 0:
                die()
            return usual(self, *arguments)
        setattr(kind, what, counted)
    corpora = [
        FileCorpus(name, f"{folder}/{name}.jsonl", heldout=0.1, part_size=5000) for name in "ab"
    ]
    prepare(corpora, f"{folder}/{moment}", 32, vocab_size=320, workers=1)

for moment in moments:  # a process each, which need not import all this
    if not os.fork():
        killed(moment)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 9, moment
"""

# A part is two batches and two files of each split; `a` has 17 parts, `b` 9.
MOMENTS = ["add 0", "add 9", "_publish 1", "_publish 27", "add 80", "tokenizer", "commit", "plan"]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """The corpora, and a folder with what is prepared from them: `whole`, and up to each of the moments."""
    folder = tmp_path_factory.mktemp("interrupted")
    corpora = [dataclasses.replace(corpus, part_size=5000) for corpus in two_corpora(folder)]
    run(corpora, folder / "whole")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), *MOMENTS], env=ENVIRONMENT, capture_output=True
    )
    assert killed.returncode == 0, killed.stderr.decode()
    return corpora, folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_it_leaves_nothing_half_and_goes_on(interrupted, moment, monkeypatch):
    corpora, folder = interrupted
    out, whole = folder / moment, folder / "whole"
    assert not (out / "mixture.json").exists()
    done = []
    for name in "ab":
        try:
            rows = open_rows(out / name)
            done.append(name)
        except UserError:
            continue
        assert (stream(rows) == stream(open_rows(whole / name))).all()
    assert len(done) == {"add 80": 1, "plan": 2}.get(moment, 0)
    marks = list(out.glob("?.incomplete/parts/0*.json"))
    assert len(marks) > 5 or moment not in ("_publish 27", "commit")
    if moment == "commit":
        marks.pop().write_bytes(b"")  # as where power fails: that part is done again
    written = []
    usual = SourceWriter.write_part

    def write_part(self, number, *arguments):
        written.append(number)
        return usual(self, number, *arguments)

    monkeypatch.setattr(SourceWriter, "write_part", write_part)
    run(corpora, out)
    left = sum(len(corpus.parts()) for corpus in corpora if corpus.name not in done)
    assert len(written) == left - len(marks)
    assert contents(out) == contents(whole)


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_is_told_and_the_rest_is_done_later(tmp_path):
    write_corpus(tmp_path / "a.jsonl", 1, 20_000)
    corpora = [FileCorpus("a", f"{tmp_path}/a.jsonl", part_size=100_000)]
    run(corpora, tmp_path / "whole", tokenizer=None)
    options = {"tokenizer": tmp_path / "whole" / "tokenizer.model", "workers": 2}

    def kill():
        deadline = time.monotonic() + 60
        while not list((tmp_path / "out").glob("a.incomplete/parts/00002.json")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        victim = next(c for c in _children(os.getpid()) if "spawn_main" in _command(c))
        os.kill(victim, signal.SIGKILL)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        killing = pool.submit(kill)
        with pytest.raises(UserError, match="was killed, probably for want of memory"):
            run(corpora, tmp_path / "out", **options)
        killing.result()
    assert len(list((tmp_path / "out").glob("a.incomplete/parts/0*.json"))) >= 1
    run(corpora, tmp_path / "out", **options)
    ours, whole = contents(tmp_path / "out" / "a"), contents(tmp_path / "whole" / "a")
    assert ours == whole


@pytest.mark.slow
def test_kill_9_ends_the_processes_that_tokenize_too(tmp_path):
    write_corpus(tmp_path / "a.jsonl", 1, 60_000)
    command = (
        *(sys.executable, "-m", "mobilellm_jax.prepare", f"--source=a={tmp_path}/a.jsonl"),
        *(f"--out={tmp_path}/out", "--row_length=32", "--vocab_size=320", "--workers=2"),
    )
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 60
        while not list((tmp_path / "out").glob("a.incomplete/scratch-*/a-train*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        children = _children(process.pid)
        process.send_signal(signal.SIGKILL)
    assert children
    with pytest.raises(UserError, match="no complete source"):
        open_rows(tmp_path / "out" / "a")
    while any(map(alive, children)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_mistake_is_told_before_other_processes_have_done_their_parts(workers):
    begin = time.monotonic()
    with pytest.raises(ValueError, match="non-negative"), Workers(workers) as processes:
        list(processes.map(time.sleep, [-1, 100, 100]))
    assert time.monotonic() - begin < 50


WORKING = """
import time
from mobilellm_jax.data.encoding import Workers

with Workers(2) as processes:
    for _ in processes.map(time.sleep, [0, 0, 100, 0]):
        print("begun", flush=True)
"""


def test_ctrl_c_reaches_processes_that_work_by_the_one_that_waits_for_them():
    command, told = (sys.executable, "-c", WORKING), {"stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, env=ENVIRONMENT, start_new_session=True, **told
    ) as process:
        assert process.stdout.readline() == "begun\n"
        children = [c for c in _children(process.pid) if "spawn_main" in _command(c)]
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        _, errors = process.communicate(timeout=50)
    assert errors.count("Traceback") == errors.count("KeyboardInterrupt") == 1  # its own
    assert len(children) == 2 and not any(map(alive, children))


def _children(pid):
    return [
        int(c)
        for c in pathlib.Path(f"/proc/{pid}/task/{pid}/children")
        .read_text(encoding="utf-8")
        .split()
    ]


def _command(pid):
    return pathlib.Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")


# Memory.

MEASURED = """
import resource, sys
from mobilellm_jax.data import documents
from mobilellm_jax.data.corpora import FileCorpus
from mobilellm_jax.prepare import prepare

pattern, out, tokenizer, packing, workers = sys.argv[1:]
documents.ROW_GROUP = 2000  # of which one is in memory; that it is full must not look like growth
if __name__ == "__main__":
    corpus = FileCorpus("a", pattern, part_size=4 << 20)
    prepare([corpus], out, 256, tokenizer=tokenizer, packing=packing, workers=int(workers))
    # Unlike getrusage, the kernel's high-water mark does not count who started this process.
    own = open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print("PEAK", int(own) // 1024, workers // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "packing", "workers"),
    [("jsonl", "best_fit", 1), ("jsonl", "concat", 2), ("jsonl.gz", "concat", 2)],
)
def test_a_larger_corpus_takes_no_more_memory(tmp_path, kind, packing, workers):
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(5000)]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 600))) for _ in range(8000)]
    train_tokenizer(texts[:200], 1000).write(tmp_path)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    (tmp_path / "measured.py").write_text(MEASURED)
    peaks = {}
    for times in (1, 4):  # 16 and 64 MB
        file = tmp_path / f"{times}.{kind}"
        file.write_bytes(gzip.compress(times * lines, 1) if kind.endswith("gz") else times * lines)
        command = (sys.executable, "measured.py", file, f"out{times}", tmp_path / "tokenizer.model")
        done = subprocess.run(
            [*map(str, command), packing, str(workers)],
            cwd=tmp_path,
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        peaks[times] = [int(peak) for peak in done.stdout.split("PEAK")[1].split()]
    for one, four in zip(peaks[1], peaks[4], strict=True):
        assert four < one + 32, peaks  # MiB; there are 48 MB more text
