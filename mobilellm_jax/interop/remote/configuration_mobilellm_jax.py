# SPDX-License-Identifier: Apache-2.0
"""The configuration of a MobileLLM network for Hugging Face transformers (4.57 or later)."""

from typing import Any

from transformers import PretrainedConfig


class MobileLLMJaxConfig(PretrainedConfig):
    """A description of the network, and the usual keys, which follow from it.

    `mobilellm_jax["model"]` is the description: widths, and a list of stacks. A stack is a run of
    equal blocks: `layers`, `heads`, `kv_heads`, `mlp_width`, how often each block is applied
    (`repeats`), in which `order` ("immediate": 1 1 2 2, "repeat_all": 1 2 1 2, "reverse": 1 2 2 1),
    and whether its attention knows positions (`rope`).
    """

    model_type = "mobilellm_jax"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, mobilellm_jax: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if mobilellm_jax is not None:  # transformers also makes an empty one, to compare with
            kwargs |= {"mobilellm_jax": mobilellm_jax, **_usual_keys(mobilellm_jax["model"])}
        super().__init__(**kwargs)


def _usual_keys(model: dict[str, Any]) -> dict[str, Any]:
    first, *_ = stacks = model["stacks"]
    return {
        "vocab_size": model["vocab_size"],
        "hidden_size": model["width"],
        "num_hidden_layers": sum(stack["layers"] * stack["repeats"] for stack in stacks),
        "num_attention_heads": first["heads"],
        "num_key_value_heads": first["kv_heads"],
        "head_dim": model["head_dim"],
        "max_position_embeddings": model["max_length"],
        "initializer_range": model["init_std"],
        "tie_word_embeddings": model["tied"],
    }
