"""What a small model has to beat: unigram and bigram models of the same rows, and zlib.

All three are given in bits per byte of the held-out text. The two models predict the targets that a
network is trained on: position `t + 1` from position `t` of a row, where the target counts
(`packing.counted`). Their bits are summed over these targets, EOS included, and divided by
the bytes that the targets stand for.

Nothing is tuned on held-out rows. Both models subtract an absolute discount from every count and
give the mass so freed to a lower order: a discount of `D = n1 / (n1 + 2 n2)`, where n1 and n2 are
how many of the counts are 1 and 2 (Ney, Essen and Kneser 1994), here with one added to each so that
it always lies between 0 and 1. The unigram's lower order is the uniform distribution. The bigram is
interpolated Kneser-Ney (Kneser and Ney 1995): its lower order is a unigram whose counts are the
numbers of different tokens seen before a token.
"""

import dataclasses
import zlib
from collections.abc import Iterator

import numpy as np

from mobilellm_jax.data.packing import counted, segment_ids, token_ids
from mobilellm_jax.data.tokenizers import Tokenizer


def unigram_bits_per_byte(
    train_rows_RT: np.ndarray,
    heldout_rows_RT: np.ndarray,
    piece_bytes_V: np.ndarray,
    bos_id: int,
    eos_id: int,
) -> float:
    """Bits per byte of held-out rows under token frequencies of the training rows.

    Args:
      train_rows_RT: int [rows, row_length + 1], what is counted.
      heldout_rows_RT: int [rows, row_length + 1], what is predicted.
      piece_bytes_V: int [V], `Tokenizer.piece_bytes()`.
      bos_id: begins documents and fills rows.
      eos_id: ends documents; may be the same.
    """
    p_V = unigram_probabilities(train_rows_RT, len(piece_bytes_V), bos_id, eos_id)
    _, targets_M = _pairs(heldout_rows_RT, bos_id, eos_id)
    return _bits_per_byte(p_V[targets_M], targets_M, piece_bytes_V)


def bigram_bits_per_byte(
    train_rows_RT: np.ndarray,
    heldout_rows_RT: np.ndarray,
    piece_bytes_V: np.ndarray,
    bos_id: int,
    eos_id: int,
) -> float:
    """Bits per byte of held-out rows under the interpolated Kneser-Ney bigram of the training rows.

    Args:
      train_rows_RT: int [rows, row_length + 1], what is counted.
      heldout_rows_RT: int [rows, row_length + 1], what is predicted.
      piece_bytes_V: int [V], `Tokenizer.piece_bytes()`.
      bos_id: begins documents and fills rows; as a context it is a token like any other.
      eos_id: ends documents; may be the same.
    """
    bigram = fit_bigram(train_rows_RT, len(piece_bytes_V), bos_id, eos_id)
    contexts_M, targets_M = _pairs(heldout_rows_RT, bos_id, eos_id)
    return _bits_per_byte(bigram.probabilities(contexts_M, targets_M), targets_M, piece_bytes_V)


def zlib_bits_per_byte(heldout_rows_RT: np.ndarray, tokenizer: Tokenizer) -> float:
    """Bits per byte that `zlib` at level 9 needs for the documents, joined by newlines, as UTF-8.

    The documents are decoded from the rows, int [rows, row_length + 1], in the order in which they
    are stored: a row that does not begin with BOS continues the document at the end of the row
    before it. Both the bits and the bytes are those of the one joined text, of which zlib sees
    32 KiB at a time.
    """
    documents = _documents(heldout_rows_RT, tokenizer.bos_id)
    text = "\n".join(tokenizer.decode(ids.tolist()) for ids in documents).encode()
    return 8 * len(zlib.compress(text, 9)) / len(text)


def unigram_probabilities(
    rows_RT: np.ndarray, vocab_size: int, bos_id: int, eos_id: int
) -> np.ndarray:
    """float64 [V] that sum to 1; 0 for what is never a target."""
    _, targets_M = _pairs(rows_RT, bos_id, eos_id)
    return _discounted(np.bincount(targets_M, minlength=vocab_size), bos_id, eos_id)


