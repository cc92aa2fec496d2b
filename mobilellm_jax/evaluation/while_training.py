"""The tasks that a run is judged by every so many steps, by the devices that train it."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from jax.sharding import Mesh

from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.transformer import Params
from mobilellm_jax.training.metrics import STDERR


def judge(
    settings: Mapping[str, Any], model: ModelConfig, tokenizer: Tokenizer, dtype: str, mesh: Mesh
) -> Callable[[Params, Callable[[], None]], dict[str, float]] | None:
    """Opens the tasks of a run, so that what is missing is told before the first step.

    Args:
      settings: `config.eval`.
      model: the network.
      tokenizer: its tokenizer.
      dtype: of activations and products.
      mesh: devices that share the work; in every process, which all have to call what is returned.

    Returns:
      weights, what is to be called between batches -> figures by name, and their standard errors
      behind `stderr/`; None where `config.eval.tasks` is empty.

    Raises:
      UserError: the harness is not installed, or see `tasks.open_tasks`.
    """
    if not settings["tasks"]:
        return None
    try:
        from mobilellm_jax.evaluation.harness import HarnessModel
        from mobilellm_jax.evaluation.tasks import ask, open_tasks
    except ImportError as error:
        raise UserError(
            f"config.eval.tasks needs lm-evaluation-harness ({error}): pip install "
            "'mobilellm-jax[eval]', or leave that key empty."
        ) from None
    names = [name.strip() for name in settings["tasks"].split(",") if name.strip()]
    data = Path(settings["data"]) if settings["data"] else None
    tasks = open_tasks(names, data)

    def judged(params: Params, between: Callable[[], None]) -> dict[str, float]:
        lm = HarnessModel(params, model, tokenizer, dtype, mesh=mesh, quiet=True, between=between)
        with _no_bars():
            lines, _ = ask(tasks, lm, settings["limit"] or None)
        found = {}
        for line in lines:
            name = f"{line.label} {line.metric}"
            found[name] = line.value
            if not math.isnan(line.standard_error):
                found[STDERR + name] = line.standard_error
        return found

    return judged


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """The harness's bars would tear the one of the run."""
    import lm_eval.api.task

    silent = functools.partial(lm_eval.api.task.tqdm, disable=True)
    with mock.patch.object(lm_eval.api.task, "tqdm", silent):
        yield
