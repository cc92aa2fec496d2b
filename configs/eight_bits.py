r"""Does it help to train on with the rounding of 8 bits, where MobileLLM (table 15) only rounds at the end?

| row     | what                                                                    |
|---------|-------------------------------------------------------------------------|
| floats  | a trained network, 300 steps more                                       |
| rounded | the same steps, every weight and factor rounded as `w8a8` has it (QAT)  |

From any trained network, on the data of any plan; by default what `make run` leaves, minutes on 2 cores:

    python -m mobilellm_jax.sweep --sweep=configs/eight_bits.py --workdir=runs/eight_bits
    python -m mobilellm_jax.sweep --sweep=configs/eight_bits.py:SOURCE,PLAN --workdir=runs/eight_bits

The table has each as it was trained: `floats` in floats, `rounded` in integers. What `floats` loses when
it is rounded at the end:

    python -m benchmarks.eight_bits --plan=PLAN \
      --checkpoints=runs/eight_bits/floats-s0,runs/eight_bits/rounded-s0
"""

import dataclasses

from ml_collections import ConfigDict

from mobilellm_jax.interop.stored import open_model
from mobilellm_jax.model.quantization import W8A8
from mobilellm_jax.sweeps.description import Line, Sweep, Table
from mobilellm_jax.training.config import base_config

SOURCE, PLAN, STEPS = "runs/smoke", "data/smoke/mixture.json", 300


def row(source: str, plan: str, quantization: str) -> ConfigDict:
    """A run from a trained network on."""
    model = dataclasses.replace(open_model(source).model, quantization=quantization)
    c = base_config(model)
    c.plan = plan
    c.init_from = source
    c.row_length = 256
    c.steps = STEPS
    c.global_batch = 4
    c.execution.dtype = "float32"
    c.loss_chunks = 8
    c.schedule.peak = 3e-4  # below a tenth of what the network was trained with
    c.schedule.warmup_steps = 20
    c.schedule.floor = 0.0
    c.eval.every = c.checkpoint.every = STEPS
    c.eval.rows = 128
    c.checkpoint.keep = 1
    return c


def get_sweep(argument: str) -> Sweep:
    """Both rows and their table.

    Args:
      argument: the trained network and the path of the plan, `SOURCE,PLAN`.
    """
    source, _, plan = argument.partition(",")
    given = source or SOURCE, plan or PLAN
    rows = {"floats": row(*given, "none"), "rounded": row(*given, W8A8)}
    lines = Line("floats", "floats"), Line("rounded", "8 bits", "floats")
    return Sweep(rows, (Table("300 steps more, in floats or with the rounding of 8 bits", lines),))
