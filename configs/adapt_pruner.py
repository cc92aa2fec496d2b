r"""Adapt-Pruner's interleaved runs (arXiv 2502.03460): a network shrinks in small cuts while it trains.

| argument     | source                        | parameters, from -> to         | cuts |
|--------------|-------------------------------|--------------------------------|------|
| 350m         | MobileLLM-350M                | 345,355,200 -> 112,380,000     | 20   |
| 600m         | MobileLLM-600M                | 603,188,352 -> 376,000,000     | 9    |
| 1b           | MobileLLM-1B                  | 1,005,461,760 -> 603,190,000   | 10   |
| qwen-0.5b    | Qwen2.5-0.5B                  | 494,032,768 -> 376,100,000     | 5    |
| deepseek     | DeepSeek-R1-Distill-Qwen-1.5B | 1,777,088,000 -> 1,005,460,000 | 11   |

60,268 steps of 128 rows of 1,024 tokens, nine sets of instructions; the steps that follow a cut grow
linearly. Targets are those of the authors' scripts; their 376.1M and 143.1M of the first line count the
tied embedding, 30.72M, twice. Their code begins the moments anew after each cut and re-scores fifty
times within one without training; here moments are kept and scores come from the steps in between.
Rows are packed, theirs are padded. Hardware of the paper: 4 GPUs.

    python -m mobilellm_jax.prepare --chat=... --tokenizer=models/MobileLLM-350M --row_length=1024 \
      --out=data/instructions
    python -m mobilellm_jax.train --config=configs/adapt_pruner.py:350m \
      --config.init_from=models/MobileLLM-350M --workdir=runs/350m-125m
    python -m mobilellm_jax.prune --checkpoint=runs/350m-125m --out=models/350m-125m

**Llama-3.1-8B**, cut in one shot by 20, 40, 50 and 60 % and trained on as it is then, in the same way;
the paper has these shares, their settings and whether it trains on are not published. The network is
the folder's behind the last comma; without one, for pre-flight, one of equal blocks and that size.

    python -m mobilellm_jax.prune --checkpoint=models/Llama-3.1-8B --plan=data/web/mixture.json \
      --strategy=adapt --target_params=80% --rounds=50 --rows=512 --row_length=64 --batch_rows=16 \
      --out=models/8b-20
    python -m mobilellm_jax.train --config=configs/adapt_pruner.py:8b,20,models/8b-20 --workdir=runs/8b-20

**In small**, a network of 1.4M parameters on real text, minutes on 2 cores:

| argument     | what                                                          |
|--------------|---------------------------------------------------------------|
| small        | the network that is pruned, 1,500 steps                       |
| small,pruned | from its end to half the parameters in 20 cuts, 750 steps     |

    python -m mobilellm_jax.train --config=configs/adapt_pruner.py:small --config.plan=PLAN \
      --workdir=runs/small
    python -m mobilellm_jax.train --config=configs/adapt_pruner.py:small,pruned --config.plan=PLAN \
      --config.init_from=runs/small --workdir=runs/pruned
    python -m benchmarks.pruning --checkpoint=runs/small --plan=PLAN --out=runs/strategies
"""

import dataclasses

from ml_collections import ConfigDict

from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.stored import open_model
from mobilellm_jax.model.config import ModelConfig, Stack, parameter_count
from mobilellm_jax.model.presets import preset
from mobilellm_jax.training.config import base_config

# Source, parameters that are left, cuts, share of the peak rate at the end.
RUNS = {
    "350m": (preset("mobilellm-350m"), 112_380_000, 20, 0.0),
    "600m": (preset("mobilellm-600m"), 376_000_000, 9, 0.1),
    "1b": (preset("mobilellm-1b"), 603_190_000, 10, 0.1),
    "qwen-0.5b": (preset("qwen2.5-0.5b"), 376_100_000, 5, 0.1),
    "deepseek": (preset("deepseek-r1-distill-qwen-1.5b"), 1_005_460_000, 11, 0.1),
}
LLAMA, SHARES = preset("llama-3.1-8b"), (20, 40, 50, 60)
SMALL = ModelConfig(2048, 96, (Stack(12, 6, 3, 256),), head_dim=16, max_length=1024, init_std=0.05)


