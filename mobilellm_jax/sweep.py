r"""Trains the cells of a sweep and compares them: an experiment of any kind is such a sweep.

    python -m mobilellm_jax.sweep --sweep=configs/ladder.py --workdir=runs/ladder --parallel=2

A sweep file has a function `get_sweep(argument)` that returns a `Sweep` (`sweeps/description.py`):
configurations by name, seeds, and tables. Every cell is an ordinary training run in a directory of
its own below the workdir, in a process of its own. A row may have a key to tune: its best value is
found first, on a seed that no table shows. Started again, the program leaves out the cells that are
complete and goes on with those that are not; Ctrl-C and SIGTERM save and leave. A cell that fails
is reported and stops no other.

The workdir gets results.jsonl (a line per cell), table.md and table.svg, after every cell.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from etils import epath

from mobilellm_jax import cli
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import replaced
from mobilellm_jax.model.config import ModelConfig, flops_per_token
from mobilellm_jax.sweeps import summary, tuning
from mobilellm_jax.sweeps.description import Cell, Sweep, cell_name, load_sweep
from mobilellm_jax.sweeps.outcomes import Outcome, read_outcome
from mobilellm_jax.sweeps.processes import run_cells
from mobilellm_jax.training.length import length_of


def sweep(described: Sweep, workdir: Path, only: str = "", parallel: int = 1) -> list[Outcome]:
    """Trains what is not complete, and writes and prints the tables.

    Args:
      described: cells and tables.
      workdir: local directory of this sweep.
      only: regular expression; cells in whose name it is not found are not trained.
      parallel: cells at once, each on its share of the CPU cores.

    Returns:
      The outcomes of all complete cells, trained now or before.

    Raises:
      UserError: bad input, or a cell failed; the others were trained all the same.
      SystemExit: stopped by a signal, after the cells have saved; its status is 128 + the signal's
        number.
    """
    try:
        wanted = re.compile(only)
    except re.error as error:
        raise UserError(f"--cells={only!r} is no regular expression: {error}.") from None
    cells = described.possible_cells()
    if not any(wanted.search(cell.name) for cell in cells):
        raise UserError(
            f"--cells={only!r} is found in no cell: there are {', '.join(c.name for c in cells)}."
        )
    progress = _Progress(described, workdir, cells, wanted, parallel)
    print(
        f"{len(progress.outcomes)} cells are complete, {len(progress.left())} to train, "
        f"{parallel} at once, in {workdir}",
        flush=True,
    )
    caught = run_cells(progress.needed, workdir, parallel, progress.ended)
    print(summary.text(progress.write()))
    print(f"\n{workdir / 'table.md'}")
    if caught:
        print(f"stopped by {caught.name}; the cells saved. The same command goes on from here.")
        sys.exit(128 + caught)
    missed = progress.missed()
    if missed:
        listed = "; ".join(f"{name}: {said.rstrip('.')}" for name, said in missed.items())
        raise UserError(f"{len(missed)} cells failed: {listed}.")
    return list(progress.outcomes.values())


class _Progress:
    """What is complete, what failed, what is needed next, and how long the rest will take."""

    def __init__(
        self,
        described: Sweep,
        workdir: Path,
        cells: Sequence[Cell],
        wanted: re.Pattern[str],
        parallel: int,
    ) -> None:
        self._described, self._workdir, self._parallel = described, workdir, parallel
        self._wanted = wanted
        self.outcomes: dict[str, Outcome] = {}
        self.failed: dict[str, str] = {}
        for cell in cells:
            self._read(cell)
        self._seconds = self._flops = 0.0

    def needed(self) -> list[Cell]:
        """The cells that may be trained now."""
        return self._filtered(
            tuning.needed(self._described, self.outcomes.values(), self.failed)[0]
        )

    def left(self) -> list[Cell]:
        """The cells that are to be trained, as far as that is known."""
        now, later = tuning.needed(self._described, self.outcomes.values(), self.failed)
        return self._filtered(now + later)

    def missed(self) -> dict[str, str]:
        """Failed cells for want of which a table is not complete; a value that is too high may fail."""
        found = tuning.chosen(self._described, self.outcomes.values(), self.failed)
        harmless = {
            cell_name(row, self._described.tuning_seed, value)
            for row in found
            for value in self._described.tuned(row).values
        }
        return {name: said for name, said in self.failed.items() if name not in harmless}

    def _filtered(self, cells: Sequence[Cell]) -> list[Cell]:
        return [cell for cell in cells if self._wanted.search(cell.name)]

    def ended(self, cell: Cell, seconds: float, failure: str) -> None:
        """Notes a cell that ended, and prints it with the time that the others will take."""
        self._flops += _flops(cell)
        self._seconds += seconds
        if not failure:
            self._read(cell)
        if cell.name in self.outcomes:
            said = f"{self.outcomes[cell.name].bits_per_byte:.3f} bits per byte"
        else:
            failure = failure or self.failed.get(cell.name, "its record is not complete.")
            self.failed[cell.name] = failure
            said = f"failed: {failure}"
        to_go = self.left()
        left = sum(map(_flops, to_go)) * self._seconds / self._flops / self._parallel
        eta = f"{left // 3600:.0f}:{left % 3600 // 60:02.0f}:{left % 60:02.0f}"
        print(f"{cell.name}  {said}  {seconds:.0f} s; {len(to_go)} to go, ETA {eta}", flush=True)
        self.write()

    def write(self) -> summary.Summary:
        """Writes results.jsonl, table.md and table.svg; what they say."""
        found = list(self.outcomes.values())
        summed = summary.Summary.of(self._described, found, self.failed)
        lines = [outcome.to_dict() for outcome in found]
        lines += [{"cell": name, "error": said} for name, said in self.failed.items()]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        self._workdir.mkdir(parents=True, exist_ok=True)
        for name, content in (
            ("results.jsonl", text),
            ("table.md", summary.markdown(summed, "table.svg")),
            ("table.svg", summary.drawing(summed)),
        ):
            with replaced(self._workdir / name) as unfinished:
                unfinished.write_text(content)
        return summed

    def _read(self, cell: Cell) -> None:
        try:
            outcome = read_outcome(cell, epath.Path(self._workdir / cell.name))
        except UserError as error:
            self.failed[cell.name] = str(error)
        else:
            if outcome:
                self.outcomes[cell.name] = outcome


def _flops(cell: Cell) -> float:
    c = cell.config
    per_token = flops_per_token(ModelConfig.from_dict(c.model), c.row_length)
    return float(per_token) * length_of(c).tokens


def main() -> None:
    """Runs `sweep` with the flags."""
    args = flags.FLAGS
    if "://" in args.workdir:
        raise UserError("--workdir of a sweep must be a local directory.")
    sweep(load_sweep(args.sweep), Path(args.workdir), args.cells, args.parallel)


if __name__ == "__main__":
    flags.DEFINE_string("sweep", None, "Sweep file, PATH or PATH:ARGUMENT.", required=True)
    flags.DEFINE_string("workdir", None, "Directory of this sweep.", required=True)
    flags.DEFINE_string("cells", "", "Regular expression: train only cells in whose name it is.")
    flags.DEFINE_integer("parallel", 1, "Cells at once, each on its share of cores.", lower_bound=1)
    cli.run(main)
