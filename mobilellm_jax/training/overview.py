"""What is printed before the first step: parameters, FLOPs, what will be trained for how long."""

import textwrap
from collections.abc import Mapping
from typing import Any

import jax

from mobilellm_jax.data.plan import Plan
from mobilellm_jax.model.config import ModelConfig, parameter_count
from mobilellm_jax.parallel.sharding import path_name
from mobilellm_jax.tables import aligned
from mobilellm_jax.training.length import Length


def parameter_table(params: Any) -> str:
    """One line for each array of parameters: name, shape, count, and how it is sharded.

    Args:
      params: arrays or `ShapeDtypeStruct`s with `NamedSharding`s.
    """
    lines = [("parameter", "shape", "count", "sharding")]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        axes = ", ".join(str(axis) for axis in leaf.sharding.spec if axis is not None)
        shape = " x ".join(str(size) for size in leaf.shape)
        lines.append((path_name(path), shape, f"{leaf.size:,}", axes or "replicated"))
    return textwrap.indent(aligned(lines, "<<><"), "  ")


def data(plan: Plan, first_token: int, last_token: int) -> str:
    """What a run reads of a plan: a line per stage, with the shares at the stage's begin and end.

    And how often it reads the sources whose size the plan knows.
    """
    lines, begin = [], 0
    for stage, first, last in zip(plan.stages, *plan.weights, strict=True):
        end = last_token if stage.tokens is None else begin + stage.tokens
        if begin < last_token and end > first_token:
            shares = ", ".join(
                f"{name} {a:.1%}" + (f" to {b:.1%}" if a != b else "")
                for name, a, b in zip(plan.names, first, last, strict=True)
                if a or b
            )
            read = f"{max(begin, first_token):,} to {min(end, last_token):,}"
            lines.append(f"data, stage {stage.name}: {shares}; tokens {read}")
        begin = end
    tokens = plan.read(last_token) - plan.read(first_token)
    epochs = [
        f"{source.name} {read / source.tokens:.3g}"
        for source, read in zip(plan.sources, tokens, strict=True)
        if source.tokens and read
    ]
    if epochs:
        lines.append(f"data, epochs of each source: {', '.join(epochs)}")
    return "\n".join(lines)


def summary(model: ModelConfig, flops: int, parameters: int, length: Length) -> str:
    """What will be trained, on how many tokens, with how many FLOPs, given those per token."""
    tokens, row_length = length.tokens, length.row_length
    batches = ", then ".join(f"{phase.batch:,}" for phase in length.phases)
    distinct = sum(stack.layers for stack in model.stacks)
    return (
        f"model: {parameters:,} parameters, {distinct} blocks applied {model.depth} times, "
        f"{flops / 1e6:,.1f} MFLOPs per token (forward and backward, rows of {row_length:,})\n"
        f"run: {length.steps:,} steps x {batches} rows x {row_length:,} tokens = {tokens:,} tokens, "
        f"{tokens * flops:.2e} FLOPs"
    )


def compaction(model: ModelConfig, live: int) -> dict[str, Any]:
    """What a run has become that was compacted, in plain values; `live` of its parameters are not zeros."""
    stacks = (f"{s.layers} x {s.heads}/{s.kv_heads} x {s.mlp_width}" for s in model.stacks)
    return {
        "parameters": parameter_count(model),
        "live": live,
        "width": model.width,
        "stacks": ", ".join(stacks),
    }


def teacher(theirs: Mapping[str, float], own: Mapping[str, float]) -> str:
    """What a student can learn: held-out bits per byte of its teacher beside its own before it begins."""
    names = [name for name in theirs if name.startswith("bits_per_byte")]
    if not names:
        return "teacher: there are no held-out rows to measure it on."
    said = (
        f"{name.partition('/')[2] or 'all'} {theirs[name]:.3f} ({own[name]:.3f})" for name in names
    )
    line = f"teacher's held-out bits per byte, in brackets the student's: {', '.join(said)}"
    if theirs["bits_per_byte"] < own["bits_per_byte"]:
        return line
    return (
        f"{line}\nthe teacher knows less than the student, who will unlearn towards it: take a better "
        "teacher, or raise config.objective.labels."
    )
