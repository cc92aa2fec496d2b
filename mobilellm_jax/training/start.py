"""Where a new run starts when it does not start at random weights (`config.init_from`)."""

from etils import epath

from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.stored import StoredModel, open_model
from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.training.config import differences

# What a run may change of the network at whose weights it starts.
MAY_CHANGE = ("max_length", "rope_theta", "rope_scaling", "init_std")


def open_start(directory: epath.PathLike, model: ModelConfig, tokenizer: Tokenizer) -> StoredModel:
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
    return start
