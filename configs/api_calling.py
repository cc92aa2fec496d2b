r"""API calling as in MobileLLM's section 3.4 (arXiv 2402.14905): dialogues whose calls are graded.

| argument        | parameters | rows x tokens, 4 epochs | starts at      | steps |
|-----------------|------------|-------------------------|----------------|-------|
| 125m, 350m, ... | as there   | 8 x 2,048               | runs/125m, ... | 510   |
| smoke           | 951,424    | 4 x 1,024               | runs/smoke     | 2,600 |

Steps are those of 5,000 dialogues: 4.9 of them fill a row of 2,048 with a vocabulary of 32,000, and
1.9 one of 1,024 with one of 2,048.

The paper's: 5,000 dialogues to train on, 2,500 to test, about 8 turns each; 4 epochs of Adam, learning
rate linearly from 2e-5 to 0, weight decay 0.01. Its data are unreleased: ours come from a seed.

    python -m mobilellm_jax.api_dialogues --out=data/api
    python -m mobilellm_jax.prepare --chat=api=data/api/train.jsonl --tokenizer=data/mobilellm \
      --chat_template=plain --row_length=2048 --out=data/api_rows
    python -m mobilellm_jax.train --config=configs/api_calling.py:125m --workdir=runs/api-125m
    python -m mobilellm_jax.evaluate --checkpoint=runs/api-125m --tasks=test --data=data/api --chat

After `make run`, `:smoke` wants `--tokenizer=data/smoke --row_length=1024 --out=data/api_smoke`. Its
network has 1M parameters and read 1M tokens before: it shows that all works, not how well.
"""

from ml_collections import ConfigDict

from configs import mobilellm, smoke


def get_config(argument: str = "125m") -> ConfigDict:
    """The configuration for a size of `mobilellm.py`, or `smoke`.

    Raises:
      UserError: there is no such network.
    """
    c = smoke.get_config() if argument == "smoke" else mobilellm.get_config(argument)
    c.init_from = f"runs/{argument.replace(',', '-')}"
    c.plan = "data/api_smoke/mixture.json" if argument == "smoke" else "data/api_rows/mixture.json"
    c.steps, c.epochs = 0, 4.0
    # Not published: the batch, here about 39 dialogues, which are packed; Adam's decays, here its own;
    # and whether there was a warm-up.
    c.row_length, c.global_batch = (1024, 4) if argument == "smoke" else (2048, 8)
    c.optimizer.b1, c.optimizer.b2 = 0.9, 0.999
    c.optimizer.weight_decay = 0.01
    c.schedule.use = "mobilellm_jax.training.optimizer:warmup_linear"
    c.schedule.peak = 1e-3 if argument == "smoke" else 2e-5  # so small a network learns faster
    c.schedule.warmup_steps, c.schedule.floor = 0, 0.0
    c.eval.every = c.checkpoint.every = 100
    c.checkpoint.keep_every = 0
    return c
