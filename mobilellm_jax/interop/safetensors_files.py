"""The safetensors format: tensors that are read in parts, files that are written tensor by tensor.

A file is 8 bytes (the header's length, little-endian), the header (JSON: name to dtype, shape and
where the bytes lie after the header) and the bytes of the tensors, one after another. Files are read
without memory maps, whose pages would count as this program's memory.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from mobilellm_jax.errors import UserError
from mobilellm_jax.leaves import Leaf, Leaves

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    **{f"I{8 * size}": np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BLOCK = 64 << 20  # bytes read at once where only some of them are kept
_MAX_HEADER = 100 << 20  # bytes, as in the format's own reader
MAX_SHARD = 5 * 10**9  # bytes
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file; indexing reads the rows of its first axis that are asked for."""

    path: epath.Path
    offset: int  # of its first byte in the file
    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads a part: a number, a slice without a step, or a tuple of such, as for an array.

        Raises:
          UserError: the file has become shorter.
        """
        first, *rest = index if isinstance(index, tuple) else (index,)
        if not isinstance(first, slice):
            row = range(self.shape[0])[first]
            return self._rows(row, row + 1)[(0, *rest)]
        start, stop, _ = first.indices(self.shape[0])
        if all(part == slice(None) for part in rest):
            return self._rows(start, stop)
        rows = max(1, _BLOCK // self._row_bytes)
        parts = [
            self._rows(i, min(i + rows, stop))[(slice(None), *rest)]
            for i in range(start, stop, rows)
        ]
        return np.concatenate(parts)

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def _rows(self, start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        rest = out.reshape(-1).view(np.uint8).data
        with self.path.open("rb") as file:
            file.seek(self.offset + start * self._row_bytes)
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise UserError(f"{self.path} has become shorter while it was read.")
                rest = rest[count:]
        return out


def open_file(path: epath.PathLike) -> dict[str, Tensor]:
    """The tensors of a file by name, of which nothing is read yet.

    Raises:
      UserError: it is no safetensors file, or cut off, or a tensor has a dtype that is not known.
    """
    path = epath.Path(path)
    size = path.stat().length
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(size - 8, _MAX_HEADER):
            raise UserError(f"{path} is not a safetensors file, or is cut off: fetch it again.")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            return {
                name: _described(path, name, raw, 8 + length, size) for name, raw in header.items()
            }
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
            raise UserError(f"{path} is not a safetensors file ({error!r}).") from None


def _described(path: epath.Path, name: str, raw: Mapping[str, Any], base: int, size: int) -> Tensor:
    """The tensor that an entry of a header describes; its bytes lie after `base`, in `size` bytes."""
    start, end = raw["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (start, end, *raw["shape"])):
        raise ValueError(f"{name}: bytes {start} to {end} for the shape {raw['shape']}")
    if raw["dtype"] not in DTYPES:
        raise UserError(f"{path}: the tensor {name} has the unknown dtype {raw['dtype']}.")
    tensor = Tensor(path, base + start, tuple(raw["shape"]), DTYPES[raw["dtype"]])
    if end - start != math.prod(tensor.shape) * tensor.dtype.itemsize:
        raise ValueError(f"{name}: {end - start} bytes for the shape {list(tensor.shape)}")
    if base + end > size:
        raise UserError(
            f"{path} is cut off: its tensor {name} ends at byte {base + end:,} and the file at "
            f"{size:,}; fetch it again."
        )
    return tensor


def write_files(
    directory: epath.Path, tensors: Leaves, max_shard_bytes: int = MAX_SHARD
) -> list[str]:
    """Writes model.safetensors, or several such files and their index, one tensor after another.

    Args:
      directory: where to write; exists.
      tensors: by name; each is asked for its values once, in this order.
      max_shard_bytes: of tensors in one file, unless a single one is larger.

    Returns:
      the names of the files.
    """
    shards: list[list[str]] = [[]]
    total = size = 0
    for name, tensor in tensors.items():
        bytes_ = _bytes(tensor)
        if shards[-1] and size + bytes_ > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + bytes_, total + bytes_
    count = len(shards)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = [SINGLE]
    for file_name, shard in zip(names, shards, strict=True):
        _write_file(directory / file_name, {name: tensors[name] for name in shard})
    if count == 1:
        return names
    places = {n: file for file, shard in zip(names, shards, strict=True) for n in shard}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [*names, INDEX]


def _write_file(path: epath.Path, tensors: Leaves) -> None:
    # Some versions of transformers refuse a file that does not say whose layout it has.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + _bytes(tensor)
        dtype = _NAMES[np.dtype(tensor.dtype)]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor[:]).reshape(-1).view(np.uint8).data)


def _bytes(tensor: Leaf) -> int:
    return math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
