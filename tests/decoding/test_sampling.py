"""What sampling may draw: equal to a plain loop and to Hugging Face, as often as it should."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mobilellm_jax.decoding.sampling import Sampling, filtered, sample
from mobilellm_jax.errors import UserError


def brute_force(logits_V, temperature, top_k, top_p):
    """The probabilities of one row, token by token from the most likely one."""
    logits_V = logits_V.astype(np.float64) / temperature
    order = sorted(range(len(logits_V)), key=lambda token: -logits_V[token])
    order = order[: top_k or len(order)]
    mass = {token: np.exp(logits_V[token] - logits_V[order[0]]) for token in order}
    total, kept, share = sum(mass.values()), [], 0.0
    for token in order:
        if share >= top_p:
            break
        kept.append(token)
        share += mass[token] / total
    out = np.zeros(len(logits_V))
    out[kept] = [mass[token] for token in kept]
    return out / out.sum()


SETTINGS = [
    Sampling(0.7),
    Sampling(1.0, top_k=1),
    Sampling(1.3, top_k=5),
    Sampling(1.0, top_k=1000),
    Sampling(1.0, top_p=0.9),
    Sampling(0.8, top_p=0.3),
    Sampling(1.0, top_p=1e-6),
    Sampling(0.6, top_k=7, top_p=0.8),
]


def random_logits(rows=200, tokens=40):
    rng = np.random.default_rng(0)
    return (rng.normal(size=(rows, tokens)) * rng.uniform(0.1, 6, (rows, 1))).astype(np.float32)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_filters_keep_what_a_plain_loop_keeps(sampling):
    logits_BV = random_logits()
    ours = np.asarray(jax.nn.softmax(filtered(jnp.asarray(logits_BV), sampling), axis=-1))
    theirs = [
        brute_force(row, sampling.temperature, sampling.top_k, sampling.top_p) for row in logits_BV
    ]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert ((ours > 0).sum(1) >= 1).all()


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_filters_keep_what_hugging_face_keeps(sampling):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    logits_BV = random_logits()
    theirs = transformers.TemperatureLogitsWarper(sampling.temperature)(
        None, torch.tensor(logits_BV)
    )
    if sampling.top_k:
        theirs = transformers.TopKLogitsWarper(sampling.top_k)(None, theirs)
    if sampling.top_p < 1:
        theirs = transformers.TopPLogitsWarper(sampling.top_p)(None, theirs)
    ours = np.asarray(filtered(jnp.asarray(logits_BV), sampling))
    assert (np.isfinite(ours) == np.isfinite(theirs.numpy())).all()


@pytest.mark.parametrize("sampling", SETTINGS[:5:2] + SETTINGS[-1:], ids=str)
def test_tokens_are_drawn_as_often_as_they_should(sampling):
    """Chi-square over 20,000 draws; p = 1e-4 at 11 degrees of freedom is 37.4, fewer need less."""
    logits_V = random_logits(1, 12)[0]
    keys = jax.random.split(jax.random.key(1), 20_000)
    logits_BV = jnp.broadcast_to(logits_V, (len(keys), 12))
    found = np.bincount(np.asarray(sample(logits_BV, keys, sampling)), minlength=12)
    share = brute_force(logits_V, sampling.temperature, sampling.top_k, sampling.top_p)
    expected = share * len(keys)
    assert (found[share == 0] == 0).all()
    possible = share > 0
    assert ((found - expected)[possible] ** 2 / expected[possible]).sum() < 37.4


def test_temperature_zero_takes_the_likeliest_whatever_the_filters():
    logits_BV = jnp.asarray(random_logits())
    keys = jax.random.split(jax.random.key(0), len(logits_BV))
    found = sample(logits_BV, keys, Sampling(0, top_k=3, top_p=0.5))
    assert (found == logits_BV.argmax(-1)).all()


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": math.nan}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}],
    ids=str,
)
def test_what_is_no_distribution_is_refused(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        Sampling(**wrong)
