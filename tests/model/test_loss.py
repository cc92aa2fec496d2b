"""The chunked loss against float64, and chunked against whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.loss import token_losses


@pytest.fixture
def case():
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = 3 * jax.random.normal(keys[0], (3, 12, 16))
    return hidden, jax.random.normal(keys[1], (16, 50)), jax.random.randint(keys[2], (3, 12), 0, 50)


@pytest.mark.parametrize("chunks", [1, 3, 12])
def test_equals_float64(case, chunks):
    hidden, matrix, targets = case
    nll, log_z = token_losses(hidden, matrix, targets, chunks)
    logits = np.asarray(hidden, np.float64) @ np.asarray(matrix, np.float64)
    exact_z = np.log(np.exp(logits).sum(-1))
    picked = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(log_z, exact_z, rtol=1e-5)
    np.testing.assert_allclose(nll, exact_z - picked, rtol=1e-5, atol=1e-5)


def test_chunks_change_no_gradient(case):
    hidden, matrix, targets = case

    def total(hidden, matrix, chunks):
        nll, log_z = token_losses(hidden, matrix, targets, chunks)
        return (nll + 0.1 * log_z**2).sum()

    for a, b in zip(
        jax.grad(total, (0, 1))(hidden, matrix, 1),
        jax.grad(total, (0, 1))(hidden, matrix, 4),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_logits_never_exist_whole(case):
    hidden, matrix, targets = case

    def largest(chunks):
        def total(h):
            return token_losses(h, matrix, targets, chunks)[0].sum()

        text = jax.jit(jax.grad(total)).lower(hidden).compile().as_text()
        return "f32[3,12,50]" in text or "f32[36,50]" in text

    assert largest(1)
    assert not largest(4)


def test_uneven_chunks_are_refused(case):
    with pytest.raises(UserError, match="5"):
        token_losses(*case, chunks=5)


def test_extreme_logits_stay_finite():
    hidden = jnp.full((1, 2, 4), 1e4)
    nll, _ = token_losses(hidden, jnp.eye(4), jnp.array([[0, 3]]))
    assert np.isfinite(nll).all()
