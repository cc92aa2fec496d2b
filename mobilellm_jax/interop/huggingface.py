"""A network as a folder that Hugging Face loads, written weight by weight, without torch.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)

A stock architecture cannot share blocks: one that is applied twice is written twice, and what the
network really is stands as metadata in config.json. `hf_folder` reads such a folder back.

Matrices of a network with products of integers are written as compressed-tensors has it (see there),
which transformers and vLLM load.
"""

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from importlib import resources
from typing import Any

import numpy as np
from etils import epath

from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import new_folder
from mobilellm_jax.interop import hf_config, safetensors_files
from mobilellm_jax.interop.compressed_tensors import IntegerTensor, ScaleTensor
from mobilellm_jax.interop.hf_tokenizer import generation_config, write_tokenizer
from mobilellm_jax.interop.layout import Entry, Family, by_leaf, default_family, entries
from mobilellm_jax.interop.model_card import model_card
from mobilellm_jax.leaves import DTYPES, Leaf, Leaves, Whole
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.quantization import parts_of

EXPORTS = ("llama", "mistral", "qwen2", "qwen3", "llama4_text", "hf_shared")

WriteWeights = Callable[[epath.Path, Leaves], list[str]]  # a folder and tensors to names of files


def export(
    leaves: Leaves,
    model: ModelConfig,
    tokenizer: Tokenizer,
    out: epath.PathLike,
    family: str | None = None,
    dtype: str | None = None,
    meta: Mapping[str, Any] | None = None,
    write_weights: WriteWeights = safetensors_files.write_files,
) -> list[str]:
    """Writes a folder that Hugging Face loads: configuration, weights, tokenizer and model card.

    It is written beside `out` and becomes `out` when all is there. No more than one leaf is in
    memory at a time.

    Args:
      leaves: weights by path; they may lie in files.
      model: the network.
      tokenizer: the tokenizer it was trained with.
      out: the folder to make; it may exist if it is empty.
      family: one of `EXPORTS`; None chooses the stock architecture that the network is.
      dtype: of the weights in the file, one of `DTYPES`; None keeps each as it is stored.
      meta: a checkpoint's description, for the model card.
      write_weights: writes the tensors; `functools.partial` can set the size of a shard.

    Returns:
      the names of the files in `out`.

    Raises:
      UserError: `out` holds something; the family cannot express the network, or Hugging Face the
        tokenizer; the tokenizer has more pieces than the network embeddings; a weight is not
        finite in `dtype`.
    """
    family = family or default_family(model)
    if family not in EXPORTS:
        raise UserError(f"family={family!r} is not one of {', '.join(EXPORTS)}.")
    check_vocabulary(tokenizer, model)
    stored = dtype or leaves["embedding"].dtype.name
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    config = hf_config.write(model, family) | ends | {"torch_dtype": stored, "dtype": stored}
    weights = tensors(leaves, model, family, dtype)
    config[hf_config.METADATA] = hf_config.metadata(model)
    with new_folder(out) as folder:
        write_tokenizer(tokenizer, folder, model.max_length)
        write_json(folder / "generation_config.json", generation_config(tokenizer))
        write_weights(folder, weights)
        if family == "hf_shared":
            _write_code(folder)
        write_json(folder / "config.json", config)
        card = model_card(epath.Path(out).name, model, family, stored, meta or {})
        (folder / "README.md").write_text(card)
    return sorted(path.name for path in epath.Path(out).iterdir())


def tensors(
    leaves: Leaves, model: ModelConfig, family: str | Family, dtype: str | None = None
) -> dict[str, Leaf]:
    """The tensors of a family's file by name, made when they are asked for.

    They are ordered leaf by leaf, because a leaf of a checkpoint is read as a whole: whoever takes
    them in this order reads every leaf once and has one in memory at a time.

    Raises:
      UserError: the family cannot express the network, or there is no such dtype.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}.")
    whole = Whole(leaves)
    eight_bit = parts_of(model.quantization)
    found: dict[str, Leaf] = {}
    for entry in by_leaf(entries(model, family)):
        kept = DTYPES[dtype] if dtype else entry.dtype(leaves)
        tensor = ExportedTensor(entry, whole, kept)
        if _part(entry) in eight_bit:
            found[entry.name] = IntegerTensor(tensor)
            found[f"{entry.name}_scale"] = ScaleTensor(tensor)
        else:
            found[entry.name] = tensor
    return found


def _part(entry: Entry) -> str:
    """Of which part of a network a tensor is a matrix, in the words of `model.quantization`; "": none."""
    if entry.path is None or len(entry.foreign_shape) < 2 or entry.path == "embedding":
        return ""
    return "head" if entry.path == "head" else "blocks"


@dataclasses.dataclass(frozen=True)
class ExportedTensor:
    """A leaf that is made of another one's slice when it is read."""

    entry: Entry
    leaves: Leaves
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the file."""
        return self.entry.foreign_shape

    def __getitem__(self, index: Any) -> np.ndarray:
        """The values in the file's dtype.

        Raises:
          UserError: one of them is not finite.
        """
        array = self.entry.take(self.leaves)
        with np.errstate(over="ignore"):  # an overflow is reported below, with the tensor's name
            array = array.astype(self.dtype, copy=False)
        if not np.isfinite(array).all():
            raise UserError(
                f"the weight {self.entry.name} is not finite in {self.dtype.name}: "
                "the model is not exported."
            )
        return array[index]


def check_quantization(quantization: str, known: Collection[str]) -> None:
    """Raises `UserError` where matrices shall be stored in a type that the files do not have."""
    if quantization not in known:
        raise UserError(
            f"quantization={quantization!r} is not one of {', '.join(known)}, which these files have."
        )


def check_vocabulary(tokenizer: Tokenizer, model: ModelConfig) -> None:
    """Raises `UserError` where a tokenizer has ids that the network has no embeddings for."""
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size:,} pieces and the model {model.vocab_size:,} "
            "embeddings: use the tokenizer that the model was trained with."
        )


def _write_code(folder: epath.Path) -> None:
    """Puts beside the weights the modules that `config.json` names in its `auto_map`."""
    for source in (resources.files("mobilellm_jax") / "interop" / "remote").iterdir():
        if source.name.endswith(".py"):
            (folder / source.name).write_bytes(source.read_bytes())


def write_json(path: epath.Path, content: Mapping[str, Any]) -> None:
    """Writes JSON as people read it."""
    path.write_text(json.dumps(content, indent=2) + "\n")
