r"""A MobileLLM-LS-shaped network on real text, in minutes on a laptop CPU.

Deep and thin, tied embedding, grouped-query attention, SwiGLU, every block applied twice in a row
(MobileLLM, arXiv 2402.14905, sections 3.1 to 3.3), at 1/130 of its smallest published size.

| parameters | blocks | width | heads / KV | rows x tokens x steps | hardware    | training |
|------------|--------|-------|------------|-----------------------|-------------|----------|
| 951,424    | 4 x 2  | 128   | 2 / 1      | 4 x 256 x 1000 = 1.0M | 2 CPU cores | 3 min    |

    python -m mobilellm_jax.prepare --embedded --out=data/smoke --row_length=256 --vocab_size=2048
    python -m mobilellm_jax.train --config=configs/smoke.py --workdir=runs/smoke
"""

from ml_collections import ConfigDict

from mobilellm_jax.model.config import ModelConfig, Stack
from mobilellm_jax.training.config import base_config


def get_config() -> ConfigDict:
    """The configuration; what it does not name is as in `base_config`."""
    model = ModelConfig(
        vocab_size=2048,
        width=128,
        head_dim=64,
        stacks=(Stack(layers=4, heads=2, kv_heads=1, mlp_width=320, repeats=2),),
        max_length=1024,
        init_std=0.05,  # 0.02 is for networks five times as wide
    )
    c = base_config(model)
    c.plan = "data/smoke/mixture.json"
    c.row_length = 256
    c.steps = 1000
    c.global_batch = 4  # so small a run gains more from many steps than from smooth ones
    c.execution.dtype = "float32"  # CPUs have no fast bfloat16 products
    c.loss_chunks = 8  # few enough logits for the cache of a core
    c.schedule.peak = 4e-3
    c.schedule.warmup_steps = 50
    c.schedule.floor = 0.0
    c.eval.every = 250
    c.eval.rows = 64
    c.checkpoint.every = 250
    c.checkpoint.keep = 2
    c.log_every = 50
    return c
