"""A network exported to Hugging Face computes there what it computes here."""

import dataclasses
import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny
from weights import (
    LLAMA3,
    LLAMA4,
    NETWORKS,
    SMALL,
    V,
    assert_equal,
    changed,
    load_stock,
    ours,
    random_leaves,
    random_tokens,
    theirs,
)

from mobilellm_jax.data.plan import Plan, PlanSource, Stage
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop import huggingface, safetensors_files
from mobilellm_jax.interop.layout import default_family
from mobilellm_jax.leaves import nested
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import Stack, parameter_count
from mobilellm_jax.model.presets import preset

CASES = [(name, model, default_family(model)) for name, model in NETWORKS.items()]
CASES += [(name, model, "llama4_text") for name, model in LLAMA4.items()]


def exported(model, out, **options):
    leaves = random_leaves(model)
    huggingface.export(leaves, model, tiny.tokenizer(), out, **options)
    return leaves


@pytest.mark.parametrize(
    "name, model, family",
    [
        # What these have others have as well, with more to it.
        pytest.param(*case, marks=[pytest.mark.slow] * (case[0] in ("plain", "NoPE between")))
        for case in CASES
    ],
    ids=[f"{f}: {n}" for n, _, f in CASES],
)
def test_logits_and_gradients(name, model, family, tmp_path):
    leaves = exported(model, tmp_path / "out", family=family)
    loaded = load_stock(tmp_path / "out")
    assert loaded.config.model_type == family and loaded.config.dtype == loaded.dtype
    tokens_BT = random_tokens(model)
    assert_equal(ours(model, leaves, tokens_BT), theirs(loaded, model, family, tokens_BT))
    unshared = tuple(
        dataclasses.replace(s, layers=s.layers * s.repeats, repeats=1) for s in model.stacks
    )
    plain = dataclasses.replace(model, stacks=unshared)
    if family == "qwen3":  # where a norm without weights has some
        plain = dataclasses.replace(plain, qk_norm="scaled")
    zeros = 0
    if model.out_bias:  # where every projection has a bias
        plain = dataclasses.replace(plain, qkv_bias=True)
        zeros = sum(2 * s.layers * s.mlp_width for s in plain.stacks)
    assert loaded.num_parameters() == parameter_count(plain) + zeros


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, family",
    [
        ("mobilellm-125m", "llama"),
        ("mobilellm-ls-125m", "llama"),
        ("mobilellm-r1-140m", "qwen3"),
        ("mobilellm-r1-140m", "llama4_text"),
    ],
)
def test_full_size(name, family, tmp_path):
    model = preset(name)
    leaves = random_leaves(model, std=0.04)
    huggingface.export(leaves, model, tiny.tokenizer(), tmp_path / "out", family)
    loaded = load_stock(tmp_path / "out")
    tokens_BT = random_tokens(model, rows=1, length=64)
    assert_equal(ours(model, leaves, tokens_BT), theirs(loaded, model, family, tokens_BT))


