"""Checkpoints that explain themselves.

A checkpoint is one directory per step, written by Orbax in the background and named only when
whole:

    WORKDIR/checkpoints/<step>/params      the weights
                               optimizer   the rest of the train state
                               meta        format, step, rows, configuration, plan, provenance
                               tokenizer   the tokenizer's files

Programs that use a model take such a directory, or one above it, and nothing else. Such a directory
may also stand alone, without an optimizer: a network that was brought here from elsewhere.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import new_folder
from mobilellm_jax.leaves import Leaves, flat, place
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig

FORMAT = 1
FOLDER = "checkpoints"


class Damaged(UserError):
    """A checkpoint that cannot be read; the one before it may be whole."""

    def __init__(self, path: epath.Path, error: BaseException) -> None:
        self.fact = f"the checkpoint {path} is damaged ({first_line(error)})"
        super().__init__(f"{self.fact}: move that folder away to go on from the one before it.")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A network with all that is needed to use it."""

    params: transformer.Params
    model: ModelConfig
    tokenizer: Tokenizer
    step: int
    meta: Mapping[str, Any]

    @property
    def begins_with_bos(self) -> bool:
        """Whether texts begin with BOS: in training here all do, elsewhere as the tokenizer does it."""
        return "origin" not in self.meta or self.tokenizer.puts_bos


def load_model(directory: epath.PathLike) -> LoadedModel:
    """Loads the network of a checkpoint onto the default device, in the dtype of its weights.

    Args:
      directory: a workdir, its `checkpoints` folder, or one step's folder; the newest step if there
        are several.

    Raises:
      UserError: there is no checkpoint, it is damaged, or a later version of this program wrote it.
    """
    opened = open_model(directory)
    params = place(opened.leaves)
    return LoadedModel(params, opened.model, opened.tokenizer, opened.step, opened.meta)


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """The network of a checkpoint, its weights still in their files."""

    path: epath.Path  # of the step
    leaves: Leaves
    model: ModelConfig
    tokenizer: Tokenizer
    step: int
    meta: Mapping[str, Any]


def open_model(directory: epath.PathLike) -> OpenedModel:
    """Reads all of a checkpoint but its weights, which can be read leaf by leaf.

    Args:
      directory: see `load_model`.

    Raises:
      UserError: see `load_model`.
    """
    path = find(directory)
    meta = read_meta(path)
    model = network_of(meta)
    with damaged(path):
        shapes = flat(transformer.shapes(model))
        leaves = {name: _open_leaf(path, name) for name in shapes}
        for name, leaf in leaves.items():
            if leaf.shape != shapes[name].shape:
                raise ValueError(f"{name} has the shape {leaf.shape}, not {shapes[name].shape}")
        tokenizer = _read_tokenizer(path)
    return OpenedModel(path, leaves, model, tokenizer, int(meta["step"]), meta)


def network_of(meta: Mapping[str, Any]) -> ModelConfig:
    """The network of a checkpoint: its run's, unless that has become smaller since it began."""
    return ModelConfig.from_dict(meta.get("model") or meta["config"]["model"])


def write_model(
    leaves: Leaves,
    model: ModelConfig,
    tokenizer: Tokenizer,
    meta: Mapping[str, Any],
    out: epath.PathLike,
    dtype: Any = None,
) -> None:
    """Writes one step's folder without an optimizer: a network to use or to start a run at.

    Args:
      leaves: the weights.
      model: the network.
      tokenizer: its tokenizer.
      meta: further description; `step` and `config` have defaults.
      out: the folder to make; it may exist if it is empty.
      dtype: of the weights as they are stored; None keeps their own.

    Raises:
      UserError: `out` holds something, or cannot be written; a weight is not finite in `dtype`.
    """
    meta = {"step": 0, "rows": 0, **meta, "format": FORMAT, "model": model.to_dict()}
    meta["config"] = {**meta.get("config", {}), "model": model.to_dict()}
    with np.errstate(over="ignore"):  # reported below, with the weight's name
        params = place(leaves, dtype=dtype)
    for path, leaf in flat(params).items():
        if not np.isfinite(leaf).all():  # on the host, whatever mesh is set around this
            raise UserError(
                f"the weight {path} is not finite in {leaf.dtype.name}: the checkpoint is not written."
            )
    with new_folder(epath.Path(out).resolve()) as folder, explained(folder):
        # Weights hardly compress, and compressing them takes half their size in memory.
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as writer:
            writer.save(folder / "params", params)
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as json_writer:
            json_writer.save(folder / "meta", meta)
            json_writer.save(folder / "tokenizer", tokenizer.to_dict())


