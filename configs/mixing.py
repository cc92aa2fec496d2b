r"""A network of 0.26M parameters on which mixtures are compared in minutes on a laptop CPU.

Runs are short and many: `make mixing-demo` trains about thirty of them on text that comes with Python.
The same pipeline at the size of MobileLLM-R1's proxies takes another configuration:

| configuration                    | parameters | tokens of a run | hardware    | a run |
|----------------------------------|------------|-----------------|-------------|-------|
| configs/mixing.py                | 260,544    | 0.15M           | 2 CPU cores | 15 s  |
| configs/mobilellm.py:125m        | 124.6M     | as --tokens     | GPU or pod  |       |

    make mixing-demo
    python -m data_mixing.pipeline --config=configs/mobilellm.py:125m --plan=DIR/mixture.json \
        --probes=DIR --out=DIR
"""

from ml_collections import ConfigDict

from mobilellm_jax.model.config import ModelConfig, Stack
from mobilellm_jax.training.config import base_config


def get_config() -> ConfigDict:
    """The configuration; what it does not name is as in `base_config`."""
    model = ModelConfig(
        vocab_size=2048,
        width=64,
        head_dim=32,
        stacks=(Stack(layers=3, heads=2, kv_heads=1, mlp_width=160),),
        max_length=1024,
        init_std=0.05,  # 0.02 is for networks ten times as wide
    )
    c = base_config(model)
    c.row_length = 256
    c.steps = 150
    c.global_batch = 4
    c.execution.dtype = "float32"  # CPUs have no fast bfloat16 products
    c.loss_chunks = 4
    c.schedule.peak = 6e-3
    c.schedule.warmup_steps = 10
    c.schedule.floor = 0.0
    c.checkpoint.every = 150
    return c
