"""A trained network as an ExecuTorch program with a cache of keys and values, for phones.

A folder with `model.pte` and the tokenizer. The program is one that ExecuTorch's own runners for language
models load (llama_main, LLMModule, TextLLMRunner), and tells what they ask of it. Its method `forward`:

    tokens [1, T], input_pos [1], int64     new tokens and the slot of the first of them
    logits [1, V], float32                  of the last of them

It is made by torch.export of `executorch_network` and runs on CPUs through XNNPACK; attention and cache are
ExecuTorch's custom operators. A block that is applied twice has its weights in the file once. A tied
embedding has not: XNNPACK packs the head's matrix for itself.

    f32        weights as they are
    f16        weights, and products with them
    8da8w      integers of 8 bits: a scale for each output channel of a weight, and a scale and zero point
               for each token of what it is multiplied with (W8A8, as `model.quantization` has it)
    8da4w-32   blocks' matrices of 4 bits, a scale for each 32 (or 64) weights of a row; head and embedding
               and what weights are multiplied with have 8
"""

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from mobilellm_jax.data.chat import generation_ends
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import new_folder
from mobilellm_jax.interop.hf_tokenizer import write_tokenizer
from mobilellm_jax.interop.huggingface import check_quantization, check_vocabulary, tensors
from mobilellm_jax.interop.layout import FAMILIES
from mobilellm_jax.leaves import Leaves
from mobilellm_jax.model.config import ModelConfig

PROGRAM = "model.pte"
GROUPS = {"8da4w-32": 32, "8da4w-64": 64}  # weights that share a scale
QUANTIZATIONS = ("f32", "f16", "8da8w", *GROUPS)
FAMILY = dataclasses.replace(FAMILIES["hf_shared"], name="ExecuTorch", eight_bit=())


def export(
    leaves: Leaves,
    model: ModelConfig,
    tokenizer: Tokenizer,
    out: epath.PathLike,
    quantization: str = "f32",
    slots: int | None = None,
) -> None:
    """Writes a folder with the program, beside `out` until it is whole; all weights are in memory.

    Args:
      leaves: the weights, in any floating dtype.
      model: the network.
      tokenizer: the tokenizer it was trained with.
      out: the folder to make; it may exist if it is empty.
      quantization: one of `QUANTIZATIONS`.
      slots: tokens that the cache has room for; None: the network's `max_length`.

    Raises:
      UserError: the package executorch is missing; `out` holds something; the program cannot express the
        network, or Hugging Face the tokenizer; rows cannot be cut into groups; a weight is not finite.
    """
    check_quantization(quantization, QUANTIZATIONS)
    slots = model.max_length if slots is None else slots
    if not 2 <= slots <= model.max_length:
        raise UserError(
            f"a cache of {slots} tokens is not one of 2 to {model.max_length}, what the network reads."
        )
    check_vocabulary(tokenizer, model)
    with _quiet():
        _check_packages()
    with new_folder(out) as folder, _quiet():
        program = _lowered(
            network(leaves, model, slots, quantization), slots, _facts(model, tokenizer, slots)
        )
        with (folder / PROGRAM).open("wb") as file:
            program.write_to_file(file)
        write_tokenizer(tokenizer, folder, slots)


def _check_packages() -> None:
    try:
        import executorch.exir  # noqa: F401
    except ImportError:
        raise UserError(
            "writing ExecuTorch programs needs the package executorch: pip install "
            "'mobilellm-jax[executorch]'."
        ) from None


def _facts(model: ModelConfig, tokenizer: Tokenizer, slots: int) -> dict[str, Any]:
    """What runners ask a program, each of which becomes a method."""
    return {
        "get_max_seq_len": slots,
        "get_max_context_len": slots,
        "get_vocab_size": model.vocab_size,
        "get_n_layers": model.depth,
        "get_bos_id": tokenizer.bos_id,
        "get_eos_ids": generation_ends(tokenizer),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def network(leaves: Leaves, model: ModelConfig, slots: int, quantization: str = "f32") -> Any:
    """The network in PyTorch that is compiled, a function of what the program is one of.

    Args:
      leaves: see `export`.
      model: see `export`.
      slots: see `export`.
      quantization: see `export`.

    Raises:
      UserError: the program cannot express the network; rows cannot be cut into groups; a weight is not
        finite.
    """
    import torch
    from torch import nn

    from mobilellm_jax.interop.executorch_network import IntegerLinear, IntegerTable, Network

    dtype = torch.float16 if quantization == "f16" else torch.float32
    weights = tensors(leaves, model, FAMILY, "float32")
    found = Network(model, slots, dtype).eval().requires_grad_(False)
    held = {n.removeprefix("model."): torch.from_numpy(np.array(w[:])) for n, w in weights.items()}
    if model.tied:
        held["lm_head.weight"] = held["embed_tokens.weight"]
    found.load_state_dict(held)
    matrices = {n: m for n, m in found.named_modules() if isinstance(m, nn.Linear)}
    if quantization in ("f32", "f16"):
        for matrix in (found.embed_tokens, *matrices.values()):
            matrix.to(dtype)
        return found
    group = GROUPS.get(quantization)
    found.set_submodule("embed_tokens", IntegerTable(found.embed_tokens.weight))
    for name, matrix in matrices.items():
        if group and name != "lm_head":
            if matrix.in_features % group:
                raise UserError(
                    f"{name} has rows of {matrix.in_features} numbers, which groups of {group} do not "
                    "divide: export with 8da8w instead."
                )
            found.set_submodule(name, IntegerLinear(matrix, 4, group))
        else:
            found.set_submodule(name, IntegerLinear(matrix, 8))
    return found


def _lowered(module: Any, slots: int, facts: dict[str, Any]) -> Any:
    """The program: everything that XNNPACK can do handed to it."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import (
        EdgeCompileConfig,
        ExecutorchBackendConfig,
        to_edge_transform_and_lower,
    )
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  operators of `llama`

    given = torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    tokens = torch.export.Dim("T", min=1, max=slots)
    with torch.no_grad():
        exported = torch.export.export(module, given, dynamic_shapes=({1: tokens}, None))
        edge = to_edge_transform_and_lower(
            exported,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            constant_methods=facts,
        )
        return edge.to_executorch(
            ExecutorchBackendConfig(
                # Buffers of the size that the longest text needs, and not those of what is handed in.
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
                sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
            )
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what PyTorch and ExecuTorch say to their own developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
