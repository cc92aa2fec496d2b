r"""Judges a checkpoint by tasks of lm-evaluation-harness (extra `[eval]`), or by a suite of them.

    python -m mobilellm_jax.evaluate --checkpoint=runs/mine --tasks=commonsense --out=runs/mine/evaluation
    python -m mobilellm_jax.evaluate --checkpoint=runs/mine --tasks=arc_easy,piqa --data=eval --limit=200
    python -m mobilellm_jax.evaluate --checkpoint=runs/mine --tasks=rank_me --stores=data/mixture.json
    python -m mobilellm_jax.evaluate --server=http://localhost:8080/v1 --server_model=mine --tasks=r1_final

A suite is commonsense (the eight tasks of the papers and their average), mobilellm, adapt_pruner,
efficientllm, r1_base or r1_final, each with the papers' shots; any other name is a task or group of
the harness, a file of questions, problems or dialogues in --data (`evaluation/local_data.py` says
which), or one of ours: wikitext2 (perplexity as MobileLLM's own program measures it) and rank_me
(effective rank of the output embedding). --stores gives bits per byte of the held-out rows of row
stores. A table is printed, in Markdown, with standard errors and beside the published row of that
size; --out keeps it with the harness's results in JSON. --cache=FILE keeps each answer, so that a
killed evaluation goes on. --quantize=w8a8 rounds weights and activations to 8 bits, as MobileLLM's
table 15 does. All devices of this machine share the work. Where a server that runs an export writes
the answers, only tasks that are answered in text can be asked.
"""

import dataclasses
import functools
import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from mobilellm_jax import cli
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.perplexity import (
    heldout_sources,
    store_lines,
    wikitext,
    window_perplexity,
)
from mobilellm_jax.evaluation.scores import known
from mobilellm_jax.evaluation.server_flags import define_server, named_server
from mobilellm_jax.evaluation.suites import Line
from mobilellm_jax.evaluation.table import table
from mobilellm_jax.interop.stored import load_model
from mobilellm_jax.parallel.compiled import keep_compiled
from mobilellm_jax.parallel.mesh import local_mesh
from mobilellm_jax.training.checkpoint import LoadedModel
from mobilellm_jax.training.evaluation import rank_me

WIKITEXT2, RANK_ME = "wikitext2", "rank_me"


