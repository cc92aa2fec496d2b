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
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from absl import logging
from etils import epath

from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import new_folder
from mobilellm_jax.leaves import Leaves, flat, place
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.training.step import TrainState

FORMAT = 1
FOLDER = "checkpoints"


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A network with all that is needed to use it."""

    params: transformer.Params
    model: ModelConfig
    tokenizer: Tokenizer
    step: int
    meta: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run, saved asynchronously; the newest `keep` stay and every `keep_every`-th."""

    def __init__(
        self,
        workdir: epath.Path,
        every: int,
        keep: int,
        keep_every: int,
        read_only: bool = False,
    ) -> None:
        """Opens (and creates) `workdir/checkpoints` and clears away what killed saves left there.

        With `read_only` it does neither: another program may be writing there.

        Raises:
          UserError: the directory cannot be written.
        """
        self.directory = (workdir / FOLDER).resolve()  # Orbax refuses relative paths
        self._every = every
        with _explained(self.directory), _quiet(read_only):
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every or None,
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
            )
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=options,
                item_names=("params", "optimizer", "meta", "tokenizer"),
            )

    def due(self, step: int) -> bool:
        """Whether this step is one of those after which to save."""
        return step % self._every == 0

    def save(self, state: TrainState, meta: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        """Starts to save, unless this step is saved; returns as soon as the state may be changed.

        Raises:
          UserError: this save or the one before could not be written.
        """
        step = int(meta["step"])
        if step in self._manager.all_steps():
            return
        rest = dataclasses.replace(state, params=None)
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            optimizer=ocp.args.StandardSave(_as_dict(rest)),
            meta=ocp.args.JsonSave({"format": FORMAT, **meta}),
            tokenizer=ocp.args.JsonSave(tokenizer.to_dict()),
        )
        with _explained(self.directory):
            self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Returns when all that was saved is on disk.

        Raises:
          UserError: it could not be written.
        """
        with _explained(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Releases what saving used, when all that was saved is on disk.

        Raises:
          UserError: it could not be written.
        """
        with _explained(self.directory):
            self._manager.close()

    def newest_meta(self, before: int | None = None) -> dict[str, Any] | None:
        """The description of the newest checkpoint (before a step), None where there is none."""
        steps = [s for s in self._manager.all_steps() if before is None or s < before]
        return _read_meta(self.directory / str(max(steps))) if steps else None

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """A checkpoint's state, straight into the shardings of `abstract`.

        Args:
          abstract: a state of `ShapeDtypeStruct`s with shardings.
          step: of the checkpoint.

        Raises:
          UserError: the checkpoint is damaged.
        """
        rest = dataclasses.replace(abstract, params=None)
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            optimizer=ocp.args.StandardRestore(_as_dict(rest)),
        )
        with _damaged(self.directory / str(step)):
            found = self._manager.restore(step, args=args)
            return dataclasses.replace(abstract, params=found["params"], **found["optimizer"])


def restore_state(path: epath.Path, abstract: TrainState) -> TrainState:
    """The state of the checkpoint in a step's folder, straight into the shardings of `abstract`.

    Raises:
      UserError: the checkpoint is damaged.
    """
    with _damaged(path), ocp.StandardCheckpointer() as reader:
        params = reader.restore(path / "params", abstract.params)
        rest = reader.restore(path / "optimizer", _as_dict(abstract))
        return dataclasses.replace(abstract, params=params, **rest)


@contextlib.contextmanager
def _quiet(quiet: bool) -> Iterator[None]:
    """Orbax warns at length of what reading alone means."""
    before = logging.get_verbosity()
    try:
        if quiet:
            logging.set_verbosity(logging.ERROR)
        yield
    finally:
        logging.set_verbosity(before)


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
    meta = _read_meta(path)
    model = ModelConfig.from_dict(meta["config"]["model"])
    with _damaged(path):
        shapes = flat(transformer.shapes(model))
        leaves = {name: _open_leaf(path, name) for name in shapes}
        for name, leaf in leaves.items():
            if leaf.shape != shapes[name].shape:
                raise ValueError(f"{name} has the shape {leaf.shape}, not {shapes[name].shape}")
        tokenizer = _read_tokenizer(path)
    return OpenedModel(path, leaves, model, tokenizer, int(meta["step"]), meta)


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
      UserError: `out` holds something, or cannot be written.
    """
    meta = {"step": 0, "rows": 0, **meta, "format": FORMAT}
    meta["config"] = {**meta.get("config", {}), "model": model.to_dict()}
    with new_folder(epath.Path(out).resolve()) as folder, _explained(folder):
        # Weights hardly compress, and compressing them takes half their size in memory.
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as writer:
            writer.save(folder / "params", place(leaves, dtype=dtype))
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


def saved(workdir: epath.PathLike) -> bool:
    """Whether a run has saved a checkpoint there."""
    return _newest(epath.Path(workdir) / FOLDER) is not None


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


def _read_meta(path: epath.Path) -> dict[str, Any]:
    with _damaged(path):
        meta = _read_json(path / "meta")
        written = meta["format"]
    if written != FORMAT:
        raise UserError(
            f"the checkpoint {path} has format {written}, this program reads {FORMAT}: "
            f"use the version that wrote it ({meta.get('packages', {}).get('mobilellm_jax')}) or a later one."
        )
    return meta


def _read_tokenizer(path: epath.Path) -> Tokenizer:
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
        with _damaged(self.path):
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


def _as_dict(state: TrainState) -> dict[str, Any]:
    """The fields of a state but for the parameters and what it does not have, as Orbax stores them."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {name: value for name, value in fields.items() if name != "params" and value is not None}


@contextlib.contextmanager
def _explained(directory: epath.Path) -> Iterator[None]:
    """Turns what fails while writing a checkpoint into one sentence."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"the checkpoint could not be written to {directory} ({_first_line(error)}): "
            "free the disk or mend the permissions and start again; "
            "the checkpoints before it are whole."
        ) from error


@contextlib.contextmanager
def _damaged(path: epath.Path) -> Iterator[None]:
    """Turns what fails while reading a checkpoint into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the checkpoint {path} is damaged ({_first_line(error)}): "
            "move that folder away to go on from the one before it."
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
