r"""One-shot pruning: seconds of a round, of the whole, and memory beside the weights.

    python -m benchmarks.prune_speed --plan=data/mixture.json
    python -m benchmarks.prune_speed --plan=data/mixture.json --rounds=2 --strategies=adapt

A network of a preset with random weights, and the vocabulary of the plan's tokenizer, is written as a
checkpoint and cut by the function of `python -m mobilellm_jax.prune`, each strategy in a process of its
own: held-out rows before and after, the rounds, the smaller checkpoint. Memory is by how much the
process grew at most after JAX had started. The same with a network of as many blocks and next to no weights
says what of it are compilers, files and programs; the rest is given in multiples of the weights in float32.
"""

import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from absl import app, flags

from benchmarks.children import told
from benchmarks.convert import memory
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, parameter_count
from mobilellm_jax.model.presets import preset
from mobilellm_jax.prune import amount, prune
from mobilellm_jax.pruning import one_shot
from mobilellm_jax.tables import markdown_table
from mobilellm_jax.training.checkpoint import write_model
from mobilellm_jax.training.setup import tokenizer_of

STRATEGIES = ["adapt", "minitron", "magnitude"]
GIB = 2**30
HEADER = (
    "strategy|first round, s|a further one|in all, s|GiB of the process|GiB grown|of them fixed|"
    "the rest / weights"
)


def narrow(model: ModelConfig) -> ModelConfig:
    """A network of as many blocks and heads, each as small as it can be."""
    stacks = tuple(dataclasses.replace(stack, mlp_width=16) for stack in model.stacks)
    return dataclasses.replace(model, width=16, head_dim=2, stacks=stacks)


def write_random(model: ModelConfig, plan: str, out: Path) -> int:
    """A checkpoint of a network with random weights; how many parameters it has."""
    tokenizer = tokenizer_of(Plan.load(plan), plan)
    model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    params = jax.jit(lambda: transformer.init(model, jax.random.key(0)))()
    write_model(flat(jax.device_get(params)), model, tokenizer, {}, out)
    return parameter_count(model)


def measured(settings: dict[str, Any]) -> dict[str, Any]:
    """Prunes in this process: when each round was over, and memory."""
    ends: list[float] = []
    cut = one_shot.prune

    def timed(*args: Any) -> Any:
        *given, told = args
        ends.append(time.perf_counter())
        found = cut(*given, lambda event: (ends.append(time.perf_counter()), told(event)))  # type: ignore[func-returns-value]
        jax.block_until_ready(found.params)
        return found

    jax.devices()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before, began = memory("VmRSS"), time.perf_counter()
    with mock.patch.object(one_shot, "prune", timed):
        prune(**settings)
    seconds = time.perf_counter() - began
    rounds = [end - start for start, end in itertools.pairwise(ends)]
    return {
        "total": seconds,
        "first": rounds[0],
        "round": statistics.median(rounds[1:] or rounds),
        "grown": memory("VmHWM") - before,
        "whole": memory("VmHWM"),
    }


def in_a_process(settings: dict[str, Any]) -> dict[str, Any]:
    """`measured`, by a process of its own."""
    given = f"--plan={settings['plan']}", f"--child={json.dumps(settings)}"
    return told("benchmarks.prune_speed", *given)


def main(_: list[str]) -> None:
    """Measures each strategy, or in a child process one, and prints the table."""
    args = flags.FLAGS
    if args.child:
        print(json.dumps(measured(json.loads(args.child))))
        return
    lines = [HEADER.split("|")]
    keys = "plan", "target_params", "rounds", "rows", "row_length", "batch_rows", "loss_chunks"
    given = {key: getattr(args, key) for key in (*keys, "remat")}
    model = preset(args.preset)
    with tempfile.TemporaryDirectory() as folder:
        whole = write_random(model, args.plan, Path(folder) / "model")
        write_random(narrow(model), args.plan, Path(folder) / "narrow")
        weights = 4 * whole
        for strategy in args.strategies:
            named = given | {"strategy": strategy}
            fixed = in_a_process(
                named
                | {"checkpoint": f"{folder}/narrow", "out": f"{folder}/small-{strategy}"}
                | {"target_params": "97%", "rounds": 1}
            )
            found = in_a_process(
                named | {"checkpoint": f"{folder}/model", "out": f"{folder}/{strategy}"}
            )
            print(json.dumps({"strategy": strategy, **found, "fixed": fixed}), file=sys.stderr)
            seconds = (f"{found[key]:.1f}" for key in ("first", "round", "total"))
            sizes = (x / GIB for x in (found["whole"], found["grown"], fixed["grown"]))
            lines.append(
                [f"`{strategy}`", *seconds, *(f"{size:.2f}" for size in sizes)]
                + [f"{(found['grown'] - fixed['grown']) / weights:.2f}"]
            )
    print(
        f"{args.preset}: {whole:,} parameters, {weights / GIB:.3f} GiB in float32, down to "
        f"{amount(args.target_params, whole):,} in {args.rounds} rounds of "
        f"{args.rows * args.row_length:,} tokens\n"
    )
    print(markdown_table(lines, "<" + ">" * (len(lines[0]) - 1)))


if __name__ == "__main__":
    flags.DEFINE_string("plan", None, "mixture.json of the rows.", required=True)
    flags.DEFINE_string("preset", "mobilellm-125m", "The network.")
    flags.DEFINE_list("strategies", STRATEGIES, "As of mobilellm_jax.prune.")
    flags.DEFINE_string("target_params", "50%", "To be left.")
    flags.DEFINE_integer("rounds", 50, "Of cuts.", 1)
    flags.DEFINE_integer("rows", 8, "That each round reads.", 1)
    flags.DEFINE_integer("row_length", 256, "In tokens.", 1)
    flags.DEFINE_integer("batch_rows", 2, "Read at once.", 1)
    flags.DEFINE_integer("loss_chunks", 16, "Parts of a row whose logits exist at once.", 1)
    flags.DEFINE_string("remat", "full", "What a backward pass computes again.")
    flags.DEFINE_string("child", "", "Settings of one run, as JSON; used by the program itself.")
    app.run(main)
