r"""One-shot pruning: every strategy on one network, at several sparsities, on the same rows.

    python -m benchmarks.pruning --checkpoint=runs/teacher --plan=data/mixture.json --out=runs/pruning

For every strategy and share of parameters that goes: held-out bits per byte over all sources and of each,
of the network as it is cut, with nothing trained; mean and deviation over seeds, each of which reads
other rows. OUT gets results.jsonl, a line for each cut network, by which a run that was stopped goes on, and
table.md.
"""

import functools
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags

from mobilellm_jax.data.opening import open_mixture, open_split
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.decoding.decoder import execution_on
from mobilellm_jax.interop.stored import open_model
from mobilellm_jax.model.config import parameter_count
from mobilellm_jax.parallel.mesh import local_mesh
from mobilellm_jax.parallel.sharding import put_rows
from mobilellm_jax.prune import parse
from mobilellm_jax.pruning import one_shot
from mobilellm_jax.pruning.measures import batch_of
from mobilellm_jax.tables import markdown_table
from mobilellm_jax.training.evaluation import evaluate
from mobilellm_jax.training.objectives import Network
from mobilellm_jax.training.setup import tokenizer_of

ONCE = ("flap", "flap:bias=False", "slicegpt", "slicegpt_full")  # their papers cut once
BATCH = 8


def main(_: list[str]) -> None:
    args = flags.FLAGS
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "results.jsonl"
    done = (
        [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
        if kept.exists()
        else []
    )
    found = {(r["strategy"], r["share"], r["seed"]): r for r in done}
    source, plan, mesh = open_model(args.checkpoint), Plan.load(args.plan), local_mesh()
    tokenizer, model = tokenizer_of(plan, args.plan), source.model
    length = args.row_length
    mixture = open_mixture(plan, length, model.vocab_size)
    heldout = open_split(plan, "heldout", length, model.vocab_size)
    whole = parameter_count(model)
    with jax.set_mesh(mesh):
        measure = functools.partial(
            evaluate,
            heldout=heldout,
            names=plan.names,
            rows=args.heldout_rows,
            batch_rows=BATCH,
            piece_bytes_V=jax.numpy.asarray(tokenizer.piece_bytes()),
            mesh=mesh,
        )
        execution = execution_on(mesh, model, "float32")
        network = Network(model, execution, tokenizer.bos_id, tokenizer.eos_id)
        before = measure(source.params(dtype=np.float32), network=network)

        def cut(strategy: str, share: float, seed: int) -> dict[str, Any]:
            rounds = 1 if strategy in ONCE else args.rounds
            rows = args.rows * args.rounds // rounds  # all strategies read the same rows in all

            def batches(number: int) -> list[dict[str, jax.Array]]:
                first = seed * args.rows * args.rounds + number * rows
                indices = np.arange(first, first + rows).reshape(-1, BATCH)
                return [put_rows(batch_of(mixture.read(i)["tokens"]), mesh) for i in indices]

            began = time.perf_counter()
            pruned = one_shot.prune(
                source.params(dtype=np.float32),
                network,
                parse(strategy),
                round(whole * (1 - share)),
                rounds,
                batches,
                seed,
            )
            jax.block_until_ready(pruned.params)
            seconds = time.perf_counter() - began
            after = measure(
                pruned.params,
                network=Network(pruned.config, execution, tokenizer.bos_id, tokenizer.eos_id),
            )
            bits = {k: v for k, v in after.items() if k.startswith("bits_per_byte")}
            left = pruned.events[-1]["parameters"]
            return {"strategy": strategy, "share": share, "seed": seed, "seconds": seconds} | {
                "parameters": left,
                **bits,
            }

        for strategy in args.strategies:
            for share in map(float, args.shares):
                for seed in range(args.seeds):
                    if (strategy, share, seed) not in found:
                        record = cut(strategy, share, seed)
                        found[strategy, share, seed] = record
                        with kept.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(record) + "\n")
                        print(json.dumps(record), flush=True)
    text = table(found, args, before["bits_per_byte"], whole)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def table(found: dict[Any, Any], args: Any, before: float, whole: int) -> str:
    """Bits per byte over all sources: a line for each strategy, a column for each sparsity."""
    shares = [float(share) for share in args.shares]
    lines = [["", *(f"{share:.0%} less" for share in shares)]]
    for strategy in args.strategies:
        cells = []
        for share in shares:
            values = [found[strategy, share, s]["bits_per_byte"] for s in range(args.seeds)]
            spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
            cells.append(f"{np.mean(values):.3f} ± {spread:.3f}")
        lines.append([f"`{strategy}`", *cells])
    head = f"{whole:,} parameters, {before:.3f} bits per byte before\n\n"
    return head + markdown_table(lines, "<" + ">" * len(shares))


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", None, "Of the network that is cut.", required=True)
    flags.DEFINE_string("plan", None, "Of the rows that are read.", required=True)
    flags.DEFINE_string("out", None, "Folder of what is found.", required=True)
    flags.DEFINE_multi_string(
        "strategies",
        [
            "adapt",
            "adapt:update=True",
            "adapt:amplitude=0",
            "llm_pruner:protect=(1, 1)",
            "minitron",
            "flap",
            "flap:bias=False",
            "slicegpt",
            "slicegpt_full",
            "efficient",
            "efficient:update=True",
            "magnitude",
            "random",
        ],
        "As of mobilellm_jax.prune.",
    )
    flags.DEFINE_list("shares", ["0.2", "0.4", "0.5", "0.6"], "Of the parameters that go.")
    flags.DEFINE_integer("seeds", 3, "Each reads other rows.", lower_bound=1)
    flags.DEFINE_integer("rounds", 20, "Of cuts, where a strategy has rounds.", lower_bound=1)
    flags.DEFINE_integer("rows", 16, "That each round reads; a multiple of 8.", lower_bound=BATCH)
    flags.DEFINE_integer("row_length", 256, "In tokens.")
    flags.DEFINE_integer("heldout_rows", 40, "Of each source.")
    app.run(main)
