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
from mobilellm_jax.errors import UserError, in_a_line
from mobilellm_jax.files import replaced

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
class Tuned:
    """A row whose best configuration is looked for: values of one key, in order (`sweeps/tuning.py`)."""

    config: ConfigDict
    key: str  # dotted, for example schedule.peak
    values: tuple[float, ...]
    start: float  # where to begin: one of the values

    def at(self, value: float) -> ConfigDict:
        """The configuration with this value of the key."""
        config = self.config.copy_and_resolve_references()
        config.update_from_flattened_dict({self.key: value})
        return config


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run: a row of the sweep with a seed, and the value of what is tuned in it."""

    row: str
    seed: int
    config: ConfigDict
    value: float | None = None  # of the key of a `Tuned` row

    @property
    def name(self) -> str:
        """Its directory below the workdir of the sweep."""
        return cell_name(self.row, self.seed, self.value)


def cell_name(row: str, seed: int, value: float | None) -> str:
    """The name of the cell that a row has with a seed and a value."""
    return f"{row}-s{seed}" if value is None else f"{row}-{value:g}-s{seed}"


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep file's `get_sweep(argument)` returns.

    The values of tuned rows are compared on a seed of their own, so that no number in a table is
    better for having been chosen.
    """

    rows: Mapping[str, ConfigDict | Tuned]
    tables: tuple[Table, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 100

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
        if not all(isinstance(seed, int) for seed in (*self.seeds, self.tuning_seed)):
            raise UserError(f"the seeds of a sweep are whole numbers, not {self.seeds}.")
        if self.tuning_seed in self.seeds:
            raise UserError(
                f"tuning_seed={self.tuning_seed} is one of the seeds of the tables: choose another."
            )
        for name, row in self.rows.items():
            if isinstance(row, Tuned):
                _check_tuned(name, row)
            elif not isinstance(row, ConfigDict):
                raise UserError(
                    f"the row {name!r} of the sweep is a {type(row).__name__}: give a ConfigDict or a Tuned."
                )
        for table in self.tables:
            _check_table(table)
            for line in table.lines:
                for row in filter(None, (line.row, line.against)):
                    if row not in self.rows:
                        raise UserError(
                            f"the table {table.title!r} speaks of the row {row!r}, which the sweep "
                            f"does not have: it has {', '.join(self.rows)}."
                        )

    def tuned(self, row: str) -> Tuned:
        """A row that is tuned."""
        found = self.rows[row]
        assert isinstance(found, Tuned)
        return found

    def cell(self, row: str, seed: int, value: float | None = None) -> Cell:
        """The run of a row with a seed.

        A seed decides the initial weights and the order of the data: an interval over seeds is then
        about both, and not about the luck of one order. All rows see the same data in the same
        order under the same seed, so differences between rows are taken seed by seed.

        Raises:
          UserError: a plan is missing or cannot get another seed.
        """
        described = self.rows[row]
        if isinstance(described, Tuned):
            assert value is not None
            config = described.at(value)
        else:
            config = described.copy_and_resolve_references()
        config.seed = seed
        config.plan = seeded_plan(config.plan, seed)
        return Cell(row, seed, config, value)

    def possible_cells(self) -> list[Cell]:
        """Every run that this sweep may come to need; of tuned rows only some are.

        Raises:
          UserError: a plan is missing or cannot get another seed.
        """
        found = []
        for seed in (self.tuning_seed, *self.seeds):
            for name, row in self.rows.items():
                if isinstance(row, Tuned):
                    found += [self.cell(name, seed, value) for value in row.values]
                elif seed != self.tuning_seed:
                    found.append(self.cell(name, seed))
        return found


def _check_table(table: Table) -> None:
    try:
        hash(table)  # of tuples
        "".join((table.title, *(line.label for line in table.lines))).encode()  # of texts
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"a sweep's tables are each a Table of a title and a tuple of Lines ({in_a_line(error)})."
        ) from None


def _check_tuned(name: str, row: Tuned) -> None:
    if sorted({*row.values}) != [*row.values] or row.start not in row.values:
        raise UserError(
            f"the row {name!r} is tuned over {row.values} from {row.start}: give values in rising "
            "order and start at one of them."
        )
    named = {cell_name(name, 0, value) for value in row.values}
    if len(named) < len(row.values):
        raise UserError(
            f"the row {name!r} is tuned over {row.values}, of which some are alike to six digits, by "
            "which their directories are named: leave one of them out."
        )
    try:
        for value in row.values:
            row.at(value)
    except (KeyError, TypeError, ValueError) as error:
        reason = in_a_line(error)
        raise UserError(
            f"the row {name!r} is tuned by {row.key!r}, which its configuration cannot take: {reason}."
        ) from None


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
        with replaced(beside) as unfinished:
            unfinished.write_text(json.dumps(wanted, indent=2) + "\n")
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
        text = in_a_line(error, 300)
        raise UserError(
            f"the sweep is not usable: {where}: {type(error).__name__}: {text}."
        ) from None
    if not isinstance(sweep, Sweep):
        raise UserError(f"get_sweep in {path} must return a mobilellm_jax.sweeps Sweep.")
    return sweep
