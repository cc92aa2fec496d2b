"""Networks whose blocks differ in their widths, as few stacks: the same network."""

import dataclasses

import jax
import numpy as np
import pytest
from weights import SMALL, logits, random_leaves, random_tokens

from mobilellm_jax.decoding.decoder import to_read
from mobilellm_jax.evaluation.scoring import Request, score
from mobilellm_jax.leaves import nested
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import Stack
from mobilellm_jax.model.padding import joined
from mobilellm_jax.pruning.slicegpt_full import BLOCK

# Widths of blocks that follow each other; heads of the widest: 3 KV heads of 3 each.
OWN = (Stack(2, 6, 3, 20), Stack(1, 2, 2, 12), Stack(1, 3, 1, 28))
PRUNED = dataclasses.replace(SMALL, stacks=OWN)
FEW = OWN[::2]
TWICE = tuple(dataclasses.replace(stack, repeats=2) for stack in FEW)
NETWORKS = {  # and how many stacks are left
    "biases and norms": (
        dataclasses.replace(PRUNED, qkv_bias=True, out_bias=True, qk_norm="scaled"),
        1,
    ),
    "integers": (
        dataclasses.replace(PRUNED, stacks=(*OWN[1:], Stack(2, 3, 1, 8)), quantization="w8a8"),
        2,  # queries of a KV head: 1, 3, 3
    ),
    "shared, first keys": (dataclasses.replace(PRUNED, stacks=TWICE, ls_kv="first_pass"), 1),
    "other applications, no positions": (
        dataclasses.replace(
            PRUNED, stacks=(*FEW, TWICE[1], dataclasses.replace(TWICE[0], rope=False))
        ),
        3,
    ),
    "walks": (
        dataclasses.replace(
            PRUNED, stacks=tuple(dataclasses.replace(s, order="repeat_all") for s in TWICE)
        ),
        2,
    ),
    "shortcuts": (dataclasses.replace(PRUNED, stacks=FEW, block=BLOCK), 1),
}


apply = jax.jit(transformer.apply, static_argnums=1)


@pytest.mark.parametrize("name", NETWORKS)
def test_joined_stacks_are_the_same_network(name):
    model, count = NETWORKS[name]
    params = nested(random_leaves(model))
    few, single = joined(params, model)
    assert len(single.stacks) == count
    assert jax.tree.map(np.shape, few) == jax.tree.map(np.shape, transformer.shapes(single))
    tokens_BT = random_tokens(model)
    own_BTD, found_BTD = apply(params, model, tokens_BT), apply(few, single, tokens_BT)
    np.testing.assert_allclose(found_BTD, own_BTD, atol=2e-5)


def test_equal_stacks_are_left_as_they_are():
    params = nested(random_leaves(SMALL))
    few, single = joined(params, SMALL)
    assert single == SMALL
    assert all(a is b for a, b in zip(jax.tree.leaves(few), jax.tree.leaves(params), strict=True))


def test_continuations_are_scored_as_without():
    model, _ = NETWORKS["shared, first keys"]
    network = to_read(nested(random_leaves(model)), model)
    assert len(network.model.stacks) == 1
    row_T = random_tokens(model)[0][:12].tolist()
    request = Request(tuple(row_T[:7]), tuple(row_T[7:]))
    ((_, found),) = score(network, [request])
    params = nested(random_leaves(model))
    logits_TV = np.asarray(logits(params, model, np.array([row_T[:-1]]))[0, -5:], np.float64)
    log_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    expected = log_TV[np.arange(5), request.continuation].sum()
    assert found.log_likelihood == pytest.approx(expected, abs=1e-4)
