"""From text to an exported network with a tokenizer.json, one whose BOS is also its EOS."""

import contextlib
import io
import json

import numpy as np
import pytest
import runs
import tiny
import tokenizer_files
import weights

import mobilellm_jax
from mobilellm_jax.data.corpora import FileCorpus
from mobilellm_jax.data.opening import open_mixture
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.prepare import prepare
from mobilellm_jax.report import report

EMBEDDINGS = 608  # more than the 600 tokens, as published networks have


@pytest.fixture(scope="module")
def made(tmp_path_factory, shared_programs):
    """Folder of the tokenizer, plan, and workdir of a run that was stopped and went on."""
    base = tmp_path_factory.mktemp("made")
    folder = tokenizer_files.qwen2_folder(base / "tokenizer")
    sentences = [
        f"{' '.join(text.split()[: 3 + i % 30])}."
        for i, text in enumerate(tiny.documents("words", 900))
    ]
    (base / "words.jsonl").write_text("\n".join(json.dumps({"text": s}) for s in sentences))
    corpus = FileCorpus("words", f"{base}/words.jsonl", heldout=0.2)
    options = {"tokenizer": folder, "packing": "best_fit", "workers": 1}
    prepare([corpus], base / "data", tiny.ROW, **options)
    config = tiny.unshared(base / "data/mixture.json", steps=100)
    config.model.vocab_size = EMBEDDINGS
    runs.run(config, base / "run", stop_at=10)
    runs.run(config, base / "run")
    return folder, base / "data/mixture.json", base / "run"


def test_training_counts_all_of_the_documents(made):
    folder, plan, workdir = made
    tokenizer, steps = Tokenizer.load(folder), runs.lines(workdir)
    assert tokenizer.bos_id == tokenizer.eos_id
    assert sorted(steps) == list(range(1, 101))
    stream = open_mixture(Plan.load(plan), tiny.ROW, EMBEDDINGS)
    sizes, bos = tokenizer.piece_bytes(), tokenizer.bos_id
    ends = 0
    for step, recorded in steps.items():
        rows = stream.read(np.arange(16 * step - 16, 16 * step))["tokens"].tolist()
        pairs = [pair for row in rows for pair in zip(row, row[1:], strict=False)]
        targets = [b for a, b in pairs if a != bos or b != bos]
        assert recorded["tokens/words"] == len(targets)
        bits = recorded["loss/words"] * len(targets) / sizes[targets].sum() / np.log(2)
        assert recorded["bits_per_byte/words"] == pytest.approx(bits, rel=1e-5)
        ends += targets.count(tokenizer.eos_id)
    assert ends > 500


def test_the_end_of_a_document_is_learned(made):
    """Every document ends after its only full stop."""
    model, params, tokenizer = mobilellm_jax.load(made[2])
    ids = [tokenizer.bos_id, *tokenizer.encode("the model reads small rows.")]
    logits_TV = np.asarray(weights.logits(params, model, np.array([ids]))[0], np.float64)
    p_TV = np.exp(logits_TV) / np.exp(logits_TV).sum(-1, keepdims=True)
    assert p_TV[-1, tokenizer.eos_id] > 0.5
    assert p_TV[:-1, tokenizer.eos_id].max() < 0.1
    assert p_TV[:, tokenizer.vocab_size :].sum(-1).max() < 0.01  # embeddings without a token


def test_the_checkpoint_is_all_that_generation_needs(made):
    folder, _, workdir = made
    model, _, tokenizer = mobilellm_jax.load(workdir)
    assert tokenizer == Tokenizer.load(folder) and model.vocab_size == EMBEDDINGS
    arguments = f"--checkpoint={workdir}", "--prompt=the model", "--max_new_tokens=50", "--seed=3"
    first, second = (runs.program("mobilellm_jax.generate", *arguments) for _ in range(2))
    assert first.status == 0 and first.out == second.out
    assert first.out.startswith("the model ") and len(first.out) > 20
    assert "<|" not in first.out
    long = runs.program("mobilellm_jax.generate", *arguments[:2], "--max_new_tokens=9999")
    assert (long.status, long.out) == (1, "") and "9999 new ones" in long.err


def test_the_report_has_baselines_and_samples(made):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        page = report(made[2]).read_text()
    (line,) = [line for line in printed.getvalue().splitlines() if line.startswith("words")]
    scores = [float(score) for score in line.split()[-4:]]
    assert all(0 < score < 10 for score in scores), line
    assert "Held-out text, continued" in page and "cannot be read" not in page


def test_it_is_exported_with_the_tokenizer_it_came_with(made, tmp_path):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    folder, _, workdir = made
    out = tmp_path / "hf"
    done = runs.program(
        "mobilellm_jax.convert", f"--checkpoint={workdir}", "--to=hf", f"--out={out}"
    )
    assert done.status == 0, done.err
    for file in folder.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()
    model, params, tokenizer = mobilellm_jax.load(workdir)
    published, exported = (transformers.AutoTokenizer.from_pretrained(f) for f in (folder, out))
    assert exported.chat_template == published.chat_template == tokenizer.chat_template
    text = "the model learns\tto share  its blocks."
    ids = exported(text, add_special_tokens=False)["input_ids"]
    assert ids == published(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    ids = [tokenizer.bos_id, *ids]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert theirs.config.vocab_size == EMBEDDINGS
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
    )
    with torch.no_grad():
        theirs_TV = theirs(torch.tensor([ids])).logits[0].numpy()
    ours_TV = np.asarray(weights.logits(params, model, np.array([ids]))[0])
    assert np.abs(ours_TV - theirs_TV).max() < 1e-4
    # And back: the folder is a network of ours with the same tokenizer.
    again = mobilellm_jax.load(out)
    assert again[0].vocab_size == EMBEDDINGS
    assert again[2].fingerprint == tokenizer.fingerprint
