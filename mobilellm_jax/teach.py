r"""Writes down once what a teacher says of the rows of a plan, for students that learn from it later.

    python -m mobilellm_jax.teach --teacher=models/teacher --plan=data/mixture.json \
      --row_length=2048 --top_k=32 --name=llama8b
    python -m mobilellm_jax.train --config=... --config.teacher.stored=llama8b --workdir=...

For each target of every training row the k likeliest tokens and their log probabilities go beside the
rows, into <source>/taught/<name>/: 4 bytes for each of the k (6 above 65,536 pieces), so that k=32
takes 64 times the room of the tokens themselves. Started again it goes on where it was. Several
students then cost one teacher, and students train without its memory.
"""

import functools
import inspect
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from absl import flags
from etils import epath

from mobilellm_jax import cli
from mobilellm_jax.data.opening import open_split
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.taught import TaughtInfo, Writer, folder_of, rows_fingerprint
from mobilellm_jax.decoding.decoder import execution_on
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.stored import open_model
from mobilellm_jax.model import transformer
from mobilellm_jax.model.loss import over_chunks
from mobilellm_jax.parallel.compiled import keep_compiled
from mobilellm_jax.parallel.mesh import local_mesh
from mobilellm_jax.parallel.sharding import BATCH_AXES, batch_sharding, put_rows, shardings
from mobilellm_jax.training.evaluation import batches
from mobilellm_jax.training.objectives import Network, split_rows
from mobilellm_jax.training.setup import tokenizer_of
from mobilellm_jax.training.teacher import Teacher, check_tokenizer

SHARD_ROWS = 1024  # what an interruption loses at most


def teach(
    teacher: epath.PathLike,
    plan: epath.PathLike,
    name: str,
    row_length: int,
    top_k: int = 32,
    temperature: float = 1.0,
    batch_rows: int = 8,
    dtype: str = "bfloat16",
    loss_chunks: int = 1,
    sources: Sequence[str] = (),
) -> None:
    """Writes what a teacher says of the training rows of a plan's sources.

    Args:
      teacher: checkpoint or Hugging Face folder.
      plan: path of a mixture.json.
      name: of what is written.
      row_length: of the runs that will read it; see `contexts.Contexts`.
      top_k: likeliest tokens that are kept of each target.
      temperature: of the distribution that is written.
      batch_rows: rows that are read at once, over all devices of this process.
      dtype: of the teacher's weights and activations.
      loss_chunks: parts of a row whose logits exist at once.
      sources: of the plan, for one process of several each; all if empty.

    Raises:
      UserError: bad input, or what is there under that name was written otherwise.
    """
    loaded = Plan.load(plan)
    stored = open_model(teacher)
    tokenizer = tokenizer_of(loaded, plan)
    check_tokenizer(stored.needed_tokenizer, tokenizer, f"--teacher={teacher}")
    if unknown := set(sources) - set(loaded.names):
        raise UserError(
            f"{plan} has no source {', '.join(sorted(unknown))}; it has {', '.join(loaded.names)}."
        )
    model = stored.model
    if not 1 <= top_k <= model.vocab_size:
        raise UserError(
            f"--top_k={top_k} must be from 1 to the teacher's {model.vocab_size:,} tokens."
        )
    if temperature <= 0:
        raise UserError(f"--temperature={temperature} must be positive.")
    if row_length > model.max_length:
        raise UserError(
            f"--row_length={row_length} is beyond the teacher's context of {model.max_length:,} tokens."
        )
    mesh = local_mesh()
    if batch_rows % mesh.size or row_length % loss_chunks:
        raise UserError(
            f"--batch_rows={batch_rows} must be a multiple of the {mesh.size} device(s), and "
            f"--loss_chunks={loss_chunks} must divide --row_length={row_length}."
        )
    opened = open_split(loaded, "train", row_length, model.vocab_size)
    writers = {}
    for number, rows in opened.items():
        source = loaded.names[number]
        if not sources or source in sources:
            folder = folder_of(rows.info.path, name)
            info = TaughtInfo(
                stored.identity,
                tokenizer.fingerprint,
                rows_fingerprint(rows.info.path),
                row_length,
                len(rows),
                top_k,
                temperature,
                rows.info.vocab_size,
            )
            writers[source] = rows, Writer(folder, info, SHARD_ROWS)
    if all(writer.complete for _, writer in writers.values()):
        print(f"all is written under the name {name} already.")
        return

    with jax.set_mesh(mesh):
        execution = execution_on(mesh, model, dtype)
        network = Network(model, execution, tokenizer.bos_id, tokenizer.eos_id, loss_chunks)
        places = shardings(transformer.shapes(model), mesh, BATCH_AXES)
        of = Teacher(network, stored.params(places, jnp.dtype(dtype)))
        program = jax.jit(
            functools.partial(likeliest, top_k=top_k, temperature=temperature),
            out_shardings=batch_sharding(mesh),
        )
        left = sum(len(part) for _, writer in writers.values() for part in writer.missing)
        with tqdm.tqdm(total=left, unit=" rows", desc=f"teaching {name}") as bar:
            for rows, writer in writers.values():
                for part in writer.missing:
                    found = [
                        jax.device_get(program(of, put_rows({"tokens": batch}, mesh)["tokens"]))
                        for batch in batches(rows, part, batch_rows, tokenizer.bos_id)
                    ]
                    ids, log_probs = (
                        np.concatenate(arrays)[: len(part)] for arrays in zip(*found, strict=True)
                    )
                    writer.write(part, ids, log_probs)
                    bar.update(len(part))
                writer.commit()
    print(f"written beside the rows of {', '.join(writers)}: --config.teacher.stored={name}")


