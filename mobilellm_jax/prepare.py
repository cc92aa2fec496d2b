"""Raw text to rows of tokens: tokenizer, sources and the plan that training reads.

    python -m mobilellm_jax.prepare --embedded --out=DIR
    python -m mobilellm_jax.prepare --source=web='crawl/*.parquet' --source=code='**/*.py' --out=DIR

writes the tokenizer (DIR/tokenizer.model, or tokenizer.json where such a one is given), one
directory of rows per source (a TFDS dataset in ArrayRecord) and DIR/mixture.json, which names them
with their weights. Files of JSON lines (.jsonl, .jsonl.gz),
Parquet and plain text (one document a file) are read; nothing has to fit into memory.

Run again with the same options, it keeps what is complete and goes on where it was interrupted. It
never overwrites: what was made with other options is refused, and a plan that gets new weights is
kept beside.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath

import mobilellm_jax
from mobilellm_jax import cli
from mobilellm_jax.data import plan as plans
from mobilellm_jax.data import rows
from mobilellm_jax.data.corpora import Corpus, FileCorpus
from mobilellm_jax.data.embedded import embedded_corpora
from mobilellm_jax.data.encoding import Encoder, packed
from mobilellm_jax.data.packing import PACKERS
from mobilellm_jax.data.sentencepiece_tokenizer import train_tokenizer
from mobilellm_jax.data.tokenizers import Tokenizer, file_of
from mobilellm_jax.errors import UserError
from mobilellm_jax.tables import aligned

SAMPLE = 64 << 20  # bytes of text that a tokenizer is trained on


def prepare(
    corpora: Sequence[Corpus],
    out: epath.PathLike,
    row_length: int,
    *,
    vocab_size: int = 32_000,
    tokenizer: epath.PathLike | None = None,
    packing: str = "concat",
    weights: Mapping[str, float] | None = None,
    seed: int | None = None,
    workers: int | None = None,
) -> plans.Plan:
    """Tokenizes, packs and stores corpora and writes the plan over them.

    Args:
      corpora: what to read; their names become those of the sources.
      out: directory that gets the tokenizer, the sources and mixture.json.
      row_length: targets per row; a row holds one token more.
      vocab_size: pieces of the tokenizer to train; ignored if `tokenizer` is given.
      tokenizer: what to use instead of a trained one; see `Tokenizer.load`.
      packing: `concat` or `best_fit`, see `data/packing.py`.
      weights: share of every source in the mixture; in proportion to its training tokens by
        default. A source of weight 0 is prepared and left out of the plan.
      seed: order of the rows in the mixture, 0 in a new plan.
      workers: processes that tokenize; the result does not depend on it.

    Returns:
      The plan, as DIR/mixture.json has it.

    Raises:
      UserError: bad input, or `out` holds something made with other settings.
    """
    out = epath.Path(out)
    names = [corpus.name for corpus in corpora]
    _check_request(names, row_length, packing, weights)
    inputs = {corpus.name: corpus.fingerprint for corpus in corpora}
    out.mkdir(parents=True, exist_ok=True)
    model = _tokenizer(corpora, inputs, out, vocab_size, tokenizer)
    settings = {
        name: {
            "row_length": row_length,
            "packing": packing,
            "tokenizer": model.fingerprint,
            "inputs": inputs[name],
        }
        for name in names
    }
    complete = {name for name in names if _is_complete(out / name, settings[name])}
    existing = _existing_plan(out, row_length, model)
    with Encoder(workers or os.cpu_count() or 1, out / model.FILE) as encoder:
        for corpus in corpora:
            if corpus.name in complete:
                print(f"{corpus.name}: complete, kept as it is.", flush=True)
                continue
            info = rows.SourceInfo(
                name=corpus.name,
                path="",
                row_length=row_length,
                vocab_size=model.vocab_size,
                bos_id=model.bos_id,
                tokenizer=model.fingerprint,
                packing=packing,
                splits={},
            )
            batches = packed(corpus, encoder, model, row_length, packing)
            rows.write_source(out / corpus.name, info, settings[corpus.name], batches)
    infos = [rows.read_info(out / name) for name in names]
    print(_table(infos), flush=True)
    return _write_plan(out, infos, model, row_length, weights, seed, existing)


def parse_weights(text: str) -> dict[str, float]:
    """`code=0.5,prose=0.5` as a dictionary.

    Raises:
      UserError: it is not of that form.
    """
    weights = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        try:
            weights[name.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals or name.strip() == "":
            raise UserError(f"--weights={text}: {part!r} is not of the form name=number.")
    return weights


# What is asked for, and what is there already.


def _check_request(
    names: Sequence[str], row_length: int, packing: str, weights: Mapping[str, float] | None
) -> None:
    if not names:
        raise UserError("there is nothing to prepare: give --embedded or --source=name=PATTERN.")
    for name in names:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise UserError(f"a source cannot be called {name!r}: use a-z, digits and underscores.")
    if len(set(names)) < len(names):
        raise UserError(f"two sources have one name: {', '.join(names)}.")
    if row_length < 2:
        raise UserError(f"row_length must be at least 2, not {row_length}.")
    if packing not in PACKERS:
        raise UserError(f"packing is {' or '.join(PACKERS)}, not {packing!r}.")
    if weights is None:
        return
    if set(weights) != set(names):
        raise UserError(
            f"weights are given for {', '.join(weights)} but the sources are {', '.join(names)}: "
            "give every source a weight (0 leaves it out of the mixture)."
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights.values()):
        raise UserError("a weight is a number that is not negative.")
    total = math.fsum(weights.values())
    if abs(total - 1) > plans.TOLERANCE:
        raise UserError(
            f"the weights sum to {total:.6g}, not to 1: mend them so that the sum is 1."
        )
    if abs(total - 1) > 1e-9:
        print(f"the weights sum to {total:.6g}; they are renormalised to 1.", flush=True)


def _tokenizer(
    corpora: Sequence[Corpus],
    inputs: Mapping[str, Any],
    out: epath.Path,
    vocab_size: int,
    path: epath.PathLike | None,
) -> Tokenizer:
    """The tokenizer of `out`: the one that is there, if it is what is asked for, or else a new one.

    Its settings are written before it, so that a model without the right settings is never ours.
    """
    settings_path = out / "tokenizer.settings.json"
    given = Tokenizer.load(path) if path else None
    if given:
        settings: dict[str, Any] = {"model": given.fingerprint}
        if given.chat_template is not None:
            settings["chat_template"] = given.chat_template
    else:
        settings = {"vocab_size": vocab_size, "inputs": dict(inputs)}
    if there := file_of(out):
        tokenizer = Tokenizer.load(there)
        if given == tokenizer:
            return tokenizer
        if not settings_path.exists() or json.loads(settings_path.read_text()) != settings:
            raise UserError(
                f"{there} was made with other settings or from other text: to use it as it is, "
                f"give --tokenizer={there}; else prepare into another directory."
            )
        print("tokenizer: complete, kept as it is.", flush=True)
        return tokenizer
    start = time.monotonic()
    if given:
        tokenizer = given
    else:
        print(f"tokenizer: training {vocab_size} pieces ...", file=sys.stderr, flush=True)
        texts = (text for corpus in corpora for text in corpus.sample(SAMPLE // len(corpora)))
        tokenizer = train_tokenizer(texts, vocab_size)
    settings_path.write_text(json.dumps(settings, indent=2) + "\n")
    tokenizer.write(out)
    seconds = time.monotonic() - start
    print(
        f"tokenizer: {tokenizer.vocab_size} pieces in {seconds:.1f} s.", file=sys.stderr, flush=True
    )
    return tokenizer


def _is_complete(path: epath.Path, settings: Mapping[str, Any]) -> bool:
    if not rows.is_complete(path):
        return False
    theirs = rows.read_settings(path)
    other = [key for key in settings if theirs.get(key) != settings[key]]
    if other:
        told = [
            f"{key} {theirs.get(key)} instead of {settings[key]}"
            if key in ("row_length", "packing")
            else {"tokenizer": "another tokenizer", "inputs": "other input"}[key]
            for key in other
        ]
        raise UserError(
            f"the source {path} was made with {' and '.join(told)}: delete it, or prepare into "
            "another directory."
        )
    return True


def _existing_plan(out: epath.Path, row_length: int, tokenizer: Tokenizer) -> plans.Plan | None:
    path = out / "mixture.json"
    if not path.exists():
        return None
    plan = plans.Plan.load(path)
    if (plan.row_length, plan.tokenizer) != (row_length, tokenizer.fingerprint):
        raise UserError(
            f"{path} is the plan of rows of another length or tokenizer: delete it, or prepare "
            "into another directory."
        )
    return plan


# The result.


def _table(infos: Sequence[rows.SourceInfo]) -> str:
    lines: list[tuple[str, ...]] = [
        ("source", "split", "documents", "bytes", "tokens", "rows", "bytes/token")
    ]
    for info in infos:
        for split, n in info.splits.items():
            counts = (f"{x:,}" for x in (n.documents, n.bytes, n.tokens, n.rows))
            lines.append((info.name, split, *counts, f"{n.bytes / n.tokens:.2f}"))
    return aligned(lines, "<<>>>>>")


def _write_plan(
    out: epath.Path,
    infos: Sequence[rows.SourceInfo],
    tokenizer: Tokenizer,
    row_length: int,
    weights: Mapping[str, float] | None,
    seed: int | None,
    existing: plans.Plan | None,
) -> plans.Plan:
    """Writes mixture.json; one that is there gives way only to what is asked for, and is kept."""
    shares = weights or {info.name: float(info.splits["train"].tokens) for info in infos}
    total = math.fsum(shares.values())
    plan = plans.Plan(
        sources=tuple(
            plans.PlanSource(info.name, info.name, shares[info.name] / total)
            for info in infos
            if shares[info.name] > 0
        ),
        row_length=row_length,
        tokenizer_path=tokenizer.FILE,
        tokenizer=tokenizer.fingerprint,
        seed=seed or 0,
        provenance={
            "written_by": f"mobilellm_jax.prepare {mobilellm_jax.__version__}",
            "weights": "given" if weights else "in proportion to training tokens",
        },
        directory=str(out),
    )
    path = out / "mixture.json"
    if existing and existing.hash == plan.hash:
        return existing
    if existing and weights is None and seed in (None, existing.seed):
        print(
            f"{path}: kept as it is ({_shares(existing)}); give --weights to replace it.",
            flush=True,
        )
        return existing
    if existing:
        kept = out / f"mixture.{existing.hash[:8]}.json"
        existing.save(kept)
        print(f"{path}: replaced; the plan that was there is now {kept.name}.", flush=True)
    half = out / "mixture.json.incomplete"
    plan.save(half)
    half.replace(path)
    print(f"{path}: {_shares(plan)}", flush=True)
    return plan


def _shares(plan: plans.Plan) -> str:
    return ", ".join(f"{source.name} {source.weight:.4g}" for source in plan.sources)


def main() -> None:
    """The command line around `prepare`."""
    args = flags.FLAGS
    corpora: list[Corpus] = list(embedded_corpora(args.seed or 0)) if args.embedded else []
    for source in args.source:
        name, equals, pattern = source.partition("=")
        if not equals:
            raise UserError(f"--source={source} is not of the form name=PATTERN.")
        corpora.append(FileCorpus(name, pattern, args.text_key, args.heldout))
    prepare(
        corpora,
        args.out,
        args.row_length,
        vocab_size=args.vocab_size,
        tokenizer=args.tokenizer,
        packing=args.packing,
        weights=parse_weights(args.weights) if args.weights else None,
        seed=args.seed,
        workers=args.workers,
    )


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Directory to write into.", required=True)
    flags.DEFINE_bool("embedded", False, "Take code, prose and math from this Python installation.")
    flags.DEFINE_multi_string("source", [], "A source of your own: name=PATTERN. May be repeated.")
    flags.DEFINE_string("text_key", "text", "Field of JSON lines, column of Parquet files.")
    flags.DEFINE_float(
        "heldout", 0.01, "Share of the documents of --source kept out of training.", 0.0, 0.5
    )
    flags.DEFINE_integer("row_length", 2048, "Targets per row: the length of context in training.")
    flags.DEFINE_integer("vocab_size", 32_000, "Pieces of the tokenizer that is trained.")
    flags.DEFINE_string(
        "tokenizer", None, "A .model of SentencePiece, a tokenizer.json, or a folder with one."
    )
    flags.DEFINE_enum("packing", "concat", list(PACKERS), "How documents fill rows.")
    flags.DEFINE_string(
        "weights", None, "Shares in the mixture, a=0.7,b=0.3; default: by training tokens."
    )
    flags.DEFINE_integer(
        "seed", None, "Order of the rows and, with --embedded, the arithmetic; default 0."
    )
    flags.DEFINE_integer("workers", None, "Processes that tokenize; default: one per core.", 1)
    cli.run(main)
