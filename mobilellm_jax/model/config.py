"""One description of a network, from which everything else is derived.

A network is an embedding, a tuple of `Stack`s (runs of equal blocks) and a final norm. A plain
MobileLLM is one stack; MobileLLM-LS is one stack whose blocks run twice in a row; a pruned network
is several stacks. The fields cover the decoders that users bring along as well: Llama, Qwen2, Qwen3
and dense Llama 4.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.quantization import parts_of

ORDERS = ("immediate", "repeat_all", "reverse")
QK_NORMS = ("none", "unit", "scaled")
MLPS = ("swiglu", "relu")
LS_KVS = ("fresh", "first_pass")

# Beyond them a description is a mistake, at which a program would run out of memory or seem to hang.
LARGEST = 1 << 24  # number of anything but blocks
DEEPEST = 10_000  # blocks applied to a token


@dataclasses.dataclass(frozen=True)
class Stack:
    """A run of equal blocks, each applied `repeats` times: block-wise weight sharing.

    The network is `layers * repeats` deep with the weights of `layers` blocks (MobileLLM, section
    3.3). The order in which blocks are applied is one of figure 2's: for three blocks, twice,

        immediate   1 1 2 2 3 3
        repeat_all  1 2 3 1 2 3
        reverse     1 2 3 3 2 1    (a third pass runs forwards again)
    """

    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    repeats: int = 1
    order: str = "immediate"
    rope: bool = True  # False: neither positions nor QK-norm (NoPE, as in Llama 4)

    @property
    def passes(self) -> tuple[int, int]:
        """Walks through the blocks, and applications of a block in each."""
        return (1, self.repeats) if self.order == "immediate" else (self.repeats, 1)

    def backwards(self, walk: int) -> bool:
        """Whether this walk through the blocks starts at the last."""
        return self.order == "reverse" and walk % 2 == 1

    @property
    def applications(self) -> tuple[int, ...]:
        """The block of each application, in order of execution."""
        walks, times = self.passes
        forwards = [layer for layer in range(self.layers) for _ in range(times)]
        return tuple(
            layer
            for walk in range(walks)
            for layer in (forwards[::-1] if self.backwards(walk) else forwards)
        )


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of slow rotations to a longer context (`rope_type: llama3`)."""

    factor: float  # slow rotations are slowed down by this
    low_freq_factor: float  # slow: fewer turns than this in `original_max_length` tokens
    high_freq_factor: float  # fast, and left as it is: more turns than this
    original_max_length: int  # context in tokens before the stretching

    def __post_init__(self) -> None:
        """Raises `UserError` where the numbers describe no stretching."""
        factors = 1 <= self.factor < math.inf and 0 < self.low_freq_factor < self.high_freq_factor
        if not (factors and _counts(self.original_max_length)):
            raise UserError(
                f"model.rope_scaling={self} is not usable: factor must be at least 1, low_freq_factor "
                "positive and below high_freq_factor, and original_max_length a number of tokens."
            )


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
    rope_scaling: RopeScaling | None = None
    mlp: str = "swiglu"  # "relu": two matrices and no gate, as in OPT
    qkv_bias: bool = False  # biases of query, key and value (Qwen2)
    out_bias: bool = False  # biases of what attention and MLP add to the residual stream (FLAP)
    ls_kv: str = "fresh"  # "first_pass": a shared block's later passes read its first one's keys
    norm_eps: float = 1e-5
    max_length: int = 2048  # context in tokens
    init_std: float = 0.02
    dead_channels: bool = False  # a network being pruned: residual channels whose norm scales are 0
    quantization: str = "none"  # "w8a8", or some of it (`model.quantization`): numbers of 8 bits
    block: str = "mobilellm_jax.model.transformer:Block"

    def __post_init__(self) -> None:
        """Raises `UserError` where the description is not a network."""
        if not self.stacks:
            raise UserError("the model has no stack: give model.stacks at least one Stack.")
        for i, stack in enumerate(self.stacks):
            numbers = stack.layers, stack.heads, stack.kv_heads, stack.mlp_width, stack.repeats
            if not all(map(_counts, numbers)):
                raise UserError(
                    f"model.stacks[{i}] has a number that is not whole, below 1 or above "
                    f"{LARGEST:,}: {stack}."
                )
            _flag(f"model.stacks[{i}].rope", stack.rope)
            _one_of(f"model.stacks[{i}].order", stack.order, ORDERS)
            if self.ls_kv == "first_pass" and stack.order != "immediate":
                raise UserError(
                    f"model.stacks[{i}].order={stack.order!r}, but model.ls_kv='first_pass' shares "
                    "keys between passes that follow each other: make the order 'immediate'."
                )
            if stack.heads % stack.kv_heads:
                raise UserError(
                    f"model.stacks[{i}]: heads={stack.heads} is not a multiple of "
                    f"kv_heads={stack.kv_heads}, so query heads cannot share KV heads evenly."
                )
        if self.depth > DEEPEST:
            raise UserError(
                f"the model is {self.depth:,} blocks deep, and may be {DEEPEST:,}: lower layers or "
                "repeats of model.stacks."
            )
        for key in ("vocab_size", "width", "head_dim", "max_length"):
            if not _counts(value := getattr(self, key)):
                raise UserError(
                    f"model.{key}={value!r} must be a whole number from 1 to {LARGEST:,}."
                )
        if not 0 < self.rope_theta < math.inf:
            raise UserError(f"model.rope_theta={self.rope_theta} must be a number above 0.")
        for key in ("norm_eps", "init_std"):
            if not 0 <= (value := getattr(self, key)) <= LARGEST:
                raise UserError(f"model.{key}={value} must be a number from 0 to {LARGEST:,}.")
        for key in ("tied", "qkv_bias", "out_bias", "dead_channels"):
            _flag(f"model.{key}", getattr(self, key))
        if self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} is odd, but RoPE rotates pairs.")
        _one_of("model.qk_norm", self.qk_norm, QK_NORMS)
        _one_of("model.mlp", self.mlp, MLPS)
        _one_of("model.ls_kv", self.ls_kv, LS_KVS)
        parts_of(self.quantization)

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
            scaling = raw.get("rope_scaling")
            scaling = RopeScaling(**dict(scaling)) if scaling else None
            return cls(**{**dict(raw), "stacks": stacks, "rope_scaling": scaling})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"the model description is not usable ({error}): its keys are those of "
                "ModelConfig and Stack in mobilellm_jax/model/config.py."
            ) from None


