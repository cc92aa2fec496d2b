r"""The architecture ladder of MobileLLM (arXiv 2402.14905) at 1/400 of its size, on real text.

Three of the paper's comparisons: the roadmap from a shallow ReLU network to MobileLLM-LS (table 10),
depth against width (table 11), and one to four passes through shared blocks in three orders (tables
2 and 14). And a fourth table: what depth costs or gains after four times as many tokens.

| parameters         | rows x tokens x steps | networks x seeds           | hardware    | time   |
|--------------------|-----------------------|----------------------------|-------------|--------|
| 0.31M (tied 0.29M) | 2 x 256 x 720 = 0.37M | 19 x (3 + 3 or more peaks) | 2 CPU cores | 60 min |
| 0.31M              | four times as many    | 2 x (3 + 4 peaks)          | 2 CPU cores | 25 min |

    make ladder

or, on any plan with rows of 256 and a vocabulary of 512,

    python -m mobilellm_jax.sweep --sweep=configs/ladder.py:DIR/mixture.json --workdir=... --parallel=2

The vocabulary is so small that the embeddings hold a third of the shallow network and a sixth of the
deep one, about as in the paper. Networks have as many parameters as each other, within 1 %, but for
the drop that tying the embedding is; the next step spends on width what it has saved, as in the
paper. All read the same rows in the same order under the same seed. The initial weights scale with
1/sqrt(width), and each network gets the peak learning rate that is best for it: at one rate for all
the deep ones would be held back (at 4e-3 layer sharing loses half a bit per byte).
"""

import dataclasses

from mobilellm_jax.model.config import ModelConfig, Stack, flops_per_token
from mobilellm_jax.sweeps.description import Line, Sweep, Table, Tuned
from mobilellm_jax.training.config import base_config

VOCABULARY = 512
ROW = 256
STEPS = 720
LONGER = 4  # times as many steps, for the question whether depth needs more tokens
PEAKS = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)

# Layers, width, heads, KV heads, MLP width; heads are 16 wide.
NETWORKS = {
    "relu": (3, 80, 5, 5, 314),
    "depth-1": (1, 128, 8, 8, 294),
    "depth-3": (3, 80, 5, 5, 209),
    "depth-6": (6, 64, 4, 4, 126),
    "depth-12": (12, 48, 3, 3, 86),
    "depth-24": (24, 32, 2, 2, 77),
    "tied": (12, 48, 3, 3, 86),
    "gqa": (12, 56, 3, 1, 97),
}
OTHER = {"relu": {"mlp": "relu"}, "tied": {"tied": True}, "gqa": {"tied": True}}
ORDERS = ("immediate", "repeat_all", "reverse")
SHALLOW = "depth-3"  # what other depths are compared with
BASE = "depth-3"  # whose blocks are shared


def network(name: str) -> ModelConfig:
    """One of `NETWORKS`: untied and with SwiGLU but for what `OTHER` says."""
    layers, width, heads, kv_heads, mlp_width = NETWORKS[name]
    return ModelConfig(
        vocab_size=VOCABULARY,
        width=width,
        stacks=(Stack(layers, heads, kv_heads, mlp_width),),
        head_dim=16,
        max_length=ROW,
        init_std=0.5 / width**0.5,
        **{"tied": False, **OTHER.get(name, {})},
    )


def shared(name: str, repeats: int, order: str) -> ModelConfig:
    """The same network with its blocks applied several times."""
    model = network(name)
    (stack,) = model.stacks
    return dataclasses.replace(
        model, stacks=(dataclasses.replace(stack, repeats=repeats, order=order),)
    )


def config(model: ModelConfig, plan: str, steps: int = STEPS) -> Tuned:
    """The recipe of all cells. Deep networks want lower peaks, and the search begins there."""
    c = base_config(model)
    c.plan = plan
    c.row_length = ROW
    c.steps = steps
    c.global_batch = 2  # so short a run gains more from many steps than from smooth ones
    c.execution.dtype = "float32"
    c.schedule.warmup_steps = steps // 20
    c.schedule.floor = 0.0
    c.eval.every = steps
    c.eval.rows = 128
    c.checkpoint.every = steps
    c.checkpoint.keep = 1
    c.log_every = 100
    return Tuned(c, "schedule.peak", PEAKS, start=4e-3 if model.depth <= 6 else 2e-3)


def get_sweep(argument: str) -> Sweep:
    """All cells and the four tables.

    Args:
      argument: path of the plan to train on, by default that of `make ladder`.
    """
    plan = argument or "data/ladder/mixture.json"
    rows = {name: config(network(name), plan) for name in NETWORKS}

    once, twice = network("gqa"), shared("gqa", 2, "immediate")
    equal = STEPS * flops_per_token(once, ROW) / flops_per_token(twice, ROW)
    rows["ls"] = config(twice, plan)
    rows["ls-flops"] = config(twice, plan, round(equal))
    roadmap = (
        Line("relu", "ReLU MLP, 3 blocks"),
        Line("depth-3", "+ SwiGLU", "relu"),
        Line("depth-12", "+ deep and thin, 12 blocks", "depth-3"),
        Line("tied", "+ tied embedding", "depth-12"),
        Line("gqa", "+ GQA, wider = MobileLLM", "tied"),
        Line("ls", "+ layer sharing = LS", "gqa"),
        Line("ls-flops", "LS, at equal FLOPs", "gqa"),
    )

    shapes = [name for name in NETWORKS if name.startswith("depth-")]
    depths = [
        Line(name, "{} x {}".format(*NETWORKS[name]), SHALLOW if name != SHALLOW else "")
        for name in shapes
    ]

    passes = [Line(BASE, "one pass, {} blocks".format(*NETWORKS[BASE]))]
    for order in ORDERS:
        for repeats in (2, 3, 4):
            name = f"{order}-{repeats}"
            rows[name] = config(shared(BASE, repeats, order), plan)
            passes.append(Line(name, f"{order}, {repeats} passes", BASE))
    longer = []
    for name in ("depth-3", "depth-12"):
        rows[f"{name}-long"] = config(network(name), plan, LONGER * STEPS)
        label = "{} x {}".format(*NETWORKS[name])
        longer.append(Line(f"{name}-long", label, "depth-3-long" if longer else ""))
    return Sweep(
        rows,
        (
            Table("From ReLU to MobileLLM-LS (table 10)", roadmap),
            Table("Blocks x width at equal parameters (table 11)", tuple(depths)),
            Table("Passes through shared blocks (tables 2 and 14)", tuple(passes)),
            Table(f"Blocks x width with {LONGER} x the tokens", tuple(longer)),
        ),
    )
