r"""One run, a family: the networks that a run with `config.pruning.compact_at` left, exported and compared.

    python -m mobilellm_jax.family --runs=runs/pruned --out=models/family
    python -m mobilellm_jax.family --runs=runs/pruned,runs/cooled-350m --out=models/family \
      --tasks=commonsense --data=eval

Members are the checkpoint after each compaction and the newest one of every run in --runs; so a size that
was cooled down by a run of its own stands beside the one it was forked from. Each is exported to
OUT/<name>/<format> for every format in --to (see mobilellm_jax.convert), its held-out bits per byte are
measured on the run's plan, and the time to draw a token on this machine; with --tasks (extra `[eval]`)
also its accuracy. OUT gets members.jsonl, table.md and frontier.svg. A member that is there is not made
again, so that a family grows with its runs.
"""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from mobilellm_jax import cli
from mobilellm_jax.convert import FORMATS, convert
from mobilellm_jax.data.opening import open_split
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.decoding.decoder import execution_on, row_seeds, stream, to_draw
from mobilellm_jax.decoding.sampling import GREEDY
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import replaced
from mobilellm_jax.interop.stored import StoredModel, open_model
from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, parameter_count
from mobilellm_jax.parallel.compiled import keep_compiled
from mobilellm_jax.parallel.mesh import local_mesh
from mobilellm_jax.parallel.sharding import shardings
from mobilellm_jax.pruning.compaction import compacted, taken
from mobilellm_jax.pruning.groups import living
from mobilellm_jax.pruning.while_training import schedule_of
from mobilellm_jax.reporting.curves import compact
from mobilellm_jax.reporting.frontier import Member, drawing, table
from mobilellm_jax.tables import aligned
from mobilellm_jax.training.checkpoint import FOLDER, LoadedModel, saved_steps
from mobilellm_jax.training.evaluation import evaluate
from mobilellm_jax.training.length import length_of
from mobilellm_jax.training.objectives import Network
from mobilellm_jax.training.workdir import complete, read_config

TOKENS, REPEATS = 64, 5  # that are drawn to take the time; how often


def family(
    runs: Sequence[epath.PathLike],
    out: epath.PathLike,
    to: Sequence[str] = ("hf", "gguf"),
    tasks: Sequence[str] = (),
    data: str = "",
    limit: int | None = None,
    rows: int = 64,
    dtype: str = "float32",
) -> list[Member]:
    """Exports and measures every member, and draws them.

    Args:
      runs: workdirs.
      out: folder of the family; members that it has get what they lack and are else left as they are.
      to: formats, of `convert.FORMATS`.
      tasks: of `evaluate`; none: accuracy is not measured.
      data: folder with the data of the tasks in local files.
      limit: documents of each task; None: all.
      rows: held-out rows of each source.
      dtype: of activations, and of weights while tokens are drawn.

    Returns:
      The members, the largest first.

    Raises:
      UserError: a run has no checkpoint, its plan is gone, or a format cannot express a member; a
        line of members.jsonl is damaged.
    """
    if unknown := {*to} - {*FORMATS}:
        raise UserError(f"--to={', '.join(sorted(unknown))}: choose of {', '.join(FORMATS)}.")
    folder = epath.Path(out)
    kept = folder / "members.jsonl"
    there = {member.name: member for member in _members(kept)}
    names = {member.checkpoint: name for name, member in there.items()}
    wanted = [
        (epath.Path(run).name, step) for run in runs for step in _checkpoints(epath.Path(run))
    ]
    for run, step in wanted:
        name, stored = names.get(str(step.resolve())), None
        if name is None:  # it says how many parameters live, which only the weights know
            stored = _without_dead(open_model(step))
            name = f"{compact(parameter_count(stored.model))}-{run}-{step.name}"
        known = there.get(name)
        if known and known.checkpoint not in ("", str(step.resolve())):
            raise UserError(
                f"{name} would be the name of {step} and is that of {known.checkpoint}: give runs whose "
                "folders have other names, or another --out."
            )
        missing = [kind for kind in to if not _target(folder, name, kind).exists()]
        if known and not missing and not (tasks and math.isnan(known.accuracy)):
            continue
        print(f"{name} ...", flush=True)
        stored = stored or _without_dead(open_model(step))
        for kind in missing:
            target = _target(folder, name, kind)
            target.parent.mkdir(parents=True, exist_ok=True)
            convert(stored, kind, target)
        if not known or (tasks and math.isnan(known.accuracy)):
            known = _measured(name, stored, tasks, data, limit, rows, dtype)
        there[name] = dataclasses.replace(known, checkpoint=str(step.resolve()))
        text = "".join(json.dumps(dataclasses.asdict(m)) + "\n" for m in there.values())
        with replaced(kept) as unfinished:
            unfinished.write_text(text)
    members = sorted(there.values(), key=lambda m: -m.parameters)
    (folder / "table.md").write_text(table(members) + "\n")
    (folder / "frontier.svg").write_text(drawing(members))
    return members


def _members(kept: epath.Path) -> Iterator[Member]:
    """Those that are measured already."""
    lines = kept.read_bytes().splitlines() if kept.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            member = Member(**json.loads(line))
            for field in dataclasses.fields(Member):
                known = str if field.type is str else int | float
                if not isinstance(getattr(member, field.name), known):
                    raise TypeError
        except (ValueError, TypeError, RecursionError):
            raise UserError(
                f"{kept}, line {number}, is no member: remove that line, and it is measured again."
            ) from None
        yield member


