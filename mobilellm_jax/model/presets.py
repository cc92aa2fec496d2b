"""The published networks by name: those released, and those that the MobileLLM paper compares.

Released (`PRESETS`): MobileLLM (arXiv 2402.14905, section 4 and the released configurations) and
MobileLLM-R1 (arXiv 2509.24945, table 1). R1's interleaved RoPE and ours differ by a fixed
permutation of the rows of the query and key weights, under which its weightless QK-norm is
unchanged, so one RoPE serves both. R1's final models have a context of 32k and a RoPE base of 8e6;
the base models before them have 4k, and 1e6 as the reciprocal of that extension's factor of 8.

Teachers (`TEACHERS`): Llama 3.1 8B (arXiv 2407.21783, table 3), from which R1 is distilled, and Llama
2 7B (arXiv 2307.09288), from which MobileLLM is in its table 16.

Pruned (`PRUNED`): what the papers of pruning start at (Adapt-Pruner, arXiv 2502.03460; EfficientLLM,
arXiv 2502.06663) beside MobileLLM and Llama 3.1 8B, and what they compare with, as released.

Compared (`COMPARED`), each at about 125M and 350M parameters:

    roadmap-125m-relu                from ReLU to MobileLLM-LS, table 10
    depth-30x512                     layers x width at equal parameters, tables 11 and 12
    heads-8x896-16-4                 layers x width, heads and KV heads, table 13
    shared-8x896-reverse-2           layers x width, order and passes, tables 2 and 14
"""

import dataclasses
import math

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig, RopeScaling, Stack


def shared(config: ModelConfig, repeats: int = 2, order: str = "immediate") -> ModelConfig:
    """The layer-shared (LS) version: every block runs `repeats` times; same parameters."""
    stacks = tuple(dataclasses.replace(s, repeats=repeats, order=order) for s in config.stacks)
    return dataclasses.replace(config, stacks=stacks)


# Layers, heads, KV heads, width, MLP width; heads are 64 wide.
_MOBILELLM = {
    "125m": (30, 9, 3, 576, 1536),
    "350m": (32, 15, 5, 960, 2560),
    "600m": (40, 18, 6, 1152, 3072),
    "1b": (54, 20, 5, 1280, 3584),
    "1.5b": (54, 25, 5, 1600, 4352),
}
_R1 = {
    "140m": (15, 9, 3, 576, 2048),
    "360m": (15, 16, 4, 1024, 4096),
    "950m": (22, 24, 6, 1536, 6144),
}


def _mobilellm(
    layers: int, heads: int, kv_heads: int, width: int, mlp_width: int, tied: bool = True
) -> ModelConfig:
    stack = Stack(layers, heads, kv_heads, mlp_width)
    return ModelConfig(32_000, width, (stack,), head_dim=64, tied=tied)


def _r1(layers: int, heads: int, kv_heads: int, width: int, mlp_width: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=128_256,
        width=width,
        stacks=(Stack(layers, heads, kv_heads, mlp_width),),
        qk_norm="unit",
        rope_theta=1e6,
        max_length=4096,
    )


def _released() -> dict[str, ModelConfig]:
    plain = {f"mobilellm-{size}": _mobilellm(*numbers) for size, numbers in _MOBILELLM.items()}
    ls = {f"mobilellm-ls-{size}": shared(plain[f"mobilellm-{size}"]) for size in ("125m", "350m")}
    r1 = {f"mobilellm-r1-{size}": _r1(*numbers) for size, numbers in _R1.items()}
    long = {
        f"{name}-32k": dataclasses.replace(config, rope_theta=8e6, max_length=32_768)
        for name, config in r1.items()
    }
    return plain | ls | r1 | long


# Table 11: layers and heads. As many KV heads, heads 64 wide, an untied embedding.
_DEPTHS = (
    *((4, 20), (6, 16), (8, 14), (12, 12), (18, 10), (24, 9), (30, 8), (42, 7), (62, 6)),
    *((5, 32), (10, 24), (12, 22), (15, 20), (19, 18)),
    *((24, 16), (28, 15), (32, 14), (46, 12), (66, 10)),
)
# Table 13: layers and width; heads, of which each has a share of the width, with their KV heads.
_BASES = ((8, 896), (15, 1280))
_KV_HEADS = {32: (32, 16, 8, 4, 2, 1), 16: (16, 8, 4, 2, 1), 8: (8, 4, 2, 1)}
# Table 10: where the roadmap starts, and its deep and thin network; layers and heads.
_ROADMAP = {"125m": ((12, 12), (30, 8)), "350m": ((15, 20), (32, 14))}


