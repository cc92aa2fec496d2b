"""Where a new run starts when it does not start at random weights (`config.init_from`).

It takes the weights alone, or, with `config.init_state=all`, goes on with everything that another
run of ours had at a checkpoint: moments, step and place in the data. So a cooldown is forked off a
long run at any checkpoint that is kept.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.stored import CHECKPOINT, StoredModel, open_model
from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.pruning.while_training import schedule_of
from mobilellm_jax.training.checkpoint import located
from mobilellm_jax.training.config import differences
from mobilellm_jax.training.length import length_of
from mobilellm_jax.training.outliers import init_window
from mobilellm_jax.training.saving import restore_state, stored_shapes
from mobilellm_jax.training.step import TrainState, init_state
from mobilellm_jax.training.workdir import check_past, complete

if TYPE_CHECKING:  # what a run is set up with loads far more than a start needs
    from mobilellm_jax.training.setup import Setup

# What a run may change of the network at whose weights it starts.
MAY_CHANGE = (
    "max_length",
    "rope_theta",
    "rope_scaling",
    "init_std",
    "dead_channels",
    "quantization",
)


def open_start(config: ConfigDict, run: "Setup") -> tuple[StoredModel, "Setup"]:
    """Opens what a run starts at, and checks that it can; reads no weights.

    The run comes back as it is there: its network may have become smaller by then.

    Args:
      config: of the run, with `init_from`.
      run: what its configuration means.

    Raises:
      UserError: see `open_weights`, `check_stage` and `check_state`; or there is no checkpoint of
        that step.
    """
    directory = located(config.init_from)
    if config.init_state == "all":
        run = run.at(open_model(directory).meta)
    start = open_weights(directory, run.model, run.tokenizer)
    check_stage(start, config, named=epath.Path(directory).resolve() == start.directory)
    if config.init_state == "all":
        check_state(start, config, run)
    return start, run


def check_stage(start: StoredModel, config: ConfigDict, named: bool) -> None:
    """Meets a stage that would start at the wrong checkpoint, where that can be known.

    A folder of Hugging Face does not say what it is, nor do runs without a `config.stage`.

    Args:
      start: what the run would start at.
      config: of the run.
      named: whether the user named this very checkpoint, as DIR@STEP or by its folder; of a workdir
        the newest is taken, and only a run that has ended has its last.

    Raises:
      UserError: it is of another stage than `config.init_stage`; or its run has not ended.
    """
    if start.family != CHECKPOINT:
        return
    there = start.meta["config"]
    stage = there.get("stage", "")
    if stage and config.init_stage and stage != config.init_stage:
        raise UserError(
            f"config.init_from={config.init_from} is a checkpoint of the stage {stage}, and "
            f"{config.stage or 'this run'} starts at one of {config.init_stage}: name that in "
            "config.init_from, or set config.init_stage to start here all the same."
        )
    if named or "row_length" not in there:  # a network from elsewhere is no run
        return
    try:
        steps = length_of(there).steps
    except UserError as error:  # a length in epochs needs the plan of that run
        print(f"init_from: whether that run has ended is not known: {error}")
        return
    if start.step < steps:
        raise UserError(
            f"config.init_from={config.init_from} is a run that has not ended: its newest checkpoint is "
            f"of step {start.step:,} of {steps:,}. Let it end, or name the step to start at: "
            f"config.init_from={config.init_from}@{start.step}."
        )


def begin(start: StoredModel, config: ConfigDict, run: "Setup") -> TrainState:
    """The state in which the run starts, in its shardings.

    Args:
      start: as `open_start` gave it.
      config: of the run.
      run: what its configuration means.

    Raises:
      UserError: the checkpoint is damaged.
    """
    if config.init_state == "all":
        return _continued(start, config, run)
    params = start.params(run.shardings.params, np.float32)
    if run.model.dead_channels and not start.model.dead_channels:
        _check_scales(params, config)
    fresh = functools.partial(
        init_state,
        make_optimizer=run.make_optimizer,
        window=config.skip.window,
        pruning=run.pruner.begin() if run.pruner else None,
    )
    return jax.jit(fresh, out_shardings=run.shardings, donate_argnums=0)(params)


def _check_scales(params: Any, config: ConfigDict) -> None:
    """A norm scale of 0 says that a channel is dead, so at the start there must be none."""
    for path, leaf in flat(params).items():
        if path.endswith("norm/scale") and bool((leaf == 0).any()):
            raise UserError(
                f"config.init_from={config.init_from}: {path} has a scale of exactly 0, by which "
                "config.model.dead_channels=True takes a channel for dead: set it to False, or prune in "
                "one shot."
            )


def _continued(start: StoredModel, config: ConfigDict, run: "Setup") -> TrainState:
    """The state of that checkpoint; a window of another size begins empty, and pruning may be over."""
    there, place = start.meta["config"], run.shardings.step
    state = run.abstract
    if (window := there.get("skip", {}).get("window", 0)) != config.skip.window:
        shapes = jax.eval_shape(lambda: init_window(window))
        stored = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes
        )
        state = dataclasses.replace(state, window=stored)
    if over := _prunes(there) and not _prunes(config):
        state = dataclasses.replace(state, pruning=stored_shapes(start.directory, "pruning", place))
    state = restore_state(start.directory, state)
    if window != config.skip.window:
        empty = jax.jit(
            lambda: init_window(config.skip.window), out_shardings=run.shardings.window
        )()
        state = dataclasses.replace(state, window=empty)
    return dataclasses.replace(state, pruning=None) if over else state


def _prunes(config: Mapping[str, Any]) -> bool:
    return bool(config.get("pruning", {}).get("target"))


def check_state(start: StoredModel, config: ConfigDict, run: "Setup") -> None:
    """Meets what forbids to go on from a checkpoint with its moments, step and rows.

    Schedule, length, batches from here on, objective and rates may be others than that run's.

    Raises:
      UserError: there is no train state; it is of another optimizer or another way to prune, or from
        behind the end of this run; or that run has read other rows up to there than this configuration says.
    """
    where = f"config.init_from={config.init_from} with config.init_state=all"
    if start.family != CHECKPOINT or not (start.directory / "optimizer").exists():
        raise UserError(
            f"{where}: {start.directory} holds weights but no optimizer; set config.init_state=weights."
        )
    there = start.meta["config"]
    for key in ("use", "mu_dtype"):
        old, new = (c["optimizer"].get(key) for c in (there, config))
        if key == "mu_dtype":
            old, new = old or "float32", new or "float32"
        if old != new:
            raise UserError(
                f"{where}: config.optimizer.{key} is {old!r} there and {new!r} here; keep it, or set "
                "config.init_state=weights."
            )
    if _prunes(config) and not _prunes(there):
        raise UserError(
            f"{where}: that run does not prune and this one does; set config.pruning.target=0, or "
            "config.init_state=weights."
        )
    if _prunes(config):  # what its steps have added up, and its strategy remembers, goes on
        others = differences(complete(there)["pruning"], config.pruning.to_dict())
        for key in ("score", "strategy.use"):
            if key in others:
                old, new = others[key]
                raise UserError(
                    f"{where}: config.pruning.{key} is {old!r} there and {new!r} here; keep it, or "
                    "set config.init_state=weights."
                )
    if _prunes(there) and not _prunes(config):
        schedule = schedule_of(ConfigDict(complete(there)), length_of(there).steps)
        cuts = [step for step in schedule.steps if step <= start.step]
        if cuts and cuts[-1] not in schedule.compactions:
            at = ", ".join(f"{step:,}" for step in schedule.compactions) or "none"
            raise UserError(
                f"{where}: after step {start.step:,} of that run parts are dead that only a run which "
                f"prunes keeps so: start at one of its compactions (after steps: {at}), leave "
                "config.pruning as it was there, or set config.init_state=weights."
            )
    if start.step >= run.length.steps:
        raise UserError(
            f"{where}: that is step {start.step:,} and this run ends at step {run.length.steps:,}; a run "
            "that goes on counts the steps before it."
        )
    rows, expected = int(start.meta["rows"]), run.length.rows(start.step)
    if (rows, there["row_length"]) != (expected, config.row_length):
        raise UserError(
            f"{where}: after step {start.step:,} that run had read {rows:,} rows of "
            f"{there['row_length']:,} tokens, this configuration says {expected:,} of "
            f"{config.row_length:,}; give it the row_length, first_row, global_batch and batch_ramp of "
            "that run up to there (a new global_batch may follow a ramp that ends there)."
        )
    if changed := check_past(start.meta, run.plan, config.row_length, str(start.directory)):
        print(f"init_from: {changed}.")


def open_weights(
    directory: epath.PathLike, model: ModelConfig, tokenizer: Tokenizer
) -> StoredModel:
    """Opens the weights that a run of this network starts at; says what the run changes of them.

    Args:
      directory: a checkpoint or a Hugging Face folder (see `interop.stored.open_model`).
      model: the network of the run.
      tokenizer: that of the run's data.

    Raises:
      UserError: there is no network; a tensor does not fit the run's network; the networks differ
        in another setting than those of `MAY_CHANGE`; the tokenizers differ.
    """
    start = open_model(directory)
    where = f"config.init_from={directory}"
    wanted, found = flat(transformer.shapes(model)), start.leaves
    for path in [*wanted, *found]:
        there = list(found[path].shape) if path in found else "missing"
        here = list(wanted[path].shape) if path in wanted else "missing"
        if there != here:
            raise UserError(
                f"{where} does not fit config.model: {path} is {there} there and {here} here; make "
                "config.model the network of that folder."
            )
    for key, (old, new) in differences(start.model.to_dict(), model.to_dict()).items():
        if key.split(".")[0] not in MAY_CHANGE:
            raise UserError(
                f"{where} is another network: model.{key} is {old!r} there and {new!r} here; only "
                f"{', '.join(MAY_CHANGE)} may change."
            )
        print(f"init_from: model.{key} was {old!r}, is {new!r}.")
    if start.tokenizer and start.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{where} has another tokenizer than the data of config.plan: prepare the data with "
            f"--tokenizer={directory}."
        )
    said = start.tokenizer and start.tokenizer.chat_template
    if said and said != tokenizer.chat_template:
        print("init_from: the chat template was another one, is that of the data's tokenizer.")
    return start
