r"""AdamW beside Muon: the network of `smoke.py` on real text, each at the peak that is best for it.

| parameters | rows x tokens x steps | optimizers x seeds     | hardware    | time   |
|------------|-----------------------|------------------------|-------------|--------|
| 951,424    | 4 x 256 x 400 = 0.41M | 2 x (3 + 3 to 6 peaks) | 2 CPU cores | 25 min |

    python -m mobilellm_jax.prepare --embedded --out=data/smoke --row_length=256 --vocab_size=2048 \
      --weights=code=0.4,prose=0.4,math=0.2
    python -m mobilellm_jax.sweep --sweep=configs/optimizers.py --workdir=runs/optimizers

Muon's updates have the size of AdamW's (docs/schedules.md), so both are searched over the same
peaks, from the same one on.
"""

from configs import smoke
from mobilellm_jax.sweeps.description import Line, Sweep, Table, Tuned

STEPS = 400
PEAKS = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
LABELS = {"adamw": "AdamW", "muon": "Muon on the blocks' matrices, AdamW on the rest"}


def row(optimizer: str, plan: str) -> Tuned:
    """The network of `smoke.py` under one of `mobilellm_jax/training/optimizer.py`."""
    c = smoke.get_config()
    c.plan = plan
    c.steps = STEPS
    c.optimizer.use = f"mobilellm_jax.training.optimizer:{optimizer}"
    c.schedule.warmup_steps = STEPS // 20
    c.eval.every = c.checkpoint.every = STEPS
    c.eval.rows = 128
    c.checkpoint.keep = 1
    return Tuned(c, "schedule.peak", PEAKS, start=4e-3)


def get_sweep(argument: str) -> Sweep:
    """Both rows and their table.

    Args:
      argument: path of the plan to train on, by default that of `make run`.
    """
    rows = {name: row(name, argument or "data/smoke/mixture.json") for name in LABELS}
    lines = (Line("adamw", LABELS["adamw"]), Line("muon", LABELS["muon"], "adamw"))
    return Sweep(rows, (Table("AdamW and Muon", lines),))