@dataclasses.dataclass(frozen=True)
class Bigram:
    """Counts of an interpolated Kneser-Ney bigram model; C pairs are stored, not V * V."""

    keys_C: np.ndarray  # context * V + target, sorted
    counts_C: np.ndarray
    discount: float
    context_total_V: np.ndarray  # targets seen after a context
    context_types_V: np.ndarray  # different ones
    lower_V: np.ndarray  # probabilities of the lower order

    def probabilities(self, contexts_M: np.ndarray, targets_M: np.ndarray) -> np.ndarray:
        """p(target | context), float64 [M]; sums to 1 over all targets of any context."""
        keys_M = contexts_M.astype(np.int64) * len(self.lower_V) + targets_M
        places_M = np.minimum(np.searchsorted(self.keys_C, keys_M), len(self.keys_C) - 1)
        seen_M = self.keys_C[places_M] == keys_M
        kept_M = np.where(seen_M, self.counts_C[places_M] - self.discount, 0.0)
        freed_M = self.discount * self.context_types_V[contexts_M]
        total_M = self.context_total_V[contexts_M]
        lower_M = self.lower_V[targets_M]
        p_M = (kept_M + freed_M * lower_M) / np.maximum(total_M, 1)
        return np.where(total_M > 0, p_M, lower_M)


def fit_bigram(rows_RT: np.ndarray, vocab_size: int, bos_id: int, eos_id: int) -> Bigram:
    """Counts the pairs of rows, int [rows, row_length + 1]."""
    contexts_M, targets_M = _pairs(rows_RT, bos_id, eos_id)
    keys_M = contexts_M.astype(np.int64) * vocab_size + targets_M
    keys_C, counts_C = np.unique(keys_M, return_counts=True)
    contexts_C, targets_C = keys_C // vocab_size, keys_C % vocab_size
    return Bigram(
        keys_C=keys_C,
        counts_C=counts_C,
        discount=_discount(counts_C),
        context_total_V=np.bincount(contexts_M, minlength=vocab_size),
        context_types_V=np.bincount(contexts_C, minlength=vocab_size),
        lower_V=_discounted(np.bincount(targets_C, minlength=vocab_size), bos_id, eos_id),
    )


def _pairs(rows_RT: np.ndarray, bos_id: int, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Contexts and targets, [M] each, of all targets that are trained on."""
    valid_RT = counted(rows_RT, bos_id, eos_id)
    ids_RT = token_ids(rows_RT)
    return ids_RT[:, :-1][valid_RT], ids_RT[:, 1:][valid_RT]


def _discount(counts: np.ndarray) -> float:
    once, twice = 1 + np.sum(counts == 1), 1 + np.sum(counts == 2)
    return float(once / (once + 2 * twice))


def _discounted(counts_V: np.ndarray, bos_id: int, eos_id: int) -> np.ndarray:
    """Probabilities from counts, discounted towards the uniform distribution over what may be a target."""
    uniform_V = np.ones(len(counts_V))
    uniform_V[bos_id] = bos_id == eos_id
    uniform_V /= uniform_V.sum()
    discount = _discount(counts_V)
    freed = discount * np.sum(counts_V > 0)
    return (np.maximum(counts_V - discount, 0) + freed * uniform_V) / np.sum(counts_V)


def _bits_per_byte(p_M: np.ndarray, targets_M: np.ndarray, piece_bytes_V: np.ndarray) -> float:
    return float(-np.sum(np.log2(p_M)) / np.sum(piece_bytes_V[targets_M], dtype=np.int64))


def _documents(rows_RT: np.ndarray, bos_id: int) -> Iterator[np.ndarray]:
    """Ids of each document or cut piece of one, without BOS."""
    # A row that goes on repeats one token of the row before; a row that begins anew repeats none.
    parts = [row if segment_ids(row[:1], bos_id) else row[1:] for row in rows_RT[1:]]
    tokens = np.concatenate([rows_RT[0], *parts])
    begins = np.flatnonzero(np.diff(segment_ids(tokens, bos_id), prepend=0))
    for ids in np.split(token_ids(tokens), begins):
        ids = ids[ids != bos_id]
        if len(ids):
            yield ids
