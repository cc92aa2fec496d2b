"""A trained network as an ONNX graph with a cache of keys and values, for onnxruntime and browsers.

A folder as optimum and transformers.js read it: config.json and the tokenizer as for Hugging Face, and in
onnx/ the graph and its weights, which lie in a file of their own. The graph takes and gives

    input_ids [B, T], position_ids [B, T], attention_mask [B, P + T], int64; padding on the left is 0
    past_key_values.{i}.key, .value [B, K, P, H]      of each application of a block, in order; P may be 0
    logits [B, T, V]
    present.{i}.key, .value [B, K, P + T, H]

in float32. A block is a function of the graph (one for each stack), called once for each application: a
block that is applied twice has its weights in the file once. Only standard operators are used, of opset
23, which has attention over a cache.
"""

import itertools
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
from etils import epath

from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import new_folder
from mobilellm_jax.interop import hf_config
from mobilellm_jax.interop.hf_tokenizer import write_tokenizer
from mobilellm_jax.interop.huggingface import ExportedTensor, check_vocabulary, write_json
from mobilellm_jax.interop.layout import (
    HEADS_BIAS,
    VECTOR,
    Constant,
    Family,
    Kind,
    Row,
    default_family,
    entries,
)
from mobilellm_jax.leaves import Leaf, Leaves, Whole
from mobilellm_jax.model.attention import rope_frequencies
from mobilellm_jax.model.config import MLPS, QK_NORMS, ModelConfig, Stack

OPSET, IR_VERSION = 23, 11
DOMAIN = "mobilellm_jax"
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
FAMILY = Family(
    "ONNX",
    _TOP,
    _BLOCK,
    "stack_{i}.{l}.",
    uniform=False,
    rope=(True, False),
    mlps=MLPS,
    qk_norms=QK_NORMS,
    qkv_bias=(True, False),
    out_bias=(True, False),
    constants={"attention/query_norm/scale": _ONES, "attention/key_norm/scale": _ONES},
)


def export(leaves: Leaves, model: ModelConfig, tokenizer: Tokenizer, out: epath.PathLike) -> None:
    """Writes a folder with the graph, beside `out` until it is whole, with one leaf in memory at a time.

    Args:
      leaves: the weights, in any floating dtype.
      model: the network.
      tokenizer: the tokenizer it was trained with.
      out: the folder to make; it may exist if it is empty.

    Raises:
      UserError: the package onnx is missing; `out` holds something; the graph cannot express the
        network, or Hugging Face the tokenizer; a weight is not finite.
    """
    onnx = _package()
    check_vocabulary(tokenizer, model)
    weights = _weights(leaves, model)
    graph = parsed(onnx, "\n".join(_text(model, weights)))
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
        write_json(folder / "generation_config.json", ends)
        write_json(folder / "config.json", _config(model) | ends)


def _package() -> ModuleType:
    try:
        import onnx
        import onnx.parser
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


def _weights(leaves: Leaves, model: ModelConfig) -> dict[str, Leaf]:
    """All tensors of the file by name; the angles of RoPE are two of them."""
    whole, float32 = Whole(leaves), np.dtype(np.float32)
    found: dict[str, Leaf] = {
        entry.name: ExportedTensor(entry, whole, float32) for entry in entries(model, FAMILY)
    }
    angles = np.arange(model.max_length)[:, None] * rope_frequencies(model).astype(np.float64)
    return found | {"cos": np.cos(angles).astype(float32), "sin": np.sin(angles).astype(float32)}


