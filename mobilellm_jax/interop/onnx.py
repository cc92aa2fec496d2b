"""A trained network as an ONNX graph with a cache of keys and values, for onnxruntime and browsers.

A folder as optimum and transformers.js read it: config.json and the tokenizer as for Hugging Face, and in
onnx/ the graph and its weights, which lie in a file of their own. The graph takes and gives

    input_ids [B, T], position_ids [B, T], attention_mask [B, P + T], int64; padding on the left is 0
    past_key_values.{i}.key, .value [B, K, P, H]      of each application of a block, in order; P may be 0
    logits [B, T, V]
    present.{i}.key, .value [B, K, P + T, H]

in float32. A block is a function of the graph (one for each stack), called once for each application: a
block that is applied twice has its weights in the file once. Operators are the standard's (opset 23, which
has attention over a cache); but products with matrices of `q8_0` and `q4_0` are onnxruntime's own
MatMulNBits, which multiplies integers. These hold 32 weights of a row, as integers of 8 or 4 bits, and one
scale, as GGUF's types of these names do; with `q4_0` embedding and head stay at 8 bits.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
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
DOMAIN, RUNTIME = "mobilellm_jax", "com.microsoft"
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


QUANTIZATIONS = {"f32": 0, "q8_0": 8, "q4_0": 4}  # bits of a weight of a block's matrix
TABLE_BITS = 8  # of embedding and head, where matrices are quantised
BLOCK = 32  # weights that share a scale


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
    if quantization not in QUANTIZATIONS:
        raise UserError(
            f"quantization={quantization!r} is not one of {', '.join(QUANTIZATIONS)}, which ONNX files have."
        )
    check_vocabulary(tokenizer, model)
    weights = _weights(leaves, model, QUANTIZATIONS[quantization])
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


def _weights(leaves: Leaves, model: ModelConfig, bits: int) -> dict[str, Leaf]:
    """All tensors of the file by name, leaf by leaf; the angles of RoPE are two of them."""
    whole, float32 = Whole(leaves), np.dtype(np.float32)
    found: dict[str, Leaf] = {}
    of_file = entries(model, FAMILY)
    paths = list(dict.fromkeys(entry.path for entry in of_file))
    for entry in sorted(of_file, key=lambda entry: paths.index(entry.path)):
        tensor = ExportedTensor(entry, whole, float32)
        if bits and len(tensor.shape) > 1:
            own = TABLE_BITS if entry.path in ("embedding", "head") else bits
            blocks = BlocksTensor(tensor, own, entry.path != "embedding")
            found |= {entry.name: blocks, f"{entry.name}_scale": BlockScales(blocks)}
        else:
            found[entry.name] = tensor
    angles = np.arange(model.max_length)[:, None] * rope_frequencies(model).astype(np.float64)
    return found | {"cos": np.cos(angles).astype(float32), "sin": np.sin(angles).astype(float32)}


@dataclasses.dataclass(frozen=True)
class BlocksTensor:
    """A matrix as integers around 2^(bits - 1), [out, in / 32, bytes of 32]; a byte has two of 4 bits."""

    of: ExportedTensor
    bits: int
    turned: bool  # [in, out] in the network
    dtype = np.dtype(np.uint8)

    @property
    def rows(self) -> tuple[int, int]:
        """How many rows, each summed over, and how long they are.

        Raises:
          UserError: a row cannot be cut into blocks.
        """
        rows, length = self.of.shape[::-1] if self.turned else self.of.shape
        if length % BLOCK:
            raise UserError(
                f"{self.of.entry.name} has rows of {length} numbers, which cannot be cut into blocks of "
                f"{BLOCK}: export with f32 instead."
            )
        return rows, length

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the file."""
        rows, length = self.rows
        return rows, length // BLOCK, BLOCK * self.bits // 8

    def __getitem__(self, index: Any) -> np.ndarray:
        """The integers."""
        integers, _ = self.split()
        if self.bits == 4:
            integers = integers[..., 0::2] | (integers[..., 1::2] << 4)
        return integers[index]

    def split(self) -> tuple[np.ndarray, np.ndarray]:
        """The integers, one in a byte, and the scale of each block, float32 [out, in / 32, 1]."""
        rows, length = self.rows
        weight = self.of[:].T if self.turned else self.of[:]
        blocks = weight.reshape(rows, length // BLOCK, BLOCK)
        middle = 2 ** (self.bits - 1)
        if self.bits == 8:
            scale = np.abs(blocks).max(-1, keepdims=True) / (middle - 1)
        else:  # whichever end is further off takes the integer that has no opposite
            furthest = np.abs(blocks).argmax(-1)[..., None]
            scale = np.take_along_axis(blocks, furthest, -1) / -middle
        integers = np.rint(blocks / np.where(scale == 0, 1, scale)) + middle
        return integers.clip(0, 2 * middle - 1).astype(np.uint8), scale


@dataclasses.dataclass(frozen=True)
class BlockScales:
    """The scales of a matrix of integers, [out, in / 32]."""

    of: BlocksTensor
    dtype = np.dtype(np.float16)

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the file."""
        return self.of.shape[:2]

    def __getitem__(self, index: Any) -> np.ndarray:
        """The scales in float16."""
        return self.of.split()[1][..., 0].astype(self.dtype)[index]


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
second = Constant <value_ints: ints = [1]> ()
queries_T1 = Unsqueeze (queries_T, second)
causal_TS = LessOrEqual (keys_S, queries_T1)
own_TS = Equal (keys_S, queries_T1)
text_BS = Cast <to: int = 9> (attention_mask)
middle = Constant <value_ints: ints = [1, 2]> ()
text_B11S = Unsqueeze (text_BS, middle)
readable_B1TS = Or (text_B11S, own_TS)
mask = And (readable_B1TS, causal_TS)
"""  # what is padding reads itself, for the softmax over nothing is not a number


def _text(model: ModelConfig, weights: Mapping[str, Leaf]) -> Iterator[str]:
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
        handed_over = [
            _wide(name) if isinstance(tensor, BlockScales) else name.replace(".", "__")
            for name, tensor in weights.items()
            if name.startswith(prefix)
        ]
        handed = ", ".join([f"x_{d}", "mask", "position_ids", "cos", "sin", *cached, *handed_over])
        calls.append(
            f"x_{d + 1}, present__{d}__key, present__{d}__value = {DOMAIN}.stack_{i} ({handed})"
        )
    domains = f'opset_import: ["": {OPSET}, "{DOMAIN}": 1, "{RUNTIME}": 1]'
    yield f"<ir_version: {IR_VERSION}, {domains}>"
    yield f"mobilellm ({', '.join(inputs)}) => ({', '.join(outputs)}) {{"
    yield _MASK
    for name, tensor in weights.items():
        if isinstance(tensor, BlockScales):
            yield f"{_wide(name)} = Cast <to: int = 1> ({name.replace('.', '__')})"
    yield from _look_up(model, weights)
    yield from calls
    yield f"hidden = {_norm(model)} (x_{len(applied)}, final_norm)"
    yield from _head(model, weights)
    yield "}"
    for i, stack in enumerate(model.stacks):
        first = f"stack_{i}.0."
        own = {
            n.removeprefix(first): tensor for n, tensor in weights.items() if n.startswith(first)
        }
        yield f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}, "{RUNTIME}": 1]>'
        given = ["x", "mask", "position_ids", "cos", "sin", "past_key", "past_value", *own]
        yield f"stack_{i} ({', '.join(given)}) => (z, present_key, present_value) {{"
        yield from _block(model, stack, own)
        yield "}"


