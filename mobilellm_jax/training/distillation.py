"""Distillation: a student learns what a teacher says of the next token, not only which one came.

`distillation` is an objective like `next_token`; `config.teacher` says whose distribution it learns:
a network that is run beside the student (`training/teacher.py`), or the likeliest tokens that a
teacher wrote down beside the rows (`teach`). Either way the logits of a chunk of the tokens exist at
once and no more, the student's and the teacher's (`model/loss.py`).

MobileLLM-R1 (arXiv 2509.24945, section 4) mid-trains on the divergence from its teacher alone;
MobileLLM (arXiv 2402.14905, section 3.6) adds it to the loss on labels. Neither names a
temperature, weights or a direction: what is not set here is the plain choice, the forward divergence
at temperature 1.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mobilellm_jax.data.taught import TAUGHT_IDS, TAUGHT_LOG_PROBS
from mobilellm_jax.errors import UserError
from mobilellm_jax.model import transformer
from mobilellm_jax.model.loss import sum_over_chunks
from mobilellm_jax.training.objectives import Batch, Losses, Network, split_rows
from mobilellm_jax.training.teacher import Teacher

# log p of all tokens, float32 [N, V], given those of the student, what belongs to these targets, what
# is shared by all, and the temperature.
Taught = Callable[[jax.Array, Any, Any, float], jax.Array]


def distillation(
    params: Any,
    batch: Batch,
    network: Network,
    teacher: Teacher | None = None,
    temperature: float = 1.0,
    labels: float = 0.0,
    reverse: float = 0.0,
    all_tokens: bool = False,
) -> Losses:
    """What is between the student's distribution q and the teacher's p, at every target that counts.

    With both at the temperature t, the mean over the targets of

        (1 - labels) * t**2 * ((1 - reverse) * KL(p || q) + reverse * KL(q || p)) + labels * nll

    The square of the temperature keeps gradients of one size (Hinton et al., arXiv 1503.02531,
    section 2.1). The loss on labels is that of the student at temperature 1.

    Args:
      params: of the student.
      batch: see `objectives`; with what a teacher wrote down, `taught_ids` int [B, T, k] and
        `taught_log_probs` [B, T, k] as well (see `sparse`).
      network: the student.
      teacher: what is run, where the batch brings nothing.
      temperature: of both distributions.
      labels: share of the loss on labels, 0 to 1.
      reverse: share of the reverse divergence in the other part, 0 to 1.
      all_tokens: see `objectives.next_token`.

    Raises:
      UserError: a share is not one, or the temperature is not positive.
    """
    if not (0 <= labels <= 1 and 0 <= reverse <= 1):
        raise UserError(
            f"config.objective.labels={labels} and config.objective.reverse={reverse} are shares: each is "
            "from 0 to 1."
        )
    if temperature <= 0:
        raise UserError(f"config.objective.temperature={temperature} must be positive.")
    rows = split_rows(batch["tokens"], network.bos_id, network.eos_id, all_tokens=all_tokens)
    run = rows.inputs_BT, rows.segment_ids_BT
    if TAUGHT_IDS in batch:
        taught: Any = batch[TAUGHT_IDS], batch[TAUGHT_LOG_PROBS]
        whole: Any = ()
        log_p: Taught = sparse
    else:
        assert teacher is not None  # `setup` has seen to it
        of = teacher.network
        taught = transformer.apply(teacher.params, of.model, *run, of.execution)
        whole = transformer.unembedding(teacher.params, of.model).astype(taught.dtype)
        log_p = dense
    cost = functools.partial(
        _cost, log_p=log_p, temperature=temperature, labels=labels, reverse=reverse
    )
    total, nll_BT = sum_over_chunks(
        cost,
        transformer.apply(params, network.model, *run, network.execution),
        transformer.unembedding(params, network.model),
        (rows.targets_BT, rows.weight_BT, taught),
        network.loss_chunks,
        whole,
    )
    return Losses(total, nll_BT, rows.weight_BT)


def dense(
    log_q_NV: jax.Array, hidden_NE: jax.Array, unembedding_EV: jax.Array, temperature: float
) -> jax.Array:
    """What a network says: its hidden states [N, E] against its output embedding, both of one dtype."""
    logits_NV = jnp.einsum(
        "NE,EV->NV", hidden_NE, unembedding_EV, preferred_element_type=jnp.float32
    )
    return jax.nn.log_softmax(logits_NV / temperature, axis=-1)


def sparse(
    log_q_NV: jax.Array, top: tuple[jax.Array, jax.Array], whole: Any, temperature: float
) -> jax.Array:
    """What is known of a teacher's k likeliest tokens; what it leaves is shared as the student has it.

    So the other tokens are one event, whose probability is the teacher's and whose inside costs
    nothing: with it the divergence is never more than the whole one, and equal where k is V. Log
    probabilities were written at the temperature that is trained at.

    Args:
      log_q_NV: of the student.
      top: ids int [N, k], all different, and their log probabilities [N, k].
      whole: nothing.
      temperature: has been applied.
    """
    ids_NK, log_p_NK = top[0], top[1].astype(jnp.float32)
    at_N1 = jnp.arange(len(ids_NK))[:, None]
    # Rounding lets sums pass 1 a little; what is left over is never quite nothing.
    rest_p_N = jnp.maximum(1 - jnp.exp(log_p_NK).sum(-1), 1e-6)
    inside_NV = jnp.zeros(log_q_NV.shape, bool).at[at_N1, ids_NK].set(True)
    others_NV = jnp.where(inside_NV, -jnp.inf, log_q_NV)
    rest_q_N = jax.nn.logsumexp(others_NV, axis=-1)
    rest_q_N = jnp.maximum(rest_q_N, jnp.finfo(jnp.float32).min)  # nothing is left where k is V
    log_p_NV = log_q_NV + (jnp.log(rest_p_N) - rest_q_N)[:, None]
    return log_p_NV.at[at_N1, ids_NK].set(log_p_NK)


def _cost(
    logits_NV: jax.Array,
    given: tuple[jax.Array, jax.Array, Any],
    whole: Any,
    *,
    log_p: Taught,
    temperature: float,
    labels: float,
    reverse: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `loss.Cost`. A share of zero is left out of the program."""
    targets_N, weight_N, taught = given
    log_z_N = jax.nn.logsumexp(logits_NV, axis=-1)
    nll_N = log_z_N - jnp.take_along_axis(logits_NV, targets_N[:, None], axis=-1)[:, 0]
    plain_NV = logits_NV - log_z_N[:, None]
    log_q_NV = plain_NV if temperature == 1 else jax.nn.log_softmax(logits_NV / temperature)
    log_p_NV = log_p(log_q_NV, taught, whole, temperature)
    q_NV, between_NV = jnp.exp(log_q_NV), log_p_NV - log_q_NV
    cost_N, gradient_NV = jnp.zeros_like(nll_N), jnp.zeros_like(logits_NV)
    if forward := (1 - labels) * (1 - reverse):
        p_NV = jnp.exp(log_p_NV)
        # A token without any probability costs nothing, whatever the logarithms say.
        divergence_N = jnp.where(p_NV > 0, p_NV * between_NV, 0.0).sum(-1)
        cost_N += forward * temperature**2 * divergence_N
        gradient_NV += forward * temperature * (q_NV - p_NV)
    if backward := (1 - labels) * reverse:
        divergence_N = -(q_NV * between_NV).sum(-1)
        cost_N += backward * temperature**2 * divergence_N
        gradient_NV -= backward * temperature * q_NV * (between_NV + divergence_N[:, None])
    if labels:
        is_target_NV = jnp.arange(logits_NV.shape[-1]) == targets_N[:, None]
        cost_N += labels * nll_N
        gradient_NV += labels * (jnp.exp(plain_NV) - is_target_NV)
    return weight_N * cost_N, nll_N, weight_N[:, None] * gradient_NV