def _counts(value: Any) -> bool:
    return isinstance(value, int | np.integer) and bool(1 <= value <= LARGEST)


def _flag(key: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise UserError(f"{key}={value!r} must be true or false.")


def _one_of(key: str, value: str, values: tuple[str, ...]) -> None:
    if value not in values:
        raise UserError(f"{key}={value!r} is not one of {', '.join(values)}.")


def _block_matrices(config: ModelConfig, stack: Stack) -> int:
    """Matrix parameters of one block: q and out, k and v, and those of the MLP."""
    attention = 2 * config.width * config.head_dim * (stack.heads + stack.kv_heads)
    return attention + (3 if config.mlp == "swiglu" else 2) * config.width * stack.mlp_width


def _block_vectors(config: ModelConfig, stack: Stack) -> int:
    """Norm scales and biases of one block."""
    head_norms = 2 * config.head_dim if config.qk_norm == "scaled" and stack.rope else 0
    biases = config.head_dim * (stack.heads + 2 * stack.kv_heads) if config.qkv_bias else 0
    outputs = 2 * config.width if config.out_bias else 0
    return 2 * config.width + head_norms + biases + outputs


def parameter_count(config: ModelConfig) -> int:
    """Exact number of parameters, norm scales included (the papers' tables leave those out)."""
    blocks = sum(
        s.layers * (_block_matrices(config, s) + _block_vectors(config, s)) for s in config.stacks
    )
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
