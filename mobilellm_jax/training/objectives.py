"""Objectives: what a step minimises. `config.objective.use` names one of these or a user's own.

An objective is `f(params, batch, network, **settings) -> Losses`. It says which targets count and
what they cost together; the step divides by the number of counted targets and differentiates, so
that microbatches with unequal numbers of targets give the gradient of the whole batch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mobilellm_jax.data.packing import counted, segment_ids, token_ids
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.loss import summed_loss
from mobilellm_jax.model.transformer import Execution

# "tokens" int [B, T + 1], rows with the marks of `packing` (`split_rows` takes them off), "source"
# int [B].
Batch = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Network:
    """What an objective needs beside parameters and batch; static in a compiled step."""

    model: ModelConfig
    execution: Execution
    bos_id: int
    eos_id: int
    loss_chunks: int = 1


@dataclasses.dataclass(frozen=True)
class Losses:
    """What a batch costs, all float32."""

    total: jax.Array  # scalar: what is minimised, summed over the targets that count
    nll_BT: jax.Array  # negative log-likelihood of each target in nats, for the metrics
    weight_BT: jax.Array  # 1 where the target counts, else 0


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of T + 1 tokens as inputs and targets, [B, T], token ids without marks."""

    inputs_BT: jax.Array
    targets_BT: jax.Array
    segment_ids_BT: jax.Array | None  # None: a row is one document
    weight_BT: jax.Array


def split_rows(tokens: jax.Array, bos_id: int, eos_id: int, *, all_tokens: bool = False) -> Rows:
    """Cuts rows [B, T + 1] into inputs and targets; which targets count says `packing.counted`."""
    inputs_BT, targets_BT = token_ids(tokens[:, :-1]), token_ids(tokens[:, 1:])
    segment_ids_BT = segment_ids(tokens[:, :-1], bos_id)
    weight_BT = counted(tokens, bos_id, eos_id, all_tokens=all_tokens).astype(jnp.float32)
    return Rows(inputs_BT, targets_BT, segment_ids_BT, weight_BT)


def next_token(
    params: Any,
    batch: Batch,
    network: Network,
    z_loss: float = 0.0,
    all_tokens: bool = False,
) -> Losses:
    """Cross-entropy of the next token, plus `z_loss * log(Z)**2` (PaLM, arXiv 2204.02311, section 5).

    Of conversations the assistant's tokens count, or `all_tokens`. The latter is what TRL does by
    default and so, its script setting nothing else, what MobileLLM-R1 was fine-tuned with.
    """
    rows = split_rows(batch["tokens"], network.bos_id, network.eos_id, all_tokens=all_tokens)
    return cross_entropy(params, rows, network, z_loss)


def cross_entropy(params: Any, rows: Rows, network: Network, z_loss: float = 0.0) -> Losses:
    """As `next_token`, of rows that are already split: for objectives with weights of their own."""
    hidden_BTD = transformer.apply(
        params, network.model, rows.inputs_BT, rows.segment_ids_BT, network.execution
    )
    total, nll_BT = summed_loss(
        hidden_BTD,
        transformer.unembedding(params, network.model),
        rows.targets_BT,
        rows.weight_BT,
        z_loss,
        network.loss_chunks,
    )
    return Losses(total, nll_BT, rows.weight_BT)
