r"""Pruning inside of training against its rivals, in small: same source, same data, same tokens.

The source is `configs/adapt_pruner.py:small`, 12 blocks x 96, 1.42M parameters; all arms come to half of
its parameters and read 400 steps of 512 tokens where nothing else is said.

| row              | what                                                              | FLOPs |
|------------------|-------------------------------------------------------------------|-------|
| dense            | the source, trained on, nothing cut                               | 1     |
| adapt            | Adapt-Pruner, 20 cuts while it trains                             | 1     |
| adapt-once       | Adapt-Pruner in one shot, then trained                            | 0.5   |
| llm_pruner-once  | LLM-Pruner likewise                                               | 0.5   |
| random-once      | all layers alike by lot, likewise                                 | 0.5   |
| efficient-a      | EfficientLLM, 75 cuts in the first 65 % of the steps              | 1     |
| efficient-b      | the same with the local second-order update                       | 1+    |
| efficient-once   | EfficientLLM's choice in one shot, then trained                   | 0.5   |
| scratch-1, 2, 4  | the shape of adapt-once from random weights, so many times longer | 0.5 n |
| scratch-8 to 64  | the same, `longer`: until it is where adapt-once is               | 0.5 n |
| distilled        | that shape from random weights, with the source as its teacher    | 1     |
| cuts-25, 100     | efficient-a whose cuts take that share of the steps               | 1     |

A step that prunes costs what the whole network costs, because what is dead is only zero (`compact_at`
would spare a part). Held-out bits per byte per source, three seeds (`make pruning`, two hours on 2 cores):

    python -m mobilellm_jax.train --config=configs/pruning_study.py:source --config.plan=PLAN \
      --workdir=runs/pruning/source
    python -m mobilellm_jax.prune --checkpoint=runs/pruning/source --plan=PLAN --rounds=20 \
      --strategy=adapt --target_params=50% --out=runs/pruning/adapt
    (likewise llm_pruner:protect=(1,1), random and efficient)
    python -m mobilellm_jax.sweep --sweep=configs/pruning_study.py:PLAN --workdir=runs/pruning/arms

Then the claim about shapes alone: networks of random weights, equal parameters, 800 steps.

    python -m mobilellm_jax.sweep --sweep=configs/pruning_study.py:shapes,PLAN --workdir=runs/pruning/shapes

And how often a small network must read to come to where the pruned one is (hours):

    python -m mobilellm_jax.sweep --sweep=configs/pruning_study.py:longer,PLAN --workdir=runs/pruning/longer
"""

import dataclasses

from ml_collections import ConfigDict

from configs import adapt_pruner
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.stored import open_model
from mobilellm_jax.model.config import ModelConfig, Stack, flops_per_token, parameter_count
from mobilellm_jax.sweeps.description import Line, Sweep, Table
from mobilellm_jax.training.config import base_config

PLAN, FOLDER = "data/pruning/mixture.json", "runs/pruning"
ROW, ROWS, STEPS, SOURCE_STEPS = 256, 2, 400, 4_000
TARGET = parameter_count(adapt_pruner.SMALL) // 2
ONE_SHOT = ("adapt", "llm_pruner", "random", "efficient")
SHARES = (25, 100)  # of the steps, that the cuts take; 65 is efficient-a
TIMES, LONGER = (1, 2, 4), (8, 16, 32, 64)  # the steps of the arms, from random weights
EFFICIENT = "mobilellm_jax.pruning.efficient:efficient"
# By hand, of MobileLLM's proportions: as deep as the source, thin, half of its parameters.
BY_HAND = dataclasses.replace(adapt_pruner.SMALL, width=64, stacks=(Stack(12, 4, 2, 184),))


def get_config(argument: str = "source") -> ConfigDict:
    """The configuration of `source`, or of an arm of the study by its row.

    Raises:
      UserError: there is no such row.
    """
    if argument == "source":
        c = adapt_pruner.get_config("small")
        c.steps = SOURCE_STEPS
        return c
    rows = _rows(PLAN)
    if argument not in rows:
        raise UserError(
            f"configs/pruning_study.py:{argument} is neither source nor one of {', '.join(rows)}."
        )
    return rows[argument]


