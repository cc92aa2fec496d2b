"""Measures of text against sums by hand: windows, rows of a store, the rank of the output embedding."""

import dataclasses
import json
import math
import types

import jax
import numpy as np
import pytest
import tiny
from runs import lines, run

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from mobilellm_jax.data.rows import open_rows
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluate import evaluate
from mobilellm_jax.model import transformer
from mobilellm_jax.training.checkpoint import load_model
from mobilellm_jax.training.evaluation import rank_me


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run(tiny.config(tiny.corpus(folder / "data"), steps=40), folder / "run")
    return load_model(folder / "run"), folder


def likelihoods(loaded, row):
    """Of each token of a row but the first, alone and without a cache: float64."""
    padded = np.zeros((1, 128), np.int32)  # behind the row, where nothing sees it
    padded[0, : len(row) - 1] = row[:-1]
    log_TV = np.asarray(log_probabilities(loaded.params, padded), np.float64)
    return log_TV[np.arange(len(row) - 1), row[1:]]


@jax.jit
def log_probabilities(params, tokens_BT):
    hidden_BTD = transformer.apply(params, tiny.MODEL, tokens_BT)
    return jax.nn.log_softmax(transformer.logits(params, tiny.MODEL, hidden_BTD))[0]


@pytest.mark.slow
def test_windows_are_those_of_the_official_program(trained, tmp_path):
    """One BOS for all the text, windows that do not overlap, a remainder that is left out."""
    loaded, _ = trained
    texts = tiny.documents("words", 30, 9)
    folder = tmp_path / "Salesforce" / "wikitext" / "wikitext-2-raw-v1"
    folder.mkdir(parents=True)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "test.jsonl").write_text(rows)
    (line,), _ = evaluate(loaded, ["wikitext2"], data=tmp_path)
    ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode("\n\n".join(texts))]
    window = loaded.model.max_length  # below 2,048
    cut = [ids[i : i + window] for i in range(0, len(ids) - window + 1, window)]
    losses = [-likelihoods(loaded, row).mean() for row in cut]
    assert len(ids) % window and len(losses) > 3
    assert line.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    error = np.std(losses, ddof=1) / len(losses) ** 0.5
    assert line.standard_error == pytest.approx(line.value * error, rel=1e-3)
    assert (line.documents, line.metric) == (len(losses), "perplexity, windows of 128")


def test_rows_of_a_store_cost_what_training_says(trained):
    """Its own held-out measurement, of sources alone and of a plan, with the error of a ratio."""
    loaded, folder = trained
    both, _ = evaluate(loaded, [], stores=[str(folder / "data" / "mixture.json")])
    told = lines(folder / "run", "heldout")[40]
    of = {line.label: line for line in both}
    split = open_rows(folder / "data" / "sums", "heldout")
    assert of["sums"].documents == len(split)
    limited, _ = evaluate(loaded, [], stores=[str(folder / "data" / "words")], limit=20)
    assert limited[0].value == pytest.approx(told["bits_per_byte/words"], rel=1e-5)
    sized, tokenizer = tiny.tokenizer().piece_bytes(), loaded.tokenizer
    bits, size = [], []
    for row in split.read(np.arange(len(split))):
        begins = [*np.flatnonzero(row == tokenizer.bos_id), len(row)]
        parts = [row[a:b].tolist() for a, b in zip(begins, begins[1:], strict=False) if b - a > 1]
        bits.append(sum(-likelihoods(loaded, part).sum() for part in parts) / math.log(2))
        size.append(sum(sized[part[1:]].sum() for part in parts))
    bits, size = np.array(bits), np.array(size)
    value = bits.sum() / size.sum()
    assert of["sums"].value == pytest.approx(value, rel=1e-4)
    rng = np.random.default_rng(0)
    picks = rng.integers(0, len(bits), (4000, len(bits)))
    spread = (bits[picks].sum(1) / size[picks].sum(1)).std()
    assert of["sums"].standard_error == pytest.approx(spread, rel=0.1)


def test_what_cannot_be_measured_is_told(trained, tmp_path):
    loaded, folder = trained
    store = str(folder / "data" / "sums")
    known = {"bos_id": 1, "eos_id": 2, "piece_bytes": tiny.tokenizer().piece_bytes}
    tokenizer = types.SimpleNamespace(**known, fingerprint="another one")
    other = dataclasses.replace(loaded, tokenizer=tokenizer)
    with pytest.raises(UserError, match="tokenized by another tokenizer"):
        evaluate(other, [], stores=[store])
    folder = tmp_path / "Salesforce" / "wikitext" / "wikitext-2-raw-v1"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text('{"text": "short"}\n')
    with pytest.raises(UserError, match="has no window of 128"):
        evaluate(loaded, ["wikitext2"], data=tmp_path)
    with pytest.raises(UserError, match=f"wikitext2, rank_me, {store}: these need --ch"):
        evaluate("a server", ["wikitext2", "rank_me"], data=tmp_path, stores=[store])


@pytest.mark.parametrize("tied", [True, False])
def test_rank_me_is_that_of_the_singular_values(tied):
    model = dataclasses.replace(tiny.MODEL, tied=tied)
    params = transformer.init(model, jax.random.key(1))
    matrix = params["embedding"] if tied else params["head"]
    singular = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
    share = singular / singular.sum() + 1e-7
    expected = math.exp(-(share * np.log(share)).sum())
    assert rank_me(params, model) == pytest.approx(expected, rel=1e-4)
    assert 25 < expected < 32  # of a random matrix, of width 32


def test_rank_me_of_known_matrices(trained):
    model = tiny.MODEL
    flat = np.outer(np.arange(1.0, 321), np.ones(32))
    assert rank_me({"embedding": flat.astype(np.float32)}, model) == pytest.approx(1, abs=0.01)
    ones = np.tile(np.eye(32), (10, 1)).astype(np.float32)
    assert rank_me({"embedding": ones}, model) == pytest.approx(32, rel=1e-4)
    loaded, folder = trained
    (line,), _ = evaluate(loaded, ["rank_me"])
    assert line.value == pytest.approx(lines(folder / "run", "heldout")[40]["rank_me"], rel=1e-6)
