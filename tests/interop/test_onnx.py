"""A network as an ONNX graph: onnxruntime computes with it what we do, with and without a cache."""

import dataclasses
import json

import numpy as np
import pytest
import runs
import tiny
from weights import NETWORKS, SMALL, changed, logits, random_leaves, random_tokens

from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.onnx import DATA, GRAPH, export
from mobilellm_jax.leaves import nested
from mobilellm_jax.model.config import Stack, parameter_count
from mobilellm_jax.training.checkpoint import write_model

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

ALL = NETWORKS | {
    "ReLU": changed(mlp="relu", out_bias=True),
    "a pruned one, whose last block has no positions": changed(
        stacks=(Stack(2, 4, 2, 80), Stack(1, 2, 1, 33, repeats=2), Stack(1, 2, 2, 40, rope=False)),
        qk_norm="unit",
    ),
}


def exported(model, out, quantization="f32"):
    leaves = random_leaves(model)
    export(leaves, model, tiny.tokenizer(), out, quantization)
    return leaves


def ours(model, leaves, tokens_BT):
    return np.asarray(logits(nested(leaves), model, tokens_BT))


class Theirs:
    """The graph, and what it has cached of the rows that it has read so far."""

    def __init__(self, folder, rows):
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(folder / GRAPH, settings)
        self.outputs = [output.name for output in self.session.get_outputs()]
        numbers = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self.cache = {
            i.name: np.zeros((rows, i.shape[1], 0, i.shape[3]), numbers[i.type])
            for i in self.session.get_inputs()
            if i.name.startswith("past")
        }
        self.text_BS = np.zeros((rows, 0), np.int64)

    def read(self, tokens_BT, text_BT=None):
        """Logits [B, T, V] of further tokens."""
        text_BT = np.ones_like(tokens_BT) if text_BT is None else text_BT
        self.text_BS = np.concatenate([self.text_BS, text_BT], 1)
        positions_BS = np.maximum(self.text_BS.cumsum(1) - 1, 0)
        given = {
            "input_ids": tokens_BT,
            "attention_mask": self.text_BS,
            "position_ids": positions_BS[:, -tokens_BT.shape[1] :],
        }
        found = dict(zip(self.outputs, self.session.run(None, given | self.cache), strict=True))
        self.cache = {
            name: found[name.replace("past_key_values", "present")] for name in self.cache
        }
        return found["logits"]


@pytest.mark.parametrize("name", ALL)
def test_logits_with_and_without_a_cache(name, tmp_path):
    model = ALL[name]
    leaves = exported(model, tmp_path / "out")
    tokens_BT = random_tokens(model, length=20)
    wanted = ours(model, leaves, tokens_BT)
    assert wanted.std() > 0.3
    np.testing.assert_allclose(Theirs(tmp_path / "out", 2).read(tokens_BT), wanted, atol=1e-4)
    graph = Theirs(tmp_path / "out", 2)
    parts = [graph.read(tokens_BT[:, i:j]) for i, j in ((0, 9), (9, 10), (10, 17), (17, 20))]
    np.testing.assert_allclose(np.concatenate(parts, 1), wanted, atol=1e-4)
    onnx.checker.check_model(tmp_path / "out" / GRAPH, full_check=True)


HALVED = ("shared twice", "biases", "scaled QK-norm", next(reversed(ALL)))


@pytest.mark.parametrize("name", HALVED)
def test_a_graph_in_float16(name, tmp_path):
    """All of it: half the bytes in the file and in the cache, logits but for what 11 bits leave."""
    model, out = ALL[name], tmp_path / "out"
    leaves = exported(model, out, "f16")
    tokens_BT = random_tokens(model, length=20)
    wanted, graph = ours(model, leaves, tokens_BT), Theirs(out, 2)
    found = np.concatenate(
        [graph.read(tokens_BT[:, i:j]) for i, j in ((0, 9), (9, 10), (10, 20))], 1
    )
    assert {x.dtype for x in (found, *graph.cache.values())} == {np.dtype(np.float16)}
    error = np.abs(found - wanted)
    assert 1e-5 < error.max() < 2e-2 * np.abs(wanted).max() and error.std() < 5e-3 * wanted.std()
    onnx.checker.check_model(out / GRAPH, full_check=True)
    stored = onnx.load(out / GRAPH, load_external_data=False).graph.initializer
    assert {tensor.data_type for tensor in stored} == {onnx.TensorProto.FLOAT16}


QUANTISED = changed(width=64, stacks=(Stack(2, 4, 2, 96, repeats=2),), head_dim=16)


