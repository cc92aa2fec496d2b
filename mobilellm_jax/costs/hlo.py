"""Reads the text of a compiled program: which instructions run, and how often.

The text is XLA's own format (`compiled.as_text()`), as written by its compilers for CPU, GPU and TPU.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {
    "pred": 8,
    "token": 0,
    "opaque": 0,
    "c64": 64,
    "c128": 128,
    "s4": 4,
    "u4": 4,
    "f4e2m1fn": 4,
}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool  # in a memory of the core itself; False: in the device's main memory

    @property
    def bytes(self) -> float:
        """Without the padding of its layout."""
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype, int(digits[0]) if digits else 0)
        return math.prod(self.shape) * bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = result opcode(operands), attributes`."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    literal: str  # what stands between the parentheses
    attributes: str
    root: bool

    def called(self, key: str) -> str | None:
        """The computation named by an attribute such as `body=`."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in the order of the text."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        """The one whose result is the computation's."""
        return next(i for i in self.instructions.values() if i.root)


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction that runs `times` times in one call of the program, in the body of `loop`."""

    instruction: Instruction
    computation: Computation
    times: float
    loop: str


class Program:
    """Computations by name; the one of the program itself is `entry`."""

    def __init__(self, text: str) -> None:
        """Reads `compiled.as_text()`."""
        self.computations: dict[str, Computation] = {}
        self.unknown_loops: set[str] = set()  # whose number of turns the text does not tell
        header = re.search(r"\bnum_partitions=(\d+)", text.partition("\n")[0])
        self.partitions = int(header[1]) if header else None  # devices that this text is of
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line.startswith((" ", "\t")):
                if found := _instruction(line.strip()):
                    current[found.name] = found
            elif line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) ", line)):
                current = {}
                self.computations[head[2]] = Computation(head[2], current)
                if head[1]:
                    self.entry = self.computations[head[2]]

    def runs(self) -> Iterator[Run]:
        """All instructions outside of fusions and reductions; of a conditional, every branch once."""
        yield from self._runs(self.entry, 1.0, "")

    def _runs(self, computation: Computation, times: float, loop: str) -> Iterator[Run]:
        for instruction in computation.instructions.values():
            yield Run(instruction, computation, times, loop)
            if instruction.opcode == "while":
                body = self.computations[instruction.called("body") or ""]
                yield from self._runs(body, times * self.turns(instruction, computation), body.name)
            elif instruction.opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
                names = _NAME.findall(branches[1]) if branches else []
                names += [
                    instruction.called(k) or "" for k in ("true_computation", "false_computation")
                ]
                for name in filter(None, names):
                    yield from self._runs(self.computations[name], times, loop)
            elif instruction.opcode in ("call", "async-start"):
                name = instruction.called("to_apply") or instruction.called("calls")
                if name in self.computations:
                    yield from self._runs(self.computations[name], times, loop)

    def turns(self, loop: Instruction, where: Computation) -> int:
        """How often a `while`, an instruction of `where`, turns.

        XLA notes it for CPUs and GPUs. For TPUs it is read off the condition, a comparison of a counter
        with a constant, off what the counter begins with, 0 or the turns that the compiler has put before
        the loop, and off the body, which adds a constant to it: 1 in what a scan becomes, 2 where the
        compiler has put two turns into one.
        """
        if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(noted[1])
        condition, body = (self.computations[loop.called(k) or ""] for k in ("condition", "body"))
        if condition.root.opcode == "compare" and "direction=LT" in condition.root.attributes:
            counter, limit = (condition.instructions[name] for name in condition.root.operands)
            first, step = _first(counter, loop, where), _added(counter, body)
            if first is not None and step and limit.opcode == "constant":
                return math.ceil((int(limit.literal) - first) / step)
        self.unknown_loops.add(loop.name)
        return 1


def _first(counter: Instruction, loop: Instruction, where: Computation) -> int | None:
    """The constant that a loop's counter begins with."""
    begin = where.instructions[loop.operands[0]]
    value = _element(counter, begin, where)
    return int(value.literal) if value and value.opcode == "constant" else None


def _added(counter: Instruction, body: Computation) -> int | None:
    """The constant by which a loop's body adds to a counter."""
    following = _element(counter, body.root, body)
    if following is None or following.opcode != "add":
        return None
    terms = [body.instructions[name] for name in following.operands]
    constants = [int(term.literal) for term in terms if term.opcode == "constant"]
    return constants[0] if constants else None


def _element(counter: Instruction, carried: Instruction, where: Computation) -> Instruction | None:
    """What a tuple that a loop carries has as its counter, whatever it was copied to."""
    index = re.search(r"\bindex=(\d+)", counter.attributes)
    if index is None or carried.opcode != "tuple":
        return None
    found = where.instructions[carried.operands[int(index[1])]]
    while found.opcode == "copy":
        found = where.instructions[found.operands[0]]
    return found


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"(ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    return Instruction(
        found[2],
        tuple(arrays(result)),
        rest[:opening],
        tuple(_NAME.findall(inside)),
        inside,
        rest[closing + 1 :],
        bool(found[1]),
    )


def _closing(text: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"no closing parenthesis in {text[:100]!r}")


def arrays(result: str) -> Iterator[Array]:
    """The arrays of a type such as `(f32[2,3]{1,0:T(8,128)S(1)}, s32[])`."""
    for dtype, shape, layout in _SHAPE.findall(result):
        space = re.search(r"S\((\d+)\)", layout or "")
        on_chip = bool(space and space[1] not in ("0", "5"))  # 5: the host's memory
        yield Array(dtype, tuple(int(n) for n in shape.split(",") if n), on_chip)