@pytest.mark.parametrize("name", ["untied", "shared twice", "unit QK-norm"])
def test_packed_documents_have_the_losses_of_each_alone(name, tmp_path):
    torch = pytest.importorskip("torch")
    model = NETWORKS[name]
    leaves = exported(model, tmp_path / "out")
    loaded = load_stock(tmp_path / "out")
    rng = np.random.default_rng(2)
    documents = [[1, *rng.integers(3, V, size=n).tolist(), 2] for n in (5, 1, 20, 13, 9)]
    row_T = np.array([token for document in documents for token in document])
    segments_T = np.cumsum(row_T == 1)

    @jax.jit
    def log_probabilities(params):
        hidden_BTD = transformer.apply(params, model, row_T[None], segments_T[None])
        return jax.nn.log_softmax(transformer.logits(params, model, hidden_BTD)[0])

    ours_TV = np.asarray(log_probabilities(nested(leaves)))
    targets_T = np.flatnonzero(row_T[1:] != 1)
    mine = -ours_TV[targets_T, row_T[targets_T + 1]]
    alone = []
    for ids in documents:
        with torch.no_grad():
            alone_TV = loaded(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
        alone += (-alone_TV[np.arange(len(ids) - 1), ids[1:]]).tolist()
    np.testing.assert_allclose(mine, alone, rtol=1e-3, atol=1e-4)
    assert np.mean(mine) == pytest.approx(np.mean(alone), rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_are_the_rounded_ones(dtype, tmp_path):
    torch = pytest.importorskip("torch")
    model = NETWORKS["untied"]
    leaves = exported(model, tmp_path / "out", dtype=dtype)
    wide = huggingface.tensors(leaves, model, "llama")
    loaded = load_stock(tmp_path / "out")
    assert loaded.dtype == getattr(torch, dtype)
    for name, tensor in wide.items():
        expected = torch.tensor(np.ascontiguousarray(tensor[:])).to(loaded.dtype)
        assert torch.equal(loaded.state_dict()[name], expected), name


def test_without_a_dtype_each_weight_keeps_its_own(tmp_path):
    leaves = random_leaves(SMALL, "bfloat16")
    leaves["final_norm/scale"] = leaves["final_norm/scale"].astype(np.float32)
    huggingface.export(leaves, SMALL, tiny.tokenizer(), tmp_path / "out")
    found = safetensors_files.open_file(tmp_path / "out/model.safetensors")
    for name, tensor in found.items():
        assert tensor.dtype.name == ("float32" if name == "model.norm.weight" else "bfloat16")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("limit, files", [(10**9, 1), (100_000, 3), (1, 29)])
def test_shards_load_as_one(limit, files, tmp_path):
    writer = functools.partial(safetensors_files.write_files, max_shard_bytes=limit)
    leaves = exported(SMALL, tmp_path / "out", write_weights=writer)
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == files
    assert (tmp_path / "out/model.safetensors.index.json").exists() == (files > 1)
    state = load_stock(tmp_path / "out").state_dict()
    for name, tensor in huggingface.tensors(leaves, SMALL, "llama").items():
        np.testing.assert_array_equal(state[name].numpy(), tensor[:])


def test_the_folder_holds_what_runtimes_look_for(tmp_path):
    model = dataclasses.replace(NETWORKS["shared twice"], rope_scaling=LLAMA3)
    (tmp_path / "out").mkdir()  # empty, so it may be used
    leaves = random_leaves(model)
    files = huggingface.export(leaves, model, tiny.tokenizer(), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_hidden_layers"] == 6 and config["head_dim"] == 4
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000.0
    assert config["rope_scaling"]["rope_type"] == config["rope_parameters"]["rope_type"] == "llama3"
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["tie_word_embeddings"] is True
    assert config["mobilellm_jax"] == {"format": 1, "model": model.to_dict()}
    weights = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
    assert "lm_head.weight" not in weights
    for name, array in weights.items():
        if name.startswith("model.layers.0."):
            np.testing.assert_array_equal(array, weights[name.replace("layers.0.", "layers.1.")])


def test_the_model_card_tells_what_is_known(tmp_path):
    sources = PlanSource("code", "code"), PlanSource("math", "math")
    stage = Stage("train", None, {"code": 0.75, "math": 0.25})
    meta = {
        "step": 50,
        "rows": 1600,
        "config": {"row_length": 128, "init_from": "/home/me/runs/base"},
        "origin": {"directory": "/home/me/other", "family": "llama"},
        "plan": Plan(sources, (stage,), "tokenizer.model", "").to_dict(),
        "heldout": {"bits_per_byte": 1.5, "bits_per_byte/code": 1.25, "loss/code": 9.0},
    }
    model = NETWORKS["shared twice"]
    exported(model, tmp_path / "with", meta=meta)
    exported(model, tmp_path / "without", family="hf_shared")
    card = (tmp_path / "with/README.md").read_text()
    front = card.split("---\n")[1]
    assert "library_name" in front and "transformers" in front and "license" not in front
    assert "in 50 steps, starting at the weights of base," in card and "/home" not in card
    assert "Converted from other (llama)" in card
    for text in ("204,800 tokens in 50 steps", "| code | 75.0% |", "| math | 25.0% |"):
        assert text in card
    assert "| all | 1.5000 |" in card and "| code | 1.2500 |" in card and "9.0" not in card
    assert f"| {parameter_count(model):,} |" in card and "applied 2 times" in card
    other = (tmp_path / "without/README.md").read_text()
    assert "Training" not in other and "Held-out" not in other
    assert "trust_remote_code=True" in other and "trust_remote_code" not in card


def test_nothing_needs_torch_or_transformers():
    program = (
        "import importlib, sys\n"
        "programs = 'train prepare evaluate generate convert prune teach report'.split()\n"
        "for name in (*programs, 'interop.gguf', 'interop.gguf_reader'):\n"
        "    importlib.import_module(f'mobilellm_jax.{name}')\n"
        "others = {'gguf', 'torch', 'transformers', 'tokenizers', 'tensorflow'}\n"
        "print(sorted(others & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "changes, family, obstacle",
    [
        ({"qk_norm": "unit"}, "llama", r"its QK-norm is 'unit': hf-shared can"),
        ({}, "qwen3", "its QK-norm is 'none'"),
        ({}, "qwen2", "have no biases"),
        ({"qkv_bias": True}, "mistral", "have biases"),
        ({"out_bias": True}, "qwen2", "have no biases: hf-shared can"),
        ({"out_bias": True, "width": 50}, None, "mistral .* give has biases: hf-shared can"),
        ({"out_bias": True, "qk_norm": "unit"}, None, "qwen3 .* give has biases: hf-shared can"),
        ({"qkv_bias": True, "qk_norm": "scaled"}, None, "have biases: hf-shared can"),
        ({"qk_norm": "scaled"}, "llama4_text", "its QK-norm is 'scaled'"),
        ({"mlp": "relu"}, None, "its MLP is relu: hf-shared can"),
        ({"mlp": "relu"}, "llama4_text", "its MLP is relu"),
        ({"stacks": (Stack(1, 4, 2, 80), Stack(1, 4, 2, 96))}, None, "stacks differ"),
        ({"stacks": (Stack(1, 4, 2, 80), Stack(1, 2, 2, 80))}, None, "stacks differ"),
        (
            {"qk_norm": "unit", "stacks": (Stack(2, 4, 2, 80, 2), Stack(1, 4, 2, 80, rope=False))},
            "qwen3",
            "layer 4 has no positional embedding",
        ),
        ({"stacks": (Stack(1, 4, 2, 80, 2),), "ls_kv": "first_pass"}, None, "first_pass"),
        (
            {"block": "mobilellm_jax.model.transformer:Attention"},
            None,
            r"its block is .*Attention\.",
        ),
        ({"block": "mobilellm_jax.model.transformer:Attention"}, "hf_shared", "its block is"),
        ({"width": 50}, "llama", "50 is none of 4: mistral and hf-shared"),
        ({"vocab_size": V - 1}, None, f"{V} pieces and the model {V - 1}"),
        ({}, "gpt2", "family='gpt2' is not one of llama"),
    ],
)
def test_what_a_family_cannot_express_is_refused(changes, family, obstacle, tmp_path):
    model = changed(**changes)
    leaves = {"embedding": np.zeros((V, 48), np.float32)}
    with pytest.raises(UserError, match=obstacle):
        huggingface.export(leaves, model, tiny.tokenizer(), tmp_path / "out", family)
    assert not any(tmp_path.iterdir())


def test_a_larger_vocabulary_than_the_tokenizers_is_padding(tmp_path):
    model = changed(vocab_size=V + 30)
    exported(model, tmp_path / "out")
    assert load_stock(tmp_path / "out").get_input_embeddings().num_embeddings == V + 30


@pytest.mark.parametrize("value, dtype", [(np.nan, None), (np.inf, "bfloat16"), (1e30, "float16")])
def test_a_weight_that_is_not_finite_is_refused(value, dtype, tmp_path):
    leaves = random_leaves(SMALL)
    leaves["stack_0/mlp/up"][1, 2, 3] = value
    with pytest.raises(UserError, match="model.layers.1.mlp.up_proj.weight is not finite"):
        huggingface.export(leaves, SMALL, tiny.tokenizer(), tmp_path / "out", dtype=dtype)
    assert not any(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/notes.txt").write_text("mine")
    for out in (tmp_path / "folder", tmp_path / "folder/notes.txt"):
        with pytest.raises(UserError, match="not empty"):
            exported(SMALL, out)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "notes.txt"]


def test_an_interrupted_export_leaves_nothing(tmp_path):
    def interrupted(folder, _):
        assert any(folder.iterdir())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exported(SMALL, tmp_path / "out", write_weights=interrupted)
    assert not any(tmp_path.iterdir())
