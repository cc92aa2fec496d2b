"""What a sweep is: configurations by name, seeds, and the tables in which they are compared."""

import dataclasses
import importlib.util
import json
import re
import traceback
from collections.abc import Mapping
from pathlib import Path

from etils import epath
from ml_collections import ConfigDict

from mobilellm_jax.data.plan import Plan
from mobilellm_jax.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # also that of a directory


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a table: one row of the sweep, and the row that it is compared with."""

    row: str
    label: str
    against: str = ""  # a row; "": with none


@dataclasses.dataclass(frozen=True)
class Table:
    """A comparison. A row may stand in several."""

    title: str
    lines: tuple[Line, ...]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run: a row of the sweep with a seed."""

    row: str
    seed: int
    config: ConfigDict

    @property
    def name(self) -> str:
        """Its directory below the workdir of the sweep."""
        return f"{self.row}-s{self.seed}"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep file's `get_sweep(argument)` returns."""

    rows: Mapping[str, ConfigDict]
    tables: tuple[Table, ...]
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        """Raises `UserError` where the description does not hang together."""
        for name in self.rows:
            if not _NAME.fullmatch(name):
                raise UserError(
                    f"the sweep has a row named {name!r}, which is to name a directory: use letters, "
                    "digits, dots, dashes and underscores."
                )
        if not self.rows or not self.seeds or len({*self.seeds}) < len(self.seeds):
            raise UserError("a sweep needs at least one row, and seeds that differ.")
        for table in self.tables:
            for line in table.lines:
                for row in filter(None, (line.row, line.against)):
                    if row not in self.rows:
                        raise UserError(
                            f"the table {table.title!r} speaks of the row {row!r}, which the sweep "
                            f"does not have: it has {', '.join(self.rows)}."
                        )

    def cells(self) -> list[Cell]:
        """All runs, one seed after the other, so that the tables fill evenly.

        A seed decides the initial weights and the order of the data: an interval over seeds is then
        about both, and not about the luck of one order. All rows see the same data in the same
        order under the same seed, so differences between rows are taken seed by seed.

        Raises:
          UserError: a plan is missing or cannot get another seed.
        """
        found = []
        for seed in self.seeds:
            for row, config in self.rows.items():
                config = config.copy_and_resolve_references()
                config.seed = seed
                config.plan = seeded_plan(config.plan, seed)
                found.append(Cell(row, seed, config))
        return found


def seeded_plan(path: str, seed: int) -> str:
    """The path of the same plan with this seed; it is written beside the plan where it is missing.

    Raises:
      UserError: there is no usable plan at `path`, or another one where it is to be written.
    """
    plan = Plan.load(path)
    if plan.seed == seed:
        return path
    source = epath.Path(path)
    beside = source.with_name(f"{source.stem}-seed{seed}.json")
    wanted = {**json.loads(source.read_text()), "seed": seed}
    if not beside.exists():
        unfinished = beside.with_name(beside.name + ".unfinished")
        unfinished.write_text(json.dumps(wanted, indent=2) + "\n")
        unfinished.replace(beside)
    elif json.loads(beside.read_text()) != wanted:
        raise UserError(
            f"{beside} is not {path} with seed {seed}: remove it if no run needs it, or give the "
            "sweep a plan of another name."
        )
    return str(beside)


def load_sweep(name: str) -> Sweep:
    """The sweep of a file: `PATH` or `PATH:ARGUMENT`, as configurations are named.

    Raises:
      UserError: there is no such file, it has no `get_sweep`, or that does not return a `Sweep`.
    """
    path, _, argument = name.partition(":")
    if not Path(path).is_file():
        raise UserError(f"there is no sweep at {path!r}: name a file with a get_sweep(argument).")
    spec = importlib.util.spec_from_file_location("sweep_file", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file: name a file with a get_sweep(argument).")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        sweep = module.get_sweep(argument)
    except UserError:
        raise
    except Exception as error:  # whatever a user's file may raise while it runs
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = f"{path}:{lines[-1]}" if lines else path
        text = " ".join(str(error).split())[:300]
        raise UserError(
            f"the sweep is not usable: {where}: {type(error).__name__}: {text}."
        ) from None
    if not isinstance(sweep, Sweep):
        raise UserError(f"get_sweep in {path} must return a mobilellm_jax.sweeps Sweep.")
    return sweep
