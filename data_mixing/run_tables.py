"""Tables of proxy runs as CSV: a row per run, a column per source (weights) or per target (losses).

    index,code,prose          index,math,knowledge
    0,0.25,0.75               0,3.91,4.02
    1,0.9,0.1                 1,3.7,4.4

The column `index` or `run` says which rows belong together; their order does not matter.
"""

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from etils import epath

from mobilellm_jax.errors import UserError, in_a_line
from mobilellm_jax.files import new_file

KEYS = ("index", "run")
TOLERANCE = 0.02  # weights that were rounded to three digits sum to 1 within this


@dataclasses.dataclass(frozen=True)
class RunTable:
    """Numbers of runs: float64 [runs, names]; `where` is the file they are from."""

    runs: tuple[str, ...]
    names: tuple[str, ...]
    values: np.ndarray
    where: str = ""

    def save(self, path: epath.PathLike) -> None:
        """Writes a new CSV file.

        Raises:
          UserError: the file exists.
        """
        columns = [pa.array(self.runs), *map(pa.array, self.values.T)]
        table = pa.Table.from_arrays(columns, [KEYS[0], *self.names])
        with new_file(path) as partial, partial.open("wb") as file:
            pa.csv.write_csv(table, file, pa.csv.WriteOptions(quoting_style="needed"))

    def ordered(self, runs: Sequence[str]) -> "RunTable":
        """The same runs in another order."""
        at = {run: i for i, run in enumerate(self.runs)}
        values = self.values[[at[run] for run in runs]]
        return dataclasses.replace(self, runs=tuple(runs), values=values)

    @classmethod
    def load(cls, path: epath.PathLike) -> "RunTable":
        """Reads a CSV file.

        Raises:
          UserError: there is none, it has no column `index` or `run`, a run or column is there twice, or a
            cell holds no number.
        """
        path = epath.Path(path)
        if not path.exists():
            raise UserError(f"there is no table of runs at {path}: name a CSV file.")
        try:
            with path.open("rb") as file:
                table = pa.csv.read_csv(file)
            names = table.column_names
        except (pa.ArrowException, ValueError) as error:  # of names, that they are no UTF-8
            reason = in_a_line(error)
            raise UserError(f"{path} is no readable CSV file ({reason}).") from None
        twice = [name for name, count in collections.Counter(names).items() if count > 1]
        keys = [name for name in names if name in KEYS]
        if twice or len(keys) != 1 or len(names) < 2 or not len(table):
            wanted = f"one column {' or '.join(KEYS)}, columns of numbers beside it, and a row"
            has = f"{twice[0]!r} twice" if twice else f"{len(table)} rows of {', '.join(names)}"
            raise UserError(f"{path} has {has}, but needs {wanted}.")
        runs = tuple(map(str, table[keys[0]].to_pylist()))
        again = [run for run, count in collections.Counter(runs).items() if count > 1]
        if again:
            raise UserError(f"{path} has the run {again[0]} twice: give each run one row.")
        columns = {name: _numbers(table[name]) for name in names if name != keys[0]}
        for name, values in columns.items():
            if len(bad := np.flatnonzero(~np.isfinite(values))):
                raise UserError(
                    f"{path}: the column {name!r} holds no number for the run {runs[bad[0]]}: mend it, or "
                    "remove that run from both tables."
                )
        return cls(runs, tuple(columns), np.stack(list(columns.values()), 1), str(path))


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """float64; NaN for what is no number."""
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return pc.fill_null(column.cast(pa.float64()), np.nan).to_numpy()
    numbers = np.full(len(column), np.nan)
    for i, value in enumerate(column.to_pylist()):
        try:
            numbers[i] = float(value)
        except (TypeError, ValueError):
            continue
    return numbers


def load_pair(
    mixtures_path: epath.PathLike, losses_path: epath.PathLike
) -> tuple[RunTable, RunTable]:
    """Weights and losses of the same runs, in one order; weights sum to 1 exactly.

    Raises:
      UserError: one cannot be read, they are not of the same runs, or weights are below 0 or do not sum to
        1 within `TOLERANCE`.
    """
    mixtures, losses = RunTable.load(mixtures_path), RunTable.load(losses_path)
    if odd := sorted(set(mixtures.runs) ^ set(losses.runs)):
        shown = ", ".join(odd[:5]) + (f" and {len(odd) - 5} more" if len(odd) > 5 else "")
        raise UserError(
            f"{mixtures_path} and {losses_path} are not of the same runs: {shown} in one only."
        )
    total = mixtures.values.sum(1)
    bad = np.flatnonzero((mixtures.values.min(1) < 0) | (np.abs(total - 1) > TOLERANCE))
    if len(bad):
        said = "are below 0" if mixtures.values[bad[0]].min() < 0 else f"sum to {total[bad[0]]:.6g}"
        raise UserError(
            f"{mixtures_path}: weights of the run {mixtures.runs[bad[0]]} {said}: shares sum to 1."
        )
    mixtures = dataclasses.replace(mixtures, values=mixtures.values / total[:, None])
    return mixtures, losses.ordered(mixtures.runs)
