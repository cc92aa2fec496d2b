r"""MobileLLM as published (arXiv 2402.14905, section 4): 1T tokens with a cosine schedule.

| argument | parameters    | blocks | width | heads / KV | paper's time on 32 A100-80G |
|----------|---------------|--------|-------|------------|-----------------------------|
| 125m     | 124,635,456   | 30     | 576   | 9 / 3      | 3 days                      |
| 350m     | 345,355,200   | 32     | 960   | 15 / 5     | 6 days                      |
| 600m     | 603,188,352   | 40     | 1152  | 18 / 6     | 8 days                      |
| 1b       | 1,005,461,760 | 54     | 1280  | 20 / 5     | 12 days                     |
| 1.5b     | 1,511,188,800 | 54     | 1600  | 25 / 5     | 18 days                     |

1,024 rows x 2,048 tokens x 480,000 steps = 1.007T tokens; with `explore`, the length of the paper's
comparisons, 120,000 steps = 0.252T. With `ls` every block is applied twice in a row: the parameters
stay, the compute of the blocks doubles. Any preset stands in place of a size.

    python -m mobilellm_jax.prepare --source=web='text/*.parquet' --row_length=2048 --out=data/mobilellm
    python -m mobilellm_jax.train --config=configs/mobilellm.py:125m --workdir=runs/125m
    python -m mobilellm_jax.train --config=configs/mobilellm.py:350m,ls,explore --workdir=runs/ls-350m
    python -m mobilellm_jax.train --config=configs/mobilellm.py:depth-30x512,explore --workdir=...

The paper does not publish its data. Fewer devices need `--config.microbatches`; on another global
batch the peak scales with it, 2e-3 at 1,024 rows and 5e-4 at 256.
"""

from ml_collections import ConfigDict

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.presets import COMPARED, PRESETS, preset, shared
from mobilellm_jax.training.config import base_config

OPTIONS = ("ls", "explore")


def get_config(argument: str = "125m") -> ConfigDict:
    """The configuration of `SIZE[,ls][,explore]` or `PRESET[,ls][,explore]`.

    Raises:
      UserError: there is no such size, preset or option.
    """
    name, *options = argument.split(",")
    sizes = [n.removeprefix("mobilellm-") for n in PRESETS]
    if name not in (*sizes, *PRESETS, *COMPARED) or not set(options) <= {*OPTIONS}:
        raise UserError(
            f"configs/mobilellm.py:{argument} names no network: after the colon comes one of "
            f"{', '.join(sizes)}, or a preset of mobilellm_jax/model/presets.py, then any of "
            f"{', '.join(',' + option for option in OPTIONS)}."
        )
    model = preset(f"mobilellm-{name}" if name in sizes else name)
    c = base_config(shared(model) if "ls" in options else model)
    c.plan = "data/mobilellm/mixture.json"
    c.row_length = 2048
    c.steps = 120_000 if "explore" in options else 480_000
    c.global_batch = 1024
    c.loss_chunks = 8
    c.optimizer.b1, c.optimizer.b2 = 0.9, 0.95
    c.optimizer.weight_decay = 0.1
    c.schedule.peak = 2e-3
    c.schedule.warmup_steps = 1000
    c.schedule.floor = 0.1
    c.eval.every = 2000
    c.checkpoint.every = 2000
    c.checkpoint.keep_every = 40_000
    return c
