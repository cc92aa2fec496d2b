"""Our training step for `benchmarks.step`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mobilellm_jax.model import transformer
from mobilellm_jax.model.attention import choose
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.training.objectives import (
    Batch,
    Losses,
    Network,
    cross_entropy,
    next_token,
    split_rows,
)
from mobilellm_jax.training.optimizer import adamw
from mobilellm_jax.training.step import init_state, train_step


def together(params: Any, batch: Batch, network: Network) -> Losses:
    """The loss of the next token where a row is one document, whatever it holds."""
    rows = split_rows(batch["tokens"], network.bos_id, network.eos_id)
    return cross_entropy(params, dataclasses.replace(rows, segment_ids_BT=None), network)


def prepared(
    job: Any, model: ModelConfig, tokens: np.ndarray
) -> tuple[Callable[[], Any], Callable[[Any], Any], str, Callable[[], int]]:
    """A step to call again and again, how to wait for it, the device, and its peak bytes in use."""
    device = jax.devices()[0]
    dtype = job.dtype
    if dtype == "auto":
        dtype = "float32" if device.platform == "cpu" else "bfloat16"
    kernel = choose(job.attention, device.platform, model, dtype, job.row_length)
    unroll = transformer.layers_at_once(job.unroll, job.remat, device.platform, model)
    execution = transformer.Execution(dtype, job.remat, unroll, kernel)
    network = Network(model, execution, 1, 2, job.loss_chunks)
    make_optimizer = functools.partial(adamw, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0)
    state = jax.jit(
        lambda: init_state(transformer.init(model, jax.random.key(0)), make_optimizer)
    )()
    step = jax.jit(
        functools.partial(
            train_step,
            network=network,
            objective=next_token if job.way == "ours, documents apart" else together,
            make_optimizer=make_optimizer,
            schedule=lambda _: 1e-4,
            sources=1,
        ),
        donate_argnums=0,
    )
    batch = jax.device_put({"tokens": tokens, "source": np.zeros(len(tokens), np.int32)})
    piece_bytes_V = jnp.ones(model.vocab_size, jnp.int32)

    def advance() -> Any:
        nonlocal state
        state, metrics = step(state, batch, piece_bytes_V)
        return metrics

    def memory() -> int:
        stats = device.memory_stats() or {}
        return int(stats.get("peak_bytes_in_use", 0))

    return advance, jax.block_until_ready, device.device_kind, memory
