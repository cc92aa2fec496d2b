"""One table per family says which foreign tensor is which slice of ours, in both directions."""

import dataclasses
import itertools

import numpy as np
import pytest
from weights import LLAMA4, NETWORKS, SMALL, changed, random_leaves

from mobilellm_jax.errors import UserError
from mobilellm_jax.interop import layout
from mobilellm_jax.interop.layout import HEADS, HEADS_INTERLEAVED, default_family, entries
from mobilellm_jax.model.config import Stack

FIRST_PASS = changed(
    ls_kv="first_pass", mlp="relu", stacks=(Stack(2, 4, 2, 80, 2), Stack(1, 2, 1, 48, 3))
)
CASES = [(model, default_family(model)) for model in NETWORKS.values()]
CASES += [(model, "llama4_text") for model in LLAMA4.values()]
CASES += [(model, "hf_shared") for model in (*NETWORKS.values(), *LLAMA4.values(), FIRST_PASS)]
CASES += [(NETWORKS["shared twice"], "mobilellm")]


def letters(shape):
    """An array whose values tell where they were."""
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape)


@pytest.mark.parametrize("model, family", CASES)
def test_both_directions_undo_each_other_and_leave_nothing_out(model, family):
    leaves = random_leaves(model)
    rebuilt = {path: np.full_like(leaf, np.nan) for path, leaf in leaves.items()}
    found = entries(model, family)
    assert len({entry.name for entry in found}) == len(found)
    for entry in found:
        foreign = entry.take(leaves)
        assert foreign.shape == entry.foreign_shape
        if entry.path is None:
            unit = family == "qwen3" and model.qk_norm == "unit"
            assert unit or (family == "llama" and (model.qkv_bias or model.out_bias))
            assert (foreign == (1 if unit else 0)).all()
        else:
            rebuilt[entry.path][... if entry.layer is None else entry.layer] = entry.read(foreign)
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(rebuilt[path], leaf)


def test_two_stacks_never_share_a_name():
    """Files that number blocks by their layer alone would hold one stack's weights twice over."""
    model = changed(stacks=(Stack(1, 4, 2, 80), Stack(1, 4, 2, 80)))
    with pytest.raises(UserError, match="more than one stack"):
        entries(model, "mobilellm")


@pytest.mark.parametrize("kind, shape", [
    (layout.VECTOR, (6,)),
    (layout.TABLE, (6, 4)),
    (layout.MATRIX, (6, 4)),
    (layout.HEADS, (6, 3, 8)),
    (layout.HEADS_INTERLEAVED, (6, 3, 8)),
    (layout.HEADS_OUT, (3, 8, 6)),
    (layout.HEADS_BIAS, (3, 8)),
    (layout.HEADS_BIAS_INTERLEAVED, (3, 8)),
])  # fmt: skip
def test_kinds_move_every_value_and_lose_none(kind, shape):
    ours = letters(shape)
    theirs = kind.write(ours)
    assert theirs.shape == kind.foreign_shape(shape)
    assert sorted(theirs.ravel()) == list(range(ours.size))
    np.testing.assert_array_equal(kind.read(theirs, shape), ours)


def test_matrices_are_out_by_in():
    x_D, ours_DF = np.array([1.0, 2, 3]), letters((3, 5))
    np.testing.assert_array_equal(layout.MATRIX.write(ours_DF) @ x_D, x_D @ ours_DF)
    ours_DNH = letters((3, 2, 4))
    q_NH = np.einsum("D,DNH->NH", x_D, ours_DNH)
    np.testing.assert_array_equal(HEADS.write(ours_DNH) @ x_D, q_NH.ravel())
    ours_NHD = letters((2, 4, 3))
    y_D = np.einsum("NH,NHD->D", q_NH, ours_NHD)
    np.testing.assert_array_equal(layout.HEADS_OUT.write(ours_NHD) @ q_NH.ravel(), y_D)


def test_interleaved_heads_turn_as_complex_numbers():
    """Scores of rotated queries and keys: neighbours as complex numbers there, halves here."""
    rng = np.random.default_rng(0)
    width, heads, head_dim = 10, 2, 8
    half = head_dim // 2
    x, y = rng.normal(size=(2, width))
    query, key = rng.normal(size=(2, width, heads, head_dim))
    angles = rng.uniform(0, 3, size=(2, half))

    def theirs(weight, vector, angle):
        rows = HEADS_INTERLEAVED.write(weight) @ vector
        pairs = rows.reshape(heads, half, 2)
        return (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angle)

    def ours(weight, vector, angle):
        first, second = np.split(np.einsum("D,DNH->NH", vector, weight), 2, axis=-1)
        cos, sin = np.cos(angle), np.sin(angle)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    there = (theirs(query, x, angles[0]) * theirs(key, y, angles[1]).conj()).real.sum(-1)
    here = (ours(query, x, angles[0]) * ours(key, y, angles[1])).sum(-1)
    np.testing.assert_allclose(there, here, rtol=1e-12)


