"""Slopes and DataInf's directions, against gradients of single rows that are taken one by one and kept."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
from scipy.stats import spearmanr
from weights import random_leaves

from data_mixing import derivatives
from mobilellm_jax.errors import UserError
from mobilellm_jax.leaves import nested
from mobilellm_jax.model.config import Stack
from mobilellm_jax.parallel.mesh import local_mesh, one_device
from mobilellm_jax.training.objectives import next_token

BOS, EOS = 1, 2
TIED = tiny.MODEL
UNTIED = dataclasses.replace(TIED, tied=False, stacks=(Stack(2, 4, 2, 48),))


def network(model, chunks=1):
    return derivatives.network_of(model, BOS, EOS, "float32", chunks)


@functools.cache
def parameters(model):
    return nested(random_leaves(model, std=0.02))


@functools.partial(jax.jit, static_argnums=2)
def losses(params, tokens, network):
    """As training has them: in all, of each target, and whether it counts."""
    found = next_token(params, {"tokens": tokens}, network)
    return found.total, found.nll_BT, found.weight_BT


def rows(count, seed):
    """Rows of several documents each, the last of a row cut off or followed by padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, TIED.vocab_size, (count, tiny.ROW + 1))
    tokens[:, 0] = BOS
    ends = rng.integers(5, tiny.ROW - 5, count)
    tokens[np.arange(count), ends], tokens[np.arange(count), ends + 1] = EOS, BOS
    tokens[0, ends[0] + 1 :] = BOS
    return tokens.astype(np.int32)


def made(model, layers="all", mesh=None, batch=8, **settings):
    mesh = mesh or one_device()
    params = parameters(model)
    return derivatives.differentiated(params, network(model), layers, mesh, batch, **settings)


@functools.partial(jax.jit, static_argnums=3)
@jax.grad
def own_gradient(chosen, rest, row, network):
    nll, weight = derivatives.token_losses({**rest, **chosen}, row[None], network)
    return nll.sum() / weight.sum()


def own_gradients(of, tokens):
    """Gradient of the mean loss of each row, one by one, float64 by name."""
    found = [own_gradient(of.chosen, of.rest, row, of.network) for row in tokens]
    return {n: np.stack([np.asarray(g[n], np.float64) for g in found]) for n in of.chosen}


def blocks(of, array, name):
    layers = of.chosen[name].shape[0] if name.startswith("stack_") else 1
    return array.reshape(len(array), layers, -1)


def direct_datainf(of, v, own):
    """Equation 5 of DataInf as a loop over blocks and samples."""
    found = {}
    for name in of.chosen:
        gradients = blocks(of, own[name], name)
        probe = blocks(of, np.asarray(v[name], np.float64)[None], name)[0]
        out = np.zeros_like(probe)
        for layer in range(probe.shape[0]):
            g, p = gradients[:, layer], probe[layer]
            damping = 0.1 * np.mean(np.mean(g**2, axis=1))
            for sample in g:
                out[layer] += (p - sample * (p @ sample) / (damping + sample @ sample)) / damping
        found[name] = (out / len(own[name])).reshape(of.chosen[name].shape)
    return found


def dots(direction, own):
    """Direction times each row's gradient."""
    return sum(
        np.einsum("ne,e->n", own[n].reshape(len(own[n]), -1), np.asarray(d, np.float64).ravel())
        for n, d in direction.items()
    )


def per_row(found, tokens):
    """Slopes of targets as slopes of the rows' mean losses, [n, K]."""
    targets = (tokens[:, 1:] != BOS).sum(1)
    return np.concatenate(list(found)).sum(-1) / targets[:, None]