def _wide(scales: str) -> str:
    """The name of scales as products read them."""
    return scales.replace(".", "__") + "_f32"


def _product(name: str, x: str, weight: str, tensor: Leaf, scales: str) -> str:
    """X [..., in] times a matrix."""
    if not isinstance(tensor, BlocksTensor):
        return f"{name} = MatMul ({x}, {weight})"
    rows, length = tensor.rows
    # accuracy_level 4: integers are multiplied, for x is rounded to 8 bits, 32 numbers at a time.
    sizes = (
        f"K: int = {length}, N: int = {rows}, bits: int = {tensor.bits}, block_size: int = {BLOCK}"
    )
    return f"{name} = {RUNTIME}.MatMulNBits <{sizes}, accuracy_level: int = 4> ({x}, {weight}, {scales})"


def _look_up(model: ModelConfig, weights: Mapping[str, Leaf]) -> Iterator[str]:
    if not isinstance(weights["embedding"], BlocksTensor):
        yield "x_0 = Gather (embedding, input_ids)"
        return
    yield f"""
integers_BTGU = Gather (embedding, input_ids)
numbers_BTGU = Cast <to: int = 1> (integers_BTGU)
centre = Constant <value_float: float = {2.0 ** (TABLE_BITS - 1)}> ()
centred_BTGU = Sub (numbers_BTGU, centre)
scales_BTG = Gather ({_wide("embedding_scale")}, input_ids)
third = Constant <value_ints: ints = [-1]> ()
scales_BTG1 = Unsqueeze (scales_BTG, third)
scaled_BTGU = Mul (centred_BTGU, scales_BTG1)
joined = Constant <value_ints: ints = [0, 0, {model.width}]> ()
x_0 = Reshape (scaled_BTGU, joined)
"""


def _norm(model: ModelConfig) -> str:
    return f"RMSNormalization <axis: int = -1, epsilon: float = {model.norm_eps:.12f}>"


def _head(model: ModelConfig, weights: Mapping[str, Leaf]) -> Iterator[str]:
    name = "embedding" if model.tied else "head"
    if not model.tied or isinstance(weights[name], BlocksTensor):
        yield _product("logits", "hidden", name, weights[name], _wide(f"{name}_scale"))
        return
    # Not by MatMul: the transposed matrix would be there a second time.
    yield f"""
rows = Constant <value_ints: ints = [-1, {model.width}]> ()
hidden_2D = Reshape (hidden, rows)
logits_2V = Gemm <transB: int = 1> (hidden_2D, embedding)
tokens_2 = Shape (input_ids)
vocabulary_1 = Constant <value_ints: ints = [{model.vocab_size}]> ()
shape_3 = Concat <axis: int = 0> (tokens_2, vocabulary_1)
logits = Reshape (logits_2V, shape_3)
"""


def _block(model: ModelConfig, stack: Stack, own: Mapping[str, Leaf]) -> Iterator[str]:
    """The body of a block's function, whose weights are `own`."""

    def product(name: str, x: str, weight: str, bias: bool = False) -> Iterator[str]:
        yield _product(f"{name}{'_0' if bias else ''}", x, weight, own[weight], f"{weight}_scale")
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
    yield from product("u", "d", "up")
    if model.mlp == "swiglu":
        yield from product("g", "d", "gate")
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