def test_shared_blocks_are_written_as_often_as_applied_or_once():
    model = changed(stacks=(Stack(2, 4, 2, 80, 2, "reverse"), Stack(1, 4, 2, 80)))
    norm = "input_layernorm.weight"
    copies = [(e.name, e.path, e.layer) for e in entries(model, "llama") if norm in e.name]
    assert copies == [
        (f"model.layers.{d}.{norm}", f"stack_{i}/attention_norm/scale", layer)
        for d, (i, layer) in enumerate([(0, 0), (0, 1), (0, 1), (0, 0), (1, 0)])
    ]
    once = [(e.name, e.layer) for e in entries(model, "hf_shared") if norm in e.name]
    assert once == [
        (f"model.stacks.{i}.layers.{layer}.{norm}", layer) for i, layer in [(0, 0), (0, 1), (1, 0)]
    ]
    assert len({path for _, path, _ in copies}) == 2


@pytest.mark.parametrize(
    "changes, families, default",
    [
        ({}, "llama llama4_text", "llama"),
        ({"qkv_bias": True}, "llama qwen2", "qwen2"),
        ({"out_bias": True}, "llama", "llama"),
        ({"out_bias": True, "qkv_bias": True}, "llama", "llama"),
        ({"out_bias": True, "qk_norm": "unit"}, "", "qwen3"),
        ({"out_bias": True, "width": 50}, "llama", "mistral"),  # whose class then refuses the width
        ({"qk_norm": "unit"}, "qwen3 llama4_text", "qwen3"),
        ({"qk_norm": "scaled"}, "qwen3", "qwen3"),
        ({"mlp": "relu"}, "", "llama"),
        ({"stacks": (Stack(2, 4, 2, 80, rope=False),)}, "llama4_text", "llama"),
        # Without shared blocks it says nothing; they need not be the first.
        ({"ls_kv": "first_pass"}, "llama llama4_text", "llama"),
        ({"ls_kv": "first_pass", "stacks": (Stack(2, 4, 2, 80, 2),)}, "", "llama"),
        (
            {"ls_kv": "first_pass", "stacks": (Stack(1, 4, 2, 80), Stack(1, 4, 2, 80, 2))},
            "",
            "llama",
        ),
    ],
)
def test_a_stock_family_takes_what_it_can_express(changes, families, default):
    model = changed(**changes)
    assert default_family(model) == default
    taken = set()
    for name in ("llama", "qwen2", "qwen3", "llama4_text"):
        try:
            entries(model, name)
            taken.add(name)
        except UserError as error:
            assert str(error).startswith(f"{name} cannot express this network, because")
            assert str(error).endswith(": hf-shared can.")
    assert taken == set(families.split())
    assert entries(model, "hf_shared")


@pytest.mark.parametrize("family", ["llama", "mistral", "llama4_text", "mobilellm", "hf_shared"])
def test_channels_that_may_be_dead_are_in_no_file(family):
    """Norms would divide by all of them."""
    with pytest.raises(UserError, match="may be dead .*prune"):
        entries(changed(dead_channels=True), family)


@pytest.mark.parametrize("changes", [{"qkv_bias": True}, {"out_bias": True}])
def test_biases_that_a_network_does_without_are_as_long_as_what_they_are_added_to(changes):
    shapes = {entry.name: entry.foreign_shape for entry in entries(changed(**changes), "llama")}
    biases = {name: shape for name, shape in shapes.items() if name.endswith(".bias")}
    assert biases
    for name, shape in biases.items():
        assert shape == shapes[name.replace(".bias", ".weight")][:1], name


def test_leaf_by_leaf_every_leaf_is_read_in_one_go():
    found = entries(SMALL, "llama")
    ordered = layout.by_leaf(found)
    assert sorted(map(id, ordered)) == sorted(map(id, found))
    runs = [path for path, _ in itertools.groupby(entry.path for entry in ordered)]
    assert len(runs) == len(set(runs)) < len(found)


def test_a_table_of_ones_own():
    family = dataclasses.replace(layout.FAMILIES["llama"], name="mine", blocks="blk.{d}.")
    names = [entry.name for entry in entries(SMALL, family)]
    assert "blk.2.mlp.up_proj.weight" in names
    with pytest.raises(
        UserError, match="mine cannot express this network, because its MLP is relu.$"
    ):
        entries(changed(mlp="relu"), family)
