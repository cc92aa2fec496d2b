"""The report: counts are right, drawing keeps the extremes, and the page stands alone."""

import dataclasses
import html.parser
import json
import math
import re
import shutil
import time

import jax
import numpy as np
import pytest
import runs
from etils import epath

from mobilellm_jax.data import baselines
from mobilellm_jax.data.mixture import first_rows
from mobilellm_jax.data.packing import BestFit
from mobilellm_jax.data.plan import Plan, PlanSource, Stage
from mobilellm_jax.data.rows import SourceInfo, open_rows
from mobilellm_jax.data.sentencepiece_tokenizer import train_tokenizer
from mobilellm_jax.data.shards import Batch, write_source
from mobilellm_jax.errors import UserError
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, Stack
from mobilellm_jax.report import report
from mobilellm_jax.reporting import page, samples, sources
from mobilellm_jax.reporting.history import History, Series, read_history
from mobilellm_jax.reporting.samples import Sample
from mobilellm_jax.training.checkpoint import LoadedModel

NAMES = ("code", "prose", "math")
ORIGIN = {
    "time": 1.7e9,
    "parameters": 2_163_584,
    "commit": "0123456789abcdef",
    "devices": {"kind": "cpu", "count": 1},
    "packages": {"jax": "0.10.2", "python": "3.11.9"},
}


def train_line(step, rng, names=NAMES):
    """One line of a run as training writes it; a source without rows has no loss."""
    rows = rng.multinomial(8, np.ones(len(names)) / len(names))
    line = {
        "kind": "train",
        "step": step,
        "loss": rng.uniform(2, 3),
        "bits_per_byte": rng.uniform(1, 2),
    }
    for name, count in zip(names, rows.tolist(), strict=True):
        line |= {f"rows/{name}": count, f"tokens/{name}": 15 * count}
        if count:
            line[f"bits_per_byte/{name}"] = rng.uniform(1, 2)
    return line | {
        "gradient_norm": rng.uniform(0.1, 1),
        "learning_rate": 1e-3,
        "tokens_per_second": rng.uniform(900, 1100),
        "step_seconds": 0.1,
        "data_wait_seconds": 0.001,
        "skipped": 0,
    }


def write_run(workdir, lines, plan="gone/mixture.json", **config):
    """A workdir with these lines (bytes as they are) and a configuration."""
    workdir.mkdir(parents=True, exist_ok=True)
    texts = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (workdir / "metrics.jsonl").write_bytes(b"".join(text + b"\n" for text in texts))
    model = ModelConfig(64, 16, (Stack(2, 2, 1, 32, 2),), head_dim=8, max_length=64)
    whole = {
        "model": model.to_dict(),
        "plan": str(plan),
        "steps": 20,
        "row_length": 32,
        "eval": {"rows": 4},
        **config,
    }
    (workdir / "config.json").write_text(json.dumps(whole))
    return workdir


def facts(history, names=NAMES, **more):
    """The facts of a run whose data are all there."""
    baselines = sources.Baselines(unigram=3.0, bigram=2.5, zlib=2.7, rows=10, seen=10)
    found = [
        dataclasses.replace(s, planned=1 / len(names), available=100, baselines=baselines)
        for s in sources.realised(history, None, 32)
    ]
    return page.Facts("runs/it", history, {"steps": len(history.train)}, found, **more)