def evaluate(
    subject: LoadedModel | Callable[[], Any] | Any,
    names: Sequence[str],
    *,
    data: Path | None = None,
    stores: Sequence[str] = (),
    limit: int | None = None,
    shots: int | None = None,
    samples: int | None = None,
    rows: int = 32,
    dtype: str = "float32",
    cache: str = "",
    seed: int = 0,
    chat: bool = False,
    allow_code: bool = False,
    log: bool = False,
) -> tuple[list[Line], dict[str, Any]]:
    """Runs tasks, suites and measures.

    Args:
      subject: a checkpoint, or a model of the harness (`evaluation/served.py`); or what gives one of
        them, called when all that is asked is there.
      names: see `evaluation.tasks.open_tasks`; also `wikitext2` and `rank_me`.
      data: folder with data sets in local files.
      stores: row stores whose held-out rows are measured: plans, or folders of sources.
      limit: documents of each task, and rows of each source; None: all.
      shots: examples before each question; None: what suite or task say.
      samples: answers to each problem that may have several; None: what suite or task say.
      rows: texts that a device computes together.
      dtype: of activations and products.
      cache: file of answers that are not computed again; none if empty.
      seed: of examples and draws.
      chat: ask through the tokenizer's chat template, also where the suite does not say so.
      allow_code: tasks may run what the network writes, in the sandbox.
      log: keep what was asked and answered.

    Returns:
      lines of the table, and the harness's results.

    Raises:
      UserError: the harness is not installed, a task does not exist, its data cannot be had, it
        would run code and may not, or a measure needs a checkpoint.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "evaluation needs lm-evaluation-harness: pip install 'mobilellm-jax[eval]'."
        )
    from mobilellm_jax.evaluation.harness import HarnessModel
    from mobilellm_jax.evaluation.tasks import ask, open_tasks

    measures = [name for name in (WIKITEXT2, RANK_ME) if name in names]
    tasks = open_tasks(
        [name for name in names if name not in measures], data, shots, chat, samples, allow_code
    )
    text = wikitext(data) if WIKITEXT2 in measures else ""
    sources = [source for store in stores for source in heldout_sources(store)]
    if callable(subject):
        subject = subject()
    if not isinstance(subject, LoadedModel):
        if measures or stores:
            raise UserError(f"{', '.join([*measures, *stores])}: these need --checkpoint.")
        return ask(tasks, subject, limit, cache, seed, log)
    mesh = local_mesh()
    own = subject.params, subject.model, subject.tokenizer
    lm = HarnessModel(*own, dtype, rows, seed, mesh, bos=subject.begins_with_bos)
    lines, results = ask(tasks, lm, limit, cache, seed, log)
    if text:
        lines.append(window_perplexity(*own, text, dtype, mesh))
    if sources:
        lines += store_lines(*own, sources, limit, dtype, mesh)
    if RANK_ME in measures:
        rank = rank_me(subject.params, subject.model)
        lines.append(Line("output embedding", 0, "RankMe", rank, math.nan))
    results["cut"] = dict(lm.counts)
    return lines, results


def main() -> None:
    """See the module."""
    keep_compiled()
    args = flags.FLAGS
    out = Path(args.out) if args.out else None
    if out is not None and (out.is_file() or (out / "results.json").exists()):
        raise UserError(f"--out={out} is a file or holds results already: name another folder.")
    if bool(args.checkpoint) == bool(args.server):
        raise UserError("name either --checkpoint or --server: whose answers are to be judged?")
    tasks = [name for name in args.tasks if name]
    if not tasks and not args.stores:
        raise UserError("nothing is asked: name --tasks, or --stores.")
    if args.log_samples and out is None:
        raise UserError("--log_samples needs --out, where the samples are kept.")
    lines, results = evaluate(
        _served() if args.server else _loaded,
        tasks,
        data=Path(args.data) if args.data else None,
        stores=args.stores,
        limit=args.limit,
        shots=args.shots,
        samples=args.samples,
        rows=args.rows,
        dtype=args.dtype,
        cache=args.cache,
        seed=args.seed,
        chat=args.chat,
        allow_code=args.allow_code,
        log=args.log_samples,
    )
    text = table(lines, None if args.server else _loaded().model)
    print(text)
    for what, count in results.get("cut", {}).items():
        if count:
            print(f"{what} to fit the context: {count:,}")
    if out is not None:
        _keep(out, text, lines, results)


def _keep(out: Path, text: str, lines: Sequence[Line], results: dict[str, Any]) -> None:
    """Writes what was found, samples apart from figures."""
    args = flags.FLAGS
    out.mkdir(parents=True, exist_ok=True)
    for found in results.values():
        for name, samples in found.pop("samples", {}).items():
            rows = (json.dumps(sample, default=str, ensure_ascii=False) for sample in samples)
            (out / f"samples_{name}.jsonl").write_text(
                "".join(f"{row}\n" for row in rows), encoding="utf-8"
            )
    described = {
        "subject": args.checkpoint or f"{args.server_model} at {args.server}",
        "seed": args.seed,
        "limit": args.limit,
        "lines": [dataclasses.asdict(line) for line in lines],
        "harness": results,
    }
    (out / "results.md").write_text(text + "\n", encoding="utf-8")
    (out / "results.json").write_text(
        json.dumps(known(described), indent=2, default=str) + "\n", encoding="utf-8"
    )


@functools.cache  # it is judged, and described in the table
def _loaded() -> LoadedModel:
    """The checkpoint that the flags name, with numbers of 8 bits if they say so."""
    args = flags.FLAGS
    loaded = load_model(args.checkpoint)
    if args.quantize is None:
        return loaded
    model = dataclasses.replace(loaded.model, quantization=args.quantize)
    return dataclasses.replace(loaded, model=model)


def _served() -> Any:
    """The model on the server that the flags name."""
    from mobilellm_jax.evaluation.served import ServedModel

    args = flags.FLAGS
    if not args.server_model:
        raise UserError("--server needs --server_model, the model's name on the server.")
    return ServedModel(named_server("server"), seed=args.seed)


if __name__ == "__main__":
    flags.DEFINE_string("checkpoint", "", "A workdir, a checkpoint or a Hugging Face folder.")
    define_server("server", "Instead: an OpenAI-compatible server, as http://host:8080/v1.")
    flags.DEFINE_integer("workers", 8, "Answers that the server works on at a time.", 1)
    flags.DEFINE_list("tasks", ["commonsense"], "Suites, tasks of the harness, measures.")
    flags.DEFINE_list(
        "stores", [], "Row stores to measure too: mixture.json, or a source's folder."
    )
    flags.DEFINE_string("data", "", "Folder with data sets in local files.")
    flags.DEFINE_string("out", "", "Folder for results.md and results.json.")
    flags.DEFINE_integer("limit", None, "Documents of each task; all unless given.", 1)
    flags.DEFINE_integer("shots", None, "Examples before each question, for all tasks.", 0)
    flags.DEFINE_integer("samples", None, "Answers to each problem that may have several.", 1)
    flags.DEFINE_integer("rows", 32, "Texts that a device computes together.", 1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and activations.")
    flags.DEFINE_string(
        "quantize",
        None,
        "none, w8a8, or w8a8:PARTS of blocks, head, embedding, joined by +; as the checkpoint has it unless "
        "given.",
    )
    flags.DEFINE_string("cache", "", "File that keeps answers, for one checkpoint.")
    flags.DEFINE_integer("seed", 0, "Seed of examples and draws.", 0)
    flags.DEFINE_bool("chat", False, "Ask through the tokenizer's chat template.")
    flags.DEFINE_bool("allow_code", False, "Run programs that the network writes, in a sandbox.")
    flags.DEFINE_bool("log_samples", False, "Keep what was asked and answered, in --out.")
    cli.run(main)
