"""What a configuration means: the data, the network, and the programs that train it. Writes nothing."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from mobilellm_jax.data.mixture import (
    Mixture,
    check_length,
    check_templates,
    open_mixture,
    open_split,
)
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.model import transformer
from mobilellm_jax.model.attention import choose
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.parallel.mesh import make_mesh
from mobilellm_jax.parallel.sharding import batch_sharding, shardings
from mobilellm_jax.training.config import check, configured
from mobilellm_jax.training.evaluation import evaluate
from mobilellm_jax.training.length import Length, length_of, microbatches
from mobilellm_jax.training.objectives import Network
from mobilellm_jax.training.step import Batch, Objective, TrainState, init_state, train_step


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
    advance: Callable[..., Any]  # pure: state, batch, piece_bytes_V -> state, metrics
    fresh: Callable[[], TrainState]  # jitted `begin` with the seed's key; makes the state in place
    step: Any  # jitted `advance`; donates the state


@dataclasses.dataclass(frozen=True)
class Setup(Programs):
    """A run that is ready to begin or to go on: here `step` is a function of state and batch alone."""

    plan: Plan
    mixture: Mixture
    tokenizer: Tokenizer
    evaluate: Callable[[Any], dict[str, float]]  # params -> held-out measurements


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
    mixture = open_mixture(plan, config.row_length, model.vocab_size)
    check_templates(plan, tokenizer)
    length = length_of(config)
    check_length(mixture, length.rows(0), length.rows(length.steps) - length.rows(0))
    heldout = open_split(plan, "heldout", config.row_length, model.vocab_size)
    if len(heldout) < len(plan.sources):
        without = [name for i, name in enumerate(plan.names) if i not in heldout]
        print(f"data: no held-out rows of {', '.join(without)}; not evaluated.")

    # --- The programs, given what each token stands for
    made = programs(config, devices, tokenizer.bos_id, tokenizer.eos_id, len(plan.sources))
    with jax.set_mesh(made.mesh):
        piece_bytes_V = jax.numpy.asarray(tokenizer.piece_bytes())
    return Setup(
        **{**vars(made), "step": lambda state, batch: made.step(state, batch, piece_bytes_V)},
        plan=plan,
        mixture=mixture,
        tokenizer=tokenizer,
        evaluate=functools.partial(
            evaluate,
            network=made.network,
            heldout=heldout,
            names=plan.names,
            rows=config.eval.rows,
            batch_rows=config.global_batch // config.microbatches,
            piece_bytes_V=piece_bytes_V,
            mesh=made.mesh,
        ),
    )


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
    config: ConfigDict, devices: Sequence[jax.Device], bos_id: int, eos_id: int, sources: int
) -> Programs:
    """The programs of a configuration, made without data and without arrays; they compile when called.

    Args:
      config: checked (`training.config.check`); its plan is not looked at.
      devices: to run on, or those of a topology, for which one can only compile.
      bos_id: token that begins a document.
      eos_id: token that ends one.
      sources: number of sources of the plan.

    Raises:
      UserError: the mesh does not give these devices, the attention asked for cannot run on them, or
        an import path or its arguments do not exist.
    """
    model = ModelConfig.from_dict(config.model)
    mesh, length = make_mesh(config.mesh, devices), length_of(config)
    execution = config.execution
    platform = mesh.devices.flat[0].platform
    kernel = choose(execution.attention, platform, model, execution.dtype, config.row_length)
    network = Network(
        model,
        transformer.Execution(**{**execution, "attention": kernel}),
        bos_id,
        eos_id,
        config.loss_chunks,
    )
    objective = configured(config.objective, "objective")
    make_optimizer = configured(config.optimizer, "optimizer")
    schedule = configured(config.schedule, "schedule")(length.steps)

    def begin(key: jax.Array) -> TrainState:
        params = transformer.init(model, key)
        return init_state(params, make_optimizer, config.skip.window)

    def fresh() -> TrainState:
        return begin(jax.random.key(config.seed))

    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(fresh)
        state_shardings = shardings(shapes, mesh)
        abstract = jax.tree.map(_abstract, shapes, state_shardings)

    rows = config.global_batch
    shapes_of_batch = {"tokens": (rows, config.row_length + 1), "source": (rows,)}

    def advance(
        state: TrainState, batch: Batch, piece_bytes_V: jax.Array
    ) -> tuple[TrainState, dict[str, Any]]:
        return train_step(
            state,
            batch,
            piece_bytes_V,
            network=network,
            objective=objective,
            make_optimizer=make_optimizer,
            schedule=schedule,
            sources=sources,
            microbatches=microbatches(config, batch["tokens"].shape[0]),
            deviations=config.skip.deviations,
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
            name: jax.ShapeDtypeStruct(shape, "int32", sharding=batch_sharding(mesh))
            for name, shape in shapes_of_batch.items()
        },
        begin=begin,
        advance=advance,
        fresh=jax.jit(fresh, out_shardings=state_shardings),
        step=jax.jit(
            advance,
            donate_argnums=0,
            out_shardings=(state_shardings, whole),
        ),
    )


def _abstract(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
