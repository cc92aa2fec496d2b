r"""Prunes a trained network in one shot: fewer heads and channels, and a smaller checkpoint.

    python -m mobilellm_jax.prune --checkpoint=runs/350m --plan=data/mixture.json --strategy=adapt \
      --target_params=125M --out=models/pruned

--checkpoint is a workdir, a checkpoint or a Hugging Face folder; the rows by which groups are scored are
those of the plan. --strategy is one of mobilellm_jax/pruning/strategies.py, or a function of your own by
its import path, with settings behind a colon: `adapt:amplitude=0.02,attention=heads`.

The result is a checkpoint like any other: train on (`--config.init_from`), `evaluate`, `convert`. It
carries which heads and channels of the source it kept, and what each round measured and cut.

    python -m mobilellm_jax.prune --checkpoint=runs/pruned --out=models/pruned

Without --target_params nothing more is cut: what a run with `config.pruning` has made zero is taken out.
"""

import ast
import dataclasses
import functools
import inspect
import re
from typing import Any

import jax
import numpy as np
import tqdm
from absl import flags
from etils import epath

from mobilellm_jax import cli
from mobilellm_jax.data.opening import open_mixture, open_split
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.rows import read_info
from mobilellm_jax.decoding.decoder import execution_on
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import check_new_folder
from mobilellm_jax.imports import import_path
from mobilellm_jax.interop.stored import StoredModel, open_model
from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.transformer import REMAT
from mobilellm_jax.parallel.compiled import keep_compiled
from mobilellm_jax.parallel.mesh import local_mesh
from mobilellm_jax.parallel.sharding import put_rows, shardings
from mobilellm_jax.pruning import one_shot
from mobilellm_jax.pruning.compaction import LAYOUTS, Compact, compacted, taken
from mobilellm_jax.pruning.groups import counts, everything, living, parameters
from mobilellm_jax.pruning.measures import batch_of
from mobilellm_jax.pruning.names import STRATEGIES
from mobilellm_jax.pruning.strategies import Strategy
from mobilellm_jax.tables import aligned
from mobilellm_jax.training.checkpoint import write_model
from mobilellm_jax.training.evaluation import evaluate
from mobilellm_jax.training.objectives import Network
from mobilellm_jax.training.setup import tokenizer_of
from mobilellm_jax.training.teacher import check_tokenizer

