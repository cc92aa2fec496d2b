"""One way to open a network, whoever wrote it: a checkpoint of ours or a Hugging Face folder."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from mobilellm_jax.data.tokenizers import Tokenizer, file_of
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.hf_folder import open_folder
from mobilellm_jax.leaves import Leaves, place
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.transformer import Params
from mobilellm_jax.training import checkpoint

CHECKPOINT = "checkpoint"


@dataclasses.dataclass(frozen=True)
class StoredModel:
    """A network in files: its description is read, its weights are read when they are needed."""

    directory: epath.Path
    model: ModelConfig
    leaves: Leaves
    tokenizer: Tokenizer | None  # None: the folder has none
    step: int
    meta: Mapping[str, Any]  # the checkpoint's description, or where a folder's network came from
    family: str  # of `layout.FAMILIES`, or `CHECKPOINT`

    @property
    def dtype(self) -> str:
        """Of the weights as they are stored: one name, or several where they differ."""
        return ", ".join(sorted({leaf.dtype.name for leaf in self.leaves.values()}))

    @property
    def needed_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
          UserError: there is none.
        """
        if self.tokenizer is None:
            raise UserError(
                f"{self.directory} has no tokenizer: put its tokenizer.json or tokenizer.model "
                "into that folder."
            )
        return self.tokenizer

    @property
    def identity(self) -> dict[str, Any]:
        """Which network this is, in plain values, for the record of what is made of it."""
        return {"directory": str(self.directory), "family": self.family, "step": self.step}

    @property
    def description(self) -> dict[str, Any]:
        """`meta`, and under `heldout` the last evaluation that the run has recorded up to this step."""
        metrics = self.directory.parent.parent / "metrics.jsonl"
        found: dict[str, Any] = {}
        if self.family == CHECKPOINT and metrics.exists():
            for line in metrics.read_bytes().splitlines():
                if b'"heldout"' in line:
                    try:
                        record = json.loads(line)
                        found = record if record["step"] <= self.step else found
                    except (ValueError, LookupError, TypeError):
                        continue  # a killed run may leave half a line
        return {**self.meta, "heldout": found}

    def params(self, shardings: Any = None, dtype: Any = None) -> Params:
        """The weights on devices, every device reading its slices only.

        Args:
          shardings: a pytree of shardings like the parameters; None: all on the default device.
          dtype: of the arrays; None keeps that of the files.
        """
        return place(self.leaves, shardings, dtype)


def load_model(directory: epath.PathLike) -> checkpoint.LoadedModel:
    """Loads a network with its tokenizer onto the default device, weights in float32.

    Args:
      directory: see `open_model`.

    Raises:
      UserError: see `open_model`; or there is no tokenizer.
    """
    opened = open_model(directory)
    tokenizer = opened.needed_tokenizer
    params = opened.params(dtype="float32")
    return checkpoint.LoadedModel(params, opened.model, tokenizer, opened.step, opened.meta)


def open_model(directory: epath.PathLike, ls_kv: str = "fresh") -> StoredModel:
    """Opens a network without reading its weights.

    Args:
      directory: a workdir, its `checkpoints` folder, one step's folder or DIR@STEP, or a Hugging Face
        folder.
      ls_kv: what a shared block of an official MobileLLM reads in its second pass, which its files
        do not say (see `ModelConfig.ls_kv`).

    Raises:
      UserError: there is no network, or it is damaged, or not one that can be computed here; its
        tokenizer is not usable, or has more pieces than the network embeddings.
    """
    directory = epath.Path(checkpoint.located(directory))
    stored = _folder(directory, ls_kv) if is_folder(directory) else _checkpoint(directory)
    if stored.tokenizer and stored.tokenizer.vocab_size > stored.model.vocab_size:
        raise UserError(
            f"the tokenizer in {directory} has {stored.tokenizer.vocab_size:,} pieces and the "
            f"network {stored.model.vocab_size:,} embeddings: they do not belong together."
        )
    return stored


def load(directory: epath.PathLike) -> tuple[ModelConfig, Params, Tokenizer]:
    """The network, its weights on the default device, and its tokenizer.

    Args:
      directory: see `open_model`.

    Raises:
      UserError: see `open_model`; or there is no tokenizer.
    """
    stored = open_model(directory)
    tokenizer = stored.needed_tokenizer
    return stored.model, stored.params(), tokenizer


def is_folder(directory: epath.PathLike) -> bool:
    """Whether it looks like a Hugging Face folder; a workdir has a config.json as well, of another kind."""
    try:
        raw = json.loads((epath.Path(directory) / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(raw, dict) and ("model_type" in raw or "architectures" in raw)


def tokenizer_of(folder: epath.Path) -> Tokenizer | None:
    """A folder's tokenizer, None where it has none.

    Raises:
      UserError: it is damaged.
    """
    file = file_of(folder)
    return Tokenizer.load(file) if file else None


def write_checkpoint(stored: StoredModel, out: epath.PathLike, dtype: Any = None) -> None:
    """Writes a network as a checkpoint of ours without an optimizer, one step's folder.

    Args:
      stored: the network, from wherever it is.
      out: the folder to make; it may exist if it is empty.
      dtype: of the weights; None keeps that of the files.

    Raises:
      UserError: there is no tokenizer, or `out` holds something or cannot be written.
    """
    tokenizer = stored.needed_tokenizer
    checkpoint.write_model(stored.leaves, stored.model, tokenizer, stored.meta, out, dtype)


def _checkpoint(directory: epath.Path) -> StoredModel:
    found = checkpoint.open_model(directory)
    return StoredModel(
        found.path, found.model, found.leaves, found.tokenizer, found.step, found.meta, CHECKPOINT
    )


def _folder(directory: epath.Path, ls_kv: str) -> StoredModel:
    found = open_folder(directory, ls_kv)
    tokenizer = tokenizer_of(directory)
    meta = {
        "config": {"model": found.model.to_dict()},
        "origin": {"directory": str(directory), "family": found.family},
    }
    return StoredModel(directory, found.model, found.leaves, tokenizer, 0, meta, found.family)
