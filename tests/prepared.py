"""Small corpora, and what `prepare` made of them."""

import json
import os
import pathlib
import random

import numpy as np

from mobilellm_jax.data.corpora import FileCorpus
from mobilellm_jax.prepare import prepare

WORDS = "the model reads small rows of text and learns to share its blocks naïvely 😀".split()


def write_corpus(path, seed, count=400):
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(1, 60))) + f" {i}\n" for i in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[1])}  # of programs


def two_corpora(folder):
    """Of 400 and 200 documents, `a` and `b`."""
    write_corpus(folder / "a.jsonl", 1)
    write_corpus(folder / "b.jsonl", 2, 200)
    return [FileCorpus(name, f"{folder}/{name}.jsonl", heldout=0.1) for name in "ab"]


def run(corpora, out, **options):
    return prepare(corpora, out, **{"row_length": 32, "vocab_size": 320, "workers": 1, **options})


def stream(rows):
    """The tokens of a concatenated split, without the overlap of its rows."""
    tokens = rows.read(np.arange(len(rows)))
    return np.concatenate([tokens[:1, 0], tokens[:, 1:].ravel()])


def decoded(rows, tokenizer):
    """The documents of a concatenated split."""
    tokens = stream(rows)
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.bos_id))
    return [tokenizer.decode(part) for part in parts if len(part) > 1]


def contents(out):
    """Every file below a directory, with its bytes."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
