r"""The latency table (MobileLLM, table 7): what each runtime needs to load a network and to draw tokens.

    python -m benchmarks.on_device
    python -m benchmarks.on_device --networks=125m,ls-125m --runtimes=jax,onnx-q8_0,gguf-q8_0 --rounds=5

Networks of random weights and the vocabulary of 32,000: 125M, LS-125M (its 30 blocks applied twice) and 60
blocks of their own. Runtimes are our decoder (`jax`) and, where they are installed, onnxruntime (`onnx-`
f32, f16, q8_0, q4_0), ExecuTorch (`executorch-` f32, f16, 8da8w, 8da4w-32, 8da4w-64, minutes to compile) and
llama.cpp (`gguf-` f16, q8_0, q4_0), in processes of their own, in turns; medians over rounds. With --files
they are kept there, and taken from there. *Load* is from a file to a network that is ready, *first*
the time to the first token behind a prompt of --prompt tokens, *token* that of each further one. Memory is
by how much the process grew at most from before the load on. Predicted are the bytes of weights that the
passes of all blocks and the head read for a token, and two operations for each weight; beside them what
the token's time makes of that.

The second table is of one pass of a block. 60 blocks make 30 passes more than 125M, each with weights of its
own, and LS-125M 30 more over weights that were just read: by the difference of a token's times.
"""

import contextlib
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging

from benchmarks.children import size_of, told
from benchmarks.convert import memory
from benchmarks.step import network
from mobilellm_jax.model.config import ModelConfig, flops_per_token
from mobilellm_jax.tables import markdown_table

NETWORKS = ("125m", "ls-125m", "60-layers")
RUNTIMES = ("jax", *(f"onnx-{q}" for q in ("f32", "f16", "q8_0", "q4_0")))
RUNTIMES += tuple(f"executorch-{q}" for q in ("f32", "8da8w", "8da4w-32"))
RUNTIMES += tuple(f"gguf-{q}" for q in ("f16", "q8_0", "q4_0"))
# Of a weight in a block; the scales of groups are float16, or bfloat16.
BITS = {"jax": 32, "f32": 32, "f16": 16, "q8_0": 8.5, "q4_0": 4.5}
BITS |= {"8da8w": 8, "8da4w-32": 4.5, "8da4w-64": 4.25}
TABLE_BITS = {"q4_0": 8.5, "8da4w-32": 8, "8da4w-64": 8}  # of the head, where it differs
PACKAGES = {"onnx": "onnxruntime", "gguf": "llama_cpp", "executorch": "executorch"}
PASSES = "runtime|MB a pass|MFLOP|own weights, ms|GB/s|GFLOP/s|same weights, ms|/ own"
HEADER = (
    "network|runtime|file, MB|load, s|first, ms|token, ms|/ 125m|grown, MB|MB a token|GB/s|GFLOP/s"
)
PAPER = """MobileLLM, table 7 (iPhone 13, ExecuTorch, MPS, FP16; ms): load, initialise, execute
125M 39.2, 1,361.7, 15.6; LS-125M 43.6, 1,388.2, 16.0; 60 blocks 68.6, 3,347.7, 29.0"""

Reader = Callable[[np.ndarray], np.ndarray]  # further tokens int [T] to the logits of the last, [V]


def greedy(read: Reader, prompt: np.ndarray, count: int) -> tuple[float, float]:
    """Seconds to the first token, and of each further one."""
    began = time.perf_counter()
    token = read(prompt).argmax()
    first = time.perf_counter()
    for _ in range(count):
        token = read(np.array([token])).argmax()
    return first - began, (time.perf_counter() - first) / count


def by_jax(path: Path, prompt: np.ndarray, count: int) -> dict[str, float]:
    import jax

    from mobilellm_jax.decoding.decoder import row_seeds, stream, to_draw
    from mobilellm_jax.decoding.sampling import GREEDY
    from mobilellm_jax.interop.stored import load_model

    jax.devices()
    before, began = memory("VmRSS"), time.perf_counter()
    loaded = load_model(path)
    decoder = to_draw(loaded.params, loaded.model)
    jax.block_until_ready(decoder.params)
    load = time.perf_counter() - began
    for _compiled in range(2):
        began = time.perf_counter()
        drawn = stream(decoder, [prompt.tolist()], count + 1, GREEDY, row_seeds(0, 1))
        next(drawn)
        first = time.perf_counter()
        for _ in drawn:
            pass
    token = (time.perf_counter() - first) / count
    return {
        "load": load,
        "first": first - began,
        "token": token,
        "grown": memory("VmHWM") - before,
    }


def empty_cache(session: Any) -> dict[str, np.ndarray]:
    """Keys and values of a graph for onnxruntime before the first token of one text."""
    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    return {
        i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), dtypes[i.type])
        for i in session.get_inputs()
        if i.name.startswith("past")
    }


