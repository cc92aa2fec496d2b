r"""Does a teacher help? The loss on labels against the divergence from a teacher, at two sizes.

**As published** (MobileLLM, arXiv 2402.14905, table 16; teacher LLaMA-v2-7B, 120,000 steps):

| argument | network           | label loss   | label loss + teacher |
|----------|-------------------|--------------|----------------------|
| 125m[,kd]| 12 blocks x 768   | 43.9 (29 h)  | 43.8 (93 h)          |
| 350m[,kd]| 32 blocks x 960   | 49.1 (42 h)  | 48.8 (109 h)         |

(average of eight zero-shot tasks; time of a run). The plan's tokenizer must be the teacher's:

    python -m mobilellm_jax.prepare --source=web='text/*.parquet' --tokenizer=models/Llama-2-7b-hf \
      --row_length=2048 --out=data/llama2
    python -m mobilellm_jax.train --config=configs/distillation.py:125m,kd --workdir=runs/125m-kd

**In small** (`make distillation`), a student of 0.28M parameters and a teacher of 1.1M that has read
four times as much, on real text, three seeds, one peak learning rate for all:

| row          | what is minimised                                       | FLOPs |
|--------------|---------------------------------------------------------|-------|
| labels       | the loss on labels                                      | 1     |
| labels-flops | the same, for as many FLOPs as with the teacher         | 2.2   |
| kd           | forward divergence from the teacher, as in MobileLLM-R1 | 2.2   |
| mixed        | half of each, as in MobileLLM's table 16                | 2.2   |
| reverse      | reverse divergence                                      | 2.2   |
| hot          | forward divergence at temperature 2                     | 2.2   |
| stored       | forward, from the 16 likeliest tokens, written before   | 1     |

    python -m mobilellm_jax.train --config=configs/distillation.py:teacher --workdir=runs/distillation/teacher
    python -m mobilellm_jax.teach --teacher=runs/distillation/teacher --plan=data/ladder/mixture.json \
      --row_length=256 --top_k=16 --name=distillation
    python -m mobilellm_jax.sweep --sweep=configs/distillation.py --workdir=runs/distillation/students
"""

from ml_collections import ConfigDict

from configs import ladder, mobilellm
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig, Stack, flops_per_token
from mobilellm_jax.model.presets import preset
from mobilellm_jax.sweeps.description import Line, Sweep, Table

PLAN = "data/ladder/mixture.json"  # rows of 256, 512 pieces
TEACHER = "runs/distillation/teacher"
ROW, STEPS, ROWS = 256, 720, 2
PUBLISHED = {"125m": "depth-12x768", "350m": "mobilellm-350m"}

STUDENT = ModelConfig(512, 64, (Stack(6, 4, 4, 126),), head_dim=16, max_length=ROW, init_std=0.06)
TAUGHT_BY = ModelConfig(
    512, 128, (Stack(6, 8, 4, 340),), head_dim=16, max_length=ROW, init_std=0.04
)

# Settings of the objective in each row that learns from a teacher.
ROWS_TAUGHT = {
    "kd": {},
    "mixed": {"labels": 0.5},
    "reverse": {"reverse": 1.0},
    "hot": {"temperature": 2.0},
    "stored": {},
}


def get_config(argument: str = "teacher") -> ConfigDict:
    """The configuration of `teacher`, `125m` or `350m`, the latter with or without `,kd`.

    Raises:
      UserError: there is no such configuration.
    """
    if argument == "teacher":
        c = _small(TAUGHT_BY, 2 * STEPS)
        c.global_batch = 2 * ROWS
        return c
    size, _, taught = argument.partition(",")
    if size not in PUBLISHED or taught not in ("", "kd"):
        raise UserError(
            f"configs/distillation.py:{argument} is neither teacher nor one of "
            f"{', '.join(PUBLISHED)} with or without ,kd."
        )
    c = mobilellm.get_config(f"{PUBLISHED[size].removeprefix('mobilellm-')},explore")
    c.plan = "data/llama2/mixture.json"
    if taught:
        # The paper adds the two losses and names no weights; under Adam half the sum is the sum.
        _distil(c, {"labels": 0.5})
        c.teacher.path = "models/Llama-2-7b-hf"
        c.teacher.model = preset("llama-2-7b").to_dict()
    return c


def get_sweep(argument: str) -> Sweep:
    """The small study.

    Args:
      argument: path of the plan to train on, by default that of `make ladder`.
    """
    plan = argument or PLAN
    dearer = 1 + flops_per_token(TAUGHT_BY, ROW) / 3 / flops_per_token(STUDENT, ROW)
    rows = {
        "labels": _small(STUDENT, STEPS),
        "labels-flops": _small(STUDENT, round(dearer * STEPS)),
    }
    for name, settings in ROWS_TAUGHT.items():
        rows[name] = _small(STUDENT, STEPS)
        _distil(rows[name], settings)
        if name == "stored":
            rows[name].teacher.stored = "distillation"
        else:
            rows[name].teacher.path = TEACHER
    for config in rows.values():
        config.plan = plan
    lines = (
        Line("labels", "labels"),
        Line("labels-flops", "labels, at the FLOPs of a teacher", "labels"),
        Line("kd", "teacher (R1)", "labels"),
        Line("mixed", "teacher and labels (MobileLLM)", "labels"),
        Line("reverse", "teacher, reverse", "labels"),
        Line("hot", "teacher, temperature 2", "labels"),
        Line("stored", "teacher, 16 tokens stored", "labels"),
    )
    equal = tuple(Line(x.row, x.label, "labels-flops") for x in lines if x.row != "labels-flops")
    return Sweep(
        rows,
        (
            Table("A teacher, at equal steps (MobileLLM table 16)", lines),
            Table("A teacher, at equal FLOPs", (Line("labels-flops", "labels"), *equal)),
        ),
    )


def _distil(config: ConfigDict, settings: dict[str, float]) -> None:
    objective = {"use": "mobilellm_jax.training.distillation:distillation", "temperature": 1.0}
    with config.unlocked():
        config.objective = ConfigDict({**objective, "labels": 0.0, "reverse": 0.0, **settings})


def _small(model: ModelConfig, steps: int) -> ConfigDict:
    """As a run of the ladder, at the peak that is best there for 6 blocks x 64."""
    c = ladder.config(model, PLAN, steps).at(4e-3)
    c.loss_chunks = 2
    return c
