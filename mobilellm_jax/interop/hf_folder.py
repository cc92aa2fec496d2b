"""A Hugging Face folder as a network of ours, its weights read when they are needed.

A folder that was exported from here carries, as metadata in config.json, what the network really is:
shared blocks, which stock architectures hold once for each application, and QK-norm without weights.
The metadata are checked against the folder's weights, and the network comes back as it was.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from mobilellm_jax.errors import UserError
from mobilellm_jax.interop import compressed_tensors, hf_config
from mobilellm_jax.interop.layout import Entry, entries
from mobilellm_jax.interop.weight_files import open_weights
from mobilellm_jax.leaves import DTYPES, Leaf, Leaves
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.quantization import parts_of

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_ROWS = 8192  # of two tensors, compared at once


@dataclasses.dataclass(frozen=True)
class ImportedLeaf:
    """A leaf that is made of the tensors of a folder when it is read."""

    parts: tuple[tuple[Entry, Leaf], ...]  # one for each layer, or one
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads the tensors of the layers that are asked for, one after another."""
        if self.parts[0][0].layer is None:
            [(entry, tensor)] = self.parts
            if entry.kind.ours == entry.kind.theirs:
                return tensor[index]
            return entry.read(tensor[:])[index]
        first, *rest = index if isinstance(index, tuple) else (index,)
        if not isinstance(first, slice):
            return self._layer(first)[tuple(rest)]
        # An array of this shape without memory says what shape the index selects.
        shape = np.broadcast_to(np.int8(0), self.shape)[(first, *rest)].shape
        out = np.empty(shape, self.dtype)
        for i, layer in enumerate(range(len(self.parts))[first]):
            out[i] = self._layer(layer)[tuple(rest)]
        return out

    def _layer(self, layer: int) -> np.ndarray:
        entry, tensor = self.parts[layer]
        return entry.read(tensor[:])


@dataclasses.dataclass(frozen=True)
class Folder:
    """What a Hugging Face folder holds, its weights still in their files."""

    model: ModelConfig
    leaves: Leaves
    family: str


def open_folder(directory: epath.PathLike, ls_kv: str = "fresh") -> Folder:
    """Reads a folder's description and finds its weights.

    Where the description holds our metadata, and configuration and weights agree with them, the
    network is the one that was exported: blocks shared, QK-norm without weights. Where something
    does not agree, a printed line says what, and the network is read as any other.

    Args:
      directory: a folder with config.json and weights.
      ls_kv: see `hf_config.read`.

    Raises:
      UserError: the network is not one that can be computed here, or a tensor is missing, of
        another shape, of a dtype that is no plain floating point, or one too many.
    """
    directory = epath.Path(directory)
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not readable as JSON ({error}).") from None
    model, family = hf_config.read(raw, str(path), ls_kv)
    # The safetensors beside the official MobileLLM weights were converted by a program, wrongly.
    found = open_weights(directory, prefer_bin="share_embedding" in raw)
    found = {name: t for name, t in found.items() if not name.endswith("rotary_emb.inv_freq")}
    if parts_of(model.quantization):
        found = compressed_tensors.scaled(found)
    _check_tensors(entries(model, family), found, model, directory)
    if family != "hf_shared":
        try:
            model = _folded(model, family, raw, str(path), found)
        except UserError as error:
            print(f"{directory}: read by its usual keys and not by its metadata: {error}")
    return Folder(model, _leaves(model, family, found), family)


def _check_tensors(
    expected: list[Entry], found: dict[str, Leaf], model: ModelConfig, directory: epath.Path
) -> None:
    """Raises `UserError` unless a folder holds exactly the tensors that are expected."""
    for entry in expected:
        if entry.name not in found:
            raise UserError(f"{directory}: the tensor {entry.name} is missing.")
        tensor = found[entry.name]
        if tensor.shape != entry.foreign_shape:
            raise UserError(
                f"{directory}: the tensor {entry.name} has the shape {list(tensor.shape)}, and "
                f"{list(entry.foreign_shape)} by config.json."
            )
        if tensor.dtype not in DTYPES.values():
            raise UserError(
                f"{directory}: the tensor {entry.name} is stored as {tensor.dtype.name}: only "
                f"{', '.join(DTYPES)} can be read."
            )
        if entry.path is None:
            _check_constant(entry, tensor, f"{directory}: the tensor ")
    names = {entry.name for entry in expected}
    if model.tied and _HEAD in found and _HEAD not in names:
        if not _same(found[_HEAD], found[_EMBEDDING]):
            raise UserError(
                f"{directory}: the network is tied, but its {_HEAD} differs from {_EMBEDDING}: set "
                "tie_word_embeddings to false in config.json if the head is its own."
            )
        del found[_HEAD]
    if unexpected := sorted(set(found) - names):
        raise UserError(
            f"{directory}: the tensor {unexpected[0]} has no place in the network of config.json "
            f"({len(unexpected)} such)."
        )


def _check_constant(entry: Entry, tensor: Leaf, prefix: str) -> None:
    """Raises `UserError` where a tensor that the network has no weight for would do something."""
    if (tensor[:] != entry.value).any():
        raise UserError(
            f"{prefix}{entry.name} is not all {entry.value:g}, and the network has no weight for it."
        )


def _folded(
    model: ModelConfig,
    family: str,
    raw: Mapping[str, Any],
    where: str,
    found: Mapping[str, Leaf],
) -> ModelConfig:
    """The network of the metadata, if the folder holds what it would be exported as.

    Raises:
      UserError: it does not; the sentence says what is different.
    """
    described = hf_config.described(raw, where)
    if described is None or described == model:
        return model
    expected = entries(described, family)
    exported, _ = hf_config.read(hf_config.write(described, family), where)
    for key, value in exported.to_dict().items():
        if value != model.to_dict()[key]:
            raise UserError(f"model.{key} is {value!r} there and {model.to_dict()[key]!r} here.")
    first: dict[tuple[str, int | None], str] = {}
    for entry in expected:
        if entry.path is None:
            _check_constant(entry, found[entry.name], "")
            continue
        original = first.setdefault((entry.path, entry.layer), entry.name)
        if not _same(found[original], found[entry.name]):
            raise UserError(f"{entry.name} is no copy of {original}.")
    return described


def _leaves(model: ModelConfig, family: str, found: Mapping[str, Leaf]) -> Leaves:
    parts: dict[str, dict[int, tuple[Entry, Leaf]]] = {}
    for entry in entries(model, family):
        if entry.path is not None:
            parts.setdefault(entry.path, {}).setdefault(
                entry.layer or 0, (entry, found[entry.name])
            )
    leaves = {}
    for path, by_layer in parts.items():
        ordered = tuple(by_layer[layer] for layer in range(len(by_layer)))
        entry, tensor = ordered[0]
        shape = entry.shape if entry.layer is None else (len(ordered), *entry.shape)
        dtypes = {tensor.dtype for _, tensor in ordered}
        dtype = tensor.dtype if len(dtypes) == 1 else np.dtype(np.float32)
        leaves[path] = ImportedLeaf(ordered, shape, dtype)
    return leaves


def _same(a: Leaf, b: Leaf) -> bool:
    """Whether two tensors are equal to the bit."""
    if a is b:
        return True
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return all(
        a[rows].tobytes() == b[rows].tobytes()
        for rows in (slice(i, i + _ROWS) for i in range(0, a.shape[0], _ROWS))
    )
