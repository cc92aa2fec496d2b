"""W8A8 of `model.quantization` in the words and tensors of compressed-tensors, there and back.

A matrix [out, in] is int8 in such a folder, and beside it, as NAME_scale [out, 1], lies the scale of each
row. What enters its products becomes integers when the network runs.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mobilellm_jax.errors import UserError
from mobilellm_jax.leaves import Leaf
from mobilellm_jax.model.quantization import W8A8, integers, parts_of

KEY = "quantization_config"  # of config.json
_HEAD = "lm_head"
_NUMBERS = {"num_bits": 8, "type": "int"}
_GROUP = {
    "weights": _NUMBERS | {"symmetric": True, "strategy": "channel", "dynamic": False},
    "input_activations": _NUMBERS | {"symmetric": False, "strategy": "token", "dynamic": True},
}
# What programs write into it beside that, and changes no number.
_INERT = (
    "quantization_status",
    "version",
    "global_compression_ratio",
    "observer",
    "observer_kwargs",
)


def described(quantization: str) -> dict[str, Any]:
    """What config.json says of the integers of a network, see `ModelConfig`: nothing where it has none."""
    parts = parts_of(quantization)
    if not parts:
        return {}
    # To vLLM a head is no Linear, and has to be named; to transformers it is both.
    targets = ["Linear", _HEAD] if "head" in parts else ["Linear"]
    return {
        KEY: {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": targets} | _GROUP},
            "ignore": [] if "head" in parts else [_HEAD],
        }
    }


def quantization_of(found: Any, tied: bool) -> str | None:
    """The quantization that config.json describes, as `ModelConfig` names it; None: no such one.

    Args:
      found: what is written under `KEY`; None where nothing is.
      tied: whether the head is the embedding, which is never one of integers.
    """
    for quantization in ("none", f"{W8A8}:blocks", f"{W8A8}:blocks+head"):
        if _essence(found) == _essence(described(quantization).get(KEY)):
            return None if tied and "head" in quantization else quantization
    return None


def _essence(found: Any) -> Any:
    """What a description says, less the names of groups, what is empty and what changes no number."""
    if not isinstance(found, Mapping):
        return found
    kept = {
        key: _essence(value)
        for key, value in found.items()
        if key not in _INERT and value not in (None, {}, [])
    }
    if isinstance(groups := kept.get("config_groups"), dict):
        kept["config_groups"] = list(groups.values())
    if isinstance(targets := kept.get("targets"), list):
        kept["targets"] = [target for target in targets if target != _HEAD]  # said twice, see above
    return kept


@dataclasses.dataclass(frozen=True)
class IntegerTensor:
    """A matrix [out, in] as integers, for which `ScaleTensor` has the scales."""

    of: Leaf
    dtype = np.dtype(np.int8)

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the file."""
        return self.of.shape

    def __getitem__(self, index: Any) -> np.ndarray:
        """The integers."""
        return np.asarray(integers(self.of[:], (0,)).qvalue)[index]


@dataclasses.dataclass(frozen=True)
class ScaleTensor:
    """The scale of each row of a matrix of integers, [out, 1]."""

    of: Leaf

    @property
    def dtype(self) -> np.dtype:
        """That which the weights would have."""
        return self.of.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """As in the file."""
        return self.of.shape[0], 1

    def __getitem__(self, index: Any) -> np.ndarray:
        """The scales."""
        return np.asarray(integers(self.of[:], (0,)).scale).astype(self.dtype)[index]


@dataclasses.dataclass(frozen=True)
class ScaledTensor:
    """A matrix of integers as the numbers that they stand for."""

    of: Leaf
    scales: Leaf
    dtype = np.dtype(np.float32)  # in which an integer times a scale has no error worth the name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the integers."""
        return self.of.shape

    def __getitem__(self, index: Any) -> np.ndarray:
        """The numbers."""
        return (self.of[:].astype(self.dtype) * self.scales[:].astype(self.dtype))[index]


def scaled(found: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """A folder's tensors, with matrices of integers as the numbers that they stand for.

    Raises:
      UserError: the scales of a matrix are missing or not one for each row.
    """
    numbers = dict(found)
    for name, tensor in found.items():
        if tensor.dtype != np.int8:
            continue
        scales = numbers.pop(f"{name}_scale", None)
        if scales is None or scales.shape != (tensor.shape[0], 1):
            raise UserError(
                f"the matrix {name} holds integers, but there is no {name}_scale with one scale for each of "
                f"its {tensor.shape[0]:,} rows: write the folder again."
            )
        numbers[name] = ScaledTensor(tensor, scales)
    return numbers
