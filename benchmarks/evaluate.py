"""Our model of lm-evaluation-harness beside the harness's Hugging Face backend: equal answers, and speed.

    python -m benchmarks.evaluate --data=DIR --tokenizer=FILE --limit=100
    python -m benchmarks.evaluate --data=DIR --checkpoint=runs/smoke

DIR holds arc_easy, piqa, siqa, openbook_qa and gsm8k as .jsonl.gz (`evaluation/local_data.py`; gsm8k has
`context`). Without --checkpoint the network is of random weights, `--network` at full size. It is
exported, and each side answers the same requests in float32 in a process of its own: log-likelihoods
are compared one by one, then the greedy continuations of 100 prompts: wherever one of ours is not the
most likely token there, by how much, and whether that is a near tie.
"""

import dataclasses
import gzip
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks.children import told
from benchmarks.step import network
from mobilellm_jax.tables import aligned

TASKS = ("arc_easy", "piqa", "siqa", "openbook_qa")
PROMPTS, NEW_TOKENS = 100, 64
NEAR = 1e-3  # between logits, below which either token may be the most likely one


def prompts_of(data: Path) -> list[str]:
    """Questions as the harness's gsm8k asks them."""
    with gzip.open(data / "gsm8k.jsonl.gz", "rt", encoding="utf-8") as lines:
        asked = [json.loads(line)["context"] for line in lines]
    return [f"Question: {question}\nAnswer:" for question in asked[:PROMPTS]]


def answers(lm: Any, data: Path, limit: int, rows: int) -> dict[str, Any]:
    """Log-likelihoods, accuracies and the model's seconds; the first run of a task compiles."""
    import lm_eval

    from mobilellm_jax.evaluation.local_data import local_tasks

    found, seconds = {}, [0.0]
    tasks, computed = local_tasks(data), lm.loglikelihood

    def timed(*given: Any, **options: Any) -> Any:
        began = time.perf_counter()
        answer = computed(*given, **options)
        seconds[0] = time.perf_counter() - began
        return answer

    lm.loglikelihood = timed
    for name in TASKS:
        for _compiled in range(2):
            out: Any = lm_eval.simple_evaluate(
                lm, tasks=[tasks[name]], limit=limit, batch_size=rows, bootstrap_iters=0
            )
        scored = [r[0] for sample in out["samples"][name] for r in sample["resps"]]
        found[name] = {
            "scored": [[float(value), bool(greedy)] for value, greedy in scored],
            "acc": out["results"][name]["acc,none"],
            "acc_norm": out["results"][name]["acc_norm,none"],
            "seconds": seconds[0],
        }
    return found


def ours(folder: Path, data: Path, limit: int, rows: int) -> dict[str, Any]:
    from mobilellm_jax.decoding.decoder import row_seeds, stream
    from mobilellm_jax.decoding.sampling import GREEDY
    from mobilellm_jax.evaluation.harness import HarnessModel
    from mobilellm_jax.training.checkpoint import load_model

    loaded = load_model(folder / "ours")
    lm = HarnessModel(loaded.params, loaded.model, loaded.tokenizer, rows=rows)
    found = answers(lm, data, limit, rows)
    asked = [lm.tok_encode(prompt)[-(lm.max_length - NEW_TOKENS) :] for prompt in prompts_of(data)]
    drawn: list[list[int]] = []
    for at in range(0, len(asked), rows):
        part = asked[at : at + rows]
        tokens = stream(lm._decoder, part, NEW_TOKENS, GREEDY, row_seeds(0, len(part)))
        drawn += np.stack(list(tokens), axis=1).tolist()
    (folder / "drawn.json").write_text(json.dumps([asked, drawn]), encoding="utf-8")
    return found


