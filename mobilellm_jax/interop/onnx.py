"""A trained network as an ONNX graph with a cache of keys and values, for onnxruntime and browsers.

A folder as optimum and transformers.js read it: config.json and the tokenizer as for Hugging Face, and in
onnx/ the graph and its weights, which lie in a file of their own. The graph takes and gives

    input_ids [B, T], position_ids [B, T], attention_mask [B, P + T], int64; padding on the left is 0
    past_key_values.{i}.key, .value [B, K, P, H]      of each application of a block, in order; P may be 0
    logits [B, T, V]
    present.{i}.key, .value [B, K, P + T, H]

in float32, or all of it in float16 (`f16`). A block is a function of the graph (one for each stack), called
once for each application: a block that is applied twice has its weights in the file once. Operators are the
standard's (opset 23, which has attention over a cache); but products with matrices of `q8_0` and `q4_0` are
onnxruntime's own MatMulNBits, which multiplies integers. These hold 32 weights of a row, as integers of 8
or 4 bits, and one scale, as GGUF's types of these names do; with `q4_0` embedding and head stay at 8 bits.
"""

import dataclasses
from types import ModuleType
from typing import Any

import numpy as np
from etils import epath

from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import new_folder
from mobilellm_jax.interop import hf_config
from mobilellm_jax.interop.hf_tokenizer import generation_config, write_tokenizer
from mobilellm_jax.interop.huggingface import (
    ExportedTensor,
    check_quantization,
    check_vocabulary,
    write_json,
)
from mobilellm_jax.interop.integer_blocks import BlockScales, BlocksTensor
from mobilellm_jax.interop.layout import (
    FAMILIES,
    HEADS_BIAS,
    VECTOR,
    Constant,
    Kind,
    Row,
    by_leaf,
    default_family,
    entries,
)
from mobilellm_jax.interop.onnx_graph import graph_text, parsed
from mobilellm_jax.leaves import Leaf, Leaves, Whole
from mobilellm_jax.model.attention import rope_frequencies
from mobilellm_jax.model.config import ModelConfig

GRAPH, DATA = "onnx/model.onnx", "onnx/model.onnx_data"
_PAGE = 4096  # bytes: weights begin at a multiple of it, so that they can be mapped into memory

# Matrices are [in, out], as here, with heads and their components as one axis.
_TABLE, _MATRIX = Kind("V D", "V D"), Kind("D F", "D F")
_HEADS, _HEADS_OUT = Kind("D N H", "D NH"), Kind("N H D", "NH D")
_TOP: tuple[Row, ...] = (
    ("embedding", "embedding", _TABLE),
    ("final_norm", "final_norm/scale", VECTOR),
    ("head", "head", _MATRIX),
)
_BLOCK: tuple[Row, ...] = (
    ("attention_norm", "attention_norm/scale", VECTOR),
    ("query", "attention/query", _HEADS),
    ("key", "attention/key", _HEADS),
    ("value", "attention/value", _HEADS),
    ("query_bias", "attention/query_bias", HEADS_BIAS),
    ("key_bias", "attention/key_bias", HEADS_BIAS),
    ("value_bias", "attention/value_bias", HEADS_BIAS),
    ("query_norm", "attention/query_norm/scale", VECTOR),
    ("key_norm", "attention/key_norm/scale", VECTOR),
    ("out", "attention/out", _HEADS_OUT),
    ("out_bias", "attention/out_bias", VECTOR),
    ("mlp_norm", "mlp_norm/scale", VECTOR),
    ("gate", "mlp/gate", _MATRIX),
    ("up", "mlp/up", _MATRIX),
    ("down", "mlp/down", _MATRIX),
    ("down_bias", "mlp/down_bias", VECTOR),
)
_ONES = Constant(1.0, "H", lambda model: model.qk_norm == "unit")
FAMILY = dataclasses.replace(
    FAMILIES["hf_shared"],  # whose networks it can express as well, but for these
    name="ONNX",
    top=_TOP,
    block=_BLOCK,
    blocks="stack_{i}.{l}.",
    ls_kvs=("fresh",),
    eight_bit=(),
    constants={"attention/query_norm/scale": _ONES, "attention/key_norm/scale": _ONES},
)


