"""The tensors of a Hugging Face folder, from safetensors or pytorch_model.bin, in one file or many."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from mobilellm_jax.errors import UserError
from mobilellm_jax.interop import safetensors_files
from mobilellm_jax.leaves import Leaf

_SAFETENSORS = safetensors_files.SINGLE
_BIN = "pytorch_model.bin"


def open_weights(directory: epath.Path, prefer_bin: bool = False) -> dict[str, Leaf]:
    """All tensors of a folder by name, none of them read yet.

    Args:
      directory: with `model.safetensors` or `pytorch_model.bin`, or shards of one and their index.
      prefer_bin: which to take where both are there.

    Raises:
      UserError: there are no weights; a file or a tensor that an index names is missing, or a file
        is damaged; a .bin is to be read and torch is not installed.
    """
    for name in (_BIN, _SAFETENSORS) if prefer_bin else (_SAFETENSORS, _BIN):
        opener: Callable[[epath.Path], Mapping[str, Leaf]]
        opener = _open_bin if name == _BIN else safetensors_files.open_file
        if (directory / name).exists():
            return dict(opener(directory / name))
        if (directory / f"{name}.index.json").exists():
            return _open_shards(directory / f"{name}.index.json", opener)
    raise UserError(f"{directory} has no weights: neither {_SAFETENSORS} nor {_BIN}, nor an index.")


def _open_shards(
    index: epath.Path, opener: Callable[[epath.Path], Mapping[str, Leaf]]
) -> dict[str, Leaf]:
    try:
        places: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
        if not all(isinstance(file, str) for file in places.values()):
            raise TypeError("a file's name is no text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{index} is not an index of weights ({error!r}).") from None
    opened: dict[str, Mapping[str, Leaf]] = {}
    for file in sorted(set(places.values())):
        path = index.parent / file
        if path.parent != index.parent or not path.is_file():
            raise UserError(f"{index} names the file {file}, which is not there: fetch it.")
        opened[file] = opener(path)
    for name, file in places.items():
        if name not in opened[file]:
            raise UserError(f"{index} says that {name} is in {file}, but it is not.")
    return {name: opened[file][name] for name, file in places.items()}


@dataclasses.dataclass(frozen=True)
class _TorchTensor:
    """A torch tensor as a leaf."""

    tensor: Any

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @functools.cached_property
    def dtype(self) -> np.dtype:
        name = str(self.tensor.dtype).removeprefix("torch.")
        return np.dtype(getattr(ml_dtypes, name, name))

    def __getitem__(self, index: Any) -> np.ndarray:
        if self.dtype == ml_dtypes.bfloat16:  # which numpy knows from elsewhere
            import torch

            return self.tensor[index].view(torch.int16).numpy().view(self.dtype)
        return self.tensor[index].numpy()


def _open_bin(path: epath.Path) -> dict[str, Leaf]:
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{path} can only be read with torch: install the extra [torch], or fetch safetensors."
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise TypeError("it holds other things than tensors")
        return {name: _TorchTensor(tensor) for name, tensor in state.items()}
    except Exception as error:  # torch raises whatever its unpickler meets
        reason = (str(error).splitlines() or [""])[0][:200]
        raise UserError(f"{path} cannot be read by torch ({reason}): fetch it again.") from error
