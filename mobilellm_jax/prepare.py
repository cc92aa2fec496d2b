"""Raw text to rows of tokens: tokenizer, sources and the plan that training reads.

    python -m mobilellm_jax.prepare --embedded --out=DIR
    python -m mobilellm_jax.prepare --source=web='crawl/*.parquet' --source=code='**/*.py' --out=DIR
    python -m mobilellm_jax.prepare --chat=tulu='tulu/*.parquet' --tokenizer=llama3/ --out=DIR

writes the tokenizer (DIR/tokenizer.model, or tokenizer.json where such a one is given), one
directory of rows per source (a TFDS dataset in ArrayRecord, with a record of which documents its
rows hold) and DIR/mixture.json, which names them with their weights. Files of JSON lines (.jsonl,
.jsonl.gz, .jsonl.zst), Parquet and plain text (one document a file) and TFDS datasets are read;
nothing has to fit into memory. --chat reads conversations, of which only what the assistant says is
trained on. docs/preparing.md tells of them, of large corpora and of clusters.

Run again with the same options, it keeps what is complete and goes on where it was interrupted. It
never overwrites: what was made with other options is refused, and a plan that gets new weights is
kept beside.
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from etils import epath

import mobilellm_jax
from mobilellm_jax import cli
from mobilellm_jax.data import on_beam, parts, rows
from mobilellm_jax.data import plan as plans
from mobilellm_jax.data.chat import (
    ConversationEncoder,
    EncodeChats,
    markers,
    read_template,
    shipped_templates,
)
from mobilellm_jax.data.chat_corpus import NO_ASSISTANT, TOO_LONG, ChatCorpus
from mobilellm_jax.data.corpora import Corpus
from mobilellm_jax.data.encoding import Encode, Workers, encode_texts
from mobilellm_jax.data.packing import TEXT_PACKERS
from mobilellm_jax.data.sentencepiece_tokenizer import train_tokenizer
from mobilellm_jax.data.shards import SourceWriter
from mobilellm_jax.data.source_flags import (
    check_names,
    define_sources,
    named,
    named_corpora,
    parse_share,
)
from mobilellm_jax.data.tokenizers import Tokenizer, file_of
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import record_of
from mobilellm_jax.tables import aligned

SAMPLE = 64 << 20  # bytes of text that a tokenizer is trained on


def prepare(
    corpora: Sequence[Corpus],
    out: epath.PathLike,
    row_length: int,
    *,
    vocab_size: int = 32_000,
    tokenizer: epath.PathLike | None = None,
    chat_template: str | None = None,
    packing: str = "concat",
    weights: Mapping[str, float] | None = None,
    seed: int | None = None,
    workers: int | None = None,
    beam: Sequence[str] | None = None,
) -> plans.Plan:
    """Tokenizes, packs and stores corpora and writes the plan over them.

    Args:
      corpora: what to read; their names become those of the sources.
      out: directory that gets the tokenizer, the sources and mixture.json.
      row_length: targets per row; a row holds one token more.
      vocab_size: pieces of the tokenizer to train; ignored if `tokenizer` is given.
      tokenizer: what to use instead of a trained one; see `Tokenizer.load`.
      chat_template: what the tokenizer gets instead of the one it has, if any; Jinja. A tokenizer that
        is trained gets the special tokens that it spells.
      packing: `concat` or `best_fit`, see `data/packing.py`; conversations are always packed whole.
      weights: share of every source in the mixture; in proportion to its training tokens by
        default. A source of weight 0 is prepared and left out of the plan.
      seed: order of the rows in the mixture, 0 in a new plan.
      workers: processes on this machine; the result does not depend on it.
      beam: options of an Apache Beam pipeline that does the work instead, see `data/on_beam.py`.

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
    model = _tokenizer(corpora, inputs, out, vocab_size, tokenizer, chat_template)
    _tell_of_losses(model)
    chats = {corpus.name: corpus for corpus in corpora if isinstance(corpus, ChatCorpus)}
    settings = {
        name: {
            "row_length": row_length,
            "packing": "whole" if name in chats else packing,
            "tokenizer": model.fingerprint,
            "inputs": inputs[name],
            **({"chat_template": _template_hash(model)} if name in chats else {}),
        }
        for name in names
    }
    complete = {name for name in names if _is_complete(out / name, settings[name])}
    _existing_plan(out, model)  # is told of now, not when all is prepared
    writers = {}
    for name in names:
        if name in complete:
            print(f"{name}: complete, kept as it is.", flush=True)
            continue
        info = rows.SourceInfo(
            name=name,
            path="",
            row_length=row_length,
            vocab_size=model.vocab_size,
            bos_id=model.bos_id,
            tokenizer=model.fingerprint,
            packing="whole" if name in chats else packing,
            splits={},
            kind="chat" if name in chats else "text",
        )
        writers[name] = SourceWriter(str(out / name), info, settings[name])
    encode: dict[str, Encode] = {
        name: EncodeChats(row_length, chat.too_long == "drop", chat.no_assistant == "keep")
        for name, chat in chats.items()
    }
    jobs = {
        corpus.name: parts.jobs_of(
            corpus,
            writers[corpus.name],
            str(out / model.FILE),
            encode.get(corpus.name, encode_texts),
        )
        for corpus in corpora
        if corpus.name in writers
    }
    with contextlib.ExitStack() as held:
        for writer in writers.values():
            held.enter_context(writer.alone())
            writer.begin()
        if beam is not None:
            on_beam.prepare_parts([job for some in jobs.values() for job in some], beam)
        processes = held.enter_context(Workers(workers or os.cpu_count() or 1))
        for name, writer in writers.items():
            if beam is None:
                parts.prepare_parts(name, jobs[name], processes)
            writer.commit(len(jobs[name]))
    infos = [rows.read_info(out / name) for name in names]
    print(_table(infos), flush=True)
    for info in infos:
        if info.notes:
            told = ", ".join(f"{count:,} {note}" for note, count in info.notes.items())
            print(f"{info.name}: of its conversations, {told}.", flush=True)
    # Read only now: another preparation into this directory may have ended meanwhile.
    return _write_plan(out, infos, model, weights, seed, _existing_plan(out, model))


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
        raise UserError(
            "there is nothing to prepare: give --embedded, --source=name=PATTERN or --chat=name=PATTERN."
        )
    check_names(names)
    if row_length < 2:
        raise UserError(f"row_length must be at least 2, not {row_length}.")
    if packing not in TEXT_PACKERS:
        raise UserError(f"packing is {' or '.join(TEXT_PACKERS)}, not {packing!r}.")
    if weights is None:
        return
    if set(weights) != set(names):
        raise UserError(
            f"weights are given for {', '.join(weights)} but the sources are {', '.join(names)}: "
            "give every source a weight (0 leaves it out of the mixture)."
        )
    plans.normalised(weights, "the weights")


