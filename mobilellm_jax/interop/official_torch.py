"""A network as a folder for the code published with MobileLLM (github.com/facebookresearch/MobileLLM).

    from utils.modeling_llama import LlamaForCausalLM
    model = LlamaForCausalLM.from_pretrained(out)

That code is transformers' Llama of version 4.41 with two keys more in its configuration:
`share_embedding`, for a network that is tied, and `layer_sharing`, which applies every block twice
in a row. A shared block stands in the file once.

With `use_cache` its second pass over a block reads the keys of the first, in training as well, and
its `generate` fails for every network. So that key is false, unless the network is meant to read
them (`ls_kv="first_pass"`).
"""

import json
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from mobilellm_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import new_folder
from mobilellm_jax.interop.hf_tokenizer import write_tokenizer
from mobilellm_jax.interop.huggingface import check_vocabulary, tensors
from mobilellm_jax.leaves import Leaves
from mobilellm_jax.model.config import ModelConfig


def export(
    leaves: Leaves,
    model: ModelConfig,
    tokenizer: Tokenizer,
    out: epath.PathLike,
    dtype: str | None = None,
) -> list[str]:
    """Writes config.json, generation_config.json, pytorch_model.bin and the tokenizer's files.

    They are written into a folder beside `out` that becomes `out` when all are there. The weights
    are in memory all at once.

    Args:
      leaves: weights by path; they may lie in files.
      model: the network.
      tokenizer: the tokenizer it was trained with.
      out: the folder to make; it may exist if it is empty.
      dtype: of the weights in the file, one of `leaves.DTYPES`; None keeps each as it is stored.

    Returns:
      the names of the files in `out`.

    Raises:
      UserError: torch is not installed; `out` holds something; the official code cannot compute
        the network, or its tokenizer class the ids; the tokenizer has more pieces than the network
        embeddings; a weight is not finite in `dtype`.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            "the folder for the official MobileLLM code is written with torch, which is not "
            "installed: install the extra [torch]."
        ) from None
    for reason in _obstacles(model):
        raise UserError(
            f"the official MobileLLM code cannot compute this network, because {reason}."
        )
    check_vocabulary(tokenizer, model)
    found = tensors(leaves, model, "mobilellm", dtype)
    stored = dtype or leaves["embedding"].dtype.name
    running = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "use_cache": model.ls_kv == "first_pass" and model.stacks[0].repeats == 2,
    }
    files = {
        "config.json": _config(model) | running | {"torch_dtype": stored},
        "generation_config.json": running,
    }
    with new_folder(out) as folder:
        if isinstance(tokenizer, SentencePieceTokenizer):
            tokenizer.write(folder)
            files |= _llama_tokenizer(tokenizer)
        else:
            write_tokenizer(tokenizer, folder, model.max_length)
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        state = {name: _torch_tensor(tensor[:]) for name, tensor in found.items()}
        with (folder / "pytorch_model.bin").open("wb") as file:
            torch.save(state, file)
    return sorted(path.name for path in epath.Path(out).iterdir())


def _obstacles(model: ModelConfig) -> Iterator[str]:
    """What that code has no form for; `layout.check` finds the rest."""
    if len(model.stacks) > 1:
        yield f"it has {len(model.stacks)} stacks"
    stack = model.stacks[0]
    if stack.repeats > 2:
        yield f"its blocks are applied {stack.repeats} times"
    if stack.repeats == 2 and stack.order != "immediate":
        yield f"its blocks are applied in the order {stack.order}"
    if model.rope_scaling:
        yield "its positions are scaled"
    if stack.heads * model.head_dim != model.width:
        yield f"its {stack.heads} heads of {model.head_dim} do not make up its width {model.width}"


def _config(model: ModelConfig) -> dict[str, Any]:
    stack = model.stacks[0]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "share_embedding": model.tied,
        "layer_sharing": stack.repeats == 2,
        "tie_word_embeddings": False,  # it is `share_embedding` that ties
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "intermediate_size": stack.mlp_width,
        "num_hidden_layers": stack.layers,
        "num_attention_heads": stack.heads,
        "num_key_value_heads": stack.kv_heads,
        "max_position_embeddings": model.max_length,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "initializer_range": model.init_std,
    }


def _llama_tokenizer(tokenizer: SentencePieceTokenizer) -> dict[str, dict[str, Any]]:
    """What makes transformers 4.41 give a SentencePiece model's own ids.

    There is no tokenizer.json: that version cannot read one whose pieces hold spaces. "Legacy" is
    the behaviour in which its `LlamaTokenizer` hands the text to SentencePiece as it is.
    """
    proto = tokenizer.proto
    special = {
        "bos_token": proto.pieces[tokenizer.bos_id].piece,
        "eos_token": proto.pieces[tokenizer.eos_id].piece,
        "unk_token": proto.pieces[proto.trainer_spec.unk_id].piece,
    }
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_prefix_space": proto.normalizer_spec.add_dummy_prefix,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": tokenizer.chat_template is None,
        **special,
    }
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    return {"tokenizer_config.json": config, "special_tokens_map.json": special}


def _torch_tensor(array: np.ndarray) -> Any:
    import torch

    array = np.array(array, order="C")  # memory of its own, of which torch stores all
    if array.dtype == ml_dtypes.bfloat16:  # which numpy knows from elsewhere
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