HELDOUT_ROWS = 64  # of each source, read before and after
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def prune(
    checkpoint: epath.PathLike,
    plan: epath.PathLike,
    strategy: str,
    target_params: str,
    out: epath.PathLike,
    rounds: int = 50,
    rows: int = 16,
    row_length: int = 0,
    batch_rows: int = 8,
    loss_chunks: int = 1,
    dtype: str = "float32",
    remat: str = "full",
    layout: str = "stacks",
    multiple: int = 1,
    seed: int = 0,
) -> ModelConfig:
    """Prunes a network and writes what is left as a checkpoint.

    Args:
      checkpoint: a workdir, a checkpoint or a Hugging Face folder.
      plan: path of a mixture.json, on whose rows groups are scored.
      strategy: see `parse`.
      target_params: how many parameters are to be left, like 125000000, 125M or 80%.
      out: the folder to make.
      rounds: of cuts; all is measured anew before each.
      rows: that each round reads; round i reads those after round i - 1's.
      row_length: in tokens; 0: that of the context or of the plan's rows, whichever is shorter.
      batch_rows: rows that are read at once, over all devices.
      loss_chunks: parts of a row whose logits exist at once.
      dtype: of activations; weights are in float32.
      remat: what a backward pass computes again: none, dots or full, which keeps the least.
      layout: of the smaller network, of `compaction.LAYOUTS`.
      multiple: to which widths are rounded up; see `compaction.compacted`.
      seed: of what is drawn.

    Returns:
      The smaller network.

    Raises:
      UserError: bad input, told before anything is computed.
    """
    chosen = parse(strategy)
    check_new_folder(out)
    source, loaded = open_model(checkpoint), Plan.load(plan)
    tokenizer = tokenizer_of(loaded, plan)
    check_tokenizer(source.needed_tokenizer, tokenizer, f"--checkpoint={checkpoint}", "network")
    model = source.model
    amount(target_params, size(model))  # may be none; what it means, the weights say
    for flag, value in (("rounds", rounds), ("rows", rows), ("batch_rows", batch_rows)):
        if value < 1:
            raise UserError(f"--{flag}={value} must be at least 1.")
    length = row_length or min(model.max_length, _stored_length(loaded))
    mesh = local_mesh()
    if rows % batch_rows or batch_rows % mesh.size:
        raise UserError(
            f"--batch_rows={batch_rows} must divide --rows={rows} and be a multiple of the {mesh.size} "
            "device(s)."
        )
    if length > model.max_length or length % loss_chunks:
        raise UserError(
            f"--row_length={length} must not exceed the network's context of {model.max_length:,} tokens, "
            f"and --loss_chunks={loss_chunks} must divide it."
        )
    mixture = open_mixture(loaded, length, model.vocab_size)
    heldout = open_split(loaded, "heldout", length, model.vocab_size)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id

    with jax.set_mesh(mesh):
        execution = dataclasses.replace(execution_on(mesh, model, dtype), remat=remat)
        network = Network(model, execution, bos, eos, loss_chunks)
        params = source.params(shardings(transformer.shapes(model), mesh), np.float32)
        piece_bytes_V = jax.numpy.asarray(tokenizer.piece_bytes())

        def measured(params: Any, network: Network) -> dict[str, float]:
            return evaluate(
                params,
                network=network,
                heldout=heldout,
                names=loaded.names,
                rows=HELDOUT_ROWS,
                batch_rows=batch_rows,
                piece_bytes_V=piece_bytes_V,
                mesh=mesh,
            )

        def batches(number: int) -> list[dict[str, jax.Array]]:
            first = number * rows
            indices = np.arange(first, first + rows).reshape(-1, batch_rows)
            return [put_rows(batch_of(mixture.read(part)["tokens"]), mesh) for part in indices]

        target = amount(target_params, parameters(model, counts(living(params, model))))
        before = measured(params, network)
        with tqdm.tqdm(total=rounds, unit=" rounds", desc=f"pruning by {strategy}") as bar:

            def told(event: dict[str, Any]) -> None:
                shown = {"parameters": f"{event['parameters']:,}"}
                if "loss" in event:
                    shown["loss"] = f"{event['loss']:.3f}"
                bar.set_postfix(shown)
                bar.update()

            pruned = one_shot.prune(params, network, chosen, target, rounds, batches, seed, told)
        compact = compacted(pruned.config, pruned.live, layout=layout, multiple=multiple)
        shapes = transformer.shapes(compact.config)
        smaller = taken(pruned.params, compact, shapes, consumed=True)
        after = measured(smaller, Network(compact.config, execution, bos, eos, loss_chunks))
        record = {
            "strategy": strategy,
            "target": target,
            "rounds": rounds,
            "rows": rows,
            "row_length": length,
            "seed": seed,
            "plan": loaded.hash,
            "heldout_before": before,
            "heldout_after": after,
            "events": pruned.events,
        }
        _write(source, smaller, compact, record, out)
    for key in before:
        print(f"{key}: {before[key]:.4f} before, {after[key]:.4f} after")
    left, live = size(compact.config), pruned.events[-1]["parameters"]
    filled = f", {left - live:,} of them zeros that fill up widths" if left > live else ""
    print(f"{size(model):,} parameters are {left:,}{filled}; target {target:,}: {out}")
    return compact.config


def take_out(
    checkpoint: epath.PathLike, out: epath.PathLike, layout: str = "stacks", multiple: int = 1
) -> ModelConfig:
    """Writes a network without the heads and channels whose weights are all zero.

    Args:
      checkpoint: of a run that prunes.
      out: the folder to make.
      layout: see `prune`.
      multiple: see `prune`.

    Returns:
      The smaller network.

    Raises:
      UserError: there is no such checkpoint, nothing in it is dead, or `out` holds something.
    """
    check_new_folder(out)
    source = open_model(checkpoint)
    params = source.params(dtype=np.float32)
    live = living(params, source.model)
    compact = compacted(source.model, live, layout=layout, multiple=multiple)
    before, after = size(source.model), size(compact.config)
    if before == after:
        raise UserError(
            f"nothing in {source.directory} is dead: say how many parameters are to be left, "
            "--target_params, and by which rows, --plan."
        )
    smaller = taken(params, compact, transformer.shapes(compact.config), consumed=True)
    _write(source, smaller, compact, {}, out)
    print(f"{before:,} parameters are {after:,}: {out}")
    return compact.config


def _write(
    source: StoredModel, smaller: Any, compact: Compact, record: dict[str, Any], out: epath.PathLike
) -> None:
    """Writes the smaller network with a record of how it came about, and shows its stacks."""
    record = {"source": source.identity, **record, "kept": compact.to_dict()}
    leaves, tokenizer = flat(jax.device_get(smaller)), source.needed_tokenizer
    write_model(leaves, compact.config, tokenizer, {"pruning": record}, out)
    print(table(source.model, compact.config))


