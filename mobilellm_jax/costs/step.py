"""What one step of a configuration costs on a topology: traced, compiled and read, never run."""

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from mobilellm_jax.costs import collectives, flops
from mobilellm_jax.costs.hlo import Program
from mobilellm_jax.costs.traffic import memory_bytes
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.taught import read_info
from mobilellm_jax.parallel.chips import Chip, find_chip
from mobilellm_jax.parallel.mesh import in_slices
from mobilellm_jax.parallel.topologies import is_described
from mobilellm_jax.training.config import check
from mobilellm_jax.training.setup import Programs, programs

_GPU_SHARE = 0.75
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    capacity: float | None  # what a program may use; None: not known
    weights: float  # float32, this device's pieces, as are the next four
    teacher: float  # in the dtype of the activations; 0: there is none
    optimizer: float
    gradients: float  # float32, added up over the microbatches; a part of the temporaries
    batch: float
    arguments: float | None  # weights, optimizer state and batch, padded as the device wants them
    temporaries: float | None  # activations, gradients, weights in bfloat16
    code: float | None
    peak: float  # all together at the worst moment, or what the compiler says it would take

    @property
    def fits(self) -> bool:
        """True as well where the capacity is not known."""
        return self.capacity is None or self.peak <= self.capacity


@dataclasses.dataclass(frozen=True)
class StepCosts:
    """One step; numbers are of one device unless they say otherwise."""

    device_kind: str
    devices: int
    slices: int  # or nodes of GPUs, that they are in
    mesh: dict[str, int]
    tokens: int  # of a step, over all devices
    parameters: int
    memory: Memory
    model_matmul: float  # FLOPs by the formula of `Programs.flops_per_token`
    model_attention: float  # likewise, the causal half
    matmul: float  # FLOPs that the program computes, recomputation included
    attention: float
    optimizer: float  # FLOPs of the products in the optimizer: all of them, or a share as large as
    # this device's pieces of the weights are
    uncounted: dict[str, float]  # what is not in the count, and how often
    traffic: float | None  # bytes to and from memory
    exchanged: list[dict[str, Any]] | None  # collectives, see `collectives.summary`
    unread: str  # why the two before are None
    trace_seconds: float
    compile_seconds: float
    program_bytes: int  # of the lowered program's text, before XLA's compiler

    @property
    def chip(self) -> Chip | None:
        """The data sheet of the device."""
        return find_chip(self.device_kind)

    @property
    def model_flops(self) -> float:
        """What the model FLOPs utilisation counts."""
        return self.model_matmul + self.model_attention

    @property
    def seconds(self) -> dict[str, float]:
        """The least time that each resource needs; a step is no faster than the slowest."""
        chip, found = self.chip, {}
        if chip is None:
            return {}
        found["compute"] = (self.matmul + self.attention + self.optimizer) / chip.flops
        if self.traffic is not None and chip.bandwidth:
            found["memory"] = self.traffic / chip.bandwidth
        if self.exchanged is not None and chip.link:
            found["interconnect"] = sum(row["sent"] for row in self.exchanged) / chip.link
        if self.exchanged is not None and chip.network and self.slices > 1:
            found["network"] = sum(row["network"] for row in self.exchanged) / chip.network
        return found


def make_programs(config: ConfigDict, devices: Sequence[jax.Device], sources: int) -> Programs:
    """The programs that training would make, for tokens that nobody has prepared yet.

    Raises:
      UserError: the configuration is not usable, or does not divide over the devices.
    """
    check(config, len(devices))
    top_k = 0
    if config.teacher.stored:
        plan = Plan.load(config.plan)
        top_k = read_info(plan.resolve(plan.sources[0].path), config.teacher.stored).top_k
    return programs(config, devices, bos_id=1, eos_id=2, sources=sources, top_k=top_k)


def state_memory(made: Programs, capacity: float | None) -> Memory:
    """What is known before compilation: the pieces of the state and of the batch on a device."""

    def size(tree: Any) -> float:
        leaves = jax.tree.leaves(tree)
        shapes = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in leaves]
        return float(sum(jax.ShapeDtypeStruct(*shape).size * shape[1].itemsize for shape in shapes))

    weights, optimizer = size(made.abstract.params), size(made.abstract.opt_state)
    teacher, batch = size(made.teacher), size(made.abstract_batch)
    least = weights + teacher + optimizer + batch
    return Memory(capacity, weights, teacher, optimizer, weights, batch, None, None, None, least)


