r"""Compiles the step of a configuration for devices that need not be here, and tells what it costs.

    python -m mobilellm_jax.preflight --config=configs/mobilellm.py:125m --topology=v5e:16x16
    python -m mobilellm_jax.preflight --config=configs/mobilellm_r1.py:950m,pretrain1 \
      --topology=v5p:8x8x16 --config.mesh.fsdp=8 --search --cache=data/preflight

Nothing runs and no data is needed: any CPU compiles for a TPU pod (`pip install
mobilellm-jax[preflight]`), for GPUs (`--topology=h100:8`, with `[cuda]`), for simulated devices
(`--topology=cpu:8`) or for what is here (`--topology=local`); `--slices=4` means four such slices,
or nodes of GPUs. A step that does not fit is an answer, and exit status 0. docs/preflight.md explains
the output.
"""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from mobilellm_jax import cli
from mobilellm_jax.costs import report
from mobilellm_jax.costs.search import search
from mobilellm_jax.costs.step import StepCosts, make_programs, measure
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.errors import UserError
from mobilellm_jax.parallel.topologies import EXAMPLES, topology_devices

SOURCES = 14  # assumed where there is no plan yet: as many as MobileLLM-R1 mixes


def preflight(config: ConfigDict, topology: str, slices: int = 1) -> StepCosts:
    """Compiles one step and reads what it costs.

    Args:
      config: see `training.config.base_config`; its plan need not exist.
      topology: see `parallel.topologies.topology_devices`, as for:
      slices: how many of them.

    Raises:
      UserError: the configuration or the topology is not usable, or they do not fit together.
    """
    devices = topology_devices(topology, slices)
    return measure(make_programs(config, devices, sources(config)), config)


def sources(config: ConfigDict) -> int:
    """How many sources the plan of a configuration has, or `SOURCES` if it is not there yet."""
    if config.plan and Path(config.plan).exists():
        return len(Plan.load(config.plan).sources)
    return SOURCES


def main() -> None:
    """Runs `preflight`, or the search, with the flags."""
    args = flags.FLAGS
    if args.topology != "local":
        jax.config.update("jax_platforms", "cpu")
    if not 0 < args.utilisation <= 1:
        raise UserError(f"--utilisation={args.utilisation} is no share: 0.4 stands for 40 %.")
    if not (args.config.plan and Path(args.config.plan).exists()) and not args.json:
        print(f"plan: {args.config.plan or 'none'} is not there; {SOURCES} sources assumed.")
    found: dict[str, Any] | list[dict[str, Any]]
    if args.search:
        devices = topology_devices(args.topology, args.slices)
        given = args.config, args.topology, devices, sources(args.config), args.cache
        with contextlib.redirect_stdout(sys.stderr if args.json else sys.stdout):
            found = search(*given)
    else:
        costs = preflight(args.config, args.topology, args.slices)
        if not args.json:
            print(f"topology: {args.topology}" + f", {args.slices} of them" * (args.slices > 1))
            print(report.text(costs, args.config, args.utilisation))
            return
        found = report.as_json(costs, args.config, args.utilisation)
    if args.json:
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=True)
    flags.DEFINE_string("topology", "local", f"Devices to compile for: {EXAMPLES}.")
    flags.DEFINE_integer(
        "slices", 1, "How many: TPU slices, or nodes of GPUs, joined by a network.", 1
    )
    flags.DEFINE_float("utilisation", 0.4, "Model FLOPs utilisation that the run is priced at.")
    flags.DEFINE_bool("json", False, "Print JSON instead of text.")
    flags.DEFINE_bool("search", False, "Try microbatches, remat and sharding; print the frontier.")
    flags.DEFINE_string("cache", "", "Folder in which a search keeps what it has compiled.")
    flags.mark_flag_as_required("config")
    cli.run(main)
