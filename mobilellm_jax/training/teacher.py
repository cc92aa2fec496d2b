"""The teacher of a distillation: a network that is run beside the one that is trained, and stays as it is.

It is any network that can be opened (`interop.stored.open_model`), with the student's tokenizer. Its
weights are kept in the dtype of the activations, and split over the devices apart from the
student's: those are often a tenth of its size.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from mobilellm_jax.errors import UserError
from mobilellm_jax.model import transformer
from mobilellm_jax.model.attention import choose
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.parallel.mesh import AXES
from mobilellm_jax.parallel.sharding import shardings
from mobilellm_jax.training.objectives import Network

if TYPE_CHECKING:  # what opens files loads far more than a description needs
    from mobilellm_jax.data.tokenizers import Tokenizer


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["network"]
)
@dataclasses.dataclass(frozen=True)
class Teacher:
    """A network as an objective runs it."""

    network: Network
    params: transformer.Params  # arrays, or `ShapeDtypeStruct`s with their shardings


def described(config: ConfigDict) -> ModelConfig | None:
    """The teacher's network; None: there is no teacher.

    It is what its files say, and where they are not at hand, as for a pre-flight, what
    `config.teacher.model` says.

    Raises:
      UserError: there is no such network.
    """
    if config.teacher.stored or not (config.teacher.path or config.teacher.model):
        return None
    said = ModelConfig.from_dict(config.teacher.model) if config.teacher.model else None
    if said and not (config.teacher.path and epath.Path(config.teacher.path).exists()):
        return said
    from mobilellm_jax.interop.stored import open_model

    found = open_model(config.teacher.path).model
    if said and said != found:
        print(
            f"config.teacher.path={config.teacher.path} is another network than config.teacher.model "
            "describes; it is the teacher."
        )
    return found


def check_teacher(config: ConfigDict, objective: Callable[..., Any]) -> None:
    """An objective that learns from a teacher must have one, and no other may.

    Raises:
      UserError: it is not so.
    """
    where, argument = config.objective.use, inspect.signature(objective).parameters.get("teacher")
    learns = argument is not None
    named = [key for key in ("path", "model", "stored") if config.teacher[key]]
    if "teacher" in config.objective:
        raise UserError(
            "config.objective.teacher is given by the run: name the teacher's folder in config.teacher.path."
        )
    if learns and not named:
        raise UserError(
            f"config.objective.use={where} learns from a teacher: name its checkpoint or Hugging Face folder "
            "in config.teacher.path, or in config.teacher.stored what `teach` wrote."
        )
    if named and not learns:
        raise UserError(
            f"config.teacher.{named[0]} is set, but config.objective.use={where} learns from no teacher: set "
            "it to mobilellm_jax.training.distillation:distillation, or take the teacher away."
        )
    if config.teacher.stored and config.teacher.path:
        raise UserError(
            f"config.teacher.path={config.teacher.path} and config.teacher.stored={config.teacher.stored}: "
            "either a network is run, or what it wrote is read; set one of them."
        )
    if config.teacher.stored and argument and argument.default is argument.empty:
        raise UserError(
            f"config.teacher.stored={config.teacher.stored}: config.objective.use={where} runs its teacher; "
            "name the network in config.teacher.path, or give that argument the default None and read what "
            "the batch brings."
        )


def abstract_teacher(
    config: ConfigDict, student: Network, mesh: jax.sharding.Mesh
) -> Teacher | None:
    """The teacher without its weights: how it is run, and where each weight lives.

    Args:
      config: of the run.
      student: as it is run.
      mesh: of the run.

    Raises:
      UserError: there is no such network, or it cannot teach this student: it has another number of
        tokens or a shorter context.
    """
    model = described(config)
    if model is None:
        return None
    where = f"config.teacher.path={config.teacher.path}"
    if model.vocab_size != student.model.vocab_size:
        raise UserError(
            f"{where} has {model.vocab_size:,} tokens and the student {student.model.vocab_size:,}: a "
            "teacher must have the student's tokenizer and as many embeddings."
        )
    if model.max_length < config.row_length:
        raise UserError(
            f"{where} has a context of {model.max_length:,} tokens, shorter than "
            f"config.row_length={config.row_length:,}: choose another teacher or shorter rows."
        )
    split = tuple(config.teacher.split)
    if not set(split) <= {*AXES}:
        raise UserError(
            f"config.teacher.split={split} names no axes of the mesh: they are {', '.join(AXES)}."
        )
    dtype, platform = student.execution.dtype, mesh.devices.flat[0].platform
    kernel = choose(config.execution.attention, platform, model, dtype, config.row_length)
    # Its walk stays a loop unless it is asked for: nothing is kept for a backward pass.
    unroll = config.execution.unroll or 1
    execution = transformer.Execution(dtype=dtype, unroll=unroll, attention=kernel)
    network = dataclasses.replace(student, model=model, execution=execution)
    shapes = transformer.shapes(model)
    params = jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape.shape, dtype, sharding=place),
        shapes,
        shardings(shapes, mesh, split),
    )
    return Teacher(network, params)


def check_tokenizer(
    of_teacher: "Tokenizer", of_data: "Tokenizer", where: str, who: str = "teacher"
) -> None:
    """Who reads rows must know their tokens: every id must stand for the same text.

    Special tokens may differ, and which of them begins and ends a document, as they do between a
    network and its chat version; that is printed.

    Raises:
      UserError: the vocabularies differ.
    """
    if of_teacher.fingerprint == of_data.fingerprint:
        return
    if of_teacher.vocabulary != of_data.vocabulary:
        raise UserError(
            f"{where} has another tokenizer ({of_teacher.fingerprint[:12]}) than the data "
            f"({of_data.fingerprint[:12]}): prepare the data with the {who}'s "
            f"tokenizer, or choose another {who}."
        )
    ends = ((t.bos_id, t.eos_id) for t in (of_teacher, of_data))
    print(
        "{}: the {}'s tokenizer has the pieces of the data's, but not all of its special tokens or "
        "rules (BOS and EOS are {} there, {} here).".format(where, who, *ends)
    )


def open_teacher(
    config: ConfigDict, abstract: Teacher, tokenizer: "Tokenizer"
) -> Callable[[], Teacher]:
    """Opens the teacher and checks it; what comes back reads its weights, once, when it is first called.

    A run that has nothing left to do never calls it. Each device reads its slices only.

    Args:
      config: of the run.
      abstract: as `abstract_teacher` gave it.
      tokenizer: of the data.

    Raises:
      UserError: `config.teacher.path` is empty, or has another tokenizer.
    """
    from mobilellm_jax.interop.stored import open_model

    path = config.teacher.path
    if not path:
        raise UserError(
            "config.teacher.path is empty: name the checkpoint or Hugging Face folder of the network that "
            "config.teacher.model describes."
        )
    stored = open_model(path)
    check_tokenizer(stored.needed_tokenizer, tokenizer, f"config.teacher.path={path}")
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract.params)
    dtype: Any = np.dtype(jax.numpy.dtype(abstract.network.execution.dtype))

    @functools.cache
    def load() -> Teacher:
        return dataclasses.replace(abstract, params=stored.params(places, dtype))

    return load
