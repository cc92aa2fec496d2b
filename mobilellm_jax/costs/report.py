"""How the costs of a step are told: per device and per chip, against the device, and for a whole run."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from mobilellm_jax.costs.step import StepCosts
from mobilellm_jax.tables import aligned
from mobilellm_jax.training.length import length_of, possible_microbatches

GIB = 2**30


def run_figures(costs: StepCosts, config: ConfigDict, utilisation: float) -> dict[str, float]:
    """What the configured run takes at a model FLOPs utilisation; empty where no peak is known.

    `attainable` is the utilisation that the roofline allows: the model's FLOPs in the least time.
    """
    chip, seconds = costs.chip, costs.seconds
    if chip is None:
        return {}
    step = costs.model_flops / (utilisation * chip.flops)
    run = step * length_of(config).tokens / costs.tokens
    chips = costs.devices / chip.devices_per_chip
    return {
        "utilisation": utilisation,
        "attainable": costs.model_flops / (max(seconds.values()) * chip.flops),
        "step_seconds": step,
        "tokens_per_second": costs.tokens / step,
        "tokens_per_second_per_chip": costs.tokens / step / chips,
        "days": run / 86_400,
        "chip_hours": run / 3600 * chips,
    }


def as_json(costs: StepCosts, config: ConfigDict, utilisation: float) -> dict[str, Any]:
    """Everything, as plain values."""
    return {
        **dataclasses.asdict(costs),
        "fits": costs.memory.fits,
        "seconds": costs.seconds,
        "run": run_figures(costs, config, utilisation),
        "advice": advice(costs, config),
    }


def text(costs: StepCosts, config: ConfigDict, utilisation: float) -> str:
    """Everything, for a reader."""
    chip = costs.chip
    per_chip = chip.devices_per_chip if chip else 1
    count = f"{costs.devices} x {costs.device_kind}"
    if per_chip > 1:
        count += f" (devices; {costs.devices // per_chip} chips)"
    if costs.slices > 1:
        count += f" in {costs.slices} slices or nodes"
    rows = config.global_batch // (costs.devices * config.microbatches)
    mesh = " x ".join(f"{name} {size}" for name, size in costs.mesh.items())
    lines = [
        f"devices: {count}, mesh {mesh}",
        f"step: {costs.tokens:,} tokens; {config.microbatches} microbatch(es) of {rows} row(s) of "
        f"{config.row_length:,} on a device; {costs.parameters:,} parameters",
        f"compiled in {costs.compile_seconds:.1f} s (traced in {costs.trace_seconds:.1f} s), "
        f"{costs.program_bytes:,} bytes of program before compilation",
        "",
        _memory_table(costs, per_chip),
        _verdict(costs),
        *advice(costs, config),
        "",
        _flops_table(costs, per_chip),
    ]
    lines += [f"not counted: {name}, {n:,.0f} times" for name, n in costs.uncounted.items()]
    lines += ["", *_moved(costs), "", *_time(costs, config, utilisation)]
    return "\n".join(lines)


def _memory_table(costs: StepCosts, per_chip: int) -> str:
    m = costs.memory
    rows = [
        ("weights, float32", m.weights),
        *([("teacher", m.teacher)] if m.teacher else []),
        ("optimizer state", m.optimizer),
        ("batch", m.batch),
        ("  these, padded by the device", m.arguments),
        ("temporaries", m.temporaries),
        ("  of them gradients, at most", m.gradients),
        ("program", m.code),
        ("peak" if m.temporaries is not None else "needed", m.peak),
        ("capacity", m.capacity),
    ]
    return _table("memory, GiB", [(n, v) for n, v in rows if v is not None], per_chip, GIB)


def _verdict(costs: StepCosts) -> str:
    m = costs.memory
    if m.capacity is None:
        return "the capacity of this device is not known."
    gap = abs(m.capacity - m.peak) / GIB
    if m.fits:
        return f"it fits: {gap:.2f} GiB are left ({m.peak / m.capacity:.0%} used)."
    return f"it does not fit: {gap:.2f} GiB too much."


def advice(costs: StepCosts, config: ConfigDict) -> list[str]:
    """What gives memory back where a step does not fit, by arithmetic; the most useful first."""
    m = costs.memory
    if m.fits or m.capacity is None:
        return []
    said = []
    split = m.weights + m.optimizer + m.gradients  # over fsdp; the others over all devices
    state = split - m.gradients + m.teacher + m.batch
    rows = config.global_batch // (costs.devices * config.microbatches)
    rest = max(m.peak - state - m.gradients, 0.0)
    possible = possible_microbatches(config, costs.devices)
    factors = [k // config.microbatches for k in possible if k % config.microbatches == 0][1:]
    if factors:
        room = m.capacity - state - m.gradients
        by = next((k for k in factors if rest / k <= 0.9 * room), factors[-1])
        said.append(
            f"config.microbatches={config.microbatches * by}: {rows // by} row(s) at once instead of "
            f"{rows}; the temporaries shrink to about a {by}th, {(rest - rest / by) / GIB:.1f} GiB back."
        )
    if config.execution.remat != "full":
        better = "full" if config.execution.remat == "dots" else "dots"
        said.append(
            f"config.execution.remat={better}: of a block less is kept for the backward pass, for "
            f"{'a third' if better == 'full' else 'a few per cent'} more work."
        )
    logits = 4 * rows * config.row_length * config.model.vocab_size / config.loss_chunks
    if logits > 0.05 * m.capacity:
        said.append(
            f"config.loss_chunks={2 * config.loss_chunks}: the logits of a chunk, "
            f"{logits / GIB:.1f} GiB, are halved."
        )
    data = costs.mesh["data"] // costs.slices
    if data > 1 and split > 0.1 * m.capacity:
        pieces = [by for by in range(2, data + 1) if data % by == 0]
        by = next((by for by in pieces if split / by <= 0.1 * m.capacity), data)
        rest_of_it = (
            "" if config.mesh.data == -1 else f" with config.mesh.data={costs.mesh['data'] // by}"
        )
        said.append(
            f"config.mesh.fsdp={costs.mesh['fsdp'] * by}{rest_of_it}: weights, moments and gradients in "
            f"as many pieces, {split * (1 - 1 / by) / GIB:.1f} GiB back."
        )
    # Last, because it alone changes the result: a first moment for each weight, in half its bytes.
    if config.optimizer.get("mu_dtype") == "float32" and m.weights / 2 > (m.peak - m.capacity) / 10:
        said.append(
            f"config.optimizer.mu_dtype=bfloat16: first moments in two bytes instead of four, "
            f"{m.weights / 2 / GIB:.2f} GiB back; not for a run that goes on."
        )
    return said


def _flops_table(costs: StepCosts, per_chip: int) -> str:
    rows = [
        ("model, matrices", costs.model_matmul),
        ("model, attention (causal half)", costs.model_attention),
        ("program, matrices", costs.matmul),
        ("program, attention", costs.attention),
        *([("program, optimizer", costs.optimizer)] if costs.optimizer else []),
    ]
    table = _table("TFLOP of a step", rows, per_chip, 1e12)
    return (
        f"{table}\nthe program computes {costs.matmul / costs.model_matmul:.3f} x the model's matrices "
        f"and {costs.attention / costs.model_attention:.2f} x its attention."
    )


def _moved(costs: StepCosts) -> list[str]:
    if costs.exchanged is None or costs.traffic is None:
        return [f"memory traffic and collectives are not known: {costs.unread}."]
    header = ["collective of a step", "devices", "operations", "arrays", "GiB", "GiB sent"]
    lines = [
        [
            row["kind"],
            f"{row['group']}",
            f"{row['operations']:,.0f}",
            f"{row['arrays']:,.0f}",
            f"{row['bytes'] / GIB:.3f}",
            f"{row['sent'] / GIB:.3f}",
        ]
        for row in costs.exchanged
    ]
    if costs.slices > 1:
        header += ["in slices", "GiB between them"]
        for line, row in zip(lines, costs.exchanged, strict=True):
            line += [f"{row['slices']}", f"{row['network'] / GIB:.4f}"]
    table = aligned([header, *lines], "<" + ">" * (len(header) - 1)) if lines else "no collectives"
    return [f"memory traffic: {costs.traffic / GIB:,.1f} GiB a step and device", table]


def _time(costs: StepCosts, config: ConfigDict, utilisation: float) -> list[str]:
    figures, seconds = run_figures(costs, config, utilisation), costs.seconds
    if not figures:
        return [f"no peak of {costs.device_kind} is known, so no bound of the time."]
    slowest = max(seconds, key=lambda name: seconds[name])
    parts = ", ".join(f"{name} {1e3 * s:,.1f} ms" for name, s in seconds.items())
    parts += "; the others are not known" if len(seconds) < 3 + (costs.slices > 1) else ""
    lines = [
        f"roofline: a step takes at least {1e3 * seconds[slowest]:,.1f} ms, bound by {slowest} "
        f"({parts}); at most {figures['attainable']:.0%} model FLOPs utilisation.",
        f"at {utilisation:.0%} utilisation: {1e3 * figures['step_seconds']:,.1f} ms a step, "
        f"{figures['tokens_per_second']:,.0f} tokens/s ({figures['tokens_per_second_per_chip']:,.0f} "
        f"a chip); {length_of(config).steps:,} steps in {figures['days']:,.2f} days, "
        f"{figures['chip_hours']:,.0f} chip-hours.",
    ]
    if utilisation > figures["attainable"]:
        lines.append("that is more than the roofline allows: see what binds above.")
    return lines


def _table(title: str, rows: list[tuple[str, float]], per_chip: int, unit: float) -> str:
    header = [title, "a device", "a chip"] if per_chip > 1 else [title, "a device"]
    lines = [header]
    for name, value in rows:
        cells = [f"{value / unit:,.3f}", f"{value * per_chip / unit:,.3f}"]
        lines.append([name, *cells[: len(header) - 1]])
    return aligned(lines, "<>>"[: len(header)])
