"""What co-evolution begins with in tests: sources, probes and a run of seconds."""

import dataclasses

import mixing
import runs
import tiny

from data_mixing.scorers import Settings
from data_mixing.stages import Choices, Given
from mobilellm_jax.data.plan import Plan

CAPABILITIES = {"math": ("sums",), "language": ("words",)}
BASE, STEPS = 90, 12  # steps of the run to begin with, and of a stage


def coevolving(folder):
    """(what is given, workdir of the run to begin with): two sources that help, and one of noise."""
    sums, words = (tiny.documents(kind, 250) for kind in ("sums", "words"))
    noise = mixing.shuffled((sums + words)[::2], 0)
    plan = mixing.sources(folder, {"sums": sums, "words": words, "noise": noise})
    config = tiny.config("", STEPS)
    config.eval.every = config.checkpoint.every = STEPS
    known = Plan.from_dict(
        {
            **plan.to_dict(),
            "sources": [dataclasses.asdict(s) for s in plan.sources[:2]],
            "stages": [{"name": "a", "tokens": None, "weights": {"sums": 0.5, "words": 0.5}}],
        },
        "",
    )
    known.save(folder / "data" / "known.json")
    base = tiny.config(folder / "data" / "known.json", BASE)
    base.eval.every = base.checkpoint.every = BASE
    runs.run(base, folder / "base")
    found = Given(
        config,
        plan,
        mixing.probes(folder, CAPABILITIES),
        Choices(rows=60, train_rows=16),
        Settings("output", batch_rows=16, own_gradients=2),
        tiny.one_device(),
    )
    return found, folder / "base"
