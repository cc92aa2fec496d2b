"""Files of what was measured of sources: scores of pieces (Parquet) and leave-one-out runs (JSON).

Scores have a line per piece of a training row: columns `source`, `row`, `tokens` (targets of the piece) and
columns of numbers, the benefit per token by one metric; `datainf` over all capabilities and checkpoints,
`datainf/code/1000` for one of each. Other columns (where the piece is from) are not needed here.

Leave-one-out runs have a record per run and capability:

    {"version": 1, "sources": ["code", "prose"], "capabilities": ["math"],
     "records": [{"source": "code",       which one the run went without
                  "capability": "math", "seed": 0, "step": 1000,
                  "delta": 0.031,         mean NLL per token without the source, minus that with it
                  "stderr": 0.002}]}      of delta over probes; may be null

Axes in names: N pieces, S sources, C capabilities, R seeds.
"""

import dataclasses
import hashlib
import json
from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from mobilellm_jax.errors import UserError, in_a_line

VERSION = 1  # of the JSON of leave-one-out runs


@dataclasses.dataclass(frozen=True)
class Scored:
    """The scored pieces of one source."""

    benefit_N: np.ndarray  # float64, per token; above 0 helps
    tokens_N: np.ndarray  # int64, targets
    row_N: np.ndarray  # int64, the training row a piece is cut from


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """Rises of the mean NLL per token where a source is left out, and their standard errors (or NaN)."""

    sources: tuple[str, ...]
    capabilities: tuple[str, ...]
    seeds: tuple[int, ...]
    step: int
    rise_SCR: np.ndarray
    stderr_SCR: np.ndarray


def sha256(path: epath.PathLike) -> str:
    """Of a file's bytes, hex."""
    return hashlib.sha256(epath.Path(path).read_bytes()).hexdigest()


def read_scores(
    path: epath.PathLike, sources: Collection[str], column: str = ""
) -> dict[str, Scored]:
    """The scores of the sources, in their order.

    Args:
      path: a Parquet file.
      sources: those that are needed; others in the file are left alone, which is printed.
      column: the benefit; needs no name if there is one joint column (without `/`) only.

    Raises:
      UserError: the file or a column is missing, a source has no piece, or a value is not usable.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"there are no scores at {path}: name a Parquet file of scores.")
    try:
        with path.open("rb") as file:
            parquet = pq.ParquetFile(file)
            column = _benefit_column(parquet.schema_arrow, path, column)
            # Without Arrow's threads, see `documents._read`.
            table = parquet.read(["source", "row", "tokens", column], use_threads=False)
        named = np.array(table["source"].to_pylist(), dtype=object)
    except (pa.ArrowException, ValueError, OSError) as error:
        reason = in_a_line(error)
        raise UserError(f"{path} is no readable Parquet file ({reason}).") from None
    benefit, tokens, row = (
        table[name].to_numpy().astype(np.float64) for name in (column, "tokens", "row")
    )
    _tell_others(path, {name for name in named if name is not None}, sources)
    found = {}
    for source in sources:
        here = named == source
        if not here.any():
            raise UserError(
                f"{path} has no piece of the source {source!r}: score it as well, or take it out of the plan."
            )
        for name, values in ((column, benefit), ("tokens", tokens), ("row", row)):
            if bad := int((~np.isfinite(values[here])).sum()):
                raise UserError(
                    f"{path}: the column {name!r} of {source!r} has {bad} values that are no numbers: score "
                    "it again."
                )
        if (tokens[here] <= 0).any():
            raise UserError(f"{path}: a piece of {source!r} has no tokens: leave such pieces out.")
        found[source] = Scored(benefit[here], tokens[here], row[here].astype(np.int64))
    return found


def _benefit_column(schema: pa.Schema, path: epath.Path, column: str) -> str:
    """The column to read, all columns that are needed being there."""
    numbers = [f.name for f in schema if pa.types.is_floating(f.type)]
    if missing := [n for n in ("source", "row", "tokens") if n not in schema.names]:
        raise UserError(
            f"{path} has no column {', '.join(missing)}, only {', '.join(schema.names)}."
        )
    if not _is_text(schema.field("source").type):
        raise UserError(f"{path}: the column 'source' holds no names: score again.")
    for name in ("row", "tokens"):
        if not pa.types.is_integer(schema.field(name).type):
            raise UserError(f"{path}: the column {name!r} holds no whole numbers: score again.")
    joint = [name for name in numbers if "/" not in name]
    if not column and len(joint) == 1:
        return joint[0]
    if column not in numbers:
        asked = f"no column {column!r} of benefits" if column else f"{len(joint)} joint columns"
        raise UserError(
            f"{path} has {asked}: choose one by column=..., of {', '.join(numbers) or 'none'}."
        )
    return column


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _tell_others(path: epath.Path, found: Collection[str], wanted: Collection[str]) -> None:
    if others := sorted(set(found) - set(wanted)):
        print(f"{path}: the plan has no source {', '.join(others)}; not used.", flush=True)


def read_left_out(
    path: epath.PathLike, sources: Collection[str], step: int | None = None
) -> LeftOut:
    """Leave-one-out runs of the sources, in their order, at one step.

    Args:
      path: a JSON file.
      sources: those that are needed; others in the file are left alone, which is printed.
      step: the last one by default.

    Raises:
      UserError: the file is missing or is not usable, or not every source has every capability and seed.
    """
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"there are no leave-one-out runs at {path}: name their JSON file.")
    try:
        raw = json.loads(path.read_text())
        if raw["version"] != VERSION:
            raise UserError(f"{path} has version {raw['version']}, this program reads {VERSION}.")
        capabilities = tuple(map(str, raw["capabilities"]))
        known = {
            (str(r["source"]), str(r["capability"]), int(r["seed"]), int(r["step"])): (
                float(r["delta"]),
                float("nan" if r.get("stderr") is None else r["stderr"]),
            )
            for r in raw["records"]
        }
        repeated = len(raw["records"]) - len(known)
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is not usable ({type(error).__name__}: {error}).") from None
    if not known or not capabilities or repeated:
        what = f"{repeated} records twice" if repeated else "no record"
        raise UserError(f"{path} has {what}: write it again.")
    steps = sorted({key[3] for key in known})
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(f"{path} has no step {step}, only {', '.join(map(str, steps))}.")
    _tell_others(path, {key[0] for key in known}, sources)
    seeds = tuple(sorted({key[2] for key in known if key[3] == step}))
    wanted = [[[(s, c, n, step) for n in seeds] for c in capabilities] for s in sources]
    for source, capability, seed, _ in (k for lines in wanted for line in lines for k in line):
        if not np.isfinite(known.get((source, capability, seed, step), (np.nan,))[0]):
            raise UserError(
                f"{path} has no rise of {capability!r} without {source!r} of seed {seed} at step {step}: "
                "run what is missing, choose another step, or take the source out of the plan."
            )
    values = np.array([[[known[k] for k in line] for line in lines] for lines in wanted])
    return LeftOut(tuple(sources), capabilities, seeds, step, values[..., 0], values[..., 1])
