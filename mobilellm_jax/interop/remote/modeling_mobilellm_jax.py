# SPDX-License-Identifier: Apache-2.0
"""MobileLLM networks in PyTorch: every block's weights once, however often it is applied.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)

Axes: B rows, T query positions, S key positions, D model width, N query heads, K KV heads, H head
width, V vocabulary. Norms, rotations and softmax are computed in float32.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_mobilellm_jax import MobileLLMJaxConfig


def applications(model: dict[str, Any]) -> list[tuple[int, int]]:
    """The stack and layer of each application of a block, in order of execution."""
    order: list[tuple[int, int]] = []
    for i, stack in enumerate(model["stacks"]):
        forwards = [(i, layer) for layer in range(stack["layers"])]
        if stack["order"] == "immediate":
            order += [block for block in forwards for _ in range(stack["repeats"])]
        else:
            backwards = forwards[::-1] if stack["order"] == "reverse" else forwards
            for walk in range(stack["repeats"]):
                order += backwards if walk % 2 else forwards
    return order


def rope_frequencies(model: dict[str, Any]) -> list[float]:
    """Radians per position of each pair of a head's components, with Llama 3.1's scaling if any."""
    half = model["head_dim"] // 2
    frequencies = [model["rope_theta"] ** (-i / half) for i in range(half)]
    scaling = model["rope_scaling"]
    if scaling is None:
        return frequencies
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = [scaling["original_max_length"] * f / (2 * math.pi) for f in frequencies]
    kept = [min(max((turn - low) / (high - low), 0), 1) for turn in turns]
    return [f * (k + (1 - k) / scaling["factor"]) for f, k in zip(frequencies, kept, strict=True)]


def rotate(x_BNTH: torch.Tensor, angles_B1TH: torch.Tensor) -> torch.Tensor:
    """Turns component `i` of a head together with `i + H/2`; angles are given for the first half."""
    cos, sin = angles_B1TH.cos(), angles_B1TH.sin()
    first, second = x_BNTH.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x_BNTH.dtype)


def visible(
    attention_mask: torch.Tensor | None, past: int, queries_T: torch.Tensor
) -> torch.Tensor | None:
    """The keys that each query may read, [B, 1, T, S]; None where no key is cached or padding.

    Args:
      attention_mask: [B, S], zero for padding, on either side; or ready-made, [B, 1, T, S].
      past: how many tokens are cached.
      queries_T: places in their rows of those that follow.
    """
    length = past + len(queries_T)
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask[..., :length]
    if past == 0 and (attention_mask is None or bool(attention_mask.all())):
        return None
    keys_S, queries_T1 = torch.arange(length, device=queries_T.device), queries_T[:, None]
    causal_11TS = (keys_S <= queries_T1)[None, None]
    if attention_mask is None:
        return causal_11TS
    # Padding reads itself, because the softmax over no key at all is not a number.
    return causal_11TS & (attention_mask[:, None, None].bool() | (keys_S == queries_T1))


class RMSNorm(nn.Module):
    """x / rms(x), times learned weights if `scaled`."""

    def __init__(self, width: int, eps: float, scaled: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width)) if scaled else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalises the last axis."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            y = y * self.weight.float()
        return y.to(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention; with RoPE and QK-norm unless the stack goes without positions."""

    def __init__(self, model: dict[str, Any], stack: dict[str, Any]) -> None:
        super().__init__()
        width, bias, self.head_dim = model["width"], model["qkv_bias"], model["head_dim"]
        self.groups = stack["heads"] // stack["kv_heads"]
        self.q_proj = nn.Linear(width, stack["heads"] * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, stack["kv_heads"] * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, stack["kv_heads"] * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(stack["heads"] * self.head_dim, width, bias=model["out_bias"])
        self.rope = stack["rope"]

        def qk_norm() -> nn.Module:
            if not self.rope or model["qk_norm"] == "none":
                return nn.Identity()
            return RMSNorm(self.head_dim, model["norm_eps"], model["qk_norm"] == "scaled")

        self.q_norm, self.k_norm = qk_norm(), qk_norm()

    def forward(
        self,
        x_BTD: torch.Tensor,
        k_BKSH: torch.Tensor | None,
        v_BKSH: torch.Tensor | None,
        angles_B1TH: torch.Tensor,
        mask: torch.Tensor | None,
        past_key_values: Cache | None,
        cache_position: torch.Tensor,
        slot: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reads the given keys and values or, where there are none, its own behind the cache's."""
        q_BNTH = self.q_norm(self._heads(self.q_proj(x_BTD)))
        if self.rope:
            q_BNTH = rotate(q_BNTH, angles_B1TH)
        if k_BKSH is None or v_BKSH is None:
            k_BKSH = self.k_norm(self._heads(self.k_proj(x_BTD)))
            v_BKSH = self._heads(self.v_proj(x_BTD))
            if self.rope:
                k_BKSH = rotate(k_BKSH, angles_B1TH)
            if past_key_values is not None:
                at = {"cache_position": cache_position}  # transformers 5 knows by itself
                k_BKSH, v_BKSH = past_key_values.update(k_BKSH, v_BKSH, slot, at)
                read = x_BTD.shape[1] if mask is None else mask.shape[-1]
                # A cache of fixed size also returns what is not written yet.
                k_BKSH, v_BKSH = k_BKSH[:, :, :read], v_BKSH[:, :, :read]
        y_BNTH = F.scaled_dot_product_attention(
            q_BNTH,
            k_BKSH.repeat_interleave(self.groups, dim=1),
            v_BKSH.repeat_interleave(self.groups, dim=1),
            attn_mask=mask,
            is_causal=mask is None,
        )
        return self.o_proj(y_BNTH.transpose(1, 2).flatten(2)), k_BKSH, v_BKSH

    def _heads(self, x_BTF: torch.Tensor) -> torch.Tensor:
        return x_BTF.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU, or ReLU without a gate."""

    def __init__(self, model: dict[str, Any], stack: dict[str, Any]) -> None:
        super().__init__()
        width, hidden = model["width"], stack["mlp_width"]
        self.gated = model["mlp"] == "swiglu"
        if self.gated:
            self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=model["out_bias"])

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        up_BTF = self.up_proj(x_BTD)
        return self.down_proj(
            F.silu(self.gate_proj(x_BTD)) * up_BTF if self.gated else up_BTF.relu()
        )


class MobileLLMJaxBlock(GradientCheckpointingLayer):
    """One pre-norm decoder block, with Llama's names."""

    def __init__(self, model: dict[str, Any], stack: dict[str, Any]) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(model["width"], model["norm_eps"])
        self.self_attn = Attention(model, stack)
        self.post_attention_layernorm = RMSNorm(model["width"], model["norm_eps"])
        self.mlp = MLP(model, stack)

    def forward(
        self,
        x_BTD: torch.Tensor,
        k_BKSH: torch.Tensor | None,
        v_BKSH: torch.Tensor | None,
        **context: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The next hidden states, and the keys and values that were read."""
        y_BTD, k_BKSH, v_BKSH = self.self_attn(
            self.input_layernorm(x_BTD), k_BKSH, v_BKSH, **context
        )
        x_BTD = x_BTD + y_BTD
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD)), k_BKSH, v_BKSH


class MobileLLMJaxPreTrainedModel(PreTrainedModel):
    """What transformers has to know."""

    config_class = MobileLLMJaxConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MobileLLMJaxBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True


class MobileLLMJaxModel(MobileLLMJaxPreTrainedModel):
    """Tokens to hidden states, after the final norm."""

    def __init__(self, config: MobileLLMJaxConfig) -> None:
        super().__init__(config)
        model = config.mobilellm_jax["model"]
        self.embed_tokens = nn.Embedding(config.vocab_size, model["width"])
        self.stacks = nn.ModuleList()
        for stack in model["stacks"]:
            blocks = [MobileLLMJaxBlock(model, stack) for _ in range(stack["layers"])]
            self.stacks.append(nn.ModuleDict({"layers": nn.ModuleList(blocks)}))
        self.norm = RMSNorm(model["width"], model["norm_eps"])
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Arguments and results are those of transformers' Llama."""
        model = self.config.mobilellm_jax["model"]
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", True) and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        cache_position = torch.arange(past, past + x_BTD.shape[1], device=x_BTD.device)
        if position_ids is None:
            position_ids = cache_position[None]
        frequencies_H = torch.tensor(rope_frequencies(model), device=x_BTD.device)
        context = {
            "angles_B1TH": position_ids[:, None, :, None].float() * frequencies_H,
            "mask": visible(attention_mask, past, cache_position),
            "past_key_values": past_key_values,
            "cache_position": cache_position,
        }
        states, slot, before, k_BKSH, v_BKSH = [], -1, None, None, None
        for place in applications(model):
            states.append(x_BTD)
            if model["ls_kv"] == "fresh" or place != before:
                slot, k_BKSH, v_BKSH = slot + 1, None, None
            block = self.get_submodule("stacks.{}.layers.{}".format(*place))
            x_BTD, k_BKSH, v_BKSH = block(x_BTD, k_BKSH, v_BKSH, slot=slot, **context)
            before = place
        x_BTD = self.norm(x_BTD)
        return BaseModelOutputWithPast(
            last_hidden_state=x_BTD,
            past_key_values=past_key_values,
            hidden_states=(*states, x_BTD) if output_hidden_states else None,
        )


class MobileLLMJaxForCausalLM(MobileLLMJaxPreTrainedModel, GenerationMixin):
    """Tokens to logits and, given labels, the loss of predicting each label from what precedes it."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MobileLLMJaxConfig) -> None:
        super().__init__(config)
        self.model = MobileLLMJaxModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the last `logits_to_keep` tokens, of all where it is 0; labels of -100 do not count."""
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BTV, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As usual; and the description of the network follows."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.config.mobilellm_jax["model"]["vocab_size"] = self.config.vocab_size
        return embedding