def _tokenizer(
    corpora: Sequence[Corpus],
    inputs: Mapping[str, Any],
    out: epath.Path,
    vocab_size: int,
    path: epath.PathLike | None,
    chat_template: str | None,
) -> Tokenizer:
    """The tokenizer of `out`: the one that is there, if it is what is asked for, or else a new one.

    Its settings are written before it, so that a model without the right settings is never ours.
    """
    settings_path = out / "tokenizer.settings.json"
    given = Tokenizer.load(path) if path else None
    settings: dict[str, Any]
    if given:
        given = dataclasses.replace(given, chat_template=chat_template or given.chat_template)
        chat_template, settings = given.chat_template, {"model": given.fingerprint}
    else:
        settings = {"vocab_size": vocab_size, "inputs": dict(inputs)}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    if there := file_of(out):
        tokenizer = Tokenizer.load(there)
        if given == tokenizer:
            return tokenizer
        if not settings_path.exists() or record_of(settings_path) != settings:
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
        tokenizer = train_tokenizer(texts, vocab_size, markers(chat_template or ""))
        tokenizer = dataclasses.replace(tokenizer, chat_template=chat_template)
    if any(isinstance(corpus, ChatCorpus) for corpus in corpora):
        ConversationEncoder(tokenizer)  # before it is stored without the template that they need
    settings_path.write_text(json.dumps(settings, indent=2) + "\n")
    tokenizer.write(out)
    seconds = time.monotonic() - start
    print(
        f"tokenizer: {tokenizer.vocab_size} pieces in {seconds:.1f} s.", file=sys.stderr, flush=True
    )
    return tokenizer


def _tell_of_losses(tokenizer: Tokenizer) -> None:
    """Says so where a tokenizer of someone else's does not give texts such as code back."""
    text = "if x:\n\treturn  {}"
    if (back := tokenizer.decode(tokenizer.encode(text))) != text:
        print(f"tokenizer: it loses text, {text!r} comes back as {back!r}.", flush=True)


def _template_hash(tokenizer: Tokenizer) -> str:
    """Of the chat template, after a look at it, for prepared conversations."""
    if not ConversationEncoder(tokenizer).turn_ends:
        print(
            "chat template: it ends a turn of the assistant with letters, for the tokenizer has no such "
            "token, and nothing will end what the network says. Train the tokenizer with this "
            "--chat_template, or take --chat_template=plain, which ends turns with EOS.",
            flush=True,
        )
    return tokenizer.template_fingerprint


def _is_complete(path: epath.Path, settings: Mapping[str, Any]) -> bool:
    if not rows.is_complete(path):
        return False
    theirs = rows.read_settings(path)
    other = [key for key in settings if theirs.get(key) != settings[key]]
    if other:
        told = [
            f"{key} {theirs.get(key)} instead of {settings[key]}"
            if key in ("row_length", "packing")
            else {"tokenizer": "another tokenizer", "inputs": "other input"}.get(
                key, "another chat template"
            )
            for key in other
        ]
        raise UserError(
            f"the source {path} was made with {' and '.join(told)}: delete it, or prepare into "
            "another directory."
        )
    return True