def by_onnx(path: Path, prompt: np.ndarray, count: int, threads: int) -> dict[str, float]:
    import onnxruntime

    def load() -> Reader:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path / "onnx" / "model.onnx", settings)
        outputs = [output.name for output in session.get_outputs()]
        empty = empty_cache(session)
        cached = dict(empty)

        def read(tokens_T: np.ndarray) -> np.ndarray:
            past = 0 if len(tokens_T) > 1 else next(iter(cached.values())).shape[2]
            if not past:
                cached.update(empty)
            given = {
                "input_ids": tokens_T[None],
                "attention_mask": np.ones((1, past + len(tokens_T)), np.int64),
                "position_ids": np.arange(past, past + len(tokens_T))[None],
            }
            found = dict(zip(outputs, session.run(None, given | cached), strict=True))
            for name in cached:
                cached[name] = found[name.replace("past_key_values", "present")]
            return found["logits"][0, -1]

        return read

    return _timed(load, prompt, count)


def by_executorch(path: Path, prompt: np.ndarray, count: int, threads: int) -> dict[str, float]:
    import torch
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    from mobilellm_jax.interop.executorch import PROGRAM

    torch.set_num_threads(threads)
    portable_lib._unsafe_reset_threadpool(threads)

    def load() -> Reader:
        program = Runtime.get().load_program(path / PROGRAM)
        forward = program.load_method("forward")
        state = {"program": program, "at": 0}

        def read(tokens_T: np.ndarray) -> np.ndarray:
            at = 0 if len(tokens_T) > 1 else state["at"]
            state["at"] = at + len(tokens_T)
            return forward.execute((torch.from_numpy(tokens_T)[None], torch.tensor([at])))[
                0
            ].numpy()

        return read

    return _timed(load, prompt, count)


def by_gguf(path: Path, prompt: np.ndarray, count: int, threads: int) -> dict[str, float]:
    import llama_cpp

    def load() -> Reader:
        settings = {"n_threads": threads, "n_threads_batch": threads, "n_ctx": 1024}
        # As its own programs have it; the Python package leaves flash attention off.
        loaded = llama_cpp.Llama(str(path), verbose=False, flash_attn=True, **settings)

        def read(tokens_T: np.ndarray) -> np.ndarray:
            if len(tokens_T) > 1:
                loaded.reset()
            loaded.eval(tokens_T.tolist())
            return np.ctypeslib.as_array(
                llama_cpp.llama_get_logits_ith(loaded.ctx, -1), shape=(loaded.n_vocab(),)
            )

        return read

    return _timed(load, prompt, count)


def _timed(load: Callable[[], Reader], prompt: np.ndarray, count: int) -> dict[str, float]:
    before, began = memory("VmRSS"), time.perf_counter()
    read = load()
    loaded = time.perf_counter() - began
    greedy(read, prompt, 2)
    first, token = greedy(read, prompt, count)
    grown = memory("VmHWM") - before
    return {"load": loaded, "first": first, "token": token, "grown": grown}


def measured(args: Any) -> dict[str, float]:
    """One runtime, in this process."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    prompt = np.random.default_rng(0).integers(3, 32000, args.prompt)
    kind, path = args.runtime.partition("-")[0], Path(args.path)
    if kind == "jax":
        return by_jax(path, prompt, args.tokens)
    ways = {"onnx": by_onnx, "gguf": by_gguf, "executorch": by_executorch}
    return ways[kind](path, prompt, args.tokens, args.threads)


def write(name: str, runtimes: list[str], folder: Path) -> dict[str, Path]:
    """A network with random weights in the files of the runtimes, but for those that are there."""
    import jax

    from mobilellm_jax.data.sentencepiece_tokenizer import train_tokenizer
    from mobilellm_jax.interop import executorch, gguf, onnx
    from mobilellm_jax.leaves import flat
    from mobilellm_jax.model import transformer
    from mobilellm_jax.training.checkpoint import write_model

    model = network(name)
    leaves = flat(jax.device_get(jax.jit(lambda: transformer.init(model, jax.random.key(0)))()))
    tokenizer = train_tokenizer([f"some text to learn {i}" for i in range(500)], 280)
    paths = {}
    for runtime in runtimes:
        kind, _, quantization = runtime.partition("-")
        path = paths[runtime] = folder / f"{name}-{runtime}{'.gguf' * (kind == 'gguf')}"
        if path.exists():
            continue
        if kind == "jax":
            write_model(leaves, model, tokenizer, {}, path)
        elif kind == "onnx":
            onnx.export(leaves, model, tokenizer, path, quantization)
        elif kind == "executorch":
            executorch.export(
                leaves, model, tokenizer, path, quantization, min(1024, model.max_length)
            )
        else:
            gguf.export(leaves, model, tokenizer, path, quantization)
    return paths


def read_for_a_token(model: ModelConfig, runtime: str) -> tuple[float, float]:
    """Bytes of weights and FLOPs, predicted."""
    quantization = runtime.partition("-")[2] or runtime
    head, bits = model.vocab_size * model.width, BITS[quantization]
    blocks = flops_per_token(model, 0) / 6 - head
    bytes_ = (blocks * bits + head * TABLE_BITS.get(quantization, bits)) / 8
    return bytes_, 2 * (blocks + head)


def of_a_pass(runtime: str, tokens: dict[tuple[str, str], float]) -> list[str]:
    """A line of the second table: what a block's pass reads and computes, and by what a token is longer."""
    plain, shared, deep = (network(name) for name in NETWORKS)
    passes = deep.depth - plain.depth
    assert passes == shared.depth - plain.depth
    (more, flops_more), (less, flops_less) = (read_for_a_token(m, runtime) for m in (deep, plain))
    bytes_, flops = (more - less) / passes, (flops_more - flops_less) / passes
    own, same = (
        (tokens[name, runtime] - tokens["125m", runtime]) / passes
        for name in ("60-layers", "ls-125m")
    )
    return (
        [runtime, f"{bytes_ / 1e6:.2f}", f"{flops / 1e6:.1f}", f"{1e3 * own:.2f}"]
        + [f"{bytes_ / own / 1e9:.1f}", f"{flops / own / 1e9:.0f}"]
        + [f"{1e3 * same:.2f}", f"{same / own:.2f}"]
    )