def parse(text: str) -> Strategy:
    """`adapt:amplitude=0.02,attention=heads` as a strategy: a name of ours, or an import path.

    Raises:
      UserError: there is no such strategy or setting, or a setting is missing.
    """
    match = re.fullmatch(r"(\w+|[\w.]+:\w+)(?::(\w+=.*))?", text)
    if not match:
        raise UserError(
            f"--strategy={text} is not of the form NAME or PACKAGE.MODULE:NAME with :KEY=VALUE,... behind it."
        )
    name, settings = match[1], match[2]
    if ":" in name:
        function = import_path(name, "strategy", below="--")
    elif name in STRATEGIES:
        function = STRATEGIES[name]
    else:
        raise UserError(
            f"--strategy={name} is not one of {', '.join(STRATEGIES)}, nor an import path."
        )
    known = list(inspect.signature(function).parameters)[2:]
    given: dict[str, Any] = {}
    for pair in re.split(r",(?=\w+=)", settings) if settings else []:
        key, _, value = pair.partition("=")
        if key not in known:
            raise UserError(
                f"--strategy={text}: {name} has no setting {key!r}; it has {', '.join(known) or 'none'}."
            )
        try:
            given[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            given[key] = value
    return functools.partial(function, **given)


def amount(text: str, whole: int) -> int:
    """`125M`, `125000000` or `80%` of `whole` as a number of parameters.

    Raises:
      UserError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB%]?)", text.replace(",", "").replace("_", ""))
    if not match:
        raise UserError(
            f"--target_params={text} is not a number of parameters: write 125000000, 125M or 80%."
        )
    number, unit = float(match[1]), match[2]
    return round(number * whole / 100) if unit == "%" else round(number * UNITS[unit])


def size(model: ModelConfig) -> int:
    """The parameters of a network, also of one whose blocks have more than the usual."""
    return parameters(model, counts(everything(model)))


def table(before: ModelConfig, after: ModelConfig) -> str:
    """The stacks of two networks, one above the other."""
    lines = [["", "layers", "heads", "KV heads", "MLP width", "width"]]
    for what, model in (("before", before), ("after", after)):
        for stack in model.stacks:
            numbers = stack.layers, stack.heads, stack.kv_heads, stack.mlp_width, model.width
            lines.append([what, *(f"{n:,}" for n in numbers)])
    return aligned(lines, "<>>>>>")


def _stored_length(plan: Plan) -> int:
    return min(read_info(plan.resolve(source.path)).row_length for source in plan.sources)


def main() -> None:
    """Runs `prune` with the flags, or `take_out` where there is no target."""
    args = flags.FLAGS
    keep_compiled()
    if not args.target_params:
        take_out(args.checkpoint, args.out, args.layout, args.multiple)
        return
    if not args.plan:
        raise UserError("--plan is missing: the mixture.json by whose rows groups are scored.")
    prune(**{name: getattr(args, name) for name in inspect.signature(prune).parameters})


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "Workdir, checkpoint or HF folder.", required=True)
    flags.DEFINE_string("plan", "", "mixture.json by whose rows groups are scored.")
    flags.DEFINE_string(
        "strategy",
        "adapt",
        f"{', '.join(STRATEGIES)}, or an import path; settings behind a colon.",
    )
    flags.DEFINE_string("target_params", "", "To be left: 125M, 125000000, 80%; none: see above.")
    flags.DEFINE_string("out", None, "Folder to make.", required=True)
    flags.DEFINE_integer("rounds", 50, "Of cuts; all is measured anew before each.")
    flags.DEFINE_integer("rows", 16, "Rows that each round reads.")
    flags.DEFINE_integer("row_length", 0, "In tokens; 0: the context's or the stored rows'.")
    flags.DEFINE_integer("batch_rows", 8, "Rows read at once, over all devices.")
    flags.DEFINE_integer("loss_chunks", 1, "Parts of a row whose logits exist at once.", 1)
    flags.DEFINE_enum("dtype", "float32", ["bfloat16", "float32"], "Of activations.")
    flags.DEFINE_enum("remat", "full", list(REMAT), "What a backward pass computes again.")
    flags.DEFINE_enum("layout", "stacks", LAYOUTS, "Of blocks that differ in their widths.")
    flags.DEFINE_integer("multiple", 1, "To which widths are rounded up, filled with zeros.", 1)
    flags.DEFINE_integer("seed", 0, "Of what is drawn.")
    cli.run(main)
