"""Flags by which a program is told of its sources, and the corpora that they name."""

import re
from collections.abc import Sequence

from absl import flags

from mobilellm_jax.data.corpora import Corpus, FileCorpus
from mobilellm_jax.data.embedded import embedded_corpora
from mobilellm_jax.data.tfds_corpus import PREFIX, TfdsCorpus
from mobilellm_jax.errors import UserError


def define_sources() -> None:
    """Defines --source, --embedded, and how documents are read and held out."""
    flags.DEFINE_bool("embedded", False, "Take code, prose and math from this Python installation.")
    flags.DEFINE_multi_string(
        "source",
        [],
        "A source of your own: name=PATTERN, name=tfds:NAME:SPLIT or name=tfds:DIRECTORY:SPLIT. May "
        "be repeated.",
    )
    flags.DEFINE_string(
        "text_key",
        "text",
        "Field of JSON lines, column of Parquet files, feature of TFDS datasets; a+b joins two.",
    )
    flags.DEFINE_string(
        "id_key", "id", "The same for what a document is called; it may be missing."
    )
    flags.DEFINE_float(
        "heldout", 0.01, "Share of the documents of --source kept out of training.", 0.0, 0.5
    )
    flags.DEFINE_string(
        "sample",
        "100%",
        "Share of the documents to read, but of --embedded: 0.1% makes a proxy corpus.",
    )


def named_corpora(seed: int) -> list[Corpus]:
    """What --embedded and --source name; `seed` is that of the embedded arithmetic.

    Raises:
      UserError: a flag is not of its form, or Python came without the text of --embedded.
    """
    args = flags.FLAGS
    corpora: list[Corpus] = list(embedded_corpora(seed)) if args.embedded else []
    share = parse_share(args.sample)
    for source in args.source:
        corpora.append(corpus_of(source, args.text_key, args.heldout, args.id_key, share))
    return corpora


def corpus_of(
    source: str, text_key: str, heldout: float, id_key: str, share: float = 1.0
) -> Corpus:
    """The corpus that `name=PATTERN` or `name=tfds:...` names; see `FileCorpus` for the rest.

    Raises:
      UserError: it is not of that form.
    """
    name, where = named(source, "source")
    kind = TfdsCorpus if where.startswith(PREFIX) else FileCorpus
    return kind(name, where.removeprefix(PREFIX), text_key, heldout, id_key, share)


def named(text: str, flag: str) -> tuple[str, str]:
    """`name=PATTERN` in two.

    Raises:
      UserError: it is not of that form.
    """
    name, equals, where = text.partition("=")
    if not equals:
        raise UserError(f"--{flag}={text} is not of the form name=PATTERN.")
    return name, where


def check_names(names: Sequence[str]) -> None:
    """Sees that sources can be told apart, and can be folders and files.

    Raises:
      UserError: a name is none, or two are equal.
    """
    for name in names:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise UserError(f"a source cannot be called {name!r}: use a-z, digits and underscores.")
    if len(set(names)) < len(names):
        raise UserError(f"two sources have one name: {', '.join(names)}.")


def parse_share(text: str) -> float:
    """`0.1%` or `0.001` as a number.

    Raises:
      UserError: it is neither, or not above 0 and at most 100 %.
    """
    number, percent, rest = text.partition("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = 0.0
    if rest or not 0 < share <= 1:
        raise UserError(f"--sample={text} is no share: give 0.1% or 0.001, at most 100%.")
    return share