def main(_: list[str]) -> None:
    args = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    if args.runtime:
        print(json.dumps(measured(args)))
        return
    runtimes = [
        runtime
        for runtime in args.runtimes
        if importlib.util.find_spec(PACKAGES.get(runtime.partition("-")[0], "jax"))
    ]
    lines, tokens = [HEADER.split("|")], {}
    with contextlib.ExitStack() as stack:
        folder = args.files or stack.enter_context(tempfile.TemporaryDirectory())
        Path(folder).mkdir(parents=True, exist_ok=True)
        paths = {name: write(name, runtimes, Path(folder)) for name in args.networks}
        found: dict[tuple[str, str], list[dict[str, float]]] = {}
        for _round in range(args.rounds):
            for runtime in runtimes:
                for name in args.networks:
                    one = in_a_process(args, runtime, paths[name][runtime])
                    found.setdefault((name, runtime), []).append(one)
        for (name, runtime), rounds in sorted(found.items(), key=lambda item: item[0][1]):
            one = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
            tokens[name, runtime] = one["token"]
            bytes_, flops = read_for_a_token(network(name), runtime)
            ratio = one["token"] / tokens.get((args.networks[0], runtime), one["token"])
            lines.append(
                [name, runtime, f"{size_of(paths[name][runtime]) / 1e6:,.1f}", f"{one['load']:.2f}"]
                + [f"{1e3 * one['first']:,.0f}", f"{1e3 * one['token']:.1f}", f"{ratio:.2f}"]
                + [f"{one['grown'] / 1e6:,.0f}", f"{bytes_ / 1e6:,.0f}"]
                + [f"{bytes_ / one['token'] / 1e9:.1f}", f"{flops / one['token'] / 1e9:.0f}"]
            )
    print(markdown_table(lines, "<<" + ">" * (len(lines[0]) - 2)))
    if set(NETWORKS) <= set(args.networks):
        passes = [of_a_pass(runtime, tokens) for runtime in runtimes]
        print("\n" + markdown_table([PASSES.split("|"), *passes], "<" + ">" * 7))
    print(
        f"\n{args.threads} threads of {os.cpu_count()}; this machine copies {copied():.1f} GB/s\n"
    )
    print(PAPER)


def copied() -> float:
    """GB/s that a copy of a large array reads, at best."""
    source = np.ones(1 << 26, np.float32)
    target = np.empty_like(source)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - began)
    return source.nbytes / min(seconds) / 1e9


def in_a_process(args: Any, runtime: str, path: Path) -> dict[str, float]:
    """`measured`, by a process of its own."""
    given = [f"--{key}={getattr(args, key)}" for key in ("prompt", "tokens", "threads")]
    return told("benchmarks.on_device", f"--runtime={runtime}", f"--path={path}", *given)


if __name__ == "__main__":
    flags.DEFINE_list("networks", list(NETWORKS), "As benchmarks.step names them.")
    flags.DEFINE_list("runtimes", list(RUNTIMES), "Those whose package is missing are left out.")
    flags.DEFINE_integer("rounds", 3, "Each runtime and network once in each.", 1)
    flags.DEFINE_integer("prompt", 32, "Tokens of the prompt.", 2)
    flags.DEFINE_integer("tokens", 64, "Drawn behind it.", 1)
    flags.DEFINE_integer("threads", 2, "Of onnxruntime, ExecuTorch and llama.cpp.", 1)
    flags.DEFINE_string("files", "", "Folder to keep the files in.")
    flags.DEFINE_string("runtime", "", "Measure this one here.")
    flags.DEFINE_string("path", "", "Where --runtime finds the network.")
    app.run(main)