def _target(folder: epath.Path, name: str, kind: str) -> epath.Path:
    return folder / name / (kind if kind != "gguf" else "model.gguf")


def _checkpoints(workdir: epath.Path) -> Iterator[epath.Path]:
    """Folders of a run's checkpoints after compactions, and of its newest."""
    config = ConfigDict(complete(read_config(workdir)))
    compactions = schedule_of(config, length_of(config).steps).compactions
    folder = workdir / FOLDER
    steps = saved_steps(folder)
    if not steps:
        raise UserError(f"{workdir} has no checkpoint yet: wait for the first one.")
    for step in steps:
        if step in compactions or step == steps[-1]:
            yield folder / str(step)


def _without_dead(stored: StoredModel) -> StoredModel:
    """The same network without groups whose weights are all zero."""
    params = stored.params()
    smaller = compacted(stored.model, living(params, stored.model))
    leaves = taken(params, smaller, transformer.shapes(smaller.config), consumed=True)
    return dataclasses.replace(stored, model=smaller.config, leaves=flat(jax.device_get(leaves)))


def _measured(
    name: str,
    stored: StoredModel,
    tasks: Sequence[str],
    data: str,
    limit: int | None,
    rows: int,
    dtype: str,
) -> Member:
    model, tokenizer, mesh = stored.model, stored.needed_tokenizer, local_mesh()
    config = stored.meta["config"]
    plan = Plan.load(config["plan"])
    heldout = open_split(plan, "heldout", config["row_length"], model.vocab_size)
    with jax.set_mesh(mesh):
        params = stored.params(shardings(transformer.shapes(model), mesh), np.float32)
        execution = execution_on(mesh, model, dtype)
        found = evaluate(
            params,
            network=Network(model, execution, tokenizer.bos_id, tokenizer.eos_id),
            heldout=heldout,
            names=plan.names,
            rows=rows,
            batch_rows=mesh.size * -(-8 // mesh.size),
            piece_bytes_V=jnp.asarray(tokenizer.piece_bytes()),
            mesh=mesh,
        )
    if "bits_per_byte" not in found:
        raise UserError(f"{config['plan']} has no held-out rows to measure {name} on.")
    prompt_ms, token_ms = times(params, model, dtype)
    accuracy: dict[str, Any] = {}
    if tasks:
        from mobilellm_jax.evaluate import evaluate as judged  # needs the extra [eval]

        subject = LoadedModel(params, model, tokenizer, stored.step, stored.meta)
        local = Path(data) if data else None
        answers, _ = judged(subject, tasks, data=local, limit=limit, dtype=dtype)
        shares = [line.value for line in answers if line.metric.startswith("acc")]
        if shares:
            accuracy = {"accuracy": statistics.mean(shares)}
    return Member(
        name=name,
        parameters=parameter_count(model),
        bits_per_byte=found["bits_per_byte"],
        token_ms=token_ms,
        prompt_ms=prompt_ms,
        megabytes=sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in stored.leaves.values())
        / 1e6,
        **accuracy,
    )


def times(params: Any, model: ModelConfig, dtype: str) -> tuple[float, float]:
    """Milliseconds to read a prompt and to draw a token, one row: medians, compilation not counted."""
    decoder = to_draw(params, model, dtype)
    # The first round compiles.
    tokens = min(TOKENS, model.max_length // 2)
    prompt = [3 % model.vocab_size] * min(tokens, model.max_length - tokens)
    reading, drawing = [], []
    for _ in range(1 + REPEATS):
        began = time.perf_counter()
        for number, _row in enumerate(stream(decoder, [prompt], tokens, GREEDY, row_seeds(0, 1))):
            if number == 0:
                first = time.perf_counter()
        reading.append(first - began)
        drawing.append((time.perf_counter() - first) / (tokens - 1))
    return 1e3 * statistics.median(reading[1:]), 1e3 * statistics.median(drawing[1:])


def main() -> None:
    """Runs `family` with the flags, and prints the table."""
    args = flags.FLAGS
    keep_compiled()
    names = "tasks", "data", "limit", "rows", "dtype"
    members = family(args.runs, args.out, args.to, **{name: getattr(args, name) for name in names})
    lines = [["", "parameters", "bits per byte", "ms per token"]]
    for m in members:
        lines.append([m.name, f"{m.parameters:,}", f"{m.bits_per_byte:.3f}", f"{m.token_ms:.2f}"])
    print(aligned(lines, "<>>>"))
    print(epath.Path(args.out) / "frontier.svg")


if __name__ == "__main__":
    flags.DEFINE_list("runs", None, "Workdirs of runs, DIR,DIR.", required=True)
    flags.DEFINE_string("out", None, "Folder of the family; it may grow.", required=True)
    flags.DEFINE_list("to", ["hf", "gguf"], f"Formats: {', '.join(FORMATS)}.")
    flags.DEFINE_list("tasks", [], "Suites and tasks of `evaluate`; none: no accuracy.")
    flags.DEFINE_string("data", "", "Folder with the tasks' data in local files.")
    flags.DEFINE_integer("limit", None, "Documents of each task; all by default.", 1)
    flags.DEFINE_integer("rows", 64, "Held-out rows of each source.", 1)
    flags.DEFINE_enum("dtype", "float32", ["bfloat16", "float32"], "Of activations.")
    cli.run(main)
