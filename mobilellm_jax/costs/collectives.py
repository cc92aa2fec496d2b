"""What devices exchange in one call of a compiled program."""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

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

    @property
    def bytes(self) -> float:
        """Of its arrays, once."""
        return sum(array.bytes for array in self.arrays)

    @property
    def sent(self) -> float:
        """Bytes that a device sends in one call of the program, if the devices form a ring.

        A gather, a scatter or an exchange passes on all but the own part; a reduction that leaves
        the result everywhere is a scatter and a gather.
        """
        if self.kind == "collective-permute":
            return self.times * self.bytes
        rounds = 2 if self.kind == "all-reduce" else 1
        return self.times * rounds * self.bytes * (1 - 1 / self.group)


def collectives(program: Program, devices: int) -> list[Collective]:
    """Every collective of a program, each once: a start and its end, or the steps of one, are one.

    The TPU compiler writes a reduce-scatter as a fusion named after it, and spreads a gather that
    runs beside computation over several fusions, which share its channel.

    Args:
      program: compiled.
      devices: that it runs on.
    """
    found: dict[Any, Collective] = {}
    for run in program.runs():
        for one, key in _of(run, program, devices):
            found.setdefault((run.loop, *key), one)
    return list(found.values())


def _of(run: Run, program: Program, devices: int) -> Iterator[tuple[Collective, tuple[Any, ...]]]:
    at = run.instruction
    if at.opcode == "fusion":
        body = program.computations[at.called("calls") or ""]
        scatter = body.name.startswith(("all-reduce-scatter", "reduce-scatter"))
        for inner in body.instructions.values():
            if kind := _kind(inner.opcode):
                if scatter and kind == "all-reduce":
                    whole = tuple(_operand_arrays(inner, body))
                    one = _collective("reduce-scatter", inner, whole, run, devices)
                    yield one, (run.computation.name, at.name)
                else:
                    one = _collective(kind, inner, _whole(kind, inner, body), run, devices)
                    shapes = tuple((a.dtype, a.shape) for a in one.arrays)
                    yield one, (kind, _channel(inner) or at.name, shapes)
    elif kind := _kind(at.opcode):
        whole = _whole(kind, at, run.computation)
        one = _collective(kind, at, whole, run, devices)
        yield one, (run.computation.name, at.name)


def _kind(opcode: str) -> str | None:
    name = opcode.removesuffix("-start")
    return name if name in KINDS else None


def _collective(
    kind: str, at: Instruction, whole: tuple[Array, ...], run: Run, devices: int
) -> Collective:
    origin = re.search(r'op_name="([^"]*)"', at.attributes)
    group = _group(at.attributes, devices)
    return Collective(kind, whole, run.times, run.loop, group, origin[1] if origin else "")


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


def _group(attributes: str, devices: int) -> int:
    """Devices in each of the groups, which XLA writes as axes of a mesh, as a grid or one by one."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        # A part of an axis is written with its own size: 'axis_0':(2)4.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(found[1].split(","))
    return devices


def summary(found: Sequence[Collective]) -> list[dict[str, Any]]:
    """Per kind and group size: operations and arrays in one call, their bytes, the bytes sent.

    Sorted by the bytes sent, the most first.
    """
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for one in found:
        new = {"kind": one.kind, "group": one.group, "operations": 0.0, "arrays": 0.0}
        row = rows.setdefault((one.kind, one.group), {**new, "bytes": 0.0, "sent": 0.0})
        row["operations"] += one.times
        row["arrays"] += one.times * len(one.arrays)
        row["bytes"] += one.times * one.bytes
        row["sent"] += one.sent
    return sorted(rows.values(), key=lambda row: -row["sent"])
