"""Accelerators by name: what one JAX device of each can do at best, from the vendors' data sheets.

TPUs: cloud.google.com/tpu/docs, the page of each generation; the memory is what the compiler lets a
program use. A TPU7x chip is two devices, and the numbers here are those of one: half of the chip's.
GPUs: NVIDIA's data sheets, dense bf16; the memory is all that they have, of which JAX takes a share;
the network is that of a DGX, an adapter for each GPU (200 Gb/s of an A100, 400 of the others).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device. A number of 0 is not known."""

    kind: str  # a part of the `device_kind`
    flops: float  # dense bf16, FLOP/s
    memory: float = 0  # bytes; of a TPU those that a program may use, of a GPU all of them
    bandwidth: float = 0  # of that memory, bytes/s
    link: float = 0  # bytes/s sent to other chips over all links together, one way
    network: float = 0  # bytes/s sent to other slices or nodes: its part of their network, one way
    devices_per_chip: int = 1


GIB = 2**30

# The first that matches counts.
CHIPS: tuple[Chip, ...] = (
    Chip("TPU v4", 275e12, 31.75 * GIB, 1228e9, 300e9),
    Chip("TPU v5 lite", 197e12, 15.75 * GIB, 819e9, 200e9, 3.125e9),
    Chip("TPU v5e", 197e12, 15.75 * GIB, 819e9, 200e9, 3.125e9),
    Chip("TPU v5", 459e12, 95.74 * GIB, 2765e9, 600e9, 6.25e9),
    Chip("TPU v6", 918e12, 31.25 * GIB, 1640e9, 400e9, 12.5e9),
    Chip("TPU7x", 2307e12 / 2, 94.75 * GIB, 7380e9 / 2, 600e9 / 2, devices_per_chip=2),
    Chip("A100", 312e12, 79.25 * GIB, 2039e9, 300e9, 25e9),
    Chip("H100", 989e12, 79.11 * GIB, 3350e9, 450e9, 50e9),
    Chip("H200", 989e12, 141 * GIB, 4800e9, 450e9, 50e9),
    Chip("B200", 2250e12, 178.36 * GIB, 8000e9, 900e9, 50e9),
)


def find_chip(device_kind: str) -> Chip | None:
    """What is known of devices of this kind, or None (a CPU, for one)."""
    return next((chip for chip in CHIPS if chip.kind in device_kind), None)


def peak_flops(device_kind: str) -> float | None:
    """bf16 peak of one device in FLOP/s, or None where it is not known."""
    chip = find_chip(device_kind)
    return chip.flops if chip else None