def likeliest(
    teacher: Teacher, tokens: jax.Array, *, top_k: int, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """The k likeliest tokens at every target of rows.

    Args:
      teacher: with its weights.
      tokens: int [B, T + 1], rows as they are stored.
      top_k: how many.
      temperature: of the distribution.

    Returns:
      int32 [B, T, k], likeliest first, and float16 [B, T, k], their log probabilities.
    """
    of = teacher.network
    rows = split_rows(tokens, of.bos_id, of.eos_id)
    hidden_BTD = transformer.apply(
        teacher.params, of.model, rows.inputs_BT, rows.segment_ids_BT, of.execution
    )

    def chunk(hidden_BND: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits_BNV = transformer.logits(teacher.params, of.model, hidden_BND) / temperature
        top, ids = jax.lax.top_k(logits_BNV, top_k)
        return ids, top - jax.nn.logsumexp(logits_BNV, axis=-1, keepdims=True)

    ids, log_probs = over_chunks(chunk, of.loss_chunks, hidden_BTD)
    return ids, log_probs.astype(jnp.float16)


def main() -> None:
    """Runs `teach` with the flags."""
    args = flags.FLAGS
    keep_compiled()
    teach(**{name: getattr(args, name) for name in inspect.signature(teach).parameters})


if __name__ == "__main__":
    flags.DEFINE_string("teacher", None, "Checkpoint or Hugging Face folder.", required=True)
    flags.DEFINE_string("plan", None, "The mixture.json whose rows are read.", required=True)
    flags.DEFINE_string("name", None, "Of what is written, a folder beside rows.", required=True)
    flags.DEFINE_integer("row_length", 2048, "Of the runs that will read it.", lower_bound=1)
    flags.DEFINE_integer("top_k", 32, "Likeliest tokens that are kept.", lower_bound=1)
    flags.DEFINE_float("temperature", 1.0, "Of the distribution that is written.")
    flags.DEFINE_integer("batch_rows", 8, "Rows read at once, over all devices.", lower_bound=1)
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of weights and activations.")
    flags.DEFINE_integer("loss_chunks", 1, "Parts of a row whose logits exist at once.", 1)
    flags.DEFINE_list("sources", [], "Of the plan, where several processes share the work.")
    cli.run(main)
