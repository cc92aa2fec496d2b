"""Sources, probes and runs of seconds for tests of data_mixing."""

import json
import random
from pathlib import Path

import numpy as np
import runs
import tiny

from data_mixing import probe_sets
from data_mixing.probe_sets import Probe, ProbeSets
from mobilellm_jax.data.corpora import FileCorpus, documents
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.prepare import prepare

HELDOUT = 0.2


def shuffled(texts: list[str], seed: int) -> list[str]:
    """The same characters in an order that says nothing."""
    rng = random.Random(seed)
    return ["".join(rng.sample(text, len(text))) for text in texts]


def sources(directory: Path, texts: dict[str, list[str]], row_length: int = tiny.ROW) -> Plan:
    """Prepares texts by source and returns their plan, all sources alike."""
    for name, found in texts.items():
        lines = [json.dumps({"id": f"{name}-{i}", "text": t}) + "\n" for i, t in enumerate(found)]
        (directory / f"{name}.jsonl").write_text("".join(lines))
    tiny.tokenizer().write(directory)
    corpora = [FileCorpus(name, f"{directory}/{name}.jsonl", heldout=HELDOUT) for name in texts]
    weights = dict.fromkeys(texts, 1 / len(texts))
    tokenizer = directory / "tokenizer.model"
    return prepare(
        corpora, directory / "data", row_length, tokenizer=tokenizer, weights=weights, workers=1
    )


def probes(directory: Path, capabilities: dict[str, tuple[str, ...]]) -> ProbeSets:
    """Held-out documents of prepared sources as probe sets."""
    names = {source for of_one in capabilities.values() for source in of_one}
    found = {}
    for name in sorted(names):
        corpus = FileCorpus(name, f"{directory}/{name}.jsonl", heldout=HELDOUT)
        found[name] = tuple(
            Probe(d.text, name, probe_sets.half_of(d.text), d.id, d.file, d.place)
            for d in documents(corpus)
            if d.split == "heldout"
        )
    return ProbeSets(capabilities, found)


def trained(plan: Plan, workdir: Path, steps: int = 60, seed: int = 0) -> Path:
    """Trains the tiny network on a plan, with checkpoints along the way."""
    config = tiny.config(Path(plan.directory) / "mixture.json", steps)
    config.seed = seed
    config.checkpoint.every = steps // 3
    config.checkpoint.keep = 10
    config.eval.every = steps
    config.schedule.floor = 0.0
    runs.run(config, workdir)
    return workdir


def unigram_bits(rows: np.ndarray, heldout: np.ndarray, bos_id: int) -> float:
    """Nats per token of a unigram model of some rows on others."""
    targets = rows[:, 1:][rows[:, 1:] != bos_id]
    counts = np.bincount(targets, minlength=tiny.VOCAB) + 1
    of = heldout[:, 1:][heldout[:, 1:] != bos_id]
    return float(-np.log(counts[of] / counts.sum()).mean())