def _existing_plan(out: epath.Path, tokenizer: Tokenizer) -> plans.Plan | None:
    path = out / "mixture.json"
    if not path.exists():
        return None
    plan = plans.Plan.load(path)
    if plan.tokenizer != tokenizer.fingerprint:
        raise UserError(
            f"{path} is the plan of rows of another tokenizer: delete it, or prepare into another "
            "directory."
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
    weights: Mapping[str, float] | None,
    seed: int | None,
    existing: plans.Plan | None,
) -> plans.Plan:
    """Writes mixture.json; one that is there gives way only to what is asked for, and is kept."""
    shares = weights or {info.name: float(info.splits["train"].tokens) for info in infos}
    total = math.fsum(shares.values())
    chosen = [info for info in infos if shares[info.name] > 0]
    plan = plans.Plan(
        sources=tuple(
            plans.PlanSource(
                info.name,
                info.name,
                rows=info.splits["train"].rows,
                tokens=info.splits["train"].rows * info.row_length,
            )
            for info in chosen
        ),
        stages=(
            plans.Stage("train", None, {info.name: shares[info.name] / total for info in chosen}),
        ),
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
        if not {info.name for info in infos} <= set(existing.names):
            print(
                f"`python -m mobilellm_jax.plan {out} --out=FILE` writes one of all sources there.",
                flush=True,
            )
        return existing
    if existing:
        kept = out / f"mixture.{existing.hash[:8]}.json"
        existing.save(kept)
        print(f"{path}: replaced; the plan that was there is now {kept.name}.", flush=True)
    plan.save(path)
    print(f"{path}: {_shares(plan)}", flush=True)
    return plan


def _shares(plan: plans.Plan) -> str:
    return "; ".join(
        ", ".join(f"{name} {weight:.4g}" for name, weight in stage.weights.items())
        for stage in plan.stages
    )


def main() -> None:
    """The command line around `prepare`."""
    args = flags.FLAGS
    corpora = named_corpora(args.seed or 0)
    share = parse_share(args.sample)
    for source in args.chat:
        name, where = named(source, "chat")
        corpora.append(
            ChatCorpus(
                name,
                where,
                args.messages_key,
                args.heldout,
                args.id_key,
                share,
                system_prompt=args.system_prompt,
                too_long=args.too_long,
                no_assistant=args.no_assistant,
                tools_key=args.tools_key,
            )
        )
    prepare(
        corpora,
        args.out,
        args.row_length,
        vocab_size=args.vocab_size,
        tokenizer=args.tokenizer,
        chat_template=read_template(args.chat_template) if args.chat_template else None,
        packing=args.packing,
        weights=parse_weights(args.weights) if args.weights else None,
        seed=args.seed,
        workers=args.workers,
        beam=[f"--runner={args.beam}", *(f"--{option}" for option in args.beam_option)]
        if args.beam
        else None,
    )


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Directory to write into.", required=True)
    define_sources()
    flags.DEFINE_multi_string(
        "chat", [], "Conversations of your own: name=PATTERN. May be repeated."
    )
    flags.DEFINE_string(
        "messages_key",
        "messages",
        "Of --chat: field or column with the list of messages, or question+answer, a field each.",
    )
    flags.DEFINE_string(
        "tools_key",
        "tools",
        "The same for the functions that it may call, if any; empty reads none.",
    )
    flags.DEFINE_string(
        "system_prompt", None, "Of --chat: what conversations without a system message begin with."
    )
    flags.DEFINE_enum(
        "too_long", "truncate", TOO_LONG, "What becomes of a conversation longer than a row."
    )
    flags.DEFINE_enum(
        "no_assistant",
        "drop",
        NO_ASSISTANT,
        "What becomes of a conversation in which nothing of an assistant is: it is left out, or kept "
        "for a loss on all tokens.",
    )
    flags.DEFINE_string(
        "chat_template",
        None,
        f"Chat template for the tokenizer: {', '.join(shipped_templates())} or a file of Jinja; "
        "default: its own.",
    )
    flags.DEFINE_integer("row_length", 2048, "Targets per row: the length of context in training.")
    flags.DEFINE_integer("vocab_size", 32_000, "Pieces of the tokenizer that is trained.")
    flags.DEFINE_string(
        "tokenizer", None, "A .model of SentencePiece, a tokenizer.json, or a folder with one."
    )
    flags.DEFINE_enum("packing", "concat", list(TEXT_PACKERS), "How documents fill rows.")
    flags.DEFINE_string(
        "weights", None, "Shares in the mixture, a=0.7,b=0.3; default: by training tokens."
    )
    flags.DEFINE_integer(
        "seed", None, "Order of the rows and, with --embedded, the arithmetic; default 0."
    )
    flags.DEFINE_integer("workers", None, "Processes that tokenize; default: one per core.", 1)
    flags.DEFINE_string(
        "beam", None, "Runner of Apache Beam that does the work instead, such as DataflowRunner."
    )
    flags.DEFINE_multi_string("beam_option", [], "name=value for that runner. May be repeated.")
    cli.run(main)
