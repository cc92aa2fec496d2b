"""DataInf here beside PyTorch with stored per-sample gradients: equal benefits, samples/s, memory.

    python -m benchmarks.influence --datainf=PATH

scores --samples rows for --probes probe sets, with --train of them as DataInf's training samples, by the
input and the output embedding (or `--layers=all`), in float32, each side in a process of its own. PATH
is a checkout of github.com/ykwon0407/DataInf, whose `compute_hvp_proposed` then works on PyTorch's
gradients; without it the formula is a loop here. Memory is the most that a process held beyond what
it held before it began to score.
"""

import importlib.util
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging

from benchmarks.children import told
from mobilellm_jax.model.config import ModelConfig, Stack
from mobilellm_jax.tables import aligned

NETWORKS = {  # parameters: 0.30M, 8.0M and 125M
    "tiny": ModelConfig(2048, 64, (Stack(4, 4, 2, 160),), head_dim=16, max_length=512),
    "small": ModelConfig(8192, 256, (Stack(8, 8, 4, 704),), head_dim=32, max_length=512),
    "125m": ModelConfig(32000, 576, (Stack(30, 9, 3, 1536),), head_dim=64, max_length=2048),
}
BOS, EOS = 1, 2


def rows_of(model: ModelConfig, count: int, length: int, seed: int) -> np.ndarray:
    """Documents of one row each: Zipf's law over the vocabulary."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(3, model.vocab_size)
    tokens = rng.choice(np.arange(3, model.vocab_size), (count, length + 1), p=share / share.sum())
    tokens[:, 0] = BOS
    return tokens.astype(np.int32)


def data(args: Any) -> tuple[ModelConfig, list[np.ndarray], np.ndarray]:
    model = NETWORKS[args.network]
    probes = [rows_of(model, 8, args.length, 10 + k) for k in range(args.probes)]
    return model, probes, rows_of(model, args.samples, args.length, 2)


def peak() -> int:
    """Most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def ours(args: Any, folder: Path) -> dict[str, Any]:
    from data_mixing import derivatives
    from mobilellm_jax.interop.stored import load_model
    from mobilellm_jax.parallel.mesh import local_mesh

    model, probes, sample = data(args)
    loaded = load_model(folder / "ours")
    network = derivatives.network_of(model, BOS, EOS, "float32", 1)
    of = derivatives.differentiated(
        loaded.params, network, args.layers, local_mesh(), args.rows, args.group
    )

    def score(rows: np.ndarray) -> np.ndarray:
        gradients = [derivatives.mean_gradient(of, probe) for probe in probes]
        directions = derivatives.datainf(of, gradients, rows[: args.train])
        found = list(derivatives.slopes(of, directions, rows, by_target=False))
        return np.concatenate(found).mean(-1)

    score(sample[: args.rows])  # compiles
    before, began = peak(), time.perf_counter()
    benefits = score(sample)
    seconds = time.perf_counter() - began
    return {"benefits": benefits.tolist(), "seconds": seconds, "bytes": peak() - before}


