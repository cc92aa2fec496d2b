"""What a result depends on beside its configuration: commit, packages, devices."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import mobilellm_jax

PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"),
    *("tensorflow-datasets", "array_record", "sentencepiece"),
)


def provenance(devices: Sequence[jax.Device]) -> dict[str, Any]:
    """Commit of this code, versions of what it runs on, and the devices, as plain values."""
    return {
        "commit": _commit(),
        "packages": {
            "mobilellm_jax": mobilellm_jax.__version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES},
        },
        "devices": {
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
            # XLA:CPU sums in an order that depends on its number of threads.
            "cpu_threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        },
    }


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs in packages and devices, and so may change the last bits of a resumed run."""
    return [
        f"{part}.{name}: {old[part].get(name)} -> {value}"
        for part in ("packages", "devices")
        for name, value in new[part].items()
        if old[part].get(name) != value
    ]


def _commit() -> str:
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