def get_config(argument: str = "350m") -> ConfigDict:
    """The configuration of a run of the table, of `8b,SHARE[,FOLDER]` or of `small[,pruned]`.

    Raises:
      UserError: there is no such run, or no network in that folder.
    """
    if argument in ("small", "small,pruned"):
        return _small("pruned" in argument)
    name, _, rest = argument.partition(",")
    share, _, folder = rest.partition(",")
    if name == "8b" and share in map(str, SHARES):
        c = _published(open_model(folder).model if folder else _equal(int(share)), 0.1)
        c.init_from = folder
        c.mesh.fsdp = 4  # each device of a v5p-8 holds a quarter of weights, moments and gradients
        c.execution.remat = "dots"
        return c
    if argument not in RUNS:
        raise UserError(
            f"configs/adapt_pruner.py:{argument} names no run: after the colon comes one of "
            f"{', '.join(RUNS)}, 8b,20 to 8b,60, small or small,pruned."
        )
    model, target, cuts, floor = RUNS[argument]
    c = _published(model, floor)
    c.pruning.target = target
    c.pruning.cuts = cuts
    c.pruning.spacing = "growing"
    return c


def _published(model: ModelConfig, floor: float) -> ConfigDict:
    c = base_config(model)
    c.plan = "data/instructions/mixture.json"
    c.row_length = 1024
    c.steps = 60_268
    c.global_batch = 128
    c.microbatches = 2  # 16 rows at once on each device of a v5p-8
    c.loss_chunks = 8
    c.objective.all_tokens = True  # as the authors' trainer has it
    c.optimizer.b1, c.optimizer.b2 = 0.9, 0.999
    c.optimizer.weight_decay = 0.0
    c.schedule = ConfigDict(
        {
            "use": "mobilellm_jax.training.optimizer:warmup_stable_decay",
            "peak": 2e-5,
            "warmup_steps": 3_013,  # 5 %
            "floor": floor,
            "decay_steps": 6_027,  # 10 %
            "decay": "linear",
        }
    )
    c.checkpoint.keep_every = 6_000
    return c


def _equal(share: int) -> ModelConfig:
    """Llama-3.1-8B with that much less in equal blocks: KV heads to the nearest, the rest by the MLP."""
    (stack,) = LLAMA.stacks
    whole = parameter_count(LLAMA)
    blocks = whole - 2 * LLAMA.vocab_size * LLAMA.width
    kv_heads = round(stack.kv_heads * (1 - share / 100 * whole / blocks))
    stack = dataclasses.replace(stack, kv_heads=kv_heads, heads=4 * kv_heads)
    over = (
        parameter_count(dataclasses.replace(LLAMA, stacks=(stack,))) - whole * (100 - share) // 100
    )
    mlp_width = stack.mlp_width - -(-over // (3 * LLAMA.width * stack.layers))
    return dataclasses.replace(LLAMA, stacks=(dataclasses.replace(stack, mlp_width=mlp_width),))


def _small(pruned: bool) -> ConfigDict:
    c = base_config(SMALL)
    c.row_length = 256
    c.steps = 750 if pruned else 1500
    c.global_batch = 4
    c.execution.dtype = "float32"
    c.loss_chunks = 8
    c.schedule.peak = 1e-3 if pruned else 4e-3
    c.schedule.warmup_steps = 50
    c.schedule.floor = 0.0
    c.eval.every = 250
    c.eval.rows = 64
    c.checkpoint.every = 250
    if pruned:
        c.pruning.target = parameter_count(SMALL) // 2
        c.pruning.spacing = "growing"
    return c
