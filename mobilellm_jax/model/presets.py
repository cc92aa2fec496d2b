"""The published networks by name.

Widths are those of MobileLLM (arXiv 2402.14905, section 4 and its released configurations) and
MobileLLM-R1 (arXiv 2509.24945, table 1). R1's interleaved RoPE and ours differ by a fixed
permutation of the rows of the query and key weights, under which its weightless QK-norm is
unchanged, so one RoPE serves both.
"""

import dataclasses

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig, Stack


def _mobilellm(layers: int, heads: int, kv_heads: int, width: int, mlp_width: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=32_000, width=width, stacks=(Stack(layers, heads, kv_heads, mlp_width),)
    )


def _r1(layers: int, heads: int, kv_heads: int, width: int, mlp_width: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=128_256,
        width=width,
        stacks=(Stack(layers, heads, kv_heads, mlp_width),),
        qk_norm="unit",
        rope_theta=500_000.0,
        max_length=4096,
    )


def shared(config: ModelConfig, repeats: int = 2) -> ModelConfig:
    """The layer-shared (LS) version: every block runs `repeats` times in a row; same parameters."""
    stacks = tuple(dataclasses.replace(stack, repeats=repeats) for stack in config.stacks)
    return dataclasses.replace(config, stacks=stacks)


PRESETS: dict[str, ModelConfig] = {
    "mobilellm-125m": _mobilellm(30, 9, 3, 576, 1536),
    "mobilellm-350m": _mobilellm(32, 15, 5, 960, 2560),
    "mobilellm-600m": _mobilellm(40, 18, 6, 1152, 3072),
    "mobilellm-1b": _mobilellm(54, 20, 5, 1280, 3584),
    "mobilellm-1.5b": _mobilellm(54, 25, 5, 1600, 4352),
    "mobilellm-ls-125m": shared(_mobilellm(30, 9, 3, 576, 1536)),
    "mobilellm-ls-350m": shared(_mobilellm(32, 15, 5, 960, 2560)),
    "mobilellm-r1-140m": _r1(15, 9, 3, 576, 2048),
    "mobilellm-r1-360m": _r1(15, 16, 4, 1024, 4096),
    "mobilellm-r1-950m": _r1(22, 24, 6, 1536, 6144),
}


def preset(name: str) -> ModelConfig:
    """A published network by name.

    Raises:
      UserError: there is no such preset; the sentence lists those there are.
    """
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]
