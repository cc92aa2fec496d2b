"""A corpus of two sources, a plan, a network and a configuration, small enough to train in a second."""

import functools
import json
import random
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from mobilellm_jax.data.packing import BestFit, Concat
from mobilellm_jax.data.plan import Plan, PlanSource, Stage
from mobilellm_jax.data.rows import SourceInfo
from mobilellm_jax.data.sentencepiece_tokenizer import train_tokenizer
from mobilellm_jax.data.shards import Batch, write_source
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.model.config import ModelConfig, Stack
from mobilellm_jax.training.config import base_config

ROW = 32
VOCAB = 320
MODEL = ModelConfig(VOCAB, 32, (Stack(2, 4, 2, 48, repeats=2),), head_dim=8, max_length=128)


def documents(kind: str, count: int, seed: int = 0) -> list[str]:
    """Sums (`kind="sums"`) or sentences, of very different lengths."""
    rng = random.Random(f"{kind}{seed}")
    words = "the model reads small deep thin rows of text and learns to share its blocks".split()
    out = []
    for _ in range(count):
        if kind == "sums":
            pairs = [(rng.randrange(50), rng.randrange(50)) for _ in range(rng.randrange(1, 8))]
            out.append("\n".join(f"{a} + {b} = {a + b}" for a, b in pairs))
        else:
            out.append(" ".join(rng.choice(words) for _ in range(rng.randrange(3, 60))) + ".")
    return out


@functools.cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(documents("sums", 200) + documents("words", 200), VOCAB)


def corpus(
    directory: Path, row_length: int = ROW, weights: tuple[float, float] = (0.7, 0.3)
) -> Path:
    """Writes the corpus below `directory` and returns the path of its plan."""
    model = tokenizer()
    directory.mkdir(parents=True, exist_ok=True)
    model.write(directory)
    for kind, packer_of in (("words", Concat), ("sums", BestFit)):
        batches = []
        for split, count, seed in (("train", 300, 1), ("heldout", 40, 2)):
            packer = packer_of(row_length, model.bos_id, model.eos_id)
            texts = documents(kind, count, seed)
            ids = [np.array(model.encode(text), np.int32) for text in texts]
            rows = np.concatenate([packer.add(ids).rows, packer.finish().rows])
            size = sum(len(text.encode()) for text in texts)
            batches.append(Batch(split, rows, count, size, sum(map(len, ids)) + 2 * count))
        info = SourceInfo(
            kind,
            "",
            row_length,
            model.vocab_size,
            model.bos_id,
            model.fingerprint,
            packer_of.__name__,
            {},
        )
        write_source(directory / kind, info, {}, batches)
    sources = tuple(PlanSource(kind, kind) for kind in ("words", "sums"))
    stage = Stage("train", None, dict(zip(("words", "sums"), weights, strict=True)))
    plan = Plan(sources, (stage,), "tokenizer.model", model.fingerprint)
    plan.save(directory / "mixture.json")
    return directory / "mixture.json"


def tasks(folder: Path) -> None:
    """Files of questions and of problems to answer: the tasks `sums` and `doubles`."""
    pairs = ((1, 2), (3, 4), (10, 20), (7, 7), (5, 0), (2, 9))
    files = {
        "sums": [
            {"query": f"{a} + {b} =", "choices": [str(a + b), str(a), str(b + 1)], "gold": 0}
            for a, b in pairs
        ],
        "doubles": [{"question": f"{a} + {a}", "answer": str(2 * a)} for a in range(3)],
    }
    for name, records in files.items():
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text)


def config(plan: Path, steps: int = 12) -> ConfigDict:
    """A run of seconds on that plan."""
    c = base_config(MODEL)
    c.plan = str(plan)
    c.row_length = ROW
    c.steps = steps
    c.global_batch = 16
    c.execution.dtype = "float32"
    c.schedule.peak = 1e-2
    c.schedule.warmup_steps = 3
    c.eval.every = 6
    c.eval.rows = 20
    c.checkpoint.every = 4
    c.log_every = 4
    c.max_skipped = 3
    return c


def unshared(plan: Path, steps: int = 12) -> ConfigDict:
    """The same with blocks that are applied once: less to trace, where sharing is not the point."""
    c = config(plan, steps)
    c.model.stacks[0]["repeats"] = 1
    return c


def one_device() -> list[jax.Device]:
    """Of the simulated ones."""
    return jax.devices()[:1]
