"""Which microbatches, remat, sharding and loss chunks fit, and how fast each could be at best."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from mobilellm_jax.costs.step import (
    Memory,
    StepCosts,
    capacity,
    make_programs,
    measure,
    state_memory,
)
from mobilellm_jax.errors import UserError
from mobilellm_jax.model.transformer import REMAT
from mobilellm_jax.parallel.mesh import in_slices
from mobilellm_jax.tables import aligned
from mobilellm_jax.training.length import possible_microbatches

GIB = 2**30
SECONDS = 30, 60  # that a compilation takes on a quiet machine


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting of the keys that change how a step is computed, not what it computes."""

    fsdp: int
    remat: str
    loss_chunks: int
    microbatches: int

    def applied(self, config: ConfigDict) -> ConfigDict:
        """A copy of the configuration with this setting."""
        copy = config.copy_and_resolve_references()
        copy.mesh.data, copy.mesh.fsdp = -1, self.fsdp
        copy.execution.remat = self.remat
        copy.loss_chunks, copy.microbatches = self.loss_chunks, self.microbatches
        return copy


def lines_to_try(config: ConfigDict, devices: Sequence[jax.Device], sources: int) -> list[Point]:
    """The settings whose microbatches are to be found, those left out that arithmetic rules out.

    Sharding: none, and powers of 4 within a slice, as far as weights, moments and gradients take at
    most half of the memory; of the shardings that do, the two least, for more only means more exchange.
    Loss chunks: as configured, and none where the logits of a row take at most a quarter of the memory.

    Raises:
      UserError: the configuration is not usable, or the state fits at no sharding.
    """
    room = capacity(devices[0]) or math.inf
    of_a_slice = len(devices) // len(in_slices(devices))
    shardings = [f for f in (4**i for i in range(9)) if of_a_slice % f == 0]
    fitting = []
    for fsdp in shardings:
        point = Point(fsdp, "none", config.loss_chunks, config.microbatches)
        state = state_memory(make_programs(point.applied(config), devices, sources), None)
        if state.peak + state.gradients <= room / 2:
            fitting.append(fsdp)
    if not fitting:
        raise UserError(
            "weights, moments and gradients do not fit into half of the memory of these devices, however "
            "they are sharded: take more devices."
        )
    logits = 4.0 * config.row_length * config.model.vocab_size
    chunks = {config.loss_chunks} | ({1} if logits <= room / 4 else set())
    grid = itertools.product(fitting[:2], REMAT, sorted(chunks))
    return [Point(fsdp, remat, some, config.microbatches) for fsdp, remat, some in grid]


def search(
    config: ConfigDict, topology: str, devices: Sequence[jax.Device], sources: int, cache: str = ""
) -> list[dict[str, Any]]:
    """For each sharding, remat and number of loss chunks: the fewest microbatches that fit.

    More microbatches need less memory, so they are found by bisection. Prints what it will do, a
    progress bar on standard error, and the frontier: settings that no other beats both in memory
    and in the bound of the step.

    Args:
      config: see `training.config.base_config`.
      topology: name of the devices, for the cache.
      devices: to compile for.
      sources: of the plan.
      cache: folder that keeps results; "" keeps none.

    Returns:
      All settings tried that fit: their keys, `peak` (bytes), `seconds` (bound) and `frontier`.

    Raises:
      UserError: the configuration is not usable, or the state fits at no sharding.
    """
    lines = lines_to_try(config, devices, sources)
    divisors = possible_microbatches(config, len(devices))
    most = len(lines) * math.ceil(math.log2(len(divisors) + 1))
    low, high = (most * seconds / 60 for seconds in SECONDS)
    print(
        f"search: {len(lines)} settings x {len(divisors)} numbers of microbatches, at most {most} "
        f"compilations, {low:.0f} to {high:.0f} minutes at {SECONDS[0]} to {SECONDS[1]} s each."
    )
    found: dict[Point, StepCosts] = {}
    with tqdm(total=most, unit="compilation", desc="search", dynamic_ncols=True) as bar:
        for line in lines:
            bar.set_postfix_str(f"fsdp={line.fsdp} remat={line.remat} chunks={line.loss_chunks}")
            for point in _bisect(line, divisors, lambda point: found[point].memory.fits):
                setting = point.applied(config)
                found[point] = _cached(
                    cache,
                    [setting.to_dict(), topology, len(devices), devices[0].device_kind, sources],
                    functools.partial(_measure, setting, devices, sources),
                )
                bar.update()
        bar.total = bar.n
    rows_found = _rows(found)
    print(_table(rows_found))
    return rows_found


def _measure(config: ConfigDict, devices: Sequence[jax.Device], sources: int) -> StepCosts:
    return measure(make_programs(config, devices, sources), config)


def _bisect(line: Point, divisors: Sequence[int], fits: Callable[[Point], bool]) -> Iterator[Point]:
    """Settings to try, each asked about after it was yielded, until the fewest microbatches are known."""
    low, high = 0, len(divisors)  # all below `low` do not fit, those from `high` on do
    while low < high:
        middle = (low + high) // 2
        point = dataclasses.replace(line, microbatches=divisors[middle])
        yield point
        low, high = (low, middle) if fits(point) else (middle + 1, high)


def _cached(folder: str, described: Any, make: Callable[[], StepCosts]) -> StepCosts:
    if not folder:
        return make()
    compilers = "libtpu", "jax-cuda13-pjrt", "jax-cuda12-pjrt"
    packages = {name: _version(name) for name in ("jax", "jaxlib", *compilers, "mobilellm-jax")}
    key = json.dumps([described, packages, _own_code()], sort_keys=True).encode()
    path = Path(folder) / f"{hashlib.sha256(key).hexdigest()[:32]}.json"
    if path.exists():
        raw = json.loads(path.read_text(encoding="utf-8"))
        return StepCosts(**{**raw, "memory": Memory(**raw["memory"])})
    costs = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps(dataclasses.asdict(costs)), encoding="utf-8")
    unfinished.replace(path)
    return costs


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _own_code() -> str:
    """A hash of this package: another version of it may compute another step."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _rows(found: dict[Point, StepCosts]) -> list[dict[str, Any]]:
    fitting = {point: costs for point, costs in found.items() if costs.memory.fits}
    numbers = {p: (c.memory.peak, max(c.seconds.values(), default=0.0)) for p, c in fitting.items()}
    rows = []
    for point, (peak, seconds) in sorted(numbers.items(), key=lambda item: item[1][::-1]):
        beaten = any(
            other != (peak, seconds) and other[0] <= peak and other[1] <= seconds
            for other in numbers.values()
        )
        bound = fitting[point].seconds
        rows.append(
            {
                **dataclasses.asdict(point),
                "peak": peak,
                "seconds": seconds,
                "bound_by": max(bound, key=lambda name: bound[name]) if bound else "",
                "frontier": not beaten,
            }
        )
    return rows


def _table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "none of them fits: take more devices, or a smaller config.global_batch."
    lines = [("", "fsdp", "remat", "loss_chunks", "microbatches", "GiB", "bound, ms", "by")]
    for row in rows:
        keys = (str(row[key]) for key in ("fsdp", "remat", "loss_chunks", "microbatches"))
        numbers = f"{row['peak'] / GIB:.2f}", f"{1e3 * row['seconds']:,.1f}"
        lines.append(("*" if row["frontier"] else "", *keys, *numbers, row["bound_by"]))
    return aligned(lines, "<><>>>><") + "\n* on the frontier: none is better in both."