def long_history(steps, names):
    """A finished run of many steps, made directly in arrays."""
    rng = np.random.default_rng(0)
    columns = {"loss": rng.normal(3, 0.1, steps), "bits_per_byte": rng.normal(2, 0.1, steps)}
    for name in names:
        columns[f"bits_per_byte/{name}"] = rng.normal(2, 0.1, steps)
        columns[f"rows/{name}"] = columns[f"tokens/{name}"] = rng.integers(0, 9, steps).astype(
            float
        )
    for name in ("gradient_norm", "learning_rate", "tokens_per_second", "step_seconds"):
        columns[name] = rng.uniform(1, 2, steps)
    columns["data_wait_seconds"] = rng.uniform(0, 0.01, steps)
    heldout = {f"bits_per_byte/{name}": rng.uniform(1, 2, 200) for name in names}
    measured = Series(np.arange(1, 201) * (steps // 200), heldout)
    starts = [{"kind": "start", "step": i * (steps // 300), **ORIGIN} for i in range(300)]
    tasks = Series(measured.steps_N[::10], {"ARC-e acc": rng.uniform(0, 1, 20)})
    nothing = Series(np.array([], np.int64), {})
    train = Series(np.arange(1, steps + 1), columns)
    return History(starts, train, measured, tasks, nothing, 0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two small sources with their plan: (path of the plan, tokenizer, held-out text by source)."""
    rng = np.random.default_rng(9)
    directory = tmp_path_factory.mktemp("data")
    words = {
        "code": ["def", "self", "return", "(x):\n  "],
        "prose": ["the", "row", "of", "a", "sea"],
    }
    texts = {
        name: [" ".join(rng.choice(some, rng.integers(5, 40))) for _ in range(60)]
        for name, some in words.items()
    }
    tokenizer = train_tokenizer([text for some in texts.values() for text in some], 290)
    tokenizer.write(directory)
    length, bos, eos = 32, tokenizer.bos_id, tokenizer.eos_id
    for name, some in texts.items():
        info = SourceInfo(name, "", length, 290, bos, tokenizer.fingerprint, "best_fit", {})
        batches = []
        for split, part in (("train", some[:45]), ("heldout", some[45:])):
            packer = BestFit(length, bos, eos)
            ids = [np.array(tokenizer.encode(text), np.int32) for text in part]
            rows = np.concatenate([packer.add(ids).rows, packer.finish().rows])
            batches.append(Batch(split, rows, len(part), 1, 1))
        write_source(directory / name, info, {}, batches)
    chosen = tuple(PlanSource(name, name) for name in texts)
    stage = Stage("train", None, dict.fromkeys(texts, 0.5))
    plan = Plan(chosen, (stage,), "tokenizer.model", tokenizer.fingerprint)
    plan.save(directory / "mixture.json")
    return directory / "mixture.json", tokenizer, {name: t[45:] for name, t in texts.items()}


def write_prepared_run(workdir, plan):
    """A finished run on prepared sources."""
    rng = np.random.default_rng(10)
    names = ("code", "prose")
    lines = [{"kind": "start", "step": 0, "plan": Plan.load(plan).hash, **ORIGIN}]
    lines += [train_line(step, rng, names) for step in range(1, 21)]
    lines.append({"kind": "heldout", "step": 20} | {f"bits_per_byte/{n}": 0.1 for n in names})
    return write_run(workdir, lines, plan)


class Tags(html.parser.HTMLParser):
    """Collects every tag with its attributes, and all text outside scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._raw = [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._raw = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._raw = False

    def handle_data(self, data):
        self.text += "" if self._raw else data


def test_last_line_of_a_step_counts(tmp_path):
    rng = np.random.default_rng(1)
    lines = [train_line(int(step), rng) for step in rng.integers(1, 40, 200)]
    lines += [
        {"kind": "heldout", "step": int(s), "bits_per_byte/code": rng.uniform()} for s in (5, 9, 5)
    ]
    history = read_history(write_run(tmp_path / "run", lines))
    last = {(line["kind"], line["step"]): line for line in lines}
    for kind, series in (("train", history.train), ("heldout", history.heldout)):
        wanted = {step: line for (k, step), line in last.items() if k == kind}
        assert series.steps_N.tolist() == sorted(wanted)
        for name, column in series.columns.items():
            expected = [wanted[step].get(name, math.nan) for step in series.steps_N.tolist()]
            np.testing.assert_array_equal(column, expected)


def test_files_of_several_starts_are_read_in_the_order_of_their_names(tmp_path):
    workdir = write_run(tmp_path / "run", [])
    (workdir / "metrics.jsonl").unlink()
    for name, loss in (("metrics-000000002-7.jsonl", 2.0), ("metrics-000000000-9.jsonl", 1.0)):
        line = {"kind": "train", "step": 3, "loss": loss}
        (workdir / name).write_text(json.dumps(line) + "\n")
    assert read_history(workdir).train.column("loss").tolist() == [2.0]


def test_torn_lines_are_left_out_and_told(tmp_path):
    rng = np.random.default_rng(2)
    lines = [train_line(step, rng) for step in range(1, 9)]
    whole = json.dumps(lines[4]).encode()
    torn = [*lines[:4], whole[:70], "é".encode()[:1], b"17", *lines[4:], whole[:-1]]
    history = read_history(write_run(tmp_path / "run", torn))
    assert history.train.steps_N.tolist() == list(range(1, 9)) and history.torn == 4
    assert "4 torn lines" in report(tmp_path / "run").read_text()


@pytest.mark.parametrize(
    "damage",
    [
        {"kind": ["start"]},
        {"step": 1 << 70},
        {"step": -1},
        {"step": None},
        *({key: "x" if key != "plan" else {}} for key in ("devices", "packages", "plan", "time")),
        {"parameters": None},
    ],
)
def test_a_start_of_other_kinds_is_no_record(tmp_path, damage):
    start = {"kind": "start", "step": 0, "plan": "0" * 64, **ORIGIN}
    line = train_line(1, np.random.default_rng(2))
    history = read_history(write_run(tmp_path / "whole", [start, line]))
    assert history.starts == [start] and not history.torn
    workdir = write_run(tmp_path / "run", [start | damage, b"[" * 100_000, line])
    history = read_history(workdir)
    assert history.starts == [] and history.torn == 2
    assert "2 torn lines" in report(workdir).read_text()


def test_realised_mixture_equals_a_count_of_the_lines_that_count(tmp_path):
    rng = np.random.default_rng(3)
    lines = [train_line(step, rng) for step in [*range(1, 30), *range(20, 50)]]
    history = read_history(write_run(tmp_path / "run", lines))
    last = {line["step"]: line for line in lines}.values()
    rows = {name: sum(line[f"rows/{name}"] for line in last) for name in NAMES}
    found = {source.name: source for source in sources.realised(history, None, 32)}
    assert {name: source.rows for name, source in found.items()} == rows
    for name, source in found.items():
        assert source.row_share == pytest.approx(rows[name] / (8 * 49), abs=1e-12)
        assert source.tokens == 15 * rows[name]
        assert dataclasses.replace(source, available=7).epochs == rows[name] / 7
    assert history.tokens_so_far()[-1] == 15 * 8 * 49


def test_planned_shares_are_those_of_the_rows_that_the_run_reads(tmp_path):
    """Of a run that begins in the middle of its plan, those from there on."""
    rng = np.random.default_rng(3)
    history = read_history(write_run(tmp_path / "run", [train_line(s, rng) for s in range(1, 41)]))
    first, second = ({NAMES[0]: a, NAMES[1]: 1 - a} for a in (0.9, 0.2))
    plan = Plan(
        tuple(PlanSource(name, name) for name in NAMES[:2]),
        (Stage("one", 320 * 32, first), Stage("two", None, second)),
        "t",
        "ab",
    )
    found = {s.name: s.planned for s in sources.realised(history, plan, 32, first_row=320)}
    assert found[NAMES[0]] == pytest.approx(0.2) and found[NAMES[1]] == pytest.approx(0.8)


def test_page_loads_nothing_from_elsewhere(tmp_path):
    text = page.render(facts(long_history(400, NAMES)))
    for tag, attributes in Tags(text).tags:
        for name in ("src", "href", "srcset", "action", "data", "xlink:href"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), (tag, attributes)
    assert "://" not in text
    assert not re.search(r"@import|url\(", text)
    assert "default-src 'none'" in text


def test_text_from_outside_is_escaped():
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    history = long_history(400, [evil])
    history.starts[-1]["devices"] = {"kind": evil, "count": 1}
    plain = page.render(facts(long_history(400, ["it"]), samples=[Sample("it", "a", "b", "c")]))
    text = page.render(
        dataclasses.replace(
            facts(history, [evil]),
            workdir=evil,
            config={"steps": 400, evil: {evil: evil}},
            samples=[Sample(evil, evil, evil, evil)],
            notes=[evil],
        )
    )
    assert evil not in text
    found, wanted = (
        [tag for tag, _ in Tags(t).tags if tag in ("script", "img", "style")] for t in (text, plain)
    )
    assert found == wanted
    assert Tags(text).text.count(evil) > 8


def test_a_million_steps_stay_small_and_quick():
    names = [f"source_{i}" for i in range(14)]
    start = time.process_time()
    text = page.render(facts(long_history(1_000_000, names), names))
    assert len(text.encode()) < 2_000_000
    assert time.process_time() - start < 15
    many = [f"source_{i}" for i in range(60)]
    assert len(page.render(facts(long_history(20_000, many), many)).encode()) < 2_000_000


def test_a_young_run_without_plan_heldout_or_checkpoint_is_told_as_it_is(tmp_path, capsys):
    rng = np.random.default_rng(5)
    workdir = write_run(tmp_path / "run", [train_line(step, rng) for step in (1, 2)])
    path = report(workdir)
    text = Tags(path.read_text()).text
    assert path == epath.Path(workdir) / "report.html"
    assert "2 of 20 steps" in text and "there is no plan at gone/mixture.json" in text
    assert "Nothing was measured on held-out text yet" in text and "No samples" in text
    assert str(path) in capsys.readouterr().out
    assert report(workdir) == path  # a report may be replaced by a newer one


@pytest.mark.parametrize("kind", ["missing", "empty", "no config", "no step"])
def test_a_directory_that_is_no_workdir_is_refused(tmp_path, kind):
    workdir = tmp_path / "run"
    if kind == "empty":
        workdir.mkdir()
    elif kind != "missing":
        lines = [train_line(1, np.random.default_rng(6))] if kind == "no config" else []
        write_run(workdir, lines)
        if kind == "no config":
            (workdir / "config.json").unlink()
    with pytest.raises(UserError, match=re.escape(str(workdir))):
        report(workdir)
    assert not (workdir / "report.html").exists()


def test_a_file_that_is_no_report_is_not_overwritten(tmp_path):
    workdir = write_run(tmp_path / "run", [train_line(1, np.random.default_rng(7))])
    (tmp_path / "mine.html").write_bytes(b"\xffmy own page")
    with pytest.raises(UserError, match="mine.html"):
        report(workdir, tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_bytes() == b"\xffmy own page"


def test_resumes_and_skipped_steps_are_marked(tmp_path):
    rng = np.random.default_rng(8)
    lines = [{"kind": "start", "step": 0}]
    lines += [
        train_line(step, rng) | {"skipped": int(step >= 4) + int(step >= 6)} for step in range(1, 9)
    ]
    lines += [{"kind": "start", "step": 5}, *(line for line in lines if line["step"] > 5)]
    history = read_history(write_run(tmp_path / "run", lines))
    assert history.resumes == [5] and history.skipped == [4, 6]
    text = report(tmp_path / "run").read_text()
    numbers = json.loads(re.search(r'id="numbers">(.*?)</script>', text).group(1))
    assert [(m["kind"], m["step"]) for m in numbers["marks"]] == [
        ("resumed", 5), ("skipped", 4), ("skipped", 6)
    ]  # fmt: skip


def test_baselines_epochs_and_samples_are_those_of_the_rows(
    tmp_path, prepared, monkeypatch, capsys
):
    plan, tokenizer, heldout = prepared
    model = ModelConfig(290, 16, (Stack(1, 2, 1, 32, 2),), head_dim=8, max_length=64)
    params = jax.jit(transformer.init, static_argnums=0)(model, jax.random.key(0))
    loaded = LoadedModel(params, model, tokenizer, 20, {})
    monkeypatch.setattr(samples, "load_model", lambda directory: loaded)
    workdir = write_prepared_run(tmp_path / "run", plan)
    text = Tags(report(workdir).read_text()).text
    printed = capsys.readouterr().out
    for name in ("code", "prose"):
        train, held = (open_rows(plan.parent / name, split) for split in ("train", "heldout"))
        held_RT = held.read(np.arange(4))  # eval.rows of the configuration
        lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
        seen = sum(line.get(f"rows/{name}", 0) for line in lines)
        train_RT = train.read(first_rows(Plan.load(plan), name, len(train), min(seen, len(train))))
        known = (train_RT, held_RT, tokenizer.piece_bytes(), tokenizer.bos_id, tokenizer.eos_id)
        scores = [
            baselines.bigram_bits_per_byte(*known),
            baselines.unigram_bits_per_byte(*known),
            baselines.zlib_bits_per_byte(held_RT, tokenizer),
        ]
        line = next(line for line in printed.splitlines() if line.startswith(name))
        assert line.split()[-3:] == [f"{score:.3f}" for score in scores]
        assert all(f"{score:.3f}" in text for score in scores)
        assert line.split()[3] == f"{seen / len(train):.2f}"
    found, step = samples.sample(workdir, Plan.load(plan))
    assert step == 20 and {sample.source for sample in found} == {"code", "prose"}
    for sample in found:
        assert any(sample.prompt + sample.original in whole for whole in heldout[sample.source])
        shown = text.replace("\r", "\n")  # as whoever reads HTML sees line ends
        for said in (sample.prompt, sample.continuation):
            assert said.replace("\r\n", "\n").replace("\r", "\n") in shown


def test_baselines_are_computed_once_per_plan(tmp_path, prepared, monkeypatch):
    workdir = write_prepared_run(tmp_path / "run", prepared[0])
    calls = []
    measure = sources.measure
    monkeypatch.setattr(sources, "measure", lambda *a: calls.append(a) or measure(*a))
    report(workdir)
    report(workdir)
    assert len(calls) == 2  # one for each source
    whole = (workdir / "baselines.json").read_text()
    for damaged in (whole.replace('"zlib": ', '"zlib": -'), "[" * 100_000):
        (workdir / "baselines.json").write_text(damaged)
        report(workdir)
        assert (workdir / "baselines.json").read_text() == whole and len(calls.pop() + calls.pop())
    (workdir / "baselines.json").write_text("{")
    monkeypatch.setattr(sources, "COUNTED_TOKENS", 64)
    text = Tags(report(workdir).read_text()).text
    assert len(calls) == 4 and "Of code, prose the n-gram models count the first 64" in text


def test_a_plan_or_rows_that_changed_since_are_told(tmp_path, prepared):
    data = tmp_path / "data"
    shutil.copytree(prepared[0].parent, data)
    workdir = write_prepared_run(tmp_path / "run", data / "mixture.json")
    next((data / "code").glob("*.array_record*")).unlink()
    text = Tags(report(workdir).read_text()).text
    assert "Some rows of code cannot be read" in text and "Some rows of prose" not in text
    plan = Plan.load(data / "mixture.json")
    dataclasses.replace(plan, seed=1).save(data / "mixture.json")
    assert "now holds another plan" in Tags(report(workdir).read_text()).text


def test_the_program_takes_the_workdir_and_tells_mistakes_in_one_line(tmp_path):
    done = runs.program("mobilellm_jax.report", tmp_path)
    assert done.status == 1 and "Traceback" not in done.err
    assert done.err.splitlines()[-1].startswith(f"error: {tmp_path} is not the workdir of a run")


def test_rows_inside_a_long_document_give_no_prompt():
    class Inside:
        def __len__(self):
            return 3

        def read(self, indices):
            rows = np.full((3, 9), 5)
            rows[2, 4] = 1
            return rows[indices]

    found = list(samples._documents(Inside(), bos_id=1, length=3))
    assert [d.tolist() for d in found] == [[5, 5, 5]]
