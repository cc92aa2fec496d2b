"""A GGUF file holds the network and says what it is."""

import dataclasses
import pathlib
import struct
import sys
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
import tiny
from gguf_networks import (
    NETWORKS,
    V,
    architecture,
    leaves_of,
    network,
    stored_block,
    stored_tensors,
)

from mobilellm_jax.errors import UserError
from mobilellm_jax.interop import inspection
from mobilellm_jax.interop.gguf import QUANTIZATIONS, export
from mobilellm_jax.interop.gguf_reader import TENSOR_TYPES, inspect
from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, RopeScaling, Stack, parameter_count

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_stands_where_it_belongs(name: str, tmp_path: pathlib.Path) -> None:
    model = NETWORKS[name]
    leaves = leaves_of(model)
    export(leaves, model, tiny.tokenizer(), tmp_path / "out.gguf", "f32")
    stored = stored_tensors(tmp_path / "out.gguf")
    count = sum(tensor.size for tensor in stored.values())
    d = 0
    for i, stack in enumerate(model.stacks):
        for layer in stack.applications:
            for path, array in stored_block(stored, model, d).items():
                np.testing.assert_array_equal(array, leaves[f"stack_{i}/{path}"][layer])
            d += 1
    np.testing.assert_array_equal(stored["token_embd.weight"], leaves["embedding"])
    np.testing.assert_array_equal(stored["output_norm.weight"], leaves["final_norm/scale"])
    if not model.tied:
        np.testing.assert_array_equal(stored["output.weight"].T, leaves["head"])
    if model.qk_norm == "unit":
        ones = [stored.pop(name) for name in list(stored) if "_q_norm" in name or "_k_norm" in name]
        assert len(ones) == 2 * model.depth and all((one == 1).all() for one in ones)
    if model.rope_scaling:
        factors = stored.pop("rope_freqs.weight")
        assert factors.min() == 1 and factors.max() == model.rope_scaling.factor
    unshared = tuple(
        dataclasses.replace(s, layers=s.layers * s.repeats, repeats=1) for s in model.stacks
    )
    assert sum(tensor.size for tensor in stored.values()) == parameter_count(
        dataclasses.replace(model, stacks=unshared)
    )
    assert inspect(tmp_path / "out.gguf").parameter_count == count


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_types_and_sizes(quantization: str, tied: bool, tmp_path: pathlib.Path) -> None:
    model = dataclasses.replace(NETWORKS["untied, narrow heads"], tied=tied)
    export(leaves_of(model), model, tiny.tokenizer(), tmp_path / "out.gguf", quantization)
    contents = inspect(tmp_path / "out.gguf")
    types = {tensor.name: tensor.type for tensor in contents.tensors}
    logits = "token_embd.weight" if tied else "output.weight"
    vectors = {name for name in types if "norm" in name}
    assert ("output.weight" in types) != tied
    assert {types[name] for name in vectors} == {"F32"}
    assert types[logits] == ("Q8_0" if quantization == "q4_0" else quantization.upper())
    assert {types[n] for n in types.keys() - vectors - {logits}} == {quantization.upper()}
    bits = {"F32": 32, "BF16": 16, "F16": 16, "Q8_0": 8.5, "Q4_0": 4.5}
    expected = sum(np.prod(tensor.shape) * bits[tensor.type] / 8 for tensor in contents.tensors)
    header = (tmp_path / "out.gguf").stat().st_size - expected
    assert 0 < header < 32_000  # the tokenizer
    assert ("general.quantization_version" in contents.keys) == quantization.startswith("q")


@pytest.mark.parametrize(("quantization", "steps"), [("q8_0", 127), ("q4_0", 8)])
def test_quantised_weights_are_the_nearest(
    quantization: str, steps: int, tmp_path: pathlib.Path
) -> None:
    model = NETWORKS["untied, narrow heads"]
    leaves = leaves_of(model)
    export(leaves, model, tiny.tokenizer(), tmp_path / "out.gguf", quantization)
    stored = stored_block(stored_tensors(tmp_path / "out.gguf"), model, 1)["mlp/down"]
    blocks = leaves["stack_0/mlp/down"][1].T.reshape(-1, 32)
    step = np.abs(blocks).max(axis=1, keepdims=True) / steps
    error = np.abs(stored.T.reshape(-1, 32) - blocks)
    half = 0.5 + steps * 2**-11  # the scale is rounded as well
    assert (error <= half * step).mean() > (0.99999 if quantization == "q8_0" else 0.95)
    assert (error <= 2 * half * step).all()  # one side of zero has only 7 of q4_0's 16 values


