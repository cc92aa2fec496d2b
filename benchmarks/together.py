r"""What a device gains from training several runs as one program: tokens/s by the size of the group.

    python -m mobilellm_jax.prepare --embedded --out=data/smoke --row_length=256 --vocab_size=2048
    python -m benchmarks.together --plan=data/smoke/mixture.json
    python -m benchmarks.together --plan=... --groups=1,4,16,64 --tokens=1000000     # a GPU

For the network of `configs/smoke.py` and one four times smaller, in turns: the step of `train`, and that
of `data_mixing.together` with groups of several sizes, with the reading of their rows; the median of
the rounds.
"""

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
from data_mixing.runs import set_up as open_runs
from data_mixing.together import advance_all, begin_all, stacked
from mobilellm_jax import cli
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, Stack
from mobilellm_jax.parallel.sharding import put_rows
from mobilellm_jax.tables import aligned
from mobilellm_jax.training.length import stream
from mobilellm_jax.training.setup import set_up


def networks() -> dict[str, ModelConfig]:
    """That of the smoke configuration, and one of about a quarter of its parameters."""
    small = ModelConfig(
        2048, 64, (Stack(2, 1, 1, 160, repeats=2),), head_dim=64, max_length=1024, init_std=0.05
    )
    return {"smoke": ModelConfig.from_dict(get_config().model), "small": small}


def configured(model: ModelConfig, plan: str) -> ConfigDict:
    """The smoke configuration with another network and plan."""
    config = get_config()
    config.unlock()
    config.model = ConfigDict(model.to_dict())
    config.plan = plan
    return config


def alone(config: ConfigDict) -> Callable[[], jax.Array]:
    """A step of `train` at each call; its loss."""
    run = set_up(config, jax.devices()[:1])
    batches = stream(run.mixture, run.length, 0, 0, 1, prefetch=2, readers=0, workers=0)
    state = run.fresh()

    def step() -> jax.Array:
        nonlocal state
        state, metrics = run.step(state, put_rows(next(batches), run.mesh))
        return metrics["loss"]

    return step


def together(config: ConfigDict, group: int, folder: Path) -> Callable[[], jax.Array]:
    """A step of a group at each call; its losses."""
    plan = Plan.load(config.plan)
    members = [Member(f"m{seed}", plan, seed) for seed in range(group)]
    runs = open_runs(config, members, {}, folder, 1, group, 0, jax.devices()[:1])
    batches = stacked(list(runs.mixtures.values()), runs.length, 0, 0)
    keys_R = jax.numpy.stack([jax.random.key(member.seed) for member in members])
    state = begin_all(keys_R, begin=runs.made.begin, mesh=runs.mesh)
    piece_bytes_V = jax.numpy.asarray(runs.tokenizer.piece_bytes())
    settings = {"advance": runs.made.advance, "mesh": runs.mesh}

    def step() -> jax.Array:
        nonlocal state
        batch = put_rows(next(batches), runs.mesh)
        state, metrics = advance_all(state, batch, piece_bytes_V, **settings)
        return metrics["loss"]

    return step


def seconds(step: Callable[[], jax.Array], steps: int) -> float:
    """Of a step, the mean of some."""
    began = time.perf_counter()
    for _ in range(steps):
        loss = step()
    loss.block_until_ready()
    return (time.perf_counter() - began) / steps


def measure(plan: str, groups: list[int], tokens: int, rounds: int, folder: Path) -> None:
    """Prints a table of each network."""
    for name, model in networks().items():
        config = configured(model, plan)
        step_tokens = config.global_batch * config.row_length
        ways = {"train": (1, alone(config))}
        for group in groups:
            runs = together(config, group, folder / f"{name}_{group}")
            ways[f"groups of {group}"] = group, runs
        for _size, step in ways.values():
            seconds(step, 1)  # compiles
        found: dict[str, list[float]] = {way: [] for way in ways}
        for _round in range(rounds):
            for way, (size, step) in ways.items():
                steps = max(tokens // (step_tokens * size), 1)
                found[way].append(seconds(step, steps) / (size * step_tokens))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(transformer.shapes(model)))
        speed = {way: 1 / statistics.median(each) for way, each in found.items()}
        lines = [["way", "tokens/s", "/ train", "slowest and fastest round"]]
        for way, each in found.items():
            spread = f"{1 / max(each):,.0f} to {1 / min(each):,.0f}"
            lines.append([way, f"{speed[way]:,.0f}", f"{speed[way] / speed['train']:.2f}", spread])
        size = f"{config.global_batch} x {config.row_length} tokens a step and run"
        kind = jax.devices()[0].device_kind
        print(f"{name}, {parameters:,} parameters, {size}, one {kind} device")
        print(f"{aligned(lines, '<>>>')}\n", flush=True)


def main() -> None:
    """The command line."""
    args = flags.FLAGS
    groups = [int(group) for group in args.groups]
    with tempfile.TemporaryDirectory() as folder:
        measure(args.plan, groups, args.tokens, args.rounds, Path(folder))


if __name__ == "__main__":
    flags.DEFINE_string("plan", "data/smoke/mixture.json", "Plan to train on.")
    flags.DEFINE_list("groups", ["1", "2", "4", "8"], "Sizes of groups.")
    flags.DEFINE_integer("tokens", 16_384, "Tokens of a timing, of all members.", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "Times that each way has its turn.", lower_bound=1)
    cli.run(main)
