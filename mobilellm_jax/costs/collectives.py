"""What devices exchange in one call of a compiled program."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mobilellm_jax.costs.hlo import Array, Computation, Instruction, Program, Run

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of the text, which may move several arrays."""

    kind: str
    arrays: tuple[Array, ...]  # whole: what a gather gives, what a reduction takes
    times: float  # how often it runs in one call
    loop: str  # in the body of which loop; "" outside of all
    group: int  # devices that exchange with each other
    origin: str  # where it comes from in the source, as XLA knows it
    slices: int = 1  # or nodes of GPUs, over which these devices are spread

    @property
    def bytes(self) -> float:
        """Of its arrays, once."""
        return sum(array.bytes for array in self.arrays)

    @property
    def passed(self) -> float:
        """Bytes that a device passes on in one call of the program, if the devices form a ring.

        A gather, a scatter or an exchange passes on all but the own part; a reduction that leaves
        the result everywhere is a scatter and a gather.
        """
        if self.kind == "collective-permute":
            return self.times * self.bytes
        rounds = 2 if self.kind == "all-reduce" else 1
        return self.times * rounds * self.bytes * (1 - 1 / self.group)

    @property
    def network(self) -> float:
        """Of `passed`, what leaves the slice or the node.

        A ring leaves each but once, and there are as many rings, each of a part of the arrays, as
        devices of the group in a slice: each of them has a share of its network.
        """
        return self.passed * self.slices / self.group if self.slices > 1 else 0.0

    @property
    def sent(self) -> float:
        """Of `passed`, what goes over the links within the slice or the node."""
        return self.passed - self.network


def collectives(program: Program, devices: int, slices: int = 1) -> list[Collective]:
    """Every collective of a program, each once: a start and its end, or the steps of one, are one.

    The TPU compiler writes a reduce-scatter as a fusion named after it, and spreads a gather that
    runs beside computation over several fusions, which share its channel. A program for several
    slices is that of one of them; what goes between slices it hands to their hosts. XLA for GPUs knows
    no nodes: a group of devices may lie in several.

    Args:
      program: compiled.
      devices: that it runs on.
      slices: TPU slices, or nodes of GPUs, that these are in, in equal parts and in their order.
    """
    found: dict[Any, Collective] = {}
    for run in program.runs():
        for one, key in _of(run, program, devices, slices):
            found.setdefault((run.loop, *key), one)
    return list(found.values())


def _of(
    run: Run, program: Program, devices: int, slices: int
) -> Iterator[tuple[Collective, tuple[Any, ...]]]:
    at, where = run.instruction, run.computation

    def collective(kind: str, at: Instruction, arrays: tuple[Array, ...]) -> Collective:
        group = _members(at.attributes, program.partitions or devices)
        spread = len(set((group // (devices // slices)).tolist()))
        return Collective(kind, arrays, run.times, run.loop, len(group), _origin(at), spread)

    if at.opcode == "fusion":
        body = program.computations[at.called("calls") or ""]
        scatter = body.name.startswith(("all-reduce-scatter", "reduce-scatter"))
        for inner in body.instructions.values():
            if kind := _kind(inner.opcode):
                if scatter and kind == "all-reduce":
                    whole = tuple(_operand_arrays(inner, body))
                    one = collective("reduce-scatter", inner, whole)
                    yield one, (where.name, at.name)
                else:
                    one = collective(kind, inner, _whole(kind, inner, body))
                    shapes = tuple((a.dtype, a.shape) for a in one.arrays)
                    yield one, (kind, _channel(inner) or at.name, shapes)
    elif kind := _kind(at.opcode):
        yield collective(kind, at, _whole(kind, at, where)), (where.name, at.name)
    elif at.opcode == "send" and (kind := _between_slices(at)):
        sent = tuple(_operand_arrays(at, where))[:1]  # the other operand is a token
        one = Collective(kind, sent, run.times, run.loop, slices, _origin(at), slices)
        yield one, (where.name, at.name)


def _kind(opcode: str) -> str | None:
    name = opcode.removesuffix("-start")
    return name if name in KINDS else None


def _between_slices(at: Instruction) -> str | None:
    """The kind of what a TPU hands to its host for the other slices."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', at.attributes)
    return found[1].lower().replace("_", "-") if found else None


def _origin(at: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', at.attributes)
    return found[1] if found else ""


def _whole(kind: str, at: Instruction, where: Computation) -> tuple[Array, ...]:
    """The arrays in their whole size: the larger of what goes in and what comes out."""
    operands = tuple(_operand_arrays(at, where))
    if kind in ("reduce-scatter", "collective-permute", "all-reduce", "all-to-all"):
        return operands
    return at.arrays[-len(operands) :]  # the result of a start begins with its operands


def _operand_arrays(at: Instruction, where: Computation) -> Iterator[Array]:
    for name in at.operands:
        yield from where.instructions[name].arrays


def _channel(at: Instruction) -> str:
    found = re.search(r"channel_id=(\d+)", at.attributes)
    return found[1] if found else ""


def _members(attributes: str, devices: int) -> np.ndarray:
    """The devices of the first group: XLA writes axes of a mesh, a grid, or one by one; else all."""
    if found := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))?\s*\{([^}]*)\}", attributes
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        ids = _in_order(found[2]) if found[2] else np.arange(math.prod(sizes.values()))
        # A part of an axis is written with what lies before it and its own size: 'axis_0':(2)4.
        parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", found[3])
        shape: list[int] = []
        chosen: list[int] = []
        for name, size in sizes.items():
            own = [(int(before or 1), int(n or size)) for axis, before, n in parts if axis == name]
            edges = sorted({1, size, *(b for b, _ in own), *(b * n for b, n in own)})
            for begin, end in itertools.pairwise(edges):
                if any(before <= begin < before * n for before, n in own):
                    chosen.append(len(shape))
                shape.append(end // begin)
        rest = [axis for axis in range(len(shape)) if axis not in chosen]
        group = math.prod(shape[axis] for axis in chosen)
        return ids.reshape(shape).transpose(rest + chosen).reshape(-1, group)[0]
    if found := re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", attributes
    ):
        return _in_order(found[3]).reshape(int(found[1]), int(found[2]))[0]
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return np.array([int(device) for device in found[1].split(",")])
    return np.arange(devices)


def _in_order(text: str) -> np.ndarray:
    """Devices as `[4,2]T(1,0)` has them: numbered over this shape, its axes then in this order."""
    shape, _, order = text.partition("T")
    sizes = [int(size) for size in re.findall(r"\d+", shape)]
    axes = [int(axis) for axis in re.findall(r"\d+", order)] or range(len(sizes))
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(axes).ravel()


def summary(found: Sequence[Collective]) -> list[dict[str, Any]]:
    """Per kind, group size and slices: operations and arrays in one call, their bytes, the bytes sent.

    Sorted by the bytes passed on, the most first.
    """
    rows: dict[tuple[str, int, int], dict[str, Any]] = {}
    for one in found:
        key = {"kind": one.kind, "group": one.group, "slices": one.slices}
        sums = dict.fromkeys(("operations", "arrays", "bytes", "sent", "network"), 0.0)
        row = rows.setdefault((one.kind, one.group, one.slices), {**key, **sums})
        row["operations"] += one.times
        row["arrays"] += one.times * len(one.arrays)
        row["bytes"] += one.times * one.bytes
        row["sent"] += one.sent
        row["network"] += one.network
    return sorted(rows.values(), key=lambda row: -(row["sent"] + row["network"]))
