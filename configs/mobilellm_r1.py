r"""MobileLLM-R1 as published (arXiv 2509.24945): the two phases of pre-training, 4.2T tokens.

| argument | parameters  | blocks | width | heads / KV |
|----------|-------------|--------|-------|------------|
| 140m     | 140,248,512 | 15     | 576   | 9 / 3      |
| 360m     | 359,431,168 | 15     | 1024  | 16 / 4     |
| 950m     | 949,685,760 | 22     | 1536  | 24 / 6     |

Each phase: 2,048 rows x 2,048 tokens x 500,000 steps = 2.1T tokens, learning rate linearly to a
tenth of 4e-3, on data of its own; the paper took 4 to 5 days for each on 128 GPUs. The second phase
starts at the weights of the first, with moments and warm-up anew: whether the paper's learning rate
rose again is not said, its table gives the same peak for both.

    python -m mobilellm_jax.train --config=configs/mobilellm_r1.py:140m,pretrain1 \
      --workdir=runs/r1-140m-pretrain1
    python -m mobilellm_jax.train --config=configs/mobilellm_r1.py:140m,pretrain2 \
      --workdir=runs/r1-140m-pretrain2

The plan has both phases as stages: configs/plans/mobilellm_r1_pretrain.json, tied to the prepared
sources (docs/data.md) with the tokenizer of Llama 3.2.
"""

from ml_collections import ConfigDict

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.presets import preset
from mobilellm_jax.training.config import base_config

SIZES = ("140m", "360m", "950m")
STAGES = ("pretrain1", "pretrain2")


def get_config(argument: str = "140m,pretrain1") -> ConfigDict:
    """The configuration of `SIZE,STAGE`.

    Raises:
      UserError: there is no such size or stage.
    """
    size, _, stage = argument.partition(",")
    if size not in SIZES or stage not in STAGES:
        raise UserError(
            f"configs/mobilellm_r1.py:{argument} names no stage: after the colon comes one of "
            f"{', '.join(SIZES)}, a comma, and one of {', '.join(STAGES)}."
        )
    c = base_config(preset(f"mobilellm-r1-{size}"))
    c.plan = "data/r1/mixture.json"
    c.row_length = 2048
    c.steps = 500_000
    c.global_batch = 2048
    if stage == "pretrain2":
        c.init_from = f"runs/r1-{size}-pretrain1"
        c.first_row = c.steps * c.global_batch  # where the plan's second stage begins
    c.loss_chunks = 16  # of so large a vocabulary
    c.optimizer.b1, c.optimizer.b2 = 0.9, 0.95
    c.optimizer.weight_decay = 0.1
    c.schedule.use = "mobilellm_jax.training.optimizer:warmup_linear"
    c.schedule.peak = 4e-3
    c.schedule.warmup_steps = 2000
    c.schedule.floor = 0.1
    c.eval.every = 2000
    c.checkpoint.every = 2000
    c.checkpoint.keep_every = 50_000
    return c
