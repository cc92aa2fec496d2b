"""Vectors of texts and their neighbours: what a plain computation gives, whatever is computed together."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from weights import random_leaves

from data_mixing import embeddings
from data_mixing.embeddings import Kept, Whitening, embed, unit
from mobilellm_jax.data.sentencepiece_tokenizer import train_tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.leaves import nested
from mobilellm_jax.model import transformer
from mobilellm_jax.parallel.mesh import local_mesh
from mobilellm_jax.training.checkpoint import LoadedModel


@pytest.fixture(scope="module")
def loaded():
    params = nested(jax.tree.map(jnp.asarray, random_leaves(tiny.MODEL)))
    return LoadedModel(params, tiny.MODEL, tiny.tokenizer(), 0, {})


TEXTS = [*tiny.documents("sums", 4), *tiny.documents("words", 5), "the model reads. " * 100, "a"]


def plain(loaded, text, length):
    """The mean of the states of one text, alone; what is behind a token does not change its state."""
    ids = loaded.tokenizer.encode(text)[:length]
    tokens_BT = np.zeros((1, 128), np.int32)
    tokens_BT[0, : len(ids) + 1] = [loaded.tokenizer.bos_id, *ids]
    states_BTD = jax.jit(transformer.apply, static_argnums=1)(
        loaded.params, loaded.model, tokens_BT
    )
    return np.asarray(states_BTD)[0, 1 : len(ids) + 1].mean(0)


def test_a_vector_is_the_mean_of_the_states_of_the_texts_own_tokens(loaded, monkeypatch):
    monkeypatch.setattr(embeddings, "AT_ONCE", 512)  # several batches
    for length in (
        16,
        20,
        10_000,
    ):  # as many as fill a batch's width, and beyond the context of 128
        expected = [plain(loaded, text, min(length, 127)) for text in TEXTS]
        found = embed(TEXTS, loaded, length=length)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_neither_order_nor_neighbours_nor_devices_matter(loaded):
    whole = embed(TEXTS, loaded)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    np.testing.assert_allclose(embed([TEXTS[n] for n in order], loaded), whole[order], atol=2e-5)
    np.testing.assert_allclose(embed(TEXTS[3:5], loaded), whole[3:5], atol=2e-5)
    np.testing.assert_allclose(embed(TEXTS, loaded, mesh=local_mesh()), whole, atol=2e-5)


def test_a_stored_network_is_known_by_all_that_its_vectors_depend_on(loaded, monkeypatch):
    def stored(weights="a", tokenizer=loaded.tokenizer, **how):
        opened = types.SimpleNamespace(identity={"weights": weights}, needed_tokenizer=tokenizer)
        monkeypatch.setattr(embeddings, "open_model", lambda directory: opened)
        return embeddings.network("somewhere", **how)

    monkeypatch.setattr(embeddings, "load_model", lambda directory: loaded)
    found = stored(length=9, dtype="bfloat16")
    np.testing.assert_allclose(
        found.of(TEXTS), embed(TEXTS, loaded, length=9, dtype="bfloat16"), atol=2e-5
    )
    other = train_tokenizer(tiny.documents("words", 100), tiny.VOCAB)
    changed = ({"length": 8}, {"dtype": "bfloat16"}, {"weights": "b"}, {"tokenizer": other})
    identities = [stored(**how).identity for how in ({}, *changed)]
    assert len({json.dumps(identity, sort_keys=True) for identity in identities}) == 5
    with pytest.raises(UserError, match="--embedding_tokens=0"):
        stored(length=0)


def test_a_text_without_a_token_is_refused(loaded):
    with pytest.raises(UserError, match="no token"):
        embed(["words", ""], loaded)


def test_the_nearest_is_that_of_brute_force_across_blocks(monkeypatch):
    monkeypatch.setattr(embeddings, "BLOCK", 8)
    rng = np.random.default_rng(0)
    vectors, kept = unit(rng.normal(size=(60, 5))), Kept()
    similarity, number = kept.nearest(vectors[:3])
    assert (similarity == -np.inf).all() and (number == -1).all()
    for begin, end in ((0, 1), (1, 8), (8, 27), (27, 41)):
        kept.add(vectors[begin:end])
        cosines = vectors.astype(np.float64) @ vectors[:end].astype(np.float64).T
        similarity, number = kept.nearest(vectors)
        np.testing.assert_allclose(similarity, cosines.max(1), atol=1e-6)
        np.testing.assert_array_equal(number, cosines.argmax(1))


def test_of_equally_near_ones_the_first_is_named(monkeypatch):
    monkeypatch.setattr(embeddings, "BLOCK", 4)
    kept = Kept()
    kept.add(np.repeat(np.eye(3, dtype=np.float32), 3, axis=0))
    assert kept.nearest(np.eye(3, dtype=np.float32))[1].tolist() == [0, 3, 6]


def test_a_vector_without_a_length_is_like_nothing():
    assert (unit(np.array([[0.0, 0.0], [3.0, 4.0]])) == np.float32([[0, 0], [0.6, 0.8]])).all()


def test_whitening_makes_unrelated_vectors_unlike_and_leaves_near_copies_alike():
    rng = np.random.default_rng(0)
    spread = np.diag([3.0, 1.0, 0.3, 0.2, 0.1])
    turned = np.linalg.qr(rng.normal(size=(5, 5)))[0]

    def states(normal):  # all point almost the same way, as those of a causal network do
        return (normal @ spread + [30.0, 0, 0, 0, 0]) @ turned

    normal = rng.normal(size=(4000, 5))
    vectors = states(normal)
    copies = states(normal[:200] + 0.01 * rng.normal(size=(200, 5)))
    raw = unit(vectors[:200]) @ unit(vectors[200:400]).T
    assert raw.min() > 0.95
    white = Whitening.fitted(vectors[1000:])
    found = white(vectors[:1000])
    np.testing.assert_allclose(found.mean(0), 0, atol=0.15)
    np.testing.assert_allclose(np.cov(found.T), np.eye(5), atol=0.55)  # a ridge shrinks the last
    cosines = unit(white(vectors[:200])) @ unit(white(vectors[200:400])).T
    assert abs(np.mean(cosines)) < 0.05 and np.quantile(cosines, 0.9) < 0.8
    assert (unit(white(vectors[:200])) * unit(white(copies))).sum(1).min() > 0.99


def test_a_sample_smaller_than_the_width_can_whiten_and_one_too_small_cannot():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(70, 300)) + 5
    assert np.isfinite(Whitening.fitted(vectors[:64])(vectors)).all()
    stretched = np.linalg.svd(Whitening.fitted(vectors).turn_DD, compute_uv=False)
    assert stretched.max() < 32 * stretched.min()  # the root of 1,001
    assert (Whitening.fitted(np.ones((70, 3)))(np.ones((2, 3))) == 0).all()
    with pytest.raises(UserError, match="63 documents are too few .*--nowhiten"):
        Whitening.fitted(vectors[:63])
