r"""EfficientLLM (arXiv 2502.06663): pruned inside of pre-training, then pre-trained on as the small network.

| argument                  | network                        | parameters               | tokens, B  |
|---------------------------|--------------------------------|--------------------------|------------|
| 134m,prune; 134m,continue | SmolLM-360M's shape, cut 2,000x| 361,821,120 -> 134.0M    | 24.7; 500  |
| 469m,prune; 469m,continue | SmolLM-1.7B's shape, cut 6,000x| 1,711,376,384 -> 469.0M  | 73.8; 500  |
| 1.1b,prune; 1.1b,continue | SmolLM-1.7B's shape, cut 3,000x| 1,711,376,384 -> 1,100.0M| 36.1; 320  |

Published: the sizes; 50B (469M, 1.1B), 320B (1.1B) and 500B (134M, 469M) tokens of continued
pre-training; and of one run, which its figure plots: a source of 24 blocks, 32 heads, MLP 8192 and
width 2048, 0.52B tokens before the first cut, 73.79B at the end, with 19 heads, an MLP of about 3,000
and a width of about 1,180 left. That is a unit (in every block one head or one channel of the MLP; or a
channel of the stream) every 12M tokens, and at all times 16 to 19M parameters a billion tokens: so
cuts of equally many parameters, as they come here, lead along the same path. The figure beside it has
1.3M tokens a unit (N = 1): that is --config.steps=8312, a cut at nearly every step.

Not published, and ours: which sources 134M and 1.1B have; the tokens of their pruning (as the
plotted run spends them); saliency (mobilellm_jax/pruning/efficient.py); data, batch (500 steps of
1.05M tokens are 0.52B), rates, optimizer. Hardware: not published; ours fit on a v5p-8 (docs/results.md).

    python -m mobilellm_jax.prepare --tokenizer=models/SmolLM-1.7B --out=data/efficientllm ...
    python -m mobilellm_jax.train --config=configs/efficientllm.py:469m,prune \
      --config.init_from=models/SmolLM-1.7B --workdir=runs/469m-prune
    python -m mobilellm_jax.prune --checkpoint=runs/469m-prune --out=models/469m
    python -m mobilellm_jax.train --config=configs/efficientllm.py:469m,continue,models/469m \
      --config.tokens=50_000_000_000 --workdir=runs/469m

Without `init_from` the source begins at random weights. Without a folder, `SIZE,continue` has a shape
of that size near the plotted end (19 heads, MLP 3040, width 1216), for pre-flight.
"""

import dataclasses

from ml_collections import ConfigDict

from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.stored import open_model
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.presets import preset
from mobilellm_jax.training.config import base_config

BATCH, ROW, BEGIN = 512, 2048, 500  # rows of a step, tokens of a row, steps before the first cut


@dataclasses.dataclass(frozen=True)
class Size:
    """A line of the table."""

    source: ModelConfig
    target: int  # parameters
    steps: int  # of pruning
    cuts: int  # of one unit, or two where units are small
    tokens: int  # of continued pre-training
    peak: float  # learning rate
    shape: ModelConfig  # in place of what is left


def _shape(source: ModelConfig, width: int, heads: int, kv_heads: int, mlp: int) -> ModelConfig:
    (stack,) = source.stacks
    stack = dataclasses.replace(stack, heads=heads, kv_heads=kv_heads, mlp_width=mlp)
    return dataclasses.replace(source, width=width, stacks=(stack,))


_LARGE, _SMALL = preset("smollm-1.7b"), preset("smollm-360m")
SIZES = {
    "134m": Size(
        _SMALL, 134_000_000, 23_500, 2_000, 500 * 10**9, 1e-3, _shape(_SMALL, 576, 9, 3, 1400)
    ),
    "469m": Size(
        _LARGE, 469_000_000, 70_372, 6_000, 500 * 10**9, 5e-4, _shape(_LARGE, 1216, 19, 19, 3040)
    ),
    "1.1b": Size(
        _LARGE, 1_100_000_000, 34_450, 3_000, 320 * 10**9, 5e-4, _shape(_LARGE, 2048, 23, 23, 4808)
    ),
}


def get_config(argument: str = "469m,prune") -> ConfigDict:
    """The configuration of `SIZE,prune` or `SIZE,continue[,FOLDER]`.

    Raises:
      UserError: there is no such size or stage, or no network in that folder.
    """
    name, _, stage = argument.partition(",")
    stage, _, folder = stage.partition(",")
    if name not in SIZES or stage not in ("prune", "continue") or (folder and stage == "prune"):
        raise UserError(
            f"configs/efficientllm.py:{argument} names no stage: after the colon comes one of "
            f"{', '.join(SIZES)}, and ,prune or ,continue or ,continue,FOLDER."
        )
    size = SIZES[name]
    if stage == "prune":
        c = base_config(dataclasses.replace(size.source, dead_channels=True))
        c.steps = size.steps
        c.pruning.target, c.pruning.begin, c.pruning.cuts = size.target, BEGIN, size.cuts
        c.pruning.strategy.use = "mobilellm_jax.pruning.efficient:efficient"
        decay = 0  # the rate falls in the stage that follows
    else:
        c = base_config(open_model(folder).model if folder else size.shape)
        c.init_from = folder
        c.steps, c.tokens = 0, size.tokens
        c.first_row = size.steps * BATCH
        decay = None  # a fifth of the steps
    c.stage = f"efficientllm-{name}-{stage}"
    c.plan = "data/efficientllm/mixture.json"
    c.row_length, c.global_batch = ROW, BATCH
    c.microbatches = 16  # 8 rows at once on each of four devices
    c.loss_chunks = 8
    c.schedule = ConfigDict(
        {
            "use": "mobilellm_jax.training.optimizer:warmup_stable_decay",
            "peak": size.peak,
            "warmup_steps": 500,
            "floor": 0.0,
            "decay_steps": decay,
        }
    )
    c.eval.every = c.checkpoint.every = 2000
    c.checkpoint.keep_every = 20_000
    return c
