"""Traces of chosen steps (`config.profile`), for XProf and Perfetto: see docs/profiling.md."""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from etils import epath

from mobilellm_jax.errors import UserError

FOLDER = "profile"
Result = TypeVar("Result")


def profiled_steps(text: str) -> range:
    """The steps that `config.profile` names: "FIRST:LAST", both included; "" for none.

    Raises:
      UserError: it is of another form.
    """
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(
            f'config.profile={text!r} names no steps: give "FIRST:LAST", both included, as 10:12.'
        )
    return range(int(match[1]), int(match[2]) + 1)


class Profiler:
    """Writes what the devices of process 0 and its host do in the chosen steps to `workdir/profile`."""

    def __init__(self, steps: str, workdir: epath.Path) -> None:
        """Chooses the steps (see `profiled_steps`); nothing is written before the first of them."""
        self._steps = profiled_steps(steps) if jax.process_index() == 0 else range(0)
        self._folder = workdir / FOLDER
        self._running = False

    def call(self, step: int, function: Callable[..., Result], *args: Any) -> Result:
        """`function(*args)` as this step; waits for the devices at both ends of a trace, else never."""
        if step not in self._steps:
            return function(*args)
        if not self._running:
            jax.block_until_ready(args)
            jax.profiler.start_trace(str(self._folder))
            self._running = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            result = function(*args)
        if step == self._steps[-1]:
            jax.block_until_ready(result)
            self.close()
        return result

    def close(self) -> None:
        """Ends a trace that is being written, and says where it is."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            print(f"profile: steps up to {self._steps[-1]:,} are in {self._folder}", flush=True)
