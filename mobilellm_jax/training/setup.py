"""What a configuration means: the data, the network, and the programs that train it. Writes nothing."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mobilellm_jax.data.mixture import Mixture
from mobilellm_jax.data.opening import check_length, check_templates, open_mixture, open_split
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.taught import TAUGHT_IDS, TAUGHT_LOG_PROBS
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.model import transformer
from mobilellm_jax.model.attention import choose
from mobilellm_jax.model.config import ModelConfig, flops_per_token
from mobilellm_jax.parallel.mesh import make_mesh
from mobilellm_jax.parallel.sharding import batch_sharding, shardings
from mobilellm_jax.pruning.compaction import Compact
from mobilellm_jax.pruning.while_training import Pruner, carried, cut_state, pruner_of
from mobilellm_jax.training.checkpoint import network_of
from mobilellm_jax.training.config import check, configured
from mobilellm_jax.training.evaluation import evaluate
from mobilellm_jax.training.length import Length, length_of, microbatches
from mobilellm_jax.training.objectives import Network
from mobilellm_jax.training.step import Batch, Objective, TrainState, init_state, train_step
from mobilellm_jax.training.teacher import Teacher, abstract_teacher, open_teacher


@dataclasses.dataclass(frozen=True)
class Programs:
    """What a configuration computes, on which devices; the same with and without data at hand."""

    devices: Sequence[jax.Device]
    mesh: jax.sharding.Mesh
    length: Length
    model: ModelConfig
    network: Network
    objective: Objective
    make_optimizer: Callable[..., Any]
    shardings: TrainState  # where each array of the state lives
    abstract: TrainState  # the state as `ShapeDtypeStruct`s with these shardings
    abstract_batch: dict[str, jax.ShapeDtypeStruct]  # likewise the batch of a step
    begin: Callable[[jax.Array], TrainState]  # pure: key of the weights -> state of step 0
    advance: Callable[..., Any]  # pure: state, batch, piece_bytes_V[, teacher] -> state, metrics
    fresh: Callable[[], TrainState]  # jitted `begin` with the seed's key; makes the state in place
    step: Any  # jitted `advance`; donates the state
    pruner: Pruner | None  # None: nothing is pruned
    cut: Callable[..., TrainState]  # `while_training.cut_state`, jitted; donates the state
    teacher: Teacher | None  # as `ShapeDtypeStruct`s; None: the objective learns from none

    def flops_per_token(self, length: int) -> int:
        """Model FLOPs to train on one token of a row of `length`, with the forward pass of a teacher."""
        flops = flops_per_token(self.model, length)
        if self.teacher:
            flops += flops_per_token(self.teacher.network.model, length) // 3
        return flops


@dataclasses.dataclass(frozen=True)
class Setup(Programs):
    """A run that is ready to begin or to go on.

    Here `step` is a function of state and batch alone.
    """

    plan: Plan
    mixture: Mixture
    tokenizer: Tokenizer
    # params, what is called between batches -> held-out measurements
    evaluate: Callable[..., dict[str, float]]
    evaluate_teacher: Callable[[], dict[str, float]] | None  # likewise; None: there is none to run
    load_teacher: Callable[[], Teacher] | None  # with its weights, read at the first call
    microbatches: Callable[[int], int]  # parts in which so many rows are computed
    smaller: Callable[[Pruner], "Setup"]  # the same with the network of that pruner

    def at(self, meta: Mapping[str, Any]) -> "Setup":
        """The run as it was at a checkpoint of its own, when its network may have been smaller."""
        kept = meta.get("pruning", {}).get("kept")
        if self.pruner is None or kept is None or network_of(meta) == self.model:
            return self
        compact = Compact.from_dict(network_of(meta), kept)
        return self.smaller(self.pruner.at(compact))

    def pruned(
        self, step: int, state: TrainState, batch: Batch
    ) -> tuple["Setup", TrainState, Mapping[str, Any] | None]:
        """Run and state after the cut that is due after this step, and its record; None: none is due.

        Args:
          step: steps that are done.
          state: given up.
          batch: of the last of them.

        Raises:
          UserError: see `while_training.Pruner`.
        """
        pruner = self.pruner
        if pruner is None or not pruner.due(step):
            return self, state, None
        parts = self.microbatches(len(batch["tokens"]))
        batches = [jax.tree.map(lambda x, j=j: x[j::parts], batch) for j in range(parts)]
        state, cut = pruner.cut(state, batches, self.cut)
        assert state.pruning is not None
        compact = pruner.compaction(step, jax.device_get(state.pruning.live))
        if compact is None:
            return self, state, cut
        run = self.smaller(pruner.at(compact.after(pruner.compact)))
        carry = functools.partial(carried, compact=compact, shapes=run.abstract)
        return run, jax.jit(carry, out_shardings=run.shardings)(state), cut

    def describe(self) -> dict[str, Any]:
        """The network as it is now, for the description of a checkpoint; see `checkpoint.network_of`."""
        kept = {"pruning": {"kept": self.pruner.compact.to_dict()}} if self.pruner else {}
        return {"model": self.model.to_dict(), **kept}


def set_up(config: ConfigDict, devices: Sequence[jax.Device]) -> Setup:
    """Opens and checks all that a configuration names; the programs compile at their first call.

    Args:
      config: see `training.config.base_config`.
      devices: to run on.

    Raises:
      UserError: the configuration or the data are not usable.
    """
    # --- What is to be trained, on what
    check(config, len(devices))
    if not config.plan:
        raise UserError("config.plan is empty: point it at the mixture.json that `prepare` wrote.")
    model = ModelConfig.from_dict(config.model)
    plan = Plan.load(config.plan)
    tokenizer = tokenizer_of(plan, config.plan)
    mixture = open_mixture(
        plan,
        config.row_length,
        model.vocab_size,
        config.teacher.stored,
        config.objective.get("temperature", 1.0),
    )
    check_templates(plan, tokenizer)
    length = length_of(config)
    check_length(mixture, length.rows(0), length.rows(length.steps) - length.rows(0))
    heldout = open_split(plan, "heldout", config.row_length, model.vocab_size)
    if len(heldout) < len(plan.sources):
        without = [name for i, name in enumerate(plan.names) if i not in heldout]
        print(f"data: no held-out rows of {', '.join(without)}; not evaluated.")

    # --- The programs, given what each token stands for
    tokens = tokenizer.bos_id, tokenizer.eos_id
    program = functools.partial(
        programs, config, devices, *tokens, len(plan.sources), mixture.top_k
    )
    first = program()
    with jax.set_mesh(first.mesh):
        piece_bytes_V = jax.numpy.asarray(tokenizer.piece_bytes())
        # What an objective refuses is met here, before anything is written; the first step, whose
        # trace this is, does not trace it again.
        first.step.eval_shape(first.abstract, first.abstract_batch, piece_bytes_V, first.teacher)
    load = open_teacher(config, first.teacher, tokenizer) if first.teacher else None
    measure = functools.partial(
        evaluate,
        heldout=heldout,
        names=plan.names,
        rows=config.eval.rows,
        batch_rows=config.global_batch // config.microbatches,
        piece_bytes_V=piece_bytes_V,
        mesh=first.mesh,
    )

    def with_data(made: Programs) -> Setup:
        return Setup(
            **{
                **vars(made),
                "step": lambda state, batch: made.step(
                    state, batch, piece_bytes_V, load and load()
                ),
            },
            plan=plan,
            mixture=mixture,
            tokenizer=tokenizer,
            evaluate=functools.partial(measure, network=made.network),
            evaluate_teacher=load and (lambda: measure(load().params, network=load().network)),
            load_teacher=load,
            microbatches=functools.partial(microbatches, config),
            smaller=lambda pruner: with_data(program(pruner=pruner)),
        )

    return with_data(first)


def tokenizer_of(plan: Plan, where: epath.PathLike) -> Tokenizer:
    """The tokenizer that a plan was made with; `where` names the plan in errors.

    Raises:
      UserError: it is not there, or is another one now.
    """
    path = plan.resolve(plan.tokenizer_path)
    tokenizer = Tokenizer.load(path)
    if tokenizer.fingerprint != plan.tokenizer:
        raise UserError(
            f"{path} is not the tokenizer that the plan {where} was made with: put that file back, or "
            "prepare the data again."
        )
    return tokenizer


def programs(
    config: ConfigDict,
    devices: Sequence[jax.Device],
    bos_id: int,
    eos_id: int,
    sources: int,
    top_k: int = 0,
    pruner: Pruner | None = None,
) -> Programs:
    """The programs of a configuration, made without data and without arrays; they compile when called.

    Args:
      config: checked (`training.config.check`); its plan is not looked at.
      devices: to run on, or those of a topology, for which one can only compile.
      bos_id: token that begins a document.
      eos_id: token that ends one.
      sources: number of sources of the plan.
      top_k: tokens that a teacher wrote of each target beside the rows; 0: none did.
      pruner: that of a run which has become smaller, whose network is then this one's; None: of the
        beginning.

    Raises:
      UserError: the mesh does not give these devices, the attention asked for cannot run on them, or
        an import path or its arguments do not exist.
    """
    model = pruner.network.model if pruner else ModelConfig.from_dict(config.model)
    mesh, length = make_mesh(config.mesh, devices), length_of(config)
    execution = config.execution
    platform = mesh.devices.flat[0].platform
    kernel = choose(execution.attention, platform, model, execution.dtype, config.row_length)
    unroll = transformer.layers_at_once(execution.unroll, execution.remat, platform, model)
    network = Network(
        model,
        transformer.Execution(**{**execution, "attention": kernel, "unroll": unroll}),
        bos_id,
        eos_id,
        config.loss_chunks,
    )
    objective = configured(config.objective, "objective")
    teacher = abstract_teacher(config, network, mesh)
    make_optimizer = configured(config.optimizer, "optimizer")
    schedule = configured(config.schedule, "schedule")(length.steps)
    if pruner:
        pruner = dataclasses.replace(pruner, network=network)
    else:
        strategy = configured(config.pruning.strategy, "pruning.strategy")
        pruner = pruner_of(config, network, length.steps, strategy)

    def begin(key: jax.Array) -> TrainState:
        params = transformer.init(model, key)
        pruning = pruner.begin() if pruner else None
        return init_state(params, make_optimizer, config.skip.window, pruning)

    def fresh() -> TrainState:
        return begin(jax.random.key(config.seed))

    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(fresh)
        state_shardings = shardings(shapes, mesh)
        abstract = jax.tree.map(_abstract, shapes, state_shardings)

    rows = config.global_batch
    batch_of: dict[str, tuple[tuple[int, ...], str]] = {
        "tokens": ((rows, config.row_length + 1), "int32"),
        "source": ((rows,), "int32"),
    }
    if config.teacher.stored:
        shape = rows, config.row_length, top_k
        batch_of |= {TAUGHT_IDS: (shape, "int32"), TAUGHT_LOG_PROBS: (shape, "float16")}

    def advance(
        state: TrainState, batch: Batch, piece_bytes_V: jax.Array, teacher: Teacher | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        return train_step(
            state,
            batch,
            piece_bytes_V,
            network=network,
            objective=taught(objective, teacher),
            make_optimizer=make_optimizer,
            schedule=schedule,
            sources=sources,
            microbatches=microbatches(config, batch["tokens"].shape[0]),
            deviations=config.skip.deviations,
            scored=config.pruning.score,
        )

    whole = NamedSharding(mesh, P())  # metrics, in every process
    return Programs(
        devices=devices,
        mesh=mesh,
        length=length,
        model=model,
        network=network,
        objective=objective,
        make_optimizer=make_optimizer,
        shardings=state_shardings,
        abstract=abstract,
        abstract_batch={
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
            for name, (shape, dtype) in batch_of.items()
        },
        begin=begin,
        advance=advance,
        fresh=jax.jit(fresh, out_shardings=state_shardings),
        step=jax.jit(
            advance,
            donate_argnums=0,
            out_shardings=(state_shardings, whole),
        ),
        pruner=pruner,
        cut=jax.jit(cut_state, donate_argnums=0, out_shardings=state_shardings),
        teacher=teacher,
    )


def taught(objective: Objective, teacher: Teacher | None) -> Objective:
    """An objective with its teacher, if there is one."""
    return functools.partial(objective, teacher=teacher) if teacher else objective


def _abstract(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