def get_sweep(argument: str) -> Sweep:
    """The arms, or, after `shapes`, the shapes alone, or, after `longer`, longer and longer runs.

    Args:
      argument: path of the plan, by default that of `make pruning`; `shapes,` or `longer,` may stand
        before it.
    """
    first, _, rest = argument.partition(",")
    if first in OTHERS:
        return OTHERS[first](rest or PLAN)
    return Sweep(
        _rows(argument or PLAN),
        (
            Table(
                "Between and inside of training, at equal tokens",
                (
                    Line("adapt-once", "Adapt-Pruner, one shot, then trained"),
                    Line("adapt", "Adapt-Pruner, interleaved", "adapt-once"),
                    Line("llm_pruner-once", "LLM-Pruner, one shot, then trained", "adapt-once"),
                    Line("random-once", "by lot, one shot, then trained", "adapt-once"),
                    Line(
                        "efficient-once",
                        "EfficientLLM's choice, one shot, then trained",
                        "adapt-once",
                    ),
                    Line("efficient-a", "EfficientLLM A, while it trains", "efficient-once"),
                    Line("efficient-b", "EfficientLLM B, while it trains", "efficient-a"),
                    Line("dense", "nothing cut", "adapt"),
                ),
            ),
            Table(
                "The same shape from random weights",
                (
                    Line("adapt-once", "Adapt-Pruner, one shot, then trained"),
                    *(
                        Line(f"scratch-{n}", f"random weights, {n} x the tokens", "adapt-once")
                        for n in TIMES
                    ),
                ),
            ),
            Table(
                "At equal FLOPs, a step that prunes at its full cost",
                (
                    Line("scratch-2", "random weights"),
                    Line("distilled", "random weights, the source as teacher", "scratch-2"),
                    Line("adapt", "Adapt-Pruner, interleaved", "scratch-2"),
                    Line("efficient-a", "EfficientLLM A", "scratch-2"),
                ),
            ),
            Table(
                "Share of the steps in which EfficientLLM cuts, all else equal",
                (
                    Line("efficient-once", "none: one shot, then trained"),
                    Line("cuts-25", "25 %", "efficient-once"),
                    Line("efficient-a", "65 %", "efficient-once"),
                    Line("cuts-100", "100 %", "efficient-once"),
                ),
            ),
        ),
    )


def _rows(plan: str) -> dict[str, ConfigDict]:
    small = open_model(f"{FOLDER}/adapt").model
    rows = {"dense": _continued(plan), "adapt": _continued(plan)}
    rows["adapt"].pruning.target = TARGET
    rows["adapt"].pruning.spacing = "growing"
    for name in ONE_SHOT:
        rows[f"{name}-once"] = _continued(plan, name)
    for name, share, update in (
        ("efficient-a", 65, False),
        ("efficient-b", 65, True),
        *((f"cuts-{share}", share, False) for share in SHARES),
    ):
        c = rows[name] = _continued(plan)
        c.model.dead_channels = True
        c.pruning.target, c.pruning.begin, c.pruning.cuts = TARGET, 5, 75
        c.pruning.end = STEPS * share // 100
        with c.unlocked():
            c.pruning.strategy = {"use": EFFICIENT, "update": update}
        c.pruning.compact_at = (TARGET,)
    rows |= _scratch(plan, TIMES)
    flops = [flops_per_token(model, ROW) for model in (adapt_pruner.SMALL, small)]
    c = rows["distilled"] = _config(
        small, plan, round(STEPS * flops[0] / (flops[1] + flops[0] / 3))
    )
    c.teacher.path = f"{FOLDER}/source"
    with c.unlocked():
        c.objective = {
            "use": "mobilellm_jax.training.distillation:distillation",
            "temperature": 1.0,
            "labels": 0.0,
            "reverse": 0.0,
        }
    return rows


def _shapes(plan: str) -> Sweep:
    found = open_model(f"{FOLDER}/arms/efficient-a-s0").model
    models = {
        "by-hand": BY_HAND,
        "efficient": dataclasses.replace(found, dead_channels=False),
        "adapt": open_model(f"{FOLDER}/adapt").model,  # as scratch-2
    }
    labels = {
        "by-hand": "MobileLLM's proportions, by hand",
        "efficient": "the shape that EfficientLLM A came to",
        "adapt": "the widths that Adapt-Pruner came to",
    }
    lines = (
        Line(
            name,
            f"{label}, {parameter_count(models[name]):,}",
            "" if name == "by-hand" else "by-hand",
        )
        for name, label in labels.items()
    )
    rows = {name: _config(model, plan, 2 * STEPS) for name, model in models.items()}
    return Sweep(rows, (Table("Shapes alone, from random weights", tuple(lines)),))


def _longer(plan: str) -> Sweep:
    lines = (Line(f"scratch-{n}", f"random weights, {n} x the tokens") for n in LONGER)
    table = Table("The same shape from random weights, trained for longer", tuple(lines))
    return Sweep(_scratch(plan, LONGER), (table,))


def _scratch(plan: str, times: tuple[int, ...]) -> dict[str, ConfigDict]:
    small = open_model(f"{FOLDER}/adapt").model
    return {f"scratch-{n}": _config(small, plan, n * STEPS) for n in times}


OTHERS = {"shapes": _shapes, "longer": _longer}


def _config(model: ModelConfig, plan: str, steps: int) -> ConfigDict:
    """A run from random weights."""
    c = base_config(model)
    c.plan = plan
    c.row_length = ROW
    c.first_row = 4 * SOURCE_STEPS  # which the source has read
    c.steps = steps
    c.global_batch = ROWS
    c.execution.dtype = "float32"
    c.loss_chunks = 4
    c.schedule.peak = 4e-3
    c.schedule.warmup_steps = 40
    c.schedule.floor = 0.0
    c.eval.every = STEPS
    c.eval.rows = 64
    c.checkpoint.every = STEPS
    c.checkpoint.keep = 1
    return c


def _continued(plan: str, name: str = "source") -> ConfigDict:
    """A run from trained weights."""
    start = f"{FOLDER}/{name}"
    c = _config(open_model(start).model, plan, STEPS)
    c.init_from = start
    c.schedule.peak = 1e-3
    return c
