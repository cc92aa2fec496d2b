"""The graph of a network in ONNX's own textual form, in whose names two underscores stand for a dot."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from mobilellm_jax.interop.integer_blocks import BLOCK, BlockScales, BlocksTensor
from mobilellm_jax.leaves import Leaf
from mobilellm_jax.model.config import ModelConfig, Stack

OPSET, IR_VERSION = 23, 11
NUMBERS = {"float32": "float", "float16": "float16"}  # ONNX's names of them
DOMAIN, RUNTIME = "mobilellm_jax", "com.microsoft"
# As optimum names them; transformers.js makes an empty cache by these names.
B, T, P, S = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"

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


def graph_text(model: ModelConfig, weights: Mapping[str, Leaf]) -> Iterator[str]:
    """The graph, line by line: what surrounds the blocks, and a function for the blocks of each stack.

    Args:
      model: the network.
      weights: all that the file holds, by name, a weight of a block as `stack_{i}.{layer}.{name}`. The
        graph computes in the dtype of those that are no integers.
    """
    number = NUMBERS[weights["final_norm"].dtype.name]
    applied = [
        (i, stack, layer) for i, stack in enumerate(model.stacks) for layer in stack.applications
    ]
    inputs = [f"int64[{B},{T}] input_ids", f"int64[{B},{S}] attention_mask"]
    inputs.append(f"int64[{B},{T}] position_ids")
    outputs, calls = [f"{number}[{B},{T},{model.vocab_size}] logits"], []
    for d, (i, stack, layer) in enumerate(applied):
        cached = []
        for part in ("key", "value"):
            cached.append(f"past_key_values__{d}__{part}")
            heads, size = f"{number}[{B},{stack.kv_heads}", f"{model.head_dim}]"
            inputs.append(f"{heads},{P},{size} {cached[-1]}")
            outputs.append(f"{heads},{S},{size} present__{d}__{part}")
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
centre = Constant <value_float: float = {2.0 ** (weights["embedding"].bits - 1)}> ()
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
