"""What a folder or file holds, told without reading its weights: `convert --inspect`."""

import json
import math
import re
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop import gguf_reader, stored, weight_files
from mobilellm_jax.interop.model_card import network_rows
from mobilellm_jax.tables import aligned

_NUMBERED = re.compile(r"\b(layers|blk)\.\d+\.")  # a tensor of one of many equal blocks

Tensor = tuple[str, tuple[int, ...], str]  # name, shape, type


def inspect(path: epath.PathLike) -> str:
    """Format, network, tokenizer and a table of all weights, as text.

    Args:
      path: a workdir or checkpoint, a Hugging Face folder of any architecture, or a GGUF file.

    Raises:
      UserError: it is none of these, or damaged.
    """
    path = epath.Path(path)
    if path.is_file():
        facts, tensors = _gguf(path)
    elif stored.is_folder(path):
        facts, tensors = _folder(path)
    else:
        facts, tensors = _checkpoint(path)
    lines = aligned([*facts.items()], "<<")
    return f"{lines}\n\n{textwrap.indent(_table(tensors), '  ')}"


def _checkpoint(path: epath.Path) -> tuple[dict[str, str], list[Tensor]]:
    found = stored.open_model(path)
    facts = {"format": f"checkpoint {found.directory}, step {found.step:,}"}
    facts |= dict(network_rows(found.model)) | {"tokenizer": _tokenizer(found.tokenizer)}
    return facts, [(name, leaf.shape, leaf.dtype.name) for name, leaf in found.leaves.items()]


def _folder(path: epath.Path) -> tuple[dict[str, str], list[Tensor]]:
    raw = json.loads((path / "config.json").read_text())
    tensors = weight_files.open_weights(path, prefer_bin="share_embedding" in raw)
    architectures = raw.get("architectures")
    names = ", ".join(map(str, architectures)) if isinstance(architectures, list) else "?"
    facts = {"format": f"Hugging Face folder, {names} (model_type {raw.get('model_type')})"}
    try:
        found = stored.open_model(path)
        facts |= dict(network_rows(found.model))
        tokenizer = found.tokenizer
    except UserError as error:  # what cannot be computed here can still be looked at
        facts["network"] = f"cannot be used here: {error}"
        tokenizer = stored.tokenizer_of(path)
    facts["tokenizer"] = _tokenizer(tokenizer)
    return facts, [(name, tensor.shape, tensor.dtype.name) for name, tensor in tensors.items()]


def _gguf(path: epath.Path) -> tuple[dict[str, str], list[Tensor]]:
    found = gguf_reader.inspect(path)
    names = {tensor.name for tensor in found.tensors}
    vocabulary = len(found.keys.get("tokenizer.ggml.tokens", ()))
    kind = {"llama": "SentencePiece", "gpt2": "byte-level BPE"}.get(
        found.tokenizer_model, found.tokenizer_model
    )
    ends = {"BOS": "bos_token_id", "EOS": "eos_token_id"}
    known = {end: found.keys.get(f"tokenizer.ggml.{key}") for end, key in ends.items()}
    facts = {
        "format": f"GGUF, architecture {found.architecture}",
        "network": ", ".join(
            f"{key.removeprefix(found.architecture + '.')} {value}"
            for key, value in found.keys.items()
            if key.startswith(f"{found.architecture}.")
        ),
        "embedding and head": "two matrices" if "output.weight" in names else "one matrix",
        "tokenizer": _said(
            kind, vocabulary, known["BOS"], known["EOS"], "tokenizer.chat_template" in found.keys
        )
        if kind
        else "none",
    }
    return facts, [(tensor.name, tensor.shape, tensor.type) for tensor in found.tensors]


def _tokenizer(tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return "none"
    kind = type(tokenizer).__name__.removesuffix("Tokenizer")
    ends = tokenizer.bos_id, tokenizer.eos_id
    return _said(kind, tokenizer.vocab_size, *ends, tokenizer.chat_template is not None)


def _said(kind: str, pieces: int, bos: Any, eos: Any, template: bool) -> str:
    chat = "with a chat template" if template else "no chat template"
    return f"{kind}, {pieces:,} pieces, BOS {bos}, EOS {eos}, {chat}"


def _table(tensors: Iterable[Tensor]) -> str:
    """A line for each tensor, equal ones of all blocks together, and the sum."""
    counts: dict[Tensor, int] = {}
    for name, shape, kind in tensors:
        key = (_NUMBERED.sub(r"\1.*.", name), tuple(shape), kind)
        counts[key] = counts.get(key, 0) + 1
    lines = [("weight", "shape", "type", "times", "parameters")]
    total: dict[str, int] = {}
    for (name, shape, kind), count in counts.items():
        size = math.prod(shape) * count
        total[kind] = total.get(kind, 0) + size
        lines.append((name, " x ".join(map(str, shape)), kind, str(count), f"{size:,}"))
    kinds = ", ".join(_share(kind, total) for kind in total)
    lines.append(("all", "", kinds, str(sum(counts.values())), f"{sum(total.values()):,}"))
    return aligned(lines, "<<<>>")


def _share(kind: str, total: Mapping[str, int]) -> str:
    share = total[kind] / max(sum(total.values()), 1)
    return kind if len(total) == 1 else f"{kind} {share:.1%}"
