"""The baselines against counting by hand."""

import collections
import math
import time
import zlib

import numpy as np
import pytest

from mobilellm_jax.data import baselines

BOS, EOS = 1, 2
V = 7


def rows(seed: int, count: int = 12, length: int = 9, vocab: int = V) -> np.ndarray:
    """Random rows in which some tokens are frequent, some never occur, and BOS is in the middle."""
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, vocab)
    rows_RT = rng.choice(vocab - 1, size=(count, length + 1), p=p / p.sum()).astype(np.int32)
    rows_RT[:, 0] = BOS
    return rows_RT


def counted(rows_RT: np.ndarray, eos: int = EOS) -> list[tuple[int, int]]:
    pairs = [pair for row in rows_RT.tolist() for pair in zip(row, row[1:], strict=False)]
    return [(a, b) for a, b in pairs if b != BOS or (eos == BOS and a != BOS)]


def discount(counts: collections.Counter) -> float:
    n = collections.Counter(counts.values())
    return (n[1] + 1) / (n[1] + 1 + 2 * (n[2] + 1))


def unigram(counts: collections.Counter, token: int, targets: int) -> float:
    d, total = discount(counts), sum(counts.values())
    return max(counts[token] - d, 0) / total + d * len(counts) / total / targets


def bigram(pairs: list[tuple[int, int]], context: int, token: int, targets: int) -> float:
    counts = collections.Counter(pairs)
    followers = {pair: n for pair, n in counts.items() if pair[0] == context}
    lower = unigram(collections.Counter(b for _, b in counts), token, targets)
    if not followers:
        return lower
    d, total = discount(counts), sum(followers.values())
    return max(counts[context, token] - d, 0) / total + d * len(followers) / total * lower


@pytest.mark.parametrize("eos", [EOS, BOS])
@pytest.mark.parametrize("seed", range(4))
def test_bits_per_byte_equal_counting_by_hand(seed: int, eos: int) -> None:
    train_RT, heldout_RT = rows(seed), rows(seed + 100)
    piece_bytes_V = np.random.default_rng(seed).integers(1, 9, V).astype(np.int32)
    pairs, asked = counted(train_RT, eos), counted(heldout_RT, eos)
    assert any(b == BOS for _, b in asked) == (eos == BOS)
    targets = V if eos == BOS else V - 1  # that there may be
    size = sum(int(piece_bytes_V[b]) for _, b in asked)
    counts = collections.Counter(b for _, b in pairs)
    expected = -sum(math.log2(unigram(counts, b, targets)) for _, b in asked) / size
    got = baselines.unigram_bits_per_byte(train_RT, heldout_RT, piece_bytes_V, BOS, eos)
    assert got == pytest.approx(expected, rel=1e-9)
    expected = -sum(math.log2(bigram(pairs, a, b, targets)) for a, b in asked) / size
    got = baselines.bigram_bits_per_byte(train_RT, heldout_RT, piece_bytes_V, BOS, eos)
    assert got == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("eos", [EOS, BOS])
@pytest.mark.parametrize("seed", range(4))
def test_probabilities_sum_to_one_for_every_context(seed: int, eos: int) -> None:
    train_RT = rows(seed, count=3)
    assert baselines.unigram_probabilities(train_RT, V, BOS, eos).sum() == pytest.approx(1)
    fitted = baselines.fit_bigram(train_RT, V, BOS, eos)
    contexts_M, targets_M = (grid.ravel() for grid in np.indices((V, V)))
    p_VV = fitted.probabilities(contexts_M, targets_M).reshape(V, V)
    np.testing.assert_allclose(p_VV.sum(axis=1), 1)  # V - 1 was never seen, as context or as target
    assert (np.delete(p_VV, BOS, axis=1) > 0).all()
    assert ((p_VV[:, BOS] > 0) == (eos == BOS)).all()


def test_padding_changes_nothing() -> None:
    train_RT, heldout_RT, piece_bytes_V = rows(0), rows(1), np.ones(V, np.int32)
    padded_RT = np.pad(train_RT, ((0, 2), (0, 5)), constant_values=BOS)
    for measure in (baselines.unigram_bits_per_byte, baselines.bigram_bits_per_byte):
        assert measure(padded_RT, heldout_RT, piece_bytes_V, BOS, EOS) == measure(
            train_RT, heldout_RT, piece_bytes_V, BOS, EOS
        )


def test_bigram_finds_the_entropy_of_a_markov_chain() -> None:
    rng = np.random.default_rng(0)
    transition_VV = rng.dirichlet(np.full(V - 2, 0.3), size=V - 2)
    states = [0]
    for u in rng.random(40_000):
        states.append(int(np.searchsorted(transition_VV[states[-1]].cumsum(), u).clip(max=V - 3)))
    tokens = np.array(states[1:]) + 2
    rows_RT = np.pad(tokens.reshape(-1, 20), ((0, 0), (1, 0)), constant_values=BOS)
    stationary_V = np.linalg.matrix_power(transition_VV, 1000)[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nansum(stationary_V[:, None] * transition_VV * np.log2(transition_VV))
    ones_V = np.ones(V, np.int32)
    found = baselines.bigram_bits_per_byte(rows_RT[:1500], rows_RT[1500:], ones_V, BOS, EOS)
    unigrams = baselines.unigram_bits_per_byte(rows_RT[:1500], rows_RT[1500:], ones_V, BOS, EOS)
    # 1 of 20 targets follows BOS and is guessed from the stationary distribution.
    assert found == pytest.approx(0.95 * entropy + 0.05 * unigrams, rel=0.03)
    assert found < 0.9 * unigrams


class Letters:
    """A tokenizer of letters, without the lines a real one needs."""

    bos_id = BOS

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(96 + i) for i in ids if i > 2)


@pytest.mark.parametrize("eos", [EOS, BOS])
@pytest.mark.parametrize("length", [3, 4, 5, 9])
def test_zlib_sees_each_document_once_however_rows_are_cut(length: int, eos: int) -> None:
    rng = np.random.default_rng(length)
    documents = [rng.integers(3, 20, size=n).tolist() for n in (5, 1, 30, 8, 17, 2)]
    text = "\n".join(Letters().decode(ids) for ids in documents).encode()
    expected = 8 * len(zlib.compress(text, 9)) / len(text)

    stream = [token for ids in documents for token in [BOS, *ids, eos]]
    stream += [BOS] * ((1 - len(stream)) % length)
    concat_RT = np.lib.stride_tricks.sliding_window_view(stream, length + 1)[::length]
    assert baselines.zlib_bits_per_byte(concat_RT, Letters()) == expected

    whole_RT = np.array([([BOS, *ids, eos] + [BOS] * 40)[:41] for ids in documents])
    assert baselines.zlib_bits_per_byte(whole_RT, Letters()) == expected


def test_a_vocabulary_of_128k_takes_seconds() -> None:
    vocab = 128_256
    train_RT = rows(0, count=1000, length=1024, vocab=vocab)
    start = time.process_time()
    heldout_RT, ones_V = rows(1, 50, 1024, vocab), np.ones(vocab)
    bits = baselines.bigram_bits_per_byte(train_RT, heldout_RT, ones_V, BOS, EOS)
    assert 0 < bits < math.log2(vocab)
    assert time.process_time() - start < 10
