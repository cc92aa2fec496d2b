"""One description of a network, from which everything else is derived.

A network is an embedding, a tuple of `Stack`s (runs of equal blocks) and a final norm. A plain
MobileLLM is one stack; MobileLLM-LS is one stack whose blocks run twice in a row; a pruned network
is several stacks.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mobilellm_jax.errors import UserError

QK_NORMS = ("none", "unit", "scaled")


@dataclasses.dataclass(frozen=True)
class Stack:
    """A run of equal blocks.

    `repeats` is MobileLLM's immediate block-wise weight sharing (paper section 3.3): every block is
    applied `repeats` times in a row, 1 1 2 2 3 3 ..., so the network is `layers * repeats` deep
    with the weights of `layers` blocks.
    """

    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    repeats: int = 1


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """What a network is. How it is executed (dtype, remat) is `transformer.Execution`."""

    vocab_size: int
    width: int
    stacks: tuple[Stack, ...]
    head_dim: int = 64
    tied: bool = True
    qk_norm: str = "none"  # "unit": RMS norm without weights (R1); "scaled": with weights
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    max_length: int = 2048  # context in tokens
    init_std: float = 0.02
    block: str = "mobilellm_jax.model.transformer:Block"

    def __post_init__(self) -> None:
        """Raises `UserError` where the description is not a network."""
        if not self.stacks:
            raise UserError("the model has no stack: give model.stacks at least one Stack.")
        for i, stack in enumerate(self.stacks):
            if min(dataclasses.astuple(stack)) < 1:
                raise UserError(f"model.stacks[{i}] has a number below 1: {stack}.")
            if stack.heads % stack.kv_heads:
                raise UserError(
                    f"model.stacks[{i}]: heads={stack.heads} is not a multiple of "
                    f"kv_heads={stack.kv_heads}, so query heads cannot share KV heads evenly."
                )
        if min(self.vocab_size, self.width, self.head_dim, self.max_length) < 1:
            raise UserError("model: vocab_size, width, head_dim and max_length must be positive.")
        if self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} is odd, but RoPE rotates pairs.")
        if self.qk_norm not in QK_NORMS:
            raise UserError(f"model.qk_norm={self.qk_norm!r} is not one of {', '.join(QK_NORMS)}.")

    @property
    def depth(self) -> int:
        """Blocks applied to a token, repeats counted; also the number of KV-cache slots."""
        return sum(stack.layers * stack.repeats for stack in self.stacks)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON and `ConfigDict`; `from_dict` reads it back."""
        raw = dataclasses.asdict(self)
        raw["stacks"] = [dataclasses.asdict(stack) for stack in self.stacks]
        return raw

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Reads what `to_dict` wrote.

        Raises:
          UserError: a key is unknown or missing, or the values describe no network.
        """
        try:
            stacks = tuple(Stack(**dict(stack)) for stack in raw["stacks"])
            return cls(**{**dict(raw), "stacks": stacks})
        except (KeyError, TypeError) as error:
            raise UserError(
                f"the model description is not usable ({error}): its keys are those of "
                "ModelConfig and Stack in mobilellm_jax/model/config.py."
            ) from None


def _block_matrices(config: ModelConfig, stack: Stack) -> int:
    """Matrix parameters of one block: q and out, k and v, and the three of SwiGLU."""
    attention = 2 * config.width * config.head_dim * (stack.heads + stack.kv_heads)
    return attention + 3 * config.width * stack.mlp_width


def parameter_count(config: ModelConfig) -> int:
    """Exact number of parameters, norm scales included (the papers' tables leave those out)."""
    norms = 2 * config.width + (2 * config.head_dim if config.qk_norm == "scaled" else 0)
    blocks = sum(s.layers * (_block_matrices(config, s) + norms) for s in config.stacks)
    tables = config.vocab_size * config.width * (1 if config.tied else 2)
    return tables + blocks + config.width


def flops_per_token(config: ModelConfig, length: int) -> int:
    """Model FLOPs to train on one token of a row of `length` tokens, forward and backward.

        6 * (matrix parameters, once per application, + V * D) + 6 * depth-summed(heads * head_dim)
        * length

    A multiply-add is two FLOPs, the backward pass twice the forward, hence 6. Attention's two
    products (q k and weights v) read `length / 2` keys on average, because it is causal: 2 * 2 *
    (length / 2) * 3. Recomputation is not counted, nor are norms, softmax and the embedding
    look-up. The model FLOPs utilisation is this, times tokens per second, over the peak of the
    devices.
    """
    total = config.vocab_size * config.width
    for stack in config.stacks:
        applications = stack.layers * stack.repeats
        total += applications * _block_matrices(config, stack)
        total += applications * stack.heads * config.head_dim * length
    return 6 * total
