"""The program: suites and tasks, local data sets, what is said of bad input, the table."""

import gzip
import json
import math
import shutil

import jax
import numpy as np
import pytest
import tiny
from runs import run

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

import datasets
from lm_eval.api.model import LM

from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluate import evaluate
from mobilellm_jax.evaluation import tasks
from mobilellm_jax.evaluation.answered import answered_tasks
from mobilellm_jax.evaluation.local_data import local_datasets, local_tasks
from mobilellm_jax.evaluation.suites import AVERAGE, PUBLISHED, SUITES, Entry, Line
from mobilellm_jax.evaluation.table import nearest_published, table
from mobilellm_jax.interop import huggingface, stored
from mobilellm_jax.leaves import flat
from mobilellm_jax.model.presets import preset
from mobilellm_jax.training.checkpoint import load_model, write_model


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run(tiny.config(tiny.corpus(folder / "data"), steps=40), folder / "run")
    return load_model(folder / "run")


class Unasked(LM):
    """A model that nothing may be asked."""

    def generate_until(self, requests, disable_tqdm=False):
        raise AssertionError("asked")

    loglikelihood = loglikelihood_rolling = generate_until


def questions(count=12):
    rng = np.random.default_rng(0)
    for _ in range(count):
        a, b = rng.integers(0, 50, 2)
        choices = [str(a + b), str(a + b + 1), str(a)]
        yield {"query": f"{a} + {b} =", "choices": choices, "gold": 0}