def theirs(folder: Path, data: Path, limit: int, rows: int) -> dict[str, Any]:
    import torch
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(str(folder / "hf"), device="cpu", dtype="float32", batch_size=rows)
    found = answers(lm, data, limit, rows)
    asked, drawn = json.loads((folder / "drawn.json").read_text(encoding="utf-8"))
    same, near, worst = 0, 0, 0.0
    with torch.no_grad():
        for prompt, tokens in zip(asked, drawn, strict=True):
            logits_TV = lm.model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
            ours_T = logits_TV[torch.arange(len(tokens)), torch.tensor(tokens)]
            gaps_T = logits_TV.max(-1).values - ours_T
            worst = max(worst, float(gaps_T.max()))
            same += bool((gaps_T == 0).all())
            near += int(((gaps_T > 0) & (gaps_T < NEAR)).sum())
    return {**found, "greedy": {"same": same, "near": near, "worst": worst}}


WAYS = {"ours": ours, "hugging face": theirs}


def export(folder: Path) -> None:
    """The network as a checkpoint of ours, and for Hugging Face."""
    import jax

    from mobilellm_jax.data.tokenizers import Tokenizer
    from mobilellm_jax.interop import huggingface
    from mobilellm_jax.leaves import flat
    from mobilellm_jax.model import transformer
    from mobilellm_jax.training.checkpoint import load_model, write_model

    args = flags.FLAGS
    if args.checkpoint:
        loaded = load_model(args.checkpoint)
        params, model, tokenizer = loaded.params, loaded.model, loaded.tokenizer
    else:
        tokenizer, model = Tokenizer.load(args.tokenizer), network(args.network)
        model = dataclasses.replace(model, vocab_size=max(model.vocab_size, tokenizer.vocab_size))
        params = jax.jit(lambda: transformer.init(model, jax.random.key(0)))()
    leaves = {name: np.asarray(leaf) for name, leaf in flat(params).items()}
    write_model(leaves, model, tokenizer, {}, folder / "ours")
    huggingface.export(leaves, model, tokenizer, folder / "hf")


def main(_: list[str]) -> None:
    args = flags.FLAGS
    data = Path(args.data).resolve()
    if args.way:
        found = WAYS[args.way](Path(args.folder), data, args.limit, args.rows)
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as folder:
        export(Path(folder))
        both = {}
        for way in WAYS:
            given = f"--folder={folder}", f"--data={data}", f"--limit={args.limit}"
            both[way] = told("benchmarks.evaluate", f"--way={way}", *given, f"--rows={args.rows}")
    a, b = both.values()
    lines = [["task", "requests", "largest difference", "greedy", "acc", "acc_norm", "seconds"]]
    lines[0] += ["theirs", "theirs / ours"]
    for name in TASKS:
        one, other = (np.array(found[name]["scored"]) for found in (a, b))
        cells = [name, str(len(one)), f"{np.abs(one[:, 0] - other[:, 0]).max():.1e}"]
        cells.append("equal" if (one[:, 1] == other[:, 1]).all() else "DIFFER")
        for metric in ("acc", "acc_norm"):
            values = a[name][metric], b[name][metric]
            cells.append(f"{values[0]:.4f} " + ("equal" if values[0] == values[1] else "DIFFER"))
        seconds = a[name]["seconds"], b[name]["seconds"]
        cells += [f"{s:.1f}" for s in seconds]
        lines.append([*cells, f"{seconds[1] / seconds[0]:.2f}"])
    print(aligned(lines, "<>>>>>>>>"))
    greedy = b["greedy"]
    print(
        f"greedy: {greedy['same']} of {PROMPTS} continuations of {NEW_TOKENS} tokens are the most "
        f"likely one in Hugging Face as well, token by token; near ties {greedy['near']}, largest gap "
        f"of a token of ours {greedy['worst']:.1e}"
    )


if __name__ == "__main__":
    flags.DEFINE_string("data", None, "Folder with the questions.", required=True)
    flags.DEFINE_string("tokenizer", "", "Of the random network.")
    flags.DEFINE_string("network", "125m", "As `benchmarks.step` names it.")
    flags.DEFINE_string("checkpoint", "", "A network of ours instead of the random one.")
    flags.DEFINE_integer("limit", 100, "Questions of each task.", 1)
    flags.DEFINE_integer("rows", 16, "Requests that are computed together.", 1)
    flags.DEFINE_enum("way", None, list(WAYS), "Measure this one here.")
    flags.DEFINE_string("folder", "", "Where --way finds the network.")
    app.run(main)
