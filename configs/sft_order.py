r"""In which order to fine-tune: the study of MobileLLM-R1's table 8 (arXiv 2509.24945).

| row        | argument     | starts at        | reads               | MATH | GSM8K | LCB  |
|------------|--------------|------------------|---------------------|------|-------|------|
| Tulu first | `tulu`, then | mid-training     | Tulu 3              |      |       |      |
|            | `after_tulu` | runs/order-tulu  | math, code, science | 57.8 | 68.5  | 13.7 |
| joint      | `joint`      | mid-training     | all four            | 56.2 | 53.1  | 14.9 |
| no Tulu    | `reasoning`  | mid-training     | math, code, science | 56.2 | 68.2  | 13.1 |
| math       | `math`       | mid-training     | math                | 57.4 | 68.2  | 0.0  |
| code       | `code`       | mid-training     | code                | 16.2 | 31.0  | 12.0 |
| science    | `science`    | mid-training     | science             | 23.8 | 62.2  | 3.4  |

Scores are the paper's, of 950M parameters after one epoch of everything. One run starts at another's
weights, so these are no cells of a sweep but runs, one after another; the sources are prepared once,
and each row has a plan over them, with shares by which one epoch is one of every source:

    python -m mobilellm_jax.prepare --chat=tulu='tulu/*.parquet' --chat=math='math/*.jsonl' \
      --chat=code='code/*.jsonl' --chat=science='science/*.jsonl' --tokenizer=llama3/ \
      --chat_template=mobilellm_r1 --row_length=32768 --out=data/order
    python -m configs.sft_order data/order
    for row in tulu after_tulu joint reasoning math code science; do
      python -m mobilellm_jax.train --config=configs/sft_order.py:950m,$row --workdir=runs/order-$row
      python -m mobilellm_jax.evaluate --checkpoint=runs/order-$row --tasks=r1_final
    done

`tiny` is a network of 1M parameters, rows of 1,024 tokens and minutes on a CPU.
"""

import dataclasses

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mobilellm_jax import cli
from mobilellm_jax.data.plan import Plan, Stage
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig, Stack
from mobilellm_jax.model.presets import preset
from mobilellm_jax.plan import write
from mobilellm_jax.training.config import base_config

REASONING = ("math", "code", "science")
ROWS = {
    "tulu": ("tulu",),
    "after_tulu": REASONING,
    "joint": ("tulu", *REASONING),
    "reasoning": REASONING,
    **{name: (name,) for name in REASONING},
}
SIZES = ("140m", "360m", "950m", "tiny")


def get_config(argument: str = "950m,after_tulu") -> ConfigDict:
    """The configuration of `SIZE,ROW`.

    Raises:
      UserError: there is no such size or row.
    """
    size, _, row = argument.partition(",")
    if size not in SIZES or row not in ROWS:
        raise UserError(
            f"configs/sft_order.py:{argument} names no run: after the colon comes one of "
            f"{', '.join(SIZES)}, a comma, and one of {', '.join(ROWS)}."
        )
    tiny = size == "tiny"
    model = preset(f"mobilellm-r1-{size}") if not tiny else _tiny()
    row_length = 1024 if tiny else 32_768
    c = base_config(dataclasses.replace(model, max_length=row_length, rope_theta=8e6))
    c.init_from = "runs/order-tulu" if row == "after_tulu" else f"runs/r1-{size}-midtrain2"
    c.plan = f"data/order/{row}.json"
    c.steps, c.epochs = 0, 1.0
    c.row_length, c.global_batch = row_length, 2 if tiny else 256
    c.loss_chunks = row_length // 128
    c.execution.remat = "none" if tiny else "full"
    c.optimizer.b1, c.optimizer.b2 = 0.9, 0.95
    c.optimizer.weight_decay = 0.0
    # The rates of the two stages of the recipe, with warm-ups of 0.03 and 0.1 of the paper's steps. That
    # Tulu alone is read in long rows as well is a choice: so one store serves all rows of the table.
    c.schedule.use = "mobilellm_jax.training.optimizer:warmup_linear"
    c.schedule.peak, c.schedule.warmup_steps = (5e-6, 50) if row == "tulu" else (8e-5, 600)
    c.schedule.floor = 0.0
    if tiny:
        c.execution.dtype = "float32"  # CPUs have no fast bfloat16 products
        c.schedule.peak, c.schedule.warmup_steps = 1e-3, 1
    return c


def _tiny() -> ModelConfig:
    return ModelConfig(2048, 128, (Stack(4, 2, 1, 320),), qk_norm="unit", init_std=0.05)


def write_plans(data: epath.PathLike) -> None:
    """Writes the plan of every row beside the one that `prepare` made of the four sources.

    Raises:
      UserError: there is none, it lacks a source, or a plan is there already.
    """
    whole = Plan.load(epath.Path(data) / "mixture.json")
    if missing := {*ROWS["joint"]} - {*whole.names}:
        raise UserError(f"{data} has no source {', '.join(sorted(missing))}: prepare it there.")
    for row, names in ROWS.items():
        sources = tuple(source for source in whole.sources if source.name in names)
        rows = np.array([source.rows for source in sources], float)
        shares = dict(zip((s.name for s in sources), (rows / rows.sum()).tolist(), strict=True))
        plan = dataclasses.replace(whole, sources=sources, stages=(Stage(row, None, shares),))
        write(plan, epath.Path(data) / f"{row}.json")


if __name__ == "__main__":
    cli.run(write_plans, positional="folder of the prepared sources")
