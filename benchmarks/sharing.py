"""What sharing blocks costs: 125M parameters in 30 blocks, the same applied twice (LS), and 60 of their own.

    python -m benchmarks.sharing --rows=1 --row_length=256

Printed are the times of a training step (`benchmarks.step`, which has the settings) and of drawing a
token with a KV cache, as medians over rounds in which the networks take turns, relative to 125M and
to the 60 blocks that do the same work.
"""

import statistics
import time

import jax
from absl import app, flags

from benchmarks.step import Job, fitting, network
from mobilellm_jax.decoding.decoder import row_seeds, stream, to_draw
from mobilellm_jax.decoding.sampling import GREEDY
from mobilellm_jax.model import transformer
from mobilellm_jax.tables import aligned

NETWORKS = ("125m", "ls-125m", "60-layers")
DRAWN = 64  # tokens


def seconds_of_a_token(name: str) -> float:
    """Seconds of a token that one row draws after 16 others, compilation left out."""
    model = network(name)
    decoder = to_draw(jax.jit(lambda: transformer.init(model, jax.random.key(0)))(), model)
    for _compiled in range(2):
        began = time.perf_counter()
        for row, _token in enumerate(
            stream(decoder, [[1] * 16], DRAWN + 1, GREEDY, row_seeds(0, 1))
        ):
            began = began if row else time.perf_counter()
    return (time.perf_counter() - began) / DRAWN


def main(_: list[str]) -> None:
    args = flags.FLAGS
    training: dict[str, list[float]] = {name: [] for name in NETWORKS}
    decoding: dict[str, list[float]] = {name: [] for name in NETWORKS}
    for _round in range(args.rounds):
        for name in NETWORKS:
            sizes = args.rows, args.row_length, args.steps
            found = fitting(Job(name, "ours", *sizes, args.loss_chunks, "none", "auto", "auto"))
            training[name].append(found["seconds"] / found["rows"])
            decoding[name].append(seconds_of_a_token(name))
    print(f"{found['device']}, rows of {args.row_length} tokens, medians of {args.rounds} rounds")
    lines = [
        [
            "network",
            "training, ms a row",
            "/ 125M",
            "/ 60",
            "decoding, ms a token",
            "/ 125M",
            "/ 60",
        ]
    ]
    for name in NETWORKS:
        cells = [name]
        for found_by in (training, decoding):
            median = {key: statistics.median(values) for key, values in found_by.items()}
            own = median[name]
            cells += [
                f"{1e3 * own:,.1f}",
                f"{own / median['125m']:.2f}",
                f"{own / median['60-layers']:.2f}",
            ]
        lines.append(cells)
    print(aligned(lines, "<>>>>>>"))


if __name__ == "__main__":
    flags.DEFINE_integer("rows", 8, "Rows of a step, halved until they fit.", lower_bound=1)
    flags.DEFINE_integer("row_length", 2048, "Tokens of a row.", lower_bound=8)
    flags.DEFINE_integer(
        "steps", 3, "Steps in a timing, of which a process makes three.", lower_bound=1
    )
    flags.DEFINE_integer("rounds", 3, "Times that each network has its turn.", lower_bound=1)
    flags.DEFINE_integer("loss_chunks", 8, "Parts of a row whose logits exist at once.")
    app.run(main)
