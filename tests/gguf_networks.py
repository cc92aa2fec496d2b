"""Networks of every kind that GGUF can hold, with random weights, and what a file holds of them."""

from pathlib import Path

import numpy as np
import tiny

from mobilellm_jax.leaves import Leaves, flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, RopeScaling, Stack

V = tiny.VOCAB
CONTEXT = 512


def network(*stacks: Stack, width: int = 192, **changes: object) -> ModelConfig:
    """As wide as `width`, with a vocabulary just larger than the tokenizer's."""
    return ModelConfig(V + 5, width, stacks, max_length=CONTEXT, **changes)


NETWORKS = {
    "MobileLLM": network(Stack(2, 9, 3, 1536), width=576),
    "untied, narrow heads": network(Stack(2, 4, 4, 256), head_dim=32, tied=False),
    "MobileLLM-LS": network(Stack(3, 3, 1, 512, repeats=2)),
    "repeat all": network(Stack(3, 3, 1, 512, repeats=2, order="repeat_all")),
    "two stacks": network(Stack(1, 3, 1, 512, repeats=3), Stack(2, 3, 1, 512)),
    "scaled rotations": network(
        Stack(2, 3, 1, 512), rope_theta=500_000.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64)
    ),
    "MobileLLM-R1": network(Stack(2, 9, 3, 2048), width=576, qk_norm="unit", rope_theta=5e5),
    "QK-norm with weights": network(Stack(2, 4, 2, 512), qk_norm="scaled", norm_eps=1e-6),
    "biases": network(Stack(2, 3, 1, 512), qkv_bias=True, rope_theta=1e6),
    "biases, wide heads": network(Stack(2, 4, 2, 512), qkv_bias=True),
    "biases of what goes out": network(Stack(2, 3, 1, 512), out_bias=True),
    "all biases": network(Stack(2, 3, 1, 512), out_bias=True, qkv_bias=True, tied=False),
    "widths of their own": network(
        Stack(1, 6, 3, 320), Stack(2, 2, 2, 96, repeats=2), Stack(1, 3, 1, 224), head_dim=32
    ),
    "widths of their own, everything": network(
        Stack(1, 4, 2, 160),
        Stack(2, 9, 3, 64),
        tied=False,
        qkv_bias=True,
        out_bias=True,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64),
    ),
}


def architecture(model: ModelConfig) -> str:
    """What llama.cpp is to run a network as."""
    if model.qk_norm != "none":
        return "qwen3"
    if len({(stack.heads, stack.kv_heads, stack.mlp_width) for stack in model.stacks}) > 1:
        return "deci"
    fits = model.stacks[0].heads * model.head_dim == model.width
    return "qwen2" if model.qkv_bias and fits and not model.out_bias else "llama"


def leaves_of(
    model: ModelConfig, dtype: type = np.float32, std: float = 0.05
) -> dict[str, np.ndarray]:
    """Random weights, with norm scales apart from 1 and biases apart from 0."""
    rng = np.random.default_rng(0)
    spread = {"scale": (1.0, 0.2), "bias": (0.0, 0.5)}

    def random(path: str, shape: tuple[int, ...]) -> np.ndarray:
        normal = next((n for end, n in spread.items() if path.endswith(end)), (0.0, std))
        return rng.normal(*normal, shape).astype(dtype)

    return {
        path: random(path, leaf.shape) for path, leaf in flat(transformer.shapes(model)).items()
    }


def stored_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors as the package gguf reads them, dequantised."""
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    return {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in tensors}


def stored_block(stored: dict[str, np.ndarray], model: ModelConfig, d: int) -> Leaves:
    """The weights of a block of a file, axes as ours, keyed by our paths in a stack."""
    heads = "blk.{}.attn_{}.{}".format
    interleaved = architecture(model) in ("llama", "deci")

    def half_rotated(rows_ND: np.ndarray) -> np.ndarray:
        """Of a matrix or of a bias."""
        if not interleaved:
            return rows_ND
        pairs = rows_ND.reshape(-1, model.head_dim // 2, 2, *rows_ND.shape[1:])
        return np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(rows_ND.shape)

    def of_heads(rows_ND: np.ndarray) -> np.ndarray:
        return rows_ND.T.reshape(model.width, -1, model.head_dim)

    found = {
        "attention_norm/scale": stored[f"blk.{d}.attn_norm.weight"],
        "attention/query": of_heads(half_rotated(stored[heads(d, "q", "weight")])),
        "attention/key": of_heads(half_rotated(stored[heads(d, "k", "weight")])),
        "attention/value": of_heads(stored[heads(d, "v", "weight")]),
        "attention/out": stored[heads(d, "output", "weight")].T.reshape(
            -1, model.head_dim, model.width
        ),
        "mlp_norm/scale": stored[f"blk.{d}.ffn_norm.weight"],
        **{f"mlp/{n}": stored[f"blk.{d}.ffn_{n}.weight"].T for n in ("gate", "up", "down")},
    }
    if model.qkv_bias:
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
            bias = stored[heads(d, theirs, "bias")]
            bias = bias if theirs == "v" else half_rotated(bias)
            found[f"attention/{ours}_bias"] = bias.reshape(-1, model.head_dim)
    if model.out_bias:
        found["attention/out_bias"] = stored[heads(d, "output", "bias")]
        found["mlp/down_bias"] = stored[f"blk.{d}.ffn_down.bias"]
    if model.qk_norm == "scaled":
        found["attention/query_norm/scale"] = stored[f"blk.{d}.attn_q_norm.weight"]
        found["attention/key_norm/scale"] = stored[f"blk.{d}.attn_k_norm.weight"]
    return found
