"""What is scored: rows as training reads them, and what each document in them gets of a row's score."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow

from data_mixing.probe_sets import Probe
from mobilellm_jax.data.accounting import Placed, documents_placed
from mobilellm_jax.data.contexts import Contexts
from mobilellm_jax.data.encoding import encode_texts
from mobilellm_jax.data.mixture import first_rows
from mobilellm_jax.data.opening import open_split
from mobilellm_jax.data.packing import UNTRAINED, BestFit, counted, token_ids
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError

# A line for each piece of a document in a row that was scored. Its targets are the tokens
# [first + 1, last) of the row; `tokens` of them count. `place`, `file` and `id` say which document
# it is a part of (see `data.documents`).
SCHEMA = pyarrow.schema(
    [
        ("source", pyarrow.string()),
        ("row", pyarrow.int64()),
        ("first", pyarrow.int32()),
        ("last", pyarrow.int32()),
        ("tokens", pyarrow.int32()),
        ("file", pyarrow.string()),
        ("place", pyarrow.int64()),
        ("id", pyarrow.string()),
    ]
)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Rows of one source's training split."""

    source: str
    contexts: Contexts
    rows_N: np.ndarray  # int64, at the contexts' row length

    def __len__(self) -> int:
        return len(self.rows_N)

    @functools.cached_property
    def placed(self) -> list[list[Placed]]:
        """The documents of each row."""
        return documents_placed(self.contexts, self.rows_N)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """int32 [N, T + 1], with the marks of conversations."""
        return self.contexts.read(self.rows_N)


def first_samples(plan: Plan, row_length: int, vocab_size: int, rows: int) -> list[Sample]:
    """The rows of each source that the stream would read first, at most `rows` of each.

    They are a random choice, the same for every run of the plan, in which each token of a source is
    as likely as any other.

    Raises:
      UserError: the sources are not usable (see `opening.open_mixture`).
    """
    opened = open_split(plan, "train", row_length, vocab_size)
    samples = []
    for number, contexts in opened.items():
        name, count = plan.names[number], min(rows, len(contexts))
        samples.append(Sample(name, contexts, first_rows(plan, name, len(contexts), count)))
    return samples


def lines(
    sample: Sample,
    part: slice,
    values_NKT: np.ndarray,
    names: Sequence[str],
    bos_id: int,
    eos_id: int,
) -> pyarrow.Table:
    """Values of targets as means over the targets of each piece of a document.

    Args:
      sample: the rows.
      part: which of them, N.
      values_NKT: float, 0 where a target does not count.
      names: of the K columns.
      bos_id: begins documents.
      eos_id: ends them.

    Returns:
      Lines of `SCHEMA` with K columns of float64 more; pieces without a target that counts have none.
    """
    counts_NT = counted(sample.tokens[part], bos_id, eos_id)
    columns: dict[str, list] = {field.name: [] for field in SCHEMA}
    means: list[np.ndarray] = []
    rows = zip(sample.rows_N[part].tolist(), sample.placed[part], strict=True)
    for n, (row, documents) in enumerate(rows):
        for placed in documents:
            inside = slice(placed.first, placed.last - 1)
            tokens = int(counts_NT[n, inside].sum())
            if not tokens:
                continue
            piece = placed.piece
            line = (sample.source, row, placed.first, placed.last, tokens)
            for name, value in zip(
                columns, (*line, piece.file, piece.place, piece.id), strict=True
            ):
                columns[name].append(value)
            means.append(values_NKT[n, :, inside].sum(-1, dtype=np.float64) / tokens)
    table = pyarrow.table(columns, SCHEMA)
    means_NK = np.stack(means) if means else np.empty((0, len(names)))
    for k, name in enumerate(names):
        table = table.append_column(name, pyarrow.array(means_NK[:, k], pyarrow.float64()))
    return table


def packed_texts(texts: Sequence[str], tokenizer: Tokenizer, row_length: int) -> np.ndarray:
    """Texts as rows, int32 [n, row_length + 1], best-fit: each is whole, or cut where it must be."""
    packer = BestFit(row_length, tokenizer.bos_id, tokenizer.eos_id)
    ids = [found.ids for found in encode_texts(tokenizer, texts)]
    return np.concatenate(
        [packer.add([i for i in ids if i is not None]).rows, packer.finish().rows]
    )


def some(rows: np.ndarray, most: int) -> np.ndarray:
    """The rows, or of more than `most` a random choice, always the same, in their order."""
    if len(rows) <= most:
        return rows
    return rows[np.sort(np.random.default_rng(0).choice(len(rows), most, replace=False))]


def answer_row(prompt: str, answer: str, tokenizer: Tokenizer, row_length: int) -> np.ndarray:
    """A row of one text of which the answer alone counts: int32 [row_length + 1], with marks.

    Raises:
      UserError: the answer adds no token to the prompt, or both do not fit into a row.
    """
    before = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    whole = [tokenizer.bos_id, *tokenizer.encode(prompt + answer)]
    # Where prompt and answer meet, pieces of the whole may differ from those of the prompt.
    same = 0
    while same < min(len(before), len(whole)) and before[same] == whole[same]:
        same += 1
    if same == len(whole):
        raise UserError("the answer adds no token to the prompt: give the text that followed.")
    if len(whole) > row_length + 1:
        raise UserError(
            f"prompt and answer have {len(whole):,} tokens, a row {row_length + 1:,}: shorten the prompt."
        )
    row = np.full(row_length + 1, tokenizer.bos_id | UNTRAINED, np.int32)
    row[: len(whole)] = whole
    row[:same] |= UNTRAINED
    return row


def check_disjoint(
    probes: Mapping[str, Sequence[Probe]], samples: Sequence[Sample], tokenizer: Tokenizer
) -> None:
    """A probe must not be in what it scores: its own influence on itself would be the largest.

    A document is the same by its file and place, or, where it is whole in a row, by its tokens.

    Raises:
      UserError: one is in both.
    """
    unique = {probe.text: probe for of_one in probes.values() for probe in of_one}
    by_place = {(p.file, p.place): p for p in unique.values() if p.file}
    encoded = encode_texts(tokenizer, list(unique))
    by_tokens = {
        found.ids.astype(np.int32).tobytes(): probe
        for found, probe in zip(encoded, unique.values(), strict=True)
        if found.ids is not None
    }
    for sample in samples:
        shared = {probe.text: probe for probe in _shared(sample, by_place, by_tokens, tokenizer)}
        if shared:
            first = next(iter(shared.values()))
            raise UserError(
                f"{len(shared)} documents are in the probe sets and in what they are to score: {first.id!r} "
                f"({first.file}:{first.place}) is also in the training rows of {sample.source!r}. Take "
                "probes from documents that are kept out of training (`data_mixing.probes "
                "--split=heldout` with the share that `prepare --heldout` had)."
            )


def _shared(
    sample: Sample,
    by_place: Mapping[tuple[str, int], Probe],
    by_tokens: Mapping[bytes, Probe],
    tokenizer: Tokenizer,
) -> Iterator[Probe]:
    for n, placed in enumerate(sample.placed):
        for one in placed:
            if found := by_place.get((one.piece.file, one.piece.place)):
                yield found
            if one.begin == 0 and one.last - one.first == one.piece.tokens:
                ids = token_ids(sample.tokens[n, one.first + 1 : one.last])
                ids = ids[:-1] if ids.size and ids[-1] == tokenizer.eos_id else ids
                if found := by_tokens.get(ids.astype(np.int32).tobytes()):
                    yield found
