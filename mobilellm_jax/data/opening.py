"""The sources of a plan, opened and checked, and the stream that they make."""

from mobilellm_jax.data.contexts import Contexts
from mobilellm_jax.data.mixture import Mixture
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.readers import Readers
from mobilellm_jax.data.rows import open_rows, read_info, read_settings
from mobilellm_jax.data.taught import open_taught
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError


def open_mixture(
    plan: Plan, row_length: int, vocab_size: int, taught: str = "", temperature: float = 1.0
) -> Mixture:
    """Opens and checks the sources of a plan, and what `teach` wrote under a name, if one is given.

    Raises:
      UserError: a source, or what a teacher says of it, is missing, incomplete or truncated, is not
        what the plan says, was tokenized by another tokenizer, cannot give rows of that length, or
        has more tokens than the model.
    """
    sources = open_split(plan, "train", row_length, vocab_size)
    rows, readers = [sources[i] for i in range(len(plan.sources))], Readers()
    written = [open_taught(source, taught, temperature, readers) for source in rows if taught]
    return Mixture(plan, row_length, rows, written)


def open_split(plan: Plan, split: str, row_length: int, vocab_size: int) -> dict[int, Contexts]:
    """One split of the sources that have it, by number, checked against plan and vocabulary.

    Every source has rows to train on; a held-out part is the choice of who prepared it.

    Raises:
      UserError: see `open_mixture`.
    """
    opened, readers = {}, Readers()
    for number, source in enumerate(plan.sources):
        path = plan.resolve(source.path)
        info, where = read_info(path), f"source {source.name!r} at {path}"
        if info.tokenizer != plan.tokenizer:
            raise UserError(
                f"{where} was tokenized by another tokenizer ({info.tokenizer[:12]}) than the plan's "
                f"({plan.tokenizer[:12]}): prepare it again with the plan's {plan.tokenizer_path}."
            )
        if source.rows not in (None, info.splits["train"].rows):
            raise UserError(
                f"{where} has {info.splits['train'].rows:,} rows to train on, the plan says "
                f"{source.rows:,}: it was prepared again. Put it back, or write a new plan."
            )
        if info.vocab_size > vocab_size:
            raise UserError(
                f"{where} has a vocabulary of {info.vocab_size} pieces, the model one of only "
                f"{vocab_size}: set config.model.vocab_size={info.vocab_size} or more."
            )
        if split not in info.splits and split != "train":
            continue
        rows = Contexts(open_rows(path, split, readers), row_length)
        if len(rows):
            opened[number] = rows
        elif split == "train":
            raise UserError(
                f"{where} has {info.splits['train'].rows:,} rows of {info.row_length} tokens, too few "
                f"for one of {row_length}: leave it out, or lower config.row_length."
            )
    return opened


def check_templates(plan: Plan, tokenizer: Tokenizer) -> None:
    """All conversations of a plan were written with the chat template of its tokenizer.

    Raises:
      UserError: some were written with another one, which the network would not get to see in use.
    """
    for source in plan.sources:
        path = plan.resolve(source.path)
        if read_info(path).kind != "chat":
            continue
        if read_settings(path).get("chat_template") != tokenizer.template_fingerprint:
            raise UserError(
                f"source {source.name!r} at {path} was written with another chat template than that of "
                f"the tokenizer {plan.resolve(plan.tokenizer_path)}: prepare it again with that "
                "tokenizer."
            )


def check_length(mixture: Mixture, first: int, rows: int) -> None:
    """A run of so many rows, from row `first` on, must not be longer than its plan.

    Raises:
      UserError: it is.
    """
    if first + rows > len(mixture):
        begin = f" from row {first:,} on" if first else ""
        raise UserError(
            f"the run wants {rows:,} rows of {mixture.row_length} tokens{begin}, the plan in "
            f"{mixture.plan.directory} ends after {len(mixture):,}: lower config.steps (or "
            "config.tokens or config.epochs), or give its last stage more tokens (null: no end)."
        )