@pytest.mark.parametrize(("quantization", "bits"), [("q8_0", 8), ("q4_0", 4)])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_integers_are_those_of_gguf(tied, quantization, bits, tmp_path):
    """And products with them those of the numbers that they stand for, but for what 8 bits leave of x."""
    gguf = pytest.importorskip("gguf")
    model = dataclasses.replace(QUANTISED, tied=tied)
    leaves = random_leaves(model)
    for name, kind in (("f32", "f32"), ("small", quantization)):
        export(leaves, model, tiny.tokenizer(), tmp_path / name, kind)
    small = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(tmp_path / "small" / GRAPH).graph.initializer
    }
    graph = onnx.load(tmp_path / "f32" / GRAPH)
    matrices = [tensor for tensor in graph.graph.initializer if f"{tensor.name}_scale" in small]
    assert len(matrices) == 7 * model.stacks[0].layers + (1 if tied else 2)
    for tensor in matrices:
        integers, scale = small[tensor.name], small[f"{tensor.name}_scale"]
        own = 8 if tensor.name in ("embedding", "head") else bits
        if own == 4:
            integers = np.stack([integers & 15, integers >> 4], -1).reshape(*scale.shape, 32)
        numbers = (integers - 2.0 ** (own - 1)) * scale.astype(np.float32)[..., None]
        exact = onnx.numpy_helper.to_array(tensor)
        exact = exact if tensor.name == "embedding" else exact.T
        kind = gguf.GGMLQuantizationType[f"Q{own}_0"]
        wanted = gguf.dequantize(gguf.quantize(np.ascontiguousarray(exact), kind), kind)
        numbers = numbers.reshape(wanted.shape)
        # One step where a number lies between two integers.
        assert np.mean(np.abs(numbers - wanted) > 1e-5) < 1e-3
        assert np.abs(numbers - wanted).max() <= 1.01 * np.abs(scale).max()
        turned = numbers if tensor.name == "embedding" else numbers.T
        tensor.CopyFrom(onnx.numpy_helper.from_array(turned.astype(np.float32), tensor.name))
    onnx.save(graph, tmp_path / "f32" / GRAPH)
    tokens_BT = random_tokens(model, length=20)
    exact = ours(model, leaves, tokens_BT)
    wanted, got = (Theirs(tmp_path / name, 2).read(tokens_BT) for name in ("f32", "small"))
    assert (got - wanted).std() < 0.1 * wanted.std()
    assert 0.01 * exact.std() < (got - exact).std() < 0.8 * exact.std()


def test_a_shorter_row_is_padded_on_the_left(tmp_path):
    leaves = exported(SMALL, tmp_path / "out")
    tokens_BT = random_tokens(SMALL, length=12)
    text_BT = np.ones_like(tokens_BT)
    text_BT[1, :5] = 0
    graph = Theirs(tmp_path / "out", 2)
    found = np.concatenate(
        [graph.read(tokens_BT[:, i:j], text_BT[:, i:j]) for i, j in ((0, 8), (8, 9), (9, 12))], 1
    )
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[0], ours(SMALL, leaves, tokens_BT)[0], atol=1e-4)
    np.testing.assert_allclose(found[1, 5:], ours(SMALL, leaves, tokens_BT[1:, 5:])[0], atol=1e-4)


def test_every_weight_is_there_once(tmp_path):
    """Of a shared block and of a tied embedding, which the graph multiplies with without turning it."""
    model = NETWORKS["shared twice"]
    exported(model, tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / GRAPH, load_external_data=False).graph
    assert sum(node.op_type == "stack_0" for node in graph.node) == model.depth
    names = [tensor.name for tensor in graph.initializer]
    assert len(names) == len(set(names)) == 2 + 2 + 9 * model.stacks[0].layers
    numbers = parameter_count(model) + model.max_length * model.head_dim
    size = (tmp_path / "out" / DATA).stat().st_size
    assert 4 * numbers <= size <= 4 * numbers + 4096 * len(names)


def test_the_folder_is_one_of_optimum_and_transformers_js(tmp_path):
    exported(SMALL, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "llama" and config["num_key_value_heads"] == 2
    assert config["transformers.js_config"] == {"use_external_data_format": {"model.onnx": 1}}
    inputs = {i.name for i in Theirs(tmp_path / "out", 1).session.get_inputs()}
    cache = {f"past_key_values.{d}.{part}" for d in range(3) for part in ("key", "value")}
    assert inputs == cache | {"input_ids", "attention_mask", "position_ids"}
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.bos_token_id == tiny.tokenizer().bos_id


def test_what_is_refused(tmp_path, monkeypatch):
    leaves, tokenizer = random_leaves(SMALL), tiny.tokenizer()
    other = dataclasses.replace(NETWORKS["shared twice"], ls_kv="first_pass")
    with pytest.raises(UserError, match="ONNX cannot express .* read the keys of their first_pass"):
        export(random_leaves(other), other, tokenizer, tmp_path / "out")
    with pytest.raises(
        UserError, match=r"embedding has rows of 48 numbers, .* blocks of 32: .* f32"
    ):
        export(leaves, SMALL, tokenizer, tmp_path / "out", "q8_0")
    with pytest.raises(UserError, match="quantization='q2' is not one of f32, f16, q8_0, q4_0"):
        export(leaves, SMALL, tokenizer, tmp_path / "out", "q2")
    eight = dataclasses.replace(SMALL, quantization="w8a8")
    with pytest.raises(UserError, match=r"ONNX cannot express .* have 8 bits"):
        export(leaves, eight, tokenizer, tmp_path / "out")
    large = leaves | {"embedding": np.full_like(leaves["embedding"], 1e5)}
    with pytest.raises(UserError, match="the weight embedding is not finite in float16"):
        export(large, SMALL, tokenizer, tmp_path / "out", "f16")
    broken = leaves | {"embedding": np.full_like(leaves["embedding"], np.nan)}
    with pytest.raises(UserError, match="the weight embedding is not finite"):
        export(broken, SMALL, tokenizer, tmp_path / "out")
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(UserError, match=r"mobilellm-jax\[onnx\]"):
        export(leaves, SMALL, tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_program(tmp_path):
    write_model(random_leaves(SMALL), SMALL, tiny.tokenizer(), {}, tmp_path / "run")
    given = f"--checkpoint={tmp_path}/run", "--to=onnx", f"--out={tmp_path}/onnx"
    ended = runs.program("mobilellm_jax.convert", *given)
    assert ended.status == 0, ended
    assert "onnxruntime.InferenceSession" in ended.out and (tmp_path / "onnx" / GRAPH).exists()
    assert runs.program("mobilellm_jax.convert", *given).status == 1