def capacity(device: jax.Device) -> float | None:
    """Bytes that a program may use on a device, by the data sheet or by the device itself.

    JAX takes a share of a GPU's memory, 3/4 if `XLA_PYTHON_CLIENT_MEM_FRACTION` does not say another.
    """
    chip = find_chip(device.device_kind)
    if device.platform != "gpu":
        return chip.memory if chip and chip.memory else None
    if is_described(device):
        names = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
        share = next(filter(None, map(os.environ.get, names)), _GPU_SHARE)
        return float(share) * chip.memory if chip and chip.memory else None
    stats = device.memory_stats()
    return float(stats["bytes_limit"]) if stats else None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Sends standard error nowhere: XLA writes its stack there where it cannot print a program."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def measure(made: Programs, config: ConfigDict) -> StepCosts:
    """Traces and compiles the step that `train` would run, and reads what it costs.

    A program that does not fit is compiled as far as the compiler goes; what it would need is then
    `memory.peak`, and traffic and collectives are None.
    """
    sizes = jax.ShapeDtypeStruct((made.model.vocab_size,), "int32")
    arguments = made.abstract, made.abstract_batch, sizes, made.teacher
    devices, kind = len(made.devices), made.devices[0].device_kind
    slices = len(in_slices(made.devices))
    memory = state_memory(made, capacity(made.devices[0]))
    began = time.perf_counter()
    with jax.set_mesh(made.mesh):
        traced = made.step.trace(*arguments)
        counted = flops.count(traced.jaxpr)
        lowered = traced.lower()
        text, unread = None, ""
        compiling = time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            needed = needed_bytes(str(error))
            if needed is None:
                raise
            memory = dataclasses.replace(memory, peak=needed)
            unread = "it does not fit into memory, so that the compiler gave no program"
        else:
            memory = _compiled_memory(memory, compiled.memory_analysis())
            try:
                with _quietly():
                    text = compiled.as_text()
            except jax.errors.JaxRuntimeError:
                unread = f"the compiler cannot print this program for {kind}"
    done = time.perf_counter()
    program = Program(text) if text else None
    traffic = memory_bytes(program) if program else None
    exchanged = (
        collectives.summary(collectives.collectives(program, devices, slices)) if program else None
    )
    unknown = sorted(program.unknown_loops) if program else []  # known when all is read
    tokens = config.global_batch * config.row_length
    matmul = made.flops_per_token(0)
    return StepCosts(
        device_kind=kind,
        devices=devices,
        slices=slices,
        mesh=dict(made.mesh.shape),
        tokens=tokens,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(made.abstract.params)),
        memory=memory,
        model_matmul=tokens * matmul / devices,
        model_attention=tokens * (made.flops_per_token(config.row_length) - matmul) / devices,
        matmul=counted.matmul / devices,
        attention=counted.attention / devices,
        optimizer=counted.optimizer / made.mesh.shape["fsdp"],
        uncounted=dict(counted.uncounted)
        | {f"traffic and exchange of further turns of the loop {name}": 1.0 for name in unknown},
        traffic=traffic,
        exchanged=exchanged,
        unread=unread,
        trace_seconds=compiling - began,
        compile_seconds=done - compiling,
        program_bytes=len(lowered.as_text()),
    )


def _compiled_memory(known: Memory, found: Any) -> Memory:
    arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
    code = found.generated_code_size_in_bytes
    fresh = found.output_size_in_bytes - found.alias_size_in_bytes
    return dataclasses.replace(
        known,
        arguments=float(arguments),
        temporaries=float(temporaries),
        code=float(code),
        peak=float(arguments + fresh + temporaries + code),
    )


def needed_bytes(message: str) -> float | None:
    """How many bytes a program would need, from the compiler's refusal; None for another error."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"(?:required[^(]*\(|Used )([\d.]+)([KMGT]?)", message)
    return float(found[1]) * _UNITS[found[2]] if found else None