@pytest.mark.parametrize(
    "model, layers",
    [
        (TIED, "all"),
        (UNTIED, "embedding+output"),
        *(
            pytest.param(model, layers, marks=pytest.mark.slow)
            for model, layers in (
                (TIED, "embedding"),
                (TIED, "output"),
                (TIED, "embedding+output"),
                (UNTIED, "embedding"),
                (UNTIED, "output"),
                (UNTIED, "all"),
            )
        ),
    ],
)
def test_slopes_and_datainf_equal_gradients_of_single_rows(model, layers):
    """On one device in several batches, and on eight."""
    devices = {"mesh": local_mesh(), "batch": 16} if model is UNTIED else {}
    of = made(model, layers, group=2, **devices)
    probes, sample, train = rows(5, 1), rows(11, 2), rows(14, 3)
    v = derivatives.mean_gradient(of, probes)
    inverse = derivatives.datainf(of, [v], train)[0]
    own = own_gradients(of, sample)
    expected = direct_datainf(of, v, own_gradients(of, train))
    found = per_row(derivatives.slopes(of, [v, inverse], sample), sample)
    for k, direction in enumerate((v, expected)):
        wanted = dots(direction, own)
        np.testing.assert_allclose(found[:, k], wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(
    "model, layers, chunks",
    [
        pytest.param(TIED, "embedding+output", 2, marks=pytest.mark.slow),
        (UNTIED, "embedding", 1),
        pytest.param(UNTIED, "output", 4, marks=pytest.mark.slow),
        pytest.param(UNTIED, "embedding+output", 1, marks=pytest.mark.slow),
    ],
)
def test_sums_over_documents_are_those_of_targets(model, layers, chunks):
    """One backward pass for all directions, against a forward pass for each; documents in a row."""
    of = dataclasses.replace(made(model, layers), network=network(model, chunks))
    sample = rows(6, 2)
    sample[:, 5] = sample[::2, 11] = BOS
    directions = [derivatives.mean_gradient(of, rows(3, seed)) for seed in (4, 5, 6)]
    by_target, by_document = (
        np.concatenate(list(derivatives.slopes(of, directions, sample, by))) for by in (True, False)
    )
    assert derivatives.slopes_program(of, False) is not derivatives.slopes_program(of, True)
    segments = np.cumsum(sample[:, :-1] == BOS, axis=1)
    for n, row in enumerate(segments):
        for segment in np.unique(row):
            mine = row == segment
            wanted = by_target[n][:, mine].sum(1)
            np.testing.assert_allclose(
                by_document[n][:, mine].sum(1), wanted, rtol=0, atol=1e-5 * np.abs(by_target).max()
            )
    # Targets that do not count, and what is read and predicts nothing, have no share.
    if layers == "output":
        assert not by_document[:, :, 4].any()
        return
    few, many = (derivatives.cost(of, k, sample.shape[1] - 1, False).slopes for k in (1, 9))
    forward = derivatives.cost(of, 9, sample.shape[1] - 1).slopes
    assert many - few < forward / 2


def test_weights_of_a_tied_embedding_are_two_whose_gradients_add_up():
    of, probes = made(TIED, mesh=local_mesh()), rows(11, 1)
    v = derivatives.mean_gradient(of, probes)

    def loss(params):
        total, _, weight_BT = losses(params, probes, of.network)
        return total / weight_BT.sum()

    whole = jax.jit(jax.grad(loss))(parameters(TIED))
    together = v["embedding"] + v["output"].T
    np.testing.assert_allclose(together, whole["embedding"], atol=1e-6)
    assert np.abs(v["embedding"]).max() > 0 and np.abs(v["output"]).max() > 0


@pytest.mark.slow
def test_devices_batches_groups_and_chunks_change_nothing():
    probes, sample, train = rows(6, 1), rows(10, 2), rows(9, 3)

    def found(mesh, batch, group, chunks=1):
        of = made(TIED, "all", mesh, batch, group=group)
        of = dataclasses.replace(of, network=network(TIED, chunks))
        v = derivatives.mean_gradient(of, probes)
        directions = [v, derivatives.datainf(of, [v], train)[0]]
        return per_row(derivatives.slopes(of, directions, sample), sample)

    alone = found(one_device(), 4, 1)
    scale = np.abs(alone).max(0)
    assert local_mesh().size > 1
    for other in (found(local_mesh(), 16, 2), found(one_device(), 6, 3, chunks=4)):
        np.testing.assert_allclose(other / scale, alone / scale, atol=2e-5)


def test_slopes_of_several_directions_are_those_of_each():
    of, sample = made(TIED), rows(5, 2)
    one, other = (derivatives.mean_gradient(of, rows(3, seed)) for seed in (5, 6))
    together = np.concatenate(list(derivatives.slopes(of, [one, other], sample)))
    for k, direction in enumerate((one, other)):
        alone = np.concatenate(list(derivatives.slopes(of, [direction], sample)))
        np.testing.assert_allclose(together[:, k], alone[:, 0], atol=1e-5)


def test_slopes_stay_inside_documents():
    of, sample = made(TIED), rows(3, 2)
    v = derivatives.mean_gradient(of, rows(3, 5))
    before = np.concatenate(list(derivatives.slopes(of, [v], sample)))
    second = np.flatnonzero(sample[1] == BOS)[1]
    changed = sample.copy()
    changed[1, 1:second] = 7
    after = np.concatenate(list(derivatives.slopes(of, [v], changed)))
    np.testing.assert_allclose(after[1, 0, second:], before[1, 0, second:], atol=1e-6)
    assert np.abs(after[1, 0, : second - 1] - before[1, 0, : second - 1]).max() > 1e-4


def test_a_positive_slope_is_a_sample_that_helps():
    """First order: what a probe's loss falls by, after one small step on a sample, ranks as the slope."""
    of, probes, sample = made(TIED), rows(8, 1), rows(24, 2)
    v = derivatives.mean_gradient(of, probes)
    slope = per_row(derivatives.slopes(of, [v], sample), sample)[:, 0]

    @jax.jit
    def probe_losses(chosen):
        weights = {**of.rest, **chosen}
        return derivatives.token_losses(weights, probes, of.network)

    def probe_loss(chosen):
        nll, weight = (np.asarray(x, np.float64) for x in probe_losses(chosen))
        return nll.sum() / weight.sum()

    own, rate = own_gradients(of, sample), 5e-3
    start, falls = probe_loss(of.chosen), []
    for i in range(len(sample)):
        stepped = {n: w - rate * own[n][i].astype(np.float32) for n, w in of.chosen.items()}
        falls.append(start - probe_loss(stepped))
    assert spearmanr(slope, falls).statistic >= 0.99
    # and by as much as the slope says, to first order
    np.testing.assert_allclose(np.array(falls) / rate, slope, atol=0.1 * np.abs(slope).max())


def test_losses_are_those_of_training():
    of, sample = made(UNTIED, batch=4), rows(7, 2)
    nll, weight = derivatives.losses(of, sample)
    _, nll_BT, weight_BT = losses(parameters(UNTIED), sample, of.network)
    np.testing.assert_array_equal(weight, weight_BT)
    np.testing.assert_allclose(nll, nll_BT * weight_BT, atol=1e-5)


def test_bad_input():
    params = parameters(TIED)
    with pytest.raises(UserError, match="layers=head: 'head' is not embedding, output, all"):
        derivatives.differentiated(params, network(TIED), "head", one_device(), 4)
    with pytest.raises(UserError, match="3 rows cannot be split over"):
        derivatives.differentiated(params, network(TIED), "all", local_mesh(), 3)
    empty = np.full((3, tiny.ROW + 1), BOS, np.int32)
    with pytest.raises(UserError, match="no token to predict"):
        derivatives.mean_gradient(made(TIED), empty)
    of = made(TIED, group=2)
    with pytest.raises(UserError, match="DataInf cannot be had"):
        derivatives.datainf(of, [derivatives.mean_gradient(of, rows(2, 1))], empty)
