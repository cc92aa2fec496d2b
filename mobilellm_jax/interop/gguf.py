"""A trained network as one GGUF file, which llama.cpp and the programs built on it run.

    llama-completion -no-cnv -m model.gguf -p "Once"

Plain networks and MobileLLM-LS become architecture `llama`, networks with QK-norm (MobileLLM-R1)
`qwen3`, with weights of one where the norm has none, and networks with biases of queries, keys and
values `qwen2`. Networks whose blocks differ in their widths become `deci`, a `llama` whose numbers of
heads and widths of MLPs are lists with an element for each block. `llama` and `deci` turn neighbouring
components of a head together, so the rows of their queries and keys are interleaved; the other two
turn halves, as we do. Dense `llama4` is no way out: llama.cpp refuses it.

No runtime of GGUF applies a stored block twice. MobileLLM-LS is written with each block as often as
it is applied: it computes the same, and the file has the size of a network of that depth.

Matrices are stored in one of `QUANTIZATIONS`, vectors always in float32. `q8_0` and `q4_0` take 32
numbers of a row at a time and need rows of a multiple of that, which all published widths are.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from etils import epath

from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import new_file
from mobilellm_jax.interop.gguf_tokenizer import vocabulary, write_vocabulary
from mobilellm_jax.interop.huggingface import check_quantization
from mobilellm_jax.interop.layout import (
    HEADS,
    HEADS_BIAS,
    HEADS_BIAS_INTERLEAVED,
    HEADS_INTERLEAVED,
    HEADS_OUT,
    MATRIX,
    TABLE,
    UNIT_NORMS,
    VECTOR,
    Family,
    Kind,
    Row,
    by_leaf,
    entries,
    obstacles,
)
from mobilellm_jax.leaves import Leaves, Whole
from mobilellm_jax.model.attention import rope_frequencies
from mobilellm_jax.model.config import ModelConfig, parameter_count

QUANTIZATIONS = ("f32", "bf16", "f16", "q8_0", "q4_0")
_BLOCK = 32  # numbers of a row that q8_0 and q4_0 take at a time
_K_BLOCK = 256  # numbers of a row that llama.cpp's K-quants take at a time

# The largest number of each type; where a block has a scale, the scale is a float16.
_LARGEST = {
    "F32": np.finfo(np.float32).max,
    "BF16": (2 - 2**-7) * 2.0**127,
    "F16": 65504.0,
    "Q8_0": 127 * 65504.0,
    "Q4_0": 8 * 65504.0,
}

_TOP: tuple[Row, ...] = (
    ("token_embd.weight", "embedding", TABLE),
    ("output_norm.weight", "final_norm/scale", VECTOR),
    ("output.weight", "head", MATRIX),
)


def _block(heads: Kind, bias: Kind) -> tuple[Row, ...]:
    return (
        ("attn_norm.weight", "attention_norm/scale", VECTOR),
        ("attn_q.weight", "attention/query", heads),
        ("attn_k.weight", "attention/key", heads),
        ("attn_v.weight", "attention/value", HEADS),
        ("attn_output.weight", "attention/out", HEADS_OUT),
        ("attn_q.bias", "attention/query_bias", bias),
        ("attn_k.bias", "attention/key_bias", bias),
        ("attn_v.bias", "attention/value_bias", HEADS_BIAS),
        ("attn_output.bias", "attention/out_bias", VECTOR),
        ("attn_q_norm.weight", "attention/query_norm/scale", VECTOR),
        ("attn_k_norm.weight", "attention/key_norm/scale", VECTOR),
        ("ffn_norm.weight", "mlp_norm/scale", VECTOR),
        ("ffn_gate.weight", "mlp/gate", MATRIX),
        ("ffn_up.weight", "mlp/up", MATRIX),
        ("ffn_down.weight", "mlp/down", MATRIX),
        ("ffn_down.bias", "mlp/down_bias", VECTOR),
    )


_BLOCKS = "blk.{d}."
_LLAMA = Family(
    "GGUF's llama",
    _TOP,
    _block(HEADS_INTERLEAVED, HEADS_BIAS_INTERLEAVED),
    _BLOCKS,
    qkv_bias=(True, False),
    out_bias=(True, False),
)
# Of those that can express a network the first is written: what more programs read comes first.
ARCHITECTURES = {
    "qwen2": Family(
        "GGUF's qwen2",
        _TOP,
        _block(HEADS, HEADS_BIAS),
        _BLOCKS,
        qkv_bias=(True,),
        scaled_rope=(False,),
        heads_fill_width=True,
    ),
    "llama": _LLAMA,
    "qwen3": Family(
        "GGUF's qwen3",
        _TOP,
        _block(HEADS, HEADS_BIAS),
        _BLOCKS,
        qk_norms=("unit", "scaled"),
        scaled_rope=(False,),
        constants=UNIT_NORMS,
    ),
    "deci": dataclasses.replace(_LLAMA, name="GGUF's deci", uniform=False),
}


@dataclasses.dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    type: str  # F32, F16, Q8_0, ...
    take: Callable[[Leaves], np.ndarray]


def export(
    leaves: Leaves,
    model: ModelConfig,
    tokenizer: Tokenizer,
    out: epath.PathLike,
    quantization: str = "f16",
    meta: Mapping[str, str] | None = None,
    architecture: str | None = None,
) -> list[str]:
    """Writes a GGUF file, beside `out` until it is whole, with one leaf in memory at a time.

    Args:
      leaves: the weights, in any floating dtype.
      model: the network.
      tokenizer: the tokenizer it was trained with; missing tokens up to the network's vocabulary are
        filled with unused ones.
      out: the file to make, on this machine's disk.
      quantization: of the matrices, one of `QUANTIZATIONS`. With q4_0 the matrix that makes the
        logits (of a tied network its embedding) stays at q8_0.
      meta: further `general.*` keys of the file, such as name, author, license, description.
      architecture: one of `ARCHITECTURES`; None: the first of them that can express the network.

    Returns:
      what the user should know of the file, in sentences.

    Raises:
      UserError: the package gguf is missing; `out` exists; llama.cpp has no architecture for the
        network, or no tokenizer that gives the same ids; the tokenizer knows more tokens than the
        network; a row is no multiple of 32 and shall be quantised; a weight is not finite or too
        large for its type.
    """
    check_quantization(quantization, QUANTIZATIONS)
    if architecture is not None and architecture not in ARCHITECTURES:
        raise UserError(f"architecture={architecture!r} is not one of {', '.join(ARCHITECTURES)}.")
    if "://" in str(out):
        raise UserError(f"GGUF files are written to a disk, not to {out}: name a local file.")
    gguf = _package()
    architecture = architecture or _chosen(model)
    tensors = list(_tensors(model, architecture, quantization))
    words = vocabulary(tokenizer, model.vocab_size)
    with (
        new_file(out) as partial,
        contextlib.closing(gguf.GGUFWriter(partial, architecture)) as writer,
    ):
        _write_general(writer, model, quantization, {"name": epath.Path(out).stem, **(meta or {})})
        _write_network(writer, model, ARCHITECTURES[architecture].uniform)
        write_vocabulary(writer, words)
        for tensor in tensors:
            kind = gguf.GGMLQuantizationType[tensor.type]
            numbers, size = gguf.GGML_QUANT_SIZES[kind]
            size *= math.prod(tensor.shape) // numbers
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        whole = Whole(leaves)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.take(whole), np.float32)
            _check_range(tensor, array)
            kind = gguf.GGMLQuantizationType[tensor.type]
            writer.write_tensor_data(gguf.quantize(array, kind))
    return [*words.notes, *_widths(architecture), *_k_quants(tensors)]


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise UserError(
            "writing GGUF needs the package gguf: pip install 'mobilellm-jax[gguf]'."
        ) from None
    return gguf


def expressible(model: ModelConfig) -> list[str]:
    """The architectures of llama.cpp that can express a network as it is, the best first."""
    return [name for name, family in ARCHITECTURES.items() if not any(obstacles(model, family))]


def _chosen(model: ModelConfig) -> str:
    if names := expressible(model):
        return names[0]
    reasons = {name: next(obstacles(model, family)) for name, family in ARCHITECTURES.items()}
    listed = "; ".join(f"{name} because {reason}" for name, reason in reasons.items())
    raise UserError(f"no architecture of GGUF can express this network: {listed}.")


def _tensors(model: ModelConfig, architecture: str, quantization: str) -> Iterator[_Tensor]:
    """The table of tensors, leaf by leaf, because a leaf of a checkpoint is read as a whole.

    Raises:
      UserError: the architecture cannot express the network; a row cannot be cut into blocks.
    """
    for entry in by_leaf(entries(model, ARCHITECTURES[architecture])):
        shape = entry.foreign_shape
        kind = quantization.upper() if len(shape) > 1 else "F32"
        if kind == "Q4_0" and entry.path == ("embedding" if model.tied else "head"):
            kind = "Q8_0"
        if kind.startswith("Q") and shape[-1] % _BLOCK:
            raise UserError(
                f"{entry.name} has rows of {shape[-1]} numbers, which {quantization} cannot cut into "
                f"blocks of {_BLOCK}: export with f16 instead."
            )
        yield _Tensor(entry.name, shape, kind, entry.take)
    if model.rope_scaling:
        plain = rope_frequencies(dataclasses.replace(model, rope_scaling=None))
        slower = plain / rope_frequencies(model)  # llama.cpp divides by it
        yield _Tensor("rope_freqs.weight", slower.shape, "F32", lambda _: slower)


def _write_general(
    writer: Any, model: ModelConfig, quantization: str, meta: Mapping[str, str]
) -> None:
    gguf = _package()
    writer.add_type(gguf.GGUFType.MODEL)
    for key, value in meta.items():
        writer.add_string(f"general.{key}", value)
    count = parameter_count(model)
    writer.add_size_label(gguf.utility.model_weight_count_rounded_notation(count))
    prefix = "ALL" if quantization == "f32" else "MOSTLY"
    writer.add_file_type(gguf.LlamaFileType[f"{prefix}_{quantization.upper()}"])
    if quantization.startswith("q"):
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _write_network(writer: Any, model: ModelConfig, uniform: bool) -> None:
    blocks = [stack for stack in model.stacks for _ in stack.applications]
    of_blocks = {
        writer.add_feed_forward_length: [block.mlp_width for block in blocks],
        writer.add_head_count: [block.heads for block in blocks],
        writer.add_head_count_kv: [block.kv_heads for block in blocks],
    }
    for add, values in of_blocks.items():
        add(values[0] if uniform else values)
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.max_length)
    writer.add_embedding_length(model.width)
    writer.add_block_count(model.depth)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_theta)


def _check_range(tensor: _Tensor, array: np.ndarray) -> None:
    largest = max(array.max(), -array.min())
    if not largest <= _LARGEST[tensor.type]:  # written so that NaN fails
        raise UserError(
            f"the weight {tensor.name} is not finite in {tensor.type}: the model is not exported."
        )


def _widths(architecture: str) -> Iterator[str]:
    if not ARCHITECTURES[architecture].uniform:
        yield (
            f"its blocks keep widths of their own, which only architecture {architecture} has: llama.cpp "
            "runs it; for a program that does not, --architecture=llama fills them up with zeros."
        )


def _k_quants(tensors: list[_Tensor]) -> Iterator[str]:
    matrices = [tensor for tensor in tensors if len(tensor.shape) > 1]
    odd = [tensor for tensor in matrices if tensor.shape[-1] % _K_BLOCK]
    if odd:
        yield (
            f"{len(odd)} of {len(matrices)} matrices, such as {odd[0].name}, have rows of "
            f"{odd[0].shape[-1]} numbers, no multiple of {_K_BLOCK}: llama.cpp's K-quants (Q4_K_M and "
            "the like) would store them in other formats, so quantise with q8_0 or q4_0."
        )
