"""What a GGUF file says of itself: its keys and its table of tensors, read without their numbers.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little endian.
"""

import dataclasses
import math
import struct
from typing import Any, BinaryIO

from etils import epath

from mobilellm_jax.errors import UserError

# The format's numbers for types, to those of `struct` and to the names of tensor types.
_SCALARS = {**dict(enumerate("BbHhIif?")), 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Keys that are read here.
_READ = {"general.architecture": str, "tokenizer.ggml.model": str, "tokenizer.ggml.tokens": list}
TENSOR_TYPES = {
    **dict(enumerate("F32 F16 Q4_0 Q4_1".split())),
    **dict(enumerate("Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K".split(), 6)),
    **dict(enumerate("IQ2_XXS IQ2_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ2_S IQ4_XS".split(), 16)),
    **dict(enumerate("I8 I16 I32 I64 F64 IQ1_M BF16".split(), 24)),
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A line of the table of tensors; `shape` as NumPy has it, the last axis contiguous."""

    name: str
    shape: tuple[int, ...]
    type: str  # F32, F16, Q8_0, ...


@dataclasses.dataclass(frozen=True)
class Contents:
    """The header of a GGUF file."""

    keys: dict[str, Any]  # general.*, <architecture>.*, tokenizer.*
    tensors: tuple[TensorInfo, ...]

    @property
    def architecture(self) -> str:
        """How runtimes read the tensors: llama, qwen2, qwen3, ..."""
        return self.keys.get("general.architecture", "")

    @property
    def parameter_count(self) -> int:
        """Numbers in all tensors; those of a shared block as often as they are stored."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def tokenizer_model(self) -> str:
        """The kind of its tokenizer: `llama` is SentencePiece, `gpt2` byte-level BPE, "" none."""
        return self.keys.get("tokenizer.ggml.model", "")


def inspect(path: epath.PathLike) -> Contents:
    """Reads the header of a GGUF file.

    Raises:
      UserError: there is no such file, or it is no GGUF file, or it ends inside its header.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise UserError(f"{path} is not a GGUF file.")
        header = _Header(file, path.stat().length - 4)
        try:
            (version,) = header.numbers("I")
            if version not in (2, 3):
                raise UserError(f"{path} is GGUF version {version}, but 2 and 3 are what is known.")
            tensors, keys = header.numbers("QQ")
            values = {header.string(): header.value() for _ in range(keys)}
            if not all(isinstance(values.get(key, kind()), kind) for key, kind in _READ.items()):
                raise TypeError
            return Contents(values, tuple(header.tensor() for _ in range(tensors)))
        except (struct.error, UnicodeDecodeError, KeyError, TypeError):
            raise UserError(f"{path} is damaged: its header ends early or is garbled.") from None


class _Header:
    """Reads one thing after another; `struct.error` where the file ends before it."""

    def __init__(self, file: BinaryIO, left: int) -> None:
        self._file, self._left = file, left

    def _read(self, size: int) -> bytes:
        if size > self._left:  # asked first, because a garbled size would claim all memory
            raise struct.error
        self._left -= size
        return self._file.read(size)

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{kinds}")
        return layout.unpack(self._read(layout.size))

    def string(self) -> str:
        return self._read(*self.numbers("Q")).decode()

    def value(self) -> Any:
        (kind,) = self.numbers("I")
        if kind != _ARRAY:
            return self._of_kind(kind)
        kind, count = self.numbers("IQ")
        if kind in _SCALARS:
            return list(self.numbers(f"{count}{_SCALARS[kind]}"))
        return [self._of_kind(kind) for _ in range(count)]

    def _of_kind(self, kind: int) -> Any:
        return self.string() if kind == _STRING else self.numbers(_SCALARS[kind])[0]

    def tensor(self) -> TensorInfo:
        name = self.string()
        (axes,) = self.numbers("I")
        *shape, kind, _ = self.numbers(f"{axes}QIQ")
        return TensorInfo(name, tuple(reversed(shape)), TENSOR_TYPES.get(kind, f"type {kind}"))