def theirs(args: Any, folder: Path) -> dict[str, Any]:
    import torch
    import transformers

    _, probes, sample = data(args)
    llama = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    # The two embeddings are one matrix; here they are two blocks.
    llama.lm_head.weight = torch.nn.Parameter(llama.lm_head.weight.detach().clone())
    chosen = dict(llama.named_parameters())
    if args.layers != "all":
        names = {"embedding": "model.embed_tokens.weight", "output": "lm_head.weight"}
        kept = {names[layer] for layer in args.layers.split("+")}
        for name, weight in chosen.items():
            weight.requires_grad_(name in kept)
        chosen = {name: weight for name, weight in chosen.items() if name in kept}

    def gradient(rows: np.ndarray) -> dict[str, torch.Tensor]:
        tokens = torch.tensor(rows, dtype=torch.long)
        logits = llama(tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        found = torch.autograd.grad(loss, list(chosen.values()))
        return dict(zip(chosen, found, strict=True))

    def score(rows: np.ndarray, train: int) -> np.ndarray:
        of_rows = {i: gradient(row[None]) for i, row in enumerate(rows)}
        of_train = {i: of_rows[i] for i in range(train)}
        directions = [inverse(args.datainf, of_train, {0: gradient(probe)}) for probe in probes]

        def dot(direction: dict[str, torch.Tensor], of: dict[str, torch.Tensor]) -> float:
            return sum(float((direction[n] * g).sum()) for n, g in of.items())

        return np.array([[dot(d, of) for d in directions] for of in of_rows.values()])

    score(sample[:4], 2)
    before, began = peak(), time.perf_counter()
    benefits = score(sample, args.train)
    seconds = time.perf_counter() - began
    return {"benefits": benefits.tolist(), "seconds": seconds, "bytes": peak() - before}


def inverse(checkout: str, train: dict, probe: dict) -> dict[str, Any]:
    """Gradients of the probe times DataInf's inverse, by the authors' code or by the formula."""
    if checkout:
        spec = importlib.util.spec_from_file_location("theirs", f"{checkout}/src/influence.py")
        module: Any = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
        engine = module.IFEngine()
        engine.preprocess_gradients(train, probe, [])
        engine.compute_hvp_proposed()
        return engine.hvp_dict["proposed"]
    found = {}
    for name, v in probe[0].items():
        damping = 0.1 * sum(float((g[name] ** 2).mean()) for g in train.values()) / len(train)
        total = 0 * v
        for g in train.values():
            own = g[name]
            total += (v - own * ((v * own).sum() / (damping + (own**2).sum()))) / damping
        found[name] = total / len(train)
    return found


WAYS = {"ours": ours, "pytorch": theirs}


def export(args: Any, folder: Path) -> None:
    import jax

    from mobilellm_jax.data.sentencepiece_tokenizer import train_tokenizer
    from mobilellm_jax.interop import huggingface
    from mobilellm_jax.leaves import flat
    from mobilellm_jax.model import transformer
    from mobilellm_jax.training.checkpoint import write_model

    model = NETWORKS[args.network]
    leaves = {k: np.asarray(v) for k, v in flat(transformer.init(model, jax.random.key(0))).items()}
    tokenizer = train_tokenizer([f"some text to learn {i}" for i in range(500)], 280)
    write_model(leaves, model, tokenizer, {}, folder / "ours")
    huggingface.export(leaves, model, tokenizer, folder / "hf")


def main(_: list[str]) -> None:
    args = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    if args.way:
        print(json.dumps(WAYS[args.way](args, Path(args.folder))))
        return
    lines = [
        ["samples", "ours, samples/s", "PyTorch", "ratio", "ours, MB", "PyTorch", "difference"]
    ]
    with tempfile.TemporaryDirectory() as folder:
        export(args, Path(folder))
        for samples in map(int, args.counts):
            both = []
            for way in WAYS:
                given = [f"--way={way}", f"--folder={folder}", f"--samples={samples}"]
                names = (
                    "network",
                    "probes",
                    "train",
                    "length",
                    "rows",
                    "group",
                    "layers",
                    "datainf",
                )
                given += [f"--{name}={getattr(args, name)}" for name in names]
                both.append(told("benchmarks.influence", *given))
            one, other = (np.array(found["benefits"]) for found in both)
            speeds = [samples / found["seconds"] for found in both]
            cells = [str(samples), *(f"{speed:.1f}" for speed in speeds)]
            cells += [f"{speeds[0] / speeds[1]:.2f}"]
            cells += [f"{found['bytes'] / 1e6:,.0f}" for found in both]
            lines.append([*cells, f"{np.abs(one - other).max() / np.abs(other).max():.1e}"])
    print(aligned(lines, ">" * len(lines[0])))


if __name__ == "__main__":
    flags.DEFINE_enum("network", "small", list(NETWORKS), "Its size.")
    flags.DEFINE_list("counts", ["64", "128", "256"], "Numbers of rows to score.")
    flags.DEFINE_integer("samples", 64, "Of --way, the number of rows.")
    flags.DEFINE_integer("probes", 3, "Probe sets: MobileLLM-R1 has three capabilities.")
    flags.DEFINE_integer("train", 32, "Rows that stand for the training data.")
    flags.DEFINE_integer("length", 128, "Targets of a row.")
    flags.DEFINE_integer("rows", 8, "Of ours: rows of one call.")
    flags.DEFINE_integer("group", 1, "Of ours: rows whose own gradients exist at once.")
    flags.DEFINE_string("layers", "embedding+output", "As data_mixing.influence has it.")
    flags.DEFINE_string("datainf", "", "Checkout of the authors' code.")
    flags.DEFINE_enum("way", None, list(WAYS), "Measure this one here.")
    flags.DEFINE_string("folder", "", "Where --way finds the network.")
    app.run(main)
