r"""What the programs of one-shot pruning need in memory beside the weights, by the compiler's account.

    python -m benchmarks.prune_memory --preset=llama-3.1-8b --batch_rows=16 --row_length=64

Nothing runs and no weight exists: each program is compiled for one device of the kind that is here, as
`python -m mobilellm_jax.prune` calls it, and asked what it would take. Weights are in float32.
"""

import dataclasses
import functools

import jax
from absl import app, flags

from mobilellm_jax.decoding.decoder import execution_on
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import parameter_count
from mobilellm_jax.model.presets import preset
from mobilellm_jax.model.transformer import REMAT
from mobilellm_jax.parallel.mesh import local_mesh
from mobilellm_jax.pruning import measures, one_shot
from mobilellm_jax.pruning.groups import everything
from mobilellm_jax.tables import markdown_table
from mobilellm_jax.training.objectives import Network

GIB = 2**30
BOS, EOS = 1, 2


def main(_: list[str]) -> None:
    """Prints the table."""
    args = flags.FLAGS
    model, mesh = preset(args.preset), local_mesh()
    weights = 4 * parameter_count(model)
    shape = args.batch_rows, args.row_length + 1
    batch = {
        "tokens": jax.ShapeDtypeStruct(shape, "int32"),
        "source": jax.ShapeDtypeStruct(shape[:1], "int32"),
    }
    lines = [["program", "GiB beside the weights", "all / weights"]]
    with jax.set_mesh(mesh):
        params, live = transformer.shapes(model), everything(model)
        for remat in args.remat:
            execution = dataclasses.replace(execution_on(mesh, model, args.dtype), remat=remat)
            network = Network(model, execution, BOS, EOS, args.loss_chunks)
            lower = functools.partial(measures._gradients.lower, params, batch, network=network)
            lines.append(line(f"scores by gradients, remat={remat}", lower(kind="taylor"), weights))
        forward = {"params": params, "network": network}
        lines.append(
            line(
                "scores by activations, importance",
                measures._statistics.lower(batch=batch, **forward),
                weights,
            )
        )
        lines.append(line("scores by weights", measures._magnitude.lower(**forward), weights))
        lines.append(line("a cut", one_shot.cut.lower(params, live), weights))
    print(
        f"{args.preset}: {weights / GIB:.2f} GiB of weights in float32, {args.dtype} activations\n"
    )
    print(markdown_table(lines, "<>>"))


def line(name: str, lowered: jax.stages.Lowered, weights: int) -> list[str]:
    """What a program needs beside the weights that it is given."""
    found = lowered.compile().memory_analysis()
    fresh = found.output_size_in_bytes - found.alias_size_in_bytes
    beside = found.temp_size_in_bytes + fresh
    return [name, f"{beside / GIB:.2f}", f"{1 + beside / weights:.2f}"]


if __name__ == "__main__":
    flags.DEFINE_string("preset", "mobilellm-125m", "The network.")
    flags.DEFINE_list("remat", ["full", "none"], f"Of {', '.join(REMAT)}.")
    flags.DEFINE_string("dtype", "float32", "Of activations.")
    flags.DEFINE_integer("batch_rows", 2, "Read at once.", 1)
    flags.DEFINE_integer("row_length", 256, "In tokens.", 1)
    flags.DEFINE_integer("loss_chunks", 16, "Parts of a row whose logits exist at once.", 1)
    app.run(main)