def _described(onnx: Any, name: str, tensor: Leaf, offset: int) -> Any:
    """A weight of the graph whose numbers lie in the file of weights."""
    size = int(np.prod(tensor.shape)) * tensor.dtype.itemsize
    place = {"location": epath.Path(DATA).name, "offset": offset, "length": size}
    described = onnx.TensorProto(
        name=name,
        dims=tensor.shape,
        data_type=onnx.TensorProto.FLOAT,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in place.items():
        described.external_data.add(key=key, value=str(value))
    return described


# The graph in ONNX's own textual form, in whose names two underscores stand for a dot.

_MASK = """
tokens_1 = Shape <start: int = 1> (input_ids)
keys_1 = Shape <start: int = 1> (attention_mask)
past_1 = Sub (keys_1, tokens_1)
past = Squeeze (past_1)
end = Squeeze (keys_1)
zero = Constant <value_int: int = 0> ()
one = Constant <value_int: int = 1> ()
keys_S = Range (zero, end, one)
queries_T = Range (past, end, one)
last = Constant <value_ints: ints = [1]> ()
queries_T1 = Unsqueeze (queries_T, last)
causal_TS = LessOrEqual (keys_S, queries_T1)
own_TS = Equal (keys_S, queries_T1)
text_BS = Cast <to: int = 9> (attention_mask)
middle = Constant <value_ints: ints = [1, 2]> ()
text_B11S = Unsqueeze (text_BS, middle)
readable_B1TS = Or (text_B11S, own_TS)
mask = And (readable_B1TS, causal_TS)
"""  # what is padding reads itself, for the softmax over nothing is not a number


def _text(model: ModelConfig, weights: Iterable[str]) -> Iterator[str]:
    """The graph: what surrounds the blocks, and a function for the blocks of each stack."""
    applied = [
        (i, stack, layer) for i, stack in enumerate(model.stacks) for layer in stack.applications
    ]
    inputs = ["int64[B,T] input_ids", "int64[B,S] attention_mask", "int64[B,T] position_ids"]
    outputs, calls = [f"float[B,T,{model.vocab_size}] logits"], []
    for d, (i, stack, layer) in enumerate(applied):
        cached = []
        for part in ("key", "value"):
            cached.append(f"past_key_values__{d}__{part}")
            inputs.append(f"float[B,{stack.kv_heads},P,{model.head_dim}] {cached[-1]}")
            outputs.append(f"float[B,{stack.kv_heads},S,{model.head_dim}] present__{d}__{part}")
        prefix = f"stack_{i}.{layer}."
        own = [name.replace(".", "__") for name in weights if name.startswith(prefix)]
        handed = ", ".join([f"x_{d}", "mask", "position_ids", "cos", "sin", *cached, *own])
        calls.append(
            f"x_{d + 1}, present__{d}__key, present__{d}__value = {DOMAIN}.stack_{i} ({handed})"
        )
    yield f'<ir_version: {IR_VERSION}, opset_import: ["": {OPSET}, "{DOMAIN}": 1]>'
    yield f"mobilellm ({', '.join(inputs)}) => ({', '.join(outputs)}) {{"
    yield _MASK
    yield "x_0 = Gather (embedding, input_ids)"
    yield from calls
    yield f"hidden = {_norm(model)} (x_{len(applied)}, final_norm)"
    yield _head(model)
    yield "}"
    for i, stack in enumerate(model.stacks):
        names = [name.rpartition(".")[2] for name in weights if name.startswith(f"stack_{i}.0.")]
        yield f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>'
        given = ["x", "mask", "position_ids", "cos", "sin", "past_key", "past_value", *names]
        yield f"stack_{i} ({', '.join(given)}) => (z, present_key, present_value) {{"
        yield from _block(model, stack)
        yield "}"


def _norm(model: ModelConfig) -> str:
    return f"RMSNormalization <axis: int = -1, epsilon: float = {model.norm_eps:.12f}>"


def _head(model: ModelConfig) -> str:
    if not model.tied:
        return "logits = MatMul (hidden, head)"
    # Not by MatMul: the transposed matrix would be there a second time.
    return f"""
rows = Constant <value_ints: ints = [-1, {model.width}]> ()
hidden_2D = Reshape (hidden, rows)
logits_2V = Gemm <transB: int = 1> (hidden_2D, embedding)
tokens_2 = Shape (input_ids)
vocabulary_1 = Constant <value_ints: ints = [{model.vocab_size}]> ()
shape_3 = Concat <axis: int = 0> (tokens_2, vocabulary_1)
logits = Reshape (logits_2V, shape_3)
"""


def _block(model: ModelConfig, stack: Stack) -> Iterator[str]:
    """The body of a block's function."""

    def product(name: str, x: str, weight: str, bias: bool) -> Iterator[str]:
        yield f"{name}{'_0' if bias else ''} = MatMul ({x}, {weight})"
        if bias:
            yield f"{name} = Add ({name}_0, {weight}_bias)"

    yield f"a = {_norm(model)} (x, attention_norm)"
    for name, weight in (("q", "query"), ("k", "key"), ("v", "value")):
        yield from product(name, "a", weight, model.qkv_bias)
    q, k = "q", "k"
    if stack.rope:
        for name, weight, heads in (("q", "query", stack.heads), ("k", "key", stack.kv_heads)):
            normed = name
            if model.qk_norm != "none":
                yield f"{name}_4 = Constant <value_ints: ints = [0, 0, {heads}, {model.head_dim}]> ()"
                yield f"{name}_3 = Constant <value_ints: ints = [0, 0, -1]> ()"
                yield f"{name}_heads = Reshape ({name}, {name}_4)"
                yield f"{name}_unit = {_norm(model)} ({name}_heads, {weight}_norm)"
                yield f"{name}_normed = Reshape ({name}_unit, {name}_3)"
                normed = f"{name}_normed"
            turn = f"RotaryEmbedding <num_heads: int = {heads}>"
            yield f"{name}_turned = {turn} ({normed}, cos, sin, position_ids)"
        q, k = "q_turned", "k_turned"
    attend = f"Attention <q_num_heads: int = {stack.heads}, kv_num_heads: int = {stack.kv_heads}>"
    yield f"b, present_key, present_value = {attend} ({q}, {k}, v, mask, past_key, past_value)"
    yield from product("c", "b", "out", model.out_bias)
    yield "y = Add (x, c)"
    yield f"d = {_norm(model)} (y, mlp_norm)"
    yield "u = MatMul (d, up)"
    if model.mlp == "swiglu":
        yield "g = MatMul (d, gate)"
        yield "s = Sigmoid (g)"
        yield "t = Mul (g, s)"
        yield "f = Mul (t, u)"
    else:
        yield "f = Relu (u)"
    yield from product("e", "f", "down", model.out_bias)
    yield "z = Add (y, e)"


def parsed(onnx: Any, text: str) -> Any:
    """The model that a text describes, with dots in its names."""
    model = onnx.parser.parse_model(text)

    def dotted(names: Any) -> None:
        names[:] = [name.replace("__", ".") for name in names]

    for value in itertools.chain(model.graph.input, model.graph.output):
        value.name = value.name.replace("__", ".")
    for node in model.graph.node:
        dotted(node.input)
        dotted(node.output)
    return model