def find(directory: epath.PathLike) -> epath.Path:
    """The folder of one step: `directory` itself, or the newest below it.

    Raises:
      UserError: there is none.
    """
    directory = epath.Path(directory).resolve()  # Orbax refuses relative paths
    if newest := _newest(directory / FOLDER) or _newest(directory):
        return newest
    if (directory / "meta").exists():
        return directory
    raise UserError(
        f"there is no checkpoint in {directory}: name a workdir in which training has saved one, "
        f"its {FOLDER} folder, one step's folder, or a Hugging Face folder with its config.json."
    )


def located(name: epath.PathLike) -> epath.PathLike:
    """The directory that a name means: itself, or of DIR@STEP that step's folder.

    Raises:
      UserError: DIR has no checkpoint of that step.
    """
    match = re.fullmatch(r"(.+)@(\d+)", os.fspath(name))
    if not match or epath.Path(name).exists():
        return name
    directory, step = epath.Path(match[1]), int(match[2])
    folder = directory / FOLDER if (directory / FOLDER).exists() else directory
    steps = saved_steps(folder)
    if step not in steps:
        there = ", ".join(f"{s:,}" for s in steps) or "none"
        raise UserError(
            f"{name}: there is no checkpoint of step {step:,} in {folder}; its steps are: {there}."
        )
    return folder / str(step)


def saved_steps(folder: epath.Path) -> list[int]:
    """Steps that were written to their end, rising."""
    if not (folder.exists() and folder.is_dir()):
        return []
    steps = [path for path in folder.iterdir() if path.name.isdigit()]
    return sorted(int(p.name) for p in steps if ocp.utils.is_checkpoint_finalized(p))


def _newest(folder: epath.Path) -> epath.Path | None:
    """The folder of the newest step that was written to its end."""
    steps = saved_steps(folder)
    return folder / str(steps[-1]) if steps else None


def read_meta(path: epath.Path) -> dict[str, Any]:
    """The description of one step's folder.

    Raises:
      UserError: it is damaged, or of another format.
    """
    with damaged(path):
        meta = _read_json(path / "meta")
        written = meta["format"]
    if written != FORMAT:
        raise UserError(
            f"the checkpoint {path} has format {written}, this program reads {FORMAT}: "
            f"use the version that wrote it ({meta.get('packages', {}).get('mobilellm_jax')}) or a later one."
        )
    with damaged(path):
        for key, kind in (("step", int), ("rows", int), ("config", dict)):
            if not isinstance(meta[key], kind):
                raise TypeError(f"its description says {key}={meta[key]!r}")
    return meta


def _read_tokenizer(path: epath.Path) -> Tokenizer:
    if not (path / "tokenizer").exists():
        raise FileNotFoundError(
            "it has no tokenizer: that of another checkpoint of the run will do"
        )
    return Tokenizer.from_dict(_read_json(path / "tokenizer"))


@dataclasses.dataclass(frozen=True)
class _StoredLeaf:
    """A leaf of a checkpoint; every slice reads and unpacks the stored chunks that it touches."""

    path: epath.Path  # of the step
    array: ts.TensorStore

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype.numpy_dtype

    def __getitem__(self, index: Any) -> np.ndarray:
        with damaged(self.path):
            return np.asarray(self.array[index].read().result())


def _open_leaf(path: epath.Path, name: str) -> _StoredLeaf:
    """Opens an array as Orbax stores it, without what its own reader holds in memory."""
    folder = f"{path / 'params'}/"
    base = folder if "://" in folder else {"driver": "file", "path": folder}
    store = {"driver": "ocdbt", "base": base, "path": f"{name.replace('/', '.')}/"}
    return _StoredLeaf(path, ts.open({"driver": "zarr", "kvstore": store}, read=True).result())


def _read_json(path: epath.Path) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
        return reader.restore(path)


@contextlib.contextmanager
def explained(directory: epath.Path) -> Iterator[None]:
    """Turns what fails while writing a checkpoint into one sentence."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"the checkpoint could not be written to {directory} ({first_line(error)}): "
            "free the disk or mend the permissions and start again; "
            "the checkpoints before it are whole."
        ) from error


@contextlib.contextmanager
def damaged(path: epath.Path) -> Iterator[None]:
    """Turns what fails while reading a checkpoint into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise Damaged(path, error) from error


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
