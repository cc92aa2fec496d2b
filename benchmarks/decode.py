"""How fast tokens are drawn, beside `transformers` generate on the same weights and machine.

    python -m benchmarks.decode --network=125m --rows=1,16 --dtypes=float32,bfloat16

Prompts of --prompt tokens, greedy, no end: seconds of a token between the 9th and the last, so that neither
prompt nor compilation counts. Each way runs in a process of its own, in turns; printed are medians over
rounds. The bytes of the weights over the seconds of a token are what is read from memory at least.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from absl import app, flags

from benchmarks.step import network
from mobilellm_jax.model.config import parameter_count
from mobilellm_jax.tables import aligned

FIRST = 8


def ours(name: str, rows: int, dtype: str, tokens: int, prompt: int) -> float:
    """Seconds of a token of each row."""
    import jax

    from mobilellm_jax.decoding.decoder import row_seeds, stream, to_draw
    from mobilellm_jax.decoding.sampling import GREEDY
    from mobilellm_jax.model import transformer

    model = network(name)
    params = jax.jit(lambda: transformer.init(model, jax.random.key(0)))()
    decoder = to_draw(params, model, dtype)
    prompts = [[3 + i] * prompt for i in range(rows)]
    for _compiled in range(2):
        for number, _row in enumerate(
            stream(decoder, prompts, FIRST + tokens + 1, GREEDY, row_seeds(0, rows))
        ):
            if number == FIRST:
                began = time.perf_counter()
    return (time.perf_counter() - began) / tokens


def theirs(name: str, rows: int, dtype: str, tokens: int, prompt: int) -> float:
    """The same of `generate` with its default cache."""
    import torch
    import transformers

    from benchmarks.step_torch import configuration

    model = network(name)
    torch.manual_seed(0)
    config = configuration(model)
    config.use_cache = True
    llama = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()
    layers = llama.model.layers
    (stack,) = model.stacks
    for i in range(len(layers)):  # shared blocks keep a cache of their own for each pass
        if i % stack.repeats:
            for key, value in layers[i - i % stack.repeats].named_parameters():
                owner, _, leaf = key.rpartition(".")
                setattr(layers[i].get_submodule(owner), leaf, value)
    llama.generation_config.eos_token_id = None
    llama.generation_config.pad_token_id = 0
    prompts = torch.tensor([[3 + i] * prompt for i in range(rows)])

    def seconds(count: int) -> float:
        began = time.perf_counter()
        with torch.no_grad():
            llama.generate(prompts, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return time.perf_counter() - began

    seconds(2)
    short = seconds(FIRST)
    return (seconds(FIRST + tokens) - short) / tokens


WAYS = {"ours": ours, "transformers": theirs}


def main(_: list[str]) -> None:
    args = flags.FLAGS
    if args.way:
        found = WAYS[args.way](
            args.network, int(args.rows[0]), args.dtypes[0], args.tokens, args.prompt
        )
        print(json.dumps(found))
        return
    lines = [["dtype", "rows", "way", "ms a token", "tokens/s", "GB/s", "ours / it"]]
    for dtype in args.dtypes:
        for rows in args.rows:
            found: dict[str, list[float]] = {way: [] for way in WAYS}
            for _round in range(args.rounds):
                for way in WAYS:
                    command = [sys.executable, "-m", "benchmarks.decode", f"--way={way}"]
                    command += [f"--network={args.network}", f"--rows={rows}", f"--dtypes={dtype}"]
                    done = subprocess.run(
                        [*command, f"--tokens={args.tokens}", f"--prompt={args.prompt}"],
                        capture_output=True,
                        text=True,
                        check=True,
                        cwd=Path(__file__).parent.parent,
                    )
                    found[way].append(json.loads(done.stdout.splitlines()[-1]))
            size = parameter_count(network(args.network)) * (4 if dtype == "float32" else 2)
            medians = {way: statistics.median(seconds) for way, seconds in found.items()}
            for way, seconds in medians.items():
                cells = [dtype, rows, way, f"{1e3 * seconds:,.1f}", f"{int(rows) / seconds:,.1f}"]
                lines.append(
                    [*cells, f"{size / seconds / 1e9:.1f}", f"{seconds / medians['ours']:.2f}"]
                )
    print(
        f"{args.network}, prompts of {args.prompt}, {args.tokens} tokens, medians of {args.rounds} rounds"
    )
    print(aligned(lines, "<><>>>>"))


if __name__ == "__main__":
    flags.DEFINE_string("network", "125m", "As `benchmarks.step` names it.")
    flags.DEFINE_integer("prompt", 16, "Tokens of a prompt.")
    flags.DEFINE_list("rows", ["1", "16"], "Texts that are drawn together.")
    flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of weights and cache.")
    flags.DEFINE_integer("tokens", 64, "Tokens that are timed.", lower_bound=1)
    flags.DEFINE_integer("rounds", 3, "Times that each way has its turn.", lower_bound=1)
    flags.DEFINE_enum("way", None, list(WAYS), "Measure this one here.")
    app.run(main)
