"""A trained network as a folder that Hugging Face loads as stock Llama, written without torch.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)

Layer sharing is unrolled: a block that runs twice is written as two layers of equal weights.
"""

import json
import uuid
from typing import Any

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
from etils import epath

from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.hf_tokenizer import write_tokenizer
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.transformer import Params

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def export(
    params: Params,
    model: ModelConfig,
    tokenizer: Tokenizer,
    out: epath.PathLike,
    dtype: str = "float32",
) -> list[str]:
    """Writes config.json, generation_config.json, model.safetensors and the tokenizer's files.

    They are written into a folder beside `out` that becomes `out` when all are there.

    Args:
      params: weights as `transformer.init` makes them.
      model: the network.
      tokenizer: the tokenizer it was trained with.
      out: the folder to make; it may exist if it is empty.
      dtype: of the weights in the file; float32, bfloat16 or float16.

    Returns:
      the names of the files in `out`.

    Raises:
      UserError: `out` holds something; stock Llama cannot express the network, or Hugging Face the
        tokenizer; the vocabularies differ in size; a weight is not finite in `dtype`.
    """
    out = epath.Path(out)
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: export into a new folder.")
    if tokenizer.vocab_size != model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} pieces and the model {model.vocab_size} "
            "embeddings: export with the tokenizer that the model was trained with."
        )
    config = llama_config(model, tokenizer, dtype)
    state = to_llama_state(params, model)
    state = {name: _cast(name, array, dtype) for name, array in state.items()}
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}

    partial = out.parent / f"{out.name}.partial-{uuid.uuid4().hex[:8]}"
    partial.mkdir(parents=True)
    try:
        write_tokenizer(tokenizer, partial, model.max_length)
        _write_json(partial / "generation_config.json", ends)
        # Some versions of transformers refuse a file that does not say whose layout it has.
        weights = safetensors.numpy.save(state, metadata={"format": "pt"})
        (partial / "model.safetensors").write_bytes(weights)
        _write_json(partial / "config.json", config)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        partial.rmtree(missing_ok=True)
        raise
    return sorted(path.name for path in out.iterdir())


def llama_config(model: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """The content of config.json for `LlamaForCausalLM`.

    Raises:
      UserError: stock Llama cannot express the network.
    """
    _check(model)
    stack = model.stacks[0]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": stack.heads,
        "num_key_value_heads": stack.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": stack.mlp_width,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "rms_norm_eps": model.norm_eps,
        "max_position_embeddings": model.max_length,
        # transformers 5 reads the new keys, transformers 4 and other runtimes only the old ones.
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "torch_dtype": dtype,
        "dtype": dtype,
        "tie_word_embeddings": model.tied,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "initializer_range": model.init_std,
        "use_cache": True,
    }


def to_llama_state(params: Params, model: ModelConfig) -> dict[str, np.ndarray]:
    """Weights under Hugging Face's names, float32, matrices as [out, in].

    Rotary positions need no permutation: both sides rotate the two halves of a head.

    Raises:
      UserError: stock Llama cannot express the network.
    """
    _check(model)
    params = jax.tree.map(np.asarray, params)
    state = {"model.embed_tokens.weight": params["embedding"]}
    depth = 0
    for i, stack in enumerate(model.stacks):
        for layer in range(stack.layers):
            block = _llama_block(params[f"stack_{i}"], layer, model.width)
            for _ in range(stack.repeats):
                for name, array in block.items():
                    state[f"model.layers.{depth}.{name}"] = array
                depth += 1
    state["model.norm.weight"] = params["final_norm"]["scale"]
    if not model.tied:
        state["lm_head.weight"] = params["head"].T
    return state


def _llama_block(stack: Params, layer: int, width: int) -> dict[str, np.ndarray]:
    """The weights of one block, taken out of the [L, ...] arrays of its stack."""
    block = jax.tree.map(lambda leaf: leaf[layer], stack)
    attention, mlp = block["attention"], block["mlp"]
    return {
        "input_layernorm.weight": block["attention_norm"]["scale"],
        "self_attn.q_proj.weight": attention["query"].reshape(width, -1).T,
        "self_attn.k_proj.weight": attention["key"].reshape(width, -1).T,
        "self_attn.v_proj.weight": attention["value"].reshape(width, -1).T,
        "self_attn.o_proj.weight": attention["out"].reshape(-1, width).T,
        "post_attention_layernorm.weight": block["mlp_norm"]["scale"],
        "mlp.gate_proj.weight": mlp["gate"].T,
        "mlp.up_proj.weight": mlp["up"].T,
        "mlp.down_proj.weight": mlp["down"].T,
    }


def _check(model: ModelConfig) -> None:
    default_block = ModelConfig.__dataclass_fields__["block"].default
    shapes = {(stack.heads, stack.kv_heads, stack.mlp_width) for stack in model.stacks}
    obstacles = {
        f"its block is {model.block}": model.block != default_block,
        f"it has QK-norm ({model.qk_norm})": model.qk_norm != "none",
        "its stacks differ in heads, kv_heads or mlp_width": len(shapes) > 1,
    }
    for obstacle, present in obstacles.items():
        if present:
            raise UserError(f"stock Llama cannot express this network, because {obstacle}.")


def _cast(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # an overflow is reported below, with the name of the weight
        array = np.ascontiguousarray(array, DTYPES[dtype])  # the writer reads memory as it lies
    if not np.isfinite(array.astype(np.float32)).all():
        raise UserError(f"the weight {name} is not finite in {dtype}: the model is not exported.")
    return array


def _write_json(path: epath.Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
