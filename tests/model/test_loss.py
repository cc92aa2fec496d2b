"""The chunked sums against float64, their gradients, what they cost, and eight devices against one."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.loss import sum_over_chunks, summed_loss
from mobilellm_jax.parallel.mesh import make_mesh

ROWS, LENGTH, WIDTH, VOCAB = 8, 24, 16, 50


@pytest.fixture(scope="module")
def case():
    """Hidden states, output embedding, targets, and weights of which some are 0 and some not 1."""
    keys = jax.random.split(jax.random.key(0), 4)
    weight = jax.random.choice(keys[3], jnp.array([0.0, 1.0, 1.0, 0.5]), (ROWS, LENGTH))
    return (
        3 * jax.random.normal(keys[0], (ROWS, LENGTH, WIDTH)),
        jax.random.normal(keys[1], (WIDTH, VOCAB)),
        jax.random.randint(keys[2], (ROWS, LENGTH), 0, VOCAB),
        weight.at[2].set(0.0),
    )


def exact(hidden, matrix, targets, weight, z_loss):
    """Sum, losses and gradients in float64, of the whole logits."""
    hidden, matrix, weight = (np.asarray(x, np.float64) for x in (hidden, matrix, weight))
    logits = hidden @ matrix
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    softmax, one_hot = np.exp(logits - log_z[..., None]), np.eye(VOCAB)[np.asarray(targets)]
    by_logits = softmax * (1 + 2 * z_loss * log_z)[..., None] - one_hot
    by_logits *= weight[..., None]
    by_matrix = np.einsum("btd,btv->dv", hidden, by_logits)
    return (weight * (nll + z_loss * log_z**2)).sum(), nll, by_logits @ matrix.T, by_matrix


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunks", [1, 2, 8])
def test_value_and_gradients_equal_float64(case, chunks, z_loss):
    hidden, matrix, targets, weight = case
    total, nll, by_hidden, by_matrix = exact(*case, z_loss)

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(hidden, matrix):
        value, losses = summed_loss(hidden, matrix, targets, weight, z_loss, chunks)
        return 3 * value, losses  # the sum need not be the end of the chain

    (value, losses), gradients = jax.jit(loss)(hidden, matrix)
    np.testing.assert_allclose(value, 3 * total, rtol=1e-5)
    np.testing.assert_allclose(losses, nll, rtol=1e-5, atol=1e-5)
    for ours, plain in zip(gradients, (3 * by_hidden, 3 * by_matrix), strict=True):
        np.testing.assert_allclose(ours, plain, atol=3e-6 * np.abs(plain).max())
    assert not gradients[0][2].any()  # nothing counts in this row
    alone = summed_loss(*case, z_loss, chunks)  # without a gradient, another walk
    np.testing.assert_allclose(alone[0], total, rtol=1e-5)
    np.testing.assert_allclose(alone[1], nll, rtol=1e-5, atol=1e-5)


def test_a_tied_embedding_gets_both_gradients(case):
    """Looked up and multiplied with: the sum of what each use gives by autodiff."""
    _, matrix, targets, weight = case

    def loss(embedding, chunked):
        hidden = jnp.sin(embedding[targets])
        if chunked:
            return summed_loss(hidden, embedding.T, targets, weight, 0.1, 4)[0]
        logits = hidden @ embedding.T
        log_z = jax.nn.logsumexp(logits, -1)
        nll = log_z - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return (weight * (nll + 0.1 * log_z**2)).sum()

    ours, plain = (jax.grad(loss)(matrix.T, chunked) for chunked in (True, False))
    np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-4)


def test_what_is_shown_has_no_gradient(case):
    hidden, matrix, targets, weight = case
    gradients = jax.grad(lambda h, m: summed_loss(h, m, targets, weight)[1].sum(), argnums=(0, 1))(
        hidden, matrix
    )
    assert not any(g.any() for g in gradients)


def products(jaxpr, times=1):
    """(how often, multiply-adds) of every product in a program, loops counted."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            yield times, inner * eqn.outvars[0].aval.size
        inside = times * (eqn.params["length"] if eqn.primitive.name == "scan" else 1)
        for value in eqn.params.values():
            for sub in value if isinstance(value, tuple | list) else (value,):
                sub = getattr(sub, "jaxpr", sub)
                if hasattr(sub, "eqns"):
                    yield from products(sub, inside)


@pytest.mark.parametrize("chunks", [1, 8])
def test_three_products_to_train_and_one_to_evaluate(case, chunks):
    hidden, matrix, targets, weight = case

    def loss(hidden, matrix):
        return summed_loss(hidden, matrix, targets, weight, 0.1, chunks)[0]

    whole = ROWS * LENGTH * WIDTH * VOCAB
    for function, expected in ((jax.grad(loss, (0, 1)), 3), (loss, 1)):
        found = list(products(jax.make_jaxpr(function)(hidden, matrix).jaxpr))
        assert [times for times, _ in found] == [chunks] * expected
        assert sum(times * size for times, size in found) == expected * whole


def test_logits_never_exist_whole(case):
    hidden, matrix, targets, weight = case

    def whole_logits(chunks):
        def total(h, m):
            return summed_loss(h, m, targets, weight, 0.0, chunks)[0]

        text = jax.jit(jax.grad(total, (0, 1))).lower(hidden, matrix).compile().as_text()
        return f"f32[{ROWS * LENGTH},{VOCAB}]" in text

    assert whole_logits(1)
    assert not whole_logits(4)