@pytest.mark.parametrize("quantization", ["f16", "bf16", "q8_0"])
def test_blocks_of_different_widths_in_narrow_types(
    quantization: str, tmp_path: pathlib.Path
) -> None:
    model = NETWORKS["widths of their own, everything"]
    leaves = leaves_of(model)
    export(leaves, model, tiny.tokenizer(), tmp_path / "out.gguf", quantization)
    stored = stored_tensors(tmp_path / "out.gguf")
    places = [(i, layer) for i, stack in enumerate(model.stacks) for layer in stack.applications]
    for d, (i, layer) in enumerate(places):
        for path, array in stored_block(stored, model, d).items():
            leaf = leaves[f"stack_{i}/{path}"][layer]
            if "bias" in path or "scale" in path:
                np.testing.assert_array_equal(array, leaf)
            elif quantization == "q8_0":
                assert np.abs(array - leaf).max() <= 0.51 * np.abs(leaf).max() / 127
            else:
                narrow = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}[quantization]
                np.testing.assert_array_equal(array, leaf.astype(narrow).astype(np.float32))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_header(name: str, tmp_path: pathlib.Path) -> None:
    model = NETWORKS[name]
    meta = {"name": "Ours", "author": "us", "license": "apache-2.0"}
    export(leaves_of(model), model, tiny.tokenizer(), tmp_path / "out.gguf", meta=meta)
    contents = inspect(tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    assert contents.keys == {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    assert [(t.name, t.shape, t.type) for t in contents.tensors] == [
        (t.name, tuple(reversed(t.shape.tolist())), t.tensor_type.name) for t in reader.tensors
    ]
    blocks = [stack for stack in model.stacks for _ in stack.applications]
    widths = [
        [getattr(stack, name) for stack in blocks] for name in ("mlp_width", "heads", "kv_heads")
    ]
    if architecture(model) != "deci":  # one number for all
        widths = [values[0] for values in widths]
    expected = {
        "context_length": 512,
        "embedding_length": model.width,
        "block_count": model.depth,
        "feed_forward_length": widths[0],
        "attention.head_count": widths[1],
        "attention.head_count_kv": widths[2],
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "attention.layer_norm_rms_epsilon": pytest.approx(model.norm_eps),
        "rope.dimension_count": model.head_dim,
        "rope.freq_base": model.rope_theta,
        "vocab_size": V + 5,
    }
    assert contents.architecture == architecture(model)
    assert {k: contents.keys[f"{contents.architecture}.{k}"] for k in expected} == expected
    assert {key: contents.keys[f"general.{key}"] for key in meta} == meta
    assert contents.keys["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    assert contents.keys["general.size_label"].endswith(("K", "M"))
    assert contents.tokenizer_model == "llama"


def test_types_of_tensors_have_the_names_of_the_package() -> None:
    assert TENSOR_TYPES == {n: gguf.GGMLQuantizationType(n).name for n in TENSOR_TYPES}


def test_any_floating_dtype_is_read(tmp_path: pathlib.Path) -> None:
    model = NETWORKS["untied, narrow heads"]
    narrow = leaves_of(model, ml_dtypes.bfloat16)
    wide = {path: leaf.astype(np.float32) for path, leaf in narrow.items()}
    for name, leaves in (("narrow", narrow), ("wide", wide)):
        export(leaves, model, tiny.tokenizer(), tmp_path / name, "bf16", {"name": "same"})
    assert (tmp_path / "narrow").read_bytes() == (tmp_path / "wide").read_bytes()
    np.testing.assert_array_equal(
        stored_tensors(tmp_path / "narrow")["token_embd.weight"], wide["embedding"]
    )


class Drawn:
    """A leaf that is made anew whenever it is read, and so takes no memory between."""

    dtype = np.dtype(np.float32)

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __getitem__(self, index: slice) -> np.ndarray:
        return np.full(self.shape, 0.5, np.float32)[index]


def test_one_leaf_after_another_is_in_memory(tmp_path: pathlib.Path) -> None:
    model = network(Stack(12, 4, 4, 1024), width=256)
    leaves = {path: Drawn(leaf.shape) for path, leaf in flat(transformer.shapes(model)).items()}
    small = network(Stack(1, 4, 4, 256), width=256)
    export(leaves_of(small), small, tiny.tokenizer(), tmp_path / "imports.gguf", "q8_0")
    tracemalloc.start()
    export(leaves, model, tiny.tokenizer(), tmp_path / "out.gguf", "q8_0")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    largest = 4 * max(np.prod(leaf.shape) for leaf in leaves.values())
    assert peak < 1.6 * largest < 0.5 * 4 * parameter_count(model)


def test_rows_that_k_quants_cannot_take_are_told_of(tmp_path: pathlib.Path) -> None:
    for name, told in (("MobileLLM", True), ("untied, narrow heads", True)):
        notes = export(leaves_of(NETWORKS[name]), NETWORKS[name], tiny.tokenizer(), tmp_path / name)
        assert any("K-quants" in note for note in notes) == told
    model = network(Stack(1, 4, 4, 512), width=128, head_dim=32)
    (note,) = export(leaves_of(model), model, tiny.tokenizer(), tmp_path / "half.gguf")
    assert "rows of 128 numbers" in note
    model = network(Stack(1, 4, 4, 512), width=256)
    assert export(leaves_of(model), model, tiny.tokenizer(), tmp_path / "out.gguf") == []


PLAIN = Stack(2, 4, 2, 256)


@pytest.mark.parametrize(
    ("model", "options", "obstacle"),
    [
        (network(dataclasses.replace(PLAIN, rope=False)), {}, "NoPE"),
        (network(PLAIN, mlp="relu"), {}, "its MLP is relu"),
        (network(dataclasses.replace(PLAIN, repeats=2), ls_kv="first_pass"), {}, "first_pass"),
        (
            network(PLAIN, dataclasses.replace(PLAIN, mlp_width=128)),
            {"architecture": "llama"},
            "llama cannot .* its stacks differ",
        ),
        (
            network(PLAIN, dataclasses.replace(PLAIN, mlp_width=128), qk_norm="unit"),
            {},
            "qwen3 because its stacks differ .*; deci because its QK-norm is 'unit'",
        ),
        (network(PLAIN, qk_norm="unit", qkv_bias=True), {}, "qwen3 because .* have biases"),
        (network(PLAIN, qk_norm="unit", out_bias=True), {}, "qwen3 because what .* has biases"),
        (
            network(PLAIN, qkv_bias=True),
            {"architecture": "qwen2"},
            "qwen2 cannot .* 4 heads of 64",
        ),
        (
            network(PLAIN, qk_norm="unit", rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64)),
            {},
            "qwen3 because its RoPE is scaled",
        ),
        (network(PLAIN), {"architecture": "mistral"}, "'mistral' is not one of qwen2, llama"),
        (
            network(Stack(1, 4, 2, 40)),
            {"quantization": "q8_0"},
            r"blk.0.ffn_down.weight has rows of 40 .* q8_0",
        ),
        (network(PLAIN), {"quantization": "q4_k_m"}, "'q4_k_m' is not one of"),
        (network(PLAIN), {"out": "gs://bucket/model.gguf"}, "name a local file"),
        (dataclasses.replace(network(PLAIN), vocab_size=V - 1), {}, f"{V} tokens and the model"),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused(
    model: ModelConfig, options: dict[str, str], obstacle: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(UserError, match=obstacle):
        export(
            leaves_of(model), model, tiny.tokenizer(), **{"out": tmp_path / "out.gguf", **options}
        )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "quantization", "path", "tensor"),
    [
        (np.nan, "f32", "stack_0/mlp/up", "blk.1.ffn_up.weight is not finite in F32"),
        (np.inf, "bf16", "stack_0/mlp/up", "blk.1.ffn_up.weight is not finite in BF16"),
        (-1e5, "f16", "stack_0/mlp/up", "blk.1.ffn_up.weight is not finite in F16"),
        (1e7, "q8_0", "stack_0/mlp/up", "blk.1.ffn_up.weight is not finite in Q8_0"),
        (np.nan, "q4_0", "stack_0/mlp_norm/scale", "blk.1.ffn_norm.weight is not finite in F32"),
    ],
)
def test_a_weight_that_is_not_finite_is_refused(
    value: float, quantization: str, path: str, tensor: str, tmp_path: pathlib.Path
) -> None:
    model = network(PLAIN)
    leaves = leaves_of(model)
    leaves[path][1, 2] = value
    with pytest.raises(UserError, match=tensor):
        export(leaves, model, tiny.tokenizer(), tmp_path / "out.gguf", quantization)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("quantization", "largest"),
    [
        ("f32", np.finfo(np.float32).max),
        ("bf16", float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)),
        ("f16", np.finfo(np.float16).max),
        ("q8_0", 127 * float(np.finfo(np.float16).max)),
        ("q4_0", 8 * float(np.finfo(np.float16).max)),
    ],
)
def test_the_largest_number_of_a_type_is_written_and_none_beyond(
    quantization: str, largest: float, sign: int, tmp_path: pathlib.Path
) -> None:
    model = network(Stack(1, 2, 1, 32), width=64, head_dim=32)
    leaves = leaves_of(model)
    leaves["stack_0/mlp/up"][0, 2] = sign * largest
    export(leaves, model, tiny.tokenizer(), tmp_path / "out.gguf", quantization)
    stored = stored_tensors(tmp_path / "out.gguf")["blk.0.ffn_up.weight"]
    assert np.isfinite(stored).all() and np.abs(stored).max() == pytest.approx(largest, rel=1e-6)
    with np.errstate(over="ignore"):
        leaves["stack_0/mlp/up"][0, 2] *= np.float32(1.0001)
    with pytest.raises(UserError, match="is not finite in"):
        export(leaves, model, tiny.tokenizer(), tmp_path / "beyond.gguf", quantization)


def test_a_network_is_called_as_its_file_unless_it_has_a_name(tmp_path: pathlib.Path) -> None:
    model = network(Stack(1, 2, 1, 32), width=64, head_dim=32)
    for meta, name in (({"author": "us"}, "little"), ({"name": "Ours"}, "Ours")):
        export(leaves_of(model), model, tiny.tokenizer(), tmp_path / "little.gguf", meta=meta)
        assert inspect(tmp_path / "little.gguf").keys["general.name"] == name
        (tmp_path / "little.gguf").unlink()


def test_nothing_is_overwritten(tmp_path: pathlib.Path) -> None:
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(UserError, match=r"out\.gguf exists"):
        export(leaves_of(network(PLAIN)), network(PLAIN), tiny.tokenizer(), tmp_path / "out.gguf")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_without_the_package_a_sentence_says_how_to_get_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"mobilellm-jax\[gguf\]"):
        export(leaves_of(network(PLAIN)), network(PLAIN), tiny.tokenizer(), tmp_path / "out.gguf")