@pytest.fixture
def data(tmp_path):
    with gzip.open(tmp_path / "sums.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(question) + "\n" for question in questions())
    (tmp_path / "notes.jsonl").write_text('{"text": "no question"}\n')
    arc = tmp_path / "allenai" / "ai2_arc" / "ARC-Easy"
    arc.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        with (arc / f"{split}.jsonl").open("w") as file:
            for q in questions(6):
                choices = {"text": q["choices"], "label": ["A", "B", "C"]}
                line = {"question": q["query"], "choices": choices, "answerKey": "A"}
                file.write(json.dumps(line) + "\n")
    return tmp_path


@pytest.mark.slow
def test_a_file_of_questions_is_a_task(loaded, data):
    """Its accuracy is what scoring every choice by hand gives."""
    lines, results = evaluate(loaded, ["sums"], data=data)
    found = {line.metric: line for line in lines}
    assert set(found) == {"acc", "acc_norm"} and found["acc"].documents == 12
    from mobilellm_jax.decoding.decoder import to_read
    from mobilellm_jax.evaluation.scoring import Request, score

    tokenizer, right = loaded.tokenizer, 0
    for q in questions():
        prompt = tokenizer.encode(q["query"])
        asked = [
            Request(
                (tokenizer.bos_id, *prompt),
                tuple(tokenizer.encode(f"{q['query']} {choice}")[len(prompt) :]),
            )
            for choice in q["choices"]
        ]
        scores = dict(score(to_read(loaded.params, loaded.model), asked))
        right += max(range(3), key=lambda i, s=scores: s[i].log_likelihood) == q["gold"]
    assert found["acc"].value == pytest.approx(right / 12)
    assert found["acc"].standard_error == pytest.approx(
        math.sqrt(right / 12 * (1 - right / 12) / 11), abs=1e-6
    )
    assert json.dumps(results, default=str)


def test_no_question_is_an_example_for_itself(loaded, data):
    _, results = evaluate(loaded, ["sums"], data=data, shots=3, log=True)
    (samples,) = results["sums"]["samples"].values()
    for sample in samples:
        prompt = sample["arguments"][0][0]
        assert prompt.count(sample["doc"]["query"]) == 1 and prompt.count("\n\n") == 3


def test_more_examples_than_there_are_is_told(data):
    with pytest.raises(UserError, match="sums has fewer examples than the 50 .*lower --shots"):
        tasks.ask(tasks.open_tasks(["sums"], data, shots=50), Unasked())


def test_a_task_of_the_harness_reads_local_files(loaded, data):
    (line, *_), _ = evaluate(loaded, ["arc_easy"], data=data, limit=5, shots=2)
    assert (line.label, line.shots, line.documents) == ("arc_easy", 2, 5)


def test_a_tag_gives_the_figures_of_all_its_tasks(loaded, data):
    arc = data / "allenai" / "ai2_arc"
    shutil.copytree(arc / "ARC-Easy", arc / "ARC-Challenge")
    lines, _ = evaluate(loaded, ["ai2_arc", "arc_easy", "arc_easy"], data=data, limit=4)
    found = [(line.label, line.metric, line.documents) for line in lines]
    tasks = "arc_challenge", "arc_easy"
    of_tag = {(task, metric, 4) for task in tasks for metric in ("acc", "acc_norm")}
    assert set(found[:4]) == of_tag
    assert found[4:] == [("arc_easy", metric, 4) for metric in ("acc", "acc_norm")]  # once


def test_every_suite_has_its_metrics_and_their_mean(loaded, data, monkeypatch):
    """Also of what two suites ask for, which is asked once."""
    by_length, plain = (
        Entry("arc_easy", f"{metric},none", metric, averaged=True) for metric in ("acc_norm", "acc")
    )
    monkeypatch.setitem(tasks.SUITES, "both", (by_length, plain))
    monkeypatch.setitem(tasks.SUITES, "one", (plain,))
    lines, _ = evaluate(loaded, ["both", "one", "both"], data=data)
    first, second, of_both, of_one = lines
    assert (first.metric, second.metric) == ("acc_norm", "acc")
    assert (of_both.label, of_both.metric) == (AVERAGE, "both, mean of 2")
    assert of_both.value == pytest.approx((first.value + second.value) / 2)
    errors = first.standard_error, second.standard_error
    assert of_both.standard_error == pytest.approx(math.hypot(*errors) / 2)
    assert (of_one.label, of_one.metric, of_one.parts) == (AVERAGE, "one, mean of 1", ("acc",))
    assert of_one.value == second.value


def test_suites_are_those_of_the_papers():
    known = {*tasks._harness_tasks().all_tasks, *answered_tasks()}
    assert {entry.task for suite in SUITES.values() for entry in suite} <= known
    for name, row in PUBLISHED.items():
        values = [row[e.label] for e in SUITES["commonsense"] if e.label in row]
        if values:
            assert np.mean(values) == pytest.approx(row[AVERAGE], abs=0.06), name


@pytest.mark.parametrize(
    ("size", "name"),
    [
        ("125m", "MobileLLM-125M"),
        ("ls-350m", "MobileLLM-LS-350M"),
        ("r1-140m", "MobileLLM-R1-140M-base"),
        ("r1-950m", "MobileLLM-R1-950M-base"),
        ("1.5b", "MobileLLM-600M"),
    ],
)
def test_the_published_row_is_that_of_the_size(size, name):
    assert nearest_published(preset(f"mobilellm-{size}"), ["average"]) == name


def test_the_published_row_knows_what_was_measured():
    model = preset("mobilellm-r1-360m")
    assert nearest_published(model, ["MATH-500", "GSM8K", "MBPP"]) == "MobileLLM-R1-360M-base"
    final = ["MATH-500", "GSM8K", "LiveCodeBench", "AIME'24"]
    assert nearest_published(model, final) == "MobileLLM-R1-360M"
    assert nearest_published(model, ["something"]) is None


def test_the_table():
    lines = [
        Line("ARC-e", 0, "acc_norm", 0.41, 0.01, 2376),
        Line("own", 3, "f1", 0.5, math.nan),
    ]
    text = table(lines, preset("mobilellm-125m"))
    assert "| ARC-e | 0 | acc_norm | 0.4100 | 0.0100 | 2,376 | 0.439 |" in text
    assert "| own | 3 | f1 | 0.5000 |  |  |  |" in text
    assert "MobileLLM" not in table(lines[1:], preset("mobilellm-125m"))


def test_averages_stand_beside_those_of_the_same_tasks():
    """Suites average other tasks than the papers of the published networks; those know them or not."""

    def last_row(suite, network):
        parts = tuple(entry.label for entry in SUITES[suite] if entry.averaged)
        lines = [Line(label, 0, "acc", 0.4, 0.01) for label in parts]
        lines.append(Line(AVERAGE, 0, f"{suite}, mean", 0.4, 0.01, parts=parts))
        text = table(lines, preset(network))
        return text.splitlines()[-1].split("|")[-2].strip()

    assert last_row("commonsense", "mobilellm-125m") == "0.463"
    seven = (43.9 + 27.1 + 65.3 + 42.4 + 38.9 + 39.5 + 53.1) / 700
    assert last_row("adapt_pruner", "mobilellm-125m") == f"{seven:.3f}" == "0.443"
    assert last_row("commonsense", "mobilellm-r1-360m") == "0.510"
    assert last_row("adapt_pruner", "mobilellm-r1-360m") == ""


def test_a_network_is_judged_wherever_it_is_kept(loaded, data, tmp_path):
    """As a folder of Hugging Face's too; without its tokenizer it is told what is missing."""
    huggingface.export(flat(loaded.params), loaded.model, loaded.tokenizer, tmp_path / "hf")
    lines, _ = evaluate(stored.load_model(tmp_path / "hf"), ["sums"], data=data)
    assert lines == evaluate(loaded, ["sums"], data=data)[0]
    for file in (tmp_path / "hf").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match=r"hf has no tokenizer: put its tokenizer.json"):
        stored.load_model(tmp_path / "hf")
    weights = flat(jax.device_get(loaded.params))
    write_model(weights, loaded.model, loaded.tokenizer, {}, tmp_path / "ours")
    shutil.rmtree(tmp_path / "ours" / "tokenizer")
    with pytest.raises(UserError, match=r"ours is damaged .*it has no tokenizer: that of another"):
        stored.load_model(tmp_path / "ours")