def test_products_are_in_bfloat16_and_sums_in_float32(case):
    hidden, matrix, targets, weight = case
    rounded = hidden.astype(jnp.bfloat16)

    def loss(hidden, matrix):
        return summed_loss(hidden, matrix, targets, weight, 0.0, 4)[0]

    total, gradients = jax.value_and_grad(loss, (0, 1))(rounded, matrix)
    assert (total.dtype, gradients[0].dtype, gradients[1].dtype) == (
        jnp.float32,
        jnp.bfloat16,
        jnp.float32,
    )
    close, _, by_hidden, by_matrix = exact(rounded, matrix.astype(jnp.bfloat16), *case[2:], 0.0)
    np.testing.assert_allclose(total, close, rtol=1e-5)
    for ours, theirs in zip(gradients, (by_hidden, by_matrix), strict=True):
        error = np.linalg.norm(np.asarray(ours, np.float64) - theirs)
        assert error < 5e-3 * np.linalg.norm(theirs)


@pytest.mark.parametrize("split", [(8, 1), (2, 4), (1, 8)], ids=str)
@pytest.mark.parametrize("chunks", [1, 4])
def test_eight_devices_equal_one_and_reduce_once(case, split, chunks):
    """Each device walks its own rows; only weights travel, gathered once and reduced once."""
    hidden, matrix, targets, weight = case
    mesh = make_mesh(dict(zip(("data", "fsdp"), split, strict=True)), jax.devices())
    rows, pieces = (NamedSharding(mesh, P(*axes)) for axes in ((("data", "fsdp"),), ("fsdp",)))
    there = [jax.device_put(x, rows) for x in (hidden, targets, weight)]

    @jax.jit
    def gradient(hidden, matrix, targets, weight):
        def loss(hidden, matrix):
            return summed_loss(hidden, matrix, targets, weight, 0.1, chunks)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, matrix)

    alone = gradient(*case)
    with jax.set_mesh(mesh):
        placed = there[0], jax.device_put(matrix, pieces), *there[1:]
        together, text = gradient(*placed), gradient.lower(*placed).compile().as_text()
    for a, b in zip(*map(jax.tree.leaves, (together, alone)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    (_, nll), (by_hidden, by_matrix) = together
    assert nll.sharding.is_equivalent_to(rows, 2) and by_hidden.sharding.is_equivalent_to(rows, 3)
    assert by_matrix.sharding.is_equivalent_to(pieces, 2)
    fsdp = split[1] > 1
    assert text.count(" all-gather(") == fsdp
    assert text.count(" reduce-scatter(") == fsdp
    assert text.count(" all-reduce(") <= 1 + (split[0] > 1)  # the sum; over `data` the gradient
    assert not any(f" {kind}(" in text for kind in ("all-to-all", "collective-permute"))
    moved = [line for line in text.splitlines() if re.search(r" (all-\w+|reduce-scatter)\(", line)]
    assert moved and not any("while/body" in line for line in moved)  # none inside the walk


def test_rows_that_do_not_divide_are_computed_all_the_same(case):
    odd = tuple(x[:3] if x.shape[0] == ROWS else x for x in case)
    alone = summed_loss(*odd, 0.1, 4)
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 4}, jax.devices())):
        together = jax.jit(functools.partial(summed_loss, z_loss=0.1, chunks=4))(*odd)
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_other_costs_walk_the_same_way(case):
    """Divergence from a teacher, whose own output embedding every chunk sees: as by autodiff."""
    hidden, matrix, _, weight = case
    teacher_hidden, teacher_matrix = hidden[..., :4] / 3, 2 * matrix[:4]

    def divergence(logits_NV, given, teacher_DV):
        teacher_ND, weight_N = given
        teacher_NV = jax.nn.log_softmax(teacher_ND @ teacher_DV)
        ours_NV = jax.nn.log_softmax(logits_NV)
        kl_N = (jnp.exp(teacher_NV) * (teacher_NV - ours_NV)).sum(-1)
        return weight_N * kl_N, kl_N, weight_N[:, None] * (jnp.exp(ours_NV) - jnp.exp(teacher_NV))

    def walked(hidden, matrix):
        given = teacher_hidden, weight
        return sum_over_chunks(divergence, hidden, matrix, given, 3, teacher_matrix)[0]

    def plain(hidden, matrix):
        given = teacher_hidden.reshape(-1, 4), weight.reshape(-1)
        logits_NV = (hidden @ matrix).reshape(-1, VOCAB)
        return divergence(logits_NV, given, teacher_matrix)[0].sum()

    alone = jax.value_and_grad(plain, (0, 1))(hidden, matrix)
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 4}, jax.devices())):
        found = jax.jit(jax.value_and_grad(walked, (0, 1)))(hidden, matrix)
    for a, b in zip(*map(jax.tree.leaves, (found, alone)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_uneven_chunks_are_refused(case):
    with pytest.raises(UserError, match="5"):
        summed_loss(*case, chunks=5)


def test_extreme_logits_stay_finite():
    hidden, weight = jnp.full((1, 2, 4), 1e4), jnp.ones((1, 2))

    def loss(hidden):
        return summed_loss(hidden, jnp.eye(4), jnp.array([[0, 3]]), weight)

    (total, nll), gradient = jax.value_and_grad(loss, has_aux=True)(hidden)
    assert np.isfinite(total) and np.isfinite(nll).all() and np.isfinite(gradient).all()
