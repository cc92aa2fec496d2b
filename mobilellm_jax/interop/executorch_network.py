"""A network in PyTorch, in the form in which ExecuTorch compiles it well.

Names of weights are those of `layout.FAMILIES["hf_shared"]`. Between two looks into the cache there are only
operators that XNNPACK takes on shapes it learns when it runs, so that all of them are one call: there is
no axis for rows, a mean is a product with a vector, and a rotation one with a matrix of 0, 1 and -1.

Axes: T new tokens, S slots of the cache, D model width, N query heads, K KV heads, H head width, V
vocabulary. Residuals, norms, rotations and the cache are float32; products are of a dtype to choose.
"""

from typing import cast

import torch
import torch.ao.quantization.fx._decomposed  # noqa: F401  operators of `quantized_decomposed`
import torch.nn.functional as F
from torch import nn

from mobilellm_jax.model.attention import rope_frequencies
from mobilellm_jax.model.config import ModelConfig, Stack


class RMSNorm(nn.Module):
    """x / rms(x), times learned weights if `scaled`."""

    mean: torch.Tensor
    eps: torch.Tensor

    def __init__(self, width: int, eps: float, scaled: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if scaled else None
        self.register_buffer("mean", torch.full((1, width), 1 / width), persistent=False)
        self.register_buffer("eps", torch.full((1,), eps), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last axis."""
        y = x * torch.rsqrt(F.linear(x * x, self.mean, self.eps))
        return y if self.weight is None else y * self.weight


class Rotation(nn.Module):
    """Turns component `i` of a head together with `i + H/2`."""

    quarter_turn_HH: torch.Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        quarter_turn_HH = torch.zeros(head_dim, head_dim)
        first = torch.arange(head_dim // 2)
        second = first + head_dim // 2
        quarter_turn_HH[first, second], quarter_turn_HH[second, first] = -1, 1
        self.register_buffer("quarter_turn_HH", quarter_turn_HH, persistent=False)

    def forward(
        self, x_TNH: torch.Tensor, cos_T1H: torch.Tensor, sin_T1H: torch.Tensor
    ) -> torch.Tensor:
        """[T, N, H] -> [T, N, H]."""
        return x_TNH * cos_T1H + F.linear(x_TNH, self.quarter_turn_HH) * sin_T1H


class KVCache(nn.Module):
    """Keys and values of one application of a block."""

    key_1SKH: torch.Tensor
    value_1SKH: torch.Tensor

    def __init__(self, slots: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        for name in ("key_1SKH", "value_1SKH"):
            self.register_buffer(name, torch.zeros(1, slots, kv_heads, head_dim), persistent=False)


class Attention(nn.Module):
    """Grouped-query attention; with RoPE and QK-norm unless the stack goes without positions."""

    def __init__(self, model: ModelConfig, stack: Stack) -> None:
        super().__init__()
        width, bias, self.head_dim = model.width, model.qkv_bias, model.head_dim
        self.heads, self.kv_heads, self.rope = stack.heads, stack.kv_heads, stack.rope
        self.q_proj = nn.Linear(width, stack.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, stack.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, stack.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(stack.heads * self.head_dim, width, bias=model.out_bias)
        self.rotate = Rotation(self.head_dim)

        def qk_norm() -> nn.Module:
            if not self.rope or model.qk_norm == "none":
                return nn.Identity()
            return RMSNorm(self.head_dim, model.norm_eps, model.qk_norm == "scaled")

        self.q_norm, self.k_norm = qk_norm(), qk_norm()

    def forward(
        self, x_TD: torch.Tensor, angles: list[torch.Tensor], at: int, cache: KVCache, writes: bool
    ) -> torch.Tensor:
        """[T, D] -> [T, D]; writes keys and values of its own from slot `at` on, or reads what is there."""
        q_TNH = self.q_norm(self.q_proj(x_TD).float().view(-1, self.heads, self.head_dim))
        if self.rope:
            q_TNH = self.rotate(q_TNH, *angles)
        if writes:
            k_TKH = self.k_norm(self.k_proj(x_TD).float().view(-1, self.kv_heads, self.head_dim))
            v_TKH = self.v_proj(x_TD).float().view(-1, self.kv_heads, self.head_dim)
            if self.rope:
                k_TKH = self.rotate(k_TKH, *angles)
            torch.ops.llama.update_cache(k_TKH[None], cache.key_1SKH, at)
            torch.ops.llama.update_cache(v_TKH[None], cache.value_1SKH, at)
        y_1TNH = torch.ops.llama.custom_sdpa(
            q_TNH[None], cache.key_1SKH, cache.value_1SKH, at, None, 0.0, True
        )
        return self.o_proj(y_1TNH.view(-1, self.heads * self.head_dim).to(x_TD.dtype))


class MLP(nn.Module):
    """SwiGLU, or ReLU without a gate."""

    def __init__(self, model: ModelConfig, stack: Stack) -> None:
        super().__init__()
        if model.mlp == "swiglu":
            self.gate_proj = nn.Linear(model.width, stack.mlp_width, bias=False)
        self.up_proj = nn.Linear(model.width, stack.mlp_width, bias=False)
        self.down_proj = nn.Linear(stack.mlp_width, model.width, bias=model.out_bias)
        self.gated = model.mlp == "swiglu"

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        up_TF = self.up_proj(x_TD)
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * up_TF if self.gated else up_TF.relu())


class Block(nn.Module):
    """One pre-norm decoder block, with Llama's names."""

    def __init__(self, model: ModelConfig, stack: Stack, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.input_layernorm = RMSNorm(model.width, model.norm_eps)
        self.self_attn = Attention(model, stack)
        self.post_attention_layernorm = RMSNorm(model.width, model.norm_eps)
        self.mlp = MLP(model, stack)

    def forward(
        self, x_TD: torch.Tensor, angles: list[torch.Tensor], at: int, cache: KVCache, writes: bool
    ) -> torch.Tensor:
        """[T, D] -> [T, D], float32."""
        y_TD = self.input_layernorm(x_TD).to(self.dtype)
        x_TD = x_TD + self.self_attn(y_TD, angles, at, cache, writes).float()
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD).to(self.dtype)).float()


class Network(nn.Module):
    """New tokens of one text to the logits of the last of them, behind what the cache holds."""

    cos_SH: torch.Tensor
    sin_SH: torch.Tensor

    def __init__(self, model: ModelConfig, slots: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.embed_tokens = nn.Embedding(model.vocab_size, model.width)
        self.stacks = nn.ModuleList()
        for stack in model.stacks:
            blocks = nn.ModuleList([Block(model, stack, dtype) for _ in range(stack.layers)])
            self.stacks.append(nn.ModuleDict({"layers": blocks}))
        self.norm = RMSNorm(model.width, model.norm_eps)
        self.lm_head = nn.Linear(model.width, model.vocab_size, bias=False)
        if model.tied:
            self.lm_head.weight = self.embed_tokens.weight
        self.order: list[tuple[str, int, bool]] = []  # name, cache, whether it writes there
        self.caches = nn.ModuleList()
        before = ""
        for i, stack in enumerate(model.stacks):
            for layer in stack.applications:
                name = f"stacks.{i}.layers.{layer}"
                # With the keys of its first pass, a block reads in its next one what that has written.
                if fresh := model.ls_kv == "fresh" or name != before:
                    self.caches.append(KVCache(slots, stack.kv_heads, model.head_dim))
                self.order.append((name, len(self.caches) - 1, fresh))
                before = name
        angles_SH = torch.outer(
            torch.arange(slots, dtype=torch.float64),
            torch.as_tensor(rope_frequencies(model), dtype=torch.float64),
        ).repeat(1, 2)
        self.register_buffer("cos_SH", angles_SH.cos().float(), persistent=False)
        self.register_buffer("sin_SH", angles_SH.sin().float(), persistent=False)

    def forward(self, tokens_1T: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
        """Int64 [1, T] and the slot of the first of them, int64 [1], to float32 [1, V]."""
        at, count = cast(int, input_pos[0].item()), tokens_1T.shape[1]
        torch._check(at >= 0)
        torch._check(at < len(self.cos_SH))
        torch._check(at + count <= len(self.cos_SH))
        angles = [table.narrow(0, at, count)[:, None] for table in (self.cos_SH, self.sin_SH)]
        x_TD = self.embed_tokens(tokens_1T[0]).float()
        for name, cache, writes in self.order:
            x_TD = self.get_submodule(name)(x_TD, angles, at, self.caches[cache], writes)
        return self.lm_head(self.norm(x_TD[-1:]).to(self.dtype)).float()


def _range(bits: int) -> tuple[int, int]:
    """Least and largest integer: of 8 bits symmetric, of 4 all that there are."""
    return -(2 ** (bits - 1)) + (bits == 8), 2 ** (bits - 1) - 1


def rounded(
    weight: torch.Tensor, bits: int, group: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [out, in] as int8, and scales of its rows, [out, 1], or of groups, [out, in / group]."""
    least, largest = _range(bits)
    rows = weight.unflatten(1, (-1, group or weight.shape[1]))
    exact = rows.abs().amax(2) / ((largest - least) / 2)
    # XNNPACK holds the scales of groups in bfloat16, whose rounding the integers shall know of.
    scale = exact.bfloat16().float() if group else exact
    scale = scale.clamp(min=torch.finfo(torch.bfloat16).tiny)
    integers = torch.round(rows / scale[..., None]).clamp(least, largest)
    return integers.flatten(1).to(torch.int8), scale


class IntegerLinear(nn.Module):
    """A product of integers: each of its factors rounded to a row's scale, or that of a group in it.

    Written in the operators that XNNPACK knows as products of integers. What enters has 8 bits, and a scale
    and a zero point for each token.
    """

    integers: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor

    def __init__(self, linear: nn.Linear, bits: int, group: int | None = None) -> None:
        super().__init__()
        self.range, self.group = _range(bits), group
        integers, scale = rounded(linear.weight.detach(), bits, group)
        self.register_buffer("integers", integers)
        self.register_buffer("scale", scale if group else scale[:, 0])
        self.register_buffer("zero", torch.zeros_like(self.scale, dtype=torch.int64))
        self.bias = linear.bias

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, F]."""
        ops = torch.ops.quantized_decomposed
        of_token = *ops.choose_qparams_per_token_asymmetric(x_TD, torch.int8), -128, 127, torch.int8
        integers_TD = ops.quantize_per_token(x_TD, *of_token)
        x_TD = ops.dequantize_per_token(integers_TD, *of_token, torch.float32)
        given = self.integers, self.scale, self.zero
        if self.group is None:
            weight_FD = ops.dequantize_per_channel(*given, 0, *self.range, torch.int8)
        else:
            of_group = *self.range, torch.int8, self.group, torch.float32
            weight_FD = ops.dequantize_per_channel_group(*given, *of_group)
        return F.linear(x_TD, weight_FD, self.bias)


class IntegerTable(nn.Module):
    """An embedding of 8 bits, with a scale for each row."""

    integers_VD: torch.Tensor
    scale_V1: torch.Tensor

    def __init__(self, weight_VD: torch.Tensor) -> None:
        super().__init__()
        integers_VD, scale_V1 = rounded(weight_VD, 8)
        self.register_buffer("integers_VD", integers_VD)
        self.register_buffer("scale_V1", scale_V1)

    def forward(self, tokens_T: torch.Tensor) -> torch.Tensor:
        """Int64 [T] -> float32 [T, D]."""
        return F.embedding(tokens_T, self.integers_VD).float() * F.embedding(
            tokens_T, self.scale_V1
        )