# Dtype of the graph's numbers; bits of a weight of a block's matrix where it is an integer, else 0.
QUANTIZATIONS = {
    "f32": ("float32", 0),
    "f16": ("float16", 0),
    "q8_0": ("float32", 8),
    "q4_0": ("float32", 4),
}
TABLE_BITS = 8  # of embedding and head, where matrices are quantised


def export(
    leaves: Leaves,
    model: ModelConfig,
    tokenizer: Tokenizer,
    out: epath.PathLike,
    quantization: str = "f32",
) -> None:
    """Writes a folder with the graph, beside `out` until it is whole, with one leaf in memory at a time.

    Args:
      leaves: the weights, in any floating dtype.
      model: the network.
      tokenizer: the tokenizer it was trained with.
      out: the folder to make; it may exist if it is empty.
      quantization: of the matrices, one of `QUANTIZATIONS`.

    Raises:
      UserError: the package onnx is missing; `out` holds something; the graph cannot express the
        network, or Hugging Face the tokenizer; a row is no multiple of 32 and shall be quantised; a
        weight is not finite.
    """
    onnx = _package()
    check_quantization(quantization, QUANTIZATIONS)
    check_vocabulary(tokenizer, model)
    weights = _weights(leaves, model, *QUANTIZATIONS[quantization])
    graph = parsed(onnx, "\n".join(graph_text(model, weights)))
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    with new_folder(out) as folder:
        (folder / GRAPH).parent.mkdir()
        with (folder / DATA).open("wb") as file:
            for name, tensor in weights.items():
                file.write(bytes(-file.tell() % _PAGE))
                graph.graph.initializer.append(_described(onnx, name, tensor, file.tell()))
                file.write(np.ascontiguousarray(tensor[:]).reshape(-1).view(np.uint8).data)
        (folder / GRAPH).write_bytes(graph.SerializeToString())
        write_tokenizer(tokenizer, folder, model.max_length)
        write_json(folder / "generation_config.json", generation_config(tokenizer))
        write_json(folder / "config.json", _config(model) | ends)


def _package() -> ModuleType:
    try:
        import onnx
        import onnx.parser  # noqa: F401 (onnx_graph calls it)
    except ImportError:
        raise UserError(
            "writing ONNX needs the package onnx: pip install 'mobilellm-jax[onnx]'."
        ) from None
    return onnx


def _config(model: ModelConfig) -> dict[str, Any]:
    """config.json: programs read the numbers of the cache in it, one set of which holds for all blocks."""
    family = default_family(model)
    external = {"transformers.js_config": {"use_external_data_format": {"model.onnx": 1}}}
    return (
        hf_config.write(model, family) | external | {hf_config.METADATA: hf_config.metadata(model)}
    )


def _weights(leaves: Leaves, model: ModelConfig, number: str, bits: int) -> dict[str, Leaf]:
    """All tensors of the file by name, leaf by leaf; the angles of RoPE are two of them."""
    whole, dtype = Whole(leaves), np.dtype(number)
    found: dict[str, Leaf] = {}
    for entry in by_leaf(entries(model, FAMILY)):
        tensor = ExportedTensor(entry, whole, dtype)
        if bits and len(tensor.shape) > 1:
            own = TABLE_BITS if entry.path in ("embedding", "head") else bits
            blocks = BlocksTensor(tensor, own, entry.path != "embedding")
            found |= {entry.name: blocks, f"{entry.name}_scale": BlockScales(blocks)}
        else:
            found[entry.name] = tensor
    angles = np.arange(model.max_length)[:, None] * rope_frequencies(model).astype(np.float64)
    return found | {"cos": np.cos(angles).astype(dtype), "sin": np.sin(angles).astype(dtype)}


def _described(onnx: Any, name: str, tensor: Leaf, offset: int) -> Any:
    """A weight of the graph whose numbers lie in the file of weights."""
    size = int(np.prod(tensor.shape)) * tensor.dtype.itemsize
    place = {"location": epath.Path(DATA).name, "offset": offset, "length": size}
    described = onnx.TensorProto(
        name=name,
        dims=tensor.shape,
        data_type=onnx.helper.np_dtype_to_tensor_dtype(tensor.dtype),
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in place.items():
        described.external_data.add(key=key, value=str(value))
    return described
