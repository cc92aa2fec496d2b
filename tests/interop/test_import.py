"""A network that transformers wrote computes here what it computes there; what does not is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from weights import (
    DENSE,
    LLAMA4,
    NETWORKS,
    ROPE3,
    SHAPE,
    SMALL,
    assert_equal,
    changed,
    edit,
    ours,
    random_tokens,
    said,
    stock,
    theirs,
)

from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.hf_folder import open_folder
from mobilellm_jax.model.config import Stack

BETWEEN = {"no_rope_layers": [1, 0, 1], **DENSE}
# Family, configuration, what is then edited in config.json, and the network it must be.
FOREIGN = {
    "llama": ("llama", {}, {"head_dim": None}, SMALL),
    "llama, untied": (
        "llama",
        {
            "tie_word_embeddings": False,
            "num_hidden_layers": 2,
            "num_key_value_heads": 4,
            "intermediate_size": 48,
        },
        {"num_key_value_heads": None, "head_dim": None},
        NETWORKS["untied"],
    ),
    "llama, wide heads": (
        "llama",
        {
            **{"hidden_size": 24, "num_attention_heads": 6, "num_hidden_layers": 2, "head_dim": 16},
            **{"intermediate_size": 40, "rms_norm_eps": 1e-3},
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        },
        {},
        NETWORKS["wide heads, another theta and epsilon"],
    ),
    "llama 3": (
        "llama",
        {"rope_parameters": ROPE3 | {"rope_theta": 500.0}},
        {},
        NETWORKS["Llama 3.1's RoPE"],
    ),
    "llama 3, as transformers 4 wrote it": (
        "llama",
        {"rope_parameters": ROPE3 | {"rope_theta": 500.0}},
        {"rope_parameters": None, "rope_scaling": ROPE3, "rope_theta": 500.0},
        NETWORKS["Llama 3.1's RoPE"],
    ),
    "mistral": (
        "mistral",
        {"head_dim": 12, "num_attention_heads": 6, "num_key_value_heads": 2, "sliding_window": None}
        | {"hidden_size": 40, "tie_word_embeddings": False},
        {},
        changed(width=40, tied=False, stacks=(dataclasses.replace(SMALL.stacks[0], heads=6),)),
    ),
    "qwen2": ("qwen2", {"head_dim": 16, "tie_word_embeddings": False}, {}, NETWORKS["biases"]),
    "qwen2, tied": ("qwen2", {}, {}, changed(qkv_bias=True)),
    "qwen3": (
        "qwen3",
        {"head_dim": 12, "tie_word_embeddings": False},
        {},
        NETWORKS["scaled QK-norm"],
    ),
    "llama 4": (
        "llama4_text",
        {
            **DENSE,
            "no_rope_layers": [1, 1, 1],
            "rms_norm_eps": 1e-2,
            "attn_temperature_tuning": True,
        }
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
        {},
        LLAMA4["all RoPE"],
    ),
    "llama 4, NoPE": (
        "llama4_text",
        {**BETWEEN, "attn_temperature_tuning": False}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
        {},
        LLAMA4["NoPE between"],
    ),
    "llama 4, NoPE and a tuning that begins later": (
        "llama4_text",
        {**BETWEEN, "attn_temperature_tuning": True, "floor_scale": 65, "attn_scale": 9.0}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
        {},
        LLAMA4["NoPE between"],
    ),
    "llama 4, no QK-norm": (
        "llama4_text",
        {**DENSE, "no_rope_layers": [1, 1, 1], "use_qk_norm": False, "tie_word_embeddings": False}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}},
        {},
        LLAMA4["no QK-norm"],
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_logits_and_gradients(name, tmp_path):
    family, config, edits, model = FOREIGN[name]
    loaded = stock(family, **{**SHAPE, **config})
    loaded.save_pretrained(tmp_path)
    edit(tmp_path, **edits)
    folder, printed = said(open_folder, tmp_path)
    assert (folder.model, folder.family, printed) == (model, family, "")
    tokens_BT = random_tokens(model)
    assert_equal(ours(model, folder.leaves, tokens_BT), theirs(loaded, model, family, tokens_BT))


@pytest.mark.parametrize("mlp_bias", [False, True])
def test_biases_of_a_llama_that_do_something_must_have_a_place(mlp_bias, tmp_path):
    """Here queries, keys and values have biases, and attention and MLP in what they give."""
    torch = pytest.importorskip("torch")
    loaded = stock("llama", **SHAPE, attention_bias=True, mlp_bias=mlp_bias)
    names = ("gate_proj.bias", "up_proj.bias") if mlp_bias else ("o_proj.bias",)
    homeless = {n: p for n, p in loaded.named_parameters() if n.endswith(names)}
    assert len(homeless) == 3 * len(names)
    with torch.no_grad():
        for name in homeless:
            for p in homeless.values():
                p.zero_()
            homeless[name][-1] = 0.1
            loaded.save_pretrained(tmp_path)
            with pytest.raises(UserError, match=f"{name} is not all 0, and the network has no"):
                open_folder(tmp_path)
        homeless[name].zero_()
    loaded.save_pretrained(tmp_path)
    folder, printed = said(open_folder, tmp_path)
    model = changed(qkv_bias=True, out_bias=mlp_bias)
    assert (folder.model, folder.family, printed) == (model, "llama", "")
    tokens_BT = random_tokens(model)
    assert_equal(ours(model, folder.leaves, tokens_BT), theirs(loaded, model, "llama", tokens_BT))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen3", "llama4_text"])
def test_full_size(family, tmp_path):
    """The widths of MobileLLM-125M, and of MobileLLM-R1-140M."""
    torch = pytest.importorskip("torch")
    r1 = {"num_hidden_layers": 15, "vocab_size": 128_256, "intermediate_size": 2048}
    r1 |= {"intermediate_size_mlp": 2048, "moe_layers": [], "no_rope_layers": [1] * 15}
    config = SHAPE | {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    config |= {"num_hidden_layers": 30, "vocab_size": 32_000, "intermediate_size": 1536}
    config |= {"head_dim": 64, "max_position_embeddings": 2048}
    loaded = stock(family, **(config | r1 if family == "llama4_text" else config))
    with torch.no_grad():
        for name, p in loaded.named_parameters():
            if "norm" not in name:
                p.mul_(0.2)
    loaded.save_pretrained(tmp_path)
    folder = open_folder(tmp_path)
    tokens_BT = random_tokens(folder.model, rows=1, length=64)
    assert_equal(
        ours(folder.model, folder.leaves, tokens_BT),
        theirs(loaded, folder.model, family, tokens_BT),
    )


def test_temperature_tuning_that_would_be_felt_is_refused(tmp_path):
    """It begins at position floor_scale - 1, and so within a context of that length."""
    torch = pytest.importorskip("torch")
    config = {**SHAPE, **BETWEEN, "attn_temperature_tuning": True, "attn_scale": 9.0}
    tokens = torch.tensor(random_tokens(SMALL))
    logits = []
    for floor in (64, 65):
        loaded = stock("llama4_text", **config, floor_scale=floor)
        logits.append(loaded.eval()(tokens).logits.detach().numpy())
        loaded.save_pretrained(tmp_path / str(floor))
    np.testing.assert_array_equal(logits[0][:, :-1], logits[1][:, :-1])
    assert np.abs(logits[0][:, -1] - logits[1][:, -1]).max() > 1e-3
    open_folder(tmp_path / "65")
    with pytest.raises(UserError, match="attn_temperature_tuning=True describes a computation"):
        open_folder(tmp_path / "64")


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_in_any_kind_of_file_are_the_same(dtype, shards, tmp_path):
    torch = pytest.importorskip("torch")
    loaded = stock("llama", **SHAPE).to(getattr(torch, dtype))
    size = {"max_shard_size": "60KB"} if shards else {}
    loaded.save_pretrained(tmp_path / "safetensors", **size)
    plain = open_folder(tmp_path / "safetensors").leaves
    (tmp_path / "bin").mkdir()
    shutil.copy(tmp_path / "safetensors/config.json", tmp_path / "bin")
    state = {name: p for name, p in loaded.state_dict().items() if name != "lm_head.weight"}
    names = list(state)
    halves = [names[::2], names[1::2]] if shards else [names]
    files = [f"pytorch_model-{i}.bin" for i in range(2)] if shards else ["pytorch_model.bin"]
    for file, part in zip(files, halves, strict=True):
        torch.save({name: state[name] for name in part}, tmp_path / "bin" / file)
    if shards:
        places = {name: file for file, part in zip(files, halves, strict=True) for name in part}
        index = tmp_path / "bin/pytorch_model.bin.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
        assert len(list((tmp_path / "safetensors").glob("*.safetensors"))) > 2
    unpickled = open_folder(tmp_path / "bin").leaves
    assert set(plain) == set(unpickled)
    for path, leaf in plain.items():
        other = unpickled[path]
        assert leaf.dtype == other.dtype == np.dtype(dtype) and leaf.shape == other.shape
        assert leaf[:].tobytes() == other[:].tobytes()
        assert leaf[1:2].tobytes() == other[1:2].tobytes() == leaf[:][1:2].tobytes()
    query, at = plain["stack_0/attention/query"], (slice(1, 3), slice(5, 9), 2)
    np.testing.assert_array_equal(query[at], query[:][at])
    np.testing.assert_array_equal(query[-1], query[:][-1])


# --- The folders published with MobileLLM


def official(tmp_path, layers, **config):
    """Weights as they are published: a .bin that is right and safetensors that are not."""
    torch = pytest.importorskip("torch")
    loaded = stock("llama", **SHAPE | {"num_hidden_layers": layers})
    state = {name: p for name, p in loaded.state_dict().items() if name != "lm_head.weight"}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    torch.save(state, tmp_path / "pytorch_model.bin")
    wrong = {name: np.zeros(p.shape, np.float32) for name, p in state.items()}
    safetensors.numpy.save_file(wrong, tmp_path / "model.safetensors")
    raw = {
        **SHAPE,
        "num_hidden_layers": layers,
        "architectures": ["MobileLLMForCausalLM"],
        "model_type": "mobilellm",
        "auto_map": {"AutoModelForCausalLM": "modeling_mobilellm.MobileLLMForCausalLM"},
        "share_embedding": True,
        "layer_sharing": False,
        "tie_word_embeddings": False,
        "rope_theta": 10_000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "pretraining_tp": 1,
        "torch_dtype": "float16",
        "transformers_version": "4.41.2",
        **config,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return loaded


@pytest.mark.parametrize("model_type", ["mobilellm", "llama"])
def test_a_published_network(model_type, tmp_path):
    loaded = official(tmp_path, 3, model_type=model_type)
    folder = open_folder(tmp_path)
    assert (folder.model, folder.family) == (SMALL, "mobilellm")
    tokens_BT = random_tokens(SMALL)
    assert_equal(ours(SMALL, folder.leaves, tokens_BT), theirs(loaded, SMALL, "llama", tokens_BT))


def test_a_published_network_with_shared_layers(tmp_path):
    """It computes what the network computes in which every layer stands twice."""
    loaded = official(tmp_path, 2, layer_sharing=True)
    folder = open_folder(tmp_path)
    assert folder.model == changed(stacks=(Stack(2, 4, 2, 80, repeats=2),))
    twice = stock("llama", **SHAPE | {"num_hidden_layers": 4})
    state = loaded.state_dict()
    for name, p in twice.state_dict().items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(int(parts[2]) // 2)
        p.copy_(state[".".join(parts)])
    tokens_BT = random_tokens(SMALL)
    assert_equal(
        ours(folder.model, folder.leaves, tokens_BT),
        theirs(twice, folder.model, "llama", tokens_BT),
    )
    first = open_folder(tmp_path, ls_kv="first_pass")
    assert first.model == dataclasses.replace(folder.model, ls_kv="first_pass")


def test_a_published_network_needs_torch_and_says_so(tmp_path, monkeypatch):
    official(tmp_path, 2)
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UserError, match=r"pytorch_model.bin can only be read with torch: install"):
        open_folder(tmp_path)
