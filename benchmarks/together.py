r"""What a device gains from training several runs as one program: tokens/s by the size of the group.

    python -m mobilellm_jax.prepare --embedded --out=data/smoke --row_length=256 --vocab_size=2048
    python -m benchmarks.together --plan=data/smoke/mixture.json
    python -m benchmarks.together --plan=... --groups=1,4,16,64 --tokens=4000000     # a GPU

For the network of `configs/smoke.py` and one four times smaller: `train`, run after run, and
`data_mixing.together` with groups of several sizes, in turns. Speeds are of steps, with reading and
recording: a short and a long run of the same programs are timed, compiled before, and what counts is
their difference, the median of the rounds.
"""

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from configs.smoke import get_config
from data_mixing.runs import Member
from data_mixing.together import train_together
from mobilellm_jax import cli
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, Stack
from mobilellm_jax.tables import aligned
from mobilellm_jax.train import train

SHORT = 3  # steps


def networks() -> dict[str, ModelConfig]:
    """That of the smoke configuration, and one of about a quarter of its parameters."""
    small = ModelConfig(
        2048, 64, (Stack(2, 1, 1, 160, repeats=2),), head_dim=64, max_length=1024, init_std=0.05
    )
    return {"smoke": ModelConfig.from_dict(get_config().model), "small": small}


def configured(model: ModelConfig, plan: str) -> ConfigDict:
    """A configuration that does nothing but train."""
    config = get_config()
    config.unlock()
    config.model = ConfigDict(model.to_dict())
    config.plan, config.eval.rows = plan, 1
    for section in (config.eval, config.checkpoint):
        section.every = 1_000_000
    config.log_every = 1_000_000
    config.schedule.warmup_steps = 1
    return config


def seconds(run: Callable[[int, Path], object], steps: int) -> float:
    """Of a run of so many steps in a new folder, in silence."""
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        began = time.perf_counter()
        run(steps, Path(folder) / "run")
        return time.perf_counter() - began


def alone(config: ConfigDict) -> Callable[[int, Path], object]:
    """`train`."""

    def run(steps: int, folder: Path) -> object:
        config.steps = steps
        return train(config, folder)

    return run


def together(config: ConfigDict, group: int) -> Callable[[int, Path], object]:
    """One group."""
    plan = Plan.load(config.plan)
    members = [Member(f"m{seed}", plan, seed) for seed in range(group)]

    def run(steps: int, folder: Path) -> object:
        config.steps = steps
        return train_together(config, members, {}, folder, measure_every=steps, group=group)

    return run


def main() -> None:
    """The command line."""
    args = flags.FLAGS
    with tempfile.TemporaryDirectory() as compiled:
        jax.config.update("jax_compilation_cache_dir", compiled)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        measure(args.plan, [int(g) for g in args.groups], args.tokens, args.rounds)


def measure(plan: str, groups: list[int], tokens: int, rounds: int) -> None:
    """Prints the table."""
    lines = [["network", "parameters", "way", "ms a step", "tokens/s", "/ train"]]
    for name, model in networks().items():
        config = configured(model, plan)
        step_tokens = config.global_batch * config.row_length
        ways = {"train": (1, alone(config))}
        ways |= {f"groups of {g}": (g, together(config, g)) for g in groups}
        found: dict[str, list[float]] = {way: [] for way in ways}
        for _size, run in ways.values():
            seconds(run, SHORT)  # compiles
        for _round in range(rounds):
            for way, (size, run) in ways.items():
                more = max(tokens // (step_tokens * size), SHORT)
                spent = seconds(run, SHORT + more) - seconds(run, SHORT)
                found[way].append(spent / more)
        speed = {w: ways[w][0] * step_tokens / statistics.median(s) for w, s in found.items()}
        leaves = jax.tree.leaves(transformer.shapes(model))
        parameters = f"{sum(leaf.size for leaf in leaves):,}"
        for way, times in found.items():
            milliseconds = f"{1e3 * statistics.median(times):,.1f}"
            cells = [milliseconds, f"{speed[way]:,.0f}", f"{speed[way] / speed['train']:.2f}"]
            lines.append([name, parameters, way, *cells])
    device = jax.devices()[0].device_kind
    print(f"{device}, rows of {config.row_length} tokens, {config.global_batch} a step and run")
    print(aligned(lines, "<><>>>"))


if __name__ == "__main__":
    flags.DEFINE_string("plan", "data/smoke/mixture.json", "Plan to train on.")
    flags.DEFINE_list("groups", ["1", "2", "4", "8"], "Sizes of groups.")
    flags.DEFINE_integer("tokens", 100_000, "Tokens of a timing, of all members.", lower_bound=1)
    flags.DEFINE_integer("rounds", 3, "Times that each way has its turn.", lower_bound=1)
    cli.run(main)
