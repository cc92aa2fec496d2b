"""Every key of a training configuration, with its default; a file in `configs/` changes what it needs."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from mobilellm_jax.errors import UserError
from mobilellm_jax.imports import import_path
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.training.length import length_of, microbatches
from mobilellm_jax.training.profile import profiled_steps
from mobilellm_jax.training.teacher import check_teacher

# Keys that may differ when a run is continued: they change how it is computed or watched, not what
# it is.
FREE: tuple[str, ...] = ("plan", "mesh", "microbatches", "execution", "loss_chunks", "prefetch")
FREE += ("readers", "workers", "max_skipped", "eval", "checkpoint", "log_every", "wandb", "profile")

INIT_STATES = ("weights", "all")

# Arguments that the loop itself gives to such a function, before those of the configuration.
GIVEN = {"objective": 3, "optimizer": 1, "schedule": 1, "pruning.strategy": 2}
BY_NAME = {"objective": ("teacher",)}  # and those that it gives by their names
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)

POSITIVE: tuple[str, ...] = ("row_length", "global_batch", "microbatches")
POSITIVE += ("loss_chunks", "prefetch")
POSITIVE += ("eval.every", "eval.rows", "eval.tasks_every", "checkpoint.every", "checkpoint.keep")
POSITIVE += ("max_skipped", "log_every")
NOT_NEGATIVE = ("first_row", "checkpoint.keep_every", "readers", "workers", "eval.limit")


def base_config(model: ModelConfig) -> ConfigDict:
    """All keys, locked: a misspelt one is an error where it is written.

    `schedule`, `optimizer`, `objective` and `model.block` name a function or module by import path
    (`use="package.module:name"`), ours or a user's own; the other keys beside `use` are its
    arguments.
    """
    c = ConfigDict()
    c.seed = 0  # of the initial weights; the order of the data has its seed in the plan
    c.model = model.to_dict()  # the network (mobilellm_jax/model/config.py), often a preset
    c.init_from = (
        ""  # where a new run starts: checkpoint, DIR@STEP for one of several, or HF folder
    )
    c.stage = ""  # name of this run where several follow each other
    c.init_stage = ""  # name that the run of `init_from` must have; "": any
    c.init_state = "weights"  # what it takes from there; all: moments, step and rows go on as well
    c.plan = ""  # path of the mixture.json to train on, as `prepare` writes it
    c.first_row = 0  # rows of the plan that runs before this one have read; 0: it begins here
    c.row_length = 2048  # targets per row: what is stored, or a multiple or divisor of it
    c.steps = 1000  # optimizer steps of the whole run; 0: as many as `tokens` or `epochs` take
    c.tokens = 0  # tokens of the whole run, instead of steps; 0: as many as the others read
    c.epochs = 0.0  # readings of all rows of the plan, instead of steps; how often each source is
    # read its weight decides, and is printed at the start
    c.global_batch = 1024  # rows per step, over all devices
    c.batch_ramp = ()  # before that: ((rows per step, tokens of the run at which they end), ...)
    c.microbatches = 1  # parts of a step computed one after another, to save memory

    c.execution = ConfigDict()
    c.execution.dtype = "bfloat16"  # of activations and products; weights and sums are float32
    c.execution.remat = "none"  # what the backward pass computes again: none, dots or full
    c.execution.unroll = 0  # layers per iteration of the scan over a stack; 0: all on GPUs, else 1
    c.execution.attention = "auto"  # of whole rows: auto, reference, splash, flash, cudnn, blocks
    c.loss_chunks = 1  # parts of a row whose logits exist at once; 1 keeps all logits

    c.objective = ConfigDict()
    c.objective.use = "mobilellm_jax.training.objectives:next_token"
    c.objective.z_loss = 0.0  # weight of the squared log normaliser
    c.objective.all_tokens = False  # of conversations also what others than the assistant say

    c.teacher = ConfigDict()  # of objectives that learn from one (training/distillation.py)
    c.teacher.path = ""  # checkpoint or Hugging Face folder of a network that is run; "": none
    c.teacher.model = {}  # its network, where its files are not at hand (pre-flight)
    c.teacher.split = ("data", "fsdp")  # mesh axes over which its weights are split
    c.teacher.stored = ""  # instead of a path: name under which `teach` wrote beside the rows

    c.optimizer = ConfigDict()
    c.optimizer.use = "mobilellm_jax.training.optimizer:adamw"
    c.optimizer.b1 = 0.9  # decay of the first moment
    c.optimizer.b2 = 0.95  # decay of the second moment
    c.optimizer.eps = 1e-8  # added to the root of the second moment
    c.optimizer.weight_decay = 0.1  # of matrices and embedding, not of norm scales and biases
    c.optimizer.clip = 1.0  # global norm to which gradients are cut
    c.optimizer.mu_dtype = "float32"  # of the first moment as it is kept; bfloat16 halves it

    c.schedule = ConfigDict()
    c.schedule.use = "mobilellm_jax.training.optimizer:warmup_cosine"
    c.schedule.peak = 2e-3  # learning rate after the warm-up
    c.schedule.warmup_steps = 1000  # from zero to the peak, linearly
    c.schedule.floor = 0.1  # share of the peak that is left at the last step

    c.pruning = ConfigDict()  # inside of training (docs/pruning.md)
    c.pruning.target = 0  # parameters that are left in the end; 0: nothing is pruned
    c.pruning.begin = 1  # steps before the first cut
    c.pruning.end = 0  # step before which the last cut comes; 0: that of the run
    c.pruning.cuts = 20  # that many, each down by as many parameters
    c.pruning.spacing = "even"  # of the cuts; growing: the steps that follow a cut grow linearly
    c.pruning.compact_at = ()  # falling numbers of parameters at which what is dead is taken out, and
    # the run goes on as a smaller network; these checkpoints are kept for ever
    c.pruning.layout = "stacks"  # of blocks that differ in their widths then; padded: one scan
    c.pruning.multiple = 1  # to which widths are rounded up then, with zeros
    c.pruning.score = "taylor"  # that the steps add up: taylor, taylor_slice or fisher
    c.pruning.strategy = ConfigDict()
    c.pruning.strategy.use = "mobilellm_jax.pruning.strategies:adapt"

    c.mesh = ConfigDict()
    c.mesh.data = -1  # devices over which rows are split; -1: what is left
    c.mesh.fsdp = 1  # devices over which rows and weights are split
    c.prefetch = 8  # batches read ahead
    c.readers = 0  # threads that read rows; 0: local files; 64 and more: object stores
    c.workers = 0  # processes that read ahead; 0: threads of this one

    c.eval = ConfigDict()
    c.eval.every = 1000  # steps between evaluations on the held-out rows; also at the end
    c.eval.rows = 512  # held-out rows of each source that are read, or all there are
    c.eval.tasks = ""  # suites and tasks of `evaluate` as well, NAME,NAME; needs the extra [eval]
    c.eval.tasks_every = 10_000  # steps between those; also at the end
    c.eval.data = ""  # folder with their data sets in local files
    c.eval.limit = 0  # documents of each task; 0: all

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 1000  # steps between checkpoints; also at the end and when stopped
    c.checkpoint.keep = 3  # newest checkpoints kept
    c.checkpoint.keep_every = 0  # steps between those kept for ever; 0: none

    c.max_skipped = 10  # non-finite steps in a row after which the run stops
    c.skip = ConfigDict()
    c.skip.window = 0  # steps with which each is compared, to skip outliers; 0: none is skipped
    c.skip.deviations = 6.0  # above their median loss or gradient norm at which a step is skipped
    c.profile = ""  # steps to trace for XProf, FIRST:LAST, both included, into WORKDIR/profile
    c.wandb = ""  # Weights & Biases project to log to as well; needs the extra [wandb]
    c.log_every = 50  # steps between lines where there is no terminal for a progress bar
    return c.lock()


def configured(section: Mapping[str, Any], key: str) -> Callable[..., Any]:
    """The function that a section names under `use`, with the section's other keys bound to it.

    Args:
      section: a part of the configuration with a key `use`.
      key: its name in the configuration: objective, optimizer or schedule.

    Raises:
      UserError: the import path or one of the arguments does not exist, or an argument is missing.
    """
    settings = dict(section)
    function = import_path(settings.pop("use"), f"{key}.use")
    known = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for name in settings:
        if name not in known and not takes_any:
            raise UserError(
                f"config.{key}.{name} is not an argument of {section['use']}: it takes "
                f"{', '.join(known)}."
            )
    others = list(known.values())[GIVEN[key] :]
    for p in (p for p in others if p.name not in BY_NAME.get(key, ())):
        if p.default is p.empty and p.name not in settings and p.kind in _NAMED:
            raise UserError(f"config.{key}.{p.name} is missing: {section['use']} needs it.")
    return functools.partial(function, **settings)


def check(config: ConfigDict, devices: int) -> None:
    """Meets what is wrong with a configuration before anything is built from it.

    Raises:
      UserError: a number is out of range or two do not fit together.
    """
    flat = dict(_flat(config.to_dict()))
    for key in POSITIVE:
        if flat[key] < 1:
            raise UserError(f"config.{key}={flat[key]} must be at least 1.")
    for key in NOT_NEGATIVE:
        if flat[key] < 0:
            raise UserError(f"config.{key}={flat[key]} must be at least 0.")
    for key, value in flat.items():
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"config.{key} is not a number.")
    for batch in (phase.batch for phase in length_of(config).phases):
        if batch % (parts := microbatches(config, batch) * devices):
            key = "global_batch" if batch == config.global_batch else "batch_ramp"
            raise UserError(
                f"config.{key}={batch} cannot be split into config.microbatches="
                f"{parts // devices} parts over {devices} device(s): make it a multiple of their product."
            )
    if config.init_state not in INIT_STATES:
        raise UserError(
            f"config.init_state={config.init_state!r} is unknown: {' or '.join(INIT_STATES)}."
        )
    if config.init_stage and not config.init_from:
        raise UserError(
            f"config.init_from is empty, but {config.stage or 'this run'} starts at a checkpoint of the "
            f"stage {config.init_stage}: name it there, or set config.init_stage='' for random weights."
        )
    if config.init_state == "all" and not config.init_from:
        raise UserError("config.init_state=all needs a checkpoint: name it in config.init_from.")
    if config.skip.window < 0 or config.skip.window == 1:
        raise UserError(
            f"config.skip.window={config.skip.window} must be at least 2, or 0 to skip no step."
        )
    if config.skip.deviations <= 0:
        raise UserError(f"config.skip.deviations={config.skip.deviations} must be positive.")
    profiled_steps(config.profile)
    if config.row_length % config.loss_chunks:
        raise UserError(
            f"config.loss_chunks={config.loss_chunks} does not divide "
            f"config.row_length={config.row_length}."
        )
    if config.row_length > config.model.max_length:
        raise UserError(
            f"config.row_length={config.row_length} exceeds the model's context, "
            f"config.model.max_length={config.model.max_length}."
        )
    check_teacher(config, configured(config.objective, "objective"))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys at which two configurations differ, with both values (None where a key is missing)."""
    flat_old, flat_new = dict(_flat(old)), dict(_flat(new))
    keys = sorted({*flat_old, *flat_new})
    pairs = {key: (flat_old.get(key), flat_new.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _flat(tree: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        items = [(str(k), v) for k, v in tree.items()]
    elif isinstance(tree, list | tuple):
        items = [(str(i), v) for i, v in enumerate(tree)]
    else:
        return [(prefix, tree)]
    return [pair for k, v in items for pair in _flat(v, f"{prefix}.{k}" if prefix else k)]