def test_a_header_is_read_without_the_package(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That no module of ours needs it is seen where nothing else is imported (test_huggingface.py)."""
    model = network(PLAIN)
    export(leaves_of(model), model, tiny.tokenizer(), tmp_path / "out.gguf")
    for name in ("gguf", "torch", "transformers", "tokenizers"):
        monkeypatch.setitem(sys.modules, name, None)
    assert inspect(tmp_path / "out.gguf").architecture == "llama"


def test_a_damaged_file_is_named(tmp_path: pathlib.Path) -> None:
    model = network(PLAIN)
    export(leaves_of(model), model, tiny.tokenizer(), tmp_path / "out.gguf")
    whole = (tmp_path / "out.gguf").read_bytes()
    damaged = tmp_path / "damaged.gguf"
    rng = np.random.default_rng(0)
    for length in [*range(24), *rng.integers(24, 9000, 100)]:
        damaged.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"damaged\.gguf is"):
            inspect(damaged)
    for _ in range(300):  # may be read, may be refused, but neither crashes nor takes all memory
        garbled = np.frombuffer(whole[:9000], np.uint8).copy()
        garbled[rng.integers(4, 400, 3)] = rng.integers(256, size=3)
        damaged.write_bytes(garbled.tobytes())
        try:
            inspect(damaged)
        except UserError as error:
            assert "damaged" in str(error)
    with pytest.raises(UserError, match="there is no file"):
        inspect(tmp_path / "absent.gguf")


@pytest.mark.parametrize(
    ("key", "found"),
    [
        ("general.architecture", b"\x04\0\0\0" + bytes(4)),  # a number
        ("tokenizer.ggml.model", b"\x09\0\0\0\x04\0\0\0" + bytes(8)),  # a list
        ("tokenizer.ggml.tokens", b"\x08\0\0\0" + bytes(8)),  # a text
    ],
)
def test_a_key_of_another_kind_is_damage(key: str, found: bytes, tmp_path: pathlib.Path) -> None:
    head = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key))
    (tmp_path / "odd.gguf").write_bytes(head + key.encode() + found)
    with pytest.raises(UserError, match=r"odd\.gguf is damaged"):
        inspect(tmp_path / "odd.gguf")


def test_tensors_without_numbers_are_shown(tmp_path: pathlib.Path) -> None:
    shape = struct.pack("<IQ", 1, 0)
    table = [
        struct.pack("<Q", 1) + name + shape + struct.pack("<IQ", kind, 0)
        for kind, name in enumerate((b"a", b"b"))
    ]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(table), 0)
    (tmp_path / "empty.gguf").write_bytes(head + b"".join(table))
    assert "F32 0.0%, F16 0.0%" in inspection.inspect(tmp_path / "empty.gguf")
