"""Continuations of held-out documents, for people to read."""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
from etils import epath

from mobilellm_jax.data.packing import segment_ids, token_ids
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.rows import Rows, open_rows
from mobilellm_jax.decoding.decoder import to_draw
from mobilellm_jax.decoding.sampling import Sampling
from mobilellm_jax.decoding.text import generate
from mobilellm_jax.errors import UserError
from mobilellm_jax.training.checkpoint import load_model

PROMPT_TOKENS, NEW_TOKENS = 32, 96
PER_SOURCE = 2
SEARCHED_ROWS = 512
SAMPLING, SEED = Sampling(temperature=0.7, top_p=0.95), 0


@dataclasses.dataclass(frozen=True)
class Sample:
    """A held-out prompt, what the model makes of it, and how the document goes on."""

    source: str
    prompt: str
    continuation: str
    original: str


def sample(workdir: epath.PathLike, plan: Plan) -> tuple[list[Sample], int]:
    """Continues the beginnings of held-out documents with the newest checkpoint.

    Returns:
      the samples, some for each source whose rows can be read, and the step of the checkpoint.

    Raises:
      UserError: there is no checkpoint yet, or no held-out document.
    """
    loaded = load_model(workdir)
    # Together at most 3/4 of the context: a prompt cut inside a word may need more tokens.
    prompt_tokens = min(PROMPT_TOKENS, loaded.model.max_length // 4)
    new_tokens = min(NEW_TOKENS, loaded.model.max_length // 2)
    found = []
    for source in plan.sources:
        try:
            rows = open_rows(plan.resolve(source.path), "heldout")
        except UserError:
            continue  # told beside the baselines, which read the same rows
        for document in _documents(rows, loaded.tokenizer.bos_id, prompt_tokens + new_tokens):
            cut = min(prompt_tokens, len(document) // 2)
            prompt, original = (
                loaded.tokenizer.decode(d.tolist()) for d in np.split(document, [cut])
            )
            found.append(Sample(source.name, prompt, "", original))
    if not found:
        raise UserError("no held-out document can be read.")
    texts = generate(
        to_draw(loaded.params, loaded.model),
        loaded.tokenizer,
        [s.prompt for s in found],
        new_tokens,
        SAMPLING,
        SEED,
    )
    pairs = zip(found, texts, strict=True)
    return [dataclasses.replace(s, continuation=text) for s, text in pairs], loaded.step


def describe(step: int) -> str:
    """How the samples were made, for the page."""
    return (
        f"Held-out text, continued (shaded) by the checkpoint of step {step:,}: "
        f"temperature {SAMPLING.temperature}, top-p {SAMPLING.top_p}, seed {SEED}."
    )


def _documents(rows: Rows, bos_id: int, length: int) -> Iterator[np.ndarray]:
    """Up to `PER_SOURCE` documents of a split, from rows far apart: at most `length` ids, no BOS.

    One of less than `length` tokens is taken only where there are too few longer ones.
    """
    pieces = []
    searched = min(len(rows), SEARCHED_ROWS)
    for row in rows.read(np.arange(searched, dtype=np.int64) * len(rows) // max(searched, 1)):
        begins = np.flatnonzero(np.diff(segment_ids(row, bos_id), prepend=0))
        borders, row = np.append(begins, len(row)), token_ids(row)
        for start, end in itertools.pairwise(borders):  # none where a row lies inside a document
            pieces.append(row[start + 1 : min(end, start + 1 + length)])
    pieces = [piece for piece in pieces if len(piece) > 1]  # BOS is also the padding
    long = [piece for piece in pieces if len(piece) == length]
    if len(long) < PER_SOURCE:
        long = sorted(pieces, key=len, reverse=True)[:PER_SOURCE]
    for i in range(min(PER_SOURCE, len(long))):
        yield long[i * len(long) // PER_SOURCE]