def _mlp_width(width: int) -> int:
    """8/3 of the width, up to a multiple of 256: SwiGLU's share of the parameters in these tables."""
    return 256 * math.ceil(8 * width / 3 / 256)


def _square(layers: int, heads: int, tied: bool = False) -> ModelConfig:
    """A network whose heads are 64 wide, span the width and have keys and values of their own."""
    width = 64 * heads
    return _mobilellm(layers, heads, heads, width, _mlp_width(width), tied)


def _heads(layers: int, width: int, heads: int, kv_heads: int) -> ModelConfig:
    stack = Stack(layers, heads, kv_heads, _mlp_width(width))
    return ModelConfig(32_000, width, (stack,), head_dim=width // heads, tied=False)


def _roadmap(size: str) -> dict[str, ModelConfig]:
    start, deep = _ROADMAP[size]
    swiglu, gqa = _square(*start), _mobilellm(*_MOBILELLM[size])
    (stack,) = swiglu.stacks
    wide = dataclasses.replace(stack, mlp_width=4 * swiglu.width)
    return {
        "relu": dataclasses.replace(swiglu, mlp="relu", stacks=(wide,)),
        "swiglu": swiglu,
        "deep": _square(*deep),
        "tied": _square(*deep, tied=True),
        "gqa": gqa,
        "ls": shared(gqa),
    }


def _compared() -> dict[str, ModelConfig]:
    found = {f"depth-{layers}x{64 * heads}": _square(layers, heads) for layers, heads in _DEPTHS}
    for size in _ROADMAP:
        found |= {f"roadmap-{size}-{step}": config for step, config in _roadmap(size).items()}
    for layers, width in _BASES:
        base = f"{layers}x{width}"
        for heads, choices in _KV_HEADS.items():
            for kv_heads in choices:
                config = _heads(layers, width, heads, kv_heads)
                found[f"heads-{base}-{heads}-{kv_heads}"] = config
        for order in ("immediate", "repeat_all", "reverse"):
            for repeats in (1, 2, 3, 4):
                config = shared(_heads(layers, width, 16, 16), repeats, order)
                found[f"shared-{base}-{order}-{repeats}"] = config
    return found


PRESETS = _released()
COMPARED = _compared()
TEACHERS = {
    "llama-3.1-8b": ModelConfig(
        vocab_size=128_256,
        width=4096,
        stacks=(Stack(layers=32, heads=32, kv_heads=8, mlp_width=14_336),),
        head_dim=128,
        tied=False,
        rope_theta=5e5,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
        max_length=131_072,
    ),
    "llama-2-7b": ModelConfig(
        vocab_size=32_000,
        width=4096,
        stacks=(Stack(layers=32, heads=32, kv_heads=32, mlp_width=11_008),),
        head_dim=128,
        tied=False,
        max_length=4096,
    ),
}
_SMOLLM = {"135m": (30, 9, 3, 576, 1536), "360m": (32, 15, 5, 960, 2560)}
_SMOLLM |= {"1.7b": (24, 32, 32, 2048, 8192)}
_QWEN = ModelConfig(
    vocab_size=151_936,
    width=896,
    stacks=(Stack(layers=24, heads=14, kv_heads=2, mlp_width=4864),),
    rope_theta=1e6,
    qkv_bias=True,
    norm_eps=1e-6,
    max_length=32_768,
)
_QWEN_1_5B = dataclasses.replace(
    _QWEN,
    width=1536,
    stacks=(Stack(layers=28, heads=12, kv_heads=2, mlp_width=8960),),
    head_dim=128,
    max_length=131_072,
)
PRUNED = {
    f"smollm-{size}": dataclasses.replace(_mobilellm(*numbers), vocab_size=49_152)
    for size, numbers in _SMOLLM.items()
} | {
    "qwen2.5-0.5b": _QWEN,
    "qwen2.5-1.5b": _QWEN_1_5B,
    "deepseek-r1-distill-qwen-1.5b": dataclasses.replace(
        _QWEN_1_5B, tied=False, rope_theta=10_000.0
    ),
}


def preset(name: str) -> ModelConfig:
    """A published network by name.

    Raises:
      UserError: there is no such preset; the sentence lists those there are.
    """
    found = {**PRESETS, **COMPARED, **TEACHERS, **PRUNED}
    if name not in found:
        raise UserError(
            f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}, of the teachers "
            f"{', '.join(TEACHERS)}, of those that are pruned {', '.join(PRUNED)}, or of the networks that "
            f"the MobileLLM paper compares, {', '.join(COMPARED)}."
        )
    return found[name]
