"""Texts with copies among them, and what `clean` left of them."""

import gzip
import importlib.util
import itertools
import json

import pyarrow
import pytest

from mobilellm_jax.data.corpora import FileCorpus

WORDS = [
    f"{a}{b}" for a, b in itertools.product("ba ko mi zu re".split(), "lan tor pes vik um".split())
]
WORDS += [f"{a}{b}" for a, b in itertools.product(WORDS, "s ed ing er".split())]

needs_datatrove = pytest.mark.skipif(
    not importlib.util.find_spec("datatrove"), reason="needs mobilellm-jax[clean]"
)


def text_of(rng, length=120):
    return " ".join(rng.choices(WORDS, k=length))


def edited(text, rate, rng):
    """The text with a share of its words replaced."""
    return " ".join(
        rng.choice(WORDS) + "x" if rng.random() < rate else word for word in text.split()
    )


def write_lines(path, texts):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt") as file:
        for number, text in enumerate(texts):
            record = text if isinstance(text, dict) else {"id": f"d{number}", "text": text}
            file.write(json.dumps(record) + "\n")
    return path


def corpus(tmp_path, texts, files=1, **options):
    for i in range(files):
        write_lines(tmp_path / f"in{i}.jsonl", texts[i::files])
    return FileCorpus("web", f"{tmp_path}/in*.jsonl", heldout=0, **options)


def left(out):
    """What was written, as the records are."""
    found = []
    for path in sorted(out.glob("*.jsonl.zst")):
        with pyarrow.CompressedInputStream(str(path), "zstd") as file:
            found += map(json.loads, file.read().splitlines())
    return found


def contents(out):
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def mixed(rng, count=150):
    """Texts with copies, near copies and an evaluation item among them, and the item."""
    item = "What did the baker's youngest daughter sell at the market on the last day of winter?"
    texts = [text_of(rng) for _ in range(count)]
    texts += rng.choices(texts, k=20)
    texts += [edited(text, 0.01, rng) for text in rng.sample(texts[:count], 10)]
    texts += [f"{text_of(rng, 20)} {item.upper()} {text_of(rng, 20)}"]
    rng.shuffle(texts)
    return texts, {"question": item, "answer": "bread"}
