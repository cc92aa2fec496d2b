r"""MobileLLM-R1 as published (arXiv 2509.24945): six stages, from random weights to a reasoner.

| argument | parameters  | blocks | width | heads / KV |
|----------|-------------|--------|-------|------------|
| 140m     | 140,248,512 | 15     | 576   | 9 / 3      |
| 360m     | 359,431,168 | 15     | 1024  | 16 / 4     |
| 950m     | 949,685,760 | 22     | 1536  | 24 / 6     |
| tiny     | 951,424     | 4      | 128   | 2 / 1      |

    python -m mobilellm_jax.train --config=configs/mobilellm_r1.py:140m,pretrain1 \
      --workdir=runs/r1-140m-pretrain1

Each stage starts at the weights of the one before, with moments and schedule of its own;
`launch/r1_recipe.sh --size=140m` runs all of them, and `--size=tiny` a small copy, data and teacher
included, in minutes on a CPU. docs/recipe.md tells of data, memory and the choices made here.
"""

import dataclasses

from ml_collections import ConfigDict

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig, Stack
from mobilellm_jax.model.presets import preset
from mobilellm_jax.training.config import base_config

SIZES = ("140m", "360m", "950m", "tiny")


@dataclasses.dataclass(frozen=True)
class Stage:
    """A line of the paper's table 2."""

    plan: str  # below the folder of the data
    context: int  # tokens of a row
    batch: int  # rows of a step
    length: int  # steps; or epochs, where the rows of the plan are read several times
    peak: float  # learning rate
    warmup: int  # steps
    floor: float = 0.0  # share of the peak at the end
    decay: float = 0.1  # weight decay
    theta: float = 1e6  # RoPE's base; the released models, scaled by 8 for 32k, have 8e6
    after: int = 0  # steps of the stage before that the same plan has served
    saves: int = 1000  # steps between checkpoints and evaluations


# The paper gives tokens, batches, peaks and the linear schedules; the rest are choices:
# - Both phases of pre-training have the same peak in its table: the rate rises again in the second.
# - No warm-up is published for mid-training: 1 %, since the moments begin anew.
# - Rows of SFT are packed, and the paper's hold one padded conversation each. A step has about as
#   many conversations as there, 512 and 1,024, if those have 500 and 8,000 tokens on average; so
#   steps and warm-up (0.03 and 0.1 of the run) are the paper's too.
# - The released script for reasoning has a cosine schedule, the text a linear one.
PUBLISHED = {
    "pretrain1": Stage("pretrain.json", 2048, 2048, 500_000, 4e-3, 2000, 0.1, saves=2000),
    "pretrain2": Stage(
        "pretrain.json", 2048, 2048, 500_000, 4e-3, 2000, 0.1, after=500_000, saves=2000
    ),
    "midtrain1": Stage("midtrain.json", 4096, 512, 50_000, 3.6e-4, 500),
    "midtrain2": Stage("midtrain.json", 4096, 512, 50_000, 3.6e-4, 500, after=50_000),
    "sft_general": Stage("sft_general/mixture.json", 4096, 64, 2, 5e-6, 100, decay=0.0),
    "sft_reasoning": Stage(
        "sft_reasoning/mixture.json", 32_768, 256, 4, 8e-5, 2400, decay=0.0, theta=8e6
    ),
}
# The same in small. A network of 1M parameters wants higher rates.
SMALL = {
    "teacher": Stage("pretrain.json", 512, 2, 300, 4e-3, 30, saves=50),
    "pretrain1": Stage("pretrain.json", 256, 4, 100, 4e-3, 10, 0.1, saves=20),
    "pretrain2": Stage("pretrain.json", 256, 4, 60, 4e-3, 10, 0.1, after=100, saves=20),
    "midtrain1": Stage("midtrain.json", 512, 2, 40, 1e-3, 4, saves=20),
    "midtrain2": Stage("midtrain.json", 512, 2, 40, 1e-3, 4, after=40, saves=20),
    "sft_general": Stage("sft_general/mixture.json", 1024, 1, 2, 1e-3, 4, decay=0.0, saves=20),
    "sft_reasoning": Stage(
        "sft_reasoning/mixture.json", 2048, 1, 4, 1e-3, 4, decay=0.0, theta=8e6, saves=20
    ),
}
STAGES = tuple(PUBLISHED)


def network(size: str, name: str) -> ModelConfig:
    """The network of a stage; stages differ in its context and in RoPE's base."""
    if size == "tiny":
        stage, layers = SMALL[name], 8 if name == "teacher" else 4
        blocks = (Stack(layers, heads=2, kv_heads=1, mlp_width=320),)
        model = ModelConfig(2048, 128, blocks, qk_norm="unit", init_std=0.05)
    else:
        stage, model = PUBLISHED[name], preset(f"mobilellm-r1-{size}")
    return dataclasses.replace(model, max_length=stage.context, rope_theta=stage.theta)


def get_config(argument: str = "140m,pretrain1") -> ConfigDict:
    """The configuration of `SIZE,STAGE`; `tiny,teacher` teaches the mid-training of `tiny`.

    Raises:
      UserError: there is no such size or stage.
    """
    size, _, name = argument.partition(",")
    stages = SMALL if size == "tiny" else PUBLISHED
    if size not in SIZES or name not in stages:
        raise UserError(
            f"configs/mobilellm_r1.py:{argument} names no stage: after the colon comes one of "
            f"{', '.join(SIZES)}, a comma, and one of {', '.join(STAGES)} (or tiny,teacher)."
        )
    stage = stages[name]
    c = base_config(network(size, name))
    c.plan = f"data/{'r1-tiny' if size == 'tiny' else 'r1'}/{stage.plan}"
    c.row_length = stage.context
    c.global_batch = stage.batch
    c.first_row = stage.after * stage.batch
    c.steps, c.epochs = (0, float(stage.length)) if name.startswith("sft") else (stage.length, 0.0)
    c.stage = name
    if before := STAGES[: STAGES.index(name)] if name in STAGES else ():
        c.init_from, c.init_stage = f"runs/r1-{size}-{before[-1]}", before[-1]

    if name.startswith("midtrain"):
        # Forward KL alone, at temperature 1: neither is published.
        c.objective = ConfigDict(
            {
                "use": "mobilellm_jax.training.distillation:distillation",
                "temperature": 1.0,
                "labels": 0.0,
                "reverse": 0.0,
            }
        )
        c.teacher.path = "models/Llama-3.1-8B-Instruct"
        c.teacher.model = preset("llama-3.1-8b").to_dict()
        if size == "tiny":
            c.teacher.path = "runs/r1-tiny-teacher"
            c.teacher.model = network(size, "teacher").to_dict()
    # Adam's decays are published for pre-training alone, and kept.
    c.optimizer.b1, c.optimizer.b2 = 0.9, 0.95
    c.optimizer.weight_decay = stage.decay
    c.schedule.use = "mobilellm_jax.training.optimizer:warmup_linear"
    c.schedule.peak, c.schedule.floor = stage.peak, stage.floor
    c.schedule.warmup_steps = stage.warmup

    c.loss_chunks = stage.context // 128  # of so large a vocabulary
    c.execution.remat = "full" if stage.context > 4096 else "none"
    c.eval.every = c.checkpoint.every = stage.saves
    if size == "tiny":
        c.execution.dtype = "float32"  # CPUs have no fast bfloat16 products
        c.loss_chunks = stage.context // 32  # few enough logits for the cache of a core
        c.eval.rows = 16
        c.log_every = 20
    else:
        c.checkpoint.keep_every = 50_000
    return c
