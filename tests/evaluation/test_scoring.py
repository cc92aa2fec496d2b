"""How requests are laid out for devices: each gets what its own context and continuation are worth."""

import types
import zlib

import numpy as np
import pytest

from mobilellm_jax.evaluation import scoring
from mobilellm_jax.evaluation.scoring import Request, score


def worth(read, targets):
    """In place of a network: a number for what is read and for what is to follow."""
    return zlib.crc32(repr((list(read), list(targets))).encode()) % 10_007


def requests(count=90, seed=0):
    """Contexts from one token on, some often; continuations of many lengths, some twice."""
    rng = np.random.default_rng(seed)
    contexts = [tuple(rng.integers(3, 99, n).tolist()) for n in (1, 1, 2, 9, 17, 33, 34, 70)]
    answers = [tuple(rng.integers(3, 99, n).tolist()) for n in rng.integers(1, 40, 50)]
    found = [(contexts[rng.integers(8)], answers[rng.integers(50)]) for _ in range(count)]
    return [Request(*pair) for pair in [*found, *((contexts[3], a) for a in answers[:20])]]


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize(("rows", "tokens"), [(32, 4096), (5, 100), (1, 4096)])
def test_every_request_gets_its_own_likelihood(monkeypatch, devices, rows, tokens):
    """However many devices share them, and however few fit into a batch."""
    monkeypatch.setattr(scoring, "TOKENS", tokens)

    def network(params, prefix_GT, begin_G, group_R, tokens_RT, targets_RT, **_):
        R, G = len(tokens_RT) // devices, len(prefix_GT) // devices
        assert R * devices == len(tokens_RT) and G * devices == len(prefix_GT)
        assert R < 2 * rows  # filled up to a power of 2
        assert R * tokens_RT.shape[1] < 2 * tokens or R == 1
        sums = np.zeros(len(tokens_RT))
        for r, (inputs, targets) in enumerate(zip(tokens_RT, targets_RT, strict=True)):
            g = r // R * G + group_R[r]  # a row reads the groups of its own device
            count = (targets >= 0).sum()
            assert (targets[:count] >= 0).all()
            read = [*prefix_GT[g, begin_G[g] :].tolist(), *inputs[:count].tolist()]
            sums[r] = worth(read, targets[:count].tolist())
        return sums, sums % 2 == 0

    monkeypatch.setattr(scoring, "_score", network)
    asked, done = requests(), []
    mesh = types.SimpleNamespace(size=devices)
    placed = types.SimpleNamespace(mesh=mesh, params=None, model=None, execution=None)
    found = list(score(placed, asked, rows, done.append))
    assert sorted(number for number, _ in found) == list(range(len(asked)))
    assert sum(done) == len(asked)
    for number, likelihood in found:
        one = asked[number]
        expected = worth([*one.context, *one.continuation[:-1]], one.continuation)
        assert (likelihood.log_likelihood, likelihood.greedy) == (expected, expected % 2 == 0)
