"""Networks whose blocks differ in their widths: in formats that have one width for all, exactly."""

import dataclasses

import jax
import numpy as np
import pytest
import runs
import tiny
import weights
from gguf_networks import stored_tensors
from weights import SMALL, load_stock, random_leaves, random_tokens

from mobilellm_jax.interop.gguf_reader import inspect
from mobilellm_jax.interop.stored import open_model
from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import Stack, parameter_count
from mobilellm_jax.model.padding import padded, widest
from mobilellm_jax.prune import take_out
from mobilellm_jax.training.checkpoint import write_model

STACKS = (Stack(2, 6, 3, 20), Stack(1, 2, 2, 12), Stack(1, 3, 1, 28))
PRUNED = dataclasses.replace(SMALL, stacks=STACKS)  # heads of the widest: 3 KV heads of 3 each
NETWORKS = {
    "llama": dataclasses.replace(PRUNED, width=54),
    "mistral": PRUNED,
    "qwen2": dataclasses.replace(PRUNED, qkv_bias=True),
    "qwen3": dataclasses.replace(PRUNED, qk_norm="unit"),
    "llama, biases": dataclasses.replace(PRUNED, width=54, out_bias=True),
}


def checkpoint(model, folder):
    leaves = random_leaves(model)
    write_model(leaves, model, tiny.tokenizer(), {}, folder)
    return leaves


def converted(source, out, *more):
    ended = runs.program("mobilellm_jax.convert", f"--checkpoint={source}", f"--out={out}", *more)
    assert ended.status == 0, ended.err
    return ended


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[pytest.mark.slow] * (n in ("llama", "mistral")))  # without biases
        for n in NETWORKS
    ],
)
def test_hugging_face_computes_the_same(name, tmp_path):
    model, family = NETWORKS[name], name.split(",")[0]
    leaves = checkpoint(model, tmp_path / "ours")
    ended = converted(tmp_path / "ours", tmp_path / "hf", "--to=hf")
    wide = widest(model)
    assert f"{parameter_count(model):,} parameters are {parameter_count(wide):,}" in ended.out
    loaded = load_stock(tmp_path / "hf")
    assert loaded.config.model_type == family and loaded.config.intermediate_size == 28
    tokens_BT = random_tokens(model)
    ours = weights.logits(_nested(leaves), model, tokens_BT)
    np.testing.assert_allclose(weights.logits_of_torch(loaded, tokens_BT), ours, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [n if n == "llama, biases" else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS],
)
def test_what_was_filled_up_is_found_again(name, tmp_path):
    """Imported and with the zeros taken out it is the network that it was, bit for bit."""
    model = NETWORKS[name]
    leaves = checkpoint(model, tmp_path / "ours")
    converted(tmp_path / "ours", tmp_path / "hf", "--to=hf")
    take_out(tmp_path / "hf", tmp_path / "again")
    again = open_model(tmp_path / "again")
    widths = [(s.layers, s.heads, s.kv_heads, s.mlp_width) for s in again.model.stacks]
    assert widths == [(s.layers, s.heads, s.kv_heads, s.mlp_width) for s in STACKS]
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(again.leaves[path][:], leaf, err_msg=path)


def test_shared_folders_keep_the_widths(tmp_path):
    model = NETWORKS["llama"]
    leaves = checkpoint(model, tmp_path / "ours")
    converted(tmp_path / "ours", tmp_path / "hf", "--to=hf-shared")
    found = open_model(tmp_path / "hf")
    assert found.model == model
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(found.leaves[path][:], leaf)


def test_gguf_has_the_widths_of_the_blocks_or_of_the_widest(tmp_path):
    """As `deci` exactly the network's parameters; as `llama`, on request, those of the padded one."""
    pytest.importorskip("gguf")
    model = dataclasses.replace(PRUNED, head_dim=16, out_bias=True)
    leaves = checkpoint(model, tmp_path / "ours")
    options = ["--to=gguf", "--quantization=f32"]
    own = converted(tmp_path / "ours", tmp_path / "own.gguf", *options)
    assert "--architecture=llama" in own.out and "filled up" not in own.out
    one = converted(tmp_path / "ours", tmp_path / "one.gguf", *options, "--architecture=llama")
    wide = widest(model)
    assert f"{parameter_count(model):,} parameters are {parameter_count(wide):,}" in one.out
    sizes = {}
    for name, expected in (("own", model), ("one", wide)):
        contents = inspect(tmp_path / f"{name}.gguf")
        assert contents.parameter_count == parameter_count(expected)
        assert contents.architecture == {"own": "deci", "one": "llama"}[name]
        sizes[name] = (tmp_path / f"{name}.gguf").stat().st_size
    zeros = 4 * (parameter_count(wide) - parameter_count(model))
    assert zeros < sizes["one"] - sizes["own"] + 200 < zeros + 400  # lists, alignment
    shown = runs.program("mobilellm_jax.convert", f"--inspect={tmp_path / 'own.gguf'}").out
    assert "architecture deci" in shown and "feed_forward_length [20, 20, 12, 28]" in shown
    up = stored_tensors(tmp_path / "one.gguf")["blk.2.ffn_up.weight"]  # the stack of 12 channels
    np.testing.assert_array_equal(up[:12].T, leaves["stack_1/mlp/up"][0])
    assert not up[12:].any()


def test_gguf_fills_up_what_has_no_architecture_of_its_own_widths(tmp_path):
    pytest.importorskip("gguf")
    checkpoint(NETWORKS["qwen3"], tmp_path / "ours")
    done = converted(tmp_path / "ours", tmp_path / "net.gguf", "--to=gguf")
    assert "gguf has one for all: filled up" in done.out
    contents = inspect(tmp_path / "net.gguf")
    assert contents.architecture == "qwen3"
    assert contents.keys["qwen3.attention.head_count"] == 9


def test_slices_are_those_of_the_whole():
    model = NETWORKS["qwen2"]
    leaves, wide = padded(random_leaves(model), model)
    for path, shape in flat(transformer.shapes(wide)).items():
        whole = leaves[path][:]
        assert whole.shape == leaves[path].shape == shape.shape
        if path.startswith("stack_"):
            np.testing.assert_array_equal(leaves[path][0], whole[0])
            np.testing.assert_array_equal(leaves[path][0:1], whole[0:1])
            np.testing.assert_array_equal(leaves[path][0, 1:3], whole[0, 1:3])
            np.testing.assert_array_equal(leaves[path][:, 1:3], whole[:, 1:3])
    tokens = random_tokens(model)
    both = [
        jax.jit(transformer.apply, static_argnums=1)(_nested(of), m, tokens)
        for of, m in ((random_leaves(model), model), (leaves, wide))
    ]
    np.testing.assert_allclose(both[0], both[1], atol=1e-5)


def _nested(leaves):
    from mobilellm_jax.leaves import nested

    return nested({path: np.asarray(leaf[:]) for path, leaf in leaves.items()})
