"""Bytes that a compiled program moves to and from a device's main memory, in one call."""

from collections.abc import Set

from mobilellm_jax.costs.hlo import Array, Computation, Instruction, Program, Run

# These move nothing, or what they move is counted where it happens.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all domain "
    "partition-id replica-id opt-barrier async-update".split()
)
_SLICES = ("dynamic-slice", "slice", "gather")
# Operations that keep or move their first operand's bytes in place.
_VIEWS = ("bitcast", "reshape", "copy", "convert", "transpose")


def memory_bytes(program: Program) -> float:
    """What every instruction reads and writes, times how often it runs.

    An array that lives in the core's own memory costs nothing; of a sliced or updated array the
    slice counts alone; nothing is padded. What caches save is not known, so on CPUs and GPUs this
    is more than what reaches the memory.
    """
    return sum(run.times * _bytes(run, program) for run in program.runs())


def _bytes(run: Run, program: Program) -> float:
    at, where = run.instruction, run.computation
    if at.opcode in _FREE or at.opcode.endswith("-done") or at.name.startswith("AllocateBuffer"):
        return 0.0
    if at.opcode == "custom-call" and "AllocateBuffer" in at.attributes:
        return 0.0
    if at.opcode.endswith("-start"):
        # The result holds the operands, what comes of them, and semaphores; of a copy what comes first.
        behind = at.opcode != "copy-start" and len(at.arrays) > 1
        whole = at.arrays[1 if behind else 0]
        source = where.instructions[at.operands[0]].arrays
        return _of_array(whole) + sum(min(_of_array(a), whole.bytes) for a in source)
    if at.opcode == "fusion":
        body = program.computations[at.called("calls") or ""]
        return _of_fusion(at, where, body, program)
    if at.opcode in _SLICES:
        on_chip = where.instructions[at.operands[0]].arrays[0].on_chip
        size = sum(a.bytes for a in at.arrays)
        return sum(map(_of_array, at.arrays)) + (0.0 if on_chip else size)
    if at.opcode == "dynamic-update-slice":
        update = where.instructions[at.operands[1]].arrays[0]
        return _of_array(update) + (0.0 if at.arrays[0].on_chip else update.bytes)
    operands = [a for name in at.operands for a in where.instructions[name].arrays]
    return sum(map(_of_array, [*operands, *at.arrays]))


def _of_array(array: Array) -> float:
    return 0.0 if array.on_chip else array.bytes


def _of_fusion(at: Instruction, where: Computation, body: Computation, program: Program) -> float:
    """Its operands as far as its body reads them, and its results as far as it changes them."""
    total = 0.0
    in_place: set[str] = set()  # instructions that hand on an operand of which they read nothing
    outputs = [body.root]
    if body.root.opcode == "tuple":
        outputs = [body.instructions[name] for name in body.root.operands]
    for output, array in zip(outputs, at.arrays, strict=False):
        update = _views(output, body)[-1]
        if update.opcode == "dynamic-update-slice":
            size = body.instructions[update.operands[1]].arrays[0].bytes
            total += 0.0 if array.on_chip else size
            before = _views(body.instructions[update.operands[0]], body)
            in_place |= {update.name, *(view.name for view in before[:-1])}
        elif output.opcode != "parameter":  # which is passed on as it is
            total += _of_array(array)
    for index, parameter in _parameters(body).items():
        source = where.instructions[at.operands[index]].arrays
        if not source or source[0].on_chip:
            continue
        size = sum(a.bytes for a in source)
        total += min(size, _read(parameter, body, program, in_place))
    return total


def _views(at: Instruction, body: Computation) -> list[Instruction]:
    """An instruction, and from it back what it is a view of; the last one is no view."""
    found = [at]
    while found[-1].opcode in _VIEWS and found[-1].operands:
        found.append(body.instructions[found[-1].operands[0]])
    return found


def _parameters(body: Computation) -> dict[int, Instruction]:
    found = (i for i in body.instructions.values() if i.opcode == "parameter")
    return {int(parameter.literal): parameter for parameter in found}


def _read(
    parameter: Instruction, body: Computation, program: Program, in_place: Set[str] = frozenset()
) -> float:
    """Bytes of a parameter that a fusion's body reads: slices where it only ever slices it."""
    whole = sum(a.bytes for a in parameter.arrays)
    total = 0.0
    for user in body.instructions.values():
        if parameter.name not in user.operands or user.opcode == "tuple":
            continue
        if user.name in in_place and parameter.name not in user.operands[1:]:
            continue
        if user.opcode in _SLICES and user.operands[0] == parameter.name:
            total += sum(a.bytes for a in user.arrays)
        elif user.opcode in ("bitcast", "reshape"):
            total += _read(user, body, program, in_place)
        elif user.opcode == "fusion":
            inner = program.computations[user.called("calls") or ""]
            parameters = _parameters(inner)
            for index, name in enumerate(user.operands):
                if name == parameter.name:
                    total += _read(parameters[index], inner, program)
        else:
            return whole
    return min(total, whole)