def test_unknown_tasks_are_told_with_the_nearest(loaded):
    with pytest.raises(UserError, match="no suite or task 'arc_eazy'; near are arc_easy"):
        evaluate(loaded, ["arc_eazy"])
    with pytest.raises(UserError, match="near are commonsense"):
        evaluate(loaded, ["comonsense"])


def test_what_is_asked_and_is_not_there_is_told_before_a_network_is_loaded(tmp_path):
    def load():
        raise AssertionError("loaded")

    nowhere = tmp_path / "nowhere"
    with pytest.raises(UserError, match=f"--data={nowhere} is not a folder"):
        evaluate(load, [], data=nowhere)
    with pytest.raises(UserError, match="no suite or task 'nothing_like_it'"):
        evaluate(load, ["nothing_like_it"])
    with pytest.raises(UserError, match="nowhere"):
        evaluate(load, [], stores=[str(nowhere / "mixture.json")])


def test_code_is_not_run_unasked(loaded):
    with pytest.raises(UserError, match=r"mbpp, humaneval run programs .* --allow_code"):
        evaluate(loaded, ["r1_base"])


def test_code_is_not_run_unasked_whatever_names_it(loaded, tmp_path):
    """A task that no suite says it of, by its own word: here the harness's HumanEval."""
    folder = tmp_path / "openai" / "openai_humaneval"
    folder.mkdir(parents=True)
    problem = {"task_id": "0", "prompt": "def f():\n", "canonical_solution": "    return 1\n"}
    problem |= {"test": "def check(f):\n    assert f() == 1\n", "entry_point": "f"}
    (folder / "test.jsonl").write_text(json.dumps(problem) + "\n")
    with pytest.raises(UserError, match="humaneval run programs .* --allow_code"):
        evaluate(loaded, ["humaneval"], data=tmp_path)
    (line,), _ = evaluate(loaded, ["humaneval"], data=tmp_path, allow_code=True)
    assert (line.metric, line.documents, line.value) == ("pass@1 (create_test)", 1, 0.0)


def test_code_that_no_sandbox_holds_is_not_run(loaded, tmp_path):
    """CRUXEval starts processes itself."""
    folder = tmp_path / "cruxeval-org" / "cruxeval"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text(json.dumps(dict.fromkeys(("code", "input", "output"), "1")))
    with pytest.raises(UserError, match="cruxeval_input runs programs .* the sandbox"):
        evaluate(loaded, ["cruxeval_input"], data=tmp_path, allow_code=True)


def test_a_data_set_that_is_nowhere_is_told_with_where_to_put_it(loaded, data, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"allenai/ai2_arc/ARC-Challenge .*\(no network\).*--data="):
        evaluate(loaded, ["arc_challenge"], data=data)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '{"query": "a", "choices": ["b"], "gold": 0}\n{"query": "a"}\n',
            "line 2, is not like the first",
        ),
        ('{"query": "a", "choices": ["b"], "gold": 0}\n{"query\n', "not JSON"),
        (
            '{"query": "", "choices": [], "gold": 0}\n{"query": "", "choices": [], "gold": 1}\n',
            "names none",
        ),
        ('{"query": "1 + 1", "choices": [1, 2], "gold": 1}\n', "line 1, .*is no text, or empty"),
        ('{"query": "a", "choices": "bc", "gold": 1}\n', "line 1, .*its choices are no list"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 0.5}\n', "line 1, .*gold=0.5 names none"),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}\n', "line 1, .*gold=True names none"),
        ('{"query": ["a"], "choices": ["b"], "gold": 0}\n', "line 1, .*what it asks is no text"),
        ('{"question": {"a": 1}, "answer": 1}\n', "line 1, .*what it asks is no text"),
        ('{"question": "a", "answer": [1]}\n', "line 1, .*neither text nor number"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_damaged_questions_are_told(tmp_path, text, said):
    (tmp_path / "mine.jsonl").write_text(text)
    with pytest.raises(UserError, match=said):
        local_tasks(tmp_path)


def test_a_cut_archive_is_told(tmp_path):
    whole = gzip.compress(b'{"query": "a", "choices": ["b"], "gold": 0}\n' * 1000)
    (tmp_path / "mine.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"mine.jsonl.gz cannot be read"):
        local_tasks(tmp_path)
    (tmp_path / "mine.jsonl.gz").write_bytes(whole[:10] + b"\xff" + whole[11:])  # no such block
    with pytest.raises(UserError, match=r"mine.jsonl.gz cannot be read"):
        local_tasks(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        local_tasks(tmp_path / "nothing")


def test_the_patch_ends_with_the_block(data):
    before = datasets.load_dataset
    with local_datasets(data):
        assert datasets.load_dataset is not before
    assert datasets.load_dataset is before
